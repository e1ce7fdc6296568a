"""Rotary positions and the RMS norm behind them, which queries and keys go through. On a CPU one pass forward and one backward."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nanochat.kernels import native
from nanochat.kernels.rms_norm import rms_norm_twin


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Turn each pair (x[d], x[d + D/2]) of x (B, T, H, D) by its position's angle; rope is cos, sin (T, D/2) or (B, T, D/2).

    The result is float32: what follows (a norm) wants it.
    """
    cos, sin = (table.unsqueeze(-2) for table in rope)
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat([x1 * cos + x2 * sin, x2 * cos - x1 * sin], dim=-1)


def rope_norm_twin(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Return the RMS norm over D of x (B, T, H, D) turned by rope (see `rotate`), in x's dtype; the definition."""
    return rms_norm_twin(rotate(x, rope)).to(x.dtype)


class _RopeNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(x, cos, sin)
        return native.rope_norm(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor, None, None]:
        return native.rope_norm_backward(dy, *ctx.saved_tensors), None, None


def rope_norm(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Return what `rope_norm_twin` returns, up to rounding."""
    cos, sin = rope
    if not native.ready(x, cos, sin) or cos.dtype != torch.float32 or sin.dtype != torch.float32:
        return rope_norm_twin(x, rope)
    return _RopeNorm.apply(x, cos, sin) if torch.is_grad_enabled() and x.requires_grad else native.rope_norm(x, cos, sin)
