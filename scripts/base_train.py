"""Train a base model from text.

    python -m scripts.base_train --depth=4 --max-seq-len=256 --device-batch-size=8 --total-batch-size=2048 \\
        --num-iterations=500
    torchrun --standalone --nproc_per_node=8 -m scripts.base_train -- --depth=20 --run=NAME --device_batch_size=32

The same command resumes a run that was stopped; Ctrl-C and SIGTERM save first. Files: base_checkpoints/<tag>/ and
logs/base_<tag>.jsonl under $NANOCHAT_BASE_DIR.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch

from nanochat.checks import say_what_would_be_done, where
from nanochat.cli import (
    COUNT,
    COUNT_OR_ALL,
    DEPTH,
    EVERY,
    FRACTION,
    FROM_ZERO,
    NOT_NEGATIVE,
    POSITIVE,
    ROW_TOKENS,
    ROWS,
    SEED,
    Range,
    flag,
    run_main,
)
from nanochat.dataloader import PackedLoader, TextSource
from nanochat.dataset import data_dir
from nanochat.dataset.identity import identity_of_bundle, identity_of_shards, with_identity
from nanochat.dataset.shards import read_source
from nanochat.distributed import Ranks, dtype_of_run, on_main
from nanochat.errors import UserError
from nanochat.evaluation.core import bundle_of_ranks, check_bundle, evaluate_core
from nanochat.evaluation.loss import EvalRows
from nanochat.files import base_dir
from nanochat.gpt import GPT, GPTConfig
from nanochat.kernels.fp8 import EMULATED, REAL, check_fp8
from nanochat.loading import model_from_state
from nanochat.memory import RECOMPUTE_HELP
from nanochat.recipe import MOST_ROWS, MomentumSchedule, RateSchedule, Recompute, Rows, published
from nanochat.run import (
    Origin,
    PeriodicAction,
    TrainingFlags,
    checkpoint_to_resume,
    claim,
    compile_wanted,
    fit_and_choose,
    horizon_of,
    is_trained,
    keep_flag,
    launch,
    loader_state,
    model_shape,
    open_run,
    save_every_flag,
)
from nanochat.run.horizon import NO_HORIZON
from nanochat.stages import STAGES
from nanochat.tokenizer import get_token_bytes, get_tokenizer
from nanochat.training import TrainingPlan, clock, share_of_micro_batches
from scripts.base_loss import beginnings, samples

BASE = published.base
BELOW_ONE = Range(0, below=1)


@dataclass
class Config(TrainingFlags):
    """Flags of base_train; the defaults are those of the recipe."""

    stage: ClassVar[str] = "base"

    depth: int = flag(BASE.shape.depth, "layers; sets width (64 a layer) and heads too", within=DEPTH)
    max_seq_len: int = flag(BASE.shape.max_seq_len, "tokens in a row", within=ROW_TOKENS)
    layer_pattern: str = flag(BASE.shape.layer_pattern,
                              "mixer of each layer, S for SLC2 and A for attention; one letter stands for all layers")
    window: int = flag(BASE.shape.window, "tokens that attention sees, each itself and those before it; 0 = all",
                       within=FROM_ZERO)
    n_kernel: int = flag(BASE.shape.n_kernel, "taps of the SLC2 convolution", within=Range(1, 64))
    slc_rate: int = flag(BASE.shape.slc_rate, "one layer in this many is attention", within=COUNT)
    lambdas: bool = flag(BASE.shape.lambdas, "each layer scales the residual stream and adds the embedding, by learnt "
                         "factors")
    backout: bool = flag(BASE.shape.backout, "the head sees the stream less a learnt part of that of the middle layer")
    smear: bool = flag(BASE.shape.smear, "the embedding of the token before is mixed in, through a learnt gate")
    value_embeds: str = flag(BASE.shape.value_embeds, "layers that add an embedding of the token to their values: A, S "
                             "or AS")
    qk_gain: float = flag(BASE.shape.qk_gain, "factor of queries and keys after their norm", within=POSITIVE)
    rope_base: float = flag(BASE.shape.rope_base, "of the rotary positions; 0 = no positions", within=NOT_NEGATIVE)
    mlp_ratio: float = flag(BASE.shape.mlp_ratio, "width of the MLPs, as a multiple of the model's", within=POSITIVE)
    embed_init: float = flag(BASE.shape.embed_init, "standard deviation of the first embedding", within=NOT_NEGATIVE)
    head_init: float = flag(BASE.shape.head_init, "standard deviation of the first head", within=NOT_NEGATIVE)
    fc_init: float = flag(BASE.shape.fc_init, "factor of the first weights of the MLPs' c_fc", within=NOT_NEGATIVE)
    slc_gate_init: Literal["published", "unit"] = flag(
        BASE.shape.slc_gate_init, "first weights of SLC2's gate: as published, or with a gate of unit size")
    slc_norm: bool = flag(BASE.shape.slc_norm, "normalise what SLC2's last matrix gets")
    slc_gate: Literal["rank-one", "full", "none"] = flag(
        BASE.shape.slc_gate, "gate of SLC2: of rank one a head, as wide as the model, or none")
    attn_conv: int = flag(BASE.shape.attn_conv, "taps of a convolution over queries, keys and values; 0 = none",
                          within=Range(0, 64))
    num_iterations: int = flag(BASE.horizon.num_iterations,
                               "optimizer steps; counts before the next two; -1 = unset", within=COUNT_OR_ALL)
    target_flops: float = flag(BASE.horizon.target_flops, "train until this many FLOPs are done; -1 = unset",
                               within=Range(above=0, also=-1))
    target_param_data_ratio: float = flag(BASE.horizon.target_param_data_ratio, "train on this many tokens a parameter",
                                          within=Range(above=0, also=-1))
    ratio_of: Literal["all", "matrices"] = flag(BASE.horizon.ratio_of, "which parameters that counts: all, or those of "
                                                "the blocks' matrices and the head")
    device_batch_size: Rows = flag(BASE.device_batch_size,
                                   "rows a device takes at a time; auto is what fits its memory", within=ROWS)
    total_batch_size: int | Literal["auto"] = flag(
        BASE.total_batch_size, "tokens of all devices in an optimizer step; auto follows the horizon", within=COUNT)
    reference_batch: int = flag(BASE.reference_batch, "tokens of the batch at which the learning rates hold: others "
                                "scale them by the square root; 0 = they hold for any", within=FROM_ZERO)
    reference_depth: int = flag(BASE.reference_depth, "depth of the model at whose horizon --matrix-decay and the "
                                "automatic batch hold; 0 = at any", within=Range(0, 1000))
    warmup_ratio: float = flag(BASE.rates.warmup_ratio, "part of the steps over which the learning rates rise",
                               within=FRACTION)
    warmup_steps: int = flag(BASE.rates.warmup_steps, "steps over which they rise, at most a tenth of all; 0 = by the "
                             "ratio", within=FROM_ZERO)
    warmdown_ratio: float = flag(BASE.rates.warmdown_ratio, "part of the steps over which the learning rates fall",
                                 within=FRACTION)
    final_lr_frac: float = flag(BASE.rates.final_lr_frac, "learning rates at the end, as a fraction of the full ones",
                                within=FRACTION)
    momentum_start: float = flag(BASE.momentum.momentum_start, "Muon's momentum at the beginning", within=BELOW_ONE)
    momentum_peak: float = flag(BASE.momentum.momentum_peak, "Muon's momentum after the first momentum_steps",
                                within=BELOW_ONE)
    momentum_steps: int = flag(BASE.momentum.momentum_steps, "steps over which it rises", within=COUNT)
    momentum_end: float = flag(BASE.momentum.momentum_end, "Muon's momentum when the learning rates have fallen",
                               within=BELOW_ONE)
    eval_every: int = flag(BASE.eval_every, "steps from one validation to the next; -1 = at the end only", within=EVERY)
    eval_tokens: int = flag(BASE.eval_tokens, "tokens to validate on", within=COUNT)
    core_metric_every: int = flag(BASE.core_metric_every,
                                  "steps from one CORE evaluation to the next, and one at the end; -1 = never",
                                  within=EVERY)
    core_metric_max_per_task: int = flag(BASE.core_metric_max_per_task,
                                         "examples of each task in that evaluation; -1 = all", within=COUNT_OR_ALL)
    sample_every: int = flag(BASE.sample_every, "steps from one set of samples to the next; -1 = at the end only",
                             within=EVERY)
    recompute: Recompute = flag(BASE.recompute, RECOMPUTE_HELP)
    save_every: int = save_every_flag(BASE.save_every)
    keep: int = keep_flag(BASE.keep)
    model_tag: str = flag("", "name of the checkpoint folder; unset is d<depth>")
    data_dir: str = flag("", "folder of shards; unset is base_data")
    shards: int = flag(-1, "training shards that are planned: it begins with the first while a download brings the "
                           "rest; -1 = those that are there", within=COUNT_OR_ALL)
    seed: int = flag(BASE.seed, "of the initial weights", within=SEED)
    data_seed: int = flag(0, "of the order of the documents; 0 = that of the shards", within=SEED)
    compile: str = flag("auto", "compile the blocks with torch.compile: yes, no, or auto (on GPUs)")
    fp8: bool = flag(False, "products of MLPs and head in 8 bits, on NVIDIA GPUs of compute capability 8.9 and newer")
    fp8_emulated: bool = flag(False, "round as --fp8 does, on any device, slowly: to measure its effect on the loss")

    def check(self) -> None:
        """Raise UserError for flags that do not fit one another."""
        super().check()
        if self.warmup_ratio + self.warmdown_ratio > 1:
            raise UserError(f"--warmup-ratio {self.warmup_ratio:g} and --warmdown-ratio {self.warmdown_ratio:g} are "
                            "more than the whole run together; their sum must be at most 1")
        if self.num_iterations < 0 and self.target_flops < 0 and self.target_param_data_ratio < 0:
            raise UserError(NO_HORIZON)
        model_shape(self, 1)


def main(argv: Sequence[str] | None = None) -> None:
    """Train as the flags say. Raises UserError for what the user can mend."""
    launch(Config, run, argv, __doc__)


def origin_of(config: Config, shape: GPTConfig, tokenizer: Any, text: Path, ranks: Ranks) -> Origin:
    """Return what the run starts from: a new model of this shape, or the checkpoint of the same tag. Collective.

    Raises:
        UserError: the folder holds a model of another shape or tokenizer.
    """
    folder = base_dir() / STAGES["base"].folder / (config.model_tag or f"d{config.depth}")
    file = claim(folder, config, ranks)
    resumed = checkpoint_to_resume(folder, config, ranks)
    meta = resumed.meta if resumed else {}
    if resumed is None:
        torch.manual_seed(config.seed)  # initialised on the CPU: the same weights for every device and number of ranks
        model = GPT(shape).to(ranks.device)
    else:
        way_out = "Use another --model-tag, or --fresh to move it aside and start anew."
        old, new = meta["model_config"], shape.to_dict()
        if old != new:
            differ = ", ".join(f"{name} {old.get(name)} there, {new.get(name)} here" for name in old | new
                               if old.get(name) != new.get(name))
            raise UserError(f"{folder} holds a model of another shape ({differ}). {way_out}")
        if meta.get("tokenizer", tokenizer.fingerprint()) != tokenizer.fingerprint():
            raise UserError(f"{folder} was trained with another tokenizer. {way_out}")
        model = model_from_state(new, resumed.model_state, what=str(folder))
        resumed.model_state = {}  # the optimizer gives the weights other memory
    model.compute_dtype = dtype_of_run(ranks, meta.get("compute_dtype"))
    return Origin(stage=STAGES["base"], folder=folder, step=resumed.step if resumed else 0, model=model,
                  tokenizer=tokenizer, meta=meta, loaded="", provenance={"data": read_source(text)}, lock=file,
                  resumed=resumed, fresh=config.fresh)


def run(config: Config, ranks: Ranks) -> None:
    """Run base training on these ranks."""
    compiled, fp8 = compile_wanted(config.compile, ranks), REAL if config.fp8 else EMULATED
    if config.fp8:
        check_fp8(fp8, ranks.device)  # before anything is read
    T = config.max_seq_len
    tokenizer = get_tokenizer()
    base = horizon_of(config, tokenizer.get_vocab_size())
    shape, num_iterations = base.shape, base.num_iterations
    config = replace(config, total_batch_size=base.total_batch_size)
    share_of_micro_batches(config.total_batch_size, config.device_batch_size, T, ranks)  # raises before a model is made
    bundle = None
    if config.core_metric_every > 0:  # find what is wrong with it at the start, not after thousands of steps
        bundle = bundle_of_ranks(None, ranks, fetch=not config.dry_run)
        check_bundle(bundle, config.core_metric_max_per_task, ranks)
    text = Path(config.data_dir).expanduser() if config.data_dir else data_dir()
    source = TextSource(tokenizer, "train", text, expected=None if config.shards == -1 else config.shards,
                        say=print if ranks.is_main else lambda text: None,  # now: without text, no model is made
                        seed=config.data_seed)
    val_source = TextSource(tokenizer, "val", text)

    origin = origin_of(config, shape, tokenizer, text, ranks)
    if is_trained(origin, num_iterations, ranks):
        return
    origin = with_identity(origin, lambda: identity_of_shards(source.paths), lambda: {
        **identity_of_shards(TextSource(tokenizer, "val", text).paths), **identity_of_bundle(bundle)}, ranks)
    model = origin.model
    if config.fp8 or config.fp8_emulated:
        model.train_in_fp8(fp8)
    config, kernels = fit_and_choose(config, model, T, config.total_batch_size // T, MOST_ROWS["base"], ranks,
                                     meta=origin.meta, compiled=compiled)
    B = config.device_batch_size
    micro_batches = share_of_micro_batches(config.total_batch_size, B, T, ranks)
    tokens = base.tokens
    lines = [f"model d{config.depth}: {base.parameters:,} parameters, width {shape.n_embd}, {shape.n_head} heads, "
             f"layers {shape.pattern()}, vocabulary {shape.vocab_size:,}, rows of {shape.sequence_len}",
             f"train {num_iterations:,} steps of {config.total_batch_size:,} tokens = {tokens / 1e6:,.1f}M tokens "
             f"({tokens / base.parameters:.1f} a parameter), {base.flops_per_token * tokens:.2e} FLOPs; "
             f"{where(model, ranks)}, {micro_batches} micro-batch{'es' * (micro_batches > 1)} of {B} rows a step"]
    if config.dry_run:
        return say_what_would_be_done(origin, config, ranks, num_iterations, lines)
    ahead = 4 if source.shards == source.planned else max(4, 3 * micro_batches)  # so that a run without text can save
    loader = PackedLoader(source, B, T, ranks=ranks, rows_per_step=config.total_batch_size // T,
                          state=loader_state(origin), prefetch=ahead)
    plan = TrainingPlan(num_iterations, micro_batches, config.total_batch_size, clip=config.grad_clip or None,
                        rates=RateSchedule(config.warmup_ratio, config.warmdown_ratio, config.final_lr_frac,
                                           config.warmup_steps),
                        muon_momentum=MomentumSchedule(config.momentum_start, config.momentum_peak,
                                                       config.momentum_steps, config.momentum_end))
    with loader, open_run(origin, config, ranks, num_iterations=num_iterations, loader=loader, kernels=kernels,
                          lr_factor=base.lr_factor, decay_factor=base.decay_factor, val_bpb=None) as run:
        log, token_bytes = run.log, get_token_bytes(ranks.device)
        prompts = beginnings(tokenizer, text) if ranks.is_main else []
        run.introduce(lines, flops_per_token=base.flops_per_token, tokens=tokens)

        @cache
        def val_rows() -> EvalRows:
            return EvalRows(val_source, B, T, config.eval_tokens, ranks=ranks)

        def evaluate_tasks(step: int) -> None:
            result = evaluate_core(model, tokenizer, bundle, config.core_metric_max_per_task, ranks=ranks)
            log.say(f"step {step:05d} | CORE {result.core:.4f} in {clock(result.seconds)}")
            log.record("core", step=step, **result.record())

        def sample(step: int) -> None:
            on_main("samples", lambda: run.show_samples(step, samples(model, tokenizer, prompts)), ranks)

        actions = [PeriodicAction(config.eval_every, lambda step: run.evaluate_bpb(step, val_rows(), token_bytes),
                                  at_zero=True)]
        if config.eval_every <= 0 and not origin.step:
            actions.append(PeriodicAction(-1, lambda step: run.evaluate_bpb(step, val_rows(), token_bytes, whole=False),
                                          at_start=True, at_end=False))
        if bundle is not None:
            actions.append(PeriodicAction(config.core_metric_every, evaluate_tasks))
        run.train(lambda step: (next(loader) for _ in range(micro_batches)), plan,
                  [*actions, PeriodicAction(config.sample_every, sample)])
        bpb = run.results["val_bpb"]
        run.finish(f"validation bpb {bpb:.4f}", bpb=bpb)


if __name__ == "__main__":
    run_main(main)
