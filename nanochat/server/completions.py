"""POST /v1/completions: text or token ids in, how they go on out, at once or as it comes. Nothing is done for tools here."""

from collections.abc import AsyncIterator
from typing import Any

from nanochat.server.answer import Answer, Entry, Text
from nanochat.server.protocol import ApiError, CompletionRequest
from nanochat.server.serving import Finish, Prompt, Run, Serving, Stream, finite, names_of, token_bytes
from nanochat.server.worker import ModelInfo
from nanochat.tokenizer import RustBPETokenizer

MAX_TOKENS = 16  # OpenAI's default


class Completion:
    """One request."""

    def __init__(self, serving: Serving, body: CompletionRequest, info: ModelInfo, tokenizer: RustBPETokenizer):
        self.serving, self.body, self.info, self.tokenizer = serving, body, info, tokenizer
        self.names = names_of(tokenizer)

    async def start(self) -> Run:
        """Begin. Raises ApiError."""
        body, info, serving, tokenizer = self.body, self.info, self.serving, self.tokenizer
        wanted = serving.new_tokens(body.max_tokens, MAX_TOKENS, info, least=0 if body.echo else 1)
        prompts = self._prompts()
        most = min(serving.config.max_n, serving.pool.capacity)
        if len(prompts) * (body.n or 1) > most:
            raise ApiError(f"prompt: {len(prompts)} prompts and n of {body.n or 1} are {len(prompts) * (body.n or 1)} answers; "
                           f"the limit of a request is {most} (--max-n)", param="prompt" if len(prompts) > 1 else "n")
        chars = sum(len(prompt) for prompt in prompts if isinstance(prompt, str))
        serving.check_length(chars, "prompt")
        ids = await serving.in_thread(chars, lambda: [self._ids(prompt) for prompt in prompts])
        limits = [min(wanted, serving.room(len(prompt), info, "prompt")) for prompt in ids]
        self.echo: list[Answer | None] = [None] * (len(prompts) * (body.n or 1))  # the prompt's text and tokens, where it is told
        self.given = prompts
        scored = bool(body.echo) and body.logprobs is not None
        self.run = Run(serving, info, tokenizer, ids, body, max_tokens=limits, about=f"{info.id} {hash(str(ids[0][:64]))}", tools=False,
                       logprobs=body.logprobs, prompt_logprobs=scored)
        if body.echo and not scored:
            for i in range(len(self.echo)):
                self._echo(i, [(None, [])] * len(ids[i // self.run.n]))
        return self.run

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

    def _echo(self, i: int, scores: list[tuple[float | None, list[tuple[int, float]]]]) -> Answer:
        """What is told of the prompt of a row. The <|bos|> before a text is not."""
        skip = int(isinstance(self.given[i // self.run.n], str))
        told = self.echo[i] = Answer(self.tokenizer, tools=False)
        for token, (logprob, top) in list(zip(self.run.prompts[i // self.run.n], scores))[skip:]:
            told.feed(token, logprob, top)
        told.finish()
        return told

    # ---- at once

    async def answer(self) -> dict[str, Any]:
        """Wait for all of it, and return OpenAI's text_completion."""
        run = self.run
        async for i, piece in run.pieces():
            if isinstance(piece, Prompt):
                self._echo(i, piece.scores)
        self.log()
        return {**self._head(), "choices": [self._choice(i, answer) for i, answer in enumerate(run.answers)], "usage": run.usage,
                "nanochat": {"timings": run.timings}}

    def _choice(self, i: int, answer: Answer) -> dict[str, Any]:
        echo = self.echo[i]
        return {"index": i, "text": (echo.text if echo else "") + answer.text, "finish_reason": self.run.finishes[i],
                "logprobs": self._logprobs(i, (echo.entries if echo else []), answer.entries)}

    # ---- as it comes

    async def stream(self) -> AsyncIterator[Any]:
        """Yield OpenAI's text_completion chunks."""
        run = self.run
        usage = self.body.stream_options is not None and bool(self.body.stream_options.include_usage)
        head = {**self._head(), **({"usage": None} if usage else {})}

        def chunk(i: int, text: str, logprobs: dict | None, finish: str | None = None, extra: dict | None = None) -> dict:
            choice = {"index": i, "text": text, "logprobs": logprobs, "finish_reason": finish}
            return {**head, "choices": [choice], **({"nanochat": extra} if extra else {})}

        for i, echo in enumerate(self.echo):
            if echo:
                yield chunk(i, echo.text, self._logprobs(i, echo.entries, []))
        async for i, piece in run.pieces():
            if isinstance(piece, Prompt):
                echo = self._echo(i, piece.scores)
                yield chunk(i, echo.text, self._logprobs(i, echo.entries, []))
            elif isinstance(piece, Text):
                yield chunk(i, piece.text, self._logprobs(i, [], piece.entries))
            elif isinstance(piece, Finish):
                yield chunk(i, "", None, piece.reason, {"timings": run.timings} if all(run.finishes) else None)
        self.log()
        if usage:
            yield {**head, "choices": [], "usage": run.usage}
        yield b"[DONE]"

    # ---- both

    def _head(self) -> dict[str, Any]:
        return {"id": f"cmpl-{self.run.id}", "object": "text_completion", "created": self.run.created, "model": self.info.id,
                "system_fingerprint": f"{self.info.id}-{self.info.step}"}

    def _logprobs(self, i: int, echoed: list[Entry], entries: list[Entry]) -> dict[str, Any] | None:
        """Of tokens of the prompt, and of the answer behind it."""
        if self.body.logprobs is None:
            return None
        behind = len(self.echo[i].text) if self.echo[i] else 0
        told = [*echoed, *(entry._replace(start=entry.start + behind) for entry in entries)]
        return {"tokens": [self._name(entry.token) for entry in told], "token_logprobs": [finite(entry.logprob) for entry in told],
                "top_logprobs": [None if entry.logprob is None else {self._name(id): finite(logprob) for id, logprob in
                                                                     [*(entry.top or []), (entry.token, entry.logprob)]} for entry in told],
                "text_offset": [entry.start for entry in told]}

    def _name(self, token: int) -> str:
        """A token as text; one that is no whole text as OpenAI shows it: bytes:\\xe3."""
        data = token_bytes(self.tokenizer, token, self.names)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def log(self) -> None:
        """Write it to the file of chats, if there is one."""
        self.serving.log({"route": "completions", "model": self.info.id, "prompt": self.given, "finish": self.run.finishes,
                          "answers": [answer.text for answer in self.run.answers], "usage": self.run.usage})


async def completion(serving: Serving, body: CompletionRequest) -> tuple[Completion, Stream | None]:
    """Begin a request; a Stream if it is to be streamed."""
    request = Completion(serving, body, *await serving.model(body.model))
    run = await request.start()
    return request, Stream(request.stream(), run) if body.stream else None
