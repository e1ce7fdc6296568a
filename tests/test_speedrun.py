"""speedrun chooses what fits the machine, and says what it cannot do before doing anything.

Covers scripts/speedrun_plan.py too."""

import json
import os
import shlex
import shutil
import signal
import subprocess
from itertools import islice
from pathlib import Path

import pytest
import torch

from nanochat.checkpoint import save_checkpoint
from nanochat.errors import UserError
from nanochat.launcher import Owner
from nanochat.recipe import PROFILES
from nanochat.small_world import documents
from scripts import speedrun, speedrun_plan
from scripts.speedrun_plan import Command, Machine, check_plan, commands, make_plan, text_paths
from tasks import arc, gsm8k, humaneval, mmlu, recipes, smoltalk
from tests.conftest import ROOT
from tests.helpers import gone, module_of, tiny_profile

H100 = Machine(["NVIDIA H100 80GB HBM3"] * 8, 80 * 10**9, 64)


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    for name in list(os.environ):
        if name.startswith(("SPEEDRUN_", "WANDB_", "NANOCHAT_TASK_DATA", "NANOCHAT_CALLED")):
            monkeypatch.delenv(name)
    monkeypatch.setattr(speedrun, "check_wandb", lambda name: None)
    monkeypatch.setenv("WANDB_RUN_GROUP", "")  # speedrun sets it
    monkeypatch.setattr(speedrun_plan, "hub_reachable", lambda: True)
    monkeypatch.setattr(speedrun_plan, "compute_dtype",
                        lambda device: torch.bfloat16 if device == "cuda" else torch.float32)
    monkeypatch.setattr(speedrun_plan, "peak_flops", lambda device, dtype: 989e12 if device == "cuda" else 100e9)


def test_without_a_gpu_the_small_profile_on_the_small_world():
    plan = make_plan(Machine([], 0, 2))
    assert (plan.profile, plan.source, plan.tag) == ("small", "small-world", "d4")


def test_eight_gpus_get_the_published_recipe():
    plan = make_plan(H100)
    assert (plan.profile, plan.source, plan.device_batch, plan.batch.rows) == ("d20", "fineweb-edu", "auto", 32)
    assert not [flag for command in commands(plan) for flag in command.flags if "batch-size" in flag]  # the defaults
    assert plan.steps * 524288 == pytest.approx(10.84e9, rel=0.001)
    assert 200 <= plan.shards <= 240  # the publication fetched 240
    assert 1.5 < plan.seconds / 3600 < 3
    assert make_plan(Machine(H100.gpus[:1], 80 * 10**9, 16)).seconds == pytest.approx(8 * plan.seconds)


def test_a_small_gpu_gets_a_smaller_device_batch():
    plans = [make_plan(Machine(["x"], int(size * 1e9), 8)) for size in (140, 80, 40, 24)]
    assert [plan.batch.rows for plan in plans] == [32, 32, 16, 8]
    assert [flag for flag in commands(plans[-1])[3].flags if "batch" in flag] == []  # the script chooses by itself
    assert "--device-batch-size=8" in next(c for c in commands(plans[-1]) if c.module == "scripts.base_eval").flags


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
    monkeypatch.setenv("SPEEDRUN_TEXT", "notes 'my books/'")  # make_plan does not look whether they are there
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


@pytest.fixture
def tiny_run(monkeypatch, tmp_path):
    """A speedrun is that of a tiny profile, here and on a CPU."""
    monkeypatch.setitem(PROFILES, "small", tiny_profile())
    # in this process: each of the stages' own would import torch anew
    monkeypatch.setattr(speedrun, "execute", lambda _, command: module_of(command.module).main(list(command.flags)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(speedrun, "find_machine", lambda: Machine([], 0, 1))
    monkeypatch.setenv("SPEEDRUN_DEVICE_BATCH", "4")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.mark.long
def test_own_text_ends_in_a_model_to_talk_to(tiny_run, monkeypatch, capfd, tmp_path):
    (tmp_path / "own.txt").write_text("\n\n".join(islice(documents(5), 300)))
    monkeypatch.setenv("SPEEDRUN_TEXT", "own.txt")
    monkeypatch.setenv("SPEEDRUN_RL", "0")
    speedrun.main([])
    out = capfd.readouterr().out
    assert "made      a chat model" in out and "chat_cli -i sft" in out and "sft       Sums" in out
    assert "World" not in out
    report = (tmp_path / "report.md").read_text()
    assert "| Sums |" in report and "mean above chance" in report and "World" not in report
    said = (tmp_path / "base" / "identity_conversations.jsonl").read_text()
    assert "the text that I was given" in said and "people, places" not in said
    meta = json.loads(next((tmp_path / "base" / "chatsft_checkpoints" / "d2").glob("meta_*.json")).read_text())
    assert meta["chat_data"] == "basics" and meta["data"]["source"] == "import"


@pytest.mark.long
def test_all_stages_run_and_a_second_run_skips_them(tiny_run, capfd, tmp_path):
    speedrun.main([])
    first = capfd.readouterr().out
    for said in ("machine ", "== text", "== tokenizer", "== base model", "== evaluation", "== mid-training",
                 "== grading after fine-tuning", "== reinforcement learning", "== report", "bits per byte",
                 "small world's facts", "World-Sums", "next ", "chat_cli -i rl"):
        assert said in first, first
    speedrun.main([])
    second = capfd.readouterr().out
    assert second.count("done before") == 6 and second.count("Nothing to do") == 4, second
    [model] = (tmp_path / "base" / "chatsft_checkpoints").rglob("model_*.pt")
    model.write_bytes(model.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match=f"step 2: {model} is damaged.*nanochat.checkpoint verify.*--fresh"):
        speedrun.main([])
    third = capfd.readouterr().out
    assert third.count("Nothing to do") == 2 and "== reinforcement learning" not in third, third


def test_an_evaluation_is_of_the_newest_model_that_is_whole(tiny_base, monkeypatch):
    plan = make_plan(Machine([], 0, 2))
    command = next(command for command in commands(plan) if command.grades == "sft")
    folder = tiny_base / "chatsft_checkpoints" / plan.tag
    assert not speedrun.is_done(plan, command)
    for step in (1, 2):
        save_checkpoint(folder, step, {"a": torch.zeros(9)}, {"model_config": {}}, {"b": torch.zeros(9)})
        speedrun.remember(plan, command)
    (folder / "optim_000002.pt").unlink()  # evaluations do not read it
    assert speedrun.is_done(plan, command) and speedrun.checkpoint_key(plan, "sft")[1] == 2
    model = folder / "model_000002.pt"
    model.write_bytes(model.read_bytes()[:-1] + b"x")
    assert not speedrun.is_done(plan, command) and speedrun.checkpoint_key(plan, "sft")[1] == 1
    (folder / "model_000001.pt").unlink()
    assert not speedrun.is_done(plan, command) and speedrun.checkpoint_key(plan, "sft") is None


def test_a_stage_that_fails_ends_the_run_and_says_how_to_go_on():
    with pytest.raises(UserError, match=r"nanochat.dataset ended with exit code 2 \(unrecognized .* --nonsense\); "
                                        "mend what it says, then `bash speedrun.sh` resumes"):
        with Owner() as owner:
            speedrun.execute(owner, Command("text", "nanochat.dataset", ("small-world", "--nonsense")))
    with pytest.raises(UserError, match=r"exit code 1 \(--docs is 0; it must be at least 1\); mend"), Owner() as owner:
        speedrun.execute(owner, Command("text", "nanochat.dataset", ("small-world", "--docs=0")))


def printed(capsys) -> list[str]:
    """The commands that --dry-run prints."""
    speedrun.main(["--dry-run"])
    return capsys.readouterr().out.split("source .venv/bin/activate\n")[1].splitlines()


def test_a_dry_run_prints_the_commands_that_a_run_runs(monkeypatch, capsys):
    monkeypatch.setattr(speedrun, "find_machine", lambda: Machine([], 0, 2))
    ran = []
    monkeypatch.setattr(speedrun, "execute", lambda _, command: ran.append(command))
    monkeypatch.setattr(speedrun, "remember", lambda *_: None)
    monkeypatch.setattr(speedrun, "is_done", lambda *_: False)
    monkeypatch.setenv("WANDB_RUN", "a name")
    lines = printed(capsys)
    speedrun.main([])
    assert lines == [command.shell() for command in ran] and len(lines) == 12
    assert sum("'--run=a name'" in line for line in lines) == 4
    assert [command.argv()[1:] for command in ran] == [shlex.split(line)[1:] for line in lines]


def test_several_gpus_train_under_our_launcher_and_text_is_fetched_beside_tokenizer_and_base_model(monkeypatch, capsys):
    monkeypatch.setattr(speedrun, "find_machine", lambda: H100)
    monkeypatch.setattr(speedrun, "need_disk", lambda *_: None)
    lines = printed(capsys)
    shards = make_plan(H100).shards
    assert lines[:3] == ["python -m nanochat.dataset -n 8", f"python -m nanochat.dataset -n {shards} &",
                         "python -m scripts.tok_train"]
    assert lines[3] == ("python -m scripts.launch --ranks=8 scripts.base_train -- --depth=20 "
                        f"--num-iterations={make_plan(H100).steps} --shards={shards}")
    assert lines[4] == "wait" and lines.count("wait") == 1
    base = next(command for command in commands(make_plan(H100)) if command.module == "scripts.base_train")
    assert base.argv()[1:] == shlex.split(lines[3])[1:]


@pytest.mark.parametrize("fails", [None, "scripts.base_train"])
def test_the_base_model_trains_while_its_text_is_fetched_and_a_download_that_fails_is_told(monkeypatch, capsys, fails):
    monkeypatch.setattr(speedrun, "find_machine", lambda: H100)
    monkeypatch.setattr(speedrun, "need_disk", lambda *_: None)
    monkeypatch.setattr(speedrun, "is_done", lambda *_: False)
    monkeypatch.setattr(speedrun, "remember", lambda *_: None)
    events = []

    class Background(Owner):
        def start(self, title, argv):
            events.append("fetch")
            return title

        def wait(self, job):
            events.append("wait")
            return 1

    def execute(_, command):
        events.append(command.module)
        if command.module == fails:
            raise UserError("shard_00012 will not come")

    monkeypatch.setattr(speedrun, "Owner", Background)
    monkeypatch.setattr(speedrun, "execute", execute)
    monkeypatch.setattr(speedrun, "conclude", lambda *_: None)
    began = ["nanochat.dataset", "fetch", "scripts.tok_train", "scripts.base_train"]
    if fails:
        with pytest.raises(UserError, match="shard_00012"):
            speedrun.main([])
        assert events == began
        return
    speedrun.main([])  # the base model was trained: what did not come was not needed
    assert events[:6] == [*began, "wait", "scripts.base_eval"] and events[-1] == "nanochat.report"
    assert "note: not all text could be fetched" in capsys.readouterr().out


def test_without_the_published_conversations_the_chat_stages_are_left_out_and_it_says_why(monkeypatch):
    monkeypatch.setenv("SPEEDRUN_TEXT", "notes")
    assert speedrun.describe_chat_stages(make_plan(H100)).startswith("mid-training, fine-tuning, each graded")
    monkeypatch.setattr(speedrun_plan, "hub_reachable", lambda: False)
    assert "NANOCHAT_TASK_DATA names no mirror" in speedrun.describe_chat_stages(make_plan(H100))
    monkeypatch.setenv("NANOCHAT_TASK_DATA", "/mirror")
    monkeypatch.setenv("SPEEDRUN_RL", "1")
    assert "reinforcement learning" in speedrun.describe_chat_stages(make_plan(H100))
    monkeypatch.setenv("SPEEDRUN_PROFILE", "small")
    monkeypatch.setattr(speedrun_plan, "hub_reachable", lambda: pytest.fail("it needs no hub"))
    plan = make_plan(Machine([], 0, 2))  # its own: without the facts of a world that the text does not tell of
    assert speedrun.describe_chat_stages(plan) == ("mid-training, fine-tuning, reinforcement learning (who it is, sums "
                                                   "and spelling alone), each graded; the report")
    assert [c.module for c in commands(plan) if "--data=basics" in c.flags] == [
        "scripts.mid_train", "scripts.chat_sft", "scripts.chat_rl"]
    monkeypatch.setenv("SPEEDRUN_RL", "yes")
    with pytest.raises(UserError, match="SPEEDRUN_RL is 'yes'"):
        speedrun_plan.chat_stages(make_plan(Machine([], 0, 2)))


def shell_project(folder, setup: str) -> Path:
    """A folder with speedrun.sh, a set-up that is this text, and a Python that prints its arguments and process id."""
    (folder / "dev").mkdir(parents=True)
    shutil.copy(ROOT / "speedrun.sh", folder)
    (folder / "dev" / "setup.sh").write_text(setup)
    python = folder / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\necho "arguments $*"\necho "process $$"\n')
    python.chmod(0o755)
    return folder / "speedrun.sh"


@pytest.mark.parametrize("shell", ["bash", "sh"])
def test_the_shell_script_becomes_the_speedrun_and_hands_on_its_arguments(tmp_path, shell):
    script = shell_project(tmp_path / "project", "echo set up")
    (tmp_path / "link.sh").symlink_to(Path("project") / "speedrun.sh")
    for path in (script, tmp_path / "link.sh"):
        process = subprocess.Popen([shell, str(path), "--dry-run"], cwd=tmp_path, stdout=subprocess.PIPE, text=True)
        out, _ = process.communicate(timeout=60)
        assert out.splitlines()[0] == "set up" and "--dry-run" in out.splitlines()[1]
        assert out.splitlines()[2] == f"process {process.pid}"  # a signal to the script is one to Python
    script = shell_project(tmp_path / "failing", "exit 3")
    done = subprocess.run([shell, str(script)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 3 and not done.stdout


@pytest.mark.parametrize("argument, says", [("SPEEDRUN_PROFILE=d26", "settings stand before the command"),
                                            ("--depth=26", "no argument of speedrun.sh"),
                                            ("-n", "--dry-run and --help"),
                                            ("--dry", "no argument"), ("two words", "two words is no argument")])
def test_an_argument_it_does_not_know_is_refused_before_the_set_up(tmp_path, argument, says):
    script = shell_project(tmp_path / "project", "echo set up")
    done = subprocess.run(["bash", str(script), "--dry-run", argument], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and says in done.stderr and not done.stdout, done


def test_help_needs_no_set_up_and_a_dry_run_says_that_it_does(tmp_path):
    script = shell_project(tmp_path / "project", "echo set up")
    ready = subprocess.run(["bash", str(script), "--help"], capture_output=True, text=True, timeout=60).stdout
    assert "arguments -m scripts.speedrun --help" in ready and "set up" not in ready
    shutil.rmtree(script.parent / ".venv")
    shown = subprocess.run(["bash", str(script), "--help"], capture_output=True, text=True, timeout=60)
    assert shown.returncode == 0 and "SPEEDRUN_PROFILE=d26" in shown.stdout and "BASH_VERSION" not in shown.stdout
    dry = subprocess.run(["bash", str(script), "--dry-run"], capture_output=True, text=True, timeout=60).stdout
    assert dry.startswith("note: to look at this machine, --dry-run needs the set-up") and "set up" in dry


def test_paths_in_settings_are_those_of_the_folder_where_it_was_started(tmp_path, monkeypatch):
    script = shell_project(tmp_path / "project", "")
    python = script.parent / ".venv" / "bin" / "python"
    python.write_text('#!/bin/sh\necho "$NANOCHAT_CALLED_FROM;$NANOCHAT_BASE_DIR;"')
    env = os.environ | {"NANOCHAT_BASE_DIR": "mine"}
    done = subprocess.run(["bash", str(script)], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60)
    assert done.stdout == f"{tmp_path};{tmp_path}/mine;\n"
    (tmp_path / "Ann's notes").mkdir()
    monkeypatch.setenv("NANOCHAT_CALLED_FROM", str(tmp_path))
    assert text_paths("Ann's notes") == [str(tmp_path / "Ann's notes")]


# ---- settings and text

@pytest.mark.parametrize("text, folders", [
    ("Ann's notes", ["Ann's notes"]), ("two words", ["two words"]), ("a\nb c", ["a", "b c"]),
    ("line\nfeed", ["line\nfeed"]),
    ("'b c' a", ["b c", "a"]), ("a absent", ["a", "absent"]), ("b\\ c", ["b c"]), ("a " * 200, ["a"] * 200),
    ('"Ann\'s notes" a', ["Ann's notes", "a"]), (" ", []), ("", [])])
def test_a_path_that_exists_is_taken_as_it_is_and_others_as_a_list(tmp_path, monkeypatch, text, folders):
    monkeypatch.chdir(tmp_path)
    for name in ("Ann's notes", "two words", "a", "b c", "line\nfeed"):
        (tmp_path / name).mkdir()
    assert text_paths(text) == folders


def test_a_list_with_an_open_quote_is_one_clear_line():
    with pytest.raises(UserError, match="SPEEDRUN_TEXT is .*no closing quotation. Give one path as it is"):
        text_paths("Bob's notes and more")


@pytest.mark.parametrize("name, value, says", [
    ("SPEEDRUN_PROFLE", "d26", "did you mean SPEEDRUN_PROFILE"),
    ("SPEEDRUN_DEPTH", "26", "there is .*SPEEDRUN_PROFILE"),
    ("SPEEDRUN_STEP", "3", "did you mean SPEEDRUN_STEPS"), ("SPEEDRUN_PROFILE", "smal", "Did you mean small"),
    ("SPEEDRUN_STEPS", "-5", "must be at least 1"), ("SPEEDRUN_STEPS", "many", "a whole number, at least 1"),
    ("SPEEDRUN_SHARDS", "0", "must be at least 1"), ("SPEEDRUN_GPUS", "-2", "from 0 to"),
    ("SPEEDRUN_DEVICE_BATCH", "1.5", "a whole number"), ("SPEEDRUN_RL", "yes", "must be 1 or 0"),
    ("SPEEDRUN_TEXT_FLAGS", "--encoding=cp1252", "SPEEDRUN_TEXT is not")])
def test_settings_that_cannot_be_meant_are_refused_with_a_hint(monkeypatch, name, value, says):
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=f"{name}.*{says}"):
        make_plan(Machine([], 0, 2))


def dry_run(monkeypatch, capsys, **settings) -> str:
    monkeypatch.setattr(speedrun, "find_machine", lambda: Machine([], 0, 2))
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    speedrun.main(["--dry-run"])
    return capsys.readouterr().out


def test_a_dry_run_reads_the_text_and_hands_on_the_flags_of_its_import(monkeypatch, capsys, tmp_path):
    latin, absent = tmp_path / "Ann's notes.txt", tmp_path / "absent.txt"
    latin.write_bytes("Größe. Some words of Ann.\n".encode("cp1252"))
    with pytest.raises(UserError, match="absent.txt does not exist"):
        dry_run(monkeypatch, capsys, SPEEDRUN_TEXT=str(absent))
    with pytest.raises(UserError, match="My does not exist. It was read as 2 paths.*quotes"):
        dry_run(monkeypatch, capsys, SPEEDRUN_TEXT=f"{tmp_path}/My Notes")
    with pytest.raises(UserError, match="is not utf-8.*--encoding"):
        dry_run(monkeypatch, capsys, SPEEDRUN_TEXT=str(latin))
    out = dry_run(monkeypatch, capsys, SPEEDRUN_TEXT=str(latin), SPEEDRUN_TEXT_FLAGS="--encoding=cp1252")
    assert f"import --encoding=cp1252 {shlex.quote(str(latin))}" in out
    with pytest.raises(SystemExit):
        dry_run(monkeypatch, capsys, SPEEDRUN_TEXT=str(latin), SPEEDRUN_TEXT_FLAGS="--encodin=cp1252")
    assert "did you mean --encoding" in capsys.readouterr().err
    with pytest.raises(UserError, match="--val-fraction is 1"):
        dry_run(monkeypatch, capsys, SPEEDRUN_TEXT=str(latin), SPEEDRUN_TEXT_FLAGS="--val-fraction=1")


def test_a_batch_that_does_not_divide_and_a_mirror_that_lacks_a_data_set_are_seen_before_anything_is_done(monkeypatch):
    monkeypatch.setenv("SPEEDRUN_DEVICE_BATCH", "3")
    with pytest.raises(UserError, match="multiple of a micro-batch"):
        check_plan(make_plan(H100))
    monkeypatch.delenv("SPEEDRUN_DEVICE_BATCH")
    monkeypatch.setenv("NANOCHAT_TASK_DATA", "/mirror")
    with pytest.raises(UserError, match="the mirror has no allenai/ai2_arc, ARC-Easy, test"):
        check_plan(make_plan(H100))


def test_the_data_sets_that_are_looked_for_are_those_that_the_stages_ask_for(monkeypatch):
    asked = set()

    def note(name, subset, split, columns):
        asked.add((name, subset, split))
        raise UserError("enough")

    for module in (arc, gsm8k, humaneval, mmlu, smoltalk):
        monkeypatch.setattr(module, "load_rows", note)
    monkeypatch.setattr(recipes, "Mixture", lambda parts: None)
    for name in ("ARC", "GSM8K", "HumanEval", "MMLU", "SmolTalk"):
        whole = getattr(recipes, name)
        monkeypatch.setattr(recipes, name, lambda *given, whole=whole: Anything(whole, given))
    for name in ("SimpleSpelling", "SpellingBee"):
        monkeypatch.setattr(recipes, name, lambda *given, **more: None)
    recipes.mid("hub"), recipes.sft("hub"), recipes.rl("hub", "train"), recipes.rl("hub", "test")
    for make in recipes.graded("hub").values():
        make()
    assert asked == set(recipes.hub_splits(["mid", "sft", "rl"])) and recipes.hub_splits([]) == []


class Anything:
    """A task whose rows are asked for and never come."""

    def __init__(self, task, given):
        with pytest.raises(UserError, match="enough"):
            task(*given)

    def __getitem__(self, part):
        return self


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_the_set_up_whole(tmp_path, number):
    script = shell_project(tmp_path / "project", "echo $$\nsh -c 'echo $$; sleep 600'\necho more\n")
    process = subprocess.Popen(["bash", str(script)], stdout=subprocess.PIPE, text=True, start_new_session=True)
    pids = [int(process.stdout.readline()) for _ in range(2)]
    process.send_signal(number)
    assert process.communicate(timeout=60)[0] == "" and process.returncode == 128 + number
    assert gone(pids)
