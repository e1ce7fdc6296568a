"""speedrun chooses what fits the machine, and says what it cannot do before doing anything.

Covers scripts/speedrun_plan.py too."""

import json
import shlex
from dataclasses import replace

import pytest
import torch

from nanochat.errors import UserError
from nanochat.recipe import PROFILES, small
from scripts import speedrun, speedrun_plan
from scripts.speedrun_plan import Command, Machine, commands, make_plan
from tests.helpers import module_of

H100 = Machine(["NVIDIA H100 80GB HBM3"] * 8, 80 * 10**9, 64)


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    for name in ("SPEEDRUN_PROFILE", "SPEEDRUN_TEXT", "SPEEDRUN_STEPS", "SPEEDRUN_SHARDS", "SPEEDRUN_DEVICE_BATCH",
                 "SPEEDRUN_GPUS", "SPEEDRUN_RL", "NANOCHAT_TASK_DATA", "WANDB_RUN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(speedrun_plan, "hub_reachable", lambda: True)
    monkeypatch.setattr(speedrun_plan, "compute_dtype",
                        lambda device: torch.bfloat16 if device == "cuda" else torch.float32)
    monkeypatch.setattr(speedrun_plan, "peak_flops", lambda device, dtype: 989e12 if device == "cuda" else 100e9)


def test_without_a_gpu_the_small_profile_on_the_small_world():
    plan = make_plan(Machine([], 0, 2))
    assert (plan.profile, plan.source, plan.tag) == ("small", "small-world", "d4")


def test_eight_gpus_get_the_published_recipe():
    plan = make_plan(H100)
    assert (plan.profile, plan.source, plan.device_batch) == ("d20", "fineweb-edu", 32)
    assert plan.steps * 524288 == pytest.approx(10.84e9, rel=0.001)
    assert 200 <= plan.shards <= 240  # the publication fetched 240
    assert 1.5 < plan.seconds / 3600 < 3
    assert make_plan(Machine(H100.gpus[:1], 80 * 10**9, 16)).seconds == pytest.approx(8 * plan.seconds)


def test_a_small_gpu_gets_a_smaller_device_batch():
    """By what PyTorch sees, in GiB, of an H200, an H100, an A100 with 40 GB, an RTX 4090, a T4."""
    sizes = (139.80, 79.10, 39.39, 23.53, 14.56)
    assert [make_plan(Machine(["x"], int(size * 2**30), 8)).device_batch for size in sizes] == [32, 32, 16, 8, 2]


def test_larger_tiers_by_name(monkeypatch):
    steps = []
    for name in ("d20", "d26", "d32"):
        monkeypatch.setenv("SPEEDRUN_PROFILE", name)
        plan = make_plan(H100)
        steps.append(plan.steps)
        assert plan.depth == int(name[1:]) and plan.shards < 1822
    assert steps == sorted(steps)


def test_a_gpu_without_network_is_told_what_else_there_is(monkeypatch):
    monkeypatch.setattr(speedrun_plan, "hub_reachable", lambda: False)
    with pytest.raises(UserError, match="SPEEDRUN_TEXT=.*SPEEDRUN_PROFILE=small"):
        make_plan(H100)
    monkeypatch.setenv("SPEEDRUN_TEXT", "notes 'my books/'")
    assert make_plan(H100).text == ["notes", "my books/"]
    monkeypatch.setenv("SPEEDRUN_PROFILE", "small")
    assert make_plan(H100).source == "import"


@pytest.mark.parametrize("name, value", [("SPEEDRUN_PROFILE", "d21"), ("SPEEDRUN_STEPS", "many"),
                                         ("SPEEDRUN_STEPS", "0")])
def test_wrong_settings_are_named(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=name):
        make_plan(Machine([], 0, 2))


def test_more_gpus_than_there_are_is_refused(monkeypatch):
    monkeypatch.setenv("SPEEDRUN_GPUS", "99")
    with pytest.raises(UserError, match="SPEEDRUN_GPUS is 99"):
        speedrun_plan.find_machine()


def test_text_and_tokenizer_of_another_run_are_never_mixed_in():
    from nanochat.files import base_dir
    (base_dir() / "base_data").mkdir(parents=True)
    (base_dir() / "base_data" / "source.json").write_text(json.dumps({"source": "fineweb-edu"}))
    with pytest.raises(UserError, match="NANOCHAT_BASE_DIR="):
        make_plan(Machine([], 0, 2))


def test_an_unreachable_hub_is_seen(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert not speedrun_plan.hub_reachable()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert not speedrun_plan.hub_reachable()


@pytest.mark.long
def test_all_stages_run_and_a_second_run_skips_them(monkeypatch, capfd, tmp_path):
    few = {"num_iterations": 2, "eval_every": -1}
    base = replace(small.base, shape=replace(small.base.shape, depth=2, max_seq_len=128), total_batch_size=512,
                   horizon=replace(small.base.horizon, num_iterations=3), eval_tokens=1000)
    tiny = replace(
        small, docs=600, tokenizer=replace(small.tokenizer, vocab_size=300), base=base,
        base_eval=replace(small.base_eval, split_tokens=1000), identity=replace(small.identity, count=20),
        mid=replace(small.mid, **few, total_batch_size=512, eval_tokens=1000),
        sft=replace(small.sft, **few, target_examples_per_step=4, eval_steps=1),
        rl=replace(small.rl, **few, examples_per_step=1, num_samples=2, max_new_tokens=4, eval_examples=2,
                   eval_samples=1),
        chat_eval=replace(small.chat_eval, max_problems=2, max_new_tokens=4))
    monkeypatch.setitem(PROFILES, "small", tiny)
    # in this process: each of the stages' own would import torch anew
    monkeypatch.setattr(speedrun, "execute", lambda command: module_of(command.module).main(list(command.flags)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(speedrun, "find_machine", lambda: Machine([], 0, 1))
    monkeypatch.setenv("SPEEDRUN_DEVICE_BATCH", "4")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    speedrun.main([])
    first = capfd.readouterr().out
    for said in ("machine ", "== text", "== tokenizer", "== base model", "== evaluation", "== mid-training",
                 "== grading after fine-tuning", "== reinforcement learning", "== report", "bits per byte",
                 "small world's facts", "World-Sums", "next ", "chat_cli -i rl"):
        assert said in first, first
    speedrun.main([])
    second = capfd.readouterr().out
    assert second.count("done before") == 6 and second.count("Nothing to do") == 4, second


def test_a_stage_that_fails_ends_the_run_and_says_how_to_go_on():
    with pytest.raises(UserError, match="nanochat.dataset ended with exit code 2; "
                                        "mend what it says, then `bash speedrun.sh` resumes"):
        speedrun.execute(Command("text", "nanochat.dataset", ("small-world", "--nonsense")))


def printed(capsys) -> list[str]:
    """The commands that --dry-run prints."""
    speedrun.main(["--dry-run"])
    return capsys.readouterr().out.split("source .venv/bin/activate\n")[1].splitlines()


def test_a_dry_run_prints_the_commands_that_a_run_runs(monkeypatch, capsys):
    monkeypatch.setattr(speedrun, "find_machine", lambda: Machine([], 0, 2))
    ran = []
    monkeypatch.setattr(speedrun, "execute", ran.append)
    monkeypatch.setattr(speedrun, "remember", lambda *_: None)
    monkeypatch.setattr(speedrun, "is_done", lambda *_: False)
    monkeypatch.setenv("WANDB_RUN", "a name")
    lines = printed(capsys)
    speedrun.main([])
    assert lines == [command.shell() for command in ran] and len(lines) == 12
    assert sum("'--run=a name'" in line for line in lines) == 4
    assert [command.argv()[1:] for command in ran] == [shlex.split(line)[1:] for line in lines]


def test_several_gpus_train_under_torchrun_and_text_is_fetched_beside_the_tokenizer(monkeypatch, capsys):
    monkeypatch.setattr(speedrun, "find_machine", lambda: H100)
    monkeypatch.setattr(speedrun, "need_disk", lambda *_: None)
    lines = printed(capsys)
    assert lines[:4] == ["python -m nanochat.dataset -n 8", f"python -m nanochat.dataset -n {make_plan(H100).shards} &",
                         "python -m scripts.tok_train", "wait"]
    assert lines[4] == ("torchrun --standalone --nproc_per_node=8 -m scripts.base_train -- --depth=20 "
                        f"--num-iterations={make_plan(H100).steps}")
    base = next(command for command in commands(make_plan(H100)) if command.module == "scripts.base_train")
    assert base.argv()[1:] == ["-m", "torch.distributed.run", *shlex.split(lines[4])[1:]]


def test_a_run_waits_for_its_text_before_it_trains(monkeypatch):
    monkeypatch.setattr(speedrun, "find_machine", lambda: H100)
    monkeypatch.setattr(speedrun, "need_disk", lambda *_: None)
    events = []

    class Background:
        def __init__(self, argv):
            events.append("fetch")

        def wait(self):
            events.append("wait")
            return 1

        def poll(self):
            return 1

    monkeypatch.setattr(speedrun.subprocess, "Popen", Background)
    monkeypatch.setattr(speedrun, "execute", lambda command: events.append(command.module))
    with pytest.raises(UserError, match="not all text could be fetched"):
        speedrun.main([])
    assert events == ["nanochat.dataset", "fetch", "scripts.tok_train", "wait"]


def test_without_the_published_conversations_the_chat_stages_are_left_out_and_it_says_why(monkeypatch):
    monkeypatch.setenv("SPEEDRUN_TEXT", "notes")
    assert speedrun.describe_chat_stages(make_plan(H100)).startswith("mid-training, fine-tuning, each graded")
    monkeypatch.setattr(speedrun_plan, "hub_reachable", lambda: False)
    assert "NANOCHAT_TASK_DATA names no mirror" in speedrun.describe_chat_stages(make_plan(H100))
    monkeypatch.setenv("NANOCHAT_TASK_DATA", "/mirror")
    monkeypatch.setenv("SPEEDRUN_RL", "1")
    assert "reinforcement learning" in speedrun.describe_chat_stages(make_plan(H100))
    monkeypatch.setenv("SPEEDRUN_PROFILE", "small")
    assert "too many for this profile" in speedrun.describe_chat_stages(make_plan(Machine([], 0, 2)))
    monkeypatch.setenv("SPEEDRUN_RL", "yes")
    with pytest.raises(UserError, match="SPEEDRUN_RL is 'yes'"):
        speedrun_plan.chat_stages(make_plan(Machine([], 0, 2)))
