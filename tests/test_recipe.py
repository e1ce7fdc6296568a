"""Recipes: what the scripts do by default is the published one, and a command line can say any other."""

import subprocess
import sys
from dataclasses import FrozenInstanceError, replace

import pytest

from nanochat.cli import parse
from nanochat.recipe import (
    PROFILES,
    RECIPES,
    Horizon,
    MomentumSchedule,
    RateSchedule,
    at_depth,
    changed_flags,
    fields_of,
    modern,
    override,
    published,
    small,
)
from nanochat.stages import STAGES
from tests.conftest import ROOT
from tests.helpers import module_of

SCRIPTS = {"tokenizer": "scripts.tok_train", "base": "scripts.base_train", "base_eval": "scripts.base_eval",
           "identity": "dev.gen_identity", "mid": "scripts.mid_train", "sft": "scripts.chat_sft",
           "rl": "scripts.chat_rl", "chat_eval": "scripts.chat_eval"}
RATES = {"warmup_ratio", "warmdown_ratio", "final_lr_frac"}
MOMENTUM = {"momentum_start", "momentum_peak", "momentum_steps", "momentum_end"}  # with flags in base training alone
LATER = MOMENTUM | RATES | {"warmup_steps"}
NO_FLAG = {"mid": LATER - {"warmdown_ratio"}, "sft": LATER - {"warmdown_ratio"}, "rl": LATER}


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
@pytest.mark.parametrize("stage", SCRIPTS)
def test_the_default_of_every_flag_is_the_recipes(stage, recipe):
    flags = [f"--recipe={recipe.name}"] if stage in STAGES else []
    config = parse(module_of(SCRIPTS[stage]).Config, flags)
    for name, value in fields_of(getattr(recipe if flags else published, stage)):
        if name not in NO_FLAG.get(stage, ()):
            assert getattr(config, name) == value and type(getattr(config, name)) is type(value), name
    if flags:
        matrices = recipe.groups["matrices"]
        if stage != "base":  # there the decay has fallen to 0
            matrices = replace(matrices, weight_decay=0.0)
        assert config.groups() == {**recipe.groups, "matrices": matrices} and config.grad_clip == recipe.grad_clip
        assert config.groups(0.5, 0.25)["matrices"] == replace(matrices, lr=matrices.lr / 2,
                                                               weight_decay=matrices.weight_decay / 4)


@pytest.mark.parametrize("stage", ["base", "mid", "sft", "rl"])
def test_without_a_recipe_the_flags_default_to_the_published_one(stage):
    config = parse(module_of(SCRIPTS[stage]).Config, [])
    assert replace(config, recipe="published") == parse(module_of(SCRIPTS[stage]).Config, ["--recipe", "published"])


def test_one_recipe_trains_the_model_of_another():
    config = parse(module_of(SCRIPTS["base"]).Config, ["--recipe=modern", "--optimizer=published", "--matrix_lr=0.5"])
    assert config.groups() == {**published.groups, **{name: replace(published.groups[name], lr=0.5)
                                                      for name in ("matrices", "taps")}}
    assert config.momentum_peak == modern.base.momentum.momentum_peak  # of the schedules, which are the recipe's


@pytest.mark.parametrize("stage", SCRIPTS)
@pytest.mark.parametrize("profile", PROFILES)
def test_a_command_line_says_any_recipe(profile, stage):
    wanted = getattr(PROFILES[profile], stage)
    default = RECIPES[PROFILES[profile].name]
    flags = changed_flags(wanted, getattr(default, stage))
    config = parse(module_of(SCRIPTS[stage]).Config, flags)
    for name, value in fields_of(wanted):
        assert name in NO_FLAG.get(stage, ()) or getattr(config, name) == value, name
    assert bool(flags) == (profile == "small" or stage == "base" and profile != "d20")


def test_override_changes_rates_and_decay_alone():
    groups = override(published.groups, matrix_lr=1.0, embedding_lr=2.0, unembedding_lr=3.0, weight_decay=0.1,
                      matrix_decay=0.2, lr_frac=0.5)
    assert {name: (group.lr, group.weight_decay) for name, group in groups.items()} == {
        "matrices": (0.5, 0.2), "wte": (1.0, 0.1), "lm_head": (1.5, 0.1), "taps": (0.5, 0.1),
        "value_embeds": (0.075, 0.1), "residual_scales": (0.0025, 0.1), "x0_scales": (0.25, 0.1),
        "scalars": (0.1, 0.1)}
    assert list(groups) == list(published.groups)
    for name, group in groups.items():
        assert replace(group, lr=0.0, weight_decay=0.0) == replace(published.groups[name], lr=0.0, weight_decay=0.0)
    own = override(modern.groups, matrix_lr=1, embedding_lr=1, unembedding_lr=1)  # no decay named: that of the group
    assert {name: group.weight_decay for name, group in own.items()} == {
        name: 0.0 if name == "matrices" else group.weight_decay for name, group in modern.groups.items()}


def test_rates_rise_stay_and_fall():
    rates = RateSchedule(warmup_ratio=0.1, warmdown_ratio=0.2, final_lr_frac=0.25)
    factors = [rates.factor(step, 100) for step in range(101)]
    assert factors[:11] == pytest.approx([*(0.1 * step for step in range(1, 11)), 1.0])
    assert set(factors[10:81]) == {1.0}
    assert factors[90] == pytest.approx(0.625) and factors[100] == 0.25
    assert {RateSchedule(0.0, 0.0, 0.0).factor(step, 10) for step in range(10)} == {1.0}
    assert [rates.fallen(step, 100) for step in (0, 80, 85, 100)] == pytest.approx([0, 0, 0.25, 1])
    assert [replace(rates, warmup_steps=4).factor(step, 100) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert replace(rates, warmup_steps=40).factor(9, 100) == 1.0  # at most a tenth of the run


def test_momentum_rises_and_stays():
    momentum = MomentumSchedule(0.85, 0.95, momentum_steps=300, momentum_end=0.95)
    assert [momentum.at(step) for step in (0, 150, 300, 5000)] == pytest.approx([0.85, 0.9, 0.95, 0.95])
    falls = replace(momentum, momentum_end=0.9)
    assert [falls.at(5000, fallen) for fallen in (0.0, 0.5, 1.0)] == pytest.approx([0.95, 0.925, 0.9])
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
