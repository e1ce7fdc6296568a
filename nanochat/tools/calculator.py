"""The tool that a model may call: arithmetic, and counting how often a text occurs in another.

    calculate("12 * (3 + 4.5)")             # "90.0"
    calculate("1,000 - 1")                  # "999"
    calculate("'strawberry'.count('r')")    # "3"
    calculate("2**10 > 10**3")              # "True"
    calculate("__import__('os')")           # None

The parser accepts only the grammar below, and never calls Python's eval. The answer is what Python prints for the same
expression. Length, nesting and every intermediate value are bounded, so every input takes at most about a millisecond,
on any thread and any platform.

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
MAX_DEPTH = 40      # nested parentheses, signs and powers
MAX_VALUE = 10**100  # largest intermediate value, so a whole number has at most 101 digits
MAX_BITS = MAX_VALUE.bit_length()

TOKEN = re.compile(r"""[ \t]*(?:
    (?P<number> [0-9]+(?:,[0-9]+)*(?:\.[0-9]*)? | \.[0-9]+ )
  | (?P<text> '(?:[^'\\\r\n]|\\['"\\])*' | "(?:[^"\\\r\n]|\\['"\\])*" )
  | (?P<sign> \.[ \t]*count\b | \*\*|//|[<>=!]=|[-+*/%()<>] )
)""", re.VERBOSE)
ADDITIVE = {"+": operator.add, "-": operator.sub}
MULTIPLICATIVE = {"*": operator.mul, "/": operator.truediv, "//": operator.floordiv, "%": operator.mod}
COMPARISON = {"<": operator.lt, ">": operator.gt, "<=": operator.le, ">=": operator.ge,
              "==": operator.eq, "!=": operator.ne}


def calculate(expression: str) -> str | None:
    """Return the value of `expression` as Python prints it.

    Returns None if the expression is not in the grammar, has no value, or exceeds a bound. Never raises.
    """
    if len(expression) > MAX_LENGTH:
        return None
    try:
        parser = _Parser(_tokens(expression.strip(" \t\r\n")))
        value = parser.comparison()
        if parser.next() != ("end", ""):
            return None
    except (_NoValue, ArithmeticError):  # ArithmeticError: division by zero, a float that overflows
        return None
    return str(value)


class _NoValue(Exception):
    """The expression is not in the grammar, or exceeds a bound."""


def _tokens(expression: str) -> list[tuple[str, str]]:
    """Split into (kind, text) tokens of kind number, text or sign; the last token is ("end", "")."""
    tokens, position = [], 0
    while position < len(expression):
        found = TOKEN.match(expression, position)
        if found is None:
            raise _NoValue
        tokens.append((found.lastgroup, found[found.lastgroup]))
        position = found.end()
    return [*tokens, ("end", "")]


class _Parser:
    """A recursive-descent parser that evaluates while it parses. `depth` is the nesting depth of a method call."""

    def __init__(self, tokens: list[tuple[str, str]]):
        self.tokens, self.position = tokens, 0

    def next(self) -> tuple[str, str]:
        self.position += 1
        return self.tokens[self.position - 1]

    def peek(self) -> str | None:
        """Return the next token if it is a sign, else None."""
        kind, text = self.tokens[self.position]
        return text if kind == "sign" else None

    def expect(self, sign: str) -> None:
        if self.peek() != sign:
            raise _NoValue
        self.position += 1

    def comparison(self) -> int | float | bool:
        value, holds = self.sum(0), None
        while self.peek() in COMPARISON:  # 1 < 2 < 3 means 1 < 2 and 2 < 3
            sign, left = self.next()[1], value
            value = self.sum(0)
            holds = holds is not False and COMPARISON[sign](left, value)
        return value if holds is None else holds

    def sum(self, depth: int) -> int | float:
        value = self.product(depth)
        while self.peek() in ADDITIVE:
            value = _bounded(ADDITIVE[self.next()[1]](value, self.product(depth)))
        return value

    def product(self, depth: int) -> int | float:
        value = self.factor(depth)
        while self.peek() in MULTIPLICATIVE:
            value = _bounded(MULTIPLICATIVE[self.next()[1]](value, self.factor(depth)))
        return value

    def factor(self, depth: int) -> int | float:
        if depth > MAX_DEPTH:
            raise _NoValue
        if self.peek() in ADDITIVE:
            sign = self.next()[1]
            value = self.factor(depth + 1)
            return -value if sign == "-" else value
        base = self.primary(depth)
        if self.peek() != "**":
            return base
        self.next()
        return _power(base, self.factor(depth + 1))

    def primary(self, depth: int) -> int | float:
        kind, text = self.next()
        if kind == "number":
            return _number(text)
        if kind == "text":
            if not re.fullmatch(r"\.[ \t]*count", self.peek() or ""):
                raise _NoValue
            self.next()
            self.expect("(")
            kind, part = self.next()
            if kind != "text":
                raise _NoValue
            self.expect(")")
            return _unquoted(text).count(_unquoted(part))
        if (kind, text) != ("sign", "("):
            raise _NoValue
        value = self.sum(depth + 1)
        self.expect(")")
        return value


def _number(text: str) -> int | float:
    text = text.replace(",", "")
    if "." in text:
        return _bounded(float(text))
    if text[0] == "0" and text.strip("0"):  # 007 is not a number in Python
        raise _NoValue
    return _bounded(int(text))


def _unquoted(text: str) -> str:
    return re.sub(r"\\(.)", r"\1", text[1:-1])


def _power(base: int | float, exponent: int | float) -> int | float:
    """Return base ** exponent. Whole numbers that would be too large are refused before the calculation."""
    if isinstance(base, int) and isinstance(exponent, int) and exponent > 0:
        if (abs(base).bit_length() - 1) * exponent > MAX_BITS:
            raise _NoValue
    return _bounded(base**exponent)


def _bounded(value: int | float | complex) -> int | float:
    # a root of a negative number is complex; a comparison with nan is false
    if isinstance(value, complex) or not abs(value) <= MAX_VALUE:
        raise _NoValue
    return value
