"""SLC2, the substitution liquid convolution: a mixer whose memory of the past is its last K−1 gated inputs.

By Rikka Botan, after the short convolution blocks of LFM2. The formula is that of the published code, which the weights
were trained with.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanochat.cache import LayerCache
from nanochat.kernels.rms_norm import rms_norm
from nanochat.kernels.slc2 import gated_input, slc2_mix, slc2_step, split_columns
from nanochat.layers import Linear, columns_of
from nanochat.mixer import Mixer, convolve
from nanochat.positions import Positions

GATES = ("rank-one", "full", "none")   # GPTConfig.slc_gate
GATE_INITS = ("published", "unit")     # GPTConfig.slc_gate_init


class SLC2(Mixer):
    """y = c_proj(B · silu(conv(gate · x))), gate = silu(silu(alpha) ⊗ A); x, B, A, alpha are projections of the
    input.

    That is slc_gate "rank-one". Two others are there to compare it with: "full" is c_proj(C · conv(B · x)), and "none"
    c_proj(B · silu(conv(x))). GPTConfig says what slc_norm and value_embeds add.
    """

    kept_for_backward = 9.1
    value_heads = "n_head"

    def __init__(self, config):
        super().__init__(config)
        E, H = config.n_embd, config.n_head
        self.heads = {"n_head": H, "head_width": E // H}
        self.gate, self.gate_init, self.normed = config.slc_gate, config.slc_gate_init, config.slc_norm
        self.x_proj = Linear(E, E)
        if self.gate == "rank-one":
            self.alpha_proj = Linear(E, H)
            self.A_proj = Linear(E, E // H)
        elif self.gate == "full":
            self.C_proj = Linear(E, E)
        self.B_proj = Linear(E, E)
        self.conv1d = nn.Conv1d(E, E, config.n_kernel, groups=E, bias=False)  # holds the taps (E, 1, K)
        self.c_proj = Linear(E, E)

    @classmethod
    def kept(cls, config, embeds: bool) -> float:
        return cls.kept_for_backward + config.slc_norm + embeds + (0 if config.slc_gate == "rank-one" else 2.8)

    def projections(self) -> list[Linear]:
        """Return the matrices of the input, in the order in which the fused kernel reads their columns."""
        names = {"rank-one": ["A_proj", "alpha_proj"], "full": ["C_proj"], "none": []}[self.gate]
        more = [] if self.value_gate is None else [self.value_gate]
        return [self.x_proj, self.B_proj, *(getattr(self, name) for name in names), *more]

    def new_cache(self, max_rows: int, max_len: int, device: torch.device | str, dtype: torch.dtype) -> LayerCache:
        """Return a cache of `past` (max_rows, K−1, E): the last gated inputs of each row, oldest first."""
        E, _, K = self.conv1d.weight.shape
        return LayerCache(per_row={"past": torch.zeros(max_rows, K - 1, E, device=device, dtype=dtype)})

    def mix(self, z: Tensor, positions: Positions, cache: LayerCache | None) -> Tensor:
        if self.value_embed is not None:
            x, *rest = columns_of(z, *self.projections())
            x = self.with_embedded(x.unflatten(-1, (self.heads["n_head"], -1)), rest[-1], positions.ids).flatten(2)
            z = torch.cat([x, z[..., x.shape[-1]:]], dim=-1)
        taps = self.conv1d.weight.squeeze(1).to(z.dtype)  # rounded as decoding holds them, in training too
        past = None if cache is None else cache.per_row["past"]
        y = (self._rank_one if self.gate == "rank-one" else self._compared)(z, taps, positions, past)
        return rms_norm(y) if self.normed else y

    def _compared(self, z: Tensor, taps: Tensor, positions: Positions, past: Tensor | None) -> Tensor:
        """Return the core with the gate "full" or "none", in plain PyTorch."""
        x, B, *gates = columns_of(z, *self.projections())
        if self.gate == "full":
            return gates[0] * convolve(B * x, taps, positions, past)
        return B * F.silu(convolve(x, taps, positions, past))

    def _rank_one(self, z: Tensor, taps: Tensor, positions: Positions, past: Tensor | None) -> Tensor:
        """Return the core of SLC2."""
        if past is None:
            return slc2_mix(z, taps, **self.heads)
        x, B, A, alpha, _ = split_columns(z, **self.heads)
        if positions.T == 1 and positions.counts is None:
            return slc2_step(x, B, A, alpha, taps, past)
        y, K = slc2_mix(z, taps, past, **self.heads), taps.shape[1]
        newest = slice(None) if positions.counts is not None else slice(-max(K - 1, 1), None)  # all that can be kept
        u = gated_input(x[:, newest], A[:, newest], alpha[:, newest])
        positions.remember(past, u)
        return y

    def is_dead(self) -> bool:
        """Whether all taps are zero: the published code left them as memory held them, which on GPUs is often zero."""
        return not self.conv1d.weight.any()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Draw all weights: matrices as published, taps uniform ±1/√K.

        The published code left the taps as memory held them. Zeros there and in c_proj give zero gradients for ever.
        """
        super().init_weights()
        if self.gate == "rank-one" and self.gate_init == "unit":
            for thin in (self.alpha_proj, self.A_proj):
                thin.weight.normal_(std=thin.weight.shape[1] ** -0.5)
        bound = self.conv1d.weight.shape[-1] ** -0.5
        self.conv1d.weight.uniform_(-bound, bound)
