"""What every mixer along time must offer. A mixer is one file: this class, subclassed, and one letter in gpt.MIXERS."""

import torch
from torch import Tensor, nn

from nanochat.cache import LayerCache
from nanochat.kernels.fused_matvec import fused_matvec
from nanochat.layers import Linear, init_linear, is_plain, joined, together
from nanochat.positions import Positions


class Mixer(nn.Module):
    """Mixes the tokens of each sequence: h (B, T, E) → (B, T, E), where token t depends on tokens up to t alone.

    Most mixers are `c_proj(mix(projections of h))`. Such a mixer sets `c_proj` and defines `projections`, `mix` and
    `new_cache`; forward, the single-row step, initialisation and the count of FLOPs follow. Another one overrides
    `forward` instead, and then decodes single rows by it too.

    The decoding cache belongs to the request, never to the module. Whatever the split of a sequence into calls, the
    result must be that of one call: tests/test_new_mixer.py says how that is tested.
    """

    c_proj: Linear
    # What a layer with this mixer keeps for backward of each token, its MLP included, in tensors as large as its input,
    # (B, T, E). For nanochat/memory.py; a number too large costs rows of a micro-batch.
    kept_for_backward = 13.0

    def __init__(self, config):
        """config: a GPTConfig."""
        super().__init__()

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

    @torch.no_grad()
    def init_weights(self) -> None:
        """Initialise all weights: c_proj zero, other matrices as published (`layers.init_linear`)."""
        for name, module in self.named_children():
            if isinstance(module, Linear):
                init_linear(module, zero=name == "c_proj")

    def optimizer_group(self, name: str) -> str | None:
        """Return the optimizer group of the parameter `name`; None: there is no rule, and training refuses to begin."""
        return "matrices" if self.get_parameter(name).ndim == 2 else None

    def flops_per_token(self, T: int) -> float:
        """Return the training FLOPs a token at rows of T: 6 a matrix weight (2 forward, 4 backward)."""
        return 6 * sum(p.numel() for p in self.parameters() if p.ndim == 2)
