"""Kills and signals at chosen moments: the same command, started again and again, ends as if nothing had happened.

The moments: during the start; anywhere; while the thread writes a checkpoint; between its commit and its final names;
inside an evaluation; inside the rollouts of reinforcement learning.
"""

import json
import random
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from bench.torture.judge import SURVIVED, Verdict, changed, compare_end, lost
from bench.torture.lab import JOBS, PATIENCE, START, TEXT, Job, Lab, Room, content
from bench.torture.processes import Hung, Life
from nanochat.logs import read_log

START_SECONDS = 4.0  # that a new Python takes to import PyTorch
DIVERSE = ("anywhere", "anywhere", "save", "commit", "evaluation", "start")


def moments(job: Job) -> tuple[str, ...]:
    """Return the moments that a stage has, the more frequent ones several times."""
    return (*DIVERSE, "rollout", "rollout") if job.stage == "rl" else DIVERSE


def await_moment(life: Life, room: Room, job: Job, moment: str, usual: float, rng: random.Random) -> None:
    """Wait until a moment has come, or the process has ended before.

    Args:
        usual: seconds that the whole command takes.
    """
    limit = START + PATIENCE * usual
    if moment == "start":
        life.last(rng.uniform(0, START_SECONDS))
    elif moment == "anywhere":
        life.last(rng.uniform(0, 0.6 * usual))  # a resumed run has less to do
    elif moment in ("save", "commit"):
        folder = room.folder(job)
        before = _names(folder)
        skip = rng.randrange(2)  # not always the first save

        def writing() -> bool:
            nonlocal before, skip
            new = {name for name in _names(folder) - before
                   if name.endswith((".new", ".tmp") if moment == "save" else ".json.new")}
            if new and skip:
                before, skip = before | new, skip - 1
                return False
            return bool(new)

        if life.until(writing, limit) and moment == "save":
            life.last(rng.uniform(0, 0.03))
    else:
        log, kinds = room.base / job.log, ("rl",) if job.stage == "rl" else ("train",)
        seen = log.stat().st_size if log.exists() else 0
        every = 10 if moment == "evaluation" else 1
        skip = rng.randrange(4) if moment == "rollout" else rng.randrange(2)
        record: dict = {}

        def there() -> bool:
            nonlocal seen, skip, record
            if not log.exists() or log.stat().st_size <= seen:
                return False
            seen = log.stat().st_size
            record = next((row for row in reversed(read_log(log)[-3:]) if row["kind"] in kinds), {})
            # the numbers of a step are read one step later: an evaluation at 10 follows the record of 9
            if not record or (record["step"] + (job.stage != "rl")) % every:
                return False
            skip -= 1
            return skip < 0

        if life.until(there, limit):
            if moment == "rollout":
                life.last(rng.uniform(0, record["rollout_seconds"]))
            else:
                life.last(min(record["seconds"], 1) * rng.uniform(0.8, 1) + rng.uniform(0, 0.1))


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} if folder.is_dir() else set()


def was_in(room: Room, job: Job, life: Life) -> str:
    """Return in a word where a process was when it was killed, by what it left."""
    if any(name.endswith((".tmp", ".new", ".gone")) for name in _names(room.folder(job))):
        return "in a save"
    text = life.text()
    return "at work" if "step 0" in text else "in the start"


def kills(lab: Lab, rng: random.Random, name: str, job: Job, tell: Callable[[str], None]) -> Verdict:
    """Kill a run two to five times, then let it end."""
    whole = lab.reference(job)
    room = lab.room(job, name)
    where: Counter[str] = Counter()
    for _ in range(rng.randint(2, 5)):
        moment = rng.choice(moments(job))
        fresh = moment == "start"
        life = room.start(job, fresh=fresh)
        await_moment(life, room, job, moment, whole.seconds, rng)
        if life.poll() is not None:
            if life.code:
                return keep(room, lost(f"exit code {life.code} after {dict(where)}: {last_line(life)}"))
            break
        life.kill()
        where[was_in(room, job, life) + ("" if moment in ("save", "commit", "anywhere", "start") else f" ({moment})")] \
            += 1
    tell(", ".join(f"{count} {word}" for word, count in where.items()))
    return finish(room, job, whole.base, whole.seconds)


def finish(room: Room, job: Job, whole: Path, usual: float, *, log: bool = True) -> Verdict:
    """Start the command once more, let it end, and judge the end."""
    life = room.start(job)
    try:
        code = room.end(life, usual)
    except Hung as error:
        return keep(room, lost(str(error)))
    if code:
        return keep(room, lost(f"the run does not go on, exit code {code}: {last_line(life)}"))
    return keep(room, compare_end(room.base, whole, job, log=log))


def last_line(life: Life) -> str:
    """Return the last line that a command printed, which says why it ended."""
    lines = [line for line in life.text().strip().splitlines() if line.strip()]
    return next((line for line in reversed(lines) if "error" in line), lines[-1] if lines else "no word")[:300]


def keep(room: Room, verdict: Verdict) -> Verdict:
    """Keep the folder of a case in which something was lost or changed. Return the verdict."""
    room.keep = room.keep or verdict.word not in (SURVIVED, "skipped")
    return verdict


def signals(lab: Lab, rng: random.Random, name: str, tell: Callable[[str], None]) -> Verdict:
    """Ask a run to stop, by SIGTERM, SIGINT or SIGHUP: it saves the step it is at and ends; nothing is done twice."""
    job = JOBS[rng.choice(list(JOBS))]
    whole = lab.reference(job)
    room = lab.room(job, name)
    told = []
    for _ in range(rng.randint(1, 3)):
        number = rng.choice((signal.SIGTERM, signal.SIGINT, signal.SIGHUP))
        moment = rng.choice([moment for moment in moments(job) if moment != "start"])
        life = room.start(job)
        # before the run handles signals it has nothing to save
        if not life.until(lambda life=life: "step 0" in life.text(), START + PATIENCE * whole.seconds):
            break
        await_moment(life, room, job, moment, whole.seconds / 2, rng)
        if life.poll() is not None:
            break
        trained = _trained(room, job)
        life.signal(number)
        try:
            code = room.end(life, whole.seconds)
        except Hung as error:
            return keep(room, lost(f"after {signal.Signals(number).name}: {error}"))
        told.append(f"{job.stage} {signal.Signals(number).name} ({moment})")
        if code not in (0, 128 + number):
            return keep(room, lost(f"exit code {code} after {signal.Signals(number).name}: {last_line(life)}"))
        steps = [int(path.stem[5:]) for path in room.folder(job).glob("meta_*.json")]
        if code and max(steps, default=0) < trained:
            return keep(room, lost(f"{signal.Signals(number).name} at step {trained}: the newest checkpoint is of "
                                    f"{max(steps, default=0)}"))
    tell(", ".join(told))
    return finish(room, job, whole.base, whole.seconds)


def _trained(room: Room, job: Job) -> int:
    kind = "rl" if job.stage == "rl" else "train"
    return max((row["step"] for row in read_log(room.base / job.log) if row["kind"] == kind), default=0)


def made(folder: Path) -> dict[str, str]:
    """Return the content of a folder of text or of a tokenizer; the seconds that it took do not count."""
    found = content(folder)
    meta = folder / "meta.json"
    if meta.exists():
        about = json.loads(meta.read_text(encoding="utf-8"))
        found["meta.json"] = json.dumps({name: value for name, value in about.items() if name != "seconds"})
    return found


def text_and_tokenizer(lab: Lab, rng: random.Random, name: str, tell: Callable[[str], None]) -> Verdict:
    """Kill the making of text and of the tokenizer: afterwards the same commands make the same files."""
    whole = lab.text()
    room = lab.empty_room(name)
    count = 0
    for argv, seconds, folder in zip(TEXT, (1.0, 2.0), ("base_data", "tokenizer")):
        for _ in range(rng.randint(0, 3)):
            life = room.start(argv)
            life.last(rng.uniform(0, seconds))
            if life.poll() is not None:
                break
            life.kill()
            count += 1
        life = room.start(argv)
        if code := room.end(life, seconds):
            return keep(room, lost(f"{argv[1]} does not go on, exit code {code}: {last_line(life)}"))
        found, wanted = made(room.base / folder), made(whole / folder)
        differ = sorted(path for path in wanted if found.get(path) != wanted[path])
        if differ:
            return keep(room, changed(f"{folder}: other files than undisturbed: {', '.join(differ)[:200]}"))
    tell(f"{count} kills")
    return Verdict(SURVIVED)
