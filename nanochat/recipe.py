"""What a model is trained with, as data. Training code, the scripts' flag defaults and speedrun read it.

    published        the recipe of the model published in November 2025: 20 layers, FineWeb-Edu
    small            4 layers, the small world, for a CPU: what `bash speedrun.sh` does without a GPU
    PROFILES         what `SPEEDRUN_PROFILE` can name: these two, and the published one at other depths

Each number is here once. A field of a stage has the name of the flag that overrides it, so `changed_flags` can write
the command line that turns one recipe into another. speedrun makes its commands this way.

A new recipe is one more value, mostly `dataclasses.replace(published, ...)`. It may have other optimizer groups: a
mixer says by name which group each of its parameters is in, and `groups` says how each group is trained.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

BATCH = 524_288  # tokens in an optimizer step of the published runs, 2^19

# Rows of a micro-batch, or "auto": as many as fit the device's memory, but no more than these. 65,536 tokens fill any
# GPU. Conversations are padded to the longest, so the fewer together the less padding.
Rows = int | Literal["auto"]
MOST_ROWS = {"base": 32, "mid": 32, "sft": 4, "rl": 8}
Recompute = Literal["auto", "none", "blocks"]  # activation checkpointing


# ---- how weights are changed


@dataclass(frozen=True)
class OptimizerGroup:
    """How one group of parameters is trained.

    optimizer: "muon" for 2-D matrices, "adamw" for anything.
    lr: learning rate, before the schedule.
    by_width: multiply the rate by (E / 768)^-0.5, where E is the model's width.
    betas, eps: AdamW's. Muon has a momentum instead, which moves along the run: see `MomentumSchedule`.
    weight_decay: decoupled; a step multiplies the weights by 1 - rate x weight_decay.
    """

    optimizer: Literal["muon", "adamw"]
    lr: float
    by_width: bool = False
    betas: tuple[float, float] = (0.0, 0.0)
    eps: float = 0.0
    weight_decay: float = 0.0


@dataclass(frozen=True)
class RateSchedule:
    """What all learning rates are multiplied by along a run: a linear warm-up, 1, a linear warm-down.

    The ratios are fractions of the optimizer steps; final_lr_frac is the factor at the end.
    """

    warmup_ratio: float
    warmdown_ratio: float
    final_lr_frac: float

    def factor(self, step: int, num_iterations: int) -> float:
        """Return the factor at `step`, which counts from 0, of a run of num_iterations steps."""
        warmup, warmdown = round(self.warmup_ratio * num_iterations), round(self.warmdown_ratio * num_iterations)
        if step < warmup:
            return (step + 1) / warmup
        if step <= num_iterations - warmdown:
            return 1.0
        left = (num_iterations - step) / warmdown
        return left + (1 - left) * self.final_lr_frac


@dataclass(frozen=True)
class MomentumSchedule:
    """Muon's momentum along a run: from `start`, by `rise`, over the first `steps` optimizer steps."""

    start: float
    rise: float
    steps: int

    def at(self, step: int) -> float:
        """Return the momentum at `step`, which counts from 0."""
        return self.start + self.rise * min(step / self.steps, 1.0)


# ---- what is done with text and model


@dataclass(frozen=True)
class TokenizerRecipe:
    """How the tokenizer is trained. doc_cap: characters of a document that count; 0 for all."""

    vocab_size: int
    max_chars: int
    doc_cap: int


@dataclass(frozen=True)
class Shape:
    """The shape of the model.

    depth: layers; sets width and heads (GPTConfig.from_depth). max_seq_len: tokens in a row. n_kernel: taps.
    layer_pattern: mixer of each layer; "" follows slc_rate. window: tokens that attention sees; 0 is all.
    """

    depth: int
    max_seq_len: int
    layer_pattern: str
    window: int
    n_kernel: int
    slc_rate: int


@dataclass(frozen=True)
class Horizon:
    """How long to train: the first of these that is above 0 counts."""

    num_iterations: int
    target_flops: float
    target_param_data_ratio: float

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
    """

    shape: Shape
    horizon: Horizon
    total_batch_size: int
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
    """How supervised fine-tuning is done: a step is a number of conversations. Other fields as in MidRecipe."""

    num_iterations: int
    num_epochs: float
    max_seq_len: int
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

    docs: documents of the small world, where that is the text.
    groups: optimizer groups by name, in the order in which the optimizer keeps them; every stage trains with these.
    grad_clip: largest norm of the gradient that is used as it is; 0 for no limit.
    stages: those that a speedrun trains, by their names in nanochat/stages.py.
    """

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


# ---- the published recipe

# Learning rates, betas and eps as published. The rates were tuned at width 768, so they are scaled for other widths.
_ADAMW = OptimizerGroup("adamw", lr=0.0, by_width=True, betas=(0.8, 0.95), eps=1e-10, weight_decay=0.0)

_RISING = MomentumSchedule(start=0.85, rise=0.1, steps=300)  # to 0.95: Muon's warm-up, as in modded-nanogpt

published = Recipe(
    docs=100_000,
    tokenizer=TokenizerRecipe(
        vocab_size=65_536,         # 2^16, the 9 special tokens among them
        max_chars=2_000_000_000,   # 8 shards
        doc_cap=10_000,            # so that a few very long documents do not dominate
    ),
    groups={
        "matrices": OptimizerGroup("muon", lr=0.02),
        "wte": replace(_ADAMW, lr=0.2),
        "lm_head": replace(_ADAMW, lr=0.004),
        "taps": replace(_ADAMW, lr=0.02),  # as the matrices: no rate of its own was tuned
    },
    grad_clip=1.0,
    stages=("base", "mid", "sft"),  # reinforcement learning is for GSM8K alone, so it is optional
    base=BaseRecipe(
        shape=Shape(
            depth=20,
            max_seq_len=2048,
            layer_pattern="",
            window=0,
            n_kernel=3,            # the convolution sees a token and the two before it
            slc_rate=3,            # every third layer is attention, and the last one
        ),
        # 20 tokens a parameter is compute-optimal: Hoffmann et al., arXiv 2203.15556
        horizon=Horizon(num_iterations=-1, target_flops=-1.0, target_param_data_ratio=20.0),
        total_batch_size=BATCH,
        device_batch_size="auto",
        recompute="auto",
        rates=RateSchedule(warmup_ratio=0.0, warmdown_ratio=0.2, final_lr_frac=0.0),
        momentum=_RISING,
        eval_every=250,
        eval_tokens=20 * BATCH,
        core_metric_every=-1,      # off: CORE needs a bundle of data that not everybody has
        core_metric_max_per_task=500,
        sample_every=2000,
        save_every=1000,
        keep=2,
        seed=1337,
    ),
    base_eval=BaseEvaluation(device_batch_size=32, split_tokens=20 * BATCH, max_per_task=-1),
    identity=IdentityRecipe(short=False, count=1000),
    mid=MidRecipe(
        num_iterations=-1,
        num_epochs=1.0,
        max_seq_len=-1,
        total_batch_size=BATCH,
        device_batch_size="auto",
        recompute="auto",
        init_lr_frac=1.0,
        rates=RateSchedule(warmup_ratio=0.0, warmdown_ratio=0.2, final_lr_frac=0.0),
        momentum=_RISING,
        eval_every=150,
        eval_tokens=20 * BATCH,
        save_every=-1,
        keep=2,
        seed=0,
        mixture={"identity": 2, "spelling": 200_000, "bee": 80_000},  # identity: times the file is repeated
        validation={"mmlu": 5200, "gsm8k": 420},  # in the proportions of training, beside all of SmolTalk's test split
    ),
    sft=FineTuningRecipe(
        num_iterations=-1,
        num_epochs=1.0,
        max_seq_len=-1,
        target_examples_per_step=32,
        device_batch_size="auto",
        recompute="auto",
        init_lr_frac=0.02,         # so that the model forgets little
        rates=RateSchedule(warmup_ratio=0.0, warmdown_ratio=1.0, final_lr_frac=0.0),
        momentum=_RISING,
        eval_every=100,
        eval_steps=100,
        eval_metrics_every=200,
        eval_metrics_max_problems=1024,
        save_every=-1,
        keep=2,
        seed=0,
        mixture={"identity": 1, "smoltalk": 10_000, "spelling": 300, "bee": 300},
        validation={},             # SmolTalk's test split
    ),
    rl=ReinforcementRecipe(
        num_iterations=-1,
        num_epochs=1.0,
        examples_per_step=16,
        num_samples=16,
        device_batch_size="auto",
        recompute="auto",
        rollout_batch_size=128,
        max_new_tokens=256,
        temperature=1.0,
        top_k=0,                   # the published run sampled from the top 50 but learned as if from all: off-policy
        init_lr_frac=0.05,
        rates=RateSchedule(warmup_ratio=0.0, warmdown_ratio=1.0, final_lr_frac=0.0),
        momentum=MomentumSchedule(start=0.95, rise=0.0, steps=1),  # constant
        eval_every=60,
        eval_examples=400,
        eval_samples=8,
        save_every=60,
        keep=2,
        seed=0,
    ),
    chat_eval=ChatEvaluation(
        temperature=0.0,
        max_new_tokens=512,
        num_samples=1,
        top_k=50,
        batch_size=64,
        max_problems=-1,
    ),
)


# ---- a small one, for a CPU: it made the table in the README

small = replace(
    published,
    docs=20_000,                   # more than base training reads
    tokenizer=replace(published.tokenizer, vocab_size=2048),  # the small world has few words
    stages=("base", "mid", "sft", "rl"),
    base=replace(
        published.base,
        shape=replace(published.base.shape, depth=4, max_seq_len=256),
        horizon=replace(published.base.horizon, num_iterations=500),
        # 500 x 2048 = 1.02M tokens: the facts come all at once between 0.4M and 0.6M. Many small steps, since they are
        # learnt by the step more than by the token.
        total_batch_size=2048,
        device_batch_size=8,
        rates=replace(published.base.rates, warmdown_ratio=0.3),
        eval_every=125,
        eval_tokens=65_536,
        sample_every=-1,
        save_every=125,
    ),
    base_eval=replace(published.base_eval, device_batch_size=8, split_tokens=65_536),
    identity=IdentityRecipe(short=True, count=300),
    mid=replace(
        published.mid,
        num_iterations=200,
        total_batch_size=2048,
        device_batch_size=8,
        eval_every=50,
        eval_tokens=20_000,
        save_every=50,
        mixture={"identity": 1, "questions": 5000, "choices": 1500, "sums": 2500, "spelling": 3000, "bee": 3000},
        validation={"each": 80},
    ),
    sft=replace(
        published.sft,
        num_iterations=100,
        device_batch_size=16,
        init_lr_frac=0.3,          # after so few steps of mid-training there is still much to learn
        eval_every=25,
        eval_steps=4,
        eval_metrics_every=-1,     # multiple choice is more than four layers learn
        save_every=50,
        mixture={"identity": 1, "questions": 1500, "choices": 500, "sums": 800, "spelling": 300, "bee": 1000},
        validation={"each": 80},
    ),
    rl=replace(
        published.rl,
        num_iterations=25,         # from 94.7 to 97.5 % of the sums in a minute and a half; more steps gave little more
        examples_per_step=32,
        device_batch_size=64,
        rollout_batch_size=256,
        max_new_tokens=48,         # its answers are short
        init_lr_frac=0.1,
        eval_every=-1,
        eval_examples=200,
        save_every=10,
    ),
    chat_eval=replace(published.chat_eval, max_new_tokens=128),
)


def at_depth(depth: int, recipe: Recipe = published) -> Recipe:
    """Return the recipe for a model of this depth; the horizon follows, since it is in tokens a parameter."""
    return replace(recipe, base=replace(recipe.base, shape=replace(recipe.base.shape, depth=depth)))


PROFILES = {"small": small, "d20": published, "d26": at_depth(26), "d32": at_depth(32)}


# ---- recipes and flags


def override(groups: Mapping[str, OptimizerGroup], *, matrix_lr: float, embedding_lr: float, unembedding_lr: float,
             weight_decay: float, lr_frac: float = 1.0) -> dict[str, OptimizerGroup]:
    """Return optimizer groups with the learning rates and the weight decay of a command line.

    Args:
        groups: of the recipe.
        matrix_lr: of the matrices and of the taps.
        embedding_lr, unembedding_lr: of the embedding and of the head.
        weight_decay: of all groups that AdamW trains.
        lr_frac: what all rates are multiplied by.
    """
    rates = {"matrices": matrix_lr, "taps": matrix_lr, "wte": embedding_lr, "lm_head": unembedding_lr}
    return {name: replace(group, lr=lr_frac * rates.get(name, group.lr),
                          weight_decay=weight_decay if group.optimizer == "adamw" else group.weight_decay)
            for name, group in groups.items()}


def fields_of(part: Any) -> Iterator[tuple[str, Any]]:
    """Yield (name, value) of all fields of a stage and of its parts, except mappings, which no flag can say."""
    for field in dataclasses.fields(part):
        value = getattr(part, field.name)
        if dataclasses.is_dataclass(value):
            yield from fields_of(value)
        elif not isinstance(value, Mapping):
            yield field.name, value


def changed_flags(part: Any, default: Any) -> list[str]:
    """Return the flags for what a stage has other than `default`, the same stage of the recipe the flags default to."""
    defaults = dict(fields_of(default))
    return [f"--{name.replace('_', '-')}" + ("" if value is True else f"={value}")
            for name, value in fields_of(part) if value != defaults[name]]
