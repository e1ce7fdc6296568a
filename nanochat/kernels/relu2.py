"""relu(x)², the MLP's activation: one pass fewer forward and two fewer backward than PyTorch makes of it, which a CPU feels."""

import torch
import torch.nn.functional as F
from torch import Tensor


def relu_squared_twin(x: Tensor) -> Tensor:
    """Return relu(x)² of any shape; the definition."""
    return F.relu(x).square()


class _ReluSquared(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        positive = x.relu()
        ctx.save_for_backward(positive)
        return positive * positive

    @staticmethod
    def backward(ctx, dy: Tensor) -> Tensor:
        positive, = ctx.saved_tensors  # zero where the gradient is
        return (dy * positive).mul_(2)


def relu_squared(x: Tensor) -> Tensor:
    """Return what `relu_squared_twin` returns. Under torch.compile the twin is used: the compiler fuses it itself."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return relu_squared_twin(x)
    return _ReluSquared.apply(x)
