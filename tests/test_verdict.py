"""nanochat/evaluation/verdict.py and its place in the stages: a stage that taught nothing or did harm says so."""

import json
import math
import shutil
from dataclasses import asdict

import numpy as np
import pytest
import torch

from nanochat.distributed import Ranks
from nanochat.engine import Row
from nanochat.errors import UserError
from nanochat.evaluation.loss import EvalRows, evaluate_bpb, evaluate_loss
from nanochat.evaluation.verdict import FEW, Progress, judge_loss
from nanochat.logs import RunLog, read_log
from nanochat.rl import AnswerGroup, standard_error
from scripts import base_train, speedrun
from scripts.speedrun_plan import Machine
from tests.helpers import small_model
from tests.test_training import TINY

ALONE = Ranks(0, 0, 1, torch.device("cpu"))


def test_a_loss_is_compared_on_the_same_batches():
    curve = {0: 3.0, 10: 2.0}
    asked = []

    def evaluate(step):
        return lambda n: asked.append((step, n)) or curve[step] + n / 100

    for known, size in ((True, 20), (False, FEW)):
        progress = Progress({}, fresh=True)
        for step in (0, 5, 10):
            progress.measure(step, 10, "bpb", evaluate(step), 20, [8, 256],
                             known=curve[step] + 0.2 if known and step in curve else None)
        assert str(progress.verdict) == f"verdict: better: bpb {3 + size / 100:.4f} → {2 + size / 100:.4f}"
        assert progress.began["bpb"]["batches"] == size
        later = Progress(json.loads(json.dumps(progress.began)), fresh=False)  # from a checkpoint
        later.measure(7, 10, "bpb", evaluate(10), 20, [8, 256])
        later.measure(10, 10, "bpb", evaluate(10), 20, [8, 256], known=2.2)
        assert str(later.verdict) == str(progress.verdict)
    assert asked == [(0, FEW), (10, FEW), (10, FEW)]
    later.measure(10, 10, "bpb", evaluate(10), 20, [4, 256])
    assert later.verdict.word == "unknown" and "on other batches" in str(later.verdict)
    later.measure(10, 10, "loss", evaluate(10), 20, [8, 256])
    assert later.verdict.word == "unknown" and later.verdict.warning() == ""


@pytest.mark.parametrize("before, after, word", [(2.0, 1.9, "better"), (2.0, 2.001, "no change"),
                                                 (2.0, 2.0, "no change"), (2.0, 1.999, "no change"),
                                                 (2.0, 2.05, "worse"), (0.0, 0.1, "worse")])
def test_words_for_losses(before, after, word):
    verdict = judge_loss("bpb", before, after)
    assert verdict.word == word and (verdict.warning() != "") == (word != "better")


@pytest.mark.parametrize("before, after, error, word", [(0.1, 0.2, 0.01, "better"), (0.1, 0.12, 0.01, "no change"),
                                                        (0.2, 0.1, 0.01, "worse"), (0.0, 0.0, 0.0, "no change"),
                                                        (0.0, 0.01, 0.0, "better")])
def test_words_for_rates(before, after, error, word):
    progress = Progress({}, fresh=True)
    progress.measure_rate(0, 4, "pass@1", before, error)
    progress.measure_rate(2, 4, "pass@1", 0.9, error)
    progress.measure_rate(4, 4, "pass@1", after, error)
    assert progress.verdict.word == word and "standard error" in str(progress.verdict)


def test_what_is_not_finite_is_an_error_and_no_verdict():
    nan, inf = float("nan"), float("inf")
    for before, after in ((1.0, nan), (nan, 1.0), (1.0, inf)):
        with pytest.raises(UserError, match="the bpb is .* damaged, or training has diverged"):
            judge_loss("bpb", before, after)
    model = small_model()
    with torch.no_grad():
        model.lm_head.weight[:] = nan
    ids = torch.ones(2, 9, dtype=torch.long)
    with pytest.raises(UserError, match="bits per byte are nan"):
        evaluate_bpb(model, [(ids, ids)], torch.ones(97, dtype=torch.int32), ALONE)
    with pytest.raises(UserError, match="loss is nan"):
        evaluate_loss(model, [(ids, ids)], ALONE)


def test_a_model_that_knows_no_more_than_frequencies_is_told(tmp_path, monkeypatch):
    rows = EvalRows.__new__(EvalRows)
    rng = np.random.default_rng(0)
    rows._rows = rng.choice(97, size=(6, 33), p=(p := rng.dirichlet(np.ones(97)))).astype(np.int32)
    rows._rows[5, 9:] = -1  # padding
    sizes = torch.from_numpy(rng.integers(0, 4, 97)).int()
    targets = [t for t in rows._rows[:, 1:].flatten().tolist() if t >= 0 and sizes[t] > 0]
    share = {t: targets.count(t) / len(targets) for t in set(targets)}
    bits = -sum(math.log2(share[t]) for t in targets)
    wanted = bits / sum(int(sizes[t]) for t in targets)
    assert rows.unigram_bpb(sizes) == pytest.approx(wanted) and p.sum() == pytest.approx(1)
    progress = Progress({}, fresh=True, verdict=judge_loss("bpb", 3.0, 2.0))
    progress.compare_with_unigram(2.0, 2.1)
    assert str(progress.verdict) == "verdict: better: bpb 3.0000 → 2.0000"
    progress.compare_with_unigram(2.0, 1.9)
    assert "the frequencies of the tokens alone give 1.9000" in str(progress.verdict)


def test_the_standard_error_is_that_of_the_mean_over_problems():
    shares = [0.0, 0.5, 1.0, 0.5, 0.0, 1.0]
    groups = [AnswerGroup([Row([1], 1), Row([1], 1)], [float(share > 0), float(share == 1)]) for share in shares]
    wanted = torch.tensor(shares).std().item() / len(shares) ** 0.5
    assert standard_error(groups, len(shares), ALONE) == pytest.approx(wanted, abs=1e-6)
    assert standard_error(groups[:1], 1, ALONE) == 0.0


STILL = [*TINY, "--max-seq-len=128", "--total-batch-size=256", "--eval-every=-1", "--model-tag=still"]


def verdicts(base, tag):
    return [row for row in read_log(base / "logs" / f"base_{tag}.jsonl") if row["kind"] == "verdict"]


def test_a_run_says_at_its_end_what_it_taught_and_remembers_its_beginning_on_resume(tiny_base, capsys):
    """Learning rates of zero teach nothing; a resumed run judges by the number of its checkpoint."""
    off = ["--embedding-lr=0", "--unembedding-lr=0", "--matrix-lr=0"]
    base_train.main([*STILL, *off, "--num-iterations=2"])
    out = capsys.readouterr().out
    assert "\nverdict: no change: bpb " in out and "WARNING: this stage taught nothing" in out
    folder = tiny_base / "base_checkpoints" / "still"
    began = json.loads((folder / "meta_000002.json").read_text())["began"]["bpb"]
    capsys.readouterr()
    base_train.main([*STILL, "--num-iterations=8", "--save-every=4"])      # goes on from step 2
    out = capsys.readouterr().out
    assert "resuming from step 2" in out and f"\nverdict: better: bpb {began['value']:.4f} → " in out
    assert "WARNING: this stage" not in out
    assert [row["word"] for row in verdicts(tiny_base, "still")] == ["no change", "better"]
    for path in folder.glob("*_000008*"):
        path.unlink()
    base_train.main([*STILL, "--num-iterations=8", "--matrix-lr=3", "--embedding-lr=40", "--unembedding-lr=3",
                     "--warmdown-ratio=0", "--grad-clip=0"])
    assert "verdict: worse: bpb" in capsys.readouterr().out
    last = verdicts(tiny_base, "still")[-1]
    assert last["word"] == "worse" and last["before"] == began["value"] < last["after"]
    shutil.rmtree(folder)


def test_speedrun_repeats_the_verdict_of_every_stage_and_is_loud_about_harm(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    monkeypatch.setenv("SPEEDRUN_PROFILE", "small")
    plan = speedrun.make_plan(Machine([], 0, 2))
    for stage, loss in (("base", (2.0, 1.0)), ("mid", (2.0, 2.1)), ("sft", (2.0, 2.0))):
        with RunLog(stage, plan.tag, {}) as log:
            log.record("verdict", **asdict(judge_loss("bpb", *loss)))
    speedrun.conclude(plan, 5.0)
    found = [line.split(None, 1)[1] for line in capsys.readouterr().out.splitlines() if line.startswith("verdict")]
    assert found == ["pretraining: better: bpb 2.0000 → 1.0000",
                     "mid-training: worse: bpb 2.0000 → 2.1000 <-- WARNING",
                     "fine-tuning: no change: bpb 2.0000 → 2.0000 <-- WARNING"]
