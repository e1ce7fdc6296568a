"""Any number of ranks trains one loss curve in every stage, and evaluates to the same scores.

The real scripts run in order on ranks over gloo, in float32, all of a number of ranks in the same processes. Each stage
starts from what one process made of the stage before, so that differences do not add up over the stages. What is left
of them is rounding: each rank adds up its own gradients before all of them are added, and other micro-batches have
products of other shapes.
"""

import contextlib
import os
from pathlib import Path

import pytest

from nanochat import distributed
from nanochat.distributed import Ranks
from nanochat.logs import read_log
from nanochat.stages import STAGES
from tasks import recipes
from tests.helpers import module_of
from tests.test_distributed import start_ranks


def commands(steps: int, rows: int) -> dict[str, list[str]]:
    """The scripts and their flags. steps: of each stage. rows: of a micro-batch."""
    stage = ["--device-type=cpu", f"--num-iterations={steps}", "--save-every=-1", f"--device-batch-size={rows}"]
    tokens = ["--total-batch-size=1024", "--eval-every=-1", "--eval-tokens=2000"]
    return {
        "base": [*stage, *tokens, "--depth=2", "--max-seq-len=64", "--sample-every=-1"],
        "base_loss": ["--split-tokens=2000", f"--device-batch-size={rows}", "--device-type=cpu"],
        "mid": [*stage, *tokens],
        "sft": [*stage, "--target-examples-per-step=12", "--eval-every=-1", "--eval-steps=1", "--eval-metrics-every=-1",
                "--init-lr-frac=0.5"],
        "chat_eval": ["--device-type=cpu", "-i", "sft", "-x", "9", "-m", "6", "-b", str(rows)],
        "rl": [*stage, "--examples-per-step=8", "--num-samples=4", "--max-new-tokens=6", "--eval-every=-1",
               "--eval-examples=9", "--eval-samples=2", "--source=sft", "--init-lr-frac=0.5",
               f"--rollout-batch-size={8 * rows}"],
    }


def _run(ranks: Ranks, text: str, first: str, folder: str, steps: int, rows: int) -> None:
    """Run all scripts in `folder`; where `first`, another folder, is not empty, it has the models to start from."""
    base = Path(folder)
    os.environ |= {"NANOCHAT_BASE_DIR": str(base), "NANOCHAT_DTYPE": "float32"}
    if ranks.is_main:
        base.mkdir()
        for name in ("base_data", "tokenizer"):
            (base / name).symlink_to(Path(text) / name)
    distributed.barrier(ranks, "the folder")
    with pytest.MonkeyPatch.context() as patch, open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        patch.setattr(recipes.WorldSums, "reward", lambda self, conversation, answer: float(len(answer) % 2))
        if ranks.world_size > 1:  # the scripts share one group
            patch.setattr(distributed, "init_ranks", lambda device_type: ranks)
            patch.setattr(distributed, "close_ranks", lambda: None)
        for name, flags in commands(steps, rows).items():
            module_of(STAGES[name].script if name in STAGES else f"scripts.{name}").main(flags)
            if first and name in STAGES and ranks.is_main:
                made = base / STAGES[name].folder
                made.rename(base / f"own_{made.name}")
                made.symlink_to(Path(first) / made.name)
            distributed.barrier(ranks, name)


def told(base: Path) -> dict[str, list[float]]:
    """The curves and scores of all stages, by name."""
    def curve(log: str, kind: str, *names: str) -> list[float]:
        return [row[name] for row in read_log(base / "logs" / f"{log}_d2.jsonl") if row["kind"] == kind
                for name in names]
    return {f"{stage} loss": curve(stage, "train", "loss") for stage in ("base", "mid", "sft")} | {
        "rl loss": curve("rl", "rl", "loss"),
        "rl rollouts": curve("rl", "rl", "reward", "kept_groups", "sequence_length", "ended"),
        "base bpb": curve("base", "val", "bpb"), "mid bpb": curve("mid", "val", "bpb"),
        "base_loss bpb": curve("base_loss", "loss", "train_bpb", "val_bpb"), "sft val": curve("sft", "val", "loss"),
        "pass@k": curve("rl", "pass", "pass@1", "pass@2")}


def compare(folder: Path, text: Path, steps: int, worlds: list[tuple[int, int]]) -> dict[str, float]:
    """Run on each (ranks, rows of a micro-batch). Return the largest difference of each curve from the first's."""
    first, curves, answers = "", [], []
    for world_size, rows in worlds:
        base = folder / f"{world_size}-{rows}"
        start_ranks(world_size, _run, str(text), first, str(base), steps, rows)
        first = first or str(base)
        curves.append(told(base))
        answers.append({path.name: path.read_text() for path in base.glob("chat_eval/*/*.jsonl")})
    assert len(curves[0]["base loss"]) == len(curves[0]["rl loss"]) == steps and all(curves[0].values())
    assert any(curves[0]["rl loss"]) and answers[0]
    assert all(other == answers[0] for other in answers), "answers of chat_eval differ"
    return {name: max(abs(a - b) for other in curves for a, b in zip(curve, other[name], strict=True))
            for name, curve in curves[0].items()}


def check(found: dict[str, float], losses: float) -> None:
    print({name: f"{difference:.1e}" for name, difference in found.items()})
    for name, difference in found.items():
        assert difference <= (0 if name == "pass@k" else losses), found


@pytest.mark.long
def test_ranks_and_micro_batches_change_no_curve_and_no_score(tiny, tmp_path):
    check(compare(tmp_path, tiny, 4, [(1, 2), (2, 2), (3, 2), (4, 1)]), losses=1e-5)


@pytest.mark.slow
def test_fifty_steps_are_one_curve_on_up_to_eight_ranks(tiny, tmp_path):
    check(compare(tmp_path, tiny, 50, [(1, 2), (2, 2), (3, 2), (4, 2), (8, 1)]), losses=1e-5)
