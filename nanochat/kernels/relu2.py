"""relu(x)², the MLP's activation. On a CPU one pass forward and one backward; in plain PyTorch one fewer forward and two fewer backward."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from nanochat.kernels import native


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


class _NativeReluSquared(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return native.relu2(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> Tensor:
        return native.relu2_backward(dy, *ctx.saved_tensors)


def relu_squared(x: Tensor) -> Tensor:
    """Return what `relu_squared_twin` returns. Under torch.compile the twin is used: the compiler fuses it itself."""
    if torch.compiler.is_compiling():
        return relu_squared_twin(x)
    wants_grad = torch.is_grad_enabled() and x.requires_grad
    if native.ready(x):
        return _NativeReluSquared.apply(x) if wants_grad else native.relu2(x)
    return _ReluSquared.apply(x) if wants_grad else relu_squared_twin(x)
