"""What the benchmarks share: interleaved timing, peak memory, measured limits of the machine, models, batches, output.

Every benchmark prints a table, and writes its raw numbers with --json=PATH: command, date, commit, machine, versions,
configuration and rows (`write_results`). The files in bench/results/ are written so.
"""

import gc
import statistics
import sys
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from nanochat.cli import flag
from nanochat.files import atomic_write, to_json
from nanochat.gpt import GPT, GPTConfig
from nanochat.logs import commit, machine, versions

K = TypeVar("K")  # name of a case


# ---- time

def synchronize(device: torch.device) -> None:
    """Wait until the device has finished; a CPU always has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def seconds_of(fn: Callable[[], object], device: torch.device) -> float:
    """Wall-clock seconds of one call, until the device has finished."""
    synchronize(device)
    start = time.perf_counter()
    fn()
    synchronize(device)
    return time.perf_counter() - start


def interleaved(cases: dict[K, Callable[[], object]], device: torch.device, rounds: int, warmup: int = 2
                ) -> dict[K, list[float]]:
    """Time each case once a round, so that other load on the machine affects all cases alike.

    Args:
        cases: functions by name.
        device: that they run on.
        rounds: timed calls of each case.
        warmup: calls of each case before, which compile and allocate.

    Returns:
        Seconds of each call, by name.
    """
    for fn in cases.values():
        for _ in range(warmup):
            fn()
    seconds: dict[K, list[float]] = {name: [] for name in cases}
    for _ in range(rounds):
        for name, fn in cases.items():
            seconds[name].append(seconds_of(fn, device))
    return seconds


def median(values: Iterable[float]) -> float:
    """The median: one lucky or disturbed call does not change it."""
    return statistics.median(values)


def interleaved_kernels(cases: dict[K, Callable[[int], object]], device: torch.device, rounds: int, sets: int = 1,
                        least: float = 0.003) -> dict[K, list[float]]:
    """Time short calls, interleaved: each measurement is the mean of as many calls as take `least` seconds.

    On CUDA, events on the device measure the time. The device first waits until the host has queued all calls, so that
    the launch overhead of the host is left out.

    Args:
        cases: functions by name, called with the index of the set of inputs to use.
        device: that they run on.
        rounds: measurements of each case.
        sets: of inputs, used in turn, so that a cache does not hold the next inputs.
        least: seconds of one measurement.

    Returns:
        Seconds of a call in each measurement, by name.
    """
    calls, host_seconds = {}, {}
    for name, fn in cases.items():
        for number in range(max(2, sets)):  # warm-up: compiles and allocates
            fn(number % sets)
        synchronize(device)
        start = time.perf_counter()
        fn(0)
        host_seconds[name] = time.perf_counter() - start
        synchronize(device)
        calls[name] = max(1, min(100, round(least / max(time.perf_counter() - start, 1e-6))))
    seconds: dict[K, list[float]] = {name: [] for name in cases}
    for turn in range(rounds):
        for name, fn in cases.items():
            numbers = [(turn * calls[name] + i) % sets for i in range(calls[name])]
            if device.type == "cuda":
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                wait = min(0.2, 1.5 * host_seconds[name] * calls[name])
                torch.cuda._sleep(int(2e9 * wait))  # in cycles of a clock of about 2 GHz
                begin.record()
                for number in numbers:
                    fn(number)
                end.record()
                end.synchronize()
                whole = begin.elapsed_time(end) / 1000
            else:
                start = time.perf_counter()
                for number in numbers:
                    fn(number)
                synchronize(device)
                whole = time.perf_counter() - start
            seconds[name].append(whole / len(numbers))
    return seconds


def relative_error(a: Tensor, b: Tensor) -> float:
    """‖a − b‖ / ‖b‖ in float64; the two may be on different devices."""
    a, b = a.detach().double().cpu(), b.detach().double().cpu()
    return float((a - b).norm() / b.norm().clamp_min(1e-30))


# ---- memory

class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of the storages that operations allocate and that are still alive."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            inputs = {id(x.untyped_storage()) for x in (*args, *(kwargs or {}).values()) if isinstance(x, Tensor)}
            for x in result if isinstance(result, tuple | list) else (result,):
                if isinstance(x, Tensor) and id(x.untyped_storage()) not in inputs:
                    self._allocated(x.untyped_storage())
        return result

    def _allocated(self, storage: torch.UntypedStorage) -> None:
        if id(storage) not in self.seen:
            self.seen.add(id(storage))
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._freed, id(storage), storage.nbytes())

    def _freed(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.now -= size


def peak_growth(fn: Callable[[], object], device: torch.device) -> int | None:
    """Return the peak of live tensor bytes in one call minus those before it: activations, gradients, scratch.

    CUDA: the count of the allocator. CPU: the tensors that operations return; scratch within an operation and compiled
    code are not seen. None on other devices.
    """
    if device.type == "cuda":
        gc.collect()
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        fn()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    if device.type != "cpu":
        return None
    # our CPU kernels are not used under a dispatch mode, whose tensors may have no memory; this mode only counts
    with patch.object(torch._C, "_len_torch_dispatch_stack", lambda: 0), _LiveBytes() as live:
        fn()
    return live.peak


def nbytes(tensors: Iterable[Any]) -> int:
    """Bytes of the tensors among `tensors`."""
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))


# ---- limits of the machine

def copy_bandwidth(device: torch.device, size: int = 0) -> float:
    """Bytes a second of a copy in device memory, counting bytes read and bytes written; median of 7.

    size: bytes of the copy; 0 takes more than any cache holds.
    """
    size = size or (1 << 26 if device.type == "cpu" else 1 << 30)
    source = torch.randint(1 << 60, (size // 8,), device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    times = [seconds_of(lambda: [target.copy_(source) for _ in range(4)], device) / 4 for _ in range(7)]
    return 2 * size / median(times)


def matmul_flops(device: torch.device, dtype: torch.dtype, size: int = 8192) -> float:
    """FLOP/s of a product of two square random matrices; median of 7."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    for _ in range(2):
        a @ b
    return 2 * size ** 3 / median(seconds_of(lambda: a @ b, device) for _ in range(7))


# ---- models and data

def random_model(config: GPTConfig, device: torch.device | str, seed: int = 0) -> GPT:
    """A GPT without a zero matrix. A fresh GPT has some, and hardware can be faster on zeros than on real weights."""
    torch.manual_seed(seed)
    with torch.device(device), torch.no_grad():
        model = GPT(config)
        for p in model.parameters():
            if not p.any():
                p.normal_(std=0.5 * p.shape[-1] ** -0.5)
    return model


def random_batch(B: int, T: int, V: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """Inputs and targets (B, T), int64, uniform over V tokens: for timing, there is nothing to learn."""
    rows = torch.randint(V, (B, T + 1), generator=torch.Generator().manual_seed(0)).to(device)
    return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


def text_batches(B: int, T: int, device: torch.device | str, seed: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches (inputs, targets), each (B, T) int64: the bytes of small-world documents, so ids below 256.

    A model can learn them, and they need no files.
    """
    from nanochat.small_world import documents
    stream, text, need = documents(seed), bytearray(), B * (T + 1)
    while True:
        while len(text) < need:
            text += next(stream).encode() + b"\n"
        rows = torch.frombuffer(text[:need], dtype=torch.uint8).view(B, T + 1).to(device, torch.int64)
        del text[:need]
        yield rows[:, :-1], rows[:, 1:]


# ---- output

def table(headers: Sequence[str], rows: Iterable[Sequence[object]], left: Sequence[int] = (0,)) -> str:
    """A Markdown table with aligned columns. left: indices of the columns that are aligned left, not right."""
    cells = [[str(cell) for cell in row] for row in (headers, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells)]

    def line(row: Sequence[str]) -> str:
        aligned = (cell.ljust(w) if i in left else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths)))
        return f"| {' | '.join(aligned)} |"
    rule = "|" + "|".join("-" * (w + 1) + ("-" if i in left else ":") for i, w in enumerate(widths)) + "|"
    return "\n".join([line(cells[0]), rule, *map(line, cells[1:])])


def si(number: float | None, digits: int = 3) -> str:
    """A number with an SI prefix: 3.21K, 45.1M, 1.2G; a dash for None."""
    if number is None:
        return "-"
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "K")):
        if abs(number) >= size:
            return f"{number / size:.{digits}g}{letter}" if number < 1000 * size else f"{number / size:,.0f}{letter}"
    return f"{number:.{digits}g}"


def json_flag() -> str:
    """The flag --json of a benchmark."""
    return flag("", "file for the raw numbers, with command, date, commit, machine and versions")


def provenance(command: str) -> dict[str, Any]:
    """Where numbers come from: command, date (UTC), commit, CPU threads, machine and versions."""
    try:
        numpy = metadata.version("numpy")
    except metadata.PackageNotFoundError:
        numpy = "not installed"
    return {"command": command, "date": datetime.now(timezone.utc).isoformat(timespec="seconds"), "commit": commit(),
            "threads": torch.get_num_threads(), "machine": machine(), "versions": {**versions(), "numpy": numpy}}


def provenance_line(source: dict[str, Any]) -> str:
    """`provenance` in one line, for above a table."""
    where, used = source["machine"], source["versions"]
    gpus = f"{len(where['gpus'])} × {where['gpus'][0]}, " if where["gpus"] else ""
    return (f"`{source['command']}`, {gpus}{where['cpu']}, {source['threads']} of {where['cores']} cores, "
            f"torch {used['torch']}, Python {used['python']}, code {(source['commit'] or 'unknown')[:12]}")


def command_line(module: str, argv: Sequence[str] | None) -> str:
    """The command that started this benchmark."""
    import shlex
    return f"python -m {module} {shlex.join(sys.argv[1:] if argv is None else argv)}".strip()


def write_json(path: str | Path, data: Any) -> None:
    """Write `data` as JSON. The file appears complete, or not at all."""
    with atomic_write(path) as file:
        file.write(to_json(data, indent=1).encode())


def write_results(path: str, source: dict[str, Any], config: Any, rows: list[dict[str, Any]], **more: Any) -> None:
    """Write the raw numbers of a benchmark to the file that --json names. Does nothing without one.

    Args:
        path: the value of the flag; "" is none.
        source: from `provenance`.
        config: the flags, a dataclass.
        rows: the numbers, one dict for each case.
        more: further numbers that belong to no row.
    """
    if path:
        write_json(path, {**source, "config": asdict(config), "rows": rows, **more})
