"""Continuous batching over one model: requests join and leave a running batch between any two tokens.

    scheduler = Scheduler(engine, max_rows=16)
    scheduler.submit(Request("a", prompt, max_tokens=64))
    while scheduler.busy:
        for event in scheduler.step():
            ...

A step is a bounded piece of work: some prompt tokens are taken in, in chunks, then every running row gets a token. So a long prompt
stalls nobody. It is one thread's; nothing in it waits.

What a request is answered does not depend on the others. A prompt is taken in by itself, in chunks that begin at multiples of `chunk`,
whether what came before was computed or kept (server/prefix.py); rows are decoded by an exact Batch. On a CPU that is bit for bit what the
request alone would give, on a GPU up to rounding.
"""

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from nanochat.engine import Batch, Engine, Row, scored
from nanochat.errors import UserError
from nanochat.sampling import Settings
from nanochat.server.messages import Event, Scores
from nanochat.server.prefix_cache import PrefixCache

CHUNK = {"cpu": 64, "cuda": 256}  # prompt tokens that one call of the model takes in; also the block of prefix reuse
WARM = 32  # finished conversations whose answers wait for being kept


class QueueFull(UserError):
    """As many requests wait as may."""


@dataclass
class Request:
    """What is asked: tokens that continue `prompt`, at most max_tokens; both together fit the model's context.

    stops: the tokens that close it, the engine's if None. tools: whether the calculator answers. logprobs: None, or how many of the
    likeliest tokens to tell beside each token's own log-probability; prompt_logprobs: of the prompt's tokens too. deadline: the
    time.monotonic() at which it ends, finished or not.
    """

    id: str
    prompt: list[int]
    max_tokens: int
    settings: Settings = Settings()
    tools: bool = True
    stops: tuple[int, ...] | None = None
    logprobs: int | None = None
    prompt_logprobs: bool = False
    deadline: float | None = None


@dataclass(eq=False)
class _Job:
    """A request on its way. ids: what its state has to hold, of which `at` tokens are taken in."""

    request: Request
    row: Row
    number: int
    ids: list[int]
    at: int = 0
    started: bool = False
    scores: list[Scores] = field(default_factory=lambda: [(None, [])])


class Scheduler:
    """The requests of one model. max_rows are decoded together, max_waiting wait; prefix_bytes: memory for what is kept of prompts."""

    def __init__(self, engine: Engine, *, max_rows: int = 16, max_waiting: int = 64, prefix_bytes: int = 256 << 20,
                 chunk: int | None = None):
        self.engine, self.model = engine, engine.model
        self.context = self.model.config.sequence_len
        self.chunk = min(chunk or CHUNK.get(self.model.device.type, 256), self.context)
        self.max_rows, self.max_waiting = max_rows, max_waiting
        self.prefix = PrefixCache(self.chunk, prefix_bytes)
        self._batch = Batch(engine, batch_invariant=True)
        self._waiting: deque[_Job] = deque()
        self._filling: _Job | None = None
        self._warming: deque[list[int]] = deque(maxlen=WARM)
        self._jobs: dict[str, _Job] = {}
        self._events: list[Event] = []
        self._buffer = self._holds = None  # the state of the prompt being taken in, and whose it is
        self._count = dict.fromkeys(("requests", "steps", "prompt_tokens", "cached_tokens", "generated_tokens", "prefix_lookups",
                                     "prefix_hits", "cancelled", "errors"), 0)

    # ---- from outside

    def submit(self, request: Request) -> None:
        """Take a request. Raises QueueFull where too many wait, UserError for one that cannot be."""
        if request.id in self._jobs:
            raise UserError(f"there is a request {request.id!r} already")
        if request.max_tokens < 1:
            raise UserError(f"max_tokens must be at least 1, not {request.max_tokens}")
        if len(request.prompt) + request.max_tokens > self.context:
            raise UserError(f"a prompt of {len(request.prompt):,} tokens and {request.max_tokens:,} new ones do not fit the model's "
                            f"{self.context:,}")
        if wrong := [token for token in request.prompt if not 0 <= token < self.model.config.vocab_size]:
            raise UserError(f"token {wrong[0]} is not in the vocabulary of {self.model.config.vocab_size:,}")
        if len(self._waiting) >= self.max_waiting and len(self._jobs) >= self.max_rows:
            raise QueueFull(f"{len(self._waiting)} requests are waiting already; try again in a moment")
        row = Row(request.prompt, request.max_tokens, request.settings, stops=request.stops, tools=request.tools,
                  logprobs=request.logprobs)
        job = _Job(request, row, self._count["requests"], list(request.prompt))
        row.name, self._jobs[request.id] = job, job
        self._waiting.append(job)
        self._count["requests"] += 1

    def cancel(self, id: str) -> None:
        """End a request, wherever it is; its row is free at once. One that is not there, or no longer, does nothing."""
        if id in self._jobs:
            self._count["cancelled"] += 1
            self._end(self._jobs[id], "cancelled")

    @property
    def busy(self) -> bool:
        """Is there anything to do?"""
        return bool(self._jobs or self._events or self._warming)

    def step(self) -> list[Event]:
        """Do a bounded piece of work and return what happened: prompt tokens in, then a token for every running row."""
        now = time.monotonic()
        for job in [job for job in self._jobs.values() if job.request.deadline is not None and now > job.request.deadline]:
            self._end(job, "timeout")
        rows = bool(self._batch.rows)
        budget = self.chunk if rows else 8 * self.chunk
        while budget > 0 and (self._filling or self._waiting) and len(self._batch.rows) < self.max_rows:
            budget -= self._fill()
        if self._batch.rows:
            self._decode()
        elif self._warming and not self._jobs:
            self._warm()
        self._count["steps"] += 1
        events, self._events = self._events, []
        return events

    def stats(self) -> dict[str, float]:
        """Counts since the start (…_total), and what is so now."""
        return {**{f"{name}_total": count for name, count in self._count.items()}, "running": len(self._batch.rows),
                "waiting": len(self._waiting) + bool(self._filling), "rows_max": self.max_rows, "prefix_bytes": self.prefix.nbytes,
                "prefix_blocks": len(self.prefix)}

    # ---- prompts

    @torch.inference_mode()
    def _fill(self) -> int:
        """Take in one chunk of a prompt; returns how many tokens that were. A row whose prompt is in joins the batch."""
        job = self._filling or self._waiting.popleft()
        self._filling = job
        try:
            if self._holds is not job:
                self._begin(job)
            took = self._chunk(job)
            if job.at == len(job.ids):
                self._batch.add_prefilled([job.row], self._buffer, self._logits, self.context, self._room())
                self._filling = self._holds = None
            return took
        except torch.OutOfMemoryError:
            self._make_room(job)
            return self.chunk

    def _room(self) -> int:
        """Rows that the batch needs memory for."""
        return self.max_rows + -self.max_rows % self._batch.row_multiple

    def _begin(self, job: _Job) -> None:
        """Let the buffer be what is kept of a job's prompt."""
        job.at = self._restore(job.ids, look=not job.request.prompt_logprobs)
        self._holds = job
        if not job.started:
            job.started = True
            self._count["prefix_lookups"] += 1
            self._count["prefix_hits"] += job.at > 0
            self._count["cached_tokens"] += job.at
            self._count["prompt_tokens"] += len(job.ids)
            self._events.append(Event(job.request.id, "started", cached=job.at))

    def _restore(self, ids: Sequence[int], look: bool = True) -> int:
        if self._buffer is None:
            self._buffer = self.model.new_cache(1, self.context)
        return self.prefix.restore(ids if look else ids[:1], self._buffer)

    def _chunk(self, job: _Job) -> int:
        """Take the next chunk of a job's prompt into the buffer; after the last one, the logits for the row's next token are there."""
        ids, begin = job.ids, job.at
        end = min(begin + self.chunk, len(ids))
        chunk = torch.tensor([ids[begin:end]], device=self.model.device)
        if job.request.prompt_logprobs and job.request.logprobs is not None:
            logits = self.model(chunk, cache=self._buffer)[0]
            for i in range(begin, end):
                if len(job.scores) <= i + 1 < len(job.request.prompt):
                    job.scores.append(scored(logits[i - begin], ids[i + 1], job.request.logprobs))
            if end == len(ids) and not job.row.tokens:
                self._events.append(Event(job.request.id, "prompt", prompt_logprobs=job.scores))
            self._logits = logits[-1:]
        elif end < len(ids):
            self.model.hidden(chunk, self._buffer)
        else:
            self._logits = self.model(chunk, cache=self._buffer, last_only=True)[:, -1]
        if end % self.chunk == 0:
            self.prefix.keep(ids[:end], self._buffer)
        job.at = end
        return end - begin

    def _warm(self) -> None:
        """With nothing else to do, keep the answers given too, so that a conversation goes on from there. In chunks as any prompt:
        the state that decoding left differs from it in the last bits."""
        ids = self._warming[-1]
        try:
            with torch.inference_mode():
                if self._holds is not ids:
                    self._at, self._holds = self._restore([*ids, 0]), ids
                if self._at < len(ids):
                    self._at += self.chunk
                    self.model.hidden(torch.tensor([ids[self._at - self.chunk:self._at]], device=self.model.device), self._buffer)
                    self.prefix.keep(ids[:self._at], self._buffer)
            done = self._at == len(ids)
        except torch.OutOfMemoryError:
            self._forget()
            done = True
        if done:
            self._warming.pop()
            self._holds = None

    # ---- tokens

    def _decode(self) -> None:
        """Give every running row a token, and get ready for the next."""
        for row in self._batch.sample():
            job, stopped = row.name, row.ended == "stop"
            self._count["generated_tokens"] += 1
            if not stopped:
                logprob, top = row.scores[-1] if row.scores else (None, None)
                self._events.append(Event(job.request.id, "token", row.tokens[-1], not row.mask[-1], logprob, top))
            if row.ended:
                whole = [*row.prompt, *row.tokens]
                whole = whole[:len(whole) // self.chunk * self.chunk]
                if self.prefix.max_bytes and len(whole) > len(row.prompt) and not self.prefix.holds(whole):
                    self._warming.append(whole)
                self._end(job, row.ended)
        try:
            self._batch.decode()
        except torch.OutOfMemoryError:
            self._shed()

    def _end(self, job: _Job, finish: str, message: str = "") -> None:
        """Take a job out, wherever it is."""
        del self._jobs[job.request.id]
        self._count["errors"] += finish == "error"
        if job is self._filling:
            self._filling = self._holds = None
        elif job in self._waiting:
            self._waiting.remove(job)
        else:
            self._batch.remove([job.row])
        self._events.append(Event(job.request.id, "ended", finish=finish, message=message))

    # ---- too little memory

    def _make_room(self, job: _Job) -> None:
        """After a prompt did not fit the memory: give up what is kept; then fewer rows; then this request."""
        kept, self._filling = len(self.prefix), None
        self._waiting.appendleft(job)
        self._forget()
        if kept:
            return
        if not self._batch.rows and self.max_rows > 1:
            self.max_rows //= 2
            self._batch = Batch(self.engine, batch_invariant=True)
            return
        self._end(job, "error", "the server ran out of memory for this prompt; try a shorter one, or try again later")

    def _shed(self) -> None:
        """After a step did not fit the memory: the newer half of the rows ends, the others are computed anew from their tokens."""
        jobs = sorted((row.name for row in self._batch.rows), key=lambda job: job.number)
        self._batch = Batch(self.engine, batch_invariant=True)
        self._forget()
        staying = jobs[:len(jobs) // 2]
        self.max_rows = max(1, len(staying))
        for job in reversed(staying):
            job.ids, job.at = [*job.request.prompt, *job.row.tokens], 0
            self._waiting.appendleft(job)
        for job in jobs[len(staying):]:
            self._end(job, "error", "the server ran out of memory; try again later")

    def _forget(self) -> None:
        """Let all memory go that is not a running row's."""
        self.prefix.clear()
        self._buffer = self._holds = self._logits = None
        self._warming.clear()
        if self.model.device.type == "cuda":
            torch.cuda.empty_cache()
