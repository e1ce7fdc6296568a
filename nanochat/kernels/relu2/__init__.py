"""relu(x)², the activation of the MLP, elementwise for x of any shape; the result is like x.

Saved for backward: on CPUs x; elsewhere the result y alone, since relu(x) = √y. The product behind the activation keeps
y too, so that the activation itself costs no memory. In float32 that root is exact; in bfloat16 its relative error is
2⁻⁹, half of what rounding relu(x) itself to bfloat16 would cost. Written in place: nothing.

The kernels on CPUs and GPUs make one pass over memory each way, where the twin makes two forward and three backward,
and have no second derivative. Under torch.compile the formulas below are traced, and the compiler fuses them itself.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from nanochat.kernels.dispatch import fused


def relu_squared_twin(x: Tensor) -> Tensor:
    """Return relu(x)². The definition."""
    return F.relu(x).square()


def backward_of_result(dy: Tensor, y: Tensor) -> Tensor:
    """Return the gradient of x, 2 · dy · √y, from y = relu(x)². The definition of the kernels' backward."""
    return (2 * dy.float() * y.float().sqrt()).to(dy.dtype)


class _ReluSquared(torch.autograd.Function):
    """relu(x)², which keeps its result alone."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        y = (fused("relu2", "forward", x) or relu_squared_twin)(x)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> Tensor:
        y, = ctx.saved_tensors
        return (fused("relu2", "backward", dy, y) or backward_of_result)(dy, y)


def relu_squared(x: Tensor) -> Tensor:
    """Return what `relu_squared_twin` returns."""
    if x.device.type == "cpu":
        return (fused("relu2", "relu_squared", x) or relu_squared_twin)(x)
    if torch.is_grad_enabled() and x.requires_grad:
        return _ReluSquared.apply(x)
    return (fused("relu2", "forward", x) or relu_squared_twin)(x)
