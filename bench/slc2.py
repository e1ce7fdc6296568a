"""What the SLC2 layers of a trained model do, and what the hybrid costs beside attention alone, by length of context.

    python -m bench.slc2 --model-tag=d4                  # a base model of $NANOCHAT_BASE_DIR, on its validation text
    python -m bench.slc2 --model-tag=d4 --json=slc2.json --plots=docs

The first table has a line for each mixer of the model: how large its taps are, from the oldest token to the present
one, what share of the gate is closed, and how many bits a byte the model loses on the validation text where the mixer
is left out, or where an SLC2 layer sees the present token alone. The second table compares the model's shape, with new
weights, to one with attention in all layers: tokens/s of prefill, milliseconds of a decode step, and bytes of the
state, at each length of context. docs/slc2.md explains both.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.decode import decode_in_turns, prefill_seconds
from bench.measure import (
    command_line,
    json_flag,
    median,
    provenance,
    provenance_line,
    random_model,
    si,
    table,
    write_results,
)
from nanochat.cli import COUNT, ROWS, STEP_OR_LAST, flag, parse, run_main
from nanochat.dataloader import TextSource
from nanochat.dataset import data_dir
from nanochat.distributed import Ranks, close_ranks, init_ranks
from nanochat.evaluation.loss import EvalRows, evaluate_bpb
from nanochat.files import atomic_write
from nanochat.gpt import GPT
from nanochat.kernels.slc2 import gated_input, split_columns
from nanochat.layers import together
from nanochat.loading import load_model, ready_to_decode
from nanochat.report.plots import BLUE, LIGHT_BLUE, ORANGE, plain_matplotlib
from nanochat.slc2 import SLC2

CLOSED = 0.05  # a gate is closed where its size is below this part of the layer's root mean square


@dataclass
class Config:
    """Flags of bench.slc2."""

    source: str = flag("base", "stage of the model, or a folder")
    model_tag: str = flag("", "which model; unset takes the only or the deepest one")
    step: int = flag(-1, "which checkpoint; -1 is the last", within=STEP_OR_LAST)
    tokens: int = flag(65_536, "tokens of the validation text for each ablation", within=COUNT)
    rows: int = flag(8, "rows of a batch", within=ROWS)
    contexts: str = flag("256,1024,4096", "lengths of context to time, with commas between; empty for none")
    new_tokens: int = flag(32, "timed decode steps at each of them", within=COUNT)
    plots: str = flag("", "folder for slc2_layers.svg and slc2_context.svg; unset draws none")
    device: str = flag("", "cuda, mps or cpu; unset takes the best there is")
    json: str = json_flag()


# ---- what the layers do


@contextmanager
def changed(weight: Tensor, new: Tensor | float) -> Iterator[None]:
    """Within the block, a weight has other numbers."""
    before = weight.detach().clone()
    with torch.no_grad():
        weight.copy_(new if isinstance(new, Tensor) else torch.full_like(weight, new))
    try:
        yield
    finally:
        with torch.no_grad():
            weight.copy_(before)


@torch.no_grad()
def gate_statistics(model: GPT, ids: Tensor) -> dict[int, dict[str, float]]:
    """Return of each SLC2 layer, by its number, root mean square of the gate and the share of it that is CLOSED, on
    ids (B, T)."""
    found: dict[int, dict[str, float]] = {}

    def watch(number: int, mixer: SLC2) -> Any:
        def see(module: SLC2, given: tuple) -> None:
            z = together(given[0], *module.projections())
            x, _, A, alpha, _ = split_columns(z, **module.heads)
            gate = gated_input(torch.ones_like(x), A, alpha).float()
            rms = gate.square().mean().sqrt()
            found[number] = {"gate_rms": float(rms), "gate_closed": float((gate.abs() < CLOSED * rms).float().mean())}
        return mixer.register_forward_pre_hook(see)

    hooks = [watch(number, block.attn) for number, block in enumerate(model.transformer.h)
             if isinstance(block.attn, SLC2) and block.attn.gate == "rank-one"]
    try:
        model(ids)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def layers(model: GPT, rows: EvalRows, token_bytes: Tensor, ranks: Ranks) -> tuple[float, list[dict[str, Any]]]:
    """Return the bits a byte of a model, and a record for each layer.

    A record has "letter"; "without", the bits a byte more where the layer's mixer adds nothing; of SLC2 layers "taps",
    the mean size of each, from the oldest to the present; "present", the bits more where all others are zero; and what
    `gate_statistics` says.
    """
    def bpb() -> float:
        return evaluate_bpb(model, rows, token_bytes, ranks)

    whole, found = bpb(), []
    gates = gate_statistics(model, next(iter(rows))[0])
    for number, (letter, block) in enumerate(zip(model.config.pattern(), model.transformer.h)):
        record: dict[str, Any] = {"layer": number, "letter": letter}
        with changed(block.attn.c_proj.weight, 0.0):
            record["without"] = bpb() - whole
        if isinstance(block.attn, SLC2):
            taps = block.attn.conv1d.weight
            record["taps"] = taps.detach().squeeze(1).abs().mean(0).tolist()
            alone = torch.zeros_like(taps)
            alone[..., -1] = taps.detach()[..., -1]
            with changed(taps, alone):
                record["present"] = bpb() - whole
            record |= gates.get(number, {})
        found.append(record)
    return whole, found


# ---- what the hybrid costs


def by_context(model: GPT, contexts: Sequence[int], new_tokens: int) -> list[dict[str, Any]]:
    """Return for each length of context a record of the hybrid and of attention alone, both of this shape, with new
    weights: "prefill" in tokens/s, "decode" in seconds a step, "state" in bytes of one sequence."""
    longest = max(contexts) + new_tokens + 8
    shape = replace(model.config, sequence_len=longest)
    models = {"hybrid": shape, "attention": replace(shape, layer_pattern="A" * shape.n_layer)}
    ready = {name: ready_to_decode(random_model(config, model.device)) for name, config in models.items()}
    found = []
    for T in contexts:
        decode = decode_in_turns(ready, 1, T, new_tokens)
        found += [{"context": T, "model": name, "prefill": T / median(prefill_seconds(one, 1, T)),
                   "decode": median(decode[name]), "state": one.new_cache(1, T).nbytes()}
                  for name, one in ready.items()]
    return found


# ---- plots


def draw_layers(figure: Any, found: list[dict[str, Any]]) -> None:
    """Draw the taps of each SLC2 layer, and what each mixer is worth."""
    figure.set_size_inches(9.5, 3.2)
    left, right = figure.subplots(1, 2)
    slc2 = [record for record in found if "taps" in record]
    K = len(slc2[0]["taps"])
    for tap in range(K):
        age = K - 1 - tap
        name = "present token" if age == 0 else f"{age} before"
        left.plot([r["layer"] for r in slc2], [r["taps"][tap] for r in slc2], marker="o", markersize=3, label=name)
    left.set_title("mean size of a tap, by SLC2 layer", fontsize=9)
    left.legend(fontsize=7)
    right.bar([r["layer"] for r in found], [r["without"] for r in found],
              color=[ORANGE if r["letter"] == "A" else BLUE for r in found])
    right.bar([r["layer"] for r in slc2], [r["present"] for r in slc2], width=0.4, color=LIGHT_BLUE)
    right.set_title("bits a byte lost without a mixer (orange: attention); light: without the past", fontsize=9)
    for axes in (left, right):
        axes.set_xlabel("layer", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.25)


def draw_contexts(figure: Any, found: list[dict[str, Any]]) -> None:
    """Draw prefill, decode step and state of the two models over the length of context."""
    figure.set_size_inches(9.5, 2.8)
    panels = (("prefill", "tokens/s of prefill", 1), ("decode", "milliseconds of a decode step", 1e3),
              ("state", "state of one sequence, MB", 1e-6))
    for axes, (key, title, scale) in zip(figure.subplots(1, 3), panels):
        for name, colour in (("hybrid", BLUE), ("attention", ORANGE)):
            points = [r for r in found if r["model"] == name]
            axes.plot([r["context"] for r in points], [scale * r[key] for r in points], marker="o", markersize=3,
                      color=colour, label=name)
        axes.set_xscale("log", base=2)
        axes.set_ylim(0)
        axes.set_title(title, fontsize=9)
        axes.set_xlabel("tokens of context", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.25)
        axes.legend(fontsize=7)


def save_plots(folder: Path, layers_found: list[dict[str, Any]], contexts_found: list[dict[str, Any]]) -> None:
    """Write slc2_layers.svg and slc2_context.svg."""
    with plain_matplotlib():
        import matplotlib
        from matplotlib.figure import Figure
        matplotlib.rcParams["svg.hashsalt"] = "slc2"  # so that equal numbers give equal files
        for name, draw, found in (("slc2_layers", draw_layers, layers_found),
                                  ("slc2_context", draw_contexts, contexts_found)):
            if found:
                figure = Figure(layout="constrained")
                draw(figure, found)
                with atomic_write(folder / f"{name}.svg") as file:
                    figure.savefig(file, format="svg", metadata={"Date": None})


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print two tables, and write JSON and plots where that is asked for."""
    config = parse(Config, argv, __doc__)
    ranks = init_ranks(config.device)
    try:
        model, tokenizer, meta = load_model(config.source, ranks.device, model_tag=config.model_tag or None,
                                            step=None if config.step < 0 else config.step)
        print(meta["loaded"])
        rows = EvalRows(TextSource(tokenizer, "val", data_dir()), config.rows, model.config.sequence_len,
                        config.tokens, ranks=ranks)
        whole, found = layers(model, rows, tokenizer.token_bytes().to(ranks.device), ranks)
        contexts = [int(word) for word in config.contexts.split(",") if word.strip()]
        costs = by_context(model, contexts, config.new_tokens) if contexts else []
    finally:
        close_ranks()
    source = provenance(command_line("bench.slc2", argv))
    print(provenance_line(source))
    print(f"\n{whole:.4f} bits a byte on {len(rows) * rows.shape[0] * rows.shape[1]:,} tokens\n")
    print(table(["layer", "mixer", "taps, oldest first", "gate RMS", "closed", "without it", "present alone"], [
        [r["layer"], r["letter"], " ".join(f"{tap:.2f}" for tap in r.get("taps", ())),
         f"{r['gate_rms']:.3f}" if "gate_rms" in r else "", f"{r['gate_closed']:.0%}" if "gate_closed" in r else "",
         f"+{r['without']:.4f}", f"+{r['present']:.4f}" if "present" in r else ""] for r in found], (1, 2)))
    if costs:
        print("\n" + table(["context", "model", "prefill tokens/s", "ms a decode step", "state, bytes"], [
            [r["context"], r["model"], si(r["prefill"]), f"{1000 * r['decode']:.2f}", si(r["state"])] for r in costs],
            (1,)))
    if config.plots:
        save_plots(Path(config.plots), found, costs)
    if config.json:
        write_results(config.json, source, config, found, bpb=whole, contexts=costs)


if __name__ == "__main__":
    run_main(main)
