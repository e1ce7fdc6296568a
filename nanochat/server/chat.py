"""POST /v1/chat/completions: a conversation in, the assistant's answer out, at once or as it comes."""

from collections.abc import AsyncIterator
from typing import Any

from nanochat.server.answer import Answer, Entry, Text, Tool
from nanochat.server.protocol import ApiError, ChatRequest
from nanochat.server.serving import Finish, Run, Serving, Stream, finite, names_of, token_bytes
from nanochat.server.worker import ModelInfo
from nanochat.tokenizer import RustBPETokenizer


def fitting(messages: list[dict[str, Any]], tokenizer: RustBPETokenizer, context: int, reserve: int) -> tuple[list[int], int]:
    """Return (prompt, how many of the oldest questions and their answers are left out): so many that `reserve` tokens of the context are
    free behind the prompt; or all but the last question, where that does not do. A system message stays."""
    head = messages[:1] if messages[0]["role"] == "system" else []
    rest = messages[len(head):]

    def prompt(gone: int) -> list[int]:
        return tokenizer.render_for_completion({"messages": [*head, *rest[2 * gone:]]})

    least, most = 0, (len(rest) - 1) // 2
    while least < most:
        middle = (least + most) // 2
        if len(prompt(middle)) <= context - reserve:
            most = middle
        else:
            least = middle + 1
    return prompt(least), least


class Chat:
    """One request."""

    def __init__(self, serving: Serving, body: ChatRequest, info: ModelInfo, tokenizer: RustBPETokenizer):
        self.serving, self.body, self.info, self.tokenizer = serving, body, info, tokenizer
        self.names = names_of(tokenizer)
        self.dropped = 0

    async def start(self) -> Run:
        """Begin. Raises ApiError."""
        body, info, serving, tokenizer = self.body, self.info, self.serving, self.tokenizer
        asked = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
        wanted = serving.new_tokens(asked, serving.config.max_tokens, info)
        self.messages = messages = [message.plain() for message in body.messages]
        chars = sum(len(content if isinstance(content, str) else "".join(part["text"] for part in content))
                    for content in (message["content"] for message in messages))
        serving.check_length(chars, "messages")
        if messages[-1]["role"] != "user":
            raise ApiError("messages: the last message must be the user's: there is nothing to answer", param="messages")
        prompt = await serving.in_thread(chars, lambda: tokenizer.render_for_completion({"messages": messages}))
        reserve = min(wanted, info.context_length // 4)
        if body.drop_oldest and len(prompt) > info.context_length - reserve:
            prompt, self.dropped = await serving.in_thread(chars, lambda: fitting(messages, tokenizer, info.context_length, reserve))
        limit = min(wanted, serving.room(len(prompt), info, "messages"))
        first = next(message["content"] for message in messages if message["role"] == "user")
        self.run = Run(serving, info, tokenizer, [prompt], body, max_tokens=[limit], about=f"{info.id} {hash(str(first))}", tools=True,
                       logprobs=(body.top_logprobs or 0) if body.logprobs else None)
        return self.run

    # ---- at once

    async def answer(self) -> dict[str, Any]:
        """Wait for all of it, and return OpenAI's chat.completion."""
        run = self.run
        async for _ in run.pieces():
            pass
        self.log()
        return {**self._head("chat.completion"), "choices": [self._choice(i, answer) for i, answer in enumerate(run.answers)],
                "usage": run.usage, "nanochat": {"dropped_turns": self.dropped, "timings": run.timings}}

    def _choice(self, i: int, answer: Answer) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": answer.text, "refusal": None}
        used = any(part["type"] != "text" for part in answer.parts)
        return {"index": i, "message": message, "logprobs": self._logprobs(answer.entries), "finish_reason": self.run.finishes[i],
                **({"nanochat": {"parts": answer.parts}} if used else {})}

    # ---- as it comes

    async def stream(self) -> AsyncIterator[Any]:
        """Yield OpenAI's chat.completion.chunks."""
        run, shown = self.run, bool(self.body.tools_shown)
        usage = self.body.stream_options is not None and bool(self.body.stream_options.include_usage)
        head = {**self._head("chat.completion.chunk"), **({"usage": None} if usage else {})}

        def chunk(i: int, delta: dict, finish: str | None = None, entries: list[Entry] | None = None, extra: dict | None = None) -> dict:
            choice = {"index": i, "delta": delta, "logprobs": self._logprobs(entries), "finish_reason": finish}
            return {**head, "choices": [choice], **({"nanochat": extra} if extra else {})}

        for i in range(len(run.answers)):
            yield chunk(i, {"role": "assistant", "content": None, "refusal": None},
                        extra={"dropped_turns": self.dropped} if self.dropped and not i else None)
        async for i, piece in run.pieces():
            if isinstance(piece, Text):
                yield chunk(i, {"content": piece.text}, entries=piece.entries)
            elif isinstance(piece, Tool) and shown:
                yield chunk(i, {}, extra={"tool": piece._asdict()})
            elif isinstance(piece, Finish):
                yield chunk(i, {}, piece.reason, extra={"timings": run.timings} if all(run.finishes) else None)
        self.log()
        if usage:
            yield {**head, "choices": [], "usage": run.usage}
        yield b"[DONE]"

    # ---- both

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": f"chatcmpl-{self.run.id}", "object": kind, "created": self.run.created, "model": self.info.id,
                "system_fingerprint": f"{self.info.id}-{self.info.step}"}

    def _logprobs(self, entries: list[Entry] | None) -> dict[str, Any] | None:
        if not self.body.logprobs or entries is None:
            return None

        def one(token: int, logprob: float | None) -> dict[str, Any]:
            data = token_bytes(self.tokenizer, token, self.names)
            return {"token": data.decode(errors="replace"), "logprob": finite(logprob), "bytes": list(data)}

        return {"content": [{**one(entry.token, entry.logprob), "top_logprobs": [one(*pair) for pair in entry.top or []]}
                            for entry in entries], "refusal": None}

    def log(self) -> None:
        """Write it to the file of chats, if there is one."""
        self.serving.log({"route": "chat", "model": self.info.id, "messages": self.messages, "dropped_turns": self.dropped,
                          "answers": [answer.parts for answer in self.run.answers], "finish": self.run.finishes, "usage": self.run.usage})


async def chat(serving: Serving, body: ChatRequest) -> tuple[Chat, Stream | None]:
    """Begin a request; a Stream if it is to be streamed."""
    request = Chat(serving, body, *await serving.model(body.model))
    run = await request.start()
    return request, Stream(request.stream(), run) if body.stream else None
