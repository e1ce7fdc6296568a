"""Checkpoints that do not stop training: copied to the host, then hashed and written by a thread.

    saver = BackgroundSaver()
    optimizer_state = optimizer.state_dict(saver.host_copy)                      # collective, short
    weights = {name: saver.host_copy(name, tensor) for name, tensor in model.state_dict().items()}
    saver.write(folder, 500, weights, meta, optimizer_state, keep=4)             # returns at once
    saver.finished()              # [500] once it is on disk; raises what went wrong
    saver.wait_for_room(print)    # before the process ends

What a save costs. The optimizer state is sharded over the ranks. It goes to rank 0 one bucket after the other, by an
all-gather between the GPUs and one copy from rank 0's GPU to its host, behind the step that was just enqueued; the
hosts do not wait for either. The GPUs stand still for as long as that takes: 5.1 GB at d20, 15.4 GB at d32, 0.1 and
0.3 s over PCIe 5. The copies are in the stream of the training step, not in one of their own: the next step must not
change the weights before they are copied, and the memory of one bucket serves for the next. Rank 0 needs host memory
for one checkpoint, which every save uses again; on a GPU it is pinned, and PyTorch rounds each pinned tensor up to a
power of two (6.9 GB at d20); allocating it makes the first save slower. The other ranks need none.

Only rank 0 writes. Where other machines have a base folder of their own, `copy_to_machines` gives them the checkpoint
before it is loaded.

A process that is killed while the thread writes loses this checkpoint alone; nanochat/checkpoint/ says why. The
thread is no daemon, so a process that ends by itself ends after the write.
"""

import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from nanochat.checkpoint import delete_checkpoints, latest_step, save_checkpoint, superseded
from nanochat.checkpoint.meta import files_of, parse_meta
from nanochat.distributed import Ranks, gather_objects, on_main, several_machines
from nanochat.errors import NotWritten, UserError
from nanochat.files import atomic_write, base_dir, free_space, in_words, need_disk, sha256_of
from nanochat.launcher import handling_stops, saving
from nanochat.logs import print_line

PATIENCE = 600.0         # seconds in which the last checkpoint of a run is tried again where its disk does not take it
TRY_EVERY = 10.0         # seconds from one try to the next
BYTES_OF_A_STEP = 500    # that a training step takes in the log
COPIED_AT_ONCE = 1 << 26  # bytes that are sent to other machines at a time


class BackgroundSaver:
    """Writes one checkpoint at a time in a thread. A second one, and a new copy, wait for the one before."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}
        self._thread: threading.Thread | None = None
        self.step = -1  # of the last checkpoint that was asked for
        self._work: Callable[[], None] = lambda: None
        self._error: BaseException | None = None

    @torch.no_grad()
    def host_copy(self, name: str, tensor: Tensor) -> Tensor:
        """Return a copy of a tensor in host memory, which is complete when the work of its device's stream is.

        Call `wait` before the first copy of a checkpoint: the memory is that of the last copy of this name.
        """
        buffer = self._buffers.get(name)
        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            buffer = self._buffers[name] = _host_memory(tensor)
        return buffer.copy_(tensor, non_blocking=tensor.is_cuda)

    def write(self, folder: Path, step: int, model_state: dict[str, Tensor], meta: dict[str, Any],
              optimizer_state: dict | None = None, keep: int | None = None, keep_every: int = -1,
              spared: Collection[int] = ()) -> None:
        """Start to write a checkpoint of tensors from `host_copy`; arguments as those of `save_checkpoint`.

        Where the disk is full, older periodic checkpoints make room for it; the newest of them stays.

        Raises:
            UserError: the checkpoint before could not be written.
        """
        self.wait()
        copied = None
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            copied = torch.cuda.Event()
            copied.record()

        def work() -> None:
            try:
                if copied is not None:
                    copied.synchronize()
                with saving(f"step {step}"):
                    while True:
                        try:
                            return save_checkpoint(folder, step, model_state, meta, optimizer_state, keep, keep_every,
                                                   spared)
                        except NotWritten as error:
                            if not (error.full and _make_room(folder, step, keep_every, spared)):
                                raise
            except BaseException as error:
                self._error = error

        self.step, self._work = step, work
        self._start()

    def _start(self) -> None:
        self._thread = threading.Thread(target=self._work, name="checkpoint")
        self._thread.start()

    def finished(self) -> list[int]:
        """Return the step of the checkpoint whose write has ended since the last call; empty while none has.

        Raises:
            UserError: it could not be written, because the disk is full, for example; NotFinite where its numbers are
                not finite.
        """
        return [] if self._thread is not None and self._thread.is_alive() else self.wait()

    def wait(self) -> list[int]:
        """Wait for the write under way; return and raise what `finished` does."""
        if self._thread is None:
            return []
        self._thread.join()
        self._thread, error, self._error = None, self._error, None
        if error is not None:
            raise error
        return [self.step]

    def wait_for_room(self, say: Callable[[str], None], patience: float | None = None) -> list[int]:
        """Wait for the last checkpoint of a run. Where the disk does not take it, try again for `patience` seconds.

        A signal (Ctrl-C, SIGTERM) ends the waiting, and the program with it.

        Args:
            say: prints a line.
            patience: PATIENCE seconds where it is None.

        Raises:
            NotWritten: it could not be written in this time.
        """
        patience = PATIENCE if patience is None else patience
        began = told = None
        while True:
            try:
                return self.wait()
            except NotWritten as error:
                now = time.monotonic()
                began = now if began is None else began
                if now - began >= patience:
                    raise NotWritten(f"{error} The checkpoint of step {self.step} was tried for {patience:.0f} s and "
                                     "is lost; older ones are untouched.", error.full) from error
                if told is None or now - told >= 60:
                    told = now
                    say(f"warning: {error} The run is over but for this checkpoint: trying again every "
                        f"{TRY_EVERY:.0f} s for {patience - (now - began):.0f} s more. Ctrl-C gives it up.")
            with saving(f"step {self.step}, which waits for room on its disk"), handling_stops(_end):
                time.sleep(min(TRY_EVERY, patience))
            self._start()


def _end(number: int) -> NoReturn:
    raise SystemExit(128 + number)


def _make_room(folder: Path, step: int, keep_every: int, spared: Collection[int]) -> bool:
    """Delete the oldest periodic checkpoint for that of `step`, and print it. The newest stays.

    Returns False, without deleting anything, where that does not make enough room.
    """
    newest, *spare = (superseded(folder, step, 0, keep_every, spared) if folder.is_dir() else []) or [-1]
    sizes = {old: bytes_on_disk(folder, old) for old in spare}
    if not spare or free_space(folder) + sum(sizes.values()) < bytes_on_disk(folder, newest):
        return False
    oldest = min(spare)
    delete_checkpoints(folder, [oldest])
    print_line(f"warning: the disk is full: deleted the checkpoint of step {oldest} ({in_words(sizes[oldest])}) in "
               f"{folder}, to write that of step {step}")
    return True


def bytes_on_disk(folder: Path, step: int) -> int:
    """Return the size of the files of a checkpoint."""
    return sum(path.stat().st_size for path in folder.glob(f"*_{step:06d}.*") if path.is_file())


# ---- room on the disk, before it is needed

def check_room(folder: Path, size: int, saves: Sequence[int], keep: int, keep_every: int, steps: int) -> str:
    """Compare the room on the disk with what a run will write.

    Args:
        folder: of its checkpoints, which may hold some already. It may be absent.
        size: of the tensors of a checkpoint, in bytes.
        saves: steps of the periodic checkpoints to come, besides the one at the end.
        keep, keep_every: which of them stay; see `superseded`.
        steps: to come, each a record of the log.

    Returns:
        A warning where there is no room for all of it, else "".

    Raises:
        NotWritten: there is no room for a single checkpoint.
    """
    size += size // 50 + 50_000  # names, alignment and the meta file
    free, logs = free_space(folder), steps * BYTES_OF_A_STEP
    present = superseded(folder, 10**9, 0, keep_every, verify=False) if folder.is_dir() else []
    for_good = sum(keep_every > 0 and step % keep_every == 0 for step in saves)
    spare = sum(bytes_on_disk(folder, old) for old in present[1:])  # may be deleted for a new one
    rest = len(saves) - for_good
    count = for_good + max(0, min(keep, len(present) + rest) - len(present)) + 1  # those that stay, and the last one
    about = f"{folder} has {in_words(free)} free, a checkpoint of this run takes {in_words(size)}"
    if free + spare < size + logs:
        lacks = in_words(size + logs - free - spare)
        raise NotWritten(f"no room for a checkpoint: the disk of {about}, and its log {in_words(logs)}. Free at least "
                         f"{lacks}, or set NANOCHAT_BASE_DIR to another disk.", full=True)
    if free < count * size + logs:
        return (f"warning: the disk of {about}: {count} at a time take {in_words(count * size)}, and the log "
                f"{in_words(logs)}. Free {in_words(count * size + logs - free)}, or keep fewer with --keep (now "
                f"{keep}); else older checkpoints are deleted when it is full.")
    return ""


def look_ahead(folder: Path, step: int, keep: int, keep_every: int) -> str:
    """Return a warning where the disk will not take the next checkpoint or the one after it, else "".

    It is said once the one of `step` is on disk. keep, keep_every: which periodic ones stay; see `superseded`.
    """
    size, free = bytes_on_disk(folder, step), free_space(folder)
    if free < size:
        which = "the next checkpoint"
    elif free < 2 * size and len(superseded(folder, step, 0, keep_every, verify=False)) < keep:
        # else the next one's place is given back
        which = "the checkpoint after the next"
    else:
        return ""
    return (f"warning: the disk has no room for {which}: {in_words(free)} are free, one takes {in_words(size)}. Free "
            f"some space on the disk of {folder}; else older checkpoints are deleted for it, and where that is not "
            "enough, it is not written.")


def copy_to_machines(folder: Path, step: int | None, ranks: Ranks) -> None:
    """Copy a checkpoint of rank 0 to the machines that do not have it in this folder. Collective.

    Does nothing where all ranks are on one machine, or see the same folder. The copy is whole or not there: its meta
    file comes last. `load_checkpoint` verifies it like any other.

    Args:
        folder: with checkpoints in it, in the same place below the base folder on all machines.
        step: which one; None is the newest whole one. Where rank 0 has none, nothing is copied.

    Raises:
        UserError: on all ranks, where a machine cannot write it.
    """
    if not several_machines(ranks):
        return
    place = folder.relative_to(base_dir()) if folder.is_relative_to(base_dir()) else folder
    listed = on_main("listing the files of a checkpoint", lambda: (place, _files_to_copy(folder, step)), ranks)
    folder, files = base_dir() / listed[0], listed[1]
    needs = ranks.local_rank == 0 and any(_differs(folder / name, size, digest) for name, size, digest in files)
    if not any(gather_objects(needs, ranks)):
        return
    if ranks.is_main:
        size = sum(size for _, size, _ in files)
        print_line(f"copying {folder} ({in_words(size)}) to the machines that do not have it")
    problems = gather_objects(_receive(folder, files, needs, ranks), ranks)
    if problem := next(filter(None, problems), ""):
        raise UserError(problem)


def _files_to_copy(folder: Path, step: int | None) -> list[tuple[str, int, str]]:
    """Return name, size and SHA-256 of the files of a checkpoint, the meta file last. "" for what is not hashed: it is
    copied where its size differs."""
    step = latest_step(folder) if step is None else step
    meta_path = folder / f"meta_{step:06d}.json" if step is not None else None
    if meta_path is None or not meta_path.exists():
        return []
    meta = parse_meta(meta_path)
    names = [*files_of(meta), *(name for name in ("tokenizer.json", "tokenizer.pkl") if (folder / name).exists())]
    known = meta.get("files") or {}
    files = [(name, (folder / name).stat().st_size, known.get(name, {}).get("sha256", "")) for name in names]
    return [*files, (meta_path.name, meta_path.stat().st_size, sha256_of(meta_path))]


def _differs(path: Path, size: int, digest: str) -> bool:
    """Return whether a file is not there as it should be. Only small ones are hashed: loading verifies the others."""
    try:
        return path.stat().st_size != size or path.suffix == ".json" and digest not in ("", sha256_of(path))
    except OSError:
        return True


def _receive(folder: Path, files: list[tuple[str, int, str]], needs: bool, ranks: Ranks) -> str:
    """Send the files from rank 0, and write them where they are needed. Collective. Return what went wrong.

    A rank with a problem goes on receiving, as the others do.
    """
    problem = ""
    if needs:
        try:
            need_disk(folder, sum(size for _, size, _ in files), f"a copy of {folder}")
        except UserError as error:
            problem = str(error)
    for name, size, _ in files:
        parts = _parts(folder / name, size, ranks)
        if needs and not problem:
            try:
                with atomic_write(folder / name) as file:
                    for part in parts:
                        file.write(part.cpu().numpy())
            except (UserError, OSError) as error:
                problem = f"{folder / name} was not copied: {error}"
        for _ in parts:
            pass
    return problem


def _parts(path: Path, size: int, ranks: Ranks) -> Iterator[Tensor]:
    """Yield the bytes of rank 0's file, piece by piece, on all ranks. Collective."""
    piece = torch.empty(min(size, COPIED_AT_ONCE), dtype=torch.uint8, device=ranks.device)
    with open(path, "rb") if ranks.is_main else nullcontext() as file:
        for start in range(0, size, COPIED_AT_ONCE):
            part = piece[:min(COPIED_AT_ONCE, size - start)]
            if file is not None:
                part.copy_(torch.frombuffer(bytearray(file.read(len(part))), dtype=torch.uint8))
            dist.broadcast(part, src=0)
            yield part


def _host_memory(tensor: Tensor) -> Tensor:
    """Return empty host memory for a tensor, contiguous, pinned where a GPU copies to it and there is enough of it."""
    if tensor.is_cuda:
        try:
            return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        except RuntimeError:  # the system limits pinned memory; copying to other memory takes longer
            pass
    return torch.empty(tensor.shape, dtype=tensor.dtype)
