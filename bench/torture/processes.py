"""Real commands as processes that can be killed at any moment, and of which none is left at the end.

A command starts in one of two ways. Fresh: as a new Python, which takes seconds to import PyTorch. Forked: as a copy of
this process, which has imported it already; the command itself runs the same from its first line on. Forked commands
make ten times as many cases possible; fresh ones are what a kill during the start needs. Unix only.
"""

import ctypes
import os
import runpy
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

MARK = "NANOCHAT_TORTURE"  # environment: names the run of this program that a process belongs to
POLL = 0.002               # seconds between two looks at a process whose moment is awaited
PR_SET_PDEATHSIG = 1       # Linux: the signal that a process gets when its parent ends


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
        self.began = time.monotonic()
        self.offset = output.stat().st_size if output.exists() else 0
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if not self.pid:
            _become(list(argv), env, output, fresh, prepare)

    def poll(self) -> int | None:
        """Return the exit code as a shell has it, None while the process runs."""
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                code = os.waitstatus_to_exitcode(status)
                self.code = 128 - code if code < 0 else code
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


def _become(argv: list[str], env: dict[str, str], output: Path, fresh: bool,
            prepare: Callable[[], None] | None) -> NoReturn:
    """Turn this copy of the process into the command. Never returns."""
    code = 70
    try:
        os.setsid()
        with suppress(AttributeError, OSError):  # elsewhere than on Linux, `stragglers` finds nothing either
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
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
        code = _run(argv)
    except BaseException:
        traceback.print_exc()
    finally:
        with suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


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


def stragglers(mark: str) -> list[int]:
    """Return the processes that carry this mark in their environment; [] where there is no /proc."""
    found, wanted = [], f"{MARK}={mark}".encode()
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError, ValueError):
            if wanted in (folder / "environ").read_bytes().split(b"\0") and int(folder.name) != os.getpid():
                found.append(int(folder.name))
    return found


def ranks_of(mark: str) -> dict[int, int]:
    """Return the process of each rank of a job that is running with this mark: rank → pid."""
    found = {}
    for pid in stragglers(mark):
        with suppress(OSError):
            env = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            rank = next((part[5:] for part in env if part.startswith(b"RANK=")), b"")
            if rank.isdigit():
                found[int(rank)] = pid
    return found
