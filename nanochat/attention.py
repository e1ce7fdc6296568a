"""Causal softmax attention with rotary positions and normalised queries and keys: the mixer with a KV cache.

It is grouped-query attention where there are fewer key/value heads than query heads.
"""

import torch
from torch import Tensor

from nanochat.cache import LayerCache
from nanochat.kernels.attention import attend
from nanochat.kernels.decode_attention import append_and_attend, decode_attention, decode_attention_ragged
from nanochat.kernels.rope_norm import rope_norm
from nanochat.layers import Linear, columns_of
from nanochat.mixer import Mixer
from nanochat.positions import Positions


class Attention(Mixer):
    """Softmax attention over the positions up to each token; over the last `window` of them where that is set."""

    kept_for_backward = 12.1

    def __init__(self, config):
        super().__init__(config)
        E, D = config.n_embd, config.n_embd // config.n_head
        self.head_width, self.window = D, config.window
        self.c_q = Linear(E, config.n_head * D)
        self.c_k = Linear(E, config.n_kv_head * D)
        self.c_v = Linear(E, config.n_kv_head * D)
        self.c_proj = Linear(E, E)

    def projections(self) -> list[Linear]:
        """Return the matrices of queries, keys and values."""
        return [self.c_q, self.c_k, self.c_v]

    def new_cache(self, max_rows: int, max_len: int, device: torch.device | str, dtype: torch.dtype) -> LayerCache:
        """Return a KV cache: `k` and `v` (max_rows, max_len, Hkv, D)."""
        shape = max_rows, max_len, self.c_k.weight.shape[0] // self.head_width, self.head_width
        return LayerCache(per_token={name: torch.zeros(shape, device=device, dtype=dtype) for name in "kv"})

    def mix(self, z: Tensor, positions: Positions, cache: LayerCache | None) -> Tensor:
        q, k, v = self._heads(z)
        if positions.index is not None:
            y = append_and_attend(q, k, v, positions.rope, cache.per_token["k"], cache.per_token["v"], positions.index,
                                  self.window)
            return y.flatten(2)
        q, k = rope_norm(q, positions.rope), rope_norm(k, positions.rope)
        if cache is None:
            return attend(q, k, v, causal=True, window=self.window).flatten(2)
        for name, new in (("k", k), ("v", v)):
            positions.write(cache.per_token[name], new)
        k, v = (cache.per_token[name][:, :positions.end].to(q.dtype) for name in "kv")
        if positions.T == 1 and positions.batch_invariant:
            y = decode_attention_ragged(q, k, v, [length + 1 for length in positions.lengths], self.window)
        elif (mask := positions.mask(self.window)) is not None:
            y = attend(q, k, v, mask=mask)
        elif positions.T == 1:
            seen = slice(None if self.window is None else -self.window, None)
            y = decode_attention(q, k[:, seen], v[:, seen])
        else:  # the first chunk of all rows
            y = attend(q, k, v, causal=True, window=self.window)
        return y.flatten(2)

    def _heads(self, z: Tensor) -> list[Tensor]:
        """Cut z (B, T, N) into q (B, T, H, D), k and v (B, T, Hkv, D)."""
        return [part.unflatten(-1, (-1, self.head_width)) for part in columns_of(z, *self.projections())]

    def flops_per_token(self, T: int) -> float:
        """Return the training FLOPs a token at rows of T: the matrices', and those of causal attention.

        Attention costs 2·2·E FLOPs a key forward, three times that with backward, over (T+1)/2 ≈ T/2 keys: 6·E·T a
        token; with a window of W < T over W − W²/2T keys.
        """
        W = min(T, self.window or T)
        return super().flops_per_token(T) + 12 * self.c_q.weight.shape[1] * (W - W * W / (2 * T))
