"""bench/torture: the judge sees every kind of harm, and processes end.

Samples of faults, of half a minute and of five, are marked slow.
"""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

from bench.torture import __main__ as torture
from bench.torture import costs, judge
from bench.torture.bad_hub import FAULTS, NAMES, Hub
from bench.torture.damage import WAYS, damage, is_finite
from bench.torture.judge import CHANGED, LOST, SKIPPED, SURVIVED, Verdict, compare_end, differences, read_curve
from bench.torture.lab import JOBS, Lab, content
from bench.torture.processes import Hung, Life, OutOfTime, stragglers
from nanochat.checkpoint import save_checkpoint
from nanochat.errors import UserError
from tests.conftest import ROOT

JOB = JOBS["base"]
CONFIG = {"sequence_len": 8, "vocab_size": 11, "n_layer": 1, "n_head": 1, "n_kv_head": 1, "n_embd": 8}


def finished(base, steps=JOB.steps):
    """Write what a finished run of the base stage leaves: two checkpoints, a log, and what it read."""
    for folder in ("base_data", "tokenizer", "logs"):
        (base / folder).mkdir(parents=True)
        (base / folder / "file").write_text(folder)
    for step in (steps - 5, steps):
        torch.manual_seed(step)
        weights = {"wte": torch.randn(5, 3), "scale": torch.tensor(0.5)}
        meta = {"model_config": CONFIG, "val_bpb": 0.5, "loader": [{"at": 3}]}
        save_checkpoint(base / JOB.folder, step, weights, meta, {"state": [torch.randn(4)], "step": step})
    records = [{"kind": "start"}, {"kind": "model", "start": 0}]
    records += [{"kind": "train", "step": step, "loss": 1 / step, "norm": 1.0, "seconds": 0.1}
                for step in range(1, steps + 1)]
    write_log(base, [*records, {"kind": "val", "step": steps, "bpb": 0.5}, {"kind": "done", "step": steps}])
    return base


def write_log(base, records):
    (base / JOB.log).write_text("".join(json.dumps({"time": "t", **record}) + "\n" for record in records))


def read_records(base):
    return [json.loads(line) for line in (base / JOB.log).read_text().splitlines()]


@pytest.fixture
def two(tmp_path):
    """Return the folders of two equal finished runs."""
    return finished(tmp_path / "one"), finished(tmp_path / "whole")


def verdict(two):
    return compare_end(*two, JOB)


def test_equal_ends_survive(two):
    assert verdict(two) == Verdict(SURVIVED)


def test_a_resumed_log_is_that_of_an_undisturbed_run(two):
    records = read_records(two[0])
    again = [record for record in records if record["kind"] == "train" and 10 < record["step"] <= 17]
    write_log(two[0], [*records[:2], *records[2:19], {"kind": "start"}, {"kind": "model", "start": 10}, *again,
                       *records[19:]])
    assert verdict(two).word == SURVIVED


@pytest.mark.parametrize("harm, word, says", [
    ("weight", CHANGED, "weights differ in 1, such as .wte"), ("older", CHANGED, "step 35: weights"),
    ("state", CHANGED, "optimizer"), ("position", CHANGED, r"\.loader"), ("gone", LOST, "model_000040.pt is not there"),
    ("hole", LOST, "no record of train at step 7"), ("loss", CHANGED, "train at step 7"),
    ("twice", CHANGED, "step 7 twice"), ("redone", CHANGED, "where it was"), ("input", CHANGED, "tokenizer, which"),
    ("extra", CHANGED, "undisturbed run has not"), ("torn", LOST, "does not load")])
def test_the_judge_sees_every_kind_of_harm(two, harm, word, says):
    base, folder = two[0], two[0] / JOB.folder
    records = read_records(base)
    at = next(i for i, record in enumerate(records) if record.get("step") == 7)

    def saved(step, change):
        model, optim, meta = judge.read_raw(folder, step)
        change(model, optim, meta)
        config = meta.pop("model_config")
        save_checkpoint(folder, step, model, {"model_config": config, "val_bpb": meta["val_bpb"],
                                              "loader": meta["loader"]}, optim)

    if harm == "weight":  # the smallest change there is
        saved(40, lambda model, *_: model["wte"].view(torch.int32).view(-1)[4].bitwise_xor_(1))
    elif harm == "older":
        saved(35, lambda model, *_: model["scale"].add_(1))
    elif harm == "state":
        saved(40, lambda model, optim, meta: optim["state"][0].neg_())
    elif harm == "position":
        saved(40, lambda model, optim, meta: meta.update(loader=[{"at": 4}]))
    elif harm == "gone":
        (folder / "model_000040.pt").unlink()
    elif harm == "hole":
        write_log(base, records[:at] + records[at + 1:])
    elif harm == "loss":
        records[at]["loss"] += 1e-15
        write_log(base, records)
    elif harm == "twice":
        write_log(base, [*records[:at], records[at], *records[at:]])
    elif harm == "redone":
        write_log(base, [*records[:at + 1], {"kind": "model", "start": 6}, {**records[at], "loss": 3.0},
                         *records[at + 1:]])
    elif harm == "input":
        (base / "tokenizer" / "file").write_text("other")
    elif harm == "extra":
        write_log(base, [*records, {**records[at], "step": 41}])
    elif harm == "torn":
        save_checkpoint(folder, 20, {"wte": torch.ones(3)}, {"model_config": CONFIG}, {"state": []})
        shutil.copytree(folder, two[1] / JOB.folder, dirs_exist_ok=True)
        for base in two:  # equal to the other, and still not whole
            path = base / JOB.folder / "meta_000020.json"
            path.write_text(path.read_text().replace('"sha256": "', '"sha256": "0'))
    found = verdict(two)
    assert found.word == word and re.search(says, found.note), found


def test_nested_values_are_compared_bit_for_bit():
    zero, minus = torch.tensor([0.0]), torch.tensor([-0.0])
    assert differences({"a": [zero]}, {"a": [minus]}) == [".a[0]"]
    assert not differences({"a": [zero, float("nan")]}, {"a": [zero.clone(), float("nan")]})
    assert differences({"a": 1}, {"a": 1.0}) == [".a"] and set(differences({"a": 1}, {"b": 1})) == {".a", ".b"}
    assert differences(torch.ones(2), torch.ones(2, dtype=torch.float64)) == ["value"]


@pytest.mark.parametrize("how", sorted(set(WAYS) | {"swap"}))
def test_damage_changes_the_file_and_says_how(tmp_path, how):
    path, other = tmp_path / "model_000010.pt", tmp_path / "model_000005.pt"
    data = bytes(range(1, 200)) * 100
    path.write_bytes(data)
    other.write_bytes(data[::-1])
    words = damage(path, how, random.Random(3), other)
    assert path.name in words and (not path.exists() or path.read_bytes() != data)
    assert (other.read_bytes() == data) == (how == "swap")
    if how == "flip":
        assert sum(a != b for a, b in zip(path.read_bytes(), data)) == 1


def test_numbers_that_are_not_finite_are_found(tmp_path):
    torch.save({"a": torch.ones(3), "b": [torch.tensor([1, 2])]}, tmp_path / "good.pt")
    torch.save({"a": torch.ones(3), "b": [torch.tensor([1.0, float("inf")])]}, tmp_path / "bad.pt")
    assert is_finite(tmp_path / "good.pt") and not is_finite(tmp_path / "bad.pt")


def life_of(tmp_path, code, seconds=60, **options):
    (tmp_path / "own_program.py").write_text(code)
    return Life(["-m", "own_program"], {"PYTHONPATH": str(tmp_path), "NANOCHAT_TORTURE": f"t{os.getpid()}"},
                tmp_path / "out", fresh=True, deadline=time.monotonic() + seconds, **options)


def test_a_life_ends_with_its_code_by_a_signal_or_with_the_time(tmp_path):
    life = life_of(tmp_path, "print('said'); raise SystemExit(3)")
    assert life.wait(60) == 3 and life.text() == "said\n"
    life = life_of(tmp_path, "import time; print('up', flush=True); time.sleep(100)")
    assert life.until(lambda: "up" in life.text(), 60) and stragglers(f"t{os.getpid()}") == [life.pid]
    life.signal(signal.SIGTERM)
    assert life.wait(60) == 128 + signal.SIGTERM
    life = life_of(tmp_path, "import time; time.sleep(100)")
    with pytest.raises(Hung):
        life.wait(0.1)
    assert life.code == 128 + signal.SIGKILL
    life = life_of(tmp_path, "import time; time.sleep(100)", seconds=0.1)
    with pytest.raises(OutOfTime):
        life.wait(60)
    life.kill()
    assert not stragglers(f"t{os.getpid()}")


def test_the_bad_hub_serves_the_same_for_the_same_seed(tmp_path):
    hubs = [Hub(tmp_path, 7), Hub(tmp_path, 7), Hub(tmp_path, 8)]
    for hub in hubs:
        hub.server_close()
    assert hubs[0].files == hubs[1].files != hubs[2].files and hubs[0].faults == hubs[1].faults
    assert set(hubs[0].files) == set(NAMES)
    assert {fault for each in hubs[0].faults.values() for fault in each} <= set(FAULTS)
    (tmp_path / "good").touch()
    assert hubs[0].next_fault(["cut"]) == ""


def test_the_table_counts_and_the_exit_code_tells(tmp_path, monkeypatch, capsys):
    words = iter([SURVIVED, LOST, SKIPPED, CHANGED])
    monkeypatch.setattr(torture, "FAULTS", {name: (f"fault {name}", lambda *_: Verdict(next(words), "why"))
                                            for name in ("one", "two")})
    monkeypatch.setattr(torture, "BEGAN", time.monotonic())
    monkeypatch.setattr(torture, "FORKED", ())
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit) as ended:
        torture.main(["--times=2", f"--scratch={tmp_path / 's'}", f"--json={tmp_path / 'out.json'}", "--seed=4"])
    out = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in out.splitlines() if line.startswith("|")]
    assert rows[2:] == [["one", "fault one", "1", "1", "0", "0"], ["two", "fault two", "2", "0", "1", "1"],
                        ["all", "", "3", "1", "1", "1"]]
    assert "again: python -m bench.torture --seed=4 --only=two --case=1" in out and ended.value.code == 1
    assert len(json.loads((tmp_path / "out.json").read_text())["rows"]) == 4 and not (tmp_path / "s").exists()
    torture.main(["--list", "--only=tw"])
    assert capsys.readouterr().out.split() == ["two", "fault", "two"]
    with pytest.raises(UserError, match="no fault is called thre"):
        torture.main(["--only=thre"])


def run_torture(tmp_path, *flags, limit=600):
    done = subprocess.run([sys.executable, "-m", "bench.torture", *flags, f"--scratch={tmp_path / 'scratch'}",
                           f"--json={tmp_path / 'out.json'}"], cwd=ROOT, capture_output=True, text=True, timeout=limit,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert (tmp_path / "out.json").exists(), done.stderr
    return done, json.loads((tmp_path / "out.json").read_text())["rows"]


@pytest.mark.slow
def test_a_sample_of_kills_and_damage_survives(tmp_path):
    done, rows = run_torture(tmp_path, "--minutes=9", "--times=1", "--only=kills-base,flips,damaged,two-runs")
    assert [row["fault"] for row in rows] == ["kills-base", "flips", "damaged", "two-runs"]
    assert {row["verdict"]["word"] for row in rows} <= {SURVIVED, SKIPPED}, done.stdout
    assert done.returncode == 0 and not (tmp_path / "scratch").exists()


@pytest.mark.slow
def test_five_minutes_of_all_faults_survive(tmp_path):
    done, rows = run_torture(tmp_path, "--minutes=5", "--verbose")
    assert rows and {row["verdict"]["word"] for row in rows} <= {SURVIVED, SKIPPED}, done.stdout
    assert not (tmp_path / "scratch").exists()


@pytest.mark.slow
def test_the_costs_are_measured(tmp_path, capsys):
    costs.main(["--only=verify", "--depth=2", f"--json={tmp_path / 'out.json'}"])
    assert "load_checkpoint, verified" in capsys.readouterr().out
    costs.main(["--only=saving", "--steps=10", "--every=5", "--rounds=1"])
    assert re.search(r"every 5 +\| +2 ", capsys.readouterr().out)


def test_the_content_of_a_folder_is_its_files(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b").write_text("x")
    before = content(tmp_path)
    (tmp_path / "run.lock").write_text("pid")
    assert content(tmp_path) == before and list(before) == ["a/b"]
    (tmp_path / "a" / "b").write_text("y")
    assert content(tmp_path) != before


def test_a_lab_leaves_nothing_unless_a_room_is_kept(tmp_path):
    with Lab(tmp_path / "lab", time.monotonic() + 60) as lab:
        lab.empty_room("one")
    assert not (tmp_path / "lab").exists()
    with Lab(tmp_path / "lab", time.monotonic() + 60) as lab:
        lab.empty_room("one")
        lab.empty_room("two").keep = True
    assert [path.name for path in (tmp_path / "lab").iterdir()] == ["two"]


def test_a_curve_starts_anew_where_a_run_resumes(tmp_path):
    base = finished(tmp_path / "one")
    assert not read_curve(base / JOB.log).problems and len(read_curve(base / JOB.log).values) == 41
