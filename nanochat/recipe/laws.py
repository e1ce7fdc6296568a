"""How learning rates, weight decay and batch follow the size of a run.

    batch = automatic_batch(horizon, reference_horizon)                 # tokens of an optimizer step
    rates = rate_factor(batch, reference_batch)                         # of all learning rates
    decay = decay_factor(batch, reference_batch, horizon, reference_horizon)    # of Muon's weight decay

A recipe's learning rates hold at one batch, and its weight decay at one batch and one horizon, the tokens of the whole
run. The reference horizon is that of the model of `BaseRecipe.reference_depth` with the same vocabulary and rule: the
ratio of tokens to parameters times its matrices and its head.

Rates go with the square root of the batch, as AdamW's do (Malladi et al., arXiv 2205.10782). The weight decay keeps the
horizon of its average, in epochs, constant: it goes with rate and batch, and against the tokens (Wang and Aitchison,
arXiv 2405.13698; Bergsma et al., arXiv 2505.13738). The best batch grows with the horizon to the power 0.383 (Bergsma
et al.).
"""

import math

BATCH = 2 ** 19          # tokens that are best at the reference horizon
BATCH_EXPONENT = 0.383


def rate_factor(batch: int, reference_batch: int) -> float:
    """Return what the learning rates are multiplied by at a batch of so many tokens.

    reference_batch: the batch at which they hold; 0: at any.
    """
    return math.sqrt(batch / reference_batch) if reference_batch else 1.0


def decay_factor(batch: int, reference_batch: int, horizon: float, reference_horizon: float) -> float:
    """Return what Muon's weight decay is multiplied by.

    Args:
        batch, reference_batch: see `rate_factor`.
        horizon: tokens of the run.
        reference_horizon: the horizon at which the weight decay holds; 0: at any, and at any batch.
    """
    return rate_factor(batch, reference_batch) * reference_horizon / horizon if reference_horizon else 1.0


def automatic_batch(horizon: float, reference_horizon: float) -> int:
    """Return the power of 2 that is nearest to the best batch, in tokens, on a scale of ratios.

    Args:
        horizon: tokens of the run.
        reference_horizon: the horizon at which BATCH is best.
    """
    return 2 ** round(math.log2(BATCH * (horizon / reference_horizon) ** BATCH_EXPONENT))
