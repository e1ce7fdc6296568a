"""Reads the one pickle the project must read, a `tiktoken.Encoding` (tokenizer.pkl), without unpickling.

A pickle is a program. This is a machine for the dozen instructions that an Encoding's pickle consists of (protocols 0 to 5):
strings, bytes, whole numbers, dicts, and names out of a fixed list. A name stands for itself here and is never looked up,
imported or called, so no file can run anything; any other instruction or name is refused. The outcome is plain data, which
nanochat/tokenizer/tokenizer.py checks before it builds an Encoding from it.
"""

import pickletools
from typing import Any

from nanochat.errors import UserError


class _Name:
    """A name from the list. Inert: it can be neither called nor filled."""

    def __init__(self, shown: str):
        self.shown = shown


ENCODING, RECONSTRUCTOR, OBJECT, BYTES, ENCODE = map(_Name, ("Encoding", "_reconstructor", "object", "bytes", "encode"))
NAMES = {
    ("tiktoken.core", "Encoding"): ENCODING,
    # protocols 0 and 1 make an object through these two, protocols 0 to 2 spell bytes through the other two
    ("copy_reg", "_reconstructor"): RECONSTRUCTOR, ("copyreg", "_reconstructor"): RECONSTRUCTOR,
    ("__builtin__", "object"): OBJECT, ("builtins", "object"): OBJECT,
    ("__builtin__", "bytes"): BYTES, ("builtins", "bytes"): BYTES,
    ("_codecs", "encode"): ENCODE,
}
CONSTANTS = {"UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8",
             "INT", "LONG", "BININT", "BININT1", "BININT2", "LONG1", "LONG4", "NONE"}
TUPLE_SIZES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
MARK = _Name("mark")


class _Made:
    """Where an Encoding would have been made: holds the state it would have been given."""

    state: dict | None = None


class _Refused(Exception):
    pass


def encoding_state(blob: bytes, where: str) -> dict[str, Any]:
    """Return the state (a dict of plain values, not yet checked) of the tiktoken Encoding pickled in `blob`.

    Raises UserError, naming `where` and what was found, for anything that is not such a pickle. Time and memory are
    proportional to the size of `blob`.
    """
    try:
        return _Machine(blob).run()
    except _Refused as error:
        raise UserError(f"{where} is refused: {error}. A tokenizer.pkl holds a pickled tiktoken Encoding and nothing else; "
                        "do not open this file with anything that unpickles it.") from None
    except Exception as error:  # whatever reading a torn or foreign file comes to: short stacks, bad text, missing memo entries
        raise UserError(f"{where} is not a pickled tiktoken Encoding, or damaged ({type(error).__name__}: {str(error)[:200]}). "
                        "Fetch it again, or train a tokenizer with: python -m scripts.tok_train") from None


class _Machine:
    def __init__(self, blob: bytes):
        self.blob, self.stack, self.memo = blob, [], {}
        self.encodable = len(blob)  # a string named again and again through the memo must not multiply into gigabytes of bytes

    def run(self) -> dict[str, Any]:
        for opcode, argument, position in pickletools.genops(self.blob):
            self.step(opcode.name, argument)
            if opcode.name == "STOP" and position != len(self.blob) - 1:
                raise _Refused(f"it goes on for {len(self.blob) - 1 - position} bytes behind its end")
        made = self.pop()
        if self.stack or not isinstance(made, _Made):
            raise _Refused(f"it holds {_kind(made)}, not an Encoding")
        if made.state is None:
            raise _Refused("its Encoding is empty")
        return made.state

    def pop(self) -> Any:
        value = self.stack.pop()
        if value is MARK:
            raise _Refused("its instructions are out of order")
        return value

    def pop_to_mark(self) -> list:
        at = len(self.stack) - 1
        while at >= 0 and self.stack[at] is not MARK:
            at -= 1
        if at < 0:
            raise _Refused("its instructions are out of order")
        values = self.stack[at + 1:]
        del self.stack[at:]
        return values

    def step(self, name: str, argument: Any) -> None:
        stack = self.stack
        if name in CONSTANTS:
            stack.append(argument)
        elif name == "MEMOIZE":
            self.memo[len(self.memo)] = self.top()
        elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
            self.memo[argument] = self.top()
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(self.memo[argument])
        elif name == "MARK":
            stack.append(MARK)
        elif name in TUPLE_SIZES:
            values = [self.pop() for _ in range(TUPLE_SIZES[name])]
            stack.append(tuple(reversed(values)))
        elif name == "TUPLE":
            stack.append(tuple(self.pop_to_mark()))
        elif name == "EMPTY_DICT":
            stack.append({})
        elif name == "DICT":
            pairs = self.pop_to_mark()
            stack.append({})
            self.fill(pairs)
        elif name == "SETITEM":
            value, key = self.pop(), self.pop()
            self.fill([key, value])
        elif name == "SETITEMS":
            self.fill(self.pop_to_mark())
        elif name == "GLOBAL":
            module, _, attribute = argument.partition(" ")
            stack.append(self.named(module, attribute))
        elif name == "STACK_GLOBAL":
            attribute, module = self.pop(), self.pop()
            stack.append(self.named(module, attribute))
        elif name in ("NEWOBJ", "REDUCE"):
            arguments, function = self.pop(), self.pop()
            stack.append(self.made(name, function, arguments))
        elif name == "BUILD":
            state, made = self.pop(), self.top()
            self.build(made, state)
        elif name not in ("PROTO", "FRAME", "STOP"):
            raise _Refused(f"it uses the pickle instruction {name}, which no Encoding needs")

    def top(self) -> Any:
        self.stack.append(value := self.pop())
        return value

    def fill(self, pairs: list) -> None:
        target = self.top()
        if type(target) is not dict or len(pairs) % 2:
            raise _Refused("its instructions are out of order")
        for key, value in zip(pairs[::2], pairs[1::2]):
            if type(key) not in (str, bytes):
                raise _Refused(f"{_kind(key)} stands where text or bytes should be")
            target[key] = value

    def named(self, module: Any, attribute: Any) -> _Name:
        if type(module) is not str or type(attribute) is not str:
            raise _Refused(f"it asks for the name {_kind(attribute)} of {_kind(module)}")
        if (module, attribute) not in NAMES:
            raise _Refused(f"it asks for {module[:60]}.{attribute[:60]}")
        return NAMES[module, attribute]

    def made(self, instruction: str, function: Any, arguments: Any) -> Any:
        """Return what an allowed construction stands for."""
        arguments = list(arguments) if type(arguments) is tuple else None
        if instruction == "NEWOBJ":
            if function is ENCODING and arguments == []:
                return _Made()
        elif function is RECONSTRUCTOR and arguments == [ENCODING, OBJECT, None]:
            return _Made()
        elif function is BYTES and arguments == []:
            return b""
        elif function is ENCODE and arguments and len(arguments) == 2 and type(arguments[0]) is str and arguments[1] == "latin1":
            self.encodable -= len(arguments[0])
            if self.encodable < 0:
                raise _Refused("it would unfold into more bytes than it has")
            return arguments[0].encode("latin1")
        raise _Refused(f"it calls {_kind(function)} in a way no Encoding does")

    def build(self, made: Any, state: Any) -> None:
        if not isinstance(made, _Made) or made.state is not None:
            raise _Refused("it fills something that is not a new Encoding")
        if type(state) is str:
            raise _Refused(f"it only names an encoding of tiktoken's own ({state[:60]!r}) and holds no tokens")
        if type(state) is not dict:
            raise _Refused(f"its Encoding is {_kind(state)}, not a dict")
        made.state = state


def _kind(value: Any) -> str:
    """Say what a value is without looking into it: printing nested tuples that share parts can take for ever."""
    return value.shown if isinstance(value, _Name) else f"a {type(value).__name__}"
