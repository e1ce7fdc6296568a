"""bench.sweep sees a difference that is there and none where there is none; its numbers are those of the definitions.

Runs that train do so in this process; one is a process of its own, and is stopped.
"""

import json
import math
import os
import sys

import numpy as np
import pytest
import torch

from bench.sweep import __main__ as sweep
from bench.sweep import arms, recall, runs, series, stats, text, worker
from nanochat.checkpoint import steps_in
from nanochat.errors import UserError
from nanochat.evaluation.loss import evaluate_bpb
from nanochat.launcher import Owner
from nanochat.loading import load_model
from nanochat.logs import read_log
from nanochat.tokenizer import get_token_bytes
from scripts import tok_train
from tests.helpers import module_of, small_model

SMALL = ["--vocab=300", "--depth=1", "--steps=30", "--batch=128", "--seq-len=16", "--held-out=3000", "--jobs=2",
         "--device-type=cpu"]
COMMON = ["--depth=1", "--max-seq-len=16", "--total-batch-size=128", "--num-iterations=30"]
SLOW = "slow: published --matrix-lr=0.002 --embedding-lr=0.02 --unembedding-lr=0.0004"


def in_this_process(monkeypatch):
    """Let runs and the tokenizer be trained here. Return the list of the tags that are run."""
    done = []

    def do_runs(owner, todo, out, *, device_type, threads, finished, keep_models=False, **options):
        monkeypatch.setenv("NANOCHAT_BASE_DIR", str(out))
        for run in todo:
            done.append(run.tag)
            worker.work(runs.spec_of(run, out, 0, device_type, threads, keep_models), out)
        finished()
        return []

    def train_tokenizer(out, vocab):
        monkeypatch.setenv("NANOCHAT_BASE_DIR", str(out))
        tok_train.main([f"--vocab-size={vocab}"])

    monkeypatch.setattr(sweep, "do_runs", do_runs)
    monkeypatch.setattr(sweep, "train_tokenizer", train_tokenizer)
    return done


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep") / "shards"
    module_of("nanochat.dataset").main(["small-world", "--docs=4000", f"--to={folder}"])
    return folder


@pytest.fixture(scope="module")
def swept(shards, tmp_path_factory):
    """The folder of a sweep, the tags that were run for it, and its results."""
    out = tmp_path_factory.mktemp("sweep") / "out"
    with pytest.MonkeyPatch.context() as patch:
        done = in_this_process(patch)
        sweep.main([f"--data={shards}", f"--out={out}", *SMALL, "--seeds=1,2", "--keep-models", "published", SLOW,
                    "again: published", "other: published --check-every=7"])
    return out, done, json.loads((out / "results.json").read_text())


def test_it_sees_the_difference_that_is_there_and_none_where_there_is_none(swept):
    out, done, found = swept
    assert [tag.rpartition("_")[0] for tag in done] == ["published_s1", "slow_s1", "other_s1",  # `again` is the first
                                                        "published_s2", "slow_s2", "other_s2"]
    first, slow, again, other = found["rows"]
    assert slow["verdict"] == "harmful" and slow["bpb_difference"]["value"] > 5 * slow["bpb_difference"]["error"] > 0
    assert slow["loss_difference"]["value"] > 5 * slow["loss_difference"]["error"]
    for same in (again, other):
        assert same["bpb_difference"] == same["loss_difference"] == {"value": 0.0, "error": 0.0}
        assert same["verdict"] == "not kept"
    assert [row["seed"] for row in first["seeds"]] == [1, 2]
    assert first["seeds"][0]["bpb"]["value"] != first["seeds"][1]["bpb"]["value"]
    report = (out / "report.md").read_text()
    assert "8 of 8 runs are done" in report and "| slow " in report and "harmful" in report
    for name in ("loss.svg", "bpb.svg"):
        assert (out / name).read_text().count("<svg") == 1 and f"![{name}]({name})" in report


def test_arms_of_a_seed_read_the_same_documents_and_seeds_others(swept):
    out, done, _ = swept
    steps = {tag: [row for row in read_log(out / "logs" / f"base_{tag}.jsonl") if row["kind"] == "train"]
             for tag in done}
    assert all([row["loss"] for row in rows] == json.loads((out / "runs" / f"{tag}.json").read_text())["loss"]
               and len(rows) == 30 for tag, rows in steps.items())
    first = {tag: rows[0]["norm"] for tag, rows in steps.items()}  # of weights and batch, before they differ by the arm
    assert len({first[tag] for tag in done if "_s1_" in tag}) == 1 == len({first[tag] for tag in done if "_s2_" in tag})
    assert len(set(first.values())) == 2


def test_what_is_done_is_kept_and_only_the_rest_is_run(swept, monkeypatch, capsys):
    out, before, _ = swept
    done = in_this_process(monkeypatch)
    sweep.main([f"--out={out}", *SMALL, "--seeds=1,2", "renamed: published", SLOW])
    assert not done
    sweep.main([f"--out={out}", *SMALL, "--seeds=2,3", "published"])
    assert len(done) == 1 and "_s3_" in done[0] and done[0] not in before
    assert not (out / "base_checkpoints" / done[0]).exists()
    (out / "runs" / f"{done[0]}.json").write_text('{"tag": "cut o')
    sweep.main([f"--out={out}", *SMALL, "--seeds=2,3", "--dry-run", "published"])
    assert "2 runs, 1 of them not done" in capsys.readouterr().out


def test_held_out_nats_are_those_of_the_plain_evaluation(swept, monkeypatch):
    out, done, found = swept
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(out))
    model, tokenizer, _ = load_model("base", "cpu", model_tag=done[0])
    with np.load(out / "heldout.npz") as kept:
        ids, ends = kept["ids"].astype(np.int64), kept["ends"]
    held = json.loads((out / "runs" / f"{done[0]}.json").read_text())["held_out"]
    assert len(held["nats"]) == len(ends) > 40 and 2000 < sum(held["tokens"]) <= 3000
    bos, documents = tokenizer.get_bos_token_id(), np.split(ids, ends[:-1])
    for number in (0, 7, len(ends) - 1):
        rows = [torch.tensor([[bos, *documents[number][at:at + 16]]]) for at in range(0, len(documents[number]), 16)]
        bpb = evaluate_bpb(model, [(row[:, :-1], row[:, 1:]) for row in rows], get_token_bytes())
        assert held["bytes"][number] == len(tokenizer.decode(documents[number].tolist()).encode())
        assert held["nats"][number] == pytest.approx(bpb * math.log(2) * held["bytes"][number], rel=1e-5)
    assert found["rows"][0]["seeds"][0]["bpb"]["value"] == pytest.approx(
        sum(held["nats"]) / sum(held["bytes"]) / math.log(2))


@pytest.mark.parametrize("arm, message", [
    ("published --n-kernl=4", "n-kernl"),
    ("published --n-kernel=0", "n-kernel"),
    ("published --layer-pattern=SX", "these flags make no model"),
    ("published --total-batch-size=100", "total.batch.size"),
    ("published --seed=3", "which the sweep sets itself"),
    ("latest", "no recipe: there is published and modern"),
    ("x: --n-kernel=4", "does not begin with a recipe"),
    ("twice: published", "two arms have the name 'twice'"),
    ("published --x='", "cannot be read"),
])
def test_a_wrong_arm_is_refused_before_anything_runs(tmp_path, arm, message):
    with pytest.raises(UserError, match=message):
        sweep.main([f"--out={tmp_path / 'out'}", *SMALL, "twice: published", arm])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("flags, message", [
    (["--seeds=1,1", "published"], "different whole numbers"),
    (["--depths=1,2", "--steps=3,4,5", "published"], "3 numbers for 2 depths"),
    (["--equal=flops", "published", "published --num-iterations=7"], "the number of steps follows"),
    (["--depths=1,2", "published --depth=3"], "--depths sets that"),
])
def test_wrong_flags_are_refused(tmp_path, flags, message):
    with pytest.raises(UserError, match=message):
        sweep.main([f"--out={tmp_path / 'out'}", *SMALL, *flags])


def test_text_that_would_be_read_twice_is_refused_and_another_text_too(swept, shards, tmp_path):
    out, _, _ = swept
    with pytest.raises(UserError, match="the training text is too short"):
        sweep.main([f"--out={out}", *SMALL, "--steps=9000", "published"])
    with pytest.raises(UserError, match="a tokenizer of 300 tokens, not 400"):
        sweep.main([f"--out={out}", *SMALL, "--vocab=400", "published"])
    other = tmp_path / "shards"
    other.symlink_to(shards)  # the same by another name
    sweep.main([f"--out={out}", f"--data={other}", *SMALL, "--dry-run", "published"])
    module_of("nanochat.dataset").main(["small-world", "--docs=50", f"--to={tmp_path / 'more'}"])
    with pytest.raises(UserError, match="use another --out"):
        sweep.main([f"--out={out}", f"--data={tmp_path / 'more'}", *SMALL, "published"])


def test_a_stopped_run_saves_and_goes_on_from_there(swept, monkeypatch):
    out, _, _ = swept
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(out))
    arm, = arms.read_arms(["stopped: published"], [*COMMON, "--num-iterations=200"], 300)
    run = runs.run_of(arm, 1, 1, "text")
    log = out / "logs" / f"base_{run.tag}.jsonl"

    class Stopped(Exception):
        pass

    with pytest.raises(Stopped), Owner() as owner:
        monkeypatch.setattr(owner, "wait", lambda *jobs: stop_when_it_trains(owner, jobs))

        def stop_when_it_trains(owner, jobs):
            while not log.exists() or not any(row["kind"] == "train" for row in read_log(log)):
                assert all(job.going_on for job in jobs), (out / "runs" / f"{run.tag}.txt").read_text()
                owner._tick()
            raise Stopped

        runs.do_runs(owner, [run], out, jobs=1, device_type="cpu", threads=1, keep_models=False, hours=0.0,
                     finished=lambda: None, say=print)
    step, = steps_in(out / "base_checkpoints" / run.tag)
    assert 0 < step < 200 and runs.result_of(run, out) is None
    worker.work(runs.spec_of(run, out, 0, "cpu", 1, keep_model=False), out)
    assert len(runs.result_of(run, out)["loss"]) == 200 and not (out / "base_checkpoints" / run.tag).exists()
    assert sum(row["kind"] == "train" for row in read_log(log)) == 200  # none of them twice


def test_runs_follow_in_their_order_as_many_as_there_are_places(tmp_path, monkeypatch):
    """A failed run does not end the others; without time, none is started."""
    (tmp_path / "runs").mkdir()
    found = arms.read_arms(["a: published", "b: published --n-kernel=2"], COMMON, 300)
    todo = [runs.run_of(arm, 1, seed, "text") for seed in (1, 2, 3) for arm in found]
    started, most = [], []

    def start(owner, run, out, slot, *_):
        started.append((run, slot))
        path = os.fspath(out / "runs" / f"{run.tag}.json")
        code = "raise SystemExit(3)" if run is todo[1] else f"open({path!r}, 'w').write('{{}}')"
        job = owner.start(run.title, [sys.executable, "-S", "-c", code])
        most.append(sum(job.going_on for job in owner._jobs))
        return job

    monkeypatch.setattr(runs, "_start", start)
    said = []
    options = {"jobs": 2, "device_type": "cpu", "threads": 1, "keep_models": False, "say": said.append,
               "finished": lambda: None}
    with Owner() as owner:
        assert runs.do_runs(owner, todo, tmp_path, hours=0.0, **options) == [todo[1]]
        assert [run for run, _ in started] == todo and {slot for _, slot in started} == {0, 1} and max(most) <= 2
        assert any("failed" in line and todo[1].title in line for line in said)
        assert runs.not_done(todo, tmp_path) == [todo[1]]
        assert runs.do_runs(owner, todo, tmp_path, hours=1e-12, **options) == [] and len(started) == 6
    assert "6 runs are not started" in said[-1]


def test_equal_flops_and_depths_set_the_steps():
    config = sweep.Config(vocab=300, depths="1,2,3", seq_len=16, batch=128, steps="100", equal="flops")
    found = sweep.arms_of(config, ["published", "thin: published --mlp-ratio=1"])
    ratios = []
    for depth, (first, thin) in found.items():
        assert first.base.shape.n_layer == depth
        step = thin.base.flops_per_token * thin.base.total_batch_size
        assert thin.base.num_iterations > first.base.num_iterations and abs(thin.flops - first.flops) <= step / 2
        size = sweep.scaling_parameters(sweep.meta_model(first.base.shape))
        ratios.append(first.base.tokens / size)
    assert ratios == pytest.approx([ratios[0]] * 3, rel=0.01)


def test_equal_time_follows_the_median_of_the_timed_steps(tmp_path, monkeypatch):
    config = sweep.Config(vocab=300, depth=1, seq_len=16, batch=128, steps="100")
    found = sweep.arms_of(config, ["published", "fast: published --mlp-ratio=1"])
    seconds = {("published", 1): 0.3, ("published", 2): 9.0, ("published", 3): 0.2,  # one is disturbed
               ("fast", 1): 0.2, ("fast", 2): 0.1, ("fast", 3): 0.2}

    def work(todo, finished):
        for run in todo:
            assert run.arm.base.num_iterations == sweep.TIMING_STEPS and not run.measure
            (tmp_path / "runs" / f"{run.tag}.json").write_text(json.dumps(
                {"step_seconds": seconds[run.arm.name, int(run.key[1])]}))
        return []

    (tmp_path / "runs").mkdir()
    first, fast = sweep.with_equal_time(found, 1, "text", tmp_path, work)[1]
    assert first.base.num_iterations == 100 and fast.base.num_iterations == 150
    with pytest.raises(UserError, match="have no time|has no time"):
        sweep.with_equal_time(found, 2, "text", tmp_path, lambda todo, finished: todo[:1])


def test_statistics_are_those_of_the_definitions():
    dice = np.random.default_rng(0)
    a, b = dice.normal(3, 1, 50), dice.normal(3, 1, 50)
    part = (a - b)[40:]
    found = stats.paired_loss(a, b, 0.8)
    assert (found.value, found.error) == pytest.approx((part.mean(), part.std(ddof=1) / math.sqrt(10)))
    assert stats.paired_loss(a, b[:-1], 0.8) is None
    assert stats.mean_of([2.0]) == stats.Estimate(2.0, None)
    # the error of a ratio of sums: against the jackknife, another way to the same
    size = dice.integers(20, 400, 300)
    first = size * dice.normal(1.0, 0.1, 300)
    own = first + size * dice.normal(-0.01, 0.02, 300)
    found = stats.paired_bits(own, first, size)
    left_out = [((own - first).sum() - d) / (size.sum() - s) / math.log(2) for d, s in zip(own - first, size)]
    jackknife = math.sqrt(299 / 300 * ((np.array(left_out) - np.mean(left_out)) ** 2).sum())
    assert found.value == pytest.approx((own - first).sum() / size.sum() / math.log(2))
    assert found.error == pytest.approx(jackknife, rel=0.02)
    assert found.error < 0.4 * stats.bits_per_byte(own, size).error  # pairing pays
    assert [stats.verdict(stats.Estimate(value, 1.0)) for value in (-2.1, -1.9, 1.9, 2.1)] == [
        "kept", "not kept", "not kept", "harmful"]
    assert stats.verdict(stats.Estimate(-9.0, None)) == "one seed: no verdict"


def test_a_line_through_a_power_law_finds_its_exponent():
    flops = [1e12, 1e13, 1e14]
    slope, intercept, residual = series.line_through(flops, [4 * c ** -0.07 for c in flops])
    assert (slope.value, math.exp(intercept)) == pytest.approx((-0.07, 4)) and residual < 1e-12 > slope.error
    noisy = [4 * c ** -0.07 * e for c, e in zip(flops, (1.01, 0.99, 1.02))]
    slope, intercept, residual = series.line_through(flops, noisy)
    fitted, covariance = np.polyfit(np.log(flops), np.log(noisy), 1, cov=True)
    assert (slope.value, intercept) == pytest.approx(tuple(fitted))
    assert slope.error == pytest.approx(math.sqrt(covariance[0, 0]))
    fit = {"slope": slope, "intercept": intercept, "bpb": noisy}
    assert series.equivalent(fit, max(noisy) * 1.01) is None is series.equivalent(fit, min(noisy) * 0.99)
    assert noisy[2] < (middle := noisy[1]) and series.equivalent(fit, middle) == pytest.approx(
        math.exp((math.log(middle) - intercept) / slope.value))


def test_recall_of_one_who_looks_it_up_is_perfect_and_of_one_who_does_not_is_chance():
    class Oracle(torch.nn.Module):
        """Says what followed the last time that this token stood here, each with the same certainty."""

        config, device = small_model(sequence_len=32).config, torch.device("cpu")

        def forward(self, ids):
            logits = torch.zeros(*ids.shape, 97)
            for b, row in enumerate(ids.tolist()):
                for t, token in enumerate(row):
                    if token in row[:t]:
                        logits[b, t, row[t - row[:t][::-1].index(token)]] = 5.0
            return logits

    tokens = np.arange(90)
    found = recall.recall(Oracle(), tokens, 96)
    assert np.mean(found["found"]) == 1
    assert found["lookup"] == pytest.approx([math.log1p(96 * math.exp(-5))] * recall.ROWS, rel=0.02)
    assert np.mean(found["first"]) > 4 and np.mean(found["copy"]) < 2  # a token may stand twice in what is copied
    model = small_model(sequence_len=32)
    found, again = recall.recall(model, tokens, 96), recall.recall(model, tokens, 96)
    assert found == again and all(len(each) == recall.ROWS for each in found.values())
    assert np.mean(found["found"]) < 0.15


def test_all_documents_are_held_out_up_to_one_length():
    assert text.common_length([5, 100, 7, 50], 62) == 25  # 5 + 25 + 7 + 25
    assert text.common_length([5, 9], 100) == 9
    assert text.common_length([50, 50, 50], 2) == 1
