"""Documents to batches: rows of T+1 tokens packed best-fit, made in a background thread, at a position that is exact.

    loader = PackedLoader(tokenizer, "train", batch_size=32, sequence_len=2048, ranks=ranks, state=None)
    inputs, targets = next(loader)        # (B, T) int64 each, on the device; targets are the inputs moved on by one
    state = loader.state_dict()           # after this very batch: a new loader given it goes on with the next row, bit for bit

A document is bos and its tokens. A row begins with bos and takes, from a buffer of documents, the largest that still fits whole, again
and again; where none fits, the largest of all is cut to fill the row. A document longer than a row counts as one that fits an empty
row, the oldest first, so that long ones take turns. Nothing is padded. The rest of a cut document goes back into the buffer behind a
bos of its own, so no token is lost. To drop the rests instead, with the shortest cut so that they are small, loses of all tokens
30 % on web pages (log-normal, mean 994 tokens, rows of 2049, buffer of 512), 13 % on documents of 100 to 200 tokens in rows of
513, and 96 % on books. Cut is then a document in every row; here in four rows of five.
"""

import os
import queue
import threading
import weakref
from bisect import bisect_right, insort
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from nanochat.dataset import Documents, shard_paths
from nanochat.distributed import Ranks
from nanochat.errors import UserError

BUFFER_DOCUMENTS = 512      # more of them cut fewer documents, and make the state and a restart longer
NOTHING = {"documents": 0, "tokens": 0, "rows": 0, "cut": 0, "padded": 0}
PADDING = -1
BUFFER_TOKENS = 1 << 22     # 16 MB; ends the filling of the buffer where documents are books


class Batch(NamedTuple):
    inputs: torch.Tensor    # (B, T) int64
    targets: torch.Tensor   # (B, T) int64


class Packer:
    """Packs documents into rows. `source` yields (number, tokens), tokens a 1-D array without bos and not empty.

    The buffer is refilled from `source` to BUFFER_DOCUMENTS documents or BUFFER_TOKENS tokens before each choice, so that what
    comes next is a function of the buffer and of the source's position alone. cut False: a document that fits a row is never cut; where
    none fits what is left of a row, the rest of it is PADDING.
    """

    def __init__(self, source: Iterator[tuple[int, np.ndarray]], bos: int, row_tokens: int, cut: bool = True):
        self._source, self._bos, self._row_tokens, self._cut = source, bos, row_tokens, cut
        self._buffer: list[tuple[int, int, int, int, np.ndarray]] = []  # (size, -age, number, offset, tokens[offset:]), sorted
        self._held = 0      # tokens in the buffer
        self._age = 0
        self._ended = False
        self.last = -1      # number of the last document taken from the source
        self.counts = dict(NOTHING)

    def put(self, number: int, offset: int, tokens: np.ndarray) -> None:
        """Add tokens `offset` and after of document `number` to the buffer, as its youngest."""
        size = min(1 + len(tokens), self._row_tokens)
        insort(self._buffer, (size, -self._age, number, offset, tokens))
        self._age += 1
        self._held += len(tokens)

    def waiting(self) -> np.ndarray:
        """What is in the buffer, oldest first: (N, 2) int64, document number and token offset."""
        items = sorted(self._buffer, key=lambda item: -item[1])
        return np.array([item[2:4] for item in items], dtype=np.int64).reshape(-1, 2)

    def fill(self, row: np.ndarray) -> bool:
        """Write the next row into `row` (T+1,). False where the source has ended and too little is left."""
        at = 0
        while at < len(row):
            self._refill()
            room = len(row) - at
            place = bisect_right(self._buffer, (room, 1)) - 1  # the largest that fits, the oldest of its size; -1: none
            if at and place < 0 and not self._cut:
                row[at:] = PADDING
                self.counts["padded"] += room
                break
            if not self._buffer:
                return False
            _, _, number, offset, tokens = self._buffer.pop(place)
            self._held -= len(tokens)
            part = min(room - 1, len(tokens))
            row[at] = self._bos
            row[at + 1:at + 1 + part] = tokens[:part]
            at += 1 + part
            if part < len(tokens):
                self.put(number, offset + part, tokens[part:])
                self.counts["cut"] += part > 0
        self.counts["rows"] += 1
        return True

    def _refill(self) -> None:
        while not self._ended and len(self._buffer) < BUFFER_DOCUMENTS and self._held < BUFFER_TOKENS:
            number, tokens = next(self._source, (-1, None))
            if tokens is None:
                self._ended = True
                return
            self.last = number
            self.put(number, 0, tokens)
            self.counts["documents"] += 1
            self.counts["tokens"] += len(tokens)


def _tokens_of(tokenizer: Any, texts: list[str]) -> list[np.ndarray]:
    if hasattr(tokenizer, "encode_flat"):
        ids, offsets = tokenizer.encode_flat(texts)
        return [ids[start:end].copy() for start, end in zip(offsets[:-1], offsets[1:])]  # a view would keep all of `ids` alive
    return [np.array(ids, dtype=np.uint32) for ids in tokenizer.encode(texts)]


def _stream(tokenizer: Any, documents: Documents, start: int, step: int, stop: int | None) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (number, tokens) from document `start` on, leaving out empty ones."""
    empty = 0
    for numbers, texts in documents.walk(start, step, stop):
        for number, tokens in zip(numbers, _tokens_of(tokenizer, texts)):
            if len(tokens):
                empty = 0
                yield number, tokens
            else:
                empty += 1
        if empty > documents.count:  # a whole pass and more
            raise UserError(f"every document in {documents.paths[0].parent} is empty.")


class PackedLoader:
    """An endless iterator of batches of one rank, or one pass with `loop=False` (what fills no batch at its end is dropped, or with
    cut=False padded).

    ranks: rank, world_size and device count; rank r reads documents r, r + world_size, ... (`nanochat.dataset` says of which stream).
    state: what `state_dict` gave. It must be of the same rank, world size, tokenizer and text (more shards may have come behind
    those it knows, while its first pass lasts); batch size and sequence length may differ. For another world size see `reshard`.
    prefetch: batches made ahead; it changes no batch. The thread starts at the first `next`.
    documents: what to read instead of the shards of `folder`; anything with the methods of `nanochat.dataset.Documents`, whose documents
    the tokenizer's `encode_flat` takes. cut False: rows end in padding (targets −1) rather than in a part of a document.

    Raises UserError where there is no text, it is corrupt, or the state does not belong to it; what goes wrong in the thread is
    raised by `next`. `close()`, leaving a `with` block, or losing the loader ends the thread.
    """

    def __init__(self, tokenizer: Any, split: Literal["train", "val"], batch_size: int, sequence_len: int, *, ranks: Ranks,
                 folder: str | Path | None = None, state: dict | None = None, prefetch: int = 4, loop: bool = True,
                 documents: Any = None, cut: bool = True):
        for name, value in (("batch_size", batch_size), ("sequence_len", sequence_len), ("prefetch", prefetch)):
            if value < 1:
                raise UserError(f"{name} is {value}; it must be at least 1.")
        self._documents = documents if documents is not None else Documents(shard_paths(split, folder))
        self._tokenizer, self._shape, self._ranks = tokenizer, (batch_size, sequence_len), ranks
        self._prefetch, self._loop, self._cut = prefetch, loop, cut
        self._about = {
            "split": split, "rank": ranks.rank, "world_size": ranks.world_size, "batch_size": batch_size, "sequence_len": sequence_len,
            "shards": len(self._documents.paths), "documents": self._documents.count, "data": self._documents.fingerprint(),
            "tokenizer": tokenizer.fingerprint() if hasattr(tokenizer, "fingerprint") else None,
        }
        self._next, self._waiting = ranks.rank, np.zeros((0, 2), dtype=np.int64)
        if state is not None:
            self._check(state)
            self._next, self._waiting = state["next"], np.array(state["waiting"], dtype=np.int64).reshape(-1, 2)
        self.counts = dict(NOTHING)  # since this loader was made: documents and tokens read, rows made, cuts
        self._thread: _Thread | None = None
        self._end: BaseException | None = None  # what every further `next` raises

    @property
    def documents(self) -> int:
        """Documents in one pass, of all ranks together."""
        return self._documents.count

    @property
    def passes(self) -> int:
        """How often the text has been gone through."""
        return self._next // self._documents.count

    def __iter__(self) -> "PackedLoader":
        return self

    def __next__(self) -> Batch:
        if self._end is not None:
            raise self._end
        if self._thread is None or self._thread.process != os.getpid():  # a fork has no thread: go on from the last batch
            self._thread = _Thread(self._prefetch, self._make)
            weakref.finalize(self, self._thread.stop)
        made = self._thread.out.get()
        if isinstance(made, BaseException):
            self._thread.stop()
            self._end = made
            raise made
        tensor, self._next, self._waiting, self.counts = made
        tensor = tensor.to(self._ranks.device, non_blocking=True)  # from pinned memory: in order on the stream, and nobody waits
        return Batch(tensor[0], tensor[1])

    def state_dict(self) -> dict:
        """The position behind the last batch handed out, as plain JSON of some kilobytes; what was made ahead does not count."""
        return self._about | {"next": int(self._next), "waiting": self._waiting.tolist()}

    def close(self) -> None:
        """End the thread. Later calls of `next` raise ValueError."""
        if self._thread is not None:
            self._thread.stop()
        self._end = ValueError("this loader is closed")

    def __enter__(self) -> "PackedLoader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def _make(self):
        """The thread's work, as a function that does not hold the loader: a lost loader ends its thread."""
        task = (self._tokenizer, self._documents, self._shape, self._ranks, self._loop, self._cut, self._next, self._waiting)
        return lambda: _batches(*task)

    def _check(self, state: dict) -> None:
        about = self._about
        try:
            known = {key: state[key] for key in ("rank", "world_size", "split", "tokenizer", "shards", "data", "documents")}
            last = max([state["next"] - 1, *(number for number, _ in state["waiting"])])
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"this is no state of a loader: {error!r}.") from error
        for key in ("rank", "world_size"):
            if known[key] != about[key]:
                raise UserError(f"the loader's state is of {key} {known[key]}, and this is {key} {about[key]}: "
                                "give each rank its own, or make them anew for this world size with dataloader.reshard.")
        if known["split"] != about["split"]:
            raise UserError(f"the loader's state is of the split {known['split']!r}, not of {about['split']!r}.")
        if known["tokenizer"] != about["tokenizer"]:
            raise UserError("the loader's state was made with another tokenizer: a run goes on with the tokenizer it began with.")
        folder = self._documents.paths[0].parent
        if known["data"] != about["data"]:
            shards = known["shards"]
            grown = shards < about["shards"] and self._documents.fingerprint(shards) == known["data"]
            if not grown or last >= known["documents"]:
                raise UserError(f"the text in {folder} is not what it was when the loader's state was made ({shards} shards of "
                                f"{known['documents']} documents then, {about['shards']} of {about['documents']} now)"
                                f"{', and shards can be added during the first pass only' if grown else ''}: "
                                "put the same shards back, or begin a new run.")


def reshard(states: Sequence[dict], world_size: int) -> list[dict]:
    """Turn the states of all ranks of one moment into states for `world_size` ranks.

    The documents still to come are the same, none is lost or read twice: those in the old buffers, and those that some ranks had
    not come to yet, are dealt out; from the furthest rank's next document on, all is read as ever. The rows are others, as they must be.
    Raises UserError where a rank's state is missing.
    """
    states = sorted(states, key=lambda state: state["rank"])
    old = states[0]["world_size"] if states else 0
    if world_size < 1 or [state["rank"] for state in states] != list(range(old)):
        raise UserError(f"the loader's states of all {old} ranks are needed, to go on with {world_size}; "
                        f"given are those of ranks {[state['rank'] for state in states]}.")
    if len({(state["data"], state["tokenizer"], state["split"]) for state in states}) > 1:
        raise UserError("the loader's states are not of one run: their text or tokenizer differ.")
    start = max(state["next"] for state in states)
    pending = [entry for state in states for entry in state["waiting"]]
    pending += [[number, 0] for state in states for number in range(state["next"], start, old)]
    pending.sort()
    return [states[0] | {"rank": rank, "world_size": world_size, "next": start + (rank - start) % world_size,
                         "waiting": pending[rank::world_size]} for rank in range(world_size)]


def _batches(tokenizer: Any, documents: Documents, shape: tuple[int, int], ranks: Ranks, loop: bool, cut: bool, start: int,
             waiting: np.ndarray) -> Iterator[tuple[torch.Tensor, int, np.ndarray, dict]]:
    """Yield (tensor (2, B, T) of inputs and targets, next document, buffer, counts): the batch and the position behind it."""
    if ranks.device.type == "cuda":
        torch.cuda.set_device(ranks.device)  # pinning would else make a context on the first GPU
    stop = None if loop else documents.count
    packer = Packer(_stream(tokenizer, documents, start, ranks.world_size, stop), tokenizer.get_bos_token_id(), shape[1] + 1,
                    cut)
    packer.last = start - ranks.world_size
    texts = documents.pick(waiting[:, 0].tolist())
    for number, offset in waiting.tolist():
        if stop is None or number < stop:
            packer.put(number, offset, _tokens_of(tokenizer, [texts[number]])[0][offset:])
    row = np.empty(shape[1] + 1, dtype=np.int64)
    while True:
        tensor = torch.empty((2, *shape), dtype=torch.int64, pin_memory=ranks.device.type == "cuda")
        inputs, targets = tensor.numpy()
        for index in range(shape[0]):
            if not packer.fill(row):
                if cut or index == 0:
                    return
                row[:] = PADDING  # the last batch of a pass
            inputs[index], targets[index] = row[:-1], row[1:]
        if not cut:
            inputs[inputs == PADDING] = tokenizer.get_bos_token_id()
        yield tensor, packer.last + ranks.world_size, packer.waiting(), dict(packer.counts)


class _Thread:
    """Runs an iterator in a thread, `ahead` results before they are asked for; `out` ends with the exception that ended it."""

    def __init__(self, ahead: int, make: Any):
        self.out: queue.Queue = queue.Queue(ahead)
        self.process = os.getpid()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(make,), name="loader", daemon=True)
        self._thread.start()

    def _run(self, make: Any) -> None:
        try:
            for made in make():
                self._put(made)
                if self._stopped.is_set():
                    return
            self._put(StopIteration())
        except BaseException as error:
            self._put(error)

    def _put(self, made: Any) -> None:
        while not self._stopped.is_set():
            try:
                return self.out.put(made, timeout=0.1)
            except queue.Full:
                continue

    def stop(self) -> None:
        """End the thread and wait for it: at most as long as it takes to read and tokenise a piece of text."""
        self._stopped.set()
        if self.process == os.getpid() and self._thread is not threading.current_thread():
            self._thread.join()
