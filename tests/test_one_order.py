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
import torch

from nanochat import distributed, rl
from nanochat.distributed import Ranks
from nanochat.logs import read_log
from nanochat.run import StageRun
from nanochat.stages import STAGES
from tests.helpers import module_of
from tests.test_distributed import start_ranks


def commands(steps: int, size: int, rows: int) -> dict[str, list[str]]:
    """The scripts and their flags. steps: of each stage. size: rows of a step. rows: of a micro-batch."""
    stage = ["--device-type=cpu", f"--num-iterations={steps}", "--save-every=-1", f"--device-batch-size={rows}"]
    tokens = [f"--total-batch-size={64 * size}", "--eval-every=-1", "--eval-tokens=2000"]
    return {
        "base": [*stage, *tokens, "--depth=2", "--max-seq-len=64", "--sample-every=-1"],
        "base_loss": ["--split-tokens=2000", f"--device-batch-size={rows}", "--device-type=cpu"],
        "mid": [*stage, *tokens],
        "sft": [*stage, f"--target-examples-per-step={size}", "--eval-every=-1", "--eval-steps=1",
                "--eval-metrics-every=-1", "--init-lr-frac=0.5"],
        "chat_eval": ["--device-type=cpu", "-i", "sft", "-x", "9", "-m", "6", "-b", str(rows)],
        "rl": [*stage, f"--examples-per-step={size // 2}", "--num-samples=4", "--max-new-tokens=6", "--eval-every=-1",
               "--eval-examples=9", "--eval-samples=2", "--source=sft", "--init-lr-frac=0.5",
               f"--rollout-batch-size={8 * rows}"],
    }


def _run(ranks: Ranks, text: str, first: str, folder: str, steps: int, size: int, rows: int) -> None:
    """Run all scripts in `folder`; where `first`, another folder, is not empty, it has the models to start from."""
    base = Path(folder)
    os.environ |= {"NANOCHAT_BASE_DIR": str(base), "NANOCHAT_DTYPE": "float32"}
    if ranks.is_main:
        base.mkdir()
        for name in ("base_data", "tokenizer"):
            (base / name).symlink_to(Path(text) / name)
    distributed.barrier(ranks, "the folder")
    with pytest.MonkeyPatch.context() as patch, open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        patch.setattr(rl, "reward_of", lambda task, conversation, row, text: float(len(text) % 2))
        patch.setattr(StageRun, "sample_answers", lambda *args: None)  # half of the time
        if ranks.world_size > 1:  # the scripts share one group
            patch.setattr(distributed, "init_ranks", lambda device_type: ranks)
            patch.setattr(distributed, "close_ranks", lambda: None)
        for name, flags in commands(steps, size, rows).items():
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


def compare(folder: Path, text: Path, steps: int, size: int, worlds: list[tuple[int, int]]) -> dict[str, float]:
    """Run on each (ranks, rows of a micro-batch); return the largest difference of each curve from the first."""
    first, curves, answers = "", [], []
    for world_size, rows in worlds:
        base = folder / f"{world_size}-{rows}"
        start_ranks(world_size, _run, str(text), first, str(base), steps, size, rows)
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
    check(compare(tmp_path, tiny, 3, 8, [(1, 2), (2, 2), (3, 2), (4, 1)]), losses=1e-5)


def _resume(ranks: Ranks, folder: str, flags: list[str]) -> None:
    os.environ |= {"NANOCHAT_BASE_DIR": folder, "NANOCHAT_DTYPE": "float32"}
    with open(f"{folder}/out-{ranks.world_size}-{ranks.rank}.txt", "w") as out, contextlib.redirect_stdout(out):
        module_of("scripts.base_train").main(flags)


def test_a_resume_on_other_ranks_goes_on_with_the_next_rows_and_says_what_differs(tiny_base):
    flags = [*commands(4, 8, 2)["base"], "--save-every=2", "--keep=9"]
    ranks = Ranks(0, 0, 1, torch.device("cpu"))
    _resume(ranks, str(tiny_base), flags)
    whole, folder = told(tiny_base)["base loss"], tiny_base / "base_checkpoints" / "d2"
    for path in folder.glob("*_000004*"):
        path.unlink()
    start_ranks(2, _resume, str(tiny_base), [*flags, "--device-batch-size=1"])
    losses = told(tiny_base)["base loss"]
    assert len(losses) == 6 and losses[4:] == pytest.approx(whole[2:], abs=1e-5)
    out = (tiny_base / "out-2-0.txt").read_text()
    assert "1 → 2 processes, 2 → 1 rows a device: the run goes on with the very next rows" in out
    assert "no longer bit for bit" in out and "no longer bit for bit" not in (tiny_base / "out-2-1.txt").read_text()


@pytest.mark.slow
def test_fifty_steps_are_one_curve_on_up_to_eight_ranks(tiny, tmp_path):
    check(compare(tmp_path, tiny, 50, 16, [(1, 2), (2, 2), (3, 2), (4, 2), (8, 1)]), losses=1e-5)
