"""Rotary positions followed by the RMS norm, and the gradient, on CPUs, by the Rust crate.

x (B, T, H, D), float32 or bfloat16, D even; cos, sin (T, D/2) or (B, T, D/2), float32; results are contiguous.
"""

import torch
from torch import Tensor

from nanochat.kernels.cpu import IS_BF16, call, dense, differentiable, gradient_like, heads, mismatch


def _rope_norm(x: Tensor, cos: Tensor, sin: Tensor, dy: Tensor | None) -> Tensor:
    B, T, H, D = x.shape
    for table in (cos, sin):
        if x.dtype not in IS_BF16 or not dense(x) or D % 2 or table.dtype != torch.float32 or not dense(table) \
                or table.shape not in ((T, D // 2), (B, T, D // 2)):
            raise mismatch("x is (B, T, H, D), float32 or bfloat16, D even; cos and sin are (T, D/2) or (B, T, D/2), "
                           "float32; the last dimension contiguous", x=x, cos=cos, sin=sin)
    y = torch.empty(x.shape, dtype=x.dtype)
    if y.numel():
        dy = None if dy is None else gradient_like(dy, x)
        tables = [(t.data_ptr(), t.stride(0) if t.dim() == 3 else 0, t.stride(-2)) for t in (cos, sin)]
        call("rope_norm", x.dtype, (B, T, H, D), heads(x), None if dy is None else heads(dy), heads(y), *tables)
    return y


def forward(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return the RMS norm of each head of x after the rotation by its position.

    A pair (x[d], x[d + D/2]) = (x1, x2) becomes (x1·cos + x2·sin, x2·cos − x1·sin).
    """
    return _rope_norm(x, cos, sin, None)


def backward(dy: Tensor, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return the gradient of x from that of `forward(x, cos, sin)`."""
    return _rope_norm(x, cos, sin, dy)


rope_norm = differentiable(forward, backward)
