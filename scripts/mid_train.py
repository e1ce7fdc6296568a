"""Mid-training: the base model learns the form of conversations, multiple choice, the calculator, spelling.

    python -m scripts.mid_train
    torchrun --standalone --nproc_per_node=8 -m scripts.mid_train -- --run=NAME --device_batch_size=32

Every token is trained on, the user's too; conversations are packed into rows whole. The same command resumes a run that
was stopped. Files: mid_checkpoints/<tag>/ and logs/mid_<tag>.jsonl under $NANOCHAT_BASE_DIR. The training data is
chosen in tasks/recipes.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from nanochat.chat_data import ConversationSource, count_tokens
from nanochat.checks import data_unseen, say_what_would_be_done, where
from nanochat.cli import COUNT, EVERY, FRACTION, POSITIVE, ROWS, Range, flag, run_main
from nanochat.dataloader import PackedLoader
from nanochat.dataset.identity import with_identity
from nanochat.distributed import Ranks, machine_first, on_main
from nanochat.evaluation.loss import EvalRows
from nanochat.recipe import MOST_ROWS, RECIPES, Rows, published
from nanochat.run import (
    ChatStageFlags,
    PeriodicAction,
    chat_data_choice,
    compile_wanted,
    fit_and_choose,
    is_trained,
    launch,
    loader_state,
    open_run,
    start_from_checkpoint,
    tokens_of_row,
)
from nanochat.stages import STAGES
from nanochat.training import TrainingPlan, share_of_micro_batches
from tasks import recipes

MID = published.mid


@dataclass
class Config(ChatStageFlags):
    """Flags of mid_train; the defaults are the published recipe."""

    num_epochs: float = flag(MID.num_epochs, "how often to go through the data", within=POSITIVE)
    max_seq_len: int = flag(MID.max_seq_len, "tokens in a row; -1 = as the base model",
                            within=Range(1, 1 << 24, also=-1))
    device_batch_size: Rows = flag(MID.device_batch_size,
                                   "rows a device takes at a time; auto is what fits its memory", within=ROWS)
    total_batch_size: int = flag(MID.total_batch_size, "tokens of all devices in an optimizer step", within=COUNT)
    warmdown_ratio: float = flag(MID.rates.warmdown_ratio, "part of the steps over which the learning rates fall",
                                 within=FRACTION)
    eval_every: int = flag(MID.eval_every, "steps from one validation to the next; -1 = at the end only", within=EVERY)
    eval_tokens: int = flag(MID.eval_tokens, "tokens to validate on", within=COUNT)
    compile: str = flag("auto", "compile the blocks with torch.compile: yes, no, or auto (on GPUs)")


def main(argv: Sequence[str] | None = None) -> None:
    """Train as the flags say. Raises UserError for what the user can mend."""
    launch(Config, run, argv, __doc__)


def run(config: Config, ranks: Ranks) -> None:
    """Run mid-training on these ranks."""
    compiled = compile_wanted(config.compile, ranks)
    origin = start_from_checkpoint(STAGES["mid"], "base", config, ranks)
    model, tokenizer = origin.model, origin.tokenizer
    T = tokens_of_row(config, model)
    share_of_micro_batches(config.total_batch_size, config.device_batch_size, T, ranks)  # raises early
    data = chat_data_choice(config, origin.meta)
    if config.dry_run and data_unseen(data.source, config, origin, ranks):
        return
    train_task, val_task = machine_first(lambda: recipes.mid(data.source, seed=data.seed, extra=data.extra), ranks)
    num_iterations = config.num_iterations
    if num_iterations <= 0:
        tokens = on_main("counting the tokens of the conversations", lambda: count_tokens(train_task, tokenizer), ranks)
        num_iterations = max(1, round(config.num_epochs * tokens / config.total_batch_size))
    if is_trained(origin, num_iterations, ranks):
        return
    origin = with_identity(origin, train_task.identity, val_task.identity, ranks)
    config, kernels = fit_and_choose(config, model, T, config.total_batch_size // T, MOST_ROWS["mid"], ranks,
                                     meta=origin.meta if origin.step else {}, compiled=compiled)
    B = config.device_batch_size
    micro_batches = share_of_micro_batches(config.total_batch_size, B, T, ranks)
    lines = [f"{num_iterations:,} steps of {config.total_batch_size:,} tokens from {len(train_task):,} conversations; "
             f"{where(model, ranks)}"]
    if config.dry_run:
        return say_what_would_be_done(origin, config, ranks, num_iterations, lines)
    source = ConversationSource(tokenizer, train_task, config.seed)
    loader = PackedLoader(source, B, T, ranks=ranks, rows_per_step=config.total_batch_size // T, cut=False,
                          state=loader_state(origin))
    recipe = RECIPES[config.recipe].mid
    plan = TrainingPlan(num_iterations, micro_batches, config.total_batch_size, clip=config.grad_clip or None,
                        rates=replace(recipe.rates, warmdown_ratio=config.warmdown_ratio),
                        muon_momentum=recipe.momentum)
    with loader, open_run(origin, config, ranks, num_iterations=num_iterations, loader=loader, kernels=kernels,
                          val_bpb=None) as run:
        run.introduce(lines, data=data.source, flops_per_token=model.flops_per_token(T), conversations=len(train_task))
        token_bytes = tokenizer.token_bytes().to(ranks.device)
        val_rows = EvalRows(ConversationSource(tokenizer, val_task), B, T, config.eval_tokens, ranks=ranks, cut=False)
        run.train(lambda step: (next(loader) for _ in range(micro_batches)), plan, [
            PeriodicAction(config.eval_every, lambda step: run.evaluate_bpb(step, val_rows, token_bytes),
                           at_zero=True),
            *([PeriodicAction(-1, lambda step: run.evaluate_bpb(step, val_rows, token_bytes, whole=False),
                              at_start=True, at_end=False)] if config.eval_every <= 0 and not origin.step else []),
            PeriodicAction(-1, lambda step: run.sample_answers(step, val_task)),
        ])
        run.log.record("packing", **loader.counts)
        bpb = run.results["val_bpb"]
        run.finish(f"validation bpb {bpb:.4f}", bpb=bpb)


if __name__ == "__main__":
    run_main(main)
