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

A process that is killed while the thread writes loses this checkpoint alone; nanochat/checkpoint/ says why. The
thread is no daemon, so a process that ends by itself ends after the write.
"""

import threading
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanochat.checkpoint import save_checkpoint
from nanochat.launcher import saving


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


def _host_memory(tensor: Tensor) -> Tensor:
    """Return empty host memory for a tensor, contiguous, pinned where a GPU copies to it and there is enough of it."""
    if tensor.is_cuda:
        try:
            return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        except RuntimeError:  # the system limits pinned memory; copying to other memory takes longer
            pass
    return torch.empty(tensor.shape, dtype=tensor.dtype)
