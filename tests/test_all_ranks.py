"""All scripts in order on several ranks over gloo, and what happens to a run: a slow rank, a rank that fails alone,
signals at any moment. The same command goes on to what an undisturbed run gives, bit for bit; no process is left."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch

from nanochat.checkpoint import latest_step
from nanochat.logs import read_log
from nanochat.stages import STAGES
from tests.conftest import ROOT
from tests.test_training import assert_same

BASE = ["--depth=2", "--max-seq-len=128", "--device-batch-size=2", "--total-batch-size=1024", "--num-iterations=6",
        "--eval-every=3", "--eval-tokens=2000", "--save-every=3", "--sample-every=-1", "--device-type=cpu"]
MID = ["--device-type=cpu", "--device-batch-size=2", "--total-batch-size=1024", "--num-iterations=3", "--eval-every=-1",
       "--eval-tokens=1000"]
SFT = ["--device-type=cpu", "--device-batch-size=2", "--target-examples-per-step=8", "--num-iterations=4",
       "--eval-every=-1", "--eval-steps=1", "--eval-metrics-every=2", "--eval-metrics-max-problems=8",
       "--init-lr-frac=0.5"]
RL = ["--device-type=cpu", "--num-iterations=2", "--examples-per-step=4", "--num-samples=2", "--max-new-tokens=5",
      "--eval-examples=3", "--eval-samples=2", "--source=sft", "--init-lr-frac=0.5"]
GRADE = ["-x", "3", "-m", "4", "--device-type=cpu"]
LOSS = ["--split-tokens=1000", "--device-batch-size=2", "--device-type=cpu"]
SCRIPTS = [
    ["scripts.tok_train", ["--vocab-size=400"]], ["scripts.base_train", BASE], ["scripts.base_loss", LOSS],
    ["scripts.base_eval", LOSS], ["scripts.mid_train", MID], ["scripts.chat_sft", SFT],
    ["scripts.chat_eval", ["-i", "sft", *GRADE]], ["scripts.chat_rl", RL], ["scripts.chat_eval", ["-i", "rl", *GRADE]]]
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
LAST = {"base": 6, "mid": 3, "sft": 4, "rl": 2}


def start(base, *command) -> subprocess.Popen:
    """Start a command on the files in `base`, in a session of its own; standard output and error come on one pipe."""
    env = {**os.environ, "NANOCHAT_BASE_DIR": str(base), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-m", *command], cwd=ROOT, env=env, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True, start_new_session=True)


def start_scripts(base, scripts, ranks=2, fault="none") -> subprocess.Popen:
    return start(base, "scripts.launch", f"--ranks={ranks}", "tests.launched_scripts", "--", json.dumps(scripts), fault)


def left_behind(base) -> list[str]:
    """The processes that were started on the files in `base` and still run, however they were started."""
    listed = subprocess.run(["ps", "axeww", "-o", "pid=,stat=,command="], capture_output=True, text=True, check=True,
                            env={"PATH": os.environ["PATH"]}).stdout
    mark = f"NANOCHAT_BASE_DIR={base}"
    return [line[:200] for line in listed.splitlines() if mark in line and line.split()[1][0] != "Z"]


def weights(base, stage, step):
    return torch.load(base / STAGES[stage].folder / "d2" / f"model_{step:06d}.pt", weights_only=True)


def own_base(tiny, folder):
    """A base folder with the text and tokenizer of `tiny`."""
    folder.mkdir()
    for name in ("base_data", "tokenizer"):
        (folder / name).symlink_to(tiny / name)
    return folder


@pytest.fixture(scope="module")
def text(tiny, make_once):
    """A base folder for the whole chain on two ranks: it has text, and the chain makes the rest."""
    def make(base):
        (base / "base_data").symlink_to(tiny / "base_data")
        process = start_scripts(base, SCRIPTS)
        out, _ = process.communicate(timeout=400)
        assert process.returncode == 0 and not left_behind(base), out
        (base / "out.txt").write_text(out)
    return make_once("two ranks", make)


def check_chain(base, ranks):
    for stage, step in LAST.items():
        rows = read_log(base / "logs" / f"{stage}_d2.jsonl")
        assert {row["world_size"] for row in rows if row["kind"] == "model"} == {ranks}
        assert [row for row in rows if row["kind"] == "done"] and weights(base, stage, step)
    for log, kind in (("base_loss", "loss"), ("base_eval", "small_world"), ("chat_eval_sft", "chatcore"),
                      ("chat_eval_rl", "chatcore")):
        assert [row for row in read_log(base / "logs" / f"{log}_d2.jsonl") if row["kind"] == kind], log


@pytest.mark.long
def test_all_scripts_in_order_on_two_ranks(text):
    check_chain(text, 2)
    assert "Error" not in (text / "out.txt").read_text()


@pytest.mark.slow
def test_all_scripts_in_order_on_four_ranks(tiny, tmp_path):
    base = tmp_path / "four"
    base.mkdir()
    (base / "base_data").symlink_to(tiny / "base_data")
    process = start_scripts(base, SCRIPTS, ranks=4)
    out, _ = process.communicate(timeout=600)
    assert process.returncode == 0 and not left_behind(base), out
    check_chain(base, 4)


@pytest.mark.slow
def test_a_slow_rank_changes_nothing(text, tiny, tmp_path):
    base = own_base(tiny, tmp_path / "slow")
    process = start_scripts(base, [SCRIPTS[1], SCRIPTS[4]], fault="slow")
    out, _ = process.communicate(timeout=400)
    assert process.returncode == 0, out
    for stage in ("base", "mid"):
        assert_same(weights(base, stage, LAST[stage]), weights(text, stage, LAST[stage]))


def test_a_rank_that_fails_alone_ends_the_job_and_is_named_last(tiny, tmp_path):
    base = own_base(tiny, tmp_path / "fails")
    process = start_scripts(base, [SCRIPTS[1]], fault="raise")
    lines, told = [], float("inf")
    for line in process.stdout:
        lines.append(line.rstrip())
        if "RuntimeError" in line:
            told = time.monotonic()
            break
    lines += process.stdout.read().splitlines()
    assert process.wait(60) == 1 and time.monotonic() - told < 60, lines
    assert lines[-1] == "error: rank 1 of 2 failed first: RuntimeError: made up", lines
    assert "rank 1: Traceback (most recent call last):" in lines
    assert not left_behind(base)


def interrupt(process: subprocess.Popen, number: int, lines: int, seconds: float) -> str:
    """Send a signal after so many lines of output and then some seconds, and return all output."""
    read = []
    while len(read) < lines and (line := process.stdout.readline()):
        read.append(line)
    time.sleep(seconds)
    process.send_signal(number)
    read.append(process.stdout.read())
    process.wait(120)
    return "".join(read)


def disturb(base, command, seed: int, times: int, numbers=(signal.SIGINT, signal.SIGTERM), most_lines=14) -> None:
    """Start a command again and again, interrupt it at moments that a seed decides, and at last let it end."""
    dice = random.Random(seed)
    for _ in range(times):
        number = dice.choice(numbers)
        moment = dice.randrange(most_lines), dice.random() ** 2
        process = start(base, *command)
        out = interrupt(process, number, *moment)
        assert process.returncode in (128 + number, -number, 0), (number, moment, out)  # −number: Python was starting
        assert "Traceback" not in out.replace("KeyboardInterrupt", "") or process.returncode == -number, out
        assert not left_behind(base), (number, moment, out)
    process = start(base, *command)
    out, _ = process.communicate(timeout=400)
    assert process.returncode == 0, out


@pytest.mark.long
def test_signals_at_any_moment_and_a_resume_give_the_undisturbed_run(text, tiny, tmp_path):
    base = own_base(tiny, tmp_path / "disturbed")
    disturb(base, ["scripts.launch", "--ranks=2", "scripts.base_train", "--", *BASE], seed=1, times=2)
    assert_same(weights(base, "base", LAST["base"]), weights(text, "base", LAST["base"]))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(8))
def test_many_signals_at_any_moment(text, tiny, tmp_path, seed):
    base = own_base(tiny, tmp_path / "disturbed")
    ranks = ["scripts.launch", "--ranks=2"]
    for (module, flags), stage in zip([SCRIPTS[1], *SCRIPTS[4:6]], ("base", "mid", "sft")):
        disturb(base, [*ranks, module, "--", *flags], seed=seed, times=4, numbers=STOPS)
        assert_same(weights(base, stage, LAST[stage]), weights(text, stage, LAST[stage]))


def start_speedrun(base, ranks, monkeypatch) -> subprocess.Popen:
    for name, value in {"SPEEDRUN_PROFILE": "small", "SPEEDRUN_DEVICE_BATCH": "2"}.items():
        monkeypatch.setenv(name, value)
    return start(base, "tests.launched_speedrun", str(ranks))


def stop_at(process: subprocess.Popen, number: int, beginning: str) -> str:
    """Send a signal when a line begins so; return all output."""
    read = []
    while not read or not read[-1].startswith(beginning):
        read.append(process.stdout.readline())
        assert read[-1], "".join(read)
    process.send_signal(number)
    read.append(process.stdout.read())
    process.wait(120)
    return "".join(read)


@pytest.mark.long
@pytest.mark.parametrize("ranks, number", [pytest.param(1, signal.SIGINT, marks=pytest.mark.slow), (2, signal.SIGTERM)])
def test_a_speedrun_that_is_asked_to_stop_saves_and_starts_nothing_more(tmp_path, monkeypatch, ranks, number):
    base = tmp_path / "speedrun"
    base.mkdir()
    process = start_speedrun(base, ranks, monkeypatch)
    out = stop_at(process, number, "step 00001/")
    assert process.returncode == 128 + number and f"{number.name}: base model is asked to save and end" in out, out
    assert out.count("asked to stop: saving step") == 1 and "== evaluation" not in out and "Traceback" not in out, out
    assert latest_step(base / "base_checkpoints" / "d2") == int(out.split("asked to stop: saving step ")[1].split()[0])
    assert not left_behind(base)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_whole_speedrun_with_signals_at_any_moment(tmp_path, monkeypatch, ranks):
    """The report is copied to the folder that it runs in: this one."""
    bases = [tmp_path / "whole", tmp_path / "disturbed"]
    for base in bases:
        base.mkdir()
    process = start_speedrun(bases[0], ranks, monkeypatch)
    out, _ = process.communicate(timeout=600)
    assert process.returncode == 0 and "== done in" in out and not left_behind(bases[0]), out
    dice = random.Random(ranks)
    for _ in range(12):
        process, number = start_speedrun(bases[1], ranks, monkeypatch), dice.choice(STOPS)
        out = interrupt(process, number, dice.randrange(1, 90), dice.random())
        assert process.returncode in (128 + number, -number, 0), (number, out)
        assert not left_behind(bases[1]), out
    process = start_speedrun(bases[1], ranks, monkeypatch)
    out, _ = process.communicate(timeout=600)
    assert process.returncode == 0 and "== done in" in out, out
    for stage, step in (("base", 8), ("mid", 2), ("sft", 2), ("rl", 2)):
        assert_same(*(weights(base, stage, step) for base in bases))


def test_two_runs_in_one_folder_are_refused(tiny, tmp_path):
    base = own_base(tiny, tmp_path / "twice")
    first = start(base, "scripts.base_train", *BASE, "--num-iterations=9999")
    while not (line := first.stdout.readline()).startswith("step 00001/"):
        assert line
    second = start(base, "scripts.base_train", *BASE)
    out, _ = second.communicate(timeout=120)
    assert second.returncode == 1 and f"is in use by a run: process {first.pid}" in out and f"kill {first.pid}" in out
    first.terminate()
    assert "asked to stop" in first.communicate(timeout=120)[0] and first.returncode == 143
