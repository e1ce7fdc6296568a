"""The measurements of dev/gpu_check.py: how fast, against what the device can do, hybrid beside all-attention.

Like in dev/gpu_correctness.py, a section is a function of (Run, Report). Each checks the time left before a long
measurement.
"""

import gc
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from bench import decode
from bench.measure import copy_bandwidth, interleaved, matmul_flops, median, random_batch, random_model, seconds_of, si
from bench.train import our_case
from dev.gpu_correctness import Report, Run, Skipped, setting, syncs
from nanochat.distributed import compute_dtype, peak_flops
from nanochat.gpt import GPT, GPTConfig
from nanochat.loading import ready_to_decode

STEP_TOKENS = 524_288  # of the published recipe; tokens/s are those of one device that does such steps


def clean(run: Run) -> None:
    """Free what the last model held, and reset the compiler.

    With too many variants of a function compiled, torch stops compiling it.
    """
    gc.collect()
    if run.compiled:
        torch._dynamo.reset()
    if run.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def ceilings(run: Run, out: Report) -> None:
    """What the device reaches at best on random data: a copy (bytes read and written), a large matrix product."""
    size, side = (1 << 22, 256) if run.tiny else (1 << 32, 8192)
    numbers = out.numbers
    numbers["copy_bandwidth"] = copy_bandwidth(run.device, size)
    numbers["matmul_bfloat16"] = matmul_flops(run.device, torch.bfloat16, side)
    numbers["matmul_float32"] = matmul_flops(run.device, torch.float32, side // 2)
    numbers["data_sheet"] = peak_flops(run.device, torch.bfloat16) if run.device.type == "cuda" else None
    names = {"copy_bandwidth": "copy, bytes/s", "matmul_bfloat16": "bfloat16 matmul, FLOP/s",
             "matmul_float32": "float32 matmul, FLOP/s",
             "data_sheet": "bfloat16 by the data sheet, FLOP/s"}
    out.table(["ceiling", "measured"], [[name, si(numbers[key])] for key, name in names.items()])
    clean(run)


# --- training ---------------------------------------------------------------------------------------------------------

def train_once(run: Run, depth: int, kind: str, compiled: bool, batches: tuple[int, ...],
               rounds: int = 5) -> dict[str, Any]:
    """Time training of one model at the largest of `batches` that fits.

    One micro-batch a step is timed; numbers are then scaled to steps of STEP_TOKENS.
    """
    T, V = (32, 300) if run.tiny else (2048, 65536)
    shape = GPTConfig.from_depth(depth, sequence_len=T, vocab_size=V,
                                 layer_pattern="A" * depth if kind == "attention" else None)
    row: dict[str, Any] = {"model": f"d{depth} {kind}", "compiled": compiled, "too_large": []}
    for B in batches:
        clean(run)
        try:
            return {**row, **_time_training(run, shape, B, compiled, rounds)}
        except torch.OutOfMemoryError:
            row["too_large"].append(B)
    return row


def _time_training(run: Run, shape: GPTConfig, B: int, compiled: bool, rounds: int) -> dict[str, Any]:
    T = shape.sequence_len
    batch = random_batch(B, T, shape.vocab_size, run.device)
    if run.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    case = our_case("", shape, batch, run.ranks, compute_dtype(run.device), compiled)
    first = seconds_of(case.step, run.device)
    seconds = interleaved({"step": case.step, "pass": case.forward_backward}, run.device, rounds)
    step, passing = median(seconds["step"]), median(seconds["pass"])
    peak = peak_flops(run.device, case.dtype)
    # gradient accumulation, then the optimizer once
    whole = max(1, STEP_TOKENS // (B * T)) * passing + max(0.0, step - passing)
    speed = max(STEP_TOKENS, B * T) / whole
    return {"batch": B, "first_seconds": first, "pass_seconds": passing, "optimizer_seconds": max(0.0, step - passing),
            "seconds": seconds,
            "tokens_per_second": speed, "pass_tokens_per_second": B * T / passing,
            "mfu": speed * case.flops_per_token / peak if peak else None,
            "memory": torch.cuda.max_memory_allocated() if run.device.type == "cuda" else None}


def _training(run: Run, out: Report, jobs: list[tuple[int, str, bool]]) -> None:
    """Time the jobs that there is time for; ratios are against all-attention of the same depth, compiled alike."""
    rows = out.numbers.setdefault("rows", [])
    longest = 0.0
    for depth, kind, compiled in jobs:
        if run.left() < 1.5 * longest + 10:
            out.numbers.setdefault("left_out", []).append(f"d{depth} {kind} {'compiled' if compiled else 'eager'}")
            continue
        began = time.monotonic()
        rows.append(train_once(run, depth, kind, compiled, (2, 1) if run.tiny else (32, 16, 8)))
        longest = max(longest, time.monotonic() - began)
    lines, found = [], {(row["model"], row["compiled"]): row for row in rows}
    for row in rows:
        other = found.get((row["model"].replace("hybrid", "attention"), row["compiled"]), {})
        how = "compiled" if row["compiled"] else "eager"
        if "batch" not in row:
            lines.append([row["model"], how, "none fits", *["-"] * 6])
            continue
        lines.append([row["model"], how, row["batch"], si(row["tokens_per_second"]),
                      f"{row['tokens_per_second'] / other['tokens_per_second']:.2f}×" if "batch" in other else "-",
                      f"{100 * row['mfu']:.1f}%" if row["mfu"] else "-", f"{1000 * row['pass_seconds']:.1f}",
                      f"{1000 * row['optimizer_seconds']:.1f}",
                      f"{row['memory'] / 1e9:.1f} GB" if row["memory"] else "-"])
    out.table(["training", "how", "batch", "tok/s", "vs attention", "MFU", "fwd+bwd ms", "optimizer ms", "peak memory"],
              lines, (0, 1))
    if "left_out" in out.numbers:
        out.tables.append(f"No time was left for: {', '.join(out.numbers['left_out'])}.")
    clean(run)


def training(run: Run, out: Report) -> None:
    """The d20 step, hybrid and all-attention: rows of 2048, the largest of 32, 16, 8 rows that fits."""
    _training(run, out, [(2 if run.tiny else 20, kind, run.compiled) for kind in ("hybrid", "attention")])
    hybrid, attention = (next((row for row in out.numbers["rows"] if row["model"].endswith(kind) and "batch" in row),
                              {})
                         for kind in ("hybrid", "attention"))
    speed, other, memory = hybrid.get("tokens_per_second"), attention.get("tokens_per_second"), hybrid.get("memory")
    out.goal("training d20: tokens/s", speed, at_least=190_000)
    out.goal("training d20: MFU, attention counted causally", hybrid.get("mfu"), at_least=0.55)
    out.goal("training d20: speed over all-attention", speed / other if speed and other else None, at_least=1.25)
    out.goal("training d20: GB of memory with 32 rows of 2048",
             memory / 1e9 if memory and hybrid["batch"] == 32 else None, at_most=72)


def training_more(run: Run, out: Report) -> None:
    """The d12 step, and both depths without compilation."""
    if run.tiny:
        raise Skipped("the tiny shape was timed above")
    hows = [(12, True), (20, False), (12, False)] if run.compiled else [(12, False)]
    _training(run, out, [(depth, kind, how) for depth, how in hows for kind in ("hybrid", "attention")])


def kernels(run: Run, out: Report) -> None:
    """Where the time of a d20 hybrid step goes: the device's kernels by their total time."""
    if run.device.type != "cuda":
        raise Skipped("the kernels of a GPU")
    T, depth, V = (32, 2, 300) if run.tiny else (2048, 20, 65536)
    shape = GPTConfig.from_depth(depth, sequence_len=T, vocab_size=V)
    batch = random_batch(2 if run.tiny else 16, T, V, run.device)
    case = our_case("", shape, batch, run.ranks, compute_dtype(run.device), run.compiled)
    for _ in range(3):
        case.step()
    from torch.profiler import ProfilerActivity, profile
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        whole = seconds_of(case.step, run.device)
    found = sorted(profiler.key_averages(), key=lambda e: -e.self_device_time_total)
    busy = sum(e.self_device_time_total for e in found) / 1e6
    out.numbers |= {"step_seconds": whole, "busy_seconds": busy,
                    "kernels": [{"name": e.key, "calls": e.count, "seconds": e.self_device_time_total / 1e6}
                                for e in found[:60]]}
    out.table(["kernel", "calls", "ms", "of the step"],
              [[e.key[:70].replace("|", "/"), e.count, f"{e.self_device_time_total / 1000:.2f}",
                f"{e.self_device_time_total / 1e4 / whole:.1f}%"] for e in found[:20]])
    clean(run)


# --- decoding ---------------------------------------------------------------------------------------------------------

def decoding(run: Run, out: Report) -> None:
    """d20 through the engine, greedily: 1 row and 64, with CUDA graphs and without, hybrid and all-attention; prefill
    of 2048.

    The goals of decoding are for a GPU of 4.8 TB/s by the data sheet, whose copies reach 4.3; elsewhere they scale with
    the copy bandwidth.
    """
    depth, V, context, new = (2, 300, 16, 4) if run.tiny else (20, 65536, 2048, 48)
    many, short = (4, 2) if run.tiny else (64, 128)
    bandwidth = copy_bandwidth(run.device, 1 << 22 if run.tiny else 1 << 32)
    rows = out.numbers.setdefault("rows", [])
    fixed = (1, short, True), (many, context, True)
    for kind, cases in (("hybrid", (*fixed, (1, context, True), (1, short, False), (many, context, False))),
                        ("attention", fixed)):
        clean(run)
        pattern = "A" * depth if kind == "attention" else None
        shape = GPTConfig.from_depth(depth, sequence_len=2 * context, vocab_size=V, layer_pattern=pattern)
        model = ready_to_decode(random_model(shape, run.device))
        for B, prompt, graphs in cases:
            if rows and run.left() < 15:
                out.numbers.setdefault("left_out", []).append(f"{kind}, {B} rows behind {prompt} tokens")
                continue
            rows.append(_decode_row(model, f"d{depth} {kind}", B, prompt, new, bandwidth, graphs))
        del model
    out.table(["decoding", "steps", "batch", "context", "tok/s", "of the bandwidth", "prefill tok/s", "state"],
              [[row["model"], "fixed" if row["graphs"] else "ordinary", row["batch"], row["context"],
                si(row["tokens_per_second"]),
                f"{100 * row['of_the_bandwidth']:.0f}%", si(row["prefill_tokens_per_second"]),
                si(row["state_bytes"]) + "B"]
               for row in rows], (0, 1))
    found = {(row["model"].split()[1], row["batch"], row["context"], row["graphs"]): row["tokens_per_second"]
             for row in rows}
    scale, one, all = bandwidth / 4.3e12, found.get(("hybrid", *fixed[0])), found.get(("hybrid", *fixed[1]))
    out.goal("decoding d20, one row: tokens/s", one, at_least=3_500 * scale)
    out.goal(f"decoding d20, {many} rows behind {context} tokens: tokens/s", all, at_least=35_000 * scale)
    out.goal("prefill d20 of 2048 tokens: tokens/s",
             max(row["prefill_tokens_per_second"] for row in rows if row["context"] == context),
             at_least=500_000)
    clean(run)


def _decode_row(model: GPT, name: str, B: int, prompt: int, new: int, bandwidth: float, graphs: bool) -> dict[str, Any]:
    seconds = median(decode.decode_seconds(model, B, prompt, new, graphs))
    rows = min(B, 8)  # a server does not prefill 64 prompts at once
    prefill = median(decode.prefill_seconds(model, rows, prompt))
    return {"model": name, "batch": B, "context": prompt, "graphs": graphs, "tokens_per_second": B / seconds,
            "step_seconds": seconds,
            "of_the_bandwidth": decode.step_bytes(model, B, prompt + new // 2) / bandwidth / seconds,
            "prefill_batch": rows, "prefill_tokens_per_second": rows * prompt / prefill,
            "state_bytes": decode.cache_bytes(model, B, prompt + new)}


# --- loader -----------------------------------------------------------------------------------------------------------

def loader(run: Run, out: Report) -> None:
    """Packed rows on the device: those of the CPU, fast, without waiting (needs pyarrow and our rustbpe)."""
    try:
        import pyarrow  # noqa: F401

        import rustbpe  # noqa: F401
    except ImportError as error:
        raise Skipped(f"{error.name} is not here") from error
    from nanochat.dataloader import PackedLoader, TextSource
    from nanochat.dataset.importing import make_small_world
    from nanochat.distributed import Ranks
    from nanochat.small_world import documents
    from nanochat.tokenizer import RustBPETokenizer
    B, T, docs, count = (2, 32, 200, 4) if run.tiny else (32, 2048, 20_000, 12)
    with tempfile.TemporaryDirectory() as base, setting("NANOCHAT_BASE_DIR", base):
        folder = Path(base) / "text"
        make_small_world(folder, docs, say=lambda text: None)
        stream = documents()
        tokenizer = RustBPETokenizer.train_from_iterator((next(stream) for _ in range(200)), 300 if run.tiny else 2048)
        mine = PackedLoader(TextSource(tokenizer, "train", folder), B, T, ranks=run.ranks)
        theirs = PackedLoader(TextSource(tokenizer, "train", folder), B, T, ranks=Ranks(0, 0, 1, torch.device("cpu")))
        try:
            same = all(torch.equal(a.cpu(), b) for _ in range(3) for a, b in zip(next(mine), next(theirs)))
            out.expect("rows on the device are the CPU's", same)
            seconds = seconds_of(lambda: [next(mine) for _ in range(count)], run.device)
            if run.device.type == "cuda":
                out.expect("times the host waits for a batch", len(syncs(lambda: next(mine))), at_most=0)
        finally:
            mine.close()
            theirs.close()
    out.numbers |= {"tokens_per_second": B * T * count / seconds, "cores": os.cpu_count()}
    out.table(["loader", "tok/s"], [["packed rows onto the device", si(out.numbers["tokens_per_second"])]])


def brief(numbers: dict[str, Any]) -> str:
    """The plain numbers and words of a section in one line; "" where it has none."""
    plain = {key: value for key, value in numbers.items() if isinstance(value, str | int | float) or value is None
             or key.endswith("syncs")
             or key == "nvidia_smi"}
    return json.dumps(plain, ensure_ascii=False) if plain else ""
