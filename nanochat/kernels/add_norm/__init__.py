"""The residual sum and the RMS norm behind it, in one pass: s = x + y and h = rms_norm(s), both wanted.

x, y, s, h (..., E) of one shape and dtype. Saved for backward, elsewhere than on CPUs: h, which the product behind the
norm keeps anyway, and the factors r = 1/√(mean s² + ε), (...) in float32. Since s·r = h, the gradient needs no s: the
residual stream costs no memory. Written in place: nothing.

Implementations: "cpu", the sum, then `rms_norm`; "triton", a kernel that makes one pass over memory each way; "torch",
plain PyTorch, which torch.compile fuses itself.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

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
from nanochat.kernels.rms_norm import gradient_from_result, norm_with_factors, rms_norm, rms_norm_twin


def add_norm_twin(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return s = x + y and its RMS norm over the last dimension. The definition."""
    s = x + y
    return s, rms_norm_twin(s)


def forward_pytorch(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return s, h and r (..., 1) in float32. The definition of the kernel's forward."""
    s = x + y
    h, r = norm_with_factors(s.float())
    return s, h.to(s.dtype), r


def backward_pytorch(ds: Tensor | None, dh: Tensor, h: Tensor, r: Tensor) -> Tensor:
    """Return the gradient of x, which is that of y too: ds + r·(dh − h·mean(dh·h)). The definition of the kernel's.

    ds is None where s is not used.
    """
    d = gradient_from_result(dh, h, r)
    return (d if ds is None else ds.float() + d).to(dh.dtype)


class _AddNorm(torch.autograd.Function):
    """Sum and norm in plain PyTorch, which keep h and r alone."""

    @staticmethod
    def forward(ctx, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        s, h, r = forward_pytorch(x, y)
        ctx.save_for_backward(h, r)
        if not torch.compiler.is_compiling():  # the compiler knows no gradients that are absent
            ctx.set_materialize_grads(False)
        return s, h

    @staticmethod
    @once_differentiable
    def backward(ctx, ds: Tensor | None, dh: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        dx = ds if dh is None else backward_pytorch(ds, dh, *ctx.saved_tensors)
        return dx, dx


def _pytorch(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    if torch.is_grad_enabled() and (x.requires_grad or y.requires_grad):
        return _AddNorm.apply(x, y)
    return forward_pytorch(x, y)[:2]


def _cpu(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    s = x + y
    return s, rms_norm(s)


def _forward(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return (kernels_of("add_norm", "triton").forward if triton_ready(x) else forward_pytorch)(x, y)


def _backward(ds: Tensor | None, dh: Tensor, h: Tensor, r: Tensor) -> Tensor:
    return (kernels_of("add_norm", "triton").backward if triton_ready(h) else backward_pytorch)(ds, dh, h, r)


def _save(ctx, inputs: tuple[Tensor, Tensor], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.save_for_backward(*output[1:])
    ctx.set_materialize_grads(False)


def _gradients(ctx, ds: Tensor | None, dh: Tensor | None, dr: None) -> tuple[Tensor | None, Tensor | None]:
    dx = ds if dh is None else torch.ops.nanochat.add_norm_backward(ds, dh, *ctx.saved_tensors)
    return dx, dx


define_operator("add_norm", "(Tensor x, Tensor y) -> (Tensor, Tensor, Tensor)", _forward, lambda x, y: (
    x.new_empty(x.shape), x.new_empty(x.shape), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)),
    _gradients, _save)
define_operator("add_norm_backward", "(Tensor? ds, Tensor dh, Tensor h, Tensor r) -> Tensor", _backward,
                lambda ds, dh, h, r: h.new_empty(h.shape))


def _triton(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return torch.ops.nanochat.add_norm(x, y)[:2]


BACKENDS = {"cpu": Backend(_cpu, lambda x, y: x.device.type == "cpu"),
            "triton": Backend(_triton, triton_ready, "eager"), "torch": Backend(_pytorch)}


def add_norm(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return what `add_norm_twin` returns, up to rounding."""
    return backend("add_norm", BACKENDS, x, y)(x, y)


def trial(shape: TrainingShape, draw: Draw) -> Trial:
    """Return what the chooser measures: the sum behind a mixer and the norm before the MLP."""
    return Trial(add_norm, add_norm_twin, tuple(draw(shape.B, shape.T, shape.E) for _ in range(2)))
