"""Saint Iberis: a language model whose layers mix tokens with SLC2, every third one with attention.

    model = GPT(GPTConfig.from_depth(20, vocab_size=65536))
    logits = model(ids)              # ids (B, T) → logits (B, T, V)
    loss = model(ids, targets)       # mean cross-entropy in nats; targets of −1 do not count

Parameter names and numbers are those of the published checkpoints, which load with strict=True.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanochat.attention import Attention, rope_table
from nanochat.cache import KeysValues, State, Taps
from nanochat.kernels.cross_entropy import head_loss, softcap
from nanochat.kernels.relu2 import relu_squared
from nanochat.kernels.rms_norm import rms_norm
from nanochat.layers import Linear
from nanochat.sampling import Sampler, Settings
from nanochat.slc2 import SLC2


@dataclass
class GPTConfig:
    """The shape of a model. layer_pattern spells the mixers, one letter a layer: S for SLC2, A for attention, "SAS…".

    Left out, the published rule holds: layer i is attention where i % slc_rate == 1 or i is the last. window: how many tokens attention
    sees at most, each itself and the window − 1 before it; all of them where it is None.
    """

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

    def __post_init__(self) -> None:
        for name in ("sequence_len", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd", "n_kernel", "slc_rate"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd {self.n_embd} does not divide into n_head {self.n_head} heads")
        if self.n_embd // self.n_head % 2:
            raise ValueError(f"a head is n_embd / n_head = {self.n_embd // self.n_head} wide; rotary positions need an even width")
        if self.n_head % self.n_kv_head:
            raise ValueError(f"n_head {self.n_head} is not a multiple of n_kv_head {self.n_kv_head}")
        if self.layer_pattern is not None and (len(self.layer_pattern) != self.n_layer or set(self.layer_pattern) - set("SA")):
            raise ValueError(f"layer_pattern {self.layer_pattern!r} must be {self.n_layer} letters, S for SLC2 or A for attention")
        if self.window is not None and self.window < 1:
            raise ValueError(f"window must be at least 1, or None for all tokens, not {self.window}")

    @classmethod
    def from_depth(cls, depth: int, **given: Any) -> "GPTConfig":
        """The one dial: depth d is d layers, 64·d wide, with heads of at most 128. Other fields as given."""
        if depth < 1:
            raise ValueError(f"depth must be at least 1, not {depth}")
        E = 64 * depth
        H = math.ceil(E / 128)
        while E % H or E // H % 2:  # odd depths: 64·d does not divide into ceil(d/2) heads; the next number that does
            H += 1
        return cls(**{"n_layer": depth, "n_head": H, "n_kv_head": H, "n_embd": E, **given})

    def pattern(self) -> str:
        """The mixer of each layer: S or A."""
        if self.layer_pattern is not None:
            return self.layer_pattern
        return "".join("A" if i % self.slc_rate == 1 or i == self.n_layer - 1 else "S" for i in range(self.n_layer))

    def to_dict(self) -> dict[str, Any]:
        """The fields for a meta file, but layer_pattern and window where they are not set: published code can read the rest."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def padded(rows: Sequence[Sequence[int]], device: torch.device | str) -> tuple[Tensor, list[int]]:
    """Return ids (B, T) of rows of different lengths, with zeros on the right, and how many of each are real: `counts` of the model."""
    counts = [len(row) for row in rows]
    ids = torch.zeros(len(rows), max(counts), dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, :counts[i]] = torch.tensor(row)
    return ids.to(device), counts


class MLP(nn.Module):
    """c_proj(relu(c_fc(x))²), four times as wide inside."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(relu_squared(self.c_fc(x)))


class Block(nn.Module):
    """One layer: a mixer along time, then an MLP, each on the normalised input and added to it."""

    def __init__(self, config: GPTConfig, kind: str):
        super().__init__()
        self.attn = Attention(config) if kind == "A" else SLC2(config)  # "attn" for both: kept for checkpoint compatibility
        self.mlp = MLP(config)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], state: KeysValues | Taps | None = None) -> Tensor:
        x = x + self.attn(rms_norm(x), rope, state)
        return x + self.mlp(rms_norm(x))


class GPT(nn.Module):
    """Token ids to logits or loss.

    Weights stay in the dtype they have (float32 in training); activations are in `compute_dtype`, or the weights' own where it is None.
    """

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.compute_dtype: torch.dtype | None = None
        self.transformer = nn.ModuleDict({
            "wte": nn.Embedding(config.vocab_size, config.n_embd),
            "h": nn.ModuleList([Block(config, kind) for kind in config.pattern()]),
        })
        self.lm_head = Linear(config.n_embd, config.vocab_size)
        self._rope: tuple[Tensor, Tensor] | None = None
        self._compiled_for: tuple[int, int] | None = None
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Draw all weights anew (after `to_empty`, say).

        Matrices normal with std min(1, √(fan_out/fan_in))/√fan_in, embedding normal(0, 1), head and every c_proj zero: as published.
        The taps are uniform ±1/√K: the published code left them as memory held them, and with zeros there an SLC2 layer never learns.
        """
        for name, module in self.named_modules():
            if isinstance(module, nn.Conv1d):
                bound = self.config.n_kernel ** -0.5
                module.weight.uniform_(-bound, bound)
            elif isinstance(module, nn.Embedding):
                module.weight.normal_()
            elif isinstance(module, nn.Linear):
                if name == "lm_head" or name.endswith("c_proj"):
                    module.weight.zero_()
                else:
                    fan_out, fan_in = module.weight.shape
                    module.weight.normal_(std=min(1.0, math.sqrt(fan_out / fan_in)) / math.sqrt(fan_in))

    @property
    def device(self) -> torch.device:
        return self.lm_head.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the activations."""
        return self.compute_dtype or self.lm_head.weight.dtype

    def get_device(self) -> torch.device:
        """The device of the weights (the published name)."""
        return self.device

    def compile_blocks(self, B: int, T: int) -> None:
        """Compile the blocks for batches of just (B, T) without a state; all other shapes run as they are. Names do not change."""
        for block in self.transformer.h:
            block.compile(dynamic=False)
        self._compiled_for = (B, T)

    def new_state(self, batch: int = 1, capacity: int | None = None) -> State:
        """An empty memory for `batch` sequences, with room for `capacity` tokens each (sequence_len where it is None)."""
        return State(self.config, batch, capacity or self.config.sequence_len, device=self.device, dtype=self.dtype)

    def rope(self, end: int) -> tuple[Tensor, Tensor]:
        """cos and sin tables for positions up to `end`; made on first use and when they must grow, never in the checkpoint."""
        if self._rope is None or self._rope[0].shape[0] < end or self._rope[0].device != self.device:
            length = max(self.config.sequence_len, 1 << (end - 1).bit_length())
            with torch.inference_mode(False):  # sampling may make it, and training use it
                self._rope = rope_table(length, self.config.n_embd // self.config.n_head, self.device)
        return self._rope

    def hidden(self, ids: Tensor, state: State | None = None, counts: list[int] | None = None) -> Tensor:
        """Return what the head reads, (B, T, E), of ids (B, T): the normalised output of the last layer.

        state: ids go on where it ends, and it takes them in. counts: how many tokens of each row are real; the rest, on the right, is
        padding: no real token sees it, the state does not take it in, and what is returned there means nothing.
        """
        T = ids.shape[1]
        if counts is not None and (len(counts) != ids.shape[0] or not all(0 < count <= T for count in counts)):
            raise ValueError(f"counts must be {ids.shape[0]} numbers from 1 to {T}, not {counts}")
        if state is None:
            rope = tuple(table[:T] for table in self.rope(T))
        else:
            state.reserve(T, counts)
            cos, sin = self.rope(max(state.lengths) + T)
            at = state.positions(T)
            rope = (cos[at], sin[at])
        x = rms_norm(F.embedding(ids, self.transformer.wte.weight).to(self.dtype))
        compiled = state is None and tuple(ids.shape) == self._compiled_for
        for i, block in enumerate(self.transformer.h):
            run = block if compiled else block.forward
            x = run(x, rope, None if state is None else state.layers[i])
        if state is not None:
            state.advance(T, counts)
        return rms_norm(x)

    def head(self, x: Tensor) -> Tensor:
        """Return float32 logits (..., V) of hidden states x (..., E)."""
        return softcap(self.lm_head(x).float())

    def forward(self, ids: Tensor, targets: Tensor | None = None, loss_reduction: str = "mean", state: State | None = None,
                last_only: bool = False, counts: list[int] | None = None, factors: Tensor | None = None) -> Tensor:
        """Return float32 logits (B, T, V) of ids (B, T); or, with targets (B, T), the cross-entropy in nats.

        loss_reduction: "mean" over the targets that are not −1, "sum", or "none" for (B·T,) losses. factors (B, T), with "sum": what each
        token's loss is multiplied with. last_only: logits (B, 1, V) of the last (real) position of each row alone. state, counts: as in
        `hidden`.
        """
        x = self.hidden(ids, state, counts)
        if last_only:
            x = x[:, -1:] if counts is None else x[torch.arange(len(counts)), [count - 1 for count in counts]].unsqueeze(1)
        if targets is None:
            return self.head(x)
        x, targets, factors = x.flatten(0, 1), targets.flatten(), None if factors is None else factors.flatten()
        plain = self.lm_head.weight.is_floating_point()  # else quantised: measured, never trained
        return head_loss(x, self.lm_head.weight, targets, loss_reduction, factors, product=None if plain else self.lm_head)

    def flops_per_token(self, T: int | None = None) -> float:
        """Training FLOPs a token at rows of T (sequence_len where None): 6 a matrix weight, and causal attention where there is some.

        Attention of one layer costs 2·2·E FLOPs a key forward, three times that with backward, over (T+1)/2 ≈ T/2 keys: 6·E·T a token;
        with a window of W < T over W − W²/2T keys.
        """
        T = T or self.config.sequence_len
        W = min(T, self.config.window or T)
        matrices = sum(p.numel() for p in self.parameters() if p.ndim == 2) - self.transformer.wte.weight.numel()
        return 6 * matrices + 12 * self.config.n_embd * (W - W * W / (2 * T)) * self.config.pattern().count("A")

    def estimate_flops(self) -> float:
        """Training FLOPs a token at rows of sequence_len (the published name)."""
        return self.flops_per_token()

    @torch.inference_mode()
    def generate(self, input_ids: Tensor, max_new_tokens: int = 512, temperature: float = 0.2, top_k: int | None = 20,
                 top_p: float | None = 0.95, repetition_penalty: float = 1.15, eos_token_id: int | None = None,
                 seed: int | None = None) -> Iterator[int]:
        """Yield the tokens that continue input_ids (1, T), one by one, at most max_new_tokens; ends before eos_token_id.

        temperature 0 or top_k 1 take the likeliest; repetition_penalty divides the logits of tokens seen (multiplies negative ones).
        """
        ids = torch.as_tensor(input_ids, device=self.device)
        if ids.ndim != 2 or ids.shape[0] != 1 or ids.shape[1] < 1:
            raise ValueError(f"generate takes ids of shape (1, T) with T at least 1, not {tuple(ids.shape)}; Engine does several rows")
        sampler = Sampler([Settings(temperature, top_k, top_p, repetition_penalty, seed)], self.config.vocab_size, self.device)
        sampler.saw(0, ids[0].tolist())
        state = self.new_state(capacity=ids.shape[1] + max_new_tokens)
        for _ in range(max_new_tokens):
            next_id = sampler(self(ids, state=state, last_only=True)[:, -1])
            token = int(next_id)
            if token == eos_token_id:
                return
            yield token
            sampler.saw(0, [token])
            ids = next_id.view(1, 1)
