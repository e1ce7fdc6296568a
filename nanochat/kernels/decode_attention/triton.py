"""Attention of one new token a row over the KV cache on GPUs, rotation, norm and the write into the cache included.

    y[b, h] = softmax(q[b, h] · keys[b, low…p] / √D) · values[b, low…p],
    p = positions[b],   low = max(0, p − window + 1)

How the work is divided: a row's keys are split into ranges of SPLIT keys. A program takes the query heads that share
one key head, goes through one range in blocks, and keeps a running maximum, sum and weighted sum, all float32. Programs
of ranges that the row does not see end at once and read nothing. A second kernel combines a row's ranges; where one
range holds all keys, it is not launched. Each key is read once, however many query heads share it: 2 · G · D elements a
key and row.

Sizes depend on shapes alone and positions are read on the device, so that a CUDA graph can capture it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanochat.kernels.dispatch import launch

PROGRAMS = 512       # wanted at least: a few for each multiprocessor
SPLIT = 64, 1024     # keys of a range, at least and at most
SPLITS = 128         # ranges of a row, at most: one program combines them
BLOCK_BYTES = 8192   # of keys in one load


@triton.jit
def _weighted(p, v):
    """Return Σ_n p[h, n] · v[n, d] on tensor cores, p as a sum of two numbers of v's dtype to keep its precision."""
    if v.dtype == tl.float32:
        return tl.dot(p, v, input_precision="ieee")
    high = p.to(v.dtype)
    return tl.dot(high, v) + tl.dot((p - high.to(tl.float32)).to(v.dtype), v)


@triton.jit
def _rotated(x, row, d, cos, sin, mask, D: tl.constexpr):
    """Return rows of x, rotated and RMS-normalised; `row` (M, 1) are their offsets, d (1, BLOCK_D) the channels."""
    HALF: tl.constexpr = D // 2
    first = d < HALF
    angle = tl.where(first, d, d - HALF)
    own = tl.load(x + row + d, mask=mask, other=0.0).to(tl.float32)
    other = tl.load(x + row + tl.where(first, d + HALF, angle), mask=mask, other=0.0).to(tl.float32)
    c, s = tl.load(cos + angle, mask=d < D, other=0.0), tl.load(sin + angle, mask=d < D, other=0.0)
    rotated = own * c + other * tl.where(first, s, -s)
    return rotated * tl.rsqrt(tl.sum(rotated * rotated, axis=1) / D + 1.1920928955078125e-07)[:, None]


@triton.jit
def _split(q, k, v, cos, sin, keys, values, positions, y, parts, tops, sums, scale, window,
           q_b, q_h, k_b, k_h, v_b, v_h, cos_b, sin_b, keys_b, keys_s, keys_h, values_b, values_s, values_h,
           SHARED: tl.constexpr, D: tl.constexpr, SPLIT: tl.constexpr, N: tl.constexpr,
           BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr, ONE: tl.constexpr):
    """Attend to one range of a row's keys; write y where it is the only range (ONE), else the partial results."""
    b, head, split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    place = tl.load(positions + b).to(tl.int32)
    low = tl.maximum(place - window + 1, 0)
    first, end = tl.maximum(split * SPLIT, low), tl.minimum(split * SPLIT + SPLIT, place)  # the new key is not read
    own = (split * SPLIT <= place) & (place < split * SPLIT + SPLIT)
    if (first < end) | own:
        h, d, n, one = tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_D), tl.arange(0, N), tl.arange(0, 1)[:, None]
        real = (h[:, None] < SHARED) & (d[None, :] < D)
        dtype = keys.dtype.element_ty
        cos += b * cos_b
        sin += b * sin_b
        query = _rotated(q, b * q_b + (head * SHARED + h[:, None]) * q_h, d[None, :], cos, sin, real, D).to(dtype)
        keys += b * keys_b + head * keys_h
        values += b * values_b + head * values_h
        top = tl.full((BLOCK_H,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK_H,), tl.float32)
        sum_ = tl.zeros((BLOCK_H, BLOCK_D), tl.float32)
        if own:
            whole, here = d[None, :] < D, place.to(tl.int64)
            new_k = _rotated(k, b * k_b + head * k_h + one, d[None, :], cos, sin, whole, D).to(dtype)
            new_v = tl.load(v + b * v_b + head * v_h + d[None, :], mask=whole, other=0.0).to(dtype)
            tl.store(keys + here * keys_s + d[None, :], new_k, mask=whole)
            tl.store(values + here * values_s + d[None, :], new_v, mask=whole)
            top = tl.sum(query.to(tl.float32) * new_k.to(tl.float32), axis=1) * scale
            total += 1.0
            sum_ += new_v.to(tl.float32)
        for start in range(first, end, N):
            there = start + n < end
            row = (start + n).to(tl.int64)[:, None]
            mask = there[:, None] & (d[None, :] < D)
            key = tl.load(keys + row * keys_s + d[None, :], mask=mask, other=0.0)
            value = tl.load(values + row * values_s + d[None, :], mask=mask, other=0.0)
            if SHARED == 1:
                score = tl.sum(key.to(tl.float32) * query.to(tl.float32), axis=1)[None, :]
            else:
                score = tl.dot(query, tl.trans(key), input_precision="ieee")
            score = tl.where(there[None, :], score * scale, float("-inf"))
            higher = tl.maximum(top, tl.max(score, axis=1))
            shrink, p = tl.exp(top - higher), tl.exp(score - higher[:, None])
            if SHARED == 1:
                more = tl.sum(tl.trans(p) * value.to(tl.float32), axis=0)[None, :]
            else:
                more = _weighted(p, value)
            top, total, sum_ = higher, total * shrink + tl.sum(p, axis=1), sum_ * shrink[:, None] + more
        out = (b * tl.num_programs(1) + head) * SHARED + h
        if ONE:
            tl.store(y + out[:, None] * D + d[None, :], (sum_ / total[:, None]).to(y.dtype.element_ty), mask=real)
        else:
            out = out * tl.num_programs(2) + split
            tl.store(tops + out, top, mask=h < SHARED)
            tl.store(sums + out, total, mask=h < SHARED)
            tl.store(parts + out[:, None] * D + d[None, :], sum_, mask=real)


@triton.jit
def _combine(parts, tops, sums, positions, y, window, splits, H: tl.constexpr, D: tl.constexpr, SPLIT: tl.constexpr,
             SPLITS: tl.constexpr, BLOCK_D: tl.constexpr):
    """Combine the partial results of a row and query head into y."""
    b, s, d = tl.program_id(0).to(tl.int64), tl.arange(0, SPLITS), tl.arange(0, BLOCK_D)
    place = tl.load(positions + b).to(tl.int32)
    written = (s * SPLIT <= place) & (s * SPLIT + SPLIT > place - window + 1)
    row = b * H + tl.program_id(1)
    top = tl.load(tops + row * splits + s, mask=written, other=float("-inf"))
    weight = tl.exp(top - tl.max(top, axis=0))
    total = tl.sum(weight * tl.load(sums + row * splits + s, mask=written, other=0.0), axis=0)
    part = tl.load(parts + (row * splits + s)[:, None] * D + d[None, :], mask=written[:, None] & (d[None, :] < D),
                   other=0.0)
    tl.store(y + row * D + d, (tl.sum(weight[:, None] * part, axis=0) / total).to(y.dtype.element_ty), mask=d < D)


def sizes(B: int, S: int, G: int, D: int, width: int) -> tuple[int, int]:
    """Return (keys of a range, keys in one load) for a cache (B, S, G, D) of elements of `width` bytes."""
    least, most = SPLIT
    split = triton.next_power_of_2(max(1, S * B * G // PROGRAMS))
    split = max(least, min(split, most), triton.next_power_of_2(triton.cdiv(S, SPLITS)))
    return split, max(16, min(64, BLOCK_BYTES // (triton.next_power_of_2(D) * width)))


def append_and_attend(q: Tensor, k: Tensor, v: Tensor, rope: tuple[Tensor, Tensor], keys: Tensor, values: Tensor,
                      positions: Tensor, window: int | None = None, gain: float = 1.0) -> Tensor:
    """Write the new keys and values into the cache and return y (B, 1, H, D), contiguous, in q's dtype.

    The contract is that of `nanochat.kernels.decode_attention.append_and_attend_twin`. q, k, v, keys and values have
    one dtype, float32, bfloat16 or float16, and any strides with a contiguous last dimension.
    """
    (B, S, G, D), H, y = keys.shape, q.shape[2], torch.empty(q.shape, dtype=q.dtype, device=q.device)
    shared, (split, N) = H // G, sizes(B, S, G, D, keys.element_size())
    splits, wide = triton.cdiv(S, split), max(16, triton.next_power_of_2(D))
    parts = tops = sums = None
    if splits > 1:
        parts, tops, sums = (torch.empty(B, H, splits, *shape, device=q.device) for shape in ((D,), (), ()))
    window, warps, scale = S if window is None else window, 4, gain * D ** -0.5
    cos, sin = rope
    launch(_split, (B, G, splits), q, k, v, cos, sin, keys, values, positions, y, parts, tops, sums, scale, window,
           q.stride(0), q.stride(2), k.stride(0), k.stride(2), v.stride(0), v.stride(2), cos.stride(0), sin.stride(0),
           *keys.stride()[:3], *values.stride()[:3], SHARED=shared, D=D, SPLIT=split, N=N,
           BLOCK_H=1 if shared == 1 else max(16, triton.next_power_of_2(shared)), BLOCK_D=wide, ONE=splits == 1,
           num_warps=warps)
    if splits > 1:
        launch(_combine, (B, H), parts, tops, sums, positions, y, window, splits, H=H, D=D, SPLIT=split,
               SPLITS=triton.next_power_of_2(splits), BLOCK_D=wide, num_warps=warps)
    return y
