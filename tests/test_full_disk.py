"""The real commands where the disk is full, limits its files, or is nearly full from the beginning."""

import json
import os
import resource
import shutil
import subprocess
from contextlib import suppress

import pytest

from nanochat import saving, training
from nanochat.checkpoint import latest_step, load_checkpoint, steps_in
from nanochat.errors import NotWritten, UserError
from nanochat.files import base_dir
from nanochat.logs import read_log
from nanochat.tokenizer import RustBPETokenizer
from scripts import base_train, tok_train
from tests.helpers import small_text_and_tokenizer

FLAGS = ["--depth=1", "--max-seq-len=32", "--device-batch-size=2", "--total-batch-size=64", "--num-iterations=12",
         "--save-every=2", "--keep=99", "--eval-every=-1", "--eval-tokens=64", "--core-metric-every=-1",
         "--sample-every=-1"]


@pytest.fixture
def disk(tmp_path, monkeypatch):
    """A small disk that holds the base directory: its folder, and a function that sets how large it is."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a small disk cannot be mounted here: it takes root")
    try:
        monkeypatch.setenv("NANOCHAT_BASE_DIR", str(folder / "base"))
        small_text_and_tokenizer()
        yield folder, lambda size: subprocess.run(
            ["mount", "-o", f"remount,size={size // 1024}k", str(folder)], check=True)
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def used(folder):
    disk = os.statvfs(folder)
    return (disk.f_blocks - disk.f_bfree) * disk.f_frsize


@pytest.fixture
def checkpoint_size(disk, monkeypatch):
    """The size of a checkpoint of FLAGS; the disk is empty again afterwards."""
    monkeypatch.setattr(saving, "TRY_EVERY", 0.05)
    base_train.main([*FLAGS, "--num-iterations=1", "--model-tag=size"])
    folder = base_dir() / "base_checkpoints" / "size"
    size = saving.bytes_on_disk(folder, 1)
    shutil.rmtree(folder)
    return size


def strict_log():
    lines = (base_dir() / "logs" / "base_d1.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_training_on_a_disk_for_three_checkpoints_keeps_the_newest(disk, checkpoint_size, capsys):
    folder, resize = disk
    resize(used(folder) + int(3.6 * checkpoint_size))
    base_train.main(FLAGS)
    said, kept = capsys.readouterr().out, base_dir() / "base_checkpoints" / "d1"
    assert "at a time take" in said and "deleted the checkpoint of step 2 " in said
    assert sorted(steps_in(kept)) == [8, 10, 12] and load_checkpoint(kept, optimizer=True).step == 12
    assert [row["step"] for row in strict_log() if row["kind"] == "checkpoint"] == [2, 4, 6, 8, 10, 12]
    assert sorted(path.name for path in kept.iterdir() if not path.name.endswith((".pt", ".json"))) == []


def test_a_disk_that_others_fill_in_the_middle_costs_saves_and_log_lines_are_made_up(disk, checkpoint_size, capsys,
                                                                                   monkeypatch):
    folder, resize = disk
    kept, filler, steps = base_dir() / "base_checkpoints" / "d1", folder / "filler", []
    train_step = training.train_step

    def one_step(*args, **more):
        steps.append(0)
        if len(steps) == 5:  # while step 4 is being saved
            with open(filler, "wb", buffering=0) as file, suppress(OSError):
                while file.write(bytes(4096)):
                    pass
        if len(steps) == 10:
            filler.unlink()
        return train_step(*args, **more)
    monkeypatch.setattr(training, "train_step", one_step)
    base_train.main(FLAGS)
    said = capsys.readouterr().out
    assert said.count("Training goes on.") >= 1 and latest_step(kept) == 12
    rows = strict_log()
    assert [row["step"] for row in rows if row["kind"] == "train"] == list(range(1, 13))  # each, and in order
    assert load_checkpoint(kept, optimizer=True).step == 12
    assert not [path for path in kept.rglob("*") if ".tmp" in path.name or path.name.endswith(".new")]


def test_a_last_checkpoint_that_finds_no_room_ends_with_an_error(disk, checkpoint_size, capsys, monkeypatch):
    folder, resize = disk
    monkeypatch.setattr(saving, "PATIENCE", 0.2)
    resize(used(folder) + int(1.6 * checkpoint_size))
    with pytest.raises(NotWritten, match="step 12 was tried for 0 s and is lost; older ones are untouched"):
        base_train.main(FLAGS)
    kept = base_dir() / "base_checkpoints" / "d1"
    assert steps_in(kept) == [2] and load_checkpoint(kept, optimizer=True).step == 2
    assert capsys.readouterr().out.count("Training goes on.") == 4  # steps 4, 6, 8 and 10
    resize(64 << 20)
    base_train.main(FLAGS)  # the same command goes on
    assert latest_step(kept) == 12


def test_a_disk_without_room_for_one_checkpoint_is_told_before_training(disk, checkpoint_size):
    folder, resize = disk
    resize(used(folder) + checkpoint_size // 2)
    with pytest.raises(NotWritten, match="no room for a checkpoint: .*Free at least"):
        base_train.main(FLAGS)
    assert not (base_dir() / "base_checkpoints" / "d1").exists()


def test_a_full_disk_leaves_the_tokenizer_that_is_there(disk):
    folder, resize = disk
    kept = base_dir() / "tokenizer"
    before = {path.name: path.read_bytes() for path in kept.iterdir() if path.is_file()}
    resize(used(folder) + 8192)
    with pytest.raises(UserError, match="the disk is full|No space"):
        tok_train.main(["--vocab-size=300"])
    assert {path.name: path.read_bytes() for path in kept.iterdir() if path.is_file()} == before
    assert RustBPETokenizer.from_directory(str(kept)) and [path.name for path in base_dir().glob("tokenizer*")] == [
        "tokenizer"]


def test_a_limit_on_the_size_of_files_costs_the_checkpoint_alone(tmp_path, monkeypatch, capsys):
    small_text_and_tokenizer()
    monkeypatch.setattr(saving, "PATIENCE", 0.0)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # Python ignores SIGXFSZ, and a write fails
    try:
        with pytest.raises(NotWritten, match="a file may not be that large: .*ulimit -f"):
            base_train.main(FLAGS)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert capsys.readouterr().out.count("Training goes on.") == 5
    kept = base_dir() / "base_checkpoints" / "d1"
    assert not kept.exists() or not list(kept.iterdir())
    rows = read_log(base_dir() / "logs" / "base_d1.jsonl")
    assert [row["step"] for row in rows if row["kind"] == "train"] == list(range(1, 13))
