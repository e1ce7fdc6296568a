"""Folders to break, the commands that work in them, and the undisturbed runs to compare with.

    with Lab(scratch, seed=1, deadline=time.monotonic() + 300) as lab:
        job = JOBS["mid"]
        whole = lab.reference(job)                  # trained once, without any disturbance
        room = lab.room(job, "kills-mid-0")         # a folder where this stage can start
        life = room.start(job)
        ...

All commands work on a text of 600 documents, a vocabulary of 512 and a model of two layers.
"""

import hashlib
import os
import random
import shutil
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from bench.torture.processes import MARK, Life, OutOfTime, fork_ranks, stragglers
from nanochat.stages import STAGES

TAG = "d2"
TEXT = (["-m", "nanochat.dataset", "small-world", "--docs=600"], ["-m", "scripts.tok_train", "--vocab-size=512"])
COMMON = ("--device-type=cpu", "--save-every=5", "--keep=3", "--kernels=default")
PATIENCE = 40.0  # a command hangs where it takes this many times as long as usual
START = 120.0    # seconds more than that, for a new Python on a busy machine


@dataclass(frozen=True)
class Job:
    """A training command and what it makes.

    stage: of nanochat.stages. module, flags: the command. steps: of the whole run. source: the stage it starts from.
    ranks: processes; above 1 they are started by `launcher`.
    """

    stage: str
    module: str
    steps: int
    flags: tuple[str, ...]
    source: str = ""
    ranks: int = 1
    launcher: tuple[str, ...] = ("scripts.launch", "--ranks={ranks}")

    def argv(self, ranks: int = 0, more: Sequence[str] = ()) -> list[str]:
        """Return the command after `python`."""
        ranks = ranks or self.ranks
        own = [*COMMON, f"--num-iterations={self.steps}", *self.flags, *more]
        if ranks == 1:
            return ["-m", self.module, *own]
        first, *rest = (part.format(ranks=ranks) for part in self.launcher)
        return ["-m", first, *rest, *(["-m"] if first.startswith("torch") else []), self.module, "--", *own]

    @property
    def folder(self) -> str:
        """Of its checkpoints, below the base folder."""
        return f"{STAGES[self.stage].folder}/{TAG}"

    @property
    def log(self) -> str:
        """Below the base folder."""
        return f"logs/{self.stage}_{TAG}.jsonl"


_CHAT = ("--eval-every=10", "--init-lr-frac=0.5")
JOBS = {
    "base": Job("base", "scripts.base_train", 40, (
        "--depth=2", "--max-seq-len=128", "--total-batch-size=512", "--device-batch-size=2", "--eval-every=10",
        "--eval-tokens=8192", "--sample-every=20", "--core-metric-every=-1")),
    "mid": Job("mid", "scripts.mid_train", 25, (
        "--max-seq-len=128", "--total-batch-size=512", "--device-batch-size=2", "--eval-tokens=4096", *_CHAT), "base"),
    "sft": Job("sft", "scripts.chat_sft", 25, (
        "--device-batch-size=4", "--target-examples-per-step=8", "--eval-steps=4", "--eval-metrics-every=10",
        "--eval-metrics-max-problems=16", *_CHAT), "mid"),
    "rl": Job("rl", "bench.torture.easy_rl", 15, (
        "--device-batch-size=4", "--examples-per-step=2", "--num-samples=4", "--max-new-tokens=16",
        "--eval-examples=8", "--eval-samples=2", "--source=sft", *_CHAT), "sft"),
}


@dataclass(frozen=True)
class Reference:
    """An undisturbed run: its base folder, and the seconds it took when it was forked."""

    base: Path
    seconds: float


class Room:
    """A base folder of one case. Commands start here; `close` ends what still runs and removes it."""

    def __init__(self, lab: "Lab", base: Path):
        self.lab, self.base, self.lives = lab, base, []
        self.mark = f"{lab.mark}-{uuid.uuid4().hex[:6]}"
        self.keep = False

    def start(self, command: Job | Sequence[str], *, fresh: bool = False, ranks: int = 0, more: Sequence[str] = (),
              env: dict[str, str] | None = None, prepare: Callable[[], None] | None = None, own_output: str = ""
              ) -> Life:
        """Start a command in this folder. See `Life`. own_output: name of a file of its own for what it prints."""
        argv = command.argv(ranks, more) if isinstance(command, Job) else list(command)
        if prepare is None and not fresh and argv[1] == "scripts.launch":
            prepare = fork_ranks
        output = self.base.with_name(f"{own_output or self.base.name}.out")
        life = Life(argv, {**self.environment(), **(env or {})}, output, fresh=fresh, prepare=prepare,
                    deadline=self.lab.deadline)
        self.lives.append(life)
        return life

    def environment(self) -> dict[str, str]:
        """Return the environment of the commands here, beside this process's."""
        return {"NANOCHAT_BASE_DIR": str(self.base), "NANOCHAT_DTYPE": "float32", MARK: self.mark,
                "NANOCHAT_PROGRESS": "0", "PYTHONUNBUFFERED": "1"}

    def end(self, life: Life, usual: float) -> int:
        """Wait until a command ends by itself, and return its exit code. Raises Hung."""
        return life.wait(START + PATIENCE * usual)

    def folder(self, job: Job) -> Path:
        """Return the folder of a job's checkpoints."""
        return self.base / job.folder

    def stop(self) -> None:
        """End all that runs here."""
        for life in self.lives:
            life.kill()
        for _ in range(5):
            left = stragglers(self.mark)
            for pid in left:
                with suppress(ProcessLookupError):
                    os.kill(pid, 9)
            if not left:
                break
            time.sleep(0.05)

    def close(self) -> None:
        """End all that runs here, and remove the folder, except where it is to be kept."""
        self.stop()
        if not self.keep:
            shutil.rmtree(self.base.parent, ignore_errors=True)


class Lab:
    """The scratch folder of this program.

    Args:
        scratch: created here; removed at the end unless a room is kept.
        deadline: by time.monotonic, when all must have ended.
    """

    def __init__(self, scratch: Path, deadline: float):
        self.scratch, self.deadline = scratch, deadline
        self.mark = f"{os.getpid()}-{uuid.uuid4().hex[:6]}"
        self.rooms: list[Room] = []
        self._references: dict[Job, Reference] = {}
        self._text: Path | None = None

    def __enter__(self) -> "Lab":
        self.scratch.mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(self, *_: object) -> None:
        for room in self.rooms:
            room.close()
        if not any(room.keep for room in self.rooms):
            shutil.rmtree(self.scratch, ignore_errors=True)

    def rest(self, seconds: float) -> None:
        """Wait. Raises OutOfTime where the program's time is over."""
        if time.monotonic() + seconds > self.deadline:
            raise OutOfTime
        time.sleep(seconds)

    def empty_room(self, name: str) -> Room:
        """Return a room with nothing in it."""
        base = self.scratch / name / "base"
        shutil.rmtree(base.parent, ignore_errors=True)
        base.mkdir(parents=True)
        room = Room(self, base)
        self.rooms.append(room)
        return room

    def text(self) -> Path:
        """Return a base folder with text and a tokenizer, made once."""
        if self._text is None:
            room = self.empty_room("text")
            for argv in TEXT:
                life = room.start(argv)
                if code := room.end(life, 10):
                    raise RuntimeError(f"`python {' '.join(argv)}` ended with {code}:\n{life.text()}")
            self._text = room.base
        return self._text

    def room(self, job: Job, name: str) -> Room:
        """Return a room where a job can start: text, tokenizer, and the checkpoints of the stage it starts from."""
        text = self.text()
        source = self.reference(JOBS[job.source]).base if job.source else None
        room = self.empty_room(name)
        for part in ("base_data", "tokenizer"):
            shutil.copytree(text / part, room.base / part)
        if source is not None:
            shutil.copytree(source / JOBS[job.source].folder, room.base / JOBS[job.source].folder)
        return room

    def reference(self, job: Job) -> Reference:
        """Return the undisturbed run of a job, trained once."""
        if job not in self._references:
            room = self.room(job, f"whole-{job.stage}-{job.ranks}-{len(self._references)}")
            life = room.start(job)
            if code := room.end(life, 30):
                raise RuntimeError(f"the undisturbed run of {job.stage} ended with {code}:\n{life.text()}")
            self._references[job] = Reference(room.base, life.seconds)
        return self._references[job]

    def stopped(self, job: Job, name: str, step: int, rng: random.Random) -> Room:
        """Return a room where a job was killed after `step` steps, with the checkpoints it had made until then.

        They are of a real run of the same command that is killed when the checkpoint of `step` has its final name.
        """
        room = self.room(job, name)
        usual = self.reference(job).seconds
        meta = room.folder(job) / f"meta_{step:06d}.json"
        life = room.start(job)
        life.until(meta.exists, START + PATIENCE * usual)
        life.last(rng.uniform(0, 0.05))
        life.kill()
        if not meta.exists():
            raise RuntimeError(f"{job.stage} did not come to step {step}:\n{life.text()}")
        return room


def with_ranks(job: Job, ranks: int) -> Job:
    """Return a job with another number of processes."""
    return replace(job, ranks=ranks)


def content(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file below a folder, by path; lock files, which hold a process's number, left out."""
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(folder.rglob("*")) if path.is_file() and path.suffix != ".lock"}
