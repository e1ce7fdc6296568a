"""What a run does and when: schedules, saving on request, refusing to resume. tests/test_stages.py runs stages."""

import importlib.util
import os
import signal
from types import SimpleNamespace

import pytest
import torch

from nanochat.cli import parse
from nanochat.distributed import Ranks
from nanochat.errors import UserError
from nanochat.gpt import GPT
from nanochat.logs import RunLog
from nanochat.recipe import modern, published
from nanochat.run import (
    Origin,
    PeriodicAction,
    compile_wanted,
    flags_of,
    horizon_of,
    is_due,
    is_trained,
    loader_state,
    scaling_parameters,
    tokens_of_row,
)
from nanochat.run.flags import inherited, recipe_of
from nanochat.stages import CHAT_STAGES, STAGES, stage_of_folder
from nanochat.training import run_steps
from scripts import chat_sft
from tests.helpers import small_model

ALONE = Ranks(0, 0, 1, torch.device("cpu"))


def steps_of(action, start=0, end=10):
    return [step for step in range(start, end + 1) if is_due(action, step, start, end)]


def test_an_event_is_due_at_its_multiples_and_at_the_end():
    def action(every, **when):
        return PeriodicAction(every, print, **when)

    assert steps_of(action(4)) == [4, 8, 10]
    assert steps_of(action(4), start=4) == [8, 10]  # done before the run stopped at step 4
    assert steps_of(action(4, at_end=False)) == [4, 8]
    assert steps_of(action(5, at_end=False)) == [5]
    assert steps_of(action(-1)) == steps_of(action(0)) == [10]
    assert steps_of(action(4, at_zero=True)) == [0, 4, 8, 10]
    assert steps_of(action(4, at_zero=True), start=4) == [8, 10]
    assert steps_of(action(-1, at_zero=True)) == [10]
    assert steps_of(action(-1, at_start=True)) == [0, 10]
    assert steps_of(action(4, at_start=True), start=3) == [3, 4, 8, 10]
    assert is_due(action(4), 4, 4, 10, stopped=True)  # it was asked to stop before that was done
    assert not is_due(action(4), 5, 5, 10, stopped=True) and not is_due(action(-1), 4, 4, 10, stopped=True)


def test_a_signal_ends_the_steps_with_a_save_of_those_that_are_done(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    did, saved = [], []

    def one_step(step, stop):
        if step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        did.append(step)
        return stop

    with pytest.raises(SystemExit) as ended, RunLog("rl", "t", {}) as log:
        run_steps(one_step, 2, 9, log, before_step=lambda step: did.append(f"before {step}"), save=saved.append,
                  flush=lambda: did.append("flush"))
    assert ended.value.code == 128 + signal.SIGTERM
    assert did == ["before 2", 2, "before 3", 3, "before 4", 4, "before 5", 5, "flush"] and saved == [6]


def test_steps_that_are_not_stopped_end_after_the_last_event(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    did = []
    with RunLog("rl", "t", {}) as log:
        run_steps(lambda step, stop: did.append(step), 0, 2, log, before_step=lambda step: did.append(f"before {step}"),
                  save=lambda step: pytest.fail("nobody asked for a save"), flush=lambda: did.append("flush"))
    assert did == ["before 0", 0, "before 1", 1, "flush", "before 2"]


def origin(tmp_path, step=3, meta=None):
    return Origin(stage=STAGES["mid"], folder=tmp_path / "d2", step=step, model=small_model(), tokenizer=None,
                  meta=meta or {}, loaded="", provenance={})


def test_a_checkpoint_without_a_position_in_the_data_is_refused(tmp_path):
    with pytest.raises(UserError, match="d2 cannot be trained on: it does not say how far.*--fresh"):
        loader_state(origin(tmp_path))
    assert loader_state(origin(tmp_path, step=0, meta={"loader": {"of": "the stage before"}})) is None
    assert loader_state(origin(tmp_path, meta={"loader": {"next": 5}})) == {"next": 5}
    with pytest.raises(UserError, match="no states of a loader"):
        loader_state(origin(tmp_path, meta={"loader": [{"next": 5}]}))


def test_a_run_that_is_done_says_so(tmp_path, capsys):
    assert not is_trained(origin(tmp_path), 4, ALONE) and not capsys.readouterr().out
    assert is_trained(origin(tmp_path), 3, ALONE)
    assert "step 3 of 3. Nothing to do; --fresh trains it anew." in capsys.readouterr().out


def test_rows_are_as_long_as_the_flag_says_or_else_the_model(tmp_path):
    model = small_model()
    assert tokens_of_row(Config(-1), model) == tokens_of_row(object(), model) == model.config.sequence_len
    assert tokens_of_row(Config(7), model) == 7


class Config:
    def __init__(self, max_seq_len):
        self.max_seq_len = max_seq_len


def test_compiling_is_chosen_by_a_word():
    assert [compile_wanted(word, ALONE) for word in ("auto", "yes", "no")] == [False, True, False]
    with pytest.raises(UserError, match="--compile is yes, no or auto, not 'on'"):
        compile_wanted("on", ALONE)


def test_the_table_of_stages_fits_together():
    assert list(STAGES) == [stage.name for stage in STAGES.values()]
    for field in ("folder", "script", "column", "graded_by", "page", "noun"):
        assert len({getattr(stage, field) for stage in STAGES.values()}) == len(STAGES)
    for place, stage in enumerate(STAGES.values()):
        assert importlib.util.find_spec(stage.script)
        assert list(stage.sections)[0] == stage.name and stage.graded_by in stage.sections
        assert set(stage.starts_from) <= set(list(STAGES)[:place])
        assert stage_of_folder(("base", stage.folder, "d2")) is stage
    assert [stage.name for stage in CHAT_STAGES] == ["mid", "sft", "rl"]
    assert stage_of_folder(("elsewhere", "d2")) is None


def test_blocks_are_compiled_where_the_gpu_can(monkeypatch, capsys):
    gpu = Ranks(0, 0, 1, torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Old GPU")
    for able in (True, False):
        monkeypatch.setattr("nanochat.run.flags.has_triton", lambda device, least, able=able: able)
        assert compile_wanted("auto", gpu) == able and not compile_wanted("no", gpu)
    assert "needs Triton and a GPU of compute capability 7.0 or later; this is Old GPU" in capsys.readouterr().out
    with pytest.raises(UserError, match="Use --compile=auto or --compile=no"):
        compile_wanted("yes", gpu)
    assert not compile_wanted("auto", Ranks(0, 0, 1, torch.device("cpu")))


def flags_with(recipe, **given):
    return SimpleNamespace(**{**vars(flags_of(recipe.base)), **given})


def test_the_published_flags_come_to_the_published_run():
    run = horizon_of(flags_of(published.base), 65_536)
    assert (run.parameters, run.total_batch_size, run.lr_factor, run.decay_factor) == (542_035_200, 2 ** 19, 1, 1)
    assert run.num_iterations == int(20 * run.parameters) // 2 ** 19 and run.shape.to_dict().keys() == {
        "sequence_len", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd", "n_kernel", "slc_rate"}


@pytest.mark.parametrize("depth, batch", [(12, 2 ** 19), (18, 2 ** 20), (24, 2 ** 20)])
def test_modern_batch_rates_and_decay_follow_from_the_horizon(depth, batch):
    run, reference = (horizon_of(flags_with(modern, depth=d), 32_768) for d in (depth, 12))
    with torch.device("meta"):
        model = GPT(run.shape)
    matrices = scaling_parameters(model)
    E, attends = run.shape.n_embd, run.shape.pattern().count("A")  # over 1,024 keys, and 4 taps over q, k and v
    assert matrices == (run.flops_per_token - attends * (12 * E * 1024 + 6 * 4 * 3 * E)) / 6
    assert run.total_batch_size == batch and run.num_iterations == 8 * matrices // batch
    assert run.lr_factor == (batch / 2 ** 19) ** 0.5
    assert run.decay_factor == pytest.approx(run.lr_factor * reference.tokens / run.tokens, rel=1e-3)
    fixed = horizon_of(flags_with(modern, depth=depth, reference_batch=0, reference_depth=0,
                                  total_batch_size=2 ** 18), 32_768)
    assert (fixed.lr_factor, fixed.decay_factor) == (1, 1) and fixed.num_iterations == 8 * matrices // 2 ** 18


@pytest.mark.parametrize("flags, said", [
    ({"target_param_data_ratio": -1.0, "num_iterations": 9}, "--total-batch-size=auto follows"),
    ({"reference_depth": 0}, "--total-batch-size=auto follows"),
    ({"target_param_data_ratio": 1e-9, "total_batch_size": 2048}, "less than one step"),
    ({"target_param_data_ratio": -1.0, "total_batch_size": 2048}, "no horizon"),
    ({"value_embeds": "X"}, "these flags make no model"),
])
def test_flags_that_come_to_no_run(flags, said):
    with pytest.raises(UserError, match=said):
        horizon_of(flags_with(modern, depth=2, **flags), 300)


def test_a_stage_takes_over_the_batch_and_the_rates_of_its_model():
    before = {"recipe": "modern", "optimizer": "", "total_batch_size": 2 ** 20, "reference_batch": 2 ** 19,
              "matrix_lr": 0.03, "weight_decay": None, "matrix_decay": 0.28, "depth": 24}
    rates = {"matrix_lr": 0.03, "weight_decay": None}
    batch = {"total_batch_size": 2 ** 20, "reference_batch": 2 ** 19}
    config = parse(chat_sft.Config, ["--recipe=modern"])
    assert recipe_of(before) == "modern" and inherited(config, before) == batch | rates
    assert inherited(parse(chat_sft.Config, ["--recipe=modern", "--optimizer=published"]), before) == batch
    assert inherited(config, {**before, "optimizer": "published"}) == batch  # rates are of an optimizer
    assert inherited(config, {**before, "total_batch_size": -1}) == rates    # other programs know such a number
    assert inherited(config, {}) == {} and recipe_of({}) == "published"
    assert recipe_of({"recipe": "of the next year"}) == "published"
