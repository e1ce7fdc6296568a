"""Several processes: one of them, or their owner, is killed or stopped; their number changes; two runs meet."""

import os
import random
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

from bench.torture.judge import SURVIVED, Verdict, all_whole, changed, lost, read_curve
from bench.torture.kills import await_moment, finish, keep, last_line
from bench.torture.lab import JOBS, PATIENCE, START, Job, Lab, Room, with_ranks
from bench.torture.processes import Hung, Life, ranks_of
from nanochat.logs import read_log

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
    try:
        code = room.end(life, whole.seconds)
    except Hung as error:
        return keep(room, lost(str(error)))
    if code:
        return keep(room, lost(f"exit code {code}: {last_line(life)}"))
    return finish(room, job, whole.base, whole.seconds)


def restarted(lab: Lab, rng: random.Random, name: str, tell: Callable[[str], None]) -> Verdict:
    """A rank is killed under torchrun --max-restarts: the job comes back by itself, to the same end."""
    job = replace(with_ranks(JOBS[rng.choice(("base", "mid"))], 2), launcher=(
        "torch.distributed.run", "--standalone", "--nproc_per_node={ranks}", "--max-restarts=3"))
    whole = lab.reference(with_ranks(JOBS[job.stage], 2))
    room = lab.room(job, name)
    life = room.start(job)
    for _ in range(rng.randint(1, 2)):
        if not begun(room, job, life, whole.seconds):
            break
        await_moment(life, room, job, rng.choice(("anywhere", "save")), whole.seconds / 4, rng)
        ranks = ranks_of(room.mark)
        rank = rng.randrange(2)
        if rank in ranks:
            _kill(ranks[rank], signal.SIGKILL)
            tell(f"{job.stage}: rank {rank} killed")
    try:
        code = room.end(life, 3 * whole.seconds)
    except Hung as error:
        return keep(room, lost(str(error)))
    if code:
        return keep(room, lost(f"exit code {code}: {last_line(life)}"))
    return finish(room, job, whole.base, whole.seconds)


def ranks_changed(lab: Lab, rng: random.Random, name: str, tell: Callable[[str], None]) -> Verdict:
    """Go on with another number of ranks after each kill: one curve, as on one rank, to float32's rounding."""
    job = JOBS[rng.choice(("base", "mid", "sft"))]
    whole = lab.reference(job)
    room = lab.room(job, name)
    counts = rng.sample((1, 2, 3), 2)
    for ranks in counts:
        life = room.start(job, ranks=ranks)
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
    life = room.start(job, ranks=last)
    try:
        code = room.end(life, whole.seconds)
    except Hung as error:
        return keep(room, lost(str(error)))
    if code:
        return keep(room, lost(f"exit code {code}: {last_line(life)}"))
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
