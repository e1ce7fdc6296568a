"""The matrix times one row on GPUs, with the norm before it and the activation or the sum behind it in the same kernel.

    y[n] = f(r · Σ_k x[k] · weight[n, k]) + add[n],   r = 1/√(mean x² + ε) or 1,   f = relu² or identity

How the work is divided: a program computes a few elements of y. It reads its rows of the matrix once, in tiles of TILE
elements, and x, which stays in cache, beside them. Every program computes the norm again; it is one number. So there
are enough programs for all multiprocessors and enough loads in flight without splitting a sum over programs, and every
run gives the same numbers. Arithmetic is float32, rounded once when y is written.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanochat.kernels.dispatch import on_device_of

TILE = 8192  # elements of the matrix in one load
WIDEST = 2048  # elements of x in one tile, at most


@triton.jit
def _fused_matvec(x, weight, add, y, N, row, K: tl.constexpr, NORMED: tl.constexpr, ACTIVATED: tl.constexpr,
                  ADD: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """Compute BLOCK_N elements of y."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    weight += n.to(tl.int64)[:, None] * row
    products = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    squares = tl.zeros((BLOCK_K,), tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        matrix = tl.load(weight + k[None, :], mask=(n < N)[:, None] & (k < K)[None, :], other=0.0).to(tl.float32)
        value = tl.load(x + k, mask=k < K, other=0.0).to(tl.float32)
        products += matrix * value[None, :]
        if NORMED:
            squares += value * value
    out = tl.sum(products, axis=1)
    if NORMED:
        out *= tl.rsqrt(tl.sum(squares, axis=0) / K + 1.1920928955078125e-07)
    if ACTIVATED:
        out = tl.maximum(out, 0.0)
        out *= out
    if ADD:
        out += tl.load(add + n, mask=n < N, other=0.0).to(tl.float32)
    tl.store(y + n, out.to(y.dtype.element_ty), mask=n < N)


def sizes(K: int) -> tuple[int, int]:
    """Return (elements of y a program computes, elements of x in one tile) for weight (N, K)."""
    width = min(WIDEST, max(16, triton.next_power_of_2(K)))
    if K > WIDEST:
        width = WIDEST // 2
    return max(1, min(32, TILE // width)), width


def fused_matvec(x: Tensor, weight: Tensor, add: Tensor | None = None, *, normed: bool = False,
                 activated: bool = False) -> Tensor:
    """Return y (1, 1, N), contiguous, in x's dtype. The contract is that of `fused_matvec_twin`.

    x (1, 1, K); weight (N, K), rows with any stride; add (1, 1, N) or None; the last dimension of each is contiguous.
    Any floating-point dtypes.
    """
    N, K = weight.shape
    y = torch.empty(1, 1, N, dtype=x.dtype, device=x.device)
    block_n, block_k = sizes(K)
    with on_device_of(x):
        _fused_matvec[(triton.cdiv(N, block_n),)](
            x, weight, add, y, N, weight.stride(0), K=K, NORMED=normed, ACTIVATED=activated, ADD=add is not None,
            BLOCK_N=block_n, BLOCK_K=block_k, num_warps=4)
    return y
