"""POST /v1/completions: the continuation of a text or of token ids, as one JSON object or as a stream.

Tools are off here.
"""

import secrets
from collections.abc import AsyncIterator
from typing import Any

from nanochat.server.answer import Answer, ScoredToken, TextPiece, finite, token_bytes
from nanochat.server.generation import Generation, PromptScores, RowFinished
from nanochat.server.messages import ModelInfo, Scores
from nanochat.server.protocol import ApiError, CompletionRequest
from nanochat.server.serving import Serving
from nanochat.server.stream import EventStream
from nanochat.tokenizer import RustBPETokenizer
from nanochat.tokenizer.stream import special_names


class TextCompletion:
    """One request to the endpoint."""

    def __init__(self, serving: Serving, body: CompletionRequest, info: ModelInfo, tokenizer: RustBPETokenizer):
        self.serving, self.body, self.info, self.tokenizer = serving, body, info, tokenizer
        self.id, self.n, self.names = secrets.token_hex(12), body.n or 1, special_names(tokenizer)

    async def start(self) -> None:
        """Tokenize the prompts and submit them as `self.generation`. Raises ApiError."""
        body, info, serving = self.body, self.info, self.serving
        defaults = serving.config.completion_defaults
        wanted = serving.new_tokens(body.max_tokens, defaults.max_tokens, info, least=0 if body.echo else 1)
        self.prompts = prompts = self._prompts()
        answers = len(prompts) * self.n
        if answers > serving.max_answers:
            raise ApiError(f"prompt: {len(prompts)} prompts and n of {self.n} are {answers} answers; the limit of a "
                           f"request is {serving.max_answers} (--max-n)", param="prompt" if len(prompts) > 1 else "n")
        chars = sum(len(prompt) for prompt in prompts if isinstance(prompt, str))
        serving.check_length(chars, "prompt")
        ids = await serving.tokenize(chars, lambda: [self._ids(prompt) for prompt in prompts])
        limits = [min(wanted, serving.room(len(prompt), info, "prompt")) for prompt in ids]
        self.echoes: list[Answer | None] = [None] * answers  # the prompt of each row, if the response begins with it
        prompt_logprobs = bool(body.echo) and body.logprobs is not None
        requests = body.row_requests(self.id, info, ids, limits, defaults, timeout=serving.config.timeout, tools=False,
                                     logprobs=body.logprobs, prompt_logprobs=prompt_logprobs)
        self.generation = Generation(serving, self.tokenizer, requests, n=self.n, stops=body.stops,
                                     affinity=f"{info.id} {hash(str(ids[0][:64]))}", prompt_only=wanted == 0)
        if body.echo and not prompt_logprobs:
            for i, request in enumerate(requests):
                self._echo(i, [(None, [])] * len(request.prompt))

    def _prompts(self) -> list[str | list[int]]:
        prompt = self.body.prompt
        if prompt is None or isinstance(prompt, str):
            return [prompt or ""]
        if not prompt:
            raise ApiError("prompt: the list is empty", param="prompt")
        return [prompt] if isinstance(prompt[0], int) else list(prompt)

    def _ids(self, prompt: str | list[int]) -> list[int]:
        if isinstance(prompt, str):
            return self.tokenizer.encode(prompt, prepend=self.tokenizer.get_bos_token_id())
        size = self.tokenizer.get_vocab_size()
        if not prompt:
            raise ApiError("prompt: a list of token ids is empty", param="prompt")
        if len(prompt) >= self.info.context_length:
            self.serving.room(len(prompt), self.info, "prompt")
        if wrong := [id for id in prompt if not 0 <= id < size]:
            raise ApiError(f"prompt: there is no token {str(wrong[0])[:40]}; ids are 0 to {size - 1}", param="prompt")
        return prompt

    def _echo(self, i: int, scores: list[Scores]) -> Answer:
        """Make the echo of row i's prompt, one score a token.

        It does not show the <|bos|> that was put before a text.
        """
        skip = int(isinstance(self.prompts[i // self.n], str))
        echo = self.echoes[i] = Answer(self.tokenizer, tools=False)
        for token, (logprob, top) in list(zip(self.generation.requests[i].prompt, scores))[skip:]:
            echo.feed(token, logprob, top)
        echo.finish()
        return echo

    async def answer(self) -> dict[str, Any]:
        """Wait for all tokens and return OpenAI's text_completion."""
        generation = self.generation
        async for i, piece in generation.pieces():
            if isinstance(piece, PromptScores):
                self._echo(i, piece.scores)
        self._log()
        return {**self._head(), "choices": [self._choice(i, answer) for i, answer in enumerate(generation.answers)],
                "usage": generation.usage, "nanochat": {"timings": generation.timings}}

    def _choice(self, i: int, answer: Answer) -> dict[str, Any]:
        echo = self.echoes[i]
        return {"index": i, "text": (echo.text if echo else "") + answer.text,
                "finish_reason": self.generation.finishes[i],
                "logprobs": self._logprobs(i, (echo.scored_tokens if echo else []), answer.scored_tokens)}

    async def stream(self) -> AsyncIterator[Any]:
        """Yield OpenAI's text_completion chunks as the tokens come."""
        generation, body = self.generation, self.body
        head = {**self._head(), **({"usage": None} if body.include_usage else {})}

        def chunk(i: int, text: str, logprobs: dict | None, finish: str | None = None,
                  extra: dict | None = None) -> dict:
            choice = {"index": i, "text": text, "logprobs": logprobs, "finish_reason": finish}
            return {**head, "choices": [choice], **({"nanochat": extra} if extra else {})}

        for i, echo in enumerate(self.echoes):
            if echo:
                yield chunk(i, echo.text, self._logprobs(i, echo.scored_tokens, []))
        async for i, piece in generation.pieces():
            if isinstance(piece, PromptScores):
                echo = self._echo(i, piece.scores)
                yield chunk(i, echo.text, self._logprobs(i, echo.scored_tokens, []))
            elif isinstance(piece, TextPiece):
                yield chunk(i, piece.text, self._logprobs(i, [], piece.tokens))
            elif isinstance(piece, RowFinished):
                yield chunk(i, "", None, piece.reason,
                            {"timings": generation.timings} if all(generation.finishes) else None)
        self._log()
        if body.include_usage:
            yield {**head, "choices": [], "usage": generation.usage}
        yield b"[DONE]"

    def _head(self) -> dict[str, Any]:
        return {"id": f"cmpl-{self.id}", "object": "text_completion", "created": self.generation.created,
                "model": self.info.id, "system_fingerprint": f"{self.info.id}-{self.info.step}"}

    def _logprobs(self, i: int, echoed: list[ScoredToken], tokens: list[ScoredToken]) -> dict[str, Any] | None:
        """Return the field `logprobs` for tokens of the echo and of the answer after it."""
        if self.body.logprobs is None:
            return None
        offset = len(self.echoes[i].text) if self.echoes[i] else 0
        scored = [*echoed, *(token._replace(start=token.start + offset) for token in tokens)]

        def top(token: ScoredToken) -> dict[str, float] | None:
            if token.logprob is None:
                return None
            most_likely = [*(token.top or []), (token.token, token.logprob)]
            return {self._name(id): finite(logprob) for id, logprob in most_likely}

        return {"tokens": [self._name(token.token) for token in scored],
                "token_logprobs": [finite(token.logprob) for token in scored],
                "top_logprobs": [top(token) for token in scored], "text_offset": [token.start for token in scored]}

    def _name(self, token: int) -> str:
        """Return a token as text. One that is not whole characters has OpenAI's form, bytes:\\xe3."""
        data = token_bytes(self.tokenizer, token, self.names)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def _log(self) -> None:
        self.serving.log({"route": "completions", "model": self.info.id, "prompt": self.prompts,
                          "finish": self.generation.finishes,
                          "answers": [answer.text for answer in self.generation.answers],
                          "usage": self.generation.usage})


async def completion(serving: Serving, body: CompletionRequest) -> tuple[TextCompletion, EventStream | None]:
    """Start a request. Return it, and its EventStream if it asks for a stream. Raises ApiError."""
    request = TextCompletion(serving, body, *await serving.model(body.model))
    await request.start()
    return request, EventStream(request.stream(), request.generation.close) if body.stream else None
