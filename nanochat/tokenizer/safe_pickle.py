"""Read the pickle of a `tiktoken.Encoding` (tokenizer.pkl) without unpickling it.

A pickle is a program. This module interprets only the few instructions that the pickle of an Encoding consists of
(protocols 0 to 5): strings, bytes, whole numbers, dicts, and names of a fixed list. A name is a placeholder here; it is
never looked up, imported or called, so no file can run code. Any other instruction or name is refused. The result is
plain data, which files.py checks before it builds an Encoding.
"""

import pickletools
from typing import Any

from nanochat.errors import UserError


class _Name:
    """A placeholder for a name of the list. It cannot be called, and it has no state."""

    def __init__(self, text: str):
        self.text = text


ENCODING, RECONSTRUCTOR, OBJECT, BYTES, ENCODE = map(_Name, ("Encoding", "_reconstructor", "object", "bytes", "encode"))
NAMES = {
    ("tiktoken.core", "Encoding"): ENCODING,
    # protocols 0 and 1 create an object with the first two, protocols 0 to 2 write bytes with the other two
    ("copy_reg", "_reconstructor"): RECONSTRUCTOR, ("copyreg", "_reconstructor"): RECONSTRUCTOR,
    ("__builtin__", "object"): OBJECT, ("builtins", "object"): OBJECT,
    ("__builtin__", "bytes"): BYTES, ("builtins", "bytes"): BYTES,
    ("_codecs", "encode"): ENCODE,
}
CONSTANTS = {"UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8",
             "INT", "LONG", "BININT", "BININT1", "BININT2", "LONG1", "LONG4", "NONE"}
TUPLE_SIZES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
MARK = _Name("mark")


class _PickledEncoding:
    """Stands for the Encoding that unpickling would have created; holds the state that it would have been given."""

    state: dict | None = None


class _UnsafePickle(Exception):
    """The pickle does something that the pickle of an Encoding never does."""


def encoding_state(blob: bytes, where: str) -> dict[str, Any]:
    """Return the state of the tiktoken Encoding pickled in `blob`: a dict of plain values, not yet checked.

    Time and memory are proportional to the size of `blob`. Raises UserError, with `where` and what was found, for
    anything that is not such a pickle.
    """
    try:
        return _Interpreter(blob).run()
    except _UnsafePickle as error:
        raise UserError(f"{where} is refused: {error}. A tokenizer.pkl holds a pickled tiktoken Encoding and nothing "
                        "else; do not open this file with anything that unpickles it.") from None
    except Exception as error:  # a cut or foreign file fails in many ways: empty stack, bad text, missing memo entry
        raise UserError(f"{where} is not a pickled tiktoken Encoding, or it is damaged "
                        f"({type(error).__name__}: {str(error)[:200]}). "
                        "Fetch it again, or train a tokenizer with: python -m scripts.tok_train") from None


class _Interpreter:
    """The pickle machine: a stack, a memo, and one method for each group of instructions."""

    def __init__(self, blob: bytes):
        self.blob, self.stack, self.memo = blob, [], {}
        self.encodable = len(blob)  # limits the bytes made of strings that the memo repeats

    def run(self) -> dict[str, Any]:
        for opcode, argument, position in pickletools.genops(self.blob):
            self.step(opcode.name, argument)
            if opcode.name == "STOP" and position != len(self.blob) - 1:
                raise _UnsafePickle(f"it has {len(self.blob) - 1 - position} more bytes after its end")
        encoding = self.pop()
        if self.stack or not isinstance(encoding, _PickledEncoding):
            raise _UnsafePickle(f"it holds {_kind(encoding)}, not an Encoding")
        if encoding.state is None:
            raise _UnsafePickle("its Encoding is empty")
        return encoding.state

    def pop(self) -> Any:
        value = self.stack.pop()
        if value is MARK:
            raise _UnsafePickle("its instructions are out of order")
        return value

    def pop_to_mark(self) -> list:
        at = len(self.stack) - 1
        while at >= 0 and self.stack[at] is not MARK:
            at -= 1
        if at < 0:
            raise _UnsafePickle("its instructions are out of order")
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
            stack.append(self.construct(name, function, arguments))
        elif name == "BUILD":
            state, encoding = self.pop(), self.top()
            self.build(encoding, state)
        elif name not in ("PROTO", "FRAME", "STOP"):
            raise _UnsafePickle(f"it uses the pickle instruction {name}, which no Encoding needs")

    def top(self) -> Any:
        self.stack.append(value := self.pop())
        return value

    def fill(self, pairs: list) -> None:
        target = self.top()
        if type(target) is not dict or len(pairs) % 2:
            raise _UnsafePickle("its instructions are out of order")
        for key, value in zip(pairs[::2], pairs[1::2]):
            if type(key) not in (str, bytes):
                raise _UnsafePickle(f"a dict has a key of the wrong kind, {_kind(key)}")
            target[key] = value

    def named(self, module: Any, attribute: Any) -> _Name:
        if type(module) is not str or type(attribute) is not str:
            raise _UnsafePickle(f"it asks for the name {_kind(attribute)} of {_kind(module)}")
        if (module, attribute) not in NAMES:
            raise _UnsafePickle(f"it asks for {module[:60]}.{attribute[:60]}")
        return NAMES[module, attribute]

    def construct(self, instruction: str, function: Any, arguments: Any) -> Any:
        """Return the value of a call, if it is one that the pickle of an Encoding makes."""
        arguments = list(arguments) if type(arguments) is tuple else None
        if instruction == "NEWOBJ":
            if function is ENCODING and arguments == []:
                return _PickledEncoding()
        elif function is RECONSTRUCTOR and arguments == [ENCODING, OBJECT, None]:
            return _PickledEncoding()
        elif function is BYTES and arguments == []:
            return b""
        elif (function is ENCODE and arguments and len(arguments) == 2
              and type(arguments[0]) is str and arguments[1] == "latin1"):
            self.encodable -= len(arguments[0])
            if self.encodable < 0:
                raise _UnsafePickle("it would unfold into more bytes than it has")
            return arguments[0].encode("latin1")
        raise _UnsafePickle(f"it calls {_kind(function)} in a way no Encoding does")

    def build(self, encoding: Any, state: Any) -> None:
        if not isinstance(encoding, _PickledEncoding) or encoding.state is not None:
            raise _UnsafePickle("it fills something that is not a new Encoding")
        if type(state) is str:
            raise _UnsafePickle(f"it only names an encoding of tiktoken's own ({state[:60]!r}) and holds no tokens")
        if type(state) is not dict:
            raise _UnsafePickle(f"its Encoding is {_kind(state)}, not a dict")
        encoding.state = state


def _kind(value: Any) -> str:
    """Name the type of a value without printing it: nested tuples that share parts can print for ever."""
    return value.text if isinstance(value, _Name) else f"a {type(value).__name__}"
