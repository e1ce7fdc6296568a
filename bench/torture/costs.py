"""What safety costs: saving every 50 steps of the small profile, and verifying a checkpoint of 2.2 GB.

    python -m bench.torture.costs --json=bench/results/torture_costs.json
    python -m bench.torture.costs --only=saving --steps=200 --rounds=4

Saving: base_train with the small profile's flags, with --save-every=50, with a single save at the end, and with a
single step, in turn. The time is that from the first step to the end, by the run's own log. Processor time is given
beside it, since it is steadier on a machine with other work: that of the whole process less that of the run of one
step. Verifying: the weights of a model of depth 20, written by save_checkpoint, then read and checked, from the disk
and from memory, beside plain SHA-256 and beside reading without a check.
"""

import hashlib
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from bench.measure import command_line, json_flag, median, provenance, provenance_line, table, write_results
from nanochat.checkpoint import load_checkpoint, save_checkpoint
from nanochat.cli import COUNT, DEPTH, ROUNDS, flag, parse, run_main
from nanochat.gpt import GPTConfig, meta_model
from nanochat.logs import read_log
from nanochat.recipe import small


@dataclass
class Config:
    """Flags of bench.torture.costs."""

    only: str = flag("", "saving or verify; unset: both")
    steps: int = flag(200, "optimizer steps of each run with and without saves", within=COUNT)
    every: int = flag(50, "steps from one save to the next", within=COUNT)
    rounds: int = flag(3, "runs of each kind, in turn", within=ROUNDS)
    depth: int = flag(20, "of the model whose checkpoint is verified; 20 is 2.2 GB", within=DEPTH)
    scratch: str = flag("", "folder to work in; unset: one in the system's folder for such files")
    json: str = json_flag()


def _run(base: Path, *argv: str) -> float:
    """Run a command with its files in `base`; return its processor time in seconds."""
    def spent() -> float:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    before = spent()
    subprocess.run([sys.executable, *argv], env={**os.environ, "NANOCHAT_BASE_DIR": str(base)}, check=True,
                   stdout=subprocess.DEVNULL)
    return spent() - before


def time_of_saving(config: Config, base: Path) -> list[dict[str, Any]]:
    """Train with and without saves, in turn. Return a row for each run."""
    recipe = small.base
    _run(base, "-m", "nanochat.dataset", "small-world", f"--docs={40 * config.steps}")
    _run(base, "-m", "scripts.tok_train", f"--vocab-size={small.tokenizer.vocab_size}")
    rows = []
    for turn in range(config.rounds):
        for every, steps in ((-1, 1), (config.every, config.steps), (-1, config.steps))[::-1 if turn % 2 else 1]:
            tag = f"every{every}-{steps}-{turn}"
            processor = _run(base, "-m", "scripts.base_train", f"--depth={recipe.shape.depth}",
                             f"--max-seq-len={recipe.shape.max_seq_len}", f"--save-every={every}",
                             f"--total-batch-size={recipe.total_batch_size}", "--sample-every=-1", "--eval-every=-1",
                             f"--device-batch-size={recipe.device_batch_size}", f"--num-iterations={steps}",
                             "--eval-tokens=2048", "--core-metric-every=-1", f"--model-tag={tag}")
            log = read_log(base / "logs" / f"base_{tag}.jsonl")
            times = {row["kind"]: datetime.fromisoformat(row["time"]) for row in log if row["kind"] == "done"}
            first = next(datetime.fromisoformat(row["time"]) for row in log if row["kind"] == "train")
            seconds = (times["done"] - first).total_seconds()
            rows.append({"what": "saving", "every": every, "steps": steps, "turn": turn, "seconds": seconds,
                         "processor": processor, "saves": sum(row["kind"] == "checkpoint" for row in log)})
    return rows


def saving_table(rows: list[dict[str, Any]]) -> str:
    """Return the medians side by side, and the share of time that saving takes."""
    one = median(row["processor"] for row in rows if row["steps"] == 1)

    def of(saves: bool, name: str) -> float:
        found = median(row[name] for row in rows if row["steps"] > 1 and (row["every"] > 0) == saves)
        return found - one if name == "processor" else found

    lines = [[f"{'every ' + str(max(row['every'] for row in rows)) if saves else 'at the end'}",
              f"{max(row['saves'] for row in rows if (row['every'] > 0) == saves)}",
              f"{of(saves, 'seconds'):.1f}", f"{of(saves, 'processor'):.1f}"] for saves in (False, True)]
    share = [f"{of(True, name) / of(False, name) - 1:+.1%}" for name in ("seconds", "processor")]
    return table(["saves", "number", "seconds of steps", "processor seconds"], [*lines, ["cost", "", *share]])


def _cold(path: Path) -> None:
    """Drop a file from the system's memory, where the system lets a process ask for that."""
    if hasattr(os, "posix_fadvise"):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def time_of_verifying(config: Config, folder: Path) -> list[dict[str, Any]]:
    """Write a checkpoint of this depth and time what reads it. Return a row for each way."""
    shape = GPTConfig(sequence_len=2048, vocab_size=65536, n_layer=config.depth, n_head=config.depth // 2,
                      n_kv_head=config.depth // 2, n_embd=64 * config.depth)
    with torch.no_grad():
        weights = {name: torch.randn(tensor.shape) for name, tensor in meta_model(shape).state_dict().items()}
    began = time.perf_counter()
    save_checkpoint(folder, 1, weights, {"model_config": shape})
    rows = [{"what": "verify", "way": "save_checkpoint", "where": "", "seconds": time.perf_counter() - began}]
    path = folder / "model_000001.pt"
    size = path.stat().st_size
    del weights

    def hashed() -> None:
        with open(path, "rb") as file:
            digest = hashlib.sha256()
            while piece := file.read(1 << 22):
                digest.update(piece)

    ways: dict[str, Callable[[], object]] = {
        "SHA-256 of the file, plain": hashed,
        "load_checkpoint, verified": lambda: load_checkpoint(folder, 1),
        "load_checkpoint, verified, mapped": lambda: load_checkpoint(folder, 1, mapped=True),
        "load_checkpoint, not verified": lambda: load_checkpoint(folder, 1, verify=False)}
    try:
        from nanochat.checkpoint import __main__ as command
        ways["python -m nanochat.checkpoint verify"] = lambda: command.main(["verify", str(folder)])
    except ImportError:
        pass
    for way, call in ways.items():
        for where in ("disk", "memory"):
            if where == "disk":
                _cold(path)
            os.utime(path)  # else a process that has checked the file once does not read it again
            began = time.perf_counter()
            call()
            seconds = time.perf_counter() - began
            rows.append({"what": "verify", "way": way, "where": where, "seconds": seconds, "bytes": size})
    return rows


def verify_table(rows: list[dict[str, Any]]) -> str:
    """Return seconds by way, from disk and from memory."""
    seconds = {(row["way"], row["where"]): row["seconds"] for row in rows}
    ways = dict.fromkeys(row["way"] for row in rows)
    return table(["way", "from disk, s", "from memory, s"],
                 [[way, *(f"{seconds[way, where]:.1f}" if (way, where) in seconds else ""
                          for where in ("disk" if (way, "disk") in seconds else "", "memory"))] for way in ways])


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print. Raises UserError for wrong flags."""
    config = parse(Config, argv, __doc__)
    about = provenance(command_line("bench.torture.costs", argv))
    rows: list[dict[str, Any]] = []
    print(provenance_line(about), flush=True)
    with tempfile.TemporaryDirectory(dir=config.scratch or None) as folder:
        if config.only in ("", "saving"):
            saving = time_of_saving(config, Path(folder) / "saving")
            print(f"\nsmall profile, {config.steps} steps, median of {config.rounds}\n\n{saving_table(saving)}",
                  flush=True)
            rows += saving
        if config.only in ("", "verify"):
            verify = time_of_verifying(config, Path(folder) / "verify")
            size = next(row["bytes"] for row in verify if "bytes" in row)
            print(f"\na checkpoint of {size / 1e9:.1f} GB of weights\n\n{verify_table(verify)}", flush=True)
            rows += verify
    write_results(config.json, about, config, rows)


if __name__ == "__main__":
    run_main(main)
