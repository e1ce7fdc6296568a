"""Bad steps are skipped without a trace, runs that diverge stop with a dump, and the weights of the ranks are
compared."""

import json
import math
import os
import random
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from nanochat import guard as guarding
from nanochat import training
from nanochat.checkpoint import load_checkpoint, save_checkpoint, steps_in
from nanochat.distributed import Ranks
from nanochat.errors import UserError
from nanochat.guard import WINDOW, Band, Guard, Limits, Trend, redo, what_is_wrong
from nanochat.logs import RunLog, read_log
from nanochat.optim import MuonAdamW, parameter_groups
from nanochat.recipe import published
from nanochat.training import TrainingPlan, train, train_step
from tests.conftest import ROOT
from tests.helpers import small_model
from tests.test_distributed import start_ranks
from tests.test_training import TINY, assert_same

ALONE = Ranks(0, 0, 1, torch.device("cpu"))
NAN, INF = float("nan"), float("inf")


def rows_of(step: int, count: int = 4):
    ids = torch.randint(97, (count, 17), generator=torch.Generator().manual_seed(step))
    return list(zip(ids[:, :-1].split(1), ids[:, 1:].split(1)))


def with_factor(rows, factor: float):
    """Multiply the loss of the first token of the last row, and so its gradient."""
    factors = [torch.ones(targets.shape) for _, targets in rows]
    factors[-1][0, 0] = factor
    return [(*row, part) for row, part in zip(rows, factors)]


def state_of(model, optimizer):
    optimizer.wait()
    return {**{name: x.clone() for name, x in model.state_dict().items()},
            **{f"{name} {key}": x for name, of in (optimizer.state_dict() or {}).items() for key, x in of.items()}}


def new(ranks=ALONE, decay=0.1):
    groups = {name: replace(group, weight_decay=decay) for name, group in published.groups.items()}
    model = small_model()
    return model, MuonAdamW(parameter_groups(model, groups), ranks)


# ---- the decision on the device

def _skips(ranks, out):
    bad = {"nan": {"batch": NAN}, "inf": {"batch": INF}, "norm": {"limits": Limits(norm=1e-9)},
           "loss": {"limits": Limits(loss=1e-9)}}
    results = {}
    for how in (None, *bad):
        model, optimizer = new(ranks)
        with optimizer.gathering_in_forward(model):
            for step in range(5):
                if how is not None and step == 3:
                    before = state_of(model, optimizer)
                    rows = rows_of(99, 3)  # a rank without a row may be among them
                    if "batch" in bad[how]:
                        rows = with_factor(rows, bad[how]["batch"])
                    stats = train_step(model, optimizer, rows[ranks.rank::ranks.world_size], ranks, clip=1.0,
                                       limits=bad[how].get("limits", Limits()))
                    assert stats[4] == 0 and not optimizer.applied, how
                    model.zero_grad()
                    held = train_step(model, optimizer, rows_of(98)[ranks.rank::ranks.world_size], ranks,
                                      limits=Limits(hold=True))
                    assert held[4] == 0 and held[:2].isfinite().all()
                    assert_same(state_of(model, optimizer), before)
                    assert optimizer.steps == 3
                    optimizer.applied = ~optimizer.applied
                stats = train_step(model, optimizer, rows_of(step)[ranks.rank::ranks.world_size], ranks, clip=1.0,
                                   limits=Limits(loss=99.0, norm=1e6, hold=True))
                assert stats[4] == 1
        results[how] = state_of(model, optimizer)
    for how in bad:
        assert_same(results[how], results[None])
    if ranks.is_main:
        torch.save(results[None], out)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_a_skipped_step_is_as_if_it_had_never_been(tmp_path, world):
    start_ranks(world, _skips, tmp_path / "state.pt") if world > 1 else _skips(ALONE, tmp_path / "state.pt")
    steps = [x for name, x in torch.load(tmp_path / "state.pt").items() if name.endswith(" step")]
    assert steps and all(step == 5 for step in steps)


def test_adamw_is_that_of_torch_with_skipped_steps_between():
    """The bias correction comes from a table, by a count that the device keeps."""
    p = torch.nn.Parameter(torch.randn(7))
    q = torch.nn.Parameter(p.detach().clone())
    group = {"kind": "adamw", "names": ["p"], "params": [p], "lr": 0.01, "weight_decay": 0.1, "betas": (0.8, 0.95),
             "eps": 1e-8}
    ours = MuonAdamW([group], ALONE)
    theirs = torch.optim.AdamW([q], lr=0.01, weight_decay=0.1, betas=(0.8, 0.95), eps=1e-8)
    dice = torch.Generator().manual_seed(1)
    for step in range(600):  # 400 count, and the table has 352
        p.grad = torch.randn(7, generator=dice)
        if step % 3 == 1:
            p.grad[2] = NAN
        else:
            q.grad = p.grad.clone()
            theirs.step()
        ours.step(clip=None)
    torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
    assert ours.steps == 400


# ---- limits and trends

def test_a_band_is_six_sigma_of_the_last_steps_known():
    band, dice = Band(0.01), random.Random(1)
    values = [dice.gauss(3, 0.5) for _ in range(300)]
    for step, value in enumerate(values):
        past = torch.tensor(values[:max(0, step - 1)][-WINDOW:], dtype=torch.float64)
        limit = band.limit(step)
        if len(past) < guarding.WARM_UP:
            assert limit == INF
        else:
            assert limit == pytest.approx(float(past.mean() + 6 * past.std()), rel=1e-12)
        band.add(step, value)
    again = Band(0.01)
    again.load(band.state())
    assert again.limit(300) == band.limit(300) and again.limit(301) == band.limit(301) != band.limit(300)
    before = band.limit(302)
    band.add(300, 1e30)
    assert before < band.limit(302) < 1.5 * before  # one value moves it little, however large


def test_a_lasting_change_of_level_is_accepted_after_a_few_steps():
    band, dice = Band(guarding.NORM_AT_LEAST), random.Random(1)
    outside = []
    for step in range(400):
        value = dice.gauss(0, 0.25) + (math.log(12) if step >= 200 else 0)
        outside += [step] if value > band.limit(step) else []
        band.add(step, value)
    assert outside and outside[-1] < 200 + guarding.IN_A_ROW, outside


def test_the_trend_is_above_where_the_loss_rises_and_stays():
    trend = Trend()
    for step in range(60):
        trend.add(step, 6.2 - step / 30)
    assert trend.sound == 60 and not trend.rising and not trend.above
    for step in range(60, 70):
        trend.add(step, 9.0 if step == 60 else 4.2)  # one spike
    assert trend.above == 0
    for step in range(70, 110):
        trend.add(step, 4.2 + (step - 70) / 4)
    assert trend.rising and trend.above >= guarding.PATIENCE and 60 < trend.sound < 85


@pytest.mark.parametrize("losses", [
    [7.4 * 0.99 ** i + 0.9 for i in range(500)], [14.3] + [4 * 0.97 ** i + 0.7 for i in range(200)],
    [0.36 + 0.2 * math.sin(i) for i in range(100)]])
def test_healthy_losses_are_never_near_the_limits(losses):
    band, trend = Band(guarding.LOSS_AT_LEAST), Trend()
    for step, loss in enumerate(losses):
        assert loss < band.limit(step) and not trend.rising
        band.add(step, loss)
        trend.add(step, loss)


# ---- the guard in a run of training

def run(base, name, factor_of=lambda step: 1.0, steps=84, mode="skip", break_weights=None, ranks=ALONE, judges=True,
        lr_scale=0.02):
    """Train a small model with faults; return the guard, the model and the records of the log."""
    model, optimizer = new(ranks)
    plan = TrainingPlan(steps, 1, 64, clip=1.0)
    object.__setattr__(plan, "rates", type("Rates", (), {"factor": lambda self, step, of: lr_scale,
                                                        "fallen": lambda self, step, of: 0.0})())
    object.__setattr__(plan, "decay_scale", lambda step: 1.0)  # so that nothing follows from the number of steps
    folder = base / name
    with RunLog("base", name, {}, enabled=ranks.is_main) as log:
        guard = Guard(model, optimizer, ranks, log, mode=mode, folder=folder, judges_loss=judges)

        def batches(step):
            rows = rows_of(step % 7)
            if (factor := factor_of(step)) != 1.0:
                rows = with_factor(rows, factor)
            return rows[ranks.rank::ranks.world_size]

        def before(step):
            if break_weights is not None:
                optimizer.wait()
                break_weights(step, model)
        try:
            train(model, optimizer, batches, plan, ranks, log, flops_per_token=1, peak=None, guard=guard,
                  before_step=before)
            end = "done"
        except UserError as error:
            end = str(error)
    return guard, model, read_log(log.path) if ranks.is_main else [], end


@pytest.fixture
def base(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    return tmp_path


def kinds(rows, kind):
    return [row for row in rows if row["kind"] == kind]


def test_bad_steps_are_skipped_counted_and_said(base, capsys):
    bad = {3: NAN, 75: 1e6, 76: 1e6, 80: INF}
    guard, _, rows, end = run(base, "skips", lambda step: bad.get(step, 1.0))
    assert end == "done" and guard.skipped == [*bad]
    assert [row["step"] for row in kinds(rows, "skipped")] == [*bad]
    out = capsys.readouterr().out
    assert "step 00003 | update skipped: the loss is nan, the gradient norm nan; 1 of" in out
    assert re.search(r"step 00075 \| update skipped: the gradient norm \S+ is above .*limit", out)
    assert [row["step"] - 1 for row in kinds(rows, "train") if row.get("skipped")] == [75, 76]
    assert all(math.isfinite(row["smooth_loss"]) for row in kinds(rows, "train"))


def test_healthy_steps_are_bit_for_bit_those_without_a_guard(base):
    states = {mode: run(base, mode, mode=mode)[1].state_dict() for mode in ("off", "skip")}
    assert_same(states["skip"], states["off"])


@pytest.mark.parametrize("mode, last", [("skip", 10 + guarding.IN_A_ROW - 1), ("stop", 10), ("off", 10)])
def test_a_run_that_stops_leaves_a_dump_from_which_the_step_can_be_done_again(base, capsys, mode, last):
    guard, model, rows, end = run(base, "stops", lambda step: NAN if 10 <= step <= last else 1.0, mode=mode, steps=20)
    assert end.startswith(f"step {last}: the loss is nan") and "training has diverged" in end
    folder = base / "stops" / "diverged" / f"step_{last:06d}"
    assert f"python -m nanochat.guard {folder}" in end
    reference = run(base, "until", steps=10)[1]
    assert_same(load_checkpoint(folder).model_state, reference.state_dict())  # before the step: none after it counted
    assert [row["step"] for row in kinds(rows, "diverged")] == [last]
    said = []
    found = redo(folder, torch.device("cpu"), said.append)
    assert math.isnan(found["loss"]) and "first loss that is not finite: micro-batch 3 of rank 0" in said


def test_too_many_skipped_steps_in_the_window_stop_the_run(base):
    bad = set(range(10, 400, 3))
    _, _, _, end = run(base, "many", lambda step: NAN if step in bad else 1.0)
    assert end.startswith(f"step {sorted(bad)[guarding.OF_WINDOW - 1]}: ") and "16 of the last" in end


def test_a_dump_done_again_gives_the_loss_and_norm_of_the_run_and_names_the_module(base):
    _, _, rows, end = run(base, "spike", lambda step: 1e6 if step == 70 else 1.0, mode="stop", lr_scale=0.0)
    [row] = kinds(rows, "diverged")
    folder = base / "spike" / "diverged" / "step_000070"
    assert row["step"] == 70 and str(folder) in end
    found = redo(folder, torch.device("cpu"), lambda line: None)
    assert found["loss"] == pytest.approx(row["loss"], rel=1e-5)
    assert found["norm"] == pytest.approx(row["norm"], rel=1e-4)
    broken = load_checkpoint(folder)
    broken.model_state["transformer.h.1.mlp.c_proj.weight"][:] = 3e38
    save_checkpoint(folder, 70, broken.model_state, broken.meta)
    said = []
    redo(folder, torch.device("cpu"), said.append)
    assert any(re.search(r"first output that is not finite: transformer\.h\.1", line) for line in said), said
    with pytest.raises(UserError, match="not a dump"):
        save_checkpoint(base / "plain", 1, broken.model_state, {"model_config": broken.meta["model_config"]})
        redo(base / "plain", torch.device("cpu"))


def test_weights_that_are_not_finite_are_named_at_once(base):
    def break_weights(step, model):
        if step == 7:
            with torch.no_grad():
                model.transformer.h[2].mlp.c_fc.weight[0] = INF
    _, _, rows, end = run(base, "inf", break_weights=break_weights, steps=20)
    assert end.startswith("step 7: ") and "transformer.h.2.mlp.c_fc.weight is not finite" in end
    assert not (base / "inf").exists()


def test_a_loss_of_any_sign_is_not_judged_where_it_means_nothing(base):
    dice = random.Random(1)
    guard, _, _, end = run(base, "rl", lambda step: dice.choice([-3.0, 4.0]), judges=False, lr_scale=0.0)
    assert end == "done" and guard.skipped == [] and guard.trend.weight == 0


def test_a_loss_that_rises_and_stays_stops_the_run(base):
    guard, _, rows, end = run(base, "rises", steps=300, lr_scale=30.0)
    assert "the loss has risen and stays" in end and "--matrix-lr" in end, end
    [row] = kinds(rows, "diverged")
    assert row["smooth_loss"] > row["lowest"] + 1 and row["step"] < 80
    assert len(list((base / "rises" / "diverged").iterdir())) == 1


def test_while_the_loss_is_high_nothing_is_saved_and_what_was_is_set_aside(base, capsys):
    model, optimizer = new()
    folder = base / "d4"
    with RunLog("base", "aside", {}) as log:
        guard = Guard(model, optimizer, ALONE, log, mode="skip", folder=folder)
        stats = torch.tensor([0.0, 1.0, 64.0, 0.0, 1.0])

        def go(step, loss):
            list(guard.recorded(step, rows_of(step)))
            stats[0] = loss
            guard.watch(step, stats.clone())
            guard.settle()
            if (step + 1) % 4 == 0 and guard.may_save(step + 1):
                save_checkpoint(folder, step + 1, model.state_dict(), {"model_config": model.config}, keep=1,
                                spared=guard.spared())
        for step in range(16):
            go(step, 5.0)
        assert steps_in(folder) == [16]
        with pytest.raises(UserError, match="step 16, is untouched.*") as raised:
            for step in range(16, 80):
                go(step, 5.0 + min((step - 15) / 4, 8.0))
    assert steps_in(folder) == [16]  # the good one, though only one is to be kept
    late = [at for at in guard.saved if at > 16]
    assert late and steps_in(folder / "diverged") == late[-1:] and "were set aside" in str(raised.value)
    assert "not saved: the smoothed loss" in capsys.readouterr().out
    with pytest.raises(UserError, match="risen"):
        guard.check_end(80)


def test_the_history_goes_through_a_checkpoint(base):
    guard = run(base, "history", lambda step: NAN if step in (5, 80) else 1.0)[0]
    state = json.loads(json.dumps(guard.state_dict()))
    other = Guard(guard.model, guard.optimizer, ALONE, guard.log, mode="skip")
    other.load_state_dict(state)
    assert [other.limits(step) for step in (84, 85)] == [guard.limits(step) for step in (84, 85)]
    assert other.limits(85).norm < INF and other.state_dict() == guard.state_dict()
    with pytest.raises(UserError, match="--guard=off"):
        other.load_state_dict({"norms": "x"})


# ---- the weights of the ranks

def test_what_is_wrong_names_ranks_and_the_first_parameter():
    one = int(torch.tensor(1.0).view(torch.int32))
    nan = int(torch.tensor(-NAN).view(torch.int32))
    same = [[1, 2, 3], [one] * 3]
    assert what_is_wrong("abc", [same] * 4) == ""
    other = [[1, 9, 8], [one] * 3]
    assert what_is_wrong("abc", [same, same, other, same]) == "b of rank 2 is not that of ranks 0, 1, 3"
    assert what_is_wrong("abc", [same, [[1, 2, 9], [one] * 3]]) == "c is not the same on ranks 0, 1"
    assert what_is_wrong("abc", [same, [[1, 9, 3], [one, one, nan]]]) == "c is not finite on rank 1"
    assert what_is_wrong("abc", [[[0, 0, 0], [one, one, 0x7f800000]]]) == "c is not finite"


def _diverges(ranks, base, out):
    os.environ["NANOCHAT_BASE_DIR"] = str(base)
    for name in ("alike", "flipped"):
        model, optimizer = new(ranks)
        with RunLog("base", name, {}, enabled=ranks.is_main) as log:
            guard = Guard(model, optimizer, ranks, log, mode="skip", check_every=4)

            def before(step, name=name, model=model, optimizer=optimizer):
                if name == "flipped" and step == 11 and ranks.rank == 1:  # one bit of a copy, before a comparison
                    optimizer.wait()
                    others = [p for bucket in optimizer.buckets for p, offset in zip(bucket.params, bucket.offsets)
                              if p is model.transformer.h[1].mlp.c_fc.weight]
                    others[0].detach().view(torch.int32)[3, 3] ^= 1
            try:
                train(model, optimizer, lambda step: rows_of(step)[ranks.rank::ranks.world_size],
                      TrainingPlan(20, 1, 64, clip=1.0), ranks, log, flops_per_token=1, peak=None, guard=guard,
                      before_step=before)
                end = "done"
            except UserError as error:
                end = str(error)
        if ranks.is_main:
            (out / name).write_text(end)


@pytest.mark.parametrize("world", [2, 3])
def test_a_rank_whose_weights_differ_is_named(tmp_path, world):
    start_ranks(world, _diverges, tmp_path, tmp_path)
    assert (tmp_path / "alike").read_text() == "done"
    told = (tmp_path / "flipped").read_text()
    whom = "is not the same on ranks 0, 1" if world == 2 else "of rank 1 is not that of ranks 0, 2"
    assert told.startswith("step 11: ") and f"transformer.h.1.mlp.c_fc.weight {whom}" in told, told


# ---- the real commands

def base_train(base, *flags, ranks=1, inject="", steps=12):
    """Run scripts.base_train in processes of its own. inject: code that runs before, to make a fault."""
    code = f"import runpy, sys, torch\n{inject}\nrunpy.run_module('scripts.base_train', run_name='__main__')"
    path = base / "inject.py"
    path.write_text(code)
    flags = [*TINY, "--eval-every=-1", f"--num-iterations={steps}", *flags]
    command = [sys.executable, str(path), *flags]
    if ranks > 1:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}",
                   str(path), *flags]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=240,
                          env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)})
    return done.returncode, done.stdout


NAN_AT = """
from nanochat import training
right, done = training.train_step, []
def step(model, optimizer, batches, ranks, **given):
    at = given.pop('at', None)
    def broken():
        for batch in batches:
            yield (*batch[:2], torch.full(batch[1].shape, float('nan')))
    bad = START + len(done) in BAD and ranks.rank == ranks.world_size - 1
    done.append(1)
    return right(model, optimizer, broken() if bad else batches, ranks, **given)
training.train_step = step
"""


def weights(base, step, tag="d2"):
    return torch.load(base / "base_checkpoints" / tag / f"model_{step:06d}.pt", weights_only=True)


@pytest.mark.long
def test_a_step_is_skipped_before_a_save_and_the_run_that_resumes_there_ends_as_the_unbroken_one(tiny_base):
    inject = NAN_AT.replace("BAD", "(4, 9)")
    code, out = base_train(tiny_base, "--save-every=5", "--model-tag=whole", inject=inject.replace("START", "0"))
    assert code == 0 and "step 00004 | update skipped" in out and "step 00009 | update skipped" in out, out
    folder = tiny_base / "base_checkpoints" / "whole"
    kept = weights(tiny_base, 12, "whole")
    for step in (10, 12):
        for path in folder.glob(f"*_{step:06d}.*"):
            path.unlink()
    code, out = base_train(tiny_base, "--save-every=5", "--model-tag=whole", inject=inject.replace("START", "5"))
    assert code == 0 and "resuming from step 5" in out, out
    assert_same(weights(tiny_base, 12, "whole"), kept)


@pytest.mark.long
def test_two_ranks_stop_alike_and_the_printed_command_does_the_step_again(tiny_base):
    code, out = base_train(tiny_base, "--save-every=2", ranks=2, steps=30,
                           inject=NAN_AT.replace("BAD", "range(3, 99)").replace("START", "0"))
    assert code == 1 and "5 of the last 8 updates were skipped" in out and "The last good checkpoint, of step 6" in out
    [command] = set(re.findall(r"python -m nanochat\.guard (\S+)", out))
    done = subprocess.run([sys.executable, "-m", "nanochat.guard", command, "--device-type=cpu"], cwd=ROOT, text=True,
                          capture_output=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    assert "step 7: weights of 7 steps" in done.stdout and "of 2 ranks" in done.stdout
    assert "transformer.h.0.mlp.c_fc.weight" in done.stdout
    assert "done again, the step is finite: suspect the hardware" in done.stdout  # the fault is in our train_step alone


def test_nothing_is_saved_of_an_update_that_breaks_the_weights(tiny_base):
    """Loss and norm of the step were finite."""
    from scripts import base_train as script
    flags = [*TINY, "--eval-every=-1", "--embedding-lr=1e39"]  # infinite in float32
    for more in (["--num-iterations=1"], ["--num-iterations=4", "--save-every=1"]):
        with pytest.raises(UserError, match="transformer.wte.weight is not finite. Nothing is saved"):
            script.main([*flags, *more])
    assert not list((tiny_base / "base_checkpoints").glob("*/model_*"))


def test_a_run_that_ends_with_a_nan_or_an_evaluation_of_nan_has_not_succeeded(tiny_base, monkeypatch):
    from nanochat.run import stage_run as running
    from scripts import base_train as script
    real, done = training.train_step, []

    def step(model, optimizer, batches, ranks, **given):
        done.append(1)
        rows = ((*batch, torch.full(batch[1].shape, NAN)) if len(done) == 3 else batch for batch in batches)
        return real(model, optimizer, rows, ranks, **given)
    monkeypatch.setattr(training, "train_step", step)
    flags = [*TINY, "--eval-every=-1", "--save-every=3"]
    with pytest.raises(UserError, match="step 2: the loss is nan"):
        script.main([*flags, "--num-iterations=3", "--guard=stop"])
    monkeypatch.setattr(running, "evaluate_bpb", lambda *given: NAN)
    with pytest.raises(UserError, match="step 2: the validation bpb is nan"):
        script.main([*flags, "--num-iterations=2", "--model-tag=bpb"])
    assert not list((tiny_base / "base_checkpoints").glob("*/model_*"))
