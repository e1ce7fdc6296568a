"""Causal softmax attention with rotary positions and normalised queries and keys; fewer key/value heads than query heads may be used."""

import torch
from torch import Tensor, nn

from nanochat.cache import Fixed, KeysValues
from nanochat.kernels.attention import attend
from nanochat.kernels.one_query import next_query, one_query, one_query_each
from nanochat.kernels.rope_norm import rope_norm
from nanochat.layers import Linear, project

ROPE_BASE = 10_000.0


def rope_table(length: int, head_width: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """Return cos and sin (length, D/2) of the rotary angles, float32 rounded to bfloat16: the published weights were trained so."""
    channels = torch.arange(0, head_width, 2, dtype=torch.float32, device=device)
    angles = torch.outer(torch.arange(length, dtype=torch.float32, device=device), ROPE_BASE ** -(channels / head_width))
    return angles.cos().bfloat16().float(), angles.sin().bfloat16().float()


class Attention(nn.Module):
    """Softmax attention over everything before and at each position."""

    def __init__(self, config):
        super().__init__()
        E, D = config.n_embd, config.n_embd // config.n_head
        self.head_width, self.window = D, config.window
        self.c_q = Linear(E, config.n_head * D)
        self.c_k = Linear(E, config.n_kv_head * D)
        self.c_v = Linear(E, config.n_kv_head * D)
        self.c_proj = Linear(E, E)

    def projections(self) -> list[Linear]:
        """The matrices of the input."""
        return [self.c_q, self.c_k, self.c_v]

    def optimizer_group(self, name: str) -> str:
        """Return the optimizer group of the parameter called `name` here."""
        return "matrices"

    def forward(self, h: Tensor, rope: tuple[Tensor, Tensor], state: KeysValues | None = None) -> Tensor:
        """Mix h (B, T, E) along time; returns (B, T, E). With a state, h goes on where the state ends, and the state takes it in."""
        D = self.head_width
        q, k, v = (y.unflatten(-1, (-1, D)) for y in project(h, *self.projections()))
        if state is not None and isinstance(state.state, Fixed):
            return self.c_proj(next_query(q, k, v, rope, state.k, state.v, state.state.at, self.window).flatten(2))
        q, k = rope_norm(q, rope), rope_norm(k, rope)
        if state is None:
            y = attend(q, k, v, causal=True, window=self.window)
        else:
            memory, T = state.state, q.shape[1]
            k, v = (t.to(q.dtype) for t in state.append(k, v))
            if T == 1 and memory.by_row:
                y = one_query_each(q, k, v, [length + 1 for length in memory.lengths], self.window)
            elif (mask := memory.mask(T)) is not None:
                y = attend(q, k, v, mask=mask)
            elif T == 1:
                last = slice(None if self.window is None else -self.window, None)
                y = one_query(q, k[:, last], v[:, last])
            else:  # a first chunk
                y = attend(q, k, v, causal=True, window=self.window)
        return self.c_proj(y.flatten(2))
