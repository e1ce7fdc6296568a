"""What a stage looks at before it moves, deletes, downloads or trains anything, and what --dry-run says of it.

    check_batch(config)                                        # do tokens of row, micro-batch and step fit one another?
    need_writable(base_dir() / "base_checkpoints" / "d20")
    if config.dry_run:
        return say_what_would_be_done(origin, config, ranks, num_iterations, ["200 steps of 2,048 tokens"])
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nanochat.cli import flag
from nanochat.errors import UserError
from nanochat.files import free_space, in_words, nearest, need_disk

NOTHING_CHANGED = "nothing was changed: this was --dry-run"


def dry_run_flag() -> Any:
    """Return the field of the flag --dry-run."""
    return flag(False, "look at everything, say what would be done, and change nothing")


def check_tag(tag: str) -> None:
    """Raise UserError where a model tag is not the name of one folder."""
    if tag and (Path(tag).name != tag or tag == ".."):
        raise UserError(f"--model-tag is {tag!r}; it must be one name, such as d20: checkpoints are in a folder of it")


def check_batch(config: Any) -> None:
    """Raise UserError where the tokens of a row, of a micro-batch and of a step do not fit one another.

    config: flags; those that a stage does not have, or that follow from the model, are passed over.
    """
    T, rows = getattr(config, "max_seq_len", -1), config.device_batch_size
    total, tokens = getattr(config, "total_batch_size", "auto"), getattr(config, "eval_tokens", None)
    total = total if getattr(config, "packed", True) else "auto"
    micro_batch = max(T, 1) * (1 if rows == "auto" else rows)
    if T > 0 and total != "auto" and total % micro_batch:
        near = max(1, round(total / micro_batch)) * micro_batch
        raise UserError(f"--total-batch-size is {total:,}; it must be a multiple of a micro-batch, "
                        f"{micro_batch // T} × {T:,} tokens = {micro_batch:,}. Try --total-batch-size={near}, or "
                        "another --device-batch-size.")
    if tokens is not None and tokens < micro_batch:
        raise UserError(f"--eval-tokens is {tokens}; it must be at least {micro_batch:,}, one micro-batch")


def conversation_files(text: str) -> list[Path]:
    """Return the files that --conversations names, with commas between."""
    return [Path(part.strip()).expanduser() for part in text.split(",") if part.strip()]


def need_writable(folder: Path) -> None:
    """Raise UserError unless files and folders can be made in `folder`, or in the nearest one above it that exists."""
    there = nearest(folder)
    if not there.is_dir():
        raise UserError(f"{folder} cannot be made: {there} is a file. Move that, or use another name.")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"{folder} cannot be written: {there} allows no writing to this user. "
                        "Correct that, or set NANOCHAT_BASE_DIR to another folder.")


def where(model: Any, ranks: Any) -> str:
    """Return processes, device and precision in words."""
    count = ranks.world_size
    return (f"{count} process{'es' if count > 1 else ''} on {ranks.device.type}, "
            f"{str(model.compute_dtype).removeprefix('torch.')}")


def say_what_would_be_done(origin: Any, config: Any, ranks: Any, num_iterations: int | None,
                           lines: Sequence[str]) -> None:
    """Print what a stage would do, all that can be wrong having been looked at; for --dry-run.

    Args:
        origin: nanochat.run.Origin. config: the flags. ranks: this process among all; rank 0 prints.
        num_iterations: optimizer steps of the whole run; None where only the data would say it.
        lines: about the training.

    Raises:
        UserError: the disk has no room for a checkpoint.
    """
    if not ranks.is_main:
        return
    parameters = sum(p.numel() for p in origin.model.parameters())
    size, folder = 12 * parameters, origin.folder  # float32 weights, and up to two float32 of the optimizer for each
    need_disk(folder, size, "a checkpoint")
    if origin.loaded:
        print(f"{origin.loaded}: {parameters:,} parameters")
    for line in lines:
        print(line)
    if config.fresh and folder.exists():
        print(f"the run in {folder} would be moved aside, and a new one begun")
    elif origin.step:
        print(f"it would resume from step {origin.step} of {folder}")
    else:
        print("it would begin at step 0")
    times = (f"every {config.save_every:,} steps, the last {config.keep} of these kept, and at the end"
             if config.save_every > 0 else "at the end")
    last = "" if num_iterations is None else f" of step {num_iterations:,}"
    print(f"it would write checkpoints of at most {in_words(size)} to {folder}, {times}{last}; "
          f"{in_words(free_space(folder))} are free there")
    print(NOTHING_CHANGED)


def data_unseen(source: str, config: Any, origin: Any, ranks: Any) -> bool:
    """For --dry-run: return whether the stage's data would have to be fetched to be seen, and print what is known.

    source: of the data, "hub", "small-world" or "basics". Other arguments are those of `say_what_would_be_done`.
    """
    if source != "hub" or os.environ.get("NANOCHAT_TASK_DATA"):
        return False
    steps = config.num_iterations if config.num_iterations > 0 else None
    text = f"{steps:,} steps" if steps else f"{config.num_epochs:g} epochs"
    say_what_would_be_done(origin, config, ranks, steps, [
        f"{text} on data sets of the Hugging Face hub, which are fetched as the stage begins, unless its cache has "
        f"them; {where(origin.model, ranks)}"])
    return True
