"""Reinforcement learning with rewards for whole answers: rollouts, advantages, batches for the training step, pass@k.

For each problem several answers are sampled from the current model (on-policy, so no ratio and no clipping is needed).
The advantage of an answer is its reward minus the mean reward of its group; a group whose answers all have the same
reward teaches nothing and is left out. The gradient is that of −Σ advantage · log p(token) / N over the N sampled
tokens of the whole step, the closing token among them. Tokens that the calculator inserted were not the model's choice
and do not count. An answer that was cut at the limit of tokens earns nothing, whatever it holds so far.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import comb
from typing import Any

import torch
from torch import Tensor

from nanochat.chat_data import batch_of
from nanochat.distributed import Ranks, all_reduce_sum
from nanochat.engine import Engine, Row


@dataclass
class AnswerGroup:
    """The answers to one problem, with their rewards."""

    rows: list[Row]
    rewards: list[float]

    @property
    def advantages(self) -> list[float]:
        mean = sum(self.rewards) / len(self.rewards)
        return [reward - mean for reward in self.rewards]

    @property
    def teaches(self) -> bool:
        """Whether the rewards differ."""
        return max(self.rewards) > min(self.rewards)


@dataclass(frozen=True)
class RolloutStats:
    """What the answers of a step are like, over all ranks.

    Attributes:
        reward: mean.
        teaching: groups whose rewards differ.
        ended: fraction of answers that end with a closing token.
        tokens: mean of an answer.
        stop: whether a rank was asked to stop.
    """

    reward: float
    teaching: int
    ended: float
    tokens: float
    stop: bool


def rollouts(engine: Engine, task: Any, conversations: Sequence[dict], seeds: Sequence[int], num_samples: int,
             **options: Any) -> list[AnswerGroup]:
    """Draw num_samples answers to each problem of a task and return them with the task's rewards.

    An answer depends on the weights, its problem, its seed and its number alone. On a CPU that holds to the last bit,
    whatever is decoded beside it. On a GPU, where logits are the same up to rounding and a token may differ, it holds
    where the rows decoded together are those of one problem: with a batch_size of num_samples.

    Args:
        conversations: the problems. seeds: one for each.
        options: of Engine.complete (max_tokens, …).
    """
    prompts = [engine.tokenizer.render_for_completion(conversation) for conversation in conversations]
    groups = []
    answered = engine.generate_many(prompts, num_samples, seed=list(seeds), batch_invariant=True, **options)
    for conversation, rows in zip(conversations, answered):
        texts = [engine.tokenizer.decode([token for token in row.tokens if token not in engine.stops]) for row in rows]
        groups.append(AnswerGroup(rows, [reward_of(task, conversation, row, text) for row, text in zip(rows, texts)]))
    return groups


def reward_of(task: Any, conversation: dict, row: Row, text: str) -> float:
    """Return the reward of an answer: the task's if the model ended it, 0 if it was cut ("#### 1800" to "#### 18")."""
    return task.reward(conversation, text) if row.ended == "stop" else 0.0


def rollout_stats(groups: Sequence[AnswerGroup], stop: bool, ranks: Ranks) -> RolloutStats:
    """Return what the answers of all ranks are like. Collective. stop: whether this rank was asked to stop."""
    rows = [row for group in groups for row in group.rows]
    sums = _sums([sum(sum(group.rewards) for group in groups), len(rows), sum(group.teaches for group in groups),
                  sum(len(row.tokens) for row in rows), sum(row.ended == "stop" for row in rows), stop], ranks)
    reward, answers, teaching, tokens, ended, stopping = sums
    return RolloutStats(reward / answers, int(teaching), ended / answers, tokens / answers, stopping > 0)


def batches(groups: Sequence[AnswerGroup], device_batch_size: int, pad: int, device: torch.device | str
            ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield micro-batches of the groups that teach.

    Args:
        device_batch_size: answers of a micro-batch at most; they are alike in length and padded on the right.
        pad: the token that fills the inputs.

    Yields:
        (inputs, targets, factors), each (B, T): targets are the sampled tokens, −1 elsewhere; factors are the
        advantages.
    """
    answers = [(row, advantage) for group in groups if group.teaches
               for row, advantage in zip(group.rows, group.advantages)]
    answers.sort(key=lambda answer: len(answer[0].prompt) + len(answer[0].tokens))
    for start in range(0, len(answers), device_batch_size):
        part = answers[start:start + device_batch_size]
        rows = [([*row.prompt, *row.tokens], [0] * len(row.prompt) + row.mask) for row, _ in part]
        inputs, targets = batch_of(rows, pad, device, device_batch_size)
        advantages = [advantage for _, advantage in part]
        factors = torch.tensor(advantages + [0.0] * (len(inputs) - len(part)), device=inputs.device)
        yield inputs, targets, factors.unsqueeze(1).expand(targets.shape)


def pass_rates(groups: Sequence[AnswerGroup], problems: int, samples: int, ranks: Ranks) -> dict[str, float]:
    """Return pass@k for k = 1, 2, 4, … samples, where a right answer has a reward of 1 or more. Collective.

    Args:
        groups: of this rank. problems: of all ranks. samples: answers to each problem.
    """
    ks = [k for k in (1, 2, 4, 8, 16, 32, 64) if k <= samples]
    right = [sum(reward >= 1 for reward in group.rewards) for group in groups]
    sums = [sum(pass_at_k(correct, len(group.rows), k) for correct, group in zip(right, groups)) for k in ks]
    return {f"pass@{k}": total / problems for k, total in zip(ks, _sums(sums, ranks))}


def _sums(numbers: Sequence[float], ranks: Ranks) -> list[float]:
    """Add up numbers over all ranks. Collective."""
    precise = torch.float32 if ranks.device.type == "mps" else torch.float64  # mps has no float64
    return all_reduce_sum(torch.tensor(numbers, device=ranks.device, dtype=precise), ranks).tolist()


def standard_error(groups: Sequence[AnswerGroup], problems: int, ranks: Ranks) -> float:
    """Return the standard error of pass@1 as the mean over problems. Collective. Arguments are those of `pass_rates`.

    The problems are the sample: their own shares of right answers say how much the mean would vary with others.
    """
    shares = [sum(reward >= 1 for reward in group.rewards) / len(group.rows) for group in groups]
    sums = _sums([sum(shares), sum(share * share for share in shares)], ranks)
    mean, square = (total / problems for total in sums)
    return math.sqrt(max(0.0, square - mean * mean) / max(1, problems - 1))


def pass_at_k(correct: int, samples: int, k: int) -> float:
    """Return the chance that at least one of k answers is right, chosen from `samples` answers of which `correct` are
    right.

    Chen et al. 2021, "Evaluating Large Language Models Trained on Code".
    """
    return 1.0 if samples - correct < k else 1 - comb(samples - correct, k) / comb(samples, k)
