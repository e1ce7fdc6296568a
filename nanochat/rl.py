"""Reinforcement learning by rewards on whole answers: rollouts, advantages, batches for the training step, pass@k.

For each problem some answers are drawn from the model as it is (on-policy, so no ratio and no clipping is needed). The advantage of an
answer is its reward less the mean reward of its group; a group whose answers are all worth the same teaches nothing and is left out.
The gradient is that of −Σ advantage · log p(token) / N over the N sampled tokens of the whole step, the closing token among them; what
the calculator put in was not the model's choice and is not rewarded.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import comb
from typing import Any

import torch
from torch import Tensor

from nanochat.chat_data import batch_of
from nanochat.engine import Engine, Row


@dataclass
class Group:
    """The answers to one problem, with their rewards."""

    rows: list[Row]
    rewards: list[float]

    @property
    def advantages(self) -> list[float]:
        mean = sum(self.rewards) / len(self.rewards)
        return [reward - mean for reward in self.rewards]

    @property
    def teaches(self) -> bool:
        """Are not all answers worth the same?"""
        return max(self.rewards) > min(self.rewards)


def rollouts(engine: Engine, task: Any, conversations: Sequence[dict], seeds: Sequence[int], num_samples: int, **options: Any
             ) -> list[Group]:
    """Return a group of num_samples answers to each problem of a task, with the task's rewards.

    seeds: one a problem. options: of Engine.complete (max_tokens, …).
    """
    prompts = [engine.tokenizer.render_for_completion(conversation) for conversation in conversations]
    groups = []
    for conversation, rows in zip(conversations, engine.generate_many(prompts, num_samples, seed=list(seeds), **options)):
        texts = [engine.tokenizer.decode([token for token in row.tokens if token not in engine.stops]) for row in rows]
        groups.append(Group(rows, [task.reward(conversation, text) for text in texts]))
    return groups


def batches(groups: Sequence[Group], device_batch_size: int, pad: int, device: torch.device | str
            ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield (inputs, targets, factors), each (B, T), of the groups that teach: targets are the sampled tokens, −1 elsewhere; factors are
    the advantages. At most device_batch_size answers each, alike in length, padded on the right."""
    answers = [(row, advantage) for group in groups if group.teaches for row, advantage in zip(group.rows, group.advantages)]
    answers.sort(key=lambda answer: len(answer[0].prompt) + len(answer[0].tokens))
    for start in range(0, len(answers), device_batch_size):
        part = answers[start:start + device_batch_size]
        inputs, targets = batch_of([([*row.prompt, *row.tokens], [0] * len(row.prompt) + row.mask) for row, _ in part], pad, device)
        factors = torch.tensor([advantage for _, advantage in part], device=inputs.device)
        yield inputs, targets, factors.unsqueeze(1).expand(targets.shape)


def pass_at_k(correct: int, samples: int, k: int) -> float:
    """Return the chance that of k answers, drawn from `samples` of which `correct` are right, one is (Chen et al. 2021, HumanEval)."""
    return 1.0 if samples - correct < k else 1 - comb(samples - correct, k) / comb(samples, k)
