"""A matrix times one row, together with the norm before it and the activation or the sum behind it.

A single sequence decodes by such products. At one row a product takes the time that reading the matrix takes, and every
further operation, however small, costs a kernel launch; so they are done in the same kernel.

y (1, 1, N) = f(norm(x) weightᵀ) + add, in x's dtype, from x (1, 1, K) and weight (N, K). There is no backward. Written
in place: nothing. On CUDA with Triton one kernel, elsewhere the twin.
"""

from functools import partial

import torch.nn.functional as F
from torch import Tensor

from nanochat.kernels.dispatch import Backend, Draw, TrainingShape, Trial, backend, kernels_of, triton_ready
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


def _triton(*args: Tensor | None, **options: bool) -> Tensor:
    return kernels_of("fused_matvec", "triton").fused_matvec(*args, **options)


BACKENDS = {"triton": Backend(_triton, triton_ready, "eager"), "torch": Backend(fused_matvec_twin)}


def fused_matvec(x: Tensor, weight: Tensor, add: Tensor | None = None, *, normed: bool = False,
                 activated: bool = False) -> Tensor:
    """Return what `fused_matvec_twin` returns, up to rounding."""
    return backend("fused_matvec", BACKENDS, x)(x, weight, add, normed=normed, activated=activated)


def trial(shape: TrainingShape, draw: Draw) -> Trial:
    """Return what the chooser measures: the first half of an MLP, for one row. It is sampling that uses it."""
    options = {"normed": True, "activated": True}
    args = draw(1, 1, shape.E, grad=False), draw(4 * shape.E, shape.E, grad=False)
    return Trial(partial(fused_matvec, **options), partial(fused_matvec_twin, **options), args, asked=args[:1],
                 inside_blocks=False)
