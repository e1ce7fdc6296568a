"""Documents to batches: packed rows of T+1 tokens, made in a background thread, with an exact position.

    source = TextSource(tokenizer, "train")
    loader = PackedLoader(source, batch_size=32, sequence_len=2048, ranks=ranks, rows_per_step=256)
    inputs, targets = next(loader)        # (B, T) int64 each, on the device; targets are the inputs shifted by one
    state = loader.state_dict()           # after a step: a new loader with state=state continues with the next row

There is one order of rows, whatever the number of ranks and the batch size: step s trains on the rows from s · R on, R
of them, and the ranks take turns at its micro-batches. Each rank packs all rows and keeps its own. So all ranks have
the same state, and any number of them goes on from it. This costs a rank the reading, tokenising and packing for all:
35 ms of one core for 524,288 tokens (Xeon, 2.8 GHz), a tenth of a core where d20 trains on 8 H100s.

A document is a bos token and its own tokens. A row begins with the oldest document of a buffer, and is then filled
best-fit: the largest document that still fits whole, again and again; where none fits, the largest of all is cut to
fill the row. Nothing is padded. The rest of a cut document goes back into the buffer as its youngest, with a bos of its
own, so no token is lost and long documents take turns.

A row that began with the largest document instead would leave the short ones in the buffer, some for the whole run: the
first steps of a run would see long documents only.

Dropping the rests instead, and cutting the shortest document so that they are small, loses 30 % of all tokens on web
pages (log-normal, mean 994 tokens, rows of 2049, buffer of 512), 13 % on documents of 100 to 200 tokens in rows of 513,
and 96 % on books. There every row cuts a document; here four rows of five do.
"""

import os
import queue
import threading
import weakref
from bisect import bisect_left, bisect_right, insort
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import torch

from nanochat.dataset import Documents, data_dir, shard_paths
from nanochat.dataset.arrival import planned_shards
from nanochat.distributed import Ranks
from nanochat.errors import UserError

BUFFER_DOCUMENTS = 512      # more documents cut fewer of them, but make the state larger and a restart slower
BUFFER_TOKENS = 1 << 22     # 16 MB; limits the buffer where documents are books
ORDER = 2                   # how rows are packed; 1: a row begins with the largest document, as states without it say
NO_COUNTS = {"documents": 0, "tokens": 0, "rows": 0, "cut": 0, "padded": 0}
PADDING = -1


def unlearnt(tokens: Any) -> Any:
    """Return what stands in a document for tokens that are read, but are no targets: −2 − token. It is its own
    inverse."""
    return PADDING - 1 - tokens


class PackedBatch(NamedTuple):
    """A batch of packed rows; targets are −1 where there is padding, and where the document says so (`unlearnt`)."""

    inputs: torch.Tensor    # (B, T) int64
    targets: torch.Tensor   # (B, T) int64


class DocumentSource(Protocol):
    """What PackedLoader packs: an endless stream of numbered documents, and their tokens.

    A pass has `count` documents; document number n belongs to pass n div count, so one number is an exact position.
    What a document is (text, a conversation) is the source's own affair.

    split: "train" or "val". folder: where the documents come from, for messages. shards: files that hold them, and are
    known; planned: those that will be, more than `shards` while text still arrives, which no pass ends before.
    bos: the token that precedes each document. tokenizer_fingerprint: None where the tokenizer has none.
    """

    split: str
    folder: Path
    shards: int
    planned: int
    count: int
    bos: int
    tokenizer_fingerprint: str | None

    def walk(self, start: int, stop: int | None) -> Iterator[tuple[list[int], list[Any]]]:
        """Yield (numbers, documents) from `start` on, below `stop` (endless where None), in small pieces; an empty
        piece where text has to arrive first."""

    def pick(self, numbers: Sequence[int]) -> dict[int, Any]:
        """Return some documents by number."""

    def encode(self, documents: Sequence[Any]) -> list[np.ndarray]:
        """Return the tokens of each document without bos, 1-D. Where documents are not cut, they and `bos` may be
        `unlearnt`."""

    def fingerprint(self, shards: int | None = None) -> str:
        """Return a digest that changes when the documents change; of the first `shards` files, all where None."""


class TextSource(Documents):
    """The text shards of a split as a DocumentSource.

    Args:
        tokenizer: encodes the texts. split: "train" or "val". folder: defaults to data_dir().
        expected: training shards that are planned, where some may still arrive: the order of the documents is that of
            the plan. None reads those that are there.
        say: prints a line to the user.
        seed: of the order of the documents; 0 is that of the shards.

    Raises:
        UserError: there is no text, it is corrupt, or a planned shard does not arrive; or another order is asked for
            where shards are planned.
    """

    def __init__(self, tokenizer: Any, split: Literal["train", "val"], folder: str | Path | None = None, *,
                 expected: int | None = None, say: Callable[[str], None] = print, seed: int = 0):
        if expected is None:
            super().__init__(shard_paths(split, folder), seed=seed)
        elif seed:
            raise UserError("--data-seed needs the whole text, and --shards may begin with a part of it: leave out one "
                            "of them")
        else:
            paths, arrival = planned_shards(expected, Path(folder) if folder is not None else data_dir(), say)
            super().__init__(paths, arrival.here if arrival is not None else None)
        self.tokenizer, self.split = tokenizer, split
        self.folder, self.planned = self.paths[0].parent, len(self.paths)
        self.bos = tokenizer.get_bos_token_id()
        self.tokenizer_fingerprint = tokenizer.fingerprint() if hasattr(tokenizer, "fingerprint") else None

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return the tokens of each text without bos."""
        if hasattr(self.tokenizer, "encode_flat"):
            ids, offsets = self.tokenizer.encode_flat(texts)
            # copies: a view would keep all of ids in memory
            return [ids[start:end].copy() for start, end in zip(offsets[:-1], offsets[1:])]
        return [np.array(ids, dtype=np.uint32) for ids in self.tokenizer.encode(texts)]


class Packer:
    """Packs documents into rows.

    Before each choice the buffer is refilled to BUFFER_DOCUMENTS documents or BUFFER_TOKENS tokens, so that the next
    row is a function of the buffer and of the stream's position alone.

    Args:
        stream: yields (number, tokens), tokens 1-D without bos and not empty.
        bos: the token that precedes each document.
        row_tokens: tokens of a row, T + 1.
        cut: False never cuts a document that fits a row: where none fits the rest of a row, the rest is PADDING.
        order: ORDER, or an earlier one.
    """

    def __init__(self, stream: Iterator[tuple[int, np.ndarray]], bos: int, row_tokens: int, cut: bool = True,
                 order: int = ORDER):
        self._stream, self._bos, self._row_tokens, self._cut, self._order = stream, bos, row_tokens, cut, order
        self._documents: OrderedDict[int, tuple[int, int, np.ndarray]] = OrderedDict()  # by age: number, offset, tokens
        self._sizes: list[tuple[int, int]] = []  # sorted (size, -age) of the same
        self._buffered_tokens = 0
        self._age = 0
        self._ended = False
        self.last = -1      # number of the last document taken from the stream
        self.counts = dict(NO_COUNTS)

    def put(self, number: int, offset: int, tokens: np.ndarray) -> None:
        """Add a document to the buffer as its youngest: `tokens` are those of document `number` from `offset` on."""
        self._documents[self._age] = number, offset, tokens
        insort(self._sizes, (self._size(tokens), -self._age))
        self._age += 1
        self._buffered_tokens += len(tokens)

    def buffered(self) -> list[tuple[int, int]]:
        """Return the buffer, oldest first: document number and token offset."""
        return [(number, offset) for number, offset, _ in self._documents.values()]

    def fill(self, row: np.ndarray | None) -> bool:
        """Pack the next row.

        Args:
            row: (T+1,), to write it into; None only packs it.

        Returns:
            False where the stream has ended and too little is left.
        """
        room = self._row_tokens
        while room:
            self._refill()
            place = bisect_right(self._sizes, (room, 1)) - 1  # the largest that fits, the oldest of its size; -1: none
            if room < self._row_tokens and place < 0 and not self._cut:
                if row is not None:
                    row[-room:] = PADDING
                self.counts["padded"] += room
                break
            if not self._documents:
                return False
            begins = room == self._row_tokens and self._order >= 2
            age = next(iter(self._documents)) if begins else -self._sizes[place][1]
            number, offset, tokens = self._documents.pop(age)
            del self._sizes[bisect_left(self._sizes, (self._size(tokens), -age))]
            self._buffered_tokens -= len(tokens)
            part = min(room - 1, len(tokens))
            if row is not None:
                at = len(row) - room
                row[at] = self._bos
                row[at + 1:at + 1 + part] = tokens[:part]
            room -= 1 + part
            if part < len(tokens):
                self.put(number, offset + part, tokens[part:])
                self.counts["cut"] += part > 0
        self.counts["rows"] += 1
        return True

    def _size(self, tokens: np.ndarray) -> int:
        """Return how many tokens of a row a document takes."""
        return min(1 + len(tokens), self._row_tokens)

    def _refill(self) -> None:
        while not self._ended and len(self._documents) < BUFFER_DOCUMENTS and self._buffered_tokens < BUFFER_TOKENS:
            number, tokens = next(self._stream, (-1, None))
            if tokens is None:
                self._ended = True
                return
            self.last = number
            self.put(number, 0, tokens)
            self.counts["documents"] += 1
            self.counts["tokens"] += len(tokens)


class Position(NamedTuple):
    """Where the order of rows stands between two steps: the rows before it, the next document of the stream, the
    documents in the buffer as (number, offset), oldest first, and how rows are packed."""

    rows: int = 0
    next: int = 0
    waiting: Sequence[tuple[int, int]] = ()
    order: int = ORDER


class PackedLoader:
    """An endless iterator over the batches of one rank.

    The thread that makes batches starts at the first `next`; an error in it is raised by `next`. `close()`, leaving a
    `with` block, or dropping the last reference to the loader ends the thread.

    Args:
        source: the documents; `TextSource`, or `nanochat.chat_data.ConversationSource`.
        batch_size: rows B of a batch. sequence_len: tokens T of a row.
        ranks: micro-batches r, r + W, … of each step are those of rank r of W, and come on ranks.device.
        rows_per_step: of all ranks, a multiple of B; None is one batch a rank.
        state: what `state_dict` returned on any rank, to continue from there. It must be of the same tokenizer and
            text; shards may have been added behind those it knows while its first pass lasts; number of ranks,
            batch_size, rows_per_step and sequence_len may differ.
        prefetch: batches made ahead. It changes no batch.
        loop: False ends after one pass; an incomplete last batch is dropped, or padded where cut is False.
        cut: False lets rows end in padding (targets −1) instead of a part of a document.

    Raises:
        UserError: an argument is below 1, or the state does not belong to this source.
    """

    def __init__(self, source: DocumentSource, batch_size: int, sequence_len: int, *, ranks: Ranks,
                 rows_per_step: int | None = None, state: dict | None = None, prefetch: int = 4, loop: bool = True,
                 cut: bool = True):
        for name, value in (("batch_size", batch_size), ("sequence_len", sequence_len), ("prefetch", prefetch)):
            if value < 1:
                raise UserError(f"{name} is {value}; it must be at least 1.")
        micro_batches, rest = divmod(rows_per_step or batch_size * ranks.world_size, batch_size)
        if rest or micro_batches < ranks.world_size:
            raise UserError(f"{rows_per_step} rows a step do not make a batch of {batch_size} rows, or several, for "
                            f"each of {ranks.world_size} ranks.")
        if not loop and source.shards < source.planned:
            raise ValueError("one pass needs the whole text, and some of it still arrives")
        self._source, self._shape, self._ranks = source, (batch_size, sequence_len), ranks
        self._micro_batches, self._prefetch, self._loop, self._cut = micro_batches, prefetch, loop, cut
        self._about = {"split": source.split, "tokenizer": source.tokenizer_fingerprint}
        self._text = self._about_text()
        self._at: Position | None = Position()
        if state is not None:
            self._check(state)
            self._at = Position(state["rows"], state["next"], [tuple(entry) for entry in state["waiting"]],
                                state["order"])
        self.counts = dict(NO_COUNTS)  # of all ranks, since this loader was made
        self._thread: _Thread | None = None
        self._end: BaseException | None = None  # what every further `next` raises

    @property
    def documents(self) -> int:
        """Documents in one pass."""
        return self._source.count

    @property
    def passes(self) -> int:
        """Completed passes over the documents; between steps only."""
        return 0 if self._source.shards < self._source.planned else self._position().next // self._source.count

    def __iter__(self) -> "PackedLoader":
        return self

    def __next__(self) -> PackedBatch:
        if self._end is not None:
            raise self._end
        made = self._running().out.get()
        if isinstance(made, BaseException):
            self._thread.stop()
            self._end = made
            raise made
        tensor, self._at, self.counts = made
        # from pinned memory the host does not wait; mps would read memory that is freed by then, and get other tokens
        tensor = tensor.to(self._ranks.device, non_blocking=self._ranks.device.type == "cuda")
        return PackedBatch(tensor[0], tensor[1])

    def prepare(self, batches: int, interrupted: Callable[[], bool] = lambda: False) -> UserError | None:
        """Wait until so many batches are made, while text still arrives. So a step that has begun can end, and some
        more, though the text may stop to arrive meanwhile.

        Args:
            batches: at most `prefetch`. interrupted: ends the wait where it returns True.

        Returns:
            The error that `next` will raise after the batches that are made; None while there is none.
        """
        if self._text["shards"] == self._source.planned or self._end is not None:
            return None
        out, batches = self._running().out, min(batches, self._prefetch)

        def ready() -> bool:
            return len(out.queue) >= batches or bool(out.queue) and isinstance(out.queue[-1], BaseException)

        with out.not_empty:  # the condition that each put notifies
            while not out.not_empty.wait_for(ready, timeout=0.2) and not interrupted():
                pass
            last = out.queue[-1] if out.queue else None
        self._text = self._about_text()
        return last if isinstance(last, UserError) else None

    def state_dict(self) -> dict:
        """Return the position behind the last step handed out (prefetch does not count) as plain JSON, the same on all
        ranks. Raises ValueError within a step."""
        if self._text["shards"] < self._source.planned:
            self._text = self._about_text()
        at = self._position()
        return self._about | self._text | at._asdict() | {"waiting": [list(entry) for entry in at.waiting]}

    def _position(self) -> Position:
        if self._at is None:
            raise ValueError("a loader's position is known between steps only")
        return self._at

    def _about_text(self) -> dict:
        """Return what a state says of the text: of the shards that are known, and how many more are planned."""
        shards = self._source.shards  # first: the thread may add some now
        planned = {"planned": self._source.planned} if shards < self._source.planned else {}
        return {"shards": shards, "documents": self._source.count, "data": self._source.fingerprint(shards)} | planned

    def _running(self) -> "_Thread":
        if self._thread is None or self._thread.process != os.getpid():  # a fork has no thread: start one
            self._thread = _Thread(self._prefetch, self._make)
            weakref.finalize(self, self._thread.stop)
        return self._thread

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
    def _make(self) -> Callable[[Callable[[], bool]], Iterator]:
        """The thread's work, as a function that holds no reference to the loader: a dropped loader ends its thread."""
        task = (self._source, self._shape, self._ranks, self._micro_batches, self._loop, self._cut, self._position())
        return lambda stopped: _batches(*task, stopped)

    def _check(self, state: dict) -> None:
        about, source = self._about | self._text, self._source
        try:
            known = {key: state[key] for key in (about | Position()._asdict()).keys() - {"planned"}}
            last = max([state["next"] - 1, *(number for number, _ in state["waiting"])])
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"this is no state of a loader: {error!r}.") from error
        if not 1 <= known["order"] <= ORDER:
            raise UserError(f"the loader's state is of order {known['order']} of rows, which a newer version packs: "
                            "resume with that version.")
        if known["split"] != about["split"]:
            raise UserError(f"the loader's state is of the split {known['split']!r}, not of {about['split']!r}.")
        if known["tokenizer"] != about["tokenizer"]:
            raise UserError("the loader's state was made with another tokenizer: a run resumes with the tokenizer it "
                            "began with.")
        shards, planned = known["shards"], state.get("planned", known["shards"])
        same = shards <= source.planned and source.fingerprint(shards) == known["data"]
        if not same or planned == shards < source.planned and last >= known["documents"]:
            only_first = ", and shards can be added during the first pass only" if same else ""
            raise UserError(f"the text in {source.folder} is not what it was when the loader's state was made "
                            f"({shards} shards of {known['documents']} documents then, {source.shards} of "
                            f"{source.count} now){only_first}: put the same shards back, or begin a new run.")
        self._text = self._about_text()


def merged(states: Sequence[dict]) -> dict:
    """Turn the states of all ranks, as versions before the one order of rows saved them, into one state.

    That of one rank goes on with the very next row. Of several, the documents still to come stay the same, and none is
    lost or read twice: those in the buffers and those that some ranks had not reached come first, then all from the
    furthest rank's next document on. The rows become different ones.

    Raises:
        UserError: a rank's state is missing, or they are not of one run.
    """
    try:
        states = sorted(states, key=lambda state: state["rank"])
        count = states[0]["world_size"] if states else 0
        if not states or [state["rank"] for state in states] != list(range(count)):
            raise UserError(f"the loader's states of all {count} ranks are needed to resume; given are those of ranks "
                            f"{[state['rank'] for state in states]}.")
        widest = max(states, key=lambda state: state["shards"])  # while text arrived, each had come to another shard
        if (len({(state["tokenizer"], state["split"]) for state in states}) > 1
                or any(state["data"] != widest["data"] for state in states
                       if state["shards"] == widest["shards"] or "planned" not in state)):
            raise UserError("the loader's states are not of one run: their text or tokenizer differ.")
        start = max(state["next"] for state in states)
        waiting = [entry for state in states for entry in state["waiting"]]
        if count > 1:
            waiting += [[number, 0] for state in states for number in range(state["next"], start, count)]
            waiting.sort()
    except (KeyError, TypeError) as error:
        raise UserError(f"these are no states of a loader: {error!r}.") from error
    about = {key: value for key, value in widest.items()
             if key not in ("rank", "world_size", "batch_size", "sequence_len")}
    return about | {"rows": 0, "next": start, "waiting": waiting, "order": 1 if count == 1 else ORDER}


def _stream(source: DocumentSource, start: int, stop: int | None, stopped: Callable[[], bool]
            ) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (number, tokens) from document `start` on, without empty documents. stopped: whether to end the wait for
    text."""
    empty = 0
    for numbers, documents in source.walk(start, stop):
        if not numbers:
            if stopped():
                return
            continue
        for number, tokens in zip(numbers, source.encode(documents)):
            if len(tokens):
                empty = 0
                yield number, tokens
            else:
                empty += 1
        if empty > source.count:  # more than a whole pass
            raise UserError(f"every document in {source.folder} is empty.")


def _batches(source: DocumentSource, shape: tuple[int, int], ranks: Ranks, micro_batches: int, loop: bool, cut: bool,
             at: Position, stopped: Callable[[], bool]) -> Iterator[tuple[torch.Tensor, Position | None, dict]]:
    """Yield (tensor, position, counts) of each batch of this rank: inputs and targets as (2, B, T), and the position
    behind its step, None where another batch of the step follows."""
    if ranks.device.type == "cuda":
        torch.cuda.set_device(ranks.device)  # otherwise pinning would make a context on the first GPU
    stop = None if loop else source.count
    packer = Packer(_stream(source, at.next, stop, stopped), source.bos, shape[1] + 1, cut, at.order)
    packer.last = at.next - 1
    waiting = [(number, offset) for number, offset in at.waiting if stop is None or number < stop]
    found = source.pick([number for number, _ in waiting])
    for (number, offset), tokens in zip(waiting, source.encode([found[number] for number, _ in waiting])):
        packer.put(number, offset, tokens[offset:])
    row, rows = np.empty(shape[1] + 1, dtype=np.int64), at.rows
    last = (micro_batches - 1 - ranks.rank) // ranks.world_size  # turn of this rank
    while True:
        held = None  # this rank's last batch of the step, until the others' are packed: the position is behind them
        for number in range(micro_batches):
            turn, rank = divmod(number, ranks.world_size)
            mine = rank == ranks.rank
            if mine:
                tensor = torch.empty((2, *shape), dtype=torch.int64, pin_memory=ranks.device.type == "cuda")
                inputs, targets = tensor.numpy()
            for index in range(shape[0]):
                if stopped():
                    return
                if not packer.fill(row if mine else None):
                    if cut or index == 0:
                        if held is not None:
                            yield held, None, dict(packer.counts)
                        return
                    row[:] = PADDING  # the last batch of a pass
                if mine:
                    inputs[index], targets[index] = row[:-1], row[1:]
            rows += shape[0]
            if mine:
                if not cut:
                    inputs[inputs == PADDING] = source.bos
                    np.copyto(inputs, unlearnt(inputs), where=inputs < PADDING)
                    np.copyto(targets, PADDING, where=targets < PADDING)
                if turn < last:
                    yield tensor, None, dict(packer.counts)
                else:
                    held = tensor
        yield held, Position(rows, packer.last + 1, packer.buffered(), at.order), dict(packer.counts)


class _Thread:
    """Runs an iterator in a thread, up to `ahead` results in advance; an exception ends the queue `out`."""

    def __init__(self, ahead: int, make: Callable[[Callable[[], bool]], Iterator]):
        self.out: queue.Queue = queue.Queue(ahead)
        self.process = os.getpid()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(make,), name="loader", daemon=True)
        self._thread.start()

    def _run(self, make: Callable[[Callable[[], bool]], Iterator]) -> None:
        try:
            for made in make(self._stopped.is_set):
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
        """End the thread and wait for it: at most as long as it takes to read and tokenise one piece of text."""
        self._stopped.set()
        if self.process == os.getpid() and self._thread is not threading.current_thread():
            self._thread.join()
