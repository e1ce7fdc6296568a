"""From the tokens of an answer, as they come, to text, tool calls and tool results.

    parser = PartParser(tokenizer)             # which part of the answer a token belongs to; decodes nothing
    decoder = StreamDecoder(tokenizer)         # the same, with the text of each part in whole characters
    text = TerminalText(tokenizer)             # text for a terminal: tool calls in brackets

An answer is text with tool calls in it: <|python_start|> ... <|python_end|> is a call ("python"), <|output_start|> ...
<|output_end|> a result ("python_output"). A model may write these special tokens anywhere, so each of them can also
stand where it has no meaning.
"""

import codecs
from typing import Literal, NamedTuple

PartType = Literal["text", "python", "python_output"]
Boundary = Literal["", "start", "end"]
ToolTokens = dict[int, tuple[PartType, Boundary]]

TOOL_TOKENS: dict[str, tuple[PartType, Boundary]] = {
    "<|python_start|>": ("python", "start"), "<|python_end|>": ("python", "end"),
    "<|output_start|>": ("python_output", "start"), "<|output_end|>": ("python_output", "end")}

# control characters that a model may write, as symbols, so that a terminal does not obey them; newline and tab stay
VISIBLE = {code: 0x2400 + code for code in range(32) if code not in (9, 10)}
VISIBLE |= {127: 0x2421} | {code: 0xFFFD for code in range(128, 160)}


def special_names(tokenizer) -> dict[int, str]:
    """Return the names of a tokenizer's special tokens by their ids."""
    return {tokenizer.encode_special(name): name for name in tokenizer.get_special_tokens()}


def tool_tokens(tokenizer, types: tuple[PartType, ...] = ("python", "python_output")) -> ToolTokens:
    """Return what PartParser needs to find parts of these types: what the special tokens begin or end, by their ids."""
    return {tokenizer.encode_special(name): (part, boundary)
            for name, (part, boundary) in TOOL_TOKENS.items() if part in types}


class PartParser:
    """Find the tool calls and their results in the tokens of one answer.

    A start token always begins a part, and so ends the one before it. An end token ends a part of its own type;
    elsewhere it belongs to the part in which it stands.

    Attributes:
        part: the type of the part that the next token belongs to.
        tokens: of the tool part that is being written or was written last, without its start and end.
    """

    def __init__(self, tool_tokens: ToolTokens):
        self.tool_tokens = tool_tokens
        self.part: PartType = "text"
        self.tokens: list[int] = []

    def feed(self, token: int) -> Boundary:
        """Take the next token.

        Return "start" or "end" if it begins or ends a tool part, "" if it belongs to the part it is in.
        """
        part, boundary = self.tool_tokens.get(token, ("", ""))
        if boundary == "start":
            self.part, self.tokens = part, []
        elif boundary == "end" and part == self.part:
            self.part = "text"
        else:
            boundary = ""
            if self.part != "text":
                self.tokens.append(token)
        return boundary


class Decoded(NamedTuple):
    """What one token adds to an answer.

    Attributes:
        boundary: whether the token begins or ends a tool part.
        before: the part that was being written when the token came.
        rest: the end of the text of that part: U+FFFD where a character was cut short by the token.
        text: more text of the part that the token belongs to; "" while a character is not whole.
        special: the name of a special token that is no boundary here; `text` is this name.
    """

    boundary: Boundary
    before: PartType
    rest: str
    text: str
    special: str


class StreamDecoder:
    """Decode the tokens of one answer into the text of its parts, in whole characters.

    types: the tool parts to find; the tokens of others are in the text by their names.
    """

    def __init__(self, tokenizer, types: tuple[PartType, ...] = ("python", "python_output")):
        self.tokenizer, self.parser = tokenizer, PartParser(tool_tokens(tokenizer, types))
        self.names = special_names(tokenizer)
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    @property
    def part(self) -> PartType:
        """The type of the part that the next token belongs to."""
        return self.parser.part

    def feed(self, token: int) -> Decoded:
        """Take the next token and return what it adds."""
        before = self.part
        boundary = self.parser.feed(token)
        name = self.names.get(token)
        if name is None:
            return Decoded("", before, "", self._utf8.decode(self.tokenizer.decode_bytes([token])), "")
        special = "" if boundary else name
        return Decoded(boundary, before, self.finish(), special, special)

    def finish(self) -> str:
        """Return the rest of the current part, U+FFFD for a character that was cut short."""
        rest = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return rest

    def leave_part(self) -> None:
        """End the tool part that is being written, as its end token would."""
        self.parser.part = "text"


class TerminalText:
    """Turn the tokens of one answer into text for people, as they come.

    Characters come whole, control characters are made visible. With tools, a call and its result are in brackets,
    [2+2 = 4]; without, they are left out.
    """

    def __init__(self, tokenizer, tools: bool = True):
        self.tools = tools
        self._decoder = StreamDecoder(tokenizer)
        self._bracket = ""  # "open", or "called": a call has ended, and its result may follow in the same bracket

    def feed(self, token: int) -> str:
        """Take the next token and return the text that it adds; "" while a character is not whole."""
        new = self._decoder.feed(token)
        return self._with_tools(new) if self.tools else self._without_tools(new)

    def finish(self) -> str:
        """Return the rest of the text, after the last token."""
        rest = self._decoder.finish()
        return rest + self._close() if self.tools else rest if self._decoder.part == "text" else ""

    def _with_tools(self, new: Decoded) -> str:
        if new.boundary == "start":
            joined = self._decoder.part == "python_output" and self._bracket == "called"
            opening = " = " if joined else self._close() + "["
            self._bracket = "open"
            return new.rest + opening
        if new.boundary == "end" and new.before == "python":
            self._bracket = "called"
            return new.rest
        if new.boundary == "end":
            return new.rest + self._close()
        if new.special:  # it has no meaning here: it ends an open call, so that everybody sees where it stands
            self._decoder.leave_part()
            return new.rest + self._close() + new.text
        return (self._close() if self._bracket == "called" else "") + new.text.translate(VISIBLE)

    def _without_tools(self, new: Decoded) -> str:
        rest = new.rest if new.before == "text" else ""
        if new.boundary:
            return rest
        if new.special in TOOL_TOKENS:  # an end without its start
            self._decoder.leave_part()
            return rest
        return rest + new.text.translate(VISIBLE) if self._decoder.part == "text" else ""

    def _close(self) -> str:
        bracket, self._bracket = self._bracket, ""
        return "]" if bracket else ""
