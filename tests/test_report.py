"""nanochat/report: what is in the logs is in the report, of the right run, whatever is missing."""

import errno
import json
import math
import os
import shutil
import struct
import subprocess
import sys
import zlib
from contextlib import contextmanager
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest

from nanochat.errors import UserError
from nanochat.files import base_dir, lock, to_json
from nanochat.logs import RunLog
from nanochat.report import generate, plots, reset, writing
from nanochat.report.__main__ import main
from nanochat.report.runs import TITLES, split_runs, thinned
from nanochat.report.sections import HEADING, fenced_block, format_duration, format_number

ROOT = Path(__file__).resolve().parent.parent
NOON = datetime(2026, 3, 1, 12, tzinfo=timezone.utc)


@pytest.fixture(autouse=True)
def own_working_folder(request, tmp_path, monkeypatch):
    """The copy goes into the working folder. Drawing takes a second: only tests with "plots" in their name do it."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    if "plots" not in request.node.name and "matplotlib" not in request.node.name:
        monkeypatch.setattr(plots, "draw", lambda logs, note: {})


class Log:
    """Writes a log as RunLog does, at times of our choice."""

    def __init__(self, stage, tag="d4", at=NOON, gpus=(), **config):
        self.path = base_dir() / "logs" / f"{stage}_{tag}.jsonl"
        self.path.parent.mkdir(exist_ok=True)
        self.time = at
        self("start", stage=stage, tag=tag, config=config, versions={"python": "3.11", "torch": "2.15"},
             commit="a" * 40 + "-dirty",
             machine={"system": "Linux", "cpu": "Abacus", "cores": 4, "memory": 8_000_000_000, "gpus": list(gpus)})

    def __call__(self, kind, after=0.0, **values):
        self.time += timedelta(seconds=after)
        with open(self.path, "a") as file:
            file.write(to_json({"time": self.time.isoformat(), "kind": kind, **values}) + "\n")
        return self

    def train(self, first, last, loss=3.0):
        for step in range(first, last + 1):
            self("train", after=1, step=step, loss=loss / step, smooth_loss=loss / step, norm=1.0,
                 lr_scale=1 - step / 100,
                 seconds=1.0, tokens_per_second=1000.0 + step, mfu=0.4, tokens=step * 100)
        return self

    def graded(self, chance=0.25, **accuracy):
        for name, value in accuracy.items():
            name = name.replace("_", "-")
            self("task", after=1, name=name, accuracy=value, correct=int(100 * value), count=100, chance=chance,
                 seconds=1.0)
        return self

    def end(self, code=0):
        return self("end", exit_code=code)


def base_run(at=NOON, **start):
    log = Log("base", at=at, depth=4, **start)
    log("model", parameters=1_234_567, flops_per_token=100, num_iterations=20, tokens=2000, world_size=1,
        dtype="torch.bfloat16", start=0)
    log("val", step=0, bpb=2.5)
    log.train(1, 20)
    log("val", step=20, bpb=0.8287)
    log("samples", step=20, texts=["a ~~~ b", "<|bos|>second"])
    return log("done", step=20, bpb=0.8287, seconds=20.0, peak_memory=None).end()


def cells(text, first):
    """The cells of the table row that begins with `first`."""
    line = next(line for line in text.splitlines() if line.startswith(f"| {first} |"))
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


def is_a_picture(path):
    """A PNG whose parts are whole and in which not all pixels are the same."""
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    at, pixels, kinds = 8, b"", []
    while at < len(data):
        size, kind = struct.unpack(">I4s", data[at:at + 8])
        body = data[at + 8:at + 8 + size]
        assert struct.unpack(">I", data[at + 8 + size:at + 12 + size])[0] == zlib.crc32(kind + body)
        kinds.append(kind)
        pixels += body if kind == b"IDAT" else b""
        at += 12 + size
    assert kinds[0] == b"IHDR" and kinds[-1] == b"IEND" and len(set(zlib.decompress(pixels))) > 20
    return True


def whole_run():
    base_run(gpus=["H100"] * 2)
    Log("base_eval", at=NOON + timedelta(minutes=2))("loss", train_bpb=0.8, val_bpb=0.83, samples=["x >>> y"])(
        "core", core=0.1796, max_per_task=500, seconds=3.0,
        tasks={"hellaswag": {"accuracy": 0.41, "centered": 0.21}}).end()
    mid = Log("mid", at=NOON + timedelta(minutes=3))("model", parameters=1_234_567, num_iterations=5, start=0)
    mid.train(1, 5)
    mid("val", step=5, bpb=0.4116)("done", step=5, seconds=5.0).end()
    Log("chat_eval_mid", at=NOON + timedelta(minutes=4)).graded(ARC_Easy=0.3, MMLU=0.31)(
        "chatcore", chatcore=0.07, tasks={}, data="hub").end()
    sft = Log("sft", at=NOON + timedelta(minutes=5))("model", num_iterations=5, start=0).train(1, 5)
    sft("val", step=5, loss=1.0657)("done", step=5, seconds=5.0).end()
    Log("chat_eval_sft", at=NOON + timedelta(minutes=6)).graded(ARC_Challenge=0.2782, ARC_Easy=0.3864, GSM8K=0.0455,
                                                                HumanEval=0.0549,
                                                                MMLU=0.3166, SpellingBee=0.99)(
        "chatcore", chatcore=0.2322, tasks={}, data="hub").end()
    rl = Log("rl", at=NOON + timedelta(minutes=7))("model", num_iterations=2, start=0)
    rl("pass", step=0, **{"pass@1": 0.1, "pass@8": 0.2})
    rl("rl", after=1, step=1, reward=0.5, kept_groups=3, sequence_length=90.0, loss=0.1, norm=1.0, lr_scale=1.0,
       seconds=1.0)
    rl("rl", after=1, step=2, reward=0.6, kept_groups=3, sequence_length=95.0, loss=0.1, norm=1.0, lr_scale=0.5,
       seconds=1.0)
    rl("pass", step=2, **{"pass@1": 0.15, "pass@8": 0.25})("done", step=2, seconds=2.0).end()
    Log("chat_eval_rl", at=NOON + timedelta(minutes=60)).graded(chance=0, GSM8K=0.0777).end()


def test_the_table_of_a_whole_run():
    whole_run()
    path = generate()
    text = path.read_text()
    assert path == Path("report.md") and text.startswith(HEADING)
    assert text == (base_dir() / "report" / "report.md").read_text()
    summary = text[text.index("## Summary"):]
    assert cells(summary, "task") == ["BASE", "MID", "SFT", "RL", "published d20"]
    assert cells(summary, "CORE") == ["0.1796", "-", "-", "-", "0.1796"]
    assert cells(summary, "ARC-Challenge") == ["-", "-", "0.2782", "-", "0.2782"]
    assert cells(summary, "ARC-Easy") == ["-", "0.3000", "0.3864", "-", "0.3864"]
    assert cells(summary, "GSM8K") == ["-", "-", "0.0455", "0.0777", "0.0455"]
    assert cells(summary, "HumanEval") == ["-", "-", "0.0549", "-", "0.0549"]
    assert cells(summary, "MMLU") == ["-", "0.3100", "0.3166", "-", "0.3166"]
    assert cells(summary, "SpellingBee") == ["-", "-", "0.9900", "-", "-"]
    assert cells(summary, "ChatCORE") == ["-", "0.0700", "0.2322", "-", "0.2322"]
    assert "World-" not in text and "Total wall-clock time: 1 h 0 min" in summary


def test_time_machine_and_cost():
    whole_run()
    text = generate(hourly_price=24).read_text()
    assert "Abacus, 4 cores, 8.0 GB of memory; GPUs: 2 × H100" in text
    assert "commit: aaaaaaaaaaaa-dirty" in text and "torch 2.15" in text
    assert cells(text, "Base model")[0] == "20 s" and cells(text, "RL")[0] == "2.0 s"
    # 3601 seconds from noon to the end of the last; stages: 20 + 0 + 5 + 2 + 5 + 6 + 2 + 1
    assert "first start to the last end: **1 h 0 min**; all stages together 41 s" in text
    assert "24.00 dollars an hour (as given): **24.01 dollars**" in text and "0.27 for the stages" in text
    assumed = generate().read_text()
    assert "6.00 dollars an hour (an assumption" in assumed


def test_without_a_gpu_there_is_no_cost_unless_it_is_given():
    base_run()
    assert "cost: not known" in generate().read_text()
    assert "36.00 dollars an hour" in generate(hourly_price=36).read_text()


def test_results_of_the_stages():
    whole_run()
    text = generate().read_text()
    base = text[text.index("## Base model\n"):text.index("## Base model, evaluation")]
    assert cells(base, "parameters") == ["1,234,567"] and cells(base, "steps") == ["20 of 20"]
    assert cells(base, "validation bits per byte at the end") == ["0.8287"]
    assert cells(base, "validation bits per byte, lowest") == ["0.8287"]
    assert cells(base, "training loss at the end, smoothed") == ["0.1500"]
    assert cells(base, "tokens a second, median") == ["1,010"]
    assert cells(base, "model FLOPs utilisation, median") == ["40.0%"] and "depth `4`" in base
    assert "~~~text\na ~~~ b\n\n<|bos|>second\n~~~" in base
    assert cells(text, "hellaswag") == ["0.4100", "0.2100"] and cells(text, "loss: val_bpb") == ["0.8300"]
    assert cells(text, "validation loss at the end") == ["1.0657"]
    assert cells(text, "pass@8, before and after") == ["0.2000, 0.2500"]
    assert cells(text, "reward, first and last step") == ["0.5000, 0.6000"]


def test_plots_are_pictures_and_links_find_them():
    pytest.importorskip("matplotlib")
    whole_run()
    path = generate()
    for folder, name in ((Path(), path), (base_dir() / "report", base_dir() / "report" / "report.md")):
        links = [part.split(")")[0] for part in name.read_text().split("](")[1:]]
        assert len(links) == 5  # four stages that train, the scores
        assert all(is_a_picture(folder / link) for link in links)
    sections = sorted(file.name for file in (base_dir() / "report").glob("*.md"))
    assert sections[0] == "00-overview.md" and sections[-1] == "report.md" and len(sections) == 11
    joined = "\n".join((base_dir() / "report" / name).read_text() for name in sections[:-1])
    assert joined == (base_dir() / "report" / "report.md").read_text()


def test_without_matplotlib_the_report_says_how_to_get_plots(monkeypatch):
    base_run()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    text = generate().read_text()
    assert "matplotlib is not installed" in text and "[report]" in text and ".png" not in text
    assert cells(text, "CORE")[0] == "-"


def test_a_small_world_has_a_table_of_its_own():
    base_run()
    Log("base_eval", at=NOON + timedelta(minutes=1))("small_world", world=0.9, people=0.8, untrained=0.2,
                                                     chance=0.21).end()
    for minute, stage, more in ((2, "chat_eval_mid", 0.0), (3, "chat_eval_sft", 0.1)):
        log = Log(stage, at=NOON + timedelta(minutes=minute))
        log.graded(chance=0.09, World_Questions=0.5 + more).graded(chance=0.25, World_Choice=0.4 + more)
        log.graded(chance=0.0, World_Sums=0.7 + more, SpellingBee=0.6 + more)
        log("chatcore", chatcore=0.33 + more, data="small-world").end()
    text = generate().read_text()
    world = text[text.index("The built-in small world"):]
    assert cells(world, "task") == ["BASE", "MID", "SFT", "RL", "chance"]
    assert cells(world, "World-Facts") == ["0.9000", "-", "-", "-", "0.2100"]
    assert cells(world, "World-Questions") == ["-", "0.5000", "0.6000", "-", "0.0900"]
    assert cells(world, "World-Choice") == ["-", "0.4000", "0.5000", "-", "0.2500"]
    assert cells(world, "World-Sums") == ["-", "0.7000", "0.8000", "-", "0.0000"]
    assert cells(world, "SpellingBee") == ["-", "0.6000", "0.7000", "-", "0.0000"]
    assert cells(world, "mean above chance") == ["-", "0.3300", "0.4300", "-", "0"]
    assert cells(text, "ChatCORE") == ["-", "-", "-", "-", "0.2322"]  # it is another mean, over other tasks


def test_the_numbers_of_a_whole_run_are_tabled_from_its_logs_and_written(tmp_path, capsys):
    from bench import speedrun
    from tests.test_bench import run, table_of
    whole_run()
    text, found = run(speedrun.main, capsys, tmp_path)
    assert ["base",
            "20 s"] in table_of(text) and "python -m bench.speedrun" in text and found["wall_clock_seconds"] == 3601
    times = {row["stage"]: row["seconds"] for row in found["rows"] if "stage" in row}
    scores = {(row["column"], row["task"]): (row["score"], row["chance"]) for row in found["rows"] if "task" in row}
    assert times["base"] == 20 and times["chat_eval_sft"] == 6
    assert all(row["finished"] for row in found["rows"] if "stage" in row)
    assert scores["BASE", "CORE"] == (0.1796, None) and scores["SFT", "MMLU"] == (0.3166, 0.25)
    assert scores["RL", "GSM8K"] == (0.0777, 0) and found["tag"] == "d4"


# ---- which run counts

def test_only_the_last_finished_run_of_a_log_counts():
    Log("chat_eval_sft").graded(MMLU=0.1).end()
    Log("chat_eval_sft", at=NOON + timedelta(hours=1)).graded(MMLU=0.2).end()
    Log("chat_eval_sft", at=NOON + timedelta(hours=2)).graded(MMLU=0.3).end(code=1)
    Log("chat_eval_sft", at=NOON + timedelta(hours=3)).graded(MMLU=0.4)
    text = generate().read_text()
    assert cells(text[text.index("## Summary"):], "MMLU")[2] == "0.2000" and "not finished" not in text
    assert "Total wall-clock time: 1.0 s" in text


def test_a_run_that_was_stopped_and_went_on_is_one_run():
    log = Log("base")("model", num_iterations=20, start=0).train(1, 12, loss=100)
    log("val", step=5, bpb=2.0)("val", step=12, bpb=9.0).end(code=130)
    # killed: no end
    log = Log("base", at=NOON + timedelta(hours=1))("model", num_iterations=20, start=10).train(11, 15)
    log = Log("base", at=NOON + timedelta(hours=2))("model", num_iterations=20, start=15).train(16, 20)
    log("val", step=20, bpb=1.5)("done", step=20, seconds=5.0).end()
    runs = split_runs([json.loads(line) for line in log.path.read_text().splitlines()])
    assert len(runs) == 1 and runs[0].resumes == 2 and runs[0].finished
    steps, losses = runs[0].series("train", "loss")
    # what was trained twice counts as it was the second time
    assert steps == list(range(1, 21)) and losses[9:11] == [10.0, 3 / 11]
    assert runs[0].series("val", "bpb") == ([5, 20], [2.0, 1.5])
    assert runs[0].seconds == 12 + 5 + 5
    text = generate().read_text()
    assert "stopped and resumed 2 times" in text and "Total wall-clock time: 2 h 0 min" in text
    assert "not finished" not in text


def test_a_fresh_run_after_an_old_one_is_another_run():
    base_run()
    log = base_run(at=NOON + timedelta(hours=1))
    runs = split_runs([json.loads(line) for line in log.path.read_text().splitlines()])
    assert len(runs) == 2 and all(run.finished and not run.resumes for run in runs)


def test_a_run_that_still_trains_is_reported_as_not_finished():
    Log("base")("model", num_iterations=20, start=0).train(1, 7)
    text = generate().read_text()
    assert "This run is not finished." in text and cells(text, "steps") == ["7 of 20"]


def test_the_newest_model_is_taken_and_another_can_be_named():
    base_run()
    other = Log("base", tag="d8", at=NOON - timedelta(hours=1))("model", parameters=8, start=0)
    other.train(1, 3)("done", step=3).end()
    Log("tok_train", tag="tokenizer", at=NOON - timedelta(hours=2))("tokenizer", vocab_size=2048, seconds=3.5).end()
    assert "Model `d4`" in generate().read_text()
    text = generate(tag="d8").read_text()
    assert "Model `d8`" in text and cells(text, "parameters") == ["8"]
    assert cells(text, "tokenizer: vocab_size") == ["2,048"]
    with pytest.raises(UserError, match="no log of a model named 'd9'.*d4, d8"):
        generate(tag="d9")


# ---- what may be missing or wrong

def test_no_log_at_all_is_said():
    with pytest.raises(UserError, match="no logs in .*nothing to report"):
        generate()
    (base_dir() / "logs").mkdir()
    (base_dir() / "logs" / "other_x.jsonl").write_text('{"kind": "start", "stage": "other", "tag": "x"}\nnonsense\n')
    with pytest.raises(UserError, match="no logs"):
        generate()
    assert not (base_dir() / "report").exists() and not Path("report.md").exists()


@pytest.mark.parametrize("stage", TITLES)
def test_records_without_their_fields_do_no_harm_nor_to_plots(stage):
    path = base_dir() / "logs" / f"{stage}_d4.jsonl"
    path.parent.mkdir()
    kinds = ("model", "train", "val", "samples", "checkpoint", "done", "loss", "core", "small_world", "task",
             "chatcore", "rl", "pass",
             "packing", "diverged", "end")
    odd = [{"kind": kind} for kind in kinds] + [
        {"kind": "train", "step": None, "loss": "x"}, {"kind": "val", "step": 3, "bpb": None},
        {"kind": "core", "tasks": {"a": None}},
        {"kind": "samples", "texts": "no list"}, {"kind": "task", "name": None, "accuracy": None},
        {"kind": "pass", "pass@1": None},
        {"kind": "model", "start": "x", "parameters": 0}, {"kind": 3}, {"time": "yesterday", "kind": "train"},
        {"no": "kind"}]
    for start in ({"kind": "start", "stage": stage, "tag": "d4"},
                  {"kind": "start", "stage": stage, "tag": "d4", "time": 5, "config": None, "machine": None,
                   "versions": None}):
        path.write_text("".join(json.dumps(row) + "\n" for row in [start, *odd]))
        assert generate().read_text().startswith(HEADING)


def test_numbers_that_are_none_are_shown_as_none_and_do_not_stop_the_plots():
    log = Log("base")("model", num_iterations=4, start=0)
    for step, loss in enumerate((2.0, math.nan, math.inf, 1.0), start=1):
        log("train", after=1, step=step, loss=loss, smooth_loss=math.nan, lr_scale=1.0, tokens_per_second=math.inf,
            mfu=None)
    log("val", step=4, bpb=math.nan)("done", step=4, bpb=math.nan, seconds=math.nan).end()
    Log("chat_eval_sft").graded(MMLU=0.5)("task", name="GSM8K", accuracy=math.nan).end()
    text = generate().read_text()
    assert cells(text[text.index("## Summary"):],
                 "GSM8K")[:4] == ["-"] * 4 and "nan" not in text.lower().replace("nanochat", "")


def test_names_with_bars_stay_in_their_cell_and_samples_in_their_fence():
    Log("chat_eval_sft", task_name="ARC-Easy|GSM8K")("task", name="a|b", accuracy=0.5).end()
    assert "| a\\|b |" in generate().read_text()
    assert fenced_block(["x\n~~~~\n# no title"]).startswith("~~~~~text\n")


@pytest.mark.parametrize("seconds, text", [(0.42, "0.4 s"), (42, "42 s"), (200, "3 min 20 s"), (3599.9, "1 h 0 min"),
                                           (11_700, "3 h 15 min")])
def test_times_as_a_person_says_them(seconds, text):
    assert format_duration(seconds) == text


@pytest.mark.parametrize("value, text", [(0.17964, "0.1796"), (None, "-"), (math.nan, "-"), (True, "-"), ("x", "-"),
                                         (12345.6, "12,346"),
                                         (7, "7"), (-0.5, "-0.5000")])
def test_numbers_as_the_report_shows_them(value, text):
    assert format_number(value) == text


# ---- what goes wrong costs that part, and the old report stays whole

def tree(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_users_backend_and_settings_do_not_stop_the_plots(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    base_run()
    (tmp_path / "matplotlibrc").write_text("text.usetex: True\nfont.family: no such font\n")
    env = os.environ | {"PYTHONPATH": str(ROOT), "MPLBACKEND": "not_in_this_environment",
                        "MATPLOTLIBRC": str(tmp_path)}
    done = subprocess.run([sys.executable, "-m", "nanochat.report"], capture_output=True, text=True, env=env)
    assert done.returncode == 0 and "note:" not in done.stdout, done.stdout + done.stderr
    assert is_a_picture(base_dir() / "report" / "00-base.png")


def test_one_broken_picture_costs_that_picture_and_says_so_in_plots(monkeypatch):
    pytest.importorskip("matplotlib")
    whole_run()
    real = plots.draw_curves

    def breaks(axes, title, lines):
        if title == "reward":
            raise RuntimeError("In FT2Font: could not load glyph")
        real(axes, title, lines)

    monkeypatch.setattr(plots, "draw_curves", breaks)
    text = generate().read_text()
    assert "The plot of RL could not be drawn (RuntimeError: In FT2Font" in text
    assert sorted(path.name for path in (base_dir() / "report").glob("*.png")) == [
        "00-base.png", "01-mid.png", "02-sft.png", "90-tasks.png"]


def test_a_library_that_is_broken_costs_the_plots(monkeypatch):
    base_run()

    @contextmanager
    def broken():
        raise OSError("libfreetype.so.6: cannot open shared object file")
        yield

    monkeypatch.setattr(plots, "plain_matplotlib", broken)
    text = generate().read_text()
    assert "There are no plots: matplotlib cannot be used (OSError: libfreetype" in text and "## Summary" in text


@pytest.mark.parametrize("last", range(6))
def test_a_failure_at_any_file_leaves_the_old_report_whole(monkeypatch, last):
    base_run()
    generate()
    (base_dir() / "report" / "my notes.txt").write_text("mine")
    before, own = tree(base_dir() / "report"), tree(Path())
    Log("sft", at=NOON + timedelta(minutes=5))("model", num_iterations=5, start=0).train(1, 5)
    real, count = os.fsync, iter(range(100))

    def full(handle):
        if next(count) >= last:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(handle)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(UserError, match="the report cannot be written: .*No space left"):
            generate()
        assert tree(base_dir() / "report") == before and tree(Path()) == own
        assert not [path for path in base_dir().iterdir() if path.name.startswith(".report")]
    generate()
    assert (base_dir() / "report" / "my notes.txt").read_text() == "mine"
    assert (base_dir() / "report" / "02-sft.md").exists()


def test_a_kill_at_any_rename_leaves_one_whole_report(monkeypatch):
    """Also where a system cannot exchange two folders: what a kill leaves is put in order by the next report."""
    base_run()
    generate()
    before = tree(base_dir() / "report")
    monkeypatch.setattr(writing, "_exchange", lambda first, second: False)
    real, count = os.rename, iter((0, 1))

    class Killed(BaseException):
        pass

    def rename(source, target):
        if next(count, None) == 1:
            raise Killed
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", rename)
        patch.setattr(shutil, "rmtree", lambda *args, **options: None)  # a killed process removes nothing
        with pytest.raises(Killed):
            generate()
    assert not (base_dir() / "report").exists()
    writing._tidy(base_dir() / "report")
    assert tree(base_dir() / "report") == before
    generate()
    assert (base_dir() / "report" / "report.md").exists()


def test_a_rename_that_fails_brings_the_old_report_back(monkeypatch):
    base_run()
    generate()
    before = tree(base_dir() / "report")
    monkeypatch.setattr(writing, "_exchange", lambda first, second: False)
    real, calls = os.rename, []

    def rename(source, target):
        calls.append(target)
        if len(calls) == 2:
            raise OSError(errno.EIO, "Input/output error")
        real(source, target)

    monkeypatch.setattr(os, "rename", rename)
    main([])
    assert tree(base_dir() / "report") == before and len(calls) == 3


def test_what_cannot_be_copied_or_kept_is_told(capsys):
    base_run()
    Path("report.md").mkdir()
    main([])
    out = capsys.readouterr().out
    assert "note: there is no copy in" in out and "Is a directory" in out
    assert out.splitlines()[-1] == f"the report is in {base_dir() / 'report' / 'report.md'}"
    Path("report.md").rmdir()
    shutil.rmtree(base_dir() / "report")
    (base_dir() / "report").write_text("a file of the user")
    main([])
    assert "there is no new report in" in capsys.readouterr().out and Path("report.md").read_text().startswith(HEADING)
    assert (base_dir() / "report").read_text() == "a file of the user"
    Path("report.md").unlink()
    Path("report.md").mkdir()
    with pytest.raises(UserError, match="the report cannot be written: .*Not a directory.*Is a directory"):
        main([])


def test_folders_named_like_files_of_the_report_are_kept():
    base_run()
    for name in ("report.md", "00-overview.md"):
        (base_dir() / "report" / name).mkdir(parents=True)
        (base_dir() / "report" / name / "x").write_text(name)
    generate()
    assert (base_dir() / "report" / "report.md.old" / "x").read_text() == "report.md"
    assert (base_dir() / "report" / "00-overview.md").is_file() and (base_dir() / "report" / "report.md").is_file()


def test_two_reports_at_once_are_one(monkeypatch):
    base_run()
    code = ("from nanochat.report import plots; from nanochat.report.__main__ import main\n"
            "from nanochat.cli import run_main; run_main(lambda: main([]))")
    path = base_dir() / "locks" / "report.lock"
    path.parent.mkdir()
    with lock(path, "the report is being written", "Wait."):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                              env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 1 and f"is being written: process {os.getpid()}" in done.stderr
    assert "Traceback" not in done.stderr and not (base_dir() / "report").exists()


def test_hostile_lines_cost_themselves(monkeypatch):
    base_run()
    path = base_dir() / "logs" / "base_d4.jsonl"
    with open(path, "ab") as file:
        file.write(b"[" * 100_000 + b"\n" + b'{"kind": "train", "step": ' + b"9" * 400 + b', "loss": 1}\n'
                   + b'{"kind": "val", "step": 30, "bpb": NaN}\n\xff\xfe\x00\n{"kind": "done", "step": 20}\n'
                   + b'{"kind": "samples", "texts": ["half a pair \\ud800"]}\n'
                   + b'{"kind": "train", "step": 21, "lo')
    text = generate().read_text()
    assert "base_d4.jsonl has 3 damaged or incomplete lines, left out." in text and "half a pair \\ud800" in text
    assert "could not be made" not in text
    (base_dir() / "logs" / "chat_eval_mid_d4.jsonl").mkdir()
    assert "chat_eval_mid_d4.jsonl could not be read (Is a directory)" in generate().read_text()


def test_a_section_that_cannot_be_made_costs_itself(monkeypatch):
    whole_run()
    real = writing.stage_section
    monkeypatch.setattr(writing, "stage_section", lambda log, plots: 1 / 0 if log.stage == "mid" else real(log, plots))
    text = generate().read_text()
    assert text.count("The section 'Midtraining' could not be made (ZeroDivisionError") == 2
    assert "## SFT" in text and cells(text[text.index("## Summary"):], "MMLU")[1] == "0.3100"


def test_verdicts_readings_and_what_was_skipped_are_in_the_report():
    log = base_run()
    log("verdict", word="worse", text="bpb 2.3100 → 2.3500", name="bpb", before=2.31, after=2.35)
    eval_log = Log("base_eval", at=NOON + timedelta(minutes=1))
    eval_log("skipped", what="CORE", why="there is no bundle\nhere").end()
    sft = Log("sft", at=NOON + timedelta(minutes=2))("model", num_iterations=5, start=0).train(1, 5)
    sft("verdict", word="better", text="validation loss 2.0 → 1.0")("done", step=5).end()
    Log("chat_eval_sft", at=NOON + timedelta(minutes=3))("task", name="GSM8K", accuracy=0.1, correct=1, count=10,
                                                         chance=0.0, seconds=1.0, cut=3, answers=10, as_published=0.2,
                                                         lenient=0.3).end()
    text = generate().read_text()
    assert cells(text, "verdict, end against beginning") == ["worse: bpb 2.3100 → 2.3500"]
    summary = text[text.index("## Summary"):]
    assert "- **Base model: worse: bpb 2.3100 → 2.3500**" in summary and "- **SFT" not in summary
    assert "Skipped: CORE: there is no bundle here" in text
    assert cells(text, "GSM8K") == ["0.1000", "1", "10", "0.0000", "1.0 s", "3", "0.2000", "0.3000"]
    assert "- no log, so not in this report: Midtraining, RL" in text


def test_of_a_long_log_enough_steps_are_kept_and_the_last_of_each_piece():
    rows = [{"kind": "start"}, *({"kind": "train", "step": step} for step in range(1, 1001)),
            {"kind": "val", "step": 1000}, {"kind": "train", "step": 1001}]
    kept = list(thinned(rows, 100))
    steps = [row["step"] for row in kept if row["kind"] == "train"]
    assert steps == [1, 101, 201, 301, 401, 501, 601, 701, 801, 901, 1000, 1001] and kept[-2]["kind"] == "val"
    assert list(thinned(rows, 1)) == rows


# ---- the command

def test_generate_reset_and_what_was_there_before(capsys):
    base_run()
    Path("report.md").write_text("my own notes\n")
    main(["generate", "--hourly-price=24", "--tag", "d4"])
    assert "24.00 dollars" in Path("report.md").read_text() and "report.md" in capsys.readouterr().out
    assert Path("report.md.old").read_text() == "my own notes\n"
    before = (base_dir() / "report" / "report.md").read_text()
    logs = {path: path.read_bytes() for path in (base_dir() / "logs").iterdir()}
    main(["reset"])
    aside = next(base_dir().glob("report.2*"))
    assert (aside / "report.md").read_text() == before and not (base_dir() / "report").exists()
    assert {path: path.read_bytes() for path in (base_dir() / "logs").iterdir()} == logs
    main(["reset"])
    assert "there was no report" in capsys.readouterr().out and reset() is None
    main([])  # generate is what it does unless told otherwise
    assert (base_dir() / "report" / "report.md").exists() and not Path("report.md.old2").exists()
    with pytest.raises(UserError, match="not 'shred'"):
        main(["shred"])


def test_sections_of_stages_that_are_gone_go_too():
    whole_run()
    generate()
    for path in (base_dir() / "logs").iterdir():
        if not path.name.startswith("base_d4"):
            path.unlink()
    generate()
    assert sorted(path.name for path in (base_dir() / "report").glob("*.md")) == [
        "00-overview.md", "01-base.md", "02-summary.md", "report.md"]


def test_the_copy_can_go_elsewhere(tmp_path):
    base_run()
    assert generate(folder=tmp_path / "there") == tmp_path / "there" / "report.md"
    assert (tmp_path / "there" / "report.md").exists() and not Path("report.md").exists()


def test_a_real_log_is_reported_by_the_command(tmp_path):
    with RunLog("base", "d4", {"depth": 4}) as log:
        log.record("model", parameters=3, start=0, num_iterations=1)
        log.record("train", step=1, loss=2.5, smooth_loss=2.5)
        log.record("done", step=1, seconds=0.1)
    done = subprocess.run([sys.executable, "-m", "nanochat.report", "generate", "--hourly-price=24"],
                          capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0 and "the report is in" in done.stdout, done.stderr
    text = Path("report.md").read_text()
    assert cells(text,
                 "training loss at the end, smoothed") == ["2.5000"] and "24.00 dollars" in text and "torch" in text
