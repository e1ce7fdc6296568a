"""Watch the ranks of a run: name the one that is stopped or hangs, and end the job where it stays so.

    watch = Watch(rank, world_size, range(0), store, collectives, told, give_up, cpu=True)
    watch.start()                                   # threads; nanochat.distributed.init_ranks does it
    with busy("timing kernels"):                    # others may wait for this rank as long as that takes
        ...

Ranks wait for one another in collectives, so that one that hangs makes all hang. A thread of each writes a sign of life
to the store that the ranks share, every BEAT seconds: how many meetings (collectives, and barriers through the store)
its main thread has come to, and for how long neither this number nor the place in the code that the main thread is at
has changed. Every rank reads those of all. Told from the rest are:

- a rank without signs of life: stopped (SIGSTOP), or its machine is dead or cut off;
- a rank that is behind the others in meetings and stands still in the code: it hangs. One that moves in the code, or
  says that it is `busy`, is slow, and nobody names it. One that may compile has COMPILING seconds;
- a store that does not answer: the process that holds it is stopped, or cannot be reached;
- ranks that have all come to the same meeting and do not get on: the network between them is gone, or a GPU hangs.

They are named after NANOCHAT_HANG_WARN seconds. After NANOCHAT_HANG_END seconds the others end with exit code HUNG. An
owner (nanochat/launcher.py) ends the one that hangs and gives it as the reason. It also looks for the signs of life of
the ranks of its machine, which come through their line: these are not named here.
"""

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nanochat.errors import UserError
from nanochat.logs import print_line

BEAT = 5.0           # seconds from one sign of life to the next, at most
STEADY = 2           # steps of this process after which everything is compiled
COMPILING = 1200.0   # seconds that the steps before may take, without a word
HUNG = 124           # exit code of a rank that gives up waiting for another
COMPILERS = ("_dynamo/convert_frame.py", "_inductor/compile_fx.py", "triton/compiler/compiler.py")
ROOT = str(Path(__file__).resolve().parent.parent)

_busy: list[str] = []
_meetings = [0]         # barriers through the store


@contextmanager
def busy(what: str) -> Iterator[None]:
    """Within the block, other ranks may wait for this one without naming it. what: it does, in words."""
    _busy.append(what)
    try:
        yield
    finally:
        _busy.pop()


def hang_seconds() -> tuple[float, float]:
    """Return after how many seconds a rank that hangs is named, and after how many the job is ended; inf for never.

    Raises UserError where NANOCHAT_HANG_WARN or NANOCHAT_HANG_END is no number.
    """
    limits = []
    for name, default in (("WARN", "120"), ("END", "600")):
        text = os.environ.get(f"NANOCHAT_HANG_{name}") or default
        try:
            seconds = float(text)
        except ValueError:
            seconds = -1.0
        if not 0 <= seconds < float("inf"):
            raise UserError(f"NANOCHAT_HANG_{name} is {text!r}: it must be a number of seconds, or 0 for never.")
        limits.append(seconds or float("inf"))
    return limits[0], limits[1]


def is_stopped(pid: int) -> bool:
    """Return whether a process is stopped by a signal. False where the system does not tell."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            return file.read().rpartition(")")[2].split()[0] in ("T", "t")
    except (OSError, IndexError):
        return False


def count_meeting() -> int:
    """Return the number of this meeting through the store; all ranks come to the same ones in the same order."""
    _meetings[0] += 1
    return _meetings[0]


@dataclass
class Beat:
    """A sign of life.

    number: of this sign. meetings: that the main thread has come to. still: seconds for which it has stood still. busy:
    with what, "" for nothing. where: the main thread is, in the code. compiles: whether it may still compile. step: it
    is at, −1 for none.
    """

    number: int
    meetings: int
    still: float
    busy: str = ""
    where: str = ""
    compiles: bool = False
    step: int = -1


@dataclass
class Seen:
    """What a rank has seen of another: its last sign of life, and when that changed."""

    beat: Beat | None = None
    at: float = field(default_factory=time.monotonic)


def judge(seen: dict[int, Seen], now: float, limit: float, here: range = range(0)) -> dict[int, str]:
    """Return the ranks that the others have waited for in vain for `limit` seconds, and how each hangs, in words.

    Args:
        seen: of every rank.
        now: the time, by the clock of Seen.at.
        limit: seconds.
        here: ranks whose signs of life another process looks for.
    """
    top = max((each.beat.meetings for each in seen.values() if each.beat is not None), default=0)
    found = {}
    for rank, each in seen.items():
        beat, silent = each.beat, now - each.at
        if silent > limit and rank not in here:
            found[rank] = (f"no sign of life for {silent:.0f} s: it is stopped, or its machine is dead or cut off")
        elif beat is not None and beat.meetings < top and not beat.busy and not (rank in here and silent > limit / 2):
            if beat.still + silent > (max(limit, COMPILING) if beat.compiles else limit):
                at = f" of step {beat.step}" if beat.step >= 0 else ""
                found[rank] = (f"the others wait for it at meeting {top}{at}, it has come to {beat.meetings} and has "
                               f"stood still for {beat.still + silent:.0f} s at {beat.where}")
    return found


def all_wait(seen: dict[int, Seen], now: float, limit: float) -> float:
    """Return for how many seconds all ranks have been at one meeting, if longer than `limit` and none is busy, else
    0."""
    beats = [each.beat for each in seen.values() if each.beat is not None]
    if len(beats) < len(seen) or any(beat.busy or beat.compiles for beat in beats):
        return 0.0
    still = min(each.beat.still for each in seen.values())
    return still if len({beat.meetings for beat in beats}) == 1 and still > limit else 0.0


class Watch:
    """The thread of one rank that shows its signs of life and looks at those of the others.

    Args:
        rank, world_size: of this process.
        here: the ranks of this machine, where an owner looks for their signs of life; else empty.
        store: that all ranks share; a connection of its own.
        collectives: returns how many collectives this process has begun.
        news: what this process told last (nanochat.launcher.told): first_step, step, saving.
        give_up: called with the ranks to name when the job is to end; it ends this process.
        cpu: whether the ranks compute on the CPU: a main thread that uses it does not stand still. One that waits for a
            GPU may use the CPU, too.
    """

    def __init__(self, rank: int, world_size: int, here: range, store: Any, collectives: Callable[[], int],
                 news: dict[str, Any],
                 give_up: Callable[[dict[int, str]], None], cpu: bool):
        self.cpu, self.news = cpu, news
        self.rank, self.world_size, self.here, self.store = rank, world_size, here, store
        self.collectives, self.give_up = collectives, give_up
        self.warn, self.end = hang_seconds()
        self.ended = threading.Event()
        self._main = threading.main_thread().ident
        self._seen = {other: Seen() for other in range(world_size)}
        self._named: dict[int, str] = {}
        self._said_all = False
        self._answered = time.monotonic()  # when the store last did
        self._store_named = False
        self._place: Any = None
        self._since = time.monotonic()
        self._threads: list[threading.Thread] = []
        self._number, self._cpu = 0, (0, 0.0)
        self._pause = min(BEAT, self.warn / 4, self.end / 4)

    def start(self) -> None:
        """Start the threads."""
        if self.warn < float("inf") or self.end < float("inf"):
            self._threads = [threading.Thread(target=work, name="watch", daemon=True)
                             for work in (self._exchange, self._look)]
            for thread in self._threads:
                thread.start()

    def stop(self) -> None:
        """End the threads: this rank leaves. A thread that is in the store's C++ when Python ends would abort it."""
        self.ended.set()
        for thread in self._threads:
            thread.join(10)

    def _own_beat(self) -> Beat:
        frame = sys._current_frames().get(self._main)
        where, innermost, compiles = "", "", False
        place = [_meetings[0] + self.collectives(), self._computed()]
        while frame is not None:
            place.append((id(frame.f_code), frame.f_lasti))
            name = frame.f_code.co_filename
            compiles = compiles or name.endswith(COMPILERS)
            at = f"{os.path.relpath(name, ROOT)}:{frame.f_lineno} in {frame.f_code.co_name}"
            innermost = innermost or at
            if not where and name.startswith(ROOT) and "site-packages" not in name:
                where = at
            frame = frame.f_back
        now = time.monotonic()
        if place != self._place:
            self._place, self._since = place, now
        self._number += 1
        step, saving = self.news.get("step", -1), self.news.get("saving")
        compiles = compiles or step >= 0 and step < self.news.get("first_step", 0) + STEADY
        what = _busy[-1] if _busy else f"saving {saving}" if saving else ""
        return Beat(self._number, place[0], now - self._since, what, where or innermost, compiles, step)

    def _computed(self) -> int:
        """Return a number that changes where the main thread has computed for more than a moment."""
        try:
            cpu = time.clock_gettime(time.pthread_getcpuclockid(self._main)) if self.cpu else 0.0
        except (AttributeError, OSError):  # not Linux
            return 0
        if cpu - self._cpu[1] > 0.1 * self._pause:
            self._cpu = self._cpu[0] + 1, cpu
        return self._cpu[0]

    def _exchange(self) -> None:
        """Write this rank's sign of life and read the others'. A call may wait for ever where the store hangs."""
        keys = [f"nanochat/life/{rank}" for rank in range(self.world_size)]
        for _ in range(2):  # a connection may break alone; where the store has gone, _look names it
            with suppress(Exception):
                everyone = False  # whether all have shown themselves
                while not self.ended.is_set():
                    self.store.set(keys[self.rank], json.dumps(vars(self._own_beat())))
                    everyone = everyone or self.store.check(keys)
                    for rank, text in enumerate(self.store.multi_get(keys) if everyone else ()):
                        beat, before = Beat(**json.loads(text)), self._seen[rank].beat
                        if before is None or before.number != beat.number:
                            self._seen[rank] = Seen(beat)
                    self._answered = time.monotonic()
                    self.ended.wait(self._pause)
            if self.ended.wait(self._pause):
                return
            with suppress(Exception):
                self.store = self.store.clone()

    def _look(self) -> None:
        last = time.monotonic()
        while not self.ended.wait(self._pause):
            now = time.monotonic()
            if now - last > 3 * self._pause + 1:  # this process was stopped itself, or its machine slept
                for each in self._seen.values():
                    each.at += now - last
                self._answered += now - last
            last = now
            self._look_once(now)

    def _look_once(self, now: float) -> None:
        unanswered = now - self._answered
        if unanswered > min(self.warn, self.end):
            self._store_is_silent(unanswered)
            return
        if self._store_named:
            self._store_named = False
            print_line(f"rank {self.rank}: the ranks' store answers again", sys.stderr)
        seen = dict(self._seen)
        named = judge(seen, now, self.warn, self.here)
        if self.rank == min(set(range(self.world_size)) - set(named), default=-1):
            for rank in named.keys() - self._named.keys():
                then = f" The job ends after {self.end:.0f} s." if self.end < float("inf") else ""
                print_line(f"warning: rank {rank} of {self.world_size} hangs: {named[rank]}.{then}", sys.stderr)
            for rank in self._named.keys() - named.keys():
                print_line(f"rank {rank} of {self.world_size} goes on", sys.stderr)
            if (seconds := all_wait(seen, now, self.warn)) and not self._said_all:
                print_line(f"warning: all {self.world_size} ranks have waited in one collective for {seconds:.0f} s: "
                           "the network between them is gone, or a GPU hangs.", sys.stderr)
            self._said_all = bool(seconds)
        self._named = named
        found = judge(seen, now, self.end, self.here)
        if found and self.rank not in found and not self.news.get("saving"):  # a checkpoint is not broken off
            self.give_up(found)
        if all_wait(seen, now, self.end) and not self.news.get("saving"):
            self.give_up({})

    def _store_is_silent(self, seconds: float) -> None:
        if 0 in self.here:  # its owner names rank 0, which holds the store, and ends it
            return
        if not self._store_named and seconds > self.warn:
            self._store_named = True
            then = f" The job ends after {self.end:.0f} s." if self.end < float("inf") else ""
            print_line(f"warning: rank {self.rank} of {self.world_size} has had no answer from the ranks' store for "
                       f"{seconds:.0f} s: the process that holds it (rank 0, or torchrun) is stopped, or its machine "
                       f"is dead or cut off.{then}", sys.stderr)
        if seconds > self.end:
            self.give_up({0: f"the ranks' store, which it holds, has not answered for {seconds:.0f} s"})
