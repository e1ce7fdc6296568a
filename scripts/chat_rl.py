"""Reinforcement learning: the model is rewarded for right answers to problems it solves with the calculator.

    python -m scripts.chat_rl
    torchrun --standalone --nproc_per_node=8 -m scripts.chat_rl -- --run=NAME

GSM8K, or the sums of the small world. The same command again goes on where it stopped. Files: chatrl_checkpoints/<tag>/ and
logs/rl_<tag>.jsonl under $NANOCHAT_BASE_DIR. How it works: nanochat/rl.py.
"""

import signal
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch

from nanochat.chat_data import Conversations
from nanochat.cli import flag, parse, run_main
from nanochat.distributed import Ranks, all_reduce_sum, joined_ranks
from nanochat.engine import Engine
from nanochat.errors import UserError
from nanochat.logs import RunLog
from nanochat.rl import batches, pass_at_k, rollouts
from nanochat.training import Plan, clock, need_finite, stop_signals, train_step
from scripts.stages import Stage, StageConfig
from tasks import recipes


@dataclass
class Config(StageConfig):
    """Flags of chat_rl; the defaults are the published recipe, but for top_k: it drew from the 50 likeliest and learnt as if from all."""

    source: Literal["sft", "mid"] = flag("sft", "stage to start from")
    num_epochs: float = flag(1.0, "how often to go through the problems")
    device_batch_size: int = flag(8, "answers a device learns from at a time")
    rollout_batch_size: int = flag(128, "answers a device writes at a time")
    examples_per_step: int = flag(16, "problems of all devices in an optimizer step")
    num_samples: int = flag(16, "answers to each problem, 2 or more: they are weighed against one another")
    max_new_tokens: int = flag(256, "tokens of an answer at most")
    temperature: float = flag(1.0, "of what is drawn; on-policy at 1 alone")
    top_k: int = flag(0, "draw from this many likeliest tokens; 0 = all, which alone is on-policy")
    init_lr_frac: float = flag(0.05, "what all rates are multiplied with")
    save_every: int = flag(60, "steps from one checkpoint to the next; -1 = at the end only")
    eval_every: int = flag(60, "steps from one evaluation to the next; -1 = before and after only")
    eval_examples: int = flag(400, "problems of the test in an evaluation")
    eval_samples: int = flag(8, "answers to each of them, for pass@1 to pass@this")


def main(argv: Sequence[str] | None = None) -> None:
    """Train as the flags say. Raises UserError for what the user can mend."""
    config = parse(Config, argv, __doc__)
    with joined_ranks(config.device_type) as ranks:
        run(config, ranks)


def run(config: Config, ranks: Ranks) -> None:
    """One run on these ranks."""
    least = {"examples_per_step": 1, "num_samples": 2, "device_batch_size": 1, "eval_examples": 1, "eval_samples": 1, "max_new_tokens": 1}
    for name, number in least.items():
        if getattr(config, name) < number:
            raise UserError(f"--{name.replace('_', '-')} must be at least {number}, not {getattr(config, name)}")
    stage = Stage("rl", config.source, config, ranks)
    problems = Conversations(recipes.rl(stage.data, "train", seed=stage.world), config.seed)
    test = recipes.rl(stage.data, "test", seed=stage.world)
    num_iterations = config.num_iterations
    if num_iterations <= 0:
        num_iterations = max(1, round(config.num_epochs * problems.count / config.examples_per_step))
    if stage.finished(num_iterations):
        return
    stage.make_optimizer()
    plan = Plan(num_iterations, 0, None, clip=config.grad_clip or None, warmdown_ratio=1.0)
    with RunLog("rl", stage.tag, asdict(config), wandb_run=config.run, enabled=ranks.is_main) as log, stop_signals() as asked:
        stage.introduce(log, num_iterations, f"{config.examples_per_step} problems, {config.num_samples} answers to each",
                        problems=problems.count)
        engine = Engine(stage.model, stage.tokenizer)
        for step in range(stage.start, num_iterations + 1):
            last = step == num_iterations
            if last or step in (0, stage.start) or config.eval_every > 0 and step % config.eval_every == 0:
                rates = evaluate(engine, test, config, ranks)
                log.say(f"step {step:05d} | " + ", ".join(f"{name} {rate:.1%}" for name, rate in rates.items()))
                log.record("pass", step=step, **rates)
            if last:
                stage.sample(log, step, test)
                stage.save(log, step, rates=rates)
                break
            if step > stage.start and config.save_every > 0 and step % config.save_every == 0:
                stage.save(log, step, config.keep)
            if one_step(engine, problems, stage, config, plan, step, log, bool(asked)):
                log.say(f"asked to stop: saving step {step + 1}")
                stage.save(log, step + 1)
                raise SystemExit(128 + (asked[0] if asked else signal.SIGTERM))
        stage.finish(log, num_iterations, ", ".join(f"{name} {rate:.1%}" for name, rate in rates.items()), **rates)


def one_step(engine: Engine, problems: Conversations, stage: Stage, config: Config, plan: Plan, step: int, log: RunLog, stop: bool) -> bool:
    """Draw answers, learn from them, say how it went; collective. Returns whether a rank was asked to stop."""
    began, ranks, model = time.perf_counter(), stage.ranks, stage.model
    numbers = range(step * config.examples_per_step, (step + 1) * config.examples_per_step)[ranks.rank::ranks.world_size]
    model.eval()
    groups = rollouts(engine, problems.task, [problems[number] for number in numbers], [config.seed + 1 + number for number in numbers],
                      config.num_samples, max_tokens=config.max_new_tokens, temperature=config.temperature, top_k=config.top_k,
                      batch_size=config.rollout_batch_size)
    drawn = time.perf_counter()
    told = torch.tensor([sum(sum(group.rewards) for group in groups), sum(len(group.rows) for group in groups),
                         sum(group.teaches for group in groups), sum(len(row.tokens) for group in groups for row in group.rows),
                         sum(row.ended == "stop" for group in groups for row in group.rows), stop],
                        device=ranks.device, dtype=torch.float32)  # said: a rank without a problem has whole numbers alone
    reward, answers, kept, tokens, ended, stopping = all_reduce_sum(told, ranks).tolist()
    loss = norm = 0.0
    if kept:
        micro_batches = batches(groups, config.device_batch_size, stage.tokenizer.get_bos_token_id(), ranks.device)
        stats = train_step(model, stage.optimizer, micro_batches, ranks, lr_scale=plan.lr_scale(step), clip=plan.clip)
        loss, norm = stats[:2].tolist()
        need_finite(step, loss, norm, log)
    seconds = time.perf_counter() - began
    log.say(f"step {step + 1:05d}/{plan.num_iterations:05d} | reward {reward / answers:.3f} | {kept:.0f} of {config.examples_per_step} "
            f"groups teach | {ended / answers:.0%} end, {tokens / answers:.0f} tokens | norm {norm:.2f} | lr x{plan.lr_scale(step):.2f} | "
            f"{drawn - began:.1f} + {seconds + began - drawn:.1f} s | {clock((plan.num_iterations - step - 1) * seconds)} left")
    log.record("rl", step=step + 1, reward=reward / answers, kept_groups=int(kept), sequence_length=tokens / answers, ended=ended / answers,
               loss=loss, norm=norm, lr_scale=plan.lr_scale(step), seconds=seconds, rollout_seconds=drawn - began)
    return stopping > 0


def evaluate(engine: Engine, test: Any, config: Config, ranks: Ranks) -> dict[str, float]:
    """Return pass@k for k = 1, 2, 4, … eval_samples on the first eval_examples problems of the test; collective."""
    count = min(config.eval_examples, len(test))
    mine = range(ranks.rank, count, ranks.world_size)
    groups = rollouts(engine, test, [test[index] for index in mine], list(mine), config.eval_samples, max_tokens=config.max_new_tokens,
                      temperature=config.temperature, top_k=config.top_k, batch_size=config.rollout_batch_size)
    ks = [k for k in (1, 2, 4, 8, 16, 32, 64) if k <= config.eval_samples]
    sums = [sum(pass_at_k(sum(reward >= 1 for reward in group.rewards), len(group.rows), k) for group in groups) for k in ks]
    totals = all_reduce_sum(torch.tensor(sums, device=ranks.device, dtype=torch.float32), ranks).tolist()
    return {f"pass@{k}": total / count for k, total in zip(ks, totals)}


if __name__ == "__main__":
    run_main(main)
