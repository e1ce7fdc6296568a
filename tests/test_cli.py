"""nanochat/cli.py: command lines from dataclasses."""

import errno
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Optional

import pytest

from nanochat.cli import flag, parse, parser_of, run_main
from nanochat.errors import UserError


@dataclass
class Config:
    depth: int = flag(20, "layers")
    device_batch_size: int = flag(32, "rows a rank, 100% of them")
    matrix_lr: float = flag(0.02, "rate of matrices")
    run: str = flag("dummy", "name of the run")
    model_tag: str | None = flag(None, "folder of the checkpoints")
    num_iterations: int | None = flag(None, "steps")
    max_hours: Optional[float] = flag(None, "hours")  # noqa: UP045 - the older spelling is to work too
    compile: bool = flag(True, "compile the model")
    resume: bool = flag(False, "go on")
    source: Literal["mid", "sft"] = flag("sft", "which model", short="i")
    x: int = flag(5, "problems")


def test_no_flags_give_the_defaults():
    assert parse(Config, []) == Config()


@pytest.mark.parametrize("argv", [["--device_batch_size=8"], ["--device-batch-size=8"], ["--device_batch_size", "8"],
                                  ["--device-batch-size", "8"], ["--", "--device-batch-size", "8"]])
def test_underscores_dashes_and_a_leading_separator_are_all_fine(argv):
    assert parse(Config, argv) == Config(device_batch_size=8)


def test_values_have_the_type_of_their_field():
    config = parse(Config, ["--matrix_lr=1e-3", "--run=a b", "--model-tag", "d4", "--num-iterations=7",
                            "--max_hours=2", "--depth", "-1"])
    assert config == Config(matrix_lr=1e-3, run="a b", model_tag="d4", num_iterations=7, max_hours=2.0, depth=-1)
    assert isinstance(config.max_hours, float) and isinstance(config.num_iterations, int)


@pytest.mark.parametrize("text, number", [("5e5", 500000), ("524_288", 524288), ("1E3", 1000), ("0", 0), ("-1", -1),
                                          ("2.0", 2), ("123456789123456789e9", 123456789123456789000000000)])
def test_whole_numbers_are_read_exactly(text, number):
    depth = parse(Config, [f"--depth={text}"]).depth
    assert depth == number and type(depth) is int


@pytest.mark.parametrize("argv, compile, resume", [
    ([], True, False), (["--resume"], True, True), (["--compile=0", "--resume=yes"], False, True),
    (["--compile", "False"], False, False), (["--resume", "--compile=off"], False, True),
    (["--resume=no"], True, False)])
def test_booleans_stand_alone_or_take_a_word(argv, compile, resume):
    config = parse(Config, argv)
    assert (config.compile, config.resume) == (compile, resume)


def test_letters_are_short_for_names():
    assert parse(Config, ["-i", "mid", "-x", "9"]) == Config(source="mid", x=9)
    assert parse(Config, ["--source=mid", "--x=9"]) == Config(source="mid", x=9)


@pytest.mark.parametrize("argv, said", [
    (["--depth=deep"], "'deep' is not a whole number"), (["--depth=1.5"], "'1.5' is not a whole number"),
    (["--depth=inf"], "'inf' is not a whole number"), (["--depth=nan"], "'nan' is not a whole number"),
    (["--depth=1e999999999"], "is not a whole number"), (["--depth=1e-999999999"], "is not a whole number"),
    (["--depth="], "'' is not a whole number"),
    (["--num_iterations=x"], "'x' is not a whole number"), (["--matrix-lr=fast"], "'fast' is not a number"),
    (["--compile=maybe"], "'maybe' is not true or false"), (["--source=big"], "invalid choice: 'big'"),
    (["--dept=3"], "unrecognized arguments: --dept=3"), (["--depth"], "expected one argument"),
    (["three"], "unrecognized arguments: three")])
def test_a_wrong_command_line_exits_with_code_2_and_says_why(argv, said, capsys):
    with pytest.raises(SystemExit) as error:
        parse(Config, argv)
    assert error.value.code == 2 and said in capsys.readouterr().err


def test_help_lists_every_flag_with_its_default(capsys):
    with pytest.raises(SystemExit) as error:
        parse(Config, ["--help"], description="Trains.")
    shown = " ".join(capsys.readouterr().out.split())
    assert error.value.code == 0 and "Trains." in shown
    for part in ("--device-batch-size INT, --device_batch_size INT rows a rank, 100% of them (default: 32)",
                 "(default: dummy)", "folder of the checkpoints (default: unset)", "steps (default: unset)",
                 "(default: True)", "(default: 0.02)", "{mid,sft}"):
        assert part in shown


def test_a_field_without_default_must_be_given_and_a_made_default_is_made_anew(capsys):
    @dataclass
    class Needs:
        path: str = field(metadata={"help": "where"})
        names: list = field(default_factory=list)

    assert parse(Needs, ["--path=a"]).names == [] and parse(Needs, ["--path=a"]).path == "a"
    assert "must be given" in parser_of(Needs).format_help()
    with pytest.raises(SystemExit) as error:
        parse(Needs, [])
    assert error.value.code == 2 and "--path" in capsys.readouterr().err


def test_a_user_error_is_one_line_and_code_1(capsys):
    def main():
        raise UserError("no text. Import some.")

    with pytest.raises(SystemExit) as error:
        run_main(main)
    assert error.value.code == 1 and capsys.readouterr().err == "error: no text. Import some.\n"


@pytest.mark.parametrize("number, named, said", [
    (errno.EROFS, True, "the disk is read-only"), (errno.ENOSPC, False, "the disk is full"),
    (errno.EACCES, True, "permission denied"), (errno.ELOOP, True, "circle")])
def test_an_error_of_the_disk_that_nobody_explained_is_one_line(capsys, number, named, said):
    def fails():
        raise OSError(number, "x", *(["/some/where"] if named else []))
    with pytest.raises(SystemExit) as ended:
        run_main(fails)
    told = capsys.readouterr().err
    assert ended.value.code == 1 and told.startswith("error: ") and said in told and told.count("\n") == 1
    assert ("/some/where" in told) == named

    def other():
        raise ConnectionResetError(errno.ECONNRESET, "x")
    with pytest.raises(ConnectionResetError):
        run_main(other)


def test_a_name_that_the_locale_does_not_have_is_one_line(capsys):
    with pytest.raises(SystemExit) as ended:
        run_main(lambda: os.fsdecode(b"/data/caf\xc3\xa9 \xff").encode())
    told = capsys.readouterr().err
    assert ended.value.code == 1 and told.count("\n") == 1 and "/data/café" in told and "PYTHONUTF8=1" in told


def test_an_interrupt_is_code_130_and_other_errors_stay_as_they_are():
    def interrupt():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as error:
        run_main(interrupt)
    assert error.value.code == 130
    with pytest.raises(ZeroDivisionError):
        run_main(lambda: 1 / 0)


def test_a_module_run_with_m_calls_itself_so(tmp_path):
    (tmp_path / "script.py").write_text("from nanochat.cli import flag, parse, run_main\n"
                                        "from dataclasses import dataclass\n"
                                        "@dataclass\nclass Config:\n    depth: int = flag(3, 'layers')\n"
                                        "run_main(lambda: print(parse(Config).depth))\n")
    run = {"cwd": tmp_path, "capture_output": True, "text": True,
           "env": {"PYTHONPATH": str(Path(__file__).resolve().parent.parent), "PATH": ""}}
    assert subprocess.run([sys.executable, "-m", "script", "--depth=4"], **run).stdout == "4\n"
    assert "usage: python -m script" in subprocess.run([sys.executable, "-m", "script", "-h"], **run).stdout
