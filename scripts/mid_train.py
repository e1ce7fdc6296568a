"""Mid-training: the base model learns the form of conversations, multiple choice, the calculator, spelling.

    python -m scripts.mid_train
    torchrun --standalone --nproc_per_node=8 -m scripts.mid_train -- --run=NAME --device_batch_size=32

Every token is trained on, the user's too; conversations are packed into rows whole. The same command again goes on where it stopped.
Files: mid_checkpoints/<tag>/ and logs/mid_<tag>.jsonl under $NANOCHAT_BASE_DIR. What it is trained on: tasks/recipes.py.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from nanochat.chat_data import ChatTokens, Conversations, count_tokens
from nanochat.cli import flag, parse, run_main
from nanochat.dataloader import PackedLoader, reshard
from nanochat.distributed import Ranks, broadcast_object, joined_ranks, peak_flops
from nanochat.errors import UserError
from nanochat.evaluation.loss import EvalRows, evaluate_bpb
from nanochat.logs import RunLog
from nanochat.training import Plan, share_of_micro_batches, train
from scripts.stages import Stage, StageConfig
from tasks import recipes


@dataclass
class Config(StageConfig):
    """Flags of mid_train; the defaults are the published recipe."""

    num_epochs: float = flag(1.0, "how often to go through the data")
    max_seq_len: int = flag(-1, "tokens in a row; -1 = as the base model")
    device_batch_size: int = flag(32, "rows a device takes at a time; lower it when memory does not suffice")
    total_batch_size: int = flag(524288, "tokens of all devices in an optimizer step")
    warmdown_ratio: float = flag(0.2, "part of the steps over which the rates fall")
    eval_every: int = flag(150, "steps from one validation to the next; -1 = at the end only")
    eval_tokens: int = flag(20 * 524288, "tokens to validate on")
    compile: str = flag("auto", "compile the blocks with torch.compile: yes, no, or auto (on GPUs)")


def main(argv: Sequence[str] | None = None) -> None:
    """Train as the flags say. Raises UserError for what the user can mend."""
    config = parse(Config, argv, __doc__)
    with joined_ranks(config.device_type) as ranks:
        run(config, ranks)


def run(config: Config, ranks: Ranks) -> None:
    """One run on these ranks."""
    if config.compile not in ("auto", "yes", "no"):
        raise UserError(f"--compile is yes, no or auto, not {config.compile!r}")
    stage = Stage("mid", "base", config, ranks)
    T = stage.max_seq_len
    micro_batches = share_of_micro_batches(config.total_batch_size, config.device_batch_size, T, ranks)
    train_task, val_task = recipes.mid(stage.data, seed=stage.world, extra=stage.extra)
    num_iterations = config.num_iterations
    if num_iterations <= 0:
        tokens = broadcast_object(count_tokens(train_task, stage.tokenizer) if ranks.is_main else 0, ranks)
        num_iterations = max(1, round(config.num_epochs * tokens / config.total_batch_size))
    if stage.finished(num_iterations):
        return
    if config.compile == "yes" or config.compile == "auto" and ranks.device.type == "cuda":
        stage.model.compile_blocks(config.device_batch_size, T)
    stage.make_optimizer()
    tokens, conversations = ChatTokens(stage.tokenizer), Conversations(train_task, config.seed)
    position = None
    if stage.start:
        states = stage.meta["loader"]
        position = (states if len(states) == ranks.world_size else reshard(states, ranks.world_size))[ranks.rank]
    loader = PackedLoader(tokens, "train", config.device_batch_size, T, ranks=ranks, documents=conversations, cut=False, state=position)
    plan = Plan(num_iterations, micro_batches, config.total_batch_size, clip=config.grad_clip or None, warmdown_ratio=config.warmdown_ratio)
    with RunLog("mid", stage.tag, asdict(config), wandb_run=config.run, enabled=ranks.is_main) as log:
        stage.introduce(log, num_iterations, f"{config.total_batch_size:,} tokens from {len(train_task):,} conversations",
                        flops_per_token=stage.model.flops_per_token(T), conversations=len(train_task))
        token_bytes = stage.tokenizer.token_bytes().to(ranks.device)
        val_rows = EvalRows(tokens, "val", config.device_batch_size, T, config.eval_tokens, ranks=ranks, documents=Conversations(val_task),
                            cut=False)
        bpb = None

        def save(step: int, keep: int | None = None) -> None:
            stage.save(log, step, keep, loader=loader.state_dict(), val_bpb=bpb)

        def before_step(step: int, last: bool) -> None:
            nonlocal bpb
            if last or config.eval_every > 0 and step % config.eval_every == 0 and (step > stage.start or step == 0):
                bpb = evaluate_bpb(stage.model, val_rows, token_bytes, ranks)
                log.say(f"step {step:05d} | validation bpb {bpb:.4f}")
                log.record("val", step=step, bpb=bpb)
            if last:
                stage.sample(log, step, val_task)
                save(step)
            elif config.save_every > 0 and step > stage.start and step % config.save_every == 0:
                save(step, config.keep)

        try:
            train(stage.model, stage.optimizer, lambda step: (next(loader) for _ in range(micro_batches)), plan, ranks, log,
                  flops_per_token=stage.model.flops_per_token(T), peak=peak_flops(ranks.device, stage.dtype), start=stage.start,
                  before_step=before_step, save=save)
        finally:
            loader.close()
        log.record("packing", **loader.counts)
        stage.finish(log, num_iterations, f"validation bpb {bpb:.4f}", bpb=bpb)


if __name__ == "__main__":
    run_main(main)
