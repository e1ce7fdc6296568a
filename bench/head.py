"""Time the head and the loss: ours, the plain twin, torch.compile of the twin, and Liger's fused linear cross-entropy.

    python -m bench.head                                                  # 4,096 tokens and V 2,048: small, for a CPU
    python -m bench.head --depth=20 --tokens=65536 --vocab-size=65536     # on a GPU

"training" is forward and backward of the summed loss from float32 weights, with some targets ignored. "evaluation" is
the loss of each token, with nothing saved. All take hidden states in --dtype. The columns:

- "of the product": the time that the products alone would take at the speed of a large one (three products in training,
  one in evaluation), over the time.
- "error": ‖got − exact‖ / ‖exact‖, exact being the twin in float64 on a part of the tokens; the worst of losses and
  gradients.
- "memory": bytes alive at the peak that were not alive before.

Liger gets the weight in the dtype of the hidden states and is asked to sum its gradient in float32, as ours does.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench.measure import (
    command_line,
    interleaved,
    json_flag,
    matmul_flops,
    median,
    peak_growth,
    provenance,
    provenance_line,
    relative_error,
    si,
    table,
    write_results,
)
from nanochat.cli import COUNT, DEPTH, ROUNDS, Range, flag, parse, run_main
from nanochat.distributed import close_ranks, compute_dtype, init_ranks
from nanochat.errors import UserError
from nanochat.kernels.cross_entropy import IGNORE, SOFTCAP, head_loss, head_loss_twin

TWIN, COMPILED, LIGER = "twin, eager", "twin, torch.compile", "Liger"
JUDGED = 1 << 23  # logits that the error is measured on: several tensors of 64 MB in float64
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
Loss = Callable[[Tensor, Tensor, Tensor, str], Tensor]


@dataclass
class Config:
    """Flags of bench.head."""

    depth: int = flag(4, "layers of the model whose width is taken", within=DEPTH)
    tokens: int = flag(4096, "in a step", within=COUNT)
    vocab_size: int = flag(2048, "tokens the model knows", within=Range(1, 1 << 24))
    dtype: str = flag("auto",
                      "of the hidden states: bfloat16, float32, or auto: what the model computes in on this device")
    rounds: int = flag(7, "timed calls of each way; the median is shown", within=ROUNDS)
    compile: str = flag("auto", "time torch.compile of the twin too: yes, no, or auto (on GPUs)")
    threads: int = flag(0, "CPU threads; 0 leaves it to torch", within=Range(0, 4096))
    device: str = flag("", "cuda, mps or cpu; unset takes the best there is")
    json: str = json_flag()


def liger(device: torch.device) -> Loss | str:
    """Return Liger's loss with our arguments, or a sentence that says why there is none."""
    if device.type != "cuda":
        return "it needs a GPU"
    try:
        from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss
    except ImportError:
        return "it is not installed; `pip install liger-kernel`"
    loss = LigerFusedLinearCrossEntropyLoss(ignore_index=IGNORE, reduction="sum", softcap=SOFTCAP,
                                            accum_dtype=torch.float32)
    return lambda x, weight, targets, reduction: loss(weight.to(x.dtype), x, targets)


def inputs(tokens: int, E: int, V: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return (x, weight, targets).

    x (tokens, E) is like a norm's output, weight (V, E) gives logits of a few units, and every 16th target is ignored.
    """
    x, weight = torch.randn(tokens, E, device=device).to(dtype), torch.randn(V, E, device=device) * (3 * E ** -0.5)
    targets = torch.randint(V, (tokens,), device=device)
    targets[::16] = IGNORE
    return x.requires_grad_(), weight.requires_grad_(), targets


def train(loss: Loss, x: Tensor, weight: Tensor, targets: Tensor) -> list[Tensor]:
    """Return the summed loss and its gradients."""
    total = loss(x, weight, targets, "sum")
    return [total, *torch.autograd.grad(total, (x, weight))]


@torch.no_grad()
def evaluate(loss: Loss, x: Tensor, weight: Tensor, targets: Tensor) -> list[Tensor]:
    """Return the loss of each token."""
    return [loss(x, weight, targets, "none")]


PASSES = {"training": (train, 6), "evaluation": (evaluate, 2)}  # and the FLOPs of its products, divided by N·V·E


def fits(fn: Callable[[], object]) -> bool:
    """Call fn once, and return False where the GPU's memory does not hold it.

    Compilation and first allocations then stay out of what is measured.
    """
    try:
        fn()
        return True
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return False


def compare(name: str, ways: dict[str, Loss], given: tuple[Tensor, Tensor, Tensor], rounds: int,
            ceiling: float) -> list[dict[str, Any]]:
    """Return a table row for each way of one pass."""
    x, weight, targets = given
    run, flops = PASSES[name]
    judged = min(len(x), max(16, JUDGED // len(weight)))
    where = torch.device("cpu") if x.device.type == "mps" else x.device  # MPS has no float64
    part = [x[:judged].detach().requires_grad_(), weight, targets[:judged]]
    wide = [t.detach().to(where, torch.float64).requires_grad_() for t in part[:2]]
    exact = run(head_loss_twin, *wide, part[2].to(where))
    errors = {how: max(relative_error(a, b) for a, b in zip(run(way, *part), exact)) for how, way in ways.items()}
    del exact, wide
    calls = {how: lambda way=way: run(way, *given) for how, way in ways.items()}
    calls = {how: fn for how, fn in calls.items() if fits(fn)}
    seconds = interleaved(calls, x.device, rounds, warmup=1)
    rows = []
    for how in ways:
        row = {"pass": name, "how": how, "error": errors[how]}
        if how in seconds:
            took = median(seconds[how])
            unseen = how == COMPILED and x.device.type == "cpu"  # the memory of compiled code is not counted
            row |= {"seconds": took, "all_seconds": seconds[how],
                    "memory": None if unseen else peak_growth(calls[how], x.device),
                    "of_the_product": flops * x.numel() * len(weight) / took / ceiling}
        rows.append(row)
    twin = rows[[row["how"] for row in rows].index(TWIN)]
    for row in rows:
        if "seconds" in row and "seconds" in twin:
            # ratios within a round, since the load of the machine drifts
            row["vs_twin"] = median(b / a for a, b in zip(row["all_seconds"], twin["all_seconds"]))
            row["memory_vs_twin"] = row["memory"] / twin["memory"] if row["memory"] else None
    return rows


def shown(rows: list[dict[str, Any]]) -> str:
    """Return the table of all rows."""
    def cell(row: dict[str, Any], key: str, form: Callable[[float], str]) -> str:
        return "-" if row.get(key) is None else form(row[key])
    return table(["pass", "how", "ms", "vs twin", "of the product", "memory", "of the twin's", "error"],
                 [[row["pass"], row["how"],
                   cell(row, "seconds", lambda s: f"{1000 * s:,.2f}") if "seconds" in row else "out of memory",
                   cell(row, "vs_twin", lambda r: f"{r:.2f}×"),
                   cell(row, "of_the_product", lambda r: f"{100 * r:.0f}%"),
                   cell(row, "memory", lambda b: si(b) + "B"), cell(row, "memory_vs_twin", lambda r: f"{100 * r:.1f}%"),
                   f"{row['error']:.1e}"] for row in rows], left=(0, 1))


def main(argv: Sequence[str] | None = None) -> None:
    """Compare as the flags say.

    Raises:
        UserError: a flag is wrong
    """
    config = parse(Config, argv, __doc__)
    if config.compile not in ("auto", "yes", "no"):
        raise UserError(f"--compile is yes, no or auto, not {config.compile!r}")
    if config.dtype not in ("auto", *DTYPES):
        raise UserError(f"--dtype is bfloat16, float32 or auto, not {config.dtype!r}")
    for name in ("depth", "tokens", "vocab_size", "rounds"):
        if getattr(config, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(config, name)}")
    if config.threads > 0:
        torch.set_num_threads(config.threads)
    torch.manual_seed(0)
    ranks = init_ranks(config.device)
    try:
        device = ranks.device
        dtype = DTYPES.get(config.dtype) or compute_dtype(device)
        about = provenance(command_line("bench.head", argv))
        given = inputs(config.tokens, 64 * config.depth, config.vocab_size, dtype, device)
        ways: dict[str, Loss] = {"ours": head_loss, TWIN: head_loss_twin}
        if config.compile == "yes" or config.compile == "auto" and device.type == "cuda":
            ways[COMPILED] = torch.compile(head_loss_twin, dynamic=False)
        peer = liger(device)
        ceiling = matmul_flops(device, dtype, 8192 if device.type == "cuda" else 2048)
        rows = compare("training", ways if isinstance(peer, str) else {**ways, LIGER: peer}, given, config.rounds,
                       ceiling)
        rows += compare("evaluation", ways, given, config.rounds, ceiling)
    finally:
        close_ranks()
    print(f"{provenance_line(about)}\n"
          f"{config.tokens:,} tokens of width {64 * config.depth:,}, V {config.vocab_size:,}, "
          f"{str(dtype).removeprefix('torch.')} on {device}\n\n{shown(rows)}\n\n"
          "Times are medians; ratios are medians of the ratios within a round.", flush=True)
    if isinstance(peer, str):
        print(f"{LIGER} is left out: {peer}.")
    write_results(config.json, about, config, rows, matmul_flops=ceiling)


if __name__ == "__main__":
    run_main(main)
