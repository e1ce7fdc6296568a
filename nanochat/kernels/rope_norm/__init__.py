"""Rotary positions followed by the RMS norm, which queries and keys go through.

x (B, T, H, D), D even; rope is (cos, sin), each (T, D/2) or (B, T, D/2), float32. The result has x's shape and dtype.

Saved for backward: on CPUs x; elsewhere the result y, which attention keeps anyway, and the factors of the norm,
(B, T, H, 1) in float32; cos and sin. Only x gets a gradient. Written in place: nothing. The kernels on CPUs and GPUs
make one pass over memory each way and have no second derivative. Under torch.compile on GPUs the formulas below are
traced, and the compiler fuses them; on CPUs the twin is.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nanochat.kernels.dispatch import fused
from nanochat.kernels.rms_norm import rms_norm_twin

EPSILON = torch.finfo(torch.float32).eps  # as in `rms_norm`


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
    rotated = rotate(x.float(), (cos, sin))
    r = torch.rsqrt(rotated.square().mean(-1, keepdim=True) + EPSILON)
    return (rotated * r).to(x.dtype), r


def backward_pytorch(dy: Tensor, y: Tensor, r: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return the gradient of x: r·(dy − y·mean(dy·y)), turned back. The definition of the GPU kernel's backward."""
    wide, y = dy.float(), y.float()
    d = r * (wide - y * (wide * y).mean(-1, keepdim=True))
    return rotate(d, (cos, -sin)).to(dy.dtype)  # the transpose of a rotation turns back


class _RopeNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        y, r = (fused("rope_norm", "forward", x, cos, sin) or forward_pytorch)(x, cos, sin)
        ctx.save_for_backward(y, r, cos, sin)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor, None, None]:
        y, r, cos, sin = ctx.saved_tensors
        return (fused("rope_norm", "backward", dy, y) or backward_pytorch)(dy, y, r, cos, sin), None, None


def rope_norm(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Return what `rope_norm_twin` returns, up to rounding."""
    if any(table.dtype != torch.float32 for table in rope):
        return rope_norm_twin(x, rope)
    if x.device.type == "cpu":
        kernel = fused("rope_norm", "rope_norm", x, *rope)
        return rope_norm_twin(x, rope) if kernel is None else kernel(x, *rope)
    if torch.is_grad_enabled() and x.requires_grad:
        return _RopeNorm.apply(x, *rope)
    return (fused("rope_norm", "forward", x, *rope) or forward_pytorch)(x, *rope)[0]
