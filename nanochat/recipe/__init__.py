"""What a model is trained with, as data. Training code, the scripts' flag defaults and speedrun read it.

    published        the recipe of the model published in November 2025: 20 layers, FineWeb-Edu
    modern           what was learnt since, for the hybrid: better for its price
    small            4 layers, the small world, for a CPU: what `bash speedrun.sh` does without a GPU
    RECIPES          what --recipe can name
    PROFILES         what `SPEEDRUN_PROFILE` can name

Each number is here once. A field of a stage has the name of the flag that overrides it, so `changed_flags` can write
the command line that turns one recipe into another. speedrun makes its commands this way.

A new recipe is one more value, mostly `dataclasses.replace(published, ...)`. It may have other optimizer groups: a
mixer says by name which group each of its parameters is in, and `groups` says how each group is trained.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from nanochat.recipe.modern import modern
from nanochat.recipe.parts import (
    MUON_EXTRAS,
    Horizon,
    MomentumSchedule,
    OptimizerGroup,
    RateSchedule,
    Recipe,
    Recompute,
    Rows,
    Shape,
)
from nanochat.recipe.published import BATCH, published
from nanochat.recipe.small import small

__all__ = ["BATCH", "MOST_ROWS", "MUON_EXTRAS", "PROFILES", "RECIPES", "Horizon", "MomentumSchedule", "OptimizerGroup",
           "RateSchedule", "Recipe", "Recompute", "Rows", "Shape", "at_depth", "changed_flags", "fields_of", "modern",
           "override", "published", "small"]

# Rows of a micro-batch that is chosen automatically, at most. 65,536 tokens fill any GPU. Conversations are padded to
# the longest, so the fewer together the less padding.
MOST_ROWS = {"base": 32, "mid": 32, "sft": 4, "rl": 8}


def at_depth(depth: int, recipe: Recipe = published) -> Recipe:
    """Return the recipe for a model of this depth; the horizon follows, since it is in tokens a parameter."""
    return replace(recipe, base=replace(recipe.base, shape=replace(recipe.base.shape, depth=depth)))


RECIPES = {"published": published, "modern": modern}
PROFILES = {"small": small, **{f"d{depth}": at_depth(depth) for depth in (12, 18, 20, 22, 24, 26, 32)}}


# ---- recipes and flags


def override(groups: Mapping[str, OptimizerGroup], *, matrix_lr: float, embedding_lr: float, unembedding_lr: float,
             weight_decay: float | None = None, matrix_decay: float = 0.0, muon_extras: str = "", lr_frac: float = 1.0
             ) -> dict[str, OptimizerGroup]:
    """Return optimizer groups with the numbers of a command line.

    Args:
        groups: of the recipe.
        matrix_lr: of the matrices and of the taps.
        embedding_lr, unembedding_lr: of the embedding and of the head.
        weight_decay: of all groups that AdamW trains; None keeps those of the groups.
        matrix_decay: weight decay of the groups that Muon trains.
        muon_extras: of MUON_EXTRAS, with commas between.
        lr_frac: what all rates are multiplied by.
    """
    rates = {"matrices": matrix_lr, "taps": matrix_lr, "wte": embedding_lr, "lm_head": unembedding_lr}
    extras = tuple(filter(None, muon_extras.split(",")))

    def changed(name: str, group: OptimizerGroup) -> OptimizerGroup:
        group = replace(group, lr=lr_frac * rates.get(name, group.lr))
        if group.optimizer == "muon":
            return replace(group, weight_decay=matrix_decay, extras=extras)
        return group if weight_decay is None else replace(group, weight_decay=weight_decay)
    return {name: changed(name, group) for name, group in groups.items()}


def fields_of(part: Any) -> Iterator[tuple[str, Any]]:
    """Yield (name, value) of all fields of a stage and of its parts, except mappings, which no flag can say."""
    for field in dataclasses.fields(part):
        value = getattr(part, field.name)
        if dataclasses.is_dataclass(value):
            yield from fields_of(value)
        elif not isinstance(value, Mapping):
            yield field.name, value


def changed_flags(part: Any, default: Any) -> list[str]:
    """Return the flags for what a stage has other than `default`, the same stage of the recipe the flags default to."""
    defaults = dict(fields_of(default))
    return [f"--{name.replace('_', '-')}" + ("" if value is True else f"={value}")
            for name, value in fields_of(part) if value != defaults[name]]
