"""The residual sum and the RMS norm behind it, in one pass: s = x + y and h = rms_norm(s), both wanted.

x, y, s, h (..., E) of one shape and dtype. Saved for backward, elsewhere than on CPUs: h, which the product behind the
norm keeps anyway, and the factors r = 1/√(mean s² + ε), (...) in float32. Since s·r = h, the gradient needs no s: the
residual stream costs no memory. Written in place: nothing.

On GPUs a Triton kernel makes one pass over memory each way. Under torch.compile the formulas below are traced, and the
compiler fuses them. On CPUs it is the sum, then the kernel of `rms_norm`.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nanochat.kernels.dispatch import fused
from nanochat.kernels.rms_norm import rms_norm, rms_norm_twin

EPSILON = torch.finfo(torch.float32).eps  # as in `rms_norm`


def add_norm_twin(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return s = x + y and its RMS norm over the last dimension. The definition."""
    s = x + y
    return s, rms_norm_twin(s)


def forward_pytorch(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return s, h and r (..., 1) in float32. The definition of the kernel's forward."""
    s = x + y
    wide = s.float()
    r = torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPSILON)
    return s, (wide * r).to(s.dtype), r


def backward_pytorch(ds: Tensor | None, dh: Tensor, h: Tensor, r: Tensor) -> Tensor:
    """Return the gradient of x, which is that of y too: ds + r·(dh − h·mean(dh·h)). The definition of the kernel's.

    ds is None where s is not used.
    """
    wide, h = dh.float(), h.float()
    d = r * (wide - h * (wide * h).mean(-1, keepdim=True))
    return (d if ds is None else ds.float() + d).to(dh.dtype)


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        s, h, r = (fused("add_norm", "forward", x, y) or forward_pytorch)(x, y)
        ctx.save_for_backward(h, r)
        if not torch.compiler.is_compiling():  # the compiler knows no gradients that are absent
            ctx.set_materialize_grads(False)
        return s, h

    @staticmethod
    @once_differentiable
    def backward(ctx, ds: Tensor | None, dh: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        if dh is None:
            return ds, ds
        h, r = ctx.saved_tensors
        dx = (fused("add_norm", "backward", dh, h) or backward_pytorch)(ds, dh, h, r)
        return dx, dx


def add_norm(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return what `add_norm_twin` returns, up to rounding."""
    if x.device.type == "cpu":
        s = x + y
        return s, rms_norm(s)
    if torch.is_grad_enabled() and (x.requires_grad or y.requires_grad):
        return _AddNorm.apply(x, y)
    return (fused("add_norm", "forward", x, y) or forward_pytorch)(x, y)[:2]
