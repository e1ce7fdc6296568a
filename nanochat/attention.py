"""Causal softmax attention with rotary positions and normalised queries and keys: the mixer with a KV cache.

It is grouped-query attention where there are fewer key/value heads than query heads.
"""

import torch
from torch import Tensor, nn

from nanochat.cache import LayerCache
from nanochat.kernels.attention import attend
from nanochat.kernels.decode_attention import append_and_attend, decode_attention, decode_attention_ragged
from nanochat.kernels.rope_norm import rope_norm
from nanochat.layers import Linear, columns_of
from nanochat.mixer import Mixer, convolve
from nanochat.positions import Positions


class Attention(Mixer):
    """Softmax attention over the positions up to each token; over the last `window` of them where that is set.

    GPTConfig says what value_embeds, qk_gain and attn_conv add.
    """

    kept_for_backward = 12.1
    value_heads = "n_kv_head"

    def __init__(self, config):
        super().__init__(config)
        E, D = config.n_embd, config.n_embd // config.n_head
        self.head_width, self.window = D, config.window
        self.c_q = Linear(E, config.n_head * D)
        self.c_k = Linear(E, config.n_kv_head * D)
        self.c_v = Linear(E, config.n_kv_head * D)
        self.c_proj = Linear(E, E)
        self.score_gain = config.qk_gain ** 2  # of queries and keys together, in one factor
        self.conv1d: nn.Conv1d | None = None
        if config.attn_conv:
            N = E + 2 * config.n_kv_head * D
            self.conv1d = nn.Conv1d(N, N, config.attn_conv, groups=N, bias=False)  # holds the taps (N, 1, K)

    @classmethod
    def kept(cls, config, embeds: bool) -> float:
        wide = 1 + 2 * config.n_kv_head / config.n_head  # queries, keys and values
        # with a value embedding the joined product need not be kept for the sake of its values
        return (cls.kept_for_backward + (config.qk_gain != 1) - embeds) + (wide if config.attn_conv else 0)

    def projections(self) -> list[Linear]:
        """Return the matrices of queries, keys and values, and of the value embedding's gate."""
        return [self.c_q, self.c_k, self.c_v, *([self.value_gate] if self.value_gate is not None else [])]

    def new_cache(self, max_rows: int, max_len: int, device: torch.device | str, dtype: torch.dtype) -> LayerCache:
        """Return a KV cache: `k` and `v` (max_rows, max_len, Hkv, D); with attn_conv also `past` (max_rows, K−1, N),
        the last inputs of the convolution, oldest first."""
        shape = max_rows, max_len, self.c_k.weight.shape[0] // self.head_width, self.head_width
        cache = LayerCache(per_token={name: torch.zeros(shape, device=device, dtype=dtype) for name in "kv"})
        if self.conv1d is not None:
            N, _, K = self.conv1d.weight.shape
            cache.per_row["past"] = torch.zeros(max_rows, K - 1, N, device=device, dtype=dtype)
        return cache

    def mix(self, z: Tensor, positions: Positions, cache: LayerCache | None) -> Tensor:
        q, k, v = self._heads(z, positions, cache)
        if positions.index is not None:
            y = append_and_attend(q, k, v, positions.rope, cache.per_token["k"], cache.per_token["v"], positions.index,
                                  self.window, self.score_gain)
            return y.flatten(2)
        q, k = rope_norm(q, positions.rope), rope_norm(k, positions.rope)
        if self.score_gain != 1:
            q = q * self.score_gain
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

    def _heads(self, z: Tensor, positions: Positions, cache: LayerCache | None) -> list[Tensor]:
        """Return q (B, T, H, D), k and v (B, T, Hkv, D), before norm and rotation, from z (B, T, N)."""
        q, k, v, *gate = columns_of(z, *self.projections())
        if self.conv1d is not None:
            taps = self.conv1d.weight.squeeze(1).to(z.dtype)
            u = z[..., :taps.shape[0]]
            whole = u + convolve(u, taps, positions, None if cache is None else cache.per_row["past"])
            q, k, v = whole.split([part.shape[-1] for part in (q, k, v)], dim=-1)
        q, k, v = (part.unflatten(-1, (-1, self.head_width)) for part in (q, k, v))
        return [q, k, v + self.embedded_values(*gate, positions.ids) if gate else v]

    @torch.no_grad()
    def init_weights(self) -> None:
        """Initialise all weights: c_proj, the gate and the convolution zero, other matrices as published."""
        super().init_weights()
        if self.conv1d is not None:
            self.conv1d.weight.zero_()  # attention without it, to begin with

    def flops_per_token(self, T: int) -> float:
        """Return the training FLOPs a token at rows of T: the matrices', and those of causal attention.

        Attention costs 2·2·E FLOPs a key forward, three times that with backward, over (T+1)/2 ≈ T/2 keys: 6·E·T a
        token; with a window of W < T over W − W²/2T keys.
        """
        W = min(T, self.window or T)
        taps = 0 if self.conv1d is None else self.conv1d.weight.numel()
        return super().flops_per_token(T) + 6 * taps + 12 * self.c_q.weight.shape[1] * (W - W * W / (2 * T))
