"""Checkpoints on disk: a save is atomic, a load is verified, and any number of ranks can resume.

    save_checkpoint(folder, 500, model.state_dict(), {"model_config": model.config}, optimizer.state_dict())
    checkpoint = load_checkpoint(folder, optimizer=True)      # the newest valid one

A checkpoint of step 500 is three files in one folder, with the published names:

    model_000500.pt     the weights by name, float32
    optim_000500.pt     the whole optimizer state, gathered from all ranks; it may be absent
    meta_000500.json    step, val_bpb, model_config, user_config, ...; and "files": size and sha256 of the other two

A checkpoint is valid if its meta file exists and the other files are the ones it lists. Published checkpoints have no
"files" entry: such a one is valid if its model file loads.

How a save survives being killed at any moment:

1. Each file is written to a temporary file, synced and renamed (`atomic_write`) to its name with `.new` at the end. The
   meta file comes last. As soon as `meta_000500.json.new` exists, the checkpoint is committed: readers look at `X.new`
   before `X`.
2. Then `.new` is removed from the names one by one, again the meta file last. If the process is killed here, the next
   save in this folder finishes this step.

So a checkpoint that is saved again is at every moment either the old one or the new one. A deletion goes the other way:
the meta file is renamed to `.gone`, the other files are deleted, then the meta file. Only one process may write to a
folder at a time; any number may read, and reading changes nothing. Training saves in a thread: nanochat/saving.py.
"""

import dataclasses
import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeVar

import torch
from torch import Tensor

from nanochat.distributed import Ranks, broadcast_object, gather_objects
from nanochat.errors import UserError
from nanochat.files import atomic_write, free_name, need_disk, sha256_of_rest, sweep, sync_folder, to_json
from nanochat.stages import STAGES, stage_of_folder

META = re.compile(r"meta_(\d{6}|[1-9]\d{6,})\.json(\.new)?")  # as %06d writes it

R = TypeVar("R")
log = logging.getLogger(__name__)


class Corrupt(UserError):
    """This checkpoint cannot be used; an older one may be valid."""


@dataclass
class Checkpoint:
    """One checkpoint in memory.

    optimizer_state: None if it was not asked for, or if there is none; no_optimizer then says why.
    """

    step: int
    model_state: dict[str, Tensor]
    meta: dict[str, Any]
    optimizer_state: dict | None = None
    no_optimizer: str = ""
    folder: Path = Path()


# ---------------------------------------------------------------------------------------------------------------------
# Writing

def save_checkpoint(folder: str | Path, step: int, model_state: dict[str, Tensor], meta: dict[str, Any],
                    optimizer_state: dict | None = None, keep: int | None = None, spared: Collection[int] = ()) -> None:
    """Write the checkpoint of `step` into `folder`. Only rank 0 calls it.

    A published checkpoint of the same step is not overwritten: its files are renamed to `X.kept`.

    Args:
        folder: created if absent.
        step: optimizer steps done.
        model_state: weights by name; they are stored in float32 and without `_orig_mod.`.
        meta: fields of the meta file. "model_config" (a dict or the dataclass) is required; step and "files" are added.
        optimizer_state: from MuonAdamW.state_dict, or None.
        keep: marks this save as periodic, and deletes all but the newest `keep` of the periodic checkpoints up to this
            step. A save without `keep` is never deleted, and neither is a file that was not written here.
        spared: steps of periodic checkpoints that are not deleted now.

    Raises:
        UserError: the disk is full. The checkpoints that were in the folder are untouched.
    """
    if step < 0 or (keep is not None and keep < 1):
        raise ValueError(f"step must be at least 0 and keep at least 1, not {step} and {keep}")
    folder = Path(folder)
    weights = {name.removeprefix("_orig_mod."): _master(tensor) for name, tensor in model_state.items()}
    contents = {f"model_{step:06d}.pt": weights}
    if optimizer_state is not None:
        contents[f"optim_{step:06d}.pt"] = optimizer_state
    config = meta["model_config"]
    config = dataclasses.asdict(config) if dataclasses.is_dataclass(config) else dict(config)
    config = {name: value for name, value in config.items() if value is not None}  # published code reads these
    meta = {**meta, "step": step, "model_config": config, "files": {}, "periodical": keep is not None}

    if folder.is_dir():
        sweep(folder)
        _finish(folder)
    need_disk(folder, sum(_bytes_in(part) for part in contents.values()), f"the checkpoint of step {step}")
    try:
        with ThreadPoolExecutor(len(contents)) as writers:  # hashing limits the speed of one
            written = writers.map(lambda name: _write_tensors(folder / f"{name}.new", contents[name]), contents)
            meta["files"] = dict(zip(contents, written))
        with atomic_write(folder / f"meta_{step:06d}.json.new", "w") as file:
            file.write(to_json(meta, indent=2))
    finally:
        _finish(folder)  # after an error, this removes what was written so far
    if keep is not None:
        _delete_older(folder, step, keep, spared)


def _write_tensors(path: Path, part: dict) -> dict[str, Any]:
    """Write one file of tensors; return its size in bytes and sha256."""
    with atomic_write(path) as file, ThreadPoolExecutor(1) as hasher:
        hashed = _Hashed(file, hasher)
        try:
            torch.save(part, hashed)
        except RuntimeError:
            if hashed.error is not None:  # PyTorch replaces the error of a full disk by one of its own
                raise hashed.error from None
            raise
    return {"size": hashed.size, "sha256": hashed.digest.hexdigest()}


class _Hashed:
    """A file to write to that computes the SHA-256 of what is written, in the thread of `hasher` while it is written.

    torch.save writes a tensor in one piece, and its memory may be gone when `write` returns.
    """

    def __init__(self, file: IO, hasher: ThreadPoolExecutor):
        self.file, self.hasher, self.size, self.digest, self.error = file, hasher, 0, hashlib.sha256(), None

    def write(self, data: memoryview) -> int:
        hashing = self.hasher.submit(self.digest.update, data) if len(data) >= 1 << 16 else None
        try:
            self.file.write(data)
        except OSError as error:
            self.error = error
            raise
        finally:
            if hashing is not None:
                hashing.result()
        if hashing is None:
            self.digest.update(data)
        self.size += len(data)
        return len(data)

    def flush(self) -> None:
        self.file.flush()


def _master(tensor: Tensor) -> Tensor:
    """Return a tensor as it is stored: on the CPU, float32, not a view (torch.save writes a view's whole storage)."""
    tensor = tensor.detach().to("cpu", torch.float32 if tensor.is_floating_point() else tensor.dtype).contiguous()
    return tensor.clone() if tensor.untyped_storage().nbytes() > tensor.nbytes else tensor


def _bytes_in(part: Any) -> int:
    """Return the bytes of all tensors in nested dicts and lists."""
    if isinstance(part, Tensor):
        return part.nbytes
    if isinstance(part, dict):
        return sum(map(_bytes_in, part.values()))
    return sum(map(_bytes_in, part)) if isinstance(part, list | tuple) else 0


def _finish(folder: Path) -> None:
    """Finish interrupted saves and deletions.

    Committed files get their names; the files of deleted and of uncommitted checkpoints are removed.
    """
    for gone in sorted(folder.glob("meta_*.json.gone")):
        for name in _files(gone):
            (folder / name).unlink(missing_ok=True)
        gone.unlink()
    for new in sorted(folder.glob("meta_*.json.new")):
        path = new.with_suffix("")
        files, old = _files(new), _files(path)
        if not files:
            _set_aside(new)
            continue
        for name in files:
            if (folder / f"{name}.new").exists():  # else it was renamed before the interruption
                if name not in old:
                    _set_aside(folder / name)
                os.replace(folder / f"{name}.new", folder / name)
        if not old:
            _set_aside(path)
        for name in old - files:  # an optimizer state that the new checkpoint does not have
            (folder / name).unlink(missing_ok=True)
        sync_folder(folder)
        os.replace(new, path)
    for new in [*folder.glob("model_*.pt.new"), *folder.glob("optim_*.pt.new")]:  # never committed
        new.unlink()
    sync_folder(folder)


def _files(meta_path: Path) -> set[str]:
    """Return the names of the files that a meta file lists; none if it is missing or was not written here."""
    try:
        return set(_parse(meta_path).get("files", ()))
    except (FileNotFoundError, Corrupt):
        return set()


def _set_aside(path: Path) -> None:
    """Rename a file that was not written here, such as a published checkpoint's, to `X.kept`."""
    if path.exists():
        kept = free_name(path.with_name(f"{path.name}.kept"))
        os.replace(path, kept)
        log.warning("%s was not written here, so it is not overwritten but kept as %s", path, kept.name)


def _delete_older(folder: Path, step: int, keep: int, spared: Collection[int]) -> None:
    """Of the valid periodic checkpoints up to `step`, delete all but the newest `keep` and those spared."""
    periodic = []
    for older in steps_in(folder):
        if older <= step:
            with suppress(Corrupt):
                meta = _read_meta(folder, older)
                if meta.get("periodical") and "files" in meta:
                    _check_sizes(folder, meta)
                    periodic.append(older)
    for older in set(periodic[keep:]).difference(spared):
        path = folder / f"meta_{older:06d}.json"
        os.replace(path, path.with_suffix(".json.gone"))
    _finish(folder)


# ---------------------------------------------------------------------------------------------------------------------
# Reading. It changes nothing on disk

def latest_step(folder: str | Path) -> int | None:
    """Return the step of the newest valid checkpoint in `folder`, None if there is none.

    Valid means here that all files exist with the right sizes; `load_checkpoint` checks every byte. An invalid one is
    skipped with a warning.
    """
    try:
        return _retry_while_changing(Path(folder), lambda: next(_valid(Path(folder), optimizer=True)))[0]
    except Corrupt:
        return None


def load_checkpoint(folder: str | Path, step: int | None = None, *, device: str | torch.device = "cpu",
                    weights: bool = True, optimizer: bool = False, verify: bool = True, mapped: bool = False
                    ) -> Checkpoint:
    """Read and verify a checkpoint. Without `weights` and `optimizer` this reads the meta file alone.

    Args:
        folder: with checkpoints in it.
        step: which one. None takes the newest valid one; corrupt ones are skipped with a warning.
        device: where the weights go; they are float32.
        weights: False reads no weights, which a caller may have already.
        optimizer: read the optimizer state too, to the CPU. It is None for a published checkpoint, whose own is in
            another layout.

    Raises:
        UserError: the checkpoint of `step` is missing or corrupt, or without a step, there is no valid one.
    """
    folder, how = Path(folder), _Reading(device, verify, mapped)

    def chosen() -> Checkpoint:
        return _load(folder, step, _read_meta(folder, step), weights, optimizer, how)

    def newest() -> Checkpoint:
        for step, meta in _valid(folder, optimizer):
            try:
                return _load(folder, step, meta, weights, optimizer, how)
            except Corrupt as error:
                log.warning("skipping the checkpoint of step %d: %s", step, error)
        raise Corrupt(nothing_found(folder))

    if step is None:
        return _retry_while_changing(folder, newest)
    if step not in steps_in(folder):
        there = ", ".join(map(str, sorted(steps_in(folder))))
        raise UserError(f"no checkpoint of step {step} in {folder}: "
                        + (f"there are those of {there}." if there else "there is none of any step."))
    return _retry_while_changing(folder, chosen)


def load_on_ranks(folder: str | Path, step: int | None, ranks: Ranks, *, device: str | torch.device = "cpu",
                  weights: bool = True, optimizer: bool = False, mapped: bool = False) -> Checkpoint:
    """Load a checkpoint as `load_checkpoint` does, on every rank; each machine verifies it once. Collective.

    Rank 0 chooses the checkpoint. The rank with local rank 0 of each machine reads all bytes and checks their SHA-256;
    the others read what they need of the same files, which the system then has in memory. With `mapped` that is what
    they touch: 8 ranks that each take their part of an optimizer state hold it once, not eight times.

    Raises:
        UserError: on every rank, where one of the ranks that verify cannot load it.
    """
    def attempt(step: int | None) -> tuple[Checkpoint | None, str]:
        try:
            return load_checkpoint(folder, step, device=device, weights=weights, optimizer=optimizer,
                                   mapped=mapped), ""
        except UserError as error:
            return None, str(error)

    found, problem = attempt(step) if ranks.is_main else (None, "")
    step, problem = broadcast_object((found.step if found is not None else None, problem), ranks)
    if not problem and ranks.local_rank == 0 and not ranks.is_main:
        found, problem = attempt(step)
    problems = [problem for problem in gather_objects(problem, ranks) if problem]
    if problems:
        raise UserError(problems[0])
    return found or load_checkpoint(folder, step, device=device, weights=weights, optimizer=optimizer, verify=False,
                                    mapped=mapped)


def _retry_while_changing(folder: Path, read: Callable[[], R]) -> R:
    """Return read(); call it again where it fails and another process saved or deleted a checkpoint meanwhile."""
    def seen() -> set:
        return {(entry.name, entry.inode()) for entry in os.scandir(folder)} if folder.is_dir() else set()

    for _ in range(20):
        before = seen()
        try:
            return read()
        except (Corrupt, StopIteration) as error:
            if seen() == before:
                raise Corrupt(str(error)) from error
    raise Corrupt(f"{folder} changes faster than it can be read.")


@dataclass(frozen=True)
class _Reading:
    """How files of tensors are read; see `load_checkpoint`."""

    device: str | torch.device
    verify: bool
    mapped: bool


def _load(folder: Path, step: int, meta: dict, weights: bool, optimizer: bool, how: _Reading) -> Checkpoint:
    model_name, optim_name = f"model_{step:06d}.pt", f"optim_{step:06d}.pt"
    loaded = Checkpoint(step, {}, meta, folder=folder)
    state = _read_tensors(folder, model_name, meta, how) if weights else {}
    if not all(isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in state.items()):
        raise Corrupt(f"{folder / model_name} does not hold weights by name.")
    for name, tensor in state.items():
        loaded.model_state[name.removeprefix("_orig_mod.")] = tensor.float() if tensor.is_floating_point() else tensor
    if optimizer and "files" not in meta:
        loaded.no_optimizer = ("the checkpoint is a published one, whose optimizer state is one rank's part in another "
                               "layout")
    elif optimizer and optim_name not in meta["files"]:
        loaded.no_optimizer = "the checkpoint was saved without"
    elif optimizer:
        loaded.optimizer_state = _read_tensors(folder, optim_name, meta, dataclasses.replace(how, device="cpu"))
    return loaded


def _read_tensors(folder: Path, name: str, meta: dict, how: _Reading) -> dict:
    """Verify a file of tensors against the meta, then read it. Only tensors and plain values are unpickled."""
    path = folder / name
    try:
        with _open(folder, name, meta) as file:
            if how.verify and "files" in meta:
                if sha256_of_rest(file) != meta["files"][name]["sha256"]:
                    raise Corrupt(f"{path} is damaged: its sha256 is not the one written in its meta file.")
                file.seek(0)
            part = _mapped(file, how) if how.mapped and "files" in meta else None
            if part is None:
                part = torch.load(file, map_location=how.device, weights_only=True)
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


def _mapped(file: IO, how: _Reading) -> Any:
    """Map an open file of tensors; None where the file system cannot. PyTorch opens it again, by its name."""
    try:
        part = torch.load(file.name, map_location=how.device, weights_only=True, mmap=True)
    except RuntimeError:
        return None
    if not os.path.samestat(os.stat(file.name), os.fstat(file.fileno())):
        raise Corrupt(f"{file.name} was replaced while it was read.")
    return part


def _open(folder: Path, name: str, meta: dict) -> IO:
    """Open a file of a checkpoint and check its size. While its save is not finished, its name may end in .new."""
    size = meta["files"][name]["size"] if "files" in meta else None
    unfinished = (folder / f"meta_{meta['step']:06d}.json.new").exists()
    for path in (folder / f"{name}.new", folder / name) if unfinished else (folder / name,):
        try:
            file = open(path, "rb")
        except FileNotFoundError:
            continue
        except OSError as error:
            raise Corrupt(f"{path} cannot be read: {error.strerror}.") from error
        found = os.fstat(file.fileno()).st_size
        if found == size or (size is None and found):
            return file
        file.close()
    problem = f"is not {size} bytes long, as its meta file says" if size is not None else "is empty"
    raise Corrupt(f"{folder / name} {problem if (folder / name).exists() else 'is missing'}.")


def _valid(folder: Path, optimizer: bool) -> Iterator[tuple[int, dict]]:
    """Yield (step, meta) of the checkpoints whose files exist in full length, newest first; warn of the others.

    Without `optimizer` the model file is enough: people copy a model elsewhere without its optimizer state.
    """
    for step in steps_in(folder):
        try:
            meta = _read_meta(folder, step)
            _check_sizes(folder, meta, optimizer)
        except Corrupt as error:
            log.warning("skipping the checkpoint of step %d: %s", step, error)
        else:
            yield step, meta


def _check_sizes(folder: Path, meta: dict, optimizer: bool = True) -> None:
    """Raise Corrupt if a file of the checkpoint is missing or has another size."""
    for name in meta.get("files") or [f"model_{meta['step']:06d}.pt"]:
        if optimizer or name.startswith("model_"):
            _open(folder, name, meta).close()


def steps_in(folder: Path) -> list[int]:
    """Return the steps that have a meta file in `folder`, newest first."""
    names = (META.fullmatch(path.name) for path in folder.glob("meta_*"))
    return sorted({int(match[1]) for match in names if match}, reverse=True)


def _read_meta(folder: Path, step: int) -> dict[str, Any]:
    """Return the meta of a step, the committed new one before the old one. Raises Corrupt."""
    path = folder / f"meta_{step:06d}.json"
    for candidate in (path.with_suffix(".json.new"), path):
        with suppress(FileNotFoundError):
            return _parse(candidate)
    raise Corrupt(f"{path} is missing.")


def _parse(path: Path) -> dict[str, Any]:
    """Read and check a meta file. Raises FileNotFoundError, or Corrupt if it is not one."""
    step = path.name.split(".")[0].removeprefix("meta_")
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
        config, files = meta["model_config"], meta.get("files", {f"model_{step}.pt": {"size": 0, "sha256": ""}})
        sound = isinstance(config, dict) and f"model_{step}.pt" in files and all(
            name in (f"model_{step}.pt", f"optim_{step}.pt")  # a meta file cannot have others opened or deleted
            and isinstance(entry["size"], int) and isinstance(entry["sha256"], str) for name, entry in files.items())
    except FileNotFoundError:
        raise
    except OSError as error:
        raise Corrupt(f"{path} cannot be read: {error.strerror}.") from error
    except (ValueError, KeyError, TypeError, AttributeError):
        sound = False
    if not sound:
        raise Corrupt(f"{path} is not the meta file of a checkpoint: it must be a JSON object with model_config, and "
                      "list no files but its own.")
    return {**meta, "step": int(step)}


def nothing_found(folder: Path) -> str:
    """Return the message that `folder` has no usable checkpoint, with what to do."""
    stage = stage_of_folder(folder.parts) or STAGES["base"]
    problem = "" if folder.is_dir() else ", there is no such folder"
    return (f"no usable checkpoint in {folder}{problem}: looked for meta_NNNNNN.json with its model_NNNNNN.pt. "
            f"Train one with `python -m {stage.script}` (or `bash speedrun.sh`), or set NANOCHAT_BASE_DIR to where "
            "yours are.")


def __getattr__(name: str) -> Any:
    """Keep `from nanochat.checkpoint import load_model` working, as published code has it.

    It is imported only when asked for, because nanochat.loading imports this module.
    """
    if name == "load_model":
        from nanochat.loading import load_model
        return load_model
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
