"""Make shards of the user's own files, or of the small world.

    python -m nanochat.dataset import PATH... [--to FOLDER] [--doc-separator '<|doc|>']
    python -m nanochat.dataset small-world [--docs N] [--seed S]

The user's documents are shuffled, in the same way each time. A hash of its text puts a document into train or
validation, so exact copies of a document are always in the same split. Memory use stays small: documents go into random
buckets on disk, then each bucket is sorted and written. Running the same command again does nothing. Shards of another
command are replaced only with --replace, and only once the new ones are complete.
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

from nanochat.dataset.readers import TextFormat, find_files, is_compressed, read_documents
from nanochat.dataset.shards import ShardWriter, already_made, check_free, data_dir, staged, write_source, writing
from nanochat.errors import UserError
from nanochat.files import in_words, need_disk, sha256_of

BUCKET_BYTES = 1 << 26
RECORD = struct.Struct("<QQI")  # hash for the split, hash for the order, bytes of text
SMALL_WORLD_VAL = 1 << 40       # number of the first validation document, beyond every training document
SMALL_WORLD_VAL_DOCUMENTS = 1000


def import_files(paths: Sequence[str | Path], folder: Path, *, doc_separator: str = "", val_fraction: float = 0.01,
                 text_column: str = "text", encoding: str = "utf-8", replace: bool = False,
                 say: Callable[[str], None] = print) -> None:
    """Make shards of the user's files.

    Args:
        paths: files and folders to read.
        folder: where the shards go.
        doc_separator: in .txt and .md, a line that holds only this ends a document; "" makes each file one document.
        val_fraction: share of the documents for validation, between 0 and 1; at least one document.
        text_column: name of the text field in .jsonl, .json and .parquet.
        encoding: of the text files.
        replace: whether to replace imported or generated shards in `folder`.
        say: prints one line to the user.

    Raises:
        UserError: the input cannot be read, or the shards may not go to `folder`. Nothing is changed then.
    """
    if not 0 < val_fraction < 1:
        raise UserError(f"val_fraction is {val_fraction}; it must lie between 0 and 1.")
    files, skipped = find_files(paths)
    if skipped:
        say(f"left out {len(skipped)} files of unknown format, such as {skipped[0]}")
    options = {"doc_separator": doc_separator.strip(), "val_fraction": val_fraction,
               "text_column": text_column, "encoding": encoding}
    fingerprint = _digest(json.dumps([options, [(name, _file_digest(path)) for name, path in files]]))
    defaults = {"doc_separator": "", "val_fraction": 0.01, "text_column": "text", "encoding": "utf-8"}
    command = ["import", *[str(Path(path).expanduser().resolve()) for path in paths],
               *[f"--{key.replace('_', '-')}={value}" for key, value in options.items() if value != defaults[key]]]
    sizes = {path: path.stat().st_size * (4 if is_compressed(path) else 1) for _, path in files}
    size = sum(sizes.values())  # of the text, estimated

    def write(new: Path, writer: ShardWriter) -> str:
        need_disk(folder, int(1.6 * size), "the import")
        with ShuffleBuckets(new / "buckets", 1 + size // BUCKET_BYTES) as buckets:
            for _, path in _with_progress(files):
                for text in read_documents(path, TextFormat(doc_separator.strip(), text_column, encoding)):
                    buckets.add(text)
            if buckets.count == 0:
                raise UserError(f"there is no text in {', '.join(map(str, paths))}: every document is empty.")
            if buckets.empty:
                say(f"left out {buckets.empty} empty documents")
            if buckets.count == 1:
                pieces = list(cut(buckets.only()))
                if len(pieces) < 2:
                    raise UserError("there is only one document, too short to be cut into a training and a validation "
                                    "part: import more text, or name the line that ends a document with "
                                    "--doc-separator.")
                say(f"there is only one document: it is cut at paragraph ends into {len(pieces)} pieces, "
                    "so that some can be kept for validation")
                buckets.refill(pieces)
            return _split(buckets, writer, val_fraction)

    _make(folder, "import", fingerprint, shlex.join(command), replace, say, write)


def make_small_world(folder: Path, docs: int = 100_000, seed: int = 0, replace: bool = False,
                     say: Callable[[str], None] = print) -> None:
    """Make training shards of the small world, and a validation shard that does not depend on `docs`.

    Args:
        folder: where the shards go.
        docs: training documents; numbers 0 to docs - 1 of the generator.
        seed: which small world.
        replace: whether to replace imported or generated shards in `folder`.
        say: prints one line to the user.

    Raises:
        UserError: `docs` is below 1, or the shards may not go to `folder`.
    """
    from nanochat.small_world import documents
    if docs < 1:
        raise UserError(f"docs is {docs}; it must be at least 1.")
    sample = list(islice(documents(seed, 0), 20))  # so that a change of the generator changes the fingerprint
    fingerprint = _digest(json.dumps([docs, seed, SMALL_WORLD_VAL, SMALL_WORLD_VAL_DOCUMENTS, sample]))

    def write(new: Path, writer: ShardWriter) -> str:
        need_disk(folder, docs * 400, "the small world")
        chars = 0
        for text in _with_progress(islice(documents(seed, 0), docs), docs):
            writer.add(text)
            chars += len(text)
        for text in islice(documents(seed, SMALL_WORLD_VAL), SMALL_WORLD_VAL_DOCUMENTS):
            writer.add_validation(text)
        return _summary(docs, chars, SMALL_WORLD_VAL_DOCUMENTS)

    command = f"small-world --docs={docs} --seed={seed}"
    _make(folder, "small-world", fingerprint, command, replace, say, write, seed=seed)


def _make(folder: Path, kind: str, fingerprint: str, command: str, replace: bool, say: Callable[[str], None],
          write: Callable[[Path, ShardWriter], str], **about: int) -> None:
    """Make shards in `folder`, unless the same command made them before.

    Args:
        folder, replace, say: as in `import_files`.
        kind: "import" or "small-world".
        fingerprint: of the command and its input.
        command: the command that makes the same shards again, without --to; goes into source.json.
        write: called as write(temporary folder, writer); writes the documents and returns a summary for the user.
        about: further fields of source.json.
    """
    folder = folder.resolve()  # if it is a link to a folder on another disk, the link stays
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
            write_source(new, about | {"source": kind, "summary": summary, "command": command,
                                       "fingerprint": fingerprint, "shards": shards})
    size = sum(facts["bytes"] for facts in shards.values())
    say(f"made {len(shards)} shards in {folder} ({in_words(size)}): {summary}")


def _split(buckets: "ShuffleBuckets", writer: ShardWriter, val_fraction: float) -> str:
    """Write the documents of the buckets: the lowest `val_fraction` of all hash values are for validation."""
    if buckets.lowest == buckets.highest:
        raise UserError(f"all {buckets.count} documents are the same text: there is nothing to validate with. "
                        "Import other text too.")
    border = int(val_fraction * 2**64)
    border = max(border, buckets.lowest + 1)      # at least one document for validation,
    border = min(border, buckets.highest)         # and at least one for training
    train = val = chars = 0
    for split, text in buckets.drain():
        if split < border:
            writer.add_validation(text)
            val += 1
        else:
            writer.add(text)
            train += 1
            chars += len(text)
    return _summary(train, chars, val)


def _summary(train: int, chars: int, val: int) -> str:
    return f"{train:,} document{'s' * (train > 1)} to train on ({chars:,} characters), {val:,} for validation"


class ShuffleBuckets:
    """Documents spread over files by hash, to be read back in an order that is random but the same each time.

    Attributes:
        count: documents added.
        empty: documents left out because they hold only white space.
        lowest, highest: of the hashes that decide the split.
    """

    def __init__(self, folder: Path, buckets: int):
        self.folder = folder
        folder.mkdir()
        self._files = [open(folder / str(number), "w+b") for number in range(min(buckets, 256))]
        self._clear()

    def _clear(self) -> None:
        self.count = self.empty = 0
        self.lowest, self.highest = 2**64, -1

    def add(self, text: str) -> None:
        """Add a document; empty ones are only counted."""
        if not text.strip():
            self.empty += 1
            return
        try:
            data = text.encode()
        except UnicodeEncodeError:  # JSON escapes can spell half a surrogate pair
            data = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode()
        split = _hash(data)
        order = _hash(struct.pack("<QQ", split, self.count))  # spreads copies of one text
        file = self._files[order % len(self._files)]
        file.write(RECORD.pack(split, order, len(data)))
        file.write(data)
        self.count += 1
        self.lowest, self.highest = min(self.lowest, split), max(self.highest, split)

    def only(self) -> str:
        """Return the text of the only document."""
        return next(text for _, text in self.drain())

    def refill(self, texts: list[str]) -> None:
        """Replace all documents by `texts`."""
        for file in self._files:
            file.seek(0)
            file.truncate()
        self._clear()
        for text in texts:
            self.add(text)

    def drain(self) -> Iterator[tuple[int, str]]:
        """Yield (hash for the split, text) of all documents, with one bucket in memory at a time."""
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

    def __enter__(self) -> "ShuffleBuckets":
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files:
            with suppress(OSError):  # a full disk was reported already
                file.close()
        shutil.rmtree(self.folder, ignore_errors=True)


def cut(text: str) -> Iterator[str]:
    """Yield about a hundred pieces of a text, each of at least 1000 characters.

    Cuts at blank lines; if there are none, at line ends or spaces. The pieces joined are the text, apart from the white
    space at the cuts.
    """
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
    return iter(tqdm(items, total=total, disable=None, leave=False))  # disable=None: a bar only on a terminal


def _hash(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _file_digest(path: Path) -> str:
    try:
        return sha256_of(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from error
