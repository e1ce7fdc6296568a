"""Train a base model from text.

    python -m scripts.base_train --depth=4 --max-seq-len=256 --device-batch-size=8 --total-batch-size=2048 --num-iterations=500
    torchrun --standalone --nproc_per_node=8 -m scripts.base_train -- --depth=20 --run=NAME --device_batch_size=32

The same command again goes on where it stopped; Ctrl-C and SIGTERM save first. Files: base_checkpoints/<tag>/ and logs/base_<tag>.jsonl
under $NANOCHAT_BASE_DIR.
"""

import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from nanochat.checkpoint import Checkpoint, latest_step, load_checkpoint, save_checkpoint
from nanochat.cli import flag, parse, run_main
from nanochat.dataloader import PackedLoader, reshard
from nanochat.dataset import data_dir, shard_paths
from nanochat.dataset.shards import read_source
from nanochat.distributed import Ranks, barrier, broadcast_object, compute_dtype, gather_objects, joined_ranks, peak_flops
from nanochat.errors import UserError
from nanochat.evaluation.core import bundle_of_ranks, check_bundle, evaluate_core
from nanochat.evaluation.core_bundle import Bundle
from nanochat.evaluation.loss import EvalRows, evaluate_bpb
from nanochat.files import base_dir
from nanochat.gpt import GPT, GPTConfig
from nanochat.logs import RunLog
from nanochat.optim import MuonAdamW, parameter_groups
from nanochat.stages import STAGES
from nanochat.tokenizer import get_token_bytes, get_tokenizer
from nanochat.training import Plan, clock, share_of_micro_batches, train
from scripts.base_loss import beginnings, samples
from scripts.stages import move_aside, tell_changes


@dataclass
class Config:
    """Flags of base_train; the defaults are the published recipe."""

    run: str = flag("dummy", "name of the wandb run; dummy means no wandb")
    device_type: str = flag("", "cuda, mps or cpu; unset takes the best there is")
    depth: int = flag(20, "layers; sets width (64 a layer) and heads too")
    max_seq_len: int = flag(2048, "tokens in a row")
    layer_pattern: str = flag("", "mixer of each layer, S for SLC2 and A for attention; one letter stands for all layers")
    window: int = flag(0, "tokens that attention sees, each itself and those before it; 0 = all")
    n_kernel: int = flag(3, "taps of the SLC2 convolution")
    slc_rate: int = flag(3, "every how manyth layer is attention")
    num_iterations: int = flag(-1, "optimizer steps; goes before the two that follow; -1 = unset")
    target_flops: float = flag(-1.0, "train until this many FLOPs are done; -1 = unset")
    target_param_data_ratio: float = flag(20.0, "train on this many tokens a parameter")
    device_batch_size: int = flag(32, "rows a device takes at a time; lower it when memory does not suffice")
    total_batch_size: int = flag(524288, "tokens of all devices in an optimizer step")
    embedding_lr: float = flag(0.2, "rate of the embedding (AdamW)")
    unembedding_lr: float = flag(0.004, "rate of the head (AdamW)")
    matrix_lr: float = flag(0.02, "rate of the matrices (Muon) and of the convolution taps (AdamW)")
    weight_decay: float = flag(0.0, "decay of embedding, head and taps")
    grad_clip: float = flag(1.0, "largest gradient norm; 0 = no limit")
    warmup_ratio: float = flag(0.0, "part of the steps over which the rates rise")
    warmdown_ratio: float = flag(0.2, "part of the steps over which the rates fall")
    final_lr_frac: float = flag(0.0, "rates at the end, as a part of the full ones")
    eval_every: int = flag(250, "steps from one validation to the next; -1 = at the end only")
    eval_tokens: int = flag(20 * 524288, "tokens to validate on")
    core_metric_every: int = flag(-1, "steps from one CORE evaluation to the next, and one at the end; -1 = never")
    core_metric_max_per_task: int = flag(500, "examples of each task in that evaluation; -1 = all")
    sample_every: int = flag(2000, "steps from one set of samples to the next; -1 = at the end only")
    save_every: int = flag(1000, "steps from one checkpoint to the next; -1 = at the end only")
    keep: int = flag(2, "periodical checkpoints to keep; the last one always stays")
    model_tag: str = flag("", "name of the checkpoint folder; unset is d<depth>")
    data_dir: str = flag("", "folder of shards; unset is base_data")
    seed: int = flag(1337, "of the initial weights")
    compile: str = flag("auto", "compile the blocks with torch.compile: yes, no, or auto (on GPUs)")
    fresh: bool = flag(False, "start anew where a run of the same tag stands; that one is moved aside, not deleted")


def main(argv: Sequence[str] | None = None) -> None:
    """Train as the flags say. Raises UserError for what the user can mend."""
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    config = parse(Config, argv, __doc__)
    with joined_ranks(config.device_type) as ranks:
        run(config, ranks)


def model_shape(config: Config, vocab_size: int) -> GPTConfig:
    """The model's shape from the flags. Raises UserError for one that cannot be."""
    pattern = config.layer_pattern * (config.depth if len(config.layer_pattern) == 1 else 1)
    try:
        return GPTConfig.from_depth(config.depth, sequence_len=config.max_seq_len, vocab_size=vocab_size, n_kernel=config.n_kernel,
                                    slc_rate=config.slc_rate, layer_pattern=pattern or None, window=config.window or None)
    except ValueError as error:
        raise UserError(f"these flags make no model: {error}") from error


def horizon(config: Config, model: GPT) -> int:
    """How many steps to train: num_iterations, else target_flops, else tokens a parameter."""
    if config.num_iterations > 0:
        return config.num_iterations
    if config.target_flops > 0:
        steps = round(config.target_flops / (model.flops_per_token() * config.total_batch_size))
    elif config.target_param_data_ratio > 0:
        steps = int(config.target_param_data_ratio * sum(p.numel() for p in model.parameters())) // config.total_batch_size
    else:
        raise UserError("no horizon: set --num-iterations, --target-flops or --target-param-data-ratio above 0")
    if steps < 1:
        raise UserError(f"the horizon is less than one step of {config.total_batch_size:,} tokens: set --num-iterations, or a smaller "
                        "--total-batch-size")
    return steps


def run(config: Config, ranks: Ranks) -> None:
    """One run on these ranks."""
    if config.compile not in ("auto", "yes", "no"):
        raise UserError(f"--compile is yes, no or auto, not {config.compile!r}")
    tokenizer = get_tokenizer()
    shape = model_shape(config, tokenizer.get_vocab_size())
    bundle = None
    if config.core_metric_every > 0:  # asked for by name: what is wrong with it is told now, not after some thousand steps
        bundle = bundle_of_ranks(None, ranks)
        check_bundle(bundle, config.core_metric_max_per_task, ranks)
    micro_batches = share_of_micro_batches(config.total_batch_size, config.device_batch_size, config.max_seq_len, ranks)
    folder = Path(config.data_dir).expanduser() if config.data_dir else data_dir()
    shard_paths("train", folder)  # no text is said before a model is made
    tag = config.model_tag or f"d{config.depth}"
    checkpoints = base_dir() / "base_checkpoints" / tag

    torch.manual_seed(config.seed)  # drawn on the CPU: the same weights whatever the device and the number of ranks
    model = GPT(shape)
    num_iterations = horizon(config, model)
    found = resumed(config, shape, tokenizer, checkpoints, num_iterations, ranks)
    if found is not None and found.step >= num_iterations:
        if ranks.is_main:
            print(f"{checkpoints} is trained: step {found.step} of {num_iterations}. Nothing to do; --fresh trains it anew.")
        return
    if found is not None:
        model.load_state_dict(found.model_state)
    start = found.step if found is not None else 0
    dtype = compute_dtype(ranks.device)
    model.to(ranks.device)
    model.compute_dtype = dtype
    if config.compile == "yes" or config.compile == "auto" and ranks.device.type == "cuda":
        model.compile_blocks(config.device_batch_size, config.max_seq_len)
    optimizer = MuonAdamW(parameter_groups(model, matrix_lr=config.matrix_lr, embedding_lr=config.embedding_lr, conv_lr=config.matrix_lr,
                                           unembedding_lr=config.unembedding_lr, weight_decay=config.weight_decay), ranks)
    loader_state = None
    if found is not None:
        optimizer.load_state_dict(found.optimizer_state)
        states = found.meta["loader"]
        loader_state = (states if len(states) == ranks.world_size else reshard(states, ranks.world_size))[ranks.rank]
    loader = PackedLoader(tokenizer, "train", config.device_batch_size, config.max_seq_len, ranks=ranks, folder=folder, state=loader_state)
    plan = Plan(num_iterations, micro_batches, config.total_batch_size, clip=config.grad_clip or None, warmup_ratio=config.warmup_ratio,
                warmdown_ratio=config.warmdown_ratio, final_lr_frac=config.final_lr_frac)
    with RunLog("base", tag, asdict(config), wandb_run=config.run, enabled=ranks.is_main) as log:
        job = _Job(config, ranks, model, tokenizer, optimizer, loader, log, folder, checkpoints, num_iterations, bundle)
        job.introduce(start, plan, dtype)
        try:
            train(model, optimizer, lambda step: (next(loader) for _ in range(micro_batches)), plan, ranks, log,
                  flops_per_token=model.flops_per_token(), peak=peak_flops(ranks.device, dtype), start=start,
                  before_step=lambda step, last: job.before_step(step, last, start), save=job.save)
        finally:
            loader.close()
        job.finish()


class _Job:
    """What a run does between its steps: evaluate, sample, save."""

    def __init__(self, config, ranks, model, tokenizer, optimizer, loader, log, folder, checkpoints, num_iterations, bundle):
        self.config, self.ranks, self.model, self.tokenizer, self.optimizer = config, ranks, model, tokenizer, optimizer
        self.loader, self.log, self.folder, self.checkpoints, self.num_iterations = loader, log, folder, checkpoints, num_iterations
        self.token_bytes = get_token_bytes(ranks.device)
        self.val_rows: EvalRows | None = None
        self.val_bpb: float | None = None
        self.bundle: Bundle | None = bundle
        self.prompts = beginnings(tokenizer, folder) if ranks.is_main else []
        self.began = time.time()

    def introduce(self, start: int, plan: Plan, dtype: torch.dtype) -> None:
        """Say what is about to happen."""
        shape, config = self.model.config, self.config
        parameters = sum(p.numel() for p in self.model.parameters())
        tokens = plan.num_iterations * plan.tokens_per_step
        say = self.log.say
        say(f"model d{config.depth}: {parameters:,} parameters, width {shape.n_embd}, {shape.n_head} heads, layers {shape.pattern()}, "
            f"vocabulary {shape.vocab_size:,}, rows of {shape.sequence_len}")
        say(f"train {plan.num_iterations:,} steps of {plan.tokens_per_step:,} tokens = {tokens / 1e6:,.1f}M tokens "
            f"({tokens / parameters:.1f} a parameter), {self.model.flops_per_token() * tokens:.2e} FLOPs; {self.ranks.world_size} "
            f"process{'es' if self.ranks.world_size > 1 else ''} on {self.ranks.device.type}, {str(dtype).removeprefix('torch.')}, "
            f"{plan.micro_batches} micro-batch{'es' if plan.micro_batches > 1 else ''} of {config.device_batch_size} rows a step")
        if start:
            say(f"going on from step {start} of {self.checkpoints}")
        self.log.record("model", parameters=parameters, flops_per_token=self.model.flops_per_token(), num_iterations=plan.num_iterations,
                        tokens=tokens, world_size=self.ranks.world_size, dtype=str(dtype), model_config=shape.to_dict(), start=start)

    def before_step(self, step: int, last: bool, start: int) -> None:
        config = self.config
        if last or step == start and start > 0:
            due = last
        else:
            due = config.eval_every > 0 and step % config.eval_every == 0
        if due:
            self.evaluate(step)
        if self.bundle is not None and (last or step > start and step % config.core_metric_every == 0):
            self.core(step)
        if last or config.sample_every > 0 and step > start and step % config.sample_every == 0:
            self.sample(step)
        if last:
            self.save(step)
        elif config.save_every > 0 and step > start and step % config.save_every == 0:
            self.save(step, keep=config.keep)

    def evaluate(self, step: int) -> None:
        if self.val_rows is None:
            self.val_rows = EvalRows(self.tokenizer, "val", self.config.device_batch_size, self.config.max_seq_len, self.config.eval_tokens,
                                     ranks=self.ranks, folder=self.folder)
        self.val_bpb = evaluate_bpb(self.model, self.val_rows, self.token_bytes, self.ranks)
        self.log.say(f"step {step:05d} | validation bpb {self.val_bpb:.4f}")
        self.log.record("val", step=step, bpb=self.val_bpb)

    def core(self, step: int) -> None:
        result = evaluate_core(self.model, self.tokenizer, self.bundle, self.config.core_metric_max_per_task, ranks=self.ranks)
        self.log.say(f"step {step:05d} | CORE {result.core:.4f} in {clock(result.seconds)}")
        self.log.record("core", step=step, **result.record())

    def sample(self, step: int) -> None:
        if not self.ranks.is_main:
            return
        texts = samples(self.model, self.tokenizer, self.prompts)
        for text in texts:
            self.log.say(f"  {text}")
        self.log.record("samples", step=step, texts=texts)

    def save(self, step: int, keep: int | None = None) -> None:
        """Write a checkpoint; collective, rank 0 writes."""
        optimizer_state = self.optimizer.state_dict()
        loader = gather_objects(self.loader.state_dict(), self.ranks)
        if self.ranks.is_main:
            config = self.config
            save_checkpoint(self.checkpoints, step, self.model.state_dict(), {
                "val_bpb": self.val_bpb, "model_config": self.model.config.to_dict(), "user_config": asdict(config),
                "device_batch_size": config.device_batch_size, "max_seq_len": config.max_seq_len, "num_iterations": self.num_iterations,
                "tokenizer": self.tokenizer.fingerprint(), "loader": loader, "world_size": self.ranks.world_size,
                "data": read_source(self.folder)}, optimizer_state, keep=keep)
            self.log.say(f"step {step:05d} | saved {self.checkpoints}")
            self.log.record("checkpoint", step=step, folder=str(self.checkpoints))
        barrier(self.ranks)

    def finish(self) -> None:
        memory = torch.cuda.max_memory_allocated() if self.ranks.device.type == "cuda" else None
        self.log.record("done", step=self.num_iterations, bpb=self.val_bpb, seconds=time.time() - self.began, peak_memory=memory)
        self.log.say(f"done in {clock(time.time() - self.began)}: validation bpb {self.val_bpb:.4f}"
                     + (f", peak memory {memory / 1e9:.1f} GB" if memory else "") + f". The model is in {self.checkpoints}")


def resumed(config: Config, shape: GPTConfig, tokenizer, folder: Path, num_iterations: int, ranks: Ranks) -> Checkpoint | None:
    """The checkpoint to go on from, None for a new run. Raises UserError where `folder` holds another model, or one that cannot go on."""
    if config.fresh and ranks.is_main:
        move_aside(folder)
    way_out = "Use another --model-tag, or --fresh to move it aside and start anew."
    step = broadcast_object(latest_step(folder) if ranks.is_main else None, ranks)
    if step is None:
        return None
    found = load_checkpoint(folder, step, optimizer=True)
    if found.meta["model_config"] != shape.to_dict():
        old, new = found.meta["model_config"], shape.to_dict()
        differ = ", ".join(f"{name} {old.get(name)} there, {new.get(name)} here" for name in old | new if old.get(name) != new.get(name))
        raise UserError(f"{folder} holds a model of another shape ({differ}). {way_out}")
    if found.meta.get("tokenizer", tokenizer.fingerprint()) != tokenizer.fingerprint():
        raise UserError(f"{folder} was trained with another tokenizer. {way_out}")
    if step >= num_iterations:
        return found
    if found.optimizer_state is None or "loader" not in found.meta:
        raise UserError(f"{folder} cannot be trained on: {found.no_optimizer or 'it does not say how far its text was read'}. {way_out}")
    if ranks.is_main:
        tell_changes(found.meta.get("user_config", {}), config, STAGES["base"].settings, folder)
    return found


if __name__ == "__main__":
    run_main(main)
