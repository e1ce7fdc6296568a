"""The tokens of one answer as text for clients, as they come: whole characters, stop strings, tool calls, scores.

    answer = Answer(tokenizer, stops=["\\n\\n"], tools=True)
    for piece in answer.feed(token): ...        # TextPiece(text, tokens) or ToolPiece(type, text)
    answer.stopped                              # a stop string was found: it and all after it are left out
    for piece in answer.finish(): ...           # the text that was held back
"""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from nanochat.tokenizer.stream import PartType, StreamDecoder


class ScoredToken(NamedTuple):
    """A token of an answer.

    Attributes:
        token: its id.
        start: where its text begins in the answer, in characters.
        logprob: its log-probability, if the request asked for it.
        top: the most likely tokens in its place, as (id, log-probability).
    """

    token: int
    start: int
    logprob: float | None = None
    top: list[tuple[int, float]] | None = None


class TextPiece(NamedTuple):
    """More text, and the tokens that begin in it."""

    text: str
    tokens: list[ScoredToken]


class ToolPiece(NamedTuple):
    """The text of a tool call ("python") or its result ("python_output") so far, from its beginning."""

    type: PartType
    text: str


Piece = TextPiece | ToolPiece


class StopStrings:
    """Find the first stop string in text that comes in pieces, cut anywhere.

    The first is the one that is complete first; of two that are complete at the same character, the longer one. Text is
    held back only while it may be the beginning of a stop string.
    """

    def __init__(self, stops: list[str]):
        self.stops = stops
        self.held = ""

    def feed(self, text: str) -> tuple[str, bool]:
        """Take more text. Return (the text that can be sent, whether a stop string follows it)."""
        text = self.held + text
        found = [(at + len(stop), at) for stop in self.stops if (at := text.find(stop)) >= 0]
        if found:
            self.held = ""
            return text[:min(found)[1]], True
        longest = max(map(len, self.stops), default=0)
        hold = next((n for n in range(min(longest - 1, len(text)), 0, -1)
                     if any(stop.startswith(text[-n:]) for stop in self.stops)), 0)
        self.held = text[len(text) - hold:]
        return text[:len(text) - hold], False

    def flush(self) -> str:
        """Return the text that is held back, and hold it no longer."""
        text, self.held = self.held, ""
        return text


@dataclass
class Answer:
    """The answer of one row.

    Args:
        tokenizer: of the model.
        stops: stop strings.
        tools: whether tool calls are parts of their own; otherwise their tokens are in the text by name.
        text: the text that was sent, without tool calls.
        parts: the same with tool calls, as the content of a message.
        scored_tokens: the tokens of `text`.
        stopped: whether a stop string was found.
        tokens: how many tokens were taken.
    """

    tokenizer: Any
    stops: list[str] = field(default_factory=list)
    tools: bool = True
    text: str = ""
    parts: list[dict[str, str]] = field(default_factory=list)
    scored_tokens: list[ScoredToken] = field(default_factory=list)
    stopped: bool = False
    tokens: int = 0

    def __post_init__(self) -> None:
        self._decoder = StreamDecoder(self.tokenizer) if self.tools else StreamDecoder(self.tokenizer, types=())
        self._search = StopStrings(self.stops)
        self._length = 0                            # characters of text decoded, with those held back
        self._pending: list[ScoredToken] = []       # tokens whose text was not sent

    def feed(self, token: int, logprob: float | None = None, top: list[tuple[int, float]] | None = None) -> list[Piece]:
        """Take the next token and return the pieces that can be sent."""
        if self.stopped:
            return []
        self.tokens += 1
        new = self._decoder.feed(token)
        if new.boundary:
            pieces = self._end_part(new.before, new.rest)
            if new.boundary == "start" and not self.stopped:
                self.parts.append({"type": self._decoder.part, "text": ""})
            return pieces
        text = new.rest + new.text
        if new.before != "text":
            return self._more_of_tool(text) if text else []
        self._pending.append(ScoredToken(token, self._length, logprob, top))
        return self._more_text(text)

    def finish(self) -> list[Piece]:
        """Return the pieces that were held back, after the last token."""
        return [] if self.stopped else self._end_part(self._decoder.part, self._decoder.finish())

    def _end_part(self, part: PartType, rest: str) -> list[Piece]:
        return self._more_text(rest, last=True) if part == "text" else self._more_of_tool(rest)

    def _more_of_tool(self, text: str) -> list[Piece]:
        part = self.parts[-1]
        part["text"] += text
        return [ToolPiece(part["type"], part["text"])]

    def _more_text(self, text: str, last: bool = False) -> list[Piece]:
        """Return the text that can be sent, with its tokens. last: nothing is held back, because the part ends."""
        self._length += len(text)
        text, self.stopped = self._search.feed(text)
        if last and not self.stopped:
            text += self._search.flush()
        end = len(self.text) + len(text)
        tokens = [token for token in self._pending if token.start < end or (last and not self.stopped)]
        self._pending = self._pending[len(tokens):]
        self.text += text
        self.scored_tokens += tokens
        if text:
            if not self.parts or self.parts[-1]["type"] != "text":
                self.parts.append({"type": "text", "text": ""})
            self.parts[-1]["text"] += text
        return [TextPiece(text, tokens)] if text or tokens else []


# ---------------------------------------------------------------------------------------------------------------------
# Log-probabilities

def token_bytes(tokenizer: Any, token: int, names: dict[int, str]) -> bytes:
    """Return the bytes of a token, of a special one its name. names: the special tokens."""
    return names[token].encode() if token in names else tokenizer.decode_bytes([token])


def finite(logprob: float | None) -> float | None:
    """Return a log-probability that JSON can hold, because JSON has no infinity."""
    return logprob if logprob is None else max(logprob, -9999.0)
