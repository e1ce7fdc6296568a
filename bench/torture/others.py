"""Divergence, and reports and gradings that are killed."""

import os
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from bench.torture.damage import is_finite
from bench.torture.judge import SURVIVED, Verdict, all_whole, changed, lost
from bench.torture.kills import keep, last_line
from bench.torture.lab import JOBS, Lab, content
from bench.torture.processes import Hung
from nanochat.checkpoint import steps_in
from nanochat.logs import read_log

RUINS = ("--matrix-lr=50", "--matrix-lr=1e6", "--embedding-lr=1e30", "--unembedding-lr=300", "--embedding-lr=2000",
         "--embedding-lr=inf")
WORSE = 1.2  # times the first loss: a run that ends so has diverged
GRADED = {"sft": ["-m", "scripts.chat_eval", "-i", "sft", "-x", "16", "-m", "8", "--device-type=cpu"],
          "base": ["-m", "scripts.base_eval", "--device-type=cpu", "--split-tokens=8192"]}


def diverged(lab: Lab, rng: random.Random, name: str, tell: Callable[[str], None]) -> Verdict:
    """Go on with a ruinous learning rate: never exit 0 with a ruined model, and the good checkpoint stays."""
    job = JOBS[rng.choice(("base", "base", "mid"))]
    whole = lab.reference(job)
    room = lab.stopped(job, name, 10, rng)
    folder = room.folder(job)
    good = steps_in(folder)[0]
    before = content(folder)
    ruin = rng.choice(RUINS)
    tell(f"{job.stage}: {ruin} from step {good}")
    code = 0
    for _ in range(2):  # people run the same command again
        life = room.start(job, more=[ruin])
        try:
            code = room.end(life, whole.seconds)
        except Hung as error:
            return keep(room, lost(str(error)))
    losses = {row["step"]: row["loss"] for row in read_log(room.base / job.log) if row["kind"] == "train"}
    first, last = losses[1], losses[max(losses)]
    if not code and not last < WORSE * first:
        return keep(room, changed(f"{ruin}: exit code 0 with a loss of {last:.2f}, {first:.2f} at the start"))
    for step in steps_in(folder):
        if not is_finite(folder / f"model_{step:06d}.pt"):
            return keep(room, lost(f"{ruin}: the checkpoint of step {step} is not finite"))
    if verdict := all_whole(folder):
        return keep(room, verdict)
    if not code:
        tell(f"{job.stage}: {ruin} from step {good}: not ruined, {last:.2f}")
        return Verdict(SURVIVED)
    if good not in steps_in(folder):
        return keep(room, lost(f"{ruin}: the last good checkpoint, of step {good}, is gone; there are "
                               f"{steps_in(folder)}"))
    if any(content(folder)[path] != before[path] for path in before if f"_{good:06d}." in path):
        return keep(room, lost(f"{ruin}: the last good checkpoint, of step {good}, was written over"))
    return Verdict(SURVIVED)


def report_killed(lab: Lab, rng: random.Random, name: str, tell: Callable[[str], None]) -> Verdict:
    """Kill the report while it is written again: the old one is there whole, or the new one is."""
    job = JOBS["sft"]
    room = lab.room(job, name)
    for stage in ("base", "mid", "sft"):
        own = lab.reference(JOBS[stage]).base
        (room.base / "logs").mkdir(exist_ok=True)
        (room.base / JOBS[stage].log).write_bytes((own / JOBS[stage].log).read_bytes())
    place = room.base.with_name("here")
    place.mkdir()
    argv = ["-m", "nanochat.report", "generate"]
    life = room.start(argv, prepare=lambda: _go(place))
    if room.end(life, 5):
        return keep(room, lost(f"the first report: {last_line(life)}"))
    usual = 3.0
    old = content(room.base / "report") | content(place)
    words = []
    for _ in range(rng.randint(2, 4)):
        life = room.start(argv, prepare=lambda: _go(place))
        delay = rng.uniform(0, usual)
        life.last(delay)
        if life.poll() is None:
            life.kill()
            words.append(f"{delay:.1f} s")
        found = content(room.base / "report") | content(place)
        missing = sorted(path for path in old if path not in found)
        torn = [path for path in found if found[path] != old.get(path) and not path.startswith(".")
                and not _whole(room.base / "report" / path, place / path)]
        if missing:
            return keep(room, lost(f"killed after {delay:.1f} s: {len(missing)} of {len(old)} files are gone, such as "
                                   f"{missing[0]}"))
        if torn:
            return keep(room, lost(f"killed after {delay:.1f} s: {torn[0]} is cut"))
    tell(f"killed after {', '.join(words)}")
    life = room.start(argv, prepare=lambda: _go(place))
    if code := room.end(life, 5):
        return keep(room, lost(f"exit code {code}: {last_line(life)}"))
    return Verdict(SURVIVED)


def _go(place: Path) -> None:
    """Work in another folder, with the project still found."""
    sys.path.insert(0, os.getcwd())
    os.environ["PYTHONPATH"] = os.pathsep.join([os.getcwd(), os.environ.get("PYTHONPATH", "")])
    os.chdir(place)


def _whole(*places: Path) -> bool:
    """Whether the file, at the first of these places that has it, is a whole picture or text."""
    path = next((path for path in places if path.exists()), None)
    if path is None:
        return True
    data = path.read_bytes()
    return data.endswith(b"IEND\xaeB`\x82") if path.suffix == ".png" else data.endswith(b"\n")


def grading_killed(lab: Lab, rng: random.Random, name: str, tell: Callable[[str], None]) -> Verdict:
    """Kill an evaluation: run again, it gives the scores of an undisturbed one, and its files are whole."""
    stage = rng.choice(list(GRADED))
    source, log = lab.reference(JOBS[stage]).base, f"logs/{'chat_eval_sft' if stage == 'sft' else 'base_eval'}_d2.jsonl"
    results, usual = [], 0.0
    for part in ("undisturbed", "killed"):
        room = lab.room(JOBS[stage], f"{name}-{part}" if part == "undisturbed" else name)
        target = room.base / JOBS[stage].folder
        shutil.copytree(source / JOBS[stage].folder, target)
        if part == "killed":
            for _ in range(rng.randint(1, 3)):
                life = room.start(GRADED[stage])
                life.last(rng.uniform(0, 1.2 * usual))
                if life.poll() is not None:
                    break
                life.kill()
        life = room.start(GRADED[stage])
        try:
            code = room.end(life, 10)
        except Hung as error:
            return keep(room, lost(str(error)))
        if code:
            return keep(room, lost(f"exit code {code}: {last_line(life)}"))
        usual = life.seconds
        rows = read_log(room.base / log)
        start = max(i for i, row in enumerate(rows) if row["kind"] == "start")
        results.append([{key: value for key, value in row.items() if key not in ("time", "seconds", "folder")}
                        for row in rows[start:] if row["kind"] in ("task", "chatcore", "loss", "small_world")])
        if part == "undisturbed":
            room.close()
    tell(stage)
    if results[0] != results[1]:
        return keep(room, changed(f"{stage}: other scores after a kill than undisturbed"))
    return Verdict(SURVIVED)

