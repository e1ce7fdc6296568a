"""What the commands do where the newest checkpoint of a stage is damaged, or none can be used."""

import os
import shutil

import pytest
import torch

from nanochat import rl
from nanochat.checkpoint import latest_step, load_checkpoint
from nanochat.errors import UserError
from nanochat.loading import checkpoint_dir, load_model
from nanochat.server.messages import WorkerConfig
from nanochat.server.models import find_models
from scripts import base_train
from tests.test_checkpoint_damage import NONE_USABLE, flip
from tests.test_stages import STAGES, base, odd_length, trained  # noqa: F401 (fixtures)
from tests.test_training import TINY, assert_same

BASE = [*TINY, "--num-iterations=2", "--max-seq-len=128", "--total-batch-size=256", "--save-every=1"]
COMMANDS = {"base": (base_train, BASE, "base_checkpoints", 2), **STAGES}


@pytest.fixture(scope="module")
def all_trained(trained, make_once):  # noqa: F811
    """Return a base folder as `trained`, where the base model has a checkpoint half way, too."""
    def make(folder):
        for name in ("base_data", "tokenizer"):
            (folder / name).symlink_to(trained / name)
        base_train.main(BASE)
    return make_once("all_trained", make)


@pytest.fixture(params=COMMANDS)
def stage(request, base, all_trained, monkeypatch):  # noqa: F811
    """Return the command, flags, folder and last step of a stage that is trained, with a checkpoint half way."""
    monkeypatch.setattr(rl, "reward_of", odd_length)
    script, flags, folder, steps = COMMANDS[request.param]
    if request.param == "base":
        shutil.rmtree(base / folder)
        shutil.copytree(all_trained / folder, base / folder)
    return script, flags, base / folder / "d2", steps


def files_below(folder):
    """The content of all files, but for the locks, which say who held them last."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and not path.name.endswith(".lock")}


def longer(flags, steps):
    return [*flags, f"--num-iterations={steps + 1}"]


@pytest.mark.parametrize("stage, name", [("base", "model"), ("base", "optim"), ("base", "meta"), ("mid", "optim"),
                                         ("sft", "model"), ("rl", "optim")], indirect=["stage"])
def test_a_stage_resumes_from_the_newest_checkpoint_that_is_whole(stage, name, caplog, capsys):
    script, flags, folder, steps = stage
    whole = load_checkpoint(folder, steps).model_state
    damaged = next(folder.glob(f"{name}_{steps:06d}.*"))
    flip(damaged)
    data = damaged.read_bytes()
    script.main(flags)
    assert f"resuming from step {steps // 2}" in capsys.readouterr().out
    assert [text for text in caplog.messages if text.startswith(f"skipping the checkpoint of step {steps}: {damaged}")]
    assert latest_step(folder) == steps
    assert_same(load_checkpoint(folder, steps).model_state, whole)
    assert (folder / f"{damaged.name}.kept").read_bytes() == data


def test_a_stage_of_which_no_checkpoint_is_usable_stops_and_writes_nothing(stage):
    script, flags, folder, steps = stage
    top, copy = folder.parent.parent, folder.with_name("copy")
    folder.rename(copy)
    for damage in NONE_USABLE.values():
        shutil.copytree(copy, folder)
        for path in list(folder.iterdir()):
            damage(path)
        before = files_below(top)
        for argv in (flags, longer(flags, steps)):
            with pytest.raises(UserError, match="none that a run can go on from: .*checkpoint verify .*--fresh"):
                script.main(argv)
        assert files_below(top) == before
        shutil.rmtree(folder)


def test_a_stage_without_optimizer_states_is_done_or_stops_with_two_ways_out(stage, capsys):
    script, flags, folder, steps = stage
    for path in folder.glob("optim_*"):
        path.unlink()
    before = files_below(folder.parent.parent)
    script.main(flags)
    assert "Nothing to do" in capsys.readouterr().out
    with pytest.raises(UserError, match=rf"trained on: .*optim_0*{steps}.pt is missing. --fresh .*--model-tag"):
        script.main(longer(flags, steps))
    assert files_below(folder.parent.parent) == before


def test_fresh_moves_nothing_where_there_is_nothing_to_start_from(base):  # noqa: F811
    script, flags, folder, _ = STAGES["mid"]
    flip(next((base / "base_checkpoints" / "d2").glob("model_*")))
    before = files_below(base)
    with pytest.raises(UserError, match="no usable checkpoint in .*model_000002.pt is damaged"):
        script.main([*flags, "--fresh"])
    assert files_below(base) == before


def test_a_stage_begins_with_the_newest_whole_model_and_goes_on_where_that_is_lost(base, caplog):  # noqa: F811
    script, flags, folder, steps = STAGES["sft"]
    parent = base / "mid_checkpoints" / "d2"
    flip(parent / "model_000006.pt")
    shutil.rmtree(base / folder / "d2")
    script.main(flags)
    assert load_checkpoint(base / folder / "d2").meta["from"]["step"] == 3 and "skipping the checkpoint" in caplog.text
    script.main(longer(flags, steps))
    flip(parent / "model_000003.pt")  # what it began from
    script.main(longer(flags, steps + 1))
    assert load_checkpoint(base / folder / "d2").meta["from"]["step"] == 3
    shutil.copytree(parent, base / "mid_checkpoints" / "copy")
    flip(parent / "model_000006.pt")  # whole again: another model than it began from
    with pytest.raises(UserError, match="trained from another model.*step 3 then, 6 now"):
        script.main(longer(flags, steps + 2))


def test_a_model_of_which_the_metas_are_lost_is_not_exchanged_for_another(base):  # noqa: F811
    root = base / "base_checkpoints"
    shutil.copytree(root / "d2", root / "d1")
    (root / "d2" / "meta_000002.json").unlink()
    assert checkpoint_dir("base") == root / "d2"
    with pytest.raises(UserError, match="no meta file says of which checkpoint"):
        load_model("base", "cpu")


def test_the_server_offers_the_newest_models_that_are_whole(base):  # noqa: F811
    for name in ("mid", "chatsft"):
        flip(base / f"{name}_checkpoints" / "d2" / "model_000006.pt")
        for path in (base / f"{name}_checkpoints" / "d2").iterdir():
            os.utime(path, (1, 1))
    (base / "chatrl_checkpoints" / "d2" / "optim_000004.pt").unlink()  # it is not needed
    steps = {model.id: model.step for model in find_models(WorkerConfig(source="sft"))}
    assert steps == {"sft": 3, "base": 2, "mid": 6, "rl": 4}  # the default model is read, others when asked for
    with pytest.raises(UserError, match="is damaged"):
        load_model("mid", torch.device("cpu"), step=6)
