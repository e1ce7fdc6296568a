"""Run Python that a model wrote: bounded, cut off from what is outside as far as the machine allows, and with nothing left behind.

    result = run_python("print(1 + 1)")                      # result.ok, .stdout, .reason, .level
    result = passes("def add(a, b):\\n    return a + b", "assert add(1, 2) == 3")

Two levels; a run takes the best that the machine reaches (tried once, by running a small program), and its result names it.

- Level.LIMITS, any Linux or macOS: a process in a folder of its own that is removed afterwards, isolated Python, next to no environment,
  limits on wall-clock time, CPU time, memory, processes, size of files, open files and output. At the end every process it started is
  killed. Under root it runs as a user id that nobody has. On Linux (x86-64, ARM64) it can neither signal other processes nor open
  sockets. It CAN read what that user can read, and write where that user can write; on macOS it can also use the network and signal
  processes of the user, may start no process, and its memory is hardly bounded.
- Level.ISOLATED, Linux with user namespaces or bubblewrap: besides, it sees only system folders and Python's own, read-only; its
  working folder is in memory, and bounded; no network but its own; it sees no process but its own.

    NANOCHAT_SANDBOX=isolated   refuse to run below that level (limits, the default, refuses nothing)

A kernel is shared with the program: this is no virtual machine. Memory is bounded for each process, so a program can take at most
`memory` times `processes`.
"""

import enum
import functools
import json
import os
import secrets
import selectors
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from nanochat.errors import UserError

OUTPUT = 256 * 1024  # bytes of each of stdout and stderr; a program that writes more is killed
FILE = 16 << 20      # bytes of a file; all files together four times that where they are in memory
BOX = "nanochat-sandbox-"
GRACE = 5.0          # seconds for the start and the end of a sandbox, beyond the time of the program


class Level(enum.IntEnum):
    """What a sandbox guarantees; see above. Higher is safer."""

    LIMITS = 1
    ISOLATED = 2


@dataclass(frozen=True)
class Result:
    """What came of a run. ok: it ended by itself with exit code 0, or, of `passes`, it passed. reason: why not, in one line; else "". """

    ok: bool
    stdout: str
    stderr: str
    timed_out: bool
    level: Level
    reason: str


def run_python(code: str, *, timeout: float = 5.0, memory: int = 512 << 20, processes: int = 8,
               level_needed: Level = Level.LIMITS) -> Result:
    """Run a program. timeout in seconds, memory in bytes for each process, processes: how many more it may start, threads counted.

    Raises UserError where this machine reaches neither `level_needed` nor what NANOCHAT_SANDBOX asks for, and on Windows.
    """
    return _Run(_way(level_needed), code, None, timeout, memory, processes).result()


def passes(program: str, checks: str, *, timeout: float = 5.0, memory: int = 512 << 20, level_needed: Level = Level.LIMITS) -> Result:
    """Run `program`, then `checks` with its names; ok where both ran to their end. Raises like run_python.

    The proof is a secret that exists only here until the checks are done: then it is sent in, and must come back. Ending early in
    whatever way, printing, or hooks for later prove nothing. The program may start no thread and no process; traces, timers
    and signal handlers that it set are taken off before the checks and after. The checks see Python's own functions as they were; a
    name of theirs that the program defined is not seen by the checks.
    The limit: program and checks share an interpreter, as the checks call the program's functions. Code written for this very
    harness, that finds its frames and speaks its protocol, or that returns objects equal to everything, or replaces functions of modules
    that the checks use, can still fool it. It gains a wrong grade, no more: what the level guarantees holds.
    """
    return _Run(_way(level_needed), program, checks, timeout, memory, 0).result()


def best_level() -> Level:
    """The level that runs reach on this machine. Raises UserError where none works."""
    return _best()[0]


def _way(needed: Level) -> str:
    names = {level.name.lower(): level for level in Level}
    wanted = os.environ.get("NANOCHAT_SANDBOX") or "limits"
    if wanted not in names:
        raise UserError(f"NANOCHAT_SANDBOX is {' or '.join(names)}, not {wanted!r}")
    if os.name != "posix":
        raise UserError("programs that a model wrote run only on Linux and macOS, where they can be confined. On Windows, use WSL.")
    level, way, why = _best()
    needed = max(names[wanted], needed)
    if level < needed:
        raise UserError(f"this machine confines programs only at the level {level.name.lower()}, and {needed.name.lower()} is asked for "
                        f"({'; '.join(why)}). Install bubblewrap or allow user namespaces; or, where this user can reach nothing that may "
                        "not be lost, set NANOCHAT_SANDBOX=limits.")
    return way


# What must work, and one limit that some systems do not hold: root in some containers, and emulated kernels
PROBE = """
import collections, json, math, os
try:
    if os.fork() == 0:
        os._exit(0)
    refused = False
except OSError:
    refused = True
print(6 * 7)
"""
LEVELS = {"namespaces": Level.ISOLATED, "bubblewrap": Level.ISOLATED, "limits": Level.LIMITS}


@functools.cache
def _best() -> tuple[Level, str, list[str]]:
    """The best level that works, the way to it, and why better ones do not."""
    _sweep(Path(tempfile.gettempdir()))
    why = []
    for way, level in LEVELS.items():
        if problem := _problem(way):
            why.append(f"{way}: {problem}")
        else:
            return level, way, why
    raise UserError(f"programs that a model wrote cannot be confined on this machine, so they do not run ({'; '.join(why)}). As root, try "
                    "an ordinary user instead, or let the container's root change its user id (capability SETUID).")


def _problem(way: str) -> str:
    """Why `way` does not work here; "" if it does. Tried by running a program."""
    if way != "limits" and sys.platform != "linux":
        return "Linux only"
    if way == "bubblewrap" and shutil.which("bwrap") is None:
        return "bwrap is not installed"
    try:
        result = _Run(way, PROBE, "assert refused, 'the number of processes is not bounded'", 10.0, 512 << 20, 0).result()
    except _NoStart as error:
        return " ".join(str(error).split())[:200]
    return "" if result.ok and result.stdout == "42\n" else f"a test program did not do well ({result.reason or 'no output'})"


class _NoStart(UserError):
    """The sandbox itself could not be set up."""


@functools.cache
def _interpreter(way: str) -> str:
    """The Python that programs run with: that of this process, outside any virtual environment.

    Root's may lie in a folder closed to others, as which the program runs: where no namespace shows it to them, the system's then.
    """
    own = os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)
    if way == "namespaces" or os.getuid() != 0:
        return own
    others = (shutil.which(name, path="/usr/local/bin:/usr/bin:/bin") for name in ("python3", "python"))
    for path in (own, *(os.path.realpath(path) for path in others if path)):
        if all(folder.stat().st_mode & stat.S_IXOTH for folder in Path(path).parents):
            return path
    return own


def _binds(python: str) -> list[str]:
    """What a program may see of the file system, besides its working folder: the system's programs and libraries, and its Python."""
    paths = ["/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/etc/ld.so.cache", "/etc/localtime", "/nix/store",
             "/dev/null", "/dev/zero", "/dev/random", "/dev/urandom"]
    for path in (str(Path(python).parent.parent),) if Path(python).parent.name == "bin" else (str(Path(python).parent),):
        if path != "/" and not any(Path(path).is_relative_to(seen) for seen in paths):
            paths.append(path)
    return [path for path in paths if os.path.lexists(path)]


def bwrap_arguments(program: str, binds: list[str]) -> list[str]:
    """The command that runs what stands behind it in bubblewrap `program`, seeing `binds`, read-only, and an empty /tmp."""
    arguments = [program, "--unshare-all", "--unshare-user", "--disable-userns", "--die-with-parent", "--new-session", "--cap-drop", "ALL",
                 "--dev", "/dev", "--remount-ro", "/dev", "--size", str(4 * FILE), "--tmpfs", "/tmp", "--chdir", "/tmp"]
    for path in binds:
        if path.startswith("/dev/"):
            continue
        arguments += ["--symlink", os.readlink(path), path] if os.path.islink(path) else ["--ro-bind", path, path]
    return [*arguments, "--remount-ro", "/", "--"]


class _Run:
    """One program in one sandbox."""

    def __init__(self, way: str, code: str, checks: str | None, timeout: float, memory: int, processes: int):
        self.way, self.level, self.timeout, self.checked = way, LEVELS[way], timeout, checks is not None
        self.secret = secrets.token_hex(16).encode()
        # what is sent in: the program, and after each byte that comes back from where it should, the checks and the secret
        self.messages = [_framed(code)]
        self.expected = b""
        if checks is not None:
            self.messages += [_framed(checks), _framed(self.secret.decode())]
            self.expected = b"12" + self.secret
        self.limits = {"RLIMIT_CPU": int(timeout) + 1, "RLIMIT_AS": memory, "RLIMIT_FSIZE": FILE, "RLIMIT_NOFILE": 64, "RLIMIT_CORE": 0,
                       "processes": processes}
        self.caught = {"stdout": b"", "stderr": b"", "report": b"", "reply": b""}
        self.excess = False

    def result(self) -> Result:
        """Run, and say what came of it. Raises _NoStart if the sandbox cannot be set up."""
        box = tempfile.mkdtemp(prefix=f"{BOX}{os.getpid()}-")
        try:
            self.run(box)
        finally:
            _remove(box)
        records = [json.loads(line) for line in self.caught["report"].splitlines()]
        failed = next((record["failed"] for record in records if "failed" in record), None)
        if failed is not None:
            raise _NoStart(f"the sandbox ({self.way}) failed: {failed}")
        end = records[-1] if records else {"exit": None, "timed_out": False}
        text = {name: self.caught[name][:OUTPUT].decode("utf-8", "replace") for name in ("stdout", "stderr")}
        reason = self.reason(end["exit"], end["timed_out"], text["stderr"])
        if not records and reason:  # killed itself, for instance where the machine ran out of memory
            reason = "the sandbox was ended from outside"
        return Result(not reason, text["stdout"], text["stderr"], end["timed_out"] and bool(reason), self.level, reason)

    def reason(self, code: int | None, timed_out: bool, stderr: str) -> str:
        """Why the run is not ok, in one line; "" if it is."""
        replies = self.caught["reply"]
        if self.checked and replies == self.expected:
            return ""
        if self.excess:
            return f"wrote more than {OUTPUT:,} bytes of output"
        if timed_out:
            return f"timed out after {self.timeout:g} s"
        if not self.expected.startswith(replies):
            return "wrote into the pipe of the harness"
        if code == 0:
            return f"the program ended {'during' if replies else 'before'} its checks" if self.checked else ""
        last = next((line.strip() for line in reversed(stderr.splitlines()) if line.strip()), "")[:200]
        number = -code if code is not None and code < 0 else (code or 0) - 128
        killed = f"killed by {signal.Signals(number).name}" if number in set(signal.Signals) else f"exit code {code}"
        where = "" if not self.checked else "in the program: " if not replies else "in the checks: "
        return where + (f"{last} ({killed})" if last and code != 1 else last or killed)

    def run(self, box: str) -> None:
        python = _interpreter(self.way)
        pipes = {"report": os.pipe(), "reply": os.pipe(), "channel": os.pipe()}
        mine = {"report": pipes["report"][0], "reply": pipes["reply"][0], "channel": pipes["channel"][1]}
        theirs = {"report": pipes["report"][1], "reply": pipes["reply"][1], "channel": pipes["channel"][0]}
        binds = _binds(python)
        wrapper = bwrap_arguments(shutil.which("bwrap") or "bwrap", binds) if self.way == "bubblewrap" else []
        spec = {"way": self.way, "box": box, "python": [python, "-I", "-S", "-B", "-X", "utf8"], "binds": binds, "wrapper": wrapper,
                "limits": self.limits, "timeout": self.timeout, "report": theirs["report"], "checked": self.checked,
                "channel": [theirs["channel"], theirs["reply"]]}
        launcher = str(Path(__file__).with_name("sandbox_launcher.py"))
        try:
            process = subprocess.Popen([python, "-I", "-S", launcher, json.dumps(spec)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                       stderr=subprocess.PIPE, pass_fds=tuple(theirs.values()), start_new_session=True, cwd="/", env={})
        except OSError as error:
            for end in mine.values():
                os.close(end)
            raise _NoStart(f"cannot start {python}: {error.strerror}") from error
        finally:
            for end in theirs.values():
                os.close(end)
        try:
            self.talk(process, mine)
        finally:
            for end in mine.values():
                with suppress(OSError):
                    os.close(end)
            with suppress(OSError):
                process.stdin.close()  # the leash
            try:
                process.wait(GRACE + 5)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            process.stdout.close()
            process.stderr.close()

    def talk(self, process: subprocess.Popen, mine: dict[str, int]) -> None:
        """Hand the messages in and take all that comes out, until every process in there has ended."""
        read = {process.stdout.fileno(): "stdout", process.stderr.fileno(): "stderr", mine["report"]: "report", mine["reply"]: "reply"}
        channel, waiting, sent = mine["channel"], b"", 0
        end = time.monotonic() + self.timeout + GRACE
        with selectors.DefaultSelector() as selector:
            for handle in (*read, channel):
                os.set_blocking(handle, False)
            for handle in read:
                selector.register(handle, selectors.EVENT_READ)
            while set(read) & set(selector.get_map()) and (left := end - time.monotonic()) > 0:
                while sent < min(len(self.messages), 1 + len(self.caught["reply"])) and not process.stdin.closed:
                    waiting, sent = waiting + self.messages[sent], sent + 1
                if waiting and channel not in selector.get_map():
                    selector.register(channel, selectors.EVENT_WRITE)
                for key, _ in selector.select(left):
                    if key.fd != channel:
                        data = os.read(key.fd, 65536)
                        if not data:
                            selector.unregister(key.fd)
                        elif self.take(read[key.fd], data):
                            process.stdin.close()  # the leash: all is killed, then the report comes
                        continue
                    try:
                        waiting = waiting[os.write(channel, waiting):]
                    except BlockingIOError:
                        pass
                    except BrokenPipeError:  # it ended
                        waiting = b""
                    if not waiting:
                        selector.unregister(channel)

    def take(self, name: str, data: bytes) -> bool:
        """Keep what came out. True where that is the end: the secret is back, or more came than may."""
        if name in ("stdout", "stderr"):
            self.excess = self.excess or len(self.caught[name]) + len(data) > OUTPUT
            data = data[:OUTPUT - len(self.caught[name])]
        elif name == "reply":
            data = data[:1 + len(self.expected) - len(self.caught[name])]  # one more byte than right shows that it is wrong
        self.caught[name] += data
        return self.excess or name == "reply" and (self.caught[name] == self.expected or not self.expected.startswith(self.caught[name]))


def _framed(text: str) -> bytes:
    data = text.encode("utf-8", "replace")
    return b"%08x" % len(data) + data


def _sweep(folder: Path) -> None:
    """Remove the folders of runs whose caller was killed: older than an hour, and no process has the id in their name."""
    for box in folder.glob(f"{BOX}*-*"):
        number = box.name.removeprefix(BOX).partition("-")[0]
        with suppress(OSError):
            if number.isdecimal() and not box.is_symlink() and time.time() - box.stat().st_mtime > 3600:
                try:
                    os.kill(int(number), 0)
                except ProcessLookupError:
                    _remove(str(box))


def _remove(folder: str) -> None:
    """Remove a folder in which somebody may have closed folders even to themselves. Nothing runs in it any more."""
    for place, folders, _ in os.walk(folder):
        for path in (os.path.join(place, name) for name in folders):
            if not os.path.islink(path):  # what a link points to is not ours
                with suppress(OSError):
                    os.chmod(path, 0o700)
    shutil.rmtree(folder, ignore_errors=True)
