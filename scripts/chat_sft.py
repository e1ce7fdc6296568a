"""Supervised fine-tuning: the model learns to give the assistant's part of a conversation, and is trained on that
alone.

    python -m scripts.chat_sft
    torchrun --standalone --nproc_per_node=8 -m scripts.chat_sft -- --run=NAME

A step is a number of conversations; every token of the assistant in it weighs the same. num_iterations counts optimizer
steps. The same command resumes a run that was stopped. Files: chatsft_checkpoints/<tag>/ and logs/sft_<tag>.jsonl under
$NANOCHAT_BASE_DIR. The training data is chosen in tasks/recipes.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import ClassVar, Literal

from nanochat.chat_data import SupervisedSteps
from nanochat.checks import data_unseen, say_what_would_be_done, where
from nanochat.cli import COUNT, COUNT_OR_ALL, EVERY, FRACTION, NOT_NEGATIVE, POSITIVE, ROWS, Range, flag, run_main
from nanochat.dataset.identity import with_identity
from nanochat.distributed import Ranks, machine_first
from nanochat.evaluation.chat import evaluate_task
from nanochat.evaluation.loss import evaluate_loss
from nanochat.guard import finite
from nanochat.recipe import MOST_ROWS, Rows, published
from nanochat.run import (
    ChatStageFlags,
    PeriodicAction,
    chat_data_choice,
    fit_and_choose,
    is_trained,
    launch,
    open_run,
    start_from_checkpoint,
    steps_state,
    tokens_of_row,
)
from nanochat.stages import STAGES
from nanochat.training import TrainingPlan
from tasks import recipes

STAGE, SFT = STAGES["sft"], published.sft


@dataclass
class Config(ChatStageFlags):
    """Flags of chat_sft; the defaults are the published recipe."""

    stage: ClassVar[str] = "sft"

    source: Literal[STAGE.starts_from] = flag(STAGE.starts_from[0], "stage to start from")
    num_epochs: float = flag(SFT.num_epochs, "how often to go through the data", within=POSITIVE)
    max_seq_len: int = flag(SFT.max_seq_len, "tokens at which a conversation is cut; -1 = the model's own",
                            within=Range(1, 1 << 24, also=-1))
    device_batch_size: Rows = flag(SFT.device_batch_size,
                                   "conversations a device takes at a time; auto is what fits its memory", within=ROWS)
    target_examples_per_step: int = flag(SFT.target_examples_per_step,
                                         "conversations of all devices in an optimizer step", within=COUNT)
    init_lr_frac: float = flag(SFT.init_lr_frac, "factor of all learning rates", within=NOT_NEGATIVE)
    warmdown_ratio: float = flag(SFT.rates.warmdown_ratio,
                                 "part of the steps over which the learning rates fall to zero", within=FRACTION)
    eval_every: int = flag(SFT.eval_every, "steps from one validation to the next; -1 = at the end only", within=EVERY)
    eval_steps: int = flag(SFT.eval_steps, "validation: this many steps' worth of conversations", within=COUNT)
    eval_metrics_every: int = flag(SFT.eval_metrics_every,
                                   "steps from one grading on multiple choice to the next; -1 = never", within=EVERY)
    eval_metrics_max_problems: int = flag(SFT.eval_metrics_max_problems, "problems of each task in that grading",
                                          within=COUNT_OR_ALL)


def main(argv: Sequence[str] | None = None) -> None:
    """Train as the flags say. Raises UserError for what the user can mend."""
    launch(Config, run, argv, __doc__)


def run(config: Config, ranks: Ranks) -> None:
    """Run fine-tuning on these ranks."""
    origin = start_from_checkpoint(STAGE, config.source, config, ranks)
    model, tokenizer, T = origin.model, origin.tokenizer, tokens_of_row(config, origin.model)
    data = chat_data_choice(config, origin.meta)
    if config.dry_run and data_unseen(data.source, config, origin, ranks):
        return
    train_task, val_task = machine_first(lambda: recipes.sft(data.source, seed=data.seed, extra=data.extra), ranks)
    origin = with_identity(origin, train_task.identity, val_task.identity, ranks)  # first: it names what changed
    config, kernels = fit_and_choose(config, model, T, None, MOST_ROWS["sft"], ranks,
                                     meta=origin.meta if origin.step else {})
    shape = {"examples_per_step": config.target_examples_per_step, "device_batch_size": config.device_batch_size,
             "max_tokens": T, "ranks": ranks}
    steps = SupervisedSteps(tokenizer, train_task, seed=config.seed, step=origin.step, state=steps_state(origin),
                            **shape)
    val_steps = SupervisedSteps(tokenizer, val_task, **shape)
    num_iterations = config.num_iterations
    if num_iterations <= 0:
        num_iterations = max(1, round(config.num_epochs * len(steps)))
    if is_trained(origin, num_iterations, ranks):
        return
    plan = TrainingPlan(num_iterations, 0, None, clip=config.grad_clip or None,
                        rates=replace(SFT.rates, warmdown_ratio=config.warmdown_ratio), muon_momentum=SFT.momentum)
    lines = [f"{num_iterations:,} steps of {config.target_examples_per_step} of {len(train_task):,} conversations; "
             f"{where(model, ranks)}"]
    graded = {}
    if config.eval_metrics_every > 0:  # now, so that a data set that cannot be had ends the run before it begins
        for name, make in recipes.graded(data.source, seed=data.seed).items():
            task = machine_first(make, ranks)
            if task.kind == "categorical":
                graded[name] = task
    if config.dry_run:
        return say_what_would_be_done(origin, config, ranks, num_iterations, lines)
    with steps, val_steps, open_run(origin, config, ranks, num_iterations=num_iterations, loader=steps,
                                     kernels=kernels, val_loss=None) as run:
        log = run.log
        run.introduce(lines, data=data.source, flops_per_token=model.flops_per_token(T), conversations=len(train_task))

        def loss_on(count: int) -> float:
            return evaluate_loss(model, chain.from_iterable(val_steps(i) for i in range(count)), ranks)

        def compare(step: int, known: float | None = None) -> None:
            run.progress.measure(step, num_iterations, "validation loss", loss_on,
                                 min(config.eval_steps, len(val_steps)), [config.target_examples_per_step, T], known)

        def validate(step: int) -> None:
            loss = finite(loss_on(min(config.eval_steps, len(val_steps))), "validation loss", step)
            compare(step, loss)
            run.results.update(val_loss=loss, val_step=step)
            log.say(f"step {step:05d} | validation loss {loss:.4f}")
            log.record("val", step=step, loss=loss)

        def grade(step: int) -> None:
            for name, task in graded.items():
                result = evaluate_task(model, tokenizer, task, ranks, max_problems=config.eval_metrics_max_problems)
                log.say(f"step {step:05d} | {name} {result.accuracy:.1%}")
                log.record("metric", step=step, name=name, accuracy=result.accuracy)

        run.train(steps, plan, [
            PeriodicAction(config.eval_every, validate, at_zero=True),
            *([PeriodicAction(-1, compare, at_start=True, at_end=False)]
              if config.eval_every <= 0 and not origin.step else []),
            PeriodicAction(config.eval_metrics_every, grade, at_end=False),
            PeriodicAction(-1, lambda step: run.sample_answers(step, val_task)),
        ], mfu=False)  # the tokens of a step are the supervised ones alone
        if steps.replaced:
            log.say(f"{steps.replaced} conversations had no answer within {T} tokens and were left out")
        loss = run.results["val_loss"]
        run.finish(f"validation loss {loss:.4f}", loss=loss)


if __name__ == "__main__":
    run_main(main)
