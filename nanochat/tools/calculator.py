"""The tool a model may call: arithmetic, and counting a piece of text in another.

    calculate("12 * (3 + 4.5)")             # "90.0"
    calculate("1,000 - 1")                  # "999"
    calculate("'strawberry'.count('r')")    # "3"
    calculate("2**10 > 10**3")              # "True"
    calculate("__import__('os')")           # None

A parser that knows these few forms and no others; nothing is handed to Python's eval. What it answers is what Python shows for the
same expression. Length, nesting and every value on the way are bounded, so any input is done in about a millisecond at most, on any
thread and any platform.

    comparison = expression (("<" | ">" | "<=" | ">=" | "==" | "!=") expression)*
    expression = term (("+" | "-") term)*               commas between digits are dropped: 1,000 is 1000
    term       = factor (("*" | "/" | "//" | "%") factor)*
    factor     = ("+" | "-") factor | power
    power      = primary ("**" factor)?
    primary    = number | text ".count(" text ")" | "(" expression ")"
"""

import operator
import re

MAX_LENGTH = 1000   # characters of an expression
MAX_DEPTH = 40      # parentheses, signs and powers inside each other
MAX_VALUE = 10**100  # no value on the way is larger; so a whole number has at most 101 digits
MAX_BITS = MAX_VALUE.bit_length()

TOKEN = re.compile(r"""[ \t]*(?:
    (?P<number> [0-9]+(?:,[0-9]+)*(?:\.[0-9]*)? | \.[0-9]+ )
  | (?P<text> '(?:[^'\\\r\n]|\\['"\\])*' | "(?:[^"\\\r\n]|\\['"\\])*" )
  | (?P<sign> \.[ \t]*count\b | \*\*|//|[<>=!]=|[-+*/%()<>] )
)""", re.VERBOSE)
SUM = {"+": operator.add, "-": operator.sub}
COMPARED = {"<": operator.lt, ">": operator.gt, "<=": operator.le, ">=": operator.ge, "==": operator.eq, "!=": operator.ne}
PRODUCT = {"*": operator.mul, "/": operator.truediv, "//": operator.floordiv, "%": operator.mod}


def calculate(expression: str) -> str | None:
    """Return the value of `expression` as Python shows it. None for what is not allowed, has no value or is too large; never raises."""
    if len(expression) > MAX_LENGTH:
        return None
    try:
        reader = _Reader(_tokens(expression.strip(" \t\r\n")))
        value = reader.comparison()
        if reader.next() != ("end", ""):
            return None
    except (_Refused, ArithmeticError):  # ArithmeticError: division by zero, a float that overflows
        return None
    return str(value)


class _Refused(Exception):
    """Not in the grammar, or over a bound."""


def _tokens(expression: str) -> list[tuple[str, str]]:
    """Split into (kind, text) with kind number, text or sign, and ("end", "") as the last."""
    tokens, at = [], 0
    while at < len(expression):
        found = TOKEN.match(expression, at)
        if found is None:
            raise _Refused
        tokens.append((found.lastgroup, found[found.lastgroup]))
        at = found.end()
    return [*tokens, ("end", "")]


class _Reader:
    """Reads tokens from left to right and calculates as it goes. `depth` counts what a method stands inside of."""

    def __init__(self, tokens: list[tuple[str, str]]):
        self.tokens, self.at = tokens, 0

    def next(self) -> tuple[str, str]:
        self.at += 1
        return self.tokens[self.at - 1]

    def ahead(self) -> str | None:
        """The sign that comes next; None if no sign does."""
        kind, text = self.tokens[self.at]
        return text if kind == "sign" else None

    def need(self, sign: str) -> None:
        if self.ahead() != sign:
            raise _Refused
        self.at += 1

    def comparison(self) -> int | float | bool:
        value, holds = self.sum(0), None
        while self.ahead() in COMPARED:  # 1 < 2 < 3 holds where 1 < 2 and 2 < 3 do
            sign, left = self.next()[1], value
            value = self.sum(0)
            holds = holds is not False and COMPARED[sign](left, value)
        return value if holds is None else holds

    def sum(self, depth: int) -> int | float:
        value = self.product(depth)
        while self.ahead() in SUM:
            value = _bounded(SUM[self.next()[1]](value, self.product(depth)))
        return value

    def product(self, depth: int) -> int | float:
        value = self.factor(depth)
        while self.ahead() in PRODUCT:
            value = _bounded(PRODUCT[self.next()[1]](value, self.factor(depth)))
        return value

    def factor(self, depth: int) -> int | float:
        if depth > MAX_DEPTH:
            raise _Refused
        if self.ahead() in SUM:
            sign = self.next()[1]
            value = self.factor(depth + 1)
            return -value if sign == "-" else value
        base = self.primary(depth)
        if self.ahead() != "**":
            return base
        self.next()
        return _power(base, self.factor(depth + 1))

    def primary(self, depth: int) -> int | float:
        kind, text = self.next()
        if kind == "number":
            return _number(text)
        if kind == "text":
            if not re.fullmatch(r"\.[ \t]*count", self.ahead() or ""):
                raise _Refused
            self.next()
            self.need("(")
            kind, part = self.next()
            if kind != "text":
                raise _Refused
            self.need(")")
            return _unquoted(text).count(_unquoted(part))
        if (kind, text) != ("sign", "("):
            raise _Refused
        value = self.sum(depth + 1)
        self.need(")")
        return value


def _number(text: str) -> int | float:
    text = text.replace(",", "")
    if "." in text:
        return _bounded(float(text))
    if text[0] == "0" and text.strip("0"):  # 007 is no number in Python
        raise _Refused
    return _bounded(int(text))


def _unquoted(text: str) -> str:
    return re.sub(r"\\(.)", r"\1", text[1:-1])


def _power(base: int | float, exponent: int | float) -> int | float:
    """base ** exponent, refused before it is calculated if it would be large."""
    if isinstance(base, int) and isinstance(exponent, int) and exponent > 0 and (abs(base).bit_length() - 1) * exponent > MAX_BITS:
        raise _Refused
    return _bounded(base**exponent)


def _bounded(value: int | float | complex) -> int | float:
    if isinstance(value, complex) or not abs(value) <= MAX_VALUE:  # the root of a negative number is complex; nan compares false
        raise _Refused
    return value
