"""Attention of one query a row over its cached keys on CPUs, by the Rust crate."""

import torch
from torch import Tensor

from nanochat.kernels.attention.cpu import checked_shape
from nanochat.kernels.cpu import call, heads, mismatch


def decode_attention(q: Tensor, k: Tensor, v: Tensor, lengths: list[int] | None = None,
                     window: int | None = None) -> Tensor:
    """Return the attention, (B, 1, H, D), of one query a row.

    Keys from a row's length on are not read, and a row's result does not depend on how many of them there are.

    Args:
        q: (B, 1, H, D)
        k, v: (B, S, G, D), strides free but for the last dimension
        lengths: how many keys of each row count, from 1 to S; None for all
        window: only the last so many of them count; None for all

    Raises:
        ValueError: the tensors do not fit together, or a length is not from 1 to S
    """
    B, S, H, G, D, window = checked_shape(q, k, v, window, 1)
    lengths = [S] * B if lengths is None else lengths
    if len(lengths) != B or any(not 1 <= n <= S for n in lengths):
        raise mismatch(f"each row has a length from 1 to S, not {lengths}", q=q, k=k)
    y = torch.empty(q.shape, dtype=q.dtype)
    ranges = [(max(0, n - window), n) for n in lengths]
    call("decode_attention", q.dtype, (H, G, D), [heads(t) for t in (q, k, v, y)], ranges)
    return y
