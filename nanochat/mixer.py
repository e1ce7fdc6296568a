"""What every mixer along time must offer. A mixer is one file, with this class subclassed, and a letter in
config.MIXERS."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanochat.cache import LayerCache
from nanochat.kernels.fused_matvec import fused_matvec
from nanochat.kernels.slc2 import causal_conv, causal_conv_step
from nanochat.layers import Linear, init_linear, is_plain, joined, together
from nanochat.positions import Positions


def convolve(u: Tensor, taps: Tensor, positions: Positions, past: Tensor | None) -> Tensor:
    """Return the causal depthwise convolution (B, T, N) of u (B, T, N) with taps (N, K).

    past: (B, K−1, N), the inputs before u, oldest first; it is brought up to date in place. None: there are none.
    """
    if past is None:
        return causal_conv(u, taps)
    if positions.T == 1 and positions.counts is None:
        return causal_conv_step(u, taps, past)
    c = causal_conv(u, taps, past.to(u.dtype))
    positions.remember(past, u)
    return c


class Mixer(nn.Module):
    """Mixes the tokens of each sequence: h (B, T, E) → (B, T, E), where token t depends on tokens up to t alone.

    Most mixers are `c_proj(mix(projections of h))`. Such a mixer sets `c_proj` and defines `projections`, `mix` and
    `new_cache`; forward, the single-row step, initialisation and the count of FLOPs follow. Another one overrides
    `forward` instead, and then decodes single rows by it too.

    The decoding cache belongs to the request, never to the module. Whatever the split of a sequence into calls, the
    result must be that of one call: tests/test_new_mixer.py says how that is tested.
    """

    c_proj: Linear
    # What a published layer with this mixer keeps for backward of each token, its MLP included, in tensors as large as
    # its input, (B, T, E). For nanochat/memory.py; a number too large costs rows of a micro-batch.
    kept_for_backward = 13.0
    # Which field of GPTConfig has the number of heads of its values; None: its letter cannot be in value_embeds.
    value_heads: str | None = None

    def __init__(self, config):
        """config: a GPTConfig."""
        super().__init__()
        self.value_embed: nn.Embedding | None = None
        self.value_gate: Linear | None = None

    def projections(self) -> list[Linear]:
        """Return the matrices that are applied to h, in the order of their columns in z; they become one product."""
        return []

    def mix(self, z: Tensor, positions: Positions, cache: LayerCache | None) -> Tensor:
        """Mix along time: from the joined projections to the input of c_proj.

        Args:
            z: (B, T, N), the columns of all projections, then padding (see `layers.together`).
            positions: where the T tokens stand. For a static decode step (`positions.index` is not None) only
                operations that can be captured as a CUDA graph may run.
            cache: what this mixer made in `new_cache`, cut to the B rows in use; it is updated in place. None: rows
                start at position 0, and nothing is kept.

        Returns:
            (B, T, E).
        """
        raise NotImplementedError(f"{type(self).__name__} defines neither mix nor forward")

    def new_cache(self, max_rows: int, max_len: int, device: torch.device | str, dtype: torch.dtype) -> LayerCache:
        """Return an empty decoding cache for max_rows sequences of up to max_len tokens."""
        raise NotImplementedError(f"{type(self).__name__} cannot decode: it defines no new_cache")

    def forward(self, h: Tensor, positions: Positions, cache: LayerCache | None = None) -> Tensor:
        """Mix h (B, T, E) along time; returns (B, T, E). Arguments as in `mix`."""
        return self.c_proj(self.mix(together(h, *self.projections()), positions, cache))

    def has_single_row_step(self, dtype: torch.dtype) -> bool:
        """Whether `single_row_step` gives what `forward` gives: plain matrices in `dtype`, joined (see
        `layers.join`)."""
        if type(self).forward is not Mixer.forward or not self.projections():
            return False
        return is_plain(joined(self.projections()), dtype) and is_plain(self.c_proj, dtype)

    def single_row_step(self, x: Tensor, positions: Positions, cache: LayerCache) -> Tensor:
        """Return x + forward(rms_norm(x)) for one token of one row, x (1, 1, E), in two products and what is
        between."""
        z = fused_matvec(x, joined(self.projections()).weight, normed=True)
        return fused_matvec(self.mix(z, positions, cache), self.c_proj.weight, x)

    @classmethod
    def kept(cls, config, embeds: bool) -> float:
        """Return `kept_for_backward` of a layer with the optional parts of `config`; embeds: and a value embedding."""
        return cls.kept_for_backward

    def add_value_embed(self, config) -> None:
        """Make the parameters of `with_embedded`."""
        E, heads = config.n_embd, getattr(config, self.value_heads)
        self.value_embed = nn.Embedding(config.vocab_size, heads * (E // config.n_head))
        # From the whole input, where nanochat takes 12 of its channels: so it is one more matrix of the joined product,
        # of a few columns, and the optimizer sees a matrix as all others.
        self.value_gate = Linear(E, heads)

    def with_embedded(self, values: Tensor, gate: Tensor, ids: Tensor) -> Tensor:
        """Return values (B, T, H, D) plus the embedding of tokens `ids` (B, T), times 3·sigmoid(gate) of each head.

        gate (B, T, H): value_gate's columns of the joined product.
        """
        embedded = F.embedding(ids, self.value_embed.weight).to(gate.dtype).unflatten(-1, (gate.shape[-1], -1))
        return torch.addcmul(values, torch.sigmoid(gate).unsqueeze(-1), embedded, value=3)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Initialise all weights: c_proj zero, other matrices as published (`layers.init_linear`)."""
        for name, module in self.named_children():
            if isinstance(module, Linear):
                init_linear(module, zero=name in ("c_proj", "value_gate"))
        if self.value_embed is not None:
            bound = (3 / self.c_proj.weight.shape[1]) ** 0.5
            self.value_embed.weight.uniform_(-bound, bound)

    def optimizer_group(self, name: str) -> str | None:
        """Return the optimizer group of the parameter `name`; None: there is no rule, and training refuses to begin."""
        if name in ("value_embed.weight", "conv1d.weight"):
            return "value_embeds" if name == "value_embed.weight" else "taps"
        return "matrices" if self.get_parameter(name).ndim == 2 else None

    def is_dead(self) -> bool:
        """Whether the weights let the mixer add nothing, whatever its input, and training cannot change that."""
        return False

    def flops_per_token(self, T: int) -> float:
        """Return the training FLOPs a token at rows of T: 6 a matrix weight (2 forward, 4 backward)."""
        return 6 * sum(p.numel() for name, p in self.named_parameters() if self.optimizer_group(name) == "matrices")
