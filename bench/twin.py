"""The model in plain eager PyTorch: the baseline of the benchmarks, and a second implementation for tests.

It is written from the formulas, with nn.Conv1d, scaled_dot_product_attention and a full float32 cross-entropy.
Parameters have the names of ours, so that weights can be copied from one to the other.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _rms(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.size(-1),))


def _causal(conv: nn.Conv1d, x: Tensor) -> Tensor:
    return conv(x.transpose(1, 2)).transpose(1, 2)[:, :x.size(1)]


def _depthwise(channels: int, taps: int) -> nn.Conv1d:
    return nn.Conv1d(channels, channels, taps, groups=channels, padding=taps - 1, bias=False)


class _Mixer(nn.Module):
    """What both mixers have: an embedding of the token, with a gate for each of `heads` heads."""

    def __init__(self, config, letter: str, heads: int):
        super().__init__()
        self.embeds = letter in config.value_embeds
        if self.embeds:
            self.value_embed = nn.Embedding(config.vocab_size, heads * (config.n_embd // config.n_head))
            self.value_gate = nn.Linear(config.n_embd, heads, bias=False)

    def embedded(self, v: Tensor, h: Tensor, ids: Tensor) -> Tensor:
        if not self.embeds:
            return v
        gate = 3 * torch.sigmoid(self.value_gate(h))
        return v + self.value_embed(ids) * gate.repeat_interleave(v.size(-1) // gate.size(-1), dim=-1)

    def optimizer_group(self, name: str) -> str:
        return {"conv1d.weight": "taps", "value_embed.weight": "value_embeds"}.get(name, "matrices")


class _Attention(_Mixer):
    def __init__(self, config):
        super().__init__(config, "A", config.n_kv_head)
        E, self.H, self.G = config.n_embd, config.n_head, config.n_kv_head
        D = E // self.H
        self.gain, self.turns, self.convolves = config.qk_gain, config.rope_base > 0, config.attn_conv > 0
        self.c_q, self.c_k, self.c_v, self.c_proj = (nn.Linear(E, n, bias=False)
                                                     for n in (E, self.G * D, self.G * D, E))
        if self.convolves:
            self.conv1d = _depthwise(E + 2 * self.G * D, config.attn_conv)

    def forward(self, h: Tensor, ids: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        b, t, _ = h.shape
        qkv = torch.cat([self.c_q(h), self.c_k(h), self.c_v(h)], dim=-1)
        if self.convolves:
            qkv = qkv + _causal(self.conv1d, qkv)
        q, k, v = qkv.split([matrix.weight.size(0) for matrix in (self.c_q, self.c_k, self.c_v)], dim=-1)
        v = self.embedded(v, h, ids)
        q, k, v = (x.reshape(b, t, heads, -1).transpose(1, 2) for x, heads in ((q, self.H), (k, self.G), (v, self.G)))
        half = q.size(-1) // 2

        def turn(z: Tensor) -> Tensor:
            a, c = z[..., :half], z[..., half:]
            return torch.cat([a * cos + c * sin, -a * sin + c * cos], dim=-1).to(z.dtype) if self.turns else z

        q, k = self.gain * _rms(turn(q)), self.gain * _rms(turn(k))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.H != self.G)
        return self.c_proj(y.transpose(1, 2).reshape(b, t, -1))


class _SLC2(_Mixer):
    def __init__(self, config):
        super().__init__(config, "S", config.n_head)
        E, H = config.n_embd, config.n_head
        self.gate, self.norm = config.slc_gate, _rms if config.slc_norm else nn.Identity()
        self.x_proj, self.B_proj, self.c_proj = (nn.Linear(E, E, bias=False) for _ in range(3))
        if self.gate == "rank-one":
            self.alpha_proj, self.A_proj = nn.Linear(E, H, bias=False), nn.Linear(E, E // H, bias=False)
        elif self.gate == "full":
            self.C_proj = nn.Linear(E, E, bias=False)
        self.conv1d = _depthwise(E, config.n_kernel)

    def forward(self, h: Tensor, ids: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        u, B = self.embedded(self.x_proj(h), h, ids), self.B_proj(h)
        if self.gate == "full":
            y = self.C_proj(h) * _causal(self.conv1d, B * u)
        else:
            if self.gate == "rank-one":
                outer = F.silu(self.alpha_proj(h))[..., :, None] * self.A_proj(h)[..., None, :]
                u = F.silu(outer.flatten(-2)) * u
            y = B * F.silu(_causal(self.conv1d, u))
        return self.c_proj(self.norm(y))


class _MLP(nn.Module):
    def __init__(self, E: int, width: int):
        super().__init__()
        self.c_fc, self.c_proj = nn.Linear(E, width, bias=False), nn.Linear(width, E, bias=False)

    def forward(self, h: Tensor) -> Tensor:
        return self.c_proj(F.relu(self.c_fc(h)).square())


class _Block(nn.Module):
    def __init__(self, config, attention: bool):
        super().__init__()
        self.attn = _Attention(config) if attention else _SLC2(config)
        self.mlp = _MLP(config.n_embd, config.mlp_width())

    def forward(self, x: Tensor, ids: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attn(_rms(x), ids, cos, sin)
        return x + self.mlp(_rms(x))


class _Stream(nn.Module):
    def __init__(self, config):
        super().__init__()
        for name, wanted, size in (("residual_scales", config.lambdas, config.n_layer), ("backout", config.backout, 1),
                                   ("x0_scales", config.lambdas, config.n_layer), ("smear", config.smear, 1),
                                   ("smear_gate", config.smear, min(24, config.n_embd))):
            if wanted:
                setattr(self, name, nn.Parameter(torch.zeros(size)))

    def optimizer_group(self, name: str) -> str:
        return name if name.endswith("_scales") else "scalars"


class TwinGPT(nn.Module):
    """The forward pass: ids (B, T) → logits (B, T, V), or the mean loss where targets are given."""

    def __init__(self, config):
        super().__init__()
        L = config.n_layer
        self.config = config
        kinds = [letter == "A" for letter in config.layer_pattern] if config.layer_pattern else \
            [i % config.slc_rate == 1 or i == L - 1 for i in range(L)]
        self.stream = _Stream(config)
        self.transformer = nn.ModuleDict({"wte": nn.Embedding(config.vocab_size, config.n_embd),
                                          "h": nn.ModuleList(_Block(config, kind) for kind in kinds)})
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        D = config.n_embd // config.n_head
        base = config.rope_base or 1.0  # 0: no rotation
        angle = torch.arange(config.sequence_len).float()[:, None] * base ** (-torch.arange(0, D, 2).float() / D)
        self.register_buffer("cos", angle.cos().bfloat16(), persistent=False)
        self.register_buffer("sin", angle.sin().bfloat16(), persistent=False)

    def forward(self, ids: Tensor, targets: Tensor | None = None) -> Tensor:
        t, config = ids.size(1), self.config
        x = _rms(self.transformer.wte(ids))
        if config.smear:
            gate = self.stream.smear * torch.sigmoid(x[:, 1:, :24] @ self.stream.smear_gate)
            x = torch.cat([x[:, :1], x[:, 1:] + gate[..., None] * x[:, :-1]], dim=1)
        x0 = x
        for i, block in enumerate(self.transformer.h):
            if config.lambdas:
                x = self.stream.residual_scales[i] * x + self.stream.x0_scales[i] * x0
            x = block(x, ids, self.cos[:t], self.sin[:t])
            if i == config.n_layer // 2:
                middle = x
        if config.backout:
            x = x - self.stream.backout * middle
        logits = self.lm_head(_rms(x))
        logits = (15 * torch.tanh(logits / 15)).float()
        if targets is None:
            return logits
        return F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1), ignore_index=-1)
