"""The shape of a model: `GPTConfig`, which a checkpoint's meta file holds as `model_config`.

    config = GPTConfig.from_depth(20, vocab_size=65536)
    config = GPTConfig.from_depth(20, lambdas=True, value_embeds="A", slc_norm=True)     # optional parts
"""

import math
from dataclasses import asdict, dataclass, fields
from typing import Any

from nanochat.attention import Attention
from nanochat.positions import ROPE_BASE
from nanochat.slc2 import GATE_INITS, GATES, SLC2

MIXERS = {"S": SLC2, "A": Attention}  # the letters of layer_pattern


@dataclass
class GPTConfig:
    """The shape of a model.

    layer_pattern: the mixer of each layer, one letter of MIXERS a layer, such as "SASSA". None is the published rule:
    layer i is attention where i % slc_rate == 1 or i is the last, else SLC2. window: how many tokens attention sees at
    most, each itself and the window − 1 before it; None is all.

    The optional parts; their defaults are the published model. nanochat/recipe/modern.py says which of them are worth
    having.

    lambdas: each layer starts from r·x + z·x0, where x is the residual stream, x0 the first layer's input, and r and z
        are learnt, a pair a layer.
    backout: the head reads norm(x − b·m), where m is the stream behind the middle layer and b is learnt.
    smear: a learnt part of the previous token's embedding is added to each token's.
    value_embeds: letters of the mixers whose values (attention) or inputs (SLC2) have an embedding of the token added.
    qk_gain: factor of queries and keys behind their norm.
    rope_base: of the rotary angles; 0 is no positions at all (NoPE).
    mlp_ratio: width inside the MLP, as a multiple of n_embd.
    embed_init, head_init: std of the embedding and of the head at the start. fc_init: factor on that of c_fc.
    slc_gate_init: std of the two thin matrices of SLC2's gate: "published", or "unit", which is 1/√E.
    slc_norm: an RMS norm before SLC2's c_proj.
    slc_gate: what gates SLC2's convolution. "rank-one" is the published one; "full" is LFM2's, with a matrix for each
        of its gates, C·conv(B·x); "none" leaves the input gate out.
    attn_conv: taps of a causal depthwise convolution that is added to queries, keys and values before norm and rotation
        (a Canon layer, arXiv 2512.17351); 0 is none.
    """

    # the fields that every meta file has
    ALWAYS = "sequence_len", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd", "n_kernel", "slc_rate"

    sequence_len: int = 1024
    vocab_size: int = 50304
    n_layer: int = 16
    n_head: int = 6
    n_kv_head: int = 6
    n_embd: int = 768
    n_kernel: int = 3
    slc_rate: int = 3
    layer_pattern: str | None = None
    window: int | None = None
    lambdas: bool = False
    backout: bool = False
    smear: bool = False
    value_embeds: str = ""
    qk_gain: float = 1.0
    rope_base: float = ROPE_BASE
    mlp_ratio: float = 4.0
    embed_init: float = 1.0
    head_init: float = 0.0
    fc_init: float = 1.0
    slc_gate_init: str = "published"
    slc_norm: bool = False
    slc_gate: str = "rank-one"
    attn_conv: int = 0

    def __post_init__(self) -> None:
        for name in self.ALWAYS:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd {self.n_embd} does not divide into n_head {self.n_head} heads")
        if self.n_embd // self.n_head % 2:
            raise ValueError(f"a head is n_embd / n_head = {self.n_embd // self.n_head} wide; rotary positions need "
                             "an even width")
        if self.n_head % self.n_kv_head:
            raise ValueError(f"n_head {self.n_head} is not a multiple of n_kv_head {self.n_kv_head}")
        if self.layer_pattern is not None and (len(self.layer_pattern) != self.n_layer
                                               or set(self.layer_pattern) - set(MIXERS)):
            letters = " or ".join(f"{letter} for {mixer.__name__}" for letter, mixer in MIXERS.items())
            raise ValueError(f"layer_pattern {self.layer_pattern!r} must be {self.n_layer} letters, {letters}")
        if self.window is not None and self.window < 1:
            raise ValueError(f"window must be at least 1, or None for all tokens, not {self.window}")
        self._check_optional_parts()

    def _check_optional_parts(self) -> None:
        letters = [letter for letter, mixer in MIXERS.items() if mixer.value_heads]
        if set(self.value_embeds) - set(letters) or len(set(self.value_embeds)) < len(self.value_embeds):
            raise ValueError(f"value_embeds {self.value_embeds!r} must be letters of mixers that take them, each once: "
                             f"{' or '.join(letters)}, or empty for none")
        for name, least in (("qk_gain", "above"), ("mlp_ratio", "above"), ("embed_init", "above"), ("fc_init", "above"),
                            ("rope_base", "at least"), ("head_init", "at least"), ("attn_conv", "at least")):
            value = getattr(self, name)
            if not (math.isfinite(value) and (value > 0 or value == 0 and least == "at least")):
                raise ValueError(f"{name} must be {least} 0, not {value}")
        for name, known in (("slc_gate_init", GATE_INITS), ("slc_gate", GATES)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} {getattr(self, name)!r} must be one of {', '.join(known)}")

    @classmethod
    def from_depth(cls, depth: int, **given: Any) -> "GPTConfig":
        """Return the shape that depth d sets: d layers, 64·d wide, heads of at most 128. Other fields as given."""
        if depth < 1:
            raise ValueError(f"depth must be at least 1, not {depth}")
        E = 64 * depth
        H = math.ceil(E / 128)
        while E % H or E // H % 2:  # odd depths: 64·d does not divide into ceil(d/2) heads; the next number that does
            H += 1
        return cls(**{"n_layer": depth, "n_head": H, "n_kv_head": H, "n_embd": E, **given})

    def pattern(self) -> str:
        """Return the mixer of each layer, one letter of MIXERS each."""
        if self.layer_pattern is not None:
            return self.layer_pattern
        return "".join("A" if i % self.slc_rate == 1 or i == self.n_layer - 1 else "S" for i in range(self.n_layer))

    def mlp_width(self) -> int:
        """Return the width inside the MLP: mlp_ratio · n_embd, where that is no whole number times n_embd the nearest
        multiple of 16, at which products on GPUs are fast."""
        if self.mlp_ratio == int(self.mlp_ratio):
            return int(self.mlp_ratio) * self.n_embd
        return max(1, round(self.mlp_ratio * self.n_embd / 16)) * 16

    def to_dict(self) -> dict[str, Any]:
        """Return the fields for a meta file.

        Optional ones are left out where they are as published, since published code does not know them. One that is not
        makes another model, which code that does not know it has to refuse.
        """
        published = {field.name: field.default for field in fields(self)}
        return {name: value for name, value in asdict(self).items() if name in self.ALWAYS or value != published[name]}
