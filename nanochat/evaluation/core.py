"""CORE: the score of a base model on the 22 tasks of DCLM, the mean over tasks of accuracy centred on chance.

    result = evaluate_core(model, tokenizer, open_bundle(), max_per_task=500, ranks=ranks, say=print)
    result.core, result.tasks["arc_easy"].accuracy, result.tasks["arc_easy"].centered

Centred accuracy is (accuracy − chance) / (1 − chance): 0 for guessing, 1 for all examples right. There are three kinds
of task. Multiple choice and schema: among several texts, the model chooses the one whose scored part has the lowest
mean loss a token. Language modelling: an example is right if every token of the continuation is the greedy one.

`score_plain` is the definition, one prompt at a time. `score_questions` gives the same results faster: a prefix that
several prompts share goes through the model once, prompts are batched, and only scored positions go through the head.
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

from nanochat.distributed import Ranks, gather_objects, machine_first, on_main, several_machines
from nanochat.errors import UserError
from nanochat.evaluation.core_bundle import Bundle, CoreTask, open_bundle
from nanochat.ragged import length_on, padded

ONE_RANK = Ranks(rank=0, local_rank=0, world_size=1, device=torch.device("cpu"))
MAX_LENGTH_FACTOR = 10  # longest prompt in units of sequence_len, as published; longer ones failed there, ours are cut
BATCH_TOKENS = {"cuda": 1 << 15, "cpu": 1 << 11}  # in one forward, padding included; a CPU is slow beyond its caches
MAX_LOGITS = 1 << 26  # in memory at once: 256 MB of float32
MAX_PROMPT_IDS = 1 << 22  # of the prompts that are in memory, and searched for shared prefixes, at once
MIN_TOKENS_SAVED = 32  # by a shared prefix; below that, the second forward costs more than it saves
TIE_MARGIN = 1e-3  # nats or logits; closer results are scored again one by one, since batches differ by about 1e-5


@dataclass(frozen=True)
class Question:
    """An example as token ids.

    prompts: ids of each choice with its context, BOS first; one prompt for language modelling.
    starts: index of the first scored id of each prompt; all ids from there on are scored.
    gold: index of the right prompt; None for language modelling.
    """

    prompts: list[list[int]]
    starts: list[int]
    gold: int | None


@dataclass(frozen=True)
class ExampleResult:
    """Result of a question. losses: mean nats a scored token of each prompt; NaN where no token is scored."""

    correct: bool
    losses: list[float]


@dataclass
class CoreTaskResult:
    """Result of a task. centered: accuracy centred on chance. examples: in the order of the task's examples."""

    accuracy: float
    centered: float
    seconds: float
    examples: list[ExampleResult] = field(repr=False)


@dataclass
class CoreResult:
    """core: the mean of the centred accuracies. tasks: result of each task, by label."""

    core: float
    tasks: dict[str, CoreTaskResult]
    seconds: float
    max_per_task: int

    def record(self) -> dict[str, Any]:
        """The values that go into a log."""
        return {"core": self.core, "max_per_task": self.max_per_task, "seconds": self.seconds,
                "tasks": {label: {"accuracy": task.accuracy, "centered": task.centered}
                          for label, task in self.tasks.items()}}


def bundle_of_ranks(folder: str | Path | None, ranks: Ranks, *, fetch: bool = True, say: Callable[[str], None] = print
                    ) -> Bundle:
    """Call `open_bundle` on rank 0, which may download the bundle, and return its result on all ranks. Collective.

    An error is raised on all ranks.
    """
    bundle = on_main("fetching the tasks of CORE", lambda: open_bundle(folder, fetch=fetch, say=say), ranks)
    if several_machines(ranks):  # which may not see rank 0's
        bundle = machine_first(lambda: open_bundle(folder, fetch=fetch, say=lambda text: None), ranks)
    return bundle


def check_bundle(bundle: Bundle, max_per_task: int, ranks: Ranks = ONE_RANK) -> None:
    """Read all examples, so that an error in the last task is reported before the first task is evaluated. Collective.

    Raises UserError, the same on all ranks.
    """
    def read() -> None:
        bundle.check()
        for task in bundle.tasks:
            load_examples(task, max_per_task)
    on_main("reading the tasks of CORE", read, ranks)


# ---- prompts

def load_examples(task: CoreTask, max_per_task: int = -1) -> list[dict[str, Any]]:
    """Return the examples of a task in the published random order, the first max_per_task of them (-1: all).

    Raises UserError where too few are left for the few-shot prompts.
    """
    examples = task.rows()
    random.Random(1337).shuffle(examples)
    if max_per_task > 0:
        examples = examples[:max_per_task]
    if len(examples) <= task.shots:
        raise UserError(f"the CORE task {task.label} puts {task.shots} other examples before each question, but has "
                        f"only {len(examples)} rows: use --max-per-task={task.shots + 1} or more")
    return examples


def prompt_texts(task: CoreTask, examples: list[dict[str, Any]], i: int) -> list[str]:
    """Return the few-shot prompts of example i.

    Multiple choice and schema: one text for each choice. Language modelling: two, without and with the continuation.
    """
    sampled = random.Random(1234 + i).sample(range(len(examples) - 1), task.shots)
    shots = [examples[j + (j >= i)] for j in sampled]  # any example but i
    delimiter, asked = task.delimiter, examples[i]
    if task.kind == "multiple_choice":
        before = [f"{row['query']}{delimiter}{row['choices'][row['gold']]}" for row in shots]
        last = [f"{asked['query']}{delimiter}{choice}" for choice in asked["choices"]]
    elif task.kind == "schema":
        before = [f"{row['context_options'][row['gold']]}{delimiter}{row['continuation']}"
                  for row in shots]
        last = [f"{context}{delimiter}{asked['continuation']}" for context in asked["context_options"]]
    else:
        before = [f"{row['context'].strip()}{delimiter}{row['continuation']}" for row in shots]
        context = f"{asked['context'].strip()}{delimiter}"
        last = [context, context + asked["continuation"]]
    texts = ["\n\n".join([*before, text]) for text in last]
    if task.kind == "language_modeling":
        texts[0] = texts[0].rstrip()  # in the whole text, the first token of the continuation begins with that space
    return texts


def make_question(tokenizer, task: CoreTask, examples: list[dict[str, Any]], i: int) -> Question:
    """Return example i of a task as token ids.

    Raises UserError where the ids of the context are not a prefix of the ids of context and continuation.
    """
    texts = prompt_texts(task, examples, i)
    return _question(task, examples, i, tokenizer.encode(texts, prepend=tokenizer.get_bos_token_id()))


def _question(task: CoreTask, examples: list[dict[str, Any]], i: int, prompts: list[list[int]]) -> Question:
    """`make_question` from the encoded texts."""
    if task.kind == "multiple_choice":  # a common context: the choices are scored
        return Question(prompts, [common_prefix(prompts)] * len(prompts), examples[i]["gold"])
    if task.kind == "schema":  # a common continuation, which is scored
        shared = common_prefix([prompt[::-1] for prompt in prompts])
        return Question(prompts, [len(prompt) - shared for prompt in prompts], examples[i]["gold"])
    context, whole = prompts
    if len(whole) <= len(context) or whole[:len(context)] != context:
        raise UserError(f"the CORE task {task.label}, example {i} after the shuffle: with this tokenizer, the ids of "
                        "the context are not a prefix of the ids of context and continuation, so that there is nothing "
                        f"to score ({examples[i]['continuation']!r})")
    return Question([whole], [len(context)], None)


def common_prefix(sequences: list[list[int]]) -> int:
    """Return the length of the longest prefix that all sequences share."""
    low, high = min(sequences), max(sequences)  # in lexicographic order, all others lie between these two
    shorter = min(len(low), len(high))
    # bisection over slices: they are compared in C, faster than a loop over ids
    return bisect_left(range(1, shorter + 1), True, key=lambda n: low[:n] != high[:n])


def cut_left(question: Question, longest: int) -> Question:
    """Return the question with each prompt cut to its last `longest` ids; one id stays before the scored ones."""
    if max(map(len, question.prompts)) <= longest:
        return question
    removed = [max(0, len(prompt) - longest) for prompt in question.prompts]
    return Question([prompt[n:] for prompt, n in zip(question.prompts, removed)],
                    [max(1, start - n) for start, n in zip(question.starts, removed)], question.gold)


# ---- scoring one prompt at a time: the definition

@torch.no_grad()
def score_plain(model, question: Question) -> ExampleResult:
    """Score a question with one full forward for each prompt."""
    losses, greedy = [], []
    for prompt, start in zip(question.prompts, question.starts):
        ids = torch.tensor([prompt], device=model.device)
        logits = model(ids)[0, start - 1:-1]
        targets = ids[0, start:]
        losses.append(float(F.cross_entropy(logits, targets)) if len(targets) else math.nan)
        greedy.append(bool((logits.argmax(-1) == targets).all()))
    return _result(question, losses, greedy[0])


def _result(question: Question, losses: list[float], greedy: bool) -> ExampleResult:
    """Choose the prompt with the lowest loss, the first in a tie; language modelling: `greedy` is the result.

    A choice that is a prefix of another choice has no scored token and the loss NaN. min() takes it only where it comes
    first, as the published evaluation does. Raises UserError for any other loss that is not finite.
    """
    for prompt, start, loss in zip(question.prompts, question.starts, losses):
        if start < len(prompt) and not math.isfinite(loss):
            raise UserError(f"the model gives a loss of {loss}, so CORE cannot be measured: its weights are damaged, "
                            "or training had diverged. Evaluate an earlier checkpoint.")
    correct = greedy if question.gold is None else losses.index(min(losses)) == question.gold
    return ExampleResult(correct, losses)


# ---- scoring in batches with shared prefixes

@dataclass
class _Sequence:
    """Input ids of one or several prompts: all but their last id, which is only a target.

    start: the lowest first scored index of these prompts. prompts: (index of the question, index of the prompt in it).
    """

    ids: list[int]
    start: int
    prompts: list[tuple[int, int]]


@torch.no_grad()
def score_questions(model, questions: list[Question], batch_tokens: int | None = None) -> list[ExampleResult]:
    """Score all questions in batches, with the results of `score_plain`.

    In float32, a question whose result is nearly a tie is scored again by `score_plain`, so that no result depends on
    what else is in its batch.

    Args:
        model: a GPT.
        questions: what to score.
        batch_tokens: tokens in one forward, padding included; None takes the default of the device.
    """
    budget = batch_tokens or BATCH_TOKENS.get(model.device.type, 1 << 13)
    losses = [[math.nan] * len(question.prompts) for question in questions]
    margins = [[math.inf] * len(question.prompts) for question in questions]
    for sequences, hidden, offsets in _forward(model, _prefix_groups(_sequences(questions), 4 * budget), budget):
        _score(model, questions, sequences, hidden, offsets, losses, margins)
    results = []
    for question, loss, margin in zip(questions, losses, margins):
        if model.dtype == torch.float32 and _nearly_tied(question, loss, margin):
            results.append(score_plain(model, question))
        else:
            results.append(_result(question, loss, margin[0] > 0))
    return results


def _nearly_tied(question: Question, losses: list[float], margins: list[float]) -> bool:
    if question.gold is None:
        return abs(margins[0]) < TIE_MARGIN
    first, second, *_ = [*sorted(loss for loss in losses if not math.isnan(loss)), math.inf, math.inf]
    return second - first < TIE_MARGIN


def _sequences(questions: list[Question]) -> list[_Sequence]:
    """Return the distinct input sequences of all questions, sorted: sequences with a common prefix are neighbours."""
    found: dict[tuple[int, ...], _Sequence] = {}
    for q, question in enumerate(questions):
        for p, (prompt, start) in enumerate(zip(question.prompts, question.starts)):
            if start < len(prompt):
                sequence = found.setdefault(tuple(prompt[:-1]), _Sequence(prompt[:-1], start, []))
                sequence.start = min(sequence.start, start)
                sequence.prompts.append((q, p))
    return sorted(found.values(), key=lambda sequence: sequence.ids)


def _prefix_groups(sequences: list[_Sequence], limit: int) -> Iterator[tuple[int, list[_Sequence]]]:
    """Group neighbours that share a prefix; yield (length of the prefix, sequences). It is 0 for a single sequence.

    A sequence joins a group where that saves tokens: n sequences that share `shared` ids save (n − 1)·shared, and with
    another one, which shortens the prefix to `new` ids, n·new. limit: positions in the cache of a group.
    """
    group: list[_Sequence] = []
    shared = longest = 0
    for sequence in sequences:
        if group:
            new = min(shared, sequence.start - 1, common_prefix([group[-1].ids, sequence.ids]))
            n = len(group)
            saved = n * new - (n - 1) * shared
            if saved >= MIN_TOKENS_SAVED and (n + 1) * max(longest, len(sequence.ids)) <= limit:
                group.append(sequence)
                shared, longest = new, max(longest, len(sequence.ids))
                continue
            yield (shared if n > 1 else 0), group
        group, shared, longest = [sequence], sequence.start - 1, len(sequence.ids)
    if group:
        yield (shared if len(group) > 1 else 0), group


def _forward(model, groups: Iterator[tuple[int, list[_Sequence]]], budget: int
             ) -> Iterator[tuple[list[_Sequence], Tensor, list[int]]]:
    """Run all groups through the model in batches.

    Yields (sequences, hidden states (B, T, E), offsets). Id t of a sequence is at position t − offset: the first
    `offset` ids are the prefix of its group, which is prefilled once. The cache is then copied for each sequence.
    """
    device = model.device
    single, grouped = [], []
    for shared, group in groups:
        (grouped if shared else single).append((shared, group))
    single.sort(key=lambda entry: -len(entry[1][0].ids))
    for batch in _batches(single, lambda batch: len(batch) * length_on(device, len(batch[0][1][0].ids)) <= budget):
        sequences = [sequence for _, (sequence,) in batch]
        ids, counts = padded([sequence.ids for sequence in sequences], device, budget)
        yield sequences, model.hidden(ids, counts=counts), [0] * len(sequences)
    grouped.sort(key=lambda entry: -entry[0])
    for batch in _batches(grouped, lambda batch: _fits(batch, budget, device)):
        prefixes = [group[0].ids[:shared] for shared, group in batch]
        longest = max(len(sequence.ids) for _, group in batch for sequence in group)
        ids, counts = padded(prefixes, device, budget)
        cache = model.new_cache(len(ids), max_len=max(longest, ids.shape[1]))
        model.hidden(ids, cache, counts)
        sequences = [sequence for _, group in batch for sequence in group]
        offsets = [shared for shared, group in batch for _ in group]
        ids, counts = padded([sequence.ids[offset:] for sequence, offset in zip(sequences, offsets)], device, budget)
        rows = [i for i, (_, group) in enumerate(batch) for _ in group]
        cache = cache.select(rows + rows[-1:] * (len(ids) - len(rows)))
        yield sequences, model.hidden(ids, cache, counts), offsets


def _fits(batch: list[tuple[int, list[_Sequence]]], budget: int, device: torch.device) -> bool:
    """Does each of the two forwards of these groups fit the budget of tokens, and their cache four times the budget?"""
    count = sum(len(group) for _, group in batch)
    rest = length_on(device, max(len(sequence.ids) - shared for shared, group in batch for sequence in group))
    longest = max(len(sequence.ids) for _, group in batch for sequence in group)
    prefixes = len(batch) * length_on(device, batch[0][0])
    return prefixes <= budget and count * rest <= budget and count * longest <= 4 * budget


def _batches(entries: list, fits: Callable[[list], bool]) -> Iterator[list]:
    """Split entries, in their order, into batches that fit; a batch has at least one entry."""
    batch: list = []
    for entry in entries:
        if batch and not fits([*batch, entry]):
            yield batch
            batch = []
        batch.append(entry)
    if batch:
        yield batch


def _score(model, questions: list[Question], sequences: list[_Sequence], hidden: Tensor, offsets: list[int],
           losses: list[list[float]], margins: list[list[float]]) -> None:
    """Compute the losses and margins of the prompts of one batch.

    Args:
        model: a GPT.
        questions: all questions.
        sequences, hidden, offsets: a batch, from `_forward`.
        losses: mean nats a scored token, by question and prompt; written in place.
        margins: logit of the target minus the best other logit, the least over the scored tokens, by question and
            prompt; written in place. All targets are greedy where it is above 0.
    """
    positions, targets, spans = [], [], []
    for b, (sequence, offset) in enumerate(zip(sequences, offsets)):
        for q, p in sequence.prompts:
            prompt, start = questions[q].prompts[p], questions[q].starts[p]
            spans.append((q, p, len(targets), len(targets) + len(prompt) - start))
            positions.extend(b * hidden.shape[1] + t - offset for t in range(start - 1, len(prompt) - 1))
            targets.extend(prompt[start:])
    x = hidden.flatten(0, 1)[torch.tensor(positions, device=hidden.device)]
    target = torch.tensor(targets, device=hidden.device)
    loss, margin = [], []
    for part in torch.arange(len(targets), device=hidden.device).split(max(1, MAX_LOGITS // model.config.vocab_size)):
        logits = model.head(x[part])
        loss.append(F.cross_entropy(logits, target[part], reduction="none"))
        (best, second), own = logits.topk(2).values.T, logits.gather(1, target[part, None])[:, 0]
        margin.append(own - torch.where(own == best, second, best))  # 0 in a tie, which is then scored again
    loss_of, margin_of = torch.cat(loss).cpu(), torch.cat(margin).cpu()
    for q, p, begin, end in spans:
        losses[q][p], margins[q][p] = float(loss_of[begin:end].mean()), float(margin_of[begin:end].min())


# ---- tasks

def evaluate_core_task(model, tokenizer, task: CoreTask, examples: list[dict[str, Any]], ranks: Ranks = ONE_RANK,
                       score: Callable[..., list[ExampleResult]] = score_questions) -> CoreTaskResult:
    """Evaluate a task on all its examples. Collective.

    Args:
        model: a GPT.
        tokenizer: its tokenizer.
        task: of a bundle.
        examples: from `load_examples`.
        ranks: rank r scores examples r, r + world_size, ...; every rank gets all results.
        score: function of model and questions; `score_plain` for each question gives the same results.

    Raises:
        UserError: on all ranks, where an example does not work with this tokenizer.
    """
    began = time.perf_counter()
    found: dict[int, ExampleResult] = {}
    error = ""
    try:
        for indices, questions in _questions(model, tokenizer, task, examples,
                                             range(ranks.rank, len(examples), ranks.world_size)):
            found.update(zip(indices, score(model, questions)))
    except UserError as problem:
        error = str(problem)
    parts = gather_objects((found, error), ranks)
    if errors := [error for _, error in parts if error]:
        raise UserError(errors[0])
    by_index = {i: result for part, _ in parts for i, result in part.items()}
    results = [by_index[i] for i in range(len(examples))]
    accuracy = sum(result.correct for result in results) / len(results)
    centered = (accuracy - task.baseline) / (1 - task.baseline)
    return CoreTaskResult(accuracy, centered, time.perf_counter() - began, results)


def _questions(model, tokenizer, task: CoreTask, examples: list[dict[str, Any]], indices: range
               ) -> Iterator[tuple[list[int], list[Question]]]:
    """Yield (indices of the examples, their questions), about MAX_PROMPT_IDS ids at a time."""
    bos, longest = tokenizer.get_bos_token_id(), MAX_LENGTH_FACTOR * model.config.sequence_len
    numbers: list[int] = []
    questions: list[Question] = []
    size = 0
    for start in range(0, len(indices), 32):  # the tokenizer encodes a list of texts in parallel
        texts = [(i, prompt_texts(task, examples, i)) for i in indices[start:start + 32]]
        encoded = iter(tokenizer.encode([text for _, prompts in texts for text in prompts], prepend=bos))
        for i, prompts in texts:
            question = cut_left(_question(task, examples, i, [next(encoded) for _ in prompts]), longest)
            numbers.append(i)
            questions.append(question)
            size += sum(map(len, question.prompts))
        if size >= MAX_PROMPT_IDS:
            yield numbers, questions
            numbers, questions, size = [], [], 0
    if questions:
        yield numbers, questions


def evaluate_core(model, tokenizer, bundle: Bundle, max_per_task: int = -1, *, ranks: Ranks = ONE_RANK,
                  say: Callable[[str], None] = lambda text: None) -> CoreResult:
    """Evaluate all tasks of a bundle and return CORE. Collective.

    On a CPU the model computes in float32, unless NANOCHAT_DTYPE is set: near ties then have the published results.

    Args:
        model: a GPT.
        tokenizer: its tokenizer.
        bundle: the tasks.
        max_per_task: examples of each task; -1 takes all.
        ranks: share the examples of each task.
        say: gets one line of progress for each task.

    Raises:
        UserError: where files of the bundle are missing or broken.
    """
    check_bundle(bundle, max_per_task, ranks)
    began, dtype = time.perf_counter(), model.compute_dtype
    if model.device.type == "cpu" and not os.environ.get("NANOCHAT_DTYPE"):
        model.compute_dtype = torch.float32
    tasks = {}
    try:
        for number, task in enumerate(bundle.tasks, 1):
            result = evaluate_core_task(model, tokenizer, task, load_examples(task, max_per_task), ranks)
            tasks[task.label] = result
            say(f"CORE {number:2d}/{len(bundle.tasks)} {task.label:32s} accuracy {result.accuracy:.4f}  "
                f"centered {result.centered:7.4f}  {len(result.examples):6,d} examples  {result.seconds:6.1f} s")
    finally:
        model.compute_dtype = dtype
    core = sum(result.centered for result in tasks.values()) / len(tasks)
    return CoreResult(core, tasks, time.perf_counter() - began, max_per_task)
