"""Attention of one new token a row over its keys: over all there are, or, where they lie in a buffer, up to where the row stands.

On CPUs torch's own attention is slow in bfloat16. Our crate reads bfloat16 as it is; without the crate it is done in float32. 6 heads,
one thread of a CPU with AVX512_BF16: 27, in float32 53, by torch 137 µs over 100 keys; 0.37, 0.75 and 2.7 ms over 2,000.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat.kernels import native, triton_kernels
from nanochat.kernels.rope_norm import rope_norm_twin


def one_query_twin(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return softmax(q · k / √D) · v of shape (B, 1, H, D), from q (B, 1, H, D) and k, v (B, S, Hkv, D). The definition.

    mask: bool (B, 1, 1, S), the keys that count.
    """
    return F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask,
                                          enable_gqa=q.shape[2] != k.shape[2]).transpose(1, 2)


def one_query(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return what `one_query_twin` does, up to rounding."""
    wants_grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    if native.ready(q, k, v) and not wants_grad:
        return native.one_query(q, k, v)
    if q.device.type != "cpu" or q.dtype != torch.bfloat16:
        return one_query_twin(q, k, v)
    return one_query_twin(q.float(), k.float(), v.float()).to(q.dtype)


def one_query_each(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], window: int | None = None) -> Tensor:
    """Return the attention of each row over its first `lengths` keys, the last `window` of them if not None, shapes as `one_query_twin`.

    To the last bit, a row's result does not depend on the rows beside it, nor on what lies behind its keys.
    """
    if native.ready(q, k, v):
        return native.one_query(q, k, v, lengths, window)
    spans = [slice(0 if window is None else max(0, n - window), n) for n in lengths]
    return torch.cat([one_query(q[b:b + 1], k[b:b + 1, span], v[b:b + 1, span]) for b, span in enumerate(spans)])


def next_query_twin(q: Tensor, k: Tensor, v: Tensor, rope: tuple[Tensor, Tensor], keys: Tensor, values: Tensor, at: Tensor,
                    window: int | None = None) -> Tensor:
    """Put each row's new key and value in their place, and return its attention, (B, 1, H, D), over the keys up to there. The definition.

    q (B, 1, H, D), k, v (B, 1, Hkv, D): the new token's, of one dtype; q and k are turned by rope, cos and sin (B, 1, D/2), and normalised
    first. keys, values (B, S, Hkv, D): buffers; what lies behind a row's place may be anything. at (B,) whole numbers below S: where each
    row's token stands. window: how many keys it sees at most, itself included; None for all. Nothing waits for the device: `at` is
    read there alone.
    """
    q, k = rope_norm_twin(q, rope), rope_norm_twin(k, rope)
    row, place, S = torch.arange(len(at), device=at.device), at.long(), keys.shape[1]
    keys[row, place], values[row, place] = k[:, 0].to(keys.dtype), v[:, 0].to(values.dtype)
    position = torch.arange(S, device=at.device)
    seen = position <= at.unsqueeze(1)
    if window is not None:
        seen &= position > at.unsqueeze(1) - window
    unseen = ~seen[:, :, None, None]  # what is there may be NaN, and 0 · NaN is NaN
    return one_query_twin(q, keys.to(q.dtype).masked_fill(unseen, 0), values.to(q.dtype).masked_fill(unseen, 0), seen[:, None, None])


def next_query(q: Tensor, k: Tensor, v: Tensor, rope: tuple[Tensor, Tensor], keys: Tensor, values: Tensor, at: Tensor,
               window: int | None = None) -> Tensor:
    """Return and write what `next_query_twin` does, up to rounding; on CUDA in one pass over the keys that a row sees."""
    fused = triton_kernels("one_query") if q.device.type == "cuda" and q.dtype == keys.dtype else None
    return (next_query_twin if fused is None else fused.next_query)(q, k, v, rope, keys, values, at, window)
