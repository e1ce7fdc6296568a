"""The residual sum with its RMS norm, and the gradient, on GPUs, one kernel each; a program takes a row.

x, y (..., E) of one dtype, any strides; results are contiguous. Arithmetic is float32, rounded once when a result is
written; the norm is that of the rounded sum. Offsets are 64 bits wide.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanochat.kernels.dispatch import launch
from nanochat.kernels.rms_norm import EPSILON


@triton.jit
def _add_norm(X, Y, S, H, R, epsilon, E: tl.constexpr, BLOCK: tl.constexpr):
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    at, inside = row * E + column, column < E
    x = tl.load(X + at, mask=inside, other=0.0).to(tl.float32)
    s = (x + tl.load(Y + at, mask=inside, other=0.0).to(tl.float32)).to(S.dtype.element_ty)
    tl.store(S + at, s, mask=inside)
    s = s.to(tl.float32)
    r = 1 / tl.sqrt_rn(tl.sum(s * s) / E + epsilon)
    tl.store(R + row, r)
    tl.store(H + at, s * r, mask=inside)


@triton.jit
def _add_norm_gradient(DS, DH, H, R, DX, E: tl.constexpr, BLOCK: tl.constexpr, WITH_DS: tl.constexpr):
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    at, inside = row * E + column, column < E
    dh = tl.load(DH + at, mask=inside, other=0.0).to(tl.float32)
    h = tl.load(H + at, mask=inside, other=0.0).to(tl.float32)
    d = tl.load(R + row) * (dh - h * (tl.sum(dh * h) / E))
    if WITH_DS:
        d += tl.load(DS + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(DX + at, d, mask=inside)


def _tile(E: int) -> dict:
    block = triton.next_power_of_2(E)
    # 16 elements a thread: two reads of 16 bytes of each tensor in 16 bits
    return {"E": E, "BLOCK": block, "num_warps": min(16, max(1, block // 512))}


def forward(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return s = x + y, h = rms_norm(s), and r (..., 1), the factors of the norm, in float32."""
    x, y = x.contiguous(), y.contiguous()
    s, h = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(2))
    r = torch.empty(*x.shape[:-1], 1, dtype=torch.float32, device=x.device)
    if x.numel():
        launch(_add_norm, (r.numel(),), x, y, s, h, r, EPSILON, **_tile(x.shape[-1]))
    return s, h, r


def backward(ds: Tensor | None, dh: Tensor, h: Tensor, r: Tensor) -> Tensor:
    """Return ds + r·(dh − h·mean(dh·h)), from h and r as `forward` gave them; without ds where it is None."""
    dh, h, ds = dh.contiguous(), h.contiguous(), None if ds is None else ds.contiguous()
    dx = torch.empty(h.shape, dtype=h.dtype, device=h.device)
    if h.numel():
        launch(_add_norm_gradient, (r.numel(),), dh if ds is None else ds, dh, h, r, dx, WITH_DS=ds is not None,
               **_tile(h.shape[-1]))
    return dx
