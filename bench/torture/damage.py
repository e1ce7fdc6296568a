"""Damaged checkpoints: never taken for good ones, never overwritten by a run that starts again from nothing."""

import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import torch

from bench.torture.judge import SURVIVED, Verdict, changed, compare_end, differences, lost, quietly
from bench.torture.kills import finish, keep, last_line
from bench.torture.lab import JOBS, Lab, content
from bench.torture.processes import Hung
from nanochat.checkpoint import load_checkpoint, save_checkpoint, steps_in
from nanochat.errors import UserError

PAGE = 4096
WAYS = ("flip", "flip", "truncate", "empty", "zero page", "delete", "swap", "other step")


def damage(path: Path, how: str, rng: random.Random, other: Path | None = None) -> str:
    """Damage a file. Return in words what was done. Its size and time stay where the damage allows it."""
    data = bytearray(path.read_bytes())
    if how == "flip":
        place, bit = rng.randrange(len(data)), rng.randrange(8)
        data[place] ^= 1 << bit
        words = f"bit {bit} of byte {place} of {path.name} flipped"
    elif how == "truncate":
        left = rng.randrange(1, len(data))
        del data[left:]
        words = f"{path.name} cut to {left} bytes"
    elif how == "empty":
        data.clear()
        words = f"{path.name} emptied"
    elif how == "zero page":
        pages = [start for start in range(0, len(data), PAGE) if any(data[start:start + PAGE])]
        start = rng.choice(pages)
        data[start:start + PAGE] = bytes(len(data[start:start + PAGE]))
        words = f"4 kB of {path.name} from {start} on zeroed"
    elif how == "delete":
        path.unlink()
        return f"{path.name} deleted"
    else:  # another checkpoint's file under this name; "swap": and the other way round
        assert other is not None
        data, mine = bytearray(other.read_bytes()), bytes(data)
        if how == "swap":
            other.write_bytes(mine)
        words = f"{path.name} {'swapped with' if how == 'swap' else 'replaced by'} {other.name}"
    when = path.stat()
    path.write_bytes(data)
    os.utime(path, ns=(when.st_atime_ns, when.st_mtime_ns))
    return words


def flips(lab: Lab, rng: random.Random, name: str, tell: Callable[[str], None]) -> Verdict:
    """Flip one bit in every file of a checkpoint, ten times each, and load what is newest: never the damaged one."""
    job = JOBS["base"]
    whole = lab.reference(job)
    room = lab.empty_room(name)
    folder = room.base / "d2"
    shutil.copytree(whole.base / job.folder, folder)
    newest = steps_in(folder)[0]
    files = sorted(folder.glob(f"*_{newest:06d}.*"))
    good = {step: _loaded(folder, step) for step in steps_in(folder)}
    tried = 0
    for path in files:
        data = path.read_bytes()
        for _ in range(10):
            how = damage(path, "flip", rng)
            tried += 1
            try:
                step, found = _newest(folder)
            except UserError as error:
                room.keep = True
                return lost(f"{how}: no checkpoint is found: {error}")
            if step == newest:
                room.keep = True
                where = differences(found, good[newest])
                return changed(f"{how}: accepted" + (f", {where[0]} is other" if where else ""))
            if differences(found, good[step]):
                room.keep = True
                return changed(f"{how}: step {step} loads as another")
            path.write_bytes(data)
    tell(f"{tried} flips a time")
    return Verdict(SURVIVED)


def _newest(folder: Path) -> tuple[int, tuple]:
    with quietly():
        found = load_checkpoint(folder, optimizer=True)
    return found.step, (found.model_state, found.optimizer_state, found.meta)


def _loaded(folder: Path, step: int) -> tuple:
    found = load_checkpoint(folder, step, optimizer=True)
    return found.model_state, found.optimizer_state, found.meta


def damaged(lab: Lab, rng: random.Random, name: str, tell: Callable[[str], None]) -> Verdict:
    """Damage the newest checkpoint of a run that was killed: the run goes on from an older one, to the same end."""
    job = JOBS[rng.choice(list(JOBS))]
    whole = lab.reference(job)
    last = job.steps // 5 * 5 - 5
    room = lab.stopped(job, name, min(15, last), rng)
    folder = room.folder(job)
    steps = steps_in(folder)
    if len(steps) < 2:
        return Verdict("skipped", "only one checkpoint was there")
    words = []
    for step in steps[:rng.choice((1, 1, len(steps) - 1))]:  # the newest, or all but the oldest
        kind = rng.choice(("model", "optim", "meta"))
        suffix = "json" if kind == "meta" else "pt"
        path, other = folder / f"{kind}_{step:06d}.{suffix}", folder / f"{kind}_{steps[-1]:06d}.{suffix}"
        how = rng.choice([way for way in WAYS if way != "swap"])  # the oldest is to stay good
        words.append(damage(path, how, rng, other))
    tell(f"{job.stage}: {'; '.join(words)}")
    before = content(folder)
    verdict = finish(room, job, whole.base, whole.seconds)
    if "does not go on" in verdict.note and content(folder) == before:
        return Verdict(verdict.word, f"{verdict.note} [{'; '.join(words)}]; an older one is whole")
    return Verdict(verdict.word, verdict.note and f"{verdict.note} [{job.stage}: {'; '.join(words)}]")


def all_damaged(lab: Lab, rng: random.Random, name: str, tell: Callable[[str], None]) -> Verdict:
    """Damage every checkpoint of a run, or take all metas away: the run stops with an error and writes nothing."""
    job = JOBS[rng.choice(list(JOBS))]
    room = lab.stopped(job, name, 10, rng)
    folder = room.folder(job)
    for new in (*folder.glob("*.new"), *folder.glob(".*.tmp")):  # a save that was not finished is none
        new.unlink()
    kinds = rng.choice((("meta",), ("model",), ("optim",), ("model", "optim", "meta")))
    how = rng.choice(("flip", "truncate", "empty", "zero page", "delete", "delete"))
    if how == "delete" and len(kinds) == 3:
        kinds = ("meta",)  # with all files gone nothing was there
    for step in steps_in(folder):
        kind = rng.choice(kinds)
        damage(folder / f"{kind}_{step:06d}.{'json' if kind == 'meta' else 'pt'}", how, rng)
    words = f"{job.stage}: {how} of every checkpoint's {' or '.join(kinds)}"
    tell(words)
    before = content(folder)
    life = room.start(job)
    try:
        code = room.end(life, lab.reference(job).seconds)
    except Hung as error:
        return keep(room, lost(str(error)))
    gone = [path for path, digest in before.items() if content(folder).get(path) != digest]
    if not code:
        return keep(room, lost(f"{words}: it trained anew, exit 0, over what was there"))
    if gone:
        return keep(room, lost(f"{words}: exit {code}, but {gone[0]} was written over or deleted"))
    if "Traceback" in life.text():
        return keep(room, changed(f"{words}: a traceback: {last_line(life)}"))
    return Verdict(SURVIVED)


def not_finite(lab: Lab, rng: random.Random, name: str, tell: Callable[[str], None]) -> Verdict:
    """Put a NaN or an infinity into the newest checkpoint, with a correct hash: it is passed over."""
    job = JOBS[rng.choice(("base", "mid", "sft"))]
    whole = lab.reference(job)
    room = lab.stopped(job, name, 15, rng)
    folder = room.folder(job)
    newest = steps_in(folder)[0]
    found = load_checkpoint(folder, newest, optimizer=True)
    bad = rng.choice((float("nan"), float("inf"), float("-inf")))
    kind = rng.choice(("model", "model", "optim"))
    tensors = [tensor for tensor in _tensors(found.model_state if kind == "model" else found.optimizer_state)
               if tensor.is_floating_point() and tensor.numel()]
    with torch.no_grad():
        tensor = rng.choice(tensors)
        tensor.view(-1)[rng.randrange(tensor.numel())] = bad
    tell(f"{job.stage}: {bad} in {kind} of step {newest}")
    _save_again(folder, newest, found, kind)
    verdict = finish(room, job, whole.base, whole.seconds)
    return Verdict(verdict.word, verdict.note and f"{verdict.note} [{job.stage}: {bad} in {kind} of step {newest}]")


def _tensors(part: object) -> list[torch.Tensor]:
    if isinstance(part, torch.Tensor):
        return [part]
    if isinstance(part, dict):
        return [each for value in part.values() for each in _tensors(value)]
    return [each for value in part for each in _tensors(value)] if isinstance(part, list | tuple) else []


def _save_again(folder: Path, step: int, found: object, kind: str) -> None:
    """Write a checkpoint whose hashes are right: by the project's own code, or by hand where that refuses it."""
    meta = {key: value for key, value in found.meta.items() if key not in ("files", "periodical")}
    try:
        save_checkpoint(folder, step, found.model_state, meta, found.optimizer_state, keep=3)
        if not is_finite(folder / f"{kind}_{step:06d}.pt"):
            return
    except UserError:
        pass
    name = f"{kind}_{step:06d}.pt"
    torch.save(found.model_state if kind == "model" else found.optimizer_state, folder / name)
    path = folder / f"meta_{step:06d}.json"
    written = json.loads(path.read_text(encoding="utf-8"))
    data = (folder / name).read_bytes()
    written["files"][name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    path.write_text(json.dumps(written, indent=2), encoding="utf-8")


def is_finite(path: Path) -> bool:
    """Return whether all numbers in a file of tensors are finite."""
    return all(torch.isfinite(tensor).all() for tensor in _tensors(torch.load(path, weights_only=True))
               if tensor.is_floating_point())


def source_damaged(lab: Lab, rng: random.Random, name: str, tell: Callable[[str], None]) -> Verdict:
    """Damage the model that a stage began from, after it began: the stage goes on to the same end, or says no."""
    job = JOBS[rng.choice(("mid", "sft", "rl"))]
    whole = lab.reference(job)
    room = lab.stopped(job, name, 10, rng)
    source = room.base / JOBS[job.source].folder
    step = steps_in(source)[0]
    kind = rng.choice(("model", "optim", "meta"))
    words = damage(source / f"{kind}_{step:06d}.{'json' if kind == 'meta' else 'pt'}",
                   rng.choice(("flip", "truncate", "zero page", "delete")), rng)
    tell(f"{job.stage} from {job.source}: {words}")
    before, inputs = content(room.folder(job)), content(source)
    life = room.start(job)
    try:
        code = room.end(life, whole.seconds)
    except Hung as error:
        return keep(room, lost(str(error)))
    if content(source) != inputs:
        return keep(room, changed(f"{words}: the folder it began from was written to"))
    if code:
        if any(content(room.folder(job)).get(path) != digest for path, digest in before.items()):
            return keep(room, lost(f"{words}: exit {code}, and the run's own checkpoints were changed"))
        return Verdict(SURVIVED)
    shutil.rmtree(source)  # the comparison is of the run's own files; what it began from is damaged on purpose
    shutil.copytree(whole.base / JOBS[job.source].folder, source)
    verdict = compare_end(room.base, whole.base, job)
    return keep(room, Verdict(verdict.word, verdict.note and f"{verdict.note} [{words}]"))

