"""Read the text to train on: the shards of a split, and the documents in them.

The document stream of a split is endless. With D documents on disk, number p of the stream is document p mod D of
epoch p div D. Epoch 0 follows the order of the files, so that the last of them may still be on their way
(nanochat/dataset/arrival.py). Later epochs shuffle the shards, and the row groups in each
shard; the order depends on the epoch alone. One integer is therefore an exact position in the stream. A seed other than
0 gives another order, epoch 0 included: it also shuffles the documents in each row group.
"""

import bisect
import hashlib
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import accumulate
from pathlib import Path
from typing import Literal

from nanochat.dataset.shards import (
    COLUMN,
    FINEWEB_EDU,
    GET_TEXT,
    HUB_TEXTS,
    data_dir,
    fetch_command,
    missing_shards,
    read_source,
    recover,
    shards_in,
)
from nanochat.errors import UserError

PIECE_DOCUMENTS, PIECE_CHARS = 128, 1 << 19      # `Documents.walk` yields pieces of about this size


def shard_paths(split: Literal["train", "val"], folder: str | Path | None = None) -> list[Path]:
    """Return the shards of a split, in order. `folder` defaults to data_dir().

    Validation is always one shard, whatever the number of training shards: the one that HUB_TEXTS says where the text
    was fetched, and the last shard of imported or generated text. In a folder without source.json (shards that another
    program fetched) the last shard is validation too. Raises UserError if the folder is missing, empty or incomplete.
    """
    if split not in ("train", "val"):
        raise ValueError(f"split is {split!r}; it is 'train' or 'val'")
    folder = Path(folder) if folder is not None else data_dir()
    recover(folder)
    found = shards_in(folder)
    if not found:
        raise UserError(f"there is no text in {folder}: {GET_TEXT}.")
    source = read_source(folder)
    if lost := missing_shards(folder, source):
        raise UserError(f"{folder / lost[0]} is missing or has another size than when it was written"
                        f"{f' (and {len(lost) - 1} more)' if lost[1:] else ''}: {_repair_hint(folder)}.")
    fetched = HUB_TEXTS.get(source.get("source"))
    val = folder / fetched.val if fetched else found[-1]
    if val not in found:
        raise UserError(f"the validation shard {val} is missing: {_repair_hint(folder)}.")
    if split == "val":
        return [val]
    train = [path for path in found if path != val]
    if not train:
        raise UserError(f"{folder} holds only the validation shard, and no shard to train on: "
                        f"fetch some with `{fetch_command(source['source'] if fetched else FINEWEB_EDU, 8)}`.")
    return train


def _repair_hint(folder: Path) -> str:
    """Say what to do about a missing or corrupt shard."""
    source = {}
    with suppress(UserError):
        source = read_source(folder)
    kind = source.get("source")
    if kind in HUB_TEXTS:
        return (f"run `{fetch_command(kind, 'N')}` with the N you used before: "
                "it checks every shard and fetches the bad ones again")
    if kind in ("import", "small-world"):
        return f"make the shards again: `python -m nanochat.dataset {source.get('command', kind)}` with --replace"
    return "fetch or make it again; " + GET_TEXT


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    import pyarrow as pa
    try:
        yield
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        hint = _repair_hint(path.parent)
        raise UserError(f"the shard {path} is corrupt or unreadable ({reason}): {hint}.") from error


class Documents:
    """The endless document stream of some shards, read by document number. Not thread-safe.

    Args:
        paths: the shards, in order.
        here: where the last of them may still arrive, a function that says whether a shard is there, after a moment
            where it is not (`Arrival.here`). A shard is then opened when the stream comes to it, so that all of them
            are known before the first epoch ends.
        seed: of the order; 0 is that of the files.

    Attributes:
        paths: the shards, in order; the planned ones.
        shards: how many of them are known, the first ones.
        count: documents in these; in one epoch when all are known.

    Raises:
        UserError: a shard is corrupt, a shard has no column `text`, there is no document at all, or what `here` raises.
    """

    def __init__(self, paths: Sequence[Path], here: Callable[[Path], bool] | None = None, seed: int = 0):
        if seed and here is not None:
            raise ValueError("another order than that of the files needs all of them")
        self.paths, self._here, self._seed = list(paths), here, seed
        self.count = 0
        self._open: tuple[int, object] | None = None
        self._group: tuple[tuple[int, int], list[str | None]] | None = None
        self._rows: list[list[int]] = []  # [shard][row group] -> documents
        self._orders: dict[int, tuple[list[tuple[int, int]], list[int]]] = {0: ([], [])}
        for path in self.paths:
            if here is not None and not path.exists():
                break
            self._add()
        if not self.paths:
            raise UserError(f"the shards in an empty list hold no document: {GET_TEXT}.")
        if seed:
            self._orders = {}

    @property
    def shards(self) -> int:
        return len(self._rows)

    def _add(self) -> None:
        """Open the next shard, and append it to the order of epoch 0."""
        shard, path = self.shards, self.paths[self.shards]
        with _reading(path):
            metadata = self._file(shard).metadata
            if COLUMN not in (names := metadata.schema.names):
                raise UserError(f"{path} has no column `{COLUMN}`, only {', '.join(names) or 'none'}. "
                                "Make shards of it: `python -m nanochat.dataset import PATH --text-column NAME`.")
            rows = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
        order, ends = self._orders[0]
        for group, size in enumerate(rows):
            self.count += size
            order.append((shard, group))
            ends.append(self.count)
        self._rows.append(rows)
        if self.shards == len(self.paths) and not self.count:
            raise UserError(f"the shards in {path.parent} hold no document: {GET_TEXT}.")

    def _reach(self, number: int) -> bool:
        """Return whether the place of a document is known. Where its shard is still to come, wait a moment."""
        while number >= self.count and self.shards < len(self.paths):
            if not self._here(self.paths[self.shards]):
                return False
            self._add()
        return True

    def fingerprint(self, shards: int | None = None) -> str:
        """Return 16 hex digits of names, sizes and row counts of the first `shards` shards (default: of the known).

        It waits for those that are still to come.
        """
        shards = self.shards if shards is None else min(shards, len(self.paths))
        while self.shards < shards:
            if self._here(self.paths[self.shards]):
                self._add()
        facts = [(path.name, path.stat().st_size, sum(rows))
                 for path, rows in zip(self.paths[:shards], self._rows[:shards])]
        return hashlib.sha256(repr([*facts, self._seed] if self._seed else facts).encode()).hexdigest()[:16]

    def walk(self, start: int = 0, stop: int | None = None) -> Iterator[tuple[list[int], list[str]]]:
        """Yield the documents from `start` on in pieces of at most PIECE_DOCUMENTS, as (numbers, texts).

        A piece is empty where the next shard has not arrived yet: the caller may stop there.

        Args:
            start: first document number.
            stop: number to stop before; None never stops.
        """
        number = start
        while stop is None or number < stop:
            if not self._reach(number):
                yield [], []
                continue
            row_group, offset = self._locate(number)
            end = number - offset  # the number after the row group's last document
            texts = self._read(*row_group)
            here: list[int] = []
            chars = 0
            after = end if stop is None else min(end, stop)
            for own in range(number, after):
                here.append(own)
                chars += len(texts[own - end] or "")
                if len(here) == PIECE_DOCUMENTS or chars >= PIECE_CHARS:
                    yield here, [texts[n - end] or "" for n in here]
                    here, chars = [], 0
            if here:
                yield here, [texts[n - end] or "" for n in here]
            number = after

    def pick(self, numbers: Sequence[int]) -> dict[int, str]:
        """Return the documents with these numbers; reads each row group once."""
        wanted: dict[tuple[int, int], list[tuple[int, int]]] = {}
        for number in set(numbers):
            row_group, offset = self._locate(number)
            wanted.setdefault(row_group, []).append((number, offset))
        found = {}
        for row_group in sorted(wanted):
            texts = self._read(*row_group)
            found |= {number: texts[offset] or "" for number, offset in wanted[row_group]}
        return found

    def _locate(self, number: int) -> tuple[tuple[int, int], int]:
        """Return the (shard, row group) of a document, and its offset from the row group's end, a negative number."""
        while not self._reach(number):
            pass
        epoch, place = divmod(number, self.count) if number >= self.count else (0, number)
        order, ends = self._order(epoch)
        i = bisect.bisect_right(ends, place)
        return order[i], place - ends[i]

    def _order(self, epoch: int) -> tuple[list[tuple[int, int]], list[int]]:
        """Return the (shard, row group) pairs in the order of an epoch, and the document count up to each one's end."""
        if epoch not in self._orders:
            rng = random.Random(f"pass {epoch}" + (f" of order {self._seed}" if self._seed else ""))
            shards = list(range(len(self._rows)))
            order = []
            rng.shuffle(shards)
            for shard in shards:
                groups = list(range(len(self._rows[shard])))
                rng.shuffle(groups)
                order += [(shard, group) for group in groups]
            if len(self._orders) > 3:
                self._orders = {0: self._orders[0]} if 0 in self._orders else {}
            self._orders[epoch] = order, list(accumulate(self._rows[shard][group] for shard, group in order))
        return self._orders[epoch]

    def _file(self, shard: int):
        import pyarrow.parquet as pq
        if self._open is None or self._open[0] != shard:
            if self._open is not None:
                self._open[1].close()
            self._open = None
            self._open = shard, pq.ParquetFile(self.paths[shard], page_checksum_verification=True)
        return self._open[1]

    def _read(self, shard: int, group: int) -> list[str | None]:
        if self._group is None or self._group[0] != (shard, group):
            with _reading(self.paths[shard]):
                column = self._file(shard).read_row_group(group, columns=[COLUMN], use_threads=False).column(COLUMN)
                self._group = (shard, group), column.to_pylist()
            if self._seed:
                random.Random(f"row group {shard} {group} of order {self._seed}").shuffle(self._group[1])
        return self._group[1]


def iter_documents(split: Literal["train", "val"], folder: str | Path | None = None, rank: int = 0,
                   world_size: int = 1) -> Iterator[str]:
    """Yield the documents of one epoch of a split.

    Args:
        split: "train" or "val".
        folder: where the shards are; defaults to data_dir().
        rank, world_size: yields document i only if i % world_size == rank.

    Raises:
        UserError: as in `shard_paths`.
    """
    if not 0 <= rank < world_size:
        raise ValueError(f"rank is {rank} of {world_size}; ranks count from 0 to world_size - 1")
    documents = Documents(shard_paths(split, folder))
    for numbers, texts in documents.walk(0, documents.count):
        for number, text in zip(numbers, texts):
            if number % world_size == rank:
                yield text
