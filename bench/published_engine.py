"""Decoding as the published engine does it, in plain eager PyTorch: the baseline for the speed of decoding.

Weights are float32. One KV cache has room for all n_layer layers, though only attention layers use it, and grows when
it is full. Nothing keeps the past inputs of the convolutions: from the second token on, an SLC2 layer sees zeros as its
past, so that the tokens are wrong while the work is the published one. A token is sampled with softmax and multinomial,
or argmax at temperature 0, and copied to the host. Parameters have the names of ours, so that weights can be copied.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.twin import TwinGPT, _Attention, _rms

GROWTH = 1024  # the cache grows to the next multiple of this


class PublishedCache:
    """The KV cache of all layers in one tensor (n_layer, 2, B, H, T, D). position: tokens in it."""

    def __init__(self, config, batch: int, length: int):
        self.shape = (config.n_layer, 2, batch, config.n_kv_head, length, config.n_embd // config.n_head)
        self.all: Tensor | None = None
        self.position = 0

    def insert(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append k and v (B, H, T, D) to the cache of a layer; return all of its keys and values."""
        if self.all is None:
            self.all = torch.empty(self.shape, dtype=k.dtype, device=k.device)
        start, end = self.position, self.position + k.size(2)
        if end > self.all.size(4):
            need = (end + GROWTH + GROWTH - 1) // GROWTH * GROWTH
            missing = (*self.shape[:4], need - self.all.size(4), self.shape[5])
            self.all = torch.cat([self.all, torch.empty(missing, dtype=k.dtype, device=k.device)], dim=4)
        self.all[layer, 0, :, :, start:end], self.all[layer, 1, :, :, start:end] = k, v
        return self.all[layer, 0, :, :, :end], self.all[layer, 1, :, :, :end]


def attend(layer: _Attention, h: Tensor, cos: Tensor, sin: Tensor, cache: PublishedCache, number: int) -> Tensor:
    """Attention of h (B, T, E), a whole prompt or one token after it, over the cache. number: of the layer."""
    b, t, _ = h.shape
    q, k, v = (matrix(h).view(b, t, heads, -1)
               for matrix, heads in ((layer.c_q, layer.H), (layer.c_k, layer.G), (layer.c_v, layer.G)))
    half = q.size(-1) // 2

    def turn(z: Tensor) -> Tensor:
        a, c = z[..., :half], z[..., half:]
        return torch.cat([a * cos + c * sin, -a * sin + c * cos], dim=3).to(z.dtype)

    q, k = _rms(turn(q)), _rms(turn(k))
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    k, v = cache.insert(number, k, v)
    y = F.scaled_dot_product_attention(q, k, v, is_causal=t == k.size(2), enable_gqa=layer.H != layer.G)
    return layer.c_proj(y.transpose(1, 2).contiguous().view(b, t, -1))


def forward(model: TwinGPT, ids: Tensor, cache: PublishedCache) -> Tensor:
    """float32 logits (B, T, V) of ids (B, T) at the positions after those in the cache."""
    start = cache.position
    cos, sin = (table[start:start + ids.size(1), None] for table in (model.cos, model.sin))
    x = _rms(model.transformer.wte(ids))
    for number, block in enumerate(model.transformer.h):
        h = _rms(x)
        attention = isinstance(block.attn, _Attention)
        x = x + (attend(block.attn, h, cos, sin, cache, number) if attention else block.attn(h, ids, cos, sin))
        x = x + block.mlp(_rms(x))
    cache.position += ids.size(1)
    logits = model.lm_head(_rms(x))
    return (15 * torch.tanh(logits / 15)).float()


@torch.inference_mode()
def generate(model: TwinGPT, tokens: list[int], num_samples: int = 1, max_tokens: int = 64, temperature: float = 1.0,
             top_k: int | None = None, seed: int = 42) -> Iterator[list[int]]:
    """Yield one token of each sequence, max_tokens times. The prompt is prefilled once, and its cache then copied."""
    device = model.lm_head.weight.device
    rng = torch.Generator(device).manual_seed(seed)

    def next_tokens(logits: Tensor) -> Tensor:
        if temperature == 0:
            return logits.argmax(dim=-1, keepdim=True)
        if top_k is not None:
            values, index = logits.topk(min(top_k, logits.size(-1)), dim=-1)
            return index.gather(1, torch.multinomial((values / temperature).softmax(dim=-1), 1, generator=rng))
        return torch.multinomial((logits / temperature).softmax(dim=-1), 1, generator=rng)

    first = PublishedCache(model.config, 1, len(tokens))
    logits = forward(model, torch.tensor([tokens], device=device), first)[:, -1]
    cache = PublishedCache(model.config, num_samples, len(tokens) + max_tokens)
    cache.all = torch.empty(cache.shape, dtype=first.all.dtype, device=device)
    cache.all[..., :len(tokens), :], cache.position = first.all, first.position
    ids = next_tokens(logits.expand(num_samples, -1))
    for _ in range(max_tokens):
        column = ids[:, 0].tolist()
        yield column
        ids = next_tokens(forward(model, torch.tensor(column, device=device)[:, None], cache)[:, -1])
