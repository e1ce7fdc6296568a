"""SLC2's core for one new token a row, behind the last K−1 gated inputs, which it moves on in place: what decoding runs."""

from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat.kernels.slc2 import causal_taps, gated_input, kernels_for


def next_tap_twin(u: Tensor, taps: Tensor, past: Tensor) -> Tensor:
    """Return c (B, 1, E) of u (B, 1, E) behind past (B, K−1, E), oldest first, which takes u in, in place. taps (E, K). The definition."""
    c = causal_taps(u, taps, past.to(u.dtype))
    past.copy_(torch.cat([past, u.to(past.dtype)], dim=1)[:, 1:])
    return c


def next_tap(u: Tensor, taps: Tensor, past: Tensor) -> Tensor:
    """Return and write what `next_tap_twin` does, to the last bit, in half the operations."""
    if past.dtype != u.dtype:
        return next_tap_twin(u, taps, past)
    window = torch.cat([past, u], dim=1)
    past.copy_(window[:, 1:])
    return reduce(torch.add, (window * taps.t()).unbind(1)).unsqueeze(1)


def slc2_step_twin(x: Tensor, B: Tensor, A: Tensor, alpha: Tensor, taps: Tensor, past: Tensor) -> Tensor:
    """Return y = B · silu(c) of shape (B, 1, E), from x, B (B, 1, E), A (B, 1, D), alpha (B, 1, H), taps (E, K). The definition.

    past (B, K−1, E), of any dtype, oldest first, takes the gated input in, in place.
    """
    return B * F.silu(next_tap_twin(gated_input(x, A, alpha), taps.to(x.dtype), past))


def slc2_step(x: Tensor, B: Tensor, A: Tensor, alpha: Tensor, taps: Tensor, past: Tensor) -> Tensor:
    """Return and write what `slc2_step_twin` does: in one kernel where there is one, up to rounding, and else to the last bit.

    On GPUs it can be captured in a CUDA graph once it has run.
    """
    kernels = kernels_for(x, B, A, alpha, taps, past, K=taps.shape[1])
    if kernels is not None:
        return kernels.step(x, B, A, alpha, taps, past)
    return B * F.silu(next_tap(gated_input(x, A, alpha), taps.to(x.dtype), past))
