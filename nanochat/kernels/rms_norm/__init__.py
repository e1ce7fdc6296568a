"""RMS norm without parameters, over the last dimension of x (..., E), float32 or bfloat16; the result is like x.

Saved for backward: x alone. Written in place: nothing. On CPUs a kernel makes one pass over memory forward and one
backward, and has no second derivative. Elsewhere, and under torch.compile, the twin runs.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from nanochat.kernels.dispatch import fused
from nanochat.kernels.rms_norm import cpu


def rms_norm_twin(x: Tensor) -> Tensor:
    """Return x / √(mean x² + ε). The definition. ε is PyTorch's default, that of float32, for bfloat16 too."""
    return F.rms_norm(x, (x.shape[-1],))


class _RmsNorm(torch.autograd.Function):
    """The CPU kernels under autograd."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return cpu.forward(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> Tensor:
        return cpu.backward(dy, *ctx.saved_tensors)


def rms_norm(x: Tensor) -> Tensor:
    """Return what `rms_norm_twin` returns, up to rounding."""
    kernel = fused("rms_norm", "forward", x)
    if kernel is None:
        return rms_norm_twin(x)
    return _RmsNorm.apply(x) if torch.is_grad_enabled() and x.requires_grad else kernel(x)
