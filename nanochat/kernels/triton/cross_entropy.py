"""Softcapped cross-entropy of a chunk of logits and its gradient, in one kernel: a row is read twice and written once.

With s = 15·tanh(z/15) the softcapped logit and r = 1/(1 + exp(2z/15)) it holds that s = 15 − 30·r: r in [0, 1] says how far s lies below
its bound. So exp(s − 15) = exp(−30·r) stays between 9e-14 and 1 whatever z is, a sum of such terms over any vocabulary neither overflows
float32 nor loses its small terms to underflow, and no running maximum is needed. The loss log Σ exp(−30·r) + 30·r[target] never holds the
15, so nothing is lost to it. r is off by half a unit in its last place, at most 6e-8, which makes the exponent wrong by under 2e-6,
as much as one rounding of a float32 near 15; the slope of the softcap is 1 − tanh² = 4·r·(1 − r).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanochat.kernels.cross_entropy import IGNORE, SOFTCAP

BLOCK = 8192  # logits a program has in hand: 16 for each of 512 threads
TO_EXPONENT = tl.constexpr(2 / SOFTCAP * 1.4426950408889634)  # exp(2z/15) = 2^(z · this)
DEPTH = tl.constexpr(2 * SOFTCAP * 1.4426950408889634)  # exp(−30·r) = 2^(−r · this)
SKIPPED = tl.constexpr(IGNORE)
NATS = tl.constexpr(0.6931471805599453)  # in a bit


@triton.jit
def _below(z):
    return 1 / (1 + tl.exp2(z.to(tl.float32) * TO_EXPONENT))


@triton.jit
def _row(Z, TARGETS, FACTORS, LOSSES, V, stride, FACTORED: tl.constexpr, WANT_GRAD: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    z = Z + row * stride
    target = tl.load(TARGETS + row)
    columns = tl.arange(0, BLOCK)
    if target == SKIPPED:
        tl.store(LOSSES + row, 0.0)
        if WANT_GRAD:
            for start in range(0, V, BLOCK):
                tl.store(z + start + columns, 0.0, mask=start + columns < V)
    else:
        of_target = tl.load(z + target, mask=(target >= 0) & (target < V), other=float("nan"))
        sums = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, V, BLOCK):
            inside = start + columns < V
            r = _below(tl.load(z + start + columns, mask=inside, other=0.0))
            sums += tl.where(inside, tl.exp2(r * -DEPTH), 0.0)
        bits = tl.log2(tl.sum(sums))
        tl.store(LOSSES + row, (bits + _below(of_target) * DEPTH) * NATS)
        if WANT_GRAD:
            tl.debug_barrier()  # the target's logit has been read before any is overwritten
            scale = 4.0
            if FACTORED:
                scale *= tl.load(FACTORS + row)
            blocks = tl.cdiv(V, BLOCK)
            for i in range(0, blocks):  # from the end: what was read last is still in a cache
                at = (blocks - 1 - i) * BLOCK + columns
                r = _below(tl.load(z + at, mask=at < V, other=0.0))
                p = tl.exp2(r * -DEPTH - bits)
                tl.store(z + at, tl.where(at == target, p - 1, p) * (r * (1 - r) * scale), mask=at < V)


def softcapped_(z: Tensor, targets: Tensor, factors: Tensor | None, losses: Tensor, want_grad: bool = True) -> None:
    """Write the loss of each row to losses and, with want_grad, overwrite z with the gradient of Σ factors·losses with respect to z.

    z (n, V) bfloat16 or float32 raw logits, rows of any stride, columns contiguous; targets (n,) int64, −1 where there is nothing to
    predict: the loss and the gradient there are 0, whatever the factor. Another target outside the vocabulary makes the loss NaN.
    factors (n,) float32, or None for 1; losses (n,) float32, not multiplied with the factors. All but z are contiguous. Without
    want_grad z stays as it is. Arithmetic is float32; a program takes a row.
    """
    n, V = z.shape
    block = min(BLOCK, triton.next_power_of_2(V))
    if n:
        with torch.cuda.device_of(z):  # Triton launches on the current device
            _row[(n,)](z, targets, targets if factors is None else factors, losses, V, z.stride(0), FACTORED=factors is not None,
                       WANT_GRAD=want_grad, BLOCK=block, num_warps=max(1, block // 512))
