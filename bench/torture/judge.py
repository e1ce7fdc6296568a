"""Tell whether the end of a disturbed run is that of an undisturbed one: nothing lost, nothing subtly other.

Two words. Lost: a checkpoint, a step, a record, a file, or the whole run is not there any more, or the command cannot
go on. Changed: all is there and the commands say so, but a number is another.
"""

import json
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.torture.lab import JOBS, Job, content
from nanochat.checkpoint import load_checkpoint, steps_in
from nanochat.logs import read_log

SURVIVED, LOST, CHANGED, SKIPPED = "survived", "lost", "changed", "skipped"
META = ("step", "val_bpb", "val_loss", "model_config", "num_iterations", "loader", "from", "data", "tokenizer",
        "max_seq_len", "compute_dtype")  # fields of a meta file that a disturbance may not change
RECORDS = {"train": ("loss", "norm", "lr_scale", "tokens", "supervised"), "rl": ("reward", "loss", "norm", "lr_scale"),
           "val": ("bpb", "loss"), "metric": ("accuracy",), "pass": None, "samples": ("texts",)}


@contextmanager
def quietly() -> Iterator[None]:
    """Within the block, do not print the warnings of the code that is called here, in this process."""
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


@dataclass(frozen=True)
class Verdict:
    """What became of a case: one of the four words above, and what was seen."""

    word: str
    note: str = ""


def lost(note: str) -> Verdict:
    """Return the verdict that something is gone."""
    return Verdict(LOST, note)


def changed(note: str) -> Verdict:
    """Return the verdict that a number is another."""
    return Verdict(CHANGED, note)


def differences(a: Any, b: Any, path: str = "") -> list[str]:
    """Return where two nested values differ; tensors are compared bit for bit."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        same = a.dtype == b.dtype and a.shape == b.shape and torch.equal(_bits(a), _bits(b))
        return [] if same else [path or "value"]
    if isinstance(a, dict) and isinstance(b, dict):
        found = [f"{path}.{name}" for name in a.keys() ^ b.keys()]
        return found + [each for name in a.keys() & b.keys() for each in differences(a[name], b[name],
                                                                                     f"{path}.{name}")]
    if isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        return [each for i, (x, y) in enumerate(zip(a, b)) for each in differences(x, y, f"{path}[{i}]")]
    if isinstance(a, float) and isinstance(b, float) and math.isnan(a) and math.isnan(b):
        return []
    return [] if type(a) is type(b) and a == b else [path or "value"]


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.contiguous()
    return tensor.view(torch.uint8) if tensor.dim() else tensor.reshape(1).view(torch.uint8)


def read_raw(folder: Path, step: int) -> tuple[dict, dict, dict]:
    """Return model, optimizer and meta of a checkpoint as they are on disk, by no code of the project."""
    model, optim = (torch.load(folder / f"{part}_{step:06d}.pt", weights_only=True) for part in ("model", "optim"))
    return model, optim, json.loads((folder / f"meta_{step:06d}.json").read_text(encoding="utf-8"))


def compare_checkpoint(folder: Path, whole: Path, step: int) -> Verdict | None:
    """Compare the checkpoint of a step with that of the undisturbed run."""
    for part in ("meta_{:06d}.json", "model_{:06d}.pt", "optim_{:06d}.pt"):
        if not (folder / part.format(step)).exists():
            return lost(f"{part.format(step)} is not there")
    found, wanted = read_raw(folder, step), read_raw(whole, step)
    for name, a, b in (("weights", found[0], wanted[0]), ("optimizer", found[1], wanted[1]),
                       ("meta", *({key: meta[key] for key in META if key in meta} for meta in (found[2], wanted[2])))):
        if where := differences(a, b):
            return changed(f"step {step}: {name} differ in {len(where)}, such as {where[0]}")
    return None


@dataclass
class Curve:
    """The records of a run by (kind, step, name), those that a resumed run trained again replaced."""

    values: dict[tuple[str, int, str], dict[str, Any]]
    problems: list[Verdict]


def read_curve(path: Path) -> Curve:
    """Read a log. What a resumed run repeats must be what was there before, and no step may be missing."""
    values: dict[tuple[str, int, str], dict[str, Any]] = {}
    problems, here, start = [], 0, 0
    for record in read_log(path):
        kind = record.get("kind")
        if kind == "model":
            start, here = record["start"], record["start"]
        if kind not in RECORDS:
            continue
        fields = RECORDS[kind]
        value = {name: record[name] for name in record if name not in ("time", "kind", "step", "name", "seconds")
                 and (fields is None or name in fields)}
        key = kind, record["step"], record.get("name", "")
        if key in values and differences(values[key], value) and kind != "pass":
            problems.append(changed(f"{kind} of step {record['step']} is {value} where it was {values[key]} before"))
        values[key] = value
        if kind in ("train", "rl"):
            if record["step"] <= here and record["step"] > start:
                problems.append(changed(f"the log has step {record['step']} twice after one start at {start}"))
            here = record["step"]
    return Curve(values, problems)


def compare_logs(path: Path, whole: Path, steps: int) -> Verdict | None:
    """Compare a log, whose run was disturbed, with that of the undisturbed run."""
    found, wanted = read_curve(path), read_curve(whole)
    if found.problems:
        return found.problems[0]
    missing = [key for key in wanted.values if key not in found.values]
    if missing:
        return lost(f"the log has no record of {missing[0][0]} at step {missing[0][1]} ({len(missing)} are missing)")
    for key, value in wanted.values.items():
        if differences(found.values[key], value):
            return changed(f"{key[0]} at step {key[1]}: {found.values[key]}, undisturbed {value}")
    extra = [key for key in found.values if key not in wanted.values and (key[0] != "pass" and key[0] != "samples")]
    if extra:
        return changed(f"the log has a record of {extra[0][0]} at step {extra[0][1]} that an undisturbed run has not")
    return None


def compare_end(base: Path, whole: Path, job: Job, *, log: bool = True) -> Verdict:
    """Judge a finished run: its last checkpoint, all others that are there, its log, and what it only read."""
    folder, other = base / job.folder, whole / job.folder
    verdict = compare_checkpoint(folder, other, job.steps)
    for step in steps_in(folder):
        if verdict is None and step != job.steps and step in steps_in(other):
            verdict = compare_checkpoint(folder, other, step)
    return verdict or (compare_logs(base / job.log, whole / job.log, job.steps) if log else None) \
        or inputs_untouched(base, whole, job) or all_whole(folder) or Verdict(SURVIVED)


def inputs_untouched(base: Path, whole: Path, job: Job) -> Verdict | None:
    """Check that what the run only reads is as it was."""
    for name in ("base_data", "tokenizer", *([JOBS[job.source].folder] if job.source else [])):
        if content(base / name) != content(whole / name):
            return changed(f"{name}, which the run only reads, is other than before")
    return None


def all_whole(folder: Path) -> Verdict | None:
    """Check that every checkpoint that has its final name can be read and verified."""
    for step in steps_in(folder):
        try:
            with quietly():
                load_checkpoint(folder, step, optimizer=True)
        except Exception as error:
            return lost(f"the checkpoint of step {step} does not load: {error}")
    return None
