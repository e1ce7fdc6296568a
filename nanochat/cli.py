"""Command lines from dataclasses: each field is a flag, with its default, its help and its type.

    @dataclass
    class Config:
        depth: int = flag(20, "layers; sets width, heads and horizon")

    config = parse(Config, argv)     # --depth=20, --depth 20; --a_b and --a-b are the same flag
"""

import argparse
import dataclasses
import sys
import types
import typing
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from nanochat.files import UserError

C = TypeVar("C")


def flag(default: Any, help: str) -> Any:
    """A dataclass field with a default and a help text (say the unit)."""
    return dataclasses.field(default=default, metadata={"help": help})


def _boolean(text: str) -> bool:
    if text.lower() in ("1", "true", "yes", "on"):
        return True
    if text.lower() in ("0", "false", "no", "off"):
        return False
    raise argparse.ArgumentTypeError(f"{text!r} is not true or false")


def _count(text: str) -> int:
    """An integer; 524288, 524_288 and 5e5 are all fine."""
    try:
        return int(text)
    except ValueError:
        pass
    try:
        number = float(text)
    except ValueError:
        number = 0.5
    if number != int(number):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number")
    return int(number)


def parser_of(config_class: type, description: str = "") -> argparse.ArgumentParser:
    """Return the argparse parser of a dataclass of flags."""
    parser = argparse.ArgumentParser(prog=config_class.__module__ if config_class.__module__ != "__main__" else None, description=description,
                                     formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    hints = typing.get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        hint = hints[field.name]
        if typing.get_origin(hint) in (typing.Union, types.UnionType):  # `int | None`: the flag is the int
            hint = next(part for part in typing.get_args(hint) if part is not type(None))
        kind = {bool: _boolean, int: _count}.get(hint, hint)
        names = [f"--{field.name.replace('_', '-')}"]
        if "_" in field.name:
            names.append(f"--{field.name}")
        if len(field.name) == 1:
            names.append(f"-{field.name}")
        shown = "unset" if field.default in (None, "") else field.default
        text = f"{field.metadata.get('help', '')} (default: {shown})".replace("%", "%%")
        extra = {"nargs": "?", "const": True} if hint is bool else {}
        parser.add_argument(*names, dest=field.name, type=kind, default=field.default, help=text, metavar=hint.__name__.upper(), **extra)
    return parser


def parse(config_class: type[C], argv: Sequence[str] | None = None, description: str = "") -> C:
    """Turn a command line into an instance of `config_class`. Exits with a usage line where the command line is wrong.

    A leading `--` is skipped: torchrun hands on the one that separates its own flags from ours.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv and argv[0] == "--":
        argv = argv[1:]
    return config_class(**vars(parser_of(config_class, description).parse_args(argv)))


def run_main(main: Callable[[], object]) -> None:
    """Run a script's main: a UserError becomes one line on stderr and exit code 1, Ctrl-C exit code 130."""
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None
