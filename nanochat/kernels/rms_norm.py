"""RMS norm without parameters. On a CPU one pass forward and one backward, which keeps nothing but its input."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from nanochat.kernels import native


def rms_norm_twin(x: Tensor) -> Tensor:
    """Return x / √(mean x² + ε) over the last dimension, with PyTorch's default ε: float32's, for bfloat16 too. The definition."""
    return F.rms_norm(x, (x.shape[-1],))


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return native.rms_norm(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> Tensor:
        return native.rms_norm_backward(dy, *ctx.saved_tensors)


def rms_norm(x: Tensor) -> Tensor:
    """Return what `rms_norm_twin` returns, up to rounding."""
    if not native.ready(x):
        return rms_norm_twin(x)
    return _RmsNorm.apply(x) if torch.is_grad_enabled() and x.requires_grad else native.rms_norm(x)
