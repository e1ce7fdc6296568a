"""Speed of a training step: our model, the plain twin of the published model, and an all-attention model, interleaved.

    python -m bench.train --depth=4 --max-seq-len=256 --device-batch-size=16 --vocab-size=2048 --threads=2
    python -m bench.train --peer=../another-checkout       # times the nanochat.gpt of that checkout too
    python -m bench.train --loss-curve=100                 # compares the losses in bfloat16 with those in float32

The twin (bench/twin.py) runs in float32, eagerly, with the published optimizers: Muon one matrix at a time (its
iteration in the best precision of the device, as ours) and torch's AdamW for the other parameters. Forward and backward
are also timed without the optimizer.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench import peer
from bench.measure import (
    command_line,
    interleaved,
    json_flag,
    median,
    nbytes,
    peak_growth,
    provenance,
    provenance_line,
    random_batch,
    random_model,
    si,
    table,
    text_batches,
    write_results,
)
from bench.twin import TwinGPT
from nanochat.cli import COUNT, DEPTH, FROM_ZERO, ROW_TOKENS, ROWS, Range, flag, parse, run_main
from nanochat.distributed import Ranks, close_ranks, compute_dtype, init_ranks, peak_flops
from nanochat.errors import UserError
from nanochat.gpt import GPT, GPTConfig
from nanochat.optim import MuonAdamW, parameter_groups
from nanochat.training import train_step

CLIP = 1.0


@dataclass
class Config:
    """Flags of bench.train."""

    depth: int = flag(4, "layers; also sets the width", within=DEPTH)
    max_seq_len: int = flag(256, "tokens in a sequence", within=ROW_TOKENS)
    device_batch_size: int = flag(16, "sequences in a step", within=ROWS)
    vocab_size: int = flag(2048, "tokens in the vocabulary", within=Range(1, 1 << 24))
    steps: int = flag(7, "timed steps of each case; the median is reported", within=COUNT)
    warmup: int = flag(2, "steps of each case before the timed ones", within=FROM_ZERO)
    threads: int = flag(0, "CPU threads; 0 is the default of torch", within=Range(0, 4096))
    device: str = flag("", "cuda, mps or cpu; unset takes the best available")
    compile: str = flag("auto", "compile the blocks of our model: yes, no, or auto (on GPUs), as base_train")
    peer: str = flag("", "another checkout with a nanochat.gpt, whose forward and backward are timed too")
    loss_curve: int = flag(0, "steps to train in bfloat16 and in float32, to compare the losses; nothing is timed",
                           within=FROM_ZERO)
    json: str = json_flag()


class PlainOptimizers:
    """Muon one matrix at a time and torch's AdamW: the published optimizers on one device."""

    def __init__(self, model: torch.nn.Module, dtype: torch.dtype):
        groups = parameter_groups(model)
        self.dtype, self.muon = dtype, next((g for g in groups if g["kind"] == "muon"), {"params": []})
        self.adamw = torch.optim.AdamW([{"params": g["params"], "lr": g["lr"]} for g in groups if g["kind"] == "adamw"],
                                       betas=(0.8, 0.95), eps=1e-10, weight_decay=0.0)
        self.buffers = [torch.zeros_like(p) for p in self.muon["params"]]
        self.params = list(model.parameters())

    @torch.no_grad()
    def step(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.params, CLIP)
        self.adamw.step()
        for p, buffer in zip(self.muon["params"], self.buffers):
            buffer.lerp_(p.grad, 0.05)
            x = p.grad.lerp(buffer, 0.95).to(self.dtype)
            x = x.mT if x.size(0) > x.size(1) else x
            x = x / (x.norm() + 1e-7)
            for _ in range(5):
                gram = x @ x.mT
                x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
            x = x.mT if p.size(0) > p.size(1) else x
            p.sub_(x.to(p.dtype), alpha=self.muon["lr"] * max(1, p.size(0) / p.size(1)) ** 0.5)

    def state(self) -> list[Tensor]:
        """The tensors of the optimizer state."""
        return self.buffers + [t for state in self.adamw.state.values() for t in state.values()]


@dataclass
class Case:
    """One model with its optimizer. `forward_backward` and `step` are timed; `state` gives the optimizer's tensors."""

    name: str
    model: torch.nn.Module
    dtype: torch.dtype
    flops_per_token: float
    forward_backward: Callable[[], None]
    step: Callable[[], object]
    state: Callable[[], list[Tensor]]


def clear_gradients(model: torch.nn.Module) -> None:
    for p in model.parameters():
        p.grad = None


def our_case(name: str, shape: GPTConfig, batch: tuple[Tensor, Tensor], ranks: Ranks, dtype: torch.dtype, compiled: bool
             ) -> Case:
    """Our model as base_train trains it: float32 weights, activations in dtype, the blocks compiled or not."""
    model = random_model(shape, ranks.device)
    model.compute_dtype = dtype
    if compiled:
        model.compile_blocks(*batch[0].shape)
    optimizer = MuonAdamW(parameter_groups(model), ranks)

    def forward_backward() -> None:
        clear_gradients(model)
        model(*batch, "sum").backward()

    def state() -> list[Tensor]:
        return [t for bucket in optimizer.buckets for t in bucket.state.values()]
    return Case(name, model, dtype, model.flops_per_token(batch[0].shape[1]), forward_backward,
                lambda: train_step(model, optimizer, [batch], ranks, clip=CLIP), state)


def twin_case(shape: GPTConfig, batch: tuple[Tensor, Tensor], ranks: Ranks) -> Case:
    """The twin in float32, eager, with the published optimizers."""
    ours = random_model(shape, ranks.device)
    model = TwinGPT(shape).to(ranks.device)
    model.load_state_dict(ours.state_dict())
    optimizer = PlainOptimizers(model, compute_dtype(ranks.device))

    def forward_backward() -> None:
        clear_gradients(model)
        model(*batch).backward()

    def step() -> None:
        forward_backward()
        optimizer.step()
    flops = ours.flops_per_token(batch[0].shape[1])
    return Case("twin, float32 eager", model, torch.float32, flops, forward_backward, step, optimizer.state)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def compare(config: Config, shape: GPTConfig, ranks: Ranks) -> list[dict[str, Any]]:
    """Time all cases, interleaved; return a row of numbers for each. "vs_twin" is a ratio of speeds."""
    device, dtype = ranks.device, compute_dtype(ranks.device)
    compiled = config.compile == "yes" or config.compile == "auto" and device.type == "cuda"
    how = "compiled" if compiled else "eager"
    batch = random_batch(config.device_batch_size, config.max_seq_len, config.vocab_size, device)
    attention = GPTConfig(**{**shape.to_dict(), "layer_pattern": "A" * shape.n_layer})
    cases = [our_case(f"ours, {dtype_name(dtype)} {how}", shape, batch, ranks, dtype, compiled)]
    if dtype != torch.float32:
        cases.append(our_case(f"ours, float32 {how}", shape, batch, ranks, torch.float32, compiled))
    cases += [twin_case(shape, batch, ranks),
              our_case(f"ours all-attention, {dtype_name(dtype)} {how}", attention, batch, ranks, dtype, compiled)]
    work = {(case.name, what): fn for case in cases
            for what, fn in (("step", case.step), ("pass", case.forward_backward))}
    seconds = interleaved(work, device, config.steps, config.warmup)
    steps, passes = ({case.name: seconds[case.name, what] for case in cases} for what in ("step", "pass"))
    tokens, rows = batch[0].numel(), []
    for case in cases:
        clear_gradients(case.model)
        unseen = compiled and case.name.startswith("ours") and device.type == "cpu"  # memory of compiled code
        growth = None if unseen else peak_growth(case.step, device)
        peak = peak_flops(device, case.dtype)
        speed = tokens / median(steps[case.name])
        rows.append({"case": case.name, "parameters": sum(p.numel() for p in case.model.parameters()),
                     "step_seconds": steps[case.name], "pass_seconds": passes[case.name], "tokens_per_second": speed,
                     "pass_tokens_per_second": tokens / median(passes[case.name]),
                     "flops_per_token": case.flops_per_token, "peak_flops": peak,
                     "mfu": None if peak is None else speed * case.flops_per_token / peak,
                     "memory": None if growth is None else
                     growth + nbytes(case.model.parameters()) + nbytes(case.state())})
        clear_gradients(case.model)
    twin = next(row for row in rows if row["case"].startswith("twin"))
    for row in rows:  # ratios within each round, since the load of the machine changes
        row["vs_twin"] = median(b / a for a, b in zip(row["step_seconds"], twin["step_seconds"]))
        row["pass_vs_twin"] = median(b / a for a, b in zip(row["pass_seconds"], twin["pass_seconds"]))
    return rows


def peer_rows(config: Config, shape: GPTConfig, device: torch.device, twin: dict[str, Any]) -> list[dict[str, Any]]:
    """Time forward and backward of the nanochat.gpt of another checkout, in a process of its own.

    twin: the row of the twin. Raises UserError where the checkout has no nanochat.gpt.
    """
    rows = []
    for found in peer.run_peer(config.peer, "pass", shape, config.device_batch_size, config.max_seq_len,
                               steps=config.steps, warmup=config.warmup, device=device.type):
        row = {"case": f"peer {found['peer']}, {found['how']}", **found}
        if seconds := found.get("seconds"):
            row["pass_tokens_per_second"] = config.device_batch_size * config.max_seq_len / median(seconds)
            row["pass_vs_twin"] = row["pass_tokens_per_second"] / twin["pass_tokens_per_second"]
        rows.append(row)
    return rows


def format_rows(rows: list[dict[str, Any]]) -> str:
    """The table of the rows of `compare`."""
    def ratio(row: dict[str, Any], key: str) -> str:
        return f"{row[key]:.2f}×" if key in row else "-"
    headers = ["training", "step tok/s", "vs twin", "fwd+bwd tok/s", "vs twin", "MFU", "memory"]
    lines = [[row["case"], si(row.get("tokens_per_second")), ratio(row, "vs_twin"),
              si(row.get("pass_tokens_per_second")), ratio(row, "pass_vs_twin"),
              "-" if row.get("mfu") is None else f"{100 * row['mfu']:.1f}%",
              "-" if row.get("memory") is None else si(row["memory"]) + "B"] for row in rows]
    return table(headers, lines)


def loss_curves(config: Config, shape: GPTConfig, ranks: Ranks) -> dict[str, list[float]]:
    """Train the same weights on the same text in float32 and bfloat16; return the loss of each step (nats) by dtype."""
    curves = {}
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        model = GPT(shape).to(ranks.device)
        model.compute_dtype = dtype
        optimizer = MuonAdamW(parameter_groups(model), ranks)
        optimizer.dtype = dtype if ranks.device.type == "cpu" else optimizer.dtype
        text = text_batches(config.device_batch_size, config.max_seq_len, ranks.device)
        curves[dtype_name(dtype)] = [train_step(model, optimizer, [next(text)], ranks, clip=CLIP)[0]
                                     for _ in range(config.loss_curve)]
    return {name: torch.stack(losses).tolist() for name, losses in curves.items()}


def compare_losses(curves: dict[str, list[float]]) -> tuple[str, dict[str, Any]]:
    """Return a table of the two curves at ten steps, and the numbers for `write_results`."""
    full, half = curves["float32"], curves["bfloat16"]
    differences = [abs(a - b) for a, b in zip(full, half)]
    at = sorted({round(i * (len(full) - 1) / 9) for i in range(10)})
    text = table(["step", "float32", "bfloat16", "difference"],
                 [[i + 1, f"{full[i]:.4f}", f"{half[i]:.4f}", f"{half[i] - full[i]:+.4f}"] for i in at])
    quarter = max(1, len(full) // 4)
    last = sum(half[-quarter:]) / quarter - sum(full[-quarter:]) / quarter
    largest = max(differences)
    text += (f"\n\nlargest difference {largest:.4f} nats, at step {differences.index(largest) + 1}; "
             f"mean of the last {quarter} steps: bfloat16 {last:+.4f} nats against float32")
    rows = [{"step": i + 1, "float32": a, "bfloat16": b} for i, (a, b) in enumerate(zip(full, half))]
    return text, {"rows": rows, "largest_difference": largest, "difference_at_the_end": last}


def main(argv: Sequence[str] | None = None) -> None:
    """Compare as the flags say. Raises UserError for a mistake of the user."""
    config = parse(Config, argv, __doc__)
    if config.compile not in ("auto", "yes", "no"):
        raise UserError(f"--compile is yes, no or auto, not {config.compile!r}")
    for name in ("device_batch_size", "max_seq_len", "steps"):
        if getattr(config, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(config, name)}")
    if config.vocab_size < 256:
        raise UserError(f"--vocab-size must be at least 256, since the text is bytes; not {config.vocab_size}")
    if config.threads > 0:
        torch.set_num_threads(config.threads)
    shape = GPTConfig.from_depth(config.depth, sequence_len=config.max_seq_len, vocab_size=config.vocab_size)
    ranks = init_ranks(config.device)
    try:
        about = provenance(command_line("bench.train", argv))
        if config.loss_curve > 0:
            text, found = compare_losses(loss_curves(config, shape, ranks))
        else:
            rows = compare(config, shape, ranks)
            if config.peer:
                twin = next(row for row in rows if row["case"].startswith("twin"))
                rows += peer_rows(config, shape, ranks.device, twin)
            text, found = format_rows(rows), {"rows": rows}
    finally:
        close_ranks()
    print(f"{provenance_line(about)}\nd{config.depth}, layers {shape.pattern()}, V {config.vocab_size:,}, "
          f"{config.device_batch_size} sequences of {config.max_seq_len} tokens, on {ranks.device}\n\n{text}",
          flush=True)
    if config.loss_curve <= 0:
        peak = "the data sheet" if ranks.device.type == "cuda" else "a matrix product measured here"
        print("\nMedians; ratios are medians of the ratios of each round.\n"
              "The optimizers of the twin: Muon one matrix at a time, torch's AdamW.\n"
              "Memory: weights, optimizer state and, at the peak of a step, gradients and activations.\n"
              f"MFU: FLOPs of causal attention count where there is attention; the peak is that of {peak}.")
        for row in found["rows"]:
            if "error" in row:
                print(f"{row['case']}: {row['error']}")
    write_results(config.json, about, config, **found)


if __name__ == "__main__":
    run_main(main)
