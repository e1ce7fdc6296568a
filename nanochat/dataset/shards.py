"""Shards: parquet files of documents, one folder of them for one source of text, and the one way they are written.

A folder holds shard_00000.parquet, shard_00001.parquet, ... (column `text`, row groups of at most 1024 documents, zstd) and
source.json, which says where they come from, so that two sources never mix. Made shards (import, small world) are written into a
folder beside it, which takes its place in one rename when all is complete: a kill or a full disk leaves what stood there before.
"""

import errno
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from nanochat.errors import UserError
from nanochat.files import FULL, atomic_write, base_dir, sync_folder, to_json

COLUMN = "text"
LAST_SHARD = 1822               # FineWeb-Edu has 1823 shards; the last is for validation
GROUP_ROWS = 1024               # documents in a row group, as the published shards have it
GROUP_CHARS = 1 << 24           # a row group of longer documents ends earlier, so that reading one stays small
SHARD_CHARS = 250_000_000       # characters in a training shard: about 100 MB on disk
DOCUMENT_BYTES = 1 << 30        # parquet strings end at 2 GB, and a document is held in memory
SHARD_NAME = re.compile(r"shard_\d{5}\.parquet")
GET_TEXT = ("get text in one of three ways: `python -m nanochat.dataset -n 8` (FineWeb-Edu from the Hugging Face hub), "
            "`python -m nanochat.dataset import PATH...` (your own files), `python -m nanochat.dataset small-world` (needs no network)")


def data_dir() -> Path:
    """The folder of pretraining text. It need not exist yet."""
    return base_dir() / "base_data"


def shard_name(index: int) -> str:
    return f"shard_{index:05d}.parquet"


def shards_in(folder: Path) -> list[Path]:
    """The shards that lie in a folder, in order; none where there is no folder."""
    return sorted(path for path in folder.glob("shard_*.parquet") if SHARD_NAME.fullmatch(path.name))


def read_source(folder: Path) -> dict:
    """What source.json says; {} where there is none. Raises UserError where it cannot be read."""
    path = folder / "source.json"
    try:
        source = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(source, dict) or not isinstance(source.get("source"), str):
            raise ValueError("no `source` in it")
        return source
    except FileNotFoundError:
        return {}
    except (ValueError, OSError) as error:
        raise UserError(f"{path} cannot be read ({error}): it says where the shards beside it come from. "
                        f"Move {folder} away, then {GET_TEXT}.") from error


def write_source(folder: Path, source: dict) -> None:
    with atomic_write(folder / "source.json", "w") as file:
        file.write(to_json(source, indent=1) + "\n")


class ShardWriter:
    """Writes documents into `folder` as training shards of about SHARD_CHARS characters and, last, one validation shard.

    Call `close` at the end: it returns {file name: {"rows": documents, "bytes": size}}, all synced to disk.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._train: _Shard | None = None
        self._val = _Shard(folder / "validation.parquet")
        self._made: list[_Shard] = []

    def add(self, text: str) -> None:
        if self._train is None:
            self._train = _Shard(self.folder / shard_name(len(self._made)))
            self._made.append(self._train)
        self._train.add(text)
        if self._train.chars >= SHARD_CHARS:
            self._train.close()
            self._train = None

    def add_validation(self, text: str) -> None:
        self._val.add(text)

    def close(self) -> dict[str, dict[str, int]]:
        if self._train is not None:
            self._train.close()
        self._val.close()
        self._val.path = self._val.path.rename(self.folder / shard_name(len(self._made)))
        return {shard.path.name: {"rows": shard.rows, "bytes": shard.path.stat().st_size} for shard in [*self._made, self._val]}

    def abandon(self) -> None:
        """Close the files after an error; what they hold is thrown away by the caller."""
        for shard in [*self._made, self._val]:
            shard.writer.is_open = False  # it would else try to write its footer when it is forgotten
            with suppress(OSError):
                shard.file.close()


class _Shard:
    def __init__(self, path: Path):
        import pyarrow as pa
        import pyarrow.parquet as pq
        self.path, self.rows, self.chars = path, 0, 0
        self.schema = pa.schema([(COLUMN, pa.string())])
        self.file = open(path, "wb")
        self.writer = pq.ParquetWriter(self.file, self.schema, compression="zstd", compression_level=3, use_dictionary=False,
                                       write_statistics=False, write_page_checksum=True)  # so that a flipped byte is noticed
        self.waiting: list[str] = []
        self.waiting_chars = 0

    def add(self, text: str) -> None:
        self.waiting.append(text)
        self.waiting_chars += len(text)
        self.rows += 1
        self.chars += len(text)
        if len(self.waiting) >= GROUP_ROWS or self.waiting_chars >= GROUP_CHARS:
            self._flush()

    def _flush(self) -> None:
        import pyarrow as pa
        if self.waiting:
            self.writer.write_table(pa.table({COLUMN: self.waiting}, schema=self.schema), row_group_size=GROUP_ROWS)
        self.waiting, self.waiting_chars = [], 0

    def close(self) -> None:
        if self.file.closed:
            return
        self._flush()
        self.writer.close()
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()


def already_made(folder: Path, fingerprint: str) -> bool:
    """True if `folder` holds the complete result of the very same command."""
    source = read_source(folder)
    if source.get("fingerprint") != fingerprint:
        return False
    return not missing_shards(folder, source)


def missing_shards(folder: Path, source: dict) -> list[str]:
    """Names of made shards that are absent or of another size than when they were written."""
    def size(name: str) -> int:
        path = folder / name
        return path.stat().st_size if path.is_file() else -1
    return [name for name, facts in source.get("shards", {}).items() if size(name) != facts["bytes"]]


def check_free(folder: Path, kind: str, fingerprint: str, replace: bool) -> None:
    """Raise UserError where made shards must not go: on other files, on downloaded shards, or without `replace` on made ones
    (but what is left of the same shards, known by their fingerprint, may be made again)."""
    if not folder.exists():
        return
    ours = re.compile(rf"{SHARD_NAME.pattern}|source\.json|\..*\.part|\.DS_Store")
    strange = sorted(path.name for path in folder.iterdir() if not ours.fullmatch(path.name))
    if strange:
        raise UserError(f"{folder} holds other things than shards ({', '.join(strange[:3])}{', ...' if len(strange) > 3 else ''}): "
                        "name a new or empty folder with --to FOLDER, or set NANOCHAT_BASE_DIR to another place.")
    source = read_source(folder)
    if not source and shards_in(folder):
        raise UserError(f"{folder} holds shards of unknown origin (no source.json): two sources never mix in one folder. Name another with "
                        "--to FOLDER, set NANOCHAT_BASE_DIR to another place, or move those shards away.")
    if not source or source.get("fingerprint") == fingerprint:
        return
    where = "name another folder with --to FOLDER or set NANOCHAT_BASE_DIR to another place"
    if source["source"] == "fineweb-edu":
        raise UserError(f"{folder} holds FineWeb-Edu shards, which a {kind} never mixes with or replaces: {where}.")
    if not replace:
        raise UserError(f"{folder} already holds other text ({source['source']}: {source.get('summary', 'see source.json')})"
                        f": {where}, or give --replace to have the new one instead.")


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Hold the lock on writing into `folder`; UserError if another process has it. Mends what a kill amid `staged` left."""
    try:
        if folder.exists() and not folder.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = open(folder.parent / f".{folder.name}.lock", "ab")
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error}. Name another folder with --to FOLDER or NANOCHAT_BASE_DIR.") from error
    with lock:
        try:
            import fcntl
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:  # Windows: two writers at once are then the user's own care
            pass
        except BlockingIOError:
            raise UserError(f"another process is writing into {folder}: wait for it to end, or stop it.") from None
        except OSError:  # a file system without locks
            pass
        recover(folder)
        yield


def _beside(folder: Path) -> tuple[Path, Path]:
    return folder.with_name(f".{folder.name}.new"), folder.with_name(f".{folder.name}.old")


def recover(folder: Path) -> None:
    """If a kill came between the two renames of `staged`, do the second one; else nothing is changed."""
    new, old = _beside(folder)
    if not folder.exists() and old.exists():
        with suppress(FileNotFoundError):  # another process was quicker
            os.rename(new if (new / "source.json").exists() else old, folder)


@contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """Give a new folder to write into; when the block ends well it takes the place of `folder`, else nothing is left of it.

    Call inside `writing(folder)`, with source.json written last. Raises UserError where the disk is full.
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
            recover(folder)  # unless a reader, finding it gone, has just done so
        else:
            os.rename(new, folder)
        sync_folder(folder.parent)
    except OSError as error:
        if error.errno in FULL:
            raise UserError(f"the disk is full: nothing was written to {folder}, what stood there before is untouched. "
                            "Free some space, or name a folder on another disk with --to FOLDER or NANOCHAT_BASE_DIR.") from error
        raise UserError(f"{folder} cannot be written: {error}. Name another folder with --to FOLDER or NANOCHAT_BASE_DIR.") from error
    finally:
        recover(folder)
        shutil.rmtree(new, ignore_errors=True)
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
