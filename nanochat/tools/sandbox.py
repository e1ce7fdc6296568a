"""Run Python code that a model wrote, with limits and as isolated as the machine allows, and leave nothing behind.

    result = run_python("print(1 + 1)")                      # result.ok, .stdout, .reason, .level
    result = passes("def add(a, b):\\n    return a + b", "assert add(1, 2) == 3")

There are two levels. A run uses the best level that works on this machine, which is tried once by running a small
program. The result names the level.

- Level.LIMITS, any Linux or macOS: a process in a temporary folder, isolated Python, almost no environment variables,
  limits on wall-clock time, CPU time, memory, processes, file size, open files and output. At the end every process
  that it started is killed. If we are root, it runs under an unused user id. On Linux (x86-64, ARM64) it can neither
  signal other processes nor open sockets. It CAN read what that user can read, and write where that user can write. On
  macOS it can also use the network and signal processes of the user, may start no process, and has almost no memory
  limit.
- Level.ISOLATED, Linux with user namespaces or bubblewrap: in addition, it sees only system folders and Python's own
  folder, read-only. Its working folder is in memory and has a size limit. It has no network and sees only its own
  processes.

    NANOCHAT_SANDBOX=isolated   refuse to run below that level (the default, limits, allows both levels)

The program shares the kernel with us: this is not a virtual machine. The memory limit holds for each process, so a
program can use at most `memory` times `processes`.
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

OUTPUT_BYTES = 256 * 1024  # bytes of each of stdout and stderr; a program that writes more is killed
FILE_BYTES = 16 << 20      # bytes of a file; an in-memory working folder holds four times that
BOX = "nanochat-sandbox-"
GRACE = 5.0          # seconds to start and end a sandbox, in addition to the program's time


class Level(enum.IntEnum):
    """What a sandbox guarantees, as described at the top of this file. Higher is safer."""

    LIMITS = 1
    ISOLATED = 2


@dataclass(frozen=True)
class Result:
    """The outcome of a run.

    Attributes:
        ok: for `run_python`, the program ended with exit code 0; for `passes`, it passed its checks.
        stdout, stderr: its output, each cut at OUTPUT_BYTES.
        timed_out: it was killed because its time was over.
        level: the level it ran at.
        reason: why `ok` is false, in one line; "" if it is true.
    """

    ok: bool
    stdout: str
    stderr: str
    timed_out: bool
    level: Level
    reason: str


def run_python(code: str, *, timeout: float = 5.0, memory: int = 512 << 20, processes: int = 8,
               level_needed: Level = Level.LIMITS) -> Result:
    """Run a program.

    Args:
        code: its Python source.
        timeout: wall-clock seconds.
        memory: bytes for each process.
        processes: how many processes and threads it may start.
        level_needed: refuse to run below this level.

    Raises:
        UserError: this machine does not reach `level_needed` or the level in NANOCHAT_SANDBOX, or it runs Windows.
    """
    return _SandboxRun(_choose_method(level_needed), code, None, timeout, memory, processes).result()


def passes(program: str, checks: str, *, timeout: float = 5.0, memory: int = 512 << 20,
           level_needed: Level = Level.LIMITS) -> Result:
    """Run `program`, then `checks` with the names it defined. The result is ok if both ran to their end.

    The proof is a secret that stays in this process until the checks are done. Then it is sent to the program's process
    and must come back. Exiting early, printing, or hooks that run later prove nothing. The program may start no thread
    and no process. Trace functions, timers and signal handlers that it set are removed before and after the checks. The
    checks see Python's built-in functions unchanged, even if the program redefined them.

    The checks call the program's functions, so both share an interpreter. Code written against this harness can still
    fool it: code that finds its frames and speaks its protocol, returns objects equal to everything, or replaces
    functions of modules that the checks use. This gains it only a wrong grade; the guarantees of the level still hold.

    Args:
        program, checks: Python source.
        timeout: wall-clock seconds for both together.
        memory: bytes.
        level_needed: refuse to run below this level.

    Raises:
        UserError: as in `run_python`.
    """
    return _SandboxRun(_choose_method(level_needed), program, checks, timeout, memory, 0).result()


def best_level() -> Level:
    """Return the best level that works on this machine. Raises UserError if none does."""
    return _best()[0]


def _choose_method(needed: Level) -> str:
    """Return the key of LEVELS to run with."""
    names = {level.name.lower(): level for level in Level}
    wanted = os.environ.get("NANOCHAT_SANDBOX") or "limits"
    if wanted not in names:
        raise UserError(f"NANOCHAT_SANDBOX is {' or '.join(names)}, not {wanted!r}")
    if os.name != "posix":
        raise UserError("programs that a model wrote run only on Linux and macOS, where they can be confined. "
                        "On Windows, use WSL.")
    level, method, why = _best()
    needed = max(names[wanted], needed)
    if level < needed:
        raise UserError(f"this machine confines programs only at the level {level.name.lower()}, and "
                        f"{needed.name.lower()} is asked for ({'; '.join(why)}). Install bubblewrap or allow user "
                        "namespaces. If this user can reach no data of value, you may set NANOCHAT_SANDBOX=limits.")
    return method


# Tests that programs run, and one limit that root in some containers and emulated kernels do not enforce
TEST_PROGRAM = """
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
    """Return the best level that works here, the method that reaches it, and why the methods before it fail."""
    _sweep(Path(tempfile.gettempdir()))
    why = []
    for method, level in LEVELS.items():
        if problem := _problem(method):
            why.append(f"{method}: {problem}")
        else:
            return level, method, why
    raise UserError(f"programs that a model wrote cannot be confined on this machine, so they do not run "
                    f"({'; '.join(why)}). If you are root, try an ordinary user, or let the container's root change "
                    "its user id (capability SETUID).")


def _problem(method: str) -> str:
    """Run a test program. Return why `method` does not work here; "" if it does."""
    if method != "limits" and sys.platform != "linux":
        return "Linux only"
    if method == "bubblewrap" and shutil.which("bwrap") is None:
        return "bwrap is not installed"
    check = "assert refused, 'the number of processes is not bounded'"
    try:
        result = _SandboxRun(method, TEST_PROGRAM, check, 10.0, 512 << 20, 0).result()
    except _SetupFailed as error:
        return " ".join(str(error).split())[:200]
    works = result.ok and result.stdout == "42\n"
    return "" if works else f"a test program failed ({result.reason or 'no output'})"


class _SetupFailed(UserError):
    """The sandbox itself could not be set up."""


@functools.cache
def _interpreter(method: str) -> str:
    """Return the Python that programs run with: that of this process, but outside any virtual environment.

    As root the program runs under another user id, which may not be able to reach our Python. Except in a namespace,
    use the system's Python then.
    """
    own = os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)
    if method == "namespaces" or os.getuid() != 0:
        return own
    others = (shutil.which(name, path="/usr/local/bin:/usr/bin:/bin") for name in ("python3", "python"))
    for path in (own, *(os.path.realpath(path) for path in others if path)):
        if all(folder.stat().st_mode & stat.S_IXOTH for folder in Path(path).parents):
            return path
    return own


def _binds(python: str) -> list[str]:
    """Return what a program may see of the file system, read-only: system programs and libraries, and its Python."""
    paths = ["/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/etc/ld.so.cache", "/etc/localtime", "/nix/store",
             "/dev/null", "/dev/zero", "/dev/random", "/dev/urandom"]
    folder = Path(python).parent
    own = folder.parent if folder.name == "bin" else folder
    if str(own) != "/" and not any(own.is_relative_to(path) for path in paths):
        paths.append(str(own))
    return [path for path in paths if os.path.lexists(path)]


def bwrap_arguments(program: str, binds: list[str]) -> list[str]:
    """Return the start of a command line for bubblewrap; append the command to run in it.

    Args:
        program: path of bwrap.
        binds: paths that the command sees, read-only, besides an empty /tmp.
    """
    arguments = [program, "--unshare-all", "--unshare-user", "--disable-userns", "--die-with-parent", "--new-session",
                 "--cap-drop", "ALL", "--dev", "/dev", "--remount-ro", "/dev",
                 "--size", str(4 * FILE_BYTES), "--tmpfs", "/tmp", "--chdir", "/tmp"]
    for path in binds:
        if path.startswith("/dev/"):
            continue
        arguments += ["--symlink", os.readlink(path), path] if os.path.islink(path) else ["--ro-bind", path, path]
    return [*arguments, "--remount-ro", "/", "--"]


class _SandboxRun:
    """One program in one sandbox. Talks to sandbox_launcher.py, which starts the program and waits for it.

    The launcher's stdin is kept open: when it closes, the launcher kills everything. The program's process reads
    messages from the pipe `channel` and answers on the pipe `reply`. The launcher writes to the pipe `report`.
    """

    def __init__(self, method: str, code: str, checks: str | None, timeout: float, memory: int, processes: int):
        self.method, self.level, self.timeout, self.checked = method, LEVELS[method], timeout, checks is not None
        self.secret = secrets.token_hex(16).encode()
        # The program is sent at once; the checks after the reply "1", the secret after the reply "2".
        self.messages = [_framed(code)]
        self.expected = b""
        if checks is not None:
            self.messages += [_framed(checks), _framed(self.secret.decode())]
            self.expected = b"12" + self.secret
        self.limits = {"RLIMIT_CPU": int(timeout) + 1, "RLIMIT_AS": memory, "RLIMIT_FSIZE": FILE_BYTES,
                       "RLIMIT_NOFILE": 64, "RLIMIT_CORE": 0, "processes": processes}
        self.received = {"stdout": b"", "stderr": b"", "report": b"", "reply": b""}
        self.excess = False

    def result(self) -> Result:
        """Run the program and return the outcome. Raises _SetupFailed if the sandbox cannot be set up."""
        box = tempfile.mkdtemp(prefix=f"{BOX}{os.getpid()}-")
        try:
            self.run(box)
        finally:
            _remove(box)
        records = [json.loads(line) for line in self.received["report"].splitlines()]
        failed = next((record["failed"] for record in records if "failed" in record), None)
        if failed is not None:
            raise _SetupFailed(f"the sandbox ({self.method}) failed: {failed}")
        end = records[-1] if records else {"exit": None, "timed_out": False}
        text = {name: self.received[name][:OUTPUT_BYTES].decode("utf-8", "replace") for name in ("stdout", "stderr")}
        reason = self.reason(end["exit"], end["timed_out"], text["stderr"])
        if not records and reason:  # the launcher itself was killed, for instance when memory ran out
            reason = "the sandbox was ended from outside"
        return Result(not reason, text["stdout"], text["stderr"], end["timed_out"] and bool(reason), self.level, reason)

    def reason(self, code: int | None, timed_out: bool, stderr: str) -> str:
        """Return why the run is not ok, in one line; "" if it is.

        Args:
            code: exit code of the program, negative for a signal; None if it was killed.
            timed_out: whether its time was over.
            stderr: what it wrote there.
        """
        replies = self.received["reply"]
        if self.checked and replies == self.expected:
            return ""
        if self.excess:
            return f"wrote more than {OUTPUT_BYTES:,} bytes of output"
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
        """Start the launcher with `box` as the program's folder, and collect all output in `received`."""
        python = _interpreter(self.method)
        pipes = {"report": os.pipe(), "reply": os.pipe(), "channel": os.pipe()}
        mine = {"report": pipes["report"][0], "reply": pipes["reply"][0], "channel": pipes["channel"][1]}
        theirs = {"report": pipes["report"][1], "reply": pipes["reply"][1], "channel": pipes["channel"][0]}
        binds = _binds(python)
        wrapper = bwrap_arguments(shutil.which("bwrap") or "bwrap", binds) if self.method == "bubblewrap" else []
        spec = {"method": self.method, "box": box, "python": [python, "-I", "-S", "-B", "-X", "utf8"], "binds": binds,
                "wrapper": wrapper, "limits": self.limits, "timeout": self.timeout, "report": theirs["report"],
                "checked": self.checked, "channel": [theirs["channel"], theirs["reply"]]}
        launcher = str(Path(__file__).with_name("sandbox_launcher.py"))
        pipe = subprocess.PIPE
        try:
            process = subprocess.Popen([python, "-I", "-S", launcher, json.dumps(spec)], stdin=pipe, stdout=pipe,
                                       stderr=pipe, pass_fds=tuple(theirs.values()), start_new_session=True,
                                       cwd="/", env={})
        except OSError as error:
            for end in mine.values():
                os.close(end)
            raise _SetupFailed(f"cannot start {python}: {error.strerror}") from error
        finally:
            for end in theirs.values():
                os.close(end)
        try:
            self.exchange(process, mine)
        finally:
            for end in mine.values():
                with suppress(OSError):
                    os.close(end)
            with suppress(OSError):
                process.stdin.close()  # makes the launcher kill everything
            try:
                process.wait(GRACE + 5)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            process.stdout.close()
            process.stderr.close()

    def exchange(self, process: subprocess.Popen, mine: dict[str, int]) -> None:
        """Send the messages and read all output, until every process of the sandbox has ended.

        Args:
            process: the launcher.
            mine: our ends of the pipes, as file descriptors.
        """
        read = {process.stdout.fileno(): "stdout", process.stderr.fileno(): "stderr",
                mine["report"]: "report", mine["reply"]: "reply"}
        channel, pending, sent = mine["channel"], b"", 0
        end = time.monotonic() + self.timeout + GRACE
        with selectors.DefaultSelector() as selector:
            for handle in (*read, channel):
                os.set_blocking(handle, False)
            for handle in read:
                selector.register(handle, selectors.EVENT_READ)
            while set(read) & set(selector.get_map()) and (left := end - time.monotonic()) > 0:
                while sent < min(len(self.messages), 1 + len(self.received["reply"])) and not process.stdin.closed:
                    pending, sent = pending + self.messages[sent], sent + 1
                if pending and channel not in selector.get_map():
                    selector.register(channel, selectors.EVENT_WRITE)
                for key, _ in selector.select(left):
                    if key.fd != channel:
                        data = os.read(key.fd, 65536)
                        if not data:
                            selector.unregister(key.fd)
                        elif self.receive(read[key.fd], data):
                            process.stdin.close()  # the launcher kills everything, then sends its report
                        continue
                    try:
                        pending = pending[os.write(channel, pending):]
                    except BlockingIOError:
                        pass
                    except BrokenPipeError:  # the program ended
                        pending = b""
                    if not pending:
                        selector.unregister(channel)

    def receive(self, name: str, data: bytes) -> bool:
        """Store output. Return whether the run is over: the secret is back, a reply is wrong, or there is too much."""
        if name in ("stdout", "stderr"):
            self.excess = self.excess or len(self.received[name]) + len(data) > OUTPUT_BYTES
            data = data[:OUTPUT_BYTES - len(self.received[name])]
        elif name == "reply":
            data = data[:1 + len(self.expected) - len(self.received[name])]  # one byte too many is enough to see it
        self.received[name] += data
        reply = self.received["reply"]
        return self.excess or name == "reply" and (reply == self.expected or not self.expected.startswith(reply))


def _framed(text: str) -> bytes:
    data = text.encode("utf-8", "replace")
    return b"%08x" % len(data) + data


def _sweep(folder: Path) -> None:
    """Remove folders of runs whose caller was killed: older than an hour, and no process has the id in their name."""
    for box in folder.glob(f"{BOX}*-*"):
        number = box.name.removeprefix(BOX).partition("-")[0]
        with suppress(OSError):
            if number.isdecimal() and not box.is_symlink() and time.time() - box.stat().st_mtime > 3600:
                try:
                    os.kill(int(number), 0)
                except ProcessLookupError:
                    _remove(str(box))


def _remove(folder: str) -> None:
    """Remove a folder, even if the program took away permissions inside it. No process uses it any more."""
    for parent, folders, _ in os.walk(folder):
        for path in (os.path.join(parent, name) for name in folders):
            if not os.path.islink(path):  # never change what a link points to
                with suppress(OSError):
                    os.chmod(path, 0o700)
    shutil.rmtree(folder, ignore_errors=True)
