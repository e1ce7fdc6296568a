"""Softcapped cross-entropy of a chunk of logits and its gradient on GPUs, in one kernel.

A row of logits is read twice and written once.

No running maximum is needed. A softcapped logit s = 15·tanh(z/15) lies within ±15 and exp(s) between 3e-7 and 3.3e6, so
that the sum over any vocabulary neither overflows float32 nor loses small terms to underflow. Nothing is subtracted in
the exponent either: a probability is exp(s) · (1/Σ), whose error is that of rounding s, while exp(s − log Σ) would
round at the size of log Σ. tanh is computed as 1 − 2/(exp(2z/15) + 1), off by at most 1e-7, or 1.5e-6 in s, far below
the rounding of bfloat16 logits. For float32 logits near 0, where that is not small against s itself, a polynomial is
used.
"""

import triton
import triton.language as tl
from torch import Tensor

from nanochat.kernels.cross_entropy import IGNORE, SOFTCAP
from nanochat.kernels.dispatch import launch

BLOCK = 8192  # logits that a program works on at a time: 16 for each of 512 threads
CAP = tl.constexpr(SOFTCAP)
SKIPPED = tl.constexpr(IGNORE)
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _tanh(z):
    """Return tanh(z/15) in float32."""
    u = z.to(tl.float32) * (1 / CAP)
    t = 1 - 2 / (1 + tl.exp2(u * (2 * LOG2_E)))
    if z.dtype == tl.float32:
        v = u * u
        # (tanh(u)/u − 1) / u², fitted where u² < 0.7: tanh is then off by at most 7e-9
        fit = -0.33333276 + v * (0.13331711 + v * (
            -0.053813435 + v * (0.021174354 + v * (-0.0072178161 + v * 0.0014791069))))
        t = tl.where(v < 0.7, u + u * v * fit, t)
    return t


@triton.jit
def _cross_entropy(Z, TARGETS, FACTORS, LOSSES, V, stride, FACTORED: tl.constexpr, WANT_GRAD: tl.constexpr,
                   BLOCK: tl.constexpr):
    """Write the loss of one row and, with WANT_GRAD, overwrite its logits with their gradient."""
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
            t = _tanh(tl.load(z + start + columns, mask=inside, other=0.0))
            sums += tl.where(inside, tl.exp2(t * (CAP * LOG2_E)), 0.0)
        total = tl.sum(sums)
        tl.store(LOSSES + row, tl.log2(total) * (1 / LOG2_E) - _tanh(of_target) * CAP)
        if WANT_GRAD:
            tl.debug_barrier()  # the target's logit has been read before any is overwritten
            factor = 1.0
            if FACTORED:
                factor *= tl.load(FACTORS + row)
            blocks = tl.cdiv(V, BLOCK)
            for i in range(0, blocks):  # from the end: what was read last is still in a cache
                at = (blocks - 1 - i) * BLOCK + columns
                t = _tanh(tl.load(z + at, mask=at < V, other=0.0))
                p = tl.exp2(t * (CAP * LOG2_E)) * (1 / total)
                tl.store(z + at, tl.where(at == target, p - 1, p) * ((1 - t * t) * factor), mask=at < V)


def softcapped_cross_entropy_(z: Tensor, targets: Tensor, factors: Tensor | None, losses: Tensor,
                              want_grad: bool = True) -> None:
    """Write the losses and, with want_grad, overwrite z with its gradient. A program takes a row.

    The contract is that of `nanochat.kernels.cross_entropy.softcapped_cross_entropy_`. The rows of z may have any
    stride; all else is contiguous. A target outside the vocabulary, other than −1, makes the loss NaN.
    """
    N, V = z.shape
    block = min(BLOCK, triton.next_power_of_2(V))
    if N:
        launch(_cross_entropy, (N,), z, targets, targets if factors is None else factors, losses, V, z.stride(0),
               FACTORED=factors is not None, WANT_GRAD=want_grad, BLOCK=block, num_warps=max(1, block // 512))
