"""nanochat/checkpoint/: a checkpoint is whole or absent, whatever happens, and readers get clear errors."""

import errno
import itertools
import json
import logging
import multiprocessing
import os
import pickle
import random
import re
import resource
import shutil
import signal
import sys
import threading
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nanochat import files
from nanochat.checkpoint import latest_step, load_checkpoint, load_on_ranks, save_checkpoint, tensors
from nanochat.distributed import Ranks
from nanochat.errors import UserError
from nanochat.loading import load_model
from nanochat.optim import MuonAdamW
from nanochat.saving import BackgroundSaver
from tests.test_distributed import start_ranks

ALONE = Ranks(0, 0, 1, torch.device("cpu"))
CONFIG = {"sequence_len": 8, "vocab_size": 16, "n_layer": 1, "layer_pattern": None}
META = {"model_config": CONFIG, "val_bpb": 1.5, "user_config": {"depth": 1}, "device_batch_size": 4, "max_seq_len": 8}


def weights(value=0.0, size=300):
    return {"a.weight": torch.full((size,), float(value)), "b.weight": torch.full((2, 3), float(value))}


def momenta(value=0.0, size=300):
    return {"step": int(value), "state": {"a.weight": {"momentum": torch.full((size,), float(value))}}}


def save(folder, step, value=None, optimizer=True, **more):
    value = step if value is None else value
    save_checkpoint(folder, step, weights(value), META | {"value": value}, momenta(value) if optimizer else None,
                    **more)


def inside(folder):
    return sorted(path.name for path in folder.iterdir())


def names(*steps):
    return sorted(name for n in steps for name in (f"meta_{n:06d}.json", f"model_{n:06d}.pt", f"optim_{n:06d}.pt"))


def is_whole(loaded, value):
    return (loaded.meta["value"] == value and all((tensor == value).all() for tensor in loaded.model_state.values())
            and (loaded.optimizer_state is None or (loaded.optimizer_state["step"] == value
                 and (loaded.optimizer_state["state"]["a.weight"]["momentum"] == value).all())))


@pytest.fixture
def three(tmp_path):
    for step in (10, 20, 30):
        save(tmp_path, step)
    return tmp_path


# ---- what is written

def test_what_is_saved_comes_back(tmp_path):
    save(tmp_path, 500)
    assert inside(tmp_path) == names(500)
    meta = json.loads((tmp_path / "meta_000500.json").read_text())
    assert meta["step"] == 500 and meta["val_bpb"] == 1.5 and meta["user_config"] == {"depth": 1}
    assert meta["model_config"] == {"sequence_len": 8, "vocab_size": 16, "n_layer": 1}  # no layer_pattern, as published
    assert {name: said["sha256"] for name, said in meta["files"].items()} == {
        name: files.sha256_of(tmp_path / name) for name in ("model_000500.pt", "optim_000500.pt")}
    loaded = load_checkpoint(tmp_path, optimizer=True)
    assert (loaded.step, loaded.no_optimizer, loaded.folder) == (500, "", tmp_path) and is_whole(loaded, 500)
    assert load_checkpoint(tmp_path, 500).optimizer_state is None
    assert latest_step(tmp_path) == 500


def test_the_optimizer_state_is_read_without_the_weights(tmp_path):
    save(tmp_path, 5, 2.0)
    whole = load_checkpoint(tmp_path, 5, optimizer=True)
    (tmp_path / "model_000005.pt").unlink()  # it is not looked at
    loaded = load_checkpoint(tmp_path, 5, weights=False, optimizer=True)
    assert loaded.model_state == {} and loaded.meta == whole.meta
    assert loaded.optimizer_state.keys() == whole.optimizer_state.keys() and loaded.optimizer_state


def test_weights_are_filed_in_float32_by_plain_names_and_without_what_they_are_views_of(tmp_path):
    big = torch.arange(100000.0)
    state = {"_orig_mod.wte.weight": torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16)),
             "_orig_mod.view": big[10:14],
             "_orig_mod.turned": big[:6].view(2, 3).T}
    save_checkpoint(tmp_path, 1, state, META)
    filed = torch.load(tmp_path / "model_000001.pt", weights_only=True)
    assert {name: (tensor.dtype, tensor.tolist()) for name, tensor in filed.items()} == {
        "wte.weight": (torch.float32, [1] * 4), "view": (torch.float32, [10, 11, 12, 13]),
        "turned": (torch.float32, [[0, 3], [1, 4], [2, 5]])}
    assert (tmp_path / "model_000001.pt").stat().st_size < 10000


def test_a_pattern_that_is_set_and_a_loss_that_is_not_finite_are_kept_in_valid_json(tmp_path):
    config = CONFIG | {"layer_pattern": "S"}
    save_checkpoint(tmp_path, 1, weights(), META | {"model_config": config, "val_bpb": float("nan")})
    meta = json.loads((tmp_path / "meta_000001.json").read_text(),
                      parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert meta["model_config"]["layer_pattern"] == "S" and meta["val_bpb"] == "NaN"


def test_steps_beyond_a_million_are_found(tmp_path):
    save(tmp_path, 999999)
    save(tmp_path, 1234567)
    assert latest_step(tmp_path) == 1234567 and is_whole(load_checkpoint(tmp_path, 999999), 999999)


# ---- kills

def write_for_ever(folder, first, kind, said, largest=None):
    """Save one checkpoint after the other, in a process of its own; say each when it is done."""
    torch.set_num_threads(1)
    if largest:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))
    saver = BackgroundSaver()
    try:
        for value in itertools.count(first):
            step = 7 if kind == "same" else value
            whole, optimizer_state = weights(value, 100000), momenta(value, 100000)
            if kind == "thread":  # the main thread trains on, in the memory that was copied
                for done in saver.wait():
                    said.send(done)
                whole = {name: saver.host_copy(name, tensor) for name, tensor in whole.items()}
                saver.write(folder, step, whole, META | {"value": value}, optimizer_state, keep=2)
                continue
            save_checkpoint(folder, step, whole, META | {"value": value}, optimizer_state, keep=2)
            said.send(value)
    except UserError as error:
        said.send(str(error))


def start(*args):
    """Start write_for_ever; returns the process and what it says. PyTorch is imported once, not in every process."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "nanochat.saving"])
    hears, says = context.Pipe(duplex=False)
    process = context.Process(target=write_for_ever, args=(*args[:3], says, *args[3:]))
    process.start()
    says.close()
    return process, hears


@pytest.mark.parametrize("kind", ["new", "same", "thread"])
def test_a_kill_at_any_moment_leaves_the_newest_checkpoint_valid(tmp_path, kind, caplog):
    chance, value = random.Random(0), 0
    for _ in range(8):
        writer, said = start(tmp_path, value + 1, kind)
        for _ in range(chance.randint(1, 6)):
            value = said.recv()
        time.sleep(chance.uniform(0, 0.03))
        writer.kill()
        with suppress(EOFError):
            while True:
                value = said.recv()
        writer.join()
        assert writer.exitcode == -signal.SIGKILL
        loaded = load_checkpoint(tmp_path, optimizer=True)
        assert loaded.meta["value"] in (value, value + 1)  # +1: saved, but killed before it said so
        assert is_whole(loaded, loaded.meta["value"])
        assert latest_step(tmp_path) == loaded.step == (7 if kind == "same" else loaded.meta["value"])
        assert not caplog.records
        value = loaded.meta["value"]
        for rest in tmp_path.glob(".*.tmp"):
            os.utime(rest, (1, 1))
    step = 7 if kind == "same" else value + 1
    save(tmp_path, step, value + 1, keep=2)
    assert inside(tmp_path) == names(*([7] if kind == "same" else [value, value + 1]))  # nothing that the kills left


class Killed(BaseException):
    pass


def killed_after(monkeypatch, count):
    """Let the writer die, as by a kill, before its (count+1)th change of a name: nothing runs any more."""
    done = []

    def counted(real):
        def change(*args, **more):
            if len(done) >= count:
                raise Killed
            done.append(1)
            return real(*args, **more)
        return change

    monkeypatch.setattr(os, "replace", counted(os.replace))
    monkeypatch.setattr(Path, "unlink", counted(Path.unlink))


@pytest.mark.parametrize("step, keep", [(20, 1), (10, None), (10, 1)])
def test_death_between_any_two_changes_of_names_leaves_the_old_checkpoint_or_the_new(tmp_path, step, keep):
    """Goes through every point in turn, for a new step, one saved again, and one after which older ones are deleted."""
    for count in range(100):
        folder = tmp_path / str(count)
        save(folder, 10, 1, keep=keep)
        with pytest.MonkeyPatch.context() as patch:
            killed_after(patch, count)
            try:
                save(folder, step, 2, optimizer=step == 20, keep=keep)
                died = False
            except Killed:
                died = True
        loaded = load_checkpoint(folder)
        assert is_whole(loaded, loaded.meta["value"]) and latest_step(folder) == loaded.step
        assert loaded.meta["value"] in (1, 2) if died else loaded.meta["value"] == 2
        for rest in folder.glob(".*.tmp"):
            os.utime(rest, (1, 1))
        save(folder, 20, 3, keep=1)  # and the next save tidies up
        older = [] if keep else ["meta_000010.json", *json.loads((folder / "meta_000010.json").read_text())["files"]]
        assert inside(folder) == sorted(names(20) + older)
        assert is_whole(load_checkpoint(folder, 20, optimizer=True), 3)
        if not died:
            break
    assert not died and count > 5


# ---- damage

def test_a_changed_byte_is_noticed_and_the_one_before_is_taken(three, caplog):
    path = three / "model_000030.pt"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert load_checkpoint(three).step == 20
    assert [("step 30" in text, "model_000030.pt is damaged" in text, "\n" in text) for text in caplog.messages] == [
        (True, True, False)]
    with pytest.raises(UserError, match="model_000030.pt is damaged"):
        load_checkpoint(three, 30)


def test_a_damaged_optimizer_state_counts_where_it_is_needed(three):
    path = three / "optim_000030.pt"
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)
    assert load_checkpoint(three).step == 30
    assert load_checkpoint(three, optimizer=True).step == 20
    path.unlink()
    assert load_checkpoint(three).step == 30  # a model is often carried elsewhere without it
    assert load_checkpoint(three, optimizer=True).step == 20 and latest_step(three) == 20


@pytest.mark.parametrize("name, damage", [
    ("model_000030.pt", lambda path: path.write_bytes(path.read_bytes()[:-1])), ("model_000030.pt", Path.unlink),
    ("model_000030.pt", lambda path: path.write_bytes(b"")),
    ("meta_000030.json", lambda path: path.write_text('{"step": 30, "mod')),
    ("meta_000030.json", lambda path: path.write_text("[]")),
    ("meta_000030.json", lambda path: path.write_bytes(b"\xff\x00")),
    ("meta_000030.json", lambda path: path.write_text("{}")),
    ("optim_000030.pt", lambda path: path.write_bytes(bytes(9)))])
def test_a_torn_or_missing_file_makes_the_one_before_the_newest(three, name, damage, caplog):
    damage(three / name)
    assert latest_step(three) == 20 and "skipping the checkpoint of step 30" in caplog.text
    assert load_checkpoint(three, optimizer=True).step == 20
    with pytest.raises(UserError, match=name):
        load_checkpoint(three, 30, optimizer=True)


def test_files_without_meta_are_no_checkpoint(three):
    (three / "meta_000030.json").unlink()
    (three / "meta_x.json").write_text("{}")
    (three / "meta_40.json").write_text("{}")
    assert latest_step(three) == 20
    with pytest.raises(UserError, match="no checkpoint of step 30 in .*there are those of 10, 20"):
        load_checkpoint(three, 30)


def test_nothing_to_load_says_what_was_looked_for_and_how_to_train(tmp_path):
    for folder in (tmp_path, tmp_path / "absent"):
        assert latest_step(folder) is None
        with pytest.raises(UserError, match=r"no usable checkpoint in .*looked for meta_NNNNNN.json"
                                            r".*scripts.base_train"):
            load_checkpoint(folder)
        with pytest.raises(UserError, match="there is none of any step"):
            load_checkpoint(folder, 5)
    with pytest.raises(UserError, match="scripts.chat_sft"):
        load_model("sft", "cpu")


def test_only_tensors_are_unpickled(tmp_path):
    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "evil"),))

    (tmp_path / "meta_000001.json").write_text(json.dumps(META))
    for content in (pickle.dumps(Evil(), 2), pickle.dumps({"a": Evil()}, 2), b"text", b"\x80"):
        (tmp_path / "model_000001.pt").write_bytes(content)
        with pytest.raises(UserError, match="model_000001.pt cannot be read"):
            load_checkpoint(tmp_path, 1)
    torch.save({"a": Evil()}, tmp_path / "model_000001.pt")
    with pytest.raises(UserError, match="model_000001.pt cannot be read"):
        load_checkpoint(tmp_path, 1)
    for content in ([torch.ones(1)], {"a": 1}, {1: torch.ones(1)}):
        torch.save(content, tmp_path / "model_000001.pt")
        with pytest.raises(UserError, match="weights by name"):
            load_checkpoint(tmp_path, 1)
    assert not (tmp_path / "evil").exists()


def test_a_meta_file_cannot_name_files_of_others(tmp_path):
    (tmp_path / "precious").write_text("")
    folder = tmp_path / "folder"
    save(folder, 10, keep=1)
    path = folder / "meta_000010.json"
    meta = json.loads(path.read_text())
    meta["files"]["../precious"] = {"size": 0, "sha256": ""}
    path.write_text(json.dumps(meta))
    (folder / "meta_000005.json.gone").write_text(json.dumps(meta))
    save(folder, 20, keep=1)
    assert (tmp_path / "precious").exists() and latest_step(folder) == 20


# ---- several ranks

def memory(kind):
    """Bytes of this process that are in memory: RssAnon its own, RssFile pages of files, shared with others."""
    return 1024 * int(re.search(rf"{kind}:\s*(\d+)", Path("/proc/self/status").read_text())[1])


def parameters_of_optimizer():
    torch.manual_seed(0)
    matrices = [torch.nn.Parameter(torch.randn(1024, 2048)) for _ in range(4)]
    common = {"lr": 1.0, "weight_decay": 0.0, "betas": (0.9, 0.9), "eps": 1e-8}
    return [{"kind": "muon", "names": list("abcd"), "params": matrices, **common},
            {"kind": "adamw", "names": ["e"], "params": [torch.nn.Parameter(torch.zeros(4_000_001))], **common}]


def _resume(ranks, folder, torn, out):
    ranks = replace(ranks, local_rank=ranks.rank % 2)  # two machines with two ranks each
    hashed, real = [], tensors.sha256_of_rest
    tensors.sha256_of_rest = lambda file: hashed.append(Path(file.name).name) or real(file)
    optimizer = MuonAdamW(parameters_of_optimizer(), ranks)
    before = {kind: memory(kind) for kind in ("RssAnon", "RssFile")} if sys.platform == "linux" else {}
    found = load_on_ranks(folder, None, ranks, weights=False, optimizer=True, mapped=True)
    optimizer.load_state_dict(found.optimizer_state)
    grown = {kind: memory(kind) - value for kind, value in before.items()}
    told = {"step": found.step, "hashed": [*hashed], "grown": grown, "state": optimizer.state_dict()}
    with pytest.raises(UserError, match="optim_000001.pt is damaged"):  # on every rank
        load_on_ranks(torn, 1, ranks, weights=False, optimizer=True, mapped=True)
    torch.save(told, out / f"{ranks.rank}.pt")


def test_one_rank_of_a_machine_verifies_a_checkpoint_and_each_takes_its_part_of_the_optimizer_state(tmp_path):
    optimizer = MuonAdamW(parameters_of_optimizer(), ALONE)
    for bucket in optimizer.buckets:
        for part in bucket.state.values():
            part.normal_()
    for step in (1, 2):
        save_checkpoint(tmp_path / "whole", step, weights(), META, optimizer.state_dict())
    size = (tmp_path / "whole" / "optim_000002.pt").stat().st_size
    shutil.copytree(tmp_path / "whole", tmp_path / "torn")
    with open(tmp_path / "torn" / "optim_000001.pt", "r+b") as file:
        file.seek(size // 2)
        file.write(b"\1\2\3\4")
    with open(tmp_path / "whole" / "optim_000002.pt", "r+b") as file:  # rank 0 chooses the one before
        file.seek(size // 3)
        file.write(b"\1\2\3\4")
    start_ranks(4, _resume, tmp_path / "whole", tmp_path / "torn", tmp_path)
    told = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(4)]
    assert [rank["step"] for rank in told] == [1] * 4
    assert [rank["hashed"] for rank in told] == [["optim_000002.pt", "optim_000001.pt"], [], ["optim_000001.pt"], []]
    for name, whole in optimizer.state_dict().items():  # rank 0 gathers the parts of all
        assert told[0]["state"][name].keys() == whole.keys()
        assert all(torch.equal(told[0]["state"][name][key], tensor) for key, tensor in whole.items())
    for rank in told:
        # a quarter of the state each and 8 MB to hash with; who loads all of it grows by its size
        grown = rank["grown"]
        assert grown.get("RssAnon", 0) < 0.9 * size and grown.get("RssFile", 0) < 0.9 * size, grown


def test_a_mapped_checkpoint_is_the_one_that_is_read(three, caplog):
    read, mapped = (load_checkpoint(three, optimizer=True, mapped=mapped) for mapped in (False, True))
    assert read.model_state.keys() == mapped.model_state.keys() and is_whole(mapped, 30)
    for name, tensor in read.model_state.items():
        assert torch.equal(tensor, mapped.model_state[name]) and tensor.dtype == mapped.model_state[name].dtype
    path = three / "model_000030.pt"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    assert load_checkpoint(three, mapped=True).step == 20
    path.write_bytes(b"x" * path.stat().st_size)
    with pytest.raises(UserError, match="model_000030.pt cannot be read"):
        load_checkpoint(three, 30, mapped=True, verify=False)


# ---- a full disk

def test_a_disk_too_small_is_said_before_anything_is_written(three, monkeypatch):
    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10000, 9000, 1000))
    before = inside(three)
    with pytest.raises(UserError, match="the checkpoint of step 40 needs 2.4 kB on the disk"):
        save(three, 40)
    assert inside(three) == before


@pytest.mark.parametrize("step", [30, 40])
@pytest.mark.parametrize("name", ["model", "optim", "meta"])
def test_a_disk_that_fills_up_leaves_all_as_it_was(three, monkeypatch, name, step):
    class Full:
        def __init__(self, file):
            self.file = file

        def __getattr__(self, part):
            return getattr(self.file, part)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self.file.close()

        def write(self, data):
            raise OSError(errno.ENOSPC, "No space left on device")

    before = {path.name: path.read_bytes() for path in three.iterdir()}
    monkeypatch.setattr(files, "open", lambda path, mode="r", **more: Full(open(path, mode, **more))
                        if Path(path).name.startswith(f".{name}_") else open(path, mode, **more), raising=False)
    with pytest.raises(UserError, match=f"the disk is full: .*{name}_0000{step}.*untouched"):
        save(three, step, 99)
    assert {path.name: path.read_bytes() for path in three.iterdir()} == before
    monkeypatch.undo()
    save(three, step, 99)
    assert is_whole(load_checkpoint(three, optimizer=True), 99)


def test_a_real_limit_on_writing_is_a_clear_error(three):
    writer, said = start(three, 40, "new", 150000)
    assert "the disk is full" in said.recv()
    writer.join()
    assert writer.exitcode == 0 and inside(three) == names(10, 20, 30)


# ---- deleting

def test_keep_deletes_the_oldest_periodical_saves_and_nothing_else(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "model_000002.pt").write_text("mine")
    torch.save(weights(), tmp_path / "model_000001.pt")
    (tmp_path / "meta_000001.json").write_text(json.dumps(META))
    save(tmp_path, 5)  # no periodical one
    for step in (10, 20, 30, 40):
        save(tmp_path, step, keep=2)
    foreign = ["meta_000001.json", "model_000001.pt", "model_000002.pt", "notes.txt"]
    assert inside(tmp_path) == sorted([*foreign, *names(5, 30, 40)])
    save(tmp_path, 50, keep=1)
    assert inside(tmp_path) == sorted([*foreign, *names(5, 50)])
    with pytest.raises(ValueError, match="keep"):
        save(tmp_path, 60, keep=0)


def test_keep_counts_only_checkpoints_that_are_valid_and_not_those_of_later_steps(tmp_path):
    for step in (10, 20, 30, 90):
        save(tmp_path, step, keep=9)
    (tmp_path / "model_000030.pt").write_bytes(b"torn")
    save(tmp_path, 40, keep=2)
    assert inside(tmp_path) == names(20, 30, 40, 90)


def test_a_published_checkpoint_in_the_way_is_kept_under_another_name(tmp_path):
    torch.save(weights(5), tmp_path / "model_000010.pt")
    torch.save({}, tmp_path / "optim_000010.pt")
    (tmp_path / "meta_000010.json").write_text(json.dumps(META))
    save(tmp_path, 10)
    save(tmp_path, 10, 11)
    assert inside(tmp_path) == sorted(names(10) + [f"{name}.kept" for name in names(10)])
    assert (torch.load(tmp_path / "model_000010.pt.kept", weights_only=True)["a.weight"] == 5).all()
    assert is_whole(load_checkpoint(tmp_path, optimizer=True), 11)


# ---- reading while writing

def test_readers_see_whole_checkpoints_while_a_writer_saves_and_deletes(tmp_path, caplog):
    caplog.set_level(logging.CRITICAL)
    save(tmp_path, 1, keep=1)
    stop, seen, wrong = threading.Event(), [], []

    def read():
        while not stop.is_set():
            try:
                loaded = load_checkpoint(tmp_path, optimizer=True)
                seen.append(loaded.meta["value"])
                if not is_whole(loaded, loaded.meta["value"]) or latest_step(tmp_path) is None:
                    wrong.append(loaded.meta)
            except Exception as error:
                wrong.append(repr(error))

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    for value in range(2, 60):
        save(tmp_path, value // 2, value, keep=1)  # each step twice
    stop.set()
    for reader in readers:
        reader.join()
    assert not wrong and len(set(seen)) > 5
