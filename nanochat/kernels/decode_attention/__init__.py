"""Attention of one decode step: one new query a row over the keys of the row's KV cache.

`decode_attention` takes the keys as they are; `decode_attention_ragged` the first `lengths` of them;
`append_and_attend` writes the new key and value into the cache first and reads where the rows end from the device, so
that a CUDA graph can capture it. Only `decode_attention` and the twins have gradients.

On CUDA with Triton `append_and_attend` is one kernel, or two for long caches. On CPUs the crate reads bfloat16 keys as
they are, where torch's own attention is slow; without the crate they are converted to float32. 6 heads, one thread of a
CPU with AVX512_BF16: over 100 keys 27 µs by the crate, 53 in float32, 137 by torch; over 2,000 keys 0.37, 0.75 and 2.7
ms.
"""

import torch
from torch import Tensor

from nanochat.kernels.cpu import ready as cpu_ready
from nanochat.kernels.dispatch import (
    Backend,
    Draw,
    TrainingShape,
    Trial,
    backend,
    chosen_backend,
    kernels_of,
    triton_ready,
)
from nanochat.kernels.rope_norm import rope_norm_twin
from nanochat.kernels.sdpa import sdpa


def decode_attention_twin(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return softmax(q · k / √D) · v of shape (B, 1, H, D). The definition.

    Args:
        q: (B, 1, H, D)
        k, v: (B, S, G, D); H/G neighbouring query heads share a key head
        mask: bool (B, 1, 1, S), the keys that count; None for all
    """
    return sdpa(q, k, v, mask=mask)


def decode_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return what `decode_attention_twin` returns without a mask, up to rounding.

    There is a gradient where one is wanted: PyTorch runs then.
    """
    wants_grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    if _by_crate(q, k, v) and not wants_grad:
        return kernels_of("decode_attention", "cpu").decode_attention(q, k, v)
    if q.device.type != "cpu" or q.dtype != torch.bfloat16:
        return decode_attention_twin(q, k, v)
    return decode_attention_twin(q.float(), k.float(), v.float()).to(q.dtype)


def decode_attention_ragged(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], window: int | None = None) -> Tensor:
    """Return the attention of each row over its first `lengths` keys, (B, 1, H, D).

    Batch-invariant: to the last bit, a row's result depends neither on the other rows nor on what is behind its keys.

    Args:
        q, k, v: as in `decode_attention_twin`
        lengths: B numbers from 1 to S
        window: only the last so many of a row's keys count; None for all
    """
    if _by_crate(q, k, v):
        return kernels_of("decode_attention", "cpu").decode_attention(q, k, v, lengths, window)
    ranges = [slice(0 if window is None else max(0, n - window), n) for n in lengths]
    return torch.cat([decode_attention(q[b:b + 1], k[b:b + 1, keys], v[b:b + 1, keys])
                      for b, keys in enumerate(ranges)])


def append_and_attend_twin(q: Tensor, k: Tensor, v: Tensor, rope: tuple[Tensor, Tensor], keys: Tensor, values: Tensor,
                           positions: Tensor, window: int | None = None, gain: float = 1.0) -> Tensor:
    """Write each row's new key and value into the cache and attend to the keys up to there. The definition.

    The host does not wait for the device: only the device reads `positions`.

    Args:
        q, k, v: of the new tokens, (B, 1, H, D) and twice (B, 1, G, D), of one dtype; q and k without rotation and norm
        rope: cos and sin of the new positions, (B, 1, D/2), float32
        keys, values: the cache, (B, S, G, D); written in place at each row's position. Behind that it may hold
            anything.
        positions: (B,) integers below S, the index of each row's new token
        window: only the last so many keys count, the new one included; None for all
        gain: factor of the scores

    Returns:
        (B, 1, H, D) in q's dtype
    """
    q, k = rope_norm_twin(q, rope) * gain, rope_norm_twin(k, rope)
    row, place, S = torch.arange(len(positions), device=positions.device), positions.long(), keys.shape[1]
    keys[row, place], values[row, place] = k[:, 0].to(keys.dtype), v[:, 0].to(values.dtype)
    index = torch.arange(S, device=positions.device)
    seen = index <= positions.unsqueeze(1)
    if window is not None:
        seen &= index > positions.unsqueeze(1) - window
    hidden = ~seen[:, :, None, None]  # set to 0: the cache may hold NaN there, and 0 · NaN is NaN
    keys, values = (cache.to(q.dtype).masked_fill(hidden, 0) for cache in (keys, values))
    return decode_attention_twin(q, keys, values, seen[:, None, None])


def append_and_attend(q: Tensor, k: Tensor, v: Tensor, rope: tuple[Tensor, Tensor], keys: Tensor, values: Tensor,
                      positions: Tensor, window: int | None = None, gain: float = 1.0) -> Tensor:
    """Return and write what `append_and_attend_twin` does, up to rounding. The kernel reads only the keys seen."""
    run = backend("decode_attention", BACKENDS, q, keys, values)
    return run(q, k, v, rope, keys, values, positions, window, gain)


def _triton(*args: Tensor | tuple[Tensor, Tensor] | float | None) -> Tensor:
    return kernels_of("decode_attention", "triton").append_and_attend(*args)


# Of `append_and_attend`; the crate has a kernel for the other two functions alone.
BACKENDS = {
    "triton": Backend(_triton, lambda q, keys, values: triton_ready(q) and q.dtype == keys.dtype, "eager"),
    "cpu": Backend(append_and_attend_twin, cpu_ready),
    "torch": Backend(append_and_attend_twin),
}


def _by_crate(q: Tensor, k: Tensor, v: Tensor) -> bool:
    return chosen_backend("decode_attention", BACKENDS, q, k, v) == "cpu"


def trial(shape: TrainingShape, draw: Draw) -> Trial:
    """Return what the chooser measures: a decode step of few rows in the middle of their cache. It is sampling that
    uses it."""
    B, T = min(4, shape.B), shape.T
    q, k, v = (draw(B, 1, heads, shape.D, grad=False) for heads in (shape.H, shape.G, shape.G))
    keys, values = (draw(B, T, shape.G, shape.D, grad=False) for _ in "kv")
    positions = torch.arange(B, device=q.device) % T + T // 2 * (T > 8)
    angles = torch.rand(B, 1, shape.D // 2, device=q.device) * 6
    rope = angles.cos(), angles.sin()
    asked = q, keys, values
    plain = Trial(decode_attention, decode_attention_twin, asked, asked, inside_blocks=False)
    cache = keys.clone(), values.clone()  # it writes the new tokens there, the same ones each time
    append = Trial(append_and_attend, append_and_attend_twin, (q, k, v, rope, *cache, positions, shape.window), asked,
                   inside_blocks=False)
    first, second = (plain, append) if q.device.type == "cpu" else (append, plain)  # timed is what has a kernel
    return first._replace(also=(second,))
