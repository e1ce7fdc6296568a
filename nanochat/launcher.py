"""Processes with an owner: started by it, asked to stop once, ended with it. The ranks of a run are such processes.

    with Owner() as owner:                                        # handles Ctrl-C, SIGTERM and SIGHUP from here on
        job = owner.start("base model", [sys.executable, "-m", "scripts.base_train"], ranks=8)
        code = owner.wait(job)                                    # SystemExit(130) after Ctrl-C

What holds:

- Each process leads a session of its own, so that Ctrl-C in a terminal reaches the owner alone. The owner hands the
  signal on once, waits as long as a save takes, and says what it waits for. Ctrl-C again ends the processes without a
  save; a checkpoint is either whole or not there.
- Where a rank fails, the others cannot go on: they end within seconds, a checkpoint that is being written excepted. The
  exit code and the last line on the screen are those of the rank that failed first.
- When a process has ended, so has everything in its process group.
- Where the owner is killed, its processes see the end of their line to it. They stop as if asked to by SIGTERM.
- A process that shows no sign of life, or that the other ranks wait for (nanochat/watch.py), is named after
  NANOCHAT_HANG_WARN seconds (120) and ended after NANOCHAT_HANG_END (600); 0 means never.

The line is a socket. A process that was started here calls `obey_owner` (`nanochat.cli.run_main` does) and then tells
its owner what it does: JSON, one object a line, see `tell_owner`. A launcher that has an owner itself hands on what its
ranks tell. Nothing here imports torch.
"""

import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from nanochat.logs import print_line
from nanochat.watch import hang_seconds, is_stopped

STOPS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
GRACE = 10.0         # seconds to end in, for a process that does not save anything
PATIENCE = 3600.0    # seconds to end in, for one that does
ORPHANED = 600.0     # seconds to end in, for a process whose owner has died
REMIND = 15.0        # seconds between two lines about what is waited for
BOUNCE = 1.0         # a second Ctrl-C counts from this many seconds after the first
TICK = 0.1           # seconds between two looks at the processes
BEAT = 5.0           # seconds from one sign of life of a process to the next
STEP_TOLD_AFTER = 0.2  # seconds

LINE, MASTER = "NANOCHAT_OWNER_LINE", "NANOCHAT_MASTER_LISTENS"  # environment: file descriptors, see Owner.start
RESTARTED = "NANOCHAT_RESTARTED"  # environment: why a job was started anew, for its log


def handled_stops() -> list[int]:
    """Return the signals that ask a run to stop. An ignored SIGHUP is none of them: under nohup a run goes on."""
    return [number for number in STOPS if number in STOPS[:2] or signal.getsignal(number) != signal.SIG_IGN]


# ---- the side of a process that has an owner

_line: socket.socket | None = None  # to the owner; None where this process has none
told: dict[str, Any] = {}          # the last news of each kind
_sending = threading.Lock()


def obey_owner() -> None:
    """Where this process was started by an Owner, end when that ends, and let signals end Python in good order.

    SIGTERM and SIGHUP raise SystemExit, so that `finally` blocks run, as they do for Ctrl-C. A process of torchrun
    ends with torchrun. A second call does nothing.
    """
    global _line
    number = os.environ.pop(LINE, "")  # not for the processes that this one starts
    if not number:
        if _line is None and os.environ.get("TORCHELASTIC_RUN_ID") and not told:
            told["ready"] = True
            threading.Thread(target=_end_with_parent, args=(os.getppid(),), name="owner", daemon=True).start()
        return
    _line = socket.socket(fileno=int(number))
    _line.set_inheritable(False)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # may be ignored, as under nohup
    for stop in STOPS[1:]:
        signal.signal(stop, _exit_of_signal)
    threading.Thread(target=_end_with_owner, args=(_line,), name="owner", daemon=True).start()
    threading.Thread(target=_show_life, name="life", daemon=True).start()
    tell_owner(ready=True)


def _show_life() -> None:
    while tell_owner(beat=True, step=told.get("step", -1)):
        time.sleep(min(BEAT, *(limit / 4 for limit in hang_seconds())))


def _exit_of_signal(number: int, frame: object) -> None:
    raise SystemExit(128 + number)


def _end_with_owner(line: socket.socket) -> None:
    with suppress(OSError):
        while line.recv(4096):
            pass
    _end_orphaned()


def _end_with_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    _end_orphaned()


def _end_orphaned() -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(ORPHANED if any(told.get(name) for name in ("saves", "saving", "owns")) else GRACE)
    if os.getpgrp() == os.getpid():
        os.killpg(os.getpid(), signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)


def tell_owner(**news: Any) -> bool:
    """Send news to the owner. Return whether there is one. Never waits.

    Args:
        ready: True: signals are handled from now on.
        saves: whether this process saves something before it ends, when it is asked to stop.
        saving: what is being saved just now, in words; "" for nothing.
        owns: True: it owns processes itself and ends them by the rules of this file.
        error: a text that the owner prints, with the name of the rank.
        reason: why this process fails, in a line, for the owner's last line. An error's last line is one too.
        mend: True: it fails for what its user must mend, so that starting it again is in vain.
        step: the optimizer step that it has come to.
        hung: of ranks that the others wait for in vain, by number as text, how they hang, in words.
        beat: True: it is alive.
    """
    told.update(news)
    if "error" in news:
        news |= {"at": time.monotonic(), "step": told.get("step", -1)}
    if _line is None:
        return False
    with _sending, suppress(OSError):  # the owner is gone, or stopped and its buffer full
        _line.send(json.dumps(news).encode() + b"\n", socket.MSG_DONTWAIT)
    return True


def has_owner() -> bool:
    """Return whether this process was started by an Owner, and has called `obey_owner`."""
    return _line is not None


def at_step(step: int) -> None:
    """Tell that this process begins optimizer step `step`, but not more often than is of use."""
    told.setdefault("first_step", step)
    now = time.monotonic()
    if now - told.get("step_at", 0.0) > STEP_TOLD_AFTER:
        tell_owner(step=step, step_at=now)
    else:
        told["step"] = step


@contextmanager
def saving(what: str) -> Iterator[None]:
    """Within the block, something is written that an owner should wait for. what: in words, such as "step 500"."""
    tell_owner(saving=what)
    try:
        yield
    finally:
        tell_owner(saving="")


@contextmanager
def handling_stops(handle: Callable[[int], object]) -> Iterator[None]:
    """Within the block, a signal that asks to stop calls handle(number)."""
    before = {}
    with suppress(ValueError):  # not the main thread, which then handles signals itself
        for number in handled_stops():
            before[number] = signal.signal(number, lambda number, frame: handle(number))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Within the block, SIGINT (Ctrl-C), SIGTERM and SIGHUP (a closed terminal) append their number to the yielded
    list and end nothing. An owner of this process is told that it saves before it ends."""
    received: list[int] = []
    with handling_stops(received.append):
        tell_owner(saves=True)
        try:
            yield received
        finally:
            tell_owner(saves=False)


# ---- the side of the owner

@dataclass(eq=False)
class _Member:
    """A process of a job, and what it told last; see `tell_owner`. name: "rank 3", or "" in a job of one process."""

    name: str
    popen: subprocess.Popen
    line: socket.socket
    unread: bytes = b""
    ready: bool = False
    saves: bool = False
    saving: str = ""
    owns: bool = False
    error: str = ""
    reason: str = ""
    mend: bool = False
    step: int = -1
    heard: float = 0.0  # when it last told anything; 0 before the first time
    named: bool = False  # as one without a sign of life
    failed_at: float = float("inf")  # by the clock that all processes share
    since: float = field(default_factory=time.monotonic)  # of the last change of these
    asked: int = 0  # the signal that it was sent
    hastened: float = 0.0  # when Ctrl-C was last handed on to end it without a save
    killed: bool = False
    silent: bool = False  # its line has ended
    code: int | None = None  # exit code as a shell has it: 128 + the signal's number where a signal ended it

    @property
    def running(self) -> bool:
        return self.code is None

    def signal(self, number: int) -> None:
        with suppress(ProcessLookupError):
            self.popen.send_signal(number)

    def kill(self) -> None:
        """Kill the process and all in its process group."""
        self.killed = True
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.popen.pid, signal.SIGKILL)


@dataclass(eq=False)
class Job:
    """Processes that succeed or fail together.

    first: the process that ended first with another code than 0. stopped: the signal that the job was asked to stop
    with, 0 for none. elsewhere: what other machines do for it (scripts/nodes.py), and `failed` there: exit code, reason
    and whether its user must mend it.
    """

    title: str
    members: list[_Member]
    first: _Member | None = None
    elsewhere: Any = None
    failed: tuple[int, str, bool] | None = None
    world: int = 0  # ranks of all machines
    failing_since: float = 0.0
    stopped: int = 0
    stopped_at: float = 0.0
    reminded_at: float = 0.0
    printed: set[str] = field(default_factory=set)

    @property
    def running(self) -> list[_Member]:
        return [member for member in self.members if member.running]

    @property
    def going_on(self) -> bool:
        """Whether a process of it runs, here or on another machine."""
        return bool(self.running) or self.elsewhere is not None and not self.elsewhere.ended()

    @property
    def code(self) -> int:
        """Exit code: that of the process that failed first."""
        return self.failed[0] if self.failed is not None else self.first.code if self.first is not None else 0

    @property
    def step(self) -> int:
        """The optimizer step that the job came to, −1 where none was told."""
        return max((member.step for member in self.members), default=-1)

    @property
    def mend(self) -> bool:
        """Whether the job failed for what its user must mend, or was ended by a signal that asks it to."""
        told = self.failed[2] if self.failed is not None else self.first is not None and self.first.mend
        return told or (self.code in (2, *(128 + number for number in STOPS)))

    @property
    def reason(self) -> str:
        """Why the job failed, in a line; "" where it did not fail or nobody knows."""
        first = self.first
        if self.failed is not None:
            return self.failed[1]
        if first is None:
            return ""
        why = first.reason.removeprefix("error: ") or death(first.code)
        return f"{first.name} of {self.world or len(self.members)} failed first: {why}" if first.name else first.reason


def death(code: int) -> str:
    """Return in words how a process ended that gave no reason itself."""
    if code == 128 + signal.SIGKILL:
        return "it was killed (SIGKILL); often the machine's memory was full"
    names = {128 + number: number.name for number in signal.Signals}
    return f"it was ended by {names[code]}" if code in names else f"it ended with exit code {code}"


@dataclass(frozen=True)
class Group:
    """The ranks of one machine among those of a job on several.

    first: of its ranks. world: ranks of all. address, port: where they meet. master: what listens there, on node 0.
    """

    first: int
    world: int
    node: int
    nodes: int
    address: str
    port: int
    master: socket.socket | None


class Owner:
    """The owner of jobs. As a context it handles Ctrl-C, SIGTERM and SIGHUP, and at its end no process of it is left.

    stopped: the signal that came, 0 for none.
    """

    def __init__(self) -> None:
        self.stopped = 0
        self._stopped_at = 0.0
        self._hasten = False
        self._jobs: list[Job] = []
        self._signals = ExitStack()
        self._looked = time.monotonic()
        self._warn, self._end = hang_seconds()

    def __enter__(self) -> "Owner":
        self._signals.enter_context(handling_stops(self._receive))
        tell_owner(owns=True)
        return self

    def __exit__(self, *_: object) -> None:
        try:
            for job in self._jobs:
                self._stop(job, self.stopped or signal.SIGTERM)
            while any(job.running for job in self._jobs):
                self._tick()
        finally:
            for job in self._jobs:  # an error in the lines above: none may be left all the same
                for member in job.running:
                    member.kill()
            self._signals.close()

    def _receive(self, number: int) -> None:
        if not self.stopped:
            self.stopped, self._stopped_at = number, time.monotonic()
        elif number == signal.SIGINT and time.monotonic() - self._stopped_at > BOUNCE:
            self._hasten = True  # a second SIGTERM or SIGHUP is a repetition, as a closed terminal sends it

    def start(self, title: str, argv: Sequence[str], *, ranks: int = 1, group: Group | None = None) -> Job:
        """Start a program, with several ranks as torchrun does: RANK, LOCAL_RANK, WORLD_SIZE and more tell them.

        The port at which the ranks meet listens already when they start, so that nobody else can take it: rank 0
        inherits the socket.

        Args:
            title: the job's name in messages.
            argv: the program and its arguments. It should call `obey_owner` early.
            ranks: number of processes on this machine.
            group: their place among those of several machines; None where this is the only one.

        Raises:
            SystemExit: a signal came before.
        """
        if self.stopped:
            raise SystemExit(128 + self.stopped)
        with socket.create_server(("127.0.0.1", 0), backlog=max(128, ranks)) as master:
            group = group or Group(0, ranks, 0, 1, "127.0.0.1", master.getsockname()[1], master)
            job = Job(title, [], world=group.world)
            self._jobs.append(job)
            for local in range(ranks):
                rank = group.first + local
                mine, theirs = socket.socketpair()
                with theirs:
                    env, passed = {**os.environ, LINE: str(theirs.fileno())}, [theirs.fileno()]
                    if group.world > 1:
                        listens = [group.master.fileno()] if rank == 0 and group.master is not None else []
                        env |= {"RANK": str(rank), "LOCAL_RANK": str(local), "WORLD_SIZE": str(group.world),
                                "LOCAL_WORLD_SIZE": str(ranks), "GROUP_RANK": str(group.node),
                                "GROUP_WORLD_SIZE": str(group.nodes),
                                "MASTER_ADDR": group.address, "MASTER_PORT": str(group.port),
                                "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),  # as torchrun
                                # a rank that ends makes the C++ of the others print pages
                                "TORCH_CPP_LOG_LEVEL": os.environ.get("TORCH_CPP_LOG_LEVEL", "ERROR"),
                                MASTER: "".join(map(str, listens))}
                        passed += listens
                    mine.setblocking(False)
                    popen = subprocess.Popen(argv, env=env, pass_fds=passed, start_new_session=True,
                                             stdin=subprocess.DEVNULL)
                job.members.append(_Member(f"rank {rank}" if group.world > 1 else "", popen, mine))
        return job

    def wait(self, *jobs: Job) -> int:
        """Wait until one of the jobs has ended. Return its exit code; `job.reason` says more.

        Raises:
            SystemExit: a signal came, and all jobs have ended. The code is 128 + its number, or that of a process that
                failed on its way to the end.
        """
        while all(job.going_on for job in jobs) and not self.stopped:
            self._tick()
        if not self.stopped:
            return next(job.code for job in jobs if not job.going_on)
        for each in self._jobs:
            self._stop(each, self.stopped)
        while any(each.running for each in self._jobs):
            self._tick()
        own = [each.code for each in self._jobs if each.first is not None and not each.first.killed
               and each.code not in (128 + number for number in STOPS)]
        raise SystemExit(own[0] if own else 128 + self.stopped)

    def _stop(self, job: Job, number: int) -> None:
        """Ask a job to stop, once."""
        if job.stopped or not job.running:
            return
        job.stopped, job.stopped_at = number, time.monotonic()
        job.reminded_at = job.stopped_at
        for member in job.running:
            self._ask(member, number)
        if _line is None and any(member.saves for member in job.running):  # else the owner of this owner says it
            print_line(f"\n{signal.Signals(number).name}: {job.title} is asked to save and end; waiting for it. "
                       "Ctrl-C again ends it without a save.", sys.stderr)

    def _ask(self, member: _Member, number: int) -> None:
        if not member.asked:
            # one that is still importing would answer Ctrl-C with a traceback
            member.asked = number if member.ready else signal.SIGTERM
            member.since = time.monotonic()
            member.signal(member.asked)

    def _tick(self) -> None:
        """Wait a moment; hear what the processes tell, see which have ended, and end those that must."""
        lines = [member.line for job in self._jobs for member in job.running if not member.silent]
        if lines:
            select.select(lines, [], [], TICK)
        else:
            time.sleep(TICK)
        self._looked, before = time.monotonic(), self._looked
        for job in self._jobs:
            for member in job.running if self._looked - before > BEAT else ():  # this process was stopped itself
                member.heard += self._looked - before if member.heard else 0
            ended = [member for member in job.running if self._has_ended(member)]
            told = [member for member in job.members if self._hear(job, member)]
            for member in sorted(ended, key=lambda member: member.failed_at):
                member.line.close()
                if member.code and job.first is None:
                    job.first, job.failing_since = member, time.monotonic()
            for member in sorted(told, key=lambda member: member.failed_at):
                self._print_error(job, member)
            self._look_for_life(job)
            if job.elsewhere is not None and not job.stopped:
                self._hear_elsewhere(job)
            self._enforce(job)
            if ended:
                self._tell(job)
                if not job.running and job.first is not None and job.first.name and not job.stopped:
                    print_line(f"error: {job.reason}", sys.stderr)

    def _has_ended(self, member: _Member) -> bool:
        code = member.popen.poll()
        if code is None:
            return False
        killed = member.killed
        member.kill()  # what is left in its process group: workers of a pool, say
        member.killed = killed
        member.code = 128 - code if code < 0 else code
        if code < 0:  # it told nothing; what others tell now follows from that
            member.failed_at = 0.0
        return True

    def _hear(self, job: Job, member: _Member) -> bool:
        """Read what a process has told since. Return whether there is an error among it."""
        with suppress(OSError):  # nothing more for now, or closed
            while piece := member.line.recv(1 << 16):
                member.unread += piece
            member.silent = True
        *whole, member.unread = member.unread.split(b"\n")
        failed = False
        for text in whole:
            try:
                news = json.loads(text)
            except ValueError:  # cut off by a full buffer
                continue
            self._hear_life(job, member)
            if "beat" in news:
                member.step = news["step"]
                continue
            member.since = member.heard
            for name in ("ready", "saves", "saving", "owns", "reason", "mend", "step"):
                setattr(member, name, news.get(name, getattr(member, name)))
            for rank, how in news.get("hung", {}).items():
                self._end_hung(job, f"rank {rank}", how)
            if "error" in news:
                member.error, member.failed_at = news["error"].strip(), min(member.failed_at, news["at"])
                member.reason = member.error.rpartition("\n")[2]
                failed = True
            self._tell(job)
        return failed

    def _hear_life(self, job: Job, member: _Member) -> None:
        now = time.monotonic()
        if member.named:
            member.named = False
            print_line(f"{member.name or job.title} is back after {now - member.heard:.0f} s", sys.stderr)
        member.heard = now

    def _look_for_life(self, job: Job) -> None:
        """Name those that have shown no sign of life for long; end those that the other ranks wait for in vain."""
        for member in job.running:
            silent = self._looked - member.heard
            if not member.heard or member.silent or silent < self._warn:
                continue
            pid, stopped = member.popen.pid, is_stopped(member.popen.pid)
            how = (f"it is stopped (SIGSTOP); `kill -CONT {pid}` lets it go on" if stopped else
                   "its machine is overloaded, or it hangs in the system")
            if not member.named:
                member.named = True
                then = f"; it is ended after {self._end:.0f} s" if len(job.members) > 1 else ""
                print_line(f"warning: {member.name or job.title} (process {pid}) has shown no sign of life for "
                           f"{silent:.0f} s: {how}{then}", sys.stderr)
            if silent > self._end and len(job.members) > 1:
                self._end_hung(job, member.name, f"no sign of life for {silent:.0f} s"
                               + (" (stopped by SIGSTOP)" if stopped else ""))

    def _end_hung(self, job: Job, name: str, how: str) -> None:
        for member in job.running:
            if member.name == name and not member.killed:
                member.reason, member.failed_at = how, 0.0
                member.kill()
                with suppress(subprocess.TimeoutExpired):
                    member.popen.wait(GRACE)  # so that it is the first that ends

    def _hear_elsewhere(self, job: Job) -> None:
        """Let a job fail here where it does on another machine, and the other way round."""
        if job.first is None and job.failed is None:
            job.failed = job.elsewhere.problem()
            if job.failed is not None:
                job.failing_since = time.monotonic()
                print_line(f"error: {job.failed[1]}", sys.stderr)
                job.elsewhere.stop(job.failed[1])
        elif job.first is not None and job.failed is None:
            job.elsewhere.stop(job.reason)
            if not job.running and (better := job.elsewhere.better_reason(job.reason)) != job.reason:
                job.failed = job.code, better, job.mend

    def _print_error(self, job: Job, member: _Member) -> None:
        """Print the error of a process: in full the first of a job, of others the last line, each once."""
        lines = member.error.splitlines() or [""]
        if job.printed or job.first not in (None, member):  # most likely what follows from the first one
            lines = lines[-1:]
        if lines[-1] not in job.printed and not (job.stopped and job.first not in (None, member)):
            print_line("\n".join([f"{member.name}: {lines[0]}" if member.name else lines[0], *lines[1:]]), sys.stderr)
        job.printed.add(lines[-1])

    def _tell(self, job: Job) -> None:
        """Hand on to the owner of this process what the processes of a job do."""
        if job.step >= 0:
            at_step(job.step)
        tell_owner(saves=any(each.saves for each in job.running),
                   saving=next((each.saving for each in job.running if each.saving), ""))

    def _enforce(self, job: Job) -> None:
        """End what must end: of a job that fails or was asked to stop."""
        now, running = time.monotonic(), job.running
        failing = job.first is not None or job.failed is not None
        if not (running and (failing or job.stopped)):
            return
        if self._hasten:
            for member in running:
                if not member.hastened:
                    member.since = now
                if now - member.hastened > 2 * BOUNCE:  # repeated, as one may have come too soon after the first
                    member.hastened = now
                    member.signal(signal.SIGINT)
                if not member.owns or now - member.since > GRACE:  # an owner kills its own processes first
                    member.kill()
            return
        for member in running:
            if failing and not member.owns:
                self._ask(member, signal.SIGTERM)
            since = max(member.since, job.failing_since, job.stopped_at)
            # Asked to stop, a run saves; one of whose ranks some have ended does not get to it, but may be at it.
            saves = member.saving or (member.saves and not failing) or member.owns
            if now - since > (PATIENCE if saves else GRACE):
                member.kill()
        if now - job.reminded_at > REMIND and job.stopped and _line is None:
            job.reminded_at = now
            what = next((f" to save {member.saving}" for member in running if member.saving), "")
            print_line(f"waiting for {job.title}{what} ({now - job.stopped_at:.0f} s). Ctrl-C again ends it without a "
                       "save.", sys.stderr)
