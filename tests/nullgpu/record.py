"""Record anew what a training step takes: writes memory.json beside this file and prints the table for dev/LOG.md.

    python -m tests.nullgpu.record                  # some minutes

Each depth is a process under the null GPU. The blocks are not compiled: that changes the memory by less than 0.1 GB, as
tests/test_nullgpu_step.py sees at d20. Run it when a change to the model, the kernels, the optimizer or the pinned
torch moves the memory of a step: that test then says so.
"""

import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from nanochat.gpt import GPTConfig
from nanochat.memory import choose_batch, memory_of_step, usable_memory
from nanochat.recipe import published
from tests.nullgpu import Face, NullGPU, build, missing
from tests.nullgpu.programs import training

POINTS = Path(__file__).with_name("memory.json")
ROW = published.base.shape.max_seq_len  # tokens of a row in the recorded steps
DEPTHS = 12, 20, 26, 32
ROWS = 1, 8, 32       # the optimizer's part; two points of a line
RANKS = 1, 8
LARGE = Face("a card with much memory", "9.0", 900, 132, 50)  # no card yet holds all of them
ALLOCATOR = {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}  # as every training script sets it
# GB by which cards are known, and GiB that PyTorch sees of them: RTX 3090 or 4090, A100, L40S, H100, H200, B200
CARDS = {24: 23.53, 40: 39.39, 48: 44.39, 80: 79.10, 141: 139.80, 192: 178.35}


def of_depth(depth: int) -> list[dict[str, Any]]:
    """Return the points of one depth."""
    found = []
    for rows in ROWS:
        for ranks in RANKS:
            seen = training(depth, rows, ranks, compiled=False, steps=2)
            found.append({"depth": depth, "rows": rows, "ranks": ranks, "allocated": seen["allocated"],
                          "reserved": seen["reserved"], "kept": seen["kept"], "launches": seen["launches"]["all"]})
    return found


def recorded() -> dict[tuple[int, int, int], dict[str, Any]]:
    """Return the recorded points by depth, rows and ranks."""
    return {(point["depth"], point["rows"], point["ranks"]): point
            for point in json.loads(POINTS.read_text(encoding="utf-8"))["points"]}


def counted(depth: int, rows: int, ranks: int) -> float:
    """Return what `memory_of_step` says of a recorded step."""
    config = GPTConfig.from_depth(depth, vocab_size=published.tokenizer.vocab_size, sequence_len=ROW)
    return memory_of_step(config, rows, ROW, ranks=ranks, accumulate=False)


def table() -> str:
    """Return, for some depths, the memory at 32 rows and the rows that a run takes on each card, in Markdown."""
    lines = ["| depth | ranks | GB at 32 rows | " + " | ".join(f"rows in {card} GB" for card in CARDS) + " |",
             "| ---: " * (3 + len(CARDS)) + "|"]
    for depth in (12, 20, 26, 32):
        config = GPTConfig.from_depth(depth, vocab_size=published.tokenizer.vocab_size, sequence_len=ROW)
        for ranks in (1, 8):
            batches = [choose_batch(config, ROW, [32, 16, 8, 4, 2, 1], ranks, dtype=torch.bfloat16,
                                    memory=size * 2**30) for size in CARDS.values()]
            lines.append(f"| {depth} | {ranks} | {counted(depth, 32, ranks) / 1e9:.1f} | "
                         + " | ".join("none" if batch.need > usable_memory(size * 2**30, ranks)
                                      else f"{batch.rows}{', recomputed' if batch.recompute else ''}"
                                      for batch, size in zip(batches, CARDS.values())) + " |")
    return "\n".join(lines)


def main() -> None:
    """Measure every point, write the file, print the table."""
    if reason := missing():
        sys.exit(reason)
    points, began = [], time.time()
    with tempfile.TemporaryDirectory() as folder:
        build(Path(folder))
        gpu = NullGPU(Path(folder))
        for depth in DEPTHS:
            points += gpu.run(of_depth, face=LARGE, env=ALLOCATOR, depth=depth)
            print(f"d{depth} after {time.time() - began:.0f} s: "
                  + ", ".join(f"{p['rows']} rows, {p['ranks']} ranks {p['allocated'] / 1e9:.2f} GB" for p in points
                              if p["depth"] == depth), flush=True)
    about = {"command": "python -m tests.nullgpu.record", "torch": torch.__version__, "tokens_of_a_row": ROW}
    lines = ",\n".join(f"  {json.dumps(point)}" for point in points)
    new = POINTS.with_suffix(".new")
    new.write_text(f'{{"about": {json.dumps(about)},\n "points": [\n{lines}\n]}}\n', encoding="utf-8")
    os.replace(new, POINTS)
    print(table())


if __name__ == "__main__":
    main()
