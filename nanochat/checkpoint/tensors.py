"""The files of tensors of a checkpoint: whether they are what was written, with finite numbers, and loading them."""

import math
import os
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from nanochat.checkpoint.meta import Corrupt, open_file
from nanochat.errors import UserError
from nanochat.files import sha256_of_rest

SETTLED = 2.0  # seconds after which a change of a file is sure to change its times

Identity = tuple[int, ...]  # of a file: device, inode, size, times. Another content has another identity
_known: dict[tuple[Identity, str], str] = {}  # files that this process has checked, by their sha256, and what is wrong


class NotFinite(UserError):
    """A state has NaN or infinity in it, so it is not saved."""


@contextmanager
def opened(folder: Path, meta: dict[str, Any], names: Iterable[str], verify: bool = True
           ) -> Iterator[tuple[dict[str, IO[bytes]], dict[str, str]]]:
    """Open files of a checkpoint and, with `verify`, read every byte of them, all at once. Yield the files by name, at
    their beginning, and of each one that is not what was written what is wrong with it.

    What is loaded from these files is what was verified, also where another process puts new ones in their place
    meanwhile. A file that this process has read before, and that has not been touched since, is not read again.
    """
    files, problems = {}, {}
    with ExitStack() as stack:
        for name in names:
            try:
                files[name] = stack.enter_context(open_file(folder, name, meta))
            except Corrupt as error:
                problems[name] = str(error)
        if verify:
            with ThreadPoolExecutor(max(1, len(files))) as readers:
                found = readers.map(lambda name: _problem(files[name], folder / name, _sha256(meta, name)), files)
                problems |= {name: problem for name, problem in zip(files, found) if problem}
        for file in files.values():
            file.seek(0)
        yield files, problems


def check_files(folder: Path, meta: dict[str, Any], names: Iterable[str]) -> dict[str, str]:
    """Return what is wrong with files of a checkpoint, by name; see `opened`."""
    with opened(folder, meta, names) as (_, problems):
        return problems


def _sha256(meta: dict[str, Any], name: str) -> str:
    """Return the SHA-256 of a file by its meta; "" where that does not say it."""
    return meta["files"][name]["sha256"] if "files" in meta else ""


def known_problem(folder: Path, name: str, meta: dict[str, Any]) -> str:
    """Return what is wrong with a file as far as it is known without reading it: its size, and what `check_files` found
    in this process. Raises nothing."""
    try:
        with open_file(folder, name, meta) as file:
            return _known.get((identity(file), _sha256(meta, name)), "")
    except Corrupt as error:
        return str(error)


def identity(file: IO[bytes]) -> Identity:
    """Return what tells this content of a file from others. A change within the same tick of the clock is not seen."""
    state = os.fstat(file.fileno())
    return state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns


def _problem(file: IO[bytes], path: Path, sha256: str) -> str:
    """Return what is wrong with the content of an open file. sha256: "" where it is not known."""
    key = (identity(file), sha256)
    if key in _known:
        return _known[key]
    began = time.time()
    try:
        if sha256 and sha256_of_rest(file) != sha256:
            found = f"{path} is damaged: its sha256 is not the one written in its meta file."
        else:
            file.seek(0)
            # From the system's memory, where the first reading has put it; nothing is kept.
            bad = not_finite(load_tensors(file, path, mapped=True))
            found = f"{path} holds numbers that are not finite (NaN or infinity), in {bad}." if bad else ""
    except Corrupt as error:
        return str(error)
    except OSError as error:  # a disk that fails
        return f"{path} cannot be read: {error.strerror}."
    if identity(file) == key[0] and began - max(key[0][3:]) / 1e9 > SETTLED:  # else a change may not show in its times
        _known[key] = found
    return found


def tensors_in(part: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) of all tensors in nested dicts and lists."""
    if isinstance(part, Tensor):
        yield name, part
    elif isinstance(part, dict | list | tuple):
        for key, inner in part.items() if isinstance(part, dict) else enumerate(part):
            yield from tensors_in(inner, f"{name} {key}".strip())


def not_finite(part: Any) -> str:
    """Return the name of the first tensor with a number that is not finite in nested dicts of CPU tensors; "" if there
    is none."""
    for name, tensor in tensors_in(part):
        if tensor.is_floating_point() and tensor.numel():
            tensor = tensor.detach() if tensor.dtype.itemsize > 1 else tensor.detach().float()
            # One pass without memory of its own. NaN or infinity makes the sum one of them; so may large numbers.
            if not math.isfinite(tensor.sum()) and not all(map(math.isfinite, torch.aminmax(tensor))):
                return name or "it"
    return ""


def load_tensors(file: IO[bytes], path: Path, device: str | torch.device = "cpu", mapped: bool = False) -> dict:
    """Load an open file of tensors. Only tensors and plain values are unpickled.

    Args:
        file: at its beginning.
        path: for messages.
        device: where the tensors go.
        mapped: keep them in the file, where the file system can: a page is in memory once it is touched, for all
            processes once.

    Raises:
        Corrupt: it cannot be loaded, or holds no dict.
    """
    try:
        part = _map(file, device) if mapped else None
        if part is None:
            part = torch.load(file, map_location=device, weights_only=True)
    except (UserError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # PyTorch raises many kinds of error for damaged or hostile files
        if isinstance(error, RuntimeError) and "CUDA" in str(error):
            raise
        why = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise Corrupt(f"{path} cannot be read, it is damaged or no file of weights: {why}") from error
    if not isinstance(part, dict):
        raise Corrupt(f"{path} holds a {type(part).__name__}, where weights by name were expected.")
    return part


def _map(file: IO[bytes], device: str | torch.device) -> Any:
    """Map an open file of tensors; None where the file system cannot. PyTorch opens it again, by its name."""
    try:
        part = torch.load(file.name, map_location=device, weights_only=True, mmap=True)
    except RuntimeError:
        return None
    if not os.path.samestat(os.stat(file.name), os.fstat(file.fileno())):
        raise Corrupt(f"{file.name} was replaced while it was read.")
    return part
