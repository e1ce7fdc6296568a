"""Writing checkpoints: whole or not at all, never over what is worth keeping; and which older ones are deleted then."""

import dataclasses
import hashlib
import logging
import math
import os
from collections.abc import Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from nanochat.checkpoint.meta import Corrupt, files_of, open_file, parse_meta, read_meta, sealed, steps_in
from nanochat.checkpoint.tensors import Identity, NotFinite, check_files, identity, not_finite, tensors_in
from nanochat.files import atomic_write, free_name, need_disk, sweep, sync_folder

log = logging.getLogger(__name__)
_written: set[Identity] = set()  # files as this process wrote them; a change within a tick of the clock is not seen


def save_checkpoint(folder: str | Path, step: int, model_state: dict[str, Tensor], meta: dict[str, Any],
                    optimizer_state: dict | None = None, keep: int | None = None, keep_every: int = -1,
                    spared: Collection[int] = ()) -> None:
    """Write the checkpoint of `step` into `folder`. Only rank 0 calls it.

    A published checkpoint of the same step, or a damaged one, is not overwritten: its files are renamed to `X.kept`.

    Args:
        folder: created if absent.
        step: optimizer steps done.
        model_state: weights by name; they are stored in float32 and without `_orig_mod.`.
        meta: fields of the meta file. "model_config" (a dict or the dataclass) is required; step and "files" are added.
        optimizer_state: from MuonAdamW.state_dict, or None.
        keep, keep_every, spared: `keep` marks this save as periodic, and once it is on disk, those of the periodic
            checkpoints up to this step that `superseded` names are deleted. A save without `keep` is never deleted.

    Raises:
        UserError: the disk is full; NotFinite, where a number in the state is not finite. The checkpoints that were in
            the folder are untouched.
    """
    if step < 0 or (keep is not None and keep < 1):
        raise ValueError(f"step must be at least 0 and keep at least 1, not {step} and {keep}")
    folder = Path(folder)
    weights = {name.removeprefix("_orig_mod."): _master(tensor) for name, tensor in model_state.items()}
    contents = {f"model_{step:06d}.pt": weights}
    if optimizer_state is not None:
        contents[f"optim_{step:06d}.pt"] = optimizer_state
    for name, part in contents.items():
        if bad := not_finite(part):
            raise NotFinite(f"the checkpoint of step {step} was not saved: {bad} ({name}) has numbers that are not "
                            f"finite (NaN or infinity). Training has diverged. The checkpoints in {folder} are "
                            "untouched: run the same command to go on from the last good one; use lower learning rates "
                            "if it happens again.")
    config = meta["model_config"]
    config = dataclasses.asdict(config) if dataclasses.is_dataclass(config) else dict(config)
    config = {name: value for name, value in config.items() if value is not None}  # published code reads these
    meta = {**meta, "step": step, "model_config": config, "files": {}, "periodical": keep is not None}

    if folder.is_dir():
        sweep(folder)
        _finish(folder)
    need_disk(folder, sum(tensor.nbytes for _, tensor in tensors_in(contents)), f"the checkpoint of step {step}")
    _set_damaged_aside(folder, step)
    try:
        with ThreadPoolExecutor(len(contents)) as writers:  # hashing limits the speed of one
            written = writers.map(lambda name: _write_tensors(folder / f"{name}.new", contents[name]), contents)
            meta["files"] = dict(zip(contents, written))
        with atomic_write(folder / f"meta_{step:06d}.json.new", "w") as file:
            file.write(sealed(meta))
    finally:
        _finish(folder)  # after an error, this removes what was written so far
    for name in contents:
        with open(folder / name, "rb") as file:
            _written.add(identity(file))
    if keep is not None:
        delete_checkpoints(folder, superseded(folder, step, keep, keep_every, spared))


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
            for path in (new, *(folder / f"{kind}_{path.stem.removeprefix('meta_')}.pt.new"
                                for kind in ("model", "optim"))):
                _set_aside(path)
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
        return set(parse_meta(meta_path).get("files", ()))
    except (FileNotFoundError, Corrupt):
        return set()


def _set_aside(path: Path, why: str = "was not written here, or is damaged") -> None:
    """Rename a file that is not to be overwritten, such as a published checkpoint's, to `X.kept`."""
    if path.exists():
        kept = free_name(path.with_name(f"{path.name}.kept"))
        os.replace(path, kept)
        log.warning("%s %s, so it is not overwritten but kept as %s", path, why, kept.name)


def _set_damaged_aside(folder: Path, step: int) -> None:
    """Rename the files of a damaged checkpoint that a new one of the same step would overwrite."""
    path = folder / f"meta_{step:06d}.json"
    with suppress(FileNotFoundError, Corrupt):  # without a meta file that says so, no file was written here
        meta = parse_meta(path)
        if "files" in meta and not is_whole(folder, meta):
            for name in (path.name, *files_of(meta)):  # the meta file first: the others are then no checkpoint
                _set_aside(folder / name, "is of a damaged checkpoint")


# ---- which older ones are deleted

def is_whole(folder: Path, meta: dict[str, Any], verify: bool = True) -> bool:
    """Return whether all files of a checkpoint are what was written. What this process wrote itself, it does not read
    again.

    verify: False looks at the sizes alone.
    """
    unknown = []
    for name in files_of(meta):
        try:
            with open_file(folder, name, meta) as file:
                if identity(file) not in _written:
                    unknown.append(name)
        except Corrupt:
            return False
    return not (verify and check_files(folder, meta, unknown))


def superseded(folder: Path, step: int, keep: int, keep_every: int = -1, spared: Collection[int] = (),
               verify: bool = True) -> list[int]:
    """Return the steps of the checkpoints up to `step` that may be deleted, newest first.

    Only periodic checkpoints that were written here and are whole count, and can be deleted. Of them stay:

    - the newest `keep`
    - those of a step that is a multiple of `keep_every`, if that is above 0, and those of the steps `spared`
    - the one with the lowest validation loss. Its meta file says when that was measured: of several with the same
      value, the one that was saved soonest after.

    verify: False looks at sizes alone, which does where nothing is deleted for it.
    """
    periodic: list[dict[str, Any]] = []
    for older in steps_in(folder):
        if older <= step:
            with suppress(Corrupt):
                meta = read_meta(folder, older)
                if meta.get("periodical") and "files" in meta and is_whole(folder, meta, verify):
                    periodic.append(meta)
    stay = {meta["step"] for meta in periodic[:keep]} | set(spared)
    if keep_every > 0:
        stay |= {meta["step"] for meta in periodic if meta["step"] % keep_every == 0}
    measured = [(loss, meta["step"] - meta.get("val_step", meta["step"]), -meta["step"]) for meta in periodic
                if (loss := validation_loss(meta)) is not None]
    if measured:
        stay.add(-min(measured)[2])
    return [meta["step"] for meta in periodic if meta["step"] not in stay]


def validation_loss(meta: dict[str, Any]) -> float | None:
    """Return the bits per byte, or else the loss, on validation data that a meta file tells; None where it is unknown
    or no finite number."""
    for name in ("val_bpb", "val_loss"):
        if isinstance(value := meta.get(name), int | float) and math.isfinite(value):
            return value
    return None


def delete_checkpoints(folder: Path, steps: list[int]) -> None:
    """Delete the checkpoints of these steps, each of them whole or not at all."""
    for step in steps:
        path = folder / f"meta_{step:06d}.json"
        os.replace(path, path.with_suffix(".json.gone"))
    _finish(folder)


def move_checkpoints(folder: Path, steps: Iterable[int], aside: Path) -> None:
    """Move the files of the checkpoints of these steps to another folder on the same disk."""
    for step in steps:
        names = [f"meta_{step:06d}.json", *(path.name for path in folder.glob(f"*_{step:06d}.*"))]
        for name in dict.fromkeys(names):  # the meta first: without it, the others are no checkpoint
            with suppress(FileNotFoundError):
                os.replace(folder / name, aside / name)
