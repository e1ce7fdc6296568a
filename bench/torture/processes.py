"""Real commands as processes that can be killed at any moment, and of which none is left at the end.

A command starts in one of two ways. Fresh: as a new Python, which takes seconds to import PyTorch. Forked: as a copy of
this process, which has imported it already; the command itself runs the same from its first line on. Forked commands
make ten times as many cases possible; fresh ones are what a kill during the start needs. Unix only.
"""

import ctypes
import os
import runpy
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import NoReturn

from nanochat import launcher

MARK = "NANOCHAT_TORTURE"  # environment: names the run of this program that a process belongs to
POLL = 0.002               # seconds between two looks at a process whose moment is awaited
PR_SET_PDEATHSIG, PR_SET_NAME = 1, 15  # Linux: signal that a process gets when its parent ends; name of a process


class OutOfTime(Exception):
    """The time of the whole program is over; the case at hand does not count."""


class Hung(Exception):
    """A command did not end within many times what it usually takes."""


class Life:
    """One start of a command, to its end.

    Args:
        argv: as after `python`, such as ["-m", "scripts.base_train", "--depth=2"].
        env: environment that is added to this process's.
        output: file that standard output and errors are appended to.
        fresh: a new Python; else a copy of this process.
        prepare: called in the new process first, for resource limits, say.
        deadline: of the whole program, by time.monotonic.
    """

    def __init__(self, argv: Sequence[str], env: dict[str, str], output: Path, *, fresh: bool,
                 deadline: float, prepare: Callable[[], None] | None = None):
        self.output, self.deadline, self.code = output, deadline, None
        self.began, self.seconds = time.monotonic(), 0.0
        self.offset = output.stat().st_size if output.exists() else 0
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if not self.pid:
            _as_child(lambda: _become(list(argv), env, output, fresh, prepare))

    def poll(self) -> int | None:
        """Return the exit code as a shell has it, None while the process runs."""
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                code = os.waitstatus_to_exitcode(status)
                self.code, self.seconds = 128 - code if code < 0 else code, time.monotonic() - self.began
        return self.code

    def until(self, happened: Callable[[], bool], seconds: float) -> bool:
        """Wait until something happened. Return False where the process ended or the seconds passed before.

        Raises:
            OutOfTime: the program's time is over.
        """
        end = time.monotonic() + seconds
        while self.poll() is None:
            if happened():
                return True
            now = time.monotonic()
            if now > self.deadline:
                raise OutOfTime
            if now > end:
                return False
            time.sleep(POLL)
        return False

    def last(self, seconds: float) -> bool:
        """Wait this long. Return False where the process ended before."""
        end = time.monotonic() + seconds
        return self.until(lambda: time.monotonic() >= end, seconds + 1)

    def wait(self, seconds: float) -> int:
        """Wait for the end; return the exit code. Raises Hung after these seconds."""
        self.until(lambda: False, seconds)
        if self.code is None:
            self.kill()
            raise Hung(f"still running after {seconds:.0f} s")
        return self.code

    def signal(self, number: int, group: bool = False) -> None:
        """Send a signal to the process, or to all of its process group."""
        with suppress(ProcessLookupError):
            if self.poll() is None:
                (os.killpg if group else os.kill)(self.pid, number)

    def kill(self) -> None:
        """Kill the process and its group, and wait for its end."""
        if self.poll() is None:
            self.signal(signal.SIGKILL, group=True)
            while self.poll() is None:
                time.sleep(POLL)

    def text(self) -> str:
        """Return what this start has printed so far."""
        with suppress(FileNotFoundError), open(self.output, "rb") as file:
            file.seek(self.offset)
            return file.read().decode(errors="replace")
        return ""


def _as_child(work: Callable[[], int]) -> NoReturn:
    """Make this copy of the process a child with a session and signals of its own, do the work and end with its code.
    Never returns."""
    code = 70
    try:
        os.setsid()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        code = work()
    except BaseException:
        traceback.print_exc()
    finally:
        with suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _become(argv: list[str], env: dict[str, str], output: Path, fresh: bool, prepare: Callable[[], None] | None) -> int:
    """Turn this copy of the process into the command. Return its exit code, unless a new Python takes its place."""
    with suppress(AttributeError, OSError):  # elsewhere than on Linux, `stragglers` finds nothing either
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    os.environ.update(env)
    out = os.open(output, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for target, source in ((0, nothing), (1, out), (2, out)):
        os.dup2(source, target)
    os.closerange(3, 256)
    if prepare is not None:
        prepare()
    if fresh:
        os.execve(sys.executable, [sys.executable, *argv], os.environ)
    return _run(argv)


def _run(argv: list[str]) -> int:
    """Run `-m module flags` in this process as a new Python would. Return its exit code."""
    module, *flags = argv[1:]
    sys.argv, sys.orig_argv = [module, *flags], [sys.executable, *argv]
    code = 0
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 0 if ended.code is None else 1
        if isinstance(ended.code, str):
            print(ended.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()  # waits for threads as Python does at its end: a checkpoint may be being written
    return code


class ForkedRank:
    """What `nanochat.launcher.Owner` needs of subprocess.Popen, with a copy of this process in place of a new Python.

    Its command name in /proc tells `stragglers` and `ranks_of` what it is: its environment there is its ancestor's.
    """

    def __init__(self, argv: Sequence[str], *, env: dict[str, str], pass_fds: Sequence[int] = (), **_: object):
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid:
            return
        _as_child(lambda: self._become(list(argv[1:]), env, pass_fds))

    @staticmethod
    def _become(argv: list[str], env: dict[str, str], pass_fds: Sequence[int]) -> int:
        for number in set(range(3, 256)) - set(pass_fds):
            with suppress(OSError):
                os.close(number)
        launcher.told.clear()  # what the owner told is not this process's
        name_process(f"{env.get(MARK, '')[-6:]}-r{env.get('RANK', '0')}")
        os.environ.clear()
        os.environ.update(env)
        return _run(argv)

    def poll(self) -> int | None:
        """Return the exit code, negative after a signal; None while the process runs."""
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send a signal while the process runs."""
        if self.poll() is None:
            os.kill(self.pid, number)


def fork_ranks() -> None:
    """Let the launcher in this process copy it for each rank. Call it in the process that will be the launcher."""
    launcher.subprocess = SimpleNamespace(**{**vars(subprocess), "Popen": ForkedRank})


def name_process(name: str) -> None:
    """Set the name of this process in /proc, 15 bytes."""
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(PR_SET_NAME, name.encode()[:15], 0, 0, 0)


def _marked(mark: str) -> dict[int, str]:
    """Return the processes of a mark, with their ranks; "" for one that is none."""
    found, wanted = {}, f"{MARK}={mark}".encode()
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError, ValueError):
            pid, name = int(folder.name), (folder / "comm").read_text().strip()
            if name.startswith(f"{mark[-6:]}-r"):
                found[pid] = name[8:]
            elif wanted in (parts := (folder / "environ").read_bytes().split(b"\0")) and pid != os.getpid():
                found[pid] = next((part[5:].decode() for part in parts if part.startswith(b"RANK=")), "")
    return found


def stragglers(mark: str) -> list[int]:
    """Return the processes with this mark, in their environment or name; [] where there is no /proc."""
    return list(_marked(mark))


def ranks_of(mark: str) -> dict[int, int]:
    """Return the process of each rank of a job that is running with this mark: rank → pid."""
    return {int(rank): pid for pid, rank in _marked(mark).items() if rank.isdigit() and _runs(pid)}


def _runs(pid: int) -> bool:
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False
