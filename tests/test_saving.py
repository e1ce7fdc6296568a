"""nanochat/saving.py: a checkpoint is written beside training, is what it was when it was asked for, and errors are
told."""

import os
import threading
from dataclasses import dataclass

import pytest
import torch

from nanochat import checkpoint, files, saving
from nanochat.checkpoint import NotFinite, latest_step, load_checkpoint, save_checkpoint
from nanochat.distributed import Ranks
from nanochat.errors import UserError
from nanochat.kernels.choose import Choice
from nanochat.logs import RunLog, read_log
from nanochat.optim import MuonAdamW, parameter_groups
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
    matrix_lr: float = 0.1
    embedding_lr: float = 0.1
    unembedding_lr: float = 0.1
    weight_decay: float = 0.0
    reduce_dtype: str = "float32"
    recompute: str = "none"


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


def test_a_full_disk_ends_the_run_and_hides_no_other_error(origin, monkeypatch, capsys):
    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 0}))
    did = []
    with pytest.raises(UserError, match="the checkpoint of step 2 needs"):
        train(origin, lambda step, stop: bool(did.append(step)))
    assert did[:2] == [0, 1] and len(did) <= 4  # at the latest the next save says it

    def diverges(step, stop):
        if step == 2:
            raise UserError("training has diverged")
        return False
    capsys.readouterr()
    with pytest.raises(UserError, match="training has diverged"):
        train(origin, diverges)
    assert "besides: the checkpoint of step 2 needs" in capsys.readouterr().out


def test_weights_that_are_not_finite_end_the_run_and_the_checkpoint_before_stays(origin):
    def one_step(step, stop):
        if step == 3:
            origin.model.transformer.wte.weight.data[5, 3] = float("nan")
        return stop

    with pytest.raises(NotFinite, match="step 4 was not saved: transformer.wte.weight .*go on from the last good one"):
        train(origin, one_step, keep=1)
    assert saved(origin) == [2] and load_checkpoint(origin.folder, optimizer=True).step == 2
    with pytest.raises(NotFinite):  # also as the last one
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
