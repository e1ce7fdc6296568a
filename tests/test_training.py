"""The training step weighs tokens equally, and a run that was stopped resumes bit for bit."""

import gc
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from nanochat.checkpoint import latest_step
from nanochat.dataset import iter_documents
from nanochat.dataset.shards import ShardWriter, shard_name, write_source
from nanochat.distributed import Ranks, barrier, gather_objects
from nanochat.errors import UserError
from nanochat.logs import RunLog, read_log
from nanochat.optim import MuonAdamW, parameter_groups
from nanochat.recipe import MomentumSchedule, RateSchedule, published
from nanochat.training import TrainingPlan, clock, share_of_micro_batches, train, train_step
from tests.conftest import ROOT
from tests.helpers import small_model
from tests.test_distributed import start_ranks

ALONE = Ranks(0, 0, 1, torch.device("cpu"))
TINY = ["--depth=2", "--max-seq-len=32", "--device-batch-size=2", "--total-batch-size=384", "--num-iterations=12",
        "--eval-every=6", "--eval-tokens=2000", "--save-every=5", "--sample-every=-1", "--device-type=cpu"]


def base_train(*flags, ranks=1, wait=True):
    """Run scripts.base_train in processes of its own, under torchrun where there is more than one rank."""
    path = str(ROOT) + os.pathsep + os.environ.get("PYTHONPATH", "")
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    command = [sys.executable, "-m", "scripts.base_train", *TINY, *flags]
    if ranks > 1:
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        command = [sys.executable, *torchrun, "-m", "scripts.base_train", "--", *TINY, *flags]
    process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if not wait:
        return process
    out, _ = process.communicate(timeout=240)
    return process.returncode, out


@pytest.fixture
def base_train_here(capsys):
    """Return a function that runs base_train in this process, faster, and returns what it prints. For runs that no
    signal stops."""
    from scripts import base_train as script
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the processes of base_train: the same weights, bit for bit

    def run(*flags):
        script.main([*TINY, *flags])
        return capsys.readouterr().out
    yield run
    torch.set_num_threads(threads)


def weights(base, step=12, tag="d2"):
    return torch.load(base / "base_checkpoints" / tag / f"model_{step:06d}.pt", weights_only=True)


def losses(base, tag="d2"):
    return {row["step"]: row["loss"] for row in read_log(base / "logs" / f"base_{tag}.jsonl") if row["kind"] == "train"}


def assert_same(a, b, **tolerance):
    assert a.keys() == b.keys()
    tolerance = tolerance or {"rtol": 0, "atol": 0}
    for name in a:
        torch.testing.assert_close(a[name], b[name], msg=lambda m, name=name: f"{name}: {m}", **tolerance)


def test_every_supervised_token_weighs_the_same_whatever_micro_batch_it_is_in():
    ids = torch.randint(97, (4, 16))
    targets = torch.randint(97, (4, 16))
    targets[0, 3:] = -1  # the first row has few supervised tokens
    targets[1, :10] = -1
    models = [small_model(), small_model()]
    stats = []
    for model, cuts in zip(models, ([4], [1, 3])):
        optimizer = MuonAdamW(parameter_groups(model), ALONE)
        stats.append(train_step(model, optimizer, list(zip(ids.split(cuts), targets.split(cuts))), ALONE, clip=1.0))
    torch.testing.assert_close(stats[0], stats[1], rtol=1e-5, atol=1e-5)
    assert stats[0][0] == pytest.approx(small_model()(ids, targets).item(), abs=1e-4)
    assert stats[0][2] == (targets >= 0).sum()
    assert_same(models[0].state_dict(), models[1].state_dict(), rtol=1e-4, atol=1e-5)


def test_rates_and_momentum_follow_the_recipe():
    plan = TrainingPlan(1000, 1, 1, rates=RateSchedule(warmup_ratio=0.1, warmdown_ratio=0.2, final_lr_frac=0.1))
    assert plan.lr_scale(0) == pytest.approx(0.01)
    assert plan.lr_scale(99) == 1 and plan.lr_scale(500) == 1 and plan.lr_scale(800) == 1
    assert plan.lr_scale(900) == pytest.approx(0.55) and plan.lr_scale(1000) == pytest.approx(0.1)
    assert plan.momentum(0) == 0.85
    assert plan.momentum(150) == pytest.approx(0.9) and plan.momentum(5000) == pytest.approx(0.95)
    assert [plan.decay_scale(step) for step in (0, 500, 1000)] == pytest.approx([1, 0.5, 0])
    assert TrainingPlan(10, 1, 1, rates=RateSchedule(0.0, 0.0, 0.0)).lr_scale(10) == 1.0
    falls = MomentumSchedule(0.8, 1, 100, 0.9)
    plan = TrainingPlan(1000, 1, 1, rates=RateSchedule(0.0, 0.5, 0.0), muon_momentum=falls)
    assert [plan.momentum(step) for step in (0, 50, 100, 500, 750, 1000)] == pytest.approx([.8, .9, 1, 1, .95, .9])


def test_any_number_of_ranks_shares_a_batch():
    for world in range(1, 9):
        ranks = [Ranks(r, r, world, torch.device("cpu")) for r in range(world)]
        shares = [share_of_micro_batches(524288, 32, 2048, rank) for rank in ranks]
        assert sum(shares) == 8 and max(shares) - min(shares) <= 1
    with pytest.raises(UserError, match="--total-batch-size=98304"):
        share_of_micro_batches(100_000, 16, 2048, ALONE)
    with pytest.raises(UserError, match="fewer than the 9 ranks.*--device-batch-size=28"):
        share_of_micro_batches(524288, 32, 2048, Ranks(0, 0, 9, torch.device("cpu")))


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step():
    model = small_model()
    calls = []

    def batches(step):
        ids = torch.randint(97, (2, 8))
        calls.append(1)
        if len(calls) == 4:
            with torch.no_grad():
                model.lm_head.weight[5] = float("nan")
        return [(ids, ids)]

    with RunLog("base", "t", {}) as log, pytest.raises(UserError, match="step 3: the loss is nan"):
        train(model, MuonAdamW(parameter_groups(model), ALONE), batches, TrainingPlan(9, 1, 16), ALONE, log,
              flops_per_token=1, peak=None, save=lambda step: pytest.fail("a broken model was saved"))
    assert [row["step"] for row in read_log(log.path) if row["kind"] == "diverged"] == [3]


def test_a_step_makes_no_garbage_and_what_was_there_before_is_not_walked_over_again(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    model, frozen, unreachable = small_model(), [], []
    optimizer = MuonAdamW(parameter_groups(model), ALONE)
    ids = torch.randint(97, (2, 9))

    def before_step(step):
        frozen.append(gc.get_freeze_count())
        if step > 3:
            unreachable.append(gc.collect())
    with RunLog("base", "collected", {}) as log:
        train(model, optimizer, lambda step: [(ids[:, :-1], ids[:, 1:])], TrainingPlan(8, 1, 16), ALONE, log,
              flops_per_token=1.0, peak=None, before_step=before_step)
    assert frozen[0] == frozen[1] == 0 and min(frozen[2:]) > 10_000
    assert max(unreachable[1:]) == 0, unreachable
    assert gc.get_freeze_count() == 0


def test_clock_reads_well():
    assert [clock(s) for s in (0.4, 59, 61, 3599, 7620)] == ["0s", "59s", "1m01s", "59m59s", "2h07m"]


@pytest.mark.long
def test_the_same_command_resumes_where_it_was_stopped_bit_for_bit(
        tiny_base, tiny, tmp_path, monkeypatch, base_train_here):
    base_train_here()
    whole, whole_losses = weights(tiny_base), losses(tiny_base)
    assert whole_losses[12] < whole_losses[1] - 0.3, "nothing was learnt"

    other = tmp_path / "other"
    other.mkdir()
    for name in ("base_data", "tokenizer"):
        (other / name).symlink_to(tiny / name)
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(other))
    process = base_train(wait=False)
    for line in process.stdout:
        if line.startswith("step 00003/"):
            process.send_signal(signal.SIGTERM)
            break
    rest, _ = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM, rest
    assert "asked to stop" in rest and not (other / "base_checkpoints/d2/model_000012.pt").exists()
    code, out = base_train()
    assert code == 0 and "resuming from step" in out, out
    assert_same(weights(other), whole)
    assert losses(other) == whole_losses
    assert "Nothing to do" in base_train_here()


@pytest.mark.long
def test_a_killed_run_resumes_from_its_last_checkpoint(tiny_base, base_train_here):
    process = base_train(wait=False)
    for line in process.stdout:
        if line.startswith("step 00007/"):
            process.kill()
            break
    process.communicate()
    assert "resuming from step 5" in base_train_here()


@pytest.mark.long
@pytest.mark.parametrize("ranks", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_ranks_train_as_one_process_does(tiny_base, base_train_here, ranks):
    """Each rank reads its own documents, so the rows differ. test_optim and the test below check that a step over the
    same rows is equal."""
    code, out = base_train("--num-iterations=4", "--total-batch-size=320", f"--model-tag=r{ranks}", ranks=ranks)
    assert code == 0, out  # 5 micro-batches over 2 or 3 ranks: uneven shares
    rows = read_log(tiny_base / "logs" / f"base_r{ranks}.jsonl")
    assert {row["supervised"] for row in rows if row["kind"] == "train"} == {320}
    out = base_train_here("--num-iterations=6", "--total-batch-size=320", f"--model-tag=r{ranks}")
    assert "resuming from step 4" in out, out  # one rank resumes the run of several


def _six_steps(ranks, out):
    model = small_model()
    groups = {**published.groups, "wte": replace(published.groups["wte"], lr=0.01)}
    optimizer = MuonAdamW(parameter_groups(model, groups), ranks)
    dice = torch.Generator().manual_seed(1)
    for _ in range(6):
        ids = torch.randint(97, (7, 16), generator=dice)
        targets = torch.where(torch.rand(7, 16, generator=dice) < 0.3, -1, ids.roll(-1, 1))
        rows = list(zip(ids.split(1), targets.split(1)))
        stats = train_step(model, optimizer, rows[ranks.rank::ranks.world_size], ranks, clip=0.5)
    if ranks.is_main:
        torch.save((stats, model.state_dict()), out)


def test_one_two_and_three_ranks_give_the_same_weights(tmp_path):
    _six_steps(ALONE, tmp_path / "1.pt")
    for world in (2, 3):
        start_ranks(world, _six_steps, tmp_path / f"{world}.pt")
    results = [torch.load(tmp_path / f"{world}.pt", weights_only=True) for world in (1, 2, 3)]
    for stats, state in results[1:]:
        torch.testing.assert_close(stats[:3], results[0][0][:3], rtol=1e-4, atol=1e-4)
        # only the order of float32 sums differs; where a gradient is near zero, Adam enlarges the difference to a
        # fraction of its learning rate (0.05 here)
        assert_same(state, results[0][1], rtol=2e-3, atol=2e-4)


def _train_on(ranks, base, flags, out):
    """Train with text of which a part is missing, then with all of it. Tell how each rank ended the first time."""
    os.environ.update(NANOCHAT_BASE_DIR=str(base), NANOCHAT_DTYPE="float32")
    from nanochat import dataloader
    from nanochat.cli import parse
    from nanochat.dataset import arrival
    from scripts import base_train as script
    dataloader.BUFFER_DOCUMENTS = 4
    arrival.START_SECONDS = arrival.POLL_SECONDS = 0.05
    config = parse(script.Config, flags)
    try:
        script.run(config, ranks)
        end = "done"
    except (UserError, SystemExit) as error:
        end = str(error)
    ends = gather_objects(end, ranks)
    if ranks.is_main:
        step = latest_step(base / "base_checkpoints" / "d2")
        (base / "base_data" / "late").rename(base / "base_data" / shard_name(1))
    barrier(ranks)
    script.run(config, ranks)
    script.run(replace(config, model_tag="whole"), ranks)
    if ranks.is_main:
        out.write_text(json.dumps({"ends": ends, "step": step}))


@pytest.mark.long
@pytest.mark.parametrize("world", [1, 2])
def test_a_run_whose_text_stops_to_arrive_saves_and_resumes(tiny, tmp_path, monkeypatch, world):
    texts = list(iter_documents("train", tiny / "base_data"))
    base = tmp_path / "other"
    folder = base / "base_data"
    folder.mkdir(parents=True)
    (base / "tokenizer").symlink_to(tiny / "tokenizer")
    writer = ShardWriter(folder)
    for text in texts[:16]:
        writer.add(text)
    for text in texts[16:60]:
        writer.add_validation(text)
    writer.close()
    shutil.copyfile(next((tiny / "base_data").glob("shard_00001*")), folder / shard_name(1822))
    (folder / shard_name(1)).rename(folder / "late")
    write_source(folder, {"source": "fineweb-edu"})
    flags = [*TINY, "--shards=2", "--eval-every=-1", "--save-every=-1"]
    start_ranks(world, _train_on, base, flags, tmp_path / "told.json")
    told = json.loads((tmp_path / "told.json").read_text())
    assert told["step"] is not None and 2 <= told["step"] < 12, told
    assert any("shard_00001.parquet of the 2 planned shards is not in" in end for end in told["ends"]), told
    assert_same(weights(base), weights(base, tag="whole"))


@pytest.mark.parametrize("flags, message", [
    (["--depth=0"], "--depth is 0; it must be from 1"),
    (["--total-batch-size=100"], "--total-batch-size=128"),
    (["--layer-pattern=SXS"], "letters, S for SLC2"),
    (["--device-batch-size=0"], "--device-batch-size is 0"),
    (["--num-iterations=-1", "--target-param-data-ratio=-1"], "no horizon"),
    (["--core-metric-every=10"], "CORE"),
    (["--data-dir=/nowhere/at/all"], "no text in /nowhere/at/all"),
    (["--device-type=tpu"], "tpu"),
])
def test_wrong_flags_get_one_clear_line(tiny_base, flags, message, capsys):
    from scripts import base_train as script
    with pytest.raises(UserError, match=message):
        script.main([*TINY, *flags])


def test_a_checkpoint_of_another_shape_is_neither_continued_nor_lost(tiny_base):
    from scripts import base_train as script
    script.main([*TINY, "--num-iterations=2"])
    kept = weights(tiny_base, 2)
    with pytest.raises(UserError, match="n_embd 128 there, 192 here.*--fresh"):
        script.main([*TINY, "--depth=3", "--model-tag=d2"])
    script.main([*TINY, "--num-iterations=1", "--depth=3", "--model-tag=d2", "--fresh"])
    moved = [path for path in (tiny_base / "base_checkpoints").iterdir() if path.name.startswith("d2.")]
    assert_same(torch.load(moved[0] / "model_000002.pt", weights_only=True), kept)


def test_meta_holds_what_published_code_reads(tiny_base):
    from scripts import base_train as script
    script.main([*TINY, "--num-iterations=1"])
    meta = json.loads((tiny_base / "base_checkpoints/d2/meta_000001.json").read_text())
    assert meta.keys() >= {"step", "val_bpb", "model_config", "user_config", "device_batch_size", "max_seq_len"}
    assert meta["model_config"].keys() == {"sequence_len", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd",
                                           "n_kernel", "slc_rate"}
    assert meta["user_config"]["depth"] == 2
