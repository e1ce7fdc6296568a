"""Supervised fine-tuning: the model learns to give the assistant's part of a conversation, and only that is trained on.

    python -m scripts.chat_sft
    torchrun --standalone --nproc_per_node=8 -m scripts.chat_sft -- --run=NAME

A step is a number of conversations; every token of the assistant in it weighs the same. num_iterations counts optimizer steps. The same
command again goes on where it stopped. Files: chatsft_checkpoints/<tag>/ and logs/sft_<tag>.jsonl under $NANOCHAT_BASE_DIR. What it is
trained on: tasks/recipes.py.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from typing import Literal

from nanochat.chat_data import SupervisedSteps
from nanochat.cli import flag, parse, run_main
from nanochat.distributed import Ranks, joined_ranks
from nanochat.errors import UserError
from nanochat.evaluation.chat import evaluate_task
from nanochat.evaluation.loss import evaluate_loss
from nanochat.logs import RunLog
from nanochat.training import Plan, train
from scripts.stages import Stage, StageConfig
from tasks import recipes


@dataclass
class Config(StageConfig):
    """Flags of chat_sft; the defaults are the published recipe."""

    source: Literal["mid", "base"] = flag("mid", "stage to start from")
    num_epochs: float = flag(1.0, "how often to go through the data")
    max_seq_len: int = flag(-1, "tokens at which a conversation is cut; -1 = the model's own")
    device_batch_size: int = flag(4, "conversations a device takes at a time")
    target_examples_per_step: int = flag(32, "conversations of all devices in an optimizer step")
    init_lr_frac: float = flag(0.02, "what all rates are multiplied with")
    warmdown_ratio: float = flag(1.0, "part of the steps over which the rates fall to zero")
    eval_every: int = flag(100, "steps from one validation to the next; -1 = at the end only")
    eval_steps: int = flag(100, "validation: this many steps' worth of conversations")
    eval_metrics_every: int = flag(200, "steps from one grading on multiple choice to the next; -1 = never")
    eval_metrics_max_problems: int = flag(1024, "problems of each task in that grading")


def main(argv: Sequence[str] | None = None) -> None:
    """Train as the flags say. Raises UserError for what the user can mend."""
    config = parse(Config, argv, __doc__)
    with joined_ranks(config.device_type) as ranks:
        run(config, ranks)


def run(config: Config, ranks: Ranks) -> None:
    """One run on these ranks."""
    if config.eval_steps < 1:
        raise UserError(f"--eval-steps must be at least 1, not {config.eval_steps}")
    stage = Stage("sft", config.source, config, ranks)
    T = stage.max_seq_len
    train_task, val_task = recipes.sft(stage.data, seed=stage.world, extra=stage.extra)
    shape = {"examples_per_step": config.target_examples_per_step, "device_batch_size": config.device_batch_size, "max_tokens": T,
             "ranks": ranks}
    steps = SupervisedSteps(stage.tokenizer, train_task, seed=config.seed, **shape)
    val_steps = SupervisedSteps(stage.tokenizer, val_task, **shape)
    num_iterations = config.num_iterations if config.num_iterations > 0 else max(1, round(config.num_epochs * len(steps)))
    if stage.finished(num_iterations):
        return
    stage.make_optimizer()
    plan = Plan(num_iterations, 0, None, clip=config.grad_clip or None, warmdown_ratio=config.warmdown_ratio)
    graded = recipes.graded(stage.data, seed=stage.world)
    with RunLog("sft", stage.tag, asdict(config), wandb_run=config.run, enabled=ranks.is_main) as log:
        stage.introduce(log, num_iterations, f"{config.target_examples_per_step} of {len(train_task):,} conversations",
                        flops_per_token=stage.model.flops_per_token(T), conversations=len(train_task))
        loss = None

        def before_step(step: int, last: bool) -> None:
            nonlocal loss
            if last or config.eval_every > 0 and step % config.eval_every == 0 and (step > stage.start or step == 0):
                count = min(config.eval_steps, len(val_steps))
                loss = evaluate_loss(stage.model, chain.from_iterable(val_steps(i) for i in range(count)), ranks)
                log.say(f"step {step:05d} | validation loss {loss:.4f}")
                log.record("val", step=step, loss=loss)
            if config.eval_metrics_every > 0 and (step > stage.start and step % config.eval_metrics_every == 0) and not last:
                for name, make in graded.items():
                    task = make()
                    if task.kind == "categorical":
                        result = evaluate_task(stage.model, stage.tokenizer, task, ranks, max_problems=config.eval_metrics_max_problems)
                        log.say(f"step {step:05d} | {name} {result.accuracy:.1%}")
                        log.record("metric", step=step, name=name, accuracy=result.accuracy)
            if last:
                stage.sample(log, step, val_task)
                stage.save(log, step, val_loss=loss)
            elif config.save_every > 0 and step > stage.start and step % config.save_every == 0:
                stage.save(log, step, config.keep, val_loss=loss)

        try:
            train(stage.model, stage.optimizer, steps, plan, ranks, log, flops_per_token=stage.model.flops_per_token(T),
                  peak=None, start=stage.start, before_step=before_step,  # tokens here are supervised ones: no MFU can be told from them
                  save=lambda step: stage.save(log, step, val_loss=loss))
        finally:
            steps.close()
            val_steps.close()
        if steps.replaced:
            log.say(f"{steps.replaced} conversations had no answer within {T} tokens and were left out")
        stage.finish(log, num_iterations, f"validation loss {loss:.4f}", loss=loss)


if __name__ == "__main__":
    run_main(main)
