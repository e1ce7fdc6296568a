"""SLC2, the substitution liquid convolution: a mixer whose memory of the past is its last K−1 gated inputs.

By Rikka Botan, after the short convolution blocks of LFM2. The formula is that of the published code, which the weights
were trained with.
"""

import torch
from torch import Tensor, nn

from nanochat.cache import LayerCache
from nanochat.kernels.slc2 import gated_input, slc2_mix, slc2_step, split_columns
from nanochat.layers import Linear, init_linear
from nanochat.mixer import Mixer
from nanochat.positions import Positions


class SLC2(Mixer):
    """y = c_proj(B · silu(conv(gate · x))), gate = silu(silu(alpha) ⊗ A); x, B, A, alpha are projections of the
    input."""

    kept_for_backward = 9.1

    def __init__(self, config):
        super().__init__(config)
        E, H = config.n_embd, config.n_head
        self.heads = {"n_head": H, "head_width": E // H}
        self.x_proj = Linear(E, E)
        self.alpha_proj = Linear(E, H)
        self.A_proj = Linear(E, E // H)
        self.B_proj = Linear(E, E)
        self.conv1d = nn.Conv1d(E, E, config.n_kernel, groups=E, bias=False)  # holds the taps (E, 1, K)
        self.c_proj = Linear(E, E)

    def projections(self) -> list[Linear]:
        """Return the matrices of the input, in the order in which the fused kernel reads their columns."""
        return [self.x_proj, self.B_proj, self.A_proj, self.alpha_proj]

    def new_cache(self, max_rows: int, max_len: int, device: torch.device | str, dtype: torch.dtype) -> LayerCache:
        """Return a cache of `past` (max_rows, K−1, E): the last gated inputs of each row, oldest first."""
        E, _, K = self.conv1d.weight.shape
        return LayerCache(per_row={"past": torch.zeros(max_rows, K - 1, E, device=device, dtype=dtype)})

    def mix(self, z: Tensor, positions: Positions, cache: LayerCache | None) -> Tensor:
        taps = self.conv1d.weight.squeeze(1).to(z.dtype)  # rounded as decoding holds them, in training too
        if cache is None:
            return slc2_mix(z, taps, **self.heads)
        past = cache.per_row["past"]
        x, B, A, alpha, _ = split_columns(z, **self.heads)
        if positions.T == 1 and positions.counts is None:
            return slc2_step(x, B, A, alpha, taps, past)
        y, K = slc2_mix(z, taps, past, **self.heads), taps.shape[1]
        newest = slice(None) if positions.counts is not None else slice(-max(K - 1, 1), None)  # all that can be kept
        u = gated_input(x[:, newest], A[:, newest], alpha[:, newest])
        past.copy_(positions.last(torch.cat([past, u.to(past.dtype)], dim=1), K - 1))
        return y

    @torch.no_grad()
    def init_weights(self) -> None:
        """Draw all weights: matrices as published, taps uniform ±1/√K.

        The published code left the taps as memory held them. Zeros there and in c_proj give zero gradients for ever.
        """
        for projection in (self.x_proj, self.alpha_proj, self.A_proj, self.B_proj):
            init_linear(projection)
        bound = self.conv1d.weight.shape[-1] ** -0.5
        self.conv1d.weight.uniform_(-bound, bound)
        init_linear(self.c_proj, zero=True)

    def optimizer_group(self, name: str) -> str | None:
        return "taps" if name == "conv1d.weight" else super().optimizer_group(name)
