"""SLC2, the substitution liquid convolution: a mixer whose memory of the past is its last K−1 gated inputs.

By Rikka Botan, after the short convolution blocks of LFM2. The formula is that of the published code, which the weights were trained with.
"""

from torch import Tensor, nn

from nanochat.cache import Taps
from nanochat.kernels.slc2 import columns, gated_input, slc2_mix
from nanochat.kernels.slc2_step import slc2_step
from nanochat.layers import Linear, together


class SLC2(nn.Module):
    """y = c_proj(B · silu(conv(gate · x))), gate = silu(silu(alpha) ⊗ A); all four of x, B, A, alpha are projections of the input."""

    def __init__(self, config):
        super().__init__()
        E, H = config.n_embd, config.n_head
        self.heads = {"n_head": H, "head_width": E // H}
        self.x_proj = Linear(E, E)
        self.alpha_proj = Linear(E, H)
        self.A_proj = Linear(E, E // H)
        self.B_proj = Linear(E, E)
        self.conv1d = nn.Conv1d(E, E, config.n_kernel, groups=E, bias=False)  # holds the taps (E, 1, K)
        self.c_proj = Linear(E, E)

    def projections(self) -> list[Linear]:
        """The matrices of the input, in the order that the fused core wants their columns in."""
        return [self.x_proj, self.B_proj, self.A_proj, self.alpha_proj]

    def optimizer_group(self, name: str) -> str:
        """Return the optimizer group of the parameter called `name` here."""
        return "taps" if name == "conv1d.weight" else "matrices"

    def forward(self, h: Tensor, rope: tuple[Tensor, Tensor], state: Taps | None = None) -> Tensor:
        """Mix h (B, T, E) along time; returns (B, T, E). With a state, h goes on where the state ends, and the state takes it in.

        rope is not used: the convolution knows the order by itself.
        """
        z = together(h, *self.projections())
        taps = self.conv1d.weight.squeeze(1).to(h.dtype)  # as decoding holds them
        if state is None:
            return self.c_proj(slc2_mix(z, taps, **self.heads))
        x, B, A, alpha, _ = columns(z, **self.heads)
        ragged = state.state.ends is not None
        if h.shape[1] == 1 and not ragged:
            return self.c_proj(slc2_step(x, B, A, alpha, taps, state.past))
        y = slc2_mix(z, taps, state.past, **self.heads)
        kept = slice(None) if ragged else slice(-max(taps.shape[1] - 1, 1), None)  # of the gated inputs, the last are remembered
        state.append(gated_input(x[:, kept], A[:, kept], alpha[:, kept]))
        return self.c_proj(y)
