"""Saint Iberis: a language model whose layers mix tokens with SLC2, every third one with attention.

    model = GPT(GPTConfig.from_depth(20, vocab_size=65536))
    logits = model(ids)              # ids (B, T) → logits (B, T, V)
    loss = model(ids, targets)       # mean cross-entropy in nats; targets of −1 do not count

Parameter names and numbers are those of the published checkpoints, which load with strict=True.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from nanochat.cache import Cache, LayerCache
from nanochat.config import MIXERS, GPTConfig
from nanochat.kernels.add_norm import add_norm
from nanochat.kernels.cross_entropy import head_loss, softcap
from nanochat.kernels.dispatch import state_fp_fusion
from nanochat.kernels.fp8 import check_fp8, fits, fp8_head_loss, fp8_mlp
from nanochat.kernels.fused_matvec import fused_matvec
from nanochat.kernels.mlp import mlp
from nanochat.kernels.relu2 import relu_squared
from nanochat.kernels.rms_norm import rms_norm
from nanochat.layers import Linear, init_linear, is_plain
from nanochat.positions import Positions, Rope, rope_table
from nanochat.ragged import cached_on
from nanochat.sampling import Sampler, Settings


class _Unfilled(TorchFunctionMode):
    """Leaves out normal_: on the meta device there are no numbers to draw, and it imports the compiler, for seconds."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (Tensor.normal_, nn.init.normal_):
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def meta_model(config: GPTConfig) -> "GPT":
    """Return a model whose parameters have shapes and no memory: to count, or to be given a checkpoint's tensors."""
    with torch.device("meta"), _Unfilled():
        return GPT(config)


class MLP(nn.Module):
    """c_proj(relu(c_fc(x))²), four times as wide inside, or mlp_ratio times."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = Linear(config.n_embd, config.mlp_width())
        self.c_proj = Linear(config.mlp_width(), config.n_embd)
        self.fp8: str | None = None  # see GPT.train_in_fp8

    def forward(self, x: Tensor) -> Tensor:
        if self.fp8 is not None and torch.is_grad_enabled() and fits(x, self.c_fc.weight):
            return fp8_mlp(x, self.c_fc.weight, self.c_proj.weight, self.fp8)
        if isinstance(self.c_fc, Linear) and isinstance(self.c_proj, Linear):
            return mlp(x, self.c_fc.weight, self.c_proj.weight)
        return self.c_proj(relu_squared(self.c_fc(x)))  # quantised


Entry = tuple[Tensor, Tensor, Tensor]  # x0 (B, T, E), and the scales r and z of a layer, 0-d: see GPTConfig.lambdas


class _Enter(torch.autograd.Function):
    """r·x + z·x0, with half the passes over memory that autograd makes for it: the gradients of r and z are dot
    products."""

    @staticmethod
    def forward(ctx, x: Tensor, x0: Tensor, r: Tensor, z: Tensor) -> Tensor:
        ctx.save_for_backward(x, x0, r, z)
        return torch.mul(x, r).addcmul_(x0, z)

    @staticmethod
    @once_differentiable
    def backward(ctx, d: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        x, x0, r, z = ctx.saved_tensors
        flat = d.flatten()
        return d * r, d * z, flat @ x.flatten(), flat @ x0.flatten()


def enter(x: Tensor, x0: Tensor, r: Tensor, z: Tensor) -> Tensor:
    """Return r·x + z·x0, what a layer starts from; x and x0 (B, T, E), r and z 0-d."""
    if x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64) and not torch.compiler.is_compiling():
        return _Enter.apply(x, x0, r, z)
    return torch.addcmul(x * r, x0, z)  # fused by the compiler


class Stream(nn.Module):
    """What the optional parts of a GPT do to the residual stream around its blocks: see GPTConfig's lambdas, backout
    and smear. As published it has no parameters and does nothing."""

    SMEAR_CHANNELS = 24  # of a token's embedding, which its gate is computed from

    def __init__(self, config: GPTConfig):
        super().__init__()
        L, E = config.n_layer, config.n_embd
        self.width, self.middle = E, L // 2
        if config.lambdas:
            self.residual_scales = nn.Parameter(torch.empty(L))
            self.x0_scales = nn.Parameter(torch.empty(L))
        if config.backout:
            self.backout = nn.Parameter(torch.empty(1))
        if config.smear:
            self.smear = nn.Parameter(torch.empty(1))
            self.smear_gate = nn.Parameter(torch.empty(min(self.SMEAR_CHANNELS, E)))
        self.lambdas, self.backs_out, self.smears = config.lambdas, config.backout, config.smear

    @torch.no_grad()
    def init_weights(self) -> None:
        """Set all scales as in nanochat: the first layers keep more of x0 and enlarge the stream; no smear yet."""
        if self.lambdas:
            way = torch.linspace(0, 1, len(self.x0_scales), device=self.x0_scales.device)
            self.residual_scales.copy_(1.15 - 0.10 * way)
            self.x0_scales.copy_(0.20 - 0.15 * way)
        if self.backs_out:
            self.backout.fill_(0.2)
        if self.smears:
            self.smear.zero_()
            self.smear_gate.uniform_(-len(self.smear_gate) ** -0.5, len(self.smear_gate) ** -0.5)

    def optimizer_group(self, name: str) -> str:
        """Return the optimizer group of the parameter `name`."""
        return name if name in ("residual_scales", "x0_scales") else "scalars"

    def new_cache(self, max_rows: int, max_len: int, device: torch.device | str, dtype: torch.dtype) -> LayerCache:
        """Return a cache of `last` (max_rows, 1, E): the embedding of each row's last token, for smear."""
        return LayerCache(per_row={"last": torch.zeros(max_rows, 1, self.width, device=device, dtype=dtype)})

    def begin(self, x: Tensor, positions: Positions, cache: LayerCache | None) -> Tensor:
        """Return x0, the input of the first layer, from the embedding x (B, T, E)."""
        if not self.smears:
            return x
        if cache is None:
            before = F.pad(x, (0, 0, 1, 0))
        else:
            last = cache.per_row["last"]
            before = torch.cat([last.to(x.dtype), x], dim=1)
            last.copy_(positions.last(before, 1))
        gate = torch.sigmoid(x[..., :len(self.smear_gate)] @ self.smear_gate.to(x.dtype)) * self.smear.to(x.dtype)
        return torch.addcmul(x, gate.unsqueeze(-1), before[:, :-1])

    def entries(self, x0: Tensor) -> list[Entry]:
        """Return what `Block.forward` takes as `entry` where there are lambdas, for each layer."""
        scales = self.residual_scales.to(x0.dtype), self.x0_scales.to(x0.dtype)  # rounded as decoding holds them
        x0 = x0.view_as(x0)  # for the first layer: given one tensor twice, the compiler would make another graph of it
        return [(x0, r, z) for r, z in zip(*(scale.unbind() for scale in scales))]

    def end(self, x: Tensor, middle: Tensor | None) -> Tensor:
        """Return what the last norm is of: x − b·middle."""
        return x if middle is None else torch.addcmul(x, middle, self.backout.to(x.dtype), value=-1)


class Block(nn.Module):
    """One layer: a mixer along time, then an MLP, each on the normalised residual stream and added to it.

    A sum and the norm behind it are one operation. So a block gets the stream x with its norm h, and returns the new
    stream with its norm, which the next block or the head starts from.
    """

    def __init__(self, config: GPTConfig, letter: str):
        super().__init__()
        self.attn = MIXERS[letter](config)  # "attn" for all mixers: kept for checkpoint compatibility
        if letter in config.value_embeds:
            self.attn.add_value_embed(config)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, h: Tensor | None, positions: Positions, cache: LayerCache | None = None,
                entry: Entry | None = None) -> tuple[Tensor, Tensor | None]:
        """Return the residual stream behind this layer and its norm, from x and h = rms_norm(x), all (B, T, E).

        With `entry`, h is not read and no norm is returned: each layer scales the stream first, see `enter`.
        """
        if entry is not None:
            x = enter(x, *entry)
            h = rms_norm(x)
        x, h = add_norm(x, self.attn(h, positions, cache))
        return add_norm(x, self.mlp(h)) if entry is None else (x + self.mlp(h), None)

    def has_single_row_step(self, dtype: torch.dtype) -> bool:
        """Whether `single_row_step` gives what `forward` gives: all matrices plain and in `dtype`."""
        matrices = is_plain(self.mlp.c_fc, dtype) and is_plain(self.mlp.c_proj, dtype)
        return matrices and self.attn.has_single_row_step(dtype)

    def single_row_step(self, x: Tensor, positions: Positions, cache: LayerCache) -> Tensor:
        """Return the residual stream that `forward` returns, for one token of one row, x (1, 1, E), in half the
        operations.

        At one row, reading each matrix and starting each kernel is what takes the time. So each product does the norm
        before it and the activation or sum behind it too: five or six kernels a layer.
        """
        x = self.attn.single_row_step(x, positions, cache)
        wide = fused_matvec(x, self.mlp.c_fc.weight, normed=True, activated=True)
        return fused_matvec(wide, self.mlp.c_proj.weight, x)


def _from_stream(run: Callable, x: Tensor, norm: list[Tensor], positions: Positions, entry: Entry | None
                 ) -> tuple[Tensor, Tensor | None]:
    """Run a block that activation checkpointing will run again.

    Only x is kept for that. `norm` holds rms_norm(x) for the first time and is then empty: the second time computes it
    again, as a value alone, since the gradient takes the way of the first time.
    """
    if entry is not None:
        return run(x, None, positions, None, entry)
    h = norm.pop() if norm else rms_norm(x.detach()).requires_grad_(x.requires_grad)
    return run(x, h, positions)


class GPT(nn.Module):
    """Token ids to logits or loss.

    Weights stay in the dtype they have (float32 in training). Activations are in `compute_dtype`, or in the weights'
    dtype where it is None. With `recompute`, training keeps the stream before each block alone, and backward computes
    the block again (activation checkpointing): a third more products for a fraction of the memory, and equal gradients.
    """

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.compute_dtype: torch.dtype | None = None
        self.recompute = False
        self.fp8: str | None = None
        self.stream = Stream(config)
        self.transformer = nn.ModuleDict({
            "wte": nn.Embedding(config.vocab_size, config.n_embd),
            "h": nn.ModuleList([Block(config, letter) for letter in config.pattern()]),
        })
        self.lm_head = Linear(config.n_embd, config.vocab_size)
        # called with a part of the model before its weights are read: an optimizer may have some on their way
        self.before_use: Callable[[nn.Module], None] | None = None
        self._rope: Rope | None = None
        self._compiled_for: tuple[int, int] | None = None
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Draw all weights anew, after `to_empty` for example.

        As published: matrices by `layers.init_linear`, the embedding normal(0, 1), the head and every c_proj zero. The
        rest is up to the mixers. GPTConfig says what can be different.
        """
        self.stream.init_weights()
        self.transformer.wte.weight.normal_(std=self.config.embed_init)
        for block in self.transformer.h:
            block.attn.init_weights()
            init_linear(block.mlp.c_fc)
            if self.config.fc_init != 1:
                block.mlp.c_fc.weight.mul_(self.config.fc_init)
            init_linear(block.mlp.c_proj, zero=True)
        init_linear(self.lm_head, zero=True)
        if self.config.head_init:
            self.lm_head.weight.normal_(std=self.config.head_init)

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
        """Compile the blocks for batches of exactly (B, T) without a cache; other shapes run eagerly. Names do not
        change."""
        if self._compiled_for == (B, T):
            return
        state_fp_fusion()
        for block in self.transformer.h:
            block.compile(dynamic=False)
        self._compiled_for = (B, T)

    def train_in_fp8(self, how: str | None) -> None:
        """Run the products of MLPs and head in 8 bits where gradients are wanted: "real", "emulated", None for not.

        See `kernels.fp8`. Evaluation and decoding do not change.

        Raises:
            UserError: this device cannot.
        """
        if how is not None:
            check_fp8(how, self.device)
        self.fp8 = how
        for block in self.transformer.h:
            block.mlp.fp8 = how

    def new_cache(self, max_rows: int = 1, max_len: int | None = None) -> Cache:
        """Return an empty decoding cache for max_rows sequences of max_len tokens (sequence_len where it is None)."""
        parts = [block.attn for block in self.transformer.h] + [self.stream] * self.config.smear
        return Cache(parts, max_rows, max_len or self.config.sequence_len, device=self.device, dtype=self.dtype)

    def rope(self, end: int) -> Rope:
        """Return the rotary tables, cos and sin (S, D/2), of at least `end` positions.

        They are made on first use and when they must grow, and are never in the checkpoint.
        """
        if self._rope is None or self._rope[0].shape[0] < end or self._rope[0].device != self.device:
            length = max(self.config.sequence_len, 1 << (end - 1).bit_length())
            with torch.inference_mode(False):  # sampling may make them, and training use them
                self._rope = rope_table(length, self.config.n_embd // self.config.n_head, self.device,
                                        self.config.rope_base)
        return self._rope

    def _ready(self, part: nn.Module) -> Any:
        """Return a part of the model whose weights are about to be read."""
        if self.before_use is not None:
            self.before_use(part)
        return part

    def _blocks(self) -> Iterator[Block]:
        return map(self._ready, self.transformer.h)

    def _begin(self, ids: Tensor, positions: Positions, layers: list[LayerCache] | None = None
               ) -> tuple[Tensor, list[Entry | None]]:
        """Return the input of the first block, (B, T, E), of ids (B, T), and the entries of all blocks.

        layers: of the cache, which begins with those of the blocks.
        """
        positions.ids = ids
        x = rms_norm(F.embedding(ids, self._ready(self.transformer.wte).weight).to(self.dtype))
        x = self._ready(self.stream).begin(x, positions, layers[-1] if layers and self.config.smear else None)
        return x, self.stream.entries(x) if self.config.lambdas else [None] * self.config.n_layer

    def _keep(self, i: int, x: Tensor, middle: Tensor | None) -> Tensor | None:
        """Return the stream x behind layer i if backout subtracts it, else what was kept before."""
        return x if self.config.backout and i == self.stream.middle else middle

    def hidden(self, ids: Tensor, cache: Cache | None = None, counts: list[int] | None = None) -> Tensor:
        """Return the input of the head: the normalised output of the last block.

        Args:
            ids: (B, T).
            cache: ids continue the B rows of it, and it is updated. None: rows start at position 0.
            counts: how many tokens of each row are real, B numbers from 1 to T. The rest, on the right, is padding: no
                real token sees it, the cache does not keep it, and what is returned there means nothing. None: all are
                real.

        Returns:
            (B, T, E) in the activations' dtype.

        Raises:
            ValueError: counts are not B numbers from 1 to T.
        """
        T = ids.shape[1]
        if counts is not None and (len(counts) != ids.shape[0] or not all(0 < count <= T for count in counts)):
            raise ValueError(f"counts must be {ids.shape[0]} numbers from 1 to {T}, not {counts}")
        if cache is None:
            positions = Positions.of_full_rows(self.rope(T), T)
            x, entries = self._begin(ids, positions)
            h, middle = rms_norm(x) if entries[0] is None else None, None
            compiled = tuple(ids.shape) == self._compiled_for
            recompute = self.recompute and torch.is_grad_enabled()
            for i, (block, entry) in enumerate(zip(self._blocks(), entries)):
                run = block if compiled else block.forward
                # nothing in a block is random, so the random state need not be kept for the second time
                if recompute:
                    x, h = checkpoint(_from_stream, run, x, [h], positions, entry, use_reentrant=False,
                                      preserve_rng_state=False)
                else:
                    x, h = run(x, h, positions) if entry is None else run(x, None, positions, None, entry)
                middle = self._keep(i, x, middle)
            h = self._end(x, h, middle)
        else:
            cached = max(cache.lengths)
            end = cached_on(self.device, cached + T) if cached and T > 1 else cached + T
            cache.reserve(end - cached)
            positions = Positions.after_cache(
                self.rope(cached + T), cache.lengths, T, batch_invariant=cache.batch_invariant, end=end,
                counts=None if counts is None else torch.tensor(counts, device=self.device))
            h = self._through(ids, positions, cache.view(cache.rows, cache.max_len))
            cache.advance(T, counts)
        return h

    def _through(self, ids: Tensor, positions: Positions, layers: list[LayerCache]) -> Tensor:
        """Return what `hidden` does, of ids that continue these layers of a cache, which are updated."""
        x, entries = self._begin(ids, positions, layers)
        h, middle = rms_norm(x) if entries[0] is None else None, None
        for i, (block, entry, layer) in enumerate(zip(self._blocks(), entries, layers)):
            x, h = block.forward(x, h, positions, layer, entry)
            middle = self._keep(i, x, middle)
        return self._end(x, h, middle)

    def _end(self, x: Tensor, h: Tensor | None, middle: Tensor | None) -> Tensor:
        """Return the input of the head, from what the last block returned and `_keep` kept."""
        return h if h is not None and middle is None else rms_norm(self.stream.end(x, middle))

    def head(self, x: Tensor) -> Tensor:
        """Return float32 logits (..., V) of hidden states x (..., E)."""
        return softcap(self._ready(self.lm_head)(x).float())

    def static_step(self, ids: Tensor, index: Tensor, cache: Cache, length: int) -> Tensor:
        """Run a decode step whose shapes and addresses depend on nothing on the host: it can be captured as a CUDA
        graph.

        Args:
            ids: (B, 1), one token for each of the first B rows of the cache.
            index: (B,) int64 on the device: the position of each token, below `length`.
            cache: updated in place, except for its `lengths`: the caller counts them.
            length: positions of the cache that are visible, S.

        Returns:
            float32 logits (B, V).
        """
        if ids.shape[1] != 1:
            raise ValueError(f"a static decode step is of one token a row, not of {ids.shape[1]}")
        positions, layers = Positions.static(self.rope(length), index, length), cache.view(len(ids), length)
        if len(ids) > 1 or not self.has_single_row_step():
            return self.head(self._through(ids, positions, layers))[:, -1]
        (x, entries), middle = self._begin(ids, positions, layers), None
        for i, (block, entry, layer) in enumerate(zip(self._blocks(), entries, layers)):
            x = block.single_row_step(x if entry is None else enter(x, *entry), positions, layer)
            middle = self._keep(i, x, middle)
        x = self.stream.end(x, middle)
        return softcap(fused_matvec(x, self._ready(self.lm_head).weight, normed=True).float())[:, -1]

    def has_single_row_step(self) -> bool:
        """Whether a single row goes through fused products: a model made ready to decode, not quantised."""
        return is_plain(self.lm_head, self.dtype) and all(
            block.has_single_row_step(self.dtype) for block in self.transformer.h)

    def forward(self, ids: Tensor, targets: Tensor | None = None, loss_reduction: str = "mean",
                cache: Cache | None = None, last_only: bool = False, counts: list[int] | None = None,
                factors: Tensor | None = None) -> Tensor:
        """Return the logits of ids, or with targets the cross-entropy in nats.

        Args:
            ids: (B, T).
            targets: (B, T), −1 where there is nothing to predict.
            loss_reduction: "mean" over the targets that count, "sum", or "none" for (B·T,) losses.
            cache, counts: as in `hidden`.
            last_only: logits of the last real position of each row alone.
            factors: (B, T), with "sum": what each token's loss is multiplied with.

        Returns:
            float32 logits (B, T, V), (B, 1, V) with last_only; or the loss.
        """
        x = self.hidden(ids, cache, counts)
        if last_only:
            x = x[:, -1:] if counts is None else x[torch.arange(len(counts)), [n - 1 for n in counts]].unsqueeze(1)
        if targets is None:
            return self.head(x)
        x, targets, factors = x.flatten(0, 1), targets.flatten(), None if factors is None else factors.flatten()
        if (self.fp8 is not None and torch.is_grad_enabled() and loss_reduction != "none"
                and fits(x, self.lm_head.weight)):
            return fp8_head_loss(x, self._ready(self.lm_head).weight, targets, loss_reduction, factors, self.fp8)
        product = None if self.lm_head.weight.is_floating_point() else self.lm_head  # quantised: evaluated, not trained
        return head_loss(x, self._ready(self.lm_head).weight, targets, loss_reduction, factors, product=product)

    def flops_per_token(self, T: int | None = None) -> float:
        """Return the training FLOPs a token at rows of T (sequence_len where None): 6 a matrix weight, and what the
        mixers add. Looking up the embedding is free."""
        T = T or self.config.sequence_len
        matrices = sum(p.numel() for block in self.transformer.h for p in block.mlp.parameters()) + sum(
            p.numel() for p in self.lm_head.parameters())
        return 6 * matrices + sum(block.attn.flops_per_token(T) for block in self.transformer.h)

    def estimate_flops(self) -> float:
        """Return the training FLOPs a token at rows of sequence_len (the published name)."""
        return self.flops_per_token()

    @torch.inference_mode()
    def generate(self, input_ids: Tensor, max_new_tokens: int = 512, temperature: float = 0.2, top_k: int | None = 20,
                 top_p: float | None = 0.95, repetition_penalty: float = 1.15, eos_token_id: int | None = None,
                 seed: int | None = None) -> Iterator[int]:
        """Yield the tokens that continue a prompt, one by one.

        Args:
            input_ids: (1, T) with T at least 1.
            max_new_tokens: tokens to yield at most.
            temperature: 0 takes the most likely token, as top_k 1 does.
            top_k, top_p: how far sampling is restricted; None does not restrict it.
            repetition_penalty: divides positive logits of tokens seen so far, multiplies negative ones.
            eos_token_id: generation ends before this token.
            seed: None takes a new one each time.

        Raises:
            ValueError: input_ids are not one row. Engine decodes several.
        """
        ids = torch.as_tensor(input_ids, device=self.device)
        if ids.ndim != 2 or ids.shape[0] != 1 or ids.shape[1] < 1:
            raise ValueError(f"generate takes ids of shape (1, T) with T at least 1, not {tuple(ids.shape)}; "
                             "Engine does several rows")
        settings = Settings(temperature, top_k, top_p, repetition_penalty, seed)
        sampler = Sampler([settings], self.config.vocab_size, self.device)
        sampler.mark_seen(0, ids[0].tolist())
        cache = self.new_cache(max_len=ids.shape[1] + max_new_tokens)
        for _ in range(max_new_tokens):
            next_id = sampler(self(ids, cache=cache, last_only=True)[:, -1])
            token = int(next_id)
            if token == eos_token_id:
                return
            yield token
            sampler.mark_seen(0, [token])
            ids = next_id.view(1, 1)
