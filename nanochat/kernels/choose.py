"""Measure the implementations of every operation at the start of a training run, and choose the fastest right one.

    choice = choose(parse_wish("attention:flash"), shape, device, torch.bfloat16, compiled=True)
    choice.apply()                                           # on every rank

`--kernels` of the training scripts, and NANOCHAT_KERNELS for everything else, say how:

    auto                    on an NVIDIA GPU measure, at most 60 s, or remember; elsewhere the fixed rules
    measure                 measure anew, on any device
    default                 the fixed rules: of each BACKENDS the first that is ready
    relu2:torch,slc2:triton these implementations, and the rest as above

The measuring is done by nanochat/kernels/measure.py in a process of its own. After a crash or a hang it is started
again for the trials that are left, and what it was trying is left out. The result is remembered in kernels.json of the
base folder, by GPU, driver, versions, the kernels' source, shapes and dtype.
"""

import contextlib
import hashlib
import importlib
import importlib.metadata
import importlib.util
import json
import os
import pkgutil
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from nanochat import kernels
from nanochat.errors import UserError
from nanochat.files import atomic_write, base_dir, to_json
from nanochat.kernels.dispatch import TrainingShape, set_choice
from nanochat.kernels.measure import Task

SECONDS = 60.0  # for all operations, at most
TRIAL_SECONDS = 25.0  # for one implementation: checks, compilation and timing; more is taken for a hang
STARTS = 12  # of the process that measures, at most
MARGIN = 1.02  # what runs by default is kept unless something is faster by this factor
MORE_MEMORY = 1.02, 1 << 20  # what may be kept for backward: the default's, times this factor, and these bytes
REMEMBERED = 32  # results in kernels.json, at most


def operations() -> dict[str, str]:
    """Return the module of each operation that has BACKENDS, by name."""
    names = [found.name for found in pkgutil.iter_modules(kernels.__path__) if found.ispkg]
    paths = {name: f"{kernels.__name__}.{name}" for name in names}
    return {name: path for name, path in paths.items() if hasattr(importlib.import_module(path), "BACKENDS")}


@dataclass(frozen=True)
class Wish:
    """What the user wants: "auto", "measure" or "default", and implementations by operation."""

    rest: str = "auto"
    asked: Mapping[str, str] = field(default_factory=dict)


def parse_wish(text: str) -> Wish:
    """Read --kernels or NANOCHAT_KERNELS. Raises UserError, with what there is, for a name that does not exist."""
    rest, asked = "auto", {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        operation, colon, name = (piece.strip() for piece in part.partition(":"))
        if not colon:
            if operation not in ("auto", "measure", "default"):
                raise UserError(f"--kernels: {part!r} is neither auto, measure, default nor OPERATION:IMPLEMENTATION, "
                                f"such as relu2:torch. There are {_what_there_is()}.")
            rest = operation
        elif name not in _names(operation):
            raise UserError(f"--kernels: there is no {part!r}. There are {_what_there_is()}.")
        else:
            asked[operation] = name
    return Wish(rest, asked)


def _names(operation: str) -> list[str]:
    path = operations().get(operation)
    return list(importlib.import_module(path).BACKENDS) if path else []


def _what_there_is() -> str:
    return ", ".join(f"{operation}:{'|'.join(_names(operation))}" for operation in operations())


def wish_of_environment() -> Wish:
    """Return what NANOCHAT_KERNELS asks for. Raises UserError."""
    return parse_wish(os.environ.get("NANOCHAT_KERNELS", ""))


def apply_wish(wish: Wish) -> None:
    """Let the operations run what was asked for, without measuring."""
    set_choice(wish.asked)


# ---- the choice

@dataclass(frozen=True)
class Choice:
    """What the operations of a run use, and why.

    chosen: what was measured as the fastest, by operation. asked: what the user asked for instead
    milliseconds: forward and backward at the training shape, by operation and implementation, where it was right
    left_out: "operation:implementation" → why it is not used
    rows: B and T of the training. seconds: what measuring took. source: "measured", "remembered", or "" for the fixed
        rules
    problem: why not all was measured; "" where it was
    """

    chosen: dict[str, str] = field(default_factory=dict)
    asked: dict[str, str] = field(default_factory=dict)
    milliseconds: dict[str, dict[str, float]] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    rows: tuple[int, int] | None = None
    seconds: float = 0.0
    source: str = ""
    problem: str = ""

    def apply(self) -> None:
        """Let the operations of this process run what was chosen."""
        left_out = {tuple(both.split(":")): why for both, why in self.left_out.items()}
        rows = {} if self.rows is None else {name: self.rows for name in self.chosen if name not in self.asked}
        set_choice({**self.chosen, **self.asked}, left_out, rows)

    def lines(self) -> list[str]:
        """Return what the log says."""
        lines = [f"kernel left out: {both}, {why}" for both, why in self.left_out.items()]
        if self.problem:
            lines.append(f"kernels: {self.problem}")
        if self.chosen:
            how = f"measured in {self.seconds:.0f} s" if self.source == "measured" else self.source
            lines.append(f"kernels, {how}: " + ", ".join(
                f"{operation} {name} {self.milliseconds[operation][name]:.3g} ms"
                if name in self.milliseconds.get(operation, {}) else f"{operation} {name}"
                for operation, name in self.chosen.items() if operation not in self.asked))
        if self.asked:
            lines.append("kernels asked for: " + ", ".join(f"{o} {name}" for o, name in self.asked.items()))
        return lines


def measures_on(device: torch.device) -> bool:
    """Return whether a run on this device measures by itself: the fixed rules for CPUs are known to be right."""
    return device.type == "cuda" and torch.version.hip is None


def choose(wish: Wish, shape: TrainingShape, device: torch.device, dtype: torch.dtype, compiled: bool,
           modules: Mapping[str, str] | None = None, seconds: float = SECONDS,
           trial_seconds: float = TRIAL_SECONDS) -> Choice:
    """Return the choice for a training run, from memory where this machine has measured the same before.

    Args:
        wish: what the user wants
        shape, device, dtype, compiled: of the training
        modules: of the operations to measure, by name; None for all of this package
        seconds, trial_seconds: for all, and for one implementation
    """
    if wish.rest == "default" or wish.rest == "auto" and not measures_on(device):
        return Choice(asked=dict(wish.asked))
    modules = {name: path for name, path in (modules or operations()).items() if name not in wish.asked}
    key = key_of(modules, shape, device, dtype, compiled)
    if wish.rest == "auto" and (found := _recall(key)) is not None:
        return Choice(**found, asked=dict(wish.asked), source="remembered", rows=(shape.B, shape.T))
    began = time.monotonic()
    task = Task(modules, [], shape, str(device), str(dtype).removeprefix("torch."), compiled, torch.get_num_threads(),
                seconds)
    found = decide(*measure(task, trial_seconds))
    if not found["problem"]:
        _remember(key, found)
    return Choice(**found, asked=dict(wish.asked), source="measured", rows=(shape.B, shape.T),
                  seconds=time.monotonic() - began)


def decide(measured: Mapping[str, Mapping[str, dict[str, Any]]], defaults: Mapping[str, str],
           problem: str) -> dict[str, Any]:
    """Choose from the results of `measure`. Returns Choice's chosen, milliseconds, left_out and problem.

    The fastest right one is chosen that keeps no more memory for backward than the default: the batch was made to fit.
    Where the default was not measured, since time was up, nothing is chosen.
    """
    chosen, times, left_out = {}, {}, {}
    for operation, results in measured.items():
        default = defaults[operation]
        right = {name: result for name, result in results.items() if "wrong" not in result}
        for name, result in results.items():
            if "wrong" in result:
                left_out[f"{operation}:{name}"] = result["wrong"]
        times[operation] = {name: result["ms"] for name, result in right.items()}
        usual = right.get(default)
        if usual is not None and usual["kept"] is not None:
            factor, more = MORE_MEMORY
            most = usual["kept"] * factor + more
            for name in [name for name, result in right.items() if result["kept"] > most]:
                result = right.pop(name)
                left_out[f"{operation}:{name}"] = (f"keeps {result['kept'] / 1e6:.0f} MB for backward, {default} "
                                                   f"{usual['kept'] / 1e6:.0f}")
        if right and (usual is not None or default in results):
            best = min(right, key=lambda name: right[name]["ms"])
            keep = usual is not None and usual["ms"] <= right[best]["ms"] * MARGIN
            chosen[operation] = default if keep else best
    return {"chosen": chosen, "milliseconds": times, "left_out": left_out, "problem": problem}


# ---- measuring in another process

def measure(task: Task, trial_seconds: float = TRIAL_SECONDS) -> tuple[dict[str, dict], dict[str, str], str]:
    """Have the task done by other processes, one after the other.

    Returns:
        The results by operation and implementation: {"ms", "kept"} or {"wrong"}; the default of each operation; and
        why some are missing, "" where none is.
    """
    results: dict[str, dict] = {}
    defaults: dict[str, str] = {}
    end = time.monotonic() + task.seconds
    for _ in range(STARTS):
        done = [(operation, name) for operation, by_name in results.items() for name in by_name]
        left = end - time.monotonic()
        if left <= 0:
            break
        how = _one_process(Task(**vars(task) | {"done": done, "seconds": left}), trial_seconds, results, defaults)
        if how == "":
            return results, defaults, ""
        if time.monotonic() < end and len(done) == sum(map(len, results.values())):
            return results, defaults, f"measuring does not work here: {how}"
    return results, defaults, f"not all could be measured in {task.seconds:.0f} s; what is left runs by default"


def _one_process(task: Task, trial_seconds: float, results: dict[str, dict], defaults: dict[str, str]) -> str:
    """Run one process until it is finished, hangs or dies, and note its results. Returns "" or how it ended."""
    read, write = os.pipe()
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    environment |= {"NANOCHAT_MEASURE": str(write), "TORCHINDUCTOR_COMPILE_THREADS": "1",
                    "PYTHONPATH": os.pathsep.join(filter(None, [str(Path(__file__).resolve().parents[2]),
                                                                os.environ.get("PYTHONPATH")]))}
    process = trying = None
    with tempfile.TemporaryFile() as output:
        try:
            process = subprocess.Popen([sys.executable, "-m", "nanochat.kernels.measure"], stdin=subprocess.PIPE,
                                       stdout=output, stderr=output, pass_fds=[write], env=environment,
                                       start_new_session=True)
            os.close(write)
            write = None
            process.stdin.write(task.to_json().encode() + b"\n")
            process.stdin.flush()
            trying, how = _follow(read, time.monotonic() + task.seconds, trial_seconds, results, defaults)
            if how is None:
                how = _ending(process.wait(timeout=10), output)
        except (OSError, subprocess.TimeoutExpired) as error:
            how = f"{type(error).__name__}: {error}"
        finally:
            if process is not None:
                _kill(process)
            for pipe in filter(None, (read, write)):
                os.close(pipe)
    if trying is not None:
        results[trying[0]][trying[1]] = {"wrong": f"its process ended: {how}"}
    return how


def _follow(read: int, end: float, trial_seconds: float, results: dict[str, dict],
            defaults: dict[str, str]) -> tuple[list[str] | None, str | None]:
    """Note what a process reports, until it is finished, hangs or dies.

    Returns:
        What it was trying when it died, None otherwise; and how it ended: "" finished, None died, else in words.
    """
    trying, limit, rest = None, end, b""
    with selectors.DefaultSelector() as selector:
        selector.register(read, selectors.EVENT_READ)
        while selector.select(max(0, min(limit, end) - time.monotonic())):
            if not (data := os.read(read, 1 << 16)):
                return trying, None
            *lines, rest = (rest + data).split(b"\n")
            for line in map(json.loads, lines):
                if "finished" in line:
                    return None, ""
                if "default" in line:
                    defaults[line["operation"]] = line["default"]
                    results.setdefault(line["operation"], {})
                    continue
                operation, name = trying = line.pop("trying")
                limit = time.monotonic() + trial_seconds
                if line:
                    results[operation][name], trying, limit = line, None, end
    if time.monotonic() >= end:
        return None, "time is up"
    operation, name = trying
    results[operation][name] = {"wrong": f"it took more than {trial_seconds:.0f} s"}
    return None, "a trial hangs"


def _ending(code: int, output: Any) -> str:
    """Return in words how a process ended, with the last line it wrote."""
    output.seek(0)
    last = (output.read().decode(errors="replace").strip().splitlines() or [""])[-1][:200]
    how = f"exit code {code}"
    if code < 0:
        how = signal.Signals(-code).name
    return f"{how}, {last}" if last else how


def _kill(process: subprocess.Popen) -> None:
    """End a process and those that it started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        process.stdin.close()
        process.wait(timeout=10)


# ---- memory

def key_of(modules: Mapping[str, str], shape: TrainingShape, device: torch.device, dtype: torch.dtype,
           compiled: bool) -> str:
    """Return the name under which a result is remembered: another GPU, driver, version, kernel or shape has another."""
    source = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        source.update(path.read_bytes())
    about: dict[str, Any] = {"modules": sorted(modules.items()), "shape": asdict(shape), "dtype": str(dtype),
                             "compiled": compiled, "torch": torch.__version__, "cuda": torch.version.cuda,
                             "source": source.hexdigest(), "flash3": os.environ.get("NANOCHAT_FA3_HUB", "")}
    for package in ("triton", "flash_attn_interface", "flash_attn_3"):
        try:
            about[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            about[package] = importlib.util.find_spec(package) is not None
    if device.type == "cuda":
        try:
            driver = Path("/sys/module/nvidia/version").read_text().strip()
        except OSError:
            driver = ""
        about |= {"gpu": torch.cuda.get_device_name(device), "driver": driver}
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:24]


def _memory() -> Path:
    return base_dir() / "kernels.json"


def _recall(key: str) -> dict[str, Any] | None:
    """Return what `decide` found under this key, None where there is nothing that can be read."""
    try:
        return json.loads(_memory().read_text(encoding="utf-8"))[key]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _remember(key: str, found: dict[str, Any]) -> None:
    """Add a result to kernels.json. A folder that cannot be written to costs the memory, not the run."""
    try:
        known = json.loads(_memory().read_text(encoding="utf-8"))
        known = {name: value for name, value in known.items() if name != key}
    except (OSError, ValueError, AttributeError):
        known = {}
    newest = dict([*known.items(), (key, found)][-REMEMBERED:])
    try:
        with atomic_write(_memory(), "w") as file:
            file.write(to_json(newest, indent=1))
    except (OSError, UserError):
        pass
