"""A matrix times one row, together with the norm before it and the activation or the sum behind it.

A single sequence decodes by such products. At one row a product takes the time that reading the matrix takes, and every
further operation, however small, costs a kernel launch; so they are done in the same kernel.

y (1, 1, N) = f(norm(x) weightᵀ) + add, in x's dtype, from x (1, 1, K) and weight (N, K). There is no backward. Written
in place: nothing. On CUDA with Triton one kernel, elsewhere the twin.
"""

import torch.nn.functional as F
from torch import Tensor

from nanochat.kernels.dispatch import fused
from nanochat.kernels.rms_norm import rms_norm_twin


def fused_matvec_twin(x: Tensor, weight: Tensor, add: Tensor | None = None, *, normed: bool = False,
                      activated: bool = False) -> Tensor:
    """Return y (1, 1, N). The definition.

    Args:
        x: (1, 1, K)
        weight: (N, K)
        add: (1, 1, N), added at the end
        normed: take the RMS norm of x first
        activated: take relu(·)² of the product
    """
    y = F.linear(rms_norm_twin(x) if normed else x, weight)
    if activated:
        y = F.relu(y).square()
    return y if add is None else add + y


def fused_matvec(x: Tensor, weight: Tensor, add: Tensor | None = None, *, normed: bool = False,
                 activated: bool = False) -> Tensor:
    """Return what `fused_matvec_twin` returns, up to rounding."""
    kernel = fused("fused_matvec", "fused_matvec", x) or fused_matvec_twin
    return kernel(x, weight, add, normed=normed, activated=activated)
