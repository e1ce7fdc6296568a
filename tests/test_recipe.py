"""Recipes: what the scripts do by default is the published one, and a command line can say any other."""

import subprocess
import sys
from dataclasses import FrozenInstanceError, replace

import pytest

from nanochat.cli import parse
from nanochat.recipe import (
    PROFILES,
    Horizon,
    MomentumSchedule,
    RateSchedule,
    at_depth,
    changed_flags,
    fields_of,
    override,
    published,
    small,
)
from tests.conftest import ROOT
from tests.helpers import module_of

SCRIPTS = {"tokenizer": "scripts.tok_train", "base": "scripts.base_train", "base_eval": "scripts.base_eval",
           "identity": "dev.gen_identity", "mid": "scripts.mid_train", "sft": "scripts.chat_sft",
           "rl": "scripts.chat_rl", "chat_eval": "scripts.chat_eval"}
RATES = {"warmup_ratio", "warmdown_ratio", "final_lr_frac"}
MOMENTUM = {"start", "rise", "steps"}  # no flag overrides these
NO_FLAG = {"base": MOMENTUM, "mid": MOMENTUM | RATES - {"warmdown_ratio"}, "sft": MOMENTUM | RATES - {"warmdown_ratio"},
           "rl": MOMENTUM | RATES}


@pytest.mark.parametrize("stage", SCRIPTS)
def test_the_default_of_every_flag_is_the_published_recipes(stage):
    config = parse(module_of(SCRIPTS[stage]).Config, [])
    for name, value in fields_of(getattr(published, stage)):
        if name not in NO_FLAG.get(stage, ()):
            assert getattr(config, name) == value and type(getattr(config, name)) is type(value), name


@pytest.mark.parametrize("stage", ["base", "mid", "sft", "rl"])
def test_optimizer_flags_default_to_the_published_groups(stage):
    config = parse(module_of(SCRIPTS[stage]).Config, [])
    groups = override(published.groups, matrix_lr=config.matrix_lr, embedding_lr=config.embedding_lr,
                      unembedding_lr=config.unembedding_lr, weight_decay=config.weight_decay)
    assert groups == published.groups and config.grad_clip == published.grad_clip


@pytest.mark.parametrize("stage", SCRIPTS)
@pytest.mark.parametrize("profile", PROFILES)
def test_a_command_line_says_any_recipe(profile, stage):
    wanted = getattr(PROFILES[profile], stage)
    flags = changed_flags(wanted, getattr(published, stage))
    config = parse(module_of(SCRIPTS[stage]).Config, flags)
    for name, value in fields_of(wanted):
        assert name in NO_FLAG.get(stage, ()) or getattr(config, name) == value, name
    assert bool(flags) == (profile == "small" or stage == "base" and profile in ("d26", "d32"))


def test_override_changes_rates_and_decay_alone():
    groups = override(published.groups, matrix_lr=1.0, embedding_lr=2.0, unembedding_lr=3.0, weight_decay=0.1,
                      lr_frac=0.5)
    assert {name: (group.lr, group.weight_decay) for name, group in groups.items()} == {
        "matrices": (0.5, 0.0), "wte": (1.0, 0.1), "lm_head": (1.5, 0.1), "taps": (0.5, 0.1)}
    assert list(groups) == list(published.groups)
    for name, group in groups.items():
        assert replace(group, lr=0.0, weight_decay=0.0) == replace(published.groups[name], lr=0.0, weight_decay=0.0)
    more = {**published.groups, "scalars": replace(published.groups["wte"], lr=0.5)}  # a group that no flag names
    changed = override(more, matrix_lr=1, embedding_lr=1, unembedding_lr=1, weight_decay=0, lr_frac=0.5)
    assert changed["scalars"].lr == 0.25


def test_rates_rise_stay_and_fall():
    rates = RateSchedule(warmup_ratio=0.1, warmdown_ratio=0.2, final_lr_frac=0.25)
    factors = [rates.factor(step, 100) for step in range(101)]
    assert factors[:11] == pytest.approx([*(0.1 * step for step in range(1, 11)), 1.0])
    assert set(factors[10:81]) == {1.0}
    assert factors[90] == pytest.approx(0.625) and factors[100] == 0.25
    assert {RateSchedule(0.0, 0.0, 0.0).factor(step, 10) for step in range(10)} == {1.0}


def test_momentum_rises_and_stays():
    momentum = MomentumSchedule(start=0.85, rise=0.1, steps=300)
    assert [momentum.at(step) for step in (0, 150, 300, 5000)] == pytest.approx([0.85, 0.9, 0.95, 0.95])
    assert {published.rl.momentum.at(step) for step in (0, 1, 400)} == {0.95}


def test_a_recipe_cannot_be_changed_and_another_depth_changes_nothing_else():
    with pytest.raises(FrozenInstanceError):
        small.base.total_batch_size = 1
    deep = at_depth(26)
    assert deep.base.shape.depth == 26
    assert replace(deep, base=published.base) == published
    assert changed_flags(deep.base, published.base) == ["--depth=26"]


def test_importing_a_recipe_imports_no_torch():
    code = "import sys, nanochat.recipe; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True).stdout == "False\n"


@pytest.mark.parametrize("horizon, steps", [((7, 1e12, 20.0), 7), ((-1, 1e12, 20.0), 98), ((-1, -1.0, 20.0), 19),
                                            ((0, 0.0, 0.001), 0), ((-1, -1.0, -1.0), None)])
def test_the_first_horizon_that_is_set_counts(horizon, steps):
    assert Horizon(*horizon).steps(parameters=1_000, flops_per_token=1e7, total_batch_size=1_024) == steps
