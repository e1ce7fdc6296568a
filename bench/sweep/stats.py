"""Statistics of a sweep: paired differences with their standard errors, over steps, documents and seeds."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

LN2 = math.log(2)
ERRORS = 2.0  # a difference counts from so many standard errors on


@dataclass(frozen=True)
class Estimate:
    """A number with its standard error; None where one value alone has none."""

    value: float
    error: float | None


def mean_of(values: Sequence[float]) -> Estimate:
    """Return the mean, with the standard error of independent values: s/√n, s with n − 1."""
    x = np.asarray(values, dtype=np.float64)
    error = float(x.std(ddof=1) / math.sqrt(len(x))) if len(x) > 1 else None
    return Estimate(float(x.mean()), error)


def paired_loss(loss: Sequence[float], first: Sequence[float], begin: float, end: float = 1.0) -> Estimate | None:
    """Return the mean difference loss − first over a part of the steps, with its standard error over steps.

    Both saw the same batches, so that what is hard in a batch is in both. None where the runs do not have the same
    number of steps.

    Args:
        loss, first: of each step, in nats.
        begin, end: of the part, from 0 to 1 of the run.
    """
    if len(loss) != len(first):
        return None
    n = len(loss)
    part = slice(min(n - 1, round(begin * n)), max(1, round(end * n)))
    difference = np.asarray(loss[part]) - np.asarray(first[part])
    return mean_of(difference) if len(difference) else None


def bits_per_byte(nats: Sequence[float], size: Sequence[float]) -> Estimate:
    """Return Σ nats / (ln 2 · Σ bytes), with its standard error over documents, as of a ratio of two sums."""
    return _ratio(np.asarray(nats, dtype=np.float64), np.asarray(size, dtype=np.float64))


def paired_bits(nats: Sequence[float], first: Sequence[float], size: Sequence[float]) -> Estimate:
    """Return the difference of bits per byte, with its standard error over documents: each is in both sums."""
    return _ratio(np.asarray(nats, dtype=np.float64) - np.asarray(first, dtype=np.float64),
                  np.asarray(size, dtype=np.float64))


def _ratio(nats: np.ndarray, size: np.ndarray) -> Estimate:
    """Return the ratio of sums r = Σa/Σb, in bits, and its error √(n/(n−1) · Σ(a − r·b)²) / Σb."""
    n, whole = len(nats), size.sum()
    ratio = nats.sum() / whole
    error = math.sqrt(n / (n - 1) * float(((nats - ratio * size) ** 2).sum())) / whole / LN2 if n > 1 else None
    return Estimate(float(ratio / LN2), error)


def verdict(difference: Estimate) -> str:
    """Return what a difference over seeds says, lower being better: kept, not kept or harmful."""
    if difference.error is None:
        return "one seed: no verdict"
    if difference.value < -ERRORS * difference.error:
        return "kept"
    return "harmful" if difference.value > ERRORS * difference.error else "not kept"
