"""Tokens of an answer as text for clients, while they come: whole characters, stop strings, tool calls apart, log-probabilities.

    answer = Answer(tokenizer, stops=["\\n\\n"], tools=True)
    for piece in answer.feed(token): ...        # Text(text, entries) or Tool(type, text)
    answer.stopped                              # a stop string came: what is behind it is left out
    for piece in answer.finish(): ...           # what was held back
"""

import codecs
from dataclasses import dataclass, field
from typing import Any, NamedTuple

TOOL_STARTS = {"<|python_start|>": "python", "<|output_start|>": "python_output"}
TOOL_ENDS = {"<|python_end|>": "python", "<|output_end|>": "python_output"}


class Entry(NamedTuple):
    """A token and its log-probability; `start` is where its text begins in the answer, in characters."""

    token: int
    start: int
    logprob: float | None = None
    top: list[tuple[int, float]] | None = None


class Text(NamedTuple):
    """More text, and the tokens that begin in it."""

    text: str
    entries: list[Entry]


class Tool(NamedTuple):
    """What a tool was asked ("python") or said ("python_output"): the part's text from its start on, as far as it has come."""

    type: str
    text: str


Piece = Text | Tool


class StopStrings:
    """Finds the first stop string in text that comes in pieces, wherever the pieces are cut: the one that is complete first, of two that
    are complete at the same character the longer one. Holds text back only as long as it may be the beginning of one."""

    def __init__(self, stops: list[str]):
        self.stops = stops
        self.held = ""

    def feed(self, text: str) -> tuple[str, bool]:
        """Return (text that can go out, was that the last)."""
        text = self.held + text
        found = [(at + len(stop), at) for stop in self.stops if (at := text.find(stop)) >= 0]
        if found:
            self.held = ""
            return text[:min(found)[1]], True
        longest = max(map(len, self.stops), default=0)
        hold = next((n for n in range(min(longest - 1, len(text)), 0, -1) if any(stop.startswith(text[-n:]) for stop in self.stops)), 0)
        self.held = text[len(text) - hold:]
        return text[:len(text) - hold], False

    def flush(self) -> str:
        """What is held back."""
        text, self.held = self.held, ""
        return text


@dataclass
class Answer:
    """The text of one row. tools: tool calls are parts of their own, otherwise their tokens stand in the text by name."""

    tokenizer: Any
    stops: list[str] = field(default_factory=list)
    tools: bool = True
    text: str = ""                                    # what went out
    parts: list[dict[str, str]] = field(default_factory=list)     # and the tool calls between, as in a message
    entries: list[Entry] = field(default_factory=list)
    stopped: bool = False
    tokens: int = 0

    def __post_init__(self) -> None:
        self._names = {self.tokenizer.encode_special(name): name for name in self.tokenizer.get_special_tokens()}
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._search = StopStrings(self.stops)
        self._length = 0                              # characters of text decoded, held back ones included
        self._pending: list[Entry] = []               # tokens whose text has not gone out
        self._tool = ""                               # the type of the tool part that is being written

    def feed(self, token: int, logprob: float | None = None, top: list[tuple[int, float]] | None = None) -> list[Piece]:
        """Take one more token; return what can be shown."""
        if self.stopped:
            return []
        self.tokens += 1
        name = self._names.get(token)
        if self.tools and (name in TOOL_STARTS or (name in TOOL_ENDS and self._tool == TOOL_ENDS[name])):
            pieces = self.finish()
            self._tool = TOOL_STARTS.get(name, "")
            if self._tool and not self.stopped:
                self.parts.append({"type": self._tool, "text": ""})
            return pieces
        data = name.encode() if name is not None else self.tokenizer.decode_bytes([token])
        if self._tool:
            if text := self._decoder.decode(data):
                self.parts[-1]["text"] += text
                return [Tool(self._tool, self.parts[-1]["text"])]
            return []
        self._pending.append(Entry(token, self._length, logprob, top))
        return self._out(self._decoder.decode(data))

    def finish(self) -> list[Piece]:
        """No more tokens come, or none of this part: return what was held back."""
        if self.stopped:
            return []
        rest = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        if self._tool:
            self.parts[-1]["text"] += rest
            return [Tool(self._tool, self.parts[-1]["text"])]
        return self._out(rest, last=True)

    def _out(self, text: str, last: bool = False) -> list[Piece]:
        self._length += len(text)
        text, self.stopped = self._search.feed(text)
        if last and not self.stopped:
            text += self._search.flush()
        end = len(self.text) + len(text)
        going = [entry for entry in self._pending if entry.start < end or (last and not self.stopped)]
        self._pending = self._pending[len(going):]
        self.text += text
        self.entries += going
        if text:
            if not self.parts or self.parts[-1]["type"] != "text":
                self.parts.append({"type": "text", "text": ""})
            self.parts[-1]["text"] += text
        return [Text(text, going)] if text or going else []
