"""nanochat/files.py: nothing half-written, whatever happens, and errors a person can act on."""

import dataclasses
import errno
import json
import math
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from nanochat import files
from nanochat.errors import NotWritten, UserError
from nanochat.files import (
    atomic_write,
    base_dir,
    free_name,
    in_words,
    lock,
    lock_folder,
    need_disk,
    sha256_of,
    sweep,
    to_json,
)
from tests.conftest import ROOT


def inside(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_appears_whole_and_replaces_the_old_one(tmp_path):
    path = tmp_path / "new" / "a.txt"
    with atomic_write(path, "w") as file:
        file.write("één\n")
        assert not path.exists()
    with atomic_write(path) as file:
        file.write(b"two")
        assert path.read_text(encoding="utf-8") == "één\n"
    assert path.read_bytes() == b"two" and inside(path.parent) == ["a.txt"]


@pytest.mark.parametrize("error", [RuntimeError("no"), KeyboardInterrupt()])
def test_an_error_leaves_the_old_file_and_nothing_beside_it(tmp_path, error):
    path = tmp_path / "a"
    path.write_bytes(b"old")
    with pytest.raises(type(error)), atomic_write(path) as file:
        file.write(b"new")
        raise error
    assert path.read_bytes() == b"old" and inside(tmp_path) == ["a"]


def test_a_full_disk_is_said_and_leaves_the_old_file(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"old")
    code = ("import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (100000, 100000))\n"
            "from nanochat.files import atomic_write\n"
            "with atomic_write(sys.argv[1]) as file: file.write(bytes(200000))")
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True)
    assert "NotWritten: the disk is full" in done.stderr and path.read_bytes() == b"old" and inside(tmp_path) == ["a"]
    with pytest.raises(UserError, match="disk is full.*NANOCHAT_BASE_DIR"), atomic_write(path):
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(OSError, match="another") as other, atomic_write(path):
        raise OSError(errno.ECONNRESET, "another")
    assert not isinstance(other.value, UserError)


@pytest.mark.parametrize("number, why, full", [
    (errno.ENOSPC, "the disk is full", True), (errno.EDQUOT, "quota", True), (errno.EFBIG, "ulimit -f", False),
    (errno.EIO, "the disk fails", False), (errno.EROFS, "read-only", False), (errno.ESTALE, "network disk", False)])
def test_a_disk_that_fails_in_the_middle_is_told_from_the_rest(tmp_path, number, why, full):
    (tmp_path / "a").write_bytes(b"old")
    with pytest.raises(NotWritten, match=f"{why}.*{tmp_path}") as told, atomic_write(tmp_path / "a") as file:
        file.write(b"new")
        raise OSError(number, os.strerror(number))  # of a write, which names no file
    assert told.value.full is full and (tmp_path / "a").read_bytes() == b"old" and inside(tmp_path) == ["a"]
    with pytest.raises(OSError) as other, atomic_write(tmp_path / "a"):
        raise OSError(errno.EIO, "x", "/elsewhere")  # another file, which the block reads
    assert not isinstance(other.value, UserError)


def test_a_disk_without_inodes_says_that_files_are_to_be_deleted(tmp_path, monkeypatch):
    disk = type("Disk", (), {"f_files": 100, "f_favail": 0, "f_bavail": 1000})
    monkeypatch.setattr(files.os, "statvfs", lambda path: disk)
    with pytest.raises(NotWritten, match="no free inodes.*Delete some files"), atomic_write(tmp_path / "a"):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_too_many_open_files_long_names_and_loops_are_a_sentence(tmp_path):
    with pytest.raises(NotWritten, match="name is too long"), atomic_write(tmp_path / ("a" * 300)):
        pass
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(NotWritten, match=f"in its place.*{tmp_path}/loop"), atomic_write(tmp_path / "loop" / "a"):
        pass
    code = ("import resource, sys; from nanochat.files import atomic_write\n"
            "resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))\n"
            "with atomic_write(sys.argv[1]): pass")
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "b")], capture_output=True, text=True, cwd=ROOT)
    assert "too many files are open" in done.stderr and inside(tmp_path) == ["loop"]


def test_text_takes_a_file_name_that_is_not_utf8(tmp_path):
    name = os.fsdecode(b"caf\xe9")
    with atomic_write(tmp_path / "a", "w") as file:
        file.write(to_json({"path": name}))
    assert json.loads((tmp_path / "a").read_text(encoding="utf-8")) == {"path": name}


def test_a_place_that_cannot_be_written_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write .*file/a"), atomic_write(tmp_path / "file" / "a"):
        pass
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="cannot write .*folder"), atomic_write(tmp_path / "folder"):
        pass
    assert inside(tmp_path) == ["file", "folder"]


def test_sweep_removes_what_a_kill_left_and_nothing_else(tmp_path):
    for name in (".a.txt.0123abcd.tmp", ".a.txt.mine.tmp", "a.0123abcd.tmp", ".young.0123abcd.tmp"):
        (tmp_path / name).write_text("")
        if "young" not in name:
            os.utime(tmp_path / name, (1, 1))
    with atomic_write(tmp_path / "held") as file:
        file.flush()
        aside = next(tmp_path.glob(".held.*"))
        os.utime(aside, (1, 1))
        sweep(tmp_path)
        assert aside.exists()
        assert not (tmp_path / ".a.txt.0123abcd.tmp").exists()
    assert inside(tmp_path) == [".a.txt.mine.tmp", ".young.0123abcd.tmp", "a.0123abcd.tmp", "held"]


def test_a_killed_writer_leaves_the_old_file_and_sweep_takes_its_rest(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"old")
    code = ("import sys, time\nfrom nanochat.files import atomic_write\n"
            "with atomic_write(sys.argv[1]) as file: file.write(bytes(9999999)); print('half', flush=True); "
            "time.sleep(60)")
    writer = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE)
    assert writer.stdout.readline() == b"half\n"
    writer.kill()
    writer.wait()
    assert path.read_bytes() == b"old" and len(inside(tmp_path)) == 2
    for rest in tmp_path.glob(".a.*"):
        os.utime(rest, (time.time() - 60,) * 2)
    sweep(tmp_path)
    assert inside(tmp_path) == ["a"]


def test_base_dir_is_made_and_a_bad_one_is_said(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "x" / "y"))
    assert base_dir() == tmp_path / "x" / "y" and base_dir().is_dir()
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "file" / "y"))
    with pytest.raises(UserError, match="Set NANOCHAT_BASE_DIR"):
        base_dir()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for name, why in {"loop": "circle", "file": "in its place", "a" * 300: "too long"}.items():
        monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / name))
        with pytest.raises(UserError, match=f"{why}.* Set NANOCHAT_BASE_DIR"):
            base_dir()
    monkeypatch.setenv("NANOCHAT_BASE_DIR", "")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert base_dir() == tmp_path / "home" / ".cache" / "nanochat"


def test_need_disk_counts_what_is_free(tmp_path, monkeypatch):
    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 50, 50))
    need_disk(tmp_path / "not" / "there", 50, "it")
    with pytest.raises(UserError, match="the model needs 51 B on the disk of .*, which has 50 B free"):
        need_disk(tmp_path / "not" / "there", 51, "the model")


def test_sizes_in_words():
    assert [in_words(size) for size in (0, 999, 1000, 2_168_140_800, 5e15)] == [
        "0 B", "999 B", "1.0 kB", "2.2 GB", "5000.0 TB"]


def test_sha256_is_that_of_the_whole_file(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert sha256_of(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    (tmp_path / "a").write_bytes(bytes((1 << 22) + 1))
    assert sha256_of(tmp_path / "a") != sha256_of(Path(__file__))


def test_free_name_never_takes_a_name_in_use(tmp_path):
    path = tmp_path / "a.kept"
    assert free_name(path) == path
    path.write_text("")
    (tmp_path / "a.kept2").write_text("")
    assert free_name(path) == tmp_path / "a.kept3"


def test_json_is_strict_and_takes_what_runs_hold():
    @dataclasses.dataclass
    class Config:
        depth: int
        folder: Path

    value = {"nan": math.nan, "inf": [math.inf, -math.inf], "config": Config(4, Path("x")), 3: True,
             "none": None, "text": "é", "numpy": np.float32(0.5), "array": np.array([1, 2]),
             "zero_d": torch.tensor(float("nan")), "bf16": torch.ones(2).bfloat16()}
    back = json.loads(to_json(value), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert back == {"nan": "NaN", "inf": ["Infinity", "-Infinity"], "config": {"depth": 4, "folder": "x"},
                    "3": True, "none": None, "text": "é", "numpy": 0.5, "array": [1, 2], "zero_d": "NaN",
                    "bf16": [1.0, 1.0]}
    assert math.isnan(float(back["nan"])) and float(back["inf"][1]) == -math.inf
    with pytest.raises(TypeError):
        to_json({"a": object()})


HOLD = """if True:
    import sys
    from pathlib import Path
    from nanochat.files import lock
    file = lock(Path(sys.argv[1]), "the folder is in use", "Stop it with {kill}.")
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_lock_is_another_processes_until_that_ends_and_says_which_one_it_is(tmp_path):
    path = tmp_path / "locks" / "it.lock"
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(path)], cwd=ROOT, stdin=subprocess.PIPE,
                              stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    told = rf"the folder is in use: process {holder.pid}, .*-c.* on .* since .*\. Stop it with `kill {holder.pid}`\."
    with pytest.raises(UserError, match=told):
        lock(path, "the folder is in use", "Stop it with {kill}.")
    holder.kill()
    holder.communicate()
    with lock(path, "the folder is in use", ""):
        assert path.read_text().startswith(f"{os.getpid()}\n")


def holding(path, how=HOLD):
    """A process that holds the lock of this path until its standard input ends."""
    holder = subprocess.Popen([sys.executable, "-c", how, str(path)], cwd=ROOT, stdin=subprocess.PIPE,
                              stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    return holder


@pytest.mark.parametrize("folder", ["base_checkpoints", "elsewhere"])
def test_a_folder_is_locked_under_all_its_names(tmp_path, folder):
    shared, link = tmp_path / "disk" / folder / "d2", tmp_path / "base" / "base_checkpoints" / "d2"
    shared.mkdir(parents=True)
    link.parent.mkdir(parents=True)
    link.symlink_to(shared)
    holder = holding(link, HOLD.replace("lock(", "lock_folder(").replace("import lock", "import lock_folder"))
    with pytest.raises(UserError, match="the folder is in use"):
        lock_folder(shared, "the folder is in use", "")  # as a machine with another base folder reaches it
    link.rename(link.with_name("aside"))  # as --fresh does
    with pytest.raises(UserError, match="the folder is in use"):
        lock_folder(link, "the folder is in use", "")
    holder.communicate("")
    with lock_folder(shared, "the folder is in use", ""), lock_folder(link, "the folder is in use", ""):
        where = shared.parent / ".d2.lock", tmp_path / "disk" / "locks" / "base_checkpoints_d2.lock"
        assert [path.exists() for path in where] == [folder == "elsewhere", folder != "elsewhere"]


ELSEWHERE = HOLD.replace("from nanochat.files", """import fcntl, socket
    from nanochat import files
    files.BEAT, socket.gethostname = 0.2, lambda: "elsewhere"
    fcntl.lockf = lambda *how: None  # a disk whose locks other machines do not see
    from nanochat.files""")


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(files, "STALE", 3.0)


def test_a_lock_of_another_machine_holds_while_its_file_is_touched(tmp_path, impatient, capsys):
    path = tmp_path / "it.lock"
    holder = holding(path, ELSEWHERE)
    with pytest.raises(UserError, match=f"process {holder.pid}, .* on elsewhere.* `kill {holder.pid}` on elsewhere"):
        lock(path, "the folder is in use", "Stop it with {kill}.")
    holder.kill()
    holder.communicate()
    with lock(path, "the folder is in use", ""):  # it says no more
        assert f"names a process of elsewhere, {holder.pid}, which may have been killed" in capsys.readouterr().err
    holder = holding(path, ELSEWHERE)
    holder.communicate("")  # ends in good order: nobody waits
    lock(path, "the folder is in use", "").close()
    assert not capsys.readouterr().err


def test_a_file_that_was_not_touched_for_long_is_taken_at_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(files, "STALE", 1e9)
    path = tmp_path / "it.lock"
    path.write_text("1\npython -m scripts.base_train\non elsewhere since 2026-01-01 00:00:00")
    os.utime(path, (1e9, 1e9))
    lock(path, "the folder is in use", "").close()
    assert not capsys.readouterr().err and not path.read_text()


def test_a_disk_without_locks_is_told_and_the_number_of_the_process_counts(tmp_path, monkeypatch, capsys):
    fcntl = pytest.importorskip("fcntl")

    def no_locks(*how):
        raise OSError(errno.ENOLCK, "No locks available")

    path = tmp_path / "it.lock"
    holder = holding(path)
    monkeypatch.setattr(fcntl, "lockf", no_locks)
    with pytest.raises(UserError, match=f"process {holder.pid}, "):
        lock(path, "the folder is in use", "")
    holder.kill()
    holder.communicate()
    lock(path, "the folder is in use", "").close()
    assert f"the disk of {tmp_path} has no file locks (No locks available)" in capsys.readouterr().err
