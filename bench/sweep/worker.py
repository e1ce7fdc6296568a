"""One run of a sweep: train with scripts.base_train, measure, write the result.

    python -m bench.sweep.worker runs/TAG.spec.json

The sweep starts it, as a process of its own. All it prints goes to runs/TAG.txt. A run that is asked to stop saves a
checkpoint first, as base_train does, and the next sweep goes on from it. The result is written last, in one piece; then
the checkpoint is removed.
"""

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def main(argv: Sequence[str] | None = None) -> None:
    """Do the run that a spec describes; see `bench.sweep.runs.spec_of`."""
    from nanochat.launcher import obey_owner
    obey_owner()
    spec = json.loads(Path((sys.argv[1:] if argv is None else argv)[0]).read_text())
    os.environ.update(spec["env"])  # before torch is imported
    out = Path(spec["env"]["NANOCHAT_BASE_DIR"])
    log = os.open(out / "runs" / f"{spec['tag']}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (1, 2):
        os.dup2(log, stream)
    os.close(log)
    work(spec, out)


def work(spec: dict[str, Any], out: Path) -> None:
    """Train, measure, write runs/TAG.json, and remove the checkpoint."""
    import shutil

    from bench.measure import provenance
    from bench.sweep.measuring import held_out_nats, peak_memory, recall_of
    from nanochat.distributed import joined_ranks
    from nanochat.files import atomic_write, to_json
    from nanochat.loading import load_model
    from scripts import base_train

    tag = spec["tag"]
    base_train.main(spec["flags"])
    memory = peak_memory()
    result = {key: spec[key] for key in ("tag", "arm", "text", "seed", "flags")}
    result |= training_record(out / "logs" / f"base_{tag}.jsonl")
    result |= {"memory": memory, "where": provenance("bench.sweep")}
    if spec.get("measure", True):
        with joined_ranks(spec["device_type"]) as ranks:
            model, tokenizer, _ = load_model("base", ranks.device, model_tag=tag)
            result |= {"held_out": held_out_nats(model, tokenizer, out / "heldout.npz"),
                       "recall": recall_of(model, tokenizer, out / "heldout.npz")}
    with atomic_write(out / "runs" / f"{tag}.json", "w") as file:
        file.write(to_json(result))
    if not spec["keep_model"]:
        shutil.rmtree(out / "base_checkpoints" / tag, ignore_errors=True)


def training_record(path: Path) -> dict[str, Any]:
    """Return what the log of a run says of its training: the loss of each step, time, FLOPs."""
    from bench.measure import median
    from nanochat.logs import read_log

    rows = read_log(path)
    model = next(row for row in reversed(rows) if row["kind"] == "model")
    steps = {row["step"]: row for row in rows if row["kind"] == "train" and row["step"] <= model["num_iterations"]}
    each = [steps[step] for step in sorted(steps)]
    tokens = each[-1]["tokens"]
    seconds = [row["seconds"] for row in each]
    return {"steps": model["num_iterations"], "loss": [row["loss"] for row in each],
            "parameters": model["parameters"], "tokens": tokens,
            "flops": model["flops_per_token"] * tokens, "seconds": sum(seconds),
            "step_seconds": (step := median(seconds[len(seconds) // 4:])),
            "tokens_per_second": tokens / model["num_iterations"] / step,
            "skipped": sum(bool(row.get("skipped")) for row in each)}


if __name__ == "__main__":
    from nanochat.cli import run_main
    run_main(main)
