"""Where files live and how they are written: aside, synced, renamed, so that a kill or a full disk leaves the old file or none."""

import errno
import hashlib
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO


class UserError(ValueError):
    """Something the user can mend. The message says what was wrong, where, and what to do; scripts print it as one line."""


def base_dir() -> Path:
    """Return the folder of everything the project makes: $NANOCHAT_BASE_DIR, or ~/.cache/nanochat. Created if absent."""
    folder = Path(os.environ.get("NANOCHAT_BASE_DIR") or Path.home() / ".cache" / "nanochat").expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {folder}: {error.strerror}. Set NANOCHAT_BASE_DIR to one you can write to.") from error
    return folder


@contextmanager
def atomic_write(path: str | Path, mode: str = "wb") -> Iterator[IO]:
    """Open a file beside `path` and move it there, synced to disk, when the block ends well.

    After an error, or a kill at any moment, `path` is what it was before. A full disk raises UserError.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with open(aside, mode, **({} if "b" in mode else {"encoding": "utf-8", "newline": ""})) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
        _sync_folder(path.parent)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(f"the disk is full: {path} was not written, what stood there before is untouched. "
                            f"Free some space on {path.parent} or set NANOCHAT_BASE_DIR to another disk.") from error
        raise
    finally:
        aside.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Make a rename in `folder` survive a power cut. Some systems (Windows) cannot open folders; the rename is then all there is."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


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
        raise UserError(f"{what} needs {size / 1e9:.1f} GB on the disk of {path}, which has {free / 1e9:.1f} GB free. "
                        "Free some space or set NANOCHAT_BASE_DIR to another disk.")
