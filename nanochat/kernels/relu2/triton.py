"""relu(x)² and its gradient on GPUs, one elementwise kernel each. Any shape, strides and dtype; results are contiguous.

Arithmetic is float32, rounded once when a result is written. Offsets are 64 bits wide.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanochat.kernels.dispatch import launch

BLOCK = 4096  # elements a program; with 8 warps and 16 bits a thread reads 16 bytes twice


@triton.jit
def _relu2(X, Y, n, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(X + at, mask=at < n, other=0.0).to(tl.float32)
    x = tl.where(x <= 0, 0.0, x)  # NaN stays NaN
    tl.store(Y + at, x * x, mask=at < n)


@triton.jit
def _relu2_gradient(DY, Y, DX, n, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    dy = tl.load(DY + at, mask=at < n, other=0.0).to(tl.float32)
    y = tl.load(Y + at, mask=at < n, other=0.0).to(tl.float32)
    tl.store(DX + at, 2 * dy * tl.sqrt_rn(y), mask=at < n)


def forward(x: Tensor) -> Tensor:
    """Return relu(x)²."""
    x, y = x.contiguous(), torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if n := x.numel():
        launch(_relu2, (triton.cdiv(n, BLOCK),), x, y, n, BLOCK=BLOCK, num_warps=8)
    return y


def backward(dy: Tensor, y: Tensor) -> Tensor:
    """Return 2 · dy · √y, the gradient of x, from the result y of `forward`."""
    dy, y = dy.contiguous(), y.contiguous()
    dx = torch.empty(dy.shape, dtype=dy.dtype, device=dy.device)
    if n := dy.numel():
        launch(_relu2_gradient, (triton.cdiv(n, BLOCK),), dy, y, dx, n, BLOCK=BLOCK, num_warps=8)
    return dx
