"""Supervised fine-tuning: the model learns to give the assistant's part of a conversation, and is trained on that
alone.

    python -m scripts.chat_sft
    torchrun --standalone --nproc_per_node=8 -m scripts.chat_sft -- --run=NAME

A step is a number of conversations, each padded, or a number of tokens, in rows of several conversations (--packed);
every token of the assistant in it weighs the same. The recipe `published` does the first, after mid-training; `modern`
the second, from the base model, with its batch, its learning rates and the momenta of its optimizer. num_iterations
counts optimizer steps. The same command resumes a run that was stopped. Files: chatsft_checkpoints/<tag>/ and
logs/sft_<tag>.jsonl under $NANOCHAT_BASE_DIR. The training data is chosen in tasks/recipes.py.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, ClassVar, Literal

from nanochat.chat_data import SupervisedSource, SupervisedSteps, count_tokens
from nanochat.checks import data_unseen, say_what_would_be_done, where
from nanochat.cli import (
    COUNT,
    COUNT_OR_ALL,
    EVERY,
    FRACTION,
    FROM_ZERO,
    NOT_NEGATIVE,
    POSITIVE,
    ROWS,
    Range,
    flag,
    run_main,
)
from nanochat.dataloader import PackedLoader
from nanochat.dataset.identity import with_identity
from nanochat.distributed import Ranks, machine_first, on_main
from nanochat.errors import UserError
from nanochat.evaluation.chat import evaluate_task
from nanochat.evaluation.loss import evaluate_loss
from nanochat.guard import finite
from nanochat.recipe import MOST_ROWS, RECIPES, Rows, published
from nanochat.recipe.laws import rate_factor
from nanochat.run import (
    ChatStageFlags,
    Origin,
    PeriodicAction,
    chat_data_choice,
    compile_wanted,
    fit_and_choose,
    is_trained,
    launch,
    loader_state,
    open_run,
    start_from_checkpoint,
    steps_state,
    tokens_of_row,
)
from nanochat.stages import STAGES
from nanochat.training import TrainingPlan, share_of_micro_batches
from tasks import recipes

STAGE, SFT = STAGES["sft"], published.sft


@dataclass
class Config(ChatStageFlags):
    """Flags of chat_sft; the defaults are those of the recipe."""

    stage: ClassVar[str] = "sft"

    source: Literal[STAGE.starts_from] = flag(SFT.source, "stage to start from")
    num_epochs: float = flag(SFT.num_epochs, "how often to go through the data", within=POSITIVE)
    max_seq_len: int = flag(SFT.max_seq_len, "tokens at which a conversation is cut, and of a packed row; -1 = the "
                            "model's own", within=Range(1, 1 << 24, also=-1))
    device_batch_size: Rows = flag(SFT.device_batch_size, "conversations or packed rows a device takes at a time; auto "
                                   "is what fits its memory", within=ROWS)
    packed: bool = flag(SFT.packed, "pack conversations into rows, as mid-training does; else each is padded")
    total_batch_size: int = flag(SFT.total_batch_size, "with --packed: tokens of all devices in an optimizer step",
                                 within=COUNT)
    reference_batch: int = flag(SFT.reference_batch, "with --packed: tokens of the batch at which the learning rates "
                                "hold: others scale them by the square root; 0 = they hold for any", within=FROM_ZERO)
    inherit: bool = flag(SFT.inherit, "take the batch and the learning rates that the model was trained with, where no "
                         "flag gives others")
    warm_start: bool = flag(SFT.warm_start, "begin with the momenta of the model's optimizer")
    target_examples_per_step: int = flag(SFT.target_examples_per_step, "conversations of all devices in an optimizer "
                                         "step that is not packed, and of a step of the validation", within=COUNT)
    init_lr_frac: float = flag(SFT.init_lr_frac, "factor of all learning rates", within=NOT_NEGATIVE)
    warmdown_ratio: float = flag(SFT.rates.warmdown_ratio,
                                 "part of the steps over which the learning rates fall to zero", within=FRACTION)
    eval_every: int = flag(SFT.eval_every, "steps from one validation to the next; -1 = at the end only", within=EVERY)
    eval_steps: int = flag(SFT.eval_steps, "validation: this many steps' worth of conversations", within=COUNT)
    eval_metrics_every: int = flag(SFT.eval_metrics_every,
                                   "steps from one grading on multiple choice to the next; -1 = never", within=EVERY)
    eval_metrics_max_problems: int = flag(SFT.eval_metrics_max_problems, "problems of each task in that grading",
                                          within=COUNT_OR_ALL)
    compile: str = flag("auto", "with --packed: compile the blocks with torch.compile: yes, no, or auto (on GPUs)")

    def check(self) -> None:
        """Raise UserError for flags that do not fit one another."""
        super().check()
        if self.compile == "yes" and not self.packed:
            raise UserError("--compile=yes needs --packed: batches of padded conversations have many lengths")


def main(argv: Sequence[str] | None = None) -> None:
    """Train as the flags say. Raises UserError for what the user can mend."""
    launch(Config, run, argv, __doc__)


@dataclass(frozen=True)
class TrainingRows:
    """The conversations to train on as batches.

    loader: whose position is saved. batches: given a step, this rank's micro-batches of it.
    micro_batches, tokens_per_step: of TrainingPlan. step: what one is, in words.
    steps_of_epoch: returns the optimizer steps of an epoch. left_out: returns how many conversations were.
    """

    loader: PackedLoader | SupervisedSteps
    batches: Callable[[int], Iterable[Any]]
    micro_batches: int
    tokens_per_step: int | None
    step: str
    steps_of_epoch: Callable[[], float]
    left_out: Callable[[], int]


def padded_rows(config: Config, origin: Origin, task: Any, T: int, ranks: Ranks) -> TrainingRows:
    """Return conversations padded to the longest of a micro-batch; a step is a number of them."""
    steps = SupervisedSteps(origin.tokenizer, task, examples_per_step=config.target_examples_per_step,
                            device_batch_size=config.device_batch_size, max_tokens=T, ranks=ranks, seed=config.seed,
                            step=origin.step, state=steps_state(origin))
    return TrainingRows(steps, steps, 0, None, f"{config.target_examples_per_step} of", lambda: len(steps),
                        lambda: steps.replaced)


def packed_rows(config: Config, origin: Origin, task: Any, T: int, ranks: Ranks) -> TrainingRows:
    """Return rows of several conversations; a step is a number of tokens. An epoch does not count the padding: 0.4 % of
    the tokens, for conversations of 600 tokens in rows of 2,048."""
    source = SupervisedSource(origin.tokenizer, task, config.seed, max_tokens=T)
    total, B = config.total_batch_size, config.device_batch_size
    loader = PackedLoader(source, B, T, ranks=ranks, rows_per_step=total // T, cut=False, state=loader_state(origin))
    micro_batches = share_of_micro_batches(total, B, T, ranks)

    def steps_of_epoch() -> float:
        return on_main("counting the tokens of the conversations",
                       lambda: count_tokens(task, origin.tokenizer, max_tokens=T + 1), ranks) / total

    return TrainingRows(loader, lambda step: (next(loader) for _ in range(micro_batches)), micro_batches, total,
                        f"{total:,} tokens of", steps_of_epoch, lambda: source.left_out)


def check_same_rows(config: Config, origin: Origin) -> None:
    """Raise UserError where a run to resume was begun packed and is not now, or the other way round."""
    before = (origin.meta.get("user_config") or {}).get("packed", False)
    if origin.step and before != config.packed:
        raise UserError(f"the run in {origin.folder} was begun with --packed={before}, and its position in the "
                        "conversations fits nothing else: use that to resume; --fresh moves the run aside and trains "
                        "anew.")


def run(config: Config, ranks: Ranks) -> None:
    """Run fine-tuning on these ranks."""
    compiled = config.packed and compile_wanted(config.compile, ranks)
    origin = start_from_checkpoint(STAGE, config.source, config, ranks)
    model, tokenizer, T = origin.model, origin.tokenizer, tokens_of_row(config, origin.model)
    check_same_rows(config, origin)
    if config.packed:
        share_of_micro_batches(config.total_batch_size, config.device_batch_size, T, ranks)  # raises early
    data, recipe = chat_data_choice(config, origin.meta), RECIPES[config.recipe]
    if config.dry_run and data_unseen(data.source, config, origin, ranks):
        return
    train_task, val_task = machine_first(
        lambda: recipes.sft(data.source, seed=data.seed, extra=data.extra, recipe=recipe), ranks)
    origin = with_identity(origin, train_task.identity, val_task.identity, ranks)  # first: it names what changed
    total_rows, most = (config.total_batch_size // T, MOST_ROWS["mid"]) if config.packed else (None, MOST_ROWS["sft"])
    config, kernels = fit_and_choose(config, model, T, total_rows, most, ranks,
                                     meta=origin.meta if origin.step else {}, compiled=compiled)
    rows = (packed_rows if config.packed else padded_rows)(config, origin, train_task, T, ranks)
    val_steps = SupervisedSteps(tokenizer, val_task, examples_per_step=config.target_examples_per_step,
                                device_batch_size=config.device_batch_size, max_tokens=T, ranks=ranks)
    num_iterations = config.num_iterations
    if num_iterations <= 0:
        num_iterations = max(1, round(config.num_epochs * rows.steps_of_epoch()))
    if is_trained(origin, num_iterations, ranks):
        return
    plan = TrainingPlan(num_iterations, rows.micro_batches, rows.tokens_per_step, clip=config.grad_clip or None,
                        rates=replace(recipe.sft.rates, warmdown_ratio=config.warmdown_ratio),
                        muon_momentum=recipe.sft.momentum)
    lines = [f"{num_iterations:,} steps of {rows.step} {len(train_task):,} conversations; {where(model, ranks)}"]
    graded = {}
    if config.eval_metrics_every > 0:  # now, so that a data set that cannot be had ends the run before it begins
        for name, make in recipes.graded(data.source, seed=data.seed).items():
            task = machine_first(make, ranks)
            if task.kind == "categorical":
                graded[name] = task
    if config.dry_run:
        return say_what_would_be_done(origin, config, ranks, num_iterations, lines)
    lr_factor = rate_factor(config.total_batch_size, config.reference_batch) if config.packed else 1.0
    with rows.loader, val_steps, open_run(origin, config, ranks, num_iterations=num_iterations, loader=rows.loader,
                                          kernels=kernels, lr_factor=lr_factor, val_loss=None) as run:
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

        run.train(rows.batches, plan, [
            PeriodicAction(config.eval_every, validate, at_zero=True),
            *([PeriodicAction(-1, compare, at_start=True, at_end=False)]
              if config.eval_every <= 0 and not origin.step else []),
            PeriodicAction(config.eval_metrics_every, grade, at_end=False),
            PeriodicAction(-1, lambda step: run.sample_answers(step, val_task)),
        ], mfu=config.packed)  # else the tokens of a step are the supervised ones alone
        if left_out := rows.left_out():
            log.say(f"{left_out} conversations had no answer within {T} tokens and were left out")
        if config.packed:
            log.record("packing", **rows.loader.counts)
        loss = run.results["val_loss"]
        run.finish(f"validation loss {loss:.4f}", loss=loss)


if __name__ == "__main__":
    run_main(main)
