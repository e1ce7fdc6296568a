"""Whatever is wrong with the files of a checkpoint is found, the one before is taken, and nothing is deleted."""

import json
import os
import random
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nanochat.checkpoint import (
    Corrupt,
    NotFinite,
    latest_step,
    load_checkpoint,
    load_on_ranks,
    load_to_resume,
    save_checkpoint,
    tensors,
    writing,
)
from nanochat.checkpoint.__main__ import main as command
from nanochat.checkpoint.meta import parse_meta
from nanochat.errors import UserError
from nanochat.files import lock_folder, sha256_of
from tests.conftest import ROOT
from tests.test_checkpoint import ALONE, META, inside, is_whole, momenta, names, save, weights
from tests.test_distributed import start_ranks


@pytest.fixture
def two(tmp_path):
    """A folder with the checkpoints of steps 10 and 20."""
    for step in (10, 20):
        save(tmp_path / "d2", step)
    return tmp_path / "d2"


def resume(folder):
    return load_to_resume(folder, ALONE)


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def flip(path, place=None, bit=0):
    data = bytearray(path.read_bytes())
    data[len(data) // 2 if place is None else place] ^= 1 << bit
    path.write_bytes(data)


def without_seal(folder, step, **changes):
    """Make a checkpoint one of before format 2; set further fields of its meta file."""
    path = folder / f"meta_{step:06d}.json"
    meta = {**json.loads(path.read_text()), **changes}
    del meta["format"], meta["meta_sha256"]
    path.write_text(json.dumps({name: value for name, value in meta.items() if value is not ...}))


def replace_tensors(folder, name, part, keep_meta=False):
    """Put other tensors into a checkpoint whose meta file says that they are right."""
    torch.save(part, folder / name)
    step = int(name.split("_")[1].split(".")[0])
    listed = json.loads((folder / f"meta_{step:06d}.json").read_text())["files"]
    listed[name] = {"size": (folder / name).stat().st_size, "sha256": sha256_of(folder / name)}
    without_seal(folder, step, files=listed)


# ---- what is found

def test_of_200_random_flips_none_is_accepted(two):
    whole, dice = content(two), random.Random(0)
    for _ in range(200):
        path = two / dice.choice(names(20))
        flip(path, dice.randrange(path.stat().st_size), dice.randrange(8))
        assert load_checkpoint(two, optimizer=True).step == latest_step(two) == 10, path
        if path.name.startswith("optim"):
            assert load_checkpoint(two).step == 20
        with pytest.raises(Corrupt, match=path.name):
            load_checkpoint(two, 20, optimizer=True)
        path.write_bytes(whole[path.name])
    assert resume(two).step == 20 and content(two) == whole


def test_every_byte_of_a_meta_file_counts(two):
    path, dice = two / "meta_000020.json", random.Random(0)
    text = path.read_bytes()
    for place in range(len(text)):
        path.write_bytes(text[:place] + bytes([text[place] ^ 1 << dice.randrange(8)]) + text[place + 1:])
        with pytest.raises(Corrupt, match="meta_000020.json"):
            parse_meta(path)
    for cut in (text[:-1], text + b"\n", text.replace(b"\n", b"\r\n"), b""):
        path.write_bytes(cut)
        with pytest.raises(Corrupt):
            parse_meta(path)
    meta = json.loads(text)
    for changed in ({"val_bpb": 1.25}, {"step": 1}, {"files": ...}, {"format": 3}, {"format": ...},
                    {"meta_sha256": ...}):
        changed = {key: value for key, value in (meta | changed).items() if value is not ...}
        path.write_text(json.dumps(changed, indent=2))
        with pytest.raises(Corrupt, match="meta_000020.json"):
            parse_meta(path)
    path.write_bytes(text)
    assert parse_meta(path)["val_bpb"] == 1.5


def test_metas_of_before_the_seal_and_published_ones_stay_readable(two):
    without_seal(two, 20)
    assert is_whole(resume(two), 20)
    without_seal_and_files = json.loads((two / "meta_000020.json").read_text())
    del without_seal_and_files["files"]
    (two / "meta_000020.json").write_text(json.dumps(without_seal_and_files))
    assert resume(two).step == 10  # one of ours always has it
    del without_seal_and_files["periodical"]
    (two / "meta_000020.json").write_text(json.dumps(without_seal_and_files))
    assert is_whole(load_checkpoint(two), 20)
    (two / "meta_000020.json").write_text(json.dumps(without_seal_and_files | {"format": 3, "meta_sha256": "0"}))
    assert load_checkpoint(two).step == 10


DAMAGES = {
    "a model cut short": lambda two: os.truncate(two / "model_000020.pt", 500),
    "an empty model": lambda two: os.truncate(two / "model_000020.pt", 0),
    "an optimizer state cut short": lambda two: os.truncate(two / "optim_000020.pt", 500),
    "an empty meta file": lambda two: os.truncate(two / "meta_000020.json", 0),
    "no meta file": lambda two: (two / "meta_000020.json").unlink(),
    "no model": lambda two: (two / "model_000020.pt").unlink(),
    "no optimizer state": lambda two: (two / "optim_000020.pt").unlink(),
    "the model of another step": lambda two: shutil.copy(two / "model_000010.pt", two / "model_000020.pt"),
    "the optimizer state of another step": lambda two: shutil.copy(two / "optim_000010.pt", two / "optim_000020.pt"),
    "the meta file of another step": lambda two: shutil.copy(two / "meta_000010.json", two / "meta_000020.json"),
    "a folder in place of the model": lambda two: ((two / "model_000020.pt").unlink(),
                                                   (two / "model_000020.pt").mkdir()),
    "NaN weights": lambda two: replace_tensors(two, "model_000020.pt", weights(float("nan"))),
    "infinite momenta": lambda two: replace_tensors(two, "optim_000020.pt", momenta(3) | {
        "x": {"m": torch.tensor([1.0, float("-inf")])}}),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_once_and_left_where_it_is(two, damage, caplog):
    (two / "model_000030.pt.new").write_text("never committed")
    (two / "notes_000040.txt").write_text("mine")
    DAMAGES[damage](two)
    before = sorted(path.name for path in two.iterdir())
    assert is_whole(resume(two), 10) and is_whole(load_checkpoint(two, optimizer=True), 10) and latest_step(two) == 10
    if damage != "no meta file":
        assert [text.split(":")[0] for text in caplog.messages] == ["skipping the checkpoint of step 20"]
    assert sorted(path.name for path in two.iterdir()) == before


def test_published_weights_that_are_not_finite_are_passed_over(two, caplog):
    for step, value in ((30, 30.0), (40, float("inf"))):
        torch.save(weights(value), two / f"model_{step:06d}.pt")
        (two / f"meta_{step:06d}.json").write_text(json.dumps(META))
    assert load_checkpoint(two).step == 30 and "not finite (NaN or infinity), in a.weight" in caplog.text
    with pytest.raises(Corrupt, match="not finite"):
        load_checkpoint(two, 40)


def test_a_file_is_read_once_by_a_process_unless_it_was_touched(two, monkeypatch):
    read, real = [], tensors.sha256_of_rest
    monkeypatch.setattr(tensors, "sha256_of_rest", lambda file: read.append(Path(file.name).name) or real(file))
    latest_step(two)
    assert load_checkpoint(two).step == 20 and len(read) == 3  # just written: its times may not show a change
    later, now = time.time() + 10, time.time
    monkeypatch.setattr(tensors.time, "time", lambda: now() + 10)
    read.clear()
    assert latest_step(two) == 20 and load_checkpoint(two).step == 20 and resume(two).step == 20
    assert sorted(read) == ["model_000020.pt", "optim_000020.pt"] and now() < later
    state = (two / "model_000020.pt").stat()
    flip(two / "model_000020.pt")
    os.utime(two / "model_000020.pt", ns=(state.st_atime_ns, state.st_mtime_ns))
    assert load_checkpoint(two).step == 10
    assert latest_step(two, verify=False) == 10  # as it is known now


# ---- resuming

def test_an_optimizer_state_that_is_lost_costs_the_steps_since_the_one_before_or_is_said(two, caplog):
    flip(two / "optim_000020.pt")
    found = resume(two)
    assert found.step == 10 and found.optimizer_state is not None and "optim_000020.pt is damaged" in caplog.text
    (two / "optim_000010.pt").unlink()
    found = resume(two)
    assert is_whole(found, 20) and found.optimizer_state is None and "optim_000020.pt is damaged" in found.no_optimizer
    flip(two / "model_000020.pt")
    found = resume(two)
    assert is_whole(found, 10) and found.no_optimizer.endswith("optim_000010.pt is missing.")
    save(two, 30, optimizer=False)
    assert resume(two).no_optimizer == "the checkpoint was saved without"  # whole, as it never had one


@pytest.mark.parametrize("rest", [[], ["model_000030.pt.new", "notes.txt"], ["tokenizer.json"]])
def test_a_folder_without_a_file_of_a_checkpoint_is_that_of_a_new_run(tmp_path, rest):
    assert resume(tmp_path / "absent") is None
    for name in rest:
        (tmp_path / name).write_text("")
    assert resume(tmp_path) is None


NONE_USABLE = {
    "all models cut short": lambda path: path.name.startswith("model") and os.truncate(path, 9),
    "all models flipped": lambda path: path.name.startswith("model") and flip(path),
    "all metas flipped": lambda path: path.name.startswith("meta") and flip(path),
    "no metas": lambda path: path.name.startswith("meta") and path.unlink(),
    "no models": lambda path: path.name.startswith("model") and path.unlink(),
    "optimizer states alone": lambda path: not path.name.startswith("optim") and path.unlink(),
    "metas alone": lambda path: path.name.startswith("meta") or path.unlink(),
}


@pytest.mark.parametrize("how", NONE_USABLE)
def test_files_of_checkpoints_of_which_none_is_usable_stop_a_run_with_what_to_do(two, how):
    for path in list(two.iterdir()):
        NONE_USABLE[how](path)
    before = content(two)
    for load in (resume, load_checkpoint):
        with pytest.raises(UserError, match="python -m nanochat.checkpoint verify") as error:
            load(two)
        assert load is load_checkpoint or "--fresh" in str(error.value) and "--model-tag" in str(error.value)
        assert any(reason in str(error.value) for reason in ("step 20: ", "no meta file says"))
    assert latest_step(two) is None and content(two) == before


def _machines(ranks, folder, out):
    ranks = replace(ranks, local_rank=0)  # each a machine of its own, with a disk of its own
    told = {}
    for case in ("whole", "newest", "optimizer", "all"):
        try:
            found = load_to_resume(folder / case / str(ranks.rank), ranks)
            told[case] = [found.step, found.optimizer_state is not None]
        except UserError as error:
            told[case] = str(error)
    try:
        load_on_ranks(folder / "newest" / str(ranks.rank), 20, ranks)
    except UserError as error:
        told["by step"] = str(error)
    (out / f"{ranks.rank}.json").write_text(json.dumps(told))


def test_machines_agree_on_the_newest_checkpoint_that_is_whole_on_all(two, tmp_path):
    for case in ("whole", "newest", "optimizer", "all"):
        for rank in range(2):
            shutil.copytree(two, tmp_path / case / str(rank))
    flip(tmp_path / "newest" / "1" / "model_000020.pt")
    flip(tmp_path / "optimizer" / "1" / "optim_000020.pt")
    for path in (tmp_path / "all" / "1").glob("model*"):
        flip(path)
    start_ranks(2, _machines, tmp_path, tmp_path)
    told = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert told[0] == told[1]
    assert [told[0][case] for case in ("whole", "newest", "optimizer")] == [[20, True], [10, True], [10, True]]
    for case, steps in (("all", (20, 10)), ("by step", (20,))):
        assert "rank 1 on " in told[0][case]
        assert all(f"model_{step:06d}.pt is damaged" in told[0][case] for step in steps)


# ---- saving

@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("part", ["model", "optim"])
def test_a_state_that_is_not_finite_is_not_saved_and_nothing_makes_room_for_it(tmp_path, part, value):
    for step in (10, 20):
        save(tmp_path, step, keep=2)
    before = content(tmp_path)
    state = {"model": weights(1), "optim": momenta(1)}
    tensor = state["model"]["b.weight"] if part == "model" else state["optim"]["state"]["a.weight"]["momentum"]
    tensor.view(-1)[-1] = value
    with pytest.raises(NotFinite, match=r"step 30 was not saved: (b.weight \(model|state a.weight momentum \(optim)"):
        save_checkpoint(tmp_path, 30, state["model"], META, state["optim"], keep=1)
    assert content(tmp_path) == before


def test_numbers_are_finite_though_their_sum_is_not():
    large = torch.full((4,), 3e38)
    assert tensors.not_finite({"a": [large, large.bfloat16(), torch.zeros(0), torch.tensor(2), "text"]}) == ""
    for wrong in (float("nan"), float("inf"), float("-inf")):
        assert tensors.not_finite({"a": large, "b": {"c": torch.tensor([3e38, wrong])}}) == "b c"
    assert tensors.not_finite([torch.tensor([float("inf"), float("-inf")], dtype=torch.float16)]) == "0"


def keep_with(folder, step, keep, keep_every=-1, **meta):
    save_checkpoint(folder, step, weights(step), META | {"val_bpb": None, "value": step} | meta, momenta(step),
                    keep=keep, keep_every=keep_every)


def test_every_nth_and_the_best_by_validation_stay(tmp_path):
    for step, loss in ((10, 3.0), (20, 2.0), (30, 2.5), (40, 2.6), (50, float("nan")), (60, None), (70, 2.0)):
        keep_with(tmp_path, step, 2, 30, val_loss=loss)
    assert inside(tmp_path) == names(30, 60, 70)  # 70 is as good as 20
    keep_with(tmp_path, 80, 1, val_bpb=1.0)
    keep_with(tmp_path, 90, 1, val_bpb=1.1)
    assert inside(tmp_path) == names(80, 90)


def test_a_validation_loss_counts_for_the_checkpoint_at_which_it_was_measured(tmp_path):
    for step, measured in ((10, 10), (20, 20), (30, 20), (40, 20), (50, 50)):
        keep_with(tmp_path, step, 1, val_bpb=2.0 if measured == 20 else 3.0, val_step=measured)
    assert inside(tmp_path) == names(20, 50)


def test_a_damaged_checkpoint_is_not_counted_not_deleted_and_not_overwritten(tmp_path, monkeypatch):
    for step in (10, 20, 30):
        save(tmp_path, step, keep=9)
    flip(tmp_path / "model_000020.pt")
    flip(tmp_path / "optim_000030.pt")
    flip(tmp_path / "meta_000030.json")
    damaged = {name: data for name, data in content(tmp_path).items() if "20" in name or "30" in name}
    monkeypatch.setattr(writing, "_written", set())  # as a process that resumes
    save(tmp_path, 40, keep=2)
    assert inside(tmp_path) == names(10, 20, 30, 40)
    save(tmp_path, 20, keep=2)
    save(tmp_path, 30, keep=2)
    save(tmp_path, 50, keep=2)
    kept = {name.removesuffix(".kept"): data for name, data in content(tmp_path).items() if name.endswith(".kept")}
    assert kept == damaged
    assert inside(tmp_path) == sorted([*(f"{name}.kept" for name in names(20, 30)), *names(40, 50)])
    assert is_whole(resume(tmp_path), 50)


# ---- python -m nanochat.checkpoint

def test_verify_names_every_file_of_all_folders_and_ends_with_1_where_one_is_bad(two, tmp_path, capsys):
    save(tmp_path / "base_checkpoints" / "d4", 5)
    torch.save(weights(), tmp_path / "base_checkpoints" / "d4" / "model_000001.pt")
    (tmp_path / "base_checkpoints" / "d4" / "meta_000001.json").write_text(json.dumps(META))
    (tmp_path / "base_checkpoints" / "d4" / "optim_000001_rank0.pt").write_text("in another layout")
    command(["verify", str(tmp_path)])
    out = capsys.readouterr().out
    assert out.count(" whole\n") == 9 and out.count("published one, without a sha256") == 2
    assert str(two) in out and "optim_000001_rank0.pt not listed in its meta file" in out
    flip(two / "optim_000010.pt")
    with pytest.raises(SystemExit):
        command(["verify", str(two)])
    assert capsys.readouterr().out.count(" whole\n") == 5
    (two / "meta_000020.json").unlink()
    before = content(two)
    for path in (two, tmp_path):
        with pytest.raises(SystemExit) as ended:
            command(["verify", str(path)])
        out = capsys.readouterr().out
        assert ended.value.code == 1 and f"optim_000010.pt      {two}/optim_000010.pt is damaged" in out
        assert "model_000020.pt      without a usable meta file" in out and "model_000010.pt      whole" in out
    assert content(two) == before


def test_list_has_a_line_for_each_checkpoint(two, capsys):
    keep_with(two, 30, 9, val_bpb=1.25)
    os.truncate(two / "model_000010.pt", 9)
    flip(two / "meta_000020.json")
    command(["list", str(two)])
    lines = capsys.readouterr().out.splitlines()[2:]
    assert [line.split()[0] for line in lines] == ["10", "20", "30"]
    assert "is not" in lines[0] and "bytes long" in lines[0] and "meta_000020.json is damaged" in lines[1]
    assert "1.2500" in lines[2] and "periodical" in lines[2] and lines[2].endswith(" whole")


def test_prune_says_what_it_would_delete_and_deletes_it_when_told(tmp_path, capsys):
    folder = tmp_path / "base_checkpoints" / "d2"
    for step in (10, 20, 30, 40, 50, 60):
        keep_with(folder, step, 9, val_bpb={20: 1.0}.get(step, 2.0))
    save(folder, 70)
    flip(folder / "model_000030.pt")
    before = content(folder)
    flags = ["prune", str(tmp_path), "--keep=1", "--keep-every", "40"]
    command(flags)
    out = capsys.readouterr().out
    assert f"{folder}: would delete 2 of 7 checkpoints" in out and ": steps 10, 50\n" in out and "--yes" in out
    assert content(folder) == before
    with lock_folder(folder, "a run", ""):
        done = subprocess.run([sys.executable, "-m", "nanochat.checkpoint", *flags, "--yes"], cwd=ROOT,
                              capture_output=True, text=True)
    assert done.returncode == 1 and "d2 is in use: process" in done.stderr and "Nothing was deleted" in done.stderr
    assert content(folder) == before
    command([*flags, "--yes"])
    assert "deleted 2 of 7" in capsys.readouterr().out and inside(folder) == names(20, 30, 40, 60, 70)
    command([*flags, "--yes"])
    assert "nothing to delete" in capsys.readouterr().out


def test_wrong_commands_get_one_clear_line(tmp_path, capsys):
    command([])
    assert "verify PATH" in capsys.readouterr().out
    for argv, message in ((["check"], "'check' is none of verify"), (["verify", str(tmp_path / "x")], "no folder"),
                          (["prune", str(tmp_path), "--keep=0"], "--keep is 0; it must be at least 1")):
        save(tmp_path, 1)
        with pytest.raises(UserError, match=message):
            command(argv)
    shutil.rmtree(tmp_path)
    tmp_path.mkdir()
    command(["list", str(tmp_path)])
    assert "no checkpoints in" in capsys.readouterr().out
