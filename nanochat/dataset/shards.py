"""Shards: parquet files of documents, one folder for one source of text.

A folder holds shard_00000.parquet, shard_00001.parquet, ... (column `text`, row groups of at most 1024 documents, zstd)
and source.json, which says where they come from, so that two sources never mix. Imported and generated shards are
written into a temporary folder beside it. When they are complete, one rename puts it in place: after a kill or on a
full disk the old shards are still there.
"""

import errno
import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from nanochat.errors import UserError
from nanochat.files import FULL, atomic_write, base_dir, sync_folder, to_json

COLUMN = "text"
GROUP_ROWS = 1024               # documents in a row group, as in the published shards
GROUP_CHARS = 1 << 24           # characters after which a row group ends early, so that one fits in memory
SHARD_CHARS = 250_000_000       # characters in a training shard: about 100 MB on disk
DOCUMENT_BYTES = 1 << 30        # a document is held in memory, and parquet limits strings to 2 GB
SHARD_NAME = re.compile(r"shard_\d{5}\.parquet")
GET_TEXT = ("get text in one of three ways: `python -m nanochat.dataset -n 8` (FineWeb-Edu from the Hugging Face hub; "
            "ClimbMix with --source=climbmix), "
            "`python -m nanochat.dataset import PATH...` (your own files), "
            "`python -m nanochat.dataset small-world` (needs no network)")


@dataclass(frozen=True)
class HubText:
    """A data set of the hub to train on: shards in the order in which they are trained on, and one for validation.

    title: what it is called. repo: where it is. last: number of the last shard, which is for validation, whatever the
    number of those that are fetched; so there are as many to train on.
    """

    title: str
    repo: str
    last: int

    @property
    def val(self) -> str:
        """The file name of the validation shard."""
        return shard_name(self.last)


# by what source.json calls them; both are shuffled, in shards of about 250 million characters
HUB_TEXTS = {
    "fineweb-edu": HubText("FineWeb-Edu", "karpathy/fineweb-edu-100b-shuffle", 1822),
    "climbmix": HubText("ClimbMix", "karpathy/climbmix-400b-shuffle", 6542),
}
FINEWEB_EDU = "fineweb-edu"  # the published model's


def fetch_command(source: str, count: int | str) -> str:
    """Return the command that fetches `count` training shards of a source in HUB_TEXTS."""
    return f"python -m nanochat.dataset -n {count}{'' if source == FINEWEB_EDU else f' --source={source}'}"


def data_dir() -> Path:
    """Return the folder of pretraining text. It may not exist yet."""
    return base_dir() / "base_data"


def shard_name(index: int) -> str:
    return f"shard_{index:05d}.parquet"


def shards_in(folder: Path) -> list[Path]:
    """Return the shards of a folder, in order; an empty list if there is no folder."""
    return sorted(path for path in folder.glob("shard_*.parquet") if SHARD_NAME.fullmatch(path.name))


def read_source(folder: Path) -> dict:
    """Return the contents of source.json; {} if there is none. Raises UserError if it cannot be read."""
    path = folder / "source.json"
    try:
        source = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(source, dict) or not isinstance(source.get("source"), str):
            raise ValueError("it has no field `source`")
        return source
    except FileNotFoundError:
        return {}
    except (ValueError, OSError) as error:
        raise UserError(f"{path} cannot be read ({error}): this file says where the shards beside it come from. "
                        f"Move {folder} away, then {GET_TEXT}.") from error


def fetched_source(folder: Path) -> str | None:
    """Return which of HUB_TEXTS a folder holds, or is being filled with; None for other text, or if that is not known.

    Shards without source.json, which another program fetched, tell by the validation shard. Raises as read_source.
    """
    source = read_source(folder)
    if source:
        return source["source"] if source["source"] in HUB_TEXTS else None
    return next((name for name, text in HUB_TEXTS.items() if (folder / text.val).exists()), None)


def write_source(folder: Path, source: dict) -> None:
    with atomic_write(folder / "source.json", "w") as file:
        file.write(to_json(source, indent=1) + "\n")


class ShardWriter:
    """Writes documents as training shards of about SHARD_CHARS characters, and one validation shard as the last.

    Call `close` at the end, or `abandon` after an error.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._train: _ShardFile | None = None
        self._val = _ShardFile(folder / "validation.parquet")
        self._written: list[_ShardFile] = []

    def add(self, text: str) -> None:
        """Add a training document."""
        if self._train is None:
            self._train = _ShardFile(self.folder / shard_name(len(self._written)))
            self._written.append(self._train)
        self._train.add(text)
        if self._train.chars >= SHARD_CHARS:
            self._train.close()
            self._train = None

    def add_validation(self, text: str) -> None:
        """Add a validation document."""
        self._val.add(text)

    def close(self) -> dict[str, dict[str, int]]:
        """Sync all shards to disk; return {file name: {"rows": documents, "bytes": size}}."""
        if self._train is not None:
            self._train.close()
        self._val.close()
        self._val.path = self._val.path.rename(self.folder / shard_name(len(self._written)))
        return {shard.path.name: {"rows": shard.rows, "bytes": shard.path.stat().st_size}
                for shard in [*self._written, self._val]}

    def abandon(self) -> None:
        """Close the files after an error; the caller deletes them."""
        for shard in [*self._written, self._val]:
            shard.writer.is_open = False  # else pyarrow writes a footer when the writer is garbage-collected
            with suppress(OSError):
                shard.file.close()


class _ShardFile:
    """One parquet file, written a row group at a time."""

    def __init__(self, path: Path):
        import pyarrow as pa
        import pyarrow.parquet as pq
        self.path, self.rows, self.chars = path, 0, 0
        self.schema = pa.schema([(COLUMN, pa.string())])
        self.file = open(path, "wb")
        self.writer = pq.ParquetWriter(self.file, self.schema, compression="zstd", compression_level=3,
                                       use_dictionary=False, write_statistics=False,
                                       write_page_checksum=True)  # the checksum reveals a flipped byte
        self.pending: list[str] = []
        self.pending_chars = 0

    def add(self, text: str) -> None:
        self.pending.append(text)
        self.pending_chars += len(text)
        self.rows += 1
        self.chars += len(text)
        if len(self.pending) >= GROUP_ROWS or self.pending_chars >= GROUP_CHARS:
            self._flush()

    def _flush(self) -> None:
        import pyarrow as pa
        if self.pending:
            self.writer.write_table(pa.table({COLUMN: self.pending}, schema=self.schema), row_group_size=GROUP_ROWS)
        self.pending, self.pending_chars = [], 0

    def close(self) -> None:
        if self.file.closed:
            return
        self._flush()
        self.writer.close()
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()


def already_made(folder: Path, fingerprint: str) -> bool:
    """Return whether `folder` holds the complete result of the same command."""
    source = read_source(folder)
    return source.get("fingerprint") == fingerprint and not missing_shards(folder, source)


def missing_shards(folder: Path, source: dict) -> list[str]:
    """Return the names of imported or generated shards that are missing or have the wrong size."""
    def size(name: str) -> int:
        path = folder / name
        return path.stat().st_size if path.is_file() else -1
    return [name for name, facts in source.get("shards", {}).items() if size(name) != facts["bytes"]]


def check_free(folder: Path, kind: str, fingerprint: str, replace: bool) -> None:
    """Check that new shards of `kind` may replace the contents of `folder`.

    Args:
        folder: where the shards are to go; it may not exist yet.
        kind: "import" or "small-world", for the message.
        fingerprint: of the command that makes the new shards. Incomplete shards of the same command are replaced.
        replace: whether imported or generated shards of another command may be replaced.

    Raises:
        UserError: `folder` holds other files, downloaded shards, or, without `replace`, other shards.
    """
    if not folder.exists():
        return
    ours = re.compile(rf"{SHARD_NAME.pattern}|source\.json|\..*\.part|\.DS_Store")
    strange = sorted(path.name for path in folder.iterdir() if not ours.fullmatch(path.name))
    if strange:
        some = ", ".join(strange[:3]) + (", ..." if len(strange) > 3 else "")
        raise UserError(f"{folder} holds other things than shards ({some}): "
                        "name a new or empty folder with --to FOLDER, or set NANOCHAT_BASE_DIR to another place.")
    source = read_source(folder)
    if not source and shards_in(folder):
        raise UserError(f"{folder} holds shards of unknown origin (no source.json): two sources never mix in one "
                        "folder. Name another with --to FOLDER, set NANOCHAT_BASE_DIR to another place, "
                        "or move those shards away.")
    if not source or source.get("fingerprint") == fingerprint:
        return
    where = "name another folder with --to FOLDER or set NANOCHAT_BASE_DIR to another place"
    if fetched := HUB_TEXTS.get(source["source"]):
        raise UserError(f"{folder} holds {fetched.title} shards, which {kind} never replaces: {where}.")
    if not replace:
        raise UserError(f"{folder} already holds other text ({source['source']}: "
                        f"{source.get('summary', 'see source.json')}): {where}, or replace it with --replace.")


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Hold the lock for writing into `folder`, and finish an interrupted `staged`.

    Raises UserError if another process holds the lock, or the folder cannot be written.
    """
    try:
        if folder.exists() and not folder.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = open(folder.parent / f".{folder.name}.lock", "ab")
    except OSError as error:
        raise _cannot_write(folder, error) from error
    with lock:
        for _ in range(5):
            if _try_lock(lock) is not False:
                break
            time.sleep(0.1)  # it may be `being_written`, which holds it for a moment
        else:
            raise UserError(f"another process is writing into {folder}: wait for it to end, or stop it.")
        recover(folder)
        yield


def being_written(folder: Path) -> bool:
    """Return whether a process writes into `folder`, so that shards may still come; True where that cannot be told."""
    try:
        with open(folder.parent / f".{folder.name}.lock", "r+b") as lock:
            return not _try_lock(lock)
    except OSError:
        return False


def _try_lock(lock: IO) -> bool | None:
    """Lock an open file as the only process. Return False where another one has, None where there are no locks."""
    try:
        import fcntl
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (ImportError, OSError):  # Windows, or a file system without locks: nothing guards against two writers there
        return None
    return True


def _cannot_write(folder: Path, error: OSError) -> UserError:
    return UserError(f"{folder} cannot be written: {error}. "
                     "Name another folder with --to FOLDER or NANOCHAT_BASE_DIR.")


def _beside(folder: Path) -> tuple[Path, Path]:
    return folder.with_name(f".{folder.name}.new"), folder.with_name(f".{folder.name}.old")


def recover(folder: Path) -> None:
    """Finish the second rename of a `staged` that was killed between its two renames."""
    new, old = _beside(folder)
    if not folder.exists() and old.exists():
        with suppress(FileNotFoundError):  # another process did it first
            os.rename(new if (new / "source.json").exists() else old, folder)


@contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """Yield a new folder to write into. It replaces `folder` if the block succeeds, and is deleted if it raises.

    Call it inside `writing(folder)`, and write source.json last. Raises UserError if the disk is full.
    """
    new, old = _beside(folder)
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
    shutil.rmtree(new, ignore_errors=True)
    try:
        new.mkdir(parents=True)
        yield new
        sync_folder(new)
        if folder.exists():
            os.rename(folder, old)
            recover(folder)  # a reader that found the folder missing may have done it already
        else:
            os.rename(new, folder)
        sync_folder(folder.parent)
    except OSError as error:
        if error.errno in FULL:
            raise UserError(f"the disk is full: nothing was written to {folder}, and its old contents are unchanged. "
                            "Free some space, or name a folder on another disk with --to FOLDER or NANOCHAT_BASE_DIR."
                            ) from error
        raise _cannot_write(folder, error) from error
    finally:
        recover(folder)
        shutil.rmtree(new, ignore_errors=True)
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
