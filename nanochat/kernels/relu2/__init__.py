"""relu(x)², the activation of the MLP, elementwise for x of any shape; the result is like x.

Saved for backward: one tensor of x's size, x for the CPU kernel and relu(x) elsewhere. Written in place: nothing. The
CPU kernel makes one pass over memory each way, where the twin makes two forward and three backward, and has no
second derivative. In eager mode elsewhere, a shorter backward than the twin's runs. Under torch.compile the twin runs:
the compiler fuses it itself.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat.kernels.cpu import ready as cpu_ready
from nanochat.kernels.dispatch import Backend, Draw, TrainingShape, Trial, backend, kernels_of


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


def _pytorch(x: Tensor) -> Tensor:
    if torch.is_grad_enabled() and x.requires_grad and not torch.compiler.is_compiling():
        return _ReluSquared.apply(x)
    return relu_squared_twin(x)


def _cpu(x: Tensor) -> Tensor:
    return kernels_of("relu2", "cpu").relu_squared(x)


BACKENDS = {"cpu": Backend(_cpu, cpu_ready), "torch": Backend(_pytorch)}


def relu_squared(x: Tensor) -> Tensor:
    """Return what `relu_squared_twin` returns."""
    return backend("relu2", BACKENDS, x)(x)


def trial(shape: TrainingShape, draw: Draw) -> Trial:
    """Return what the chooser measures: the activation of the MLP."""
    return Trial(relu_squared, relu_squared_twin, (draw(shape.B, shape.T, 4 * shape.E),))
