"""Reinforcement learning: the model is rewarded for right answers to problems that it solves with the calculator.

    python -m scripts.chat_rl
    torchrun --standalone --nproc_per_node=8 -m scripts.chat_rl -- --run=NAME

The problems are GSM8K, or the sums of the small world. The same command resumes a run that was stopped. Files:
chatrl_checkpoints/<tag>/ and logs/rl_<tag>.jsonl under $NANOCHAT_BASE_DIR. The method is described in nanochat/rl.py.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from nanochat.chat_data import ConversationSteps
from nanochat.checks import data_unseen, say_what_would_be_done, where
from nanochat.cli import COUNT, EVERY, NOT_NEGATIVE, POSITIVE, ROWS, TOP_K, Range, flag, run_main
from nanochat.dataset.identity import with_identity
from nanochat.distributed import Ranks, machine_first
from nanochat.engine import Engine
from nanochat.recipe import MOST_ROWS, RECIPES, Rows, published
from nanochat.rl import batches, pass_rates, rollout_stats, rollouts, standard_error
from nanochat.run import (
    ChatStageFlags,
    PeriodicAction,
    chat_data_choice,
    fit_and_choose,
    is_trained,
    launch,
    open_run,
    save_every_flag,
    start_from_checkpoint,
    steps_state,
)
from nanochat.stages import STAGES
from nanochat.training import TrainingPlan, clock, train_step
from tasks import recipes

STAGE, RL = STAGES["rl"], published.rl


@dataclass
class Config(ChatStageFlags):
    """Flags of chat_rl. The defaults are the published recipe, except for top_k: there the model sampled from the 50
    most likely tokens and learnt as if from all."""

    stage: ClassVar[str] = "rl"

    source: Literal[STAGE.starts_from] = flag(STAGE.starts_from[0], "stage to start from")
    num_epochs: float = flag(RL.num_epochs, "how often to go through the problems", within=POSITIVE)
    device_batch_size: Rows = flag(RL.device_batch_size,
                                   "answers a device learns from at a time; auto is what fits its memory", within=ROWS)
    rollout_batch_size: int = flag(RL.rollout_batch_size, "answers a device writes at a time", within=ROWS)
    examples_per_step: int = flag(RL.examples_per_step, "problems of all devices in an optimizer step", within=COUNT)
    num_samples: int = flag(RL.num_samples,
                            "answers to each problem, 2 or more: their rewards are compared with one another",
                            within=Range(2, 1 << 20))
    max_new_tokens: int = flag(RL.max_new_tokens, "tokens of an answer at most", within=COUNT)
    temperature: float = flag(RL.temperature, "sampling temperature; only 1 is on-policy",
                              within=Range(above=0, high=100))
    top_k: int = flag(RL.top_k, "sample from this many most likely tokens; 0 = all, and only that is on-policy",
                      within=TOP_K)
    init_lr_frac: float = flag(RL.init_lr_frac, "factor of all learning rates", within=NOT_NEGATIVE)
    save_every: int = save_every_flag(RL.save_every)
    eval_every: int = flag(RL.eval_every, "steps from one evaluation to the next; -1 = before and after only",
                           within=EVERY)
    eval_examples: int = flag(RL.eval_examples, "problems of the test in an evaluation", within=COUNT)
    eval_samples: int = flag(RL.eval_samples, "answers to each of them, for pass@1 to pass@this", within=ROWS)


def main(argv: Sequence[str] | None = None) -> None:
    """Train as the flags say. Raises UserError for what the user can mend."""
    launch(Config, run, argv, __doc__)


def run(config: Config, ranks: Ranks) -> None:
    """Run reinforcement learning on these ranks."""
    origin = start_from_checkpoint(STAGE, config.source, config, ranks)
    data = chat_data_choice(config, origin.meta)
    if config.dry_run and data_unseen(data.source, config, origin, ranks):
        return
    train, test = machine_first(lambda: [recipes.rl(data.source, split, seed=data.seed) for split in ("train", "test")],
                                ranks)
    origin = with_identity(origin, train.identity, test.identity, ranks)  # first: it names what changed
    problems = ConversationSteps(train, config.seed, config.examples_per_step, origin.step, steps_state(origin))
    num_iterations = config.num_iterations
    if num_iterations <= 0:
        num_iterations = max(1, round(config.num_epochs * problems.count / config.examples_per_step))
    if is_trained(origin, num_iterations, ranks):
        return
    config, kernels = fit_and_choose(config, origin.model, origin.model.config.sequence_len, None, MOST_ROWS["rl"],
                                     ranks, meta=origin.meta if origin.step else {})
    recipe = RECIPES[config.recipe].rl
    plan = TrainingPlan(num_iterations, 0, None, clip=config.grad_clip or None, rates=recipe.rates,
                        muon_momentum=recipe.momentum)
    lines = [f"{num_iterations:,} steps of {config.examples_per_step} problems, {config.num_samples} answers to each; "
             f"{where(origin.model, ranks)}"]
    if config.dry_run:
        return say_what_would_be_done(origin, config, ranks, num_iterations, lines)
    sampling = {"max_tokens": config.max_new_tokens, "temperature": config.temperature, "top_k": config.top_k,
                "batch_size": config.rollout_batch_size}
    with open_run(origin, config, ranks, num_iterations=num_iterations, loader=problems, kernels=kernels) as run:
        log, guard = run.log, run.guard
        run.introduce(lines, data=data.source, problems=problems.count)
        engine, bos = Engine(origin.model, origin.tokenizer), origin.tokenizer.get_bos_token_id()

        def evaluate(step: int) -> None:
            count = min(config.eval_examples, len(test))
            mine = range(ranks.rank, count, ranks.world_size)
            groups = rollouts(engine, test, [test[i] for i in mine], list(mine), config.eval_samples, **sampling)
            rates = pass_rates(groups, count, config.eval_samples, ranks)
            log.say(f"step {step:05d} | " + ", ".join(f"{name} {rate:.1%}" for name, rate in rates.items()))
            error = standard_error(groups, count, ranks)
            log.record("pass", step=step, **rates, error=error)
            run.progress.measure_rate(step, num_iterations, "pass@1", rates["pass@1"], error)
            if step == num_iterations:
                run.results["rates"] = rates

        def one_step(step: int, stop: bool) -> bool:
            began, scale = time.perf_counter(), plan.lr_scale(step)
            numbers = problems.take(step)[ranks.rank::ranks.world_size]
            origin.model.eval()
            groups = rollouts(engine, problems.task, [problems[number] for number in numbers],
                              [config.seed + 1 + number for number in numbers], config.num_samples, **sampling)
            drawing = time.perf_counter() - began
            stats = rollout_stats(groups, stop, ranks)
            loss = norm = 0.0
            if stats.teaching:
                micro_batches = guard.recorded(step, batches(groups, config.device_batch_size, bos, ranks.device))
                trained = train_step(origin.model, run.optimizer, micro_batches, ranks, lr_scale=scale,
                                     momentum=plan.momentum(step), decay_scale=plan.decay_scale(step), clip=plan.clip,
                                     limits=guard.limits(step), before_update=guard.check_due(step))
                guard.watch(step, trained)
                guard.settle()
                loss, norm = trained[:2].tolist()
            seconds = time.perf_counter() - began
            log.say(f"step {step + 1:05d}/{num_iterations:05d} | reward {stats.reward:.3f} | {stats.teaching} of "
                    f"{config.examples_per_step} groups teach | {stats.ended:.0%} end, {stats.tokens:.0f} tokens | "
                    f"norm {norm:.2f} | lr x{scale:.2f} | {drawing:.1f} + {seconds - drawing:.1f} s | "
                    f"{clock((num_iterations - step - 1) * seconds)} left")
            log.record("rl", step=step + 1, reward=stats.reward, kept_groups=stats.teaching,
                       sequence_length=stats.tokens, ended=stats.ended, loss=loss, norm=norm, lr_scale=scale,
                       seconds=seconds, rollout_seconds=drawing)
            return stats.stop

        run.train_by(one_step, [
            PeriodicAction(config.eval_every, evaluate, at_start=True),
            PeriodicAction(-1, lambda step: run.sample_answers(step, test)),
        ])
        rates = run.results["rates"]
        run.finish(", ".join(f"{name} {rate:.1%}" for name, rate in rates.items()), **rates)


if __name__ == "__main__":
    run_main(main)
