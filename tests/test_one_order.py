"""Any number of ranks trains one loss curve in every stage, and evaluates to the same scores.

The real scripts run in order on ranks over gloo, in float32, all of a number of ranks in the same processes. What is
left between the curves is rounding: each rank adds up its own gradients before all of them are added.
"""

import contextlib
import json
import os
from pathlib import Path

import pytest
import torch

from nanochat import distributed, memory
from nanochat.distributed import Ranks
from nanochat.logs import read_log
from tasks import recipes
from tests.helpers import module_of
from tests.test_distributed import start_ranks

ALONE = Ranks(0, 0, 1, torch.device("cpu"))


def commands(steps: int, rows: int) -> list[tuple[str, list[str]]]:
    """The scripts: steps of each stage, rows of a micro-batch, as flags."""
    stage = ["--device-type=cpu", f"--num-iterations={steps}", "--save-every=-1"]
    tokens = ["--total-batch-size=1024", f"--device-batch-size={rows}", "--eval-every=-1", "--eval-tokens=3000"]
    graded = ["--device-type=cpu", "-x", "12", "-m", "6"]
    return [
        ("scripts.base_train", [*stage, *tokens, "--depth=2", "--max-seq-len=64", "--sample-every=-1"]),
        ("scripts.base_loss", ["--split-tokens=3000", f"--device-batch-size={rows}", "--device-type=cpu"]),
        ("scripts.mid_train", [*stage, *tokens]),
        ("scripts.chat_sft", [*stage, f"--device-batch-size={rows}", "--target-examples-per-step=12", "--eval-every=-1",
                              "--eval-steps=1", "--eval-metrics-every=-1", "--init-lr-frac=0.5"]),
        ("scripts.chat_rl", [*stage, f"--device-batch-size={rows}", "--examples-per-step=8", "--num-samples=4",
                             "--max-new-tokens=8", "--eval-every=-1", "--eval-examples=9", "--eval-samples=2",
                             "--source=sft", "--init-lr-frac=0.5"]),
        ("scripts.chat_eval", ["-i", "sft", *graded]),
    ]


def _run(ranks: Ranks, text: str, folder: str, steps: int, rows: int) -> None:
    base = Path(folder)
    os.environ |= {"NANOCHAT_BASE_DIR": str(base), "NANOCHAT_DTYPE": "float32"}
    if ranks.is_main:
        base.mkdir()
        for name in ("base_data", "tokenizer"):
            (base / name).symlink_to(Path(text) / name)
    distributed.barrier(ranks, "the folder")
    with pytest.MonkeyPatch.context() as patch, open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        patch.setattr(recipes.WorldSums, "reward", lambda self, conversation, answer: float(len(answer) % 2))
        if ranks.world_size > 1:
            patch.setattr(distributed, "init_ranks", lambda device_type: ranks)  # the scripts share one group
            patch.setattr(distributed, "close_ranks", lambda: None)
        for module, flags in commands(steps, rows):
            module_of(module).main(flags)


def told(base: Path) -> dict[str, list[float]]:
    """What the logs of all stages say, as curves and scores by name."""
    def curve(log: str, kind: str, *names: str) -> list[float]:
        return [row[name] for row in read_log(base / "logs" / f"{log}_d2.jsonl") if row["kind"] == kind
                for name in names]
    found = {f"{stage} loss": curve(stage, "train", "loss") for stage in ("base", "mid", "sft")}
    found |= {f"{stage} norm": curve(stage, "train", "norm") for stage in ("base", "mid", "sft")}
    found |= {f"{stage} val": curve(stage, "val", value) for stage, value in
              (("base", "bpb"), ("mid", "bpb"), ("sft", "loss"))}
    found["rl"] = curve("rl", "rl", "loss", "reward", "kept_groups", "sequence_length")
    found["rl norm"] = curve("rl", "rl", "norm")
    found["rl pass"] = curve("rl", "pass", "pass@1", "pass@2")
    return found


def differences(folder: Path, text: Path, steps: int, worlds) -> dict[str, dict[str, float]]:
    """The largest difference of each curve from that of one process, by (ranks, rows of a micro-batch)."""
    curves = {}
    for world_size, rows in worlds:
        task = str(text), str(folder / f"{world_size}-{rows}"), steps, rows
        start_ranks(world_size, _run, *task)
        curves[world_size, rows] = told(Path(task[1]))
    first, *others = curves
    assert len(curves[first]["base loss"]) == steps and all(curves[first].values())
    return {f"{world_size} ranks, {rows} rows": {
        name: max(abs(a - b) for a, b in zip(curve, curves[world_size, rows][name], strict=True))
        for name, curve in curves[first].items()} for world_size, rows in others}


if __name__ == "__main__":
    import sys, tempfile
    steps, worlds = int(sys.argv[1]), json.loads(sys.argv[2])
    os.environ["NANOCHAT_DTYPE"] = "float32"
    with tempfile.TemporaryDirectory() as t:
        os.environ["NANOCHAT_BASE_DIR"] = t + "/text"
        from tests.helpers import small_text_and_tokenizer
        small_text_and_tokenizer()
        for k, v in differences(Path(t), Path(t) / "text", steps, [tuple(w) for w in worlds]).items():
            print(k, {n: f"{d:.1e}" for n, d in v.items()})
