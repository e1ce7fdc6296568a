"""Conversations to batches: packed rows for mid-training, masked rows for fine-tuning. Order and position are exact.

    loader = PackedLoader(ConversationSource(tokenizer, task), B, T, ranks=ranks, cut=False)
    loader = PackedLoader(SupervisedSource(tokenizer, task, max_tokens=T), B, T, ranks=ranks, cut=False)
    steps = SupervisedSteps(tokenizer, task, examples_per_step=32, device_batch_size=4, max_tokens=2048, ranks=ranks)
    for inputs, targets in steps(step): ...       # this rank's micro-batches of an optimizer step; target −1: no loss

A task is anything with `len` and `[i]` → conversation (tasks/base.py). Each epoch has its own order, which depends on
the seed alone.
"""

import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nanochat.dataloader import unlearnt
from nanochat.distributed import Ranks
from nanochat.errors import UserError
from nanochat.files import to_json
from nanochat.ragged import has_few_shapes, length_on

PIECE = 64       # conversations that `ConversationSource.walk` yields at a time
SAMPLE = 1000    # conversations counted where counting all takes too long


class Conversations:
    """A task as an endless stream: number n is a conversation of epoch n div count, in the order of that epoch.

    count: conversations of an epoch. Raises UserError where the task has none.
    """

    def __init__(self, task: Any, seed: int = 0):
        self.task, self.seed, self.count = task, seed, len(task)
        if self.count == 0:
            raise UserError(f"there is no conversation to train on in {getattr(task, 'name', task)}.")
        self._orders: dict[int, np.ndarray] = {}

    def __getitem__(self, number: int) -> dict:
        epoch, place = divmod(number, self.count)
        if epoch not in self._orders:
            self._orders = {e: order for e, order in self._orders.items() if e == epoch - 1}
            self._orders[epoch] = np.random.default_rng([self.seed, epoch]).permutation(self.count)
        return self.task[int(self._orders[epoch][place])]


    def fingerprint(self, shards: int | None = None) -> str:
        """Return a hex digest of the number of conversations, the seed, and some of the conversations."""
        some = [self.task[i] for i in range(0, self.count, max(1, self.count // 16))]
        return hashlib.sha256(to_json([self.count, self.seed, some]).encode()).hexdigest()[:16]


class ConversationSteps(Conversations):
    """The conversations of each optimizer step, the next `per_step` of the stream, with an exact position.

    Args:
        task, seed: as for Conversations.
        per_step: conversations of all ranks in a step.
        step: steps that are done. state: what `state_dict` returned after them; None where there is none, which takes
            all steps to have been of per_step conversations.

    Raises:
        UserError: the state is of other conversations.
    """

    def __init__(self, task: Any, seed: int, per_step: int, step: int = 0, state: dict | None = None):
        super().__init__(task, seed)
        self.per_step, self._step, self._first = per_step, step, step * per_step
        if state is not None:
            try:
                before, count, self._first = state["data"], state["conversations"], state["next"]
            except (KeyError, TypeError) as error:
                raise UserError(f"this is no position in the conversations: {error!r}.") from error
            if before != self.fingerprint():
                raise UserError("the conversations are not those that the run began with, or in another order "
                                f"({count:,} then, {self.count:,} now): use the same data and the same --seed, or "
                                "train anew with --fresh.")
        self._next = self._first

    def numbers(self, step: int) -> range:
        """Return the numbers of the conversations of a step."""
        first = self._first + (step - self._step) * self.per_step
        return range(first, first + self.per_step)

    def take(self, step: int) -> range:
        """Return the numbers of the conversations of a step, and set the position behind it."""
        self._next = self.numbers(step).stop
        return self.numbers(step)

    def state_dict(self) -> dict:
        """Return the position as plain JSON, the same on all ranks."""
        return {"data": self.fingerprint(), "conversations": self.count, "next": self._next}


class ConversationSource(Conversations):
    """A task's conversations as a `nanochat.dataloader.DocumentSource`: every token is trained on, the user's too."""

    split = "train"
    folder = Path("conversations")  # named in PackedLoader's messages
    shards = planned = 1

    def __init__(self, tokenizer: Any, task: Any, seed: int = 0):
        super().__init__(task, seed)
        self.tokenizer = tokenizer
        self.bos = tokenizer.get_bos_token_id()
        self.tokenizer_fingerprint = tokenizer.fingerprint()

    def walk(self, start: int, stop: int | None) -> Iterator[tuple[list[int], list[dict]]]:
        """Yield (numbers, conversations) from `start` on, below `stop` (None: endless), in small pieces."""
        while stop is None or start < stop:
            numbers = list(range(start, start + PIECE if stop is None else min(start + PIECE, stop)))
            yield numbers, [self[number] for number in numbers]
            start += PIECE

    def pick(self, numbers: Sequence[int]) -> dict[int, dict]:
        """Return some conversations by number."""
        return {number: self[number] for number in set(numbers)}

    def encode(self, conversations: Sequence[dict]) -> list[np.ndarray]:
        """Return the tokens of each whole conversation, without bos."""
        return [np.array(self.tokenizer.render_conversation(conversation, max_tokens=1 << 30)[0][1:], dtype=np.uint32)
                for conversation in conversations]


class SupervisedSource(ConversationSource):
    """A task's conversations for PackedLoader(cut=False), with the assistant's tokens as the only targets.

    As in mid-training, a conversation sees those before it in its row. One is cut at max_tokens, so that it fits a row;
    one with nothing to learn within them is left out.

    Args:
        tokenizer, task, seed: as for ConversationSource.
        max_tokens: T of the rows.

    Raises:
        UserError: when read: no conversation has anything to learn.
    """

    def __init__(self, tokenizer: Any, task: Any, seed: int = 0, *, max_tokens: int):
        super().__init__(tokenizer, task, seed)
        self.bos, self.max_tokens = unlearnt(self.bos), max_tokens
        self.left_out = 0  # of all that were read, ahead of training too
        self._in_vain = 0  # of the last ones read, without one between that has something to learn

    def encode(self, conversations: Sequence[dict]) -> list[np.ndarray]:
        """Return the tokens of each conversation, without bos; none for what is left out."""
        return [self._tokens(conversation) for conversation in conversations]

    def _tokens(self, conversation: dict) -> np.ndarray:
        ids, mask = self.tokenizer.render_conversation(conversation, max_tokens=self.max_tokens + 1)
        tokens, learnt = np.array(ids[1:], dtype=np.int64), np.array(mask[1:], dtype=bool)
        if learnt.any():
            self._in_vain = 0
            return np.where(learnt, tokens, unlearnt(tokens))
        self.left_out += 1
        self._in_vain += 1
        if self._in_vain >= self.count:
            raise nothing_to_learn(self.max_tokens)
        return tokens[:0]


def nothing_to_learn(max_tokens: int) -> UserError:
    """Return the error that no conversation has an answer within max_tokens."""
    return UserError(f"no conversation has an answer that begins within {max_tokens} tokens, so there is nothing to "
                     "learn: raise --max-seq-len, or look at the conversations.")


def count_tokens(task: Any, tokenizer: Any, most: int = 20_000, max_tokens: int = 1 << 30) -> int:
    """Return the number of tokens of all conversations, bos included; an estimate from SAMPLE of more than `most`.

    max_tokens: at which a conversation is cut.
    """
    count = len(task)
    which = range(count) if count <= most else np.random.default_rng(0).choice(count, SAMPLE, replace=False).tolist()
    sizes = [len(tokenizer.render_conversation(task[i], max_tokens=max_tokens)[0]) for i in which]
    return round(sum(sizes) * count / len(sizes))


class SupervisedSteps:
    """The micro-batches of every optimizer step of supervised fine-tuning, made one step ahead in a thread.

    A step is the next `examples_per_step` conversations, dealt out to the ranks by length so that all have about the
    same work. A conversation with nothing to learn within max_tokens is replaced by the next one. Any number of ranks
    can resume from a state, also with other steps. `close()` or leaving a `with` block ends the thread.

    Args:
        task: the conversations. seed: of their order.
        step, state: as for ConversationSteps, to resume.
        examples_per_step: conversations of all ranks in an optimizer step.
        device_batch_size: conversations of a micro-batch at most, padded to the longest; on a GPU to one of seven
            lengths from max_tokens / 8 on.
        max_tokens: tokens at which a conversation is cut.

    Raises:
        UserError: a rank would have nothing to do. When called: no conversation has anything to learn.
    """

    def __init__(self, tokenizer: Any, task: Any, *, examples_per_step: int, device_batch_size: int, max_tokens: int,
                 ranks: Ranks, seed: int = 0, step: int = 0, state: dict | None = None):
        if examples_per_step < ranks.world_size or device_batch_size < 1:
            raise UserError(f"a step of {examples_per_step} conversations, in micro-batches of {device_batch_size}, "
                            f"leaves nothing to some of the {ranks.world_size} ranks: set --target-examples-per-step "
                            f"to {ranks.world_size} or more.")
        self.tokenizer, self.ranks = tokenizer, ranks
        self.conversations = ConversationSteps(task, seed, examples_per_step, step, state)
        self.examples_per_step, self.device_batch_size = examples_per_step, device_batch_size
        self.max_tokens = max_tokens
        self.replaced = 0  # conversations that had nothing to learn within max_tokens
        self._thread = ThreadPoolExecutor(1, "conversations")
        self._ahead: tuple[int, Future] | None = None

    def __len__(self) -> int:
        """Optimizer steps of one epoch; the last one is filled up from the next epoch."""
        return -(-self.conversations.count // self.examples_per_step)

    def __call__(self, step: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield this rank's (inputs, targets), both (B, T) int64 on the device, of optimizer step `step`, from 0."""
        ready = self._ahead is not None and self._ahead[0] == step
        made = self._ahead[1] if ready else self._thread.submit(self._make, step)
        rows = made.result()
        self.conversations.take(step)
        self._ahead = (step + 1, self._thread.submit(self._make, step + 1))
        yield from self.micro_batches(rows)

    def micro_batches(self, rows: list[tuple[list[int], list[int]]]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the (inputs, targets) of this rank's rows of a step, (ids, mask) each."""
        full = min(self.device_batch_size, -(-self.examples_per_step // self.ranks.world_size))
        for i in range(0, len(rows), full):
            yield batch_of(rows[i:i + full], self.tokenizer.get_bos_token_id(), self.ranks.device, full,
                           least=64 * -(-self.max_tokens // 512), most=self.max_tokens)

    def state_dict(self) -> dict:
        """Return the position behind the last step handed out as plain JSON, the same on all ranks."""
        return self.conversations.state_dict()

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown(cancel_futures=True)

    def __enter__(self) -> "SupervisedSteps":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _make(self, step: int) -> list[tuple[list[int], list[int]]]:
        rows = [self._usable(number) for number in self.conversations.numbers(step)]
        rows.sort(key=lambda row: len(row[0]))
        return rows[self.ranks.rank::self.ranks.world_size]

    def _usable(self, number: int) -> tuple[list[int], list[int]]:
        for other in range(number, number + self.conversations.count):
            ids, mask = self.tokenizer.render_conversation(self.conversations[other], max_tokens=self.max_tokens + 1)
            if any(mask[1:]):
                return ids, mask
            self.replaced += 1
        raise nothing_to_learn(self.max_tokens)


def batch_of(rows: Sequence[tuple[list[int], list[int]]], pad: int, device: torch.device | str, full: int, *,
             least: int = 64, most: int | None = None) -> tuple[Tensor, Tensor]:
    """Pad rows on the right to one batch; on a GPU so that few shapes occur (nanochat/ragged.py).

    Args:
        rows: (ids, mask) each; mask 1 where a token is trained on.
        pad: the token that fills the inputs.
        full: rows of every batch on a GPU, at least len(rows): those behind have no target.
        least, most: tokens of the shortest and the longest batch on a GPU.

    Returns:
        inputs and targets, both (B, T) int64 on the device; on a CPU, B is len(rows) and T the longest row less one.
        Targets are −1 where the mask is 0 and in the padding.
    """
    B = full if has_few_shapes(device) else len(rows)
    T = length_on(device, max(len(ids) for ids, _ in rows) - 1, least, most, parts=2)
    inputs = torch.full((B, T), pad, dtype=torch.long)
    targets = torch.full((B, T), -1, dtype=torch.long)
    for i, (ids, mask) in enumerate(rows):
        row, learnt = torch.tensor(ids), torch.tensor(mask)
        inputs[i, :len(ids) - 1] = row[:-1]
        targets[i, :len(ids) - 1] = torch.where(learnt[1:] == 1, row[1:], -1)
    on_gpu = torch.device(device).type == "cuda"
    if on_gpu:
        inputs, targets = inputs.pin_memory(), targets.pin_memory()
    return inputs.to(device, non_blocking=on_gpu), targets.to(device, non_blocking=on_gpu)
