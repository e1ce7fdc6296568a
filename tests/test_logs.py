"""Every record of a log is one valid line, whatever happened before; the console and wandb get what they should."""

import errno
import io
import json
import math
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from nanochat import logs
from nanochat.errors import UserError
from nanochat.logs import RunLog, check_wandb, read_log
from tests.conftest import ROOT


def strict(path):
    """The records of a log, each line checked to be JSON as the standard has it."""
    return [json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
            for line in path.read_text().splitlines()]


def test_a_run_is_a_start_its_records_and_an_end(tmp_path):
    with RunLog("base", "d4", {"depth": 4, "folder": Path("x")}) as log:
        log.record("train", step=1, loss=np.float32(2.5), norm=torch.tensor(1.0), mfu=None)
        log.record("sample", text="zwei\nZeilen é")
    assert log.path == tmp_path / "base" / "logs" / "base_d4.jsonl"
    start, train, sample, end = strict(log.path)
    assert start["config"] == {"depth": 4, "folder": "x"} and (start["stage"], start["tag"]) == ("base", "d4")
    assert start["versions"]["torch"] == torch.__version__ and start["versions"]["python"].startswith("3.")
    assert start["machine"]["cpu"] and start["machine"]["cores"] >= 1 and start["machine"]["gpus"] == [
        torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    assert {name: train[name] for name in ("kind", "step", "loss", "norm", "mfu")} == {
        "kind": "train", "step": 1, "loss": 2.5, "norm": 1.0, "mfu": None}
    assert sample["text"] == "zwei\nZeilen é" and (end["kind"], end["exit_code"]) == ("end", 0)
    assert all(row["time"].endswith("+00:00") for row in (start, train, end))


def test_the_commit_of_the_code_is_recorded_where_it_is_a_checkout(tmp_path, monkeypatch):
    git = subprocess.run(["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, text=True)
    if git.returncode == 0 and (ROOT / ".git").exists():
        assert logs.commit().removesuffix("-dirty") == git.stdout.strip()
    monkeypatch.setattr(logs, "__file__", str(tmp_path / "nanochat" / "logs.py"))
    assert logs.commit() is None


def test_a_log_is_on_disk_line_by_line_and_survives_a_kill():
    code = ("from nanochat.logs import RunLog\nlog = RunLog('base', 'd4', {})\nlog.record('train', step=1)\n"
            "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT)
    assert done.returncode == -signal.SIGKILL
    path = Path(os.environ["NANOCHAT_BASE_DIR"]) / "logs" / "base_d4.jsonl"
    assert [row["kind"] for row in strict(path)] == ["start", "train"]
    with open(path, "a") as file:
        file.write('{"time": "now", "kind": "train", "st')  # as a kill while writing, or a full disk, leaves it
    with RunLog("base", "d4", {}) as log:
        log.record("train", step=2)
    rows = read_log(path)
    assert [row["kind"] for row in rows] == ["start", "train", "start", "train", "end"] and rows[3]["step"] == 2
    assert read_log(path.with_name("absent.jsonl")) == []


def test_values_that_are_not_finite_are_valid_json_and_come_back():
    with RunLog("base", "d4", {"clip": math.inf}) as log:
        log.record("train", step=1, loss=float("nan"), norm=torch.tensor(-math.inf), nested={"a": [math.inf]},
                   word="nan")
    assert [strict(log.path)[1][name] for name in ("loss", "norm", "nested", "word")] == [
        "NaN", "-Infinity", {"a": ["Infinity"]}, "nan"]
    start, train, _ = read_log(log.path)
    assert math.isnan(train["loss"]) and train["norm"] == -math.inf
    assert train["nested"] == {"a": [math.inf]} and train["word"] == "nan"
    assert start["config"] == {"clip": math.inf}


def test_lines_of_several_writers_never_mix():
    log, other = RunLog("base", "d4", {}), RunLog("base", "d4", {})
    writers = [threading.Thread(target=lambda log=log: [log.record("x", text="a" * 9999) for _ in range(50)])
               for log in (log, other)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert len(strict(log.path)) == 102


def test_what_cannot_be_a_record_is_refused():
    with RunLog("base", "d4", {}) as log:
        with pytest.raises(ValueError, match="time"):
            log.record("train", time=3)
        with pytest.raises(TypeError):
            log.record("train", value=object())
    assert [row["kind"] for row in strict(log.path)] == ["start", "end"]
    with pytest.raises(UserError, match="one name, such as d20"):
        RunLog("base", "../d4", {})


def test_a_place_that_cannot_be_written_is_said(tmp_path):
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "logs").write_text("")
    with pytest.raises(UserError, match="cannot write the log"):
        RunLog("base", "d4", {})


class Disk:
    """A file on a disk with so much room."""

    def __init__(self, file):
        self.file, self.room = file, 0

    def write(self, data):
        if not self.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written = self.file.write(data[:self.room])
        self.room -= written
        return written

    def __getattr__(self, name):
        return getattr(self.file, name)


def test_a_full_disk_is_told_once_and_its_records_come_when_there_is_room(monkeypatch, capsys):
    log = RunLog("base", "d4", {})
    log._file = disk = Disk(log._file)
    before = log.path.read_bytes()
    log.record("train", step=1)
    disk.room = 30  # half a record
    log.record("train", step=2)
    assert log.path.read_bytes() == before  # no half of a line
    assert capsys.readouterr().out.count("cannot write the log") == 1
    disk.room = 10**6
    log.record("train", step=3)
    assert "is written again\n" in capsys.readouterr().out
    assert [row.get("step") for row in strict(log.path)] == [None, 1, 2, 3]
    monkeypatch.setattr(logs, "MOST_WAITING", 2)
    disk.room = 0
    for step in range(4, 9):
        log.record("train", step=step)
    disk.room = 10**6
    log.record("train", step=9)
    said = capsys.readouterr().out
    assert said.count("cannot write the log") == 1 and "3 records of the time between are lost" in said
    log.close()
    assert [row.get("step") for row in strict(log.path)] == [None, 1, 2, 3, 7, 8, 9, None]


def test_what_never_finds_room_is_counted_at_the_end(capsys):
    log = RunLog("base", "d4", {})
    log._file = Disk(log._file)
    log.record("train", step=1)
    log.close()
    assert "2 records are missing" in capsys.readouterr().out and len(strict(log.path)) == 1


@pytest.mark.parametrize("tail, kept", [(b'{"kind": "train", "st', False), (b'{"kind": "train"}', True),
                                        (b"x" * 200_000, False)])
def test_half_a_record_at_the_end_of_a_log_goes_and_a_whole_one_stays(tail, kept):
    RunLog("base", "d4", {}).close()
    path = logs.base_dir() / "logs" / "base_d4.jsonl"
    with open(path, "ab") as file:
        file.write(tail)
    RunLog("base", "d4", {}).close()
    kinds = [row["kind"] for row in strict(path)]
    assert kinds == ["start", "end", *["train"] * kept, "start", "end"]


def test_a_wandb_that_fails_later_does_not_end_the_run(monkeypatch, capsys):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setattr(fake, "log", lambda values: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left")))
    with RunLog("base", "d4", {}, wandb_run="first") as log:
        log.record("train", step=3, loss=2.5)
        log.record("train", step=4, loss=2.5)
    assert capsys.readouterr().out.count("wandb fails (OSError") == 1 and fake.finished == [0]
    assert [row["kind"] for row in strict(log.path)] == ["start", "wandb", "train", "train", "end"]


def test_a_record_takes_a_file_name_that_is_not_utf8():
    name = os.fsdecode(b"caf\xe9")
    with RunLog("base", "d4", {"folder": Path(name)}) as log:
        log.record("train", text="→")
    assert strict(log.path)[0]["config"] == {"folder": name}


def test_output_to_a_full_disk_or_without_letters_does_not_end_a_program():
    code = ("from nanochat.logs import console\n"
            "with console():\n    print('né → \\udce9')\n")
    env = os.environ | {"PYTHONIOENCODING": "ascii"}
    shown = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True)
    assert (shown.returncode, shown.stdout, shown.stderr) == (0, b"n\\xe9 \\u2192 \\udce9\n", b"")
    if Path("/dev/full").exists():
        with open("/dev/full", "wb") as full:
            for unbuffered in ("", "1"):
                ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=full, stderr=subprocess.PIPE,
                                       env=env | {"PYTHONUNBUFFERED": unbuffered})
                assert (ended.returncode, ended.stderr) == (0, b"")


def test_other_ranks_write_and_say_nothing(capsys, tmp_path):
    with RunLog("base", "d4", {}, enabled=False, wandb_run="name") as log:
        log.record("train", step=1)
        log.say("no")
        log.progress(1, 2)
    assert capsys.readouterr() == ("", "") and not log.path.exists()


@pytest.mark.parametrize("error, code", [(None, 0), (RuntimeError, 1), (KeyboardInterrupt, 130),
                                         (SystemExit(143), 143), (SystemExit(), 0),
                                         (SystemExit("bad"), 1)])
def test_the_end_says_how_the_run_ended(error, code):
    try:
        with RunLog("base", "d4", {}) as log:
            if error is not None:
                raise error
    except BaseException as raised:
        assert raised is error or isinstance(raised, error)
    log.close()  # a second time does nothing
    assert [row.get("exit_code") for row in strict(log.path)] == [None, code]


# ---- console

class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_progress_bar_is_on_terminals_only_and_can_be_turned_off(monkeypatch, capsys):
    pytest.importorskip("tqdm")
    with RunLog("base", "d4", {}) as log:
        log.progress(1, 10, "loss 3")
    assert capsys.readouterr().err == ""
    for wanted in ("1", "0"):
        monkeypatch.setenv("NANOCHAT_PROGRESS", wanted)
        monkeypatch.setattr(sys, "stderr", Terminal())
        with RunLog("base", "d4", {}) as log:
            log.progress(4, 10, "loss 3")
            log.say("a line")
            log.progress(5, 10, "loss 2")
            log.say("another")
        shown = sys.stderr.getvalue()
        assert ("4/10" in shown and "5/10" in shown and "loss 2" in shown) if wanted == "1" else shown == ""
        assert capsys.readouterr().out == "a line\nanother\n"


def test_a_line_is_said_above_the_bar(monkeypatch):
    pytest.importorskip("tqdm")
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(sys, "stdout", terminal)
    with RunLog("base", "d4", {}) as log:
        log.progress(4, 10)
        log.say("a line")
    before = terminal.getvalue().partition("a line\n")[0]
    assert before.rpartition("\r")[2] == ""
    assert before.rpartition("\r")[0].rpartition("\r")[2].strip() == ""  # the bar was wiped


def test_without_tqdm_there_is_no_bar_and_no_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    monkeypatch.setattr(sys, "stderr", Terminal())
    with RunLog("base", "d4", {}) as log:
        log.progress(4, 10)
    assert sys.stderr.getvalue() == ""


def test_a_console_that_cannot_show_a_letter_shows_its_number(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    with RunLog("base", "d4", {}) as log:
        log.say("né")
    assert raw.getvalue() == b"n\\xe9\n"


# ---- wandb

@pytest.mark.parametrize("name", ["", "dummy"])
def test_no_name_means_no_wandb(name, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    RunLog("base", "d4", {}, wandb_run=name).close()


def test_a_name_without_wandb_installed_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    told = r"'first' asks for wandb, which is not installed: `uv pip install '.\[track\]'`"
    with pytest.raises(UserError, match=told):
        RunLog("base", "d4", {}, wandb_run="first")


class FakeWandb:
    Error = type("Error", (Exception,), {})
    id = "abc"

    def __init__(self, problem=None):
        self.problem, self.logged, self.finished, self.started = problem, [], [], None

    def init(self, **how):
        if self.problem:
            raise self.problem
        self.started = how
        return self

    def define_metric(self, *names, **how):
        pass

    def log(self, values):
        self.logged.append(values)

    def finish(self, exit_code):
        self.finished.append(exit_code)


def test_wandb_gets_the_numbers_the_config_and_the_exit_code(monkeypatch, tmp_path):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    with pytest.raises(RuntimeError), RunLog("base", "d4", {"depth": 4, "folder": Path("x")}, wandb_run="first") as log:
        log.record("train", step=3, loss=2.5, mfu=None, norm=float("nan"), text="no")
        log.record("val", bpb=1.0)
        raise RuntimeError
    assert fake.started == {"project": "nanochat", "name": "first", "job_type": "base",
                            "config": {"depth": 4, "folder": "x"}, "dir": str(tmp_path / "base")}
    assert fake.logged == [{"step": 3, "train/loss": 2.5}, {"val/bpb": 1.0}] and fake.finished == [1]


def test_a_run_that_resumes_goes_on_in_its_wandb_run_and_others_begin_one(monkeypatch):
    fake, started = FakeWandb(), []
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for number, (name, resumes) in enumerate([("first", True), ("first", True), ("first", False), ("first", True),
                                              ("other", True)]):
        fake.id = fake.id if resumes and name == "first" and number else f"id{number}"
        RunLog("base", "d4", {}, wandb_run=name, resumes=resumes).close()
        started.append((fake.started.get("id"), fake.started.get("resume")))
    assert started == [(None, None), ("id0", "allow"), (None, None), ("id2", "allow"), (None, None)]


@pytest.mark.parametrize("mode, key, refused", [("online", False, True), ("online", True, False),
                                                ("offline", False, False), ("disabled", False, False)])
def test_nobody_logged_in_to_wandb_is_seen_before_anything_is_done(monkeypatch, mode, key, refused):
    fake = FakeWandb()
    fake.setup = lambda: SimpleNamespace(settings=SimpleNamespace(mode=mode))
    fake.login = lambda prompt, verify: key
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    check_wandb("dummy")
    if refused:
        with pytest.raises(UserError, match="nobody is logged in.*wandb login.*WANDB_MODE=offline"):
            check_wandb("first")
    else:
        check_wandb("first")
    assert fake.started is None


def test_a_wandb_that_refuses_says_the_ways_out(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", FakeWandb(FakeWandb.Error("no API key\nconfigured")))
    with pytest.raises(UserError, match="wandb does not start: no API key configured .*WANDB_MODE=offline"):
        RunLog("base", "d4", {}, wandb_run="first")


def test_wandb_offline_keeps_the_run_here_and_reaches_out_to_nobody(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    server = socket.create_server(("127.0.0.1", 0))
    server.setblocking(False)
    code = ("from nanochat.logs import RunLog\n"
            "with RunLog('base', 'd4', {'depth': 4}, wandb_run='first') as log:\n"
            "    log.record('train', step=1, loss=2.5)\n")
    address = f"http://127.0.0.1:{server.getsockname()[1]}"
    env = os.environ | {"WANDB_MODE": "offline", "WANDB_BASE_URL": address, "WANDB_ERROR_REPORTING": "false",
                        "WANDB_SILENT": "true", "HTTP_PROXY": address, "HTTPS_PROXY": address, "http_proxy": address,
                        "https_proxy": address, "NO_PROXY": "",
                        **{f"WANDB_{what}_DIR": str(tmp_path / what) for what in ("CACHE", "CONFIG", "DATA")}}
    try:
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True,
                              timeout=120)
    except subprocess.TimeoutExpired:
        pytest.skip("wandb's own process does not start here")
    if "wandb-core" in done.stderr and done.returncode:
        pytest.skip(f"wandb cannot run here: {done.stderr[-200:]}")
    assert done.returncode == 0, done.stderr
    runs = list((tmp_path / "base" / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(runs) == 1 and b"train/loss" in runs[0].read_bytes()
    with pytest.raises(BlockingIOError):  # nobody called
        server.accept()
    server.close()


GONE = """if True:
    import os, sys
    from nanochat.logs import RunLog, print_line
    with RunLog("base", "gone", {}) as log:
        sys.stdin.read(1)  # until nobody reads our output
        for step in range(3):
            log.say(f"step {step}")
            log.progress(step, 3, "x")
            print_line("an error", sys.stderr)
            log.record("train", step=step)
    open(sys.argv[1], "w").write("saved")
"""


@pytest.mark.parametrize("terminal", [False, True])
def test_a_run_goes_on_where_its_console_is_gone(tmp_path, terminal):
    """Ctrl-C ends `tee` before the run that writes to it; a closed terminal answers every write with an error."""
    ours, theirs = os.openpty() if terminal else os.pipe()
    process = subprocess.Popen([sys.executable, "-c", GONE, str(tmp_path / "saved")], cwd=ROOT, stdin=subprocess.PIPE,
                               stdout=theirs, stderr=theirs, start_new_session=True)
    os.close(theirs)
    os.close(ours)
    process.communicate(b"x", timeout=60)
    assert process.returncode == 0 and (tmp_path / "saved").exists()
    assert len([row for row in read_log(logs.base_dir() / "logs" / "base_gone.jsonl") if row["kind"] == "train"]) == 3


def test_a_log_has_one_writer(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    text = "import sys; from nanochat.logs import RunLog; log = RunLog('rl', 't', {}); print('open', flush=True)"
    other = subprocess.Popen([sys.executable, "-c", f"{text}; sys.stdin.read()"], cwd=ROOT, stdin=subprocess.PIPE,
                             stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "open\n"
    with pytest.raises(UserError, match=rf"another run writes .*rl_t.jsonl: process {other.pid}, .*`kill {other.pid}`"):
        RunLog("rl", "t", {})
    RunLog("rl", "t", {}, enabled=False)  # another rank
    RunLog("rl", "other", {}).close()
    other.communicate("")
    RunLog("rl", "t", {}).close()
    assert [row["kind"] for row in read_log(tmp_path / "logs" / "rl_t.jsonl")].count("start") == 2
