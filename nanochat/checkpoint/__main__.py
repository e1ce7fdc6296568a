"""Look at checkpoints, and delete old ones.

    python -m nanochat.checkpoint verify PATH               # read every byte; exit code 1 if anything is damaged
    python -m nanochat.checkpoint list PATH                 # step, size, validation, when it was saved, whether whole
    python -m nanochat.checkpoint prune PATH --keep=2       # say what would be deleted; --yes deletes it

PATH is a folder of checkpoints, or any folder above some, such as $NANOCHAT_BASE_DIR. `prune` deletes as training does
(nanochat/checkpoint/writing.py, `superseded`): periodical checkpoints alone, never one that is damaged, was not written
here or is the last of a run, and nothing in the folder of a run that is going on.
"""

import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanochat.checkpoint.meta import Corrupt, files_of, holds_checkpoints, read_meta, steps_in
from nanochat.checkpoint.tensors import check_files
from nanochat.checkpoint.writing import delete_checkpoints, superseded, validation_loss
from nanochat.cli import COUNT, COUNT_OR_ALL, flag, parser_of, run_main
from nanochat.errors import UserError
from nanochat.files import in_words, lock_folder


@dataclass
class NoFlags:
    """Of the commands that have none."""


@dataclass
class PruneFlags:
    """Flags of `prune`."""

    keep: int = flag(2, "periodical checkpoints to keep, the newest", within=COUNT)
    keep_every: int = flag(-1, "those of a step that is a multiple of this stay too; -1 = none",
                           within=COUNT_OR_ALL)
    yes: bool = flag(False, "delete; without it, only what would be deleted is said")


def main(argv: Sequence[str] | None = None) -> None:
    """Run one of the commands. Raises UserError for what the user can mend; SystemExit(1) where files are damaged."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == ["prune"]:
        parser = parser_of(PruneFlags, "Delete periodical checkpoints as training does, or say which those are.")
    elif argv[:1] in (["verify"], ["list"]):
        parser = parser_of(NoFlags, "Read every byte of all checkpoints; exit code 1 if anything is damaged."
                           if argv[0] == "verify" else "Print a line for each checkpoint.")
    else:
        print((__doc__ or "").strip())
        if argv[:1] in ([], ["-h"], ["--help"]):
            return
        raise UserError(f"{argv[0]!r} is none of verify, list, prune: python -m nanochat.checkpoint verify PATH")
    parser.prog += f" {argv[0]}"
    parser.add_argument("path", metavar="PATH", help="folder of checkpoints, or any folder above some")
    flags = vars(parser.parse_args(argv[1:]))
    top = Path(flags.pop("path")).expanduser()
    if not top.is_dir():
        raise UserError(f"there is no folder {top}.")
    folders = list(_folders_in(top))
    if not folders:
        print(f"no checkpoints in {top}")
    elif argv[0] == "prune":
        prune(folders, PruneFlags(**flags))
    elif not all([(verify if argv[0] == "verify" else list_checkpoints)(folder) for folder in folders]):
        raise SystemExit(1)


def _folders_in(top: Path) -> Iterator[Path]:
    """Yield the folders that hold files of checkpoints, `top` and those below it."""
    for folder, inner, _ in os.walk(top):
        inner.sort()
        if holds_checkpoints(Path(folder)):
            yield Path(folder)


def _states(folder: Path) -> Iterator[tuple[int, dict[str, Any], dict[str, str]]]:
    """Yield (step, meta, what is wrong by file) of each checkpoint, oldest first. A damaged meta is empty."""
    for step in reversed(steps_in(folder)):
        try:
            meta = read_meta(folder, step)
        except Corrupt as error:
            yield step, {}, {f"meta_{step:06d}.json": str(error)}
        else:
            yield step, meta, check_files(folder, meta, files_of(meta))


def verify(folder: Path) -> bool:
    """Print the state of every file of the checkpoints in a folder. Return whether all are whole."""
    print(folder)
    sound, seen = True, set()
    for step, meta, wrong in _states(folder):
        files = [f"meta_{step:06d}.json", *(files_of(meta) if meta else ())]
        seen.update(files)
        for name in files:
            if name in wrong:
                print(f"  {name:20s} {wrong[name]}")
            elif "files" in meta:
                print(f"  {name:20s} whole")
            else:
                print(f"  {name:20s} readable; a published one, without a sha256 to compare with")
        sound = sound and not wrong
    for name in holds_checkpoints(folder):
        if name not in seen and not name.endswith((".new", ".gone")):
            step = name.split("_")[1].split(".")[0]
            published = (folder / f"meta_{step}.json").exists() and name.startswith("optim_")
            print(f"  {name:20s} " + ("not listed in its meta file" if published else "without a usable meta file"))
            sound = sound and published
    return sound


def _stats(folder: Path, step: int) -> list[os.stat_result]:
    """Return the sizes and times of the files of a checkpoint."""
    names = (name for name in holds_checkpoints(folder) if name.split("_")[1].split(".")[0] == f"{step:06d}")
    return [(folder / name).stat() for name in names]


def list_checkpoints(folder: Path) -> bool:
    """Print a line for each checkpoint in a folder, oldest first. Return True: nothing is judged."""
    print(f"{folder}\n  {'step':>8s} {'size':>9s} {'validation':>10s}  {'kind':10s} {'saved':16s} state")
    for step, meta, wrong in _states(folder):
        stats = _stats(folder, step)
        loss, saved = validation_loss(meta), time.localtime(max(stat.st_mtime for stat in stats))
        kind = "published" if "files" not in meta else "periodical" if meta.get("periodical") else "stays"
        kind = kind if meta else "?"
        print(f"  {step:8d} {in_words(sum(stat.st_size for stat in stats)):>9s} "
              f"{'' if loss is None else f'{loss:.4f}':>10s}  {kind:10s} {time.strftime('%Y-%m-%d %H:%M', saved)} "
              + ("; ".join(wrong.values()) or "whole"))
    return True


def prune(folders: list[Path], flags: PruneFlags) -> None:
    """Delete the checkpoints that the policy of training lets go, or say which those are.

    Raises UserError where a run is going on in one of the folders; nothing is deleted in any then.
    """
    if flags.keep < 1:
        raise UserError(f"--keep must be at least 1, not {flags.keep}")
    with ExitStack() as locks:
        for folder in folders if flags.yes else ():
            locks.enter_context(lock_folder(folder, f"{folder} is in use", "Wait until it ends, or stop it with {kill} "
                                            "(a run saves first). Nothing was deleted."))
        for folder in folders:
            steps = superseded(folder, max(steps_in(folder), default=0), flags.keep, flags.keep_every)
            size = sum(stat.st_size for step in steps for stat in _stats(folder, step))
            what = f"{len(steps)} of {len(steps_in(folder))} checkpoints, {in_words(size)}"
            if flags.yes:
                delete_checkpoints(folder, steps)
            print(f"{folder}: " + (("deleted " if flags.yes else "would delete ") + what
                                   + ": step" + "s" * (len(steps) > 1) + " " + ", ".join(map(str, reversed(steps)))
                                   if steps else "nothing to delete"))
    if not flags.yes:
        print("Nothing was deleted; --yes does it.")


if __name__ == "__main__":
    run_main(main)
