"""Tokens of an answer as text for people, while they come."""

import codecs

# control characters a model may write, shown instead of obeyed by the terminal; newline and tab stay
VISIBLE = {code: 0x2400 + code for code in range(32) if code not in (9, 10)} | {127: 0x2421} | {code: 0xFFFD for code in range(128, 160)}

TOOLS = ("<|python_start|>", "<|python_end|>", "<|output_start|>", "<|output_end|>")


class Shown:
    """Turns tokens into text to show, as they come: whole characters only, no control characters, tool calls in brackets, or left out."""

    def __init__(self, tokenizer, tools: bool = True):
        self.tokenizer, self.tools = tokenizer, tools
        self.names = {tokenizer.encode_special(name): name for name in tokenizer.get_special_tokens()}
        self._bytes = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._place = "text"  # or: call, called (its result may follow), result; hidden, where tool calls are left out

    def feed(self, token: int) -> str:
        """The text that one more token makes showable; "" while a character is not whole."""
        name = self.names.get(token)
        if self.tools or name not in TOOLS:
            return "" if self._place == "hidden" else self._feed(token)
        self._place = "hidden" if name.endswith("_start|>") else "text"
        return self._rest()

    def _feed(self, token: int) -> str:
        name = self.names.get(token)
        if name is None:
            text = self._bytes.decode(self.tokenizer.decode_bytes([token])).translate(VISIBLE)
            return self._closed() + text if self._place == "called" else text
        text = self._rest()
        if name == "<|python_start|>":
            text += self._closed() + "["
            self._place = "call"
        elif name == "<|python_end|>" and self._place == "call":
            self._place = "called"
        elif name == "<|output_start|>":
            text += " = " if self._place == "called" else self._closed() + "["
            self._place = "result"
        elif name == "<|output_end|>" and self._place == "result":
            text += self._closed()
        else:
            text += self._closed() + name  # it has no place there: seen for what it is
        return text

    def finish(self) -> str:
        """What is left when no more tokens come."""
        return self._rest() + (self._closed() if self.tools else "")

    def _rest(self) -> str:
        text = self._bytes.decode(b"", final=True)
        self._bytes.reset()
        return text

    def _closed(self) -> str:
        open_, self._place = self._place != "text", "text"
        return "]" if open_ else ""
