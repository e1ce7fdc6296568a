"""What both endpoints share: the models and their tokenizers, what is allowed, and the run of one request's rows to its end."""

import asyncio
import json
import math
import os
import secrets
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from nanochat.errors import UserError
from nanochat.server.answer import Answer, Text, Tool
from nanochat.server.metrics import Metrics
from nanochat.server.pool import Busy, Down, Group, Pool
from nanochat.server.protocol import ApiError, Asked, to_bytes
from nanochat.server.worker import Ask, ModelInfo
from nanochat.tokenizer import RustBPETokenizer

LONG = 20_000      # characters from which on a prompt is made into tokens in a thread
GRACE = 5.0        # seconds a worker has to end a row whose time is over
PING = 10.0        # seconds of silence after which a stream shows that it lives

LEAST = 1e-5       # of top_p: a worker may take the smallest numbers there are for 0, which is none

R = TypeVar("R")


@dataclass(frozen=True)
class ServerConfig:
    """What a server allows, and what holds where a request does not say."""

    host: str = "127.0.0.1"
    port: int = 8000
    temperature: float = 0.8
    top_k: int = 50
    max_tokens: int = 512
    max_n: int = 32                # rows of one request
    max_chars: int = 200_000       # of one prompt or conversation
    max_body_bytes: int = 1 << 20
    timeout: float = 300.0         # seconds of one request
    shutdown_seconds: float = 10.0
    api_key: str = ""
    cors: str = ""                 # origins, with commas between
    allow_host: str = ""           # names, with commas between
    log_chats: str = ""


class Finish(NamedTuple):
    """A row has ended: "stop" or "length"."""

    reason: str


class Prompt(NamedTuple):
    """The log-probabilities of a row's prompt."""

    scores: list[tuple[float | None, list[tuple[int, float]]]]


class Serving:
    """A server's state."""

    def __init__(self, pool: Pool, config: ServerConfig):
        """Raises UserError where the file of chats cannot be written."""
        self.pool, self.config = pool, config
        self.metrics = Metrics(pool)
        self.draining = False
        self.groups: set[Group] = set()
        self._tokenizers: dict[str, RustBPETokenizer] = {}
        self._mean_seconds = 1.0
        if config.log_chats:
            try:
                self._append(None)
            except OSError as error:
                raise UserError(f"--log-chats: {config.log_chats} cannot be written to: {error.strerror}") from None

    async def model(self, name: str | None) -> tuple[ModelInfo, RustBPETokenizer]:
        """The model of a name, or the default, and its tokenizer. Raises ApiError."""
        models = self.pool.models
        info = models.get(name) if name is not None else next((info for info in models.values() if info.default), None)
        if info is None:
            raise ApiError(f"there is no model {name!r}; there are {', '.join(models)}" if name is not None else "there is no model", 404,
                           param="model", code="model_not_found")
        if info.tokenizer not in self._tokenizers:
            try:
                self._tokenizers[info.tokenizer] = await asyncio.to_thread(RustBPETokenizer.from_directory, info.tokenizer)
            except UserError as error:
                raise ApiError(f"the tokenizer of {info.id} cannot be loaded", 500) from error
        return info, self._tokenizers[info.tokenizer]

    def check_length(self, chars: int, param: str) -> None:
        """Refuse text that is too long to be looked at."""
        if chars > self.config.max_chars:
            raise ApiError(f"{param}: {chars:,} characters; the limit is {self.config.max_chars:,} (--max-chars)", param=param,
                           code="context_length_exceeded")

    async def in_thread(self, chars: int, work: Callable[[], R]) -> R:
        """Return work(); in a thread where it has so many characters to look at that others would wait. UserErrors are the client's."""
        try:
            return await asyncio.to_thread(work) if chars > LONG else work()
        except UserError as error:
            raise ApiError(str(error)) from error

    def new_tokens(self, asked: int | None, default: int, info: ModelInfo, least: int = 1) -> int:
        """How many new tokens a request wants at most."""
        if asked is not None and not least <= asked <= info.context_length:
            raise ApiError(f"max_tokens is {asked:,}; it must be from {least} to the model's context of {info.context_length:,}",
                           param="max_tokens")
        return min(default, info.context_length) if asked is None else asked

    def room(self, length: int, info: ModelInfo, param: str) -> int:
        """How many tokens fit behind a prompt of so many. Raises ApiError where none does."""
        if length >= info.context_length:
            what = "conversation" if param == "messages" else "prompt"
            raise ApiError(f"this {what} is {length:,} tokens long; the context of {info.id} is {info.context_length:,} tokens, and at "
                           "least one must be left for the answer", param=param, code="context_length_exceeded")
        return info.context_length - length

    def submit(self, asks: list[Ask], about: str) -> Group:
        """Hand rows to the workers. Raises ApiError: 429 where too many wait."""
        most = min(self.config.max_n, self.pool.capacity)
        if len(asks) > most:
            raise ApiError(f"n: {len(asks)} answers are asked for; the limit of a request is {most} (--max-n)", param="n")
        if self.draining:
            raise ApiError("the server is shutting down", 503, headers={"Retry-After": "10"})
        try:
            group = self.pool.submit(asks, about)
        except Busy:
            raise self.busy() from None
        except Down:
            raise ApiError("no worker is running at the moment; try again soon", 503, headers={"Retry-After": "2"}) from None
        self.groups.add(group)
        return group

    def busy(self) -> ApiError:
        """The error of one request too many."""
        ahead = self.pool.config.max_waiting / self.pool.config.max_rows + 1
        seconds = min(max(math.ceil(self._mean_seconds * ahead / 2), 1), 30)
        return ApiError(f"{self.pool.rows} requests are being served or wait already; try again in {seconds} s", 429,
                        code="too_many_requests", headers={"Retry-After": str(seconds)})

    def done(self, group: Group, seconds: float) -> None:
        """A request is over."""
        group.close()
        self.groups.discard(group)
        self._mean_seconds += 0.1 * (min(seconds, 60.0) - self._mean_seconds)

    def log(self, record: dict[str, Any]) -> None:
        """Write a line to the file of chats, where one was asked for. A full disk is told in the terminal; no answer fails for it."""
        if self.config.log_chats:
            try:
                self._append({"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), **record})
            except OSError as error:
                print(f"{self.config.log_chats} cannot be written to, a chat is missing there: {error}", file=sys.stderr, flush=True)

    def _append(self, record: dict[str, Any] | None) -> None:
        handle = os.open(self.config.log_chats, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            if record is not None:
                os.write(handle, (json.dumps(record, ensure_ascii=False) + "\n").encode())
        finally:
            os.close(handle)


class Run:
    """The rows of one request: n answers to each prompt. Row i is answer i % n to prompt i // n."""

    def __init__(self, serving: Serving, info: ModelInfo, tokenizer: RustBPETokenizer, prompts: list[list[int]], body: Asked, *,
                 max_tokens: list[int], about: str, tools: bool, logprobs: int | None = None, prompt_logprobs: bool = False):
        """max_tokens: new ones, of each prompt; with 0 a row is told nothing but the scores of its prompt. Raises ApiError."""
        config, self.n = serving.config, body.n or 1
        self.serving, self.info, self.prompts, self.began = serving, info, prompts, time.monotonic()
        seed = secrets.randbits(48) if body.seed is None else body.seed % 2 ** 64
        settings = {"temperature": config.temperature if body.temperature is None else body.temperature,
                    "top_k": min(config.top_k if body.top_k is None else body.top_k, 2 ** 31),
                    "top_p": None if body.top_p is None else max(body.top_p, LEAST),
                    "repetition_penalty": body.repetition_penalty or 1.0, "seed": seed}
        self.id, self.created, self.limits = secrets.token_hex(12), int(time.time()), max_tokens
        asks = [Ask(f"{self.id}-{i}", info, prompts[i // self.n], max(max_tokens[i // self.n], 1), {**settings, "sample": i % self.n},
                    tools=tools, logprobs=logprobs, prompt_logprobs=prompt_logprobs, seconds=config.timeout)
                for i in range(len(prompts) * self.n)]
        self.answers = [Answer(tokenizer, body.stops, tools) for _ in asks]
        self.finishes: list[str] = [""] * len(asks)
        self.cached: list[int] = [0] * len(asks)
        self.first = self.last = None                 # when the first and the last token came
        self._index = {ask.id: i for i, ask in enumerate(asks)}
        self._times: dict[int, list[float]] = {}      # of each row's first and last token
        self.group = serving.submit(asks, about)
        self._late = asyncio.get_running_loop().call_later(config.timeout + GRACE, self.group.end, "timeout", "")
        self._open = True

    def close(self) -> None:
        """It is over, or nobody listens any more: what still runs is cancelled."""
        if not self._open:
            return
        self._open = False
        self._late.cancel()
        self.serving.done(self.group, time.monotonic() - self.began)
        for i, (first, last) in self._times.items():
            if self.answers[i].tokens > 1:
                self.serving.metrics.per_token.observe((last - first) / (self.answers[i].tokens - 1))

    async def pieces(self) -> AsyncIterator[tuple[int, Text | Tool | Finish | Prompt]]:
        """Yield (row, what there is of it to show). Raises ApiError where a row fails; then all end."""
        async for event in self.group:
            i = self._index[event.id]
            if self.finishes[i]:
                continue
            answer = self.answers[i]
            if event.kind == "started":
                self.cached[i] = event.cached
            elif event.kind == "prompt":
                yield i, Prompt(event.prompt_logprobs)
            elif event.kind == "token":
                self.last = self.group.now
                if self.first is None:
                    self.first = self.last
                    self.serving.metrics.first_token.observe(self.first - self.began)
                self._times.setdefault(i, [self.last, 0.0])[1] = self.last
                if self.limits[i // self.n] > 0:
                    for piece in answer.feed(event.token, event.logprob, event.top):
                        yield i, piece
                if answer.stopped or self.limits[i // self.n] == 0:
                    yield self._finish(i, "stop" if answer.stopped else "length")
            elif event.finish in ("stop", "length"):
                for piece in answer.finish():
                    yield i, piece
                yield self._finish(i, event.finish)
            else:
                raise self._error(event.finish, event.message)

    def _finish(self, i: int, reason: str) -> tuple[int, Finish]:
        self.finishes[i] = reason
        self.group.cancel(f"{self.id}-{i}")  # where it has not ended by itself
        return i, Finish(reason)

    def _error(self, finish: str, message: str) -> ApiError:
        if finish == "timeout":
            return ApiError(f"the time limit of {self.serving.config.timeout:g} seconds is over", 503, code="timeout",
                            headers={"x-should-retry": "false"})
        if finish == "refused":
            return self.serving.busy()
        if finish == "shutdown":
            return ApiError("the server is shutting down", 503, headers={"Retry-After": "10"})
        return ApiError(message or "the server failed on this request", 500)

    @property
    def usage(self) -> dict[str, Any]:
        """Tokens in and out; each prompt counts once."""
        prompt, completion = sum(map(len, self.prompts)), sum(answer.tokens for answer in self.answers)
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion,
                "prompt_tokens_details": {"cached_tokens": sum(self.cached[::self.n])}}

    @property
    def timings(self) -> dict[str, Any]:
        """How fast it went, and how full the context is."""
        usage, seconds = self.usage, (self.last or 0) - (self.first or 0)
        return {"prompt_tokens": usage["prompt_tokens"], "cached_tokens": usage["prompt_tokens_details"]["cached_tokens"],
                "completion_tokens": usage["completion_tokens"],
                "first_token_seconds": None if self.first is None else round(self.first - self.began, 4),
                "tokens_per_second": round((usage["completion_tokens"] - 1) / seconds, 2) if seconds > 0 else None,
                "context_used": max(len(self.prompts[i // self.n]) + answer.tokens for i, answer in enumerate(self.answers)),
                "context_length": self.info.context_length}


# ---------------------------------------------------------------------------------------------------------------------
# Log-probabilities

def token_bytes(tokenizer: RustBPETokenizer, token: int, names: dict[int, str]) -> bytes:
    """The bytes a token stands for; a special one for its name."""
    return names[token].encode() if token in names else tokenizer.decode_bytes([token])


def names_of(tokenizer: RustBPETokenizer) -> dict[int, str]:
    """The special tokens."""
    return {tokenizer.encode_special(name): name for name in tokenizer.get_special_tokens()}


def finite(logprob: float | None) -> float | None:
    """JSON has no infinity."""
    return logprob if logprob is None else max(logprob, -9999.0)


# ---------------------------------------------------------------------------------------------------------------------
# Clients that go away

class Gone(Exception):
    """The client is no longer there."""


async def unless_gone(receive: Receive, work: Awaitable[R]) -> R:
    """Return what `work` does, which is cancelled when the client goes away; then raises Gone."""
    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    task, watcher = asyncio.ensure_future(work), asyncio.ensure_future(watch())
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise Gone
    finally:
        for future in (task, watcher):
            future.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await future


class Stream(Response):
    """Server-sent events, as `lines` gives them: JSON values, or bytes as they are. An ApiError becomes the last of them."""

    media_type = "text/event-stream"

    def __init__(self, lines: AsyncIterator[Any], run: Run):
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self.lines, self.run, self.silent = lines, run, True

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            with suppress(Gone):
                await unless_gone(receive, self._send(send))
        finally:
            self.run.close()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        pinger = asyncio.ensure_future(self._ping(send))
        try:
            async for line in self.lines:
                self.silent = False
                await self._line(send, line)
        except ApiError as error:
            await self._line(send, error.body)
        finally:
            pinger.cancel()
        await send({"type": "http.response.body", "body": b""})

    async def _ping(self, send: Send) -> None:
        while True:
            self.silent = True
            await asyncio.sleep(PING)
            if self.silent:
                await send({"type": "http.response.body", "body": b": still there\n\n", "more_body": True})

    @staticmethod
    async def _line(send: Send, line: Any) -> None:
        data = line if isinstance(line, bytes) else to_bytes(line)
        await send({"type": "http.response.body", "body": b"data: " + data + b"\n\n", "more_body": True})

