"""Evaluation of a chat model on tasks: multiple choice by the logit of the letter, other tasks by the generated answer.

    result = evaluate_task(model, tokenizer, task, ranks, batch_size=32)
    result.accuracy, result.rows          # rows: one dict for each problem, which shows what the model answered
    chatcore({"GSM8K": 0.05, "MMLU": 0.32}, {"GSM8K": 0.0, "MMLU": 0.25})

A task has name, kind, chance, len, [i] → conversation, and evaluate(conversation, answer): see tasks/base.py.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from nanochat.distributed import Ranks, gather_objects
from nanochat.engine import Engine
from nanochat.errors import UserError
from nanochat.ragged import length_on, padded

BATCH_TOKENS = 1 << 14  # of multiple-choice prompts in one forward, padding included
TIE_MARGIN = 1e-3       # of logits, which batches change by about 1e-5


@dataclass
class TaskResult:
    """Result of a chat task.

    chance: accuracy of guessing.
    rows: for each problem its index, whether it was correct, the question, the answers and the reference answer. Where
        answers are generated, also which were cut at the limit of tokens, and whether it was correct by two other
        readings: `as_published` grades a cut answer as if it were whole, `lenient` takes other usual forms.
    """

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

    @property
    def cut(self) -> tuple[int, int]:
        """How many answers were cut at the limit, and how many there are; (0, 0) where none is generated."""
        flags = [cut for row in self.rows for cut in row.get("cut", ())]
        return sum(flags), len(flags)

    def share(self, reading: str) -> float:
        """Return the accuracy by another reading, "as_published" or "lenient"."""
        return sum(row.get(reading, row["correct"]) for row in self.rows) / self.count if self.rows else 0.0

    def readings(self) -> dict[str, float]:
        """Return what a log says beside the accuracy: cut, answers, as_published, lenient; {} for multiple choice."""
        cut, answers = self.cut
        return {"cut": cut, "answers": answers, "as_published": self.share("as_published"),
                "lenient": self.share("lenient")} if answers else {}

    def notes(self) -> list[str]:
        """Return in sentences what the accuracy leaves out: cut answers, and right ones in another form."""
        (cut, answers), found = self.cut, []
        if cut:
            found.append(f"{cut} of {answers} answers were cut at the limit and count as wrong; "
                         f"{self.share('as_published'):.1%} with them, as published")
        if self.share("lenient") > self.accuracy:
            found.append(f"{self.share('lenient'):.1%} read leniently")
        return found


def chatcore(accuracy: dict[str, float], chance: dict[str, float]) -> float:
    """Return the mean over tasks of (accuracy − chance) / (1 − chance): 0 for guessing, 1 for all problems right."""
    return sum((accuracy[name] - chance[name]) / (1 - chance[name]) for name in accuracy) / len(accuracy)


def evaluate_task(model, tokenizer, task: Any, ranks: Ranks, *, batch_size: int = 32, max_problems: int = -1,
                  num_samples: int = 1, max_tokens: int = 512, temperature: float = 0.0, top_k: int | None = None,
                  seed: int = 42, progress: Callable[[int, int, int], object] = lambda done, count, correct: None
                  ) -> TaskResult:
    """Evaluate a model on a task. Collective; in float32 on a CPU the result does not depend on the number of ranks.

    On a GPU, or in fewer bits, other rows in a batch round its logits differently, so that answers to problems that are
    nearly a tie may differ.

    A generated answer that was cut at max_tokens is wrong, whatever it holds so far: "#### 1800" cut to "#### 18" is
    not 18.

    Args:
        model: a GPT.
        tokenizer: its tokenizer.
        task: multiple choice ("categorical") or with generated answers ("generative").
        ranks: rank r has problems r, r + world_size, ...
        batch_size: sequences in one batch.
        max_problems: the first ones are evaluated; -1 takes all.
        num_samples: answers to a problem of a generative task; one correct answer is enough (pass@k).
        max_tokens: of an answer.
        temperature, top_k, seed: how answers are sampled; temperature 0 is greedy.
        progress: called as progress(done, count, correct) after each problem of this rank.

    Raises:
        UserError: for a task that has no grading; the model gives NaN.
    """
    began = time.perf_counter()
    count = len(task) if max_problems < 0 else min(max_problems, len(task))
    indices = range(ranks.rank, count, ranks.world_size)
    if task.kind == "categorical":
        graded = _grade_choices(model, tokenizer, task, indices, batch_size)
    elif task.kind == "generative":
        graded = _grade_generated(model, tokenizer, task, indices, num_samples=num_samples, max_tokens=max_tokens,
                                  temperature=temperature, top_k=top_k, seed=seed, batch_size=batch_size)
    else:
        raise UserError(f"{task.name} is training data: its answers are not graded.")
    rows = []
    for row in graded:
        rows.append(row)
        progress(len(rows), len(indices), sum(row["correct"] for row in rows))
    rows = sorted((row for part in gather_objects(rows, ranks) for row in part), key=lambda row: row["index"])
    return TaskResult(task.name, task.chance, rows, time.perf_counter() - began)


def _row(index: int, correct: bool, conversation: dict, answers: list[str]) -> dict[str, Any]:
    messages = conversation["messages"]
    return {"index": index, "correct": bool(correct), "question": messages[-2]["content"], "answers": answers,
            "reference": messages[-1]["content"]}


@torch.inference_mode()
def _grade_choices(model, tokenizer, task: Any, indices: range, batch_size: int) -> Iterator[dict[str, Any]]:
    """Yield the graded problems of a categorical task.

    The answer is the letter with the largest logit as the first token of the assistant. Longest prompts come first.
    In float32, a prompt whose best letters are nearly a tie goes through the model again, alone, so that its answer
    does not depend on what else is in its batch.
    """
    prompts = {}
    for index in indices:
        conversation = task[index]
        prompts[index] = conversation, tokenizer.render_for_completion(conversation)
    waiting = sorted(prompts, key=lambda index: -len(prompts[index][1]))
    while waiting:
        longest = length_on(model.device, len(prompts[waiting[0]][1]))
        B = max(1, min(batch_size, BATCH_TOKENS // longest))
        batch, waiting = waiting[:B], waiting[B:]
        ids, counts = padded([prompts[index][1] for index in batch], model.device, BATCH_TOKENS, batch_size)
        logits = model(ids, counts=counts, last_only=True)[:, 0].cpu()
        for i, index in enumerate(batch):
            conversation = prompts[index][0]
            letters = conversation["letters"]
            of_letters = [_letter_id(tokenizer, letter) for letter in letters]
            if model.dtype == torch.float32 and _nearly_tied(logits[i, of_letters]):
                logits[i] = model(torch.tensor([prompts[index][1]], device=model.device), last_only=True)[0, 0].cpu()
            best = letters[int(_finite(logits[i, of_letters]).argmax())]
            yield _row(index, task.evaluate(conversation, best), conversation, [best])


def _finite(logits: torch.Tensor) -> torch.Tensor:
    """Return the logits. Raises UserError where one is not finite: the largest of them would be any."""
    if not bool(logits.isfinite().all()):
        raise UserError("the model gives NaN or infinity instead of logits, so nothing can be graded: its weights are "
                        "damaged, or training had diverged. Evaluate an earlier checkpoint (--step).")
    return logits


def _nearly_tied(logits: torch.Tensor) -> bool:
    """Return whether the two largest of these logits (N,) are closer than TIE_MARGIN."""
    best = logits.topk(min(2, len(logits))).values
    return bool(best[0] - best[-1] < TIE_MARGIN)


def _letter_id(tokenizer, letter: str) -> int:
    ids = tokenizer.encode(letter)
    if len(ids) != 1:
        raise UserError(f"the letter {letter!r} is {len(ids)} tokens in this tokenizer; "
                        "multiple choice needs letters of one token.")
    return ids[0]


def _grade_generated(model, tokenizer, task: Any, indices: range, **options: Any) -> Iterator[dict[str, Any]]:
    """Yield the graded problems of a generative task in the order they finish. options: of Engine.complete."""
    engine = Engine(model, tokenizer)
    conversations = [task[index] for index in indices]
    prompts = [tokenizer.render_for_completion(conversation) for conversation in conversations]
    if prompts:  # what is sampled from NaN is some token, and no error
        with torch.inference_mode():
            _finite(model(padded(prompts[:1], model.device, BATCH_TOKENS)[0])[0, :len(prompts[0])])
    for number, samples in engine.complete(prompts, batch_invariant=True, **options):
        texts = [tokenizer.decode([token for token in row.tokens if token not in engine.stops]) for row in samples]
        cut = [row.ended != "stop" for row in samples]
        right = [bool(task.evaluate(conversations[number], text)) for text in texts]
        correct = any(good and not short for good, short in zip(right, cut))
        lenient = correct or any(not short and _lenient(task, conversations[number], text)
                                 for text, short in zip(texts, cut))
        yield _row(indices[number], correct, conversations[number], texts) | {
            "cut": cut, "as_published": any(right), "lenient": lenient}


def _lenient(task: Any, conversation: dict, text: str) -> bool:
    """Return whether an answer is right in another form; a task that is no subclass of Task may know none."""
    return hasattr(task, "evaluate_lenient") and bool(task.evaluate_lenient(conversation, text))
