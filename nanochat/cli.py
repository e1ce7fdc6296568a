"""Command lines from dataclasses: each field is a flag with a type, a default and a help text.

    @dataclass
    class Config:
        depth: int = flag(20, "layers; sets width, heads and horizon")
        num_files: int = flag(1, "shards", short="n")

    config = parse(Config, argv)     # --depth=20, --depth 20, -n 8; --num_files and --num-files are the same
"""

import argparse
import dataclasses
import sys
import types
import typing
from collections.abc import Callable, Sequence
from decimal import Decimal, InvalidOperation
from typing import Any, NoReturn, TypeVar

from nanochat.errors import UserError
from nanochat.files import disk_error
from nanochat.launcher import obey_owner, tell_owner
from nanochat.logs import console, print_line

C = TypeVar("C")


def flag(default: Any, help: str, short: str = "") -> Any:
    """Return a dataclass field that is a flag.

    Args:
        default: its value if the flag is not given; dataclasses.MISSING makes the flag required.
        help: one line for --help, with the unit.
        short: a letter, for -n beside --num-files.
    """
    return dataclasses.field(default=default, metadata={"help": help, "short": short})


def _boolean(text: str) -> bool:
    if text.lower() in ("1", "true", "yes", "on"):
        return True
    if text.lower() in ("0", "false", "no", "off"):
        return False
    raise argparse.ArgumentTypeError(f"{text!r} is not true or false")


def _count(text: str) -> int:
    """Parse an integer; 524288, 524_288 and 5e5 are all accepted."""
    try:
        number = Decimal(text)  # exact, where a float would round 123456789e12
    except InvalidOperation:
        number = Decimal("NaN")
    if not number.is_finite() or abs(number.adjusted()) > 30 or number != int(number):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number")
    return int(number)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None


def _or_word(words: Sequence[str], parse: Callable[[str], Any]) -> Callable[[str], Any]:
    return (lambda text: text if text in words else parse(text)) if words else parse


def _program() -> str | None:
    """Return `python -m scripts.x` if the program was started so; None leaves the name to argparse."""
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    return f"python -m {spec.name.removesuffix('.__main__')}" if spec else None


def parser_of(config_class: type, description: str = "") -> argparse.ArgumentParser:
    """Return the argparse parser of a dataclass of flags, of type bool, int, float, str, Literal,
    `X | None` or `X | Literal[...]`."""
    parser = argparse.ArgumentParser(prog=_program(), description=description, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    hints = typing.get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        hint = hints[field.name]
        words: tuple[str, ...] = ()
        if typing.get_origin(hint) in (typing.Union, types.UnionType):  # `int | None`: the flag is the int
            words = next((typing.get_args(part) for part in typing.get_args(hint)
                          if typing.get_origin(part) is typing.Literal), ())  # `int | Literal["auto"]`: or this word
            hint = next(part for part in typing.get_args(hint)
                        if part is not type(None) and typing.get_origin(part) is not typing.Literal)
        names = [f"--{field.name.replace('_', '-')}"]
        if "_" in field.name:
            names.append(f"--{field.name}")
        short = field.metadata.get("short") or (field.name if len(field.name) == 1 else "")
        if short:
            names.append(f"-{short}")

        how: dict[str, Any] = {"dest": field.name}
        if typing.get_origin(hint) is typing.Literal:
            how["choices"] = typing.get_args(hint)
        else:
            how["type"] = _or_word(words, {bool: _boolean, int: _count, float: _number}.get(hint, hint))
            how["metavar"] = "|".join([hint.__name__.upper(), *words])
        if hint is bool:
            how |= {"nargs": "?", "const": True}
        if field.default is not dataclasses.MISSING:
            how["default"] = field.default
            shown = f"default: {'unset' if field.default in (None, '') else field.default}"
        elif field.default_factory is not dataclasses.MISSING:
            how["default"] = field.default_factory()
            shown = f"default: {how['default']}"
        else:
            how["required"] = True
            shown = "must be given"
        text = f"{field.metadata.get('help', '')} ({shown})".strip()
        parser.add_argument(*names, help=text.replace("%", "%%"), **how)
    return parser


def parse(config_class: type[C], argv: Sequence[str] | None = None, description: str = "") -> C:
    """Parse a command line into an instance of `config_class`. A wrong one prints the usage and exits with code 2.

    A leading `--` is skipped: torchrun passes on the one that ends its own flags.

    Args:
        config_class: a dataclass whose fields were made by `flag`.
        argv: without the program's name; None takes this process's.
        description: for --help; the docstring of the script.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv and argv[0] == "--":
        argv = argv[1:]
    return config_class(**vars(parser_of(config_class, description).parse_args(argv)))


def run_main(main: Callable[[], object]) -> None:
    """Run a script's main. A UserError prints one line to stderr and exits with 1; Ctrl-C exits with 130.

    An error of the disk that nothing more exact was said of is one line, too. Where the script was started by an owner
    (nanochat.launcher), it ends with that and tells it why it fails.
    """
    obey_owner()
    with console():
        try:
            main()
        except UserError as error:
            _end_with(error)
        except KeyboardInterrupt:
            if not tell_owner():  # an owner says it, once for all ranks
                print_line("interrupted", sys.stderr)
            raise SystemExit(130) from None
        except OSError as error:
            if (told := disk_error(error)) is not None:
                _end_with(told)
            tell_owner(reason=f"{type(error).__name__}: {error}")
            raise
        except UnicodeEncodeError as error:
            if "surrogates" not in error.reason:
                raise
            name = error.object.encode(errors="surrogateescape").decode(errors="backslashreplace")
            _end_with(UserError(f"the name {name!r} has letters that are not UTF-8, or that the locale of this "
                                f"terminal ({sys.getfilesystemencoding()}) does not have. Set PYTHONUTF8=1 or "
                                "LC_ALL=C.UTF-8, or use another name."))
        except Exception as error:
            tell_owner(reason=f"{type(error).__name__}: {error}")
            raise


def _end_with(error: UserError) -> NoReturn:
    print_line(f"error: {error}", sys.stderr)
    tell_owner(reason=str(error))
    raise SystemExit(1) from None
