"""Command lines from dataclasses: each field is a flag with a type, a default, a range and a help text.

    @dataclass
    class Config:
        depth: int = flag(20, "layers; sets width, heads and horizon", within=COUNT)
        num_files: int = flag(1, "shards", short="n", within=Range(1, also=-1))

    config = parse(Config, argv)     # --depth=20, --depth 20, -n 8; --num_files and --num-files are the same

A number outside its range, an unknown flag, and an unknown setting in the environment are refused before anything is
done, in one line that says what was meant, also for flags of other nanochats (ELSEWHERE).
"""

import argparse
import dataclasses
import difflib
import math
import os
import re
import sys
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Any, NoReturn, TypeVar

from nanochat.errors import UserError
from nanochat.files import disk_error
from nanochat.launcher import obey_owner, tell_owner
from nanochat.logs import console, print_line

C = TypeVar("C")


# ---- ranges

UNTOLD = 1 << 20  # limits from here on are told only to who goes beyond them
FAR = 1 << 53


@dataclass(frozen=True)
class Range:
    """The numbers that a flag takes. NaN and infinity are never among them.

    low, high: the least and the greatest; None is no limit.
    above, below: the number must be greater, or less, than this one.
    also: a number outside that means something else, such as -1 for all; the help text of the flag says what.
    """

    low: float | None = None
    high: float | None = None
    above: float | None = None
    below: float | None = None
    also: float | None = None

    def __contains__(self, number: float) -> bool:
        if not math.isfinite(number):
            return False
        if number == self.also:
            return True
        return ((self.low is None or number >= self.low) and (self.high is None or number <= self.high)
                and (self.above is None or number > self.above) and (self.below is None or number < self.below))

    def __str__(self) -> str:
        parts = []
        if self.low is not None:
            parts.append(f"at least {_short(self.low)}")
        if self.above is not None:
            parts.append(f"above {_short(self.above)}")
        if self.high is not None and (self.high < UNTOLD or self.low is self.above is None):
            parts.append(f"at most {_short(self.high)}")
        if self.below is not None:
            parts.append(f"below {_short(self.below)}")
        text = " and ".join(parts) or "a finite number"
        if self.low is not None and self.high is not None and self.high < UNTOLD:
            text = f"from {_short(self.low)} to {_short(self.high)}"
        return text + (f", or {_short(self.also)}" if self.also is not None else "")


def _short(number: float) -> str:
    """Return a limit in few characters: powers of two from a million on as 2^63 or 2^63-1."""
    if isinstance(number, int) and number >= 1 << 20:
        for plus, end in ((0, ""), (1, "-1")):
            if (number + plus).bit_count() == 1:
                return f"2^{(number + plus).bit_length() - 1}{end}"
    return f"{number:,}" if isinstance(number, int) else f"{number:g}"


# Limits far above what anybody trains keep a slip of the finger from filling the memory, or a tensor's 64-bit index.
LARGEST = (1 << 63) - 1
COUNT = Range(1, FAR)               # steps, tokens, characters, examples
COUNT_OR_ALL = Range(1, FAR, also=-1)  # -1: all of them, or unset
FROM_ZERO = Range(0, FAR)
ROWS = Range(1, 1 << 20)                # of a batch
DEPTH = Range(1, 1000)
ROW_TOKENS = Range(1, 1 << 24)          # tokens of a row
EVERY = Range(1, FAR, also=-1)      # steps from one time to the next; -1: at the end only, or never
NOT_NEGATIVE = Range(0)                 # learning rates, weight decay, norms
POSITIVE = Range(above=0)
FRACTION = Range(0, 1)
SEED = Range(0, LARGEST)                # what PyTorch and NumPy both take
TEMPERATURE = Range(0, 100)
TOP_K = Range(0, 1 << 31)
TOP_P = Range(above=0, high=1)
PENALTY = Range(0.01, 100)              # of repetitions
STEP_OR_LAST = Range(0, FAR, also=-1)
PORT = Range(0, 65_535)
ROUNDS = Range(1, 1 << 20)              # measurements


def flag(default: Any, help: str, short: str = "", within: Range | None = None) -> Any:
    """Return a dataclass field that is a flag.

    Args:
        default: its value if the flag is not given; dataclasses.MISSING makes the flag required.
        help: one line for --help, with the unit.
        short: a letter, for -n beside --num-files.
        within: the numbers that it takes; where it is not given, all finite ones.
    """
    return dataclasses.field(default=default, metadata={"help": help, "short": short, "within": within})


def check_ranges(config_class: type, values: Mapping[str, Any], named: Callable[[str], str] | None = None) -> None:
    """Raise UserError for the first number that its flag does not take.

    Args:
        config_class: a dataclass whose fields were made by `flag`.
        values: of the fields; those that are no numbers are passed over.
        named: from the name of a field to that of the setting; None: the flag.
    """
    named = named or (lambda name: f"--{name.replace('_', '-')}")
    for field in dataclasses.fields(config_class):
        value = values.get(field.name)
        within = field.metadata.get("within") or Range()
        if isinstance(value, bool) or not isinstance(value, int | float) or value in within:
            continue
        if within.high is not None and value > within.high >= UNTOLD:
            within = Range(high=within.high)
        hint = ELSEWHERE.get(f"{field.name}={value:g}" if abs(value) < 1e15 else "")
        raise UserError(f"{named(field.name)} is {value}; it must be {within}." + (f" Here {hint}" if hint else ""))


# ---- hints

# Flags of karpathy/nanochat at several times, of the published liquid-time fork, and of nanoGPT, with what stands for
# them here. A hint that names flags is given only where one of these exists in the command.
ELSEWHERE = {
    "window_pattern": "use --layer-pattern (S for SLC2, A for attention) and --window (tokens that attention sees)",
    "aspect_ratio": "use --depth: it sets the width, 64 a layer",
    "head_dim": "use --depth: it sets width and heads",
    "total_batch_size=-1": "auto instead of -1 computes the batch from the horizon",
    "num_iterations=0": "-1 instead of 0 leaves it unset",
    "resume_from_step": "nothing is needed instead: the same command resumes where it stopped",
    "resume": "nothing is needed instead: the same command resumes where it stopped",
    "warmup_steps": "there is no warm-up in this stage; leave it out",
    "warmup_iters": "use --warmup-steps, or --warmup-ratio, a part of all steps",
    "warmup_ratio": "there is no warm-up in this stage; leave it out",
    "final_lr_frac": "the learning rates of this stage fall to 0; leave it out, or use --warmdown-ratio",
    "scalar_lr": "use nanochat/recipe/ instead: the rates of scalars are in its optimizer groups",
    "adam_beta1": "use nanochat/recipe/ instead: the betas are in its optimizer groups",
    "adam_beta2": "use nanochat/recipe/ instead: the betas are in its optimizer groups",
    "fp8_recipe": "use --fp8 alone; it has one way to scale",
    "dtype": "set NANOCHAT_DTYPE=float32 or bfloat16 instead",
    "load_optimizer": "use --warm-start",
    "total_batch_size": "use --target-examples-per-step or --examples-per-step instead",
    "eval_tokens": "use --eval-steps or --eval-examples instead",
    "chatcore_every": "use --eval-metrics-every",
    "chatcore_max_cat": "use --eval-metrics-max-problems",
    "chatcore_max_sample": "use --eval-metrics-max-problems",
    "mmlu_epochs": "use nanochat/recipe/ instead: it holds the mixture",
    "gsm8k_epochs": "use nanochat/recipe/ instead: it holds the mixture",
    "hf_path": "only models of this project are evaluated; leave it out",
    "eval_bundle": "use --bundle",
    "max_steps": "use --num-iterations",
    "steps": "use --num-iterations",
    "max_iters": "use --num-iterations",
    "epochs": "use --num-epochs",
    "batch_size": "use --device-batch-size (rows of a device) or --total-batch-size (tokens of a step)",
    "micro_batch_size": "use --device-batch-size",
    "gradient_accumulation_steps": "use --total-batch-size: the micro-batches follow from it",
    "grad_accum_steps": "use --total-batch-size: the micro-batches follow from it",
    "block_size": "use --max-seq-len",
    "sequence_len": "use --max-seq-len",
    "n_layer": "use --depth",
    "n_head": "use --depth: it sets width and heads",
    "n_embd": "use --depth: it sets the width, 64 a layer",
    "learning_rate": "use --matrix-lr, --embedding-lr and --unembedding-lr",
    "lr": "use --matrix-lr, --embedding-lr and --unembedding-lr",
    "eval_interval": "use --eval-every",
    "eval_iters": "use --eval-tokens or --eval-steps",
    "out_dir": "set NANOCHAT_BASE_DIR instead, and --model-tag for the name of the model",
    "init_from": "nothing is needed instead: the same command resumes, and --source or --model-tag choose a model",
    "wandb_log": "use --run=NAME",
    "wandb_run_name": "use --run=NAME",
    "wandb_project": "use --run=NAME; the project is nanochat",
    "device": "use --device-type",
    "nproc_per_node": "use --ranks",
}


def _words_of(name: str) -> str:
    return name.replace("-", "").replace("_", "").lower()


def near_name(name: str, names: Iterable[str], prefix: str = "") -> str | None:
    """Return the one of `names` that `name` may be a slip of, None where none is near.

    prefix: what all begin with; it does not make them more alike.
    """
    start = len(_words_of(prefix))
    by_word = {_words_of(known)[start:]: known for known in names}
    near = difflib.get_close_matches(_words_of(name)[start:], by_word, 1, 0.75)
    return by_word[near[0]] if near else None


def _hint(unknown: Sequence[str], known: Iterable[str]) -> str:
    """Return what a command line should say instead of its unknown arguments; known: names of fields."""
    first, known = unknown[0], set(known)
    name, _, value = first.lstrip("-").partition("=")
    field = name.replace("-", "_")
    if not first.startswith("-"):
        if value and (near := field if field in known else near_name(field, known)):
            return f"; did you mean --{near.replace('_', '-')}={value}? A flag begins with --"
        if first.endswith(".py"):
            return "; files of settings are not read: use flags instead"
        if near := field if field in known else near_name(field, known):
            return f"; did you mean --{near.replace('_', '-')}? A flag begins with --"
        return "; a value with spaces needs quotes"
    if field in known:  # given with one dash
        return f"; did you mean --{field.replace('_', '-')}?"
    if there := ELSEWHERE.get(field):
        flags = re.findall(r"--([a-z0-9-]+)", there)
        if not flags or any(one.replace("-", "_") in known for one in flags):
            return f": {there}"
    if near := near_name(field, known):
        return f"; did you mean --{near.replace('_', '-')}?"
    return ""


class FlagParser(argparse.ArgumentParser):
    """An argparse parser whose errors are one line with a hint, and which checks the ranges.

    config_class: the dataclass of its flags.
    """

    config_class: type

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Return the values. Exits with code 2 for a wrong spelling; UserError for a number out of range."""
        values, unknown = self.parse_known_args(args, namespace)
        if unknown:
            known = [field.name for field in dataclasses.fields(self.config_class)]
            self.error(f"unrecognized arguments: {' '.join(unknown)}{_hint(unknown, known)}")
        check_ranges(self.config_class, vars(values))
        return values

    def error(self, message: str) -> NoReturn:
        print_line(f"error: {message}" + ("" if message.endswith((".", "?")) else ".")
                   + f" `{self.prog} --help` lists the flags.", sys.stderr)
        tell_owner(reason=message)
        raise SystemExit(2)


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


def parser_of(config_class: type, description: str = "", defaults: Mapping[str, Any] | None = None
              ) -> argparse.ArgumentParser:
    """Return the argparse parser of a dataclass of flags, of type bool, int, float, str, Literal,
    `X | None` or `X | Literal[...]`.

    defaults: of fields by name, instead of their own.
    """
    parser = FlagParser(prog=_program(), description=description, allow_abbrev=False,
                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.config_class = config_class
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
        default = (defaults or {}).get(field.name, field.default)
        if default is not dataclasses.MISSING:
            how["default"] = default
            shown = f"default: {'unset' if default in (None, '') else default}"
        elif field.default_factory is not dataclasses.MISSING:
            how["default"] = field.default_factory()
            shown = f"default: {how['default']}"
        else:
            how["required"] = True
            shown = "must be given"
        if within := field.metadata.get("within"):
            shown += f"; {within}"
        text = f"{field.metadata.get('help', '')} ({shown})".strip()
        parser.add_argument(*names, help=text.replace("%", "%%"), **how)
    return parser


def parse(config_class: type[C], argv: Sequence[str] | None = None, description: str = "",
          defaults: Mapping[str, Any] | None = None) -> C:
    """Parse a command line into an instance of `config_class`.

    A wrong one prints one line and exits with code 2; a number out of its range raises UserError. Where the class has a
    method `check`, it is called: it raises UserError for values that do not fit one another. Where it has a class
    method `defaults`, that gets argv and returns defaults of fields, which may depend on other flags. A leading `--` is
    skipped: torchrun passes on the one that ends its own flags.

    Args:
        config_class: a dataclass whose fields were made by `flag`.
        argv: without the program's name; None takes this process's.
        description: for --help; the docstring of the script.
        defaults: of fields by name, instead of all others.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv and argv[0] == "--":
        argv = argv[1:]
    own = config_class.defaults(argv) if hasattr(config_class, "defaults") else {}
    config = config_class(**vars(parser_of(config_class, description, {**own, **(defaults or {})}).parse_args(argv)))
    if hasattr(config, "check"):
        config.check()
    return config


# ---- settings in the environment

# All that begin so. Names near one of these are refused, since a slip of the pen would be passed over in silence.
SETTINGS = {"NANOCHAT_" + name for name in (
    "API_KEY", "BASE_DIR", "CALLED_FROM", "CHROMIUM", "DTYPE", "EVAL_BUNDLE_URL", "FA3_HUB", "GRAPHS", "HANG_END",
    "HANG_WARN", "KERNELS", "MASTER_LISTENS", "MEASURE", "NODE_MINUTES", "OWNER_LINE", "PROGRESS", "PYTHON",
    "RESTARTED", "SANDBOX", "SCREENSHOTS", "SHARED", "SKIP_CHECKS", "TASK_DATA", "TORCH", "TORTURE")}


def check_settings(environ: Mapping[str, str] | None = None) -> None:
    """Raise UserError for a setting NANOCHAT_... in the environment that may be a slip of an existing one."""
    for name in sorted(os.environ if environ is None else environ):
        if name.startswith("NANOCHAT") and name not in SETTINGS and (near := near_name(name, SETTINGS, "NANOCHAT_")):
            raise UserError(f"{name} is no setting; did you mean {near}? Unset it, or name it right.")


def parse_settings(config_class: type[C], prefix: str, environ: Mapping[str, str] | None = None) -> C:
    """Return the settings of an environment as an instance of `config_class`; those that are unset or empty keep their
    defaults.

    Args:
        config_class: a dataclass whose fields were made by `flag`; the setting of `steps` is `prefix`STEPS.
        prefix: what the names of all settings begin with.
        environ: None takes this process's.

    Raises:
        UserError: a name that begins with `prefix` is none of these, or a value is wrong.
    """
    environ = os.environ if environ is None else environ
    names = {f"{prefix}{field.name.upper()}": field for field in dataclasses.fields(config_class)}
    hints = typing.get_type_hints(config_class)
    values: dict[str, Any] = {}
    for name in sorted(key for key in environ if key.startswith(prefix)):
        if name not in names:
            near = near_name(name, names, prefix)
            raise UserError(f"{name} is no setting" + (f"; did you mean {near}?" if near else
                                                       f": there is {', '.join(sorted(names))}."))
        field, hint = names[name], hints[names[name].name]
        text = environ[name] if hint is str else environ[name].strip()
        if not text.strip():
            continue
        if typing.get_origin(hint) is typing.Literal:
            words = [str(word) for word in typing.get_args(hint) if word != ""]
            if text not in words:
                raise UserError(f"{name} is {text!r}: it must be {' or '.join(words)}.")
            values[field.name] = text
            continue
        try:
            values[field.name] = {bool: _boolean, int: _count, float: _number}.get(hint, str)(text)
        except argparse.ArgumentTypeError:
            kind = {bool: "1 or 0", int: "a whole number", float: "a number"}[hint]
            raise UserError(f"{name} is {text!r}: it must be {kind}"
                            + (f", {field.metadata['within']}." if field.metadata.get("within") else ".")) from None
    check_ranges(config_class, values, named=lambda name: f"{prefix}{name.upper()}")
    return config_class(**values)


def run_main(main: Callable[[], object]) -> None:
    """Run a script's main. A UserError prints one line to stderr and exits with 1; Ctrl-C exits with 130.

    An error of the disk that nothing more exact was said of is one line, too. Where the script was started by an owner
    (nanochat.launcher), it ends with that and tells it why it fails.
    """
    obey_owner()
    with console():
        try:
            check_settings()
            main()
        except UserError as error:
            _end_with(error)
        except KeyboardInterrupt:
            if not tell_owner():  # an owner says it, once for all ranks
                print_line("interrupted", sys.stderr)
            raise SystemExit(130) from None
        except Exception as error:
            if (told := _in_words(error)) is not None:
                _end_with(told)
            tell_owner(reason=f"{type(error).__name__}: {error}")
            raise


def _in_words(error: Exception) -> UserError | None:
    """Return in words an error of the disk, or of a name, that nothing more exact was said of; None for others."""
    if isinstance(error, OSError):
        return disk_error(error)
    if not isinstance(error, UnicodeEncodeError) or "surrogates" not in error.reason:
        return None
    name = error.object.encode(errors="surrogateescape").decode(errors="backslashreplace")
    return UserError(f"the name {name!r} has letters that are not UTF-8, or that the locale of this terminal "
                     f"({sys.getfilesystemencoding()}) does not have. Set PYTHONUTF8=1 or LC_ALL=C.UTF-8, or use "
                     "another name.")


def _end_with(error: UserError) -> NoReturn:
    print_line(f"error: {error}", sys.stderr)
    tell_owner(reason=str(error), mend=error.mend)
    raise SystemExit(1) from None
