"""The rows of one HTTP request, from submission to the last token. Both endpoints use it."""

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any, NamedTuple

from nanochat.server.answer import Answer, Piece
from nanochat.server.messages import RowRequest, Scores
from nanochat.server.protocol import ApiError
from nanochat.server.serving import Serving
from nanochat.tokenizer import RustBPETokenizer

GRACE_SECONDS = 5.0  # a worker has them to end a row whose timeout is over, before the HTTP process ends it


class RowFinished(NamedTuple):
    """A row has ended. reason: "stop" or "length"."""

    reason: str


class PromptScores(NamedTuple):
    """The log-probabilities of a row's prompt."""

    scores: list[Scores]


class Generation:
    """The rows of one request: n answers to each prompt. Row i is answer i % n to prompt i // n."""

    def __init__(self, serving: Serving, tokenizer: RustBPETokenizer, requests: list[RowRequest], *, n: int,
                 stops: list[str], affinity: str, prompt_only: bool = False):
        """Submit the rows.

        Args:
            serving: the server.
            tokenizer: of the model.
            requests: the rows, all of one model.
            n: answers to each prompt.
            stops: stop strings.
            affinity: names the conversation, for Pool.submit.
            prompt_only: whether only the prompts' scores are wanted; the token that each row decodes is left out.

        Raises:
            ApiError: the request cannot be served.
        """
        self.serving, self.requests, self.n, self.prompt_only = serving, requests, n, prompt_only
        self.began, self.created = time.monotonic(), int(time.time())
        self.prompts = [request.prompt for request in requests[::n]]
        self.answers = [Answer(tokenizer, stops, request.tools) for request in requests]
        self.finishes: list[str] = [""] * len(requests)
        self.cached: list[int] = [0] * len(requests)
        self.first = self.last = None             # when the first and the last token arrived
        self._index = {request.id: i for i, request in enumerate(requests)}
        self._times: dict[int, list[float]] = {}  # when each row's first and last token arrived
        self.group = serving.submit(requests, affinity)
        late = serving.config.timeout + GRACE_SECONDS
        self._late = asyncio.get_running_loop().call_later(late, self.group.end, "timeout", "")
        self._open = True

    def close(self) -> None:
        """Cancel the rows that have not ended: the response is complete, or the client has disconnected."""
        if not self._open:
            return
        self._open = False
        self._late.cancel()
        self.serving.done(self.group, time.monotonic() - self.began)
        for i, (first, last) in self._times.items():
            if self.answers[i].tokens > 1:
                self.serving.metrics.per_token.observe((last - first) / (self.answers[i].tokens - 1))

    async def pieces(self) -> AsyncIterator[tuple[int, Piece | RowFinished | PromptScores]]:
        """Yield (row, piece of its answer) as they come. Raises ApiError if a row fails; the caller then closes all."""
        async for event in self.group:
            i = self._index[event.id]
            if self.finishes[i]:
                continue
            answer = self.answers[i]
            if event.kind == "started":
                self.cached[i] = event.cached
            elif event.kind == "prompt":
                yield i, PromptScores(event.prompt_logprobs)
            elif event.kind == "token":
                self.last = self.group.event_time
                if self.first is None:
                    self.first = self.last
                    self.serving.metrics.first_token.observe(self.first - self.began)
                self._times.setdefault(i, [self.last, 0.0])[1] = self.last
                if not self.prompt_only:
                    for piece in answer.feed(event.token, event.logprob, event.top):
                        yield i, piece
                if answer.stopped or self.prompt_only:
                    yield self._finish(i, "stop" if answer.stopped else "length")
            elif event.finish in ("stop", "length"):
                for piece in answer.finish():
                    yield i, piece
                yield self._finish(i, event.finish)
            else:
                raise self._error(event.finish, event.message)

    def _finish(self, i: int, reason: str) -> tuple[int, RowFinished]:
        self.finishes[i] = reason
        self.group.cancel(self.requests[i].id)  # after a stop string the worker does not know that it has ended
        return i, RowFinished(reason)

    def _error(self, finish: str, message: str) -> ApiError:
        if finish == "timeout":
            return ApiError(f"the time limit of {self.serving.config.timeout:g} seconds is over", 503, code="timeout",
                            headers={"x-should-retry": "false"})
        if finish == "refused":
            return self.serving.too_many_requests()
        if finish == "shutdown":
            return self.serving.shutting_down()
        return ApiError(message or "the server failed on this request", 500)

    @property
    def usage(self) -> dict[str, Any]:
        """The field `usage` of a response: tokens in and out; each prompt counts once."""
        prompt, completion = sum(map(len, self.prompts)), sum(answer.tokens for answer in self.answers)
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion,
                "prompt_tokens_details": {"cached_tokens": sum(self.cached[::self.n])}}

    @property
    def timings(self) -> dict[str, Any]:
        """The field `timings` of a response: how fast it was, and how full the context is."""
        usage, seconds = self.usage, (self.last or 0) - (self.first or 0)
        return {"prompt_tokens": usage["prompt_tokens"],
                "cached_tokens": usage["prompt_tokens_details"]["cached_tokens"],
                "completion_tokens": usage["completion_tokens"],
                "first_token_seconds": None if self.first is None else round(self.first - self.began, 4),
                "tokens_per_second": round((usage["completion_tokens"] - 1) / seconds, 2) if seconds > 0 else None,
                "context_used": max(len(request.prompt) + answer.tokens
                                    for request, answer in zip(self.requests, self.answers)),
                "context_length": self.requests[0].model.context_length}
