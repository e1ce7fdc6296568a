"""Shards made on this machine: of the user's own files, and of the small world.

    python -m nanochat.dataset import PATH... [--to FOLDER] [--doc-separator '<|doc|>']
    python -m nanochat.dataset small-world [--docs N] [--seed S]

Documents of the user come shuffled (the same way each time) and are split by a hash of their text: the same document is always on
the same side, and so are its exact copies. Memory stays small: documents are first dealt out to buckets on disk at random, then each
bucket is sorted and written. The same command again finds its work done; other shards are replaced with --replace only, and only when
the new ones are complete.
"""

import hashlib
import json
import shlex
import shutil
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path

from nanochat.dataset.readers import PARQUET, Format, find_files, read_documents, suffix_of
from nanochat.dataset.shards import ShardWriter, already_made, check_free, data_dir, staged, write_source, writing
from nanochat.errors import UserError
from nanochat.files import in_words, need_disk, sha256_of

BUCKET_BYTES = 1 << 26
RECORD = struct.Struct("<QQI")  # hash that splits, hash that orders, bytes of text
SMALL_WORLD_VAL = 1 << 40       # number of the first validation document: no training run comes to it
SMALL_WORLD_VAL_DOCUMENTS = 1000


def import_files(paths: Sequence[str | Path], folder: Path, *, doc_separator: str = "", val_fraction: float = 0.01,
                 text_column: str = "text", encoding: str = "utf-8", replace: bool = False, say: Callable[[str], None] = print) -> None:
    """Make shards of `paths` in `folder`. Raises UserError for input that cannot be read (nothing is then changed)."""
    if not 0 < val_fraction < 1:
        raise UserError(f"val_fraction is {val_fraction}; it must lie between 0 and 1.")
    files, skipped = find_files(paths)
    if skipped:
        say(f"left out {len(skipped)} files of no known format, such as {skipped[0]}")
    form = Format(doc_separator.strip(), text_column, encoding)
    options = {"doc_separator": form.doc_separator, "val_fraction": val_fraction, "text_column": text_column, "encoding": encoding}
    fingerprint = _digest(json.dumps([options, [(name, _file_digest(path)) for name, path in files]]))
    usual = {"doc_separator": "", "val_fraction": 0.01, "text_column": "text", "encoding": "utf-8"}
    command = ["import", *[str(Path(path).expanduser().resolve()) for path in paths],
               *[f"--{key.replace('_', '-')}={value}" for key, value in options.items() if value != usual[key]]]

    size = {path: path.stat().st_size * (4 if suffix_of(path) in PARQUET or path.name.lower().endswith(".gz") else 1) for _, path in files}

    def write(new: Path, writer: ShardWriter) -> str:
        need_disk(folder, int(1.6 * sum(size.values())), "the import")
        with Buckets(new / "buckets", 1 + sum(size.values()) // BUCKET_BYTES) as buckets:
            for _, path in _with_progress(files):
                for text in read_documents(path, form):
                    buckets.add(text)
            if buckets.count == 0:
                raise UserError(f"there is no text in {', '.join(map(str, paths))}: every document is empty.")
            if buckets.empty:
                say(f"left out {buckets.empty} empty documents")
            if buckets.count == 1:
                pieces = list(cut(buckets.only()))
                if len(pieces) < 2:
                    raise UserError("there is one document, too short to be cut into one part to train on and one to validate with: "
                                    "import more text, or name the line that ends a document with --doc-separator.")
                say(f"there is one document: cut at paragraph ends into {len(pieces)}, so that some can be kept for validation")
                buckets.refill(pieces)
            return _split(buckets, writer, val_fraction)

    _make(folder, "import", fingerprint, shlex.join(command), replace, say, write)


def make_small_world(folder: Path, docs: int = 100_000, seed: int = 0, replace: bool = False, say: Callable[[str], None] = print) -> None:
    """Make shards of documents 0 to docs - 1 of the small world, and a validation shard that is the same for any `docs`."""
    from nanochat.small_world import documents
    if docs < 1:
        raise UserError(f"docs is {docs}; it must be at least 1.")
    sample = list(islice(documents(seed, 0), 20))  # the generator itself may have changed since
    fingerprint = _digest(json.dumps([docs, seed, SMALL_WORLD_VAL, SMALL_WORLD_VAL_DOCUMENTS, sample]))

    def write(new: Path, writer: ShardWriter) -> str:
        need_disk(folder, docs * 400, "the small world")
        chars = 0
        for text in _with_progress(islice(documents(seed, 0), docs), docs):
            writer.add(text)
            chars += len(text)
        for text in islice(documents(seed, SMALL_WORLD_VAL), SMALL_WORLD_VAL_DOCUMENTS):
            writer.add_validation(text)
        return _said(docs, chars, SMALL_WORLD_VAL_DOCUMENTS)

    _make(folder, "small-world", fingerprint, f"small-world --docs={docs} --seed={seed}", replace, say, write, seed=seed)


def _make(folder: Path, kind: str, fingerprint: str, command: str, replace: bool, say: Callable[[str], None],
          write: Callable[[Path, ShardWriter], str], **about: int) -> None:
    folder = folder.resolve()  # a link to a folder on another disk stays one
    if folder != data_dir().resolve():
        command += f" --to={shlex.quote(str(folder))}"
    with writing(folder):
        if not replace and already_made(folder, fingerprint):
            say(f"already done: {folder} holds this {kind}")
            return
        check_free(folder, kind, fingerprint, replace)
        with staged(folder) as new:
            writer = ShardWriter(new)
            try:
                summary = write(new, writer)
                shards = writer.close()
            except BaseException:
                writer.abandon()
                raise
            write_source(new, about | {"source": kind, "summary": summary, "command": command, "fingerprint": fingerprint,
                                       "shards": shards})
    size = sum(facts["bytes"] for facts in shards.values())
    say(f"made {len(shards)} shards in {folder} ({in_words(size)}): {summary}")


def _split(buckets: "Buckets", writer: ShardWriter, val_fraction: float) -> str:
    """Write what the buckets hold: documents whose hash lies under `val_fraction` of all hashes are for validation."""
    if buckets.lowest == buckets.highest:
        raise UserError(f"all {buckets.count} documents are the same text: there is nothing to validate with.")
    border = int(val_fraction * 2**64)
    below = max(border, buckets.lowest + 1)       # one document at least is for validation,
    below = min(below, buckets.highest)           # and one at least to train on
    train = val = chars = 0
    for split, text in buckets.drain():
        if split < below:
            writer.add_validation(text)
            val += 1
        else:
            writer.add(text)
            train += 1
            chars += len(text)
    return _said(train, chars, val)


def _said(train: int, chars: int, val: int) -> str:
    return f"{train:,} document{'s' * (train > 1)} to train on ({chars:,} characters), {val:,} for validation"


class Buckets:
    """Documents dealt out over files by hash, to be drained in an order that is random but the same each time."""

    def __init__(self, folder: Path, buckets: int):
        self.folder = folder
        folder.mkdir()
        self._files = [open(folder / str(number), "w+b") for number in range(min(buckets, 256))]
        self._clear()

    def _clear(self) -> None:
        self.count = self.empty = 0
        self.lowest, self.highest = 2**64, -1

    def add(self, text: str) -> None:
        if not text.strip():
            self.empty += 1
            return
        try:
            data = text.encode()
        except UnicodeEncodeError:  # JSON can spell half a surrogate pair
            data = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode()
        split = _hash(data)
        order = _hash(struct.pack("<QQ", split, self.count))  # copies of one text come apart
        file = self._files[order % len(self._files)]
        file.write(RECORD.pack(split, order, len(data)))
        file.write(data)
        self.count += 1
        self.lowest, self.highest = min(self.lowest, split), max(self.highest, split)

    def only(self) -> str:
        """The text, where there is one."""
        return next(text for _, text in self.drain())

    def refill(self, texts: list[str]) -> None:
        """Hold `texts` and nothing else."""
        for file in self._files:
            file.seek(0)
            file.truncate()
        self._clear()
        for text in texts:
            self.add(text)

    def drain(self) -> Iterator[tuple[int, str]]:
        """Yield (hash, text) of all documents, one bucket in memory at a time."""
        for file in self._files:
            file.seek(0)
            records = []
            while head := file.read(RECORD.size):
                split, order, size = RECORD.unpack(head)
                records.append((order, split, file.read(size)))
            records.sort(key=lambda record: record[0], reverse=True)
            while records:
                _, split, data = records.pop()
                yield split, data.decode()

    def __enter__(self) -> "Buckets":
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files:
            with suppress(OSError):  # a full disk has been said already
                file.close()
        shutil.rmtree(self.folder, ignore_errors=True)


def cut(text: str) -> Iterator[str]:
    """Yield about a hundred pieces of a text, of at least 1000 characters: at blank lines, or where there are none at line ends or
    spaces. Joined again they are the text, but for the white space at the cuts."""
    size = max(1000, len(text) // 100)
    start = 0
    while start < len(text):
        end = len(text)
        if len(text) - start > 1.5 * size:
            for mark in ("\n\n", "\n", " "):
                found = text.find(mark, start + size, start + 3 * size)
                if found >= 0:
                    end = found
                    break
            else:
                end = start + size
        yield text[start:end].strip("\n ")
        start = end


def _with_progress(items: Sequence | Iterator, total: int | None = None) -> Iterator:
    from tqdm import tqdm
    return iter(tqdm(items, total=total, disable=None, leave=False))  # None: on a terminal only


def _hash(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _file_digest(path: Path) -> str:
    try:
        return sha256_of(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from error
