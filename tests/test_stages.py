"""mid_train, chat_sft, chat_rl and chat_eval from end to end on a tiny model: they resume bit for bit, and refuse wrong
flags and checkpoints in one clear line."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

from nanochat import rl, training
from nanochat.checkpoint import tensors
from nanochat.distributed import Ranks
from nanochat.errors import UserError
from nanochat.logs import read_log
from nanochat.run import StageRun, move_aside
from nanochat.tools import sandbox
from nanochat.tools.sandbox import Level, best_level
from scripts import base_eval, base_train, chat_eval, chat_rl, chat_sft, mid_train
from tasks import recipes
from tests.conftest import ROOT
from tests.test_distributed import start_ranks
from tests.test_tasks_hub import HUMANEVAL_ROW, mirror  # noqa: F401 (fixture)
from tests.test_training import TINY, assert_same

MID = ["--device-type=cpu", "--max-seq-len=128", "--device-batch-size=2", "--total-batch-size=512",
       "--num-iterations=6", "--save-every=3", "--eval-every=-1", "--eval-tokens=1000"]
SFT = ["--device-type=cpu", "--device-batch-size=4", "--target-examples-per-step=8", "--num-iterations=6",
       "--save-every=3", "--eval-every=-1", "--eval-steps=2", "--eval-metrics-every=4", "--eval-metrics-max-problems=8",
       "--init-lr-frac=0.5"]
RL = ["--device-type=cpu", "--num-iterations=4", "--examples-per-step=2", "--num-samples=2", "--max-new-tokens=5",
      "--eval-examples=3", "--eval-samples=2", "--save-every=2", "--source=sft", "--init-lr-frac=0.5"]
STAGES = {"mid": (mid_train, MID, "mid_checkpoints", 6), "sft": (chat_sft, SFT, "chatsft_checkpoints", 6),
          "rl": (chat_rl, RL, "chatrl_checkpoints", 4)}


def odd_length(task, conversation, row, text):
    """Return a reward that untrained models earn in half their answers, though they are cut."""
    return float(len(text) % 2)


@pytest.fixture(scope="module")
def trained(tiny, make_once):
    """Return a base folder with a tiny model of each stage. Tests only read it."""
    def make(base):
        for name in ("base_data", "tokenizer"):
            (base / name).symlink_to(tiny / name)
        base_train.main([*TINY, "--num-iterations=2", "--max-seq-len=128", "--total-batch-size=256"])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(rl, "reward_of", odd_length)
            for script, flags, _, _ in STAGES.values():
                script.main(flags)
    return make_once("trained", make)


@pytest.fixture
def base(trained, tmp_path, monkeypatch):
    """Return a copy of that folder, which the test may change."""
    base = tmp_path / "own"
    shutil.copytree(trained, base, symlinks=True)
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(base))
    return base


def weights(base, stage, step):
    return torch.load(base / STAGES[stage][2] / "d2" / f"model_{step:06d}.pt", weights_only=True)


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_resumes_bit_for_bit_and_then_is_done(base, monkeypatch, capsys, stage):
    script, flags, folder, steps = STAGES[stage]
    monkeypatch.setattr(rl, "reward_of", odd_length)
    whole = weights(base, stage, steps)
    for path in (base / folder / "d2").glob(f"*_{steps:06d}*"):
        path.unlink()
    read, real = [], tensors.open_file
    monkeypatch.setattr(tensors, "open_file", lambda *args: read.append(args[:2]) or real(*args))
    script.main(flags)
    own = base / folder / "d2"  # to verify and to load; of the model it began from, nothing but sizes and meta file
    assert [name for where, name in read if where == own][:2] == [
        f"model_{steps // 2:06d}.pt", f"optim_{steps // 2:06d}.pt"]
    assert len([name for where, name in read if where != own]) == 1
    assert f"resuming from step {steps // 2}" in capsys.readouterr().out
    assert_same(weights(base, stage, steps), whole)
    before = weights(base, stage, steps // 2)
    assert any(not torch.equal(before[name], whole[name]) for name in whole)  # the second half changed weights
    script.main(flags)
    assert "Nothing to do" in capsys.readouterr().out


@pytest.mark.parametrize("end", [4, 6])
def test_what_was_due_when_a_run_was_asked_to_stop_is_done_when_it_goes_on(base, monkeypatch, capsys, end):
    """It saves the step it is at, and evaluates nothing: neither in the middle nor after the last step."""
    flags = [*SFT, "--eval-every=2", "--eval-metrics-every=-1"]
    step, calls = training.train_step, []

    def asked(*args, **kwargs):
        calls.append(1)
        if len(calls) == end - 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(*args, **kwargs)

    chat_sft.main([*flags, "--model-tag=d2", "--fresh"])
    whole, log = weights(base, "sft", 6), base / "logs" / "sft_d2.jsonl"
    wanted = {(row["kind"], row["step"]): row.get("loss") for row in read_log(log)
              if row["kind"] in ("train", "val") and "step" in row}
    tokens = [row["tokens"] for row in read_log(log) if row["kind"] == "train"][-1]
    log.unlink()
    with monkeypatch.context() as patch:
        patch.setattr(training, "train_step", asked)
        with pytest.raises(SystemExit):
            chat_sft.main([*flags, "--fresh"])
    meta = base / "chatsft_checkpoints" / "d2" / f"meta_{end:06d}.json"
    assert json.loads(meta.read_text())["stopped"] and f"saving step {end}" in capsys.readouterr().out
    assert ("val", end) not in {(row["kind"], row.get("step")) for row in read_log(log)}
    chat_sft.main(flags)
    rows = read_log(log)
    assert {(row["kind"], row["step"]): row.get("loss") for row in rows if row["kind"] in ("train", "val")} == wanted
    assert [row["tokens"] for row in rows if row["kind"] == "train"][-1] == tokens
    assert rows[-1]["kind"] == "end" and any(row["kind"] == "done" for row in rows)
    last = json.loads((base / "chatsft_checkpoints" / "d2" / "meta_000006.json").read_text())
    assert last["val_step"] == 6 and "stopped" not in last
    assert_same(weights(base, "sft", 6), whole)
    capsys.readouterr()
    chat_sft.main(flags)
    assert "Nothing to do" in capsys.readouterr().out


def test_checkpoints_between_two_validations_say_the_last_one_after_a_resume_too(base):
    flags = [*SFT, "--eval-every=2", "--eval-metrics-every=-1", "--save-every=1", "--keep=9", "--fresh"]
    chat_sft.main(flags)
    folder = base / "chatsft_checkpoints" / "d2"
    said = json.loads((folder / "meta_000003.json").read_text())
    for path in (path for step in range(3, 7) for path in folder.glob(f"*_{step:06d}*")):
        path.unlink()
    chat_sft.main(flags[:-1])
    again = json.loads((folder / "meta_000003.json").read_text())
    assert said["val_step"] == 2 and {name: again[name] for name in ("val_loss", "val_step")} == {
        name: said[name] for name in ("val_loss", "val_step")}


def test_metas_hold_what_published_code_reads_and_where_the_model_comes_from(base):
    for stage, (_, _, folder, steps) in STAGES.items():
        meta = json.loads((base / folder / "d2" / f"meta_{steps:06d}.json").read_text())
        assert meta.keys() >= {"step", "model_config", "user_config", "device_batch_size", "max_seq_len", "from",
                               "tokenizer", "data"}
        assert meta["max_seq_len"] == 128 and meta["from"]["weights"] and meta["data"]["source"] == "small-world"
        rows = read_log(base / "logs" / f"{stage}_d2.jsonl")
        kinds = {row["kind"] for row in rows}
        assert kinds >= {"start", "model", "samples", "checkpoint", "done", "end"}
        assert kinds >= ({"rl", "pass"} if stage == "rl" else {"train", "val"})
        counted = [row["step"] for row in rows if row["kind"] == ("rl" if stage == "rl" else "train")]
        assert counted == list(range(1, steps + 1))  # num_iterations are optimizer steps
    metrics = [row for row in read_log(base / "logs" / "sft_d2.jsonl") if row["kind"] == "metric"]
    assert [(row["step"], row["name"]) for row in metrics] == [(4, "World-Choice")]


def test_going_on_with_other_settings_is_said(base, capsys):
    for path in (base / "chatsft_checkpoints" / "d2").glob("*_000006*"):
        path.unlink()
    chat_sft.main([*SFT, "--target-examples-per-step=4", "--eval-metrics-every=-1"])
    out = capsys.readouterr().out
    assert "note: resuming with other settings" in out and "target_examples_per_step 8 → 4\n" in out


def test_packed_fine_tuning_goes_on_from_the_base_run(base, monkeypatch, capsys):
    """Its recipe, batch, rates and momenta are those of the base model; it resumes bit for bit, and packed alone."""
    base_train.main([*TINY, "--num-iterations=2", "--max-seq-len=128", "--total-batch-size=256", "--recipe=modern",
                     "--reference-batch=0", "--matrix-lr=0.03", "--model-tag=m2"])
    flags = ["--device-type=cpu", "--model-tag=m2", "--device-batch-size=2", "--num-iterations=4", "--save-every=2",
             "--eval-every=-1", "--eval-steps=1", "--eval-metrics-every=-1", "--target-examples-per-step=8"]
    folder, log = base / "chatsft_checkpoints" / "m2", base / "logs" / "sft_m2.jsonl"
    monkeypatch.setattr(StageRun, "sample_answers", lambda self, step, task: None)

    def run(*more):
        capsys.readouterr()
        log.unlink(missing_ok=True)
        chat_sft.main([*flags, *more])
        return capsys.readouterr().out, [row["loss"] for row in read_log(log) if row["kind"] == "train"]

    def trained(step):
        return torch.load(folder / f"model_{step:06d}.pt", weights_only=True)

    out, losses = run()
    assert "the optimizer begins with the momenta of step 2 of" in out and "4 steps of 256 tokens of 5,100 conv" in out
    config = json.loads((folder / "meta_000004.json").read_text())["user_config"]
    assert [config[name] for name in ("recipe", "source", "total_batch_size", "reference_batch", "matrix_lr",
                                      "matrix_decay")] == ["modern", "base", 256, 0, 0.03, 0.0]
    rows = [row for row in read_log(log) if row["kind"] == "train"]
    assert [row["tokens"] for row in rows] == [256, 512, 768, 1024] and all(0 < row["supervised"] < 256 for row in rows)
    whole = trained(4)
    for path in folder.glob("*_000004*"):
        path.unlink()
    with pytest.raises(UserError, match="was begun with --packed=True.*--fresh"):
        run("--packed=no")
    out, _ = run()
    assert "resuming from step 2" in out and "momenta" not in out
    assert_same(trained(4), whole)

    out, _ = run("--fresh", "--warm-start=no", "--num-iterations=1", "--matrix-lr=0.01", "--total-batch-size=512")
    assert "momenta" not in out
    config = json.loads((folder / "meta_000001.json").read_text())["user_config"]
    assert (config["matrix_lr"], config["total_batch_size"], config["embedding_lr"]) == (0.01, 512, 0.3)
    for path in (base / "base_checkpoints" / "m2").glob("optim_*"):
        path.unlink()
    out, cold = run("--fresh", "--num-iterations=2")
    assert "note: the optimizer begins without momenta: " in out and cold[0] == losses[0] and cold[1] != losses[1]


def test_a_stage_refuses_a_model_it_did_not_begin_with(base):
    (base / "mid_checkpoints" / "d2").rename(base / "mid_checkpoints" / "kept")
    mid_train.main([*MID, "--seed=5"])
    with pytest.raises(UserError, match="trained from another model.*--fresh"):
        chat_sft.main([*SFT, "--num-iterations=8"])
    old = weights(base, "sft", 6)
    chat_sft.main([*SFT, "--fresh"])
    [aside] = (base / "chatsft_checkpoints").glob("d2.*")
    assert_same(torch.load(aside / "model_000006.pt", weights_only=True), old)


def _sft(ranks: Ranks, base, flags):
    torch.set_num_threads(1)
    os.environ.update(NANOCHAT_BASE_DIR=str(base), NANOCHAT_DTYPE="float32")
    from nanochat.cli import parse
    chat_sft.run(parse(chat_sft.Config, ["--recipe=published", *flags]), ranks)


@pytest.mark.parametrize("packed", [False, True])
def test_fine_tuning_on_two_ranks_is_that_on_one(base, monkeypatch, packed):
    monkeypatch.setenv("NANOCHAT_DTYPE", "float32")
    flags = [*SFT, "--fresh", "--num-iterations=3", "--eval-metrics-every=2"]
    if packed:
        flags += ["--packed", "--source=base", "--warm-start", "--total-batch-size=512", "--device-batch-size=2"]
    start_ranks(2, _sft, base, flags)
    two, two_log = weights(base, "sft", 3), read_log(base / "logs" / "sft_d2.jsonl")
    _sft(Ranks(0, 0, 1, torch.device("cpu")), base, flags)
    assert_same(weights(base, "sft", 3), two, rtol=2e-3, atol=5e-4)  # float32 sums in another order, through Adam
    logs = two_log, read_log(base / "logs" / "sft_d2.jsonl")
    losses = [[row["loss"] for row in log if row["kind"] == "train"][-3:] for log in logs]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def _rl(ranks: Ranks, base, flags):
    torch.set_num_threads(1)
    os.environ.update(NANOCHAT_BASE_DIR=str(base), NANOCHAT_DTYPE="float32")
    rl.reward_of = odd_length
    from nanochat.cli import parse
    chat_rl.run(parse(chat_rl.Config, ["--recipe=published", *flags]), ranks)


def test_runs_moved_aside_within_a_second_are_all_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(time, "strftime", lambda format: "now")
    for i in range(3):
        (tmp_path / "d2").mkdir()
        (tmp_path / "d2" / f"run{i}").touch()
        move_aside(tmp_path / "d2")
    assert [[file.name for file in (tmp_path / name).iterdir()] for name in ("d2.now", "d2.now2", "d2.now3")] == [
        ["run0"], ["run1"], ["run2"]]


def test_a_rank_without_a_problem_changes_nothing(base, monkeypatch):
    monkeypatch.setenv("NANOCHAT_DTYPE", "float32")
    monkeypatch.setattr(rl, "reward_of", rl.reward_of)  # restores what _rl replaces
    flags = [*RL, "--fresh", "--num-iterations=2", "--examples-per-step=1", "--num-samples=4", "--eval-examples=1"]
    start_ranks(2, _rl, base, flags)
    two = weights(base, "rl", 2)
    _rl(Ranks(0, 0, 1, torch.device("cpu")), base, flags)
    assert_same(weights(base, "rl", 2), two, rtol=2e-3, atol=5e-4)


def test_conversations_longer_than_a_row_never_give_an_empty_batch(base):
    long = [{"role": "user", "content": "Where is the lamp kept? " * 60}, {"role": "assistant", "content": "Here."}]
    (base / "long.jsonl").write_text(json.dumps(long) + "\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recipes, "sft", lambda data, seed, extra, recipe: (
            recipes.Mixture([*map(recipes.CustomJSON, extra)] * 5 + [recipes.WorldQuestions("train", size=2)]),
            recipes.WorldQuestions("test", seed)))
        chat_sft.main([*SFT, "--fresh", f"--conversations={base / 'long.jsonl'}", "--eval-metrics-every=-1"])
    rows = [row for row in read_log(base / "logs" / "sft_d2.jsonl") if row["kind"] == "train"]
    assert all(row["loss"] == row["loss"] and row["supervised"] > 0 for row in rows)


def test_chat_eval_writes_every_problem_and_the_mean_above_chance(base, capsys):
    chat_eval.main(["-i", "rl", "-x", "4", "-m", "6", "--device-type=cpu"])
    out = capsys.readouterr().out
    assert "World-Sums" in out and "mean above chance" in out
    lines = (base / "chat_eval" / "rl_d2_000004" / "World-Choice.jsonl").read_text().splitlines()
    assert len(lines) == 4 and json.loads(lines[0]).keys() == {"index", "correct", "question", "answers", "reference"}
    rows = read_log(base / "logs" / "chat_eval_rl_d2.jsonl")
    assert {row["name"] for row in rows if row["kind"] == "task"} == set(recipes.graded("small-world"))
    chat_eval.main(["-i", "sft", "-a", "world-choice|SpellingBee", "-x", "2", "-m", "6", "--device-type=cpu"])
    assert not [row for row in read_log(base / "logs" / "chat_eval_sft_d2.jsonl") if row["kind"] == "chatcore"]
    all_tasks = "|".join(recipes.graded("small-world"))
    chat_eval.main(["-i", "sft", "-a", all_tasks, "-x", "2", "-m", "6", "--device-type=cpu"])
    assert [row for row in read_log(base / "logs" / "chat_eval_sft_d2.jsonl") if row["kind"] == "chatcore"]


def test_the_level_of_the_sandbox_is_said_and_refused_before_anything_is_graded(
        base, mirror, capsys, monkeypatch):  # noqa: F811
    mirror("openai/openai_humaneval/openai_humaneval/test.jsonl", [HUMANEVAL_ROW])
    flags = ["-i", "sft", "-m", "6", "-x", "2", "-a", "World-Choice|HumanEval", "--device-type=cpu"]
    chat_eval.main(flags)
    out = capsys.readouterr().out
    assert f"sandbox of the level {best_level().name.lower()}" in out and "HumanEval            0.0%  (0 of 1" in out
    monkeypatch.setattr(sandbox, "_best", lambda: (Level.LIMITS, "limits", ["namespaces: none"]))
    monkeypatch.setenv("NANOCHAT_SANDBOX", "isolated")
    with pytest.raises(UserError, match="isolated is asked for"):
        chat_eval.main(flags)
    assert "World-Choice" not in capsys.readouterr().out


def files_of(base):
    """Return when each file was written, but for the locks, which runs touch."""
    return {path: path.stat().st_mtime_ns for path in base.rglob("*") if path.suffix != ".lock"}


@pytest.mark.parametrize("stage", STAGES)
def test_a_dry_run_says_what_would_be_done_and_changes_nothing(base, capsys, stage):
    script, flags, folder, steps = STAGES[stage]
    before = files_of(base)
    script.main([*flags, "--dry-run", f"--num-iterations={steps + 2}"])
    out = capsys.readouterr().out
    assert f"{steps + 2} steps" in out and f"would resume from step {steps}" in out and "nothing was changed" in out
    assert f"every {steps // 2} steps, the last 2 of these kept" in out and str(base / folder / "d2") in out
    script.main([*flags, "--dry-run", "--fresh"])
    assert f"the run in {base / folder / 'd2'} would be moved aside" in capsys.readouterr().out
    assert files_of(base) == before


def test_a_dry_run_of_base_training_and_of_the_evaluations_changes_nothing(base, capsys):
    before = files_of(base)
    flags = [*TINY, "--max-seq-len=128", "--total-batch-size=256", "--dry-run"]
    base_train.main([*flags, "--num-iterations=9"])
    out = capsys.readouterr().out
    assert "train 9 steps of 256 tokens" in out and "would resume from step 2" in out
    base_train.main([*flags, "--num-iterations=9", "--model-tag=new"])
    assert "it would begin at step 0" in capsys.readouterr().out
    base_eval.main(["--device-type=cpu", "--dry-run"])
    out = capsys.readouterr().out
    assert "not CORE" in out and "bits per byte of" in out and "the facts of the small world" in out
    chat_eval.main(["-i", "sft", "--device-type=cpu", "--dry-run"])
    assert "would be asked World-Questions (" in capsys.readouterr().out
    assert files_of(base) == before


def test_a_run_is_moved_aside_only_when_nothing_can_be_wrong_any_more(base, tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text("{}\n")
    before = files_of(base / "mid_checkpoints")
    for flags in ([f"--conversations={bad}"], ["--total-batch-size=100"], ["--run=x", "--model-step=77"]):
        with pytest.raises(UserError), pytest.MonkeyPatch.context() as patch:
            patch.setattr("nanochat.run.flags.check_wandb", lambda name: None)
            mid_train.main([*MID, "--fresh", *flags])
        assert files_of(base / "mid_checkpoints") == before
    with pytest.raises(UserError, match="wandb"), pytest.MonkeyPatch.context() as patch:
        patch.setattr("nanochat.run.flags.check_wandb", lambda name: None)
        patch.setitem(sys.modules, "wandb", None)  # found missing when the run is opened: still not moved
        mid_train.main([*MID, "--fresh", "--run=x"])
    assert files_of(base / "mid_checkpoints") == before


@pytest.mark.parametrize("script, flags, message", [
    (chat_eval, ["-a", "GSM9K"], "there is no task 'GSM9K'; there is .*GSM8K"),
    (chat_eval, ["-g", "d9"], "no usable checkpoint"),
    (mid_train, ["--total-batch-size=100"], "--total-batch-size"),
    (mid_train, ["--conversations=/nowhere/mine.jsonl"], "mine.jsonl"),
    (chat_sft, ["--target-examples-per-step=0"], "--target-examples-per-step"),
    (chat_sft, ["--eval-steps=0"], "--eval-steps is 0; it must be at least 1"),
    (chat_rl, ["--num-samples=1"], "--num-samples is 1; it must be at least 2"),
    (chat_rl, ["--eval-examples=0"], "--eval-examples is 0; it must be at least 1"),
    (chat_eval, ["-i", "sft", "-x", "0"], "--max-problems is 0; it must be .*, or -1"),
])
def test_wrong_flags_get_one_clear_line(base, script, flags, message):
    usual = {mid_train: MID, chat_sft: SFT, chat_rl: RL}.get(script, ["--device-type=cpu"])
    with pytest.raises(UserError, match=message):
        script.main([*usual, *flags])


def test_a_tokenizer_of_another_model_is_refused(base):
    (base / "tokenizer").unlink()
    from nanochat.tokenizer import RustBPETokenizer
    texts = ["another text altogether, with tokens of its own"] * 4
    RustBPETokenizer.train_from_iterator(texts, 300).save(base / "tokenizer")
    with pytest.raises(UserError, match="not the one that the model .* was trained with"):
        chat_sft.main([*SFT, "--num-iterations=8"])


@pytest.mark.long
def test_sigterm_saves_and_the_same_command_resumes(base):
    flags = [flag for flag in MID if "iterations" not in flag] + ["--num-iterations=400", "--fresh", "--save-every=-1"]
    command = [sys.executable, "-m", "scripts.mid_train", *flags]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                               env={**os.environ, "OMP_NUM_THREADS": "1"})
    for line in process.stdout:
        if line.startswith("step 00005/"):
            process.send_signal(signal.SIGTERM)
            break
    out = process.stdout.read()
    assert process.wait(timeout=60) == 128 + signal.SIGTERM and "asked to stop" in out, out
    [meta] = (base / "mid_checkpoints" / "d2").glob("meta_*.json")
    step = json.loads(meta.read_text())["step"]
    mid_train.main([*flags, f"--num-iterations={step + 1}"])
    assert weights(base, "mid", step + 1)
