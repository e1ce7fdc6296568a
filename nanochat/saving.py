"""Checkpoints that do not stop training: copied to the host, then hashed and written by a thread.

    saver = BackgroundSaver()
    optimizer_state = optimizer.state_dict(saver.host_copy)                      # collective, short
    weights = {name: saver.host_copy(name, tensor) for name, tensor in model.state_dict().items()}
    saver.write(folder, 500, weights, meta, optimizer_state, keep=4)             # returns at once
    saver.finished()              # [500] once it is on disk; raises what went wrong
    saver.wait()                  # before the process ends

What a save costs. The optimizer state is sharded over the ranks. It goes to rank 0 one bucket after the other, by an
all-gather between the GPUs and one copy from rank 0's GPU to its host, behind the step that was just enqueued; the
hosts do not wait for either. The GPUs stand still for as long as that takes: 5.1 GB at d20, 15.4 GB at d32, 0.1 and
0.3 s over PCIe 5. The copies are in the stream of the training step, not in one of their own: the next step must not
change the weights before they are copied, and the memory of one bucket serves for the next. Rank 0 needs host memory
for one checkpoint, which every save uses again; on a GPU it is pinned, and PyTorch rounds each pinned tensor up to a
power of two (6.9 GB at d20); allocating it makes the first save slower. The other ranks need none.

Only rank 0 writes. Where other machines have a base folder of their own, `copy_to_machines` gives them the checkpoint
before it is loaded.

A process that is killed while the thread writes loses this checkpoint alone; nanochat/checkpoint.py says why. The
thread is no daemon, so a process that ends by itself ends after the write.
"""

import json
import threading
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nanochat.checkpoint import latest_step, save_checkpoint
from nanochat.distributed import Ranks, gather_objects, on_main, several_machines
from nanochat.errors import UserError
from nanochat.files import atomic_write, base_dir, in_words, need_disk, sha256_of
from nanochat.launcher import saving
from nanochat.logs import print_line

COPIED_AT_ONCE = 1 << 26  # bytes


class BackgroundSaver:
    """Writes one checkpoint at a time in a thread. A second one, and a new copy, wait for the one before."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}
        self._thread: threading.Thread | None = None
        self._step = -1
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
              optimizer_state: dict | None = None, keep: int | None = None, keep_every: int = -1) -> None:
        """Start to write a checkpoint of tensors from `host_copy`; arguments as those of `save_checkpoint`.

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
                    save_checkpoint(folder, step, model_state, meta, optimizer_state, keep, keep_every)
            except BaseException as error:
                self._error = error

        self._step = step
        self._thread = threading.Thread(target=work, name="checkpoint")
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
        return [self._step]


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
    meta_name = f"meta_{step:06d}.json" if step is not None else ""
    if step is None or not (folder / meta_name).exists():
        return []
    meta = json.loads((folder / meta_name).read_text(encoding="utf-8"))
    names = [name for name in (f"model_{step:06d}.pt", f"optim_{step:06d}.pt", "tokenizer.json", "tokenizer.pkl")
             if (folder / name).exists()]
    known = meta.get("files") or {}
    files = [(name, (folder / name).stat().st_size, known.get(name, {}).get("sha256", "")) for name in names]
    return [*files, (meta_name, (folder / meta_name).stat().st_size, sha256_of(folder / meta_name))]


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
