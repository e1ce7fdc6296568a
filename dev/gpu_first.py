"""The first minutes of dev/gpu_check.py: does the machine have what a run needs, does a real training step work, do
collectives?

Like in dev/gpu_correctness.py, a section is a function of (Run, Report).
"""

import math
import os
import shutil
import subprocess
import sysconfig
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from bench.measure import random_batch
from dev.gpu_correctness import Report, Run, Skipped, largest, relative_error, small
from nanochat.distributed import Ranks, compute_dtype, peak_flops
from nanochat.gpt import GPT, GPTConfig
from nanochat.kernels.dispatch import launch
from nanochat.logs import machine, versions
from nanochat.optim import MuonAdamW, parameter_groups
from nanochat.training import train_step

NVIDIA_SMI = ("name", "driver_version", "memory.total", "memory.used", "power.limit", "clocks.sm", "clocks.max.sm",
              "clocks.mem", "clocks.max.mem", "temperature.gpu")


def environment(run: Run, out: Report) -> None:
    """The machine, its software and its state."""
    out.numbers |= {**versions(), **machine(), "cuda": torch.version.cuda,
                    "compute_dtype": str(compute_dtype(run.device)).removeprefix("torch.")}
    try:
        import triton
        out.numbers["triton"] = triton.__version__
    except ImportError:
        out.numbers["triton"] = None
    if run.device.type == "cuda":
        properties = torch.cuda.get_device_properties(run.device)
        out.numbers |= {"memory_bytes": properties.total_memory, "multiprocessors": properties.multi_processor_count,
                        "capability": f"{properties.major}.{properties.minor}"}
    if shutil.which("nvidia-smi") and run.device.type == "cuda":
        ask = ["nvidia-smi", f"--query-gpu={','.join(NVIDIA_SMI)}", "--format=csv,noheader"]
        done = subprocess.run(ask, capture_output=True, text=True, timeout=30)
        out.numbers["nvidia_smi"] = dict(zip(NVIDIA_SMI, map(str.strip, done.stdout.strip().split("\n")[0].split(","))))


def toolchain(run: Run, out: Report) -> None:
    """The driver, the headers, and Triton's launcher: what every kernel and torch.compile need before they can run."""
    if run.device.type != "cuda":
        raise Skipped("only a GPU needs them")
    out.expect("a C compiler (cc, gcc or clang)",
               any(shutil.which(name) for name in (os.environ.get("CC") or "cc", "gcc", "clang")))
    out.expect("Python.h, which Triton's launcher needs: apt-get install python3-dev",
               (Path(sysconfig.get_path("include")) / "Python.h").is_file())
    x = torch.arange(1000, device=run.device, dtype=torch.float32)
    out.expect("torch has code for this GPU: a kernel gives the right numbers", float((x * 2).sum()) == 999_000.0)
    import triton

    from dev.gpu_triton import doubled
    with tempfile.TemporaryDirectory() as fresh:  # an empty cache: the launcher is really built
        before = os.environ.get("TRITON_CACHE_DIR")
        os.environ["TRITON_CACHE_DIR"] = fresh
        try:
            y = torch.full_like(x, float("nan"))
            began = time.monotonic()
            launch(doubled, (triton.cdiv(len(x), 256),), x, y, len(x), BLOCK=256)
            out.expect("a Triton kernel is compiled, launched and right", torch.equal(y, 2 * x))
            out.numbers["triton_seconds"] = time.monotonic() - began
        finally:
            os.environ.pop("TRITON_CACHE_DIR") if before is None else os.environ.update({"TRITON_CACHE_DIR": before})


def first_step(run: Run, out: Report) -> None:
    """Real training steps of a d20, 32 rows of 2,048 tokens, eager and then compiled: finite, memory, milliseconds.

    On a GPU with too little memory for 32 rows, the largest half, quarter, ... of them that fits.
    """
    depth, rows, T, V = (2, 2, 32, 300) if run.tiny else (20, 32, 2048, 65536)
    torch.manual_seed(0)
    began = time.monotonic()
    with torch.device(run.device):
        model = GPT(GPTConfig.from_depth(depth, sequence_len=T, vocab_size=V))
    model.compute_dtype = compute_dtype(run.device)
    optimizer = MuonAdamW(parameter_groups(model), run.ranks)
    out.numbers |= {"dtype": str(model.compute_dtype), "model_seconds": time.monotonic() - began}
    while rows:
        out.numbers["rows"] = rows
        try:
            _steps(run, out, model, optimizer, rows, "eager", 2)
            if run.compiled:
                model.compile_blocks(rows, T)
                _steps(run, out, model, optimizer, rows, "compiled", 6)
            break
        except torch.OutOfMemoryError:
            out.numbers.setdefault("too_large", []).append(rows)
            optimizer.zero_grad()
            torch.cuda.empty_cache()
            rows //= 2
    out.expect("rows of a d20 that fit", rows, at_least=1)


def _steps(run: Run, out: Report, model: GPT, optimizer: MuonAdamW, rows: int, how: str, count: int) -> None:
    """Do some training steps on one batch; report the loss, seconds and memory of each."""
    T, V = model.config.sequence_len, model.config.vocab_size
    batch = random_batch(rows, T, V, run.device)
    on_gpu = run.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    losses, norms, seconds = [], [], []
    for _ in range(count):
        began = time.monotonic()
        loss, norm, *_ = train_step(model, optimizer, [batch], run.ranks, momentum=0.85, clip=1.0).tolist()
        losses.append(loss)
        norms.append(norm)
        seconds.append(time.monotonic() - began)
        out.numbers[how] = {"losses": losses, "norms": norms, "seconds": seconds}
        run.save()
    if how == "eager":
        out.expect("the loss of an untrained model is ln V", abs(losses[0] - math.log(V)), at_most=0.01)
    out.expect(f"{how}: every loss and gradient norm is finite", all(map(math.isfinite, losses + norms)))
    out.expect(f"{how}: the loss of one batch falls with every step, by at least", min(
        a - b for a, b in zip(losses, losses[1:])), at_least=0.0)
    best, peak = min(seconds), peak_flops(run.device, model.compute_dtype)
    speed = rows * T / best
    numbers: dict[str, Any] = {"tokens_per_second": speed,
                               "mfu": speed * model.flops_per_token() / peak if peak else None,
                               "memory": torch.cuda.max_memory_allocated() if on_gpu else None}
    out.numbers[how] |= numbers
    out.table([f"d{model.config.n_layer}, {rows} × {T}, {how}", "measured"],
              [["first step, s", f"{seconds[0]:.2f}"], ["best step, ms", f"{1000 * best:.1f}"],
               ["tokens/s", f"{speed:,.0f}"], ["MFU", f"{100 * numbers['mfu']:.1f}%" if peak else "-"],
               ["peak memory, GB", f"{numbers['memory'] / 1e9:.2f}" if on_gpu else "-"]])
    run.save()


def collectives(run: Run, out: Report) -> None:
    """The optimizer of several ranks through a real process group of this rank alone (NCCL on a GPU).

    Its weights must be those of the short cut that one process takes.
    """
    if dist.is_initialized():
        raise Skipped("a process group is open already")
    start = {name: p.detach().clone() for name, p in small(run, n_layer=3).named_parameters()}

    def after(ranks: Ranks) -> tuple[dict[str, torch.Tensor], list[float]]:
        model = small(run, n_layer=3)
        model.load_state_dict(start)
        optimizer, batch = MuonAdamW(parameter_groups(model), ranks), random_batch(4, 64, 331, run.device)
        stats = [train_step(model, optimizer, [batch, batch], ranks, momentum=0.9, clip=1.0) for _ in range(3)]
        state = optimizer.state_dict() or {}
        weights = {name: p.detach().clone() for name, p in model.named_parameters()}
        return weights | {f"{name} {key}": value for name, entry in state.items() for key, value in entry.items()
                          if torch.is_tensor(value)}, torch.stack(stats).flatten().tolist()

    torch.manual_seed(0)
    plain, plain_stats = after(run.ranks)
    torch.manual_seed(0)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        on_gpu = run.device.type == "cuda"
        dist.init_process_group("nccl" if on_gpu else "gloo", init_method=f"file://{folder}/store", rank=0,
                                world_size=1, device_id=run.device if on_gpu else None)
        try:
            x = torch.arange(1 << 20, device=run.device, dtype=torch.float32)
            y = x.clone()
            dist.all_reduce(y)
            out.expect("an all-reduce of one rank changes nothing", torch.equal(x, y))
            out.numbers["first_collective_seconds"] = time.monotonic() - began
            run.save()
            forced = Ranks(0, 0, 1, run.device, collectives=True)
            got, stats = after(forced)
        finally:
            dist.destroy_process_group()
    out.expect("weights and optimizer state, largest relative error to the short cut's",
               largest(relative_error(got[name], plain[name]) for name in plain if plain[name].numel()), at_most=2e-3)
    out.expect("loss, gradient norm, tokens, largest difference",
               largest(abs(a - b) for a, b in zip(stats, plain_stats)), at_most=1e-3)
