"""Read the text to train on: the shards of a split, and the documents in them.

The stream of documents of a split is endless: document number p is document p mod D of pass p div D, where D documents lie on disk.
The first pass is in the order of the files; later ones visit the shards, and the row groups in each, in another order (a function of
the pass alone). Rank r of W owns the numbers p = r mod W. One integer is therefore an exact position.
"""

import bisect
import hashlib
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import accumulate
from pathlib import Path
from typing import Literal

from nanochat.dataset.shards import COLUMN, GET_TEXT, LAST_SHARD, data_dir, missing_shards, read_source, recover, shard_name, shards_in
from nanochat.errors import UserError

PIECE_DOCUMENTS, PIECE_CHARS = 128, 1 << 19      # `Documents.walk` hands out pieces of about this size


def shard_paths(split: Literal["train", "val"], folder: str | Path | None = None) -> list[Path]:
    """Return the shards of a split, in order. `folder` is data_dir() where left out.

    Validation is one shard that does not depend on how many were fetched: shard_01822 of FineWeb-Edu, the last one of made
    shards. A folder without source.json (shards fetched by another program) is taken as it is: its last shard is validation.
    Raises UserError where the folder is missing, empty or incomplete.
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
                        f"{f' (and {len(lost) - 1} more)' if lost[1:] else ''}: {_way_back(folder)}.")
    val = folder / shard_name(LAST_SHARD) if source.get("source") == "fineweb-edu" else found[-1]
    if val not in found:
        raise UserError(f"the validation shard {val} is missing: {_way_back(folder)}.")
    if split == "val":
        return [val]
    train = [path for path in found if path != val]
    if not train:
        raise UserError(f"{folder} holds the validation shard alone, and no shard to train on: "
                        "fetch some with `python -m nanochat.dataset -n 8`.")
    return train


def _way_back(folder: Path) -> str:
    """What to do about a shard that is lost or corrupt."""
    source = {}
    with suppress(UserError):
        source = read_source(folder)
    kind = source.get("source")
    if kind == "fineweb-edu":
        return "`python -m nanochat.dataset -n N`, with the N you fetched, checks every shard and fetches the bad ones again"
    if kind in ("import", "small-world"):
        return f"make the shards again: `python -m nanochat.dataset {source.get('command', kind)}` with --replace"
    return "fetch or make it again; " + GET_TEXT


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    import pyarrow as pa
    try:
        yield
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"the shard {path} is corrupt or unreadable ({reason}): {_way_back(path.parent)}.") from error


class Documents:
    """The endless stream of documents of some shards, read by number. Not for several threads at once.

    `count`: documents in one pass. Raises UserError where a shard is corrupt, lacks the column `text`, or all are empty.
    """

    def __init__(self, paths: Sequence[Path]):
        self.paths = list(paths)
        self._open: tuple[int, object] | None = None
        self._group: tuple[tuple[int, int], list[str | None]] | None = None
        self._rows: list[list[int]] = []  # documents in each row group of each shard
        for shard, path in enumerate(self.paths):
            with _reading(path):
                metadata = self._file(shard).metadata
                if COLUMN not in metadata.schema.names:
                    raise UserError(f"{path} has no column `{COLUMN}`, only {', '.join(metadata.schema.names) or 'none'}. "
                                    "Turn it into shards with `python -m nanochat.dataset import PATH --text-column NAME`.")
                self._rows.append([metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)])
        self.count = sum(map(sum, self._rows))
        if self.count == 0:
            raise UserError(f"the shards in {self.paths[0].parent if self.paths else 'an empty list'} hold no document: {GET_TEXT}.")
        self._orders: dict[int, tuple[list[tuple[int, int]], list[int]]] = {}

    def fingerprint(self, shards: int | None = None) -> str:
        """Hex digest of names, sizes and row counts of the first `shards` shards (all, where left out)."""
        facts = [(path.name, path.stat().st_size, sum(rows)) for path, rows in list(zip(self.paths, self._rows))[:shards]]
        return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]

    def documents_in(self, shards: int) -> int:
        """Documents in the first `shards` shards."""
        return sum(map(sum, self._rows[:shards]))

    def walk(self, start: int = 0, step: int = 1, stop: int | None = None) -> Iterator[tuple[list[int], list[str]]]:
        """Yield (numbers, texts) of documents start, start + step, ... below `stop` (endless where None), in small pieces."""
        number = start
        while stop is None or number < stop:
            turn, first = divmod(number, self.count)
            order, ends = self._order(turn)
            place = bisect.bisect_right(ends, first)
            end = turn * self.count + ends[place]  # the number after the row group's last document
            numbers = range(number, end if stop is None else min(end, stop), step)
            texts = self._read(*order[place])
            here: list[int] = []
            chars = 0
            for number in numbers:
                here.append(number)
                chars += len(texts[number - end] or "")
                if len(here) == PIECE_DOCUMENTS or chars >= PIECE_CHARS or number == numbers[-1]:
                    yield here, [texts[n - end] or "" for n in here]
                    here, chars = [], 0
            number = numbers[-1] + step

    def pick(self, numbers: Sequence[int]) -> dict[int, str]:
        """Return some documents by number, each row group read once."""
        places = {}
        for number in set(numbers):
            turn, first = divmod(number, self.count)
            order, ends = self._order(turn)
            place = bisect.bisect_right(ends, first)
            places.setdefault(order[place], []).append((number, first - ends[place]))
        return {number: texts[row] or "" for place in sorted(places) for texts in [self._read(*place)] for number, row in places[place]}

    def _order(self, turn: int) -> tuple[list[tuple[int, int]], list[int]]:
        """Row groups as (shard, group) in the order of pass `turn`, and the document counts up to the end of each."""
        if turn not in self._orders:
            dice = random.Random(f"pass {turn}")
            shards = list(range(len(self._rows)))
            order = []
            if turn > 0:
                dice.shuffle(shards)
            for shard in shards:
                groups = list(range(len(self._rows[shard])))
                if turn > 0:
                    dice.shuffle(groups)
                order += [(shard, group) for group in groups]
            if len(self._orders) > 2:
                self._orders.clear()
            self._orders[turn] = order, list(accumulate(self._rows[shard][group] for shard, group in order))
        return self._orders[turn]

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
        return self._group[1]


def iter_documents(split: Literal["train", "val"], folder: str | Path | None = None, rank: int = 0, world_size: int = 1) -> Iterator[str]:
    """Yield the documents of a split once: document i of the stream is rank i % world_size's. Raises UserError as `shard_paths` does."""
    if not 0 <= rank < world_size:
        raise ValueError(f"rank is {rank} of {world_size}; ranks count from 0 to world_size - 1")
    documents = Documents(shard_paths(split, folder))
    for _, texts in documents.walk(rank, world_size, documents.count):
        yield from texts
