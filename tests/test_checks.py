"""Every number that a command takes has a range, and what cannot be meant is refused before anything is done.

Covers nanochat/checks.py and the flags of all commands."""

import dataclasses
import importlib
import math
import os
import re
import shutil
import subprocess
import sys
import typing
from pathlib import Path

import pytest

from nanochat import cli
from nanochat.checks import check_batch, need_writable
from nanochat.cli import ELSEWHERE, SETTINGS, Range, check_settings, near_name, parse, parser_of
from nanochat.errors import UserError
from scripts import base_train, chat_rl, chat_sft, mid_train
from scripts.speedrun_plan import Settings
from tests.conftest import ROOT


def modules_with_flags():
    """Return the modules of the repository that make flags, found by reading them."""
    found = [
        path
        for folder in ("nanochat", "scripts", "bench", "dev")
        for path in sorted((ROOT / folder).rglob("*.py"))
        if re.search(r"^    \w+: .* = flag\(", path.read_text(encoding="utf-8"), re.MULTILINE)
    ]
    return [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in found]


def flag_classes(module):
    """Return the dataclasses of flags that a module defines."""
    return [
        value
        for value in vars(importlib.import_module(module)).values()
        if isinstance(value, type)
        and dataclasses.is_dataclass(value)
        and value.__module__ == module
        and any("help" in field.metadata for field in dataclasses.fields(value))
    ]


CLASSES = [found for module in modules_with_flags() for found in flag_classes(module)]


def numbers_of(config_class):
    """Yield (field, whether it takes whole numbers) of the flags that take numbers."""
    hints = typing.get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        kinds = {hints[field.name], *typing.get_args(hints[field.name])} & {int, float}
        if kinds and "help" in field.metadata:
            yield field, float not in kinds


def test_all_commands_are_found():
    names = {f"{found.__module__}.{found.__name__}" for found in CLASSES}
    assert {
        "scripts.base_train.Config",
        "scripts.chat_rl.Config",
        "scripts.speedrun_plan.Settings",
        "nanochat.dataset.__main__.ImportFlags",
        "scripts.chat_web.Config",
        "bench.train.Config",
    } <= names
    assert len(CLASSES) > 30


@pytest.mark.parametrize("config_class", CLASSES, ids=lambda found: f"{found.__module__}.{found.__name__}")
def test_every_number_has_a_range_that_holds_its_default_and_nothing_that_cannot_be_meant(config_class):
    parser = parser_of(config_class)
    needed = [
        f"--{field.name}=1"
        for field in dataclasses.fields(config_class)
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    typed = config_class is not Settings  # which comes from the environment, where 0 and -1 stand for unset
    for field, whole in numbers_of(config_class):
        within = field.metadata["within"]
        assert isinstance(within, Range), f"{field.name} has no range"
        assert within.low is not None or within.above is not None, f"{field.name} has no lower limit"
        assert not whole or within.high is not None, f"{field.name} has no upper limit: tensors have 64-bit indices"
        if typed and isinstance(field.default, int | float):
            assert field.default in within, f"{field.name} has a default out of its range"
        bottom = within.low if within.low is not None else within.above
        wrong = [bottom - 1 if bottom - 1 != within.also else bottom - 2, -math.inf, math.inf, math.nan]
        wrong += [within.high * 2] if within.high is not None else []
        wrong += [within.above] if within.above is not None else []
        wrong += [within.below] if within.below is not None else []
        for number in wrong:
            assert number not in within
            if not typed:
                continue
            text = f"{number:d}" if isinstance(number, int) else repr(number)
            with pytest.raises((UserError, SystemExit)) as refused:
                parser.parse_args([*needed, f"--{field.name}={text}"])
            if isinstance(refused.value, UserError):
                assert str(refused.value).startswith(f"--{field.name.replace('_', '-')} is "), refused.value
        given = (
            []
            if not typed
            else [f"--{field.name}={number}" for number in (within.low, within.high, within.also) if number is not None]
        )
        for one in given:
            parser.parse_args([*needed, one if not whole else one.replace(".0", "")])
    assert all(
        str(field.metadata["within"]) in " ".join(parser.format_help().split()) for field, _ in numbers_of(config_class)
    )


@pytest.mark.parametrize(
    "within, inside, outside, text",
    [
        (Range(1, 8), (1, 8, 2.5), (0.99, 9), "from 1 to 8"),
        (Range(0), (0, 1e300), (-1e-9,), "at least 0"),
        (Range(above=0, below=1), (0.5,), (0, 1), "above 0 and below 1"),
        (Range(1, also=-1), (1, -1), (0, -2), "at least 1, or -1"),
        (Range(0, (1 << 63) - 1), (0, (1 << 63) - 1), (1 << 63,), "at least 0"),
        (Range(above=0, high=1), (1,), (0, 1.1), "above 0 and at most 1"),
        (Range(1, 1 << 20), (1 << 20,), ((1 << 20) + 1,), "at least 1"),
        (Range(), (-5,), (), "a finite number"),
    ],
)
def test_a_range_holds_what_it_says(within, inside, outside, text):
    assert all(number in within for number in inside) and str(within) == text
    assert not any(number in within for number in (*outside, math.nan, math.inf, -math.inf))


# ---- hints


@pytest.mark.parametrize(
    "script, argument, hint",
    [
        (base_train, "--window-pattern=SSSL", "use --layer-pattern"),
        (base_train, "--resume-from-step=2", "the same command resumes"),
        (base_train, "--warmup-iters=40", "use --warmup-steps"),
        (base_train, "--dept=4", "did you mean --depth?"),
        (base_train, "--device-batchsize=4", "did you mean --device-batch-size?"),
        (base_train, "--Depth=4", "did you mean --depth?"),
        (base_train, "depth=4", "did you mean --depth=4?"),
        (base_train, "config/train.py", "files of settings are not read"),
        (base_train, "-depth=4", "did you mean --depth?"),
        (base_train, "--lr=1", "use --matrix-lr"),
        (base_train, "--batch_size=8", "use --device-batch-size"),
        (base_train, "--out_dir=x", "NANOCHAT_BASE_DIR"),
        (chat_rl, "--total-batch-size=9", "--examples-per-step"),
        (chat_sft, "--chatcore-every=9", "use --eval-metrics-every"),
        (chat_sft, "--load-optimizer=1", "use --warm-start"),
        (mid_train, "--dtype=bfloat16", "NANOCHAT_DTYPE"),
        (chat_rl, "--warmup-ratio=0.1", "there is no warm-up"),
        (mid_train, "hello", "needs quotes"),
        (mid_train, "--nothing-like-it", "lists the flags"),
    ],
)
def test_a_flag_that_is_none_gets_a_hint_in_one_line(script, argument, hint, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(script.Config, [argument])
    shown = capsys.readouterr().err
    assert stop.value.code == 2 and shown.startswith("error: ") and shown.count("\n") == 1
    assert argument in shown and hint in shown, shown


@pytest.mark.parametrize(
    "argument, hint", [("--total-batch-size=-1", "instead of -1"), ("--num-iterations=0", "-1 instead of 0")]
)
def test_a_value_of_another_nanochat_gets_a_hint(argument, hint):
    with pytest.raises(UserError, match=hint):
        parse(base_train.Config, [argument])


def test_hints_name_flags_that_exist_somewhere():
    known = {field.name for found in CLASSES for field in dataclasses.fields(found)}
    for name, hint in ELSEWHERE.items():
        for flag in re.findall(r"--([a-z0-9-]+)", hint):
            assert flag.replace("-", "_") in known, (name, hint)


# ---- settings


def test_a_slip_in_a_setting_is_refused_and_other_names_are_not():
    for wrong, right in (
        ("NANOCHAT_BASEDIR", "NANOCHAT_BASE_DIR"),
        ("NANOCHAT_BASE_DIRR", "NANOCHAT_BASE_DIR"),
        ("NANOCHATBASE_DIR", "NANOCHAT_BASE_DIR"),
        ("NANOCHAT_KERNEL", "NANOCHAT_KERNELS"),
    ):
        with pytest.raises(UserError, match=f"{wrong} is no setting; did you mean {right}"):
            check_settings({wrong: "x"})
    check_settings({"NANOCHAT_BASE_DIR": "x", "NANOCHAT_SOMETHING_OF_MINE": "x", "PATH": "x"})


def test_every_setting_that_the_code_reads_is_known():
    read = set()
    for path in (
        *ROOT.glob("*.sh"),
        *(
            path
            for folder in ("nanochat", "scripts", "tasks", "bench", "dev")
            for ending in ("*.py", "*.sh")
            for path in (ROOT / folder).rglob(ending)
        ),
    ):
        read |= set(re.findall(r"\bNANOCHAT_[A-Z0-9_]*[A-Z0-9]\b", path.read_text(encoding="utf-8")))
    assert len(read) > 15 and not read - SETTINGS


# ---- flags that must fit one another


@pytest.mark.parametrize(
    "script, flags, says",
    [
        (base_train, ["--warmup-ratio=0.9"], "their sum must be at most 1"),
        (base_train, ["--total-batch-size=100"], "multiple of a micro-batch, 1 × 2,048 tokens"),
        (
            base_train,
            ["--max-seq-len=64", "--device-batch-size=3", "--total-batch-size=256"],
            "try|Try --total-batch-size=192",
        ),
        (base_train, ["--eval-tokens=100"], "at least 2,048, one micro-batch"),
        (base_train, ["--model-tag=a/b"], "--model-tag is 'a/b'"),
        (base_train, ["--model-tag=.."], "one name"),
        (base_train, ["--layer-pattern=SXS", "--depth=3"], "letters, S for SLC2"),
        (base_train, ["--num-iterations=-1", "--target-param-data-ratio=-1"], "no horizon"),
        (mid_train, ["--conversations=/nowhere/a.jsonl"], "there is no file /nowhere/a.jsonl"),
        (chat_sft, ["--model-tag=/x"], "one name"),
        (chat_rl, ["--conversations=,/nowhere/b.jsonl"], "b.jsonl"),
    ],
)
def test_flags_that_do_not_fit_one_another_are_refused_when_they_are_read(script, flags, says):
    with pytest.raises(UserError, match=says):
        parse(script.Config, flags)


def test_a_batch_whose_row_follows_from_the_model_is_left_to_the_stage():
    check_batch(parse(mid_train.Config, ["--total-batch-size=1000", "--eval-tokens=5"]))


def test_a_folder_that_cannot_be_written_is_seen(tmp_path, monkeypatch):
    need_writable(tmp_path / "new" / "folder")
    assert not (tmp_path / "new").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        need_writable(tmp_path / "file" / "d2")
    monkeypatch.setattr("os.access", lambda path, how: False)
    with pytest.raises(UserError, match="NANOCHAT_BASE_DIR"):
        need_writable(Path(tmp_path / "other"))


def test_near_names_are_near():
    assert near_name("dept", ["depth", "window"]) == "depth" and near_name("x", ["depth"]) is None
    assert (
        near_name("A_STEPZ", ["A_STEPS", "A_GPUS"], "A_") == "A_STEPS"
        and cli.near_name("A_RATE", ["A_GPUS"], "A_") is None
    )


# ---- other ways to start a command


def test_a_script_runs_as_a_file_too(tmp_path):
    script = [sys.executable, str(ROOT / "scripts" / "tok_train.py"), "--max-chars=0"]
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(script, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (1, "error: --max-chars is 0; it must be at least 1.\n")


@pytest.mark.parametrize("argument, code", [("--help", 0), ("--quick", 2), ("NANOCHAT_TORCH=cpu", 2)])
def test_the_set_up_looks_at_its_arguments_before_it_does_anything(tmp_path, argument, code):
    (tmp_path / "dev").mkdir()
    shutil.copy(ROOT / "dev" / "setup.sh", tmp_path / "dev")
    script = ["sh", str(tmp_path / "dev" / "setup.sh"), argument]
    done = subprocess.run(script, capture_output=True, text=True, timeout=60)
    assert done.returncode == code and "NANOCHAT_TORCH" in done.stdout + done.stderr
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["dev", "setup.sh"]
