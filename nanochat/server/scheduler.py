"""Continuous batching over one model: rows join and leave the running batch between any two decode steps.

    scheduler = Scheduler(engine, max_rows=16)
    scheduler.submit(RowRequest("a", prompt, max_tokens=64))
    while scheduler.busy:
        for event in scheduler.step():
            ...

A step is a bounded amount of work: prefill of some prompt tokens, in chunks, then one decode step of the running batch.
So a long prompt does not stall the rows that are being decoded. One thread owns a scheduler, and nothing in it blocks.

Decoding is batch-invariant: what a row gets does not depend on the rows beside it. Each prompt is prefilled alone, in
chunks that begin at multiples of `chunk`, whether the tokens before a chunk were computed or came from the prefix cache
(prefix_cache.py), and rows are decoded by a batch-invariant Batch. On a CPU the result is the one the row would have
alone, to the last bit; on a GPU up to rounding.
"""

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from nanochat.engine import Batch, Engine, Row, scored
from nanochat.errors import UserError
from nanochat.ragged import length_on
from nanochat.server.messages import Event, RowRequest, Scores
from nanochat.server.prefix_cache import PrefixCache

CHUNK = {"cpu": 64, "cuda": 256}  # prompt tokens of one prefill call; also the block size of the prefix cache
MAX_REPLAYS = 32  # finished answers that wait to be put into the prefix cache


class QueueFull(UserError):
    """The queue of waiting rows is full."""


@dataclass(eq=False, kw_only=True)
class ScheduledRow(Row):
    """A row with its place in the scheduler.

    Args:
        id: of its request.
        number: counts the rows as they arrive.
        deadline: the time.monotonic() at which it ends, finished or not; None for never.
        prompt_logprobs: whether log-probabilities of the prompt are wanted.
        prefill: the tokens to prefill: the prompt, and the tokens decoded so far if the row was preempted.
        prefilled: how many of them are done.
        started: whether its first prefill has begun.
        prompt_scores: of the prompt's tokens so far.
    """

    id: str
    number: int
    deadline: float | None
    prompt_logprobs: bool
    prefill: list[int]
    prefilled: int = 0
    started: bool = False
    prompt_scores: list[Scores] = field(default_factory=lambda: [(None, [])])


class Scheduler:
    """The rows of one model, from the queue through prefill and decoding to their end."""

    def __init__(self, engine: Engine, *, max_rows: int = 16, max_waiting: int = 64, prefix_bytes: int = 256 << 20,
                 chunk: int | None = None):
        """Make a scheduler without rows.

        Args:
            engine: the model and its tokenizer.
            max_rows: rows decoded together.
            max_waiting: rows that may wait in the queue.
            prefix_bytes: memory of the prefix cache; 0 for none.
            chunk: prompt tokens of one prefill call; None for the device's default.
        """
        self.engine, self.model = engine, engine.model
        self.context = self.model.config.sequence_len
        self.chunk = min(chunk or CHUNK.get(self.model.device.type, 256), self.context)
        self.max_rows, self.max_waiting = max_rows, max_waiting
        self.prefix = PrefixCache(self.chunk, prefix_bytes)
        self._batch = Batch(engine, batch_invariant=True)
        self._waiting: deque[ScheduledRow] = deque()
        self._prefilling: ScheduledRow | None = None
        self._replays: deque[list[int]] = deque(maxlen=MAX_REPLAYS)  # prompts with their answers, for the prefix cache
        self._rows: dict[str, ScheduledRow] = {}
        self._events: list[Event] = []
        self._buffer = None  # the cache of one row, for prefill
        self._owner = None   # the ScheduledRow, or the tokens of a replay, that the buffer holds
        self._logits = None  # (1, V), for the next token of the row in the buffer, once its prefill is done
        self._replayed = 0   # tokens of the replay in the buffer that are prefilled
        self._count = dict.fromkeys(("requests", "steps", "prompt_tokens", "cached_tokens", "generated_tokens",
                                     "prefix_lookups", "prefix_hits", "cancelled", "errors"), 0)

    # ---- called by the worker

    def submit(self, request: RowRequest, arrived: float | None = None) -> None:
        """Put a row into the queue.

        Args:
            request: the row.
            arrived: the time.monotonic() at which its timeout began to count; None for now.

        Raises:
            QueueFull: the queue is full.
            UserError: the request is not valid.
        """
        if request.id in self._rows:
            raise UserError(f"there is a request {request.id!r} already")
        if request.max_tokens < 1:
            raise UserError(f"max_tokens must be at least 1, not {request.max_tokens}")
        if len(request.prompt) + request.max_tokens > self.context:
            raise UserError(f"a prompt of {len(request.prompt):,} tokens and {request.max_tokens:,} new ones do not "
                            f"fit the model's {self.context:,}")
        if wrong := [token for token in request.prompt if not 0 <= token < self.model.config.vocab_size]:
            raise UserError(f"token {wrong[0]} is not in the vocabulary of {self.model.config.vocab_size:,}")
        if len(self._waiting) >= self.max_waiting and len(self._rows) >= self.max_rows:
            raise QueueFull(f"{len(self._waiting)} requests are waiting already; try again in a moment")
        deadline = None
        if request.timeout is not None:
            deadline = (time.monotonic() if arrived is None else arrived) + request.timeout
        row = ScheduledRow(
            request.prompt, request.max_tokens, request.settings, stops=request.stops, tools=request.tools,
            logprobs=request.logprobs, id=request.id, number=self._count["requests"], deadline=deadline,
            prompt_logprobs=request.prompt_logprobs, prefill=list(request.prompt))
        self._rows[row.id] = row
        self._waiting.append(row)
        self._count["requests"] += 1

    def cancel(self, id: str) -> None:
        """End a row in any state and free its slot at once. An unknown id does nothing."""
        if id in self._rows:
            self._count["cancelled"] += 1
            self._end(self._rows[id], "cancelled")

    @property
    def busy(self) -> bool:
        """Whether `step` has anything to do."""
        return bool(self._rows or self._events or self._replays)

    def step(self) -> list[Event]:
        """Prefill some prompt tokens, then decode one token for each running row; return what happened.

        With rows running, one chunk is prefilled, with none eight. If there is no row at all, a finished answer is put
        into the prefix cache.
        """
        now = time.monotonic()
        for row in [row for row in self._rows.values() if row.deadline is not None and now > row.deadline]:
            self._end(row, "timeout")
        budget = self.chunk if self._batch.rows else 8 * self.chunk
        while budget > 0 and (self._prefilling or self._waiting) and len(self._batch.rows) < self.max_rows:
            budget -= self._prefill()
        if self._batch.rows:
            self._decode()
        elif self._replays and not self._rows:
            self._replay()
        self._count["steps"] += 1
        events, self._events = self._events, []
        return events

    def stats(self) -> dict[str, float]:
        """Return the counts since the start, named ..._total, and the current values."""
        return {**{f"{name}_total": count for name, count in self._count.items()}, "running": len(self._batch.rows),
                "waiting": len(self._waiting) + bool(self._prefilling), "rows_max": self.max_rows,
                "prefix_bytes": self.prefix.nbytes, "prefix_blocks": len(self.prefix)}

    # ---- prefill

    @torch.inference_mode()
    def _prefill(self) -> int:
        """Prefill one chunk of a prompt and return its tokens' number. A row whose prompt is done joins the batch."""
        row = self._prefilling or self._waiting.popleft()
        self._prefilling = row
        try:
            if self._owner is not row:
                self._begin(row)
            tokens = self._prefill_chunk(row)
            if row.prefilled == len(row.prefill):
                self._batch.add_prefilled([row], self._buffer, self._logits, self.context, self._slots())
                self._prefilling = self._owner = None
            return tokens
        except torch.OutOfMemoryError:
            self._out_of_memory_in_prefill(row)
            return self.chunk

    def _slots(self) -> int:
        """Return the rows that the batch needs memory for."""
        return self.max_rows + -self.max_rows % self._batch.row_multiple

    def _begin(self, row: ScheduledRow) -> None:
        """Load the longest cached prefix of a row's tokens into the buffer."""
        row.prefilled = self._restore(row.prefill, look=not row.prompt_logprobs)
        self._owner = row
        if not row.started:
            row.started = True
            self._count["prefix_lookups"] += 1
            self._count["prefix_hits"] += row.prefilled > 0
            self._count["cached_tokens"] += row.prefilled
            self._count["prompt_tokens"] += len(row.prefill)
            self._events.append(Event(row.id, "started", cached=row.prefilled))

    def _restore(self, ids: Sequence[int], look: bool = True) -> int:
        """Load the longest cached prefix of ids, none without `look`, into the buffer; return its tokens' number."""
        if self._buffer is None:
            self._buffer = self.model.new_cache(1, self.context)
        return self.prefix.restore(ids if look else ids[:1], self._buffer)

    def _prefill_chunk(self, row: ScheduledRow) -> int:
        """Prefill the next chunk of a row's tokens; after the last one, self._logits (1, V) are for its next token."""
        ids, begin = row.prefill, row.prefilled
        end = min(begin + self.chunk, len(ids))
        # the last chunk of a prompt, on a GPU: few lengths
        T = length_on(self.model.device, end - begin, most=min(self.chunk, self.context - begin))
        chunk = torch.tensor([ids[begin:end] + [0] * (T - (end - begin))], device=self.model.device)
        counts = [end - begin] if T > end - begin else None
        if row.prompt_logprobs and row.logprobs is not None:
            logits = self.model(chunk, cache=self._buffer, counts=counts)[0, :end - begin]
            for i in range(begin, end):
                if len(row.prompt_scores) <= i + 1 < len(row.prompt):
                    row.prompt_scores.append(scored(logits[i - begin], ids[i + 1], row.logprobs))
            if end == len(ids) and not row.tokens:
                self._events.append(Event(row.id, "prompt", prompt_logprobs=row.prompt_scores))
            self._logits = logits[-1:]
        elif end < len(ids):
            self.model.hidden(chunk, self._buffer, counts)
        else:
            self._logits = self.model(chunk, cache=self._buffer, counts=counts, last_only=True)[:, -1]
        if end % self.chunk == 0:
            self.prefix.keep(ids[:end], self._buffer)
        row.prefilled = end
        return end - begin

    def _replay(self) -> None:
        """Prefill a chunk of a prompt with its answer: the next turn then finds both in the prefix cache.

        The state that decoding left is not kept, because it differs in the last bits from what prefill in chunks gives.
        """
        ids = self._replays[-1]
        try:
            with torch.inference_mode():
                if self._owner is not ids:
                    self._replayed, self._owner = self._restore([*ids, 0]), ids
                if self._replayed < len(ids):
                    self._replayed += self.chunk
                    chunk = ids[self._replayed - self.chunk:self._replayed]
                    self.model.hidden(torch.tensor([chunk], device=self.model.device), self._buffer)
                    self.prefix.keep(ids[:self._replayed], self._buffer)
            done = self._replayed == len(ids)
        except torch.OutOfMemoryError:
            self._free_memory()
            done = True
        if done:
            self._replays.pop()
            self._owner = None

    # ---- decoding

    def _decode(self) -> None:
        """Decode one token for each running row."""
        for row in self._batch.sample():
            self._count["generated_tokens"] += 1
            if row.ended != "stop":
                logprob, top = row.scores[-1] if row.scores else (None, None)
                self._events.append(Event(row.id, "token", row.tokens[-1], not row.mask[-1], logprob, top))
            if row.ended:
                whole = [*row.prompt, *row.tokens]
                whole = whole[:len(whole) // self.chunk * self.chunk]
                if self.prefix.max_bytes and len(whole) > len(row.prompt) and not self.prefix.holds(whole):
                    self._replays.append(whole)
                self._end(row, row.ended)
        try:
            self._batch.decode()
        except torch.OutOfMemoryError:
            self._out_of_memory_in_decode()

    def _end(self, row: ScheduledRow, finish: str, message: str = "") -> None:
        """Remove a row in any state and tell why it ended."""
        del self._rows[row.id]
        self._count["errors"] += finish == "error"
        if row is self._prefilling:
            self._prefilling = self._owner = None
        elif row in self._waiting:
            self._waiting.remove(row)
        else:
            self._batch.remove([row])
        self._events.append(Event(row.id, "ended", finish=finish, message=message))

    # ---- out of memory

    def _out_of_memory_in_prefill(self, row: ScheduledRow) -> None:
        """Free memory for another try: first the prefix cache, then half of the slots. Without either, end the row."""
        cached, self._prefilling = len(self.prefix), None
        self._waiting.appendleft(row)
        self._free_memory()
        if cached:
            return
        if not self._batch.rows and self.max_rows > 1:
            self.max_rows //= 2
            self._batch = Batch(self.engine, batch_invariant=True)
            return
        self._end(row, "error", "the server ran out of memory for this prompt; try a shorter one, or try again later")

    def _out_of_memory_in_decode(self) -> None:
        """End the newer half of the running rows and preempt the others: they are prefilled again from their tokens."""
        rows = sorted(self._batch.rows, key=lambda row: row.number)
        self._batch = Batch(self.engine, batch_invariant=True)
        self._free_memory()
        preempted = rows[:len(rows) // 2]
        self.max_rows = max(1, len(preempted))
        for row in reversed(preempted):
            row.prefill, row.prefilled = [*row.prompt, *row.tokens], 0
            self._waiting.appendleft(row)
        for row in rows[len(preempted):]:
            self._end(row, "error", "the server ran out of memory; try again later")

    def _free_memory(self) -> None:
        """Free all memory that does not belong to a running row."""
        self.prefix.clear()
        self._buffer = self._owner = self._logits = None
        self._replays.clear()
        if self.model.device.type == "cuda":
            torch.cuda.empty_cache()
