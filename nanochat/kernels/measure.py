"""Check and time the implementations of operations, in a process of its own: `python -m nanochat.kernels.measure`.

nanochat/kernels/choose.py starts it, sends a `Task` as JSON on its standard input, and reads a line of JSON before and
after each trial. What a kernel does to this process (an illegal access, an abort, a loop without end) ends this process
and not the training run, which then knows by the last line whose fault it was.
"""

import json
import os
import signal
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from nanochat.kernels.dispatch import TrainingShape, Trial, default_backend, set_choice, state_fp_fusion

SMALL = ((1, 1), (2, 67), (3, 130))  # rows and tokens of the checks, beside one row of the training's length
FLUSH = 1 << 28  # bytes written between two timings: more than any L2 cache holds
WARM_UP, TIMINGS, SECONDS = 2, 15, 0.4  # runs before timing; timed runs and their seconds, at most


@dataclass(frozen=True)
class Task:
    """What to measure.

    operations: module of each operation, by name
    done: (operation, backend) not to try again
    shape, device, dtype, threads: of the training. compiled: whether torch.compile compiles the model's blocks
    seconds: this process ends itself after so many
    """

    operations: dict[str, str]
    done: list[tuple[str, str]]
    shape: TrainingShape
    device: str
    dtype: str
    compiled: bool
    threads: int
    seconds: float

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Task":
        fields = json.loads(text)
        return cls(**fields | {"shape": TrainingShape(**fields["shape"]), "done": [tuple(p) for p in fields["done"]]})


class Wrong(Exception):
    """An implementation's numbers are not those of the twin."""


def draw_with(device: torch.device, dtype: torch.dtype, seed: int) -> Callable[..., Tensor]:
    """Return the `draw` that a package's `trial` is given: the same numbers for the same seed."""
    torch.manual_seed(seed)

    def draw(*sizes: int, grad: bool = True, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(sizes, device=device, dtype=dtype).requires_grad_(grad)
    return draw


def random_gradient(y: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Return a random gradient of each result of a function that returns one or several."""
    return tuple(torch.randn_like(part) for part in (y if isinstance(y, tuple) else (y,)))


def results(function: Callable, args: tuple, dy: tuple[Tensor, ...] | None) -> list[Tensor]:
    """Return what a function returns for these arguments, and the gradients of those that require one.

    dy: the gradient of each result; None for ones.
    """
    leaves = [x for x in tree_leaves(args) if isinstance(x, Tensor) and x.requires_grad]
    with torch.set_grad_enabled(bool(leaves)):
        y = function(*args)
    ys = y if isinstance(y, tuple) else (y,)
    if not leaves:
        return list(ys)
    gradients = [torch.ones_like(part) for part in ys] if dy is None else [d.to(part.dtype) for d, part in zip(dy, ys)]
    return [*(part.detach() for part in ys), *torch.autograd.grad(ys, leaves, gradients)]


def wider(args: tuple) -> tuple:
    """Return the arguments in the precision of the reference: float32, or float64 for a float32 training."""
    exact = torch.float32 if any(isinstance(x, Tensor) and x.dtype in (torch.bfloat16, torch.float16)
                                 for x in tree_leaves(args)) else torch.float64

    def widened(x: Any) -> Any:
        if not isinstance(x, Tensor) or not x.is_floating_point():
            return x
        return x.detach().to(exact).requires_grad_(x.requires_grad)
    return tree_map(widened, args)


def check(got: list[Tensor], plain: list[Tensor], exact: list[Tensor], eps: float) -> None:
    """Raise Wrong where results are further from the exact ones than rounding explains.

    The yardstick is what the twin itself loses in the training's precision. A kernel rounds in other places and sums in
    another order: three times that, and one unit of rounding of a typical number, is allowed as the root mean square,
    which finds what is wrong everywhere; four times, and two units of the largest number, for a single element, which
    finds a wrong one at an edge. Where the exact result is zero, as the gradient of a softmax over one key, the unit is
    that of the largest result.

    Args:
        got, plain, exact: of the implementation, of the twin in the same precision, and of the twin in a wider one
        eps: of the training's dtype
    """
    def rms(x: Tensor) -> Tensor:
        return x.square().mean().sqrt()

    largest = max(rms(c.double()).item() for c in exact if c.numel())
    for i, (a, b, c) in enumerate(zip(got, plain, exact, strict=True)):
        what = "the result" if i == 0 else f"gradient {i}"
        if a.shape != c.shape:
            raise Wrong(f"{what} has the shape {tuple(a.shape)}, not {tuple(c.shape)}")
        if not a.numel():
            continue
        if not a.isfinite().all():
            raise Wrong(f"{what} is not finite")
        off, loss, c = (a.double() - c.double()).abs(), (b.double() - c.double()).abs(), c.double().abs()
        zero = rms(c).item() <= 1e-6 * largest
        for name, size, factor, units in (("on average", rms, 3, 1), ("at worst", Tensor.max, 4, 2)):
            unit = eps * (largest if zero else size(c).item())
            error, bound = size(off).item(), factor * size(loss).item() + units * unit
            if error > bound:
                raise Wrong(f"{what} is off by {error:.2g} {name}, where rounding explains {bound:.2g}")


class Reference(NamedTuple):
    """A trial at a small shape, the gradient of its result, and what the twin gives: in the same precision, and in a
    wider one."""

    trial: Trial
    dy: tuple[Tensor, ...]
    plain: list[Tensor]
    exact: list[Tensor]


def references(module: Any, task: Task, device: torch.device, dtype: torch.dtype) -> list[Reference]:
    """Return what an operation's implementations are compared with: small and ragged shapes, and one row of the
    training's length."""
    found = []
    for seed, (B, T) in enumerate((*SMALL, (1, task.shape.T))):
        shape = TrainingShape(**asdict(task.shape) | {"B": B, "T": T, "matrices": min(2, task.shape.matrices)})
        whole = module.trial(shape, draw_with(device, dtype, seed))
        for trial in (whole, *whole.also):
            exact_args = wider(trial.args)
            with torch.no_grad():
                given = random_gradient(trial.twin(*exact_args))
                dy = tuple(d.to(dtype) for d in given)  # so rounded that it is the same for all
            found.append(Reference(trial, dy, results(trial.twin, trial.args, dy), results(trial.twin, exact_args, dy)))
    return found


def check_small(references: list[Reference], dtype: torch.dtype) -> None:
    """Compare the chosen implementation with the twin. Raises Wrong."""
    for trial, dy, plain, exact in references:
        check(results(trial.function, trial.args, dy), plain, exact, torch.finfo(dtype).eps)


def synchronize(device: torch.device) -> None:
    """Wait for the device, so that its faults are known."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def milliseconds(run: Callable[[], object], device: torch.device) -> float:
    """Return the median time of a run, with a cold L2 cache where there is one."""
    for _ in range(WARM_UP):
        run()
    synchronize(device)
    times: list[float] = []
    began = time.perf_counter()
    if device.type != "cuda":
        while len(times) < TIMINGS and time.perf_counter() - began < SECONDS or not times:
            start = time.perf_counter()
            run()
            times.append(1e3 * (time.perf_counter() - start))
        return statistics.median(times)
    flush = torch.empty(FLUSH, dtype=torch.uint8, device=device)
    while len(times) < TIMINGS and time.perf_counter() - began < SECONDS or not times:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def time_it(trial: Trial, compiled: bool, device: torch.device, dtype: torch.dtype) -> dict[str, float | None]:
    """Time the chosen implementation, forward and backward, in the mode it will run in.

    Returns:
        ms: of a run. kept: bytes that forward allocates and keeps until backward; None on other devices than GPUs

    Raises:
        Wrong: compiled, it gives other numbers than in eager mode
    """
    function = trial.function
    if compiled:
        torch.compiler.reset()
        function = torch.compile(trial.function, dynamic=False, fullgraph=True)
    with torch.no_grad():
        y = trial.function(*trial.args)
    dy, kept = (random_gradient(y) if isinstance(y, tuple) or y.dim() else None), None
    if function is not trial.function:
        eager = results(trial.function, trial.args, dy)
        check(results(function, trial.args, dy), eager, eager, 4 * torch.finfo(dtype).eps)
        del eager
    if device.type == "cuda":
        del y
        before = torch.cuda.memory_allocated(device)
        y = function(*trial.args)
        kept = torch.cuda.memory_allocated(device) - before
    del y
    return {"ms": milliseconds(lambda: results(function, trial.args, dy), device), "kept": kept}


def trials(task: Task) -> Iterator[dict[str, Any]]:
    """Do the task. Yields {"operation", "default"} before an operation, {"trying": [operation, name]} before a trial,
    and after it the same with "ms" and "kept", or with "wrong": what is wrong with it in words."""
    device, dtype = torch.device(task.device), getattr(torch, task.dtype)
    state_fp_fusion()
    if task.compiled:  # so that the first trial is not charged with loading the compiler
        torch.compile(lambda x: x + 1)(torch.zeros(8, device=device))
    for operation, path in task.operations.items():
        module = import_module(path)
        set_choice({})
        trial = module.trial(task.shape, draw_with(device, dtype, 0))
        asked = trial.args if trial.asked is None else trial.asked
        compiled = task.compiled and trial.inside_blocks
        ready = [name for name, backend in module.BACKENDS.items() if backend.ready(*asked)
                 and not (compiled and name == "cpu")]  # the crate's kernels do not run under torch.compile
        default = default_backend(operation, {name: module.BACKENDS[name] for name in ready}, *asked, compiled=compiled)
        wanted = [name for name in ready if (operation, name) not in task.done] if len(ready) > 1 else []
        twin = references(module, task, device, dtype) if wanted else []
        yield {"operation": operation, "default": default}
        for name in wanted:
            about = [operation, name]
            yield {"trying": about}
            set_choice({operation: name})
            try:
                check_small(twin, dtype)
                result = time_it(trial, compiled, device, dtype)
                synchronize(device)
            except Exception as error:
                text = str(error).strip().splitlines() or [""]
                words = text[0] if isinstance(error, Wrong) else f"{type(error).__name__}: {text[0]}"
                yield {"trying": about, "wrong": words[:300]}
                synchronize(device)  # raises after a fault, from which this process cannot recover
            else:
                yield {"trying": about, **result}
        del trial, twin


def main() -> None:
    """Do the task on standard input, one line; write results, a line each, to the file descriptor NANOCHAT_MEASURE."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the training run ends this process
    task = Task.from_json(sys.stdin.readline())
    signal.alarm(int(task.seconds) + 1)  # ends this process whatever it is doing

    def follow() -> None:
        sys.stdin.read()  # ends when the training run does
        os._exit(1)
    threading.Thread(target=follow, daemon=True).start()
    torch.set_num_threads(task.threads)
    with open(int(os.environ["NANOCHAT_MEASURE"]), "w", encoding="utf-8") as out:
        for line in trials(task):
            print(json.dumps(line), file=out, flush=True)
        print(json.dumps({"finished": True}), file=out, flush=True)
        os._exit(0)


if __name__ == "__main__":
    main()
