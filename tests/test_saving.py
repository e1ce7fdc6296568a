"""nanochat/saving.py: a checkpoint is written beside training, is what it was when it was asked for, and errors are
told."""

import errno
import os
import signal
import threading
import time
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch

from nanochat import checkpoint, files, saving
from nanochat.checkpoint import latest_step, load_checkpoint, save_checkpoint
from nanochat.distributed import Ranks
from nanochat.errors import NotWritten, UserError
from nanochat.kernels.choose import Choice
from nanochat.logs import RunLog, read_log
from nanochat.optim import MuonAdamW, parameter_groups
from nanochat.recipe import override, published
from nanochat.run import Origin, StageRun, open_run
from nanochat.saving import BackgroundSaver
from nanochat.stages import STAGES
from tests.helpers import small_model

ALONE = Ranks(0, 0, 1, torch.device("cpu"))
META = {"model_config": {"n_layer": 1}}


@pytest.fixture
def held(monkeypatch):
    """An event that all writes wait for."""
    go = threading.Event()

    def write(*args):
        assert go.wait(60)
        save_checkpoint(*args)
    monkeypatch.setattr(saving, "save_checkpoint", write)
    yield go
    go.set()


def start(saver, folder, step, weights, **more):
    saver.wait()
    saver.write(folder, step, {name: saver.host_copy(name, tensor) for name, tensor in weights.items()}, META, **more)


def test_what_is_written_is_what_was_there_when_it_was_asked_for(tmp_path, held):
    saver, weights = BackgroundSaver(), {"a": torch.zeros(5, 3), "_orig_mod.b": torch.full((4,), 2.0)}
    start(saver, tmp_path, 1, weights)
    for tensor in weights.values():
        tensor.fill_(9)  # the next step
    assert saver.finished() == [] and latest_step(tmp_path) is None
    held.set()
    assert saver.wait() == [1] and saver.finished() == saver.wait() == []
    state = load_checkpoint(tmp_path).model_state
    assert (state["a"] == 0).all() and (state["b"] == 2).all()


def test_the_files_are_those_of_a_save_that_waits_byte_for_byte(tmp_path):
    model = small_model()
    optimizer = MuonAdamW(parameter_groups(model), ALONE)
    saver, folders = BackgroundSaver(), (tmp_path / "beside", tmp_path / "waits")
    for step in (1, 2):  # the second in the memory of the first
        for bucket in optimizer.buckets:
            for part in bucket.state.values():
                part.normal_()
        model.transformer.wte.weight.data.normal_()
        optimizer.steps = step
        state = optimizer.state_dict(saver.host_copy)
        start(saver, folders[0], step, model.state_dict(), optimizer_state=state)
        saver.wait()
        save_checkpoint(folders[1], step, model.state_dict(), META, optimizer.state_dict())
    names = [sorted(path.name for path in folder.iterdir()) for folder in folders]
    assert names[0] == names[1] and len(names[0]) == 6
    for name in names[0]:
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes(), name


def test_a_second_save_waits_for_the_first(tmp_path, held):
    saver, weights = BackgroundSaver(), {"a": torch.zeros(3)}
    start(saver, tmp_path, 1, weights, keep=1)
    done = []
    second = threading.Thread(target=lambda: done.append(start(saver, tmp_path, 2, weights, keep=1)))
    second.start()
    second.join(0.05)
    assert second.is_alive() and not done
    held.set()
    second.join(60)
    assert saver.wait() == [2] and load_checkpoint(tmp_path).step == 2
    assert not (tmp_path / "meta_000001.json").exists()  # of those to keep, as without a thread


@pytest.mark.parametrize("when", ["finished", "wait", "write"])
def test_an_error_of_the_thread_is_raised_at_the_next_call(tmp_path, monkeypatch, when):
    saver, weights = BackgroundSaver(), {"a": torch.zeros(3)}
    start(saver, tmp_path, 1, weights)
    saver.wait()
    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 0}))
    start(saver, tmp_path, 2, weights)
    saver._thread.join()
    with pytest.raises(UserError, match="the checkpoint of step 2 needs"):
        saver.write(tmp_path, 3, weights, META) if when == "write" else getattr(saver, when)()
    assert saver.finished() == [] and load_checkpoint(tmp_path).step == 1


@dataclass
class Config:
    """What StageRun reads of a stage's flags."""

    run: str = "dummy"
    device_batch_size: int = 1
    max_seq_len: int = 8
    save_every: int = 2
    keep: int = 5
    keep_every: int = -1
    matrix_lr: float = 0.1
    embedding_lr: float = 0.1
    unembedding_lr: float = 0.1
    weight_decay: float = 0.0
    reduce_dtype: str = "float32"
    recompute: str = "none"

    def groups(self, *factors):
        return override(published.groups, matrix_lr=self.matrix_lr, embedding_lr=self.embedding_lr,
                        unembedding_lr=self.unembedding_lr, weight_decay=self.weight_decay)


class Tokenizer:
    def fingerprint(self):
        return "abc"


@pytest.fixture
def origin(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    return Origin(stage=STAGES["mid"], folder=tmp_path / "d2", step=0, model=small_model(), tokenizer=Tokenizer(),
                  meta={}, loaded="", provenance={})


def train(origin, one_step, steps=6, **config) -> StageRun:
    with open_run(origin, Config(**config), ALONE, num_iterations=steps, kernels=Choice()) as run:
        run.train_by(one_step, [])
    return run


def saved(origin):
    rows = read_log(origin.folder.parent / "logs" / "mid_d2.jsonl")
    return [row["step"] for row in rows if row["kind"] == "checkpoint"]


def test_training_goes_on_while_a_checkpoint_is_written_and_its_end_waits(origin, held):
    seen = []

    def one_step(step, stop):
        seen.append((step, latest_step(origin.folder)))
        if step == 3:
            held.set()  # the save of step 2 is under way, and that of step 4 waits for it
        return stop

    train(origin, one_step)
    assert seen[:4] == [(0, None), (1, None), (2, None), (3, None)] and len(seen) == 6
    assert latest_step(origin.folder) == 6 and saved(origin) == [2, 4, 6]


@pytest.mark.parametrize("end", ["signal", "error", "interrupt"])
def test_a_run_that_ends_early_waits_for_its_checkpoint(origin, held, end):
    def one_step(step, stop):
        if step == 3:
            threading.Timer(0.05, held.set).start()
            if end == "error":
                raise UserError("training has diverged")
            if end == "interrupt":
                raise KeyboardInterrupt
            os.kill(os.getpid(), 15)
        return stop

    with pytest.raises({"error": UserError, "interrupt": KeyboardInterrupt, "signal": SystemExit}[end]) as raised:
        train(origin, one_step)
    assert end != "error" or "diverged" in str(raised.value)
    step = 5 if end == "signal" else 2
    assert load_checkpoint(origin.folder, optimizer=True).step == step and saved(origin)[-1] == step


class SmallDisk:
    """A disk that holds so many checkpoints of a run, by what its folder holds; `room` is what is free besides."""

    def __init__(self, folder, monkeypatch):
        self.folder, self.room = folder, 10**9
        monkeypatch.setattr(files.shutil, "disk_usage", lambda path: type("Usage", (), {"free": self.free()}))

    def free(self):
        used = sum(path.stat().st_size for path in self.folder.glob("*")) if self.folder.exists() else 0
        return max(0, self.room - used)


def settle():
    """Wait until nothing is written, so that a test knows which save meets which disk."""
    for thread in threading.enumerate():
        if thread.name == "checkpoint":
            thread.join(60)


def checkpoint_size(folder):
    return saving.bytes_on_disk(folder, latest_step(folder))


@pytest.fixture
def small_disk(origin, monkeypatch):
    """The disk of `origin`, and the size of one of its checkpoints."""
    monkeypatch.setattr(saving, "TRY_EVERY", 0.01)
    train(origin, lambda step, stop: stop, steps=1)
    size = checkpoint_size(origin.folder)
    for path in [*origin.folder.glob("*"), *origin.folder.parent.glob("logs/*")]:
        path.unlink()
    disk = SmallDisk(origin.folder, monkeypatch)
    return disk, size


def test_a_full_disk_makes_room_by_policy_and_never_takes_the_newest(origin, small_disk, capsys):
    disk, size = small_disk
    disk.room = int(3.5 * size)
    train(origin, lambda step, stop: stop, steps=10)  # saves 2 4 6 8 10, and all may stay
    said = capsys.readouterr().out
    assert "warning: the disk of" in said and "5 at a time take" in said  # at the start
    assert "no room for the checkpoint after the next" in said and "no room for the next checkpoint" in said
    assert saved(origin) == [2, 4, 6, 8, 10] and said.count("deleted the checkpoint of step") == 2
    assert sorted(checkpoint.steps_in(origin.folder)) == [6, 8, 10]
    assert load_checkpoint(origin.folder, 10, optimizer=True).optimizer_state is not None


def test_a_run_without_room_for_one_checkpoint_does_not_begin(origin, small_disk):
    disk, size = small_disk
    disk.room = size // 2
    did = []
    with pytest.raises(NotWritten, match="no room for a checkpoint: .* free, a .* of this run takes .*Free at least"):
        train(origin, lambda step, stop: bool(did.append(step)))
    assert not did and not (origin.folder.parent / "logs").exists() or not list(origin.folder.parent.glob("logs/*"))


def test_training_goes_on_where_saves_fail_and_each_is_told(origin, small_disk, capsys):
    disk, size = small_disk

    def one_step(step, stop):
        settle()
        if step == 2:
            run_files = {path.name: path.read_bytes() for path in origin.folder.glob("*")}
            disk.room, one_step.before = 0, run_files  # something else fills the disk
        if step == 7:
            assert {path.name: path.read_bytes() for path in origin.folder.glob("*")} == one_step.before
            disk.room = 10**9
        return stop

    train(origin, one_step, steps=10)
    said = capsys.readouterr().out
    assert saved(origin)[-2:] == [8, 10] and not {4, 6} & set(saved(origin))
    assert said.count("Training goes on.") == 2 and "step 00004 was not saved: the checkpoint of step 4 needs" in said
    rows = read_log(origin.folder.parent / "logs" / "mid_d2.jsonl")
    assert [row["step"] for row in rows if row["kind"] == "not_saved"] == [4, 6]
    assert load_checkpoint(origin.folder, optimizer=True).step == 10


@pytest.mark.parametrize("end", ["end", "signal"])
@pytest.mark.parametrize("comes", [True, False])
def test_the_last_checkpoint_waits_for_room_and_then_says_that_it_is_lost(origin, small_disk, monkeypatch, capsys, end,
                                                                          comes):
    disk, size = small_disk
    monkeypatch.setattr(saving, "PATIENCE", 60 if comes else 0.05)
    tries = []

    def save(*args):
        tries.append(args[1])
        if comes and tries.count(5) == 3:
            disk.room = 10**9
        return save_checkpoint(*args)
    monkeypatch.setattr(saving, "save_checkpoint", save)

    def one_step(step, stop):
        settle()
        if step == 3 and end == "signal":
            os.kill(os.getpid(), signal.SIGTERM)  # the next step sees it
        if step == 4:
            disk.room = 0
        return stop

    steps = 5 if end == "end" else 9
    expected = {("end", True): None, ("signal", True): SystemExit}.get((end, comes), NotWritten)
    if expected is None:
        train(origin, one_step, steps)
    else:
        with pytest.raises(expected, match=None if comes else "step 5 was tried for 0 s and is lost"):
            train(origin, one_step, steps)
    said = capsys.readouterr().out
    assert said.count("trying again every") == 1 and tries.count(5) >= 3 - (not comes)
    assert latest_step(origin.folder) == (5 if comes else 4 if 4 in saved(origin) else 2)
    assert not list(origin.folder.glob("*.new")) and not list(origin.folder.glob(".*"))


def test_a_second_signal_ends_the_waiting_for_room(origin, small_disk, monkeypatch):
    disk, size = small_disk
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(saving, "time", SimpleNamespace(monotonic=time.monotonic,
                                                        sleep=lambda seconds: os.kill(os.getpid(), signal.SIGINT)))

    def one_step(step, stop):
        settle()
        if step == 4:
            disk.room = 0
            os.kill(os.getpid(), signal.SIGTERM)
        return stop

    with pytest.raises(SystemExit) as ended:  # PATIENCE is ten minutes
        train(origin, one_step, steps=9)
    assert ended.value.code == 128 + signal.SIGINT and signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize("number", [errno.EIO, errno.EROFS, errno.EDQUOT, errno.EFBIG])
def test_other_troubles_of_a_disk_do_not_end_training_either(origin, monkeypatch, capsys, number):
    torch_save = torch.save

    def fails(part, file):
        file.write(b"half")
        raise OSError(number, os.strerror(number))
    monkeypatch.setattr(torch, "save", fails)

    def one_step(step, stop):
        settle()
        if step == 5:
            monkeypatch.setattr(torch, "save", torch_save)
        return stop
    train(origin, one_step, steps=6)
    said = capsys.readouterr().out
    assert saved(origin) == [6] and said.count("Training goes on.") == 2
    assert sorted(path.name for path in origin.folder.iterdir()) == [
        "meta_000006.json", "model_000006.pt", "optim_000006.pt"]


def test_divergence_hides_no_full_disk(origin, small_disk, capsys):
    disk, _ = small_disk

    def diverges(step, stop):
        disk.room = 0
        settle()
        if step == 2:
            raise UserError("training has diverged")
        return False
    with pytest.raises(UserError, match="training has diverged"):
        train(origin, diverges)
    assert "besides: the checkpoint of step 2 needs" in capsys.readouterr().out


def test_weights_that_are_not_finite_end_the_run_and_the_checkpoint_before_stays(origin):
    def one_step(step, stop):
        if step == 3:
            origin.model.transformer.wte.weight.data[5, 3] = float("nan")
        return stop

    wrong = "step 4: weights are broken: transformer.wte.weight is not finite. Nothing is saved"
    with pytest.raises(UserError, match=wrong):
        train(origin, one_step, keep=1)
    assert saved(origin) == [2] and load_checkpoint(origin.folder, optimizer=True).step == 2
    with pytest.raises(UserError, match=wrong.replace("4", "[24]")):  # also as the last one
        train(origin, one_step, steps=4, keep=1)
    assert load_checkpoint(origin.folder, optimizer=True).step == 2


def test_the_log_is_told_of_a_checkpoint_once_it_is_on_disk(origin, held):
    with open_run(origin, Config(), ALONE, num_iterations=4, kernels=Choice()) as run:
        assert isinstance(run.log, RunLog)
        run.save(1)
        assert saved(origin) == []
        held.set()
        run.wait_for_save()
        assert saved(origin) == [1] and checkpoint.latest_step(origin.folder) == 1


@pytest.mark.gpu
def test_copies_from_the_gpu_are_pinned_and_what_the_weights_were(tmp_path):
    saver, weights = BackgroundSaver(), {"a": torch.randn(1 << 22, device="cuda")}
    before = weights["a"].cpu()
    torch.cuda.set_sync_debug_mode("error")
    try:
        saver.host_copy("a", torch.empty_like(weights["a"]))  # allocates
        start(saver, tmp_path, 1, weights)
        weights["a"].fill_(9)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert saver.wait() == [1] and saver._buffers["a"].is_pinned()
    assert torch.equal(load_checkpoint(tmp_path).model_state["a"], before)
