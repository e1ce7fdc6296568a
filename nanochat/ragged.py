"""Rows of different lengths to batches of few shapes.

    ids, counts = padded(rows, device, budget=1 << 14)     # (B, T), and the length of each row: the model's `counts`
    T = round_length(700)                                  # 768, the next of four lengths in each octave

On a GPU a shape that was not met before has a price: cuDNN plans its attention for about a second where it is used, the
allocator finds no block of that size, kernels are specialised anew. There T and the number of rows are rounded up to
one of a few values. On a CPU a new shape costs nothing and padding costs time: nothing is rounded.

No real row's result depends on it: padding is on the right, where a causal model does not see it, and rows that only
fill the batch are behind the real ones.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

LEAST_LENGTH = 16   # tokens of the shortest batch on a GPU
CACHED_MULTIPLE = 256  # positions of a cache that attention behind a prefix reads on a GPU


def has_few_shapes(device: torch.device | str) -> bool:
    """Return whether batches on this device are padded so that few different shapes occur."""
    return torch.device(device).type == "cuda"


def round_length(n: int, least: int = LEAST_LENGTH, most: int | None = None, parts: int = 4) -> int:
    """Return the smallest allowed length that is at least n; at most `most`, where n is not above it.

    Allowed are `least`, and from there on `parts` lengths in each octave: least · 2ᵏ · (1 + j / parts).
    """
    octave = least
    while 2 * octave < n:
        octave *= 2
    length = octave + -(-max(0, n - octave) * parts // octave) * octave // parts
    return length if most is None or n > most else min(length, most)


def round_rows(n: int, most: int) -> int:
    """Return the smallest of 1 to 8, 10, 12, 14, 16, 20, … (four in each octave) that is at least n, but at most the
    larger of `most` and n."""
    step = 1 << max(0, (n - 1).bit_length() - 3)
    return min(n + -n % step, max(n, most))


def length_on(device: torch.device | str, n: int, least: int = LEAST_LENGTH, most: int | None = None, parts: int = 4
              ) -> int:
    """Return the T of a batch on this device whose longest row has n tokens; see `round_length`."""
    return round_length(n, least, most, parts) if has_few_shapes(device) else n


def cached_on(device: torch.device | str, n: int) -> int:
    """Return how many positions of a cache to read on this device where n are needed and a mask hides the others."""
    return n + -n % CACHED_MULTIPLE if has_few_shapes(device) else n


def padded(rows: Sequence[Sequence[int]], device: torch.device | str, budget: int, most_rows: int | None = None
           ) -> tuple[Tensor, list[int]]:
    """Return ids (B, T) of rows of different lengths, padded with zeros on the right, and B counts of real tokens.

    On a GPU there may be further rows behind, which only fill the batch, with a count of 1.

    Args:
        rows: not empty.
        budget: tokens of a full batch, padding included; no row is added beyond it.
        most_rows: rows of a full batch, where there is such a limit.
    """
    counts = [len(row) for row in rows]
    T = length_on(device, max(counts))
    if has_few_shapes(device):
        full = budget // T if most_rows is None else min(budget // T, most_rows)
        counts += [1] * (round_rows(len(rows), full) - len(rows))
    ids = torch.zeros(len(counts), T, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, :counts[i]] = torch.tensor(row)
    return ids.to(device), counts
