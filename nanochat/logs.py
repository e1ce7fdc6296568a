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
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, TextIO

from nanochat.errors import UserError
from nanochat.files import Lock, base_dir, lock, to_json

NOT_FINITE = {"NaN": float("nan"), "Infinity": float("inf"), "-Infinity": float("-inf")}
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
def _console_may_be_gone(stream: TextIO) -> Iterator[None]:
    """Pass over errors of writing to the console. Where it is gone for good, the stream leads nowhere from now on."""
    try:
        yield
    except OSError as error:
        if error.errno in CONSOLE_GONE:
            with suppress(OSError, ValueError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, stream.fileno())
                os.close(nowhere)


class RunLog:
    """The log of one run. The file is appended to, so the parts of a run that was resumed follow one another.

    Args:
        stage, tag: the file is logs/<stage>_<tag>.jsonl in base_dir().
        config: the settings of the run, recorded at its start.
        wandb_run: name of the run in wandb's project nanochat; "" and "dummy" mean no wandb.
        enabled: False on ranks other than 0, where no call does anything.

    Raises:
        UserError: the file cannot be written, another process writes it, or wandb is wanted but missing or does not
            start.
    """

    def __init__(self, stage: str, tag: str, config: dict[str, Any], *, wandb_run: str = "dummy",
                 enabled: bool = True):
        self.path = base_dir() / "logs" / f"{stage}_{tag}.jsonl"
        self.enabled, self._file, self._wandb, self._bar, self._failed = enabled, None, None, None, False
        self._lock: Lock | None = None
        self._torn = False  # the file may end in the middle of a line
        self._bar_wanted = enabled and os.environ.get("NANOCHAT_PROGRESS") != "0" and sys.stderr.isatty()
        if not enabled:
            return
        if Path(f"{stage}_{tag}").name != f"{stage}_{tag}":
            raise UserError(f"a model tag is one name, such as d20, not {tag!r}")
        try:
            self.path.parent.mkdir(exist_ok=True)
            self._file = open(self.path, "a+b", buffering=0)  # one write per record, appended: lines never mix
            self._torn = True
        except OSError as error:
            raise UserError(f"cannot write the log {self.path}: {error.strerror}. "
                            "Correct that, or set NANOCHAT_BASE_DIR to another folder.") from error
        self._lock = lock(base_dir() / "locks" / f"{self.path.name}.lock", f"another run writes {self.path}",
                          "Two would mix their records: wait until it ends, or stop it with {kill}.")
        if wandb_run not in ("", "dummy"):
            self._wandb = _start_wandb(wandb_run, stage, config)
        self.record("start", stage=stage, tag=tag, config=config, versions=versions(), machine=machine(),
                    commit=commit())

    def record(self, kind: str, **values: Any) -> None:
        """Append one line: time (UTC, ISO 8601), kind and values (JSON-able, NumPy or PyTorch). wandb gets the numbers.

        In wandb a value is named kind/name and plotted over "step", if there is one. A full disk is reported once on
        the console and does not end the run.
        """
        if self._file is None:
            return
        row = {"time": datetime.now(timezone.utc).isoformat(timespec="milliseconds"), "kind": kind}
        if clash := row.keys() & values:
            raise ValueError(f"a record's own entries cannot be given as values: {', '.join(sorted(clash))}")
        line = to_json(row | values)
        self._write(line.encode() + b"\n")
        if self._wandb is not None and kind not in ("start", "end"):
            numbers = {name: value for name, value in json.loads(line).items() if isinstance(value, int | float)}
            self._wandb.log({name if name == "step" else f"{kind}/{name}": value for name, value in numbers.items()})

    def _write(self, data: bytes) -> None:
        try:
            # An incomplete record, after a kill or a full disk, stays a line of its own. Check only where there may be
            # one: at other times another writer may be in the middle of its line.
            if self._torn and _ends_inside_a_line(self._file):
                data = b"\n" + data
            written = self._file.write(data)
            problem = None if written == len(data) else "the disk is full"
        except OSError as error:
            problem = error.strerror
        if problem and not self._failed:
            self.say(f"warning: cannot write the log {self.path}: {problem}. The run continues without it.")
        self._failed = self._torn = bool(problem)

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
            self._file.close()
            self._file = None
        if self._lock is not None:
            self._lock.close()
            self._lock = None
        if self._wandb is not None:
            self._wandb.finish(exit_code=exit_code)
            self._wandb = None

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, SystemExit):
            code = error.code if isinstance(error.code, int) else 0 if error.code is None else 1
        else:
            code = 0 if kind is None else 130 if issubclass(kind, KeyboardInterrupt) else 1
        self.close(code)


def read_log(path: str | Path) -> list[dict[str, Any]]:
    """Return the records of a log in order, without incomplete lines; [] where there is no such file."""
    rows = []
    try:
        lines = Path(path).read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            rows.append(_finite_or_not(row))
    return rows


def _finite_or_not(value: Any) -> Any:
    if isinstance(value, str):
        return NOT_FINITE.get(value, value)
    if isinstance(value, dict):
        return {name: _finite_or_not(part) for name, part in value.items()}
    return [_finite_or_not(part) for part in value] if isinstance(value, list) else value


def _ends_inside_a_line(file: Any) -> bool:
    """Return whether the last line of an open file has no newline."""
    if file.seek(0, os.SEEK_END) == 0:
        return False
    file.seek(-1, os.SEEK_END)
    return file.read(1) != b"\n"


def _start_wandb(name: str, stage: str, config: dict[str, Any]) -> Any:
    try:
        import wandb
    except ImportError as error:
        raise UserError(f"the run name {name!r} asks for wandb, which is not installed: `uv pip install '.[track]'` in "
                        "the project's folder installs it; the run name dummy works without it.") from error
    try:
        run = wandb.init(project="nanochat", name=name, job_type=stage, config=json.loads(to_json(config)),
                         dir=str(base_dir()))
    except (wandb.Error, OSError, ValueError) as error:
        raise UserError(f"wandb does not start: {' '.join(str(error).split())[:300]} Log in with `wandb login`, set "
                        "WANDB_MODE=offline to keep the run on this machine, or use the run name dummy to work without "
                        "wandb.") from error
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
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # not Linux
        cores = os.cpu_count() or 1
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        memory = 0
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {"system": platform.platform(), "cpu": cpu or platform.machine(), "cores": cores, "memory": memory,
            "gpus": gpus}


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
