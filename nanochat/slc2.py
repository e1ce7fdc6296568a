"""SLC2, the substitution liquid convolution: a mixer whose memory of the past is its last K−1 gated inputs.

By Rikka Botan, after the short convolution blocks of LFM2. The formula is that of the published code, which the weights were trained with.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from nanochat.kernels.slc2 import causal_taps, gated_input, slc2_core
from nanochat.kernels.slc2_step import next_tap
from nanochat.layers import Linear, project
from nanochat.state import Taps


class SLC2(nn.Module):
    """y = c_proj(B · silu(conv(gate · x))), gate = silu(silu(alpha) ⊗ A); all four of x, B, A, alpha are projections of the input."""

    def __init__(self, config):
        super().__init__()
        E, H = config.n_embd, config.n_head
        self.x_proj = Linear(E, E)
        self.alpha_proj = Linear(E, H)
        self.A_proj = Linear(E, E // H)
        self.B_proj = Linear(E, E)
        self.conv1d = nn.Conv1d(E, E, config.n_kernel, groups=E, bias=False)  # holds the taps (E, 1, K)
        self.c_proj = Linear(E, E)

    def forward(self, h: Tensor, rope: tuple[Tensor, Tensor], state: Taps | None = None) -> Tensor:
        """Mix h (B, T, E) along time; returns (B, T, E). With a state, h goes on where the state ends, and the state takes it in.

        rope is not used: the convolution knows the order by itself.
        """
        x, B, A, alpha = project(h, self.x_proj, self.B_proj, self.A_proj, self.alpha_proj)
        taps = self.conv1d.weight.squeeze(1).to(h.dtype)
        if state is None:
            return self.c_proj(slc2_core(x, B, A, alpha, taps))
        u = gated_input(x, A, alpha)
        if h.shape[1] == 1 and state.state.ends is None:
            c = next_tap(u, taps, state.past)
        else:
            c = causal_taps(u, taps, state.past.to(u.dtype))
            state.append(u)
        return self.c_proj(B * F.silu(c))
