"""CORE: how well a base model does on DCLM's tasks, each centred so that guessing gives 0 and all right gives 1; the mean over them.

    result = evaluate_core(model, tokenizer, open_bundle(), max_per_task=500, ranks=ranks, say=print)
    result.core, result.tasks["arc_easy"].accuracy, result.tasks["arc_easy"].centered

Three kinds of task. Multiple choice and schema: of several texts, the one whose last part has the lowest mean loss a token is the answer.
Language modelling: right where every token of the continuation is the likeliest one. `judge_plain` is the definition, one prompt at a time;
`judge` gives the same answers: what prompts begin with in common goes through the model once, prompts go in batches, and only positions
that are judged go through the head.
"""

import math
import os
import random
import time
from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat.distributed import Ranks, broadcast_object, gather_objects
from nanochat.errors import UserError
from nanochat.evaluation.core_bundle import Bundle, CoreTask, open_bundle
from nanochat.gpt import padded

ALONE = Ranks(rank=0, local_rank=0, world_size=1, device=torch.device("cpu"))
POSITIONS = 10  # prompts may be this many times as long as sequence_len, as in the published code, which then fails; ours cuts on the left
TOKENS_AT_ONCE = {"cuda": 1 << 15, "cpu": 1 << 11}  # through the model, padding included; what falls out of its caches is slow on a CPU
LOGITS_AT_ONCE = 1 << 26  # 256 MB of float32
IDS_AT_ONCE = 1 << 22  # ids of prompts held in memory and searched for common beginnings
WORTH_SHARING = 32  # tokens saved, below which going through the model in two steps costs more
NEAR = 1e-3  # nats, or logits: what is closer than this in float32 is judged anew one prompt at a time; batches differ by some 1e-5


@dataclass(frozen=True)
class Question:
    """Prompts as ids, bos first, each judged on its tokens from `starts` on. gold: the right one; None for language modelling."""

    prompts: list[list[int]]
    starts: list[int]
    gold: int | None


@dataclass(frozen=True)
class Verdict:
    """What came of a question. losses: mean nats a judged token of each prompt (NaN where nothing is judged)."""

    correct: bool
    losses: list[float]


@dataclass
class TaskResult:
    """accuracy, and the same centred: 0 for guessing, 1 for all right; verdicts in the order of the examples."""

    accuracy: float
    centered: float
    seconds: float
    verdicts: list[Verdict] = field(repr=False)


@dataclass
class CoreResult:
    """core: the mean of `centered` over tasks, by label."""

    core: float
    tasks: dict[str, TaskResult]
    seconds: float
    max_per_task: int

    def record(self) -> dict[str, Any]:
        """What a log keeps of it."""
        return {"core": self.core, "max_per_task": self.max_per_task, "seconds": self.seconds,
                "tasks": {label: {"accuracy": task.accuracy, "centered": task.centered} for label, task in self.tasks.items()}}


def bundle_of_ranks(folder: str | Path | None, ranks: Ranks, *, fetch: bool = True, say: Callable[[str], None] = print) -> Bundle:
    """`open_bundle` for all ranks: rank 0 looks for it, and fetches it where it may; what goes wrong is raised on all. Collective."""
    return _on_main(lambda: open_bundle(folder, fetch=fetch, say=say), ranks)


def check_bundle(bundle: Bundle, max_per_task: int, ranks: Ranks = ALONE) -> None:
    """Read everything that will be asked, so that what is wrong with the last task is told before the first one. Collective.

    Raises UserError, on all ranks alike.
    """
    def read() -> None:
        bundle.check()
        for task in bundle.tasks:
            examples_of(task, max_per_task)
    _on_main(read, ranks)


def _on_main(fn: Callable[[], Any], ranks: Ranks) -> Any:
    """What fn returns on rank 0, on all ranks; a UserError it raises is raised on all."""
    found = None
    if ranks.is_main:
        try:
            found = fn()
        except UserError as error:
            found = error
    found = broadcast_object(found, ranks)
    if isinstance(found, UserError):
        raise found
    return found


# ---- prompts

def examples_of(task: CoreTask, max_per_task: int = -1) -> list[dict[str, Any]]:
    """The rows of a task in the order they are asked, cut to max_per_task (-1: all). Raises UserError if too few are left."""
    rows = task.rows()
    random.Random(1337).shuffle(rows)
    if max_per_task > 0:
        rows = rows[:max_per_task]
    if len(rows) <= task.shots:
        raise UserError(f"the CORE task {task.label} puts {task.shots} other examples before each question, but has only {len(rows)} rows: "
                        f"use --max-per-task={task.shots + 1} or more")
    return rows


def texts_of(task: CoreTask, rows: list[dict[str, Any]], i: int) -> list[str]:
    """The prompts of example i as texts: one for each choice; for language modelling, without and with the continuation."""
    others = [j + (j >= i) for j in random.Random(1234 + i).sample(range(len(rows) - 1), task.shots)]
    between, row = task.delimiter, rows[i]
    if task.kind == "multiple_choice":
        before = [f"{r['query']}{between}{r['choices'][r['gold']]}" for r in map(rows.__getitem__, others)]
        asked = [f"{row['query']}{between}{choice}" for choice in row["choices"]]
    elif task.kind == "schema":
        before = [f"{r['context_options'][r['gold']]}{between}{r['continuation']}" for r in map(rows.__getitem__, others)]
        asked = [f"{context}{between}{row['continuation']}" for context in row["context_options"]]
    else:
        before = [f"{r['context'].strip()}{between}{r['continuation']}" for r in map(rows.__getitem__, others)]
        context = f"{row['context'].strip()}{between}"
        asked = [context, context + row["continuation"]]
    texts = ["\n\n".join([*before, last]) for last in asked]
    if task.kind == "language_modeling":
        texts[0] = texts[0].rstrip()  # a space there would be a token of its own, which the continuation's first one takes in
    return texts


def question_of(tokenizer, task: CoreTask, rows: list[dict[str, Any]], i: int) -> Question:
    """Example i of a task as ids. Raises UserError where the continuation's tokens do not stand behind the context's."""
    return _question(task, rows, i, tokenizer.encode(texts_of(task, rows, i), prepend=tokenizer.get_bos_token_id()))


def _question(task: CoreTask, rows: list[dict[str, Any]], i: int, prompts: list[list[int]]) -> Question:
    if task.kind == "multiple_choice":
        return Question(prompts, [common(prompts)] * len(prompts), rows[i]["gold"])
    if task.kind == "schema":
        shared = common([prompt[::-1] for prompt in prompts])
        return Question(prompts, [len(prompt) - shared for prompt in prompts], rows[i]["gold"])
    context, whole = prompts
    if len(whole) <= len(context) or whole[:len(context)] != context:
        raise UserError(f"the CORE task {task.label}, example {i} after the shuffle: with this tokenizer the ids of the context are not a "
                        f"beginning of those of context and continuation, so there is nothing to judge ({rows[i]['continuation']!r})")
    return Question([whole], [len(context)], None)


def common(rows: list[list[int]]) -> int:
    """How many ids all rows begin with in common."""
    low, high = min(rows), max(rows)  # in the order of lists, all others lie between these two
    shorter = min(len(low), len(high))
    # bisection over slices: comparing them runs in C, a loop over ids does not
    return bisect_left(range(1, shorter + 1), True, key=lambda n: low[:n] != high[:n])


def cut(question: Question, longest: int) -> Question:
    """The question with its prompts cut to their last `longest` ids; what is judged moves along."""
    if max(map(len, question.prompts)) <= longest:
        return question
    off = [max(0, len(prompt) - longest) for prompt in question.prompts]
    return Question([prompt[n:] for prompt, n in zip(question.prompts, off)],
                    [max(1, start - n) for start, n in zip(question.starts, off)], question.gold)


# ---- one at a time: the definition

@torch.no_grad()
def judge_plain(model, question: Question) -> Verdict:
    """Judge with a full forward of each prompt by itself."""
    losses, hits = [], []
    for prompt, start in zip(question.prompts, question.starts):
        ids = torch.tensor([prompt], device=model.device)
        logits = model(ids)[0, start - 1:-1]
        targets = ids[0, start:]
        losses.append(float(F.cross_entropy(logits, targets)) if len(targets) else math.nan)
        hits.append(bool((logits.argmax(-1) == targets).all()))
    return decide(question, losses, hits[0])


def decide(question: Question, losses: list[float], hit: bool) -> Verdict:
    """The prompt with the lowest loss is chosen, the first of equal ones; for language modelling, `hit` says it all.

    A choice that is a beginning of another one has nothing to judge and NaN as its loss: chosen only if it stands first, as published.
    """
    return Verdict(hit if question.gold is None else losses.index(min(losses)) == question.gold, losses)


# ---- many at a time

@dataclass
class _Row:
    """ids (without the last one of the prompt, which is only predicted), and the prompts that have just these: (question, prompt)."""

    ids: list[int]
    start: int  # the first judged id of any of them
    asked: list[tuple[int, int]]


@torch.no_grad()
def judge(model, questions: list[Question], tokens_at_once: int | None = None) -> list[Verdict]:
    """Judge all questions as `judge_plain` judges each. tokens_at_once: through the model, padding included; None goes by the device.

    In float32 what comes out too close to call is judged anew by `judge_plain`, so that answers do not depend on what is in a batch.
    """
    budget = tokens_at_once or TOKENS_AT_ONCE.get(model.device.type, 1 << 13)
    losses = [[math.nan] * len(question.prompts) for question in questions]
    margins = [[math.inf] * len(question.prompts) for question in questions]
    for rows, hidden, offsets in _passes(model, _groups(_rows(questions), 4 * budget), budget):
        _score(model, questions, rows, hidden, offsets, losses, margins)
    verdicts = []
    for question, loss, margin in zip(questions, losses, margins):
        if model.dtype == torch.float32 and _close(question, loss, margin):
            verdicts.append(judge_plain(model, question))
        else:
            verdicts.append(decide(question, loss, margin[0] > 0))
    return verdicts


def _close(question: Question, losses: list[float], margins: list[float]) -> bool:
    if question.gold is None:
        return abs(margins[0]) < NEAR
    first, second, *_ = [*sorted(loss for loss in losses if not math.isnan(loss)), math.inf, math.inf]
    return second - first < NEAR


def _rows(questions: list[Question]) -> list[_Row]:
    """All different rows of the questions, in the order of lists: what begins alike stands together."""
    found: dict[tuple[int, ...], _Row] = {}
    for q, question in enumerate(questions):
        for p, (prompt, start) in enumerate(zip(question.prompts, question.starts)):
            if start < len(prompt):
                row = found.setdefault(tuple(prompt[:-1]), _Row(prompt[:-1], start, []))
                row.start = min(row.start, start)
                row.asked.append((q, p))
    return sorted(found.values(), key=lambda row: row.ids)


def _groups(rows: list[_Row], limit: int) -> Iterator[tuple[int, list[_Row]]]:
    """Put rows that begin alike together: (ids in common that go through the model once, rows). limit: ids in the state of a group.

    A row joins where that saves something: n rows share `old` ids; n + 1 rows that share `new` save n·new instead of (n − 1)·old.
    """
    group: list[_Row] = []
    shared = longest = 0
    for row in rows:
        if group:
            new, n = min(shared, row.start - 1, common([group[-1].ids, row.ids])), len(group)
            if n * new - (n - 1) * shared >= WORTH_SHARING and (n + 1) * max(longest, len(row.ids)) <= limit:
                group.append(row)
                shared, longest = new, max(longest, len(row.ids))
                continue
            yield (shared if n > 1 else 0), group
        group, shared, longest = [row], row.start - 1, len(row.ids)
    if group:
        yield (shared if len(group) > 1 else 0), group


def _passes(model, groups: Iterator[tuple[int, list[_Row]]], budget: int) -> Iterator[tuple[list[_Row], Tensor, list[int]]]:
    """Run all groups through the model; yield rows, their hidden states (B, T, E), and which of its ids each of them begins with."""
    alone, together = [], []
    for shared, group in groups:
        (together if shared else alone).append((shared, group))
    alone.sort(key=lambda entry: -len(entry[1][0].ids))
    for part in _batches(alone, lambda part: len(part) * len(part[0][1][0].ids) <= budget):
        rows = [row for _, (row,) in part]
        ids, counts = padded([row.ids for row in rows], model.device)
        yield rows, model.hidden(ids, counts=counts), [0] * len(rows)
    together.sort(key=lambda entry: -entry[0])
    for part in _batches(together, lambda part: _fits(part, budget)):
        begun = [group[0].ids[:shared] for shared, group in part]
        cache = model.new_cache(len(part), max_len=max(len(row.ids) for _, group in part for row in group))
        ids, counts = padded(begun, model.device)
        model.hidden(ids, cache, counts)
        cache = cache.select([i for i, (_, group) in enumerate(part) for _ in group])
        rows = [row for _, group in part for row in group]
        offsets = [shared for shared, group in part for _ in group]
        ids, counts = padded([row.ids[offset:] for row, offset in zip(rows, offsets)], model.device)
        yield rows, model.hidden(ids, cache, counts), offsets


def _fits(part: list[tuple[int, list[_Row]]], budget: int) -> bool:
    """Do these groups stay within the budget: in the first step, in the second, and (fourfold) in what the state holds?"""
    count = sum(len(group) for _, group in part)
    rest = max(len(row.ids) - shared for shared, group in part for row in group)
    longest = max(len(row.ids) for _, group in part for row in group)
    return len(part) * part[0][0] <= budget and count * rest <= budget and count * longest <= 4 * budget


def _batches(entries: list, fits: Callable[[list], bool]) -> Iterator[list]:
    """Cut entries, in their order, into parts that fit; a part has one entry at least."""
    part: list = []
    for entry in entries:
        if part and not fits([*part, entry]):
            yield part
            part = []
        part.append(entry)
    if part:
        yield part


def _score(model, questions: list[Question], rows: list[_Row], hidden: Tensor, offsets: list[int], losses: list[list[float]],
           margins: list[list[float]]) -> None:
    """Enter the mean loss of each prompt of these rows, and by how much its judged ids are the likeliest (the least of them)."""
    where, targets, spans = [], [], []
    for b, (row, offset) in enumerate(zip(rows, offsets)):
        for q, p in row.asked:
            prompt, start = questions[q].prompts[p], questions[q].starts[p]
            spans.append((q, p, len(targets), len(targets) + len(prompt) - start))
            where.extend(b * hidden.shape[1] + t - offset for t in range(start - 1, len(prompt) - 1))
            targets.extend(prompt[start:])
    x = hidden.flatten(0, 1)[torch.tensor(where, device=hidden.device)]
    target = torch.tensor(targets, device=hidden.device)
    loss, margin = [], []
    for part in torch.arange(len(targets), device=hidden.device).split(max(1, LOGITS_AT_ONCE // model.config.vocab_size)):
        logits = model.head(x[part])
        loss.append(F.cross_entropy(logits, target[part], reduction="none"))
        (best, second), top = logits.topk(2).values.T, logits.gather(1, target[part, None])[:, 0]
        margin.append(top - torch.where(top == best, second, best))  # 0 in a tie: too close to call
    loss_of, margin_of = torch.cat(loss).cpu(), torch.cat(margin).cpu()
    for q, p, begin, end in spans:
        losses[q][p], margins[q][p] = float(loss_of[begin:end].mean()), float(margin_of[begin:end].min())


# ---- tasks

def evaluate_task(model, tokenizer, task: CoreTask, rows: list[dict[str, Any]], ranks: Ranks = ALONE,
                  judge: Callable[..., list[Verdict]] = judge) -> TaskResult:
    """Judge all rows of a task, rank r those from r on in steps of world_size; every rank gets all verdicts. Collective.

    Raises UserError, on all ranks alike, where a row cannot be asked with this tokenizer.
    """
    began = time.perf_counter()
    found: dict[int, Verdict] = {}
    error = ""
    try:
        for indices, questions in _questions(model, tokenizer, task, rows, range(ranks.rank, len(rows), ranks.world_size)):
            found.update(zip(indices, judge(model, questions)))
    except UserError as problem:
        error = str(problem)
    parts = gather_objects((found, error), ranks)
    if problems := [error for _, error in parts if error]:
        raise UserError(problems[0])
    together = {i: verdict for part, _ in parts for i, verdict in part.items()}
    verdicts = [together[i] for i in range(len(rows))]
    accuracy = sum(verdict.correct for verdict in verdicts) / len(verdicts)
    return TaskResult(accuracy, (accuracy - task.baseline) / (1 - task.baseline), time.perf_counter() - began, verdicts)


def _questions(model, tokenizer, task: CoreTask, rows: list[dict[str, Any]], indices: range) -> Iterator[tuple[list[int], list[Question]]]:
    """Questions in portions of some IDS_AT_ONCE ids, with the numbers of their examples."""
    bos, longest = tokenizer.get_bos_token_id(), POSITIONS * model.config.sequence_len
    numbers: list[int] = []
    questions: list[Question] = []
    size = 0
    for start in range(0, len(indices), 32):  # texts are encoded in parallel
        texts = [(i, texts_of(task, rows, i)) for i in indices[start:start + 32]]
        encoded = iter(tokenizer.encode([text for _, some in texts for text in some], prepend=bos))
        for i, some in texts:
            question = cut(_question(task, rows, i, [next(encoded) for _ in some]), longest)
            numbers.append(i)
            questions.append(question)
            size += sum(map(len, question.prompts))
        if size >= IDS_AT_ONCE:
            yield numbers, questions
            numbers, questions, size = [], [], 0
    if questions:
        yield numbers, questions


def evaluate_core(model, tokenizer, bundle: Bundle, max_per_task: int = -1, *, ranks: Ranks = ALONE,
                  say: Callable[[str], None] = lambda text: None) -> CoreResult:
    """Return CORE and what it is made of. max_per_task: examples of each task; -1 takes all. Collective.

    On a CPU the model computes in float32 whatever it trains in: near ties then fall as they did in publication. Raises UserError for a
    bundle with files missing or broken.
    """
    check_bundle(bundle, max_per_task, ranks)
    began, dtype = time.perf_counter(), model.compute_dtype
    if model.device.type == "cpu" and not os.environ.get("NANOCHAT_DTYPE"):
        model.compute_dtype = torch.float32
    tasks = {}
    try:
        for number, task in enumerate(bundle.tasks, 1):
            result = tasks[task.label] = evaluate_task(model, tokenizer, task, examples_of(task, max_per_task), ranks)
            say(f"CORE {number:2d}/{len(bundle.tasks)} {task.label:32s} accuracy {result.accuracy:.4f}  centered {result.centered:7.4f}  "
                f"{len(result.verdicts):6,d} examples  {result.seconds:6.1f} s")
    finally:
        model.compute_dtype = dtype
    core = sum(result.centered for result in tasks.values()) / len(tasks)
    return CoreResult(core, tasks, time.perf_counter() - began, max_per_task)
