"""Grading a chat model on tasks: multiple choice by the letter's logit, the rest by what the model writes.

    result = evaluate_task(model, tokenizer, task, ranks, batch_size=32)
    result.accuracy, result.rows          # rows: one dict for each problem, to see why
    chatcore({"GSM8K": 0.05, "MMLU": 0.32}, {"GSM8K": 0.0, "MMLU": 0.25})

A task is anything with name, kind, chance, len, [i] → conversation, evaluate(conversation, answer): see tasks/base.py.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from nanochat.distributed import Ranks, gather_objects
from nanochat.engine import Engine
from nanochat.errors import UserError
from nanochat.gpt import padded

BATCH_TOKENS = 1 << 14  # of multiple-choice prompts in one call of the model, padding included


@dataclass
class TaskResult:
    """What one task gave. rows: for each problem its index, whether it was right, the question, the answers and the reference."""

    name: str
    chance: float
    rows: list[dict[str, Any]]
    seconds: float

    @property
    def count(self) -> int:
        return len(self.rows)

    @property
    def correct(self) -> int:
        return sum(row["correct"] for row in self.rows)

    @property
    def accuracy(self) -> float:
        return self.correct / self.count if self.rows else 0.0


def chatcore(accuracy: dict[str, float], chance: dict[str, float]) -> float:
    """Return the mean over tasks of (accuracy − chance) / (1 − chance): 0 is guessing, 1 is all right."""
    return sum((accuracy[name] - chance[name]) / (1 - chance[name]) for name in accuracy) / len(accuracy)


def evaluate_task(model, tokenizer, task: Any, ranks: Ranks, *, batch_size: int = 32, max_problems: int = -1, num_samples: int = 1,
                  max_tokens: int = 512, temperature: float = 0.0, top_k: int | None = None, seed: int = 42,
                  progress: Callable[[int, int, int], object] = lambda done, count, correct: None) -> TaskResult:
    """Grade the model on the first max_problems problems of a task (all where −1); collective, the same on any number of ranks.

    A generative problem is right if one of its num_samples answers is. batch_size: rows decoded together. progress(done, count, correct) is
    called as this rank's problems get done. Raises UserError for a task that cannot be graded.
    """
    began = time.perf_counter()
    count = len(task) if max_problems < 0 else min(max_problems, len(task))
    mine = range(ranks.rank, count, ranks.world_size)
    if task.kind == "categorical":
        graded = _choices(model, tokenizer, task, mine, batch_size)
    elif task.kind == "generative":
        graded = _answers(model, tokenizer, task, mine, num_samples=num_samples, max_tokens=max_tokens, temperature=temperature,
                          top_k=top_k, seed=seed, batch_size=batch_size)
    else:
        raise UserError(f"{task.name} is training data: its answers are not graded.")
    rows = []
    for row in graded:
        rows.append(row)
        progress(len(rows), len(mine), sum(row["correct"] for row in rows))
    rows = sorted((row for part in gather_objects(rows, ranks) for row in part), key=lambda row: row["index"])
    return TaskResult(task.name, task.chance, rows, time.perf_counter() - began)


def _row(index: int, correct: bool, conversation: dict, answers: list[str]) -> dict[str, Any]:
    messages = conversation["messages"]
    return {"index": index, "correct": bool(correct), "question": messages[-2]["content"], "answers": answers,
            "reference": messages[-1]["content"]}


@torch.inference_mode()
def _choices(model, tokenizer, task: Any, indices: range, batch_size: int) -> Iterator[dict[str, Any]]:
    """Yield the graded problems of a categorical task: the answer is the letter with the largest logit where the assistant begins."""
    prompts = {}
    for index in indices:
        conversation = task[index]
        prompts[index] = conversation, tokenizer.render_for_completion(conversation)
    order = sorted(prompts, key=lambda index: -len(prompts[index][1]))
    while order:
        longest = len(prompts[order[0]][1])
        part = order[:max(1, min(batch_size, BATCH_TOKENS // longest))]
        order = order[len(part):]
        ids, counts = padded([prompts[index][1] for index in part], model.device)
        logits = model(ids, counts=counts, last_only=True)[:, 0].cpu()
        for i, index in enumerate(part):
            conversation = prompts[index][0]
            letters = conversation["letters"]
            best = letters[int(logits[i, [_letter_id(tokenizer, letter) for letter in letters]].argmax())]
            yield _row(index, task.evaluate(conversation, best), conversation, [best])


def _letter_id(tokenizer, letter: str) -> int:
    ids = tokenizer.encode(letter)
    if len(ids) != 1:
        raise UserError(f"the letter {letter!r} is {len(ids)} tokens in this tokenizer; multiple choice needs letters of one token.")
    return ids[0]


def _answers(model, tokenizer, task: Any, indices: range, **options: Any) -> Iterator[dict[str, Any]]:
    """Yield the graded problems of a generative task as they get done. options: of Engine.complete."""
    engine = Engine(model, tokenizer)
    conversations = [task[index] for index in indices]
    prompts = [tokenizer.render_for_completion(conversation) for conversation in conversations]
    for number, samples in engine.complete(prompts, **options):
        texts = [tokenizer.decode([token for token in row.tokens if token not in engine.stops]) for row in samples]
        correct = any(task.evaluate(conversations[number], text) for text in texts)
        yield _row(indices[number], correct, conversations[number], texts)
