"""relu(x)², the activation of the MLP, elementwise for x of any shape; the result is like x.

Saved for backward: one tensor of x's size, x for the CPU kernel and relu(x) elsewhere. Written in place: nothing. The
CPU kernel makes one pass over memory each way, where the twin makes two forward and three backward, and has no
second derivative. In eager mode elsewhere, a shorter backward than the twin's runs. Under torch.compile the twin runs:
the compiler fuses it itself.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat.kernels.dispatch import fused


def relu_squared_twin(x: Tensor) -> Tensor:
    """Return relu(x)². The definition."""
    return F.relu(x).square()


class _ReluSquared(torch.autograd.Function):
    """Plain PyTorch, with two operations backward instead of three."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        positive = x.relu()
        ctx.save_for_backward(positive)
        return positive * positive

    @staticmethod
    def backward(ctx, dy: Tensor) -> Tensor:
        positive, = ctx.saved_tensors
        return (dy * positive).mul_(2)


def relu_squared(x: Tensor) -> Tensor:
    """Return what `relu_squared_twin` returns."""
    kernel = fused("relu2", "relu_squared", x)
    if kernel is None and torch.is_grad_enabled() and x.requires_grad and not torch.compiler.is_compiling():
        return _ReluSquared.apply(x)
    return (kernel or relu_squared_twin)(x)
