"""Every command in the README is run here, made small; speedrun.sh and test.sh themselves are not (they run these)."""

import os
import re
import shlex
import subprocess
import sys

import pytest

from nanochat.cli import parse
from scripts import speedrun, speedrun_plan
from tests.conftest import ROOT
from tests.helpers import module_of
from tests.server_helpers import Running

README = (ROOT / "README.md").read_text(encoding="utf-8")
SMALL = {  # flags put behind those of the README: the last one counts
    "nanochat.dataset": ["--docs=600"],
    "scripts.tok_train": ["--vocab-size=400"],
    "scripts.base_train": ["--depth=2", "--max-seq-len=32", "--device-batch-size=2", "--total-batch-size=128",
                           "--num-iterations=2", "--eval-tokens=1000", "--device-type=cpu", "--model-tag=d4"],
    "scripts.base_loss": ["--split-tokens=1000", "--device-batch-size=4"],
    "scripts.base_eval": ["--split-tokens=1000", "--device-batch-size=4"],
    "scripts.complete": ["--max-tokens=4"],
    "dev.gen_identity": ["--count=20"],
    "scripts.mid_train": ["--max-seq-len=64", "--device-batch-size=2", "--total-batch-size=128", "--num-iterations=2",
                          "--eval-every=-1", "--eval-tokens=500"],
    "scripts.chat_sft": ["--num-iterations=2", "--target-examples-per-step=4", "--eval-steps=1", "--eval-every=-1"],
    "scripts.chat_rl": ["--num-iterations=1", "--examples-per-step=1", "--num-samples=2", "--max-new-tokens=4",
                        "--eval-examples=1"],
    "scripts.chat_eval": ["--max-problems=2", "--max-new-tokens=4"],
    "scripts.chat_cli": ["--max-tokens=4"],
}


def code_lines(text: str) -> list[str]:
    """The indented lines of a README, without comments; a command over several lines is one."""
    return [line.split("  #")[0].strip() for line in
            re.findall(r"^ {4}(\S.*)$", re.sub(r" \\\n +", " ", text), flags=re.M)]


def commands() -> list[str]:
    """The lines of the README that are commands."""
    starts = ("bash ", "python ", ".venv/bin/python ", "torchrun ", "source ", "NANOCHAT_", "SPEEDRUN_", "WANDB_")
    return [line for line in code_lines(README) if line.startswith(starts)]


def python_blocks() -> list[str]:
    blocks = re.findall(r"(?:^ {4}.*\n)+", README, flags=re.M)
    return [re.sub(r"^ {4}", "", block, flags=re.M) for block in blocks
            if "import " in block and "python -m" not in block]


def test_readme_has_its_commands_and_nothing_unknown():
    found = commands()
    assert len(found) >= 15
    for command in found:
        words = [word for word in shlex.split(command) if not re.match(r"[A-Z_]+=", word)]
        others = (["bash", "speedrun.sh"], ["bash", "test.sh"], ["source", ".venv/bin/activate"])
        assert words[:2] in others or "-m" in words, command


@pytest.mark.long
def test_the_commands_of_the_readme_run_one_after_the_other(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    monkeypatch.chdir(tmp_path)  # the report is copied here
    ran = set()
    for command in commands():
        words = shlex.split(command)
        if words[0] not in ("python", ".venv/bin/python"):
            continue
        module, flags = words[words.index("-m") + 1], words[words.index("-m") + 2:]
        if module in ("scripts.speedrun", "scripts.launch"):
            continue  # below
        if module in ("scripts.chat_web", "bench.serve"):  # a server runs until it is told to end: one is started below
            parse(module_of(module).Config, flags)
            continue
        ran.add(module)
        module_of(module).main([*flags, *SMALL.get(module, [])])
    assert ran >= set(SMALL) | {"scripts.tok_eval", "nanochat.report"}
    with Running(tmp_path) as server:
        for block in python_blocks():
            exec(compile(block.replace("http://127.0.0.1:8000", server.url), "README.md", "exec"), {})
    out = capsys.readouterr().out
    assert "tokens" in out and "val bpb" in out and "small world, held-out phrasings" in out

    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    starts = {"torchrun": [sys.executable, "-m", "torch.distributed.run"],
              "python -m scripts.launch": [sys.executable, "-m", "scripts.launch"]}
    for start, argv in starts.items():
        command = next(command for command in commands() if command.startswith(start))
        words = shlex.split(command.removeprefix(start).replace("nproc_per_node=8", "nproc_per_node=2")
                            .replace("--ranks=8", "--ranks=2"))
        words += [*SMALL["scripts.base_train"], f"--model-tag={start.split('.')[-1]}"]
        done = subprocess.run([*argv, *words], cwd=ROOT, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("command", [c for c in commands() if "speedrun.sh" in c and "=" in c])
def test_every_setting_of_speedrun_is_understood(command, monkeypatch, tmp_path, capsys):
    settings = dict(word.split("=", 1) for word in shlex.split(command) if re.match(r"[A-Z_]+=", word))
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    monkeypatch.setattr(speedrun_plan, "hub_reachable", lambda: True)
    monkeypatch.setattr(speedrun, "find_machine", lambda: speedrun_plan.Machine([], 0, 4))
    monkeypatch.setattr(speedrun, "need_disk", lambda *_: None)
    (tmp_path / "notes").mkdir()
    for name in ("notes/a.txt", "books.txt.gz"):
        (tmp_path / name).write_text("")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(speedrun_plan, "look_at_files", lambda *_: None)  # there is no text in them,
    monkeypatch.setattr(speedrun, "check_wandb", lambda *_: None)         # and nobody is logged in
    for name, value in settings.items():
        monkeypatch.setenv(name, str(tmp_path / "elsewhere") if name == "NANOCHAT_BASE_DIR" else value)
    speedrun.main(["--dry-run"])
    assert "profile" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["README.md", "README.ja.md"])
def test_step_by_step_is_what_the_small_profile_runs(name, monkeypatch, capsys):
    for setting in [setting for setting in os.environ if setting.startswith(("SPEEDRUN_", "WANDB_"))]:
        monkeypatch.delenv(setting)
    monkeypatch.setenv("SPEEDRUN_PROFILE", "small")
    monkeypatch.setattr(speedrun, "find_machine", lambda: speedrun_plan.Machine([], 0, 4))
    monkeypatch.setattr(speedrun, "need_disk", lambda *_: None)
    speedrun.main(["--dry-run"])
    start = "source .venv/bin/activate\n"
    printed = capsys.readouterr().out.split(start)[1].splitlines()
    block = (ROOT / name).read_text(encoding="utf-8").split(start)[1].split("\n\n")[0]
    assert len(printed) == 12 and code_lines(block) == printed


def test_the_japanese_readme_has_the_same_commands():
    japanese = ROOT / "README.ja.md"
    lines = code_lines(japanese.read_text(encoding="utf-8"))
    assert not [command for command in commands() if command not in lines]
