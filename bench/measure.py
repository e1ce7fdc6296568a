"""What the benchmarks share: side-by-side timing, peak memory, measured ceilings, models and text to time with, tables."""

import gc
import statistics
import sys
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from nanochat.files import atomic_write, to_json
from nanochat.gpt import GPT, GPTConfig
from nanochat.logs import commit, machine, versions

K = TypeVar("K")  # what a case is called


def synchronize(device: torch.device) -> None:
    """Wait for the device; a CPU has nothing to wait for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def seconds_of(fn: Callable[[], object], device: torch.device) -> float:
    """Wall seconds of one call, from an idle device to an idle device."""
    synchronize(device)
    start = time.perf_counter()
    fn()
    synchronize(device)
    return time.perf_counter() - start


def interleaved(cases: dict[K, Callable[[], object]], device: torch.device, rounds: int, warmup: int = 2) -> dict[K, list[float]]:
    """Time each case `rounds` times, in turn, so that what else the machine does falls on all alike; returns seconds by name.

    `warmup` calls of each come before: compilation and first allocations stay out.
    """
    for fn in cases.values():
        for _ in range(warmup):
            fn()
    seconds: dict[K, list[float]] = {name: [] for name in cases}
    for _ in range(rounds):
        for name, fn in cases.items():
            seconds[name].append(seconds_of(fn, device))
    return seconds


def typical(seconds: Iterable[float]) -> float:
    """The median: neither one lucky call nor one that another program stood in the way of."""
    return statistics.median(seconds)


def paced(cases: dict[K, Callable[[int], object]], device: torch.device, rounds: int, sets: int = 1, least: float = 0.003
          ) -> dict[K, list[float]]:
    """Seconds of one call of each case: `rounds` measurements each, in turns, every one the mean of as many calls as take `least` seconds.

    A call is given the number of the set of inputs it is to take; they go round, so that a cache does not hold what comes next. CUDA: times
    are those of the device between two events, behind a wait that lets the host get ahead: what the host needs for a launch is left out.
    """
    calls, ahead = {}, {}
    for name, fn in cases.items():
        for number in range(max(2, sets)):  # compilation and first allocations stay out
            fn(number % sets)
        synchronize(device)
        start = time.perf_counter()
        fn(0)
        ahead[name] = time.perf_counter() - start
        synchronize(device)
        calls[name] = max(1, min(100, round(least / max(time.perf_counter() - start, 1e-6))))
    seconds: dict[K, list[float]] = {name: [] for name in cases}
    for turn in range(rounds):
        for name, fn in cases.items():
            numbers = [(turn * calls[name] + i) % sets for i in range(calls[name])]
            if device.type == "cuda":
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                torch.cuda._sleep(int(2e9 * min(0.2, 1.5 * ahead[name] * calls[name])))  # cycles, of a clock of about 2 GHz
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


def off(a: Tensor, b: Tensor) -> float:
    """‖a − b‖ / ‖b‖ in float64, wherever the two lie."""
    a, b = a.detach().double().cpu(), b.detach().double().cpu()
    return float((a - b).norm() / b.norm().clamp_min(1e-30))


class _Alive(TorchDispatchMode):
    """Counts the bytes of the storages that operations make, from their making to their end."""

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
                    self._made(x.untyped_storage())
        return result

    def _made(self, storage: torch.UntypedStorage) -> None:
        if id(storage) not in self.seen:
            self.seen.add(id(storage))
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._gone, id(storage), storage.nbytes())

    def _gone(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.now -= size


def peak_growth(fn: Callable[[], object], device: torch.device) -> int | None:
    """Bytes of tensors alive at the peak of one call beyond those alive before it: activations, gradients, scratch.

    CUDA: the allocator's own count. CPU: the tensors that operations return (their private scratch is not seen; nothing in compiled
    code is). None on other devices.
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
    # our kernels for CPUs keep away from such modes, whose tensors may be no real ones; this one only counts
    with patch.object(torch._C, "_len_torch_dispatch_stack", lambda: 0), _Alive() as alive:
        fn()
    return alive.peak


def nbytes(tensors: Iterable[Any]) -> int:
    """Bytes of the tensors among `tensors`."""
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))


# --- ceilings ----------------------------------------------------------------------------------------------------------

def copy_bandwidth(device: torch.device, size: int = 0) -> float:
    """Bytes a second of a copy within the device's memory, bytes read and bytes written counted; median of 7.

    size: bytes of the copy, beyond any cache where left out.
    """
    size = size or (1 << 26 if device.type == "cpu" else 1 << 30)
    source = torch.randint(1 << 60, (size // 8,), device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    times = [seconds_of(lambda: [target.copy_(source) for _ in range(4)], device) / 4 for _ in range(7)]
    return 2 * size / typical(times)


def matmul_flops(device: torch.device, dtype: torch.dtype, size: int = 8192) -> float:
    """FLOP/s of a square matrix product on random numbers; median of 7."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    for _ in range(2):
        a @ b
    return 2 * size ** 3 / typical(seconds_of(lambda: a @ b, device) for _ in range(7))


# --- models and data ---------------------------------------------------------------------------------------------------

def lively(config: GPTConfig, device: torch.device | str, seed: int = 0) -> GPT:
    """A GPT with every weight away from zero: fresh ones have zero matrices, on which hardware can be faster than in earnest."""
    torch.manual_seed(seed)
    with torch.device(device), torch.no_grad():
        model = GPT(config)
        for p in model.parameters():
            if not p.any():
                p.normal_(std=0.5 * p.shape[-1] ** -0.5)
    return model


def random_batch(B: int, T: int, V: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """Inputs and targets (B, T), int64, drawn evenly from V tokens: to time with, nothing to learn."""
    rows = torch.randint(V, (B, T + 1), generator=torch.Generator().manual_seed(0)).to(device)
    return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


def text_batches(B: int, T: int, device: torch.device | str, seed: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches (inputs, targets), each (B, T) int64: bytes of small-world documents, so ids are below 256. Learnable, no files."""
    from nanochat.small_world import documents
    stream, text, need = documents(seed), bytearray(), B * (T + 1)
    while True:
        while len(text) < need:
            text += next(stream).encode() + b"\n"
        rows = torch.frombuffer(text[:need], dtype=torch.uint8).view(B, T + 1).to(device, torch.int64)
        del text[:need]
        yield rows[:, :-1], rows[:, 1:]


# --- what is said ------------------------------------------------------------------------------------------------------

def table(headers: Sequence[str], rows: Iterable[Sequence[object]], left: Sequence[int] = (0,)) -> str:
    """A markdown table with aligned columns: those numbered in `left` to the left, the others to the right."""
    cells = [[str(cell) for cell in row] for row in (headers, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells)]

    def line(row: Sequence[str]) -> str:
        return "| " + " | ".join(cell.ljust(w) if i in left else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths))) + " |"
    rule = "|" + "|".join("-" * (w + 1) + ("-" if i in left else ":") for i, w in enumerate(widths)) + "|"
    return "\n".join([line(cells[0]), rule, *map(line, cells[1:])])


def si(number: float | None, digits: int = 3) -> str:
    """A number for people: 3.21K, 45.1M, 1.2G; a dash where there is none."""
    if number is None:
        return "-"
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "K")):
        if abs(number) >= size:
            return f"{number / size:.{digits}g}{letter}" if number < 1000 * size else f"{number / size:,.0f}{letter}"
    return f"{number:.{digits}g}"


def circumstances(command: str) -> dict[str, Any]:
    """What a measurement is worth nothing without: the command, the code, the versions, the machine."""
    return {"command": command, "commit": commit(), **versions(), "threads": torch.get_num_threads(), "machine": machine()}


def in_a_line(about: dict[str, Any]) -> str:
    """The circumstances in one line."""
    where = about["machine"]
    gpus = f"{len(where['gpus'])} × {where['gpus'][0]}, " if where["gpus"] else ""
    return (f"`{about['command']}`, {gpus}{where['cpu']}, {about['threads']} of {where['cores']} cores, torch {about['torch']}, "
            f"Python {about['python']}, code {(about['commit'] or 'unknown')[:12]}")


def command_line(module: str, argv: Sequence[str] | None) -> str:
    """The command that gave this run."""
    import shlex
    return f"python -m {module} {shlex.join(sys.argv[1:] if argv is None else argv)}".strip()


def write_json(path: str | Path, data: Any) -> None:
    """Write `data` as JSON, whole or not at all."""
    with atomic_write(path) as file:
        file.write(to_json(data, indent=1).encode())
