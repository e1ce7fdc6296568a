"""How batch, learning rates and weight decay follow from how long a model is trained.

The laws and exponents are those of nanochat in the first half of 2026. They were fitted there on models of depth 12, so
all of them are relative to a batch and a horizon for which the numbers of the recipe hold.
"""

import math

REFERENCE_BATCH = 2 ** 19  # tokens of the best batch of the model of the reference depth
EXPONENT = 0.383           # of the best batch in the horizon: Bergsma et al., arXiv 2505.13738


def rate_factor(batch: int, reference_batch: int) -> float:
    """Return the factor of the learning rates for a batch of so many tokens: √(batch / reference_batch); 1 where
    reference_batch is 0."""
    return math.sqrt(batch / reference_batch) if reference_batch else 1.0


def decay_factor(batch: int, reference_batch: int, tokens: float, reference_tokens: float) -> float:
    """Return the factor of Muon's weight decay: √(batch / reference_batch) · reference_tokens / tokens.

    So the time over which weights are forgotten stays the same part of the run (Wang and Aitchison, arXiv 2405.13698).
    1 where reference_tokens is 0.

    Args:
        batch, reference_batch: tokens of a step, as in `rate_factor`.
        tokens, reference_tokens: of the whole run, and of the one for which the decay holds.
    """
    return rate_factor(batch, reference_batch) * reference_tokens / tokens if reference_tokens else 1.0


def automatic_batch(tokens: float, reference_tokens: float) -> int:
    """Return the batch for a run of so many tokens: the power of two nearest to 2^19 · (tokens /
    reference_tokens)^0.383."""
    return 2 ** round(math.log2(REFERENCE_BATCH * (tokens / reference_tokens) ** EXPONENT))
