"""The laws of learning rate, weight decay and batch: at their reference they change nothing, and elsewhere they give
the numbers worked out by hand."""

import pytest

from nanochat.recipe.laws import automatic_batch, decay_factor, rate_factor

# matrices + head in millions, by depth, at a vocabulary of 32,768
SIZES = {8: 41.0, 12: 106.7, 16: 225.8, 18: 311.5, 20: 416.2, 24: 697.6}


def test_rates_go_with_the_root_of_the_batch():
    assert rate_factor(2 ** 19, 2 ** 19) == 1.0 and rate_factor(2 ** 11, 0) == 1.0
    assert rate_factor(2 ** 21, 2 ** 19) == 2.0 and rate_factor(2 ** 11, 2 ** 19) == 0.0625


def test_weight_decay_goes_with_the_root_of_the_batch_and_against_the_horizon():
    assert decay_factor(2 ** 19, 2 ** 19, 1e9, 1e9) == 1.0
    assert decay_factor(2 ** 21, 2 ** 19, 8e9, 1e9) == 0.25
    assert decay_factor(2 ** 21, 2 ** 19, 8e9, 0) == 1.0   # a recipe whose weight decay holds everywhere
    assert decay_factor(2 ** 21, 0, 8e9, 1e9) == 0.125


@pytest.mark.parametrize("depth, power", [(8, 18), (12, 19), (16, 19), (18, 20), (20, 20), (24, 20)])
def test_the_automatic_batch_is_a_power_of_two_that_grows_with_the_horizon(depth, power):
    for ratio in (8, 12):  # it is the same on both sides
        assert automatic_batch(ratio * SIZES[depth] * 1e6, ratio * SIZES[12] * 1e6) == 2 ** power


def test_a_longer_horizon_of_the_same_model_has_a_larger_batch():
    assert [automatic_batch(factor * 1e9, 1e9) for factor in (1e-3, 0.1, 1, 4, 10)] == [2 ** 15, 2 ** 18, 2 ** 19,
                                                                                       2 ** 20, 2 ** 20]
