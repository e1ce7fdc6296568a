"""POST /v1/chat/completions: the assistant's answer to a conversation, as one JSON object or as a stream."""

import secrets
from collections.abc import AsyncIterator
from typing import Any

from nanochat.request import answer_reserve
from nanochat.server.answer import Answer, ScoredToken, TextPiece, ToolPiece, finite, token_bytes
from nanochat.server.generation import Generation, RowFinished
from nanochat.server.messages import ModelInfo
from nanochat.server.protocol import ApiError, ChatRequest
from nanochat.server.serving import Serving
from nanochat.server.stream import EventStream
from nanochat.tokenizer import RustBPETokenizer
from nanochat.tokenizer.stream import special_names


def without_oldest_turns(messages: list[dict[str, Any]], tokenizer: RustBPETokenizer, context: int,
                         reserve: int) -> tuple[list[int], int]:
    """Drop the oldest turns of a conversation until the prompt leaves `reserve` tokens of the context free.

    A turn is a question with its answer. A system message stays, and so does the last question, even if that is not
    enough.

    Args:
        messages: the conversation.
        tokenizer: of the model.
        context: tokens of the model's context.
        reserve: tokens to leave free.

    Returns:
        (prompt, number of turns dropped).
    """
    head = messages[:1] if messages[0]["role"] == "system" else []
    rest = messages[len(head):]

    def prompt(dropped: int) -> list[int]:
        return tokenizer.render_for_completion({"messages": [*head, *rest[2 * dropped:]]})

    least, most = 0, (len(rest) - 1) // 2
    while least < most:
        middle = (least + most) // 2
        if len(prompt(middle)) <= context - reserve:
            most = middle
        else:
            least = middle + 1
    return prompt(least), least


class ChatCompletion:
    """One request to the endpoint."""

    def __init__(self, serving: Serving, body: ChatRequest, info: ModelInfo, tokenizer: RustBPETokenizer):
        self.serving, self.body, self.info, self.tokenizer = serving, body, info, tokenizer
        self.id, self.names = secrets.token_hex(12), special_names(tokenizer)
        self.dropped_turns = 0

    async def start(self) -> None:
        """Render the conversation and submit it as `self.generation`. Raises ApiError."""
        body, info, serving, tokenizer = self.body, self.info, self.serving, self.tokenizer
        defaults = serving.config.chat_defaults
        max_tokens = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
        wanted = serving.new_tokens(max_tokens, defaults.max_tokens, info)
        self.messages = messages = [message.plain() for message in body.messages]
        chars = sum(len(content if isinstance(content, str) else "".join(part["text"] for part in content))
                    for content in (message["content"] for message in messages))
        serving.check_length(chars, "messages")
        if messages[-1]["role"] != "user":
            raise ApiError("messages: the last message must be the user's: there is nothing to answer",
                           param="messages")
        prompt = await serving.tokenize(chars, lambda: tokenizer.render_for_completion({"messages": messages}))
        reserve = answer_reserve(wanted, info.context_length)
        if body.drop_oldest and len(prompt) > info.context_length - reserve:
            prompt, self.dropped_turns = await serving.tokenize(
                chars, lambda: without_oldest_turns(messages, tokenizer, info.context_length, reserve))
        limit = min(wanted, serving.room(len(prompt), info, "messages"))
        serving.check_answers(body.n or 1)
        requests = body.row_requests(self.id, info, [prompt], [limit], defaults, timeout=serving.config.timeout,
                                     tools=True, logprobs=(body.top_logprobs or 0) if body.logprobs else None)
        first_question = next(message["content"] for message in messages if message["role"] == "user")
        self.generation = Generation(serving, tokenizer, requests, n=body.n or 1, stops=body.stops,
                                     affinity=f"{info.id} {hash(str(first_question))}")

    async def answer(self) -> dict[str, Any]:
        """Wait for all tokens and return OpenAI's chat.completion."""
        generation = self.generation
        async for _ in generation.pieces():
            pass
        self._log()
        return {**self._head("chat.completion"),
                "choices": [self._choice(i, answer) for i, answer in enumerate(generation.answers)],
                "usage": generation.usage,
                "nanochat": {"dropped_turns": self.dropped_turns, "timings": generation.timings}}

    def _choice(self, i: int, answer: Answer) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": answer.text, "refusal": None}
        used_tools = any(part["type"] != "text" for part in answer.parts)
        return {"index": i, "message": message, "logprobs": self._logprobs(answer.scored_tokens),
                "finish_reason": self.generation.finishes[i],
                **({"nanochat": {"parts": answer.parts}} if used_tools else {})}

    async def stream(self) -> AsyncIterator[Any]:
        """Yield OpenAI's chat.completion.chunks as the tokens come."""
        generation, body = self.generation, self.body
        head = {**self._head("chat.completion.chunk"), **({"usage": None} if body.include_usage else {})}

        def chunk(i: int, delta: dict, finish: str | None = None, tokens: list[ScoredToken] | None = None,
                  extra: dict | None = None) -> dict:
            choice = {"index": i, "delta": delta, "logprobs": self._logprobs(tokens), "finish_reason": finish}
            return {**head, "choices": [choice], **({"nanochat": extra} if extra else {})}

        for i in range(len(generation.answers)):
            yield chunk(i, {"role": "assistant", "content": None, "refusal": None},
                        extra={"dropped_turns": self.dropped_turns} if self.dropped_turns and not i else None)
        async for i, piece in generation.pieces():
            if isinstance(piece, TextPiece):
                yield chunk(i, {"content": piece.text}, tokens=piece.tokens)
            elif isinstance(piece, ToolPiece) and body.tools_shown:
                yield chunk(i, {}, extra={"tool": piece._asdict()})
            elif isinstance(piece, RowFinished):
                yield chunk(i, {}, piece.reason,
                            extra={"timings": generation.timings} if all(generation.finishes) else None)
        self._log()
        if body.include_usage:
            yield {**head, "choices": [], "usage": generation.usage}
        yield b"[DONE]"

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": f"chatcmpl-{self.id}", "object": kind, "created": self.generation.created, "model": self.info.id,
                "system_fingerprint": f"{self.info.id}-{self.info.step}"}

    def _logprobs(self, tokens: list[ScoredToken] | None) -> dict[str, Any] | None:
        if not self.body.logprobs or tokens is None:
            return None

        def one(token: int, logprob: float | None) -> dict[str, Any]:
            data = token_bytes(self.tokenizer, token, self.names)
            return {"token": data.decode(errors="replace"), "logprob": finite(logprob), "bytes": list(data)}

        return {"content": [{**one(scored.token, scored.logprob),
                             "top_logprobs": [one(*pair) for pair in scored.top or []]}
                            for scored in tokens], "refusal": None}

    def _log(self) -> None:
        self.serving.log({"route": "chat", "model": self.info.id, "messages": self.messages,
                          "dropped_turns": self.dropped_turns,
                          "answers": [answer.parts for answer in self.generation.answers],
                          "finish": self.generation.finishes, "usage": self.generation.usage})


async def chat(serving: Serving, body: ChatRequest) -> tuple[ChatCompletion, EventStream | None]:
    """Start a request. Return it, and its EventStream if it asks for a stream. Raises ApiError."""
    completion = ChatCompletion(serving, body, *await serving.model(body.model))
    await completion.start()
    return completion, EventStream(completion.stream(), completion.generation.close) if body.stream else None
