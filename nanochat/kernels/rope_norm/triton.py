"""Rotary positions followed by the RMS norm, and the gradient, on GPUs, one kernel each; a program takes a token.

x (B, T, H, D) with any strides but for a contiguous last dimension, D even; cos, sin (T, D/2) or (B, T, D/2), float32;
results are contiguous. Arithmetic is float32, rounded once when a result is written. Offsets are 64 bits wide.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanochat.kernels.dispatch import launch
from nanochat.kernels.rms_norm import EPSILON


@triton.jit
def _pair(X, x_h, h, d, inside, HALF: tl.constexpr):
    """Return both halves of each head, (HEADS, PAIRS) in float32."""
    at = X + h * x_h + d
    x1 = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    return x1, tl.load(at + HALF, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _tables(COS, SIN, b, t, cos_b, cos_t, sin_b, sin_t, d, HALF: tl.constexpr):
    cos = tl.load(COS + b * cos_b + t * cos_t + d, mask=d < HALF, other=0.0)
    return cos, tl.load(SIN + b * sin_b + t * sin_t + d, mask=d < HALF, other=0.0)


@triton.jit
def _rope_norm(X, COS, SIN, Y, R, T, epsilon, x_b, x_t, x_h, cos_b, cos_t, sin_b, sin_t,
               H: tl.constexpr, HALF: tl.constexpr, HEADS: tl.constexpr, PAIRS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    b, t = row // T, row % T
    h, d = tl.arange(0, HEADS)[:, None], tl.arange(0, PAIRS)[None, :]
    inside = (h < H) & (d < HALF)
    cos, sin = _tables(COS, SIN, b, t, cos_b, cos_t, sin_b, sin_t, d, HALF)
    x1, x2 = _pair(X + b * x_b + t * x_t, x_h, h, d, inside, HALF)
    y1, y2 = x1 * cos + x2 * sin, x2 * cos - x1 * sin
    r = 1 / tl.sqrt_rn(tl.sum(y1 * y1 + y2 * y2, axis=1, keep_dims=True) / (2 * HALF) + epsilon)
    tl.store(R + row * H + h, r, mask=h < H)
    at = Y + row * (H * 2 * HALF) + h * (2 * HALF) + d
    tl.store(at, y1 * r, mask=inside)
    tl.store(at + HALF, y2 * r, mask=inside)


@triton.jit
def _rope_norm_gradient(DY, Y, R, COS, SIN, DX, T, dy_b, dy_t, dy_h, y_b, y_t, y_h, cos_b, cos_t, sin_b, sin_t,
                        H: tl.constexpr, HALF: tl.constexpr, HEADS: tl.constexpr, PAIRS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    b, t = row // T, row % T
    h, d = tl.arange(0, HEADS)[:, None], tl.arange(0, PAIRS)[None, :]
    inside = (h < H) & (d < HALF)
    cos, sin = _tables(COS, SIN, b, t, cos_b, cos_t, sin_b, sin_t, d, HALF)
    r = tl.load(R + row * H + h, mask=h < H, other=0.0)
    y1, y2 = _pair(Y + b * y_b + t * y_t, y_h, h, d, inside, HALF)
    g1, g2 = _pair(DY + b * dy_b + t * dy_t, dy_h, h, d, inside, HALF)
    mean = tl.sum(g1 * y1 + g2 * y2, axis=1, keep_dims=True) / (2 * HALF)
    g1, g2 = r * (g1 - y1 * mean), r * (g2 - y2 * mean)
    at = DX + row * (H * 2 * HALF) + h * (2 * HALF) + d
    tl.store(at, g1 * cos - g2 * sin, mask=inside)
    tl.store(at + HALF, g1 * sin + g2 * cos, mask=inside)


def _tile(H: int, D: int) -> dict:
    heads, pairs = triton.next_power_of_2(H), triton.next_power_of_2(D // 2)
    return {"H": H, "HALF": D // 2, "HEADS": heads, "PAIRS": pairs, "num_warps": min(16, max(1, heads * pairs // 256))}


def _table_strides(*tables: Tensor) -> list[int]:
    """Return the strides of a row and of a position of each table; 0 where all rows share one."""
    return [stride for table in tables for stride in (table.stride(0) if table.dim() == 3 else 0, table.stride(-2))]


def _dense(t: Tensor) -> Tensor:
    return t if t.stride(-1) == 1 else t.contiguous()


def forward(x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Return the RMS norm of each head of x after the rotation by its position, and the norm's factors (B, T, H, 1)."""
    (B, T, H, D), x, cos, sin = x.shape, _dense(x), _dense(cos), _dense(sin)
    y = torch.empty(B, T, H, D, dtype=x.dtype, device=x.device)
    r = torch.empty(B, T, H, 1, dtype=torch.float32, device=x.device)
    if y.numel():
        launch(_rope_norm, (B * T,), x, cos, sin, y, r, T, EPSILON, *x.stride()[:3], *_table_strides(cos, sin),
               **_tile(H, D))
    return y, r


def backward(dy: Tensor, y: Tensor, r: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return the gradient of x, from y and r as `forward` gave them."""
    (B, T, H, D), dy, y, cos, sin = y.shape, _dense(dy), _dense(y), _dense(cos), _dense(sin)
    dx = torch.empty(B, T, H, D, dtype=dy.dtype, device=dy.device)
    if dx.numel():
        launch(_rope_norm_gradient, (B * T,), dy, y, r.contiguous(), cos, sin, dx, T, *dy.stride()[:3], *y.stride()[:3],
               *_table_strides(cos, sin), **_tile(H, D))
    return dx
