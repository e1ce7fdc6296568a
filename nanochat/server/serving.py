"""What all requests share: the server's configuration, models, tokenizers, limits, and log of chats."""

import asyncio
import json
import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from nanochat import request
from nanochat.errors import UserError
from nanochat.server.messages import ModelInfo, RowRequest
from nanochat.server.metrics import Metrics
from nanochat.server.pool import NoWorker, Pool, PoolFull, RequestGroup
from nanochat.server.protocol import ApiError
from nanochat.tokenizer import RustBPETokenizer

LONG_TEXT = 20_000  # characters from which on a prompt is tokenized in a thread

R = TypeVar("R")


@dataclass(frozen=True)
class ServerConfig:
    """The configuration of the HTTP process. The flags of scripts/chat_web.py say what the fields mean."""

    host: str = "127.0.0.1"
    port: int = 8000
    temperature: float = request.SERVER_CHAT.temperature
    top_k: int = request.SERVER_CHAT.top_k
    max_tokens: int = request.SERVER_CHAT.max_tokens
    max_n: int = request.MAX_ANSWERS
    max_chars: int = request.MAX_CHARS
    max_body_bytes: int = request.MAX_BODY_BYTES
    timeout: float = request.TIMEOUT_SECONDS
    shutdown_seconds: float = 10.0
    api_key: str = ""
    cors: str = ""
    allow_host: str = ""
    log_chats: str = ""

    @property
    def chat_defaults(self) -> request.Defaults:
        """What a chat request gets where it does not say."""
        return request.SERVER_CHAT._replace(temperature=self.temperature, top_k=self.top_k, max_tokens=self.max_tokens)

    @property
    def completion_defaults(self) -> request.Defaults:
        """What a completion request gets where it does not say."""
        return request.SERVER_COMPLETION._replace(temperature=self.temperature, top_k=self.top_k)


class Serving:
    """The state of the HTTP process."""

    def __init__(self, pool: Pool, config: ServerConfig):
        """Raises UserError if the file of chats cannot be written."""
        self.pool, self.config = pool, config
        self.metrics = Metrics(pool)
        self.draining = False  # whether the server ends, and takes no new requests
        self.groups: set[RequestGroup] = set()
        self._tokenizers: dict[str, RustBPETokenizer] = {}
        self._mean_seconds = 1.0
        if config.log_chats:
            try:
                self._append(None)
            except OSError as error:
                raise UserError(f"--log-chats: {config.log_chats} cannot be written to: {error.strerror}") from None

    async def model(self, name: str | None) -> tuple[ModelInfo, RustBPETokenizer]:
        """Return a model by its name, the default for None, and its tokenizer. Raises ApiError."""
        models = self.pool.models
        info = models.get(name) if name is not None else next((info for info in models.values() if info.default), None)
        if info is None:
            message = "there is no model"
            if name is not None:
                message += f" {name!r}; there are {', '.join(models)}"
            raise ApiError(message, 404, param="model", code="model_not_found")
        if info.tokenizer not in self._tokenizers:
            try:
                tokenizer = await asyncio.to_thread(RustBPETokenizer.from_directory, info.tokenizer)
            except UserError as error:
                raise ApiError(f"the tokenizer of {info.id} cannot be loaded", 500) from error
            self._tokenizers[info.tokenizer] = tokenizer
        return info, self._tokenizers[info.tokenizer]

    # ---- lengths

    def check_length(self, chars: int, param: str) -> None:
        """Raise ApiError for text that is too long to be tokenized."""
        if chars > self.config.max_chars:
            raise ApiError(f"{param}: {chars:,} characters; the limit is {self.config.max_chars:,} (--max-chars)",
                           param=param, code="context_length_exceeded")

    async def tokenize(self, chars: int, work: Callable[[], R]) -> R:
        """Return work(), which tokenizes so many characters; in a thread if it would hold up other requests.

        A UserError of it becomes an ApiError, because the client caused it.
        """
        try:
            return await asyncio.to_thread(work) if chars > LONG_TEXT else work()
        except UserError as error:
            raise ApiError(str(error)) from error

    def new_tokens(self, max_tokens: int | None, default: int, info: ModelInfo, least: int = 1) -> int:
        """Return how many new tokens a request wants at most. Raises ApiError if its max_tokens is out of range."""
        if max_tokens is not None and not least <= max_tokens <= info.context_length:
            raise ApiError(f"max_tokens is {max_tokens:,}; it must be from {least} to the model's context of "
                           f"{info.context_length:,}", param="max_tokens")
        return min(default, info.context_length) if max_tokens is None else max_tokens

    def room(self, length: int, info: ModelInfo, param: str) -> int:
        """Return how many tokens fit the context after a prompt of `length` tokens. Raises ApiError if none does."""
        if length >= info.context_length:
            what = "conversation" if param == "messages" else "prompt"
            raise ApiError(
                f"this {what} is {length:,} tokens long; the context of {info.id} is {info.context_length:,} tokens, "
                "and at least one must be left for the answer", param=param, code="context_length_exceeded")
        return info.context_length - length

    @property
    def max_answers(self) -> int:
        """Answers of one request at most."""
        return min(self.config.max_n, self.pool.capacity)

    def check_answers(self, n: int) -> None:
        """Raise ApiError for more answers to one prompt than the limit."""
        if n > self.max_answers:
            raise ApiError(f"n: {n} answers are asked for; the limit of a request is {self.max_answers} (--max-n)",
                           param="n")

    # ---- requests

    def submit(self, requests: list[RowRequest], affinity: str) -> RequestGroup:
        """Give rows to a worker. Raises ApiError, with status 429 if the queue is full."""
        if self.draining:
            raise self.shutting_down()
        try:
            group = self.pool.submit(requests, affinity)
        except PoolFull:
            raise self.too_many_requests() from None
        except NoWorker:
            raise ApiError("no worker is running at the moment; try again soon", 503,
                           headers={"Retry-After": "2"}) from None
        self.groups.add(group)
        return group

    def too_many_requests(self) -> ApiError:
        """Return the error of a request that finds the queue full.

        Retry-After is half the time that a full queue takes.
        """
        batches = self.pool.config.max_waiting / self.pool.config.max_rows + 1
        seconds = min(max(math.ceil(self._mean_seconds * batches / 2), 1), 30)
        return ApiError(f"{self.pool.rows} requests are being served or wait already; try again in {seconds} s", 429,
                        code="too_many_requests", headers={"Retry-After": str(seconds)})

    def shutting_down(self) -> ApiError:
        """Return the error of a request that a server at its end does not serve."""
        return ApiError("the server is shutting down", 503, headers={"Retry-After": "10"})

    def done(self, group: RequestGroup, seconds: float) -> None:
        """Close a request that took so many seconds."""
        group.close()
        self.groups.discard(group)
        self._mean_seconds += 0.1 * (min(seconds, 60.0) - self._mean_seconds)

    # ---- the log of chats

    def log(self, record: dict[str, Any]) -> None:
        """Write a line to the file of chats, if there is one.

        A full disk is reported in the terminal and fails no request.
        """
        if self.config.log_chats:
            try:
                self._append({"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), **record})
            except OSError as error:
                print(f"{self.config.log_chats} cannot be written to, a chat is missing there: {error}",
                      file=sys.stderr, flush=True)

    def _append(self, record: dict[str, Any] | None) -> None:
        handle = os.open(self.config.log_chats, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            if record is not None:
                os.write(handle, (json.dumps(record, ensure_ascii=False) + "\n").encode())
        finally:
            os.close(handle)
