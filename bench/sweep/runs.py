"""The runs of a sweep: which there are, which are done, and doing the others side by side."""

import json
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.sweep.arms import Arm, digest
from nanochat.files import atomic_write, to_json
from nanochat.launcher import Job, Owner
from nanochat.training import clock

RESULT = 1  # higher after a change of what a run measures


@dataclass(frozen=True)
class Run:
    """An arm with a seed, at a depth of the sweep.

    flags: of base_train. key: changes with what the run is; an arm with another name has the same. tag: of its files.
    measure: whether the model is measured afterwards; else only the time of its steps is wanted.
    """

    arm: Arm
    depth: int
    seed: int
    flags: tuple[str, ...]
    key: str
    tag: str
    measure: bool = True

    @property
    def title(self) -> str:
        return f"{self.arm.name}, d{self.depth}, seed {self.seed}" + ("" if self.measure else " (timing)")


def run_of(arm: Arm, depth: int, seed: int, text: str, timing: int = 0) -> Run:
    """Return the run of an arm with a seed.

    Args:
        text: what tells the text, its tokenizer and held-out part from others.
        timing: number of a run that is only timed, from 1 on; 0 for one that counts.
    """
    flags = (*arm.flags, f"--seed={seed}", f"--data-seed={seed}")
    name = re.sub(r"[^a-z0-9.]+", "-", arm.name.lower()).strip("-.")[:40] or "arm"
    about = [RESULT, arm.identity(), seed, text, *([timing] if timing else [])]
    key = f"{f't{timing}' if timing else f's{seed}'}_{digest(*about)}"
    return Run(arm, depth, seed, flags, key, f"{name}_{key}", measure=not timing)


def result_of(run: Run, out: Path) -> dict[str, Any] | None:
    """Return the result of a run, None where it is not done."""
    for path in sorted((out / "runs").glob(f"*_{run.key}.json")):
        with suppress(OSError, ValueError):
            return json.loads(path.read_text())
    return None


def not_done(runs: Sequence[Run], out: Path) -> list[Run]:
    """Return the runs without a result, each once."""
    left: dict[str, Run] = {}
    for run in runs:
        if result_of(run, out) is None:
            left.setdefault(run.key, run)
    return list(left.values())


def spec_of(run: Run, out: Path, slot: int, device_type: str, threads: int, keep_model: bool) -> dict[str, Any]:
    """Return what bench.sweep.worker takes.

    slot: number among those that run at the same time; on GPUs it has the GPU of this number. threads: on a CPU.
    """
    env = {"NANOCHAT_BASE_DIR": str(out), "OMP_NUM_THREADS": str(threads)}
    if device_type == "cuda":
        seen = [gpu for gpu in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpu]
        env["CUDA_VISIBLE_DEVICES"] = seen[slot] if slot < len(seen) else str(slot)
    T, rows = run.arm.config.max_seq_len, run.arm.config.device_batch_size
    few = T * (rows if isinstance(rows, int) else 8)  # what base_train measures itself is not used
    flags = [*run.flags, f"--model-tag={run.tag}", f"--device-type={device_type}", "--eval-every=-1",
             "--sample-every=-1", "--save-every=-1", f"--eval-tokens={few}"]
    return {"tag": run.tag, "arm": run.arm.name, "text": run.arm.text, "seed": run.seed, "flags": flags, "env": env,
            "device_type": device_type, "keep_model": keep_model, "measure": run.measure}


class Progress:
    """What is done of a sweep, and how long the rest takes."""

    def __init__(self, total: int, cost: Callable[[Run], float]):
        self.total, self.cost, self.done, self.failed = total, cost, 0, 0
        self.began = time.monotonic()
        self.spent = 0.0  # FLOPs done since

    def line(self, left: Sequence[Run]) -> str:
        """Return a line. left: runs that are not done."""
        passed = time.monotonic() - self.began
        text = f"{self.done} of {self.total} runs done" + (f", {self.failed} failed" if self.failed else "")
        if left and self.spent:
            text += f", about {clock(passed * sum(map(self.cost, left)) / self.spent)} left"
        return text


def do_runs(owner: Owner, runs: Sequence[Run], out: Path, *, jobs: int, device_type: str, threads: int,
            keep_models: bool, hours: float, finished: Callable[[], None], say: Callable[[str], None],
            done: int = 0) -> list[Run]:
    """Do runs, as many at a time as there are jobs, in their order. Return those that failed.

    Args:
        owner: of the processes: when it ends, they save and end.
        hours: after which none is started any more; 0 for no limit.
        finished: called after each run that has a result.
        done: runs that had one before.
    """
    waiting, running, failed = list(runs), {}, []
    free = list(range(jobs))
    progress = Progress(done + len(runs), lambda run: run.arm.flops)
    progress.done = done
    while waiting or running:
        late = hours and time.monotonic() - progress.began > 3600 * hours
        if late and waiting:
            say(f"{hours:g} hours are over: {len(waiting)} runs are not started. The same command does them")
            waiting = []
        while waiting and free:
            run, slot = waiting.pop(0), free.pop(0)
            running[_start(owner, run, out, slot, device_type, threads, keep_models)] = run, slot
        if not running:
            break
        owner.wait(*running)
        for job in [job for job in running if not job.going_on]:
            run, slot = running.pop(job)
            free.append(slot)
            free.sort()
            if job.code or result_of(run, out) is None:
                failed.append(run)
                progress.failed += 1
                say(f"{run.title} failed: {job.reason or 'no result'} (runs/{run.tag}.txt)")
            else:
                progress.done += 1
                progress.spent += progress.cost(run)
                finished()
                say(f"{run.title} is done; " + progress.line([*waiting, *(run for run, _ in running.values())]))
    return failed


def _start(owner: Owner, run: Run, out: Path, slot: int, device_type: str, threads: int, keep: bool) -> Job:
    spec = out / "runs" / f"{run.tag}.spec.json"
    with atomic_write(spec, "w") as file:
        file.write(to_json(spec_of(run, out, slot, device_type, threads, keep), indent=1))
    return owner.start(run.title, [sys.executable, "-m", "bench.sweep.worker", str(spec)])
