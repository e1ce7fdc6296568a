"""Rotary positions followed by the RMS norm, which queries and keys go through.

x (B, T, H, D), D even; rope is (cos, sin), each (T, D/2) or (B, T, D/2), float32. The result has x's shape and dtype.

Saved for backward: on CPUs x; elsewhere the result y, which attention keeps anyway, and the factors of the norm,
(B, T, H, 1) in float32; cos and sin. Only x gets a gradient. Written in place: nothing.

Implementations: "cpu" and "triton", kernels that make one pass over memory each way; "torch", plain PyTorch, which
torch.compile fuses itself. None but the twin has a second derivative.
"""

import torch
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
from nanochat.kernels.rms_norm import gradient_from_result, norm_with_factors, rms_norm_twin


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Return x with each pair (x[d], x[d + D/2]) rotated by its position's angle; float32 for the norm after it."""
    cos, sin = (table.unsqueeze(-2) for table in rope)
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat([x1 * cos + x2 * sin, x2 * cos - x1 * sin], dim=-1)


def rope_norm_twin(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Return the RMS norm over D of the rotated x, in x's dtype. The definition."""
    return rms_norm_twin(rotate(x, rope)).to(x.dtype)


def forward_pytorch(x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Return y and the factors of the norm, r (B, T, H, 1) in float32. The definition of the GPU kernel's forward."""
    y, r = norm_with_factors(rotate(x.float(), (cos, sin)))
    return y.to(x.dtype), r


def backward_pytorch(dy: Tensor, y: Tensor, r: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return the gradient of x: r·(dy − y·mean(dy·y)), turned back. The definition of the GPU kernel's backward."""
    return rotate(gradient_from_result(dy, y, r), (cos, -sin)).to(dy.dtype)  # the transpose of a rotation turns back


class _RopeNorm(torch.autograd.Function):
    """Rotation and norm in plain PyTorch, which keep their result and the norm's factors alone."""

    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        y, r = forward_pytorch(x, cos, sin)
        ctx.save_for_backward(y, r, cos, sin)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor, None, None]:
        return backward_pytorch(dy, *ctx.saved_tensors), None, None


def _float32(rope: tuple[Tensor, Tensor]) -> bool:
    return all(table.dtype == torch.float32 for table in rope)


def _pytorch(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    if x.device.type == "cpu" or not _float32(rope):
        return rope_norm_twin(x, rope)
    if torch.is_grad_enabled() and x.requires_grad:
        return _RopeNorm.apply(x, *rope)
    return forward_pytorch(x, *rope)[0]


def _cpu(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    return kernels_of("rope_norm", "cpu").rope_norm(x, *rope)


def _forward(x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return (kernels_of("rope_norm", "triton").forward if triton_ready(x) else forward_pytorch)(x, cos, sin)


def _backward(dy: Tensor, y: Tensor, r: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return (kernels_of("rope_norm", "triton").backward if triton_ready(y) else backward_pytorch)(dy, y, r, cos, sin)


def _gradients(ctx, dy: Tensor, dr: None) -> tuple[Tensor, None, None]:
    return torch.ops.nanochat.rope_norm_backward(dy, *ctx.saved_tensors), None, None


define_operator("rope_norm", "(Tensor x, Tensor cos, Tensor sin) -> (Tensor, Tensor)", _forward, lambda x, cos, sin: (
    x.new_empty(x.shape), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)),
    _gradients, lambda ctx, inputs, output: ctx.save_for_backward(*output, *inputs[1:]))
define_operator("rope_norm_backward", "(Tensor dy, Tensor y, Tensor r, Tensor cos, Tensor sin) -> Tensor", _backward,
                lambda dy, y, r, cos, sin: dy.new_empty(dy.shape))


def _triton(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    return torch.ops.nanochat.rope_norm(x, *rope)[0]


BACKENDS = {"cpu": Backend(_cpu, lambda x, rope: cpu_ready(x, *rope) and _float32(rope)),
            "triton": Backend(_triton, lambda x, rope: triton_ready(x) and _float32(rope), "eager"),
            "torch": Backend(_pytorch)}


def rope_norm(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Return what `rope_norm_twin` returns, up to rounding."""
    return backend("rope_norm", BACKENDS, x, rope)(x, rope)


def trial(shape: TrainingShape, draw: Draw) -> Trial:
    """Return what the chooser measures: the queries of attention."""
    x = draw(shape.B, shape.T, shape.H, shape.D)
    angles = torch.rand(shape.T, shape.D // 2, device=x.device) * 6
    return Trial(rope_norm, rope_norm_twin, (x, (angles.cos(), angles.sin())))
