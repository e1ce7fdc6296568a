"""nanochat/loading.py: the right folder is chosen; a checkpoint that does not fit model or tokenizer is refused."""

import os
import shutil
import subprocess
import sys

import pytest
import torch

from nanochat import loading
from nanochat.checkpoint import latest_step, load_checkpoint, save_checkpoint
from nanochat.errors import UserError
from nanochat.gpt import GPT, GPTConfig
from nanochat.loading import checkpoint_dir, load_model
from tests.conftest import ROOT


def save(folder):
    """A checkpoint of step 1 that holds no model: enough to choose a folder by."""
    save_checkpoint(folder, 1, {"a.weight": torch.zeros(3)}, {"model_config": {"n_layer": 1}})


def test_the_published_import_of_load_model_works_whichever_module_comes_first():
    for first in ("nanochat.checkpoint", "nanochat.loading"):
        code = f"import {first}; from nanochat.checkpoint import load_model; print(load_model.__module__)"
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
        assert done.stdout == "nanochat.loading\n"


def test_a_stage_without_a_tag_takes_the_only_the_deepest_or_the_last_written(tmp_path):
    root = tmp_path / "base" / "base_checkpoints"
    with pytest.raises(UserError, match="no usable checkpoint in .*base_checkpoints"):
        checkpoint_dir("base")
    save(root / "small")
    (root / "d99").mkdir()  # holds none
    assert checkpoint_dir("base") == root / "small"
    save(root / "large")
    os.utime(root / "small" / "meta_000001.json", (1, 1))
    assert checkpoint_dir("base") == root / "large"
    save(root / "d4")
    save(root / "d12")
    os.utime(root / "d12" / "meta_000001.json", (1, 1))
    assert checkpoint_dir("base") == root / "d12" and checkpoint_dir("base", "new") == root / "new"
    assert loading._choose_folder("base", None)[1] == "the deepest of 4 there"
    assert [checkpoint_dir(stage, "d4").parent.name for stage in ("mid", "sft", "rl")] == [
        "mid_checkpoints", "chatsft_checkpoints", "chatrl_checkpoints"]
    with pytest.raises(UserError, match="not a model tag"):
        checkpoint_dir("base", "../d4")
    with pytest.raises(UserError, match="a source is one of base, mid, sft, rl, or a folder"):
        load_model("bass", "cpu")


@pytest.fixture(params=["hybrid_a", "orig_mod_b", "core_f"])
def published(request, shared):
    return shared / "golden" / request.param


def test_published_checkpoints_load_and_say_why_their_optimizer_does_not(published, tmp_path):
    model, tokenizer, meta = load_model(published, "cpu")
    assert not model.training and {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert model.get_device() == torch.device("cpu")
    assert model.config.vocab_size == tokenizer.get_vocab_size() and meta["folder"] == str(published)
    assert meta["loaded"] == f"step {meta['step']} of {published} (as asked)"
    ids = torch.tensor([tokenizer.encode("Hello there", prepend="<|bos|>")])
    assert model(ids).isfinite().all()
    loaded = load_checkpoint(published, optimizer=True)
    assert loaded.optimizer_state is None and "published" in loaded.no_optimizer
    assert not any(name.startswith("_orig_mod.") for name in loaded.model_state)

    # the same in a stage's folder, with the tokenizer of the base folder; and saved again by us
    folder = tmp_path / "base" / "base_checkpoints" / "d5"
    save_checkpoint(folder, 3, model.state_dict(), {"model_config": model.config, "tokenizer": tokenizer.fingerprint()})
    with pytest.raises(UserError, match="okenizer"):
        load_model("base", "cpu")
    tokenizer.save(tmp_path / "base" / "tokenizer")
    again, _, meta = load_model("base", "cpu")
    assert torch.equal(model(ids), again(ids)) and meta["loaded"] == f"step 3 of {folder} (the only one there)"
    assert load_checkpoint(folder, optimizer=True).no_optimizer == "the checkpoint was saved without"


def test_a_published_model_that_is_damaged_or_missing_is_said(published, tmp_path):
    for path in published.glob("m*"):
        shutil.copyfile(path, tmp_path / path.name)
    model = next(tmp_path.glob("model_*"))
    model.write_bytes(model.read_bytes()[:100000])
    with pytest.raises(UserError, match="looked for"):
        load_checkpoint(tmp_path)
    model.unlink()
    assert latest_step(tmp_path) is None


@pytest.fixture
def small(tmp_path):
    torch.manual_seed(0)
    model = GPT(GPTConfig(sequence_len=8, vocab_size=265, n_layer=2, n_head=2, n_kv_head=2, n_embd=16))
    return tmp_path / "d2", model


def test_a_checkpoint_of_another_shape_names_what_differs(small):
    folder, model = small
    state = model.state_dict()
    state["lm_head.weight"] = state["lm_head.weight"][:100]
    del state["transformer.h.0.mlp.c_fc.weight"]
    state["extra"] = torch.ones(1)
    save_checkpoint(folder, 1, state, {"model_config": model.config})
    with pytest.raises(UserError) as error:
        load_model(folder, "cpu")
    for part in (str(folder), "another shape", "missing: transformer.h.0.mlp.c_fc.weight", "not expected: extra",
                 "lm_head.weight (100, 16), not (265, 16)"):
        assert part in str(error.value)


def test_a_config_that_is_unknown_or_wrong_is_said(small):
    folder, model = small
    config = model.config.to_dict()
    save_checkpoint(folder, 1, model.state_dict(), {"model_config": config | {"rope_scaling": 3, "mixer": "S"}})
    with pytest.raises(UserError, match="model_config has mixer, rope_scaling, which this version does not know"):
        load_model(folder, "cpu")
    save_checkpoint(folder, 2, model.state_dict(), {"model_config": config | {"n_head": 3}})
    with pytest.raises(UserError, match="its model_config makes no model: .*n_head"):
        load_model(folder, "cpu")


class Tokenizer:
    def fingerprint(self):
        return "abc"

    def get_vocab_size(self):
        return 265


def test_layers_whose_taps_never_moved_are_said(small, monkeypatch, capsys):
    """The published code does not initialise the taps: at zero, they and their layer stay as they are for ever."""
    monkeypatch.setattr(loading, "get_tokenizer", Tokenizer)
    folder, model = small
    save_checkpoint(folder, 1, model.state_dict(), {"model_config": model.config})
    load_model(folder, "cpu")
    assert "note" not in capsys.readouterr().out
    with torch.no_grad():
        model.transformer.h[0].attn.conv1d.weight.zero_()
    save_checkpoint(folder, 2, model.state_dict(), {"model_config": model.config})
    load_model(folder, "cpu")
    note, = (line for line in capsys.readouterr().out.splitlines() if line.startswith("note"))
    assert "1 of 2 layers add nothing" in note and "(largest |tap| 0)" in note and note.endswith(": 0")


def test_a_tokenizer_that_is_not_the_models_is_refused(small, monkeypatch):
    monkeypatch.setattr(loading, "get_tokenizer", Tokenizer)
    folder, model = small
    save_checkpoint(folder, 1, model.state_dict(), {"model_config": model.config, "tokenizer": "abc"})
    assert load_model(folder, "cpu")[2]["tokenizer"] == "abc"
    save_checkpoint(folder, 2, model.state_dict(), {"model_config": model.config, "tokenizer": "def"})
    with pytest.raises(UserError, match="not the one that the model in .* was trained with"):
        load_model(folder, "cpu")
    monkeypatch.setattr(Tokenizer, "get_vocab_size", lambda self: 266)
    with pytest.raises(UserError, match="vocabulary of 265, the tokenizer in .* one of 266"):
        load_model(folder, "cpu", step=1)
