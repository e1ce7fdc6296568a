"""Attention of one new token a row over a buffer of keys, up to where the row stands. What is before and around it is done on the way:
query and key are turned to their position and normalised, key and value written into the buffers.

    y[b, h] = softmax(q[b, h] · keys[b, lo…at] / √D) · values[b, lo…at],   lo = at − window + 1, or 0

How the work is cut: a program holds the G query heads that share one key head, and goes through SPAN keys of one row in blocks, keeping a
running maximum, sum and weighted sum (all float32). Programs of spans that a row does not see end at once, and read nothing of them. A
second kernel joins a row's spans; where one span holds all, there is none. Keys are read once, whatever G is. Sizes come from shapes
alone, where rows stand from the device alone, so it can be captured in a CUDA graph. Reads 2 · Hkv · D elements a key and row.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

PROGRAMS = 512       # wanted at least: a few for each multiprocessor
SPAN = 64, 1024      # keys a program goes through, at least and at most
SPANS = 128          # of one row, at most: one program joins them
BLOCK_BYTES = 8192   # of keys in one load


@triton.jit
def _weighted(p, v):
    """Σ_n p[g, n] · v[n, d] on tensor cores: the weights as two parts of v's width, so that they lose nothing that counts."""
    if v.dtype == tl.float32:
        return tl.dot(p, v, input_precision="ieee")
    high = p.to(v.dtype)
    return tl.dot(high, v) + tl.dot((p - high.to(tl.float32)).to(v.dtype), v)


@triton.jit
def _turned(x, row, d, cos, sin, mask, D: tl.constexpr):
    """Rows of x, (M, 1) offsets `row` and (1, BLOCK_D) channels d, turned by their position's angles, divided by their root mean square."""
    HALF: tl.constexpr = D // 2
    first = d < HALF
    angle = tl.where(first, d, d - HALF)
    own = tl.load(x + row + d, mask=mask, other=0.0).to(tl.float32)
    other = tl.load(x + row + tl.where(first, d + HALF, angle), mask=mask, other=0.0).to(tl.float32)
    c, s = tl.load(cos + angle, mask=d < D, other=0.0), tl.load(sin + angle, mask=d < D, other=0.0)
    turned = own * c + other * tl.where(first, s, -s)
    return turned * tl.rsqrt(tl.sum(turned * turned, axis=1) / D + 1.1920928955078125e-07)[:, None]


@triton.jit
def _spans(q, k, v, cos, sin, keys, values, at, y, parts, tops, sums, scale, window, q_b, q_h, k_b, k_h, v_b, v_h, cos_b, sin_b, keys_b,
           keys_s, keys_h, values_b, values_s, values_h, G: tl.constexpr, D: tl.constexpr, SPAN: tl.constexpr, N: tl.constexpr,
           BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr, ONE: tl.constexpr):
    b, head, span = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    place = tl.load(at + b).to(tl.int32)
    low = tl.maximum(place - window + 1, 0)
    first, end = tl.maximum(span * SPAN, low), tl.minimum(span * SPAN + SPAN, place)  # keys in the buffer; the new one comes by itself
    own = (span * SPAN <= place) & (place < span * SPAN + SPAN)
    if (first < end) | own:
        g, d, n, one = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_D), tl.arange(0, N), tl.arange(0, 1)[:, None]
        real = (g[:, None] < G) & (d[None, :] < D)
        kind = keys.dtype.element_ty
        cos += b * cos_b
        sin += b * sin_b
        query = _turned(q, b * q_b + (head * G + g[:, None]) * q_h, d[None, :], cos, sin, real, D).to(kind)
        keys += b * keys_b + head * keys_h
        values += b * values_b + head * values_h
        top = tl.full((BLOCK_G,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK_G,), tl.float32)
        sum_ = tl.zeros((BLOCK_G, BLOCK_D), tl.float32)
        if own:
            whole, here = d[None, :] < D, place.to(tl.int64)
            new_k = _turned(k, b * k_b + head * k_h + one, d[None, :], cos, sin, whole, D).to(kind)
            new_v = tl.load(v + b * v_b + head * v_h + d[None, :], mask=whole, other=0.0).to(kind)
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
            if G == 1:
                score = tl.sum(key.to(tl.float32) * query.to(tl.float32), axis=1)[None, :]
            else:
                score = tl.dot(query, tl.trans(key), input_precision="ieee")
            score = tl.where(there[None, :], score * scale, float("-inf"))
            higher = tl.maximum(top, tl.max(score, axis=1))
            shrink, p = tl.exp(top - higher), tl.exp(score - higher[:, None])
            if G == 1:
                more = tl.sum(tl.trans(p) * value.to(tl.float32), axis=0)[None, :]
            else:
                more = _weighted(p, value)
            top, total, sum_ = higher, total * shrink + tl.sum(p, axis=1), sum_ * shrink[:, None] + more
        out = (b * tl.num_programs(1) + head) * G + g
        if ONE:
            tl.store(y + out[:, None] * D + d[None, :], (sum_ / total[:, None]).to(y.dtype.element_ty), mask=real)
        else:
            out = out * tl.num_programs(2) + span
            tl.store(tops + out, top, mask=g < G)
            tl.store(sums + out, total, mask=g < G)
            tl.store(parts + out[:, None] * D + d[None, :], sum_, mask=real)


@triton.jit
def _join(parts, tops, sums, at, y, window, spans, H: tl.constexpr, D: tl.constexpr, SPAN: tl.constexpr, SPANS: tl.constexpr,
          BLOCK_D: tl.constexpr):
    b, s, d = tl.program_id(0).to(tl.int64), tl.arange(0, SPANS), tl.arange(0, BLOCK_D)
    place = tl.load(at + b).to(tl.int32)
    written = (s * SPAN <= place) & (s * SPAN + SPAN > place - window + 1)
    row = b * H + tl.program_id(1)
    top = tl.load(tops + row * spans + s, mask=written, other=float("-inf"))
    weight = tl.exp(top - tl.max(top, axis=0))
    total = tl.sum(weight * tl.load(sums + row * spans + s, mask=written, other=0.0), axis=0)
    part = tl.load(parts + (row * spans + s)[:, None] * D + d[None, :], mask=written[:, None] & (d[None, :] < D), other=0.0)
    tl.store(y + row * D + d, (tl.sum(weight[:, None] * part, axis=0) / total).to(y.dtype.element_ty), mask=d < D)


def sizes(B: int, S: int, heads: int, D: int, width: int) -> tuple[int, int]:
    """Return (keys a program goes through, keys in one load) for B rows of S places, `heads` key heads, elements of `width` bytes."""
    least, most = SPAN
    span = triton.next_power_of_2(max(1, S * B * heads // PROGRAMS))
    span = max(least, min(span, most), triton.next_power_of_2(triton.cdiv(S, SPANS)))
    return span, max(16, min(64, BLOCK_BYTES // (triton.next_power_of_2(D) * width)))


def next_query(q: Tensor, k: Tensor, v: Tensor, rope: tuple[Tensor, Tensor], keys: Tensor, values: Tensor, at: Tensor,
               window: int | None = None) -> Tensor:
    """Write the new keys and values into their places and return y (B, 1, H, D), contiguous, in q's dtype.

    The definition is in kernels/one_query.py. q (B, 1, H, D), k, v (B, 1, Hkv, D); keys, values (B, S, Hkv, D), any S; any strides with a
    contiguous last dimension; one dtype, float32, bfloat16 or float16. rope: cos, sin (B, 1, D/2) float32. at (B,) whole numbers below S.
    """
    (B, S, heads, D), H, y = keys.shape, q.shape[2], torch.empty(q.shape, dtype=q.dtype, device=q.device)
    G, (span, N) = H // heads, sizes(B, S, heads, D, keys.element_size())
    spans, wide = triton.cdiv(S, span), max(16, triton.next_power_of_2(D))
    parts = tops = sums = None
    if spans > 1:
        parts, tops, sums = (torch.empty(B, H, spans, *shape, device=q.device) for shape in ((D,), (), ()))
    window, warps = S if window is None else window, 4
    cos, sin = rope
    _spans[B, heads, spans](q, k, v, cos, sin, keys, values, at, y, parts, tops, sums, D ** -0.5, window, q.stride(0), q.stride(2),
                            k.stride(0), k.stride(2), v.stride(0), v.stride(2), cos.stride(0), sin.stride(0), *keys.stride()[:3],
                            *values.stride()[:3], G=G, D=D, SPAN=span, N=N, BLOCK_G=1 if G == 1 else max(16, triton.next_power_of_2(G)),
                            BLOCK_D=wide, ONE=spans == 1, num_warps=warps)
    if spans > 1:
        _join[B, H](parts, tops, sums, at, y, window, spans, H=H, D=D, SPAN=span, SPANS=triton.next_power_of_2(spans), BLOCK_D=wide,
                    num_warps=warps)
    return y
