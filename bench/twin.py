"""The published model in plain eager PyTorch: the baseline of the benchmarks, and a second implementation for tests.

It is written from the formulas, with nn.Conv1d, scaled_dot_product_attention and a full float32 cross-entropy.
Parameters have the names of ours, so that weights can be copied from one to the other.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _rms(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.size(-1),))


class _Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        E, self.H, self.G = config.n_embd, config.n_head, config.n_kv_head
        D = E // self.H
        self.c_q, self.c_k, self.c_v, self.c_proj = (nn.Linear(E, n, bias=False)
                                                     for n in (E, self.G * D, self.G * D, E))

    def optimizer_group(self, name: str) -> str:
        return "matrices"

    def forward(self, h: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        b, t, _ = h.shape
        q = self.c_q(h).view(b, t, self.H, -1).transpose(1, 2)
        k = self.c_k(h).view(b, t, self.G, -1).transpose(1, 2)
        v = self.c_v(h).view(b, t, self.G, -1).transpose(1, 2)
        half = q.size(-1) // 2

        def turn(z: Tensor) -> Tensor:
            a, c = z[..., :half], z[..., half:]
            return torch.cat([a * cos + c * sin, -a * sin + c * cos], dim=-1).to(z.dtype)

        q, k = _rms(turn(q)), _rms(turn(k))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.H != self.G)
        return self.c_proj(y.transpose(1, 2).reshape(b, t, -1))


class _SLC2(nn.Module):
    def __init__(self, config):
        super().__init__()
        E, H, K = config.n_embd, config.n_head, config.n_kernel
        self.x_proj, self.B_proj, self.c_proj = (nn.Linear(E, E, bias=False) for _ in range(3))
        self.alpha_proj, self.A_proj = nn.Linear(E, H, bias=False), nn.Linear(E, E // H, bias=False)
        self.conv1d = nn.Conv1d(E, E, K, groups=E, padding=K - 1, bias=False)

    def optimizer_group(self, name: str) -> str:
        return "taps" if name == "conv1d.weight" else "matrices"

    def forward(self, h: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        b, t, e = h.shape
        outer = F.silu(self.alpha_proj(h))[..., :, None] * self.A_proj(h)[..., None, :]
        u = F.silu(outer.reshape(b, t, e)) * self.x_proj(h)
        c = self.conv1d(u.transpose(1, 2)).transpose(1, 2)[:, :t]
        return self.c_proj(self.B_proj(h) * F.silu(c))


class _MLP(nn.Module):
    def __init__(self, E: int):
        super().__init__()
        self.c_fc, self.c_proj = nn.Linear(E, 4 * E, bias=False), nn.Linear(4 * E, E, bias=False)

    def forward(self, h: Tensor) -> Tensor:
        return self.c_proj(F.relu(self.c_fc(h)).square())


class _Block(nn.Module):
    def __init__(self, config, attention: bool):
        super().__init__()
        self.attn = _Attention(config) if attention else _SLC2(config)
        self.mlp = _MLP(config.n_embd)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attn(_rms(x), cos, sin)
        return x + self.mlp(_rms(x))


class TwinGPT(nn.Module):
    """The published forward pass: ids (B, T) → logits (B, T, V), or the mean loss where targets are given."""

    def __init__(self, config):
        super().__init__()
        L = config.n_layer
        self.config = config
        kinds = [letter == "A" for letter in config.layer_pattern] if config.layer_pattern else \
            [i % config.slc_rate == 1 or i == L - 1 for i in range(L)]
        self.transformer = nn.ModuleDict({"wte": nn.Embedding(config.vocab_size, config.n_embd),
                                          "h": nn.ModuleList(_Block(config, kind) for kind in kinds)})
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        D = config.n_embd // config.n_head
        angle = torch.arange(config.sequence_len).float()[:, None] * 10000.0 ** (-torch.arange(0, D, 2).float() / D)
        self.register_buffer("cos", angle.cos().bfloat16(), persistent=False)
        self.register_buffer("sin", angle.sin().bfloat16(), persistent=False)

    def forward(self, ids: Tensor, targets: Tensor | None = None) -> Tensor:
        t = ids.size(1)
        x = _rms(self.transformer.wte(ids))
        for block in self.transformer.h:
            x = block(x, self.cos[:t], self.sin[:t])
        logits = self.lm_head(_rms(x))
        logits = (15 * torch.tanh(logits / 15)).float()
        if targets is None:
            return logits
        return F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1), ignore_index=-1)
