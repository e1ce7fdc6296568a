"""Arms of a sweep: what is written for one on the command line, and the flags of base_train that this means."""

import contextlib
import dataclasses
import hashlib
import io
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nanochat.cli import parse
from nanochat.errors import UserError
from nanochat.files import to_json
from nanochat.recipe import RECIPES
from nanochat.run.horizon import BaseRun, horizon_of
from scripts import base_train

# the same for all arms, or given by the sweep itself
RESERVED = {"run", "model_tag", "data_dir", "shards", "seed", "data_seed", "fresh", "dry_run", "save_every", "keep",
            "keep_every", "eval_every", "eval_tokens", "sample_every", "core_metric_every", "core_metric_max_per_task",
            "device_type"}
HORIZON = {"num_iterations", "target_flops", "target_param_data_ratio", "ratio_of"}
CPU_ROWS = 16  # rows of a micro-batch on a CPU, at most: more are no faster there


@dataclass(frozen=True)
class Arm:
    """An arm: a recipe and flags of base_train.

    name: in tables. text: as it was written. flags: of base_train, all that the arm and the sweep say.
    config: those flags parsed. base: what they come to.
    """

    name: str
    text: str
    flags: tuple[str, ...]
    config: base_train.Config
    base: BaseRun

    @property
    def flops(self) -> float:
        """Of the whole run."""
        return self.base.flops_per_token * self.base.tokens

    def identity(self) -> list[Any]:
        """Return what tells the runs of this arm from those of another.

        Values, not flags alone, since a recipe may change; only those that differ from their plain default, so that a
        new flag leaves runs that do not use it as they were.
        """
        groups = {name: _told(group) for name, group in self.config.groups().items()}
        return [_told(self.config), groups, self.base.num_iterations, self.base.total_batch_size]


def read_arms(texts: Sequence[str], common: Sequence[str], vocab_size: int,
              reserved: Mapping[str, str] | None = None) -> list[Arm]:
    """Return the arms that these texts say.

    Args:
        texts: `recipe --flag=value ...`, each with an optional `name: ` before.
        common: flags of base_train for every arm, which an arm may override.
        vocab_size: of the tokenizer.
        reserved: further flags, by field, that arms may not set, with the reason.

    Raises:
        UserError: one of them cannot be read or makes no model, or two have the same name.
    """
    arms = [read_arm(text, common, vocab_size, reserved or {}) for text in texts]
    names = [arm.name for arm in arms]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"two arms have the name {twice[0]!r}: write another one before, as in 'again: {twice[0]}'")
    return arms


def read_arm(text: str, common: Sequence[str], vocab_size: int, reserved: Mapping[str, str]) -> Arm:
    """Return the arm that a text says. See `read_arms`."""
    named = re.fullmatch(r"\s*([^:=]+?)\s*:\s+(.*)", text, re.DOTALL)
    name, rest = named.groups() if named else (" ".join(text.split()), text)
    try:
        words = shlex.split(rest)
    except ValueError as error:
        raise UserError(f"the arm {text!r} cannot be read: {error}") from error
    if not words or words[0].startswith("-"):
        raise UserError(f"the arm {text!r} does not begin with a recipe: write 'published {rest.strip()}'".rstrip())
    flags = [*recipe_flags(words[0], text), *common, *words[1:]]
    for word in words[1:]:
        asked = word.partition("=")[0].lstrip("-").replace("-", "_")
        if asked in RESERVED:
            raise UserError(f"the arm {text!r} sets --{asked.replace('_', '-')}, which the sweep sets itself, the same "
                            "for all arms")
        if asked in reserved:
            raise UserError(f"the arm {text!r} sets --{asked.replace('_', '-')}, and {reserved[asked]}")
    try:
        if not any(re.match(r"--?device[-_]batch[-_]size\b", flag) for flag in (*words, *common)):
            flags.append(f"--device-batch-size={rows_of(_parsed([*flags, '--device-batch-size=1']))}")
        return _arm(name, text, flags, vocab_size)
    except UserError as error:
        raise UserError(f"the arm {text!r}: {error}") from error


def _arm(name: str, text: str, flags: Sequence[str], vocab_size: int) -> Arm:
    config = _parsed(flags)
    return Arm(name, text, tuple(flags), config, horizon_of(config, vocab_size))


def with_steps(arm: Arm, steps: int) -> Arm:
    """Return the arm with another number of optimizer steps."""
    kept = [flag for flag in arm.flags if not flag.startswith("--num-iterations=")]
    return _arm(arm.name, arm.text, [*kept, f"--num-iterations={max(1, steps)}"], arm.base.shape.vocab_size)


def with_equal_flops(arms: Sequence[Arm]) -> list[Arm]:
    """Return the arms, each with as many steps as come nearest to the FLOPs of the first arm."""
    return [arm if arm is arms[0] else
            with_steps(arm, round(arms[0].flops / (arm.base.flops_per_token * arm.base.total_batch_size)))
            for arm in arms]


def recipe_flags(word: str, text: str) -> list[str]:
    """Return the flags for the recipe of this name. Raises UserError where there is none."""
    if word not in RECIPES:
        raise UserError(f"the arm {text!r} begins with {word!r}, which is no recipe: there is {' and '.join(RECIPES)}")
    return [f"--recipe={word}"]


def rows_of(config: base_train.Config) -> int:
    """Return the rows of a micro-batch: the most up to CPU_ROWS that divide the batch."""
    if config.total_batch_size == "auto":
        return 1
    rows = max(1, config.total_batch_size // config.max_seq_len)
    return max(n for n in range(1, min(rows, CPU_ROWS) + 1) if rows % n == 0)


def _parsed(flags: Sequence[str]) -> base_train.Config:
    """Return the flags parsed. Raises UserError where base_train would refuse them."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return parse(base_train.Config, list(flags))
    except SystemExit as error:
        reason = (said.getvalue().strip() or str(error)).removeprefix("error: ")
        raise UserError(re.sub(r" `[^`]*--help` lists the flags\.$", " `python -m scripts.base_train --help` lists the "
                               "flags.", reason)) from error


def _told(flags: Any) -> dict[str, Any]:
    """Return the fields of a dataclass that are not at their default."""
    return {field.name: value for field in dataclasses.fields(flags)
            if (value := getattr(flags, field.name)) != field.default}


def digest(*about: object) -> str:
    """Return 10 hex digits that change when any of `about` changes."""
    return hashlib.sha256(to_json(about).encode()).hexdigest()[:10]
