"""Where files live, and atomic writes: after a kill or on a full disk, a file is the old one or absent, never half.

    with atomic_write(base_dir() / "notes.json", "w") as file:
        file.write(to_json({"loss": 2.5}))
"""

import atexit
import dataclasses
import errno
import hashlib
import json
import math
import os
import shlex
import shutil
import socket
import sys
import threading
import time
import uuid
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from nanochat.errors import NotWritten, UserError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # no space, over a quota, over the largest file allowed
PIECE = 1 << 22  # bytes that are read at a time
BEAT = 10.0        # seconds from one sign of life of a lock's holder to the next
STALE = 45.0       # seconds without one after which it is dead
LONG_DEAD = 600.0  # seconds without one after which nobody waits to see one
# A file name that is not UTF-8 has characters that no text file takes: they are written as \\udcff
TEXT = {"encoding": "utf-8", "errors": "backslashreplace", "newline": ""}
# errno → what is wrong, and the way out. They are troubles of the place that is written to, whatever is written
TROUBLES = {
    errno.ENOSPC: ("the disk is full", "Free some space there"),
    errno.EDQUOT: ("the disk is full: your quota of it is used up", "Delete files there or ask for more"),
    errno.EFBIG: ("the disk is full: a file may not be that large", "Raise `ulimit -f`"),
    errno.EIO: ("the disk fails (input/output error)", "Look at `dmesg`, or mount it again"),
    errno.EROFS: ("the disk is read-only (some become so when they fail)", "Look at `dmesg` and `mount`"),
    errno.ENXIO: ("the disk is gone", "Mount it again"),
    errno.ENODEV: ("the disk is gone", "Mount it again"),
    errno.ESTALE: ("the network disk lost its files", "Mount it again"),
    errno.EMFILE: ("too many files are open", "Raise `ulimit -n`"),
    errno.ENFILE: ("too many files are open on this machine", "End other programs"),
    errno.EACCES: ("permission denied", "Correct the permissions"),
    errno.EPERM: ("it may not be changed", "Look at the permissions and at `lsattr`"),
    errno.ENOTDIR: ("a part of the path is a file, not a folder", "Move that file away"),
    errno.EEXIST: ("something else, a file or a link, is in its place", "Move that away"),
    errno.EISDIR: ("there is a folder of this name", "Move that folder away"),
    errno.ELOOP: ("its links lead in a circle", "Correct the links"),
    errno.ENAMETOOLONG: ("the name is too long", "Use a shorter one"),
}
OF_OPEN_FILES = (*FULL, errno.EIO, errno.EROFS, errno.ENXIO, errno.ENODEV, errno.ESTALE)  # a write names no file


def base_dir() -> Path:
    """Return the folder for everything the project makes: $NANOCHAT_BASE_DIR, or ~/.cache/nanochat. Created if absent.

    Raises UserError if it cannot be created.
    """
    try:
        folder = Path(os.environ.get("NANOCHAT_BASE_DIR") or "~/.cache/nanochat").expanduser()
        folder.mkdir(parents=True, exist_ok=True)
    except RuntimeError as error:
        raise UserError("there is no home folder to put files into. Set NANOCHAT_BASE_DIR to a folder you can write "
                        "to.") from error
    except OSError as error:
        why = "the link leads in a circle or nowhere" if os.path.islink(folder) else \
            TROUBLES.get(error.errno, (error.strerror,))[0]
        raise UserError(f"cannot make the folder {folder}: {why}. "
                        "Set NANOCHAT_BASE_DIR to one you can write to.") from error
    return folder


@contextmanager
def atomic_write(path: str | Path, mode: str = "wb") -> Iterator[IO]:
    """Open a temporary file beside `path`, and when the block ends without an error, sync it and rename it to `path`.

    After an error, or if the process is killed, `path` is what it was before. `sweep` removes the temporary file that a
    killed process leaves.

    Args:
        path: its folder is created if absent.
        mode: "wb" for bytes, "w" for UTF-8 text without newline conversion.

    Raises:
        NotWritten: the disk is full or fails, or the folder may not be written to.
    """
    path = Path(path)
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(aside, mode, **({} if "b" in mode else TEXT)) as file:
            _lock(file)
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
        sync_folder(path.parent)
    except OSError as error:
        named = error.filename is not None and Path(os.fsdecode(error.filename)) in (aside, path, *path.parents)
        if error.errno in FULL or named or error.filename is None and error.errno in OF_OPEN_FILES:
            raise not_written(path, error) from error
        raise
    finally:
        with suppress(OSError):
            aside.unlink(missing_ok=True)


def not_written(path: str | Path, error: OSError, after: str = "and an older file there is untouched") -> NotWritten:
    """Return the error that says why `path` could not be written, and what to do. after: what holds then, in words."""
    why, way_out = trouble(error, Path(path).parent)
    named = error.filename2 or error.filename
    where = Path(os.fsdecode(named)) if isinstance(named, str | bytes) else Path(path)
    where = where if where in Path(path).parents else Path(path).parent
    return NotWritten(f"{why}: cannot write {path}, {after}. {way_out} ({where}), or set NANOCHAT_BASE_DIR to another "
                      "disk.", full=error.errno in (errno.ENOSPC, errno.EDQUOT))


def disk_error(error: OSError) -> UserError | None:
    """Return an error in words for one that a disk raised; None for others, such as those of a network."""
    if error.errno == errno.ENOENT and "temporary directory" in str(error):  # of tempfile
        return UserError(f"{error.strerror}. Set TMPDIR to a folder you can write to.")
    if error.errno not in TROUBLES or error.filename is None and error.errno not in FULL:
        return None
    name = os.fsdecode(error.filename2 or error.filename or ".")  # an open file that is written to has no name here
    why, way_out = trouble(error, Path(name).parent)
    where = "" if error.filename is None else f": {name}"
    return UserError(f"{why}{where}. {way_out}, or set NANOCHAT_BASE_DIR (and TMPDIR, HF_HOME where it is theirs) to "
                     "another disk.")


def trouble(error: OSError, folder: Path) -> tuple[str, str]:
    """Return what is wrong with the place that was written to, and the way out: two clauses."""
    why, way_out = TROUBLES.get(error.errno, (error.strerror or str(error), "Correct that"))
    if error.errno == errno.ENOSPC:
        with suppress(OSError, AttributeError):  # Windows has no statvfs
            disk = os.statvfs(folder)
            if disk.f_files and not disk.f_favail and disk.f_bavail:
                return "the disk is full: it takes no further files (no free inodes)", "Delete some files there"
    return why, way_out


def sweep(folder: str | Path) -> None:
    """Remove temporary files that `atomic_write` left in `folder` when it was killed, not those being written now."""
    for aside in Path(folder).glob(".*.tmp"):
        parts = aside.name.split(".")
        if len(parts[-2]) != 8 or set(parts[-2]) - set("0123456789abcdef"):
            continue  # not from atomic_write
        with suppress(OSError):  # deleted meanwhile, or locked by the process that writes it
            if time.time() - aside.stat().st_mtime < 10:
                continue  # so new that its writer may not have locked it yet
            with open(aside, "rb") as file:
                if _lock(file):
                    aside.unlink()


def _lock(file: IO) -> bool:
    """Lock an open file until it is closed or its process dies.

    Returns False where the system has no locks. Raises BlockingIOError if another process holds the lock.
    """
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


class Lock:
    """A file that this process has locked. It ends with `close`, with this object, with the process, or at the end
    of a `with` block.

    The file system's lock ends with its process, also when the machine fails. Some file systems have none, or one that
    other machines do not see. So the file also says who holds it, and a thread touches it every BEAT seconds: whose
    file is not touched for STALE seconds is dead.
    """

    def __init__(self, file: IO):
        self._file, self._ended = file, threading.Event()
        _held.add(self)
        threading.Thread(target=_touch, args=(file, self._ended), name="lock", daemon=True).start()

    def close(self) -> None:
        """Let others have it. A second call does nothing."""
        self._ended.set()
        _held.discard(self)
        with suppress(OSError, ValueError), self._file:
            self._file.truncate(0)  # other machines see by this that nobody holds it

    def __del__(self) -> None:
        with suppress(Exception):  # Python may be ending
            self.close()

    def __enter__(self) -> "Lock":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _touch(file: IO, ended: threading.Event) -> None:
    while not ended.wait(BEAT):
        with suppress(OSError, ValueError):  # a network file system may be away for a while; closed meanwhile
            os.utime(file.fileno())


_held: weakref.WeakSet[Lock] = weakref.WeakSet()


@atexit.register
def release_locks() -> None:
    """Let others have what this process has locked: before it ends without clean-up."""
    for held in list(_held):
        held.close()


def lock(path: Path, what: str, way_out: str) -> Lock | None:
    """Lock a file for this process. A process that this one forks does not hold the lock.

    A lock whose holder is dead is taken over. Where only the touched file can tell that (see `Lock`), this waits up to
    STALE seconds. Where the file system has no locks, a line says so.

    Args:
        path: the file; created if absent. It says who holds it.
        what: what another process has taken, for the message.
        way_out: what to do; {kill} in it stands for the command that stops that process, and where to type it.

    Raises:
        UserError: another process holds the lock.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a+", encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}. Correct that, or set NANOCHAT_BASE_DIR to another "
                        "folder.") from error
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        has_locks = True
    except OSError as error:
        has_locks = error.errno in (errno.EACCES, errno.EAGAIN)
        if has_locks:
            with file:
                raise _in_use(file, what, way_out) from error
        print(f"note: the disk of {path.parent} has no file locks ({error.strerror}). A file that is touched every "
              f"{BEAT:.0f} s stands in for one: do not start two runs within {STALE:.0f} s.", file=sys.stderr)
    try:
        if _other_holds(file, path, has_locks):
            raise _in_use(file, what, way_out)
        if has_locks:  # again, as it ends when the process closes any file that it opened at this path
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        with file:
            raise _in_use(file, what, way_out) from error
    except BaseException:
        file.close()
        raise
    file.truncate(0)
    file.write(f"{os.getpid()}\n{shlex.join(sys.orig_argv)}\non {socket.gethostname()} since "
               f"{time.strftime('%Y-%m-%d %H:%M:%S')}")
    file.flush()
    return Lock(file)


def lock_folder(folder: Path, what: str, way_out: str) -> ExitStack:
    """Lock a folder for this process, until the returned stack is closed; see `lock`.

    The file lies on the folder's own disk at a place that follows from the folder, so that all machines that see the
    folder see it. Where the folder is a link, the folder that it leads to is locked as well.
    """
    with ExitStack() as locks:
        for place in dict.fromkeys((folder.parent.resolve() / folder.name, folder.resolve())):
            if held := lock(_lock_path(place), what, way_out):
                locks.enter_context(held)
        return locks.pop_all()


def _lock_path(folder: Path) -> Path:
    """Return base/locks/x_checkpoints_d20.lock for base/x_checkpoints/d20, where that is the folder's own disk; else a
    hidden file beside the folder, or in it where it is a disk itself."""
    base = folder.parent.parent
    if folder.exists() and folder.stat().st_dev != folder.parent.stat().st_dev:
        return folder / ".lock"
    whole = base.exists() and (not folder.parent.exists() or base.stat().st_dev == folder.parent.stat().st_dev)
    if folder.parent.name.endswith("_checkpoints") and whole and os.access(base, os.W_OK):
        return base / "locks" / f"{folder.parent.name}_{folder.name}.lock"
    return folder.with_name(f".{folder.name}.lock")


def _holder(file: IO) -> tuple[str, str, str]:
    """Return the number, command and host of the process that a lock's file names; ("", "", "") for none."""
    file.seek(0)
    pid, _, about = file.read().partition("\n")
    command, _, host = about.rpartition("\n")
    return pid, command, host.removeprefix("on ").partition(" since ")[0]


def _in_use(file: IO, what: str, way_out: str) -> UserError:
    pid, _, host = _holder(file)
    file.seek(0)
    about = " ".join(file.read().partition("\n")[2].split())
    kill = f"`kill {pid}`" + (f" on {host}" if host and host != socket.gethostname() else "")
    return UserError(f"{what}: process {pid}, {about}. {way_out.format(kill=kill)}")


def _other_holds(file: IO, path: Path, has_locks: bool) -> bool:
    """Return whether a lock that the file system gave to this process, or cannot give, is another process's.

    A process of this machine that has ended, or lost its lock, does not hold it. Of others it is not known; they hold
    it where they touch the file while this function looks.
    """
    pid, _, host = _holder(file)
    if not pid or int(pid) == os.getpid():
        return False
    if host == socket.gethostname():
        return not has_locks and _runs(int(pid))
    before = os.stat(path).st_mtime_ns
    os.utime(file.fileno())  # now, by the clock of the machine that has the disk
    touched = os.stat(path).st_mtime_ns
    if touched - before > 1e9 * LONG_DEAD:
        return False
    print(f"{path} names a process of {host}, {pid}, which may have been killed: waiting up to {STALE:.0f} s whether "
          "it shows itself", file=sys.stderr, flush=True)
    ends = time.monotonic() + STALE
    while time.monotonic() < ends:
        time.sleep(min(1.0, STALE / 10))
        with open(path, "rb") as again:  # a network file system looks for changes when a file is opened
            state = os.fstat(again.fileno())
        if state.st_mtime_ns != touched:
            return state.st_size > 0  # it is empty where the other gave it back meanwhile
    return False


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def sync_folder(folder: Path) -> None:
    """Sync a folder, so that renames in it survive a power cut. Does nothing where none can be opened (Windows)."""
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
    """Return `path` if nothing is there, else the first of `path`2, `path`3, ... that is free."""
    number = 1
    while (free := path.with_name(f"{path.name}{number if number > 1 else ''}")).exists():
        number += 1
    return free


def aside_of(path: Path) -> Path:
    """Return a free name beside `path` with the time in it, for what is moved aside."""
    return free_name(path.with_name(f"{path.name}.{time.strftime('%Y%m%d-%H%M%S')}"))


def sha256_of(path: str | Path) -> str:
    """Return the SHA-256 of a file in hex."""
    with open(path, "rb") as file:
        return sha256_of_rest(file)


def sha256_of_rest(file: IO[bytes]) -> str:
    """Return the SHA-256, in hex, of what an open file holds from its position on.

    A second thread reads the next piece while this one is hashed: from a disk it takes as long as the slower of the
    two. hashlib.file_digest (Python 3.11) reads and hashes by turns.
    """
    digest = hashlib.sha256()
    buffers = [memoryview(bytearray(PIECE)), memoryview(bytearray(PIECE))]
    with ThreadPoolExecutor(1) as reader:
        ahead = reader.submit(file.readinto, buffers[0])
        while size := ahead.result():
            piece = buffers[0][:size]
            buffers.reverse()
            ahead = reader.submit(file.readinto, buffers[0])
            digest.update(piece)
    return digest.hexdigest()


def free_space(path: str | Path) -> int:
    """Return how many bytes this process may still write on the disk of `path`, which need not exist yet."""
    return shutil.disk_usage(nearest(Path(path))).free


def nearest(path: Path) -> Path:
    """Return the path, or the nearest folder above it that exists."""
    while not path.exists() and path != path.parent:
        path = path.parent
    return path


def need_disk(path: str | Path, size: int, what: str) -> None:
    """Raise NotWritten if the disk of `path` has fewer than `size` bytes free; the message names `what` needs them."""
    free = free_space(path)
    if free < size:
        raise NotWritten(f"{what} needs {in_words(size)} on the disk of {path}, which has {in_words(free)} free. "
                         "Free some space or set NANOCHAT_BASE_DIR to another disk.", full=True)


def in_words(size: float) -> str:
    """Return a number of bytes in a readable unit: 812 B, 1.3 MB, 2.2 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def to_json(value: Any, indent: int | None = None) -> str:
    """Return `value` as strictly valid JSON.

    Dataclasses become objects, paths strings, NumPy and PyTorch scalars numbers. JSON has no NaN and no infinity: they
    become the strings "NaN", "Infinity" and "-Infinity", which Python's float() reads. Raises TypeError for what has no
    JSON form.
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
