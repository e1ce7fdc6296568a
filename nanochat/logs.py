"""The log of a run: one JSON line per record on disk, lines and a progress bar on the console, wandb if wanted.

    with RunLog("base", "d20", config={"depth": 20}) as log:
        log.say("step 00010 | loss 3.1")
        log.record("train", step=10, loss=3.1)
    rows = read_log(log.path)      # base_dir()/logs/base_d20.jsonl

JSON has no NaN and no infinity: they are written as the strings "NaN", "Infinity", "-Infinity", and `read_log` turns
these back into numbers.
"""

import errno
import json
import os
import platform
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, TextIO

from nanochat.errors import UserError
from nanochat.files import Lock, base_dir, lock, to_json

MOST_WAITING = 10_000  # records that wait in memory for room on the disk
NOT_FINITE = {"NaN": float("nan"), "Infinity": float("inf"), "-Infinity": float("-inf")}
NO_WANDB = ("", "dummy")
LONGEST_LINE = 1 << 26  # bytes of a record; the samples of a run are far shorter
CONSOLE_GONE = (errno.EIO, errno.EPIPE)  # a closed terminal; a pipe whose reader Ctrl-C ended before us, such as tee


def print_line(text: str, stream: TextIO | None = None) -> None:
    """Print a line at once, to standard output or `stream`, in one write: other processes print to the same console.

    A console that is gone or full is no error: a run that was asked to stop has yet to save.
    """
    stream = sys.stdout if stream is None else stream
    with _console_may_be_gone(stream):
        try:
            stream.write(f"{text}\n")
        except UnicodeEncodeError:  # a sample of a model may contain characters that this console cannot show
            encoding = stream.encoding or "ascii"
            stream.write(text.encode(encoding, "backslashreplace").decode(encoding) + "\n")
        stream.flush()


@contextmanager
def console() -> Iterator[None]:
    """Within the block, no print fails: neither where the console is gone, nor where the output goes to a full disk.

    What the console cannot show is printed as \\u2192.

    The end of the block writes what is left, and drops what cannot be written: Python would end with code 120.
    """
    before = sys.stdout, sys.stderr
    for stream in before:
        with suppress(AttributeError, ValueError, OSError):  # not every stream can be changed
            stream.reconfigure(errors="backslashreplace")
    sys.stdout, sys.stderr = map(_Console, before)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
        for stream in before:
            try:
                stream.flush()
            except (OSError, ValueError, AttributeError):
                _lead_nowhere(stream)


class _Console:
    """A stream whose errors of writing are passed over."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with _console_may_be_gone(self._stream):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with _console_may_be_gone(self._stream):
            self._stream.flush()


def _lead_nowhere(stream: TextIO) -> None:
    with suppress(OSError, ValueError, AttributeError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


@contextmanager
def _console_may_be_gone(stream: TextIO) -> Iterator[None]:
    """Pass over errors of writing to the console. Where it is gone for good, the stream leads nowhere from now on."""
    try:
        yield
    except OSError as error:
        if error.errno in CONSOLE_GONE:
            _lead_nowhere(stream)


class RunLog:
    """The log of one run. The file is appended to, so the parts of a run that was resumed follow one another.

    Args:
        stage, tag: the file is logs/<stage>_<tag>.jsonl in base_dir().
        config: the settings of the run, recorded at its start.
        wandb_run: name of the run in wandb's project nanochat; "" and "dummy" mean no wandb.
        resumes: training goes on where it stopped. Then so does the wandb run of this name that the log tells of.
        enabled: False on ranks other than 0, where no call does anything.

    Raises:
        UserError: the file cannot be written, another process writes it, or wandb is wanted but missing or does not
            start.
    """

    def __init__(self, stage: str, tag: str, config: dict[str, Any], *, wandb_run: str = "dummy",
                 resumes: bool = False, enabled: bool = True):
        self.path = log_path(stage, tag)
        self.enabled, self._file, self._wandb, self._bar = enabled, None, None, None
        self._failed = self._wandb_failed = False
        self._waiting: deque[bytes] = deque()  # lines that could not be written yet
        self._lost = 0
        self._lock: Lock | None = None
        self._bar_wanted = enabled and os.environ.get("NANOCHAT_PROGRESS") != "0" and sys.stderr.isatty()
        if not enabled:
            return
        if Path(f"{stage}_{tag}").name != f"{stage}_{tag}":
            raise UserError(f"a model tag is one name, such as d20, not {tag!r}")
        self._lock = lock(base_dir() / "locks" / f"{self.path.name}.lock", f"another run writes {self.path}",
                          "Two would mix their records: wait until it ends, or stop it with {kill}.")
        try:
            self.path.parent.mkdir(exist_ok=True)
            self._file = open(self.path, "a+b", buffering=0)  # one write per record, appended: lines never mix
            _end_last_line(self._file)
        except OSError as error:
            raise UserError(f"cannot write the log {self.path}: {error.strerror}. "
                            "Correct that, or set NANOCHAT_BASE_DIR to another folder.") from error
        if wandb_run not in NO_WANDB:
            run_id = last_wandb_id(self.path, wandb_run) if resumes else None
            self._wandb = _start_wandb(wandb_run, stage, config, run_id)
        self.record("start", stage=stage, tag=tag, config=config, versions=versions(), machine=machine(),
                    commit=commit())
        if self._wandb is not None:
            self.record("wandb", name=wandb_run, id=self._wandb.id)

    def record(self, kind: str, **values: Any) -> None:
        """Append one line: time (UTC, ISO 8601), kind and values (JSON-able, NumPy or PyTorch). wandb gets the numbers.

        In wandb a value is named kind/name and plotted over "step", if there is one. A full disk is reported once on
        the console and does not end the run; the records are written when there is room again.
        """
        if self._file is None:
            return
        row = {"time": datetime.now(timezone.utc).isoformat(timespec="milliseconds"), "kind": kind}
        if clash := row.keys() & values:
            raise ValueError(f"a record's own entries cannot be given as values: {', '.join(sorted(clash))}")
        line = to_json(row | values)
        self._write(line.encode(errors="backslashreplace") + b"\n")  # of a file name that is not UTF-8
        if self._wandb is not None and kind not in ("start", "wandb", "end"):
            numbers = {name: value for name, value in json.loads(line).items() if isinstance(value, int | float)}
            self._tell_wandb(lambda run: run.log({name if name == "step" else f"{kind}/{name}": value
                                                  for name, value in numbers.items()}))

    def _tell_wandb(self, tell: Callable[[Any], object]) -> None:
        """Tell wandb something. Its errors, such as a full disk or a service that ended, do not end the run."""
        try:
            tell(self._wandb)
        except Exception as error:  # of many classes
            if not self._wandb_failed:
                self._wandb_failed = True
                self.say(f"warning: wandb fails ({type(error).__name__}: {' '.join(str(error).split())[:200]}). The "
                         f"run goes on; {self.path} has everything.")

    def _write(self, line: bytes) -> None:
        """Append a line, after those that could not be written before. Those that cannot now wait for the next call."""
        self._waiting.append(line)
        problem = ""
        try:
            while self._waiting and not problem:
                problem = self._append(self._waiting[0])
                if not problem:
                    self._waiting.popleft()
        except OSError as error:
            problem = error.strerror or str(error)
        if problem and not self._failed:
            self.say(f"warning: cannot write the log {self.path}: {problem}. The run goes on; its last "
                     f"{MOST_WAITING:,} records are kept in memory and written once that is possible.")
        if self._failed and not problem:
            self.say(f"the log {self.path} is written again"
                     + (f"; {self._lost:,} records of the time between are lost" if self._lost else ""))
            self._lost = 0
        self._failed = bool(problem)
        if len(self._waiting) > MOST_WAITING:
            self._waiting.popleft()
            self._lost += 1

    def _append(self, line: bytes) -> str:
        """Write a line as a whole or not at all. Return the problem, "" where there is none."""
        size = os.fstat(self._file.fileno()).st_size
        written = self._file.write(line)
        if written == len(line):
            return ""
        if written and os.fstat(self._file.fileno()).st_size == size + written:  # nobody else wrote meanwhile
            self._file.truncate(size)
        return "the disk is full"

    def say(self, text: str) -> None:
        """Print a line, above the progress bar if there is one."""
        if not self.enabled:
            return
        with _console_may_be_gone(sys.stderr):
            if self._bar is not None:
                self._bar.clear()
        print_line(text)
        with _console_may_be_gone(sys.stderr):
            if self._bar is not None:
                self._bar.refresh()

    def progress(self, done: int, total: int, text: str = "") -> None:
        """Show a progress bar: `done` of `total` steps, followed by `text`. Only on a terminal and without
        NANOCHAT_PROGRESS=0."""
        if not self._bar_wanted:
            return
        with _console_may_be_gone(sys.stderr):
            if self._bar is None:
                try:
                    from tqdm import tqdm
                except ImportError:
                    self._bar_wanted = False
                    return
                self._bar = tqdm(initial=done, total=total, dynamic_ncols=True, miniters=1, file=sys.stderr,
                                 leave=False)
            self._bar.total = total
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(done - self._bar.n)

    def close(self, exit_code: int = 0) -> None:
        """End the log. exit_code: 0 for success; wandb shows others as crashed. A second call does nothing."""
        if self._bar is not None:
            with _console_may_be_gone(sys.stderr):
                self._bar.close()
            self._bar, self._bar_wanted = None, False
        if self._file is not None:
            self.record("end", exit_code=exit_code)
            if self._waiting:
                self.say(f"warning: {len(self._waiting) + self._lost:,} records are missing in {self.path}")
            with suppress(OSError):  # a network disk may report a failed write here
                self._file.close()
            self._file = None
        if self._lock is not None:
            self._lock.close()
            self._lock = None
        if self._wandb is not None:
            self._tell_wandb(lambda run: run.finish(exit_code=exit_code))
            self._wandb = None

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, SystemExit):
            code = error.code if isinstance(error.code, int) else 0 if error.code is None else 1
        else:
            code = 0 if kind is None else 130 if issubclass(kind, KeyboardInterrupt) else 1
        self.close(code)


def log_path(stage: str, tag: str) -> Path:
    """Return where the log of a stage of a model is."""
    return base_dir() / "logs" / f"{stage}_{tag}.jsonl"


def read_log(path: str | Path) -> list[dict[str, Any]]:
    """Return the records of a log in order, without incomplete lines; [] where there is no such file."""
    return list(iter_log(path))


def iter_log(path: str | Path, unread: Callable[[], object] = lambda: None) -> Iterator[dict[str, Any]]:
    """Yield the records of a log in order, one line in memory at a time; none where there is no such file.

    unread: called for each line that is no record: incomplete, damaged, or longer than LONGEST_LINE.
    """
    try:
        file = open(path, "rb")
    except FileNotFoundError:
        return
    with file:
        while line := file.readline(LONGEST_LINE):
            try:
                if len(line) == LONGEST_LINE:
                    while line and not line.endswith(b"\n"):
                        line = file.readline(LONGEST_LINE)
                    raise ValueError("no record is so long")
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise ValueError("a record is an object")
                row = _finite_or_not(row)
            except (ValueError, RecursionError, MemoryError):
                if line.strip():
                    unread()
            else:
                yield row


def _finite_or_not(value: Any) -> Any:
    if isinstance(value, str):
        return NOT_FINITE.get(value, value)
    if isinstance(value, dict):
        return {name: _finite_or_not(part) for name, part in value.items()}
    return [_finite_or_not(part) for part in value] if isinstance(value, list) else value


def _end_last_line(file: Any) -> None:
    """Remove the half of a record that a kill or a full disk left at the end of a log."""
    size = end = file.seek(0, os.SEEK_END)
    tail = b""
    while end and b"\n" not in tail:
        start = max(0, end - (1 << 16))
        file.seek(start)
        tail, end = file.read(end - start) + tail, start
    tail = tail.rpartition(b"\n")[2]
    if not tail:
        return
    try:
        json.loads(tail)
        file.write(b"\n")  # a whole record: the newline alone is missing
    except ValueError:
        file.truncate(size - len(tail))


def check_wandb(name: str) -> None:
    """Raise UserError where a run of this name cannot be logged to wandb: it is not installed, or nobody is logged in.

    Nothing is started, and the network is not asked.
    """
    if name in NO_WANDB:
        return
    wandb = _wandb_package(name)
    if sys.stdin is not None and sys.stdin.isatty():
        return  # wandb asks for the key
    try:
        online = getattr(wandb.setup().settings, "mode", "online") not in ("offline", "disabled", "dryrun")
        logged_in = not online or wandb.login(prompt=False, verify=False)
    except (AttributeError, TypeError):  # an older wandb has no such question: it says so when it starts
        return
    except (wandb.Error, OSError, ValueError) as error:  # a setting of wandb that is wrong
        raise _wandb_error(error) from error
    if not logged_in:
        raise _wandb_error("nobody is logged in.")


def last_wandb_id(log: Path, name: str) -> str | None:
    """Return the id of the wandb run of this name that a log was last written beside; None where there is none."""
    return next((row.get("id") for row in reversed(read_log(log))
                 if row.get("kind") == "wandb" and row.get("name") == name), None)


def _wandb_package(name: str) -> Any:
    try:
        import wandb
    except ImportError as error:
        raise UserError(f"the run name {name!r} asks for wandb, which is not installed: `uv pip install '.[track]'` in "
                        "the project's folder installs it; the run name dummy works without it.") from error
    return wandb


def _wandb_error(why: object) -> UserError:
    return UserError(f"wandb does not start: {' '.join(str(why).split())[:300]} Log in with `wandb login`, set "
                     "WANDB_MODE=offline to keep the run on this machine, or use the run name dummy to work without "
                     "wandb.")


def _start_wandb(name: str, stage: str, config: dict[str, Any], run_id: str | None) -> Any:
    """Start a wandb run. run_id: of the run to go on with, also where both are offline; None begins one."""
    wandb = _wandb_package(name)
    try:
        run = wandb.init(project="nanochat", name=name, job_type=stage, config=json.loads(to_json(config)),
                         dir=str(base_dir()), **({"id": run_id, "resume": "allow"} if run_id else {}))
    except (wandb.Error, OSError, ValueError) as error:
        raise _wandb_error(error) from error
    run.define_metric("*", step_metric="step")  # our steps go back where a run resumes; wandb's own cannot
    return run


def versions() -> dict[str, str]:
    """Return the versions of Python, PyTorch and this project."""
    from importlib import metadata

    import torch
    try:
        own = metadata.version("liquid-time-nanochat")
    except metadata.PackageNotFoundError:  # run from a plain checkout
        own = "not installed"
    return {"python": platform.python_version(), "torch": torch.__version__, "nanochat": own}


def available_cores() -> int:
    """Return the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine() -> dict[str, Any]:
    """Return system, CPU model, cores this process may use, memory in bytes (0 if unknown), GPU names."""
    import torch
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith(("model name", "Model")))
    cpu = next(models, platform.processor())
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        memory = 0
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {"system": platform.platform(), "cpu": cpu or platform.machine(), "cores": available_cores(),
            "memory": memory, "gpus": gpus}


def commit() -> str | None:
    """Return the git commit of the code, followed by -dirty where files differ; None outside a checkout."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    try:
        command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        found = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None
