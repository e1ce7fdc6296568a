"""A matrix and one row: what a single sequence's decoding is made of. What stands before and behind each product is done with it.

At one row a product is read from memory at the speed of memory, and each further operation, however small, costs a start of its own.
"""

import torch.nn.functional as F
from torch import Tensor

from nanochat.kernels import triton_kernels
from nanochat.kernels.rms_norm import rms_norm_twin


def one_row_twin(x: Tensor, weight: Tensor, add: Tensor | None = None, *, normed: bool = False, activated: bool = False) -> Tensor:
    """Return y (1, 1, N) of x (1, 1, K) and weight (N, K): x weightᵀ, of the RMS norm of x where normed; relu(y)² where activated; with
    add (1, 1, N) added, where given. The definition."""
    y = F.linear(rms_norm_twin(x) if normed else x, weight)
    if activated:
        y = F.relu(y).square()
    return y if add is None else add + y


def one_row(x: Tensor, weight: Tensor, add: Tensor | None = None, *, normed: bool = False, activated: bool = False) -> Tensor:
    """Return what `one_row_twin` does, up to rounding; in one kernel on CUDA."""
    fused = triton_kernels("one_row") if x.device.type == "cuda" else None
    return (one_row_twin if fused is None else fused.one_row)(x, weight, add, normed=normed, activated=activated)
