"""Checkpoints on disk: a save is atomic, a load is verified, and any number of ranks can resume.

    save_checkpoint(folder, 500, model.state_dict(), {"model_config": model.config}, optimizer.state_dict())
    checkpoint = load_checkpoint(folder, optimizer=True)      # the newest one that is whole
    python -m nanochat.checkpoint verify FOLDER               # also list and prune

A checkpoint of step 500 is three files in one folder, with the published names:

    model_000500.pt     the weights by name, float32
    optim_000500.pt     the whole optimizer state, gathered from all ranks; it may be absent
    meta_000500.json    step, val_bpb, model_config, user_config, ...; and "files": size and sha256 of the other two

A checkpoint is whole if the meta file is as it was written, the other files are the ones it lists, and all weights are
finite. "format" in a meta file says that its own bytes are covered by "meta_sha256"; older ones of ours have neither.
Published checkpoints have no "files" entry: such a one is whole if its model file loads, with finite weights.

Choosing and verifying are one act: who asks for the newest checkpoint gets the newest that is whole, and a line for
each one passed over. A checkpoint that is not whole is never deleted, nor counted among those to keep, and where a new
one takes its place, its files are renamed to `X.kept`.

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

from typing import Any

from nanochat.checkpoint.meta import Corrupt, holds_checkpoints, steps_in
from nanochat.checkpoint.reading import (
    Checkpoint,
    latest_step,
    load_checkpoint,
    load_on_ranks,
    load_to_resume,
    nothing_found,
)
from nanochat.checkpoint.tensors import NotFinite
from nanochat.checkpoint.writing import delete_checkpoints, move_checkpoints, save_checkpoint, superseded

__all__ = ["Checkpoint", "Corrupt", "NotFinite", "delete_checkpoints", "holds_checkpoints", "latest_step",
           "load_checkpoint", "load_on_ranks", "load_to_resume", "move_checkpoints", "nothing_found", "save_checkpoint",
           "steps_in", "superseded"]


def __getattr__(name: str) -> Any:
    """Keep `from nanochat.checkpoint import load_model` working, as published code has it.

    It is imported only when asked for, because nanochat.loading imports this module.
    """
    if name == "load_model":
        from nanochat.loading import load_model
        return load_model
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
