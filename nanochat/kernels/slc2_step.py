"""The convolution of SLC2 for one token: `causal_taps` and the moving on of its memory, in half the operations."""

from functools import reduce

import torch
from torch import Tensor

from nanochat.kernels.slc2 import causal_taps


def next_tap_twin(u: Tensor, taps: Tensor, past: Tensor) -> Tensor:
    """Return c (B, 1, E) of u (B, 1, E) behind past (B, K−1, E), oldest first, which takes u in, in place. taps (E, K). The definition."""
    c = causal_taps(u, taps, past.to(u.dtype))
    past.copy_(torch.cat([past, u.to(past.dtype)], dim=1)[:, 1:])
    return c


def next_tap(u: Tensor, taps: Tensor, past: Tensor) -> Tensor:
    """Return and write what `next_tap_twin` does, to the last bit."""
    if past.dtype != u.dtype:
        return next_tap_twin(u, taps, past)
    window = torch.cat([past, u], dim=1)
    past.copy_(window[:, 1:])
    return reduce(torch.add, (window * taps.t()).unbind(1)).unsqueeze(1)
