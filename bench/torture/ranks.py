"""Several processes: one of them, or their owner, is killed or stopped; their number changes; two runs meet."""

import importlib.util
import os
import random
import signal
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from bench.torture.judge import SURVIVED, Verdict, all_whole, changed, lost, read_curve
from bench.torture.kills import await_moment, finish, keep, last_line
from bench.torture.lab import JOBS, PATIENCE, START, Job, Lab, Room, with_ranks
from bench.torture.processes import Hung, Life, ranks_of
from nanochat.logs import read_log

OWN = ("scripts.launch", "--ranks={ranks}", "--max-restarts=3")
TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc_per_node={ranks}", "--max-restarts=3")
HANG_LIMIT = 60.0  # seconds in which a rank that hangs is to be ended, where the settings say ten
SAME = 1e-4       # largest relative difference of the losses of one curve on other numbers of ranks, over 40 steps


def begun(room: Room, job: Job, life: Life, usual: float) -> bool:
    """Wait until a run has trained its first step. Return whether it has."""
    log = room.base / job.log
    size = log.stat().st_size if log.exists() else 0
    kind = "rl" if job.stage == "rl" else "train"

    def there() -> bool:
        return log.exists() and log.stat().st_size > size and f'"kind": "{kind}"' in log.read_text()[size:]

    return life.until(there, START + PATIENCE * usual)


def rank_killed(lab: Lab, rng: random.Random, name: str, tell: Callable[[str], None]) -> Verdict:
    """Of two ranks one, both, or their owner is killed: the others end, and the same command goes on."""
    job = with_ranks(JOBS[rng.choice(("base", "mid", "sft", "rl"))], 2)
    whole = lab.reference(job)
    room = lab.room(job, name)
    words = []
    for _ in range(rng.randint(1, 2)):
        life = room.start(job, fresh=rng.random() < 0.2)
        who = rng.choice(("rank 0", "rank 1", "owner", "rank 1, SIGTERM"))
        if not begun(room, job, life, whole.seconds):
            return keep(room, lost(f"did not begin: {last_line(life)}"))
        await_moment(life, room, job, rng.choice(("anywhere", "save", "evaluation")), whole.seconds / 4, rng)
        if life.poll() is not None:
            break
        ranks = ranks_of(room.mark)
        if who == "owner":
            life.kill()
        elif int(who[5]) in ranks:
            _kill(ranks[int(who[5])], signal.SIGTERM if "SIGTERM" in who else signal.SIGKILL)
        words.append(f"{job.stage}: {who}")
        try:
            code = room.end(life, whole.seconds)
        except Hung as error:
            return keep(room, lost(f"{who} of 2 killed: {error}"))
        if not code and who in ("rank 0", "rank 1") and not _done(room, job):
            return keep(room, lost(f"{who} of 2 killed, and the job ended with exit code 0: {last_line(life)}"))
        end = time.monotonic() + START + PATIENCE * whole.seconds
        while left := ranks_of(room.mark):  # without their owner they save and end
            if time.monotonic() > end:
                return keep(room, lost(f"{who} killed: ranks {sorted(left)} run on"))
            room.lab.rest(0.05)
    tell(", ".join(words))
    return finish(room, job, whole.base, whole.seconds)


def _kill(pid: int, number: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def _done(room: Room, job: Job) -> bool:
    return any(row["kind"] == "done" for row in read_log(room.base / job.log))


def failed(room: Room, life: Life, seconds: float, by: str = "") -> Verdict | None:
    """Wait until a run ends. Return a verdict where it hangs or fails, which begins with `by`; else None."""
    try:
        code = room.end(life, seconds)
    except Hung as error:
        return keep(room, lost(f"{by}{error}"))
    return keep(room, lost(f"{by}exit code {code}: {last_line(life)}")) if code else None


def rank_stopped(lab: Lab, rng: random.Random, name: str, tell: Callable[[str], None]) -> Verdict:
    """One of two ranks stands still for some seconds and goes on: so does the run."""
    job = with_ranks(JOBS[rng.choice(("base", "mid", "sft"))], 2)
    whole = lab.reference(job)
    room = lab.room(job, name)
    life = room.start(job)
    if not begun(room, job, life, whole.seconds):
        return keep(room, lost(f"did not begin: {last_line(life)}"))
    rank, seconds = rng.randrange(2), rng.uniform(1, 6)
    ranks = ranks_of(room.mark)
    if rank in ranks:
        _kill(ranks[rank], signal.SIGSTOP)
        life.last(seconds)
        _kill(ranks[rank], signal.SIGCONT)
    tell(f"{job.stage}: rank {rank} for {seconds:.1f} s")
    if harm := failed(room, life, whole.seconds):
        return harm
    return finish(room, job, whole.base, whole.seconds)


def rank_hangs(lab: Lab, rng: random.Random, name: str, tell: Callable[[str], None]) -> Verdict:
    """One of two ranks stands still for good: it is named and the job ended; then the same command goes on."""
    if not launcher_has("hang_seconds"):
        return Verdict("skipped", "scripts.launch does not look for ranks that hang")
    job = with_ranks(JOBS[rng.choice(("base", "mid", "sft", "rl"))], 2)
    whole = lab.reference(job)
    room = lab.room(job, name)
    life = room.start(job, env={"NANOCHAT_HANG_WARN": "4", "NANOCHAT_HANG_END": "10"})
    if not begun(room, job, life, whole.seconds):
        return keep(room, lost(f"did not begin: {last_line(life)}"))
    life.last(rng.uniform(0, whole.seconds / 4))
    rank = rng.randrange(2)
    ranks = ranks_of(room.mark)
    tell(f"{job.stage}: rank {rank}")
    if rank not in ranks or life.poll() is not None:
        return Verdict("skipped", "the run had ended already")
    _kill(ranks[rank], signal.SIGSTOP)
    try:
        code = life.wait(START + HANG_LIMIT)
    except Hung as error:
        return keep(room, lost(f"rank {rank} of 2 stopped: {error}"))
    if code and f"rank {rank}" not in life.text():
        return keep(room, changed(f"rank {rank} of 2 stopped, and nothing names it: {last_line(life)}"))
    return finish(room, job, whole.base, whole.seconds)


def launcher_has(word: str) -> bool:
    """Return whether scripts.launch speaks of something."""
    spec = importlib.util.find_spec("scripts.launch")
    return spec is not None and spec.origin is not None and word in Path(spec.origin).read_text(encoding="utf-8")


def restarted(lab: Lab, rng: random.Random, name: str, tell: Callable[[str], None]) -> Verdict:
    """A rank is killed under --max-restarts: the job comes back by itself, to the same end."""
    own = launcher_has("max_restarts") and rng.random() < 0.7
    job = replace(with_ranks(JOBS[rng.choice(("base", "mid"))], 2), launcher=OWN if own else TORCHRUN)
    whole = lab.reference(with_ranks(JOBS[job.stage], 2))
    room = lab.room(job, name)
    life = room.start(job)
    by = "scripts.launch" if own else "torchrun"
    for _ in range(rng.randint(1, 2)):
        if not begun(room, job, life, whole.seconds):
            break
        await_moment(life, room, job, rng.choice(("anywhere", "save")), whole.seconds / 4, rng)
        ranks = ranks_of(room.mark)
        rank = rng.randrange(2)
        if rank in ranks:
            _kill(ranks[rank], signal.SIGKILL)
            tell(f"{job.stage}, {by}: rank {rank} killed")
    if harm := failed(room, life, 3 * whole.seconds, f"{by}: "):
        return harm
    return finish(room, job, whole.base, whole.seconds)


def node_killed(lab: Lab, rng: random.Random, name: str, tell: Callable[[str], None]) -> Verdict:
    """Of two nodes of one rank each, one is killed with all that runs on it, and started again: the run goes on."""
    if not launcher_has("nnodes"):
        return Verdict("skipped", "scripts.launch knows one node")
    base = with_ranks(JOBS[rng.choice(("base", "mid"))], 2)
    whole = lab.reference(base)
    room = lab.room(base, name)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    commands = [replace(base, launcher=(*OWN[:1], "--nnodes=2", f"--node-rank={node}", "--master-addr=127.0.0.1",
                                        f"--master-port={port}", "--ranks=1", "--max-restarts=3")).argv()
                for node in range(2)]
    lives = [room.start(command, fresh=True, own_output=f"node{node}") for node, command in enumerate(commands)]
    if not begun(room, base, lives[0], whole.seconds):
        return keep(room, lost(f"did not begin: {last_line(lives[0])} | {last_line(lives[1])}"))
    lives[0].last(rng.uniform(0, whole.seconds / 2))
    tell(f"{base.stage}: node 1")
    ranks = ranks_of(room.mark)
    lives[1].kill()
    if 1 in ranks:
        _kill(ranks[1], signal.SIGKILL)
    room.lab.rest(rng.uniform(0, 3))
    if lives[0].poll() is None:
        lives[1] = room.start(commands[1], fresh=True, own_output="node1b")
    try:
        codes = [room.end(life, 3 * whole.seconds) for life in lives]
    except Hung as error:
        return keep(room, lost(str(error)))
    if codes[0]:
        return keep(room, lost(f"exit codes {codes}: {last_line(lives[0])}"))
    return finish(room, base, whole.base, whole.seconds)


def ranks_changed(lab: Lab, rng: random.Random, name: str, tell: Callable[[str], None]) -> Verdict:
    """Go on with another number of ranks after each kill: one curve, as on one rank, to float32's rounding."""
    job = JOBS[rng.choice(("base", "mid", "sft"))]
    whole = lab.reference(job)
    room = lab.room(job, name)
    counts = rng.sample((1, 2, 3), 2)
    share = [] if job.stage == "sft" else ["--device-batch-size=1"]  # else there is nothing to do for a third rank
    for ranks in counts:
        life = room.start(job, ranks=ranks, more=share)
        if not begun(room, job, life, whole.seconds):
            return keep(room, lost(f"on {ranks} ranks: {last_line(life)}"))
        await_moment(life, room, job, "save", whole.seconds, rng)
        life.signal(signal.SIGTERM)
        try:
            room.end(life, whole.seconds)
        except Hung as error:
            return keep(room, lost(f"on {ranks} ranks: {error}"))
    last = rng.choice((1, 2))
    tell(f"{job.stage}: {' → '.join(map(str, (*counts, last)))}")
    life = room.start(job, ranks=last, more=share)
    if harm := failed(room, life, whole.seconds):
        return harm
    found, wanted = (read_curve(base / job.log).values for base in (room.base, whole.base))
    missing = [key for key in wanted if key not in found]
    if missing:
        return keep(room, lost(f"the log has no record of {missing[0][0]} at step {missing[0][1]}"))
    worst = max((abs(found[key]["loss"] - value["loss"]) / max(1, abs(value["loss"])), key[1])
                for key, value in wanted.items() if key[0] == "train")
    tell(f"{job.stage}: {' → '.join(map(str, (*counts, last)))}, largest difference {worst[0]:.1e} at step {worst[1]}")
    if worst[0] > SAME:
        return keep(room, changed(f"{job.stage} on {' → '.join(map(str, (*counts, last)))} ranks: the loss of step "
                                  f"{worst[1]} differs by {worst[0]:.1e} from that on one rank"))
    return keep(room, all_whole(room.folder(job)) or Verdict(SURVIVED))


def two_runs(lab: Lab, rng: random.Random, name: str, tell: Callable[[str], None]) -> Verdict:
    """Start a second run in the folder of one that trains: it is refused, and the first ends as if alone."""
    job = JOBS[rng.choice(list(JOBS))]
    whole = lab.reference(job)
    room = lab.room(job, name)
    link = room.base.with_name("link")
    link.symlink_to(room.base, target_is_directory=True)
    life = room.start(job)
    if not life.until(lambda: "step 0" in life.text(), START + PATIENCE * whole.seconds):
        return keep(room, lost(f"did not begin: {last_line(life)}"))
    life.last(rng.uniform(0, whole.seconds / 3))
    if life.poll() is not None:
        return Verdict("skipped", "the first run had ended already")
    life.signal(signal.SIGSTOP)  # so that it is still there when the second looks, however busy the machine is
    other = rng.choice(("the same", "by a link", "with --fresh"))
    output = room.base.with_name("second.out")
    first, room.base = room.base, link if other == "by a link" else room.base
    try:
        second = Life(job.argv(more=["--fresh"] if other == "with --fresh" else []),
                      {**room.environment(), "NANOCHAT_BASE_DIR": str(room.base)}, output, fresh=False,
                      deadline=lab.deadline)
        room.lives.append(second)
        code = room.end(second, whole.seconds)
    except Hung as error:
        return keep(room, lost(f"the second run ({other}): {error}"))
    finally:
        room.base = first
        life.signal(signal.SIGCONT)
    tell(f"{job.stage}, {other}")
    if not code:
        return keep(room, lost(f"the second run ({other}) was not refused"))
    if str(life.pid) not in second.text():
        return keep(room, changed(f"the second run ({other}) does not name process {life.pid}: {last_line(second)}"))
    try:
        code = room.end(life, whole.seconds)
    except Hung as error:
        return keep(room, lost(f"the first run: {error}"))
    if code:
        return keep(room, lost(f"the first run ended with {code}: {last_line(life)}"))
    return finish(room, job, whole.base, whole.seconds)
