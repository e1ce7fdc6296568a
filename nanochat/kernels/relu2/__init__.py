"""relu(x)², the activation of the MLP, elementwise for x of any shape; the result is like x.

Saved for backward: on CPUs x; elsewhere the result y alone, since relu(x) = √y. The product behind the activation keeps
y too, so that the activation itself costs no memory. In float32 that root is exact; in bfloat16 its relative error is
2⁻⁹, half of what rounding relu(x) itself to bfloat16 would cost. Written in place: nothing.

Implementations: "cpu" and "triton", kernels that make one pass over memory each way, where the twin makes two forward
and three backward; "torch", plain PyTorch, which torch.compile fuses itself. None but the twin has a second derivative.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from nanochat.kernels.cpu import ready as cpu_ready
from nanochat.kernels.dispatch import (
    Backend,
    Draw,
    TrainingShape,
    Trial,
    backend,
    define_operator,
    kernels_of,
    triton_ready,
)


def relu_squared_twin(x: Tensor) -> Tensor:
    """Return relu(x)². The definition."""
    return F.relu(x).square()


def backward_of_result(dy: Tensor, y: Tensor) -> Tensor:
    """Return the gradient of x, 2 · dy · √y, from y = relu(x)². The definition of the kernels' backward."""
    return (2 * dy.float() * y.float().sqrt()).to(dy.dtype)


class _ReluSquared(torch.autograd.Function):
    """relu(x)² in plain PyTorch, which keeps its result alone."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        y = relu_squared_twin(x)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> Tensor:
        return backward_of_result(dy, *ctx.saved_tensors)


def _pytorch(x: Tensor) -> Tensor:
    if x.device.type != "cpu" and torch.is_grad_enabled() and x.requires_grad:
        return _ReluSquared.apply(x)
    return relu_squared_twin(x)


def _cpu(x: Tensor) -> Tensor:
    return kernels_of("relu2", "cpu").relu_squared(x)


def _forward(x: Tensor) -> Tensor:
    return (kernels_of("relu2", "triton").forward if triton_ready(x) else relu_squared_twin)(x)


def _backward(dy: Tensor, y: Tensor) -> Tensor:
    return (kernels_of("relu2", "triton").backward if triton_ready(y) else backward_of_result)(dy, y)


define_operator("relu2", "(Tensor x) -> Tensor", _forward, lambda x: x.new_empty(x.shape),
                lambda ctx, dy: torch.ops.nanochat.relu2_backward(dy, *ctx.saved_tensors),
                lambda ctx, inputs, output: ctx.save_for_backward(output))
define_operator("relu2_backward", "(Tensor dy, Tensor y) -> Tensor", _backward, lambda dy, y: dy.new_empty(dy.shape))


def _triton(x: Tensor) -> Tensor:
    return torch.ops.nanochat.relu2(x)


BACKENDS = {"cpu": Backend(_cpu, cpu_ready), "triton": Backend(_triton, triton_ready, "eager"),
            "torch": Backend(_pytorch)}


def relu_squared(x: Tensor) -> Tensor:
    """Return what `relu_squared_twin` returns."""
    return backend("relu2", BACKENDS, x)(x)


def trial(shape: TrainingShape, draw: Draw) -> Trial:
    """Return what the chooser measures: the activation of the MLP."""
    return Trial(relu_squared, relu_squared_twin, (draw(shape.B, shape.T, 4 * shape.E),))
