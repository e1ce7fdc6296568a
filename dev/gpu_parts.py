"""The measurements of dev/gpu_check.py on single parts: kernels, the head, evaluation, and whether 8 bits would pay.

Like in dev/gpu_correctness.py, a section is a function of (Run, Report). All shapes are those of a d20 with rows of
2048.
"""

import tempfile
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import eval as evaluation_bench
from bench import kernels
from bench.measure import interleaved_kernels, median, relative_error
from dev.gpu_correctness import Report, Run, Skipped, setting
from dev.gpu_speed import clean
from nanochat.distributed import compute_dtype
from nanochat.gpt import GPTConfig
from nanochat.kernels.choose import choose, parse_wish
from nanochat.kernels.dispatch import TrainingShape
from nanochat.kernels.fp8 import ACTIVATION, GRADIENT, REAL, product, rounded, scale_of
from nanochat.tokenizer.tokenizer import _rustbpe


def shape_of(run: Run, B: int = 32) -> kernels.Shape:
    """Return the shapes of a d20 step of B rows of 2048, or small ones where the run asks for that."""
    depth, B, T, rows = (2, 2, 32, 3) if run.tiny else (20, B, 2048, 64)
    model = GPTConfig.from_depth(depth, sequence_len=T, vocab_size=300 if run.tiny else 65536)
    return kernels.Shape(model, B, T, rows, compute_dtype(run.device), run.device)


def _operations(run: Run, out: Report, names: Sequence[str], B: int = 32) -> list[dict[str, Any]]:
    """Time these operations in all their ways; a wrong number of ours fails the check."""
    clean(run)
    rows = out.numbers.setdefault("rows", [])
    for name in names:
        if rows and run.left() < 25:
            out.numbers.setdefault("left_out", []).append(name)
            continue
        found, ceilings = kernels.measured(shape_of(run, B), [name], 3 if run.tiny else 9, run.compiled, run.tiny)
        out.numbers |= ceilings
        rows += found
        clean(run)
    out.tables.append(kernels.shown(rows))
    wrong = out.numbers["too_far"] = kernels.too_far(rows, shape_of(run).dtype)
    out.expect(f"errors of ours beyond three times the twin's{': ' if wrong else ''}{'; '.join(wrong)}", len(wrong),
               at_most=0)
    return rows


def slc2_speed(run: Run, out: Report) -> None:
    """The core of SLC2: forward, backward, and a decode step of 64 rows."""
    rows = _operations(run, out, ["slc2 core", "slc2 step"])
    for number, way in enumerate(("forward", "backward")):
        seconds = {row["how"]: row["seconds"] for row in rows if (row["operation"], row["pass"]) == ("slc2 core", way)}
        mine = min((row for row in rows if (row["operation"], row["pass"]) == ("slc2 core", way)
                    and row["how"].startswith("ours")),
                   key=lambda row: row["seconds"])
        compiled = seconds.get(kernels.COMPILED)
        out.goal(f"SLC2 core, {way}: of the measured copy bandwidth", mine["of_the_copy"],
                 at_least=(0.80, 0.65)[number])
        out.goal(f"SLC2 core, {way}: speed over torch.compile of the twin",
                 compiled / mine["seconds"] if compiled else None, at_least=1.15)


def head_speed(run: Run, out: Report) -> None:
    """The head and the loss of 16 rows, beside the twin, its compilation, and Liger's loss where it is installed."""
    rows = _operations(run, out, [kernels.HEAD], B=16)
    found = {row["how"]: row for row in rows if row["pass"] == "training"}
    ours, twin = found["ours"], found[kernels.TWIN]
    out.goal("head and loss, training: of the FLOPs of a large product", ours.get("of_the_product"), at_least=0.8)
    fraction = ours["memory"] / twin["memory"] if ours.get("memory") and twin.get("memory") else None
    out.goal("head and loss, training: peak memory over the plain one's", fraction, at_most=0.25)


def kernel_table(run: Run, out: Report) -> None:
    """All other operations."""
    _operations(run, out, [name for name in kernels.OPERATIONS if not name.startswith("slc2")], B=16)


def choice(run: Run, out: Report) -> None:
    """What a d20 run on this device would choose: every implementation checked and timed, as base_train does it."""
    config = shape_of(run).model
    shape = TrainingShape(B=2 if run.tiny else 32, T=config.sequence_len, E=config.n_embd, H=config.n_head,
                          G=config.n_kv_head, D=config.n_embd // config.n_head, K=config.n_kernel, V=config.vocab_size,
                          matrices=config.n_layer)
    with tempfile.TemporaryDirectory() as fresh, setting("NANOCHAT_BASE_DIR", fresh):  # nothing is remembered
        found = choose(parse_wish("measure"), shape, run.device, compute_dtype(run.device), run.compiled)
    out.numbers |= {"chosen": dict(found.chosen), "milliseconds": found.milliseconds, "left_out": found.left_out,
                    "problem": found.problem, "seconds": found.seconds}
    out.table(["operation", "implementation", "ms", "taken"],
              [[operation, name, f"{ms:.3f}", "yes" if found.chosen.get(operation) == name else ""]
               for operation, times in found.milliseconds.items() for name, ms in times.items()], (0, 1, 3))
    if found.left_out:
        out.table(["left out", "why"], [[name, why] for name, why in found.left_out.items()], (0, 1))
    out.expect("operations that something was chosen for", len(found.chosen), at_least=1)


# --- evaluation -------------------------------------------------------------------------------------------------------

def evaluation(run: Run, out: Report) -> None:
    """bench.eval: bits per byte beside the twin; CORE and written answers too, where our rustbpe is built."""
    clean(run)
    given = {"depth": 1, "vocab_size": 300, "max_seq_len": 16, "device_batch_size": 2, "max_per_task": 3, "problems": 2,
             "max_tokens": 3,
             "rounds": 1} if run.tiny else {"depth": 20, "vocab_size": 65536, "max_seq_len": 2048,
                                            "device_batch_size": 8, "max_tokens": 64}
    parts = evaluation_bench.PARTS if _rustbpe() is not None and not run.tiny else ("bpb",)
    out.numbers["rows"] = rows = evaluation_bench.compare(evaluation_bench.Config(**given), parts, run.ranks)
    out.tables.append(evaluation_bench.format_rows(rows))
    clean(run)


# --- 8 bits -----------------------------------------------------------------------------------------------------------

Eight = tuple[Tensor, Tensor, Tensor]  # of `quantised`


def quantised(x: Tensor, dtype: torch.dtype) -> Eight:
    """Return x in 8 bits with one scale, the same transposed (both contiguous), and the scale."""
    scale = scale_of(x, dtype)
    small = rounded(x, scale, dtype)
    return small, small.t().contiguous(), scale


def linear_in_8_bits(x: Eight, w: Eight, dy: Eight) -> tuple[Tensor, Tensor, Tensor]:
    """Return y, dx, dw of y = x @ w.T, x (M, K), w (N, K), dy (M, N); gradients are summed precisely, as is usual."""
    (x8, x8_t, x_s), (w8, w8_t, w_s), (d8, d8_t, d_s) = x, w, dy
    return (product(x8, w8, x_s * w_s, torch.bfloat16, REAL, fast=True),
            product(d8, w8_t, d_s * w_s, torch.bfloat16, REAL), product(d8_t, x8_t, d_s * x_s, torch.bfloat16, REAL))


def fp8(run: Run, out: Report) -> None:
    """The two matrices of the MLP, forward and backward: bfloat16 beside 8 bits with one scale a tensor.

    8 bits are timed as casts alone, products alone, and both.
    """
    if run.device.type == "cuda" and torch.cuda.get_device_capability(run.device) < (8, 9):
        raise Skipped("no products of 8 bits on this GPU")
    tokens, E = (64, 32) if run.tiny else (65536, 1280)
    cast = torch.compile(quantised, dynamic=False) if run.compiled else quantised
    lines, rows = [], out.numbers.setdefault("rows", [])
    for name, fan_in, fan_out in (("c_fc", E, 4 * E), ("c_proj", 4 * E, E)):
        x, dy = (torch.randn(tokens, width, device=run.device).bfloat16() for width in (fan_in, fan_out))
        w = (torch.randn(fan_out, fan_in, device=run.device) * fan_in ** -0.5).bfloat16()
        eight = quantised(x, ACTIVATION), quantised(w, ACTIVATION), quantised(dy, GRADIENT)
        exact = F.linear(x[:64].double(), w.double())
        error = relative_error(linear_in_8_bits(*eight)[0][:64], exact)

        def plain(i: int, x=x, w=w, dy=dy) -> tuple[Tensor, ...]:
            return x @ w.T, dy @ w, dy.T @ x

        def casts(i: int, x=x, w=w, dy=dy) -> tuple[Eight, ...]:
            return cast(x, ACTIVATION), cast(w, ACTIVATION), cast(dy, GRADIENT)
        work = {"bfloat16": plain, "8 bits, products alone": lambda i, eight=eight: linear_in_8_bits(*eight),
                "casts alone": casts,
                "8 bits with casts": lambda i, casts=casts: linear_in_8_bits(*casts(i))}
        measured = interleaved_kernels(work, run.device, 1 if run.tiny else 7)
        seconds = {how: median(times) for how, times in measured.items()}
        rows.append({"matrix": name, "seconds": seconds, "error": error,
                     "bfloat16_error": relative_error(plain(0)[0][:64], exact)})
        wrong = {"bfloat16": rows[-1]["bfloat16_error"], "8 bits with casts": error}
        lines += [[name, how, f"{1000 * took:.3f}", f"{seconds['bfloat16'] / took:.2f}×",
                   f"{wrong[how]:.1e}" if how in wrong else "-"]
                  for how, took in seconds.items()]
    total = {how: sum(row["seconds"][how] for row in rows) for how in rows[0]["seconds"]}
    lines += [["both", how, f"{1000 * took:.3f}", f"{total['bfloat16'] / took:.2f}×", "-"]
              for how, took in total.items()]
    out.table(["MLP, forward and backward", "how", "ms", "vs bfloat16", "error"], lines, (0, 1))
    out.goal("8 bits in the MLP, casts paid: speed over bfloat16 (worth building from 1.2 on)",
             total["bfloat16"] / total["8 bits with casts"], at_least=1.2)
    clean(run)
