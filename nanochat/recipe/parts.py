"""What a recipe consists of: optimizer groups, schedules, the shape of the model, and the numbers of each stage."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

# Rows of a micro-batch, or "auto": as many as fit the device's memory.
Rows = int | Literal["auto"]
Recompute = Literal["auto", "none", "blocks"]  # activation checkpointing
MUON_EXTRAS = ("equilibrate", "renormalize", "normuon", "cautious")  # what they do: nanochat/optim.py


# ---- how weights are changed


@dataclass(frozen=True)
class OptimizerGroup:
    """How one group of parameters is trained.

    optimizer: "muon" for 2-D matrices, "adamw" for anything.
    lr: learning rate, before the schedule.
    by_width: multiply the rate by (E / 768)^-0.5, where E is the model's width.
    betas, eps: AdamW's. Muon has a momentum instead, which moves along the run: see `MomentumSchedule`.
    weight_decay: decoupled; a step multiplies the weights by 1 - rate x weight_decay. Muon's falls to 0
        along the run, as half a cosine.
    extras: of MUON_EXTRAS, what is done to Muon's updates besides.
    """

    optimizer: Literal["muon", "adamw"]
    lr: float
    by_width: bool = False
    betas: tuple[float, float] = (0.0, 0.0)
    eps: float = 0.0
    weight_decay: float = 0.0
    extras: tuple[str, ...] = ()


@dataclass(frozen=True)
class RateSchedule:
    """What all learning rates are multiplied by along a run: a linear warm-up, 1, a linear warm-down.

    The ratios are fractions of the optimizer steps; final_lr_frac is the factor at the end. warmup_steps: optimizer
    steps of the warm-up, but at most a tenth of the run; 0 follows warmup_ratio.
    """

    warmup_ratio: float
    warmdown_ratio: float
    final_lr_frac: float
    warmup_steps: int = 0

    def factor(self, step: int, num_iterations: int) -> float:
        """Return the factor at `step`, which counts from 0, of a run of num_iterations steps."""
        warmup = round(self.warmup_ratio * num_iterations)
        if self.warmup_steps:
            warmup = min(self.warmup_steps, num_iterations // 10)
        if step < warmup:
            return (step + 1) / warmup
        left = 1 - self.fallen(step, num_iterations)
        return left + (1 - left) * self.final_lr_frac

    def fallen(self, step: int, num_iterations: int) -> float:
        """Return which part of the warm-down lies before `step`: 0 at its beginning, 1 at the end of the run."""
        warmdown = round(self.warmdown_ratio * num_iterations)
        return 1 - (num_iterations - step) / warmdown if step > num_iterations - warmdown else 0.0


@dataclass(frozen=True)
class MomentumSchedule:
    """Muon's momentum along a run.

    It rises from momentum_start to momentum_peak over the first momentum_steps optimizer steps, and goes to
    momentum_end while the learning rates fall.
    """

    momentum_start: float
    momentum_peak: float
    momentum_steps: int
    momentum_end: float

    def at(self, step: int, fallen: float = 0.0) -> float:
        """Return the momentum at `step`, which counts from 0. fallen: see `RateSchedule.fallen`."""
        rise = round(self.momentum_peak - self.momentum_start, 12)
        momentum = self.momentum_start + rise * min(step / self.momentum_steps, 1.0)
        return momentum + fallen * min(self.momentum_end - momentum, 0.0)


# ---- what is done with text and model


@dataclass(frozen=True)
class TokenizerRecipe:
    """How the tokenizer is trained. doc_cap: characters of a document that count; 0 for all."""

    vocab_size: int
    max_chars: int
    doc_cap: int


@dataclass(frozen=True)
class Shape:
    """The shape of the model; the fields of GPTConfig, which explains them.

    depth: layers; sets width and heads (GPTConfig.from_depth). max_seq_len: tokens in a row. n_kernel: taps.
    layer_pattern: mixer of each layer; "" follows slc_rate. window: tokens that attention sees; 0 is all.
    """

    depth: int
    max_seq_len: int
    layer_pattern: str
    window: int
    n_kernel: int
    slc_rate: int
    lambdas: bool = False
    backout: bool = False
    smear: bool = False
    value_embeds: str = ""
    qk_gain: float = 1.0
    rope_base: float = 10_000.0
    mlp_ratio: float = 4.0
    embed_init: float = 1.0
    head_init: float = 0.0
    fc_init: float = 1.0
    slc_gate_init: str = "published"
    slc_norm: bool = False
    slc_gate: str = "rank-one"
    attn_conv: int = 0


@dataclass(frozen=True)
class Horizon:
    """How long to train: the first of the first three that is above 0 counts.

    target_param_data_ratio: tokens a parameter. ratio_of: the parameters that count, "all", or "matrices", which are
    those of the blocks' matrices and the head.
    """

    num_iterations: int
    target_flops: float
    target_param_data_ratio: float
    ratio_of: Literal["all", "matrices"] = "all"

    def steps(self, parameters: int, flops_per_token: float, total_batch_size: int) -> int | None:
        """Return the optimizer steps of a model, 0 where they come to less than one; None where nothing is set."""
        if self.num_iterations > 0:
            return self.num_iterations
        if self.target_flops > 0:
            return round(self.target_flops / (flops_per_token * total_batch_size))
        if self.target_param_data_ratio > 0:
            return int(self.target_param_data_ratio * parameters) // total_batch_size
        return None


@dataclass(frozen=True)
class BaseRecipe:
    """How the base model is trained.

    Batch and evaluation are in tokens, periods in optimizer steps; -1 means at the end only, or never.
    total_batch_size: "auto" follows the horizon, see nanochat/recipe/laws.py. reference_batch: tokens of the batch at
    which the learning rates hold; 0: at any. reference_depth: of the model at whose horizon Muon's weight decay and the
    automatic batch hold; 0: the decay holds at any.
    """

    shape: Shape
    horizon: Horizon
    total_batch_size: int | Literal["auto"]
    reference_batch: int
    reference_depth: int
    device_batch_size: Rows
    recompute: Recompute
    rates: RateSchedule
    momentum: MomentumSchedule
    eval_every: int
    eval_tokens: int
    core_metric_every: int
    core_metric_max_per_task: int
    sample_every: int
    save_every: int
    keep: int
    seed: int


@dataclass(frozen=True)
class MidRecipe:
    """How mid-training is done: as base training, from conversations.

    num_iterations: -1 trains for num_epochs of the data. max_seq_len: -1 is the base model's.
    init_lr_frac: what all learning rates are multiplied by.
    mixture, validation: how much of each kind of data to learn from and to validate on, for tasks/recipes.py.
    """

    num_iterations: int
    num_epochs: float
    max_seq_len: int
    total_batch_size: int
    device_batch_size: Rows
    recompute: Recompute
    init_lr_frac: float
    rates: RateSchedule
    momentum: MomentumSchedule
    eval_every: int
    eval_tokens: int
    save_every: int
    keep: int
    seed: int
    mixture: Mapping[str, int]
    validation: Mapping[str, int]


@dataclass(frozen=True)
class FineTuningRecipe:
    """How supervised fine-tuning is done. Other fields as in MidRecipe.

    source: the stage whose model it starts from.
    packed: a step is total_batch_size tokens, of rows of several conversations as in mid-training; else it is
        target_examples_per_step conversations, padded. Validation is always in steps of these.
    reference_batch: as in BaseRecipe; where packed.
    inherit: batch and learning rates are those that the model it starts from was trained with; the recipe's where it
        does not say.
    warm_start: the optimizer begins with that model's momenta; else with none.
    """

    source: str
    num_iterations: int
    num_epochs: float
    max_seq_len: int
    packed: bool
    total_batch_size: int
    reference_batch: int
    inherit: bool
    warm_start: bool
    target_examples_per_step: int
    device_batch_size: Rows
    recompute: Recompute
    init_lr_frac: float
    rates: RateSchedule
    momentum: MomentumSchedule
    eval_every: int
    eval_steps: int
    eval_metrics_every: int
    eval_metrics_max_problems: int
    save_every: int
    keep: int
    seed: int
    mixture: Mapping[str, int]
    validation: Mapping[str, int]


@dataclass(frozen=True)
class ReinforcementRecipe:
    """How reinforcement learning is done: a step is a number of problems, with num_samples answers to each."""

    num_iterations: int
    num_epochs: float
    examples_per_step: int
    num_samples: int
    device_batch_size: Rows
    recompute: Recompute
    rollout_batch_size: int
    max_new_tokens: int
    temperature: float
    top_k: int
    init_lr_frac: float
    rates: RateSchedule
    momentum: MomentumSchedule
    eval_every: int
    eval_examples: int
    eval_samples: int
    save_every: int
    keep: int
    seed: int


@dataclass(frozen=True)
class IdentityRecipe:
    """Conversations in which the model says who it is. short: in few words, for a tiny model."""

    short: bool
    count: int


@dataclass(frozen=True)
class BaseEvaluation:
    """How the base model is evaluated: tokens of each split, examples of each CORE task (-1 for all)."""

    device_batch_size: int
    split_tokens: int
    max_per_task: int


@dataclass(frozen=True)
class ChatEvaluation:
    """How a chat model is graded. temperature 0 takes the most likely token; top_k 0 and max_problems -1 take all."""

    temperature: float
    max_new_tokens: int
    num_samples: int
    top_k: int
    batch_size: int
    max_problems: int


@dataclass(frozen=True)
class Recipe:
    """All that a model is made with, in the order in which it is used.

    name: of the recipe in RECIPES that the flags of the scripts default to.
    source: of the text, one of the hub's in nanochat/dataset/shards.py, or "small-world".
    docs: documents of the small world, where that is the text.
    groups: optimizer groups by name, in the order in which the optimizer keeps them; every stage trains with these.
    grad_clip: largest norm of the gradient that is used as it is; 0 for no limit.
    stages: those that a speedrun trains, by their names in nanochat/stages.py.
    """

    name: str
    source: str
    docs: int
    tokenizer: TokenizerRecipe
    groups: Mapping[str, OptimizerGroup]
    grad_clip: float
    stages: tuple[str, ...]
    base: BaseRecipe
    base_eval: BaseEvaluation
    identity: IdentityRecipe
    mid: MidRecipe
    sft: FineTuningRecipe
    rl: ReinforcementRecipe
    chat_eval: ChatEvaluation
