"""Where files live and how they are written: aside, synced, renamed. A kill or a full disk leaves the old file, or none."""

import dataclasses
import errno
import hashlib
import json
import math
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from nanochat.errors import UserError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # no space, over a quota, over the largest file allowed
REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.EISDIR)


def base_dir() -> Path:
    """Return the folder of everything the project makes: $NANOCHAT_BASE_DIR, or ~/.cache/nanochat. Created if absent."""
    try:
        folder = Path(os.environ.get("NANOCHAT_BASE_DIR") or "~/.cache/nanochat").expanduser()
        folder.mkdir(parents=True, exist_ok=True)
    except RuntimeError as error:
        raise UserError("there is no home folder to put files into. Set NANOCHAT_BASE_DIR to a folder you can write to.") from error
    except OSError as error:
        raise UserError(f"cannot make the folder {folder}: {error.strerror}. "
                        "Set NANOCHAT_BASE_DIR to one you can write to.") from error
    return folder


@contextmanager
def atomic_write(path: str | Path, mode: str = "wb") -> Iterator[IO]:
    """Open a file beside `path` and move it there, synced to disk, when the block ends well.

    After an error, or a kill at any moment, `path` is what it was before. A full disk, or a folder that may not be
    written to, raises UserError. What a kill leaves beside `path` is found and removed by `sweep`.
    """
    path = Path(path)
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(aside, mode, **({} if "b" in mode else {"encoding": "utf-8", "newline": ""})) as file:
            _lock(file)
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
        sync_folder(path.parent)
    except OSError as error:
        if error.errno in FULL:
            raise UserError(f"the disk is full: {path} was not written, what stood there before is untouched. "
                            f"Free some space on {path.parent} or set NANOCHAT_BASE_DIR to another disk.") from error
        if error.errno in REFUSED and error.filename is not None and Path(error.filename) in (aside, *path.parents):
            raise UserError(f"cannot write {path}: {error.strerror} ({error.filename2 or error.filename}). "
                            "Mend that, or set NANOCHAT_BASE_DIR to another folder.") from error
        raise
    finally:
        with suppress(OSError):
            aside.unlink(missing_ok=True)


def sweep(folder: str | Path) -> None:
    """Remove what `atomic_write` left aside in `folder` when it was killed. Files still being written are left alone."""
    for aside in Path(folder).glob(".*.tmp"):
        parts = aside.name.split(".")
        if len(parts[-2]) != 8 or set(parts[-2]) - set("0123456789abcdef"):
            continue  # not ours
        with suppress(OSError):  # gone meanwhile, or locked: somebody is writing it
            if time.time() - aside.stat().st_mtime < 10:
                continue  # so young that its writer may not hold its lock yet
            with open(aside, "rb") as file:
                if _lock(file):
                    aside.unlink()


def _lock(file: IO) -> bool:
    """Hold a lock on an open file until it is closed, or its process dies. False where there are no locks; OSError if taken."""
    try:
        import fcntl
    except ImportError:  # Windows
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:  # a file system without locks
        return False
    return True


def sync_folder(folder: Path) -> None:
    """Make renames in `folder` survive a power cut. Some systems (Windows) cannot open folders; the rename is then all there is."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems cannot sync a folder
            raise
    finally:
        os.close(handle)


def free_name(path: Path) -> Path:
    """`path`, or where something stands there, the first of `path`2, `path`3, ... that is free."""
    number = 1
    while (free := path.with_name(f"{path.name}{number if number > 1 else ''}")).exists():
        number += 1
    return free


def sha256_of(path: str | Path) -> str:
    """Return the SHA-256 of a file in hex, read in pieces of 4 MiB."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 22):
            digest.update(piece)
    return digest.hexdigest()


def need_disk(path: str | Path, size: int, what: str) -> None:
    """Raise UserError if the disk of `path` has fewer than `size` bytes free for `what`."""
    path = Path(path)
    while not path.exists():
        path = path.parent
    free = shutil.disk_usage(path).free
    if free < size:
        raise UserError(f"{what} needs {in_words(size)} on the disk of {path}, which has {in_words(free)} free. "
                        "Free some space or set NANOCHAT_BASE_DIR to another disk.")


def in_words(size: float) -> str:
    """Bytes as a person says them: 812 B, 1.3 MB, 2.2 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def to_json(value: Any, indent: int | None = None) -> str:
    """Return `value` as strictly valid JSON. Dataclasses become objects; paths, strings; NumPy and PyTorch scalars, numbers.

    JSON has no NaN and no infinity: they become the strings "NaN", "Infinity" and "-Infinity", which Python's float() reads.
    Raises TypeError for what has no JSON form.
    """
    return json.dumps(_plain(value), indent=indent, ensure_ascii=False, allow_nan=False)


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, dict):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if isinstance(value, Path):
        return str(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _plain({field.name: getattr(value, field.name) for field in dataclasses.fields(value)})
    if hasattr(value, "tolist"):  # NumPy and PyTorch
        return _plain(value.tolist())
    return value
