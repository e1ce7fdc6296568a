"""Reading checkpoints: the newest that is whole is chosen by reading all of it. Nothing on disk is changed."""

import logging
import os
import socket
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, TypeVar

import torch
from torch import Tensor

from nanochat.checkpoint.meta import Corrupt, files_of, holds_checkpoints, read_meta, steps_in
from nanochat.checkpoint.tensors import known_problem, load_tensors, opened
from nanochat.distributed import Ranks, broadcast_object, gather_objects
from nanochat.errors import UserError
from nanochat.stages import STAGES, stage_of_folder

R = TypeVar("R")
log = logging.getLogger(__name__)
_told: set[str] = set()  # warnings of this process, each of which is printed once


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


class OptimizerLost(Corrupt):
    """The optimizer state of this checkpoint cannot be used; its model can."""


@dataclass(frozen=True)
class _Reading:
    """What is read of a checkpoint and how; see `load_checkpoint`.

    mapped: the names of the parts that stay in their file, "weights" and "optimizer".
    """

    device: str | torch.device = "cpu"
    weights: bool = True
    optimizer: bool = False
    verify: bool = True
    mapped: tuple[str, ...] = ()


# ---- one checkpoint

@contextmanager
def _opened(folder: Path, step: int, how: _Reading) -> Iterator[tuple[dict[str, Any], dict[str, IO[bytes]]]]:
    """Open and verify what is asked of a checkpoint. Yield its meta and the open files by name.

    Raises Corrupt, and OptimizerLost where all but the optimizer state is whole.
    """
    meta = read_meta(folder, step)
    wanted = [name for name in files_of(meta)
              if (how.weights if name.startswith("model_") else how.optimizer and "files" in meta)]
    with opened(folder, meta, wanted, how.verify) as (files, problems):
        for name in wanted:
            if name in problems:
                raise (Corrupt if name.startswith("model_") else OptimizerLost)(problems[name])
        yield meta, files


def _load(folder: Path, step: int, how: _Reading) -> Checkpoint:
    """Verify and load a checkpoint. Raises what `_opened` does."""
    model_name, optim_name = f"model_{step:06d}.pt", f"optim_{step:06d}.pt"
    with _opened(folder, step, how) as (meta, files):
        loaded = Checkpoint(step, {}, meta, folder=folder)
        if how.weights:
            state = load_tensors(files[model_name], folder / model_name, how.device, "weights" in how.mapped)
            if not all(isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in state.items()):
                raise Corrupt(f"{folder / model_name} does not hold weights by name.")
            for name, tensor in state.items():
                tensor = tensor.float() if tensor.is_floating_point() else tensor
                loaded.model_state[name.removeprefix("_orig_mod.")] = tensor
        if how.optimizer and "files" not in meta:
            loaded.no_optimizer = ("the checkpoint is a published one, whose optimizer state is one rank's part in "
                                   "another layout")
        elif how.optimizer and optim_name not in meta["files"]:
            loaded.no_optimizer = "the checkpoint was saved without"
        elif how.optimizer:
            loaded.optimizer_state = load_tensors(files[optim_name], folder / optim_name,
                                                  mapped="optimizer" in how.mapped)
    return loaded


# ---- the newest one

def _newest(folder: Path, below: int | None, read: Callable[[int], R], passed: dict[int, str]) -> R | None:
    """Return read(step) of the newest checkpoint for which it raises no Corrupt, None where there is none.

    below: only steps before this one. passed: filled with those that were passed over, each with the reason.
    """
    passed.clear()
    for step in steps_in(folder):
        if below is None or step < below:
            try:
                return read(step)
            except Corrupt as error:
                passed[step] = str(error)
    return None


def _warn(passed: dict[int, str]) -> None:
    """Print of each checkpoint that was passed over why."""
    for step, why in passed.items():
        text = f"skipping the checkpoint of step {step}: {why}"
        if text not in _told:
            _told.add(text)
            log.warning(text)


def latest_step(folder: str | Path, optimizer: bool = True, verify: bool = True) -> int | None:
    """Return the step of the newest checkpoint in `folder` that is whole, None if there is none.

    Args:
        folder: with checkpoints in it.
        optimizer: whether the optimizer state counts too, where the meta file lists one.
        verify: False reads no file but the metas: the sizes are right, and this process has found no damage before.
    """
    folder, passed = Path(folder), {}

    def whole(step: int) -> int:
        with _opened(folder, step, _Reading(optimizer=optimizer, verify=verify)) as (meta, files):
            for name in files:
                if not verify and (problem := known_problem(folder, name, meta)):
                    raise Corrupt(problem)
        return step

    def newest() -> int:
        found = _newest(folder, None, whole, passed)
        if found is None:
            raise Corrupt("none is whole")
        return found

    try:
        return _retry_while_changing(folder, newest)
    except Corrupt:
        return None
    finally:
        _warn(passed)


def load_checkpoint(folder: str | Path, step: int | None = None, *, device: str | torch.device = "cpu",
                    weights: bool = True, optimizer: bool = False, verify: bool = True, mapped: bool = False
                    ) -> Checkpoint:
    """Read and verify a checkpoint. Without `weights` and `optimizer` this reads the meta file alone.

    Args:
        folder: with checkpoints in it.
        step: which one. None takes the newest one that is whole; a warning names each one that is passed over.
        device: where the weights go; they are float32.
        weights: False reads no weights, which a caller may have already.
        optimizer: read the optimizer state too, to the CPU. It is None for a published checkpoint, whose own is in
            another layout.
        verify: compare every byte with the SHA-256 in the meta file, and look whether all numbers are finite.
        mapped: keep the tensors in the files; see `load_tensors`.

    Raises:
        UserError: the checkpoint of `step` is missing or not whole, or without a step, there is no whole one.
    """
    how = _Reading(device, weights, optimizer, verify, ("weights", "optimizer") if mapped else ())
    return _load_newest(Path(folder), None, how) if step is None else _load_step(Path(folder), step, how)


def _load_step(folder: Path, step: int, how: _Reading) -> Checkpoint:
    """Load the checkpoint of a step. Raises UserError if it is missing, Corrupt if it is not whole."""
    if step not in steps_in(folder):
        there = ", ".join(map(str, sorted(steps_in(folder))))
        raise UserError(f"no checkpoint of step {step} in {folder}: "
                        + (f"there are those of {there}." if there else "there is none of any step."))
    return _retry_while_changing(folder, lambda: _load(folder, step, how))


def _load_newest(folder: Path, below: int | None, how: _Reading) -> Checkpoint:
    """Load the newest whole checkpoint, before the step `below` if that is given. Raises Corrupt if there is none."""
    passed: dict[int, str] = {}

    def read(step: int) -> Checkpoint:
        if not how.weights:  # the model counts where it is not read, too
            meta = read_meta(folder, step)
            if problem := known_problem(folder, f"model_{step:06d}.pt", meta):
                raise Corrupt(problem)
        return _load(folder, step, how)

    def newest() -> Checkpoint:
        found = _newest(folder, below, read, passed)
        if found is None:
            raise Corrupt(nothing_found(folder, passed))
        return found

    found = _retry_while_changing(folder, newest)
    _warn(passed)
    return found


def _load_newest_to_resume(folder: Path, below: int | None, how: _Reading) -> Checkpoint | None:
    """Load the newest whole checkpoint that training can go on from, else the newest whole model; see
    `load_to_resume`."""
    passed: dict[int, str] = {}
    lost: dict[int, str] = {}

    def read(step: int) -> Checkpoint:
        try:
            return _load(folder, step, how)
        except OptimizerLost as error:
            lost[step] = str(error)
            raise

    found = _newest(folder, below, read, passed)
    if found is None and lost:
        step = max(lost)
        found = _load(folder, step, _Reading(how.device))
        found.no_optimizer = lost[step]
        passed = {other: why for other, why in passed.items() if other > step}
    if found is None and (names := holds_checkpoints(folder)) and below is None:
        raise Corrupt(none_usable(folder, passed, names))
    _warn(passed)
    return found


def _retry_while_changing(folder: Path, read: Callable[[], R]) -> R:
    """Return read(); call it again where it fails and another process saved or deleted a checkpoint meanwhile."""
    def seen() -> set:
        return {(entry.name, entry.inode()) for entry in os.scandir(folder)} if folder.is_dir() else set()

    for _ in range(20):
        before = seen()
        try:
            return read()
        except Corrupt as error:
            if seen() == before:
                raise Corrupt(str(error)) from error
    raise Corrupt(f"{folder} changes faster than it can be read.")


# ---- several ranks

def load_on_ranks(folder: str | Path, step: int | None, ranks: Ranks, *, device: str | torch.device = "cpu",
                  weights: bool = True, optimizer: bool = False, mapped: bool = False) -> Checkpoint:
    """Load a checkpoint as `load_checkpoint` does, on every rank; each machine verifies it once. Collective.

    Rank 0 chooses the checkpoint. The rank with local rank 0 of each machine reads all bytes and checks their SHA-256;
    the others read what they need of the same files, which the system then has in memory. With `mapped` that is what
    they touch: 8 ranks that each take their part of an optimizer state hold it once, not eight times. Without a step,
    what one machine cannot load is passed over on all.

    Raises:
        UserError: on every rank, where one of the ranks cannot load it, or none that all can load.
    """
    folder = Path(folder)
    how = _Reading(device, weights, optimizer, mapped=("weights", "optimizer") if mapped else ())
    if step is not None:
        return _load_together(folder, ranks, how, lambda below: _load_step(folder, step, how), fixed=True)
    return _load_together(folder, ranks, how, lambda below: _load_newest(folder, below, how))


def load_to_resume(folder: str | Path, ranks: Ranks, *, device: str | torch.device = "cpu") -> Checkpoint | None:
    """Load the newest checkpoint from which a run in `folder` can go on, with its optimizer state. Collective.

    The optimizer state is part of what has to be whole where the meta file lists one. Where no older checkpoint has
    one that is whole, either, this returns the newest whole model without, and `no_optimizer` says why.

    Args:
        folder: of the run. Only one process may write to it meanwhile.
        ranks: this process among all; see `load_on_ranks`.
        device: where the weights go. The optimizer state stays in its file; see `load_tensors`.

    Returns:
        None where no file of a checkpoint is there: the run is a new one.

    Raises:
        UserError: files of checkpoints are there, and no checkpoint can be used.
    """
    folder, how = Path(folder), _Reading(device, optimizer=True, mapped=("optimizer",))
    return _load_together(folder, ranks, how, lambda below: _load_newest_to_resume(folder, below, how))


def _load_together(folder: Path, ranks: Ranks, how: _Reading, choose: Callable[[int | None], Checkpoint | None],
                   fixed: bool = False) -> Checkpoint | None:
    """Load the same checkpoint on all ranks, whole on all machines. Collective.

    Args:
        how: what the other ranks read.
        choose: called on rank 0, returns the checkpoint, before a step if one is given; None or UserError for none.
        fixed: there is no other one to try.
    """
    def attempt(load: Callable[..., Checkpoint | None], *args: Any) -> tuple[Checkpoint | None, str]:
        try:
            return load(*args), ""
        except UserError as error:
            return None, str(error) if ranks.is_main else f"rank {ranks.rank} on {socket.gethostname()}: {error}"

    below, elsewhere = None, []
    while True:
        found, problem = attempt(choose, below) if ranks.is_main else (None, "")
        step, lost, problem = broadcast_object(
            (found and found.step, found.no_optimizer if found and not found.optimizer_state else "", problem), ranks)
        if problem or elsewhere and step is None:
            raise UserError(" ".join([problem, *elsewhere]).strip())
        if step is None:
            return None
        own = replace(how, optimizer=how.optimizer and not lost)
        if ranks.local_rank == 0 and not ranks.is_main:
            found, problem = attempt(_load_step, folder, step, own)
        problems = gather_objects(problem, ranks)
        if not any(problems):
            if found is None:  # another rank of this machine has verified it
                found, problem = attempt(_load_step, folder, step, replace(own, verify=False))
            problems = gather_objects(problem, ranks)
        problems = [problem for problem in problems if problem]
        if not problems:
            found.no_optimizer = lost or found.no_optimizer
            return found
        if fixed:
            raise UserError(problems[0])
        elsewhere.append(f"Step {step} cannot be used on all machines: {problems[0]}")
        if ranks.is_main:
            _warn({step: problems[0]})
        below = step


# ---- what is said where there is none

def nothing_found(folder: Path, passed: dict[int, str] | None = None) -> str:
    """Return the message that `folder` has no usable checkpoint, with what to do.

    passed: of the checkpoints that are there, why they are not usable.
    """
    what = f"no usable checkpoint in {folder}"
    looked = "looked for meta_NNNNNN.json with its model_NNNNNN.pt"
    if names := holds_checkpoints(folder):
        return f"{what}: {looked}; {_reasons(folder, passed or {}, names)}"
    stage = stage_of_folder(folder.parts) or STAGES["base"]
    problem = "" if folder.is_dir() else ", there is no such folder"
    return (f"{what}{problem}: {looked}. Train one with `python -m {stage.script}` (or `bash speedrun.sh`), or set "
            "NANOCHAT_BASE_DIR to where yours are.")


def none_usable(folder: Path, passed: dict[int, str], names: Iterable[str]) -> str:
    """Return the message that a run cannot go on in `folder`, though these files of checkpoints are there."""
    return (f"{folder} has files of checkpoints, but none that a run can go on from: {_reasons(folder, passed, names)} "
            "Nothing was changed. --fresh moves the folder aside and trains anew; another --model-tag leaves it where "
            "it is.")


def _reasons(folder: Path, passed: dict[int, str], names: Iterable[str]) -> str:
    """Return in sentences why the checkpoints in a folder are not usable."""
    steps = {f"{step:06d}" for step in steps_in(folder)}
    without = [name for name in names if name.split("_")[1].split(".")[0] not in steps]
    reasons = [f"step {step}: {why}" for step, why in passed.items()]
    if without:
        more = f" and {len(without) - 3} more" if len(without) > 3 else ""
        reasons.append(f"{', '.join(without[:3])}{more}: no meta file says of which checkpoint.")
    return (" ".join(reasons) + f" `python -m nanochat.checkpoint verify {folder}` looks at every file; a copy of the "
            "files from elsewhere can be put back.")
