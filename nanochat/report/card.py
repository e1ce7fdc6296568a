"""The report of a run, made from its logs: machine, time, cost, every stage's settings and results, plots, samples, and the summary table.

    python -m nanochat.report generate --hourly-price=24
    python -m nanochat.report reset                        # puts an old report aside; logs are not touched

Sections go to report/*.md under $NANOCHAT_BASE_DIR, joined to report/report.md with the plots beside it, and are copied to ./report.md,
whose plots are in ./report_files. Where a log holds several runs, the last that was finished counts; a run that was stopped and went on
is one run. Training knows nothing of this file: it can be run at any time, also while a stage still trains.
"""

import math
import shutil
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from nanochat import stages
from nanochat.cli import flag, parse
from nanochat.errors import UserError
from nanochat.files import atomic_write, base_dir, free_name, in_words
from nanochat.logs import read_log

STAGES = {"tok_train": "Tokenizer", "tok_eval": "Tokenizer, compression",
          **{log: title for stage in stages.STAGES.values() for log, title in stage.sections.items()}}
TRAINING = tuple(stages.STAGES)
COLUMNS = {stage.column: stage.graded_by for stage in stages.STAGES.values()}
# the published run of depth 20: CORE of the base model, the rest after SFT
PUBLISHED = {"CORE": 0.1796, "ARC-Challenge": 0.2782, "ARC-Easy": 0.3864, "GSM8K": 0.0455, "HumanEval": 0.0549, "MMLU": 0.3166,
             "SpellingBee": None, "ChatCORE": 0.2322}
PUBLISHED_TIME = "3 h 15 min"
WORLD = ("World-Questions", "World-Choice", "World-Sums", "SpellingBee")
GPU_PRICE = 3.0  # dollars an hour for a rented H100; an assumption, said as one
TITLE = "# Report of a nanochat run"


@dataclass
class Config:
    """Flags of the report."""

    tag: str = flag("", "which model; unset takes the one trained or evaluated last")
    hourly_price: float = flag(-1.0, "dollars an hour for the whole machine; unset assumes 3 for each GPU, and nothing without one")


@dataclass
class Run:
    """The last run of a stage: its records in order, without what was trained twice because of a stop.

    finished: it came to its end. stopped: how often it was stopped and went on. seconds: of all its pieces.
    """

    stage: str
    tag: str
    rows: list[dict[str, Any]] = field(default_factory=list)
    pieces: list[list[dict[str, Any]]] = field(default_factory=list)

    @property
    def finished(self) -> bool:
        if self.stage in TRAINING:
            return any(row["kind"] == "done" for row in self.rows)
        return any(row["kind"] == "end" and row.get("exit_code") == 0 for row in self.rows)

    @property
    def stopped(self) -> int:
        return len(self.pieces) - 1

    @property
    def seconds(self) -> float:
        spans = [[moment for row in piece if (moment := when(row))] for piece in self.pieces]
        return sum((max(span) - min(span)).total_seconds() for span in spans if span)

    def all(self, kind: str) -> list[dict[str, Any]]:
        """All records of a kind."""
        return [row for row in self.rows if row["kind"] == kind]

    def last(self, kind: str) -> dict[str, Any]:
        """The last record of a kind; {} where there is none."""
        return next((row for row in reversed(self.rows) if row["kind"] == kind), {})

    def series(self, kind: str, name: str) -> tuple[list[float], list[float]]:
        """Steps and values of `name` in the records of a kind, where both are finite numbers."""
        pairs = [(row["step"], row[name]) for row in self.all(kind) if number(row.get("step")) and number(row.get(name))]
        return [float(step) for step, _ in pairs], [float(value) for _, value in pairs]


def number(value: Any) -> bool:
    """Is it a finite number?"""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def when(row: dict[str, Any]) -> datetime | None:
    """The time of a record; None where it has none that can be read."""
    try:
        moment = datetime.fromisoformat(row.get("time", ""))
    except (TypeError, ValueError):
        return None
    return moment if moment.tzinfo else None


def runs_of(rows: list[dict[str, Any]]) -> list[Run]:
    """Split the records of a log into its runs. A run that goes on from a step is one with the run before."""
    runs: list[Run] = []
    for row in rows:
        if not isinstance(row.get("kind"), str):
            continue
        if row["kind"] == "start":
            runs.append(Run(str(row.get("stage", "")), str(row.get("tag", "")), [row], [[row]]))
        elif runs:
            run = runs[-1]
            run.rows.append(row)
            run.pieces[-1].append(row)
            start = row.get("start") if row["kind"] == "model" else None
            if len(runs) > 1 and number(start) and start > 0 and len(run.pieces) == 1:
                before = runs[-2]  # what it did after the checkpoint is done again
                kept = [old for old in before.rows if not (number(old.get("step")) and old["step"] > start)]
                runs[-2:] = [Run(run.stage, run.tag, kept + run.rows, before.pieces + run.pieces)]
    return runs


def read_runs(folder: Path) -> dict[tuple[str, str], Run]:
    """Return, by stage and tag, the last finished run of every log in `folder`; the last of all where none was finished."""
    found = {}
    for path in sorted(folder.glob("*.jsonl")):
        runs = runs_of(read_log(path))
        if runs and runs[-1].stage in STAGES:
            found[runs[-1].stage, runs[-1].tag] = next((run for run in reversed(runs) if run.finished), runs[-1])
    return found


def of_tag(runs: dict[tuple[str, str], Run], tag: str | None, folder: Path) -> tuple[str, dict[str, Run]]:
    """Return the tag, the newest one where none is given, and its runs by stage. Any tokenizer's log belongs to it.

    Raises UserError where there is no such run.
    """
    models = [run for (stage, _), run in runs.items() if not stage.startswith("tok_")]
    if tag and all(run.tag != tag for run in models):
        raise UserError(f"no log of a model named {tag!r} in {folder}; there is {', '.join(sorted({run.tag for run in models})) or 'none'}")
    if not runs:
        raise UserError(f"there are no logs in {folder}, so there is nothing to report. Train something first (bash speedrun.sh), "
                        "or set NANOCHAT_BASE_DIR to where it was trained.")
    ends = {id(run): max((moment.timestamp() for row in run.rows if (moment := when(row))), default=0.0) for run in runs.values()}
    tag = tag or max(models or runs.values(), key=lambda run: ends[id(run)]).tag
    chosen: dict[str, Run] = {}
    for (stage, name), run in sorted(runs.items(), key=lambda item: ends[id(item[1])]):
        if name == tag or stage.startswith("tok_") and getattr(chosen.get(stage), "tag", None) != tag:
            chosen[stage] = run
    return tag, {stage: chosen[stage] for stage in STAGES if stage in chosen}


# ---- words and tables

def shown(value: Any, digits: int = 4) -> str:
    """A number as the report shows it: 0.1796, 1,234,567; - for what is not there or not finite."""
    if not number(value):
        return "-"
    if isinstance(value, int) or abs(value) >= 10_000:
        return f"{value:,.0f}"
    return f"{value:.{digits}f}"


def spoken(seconds: float) -> str:
    """Seconds as a person says them: 42 s, 3 min 20 s, 3 h 15 min."""
    if seconds < 60:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60:,} h {minutes % 60} min"


def table(head: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """A Markdown table; the first `left` columns are text, the others numbers."""
    lines = [head, ["---" if i < left else "---:" for i in range(len(head))], *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in line) + " |" for line in lines) + "\n"


def fenced(texts: Sequence[Any]) -> str:
    """Samples of the model, verbatim; whatever they hold, they stay inside the fence."""
    body = "\n\n".join(str(text) for text in texts)
    fence = "~" * max(3, 1 + max((len(line) - len(line.lstrip("~")) for line in body.splitlines()), default=0))
    return f"{fence}text\n{body}\n{fence}\n"


# ---- sections

def overview(tag: str, runs: dict[str, Run], hourly_price: float | None) -> str:
    """Machine, versions, commit, time and cost."""
    starts = [run.last("start") for run in runs.values()]
    lines = [TITLE, "", f"Model `{tag}`, reported {datetime.now().astimezone():%Y-%m-%d %H:%M %Z} from the logs.", "", "## Machine", ""]
    machines = []
    for start in starts:
        about = start.get("machine") or {}
        if about and about not in machines:
            machines.append(about)
    for about in machines:
        gpus = about.get("gpus") or []
        kinds = ", ".join(f"{gpus.count(kind)} × {kind}" for kind in sorted(set(gpus))) or "none"
        memory = in_words(about["memory"]) if number(about.get("memory")) and about["memory"] else "unknown"
        lines.append(f"- CPU: {about.get('cpu') or 'unknown'}, {about.get('cores', '?')} cores, {memory} of memory; GPUs: {kinds}; "
                     f"{about.get('system', '')}")
    versions = dict.fromkeys(", ".join(f"{name} {value}" for name, value in (start.get("versions") or {}).items()
                                       if value != "not installed") for start in starts)
    commits = dict.fromkeys(_short(str(start["commit"])) for start in starts if start.get("commit"))
    lines += [f"- versions: {' / '.join(filter(None, versions)) or 'unknown'}", f"- commit: {', '.join(commits) or 'unknown'}", "",
              "## Time and cost", ""]
    lines.append(table(["stage", "time", ""], [[STAGES[stage], spoken(run.seconds), _state(run)] for stage, run in runs.items()]))
    wall, busy = wall_clock(runs), sum(run.seconds for run in runs.values())
    lines.append(f"- total wall-clock time, from the first start to the last end: **{spoken(wall)}**; all stages together {spoken(busy)}")
    price, why = hourly_price, "as given"
    gpus = max((len((start.get("machine") or {}).get("gpus") or []) for start in starts), default=0)
    if price is None and gpus:
        price, why = gpus * GPU_PRICE, f"an assumption: {GPU_PRICE:.0f} dollars for each of {gpus} GPUs, as for a rented H100"
    if price is None:
        lines.append("- cost: not known; `--hourly-price=DOLLARS` says what the machine costs")
    else:
        lines.append(f"- cost at {price:,.2f} dollars an hour ({why}): **{price * wall / 3600:,.2f} dollars** for the wall-clock time, "
                     f"{price * busy / 3600:,.2f} for the stages alone")
    return "\n".join(lines) + "\n"


def _short(commit: str) -> str:
    name, dash, state = commit.partition("-")
    return f"{name[:12]}{dash}{state}"


def _state(run: Run) -> str:
    stops = f"stopped and gone on {run.stopped} time{'s' if run.stopped > 1 else ''}" if run.stopped else ""
    return ", ".join(filter(None, ["" if run.finished else "not finished", stops]))


def wall_clock(runs: dict[str, Run]) -> float:
    """Seconds from the first start to the last end."""
    moments = [moment for run in runs.values() for piece in run.pieces for row in piece if (moment := when(row))]
    return (max(moments) - min(moments) if moments else timedelta()).total_seconds()


def section(run: Run, plots: list[str]) -> str:
    """Settings and results of one stage. plots: names of its picture files."""
    lines = [f"## {STAGES[run.stage]}", ""]
    if state := _state(run):
        lines += [f"This run was {state}." if run.finished else f"This run is {state}.", ""]
    rows = training_results(run) if run.stage in TRAINING else other_results(run)
    if rows:
        lines.append(table(["result", ""], rows))
    tasks = run.last("core").get("tasks")
    if isinstance(tasks, dict) and tasks:
        lines.append(table(["CORE task", "accuracy", "above chance"], [
            [name, shown((found or {}).get("accuracy")), shown((found or {}).get("centered"))] for name, found in tasks.items()]))
    graded = {row.get("name"): row for row in run.all("task")}
    if graded:
        lines.append(table(["task", "accuracy", "right", "of", "chance", "time"], [
            [name, shown(row.get("accuracy")), shown(row.get("correct")), shown(row.get("count")), shown(row.get("chance")),
             spoken(row["seconds"]) if number(row.get("seconds")) else "-"] for name, row in graded.items()]))
    lines += [f"![{STAGES[run.stage]}]({name})\n" for name in plots]
    texts = run.last("samples").get("texts") or run.last("loss").get("samples")
    if isinstance(texts, list) and texts:
        lines += ["Samples of the model:", "", fenced(texts)]
    config = run.last("start").get("config")
    if isinstance(config, dict) and config:
        lines += ["Settings: " + ", ".join(f"{name} `{value}`" for name, value in config.items() if value not in ("", None)), ""]
    return "\n".join(lines)


def training_results(run: Run) -> list[list[str]]:
    """What a stage that trains has to show."""
    model, done, rows = run.last("model"), run.last("done"), []

    def add(name: str, value: Any, digits: int = 4, unit: str = "") -> None:
        if number(value):
            rows.append([name, shown(value, digits) + unit])

    add("parameters", model.get("parameters"))
    add("FLOPs of a token", model.get("flops_per_token"), 0)
    steps = [row["step"] for kind in ("train", "rl", "done") for row in run.all(kind) if number(row.get("step"))]
    if steps:
        rows.append(["steps", f"{max(steps):,}" + (f" of {shown(model['num_iterations'])}" if number(model.get("num_iterations")) else "")])
    tokens = run.last("train").get("tokens")
    add("tokens", tokens)
    if number(tokens) and model.get("parameters"):
        add("tokens a parameter", tokens / model["parameters"], 1)
    add("conversations", model.get("conversations"))
    add("processes", model.get("world_size"))
    if model.get("dtype"):
        rows.append(["number format", str(model["dtype"]).removeprefix("torch.")])
    add("training loss at the end, smoothed", run.last("train").get("smooth_loss"))
    for name, text in (("bpb", "validation bits per byte"), ("loss", "validation loss")):
        values = run.series("val", name)[1]
        if values:
            rows.append([f"{text} at the end", shown(values[-1])])
            rows.append([f"{text}, lowest", shown(min(values))])
    speeds, mfus = run.series("train", "tokens_per_second")[1], run.series("train", "mfu")[1]
    if speeds:
        rows.append(["tokens a second, median", f"{statistics.median(speeds):,.0f}"])
    if mfus:
        rows.append(["model FLOPs utilisation, median", f"{statistics.median(mfus):.1%}"])
    rewards = run.series("rl", "reward")[1]
    if rewards:
        rows.append(["reward, first and last step", f"{shown(rewards[0])}, {shown(rewards[-1])}"])
    passes = run.all("pass")
    for name in (passes[-1] if passes else {}):
        if name.startswith("pass@"):
            rows.append([f"{name}, before and after", f"{shown(passes[0].get(name))}, {shown(passes[-1].get(name))}"])
    add("CORE at the end", run.last("core").get("core"))
    if number(done.get("peak_memory")):
        rows.append(["memory of the GPU, most", in_words(done["peak_memory"])])
    if number(done.get("seconds")):
        rows.append(["time of the last piece" if run.stopped else "time", spoken(done["seconds"])])
    return rows


def other_results(run: Run) -> list[list[str]]:
    """What a stage that does not train has to show: every number in its last record of each kind."""
    rows = []
    for kind in dict.fromkeys(row["kind"] for row in run.rows):
        if kind not in ("start", "end", "task"):
            values = {name: value for name, value in run.last(kind).items() if number(value)}
            rows += [[name if name == kind else f"{kind}: {name}", shown(value)] for name, value in values.items()]
    name = "mean above chance" if run.last("chatcore").get("data") == "small-world" else "ChatCORE"
    return [[name if row[0] == "chatcore" else row[0], row[1]] for row in rows]


def accuracies(runs: dict[str, Run]) -> dict[str, dict[str, float]]:
    """By column (BASE, MID, SFT, RL), what each row of the summary shows there, only what exists."""
    found: dict[str, dict[str, float]] = {}
    for column, stage in COLUMNS.items():
        run, values = runs.get(stage), {}
        if run is not None:
            values = {str(row.get("name")): row.get("accuracy") for row in run.all("task")}
            core = run.last("chatcore")
            values["mean above chance" if core.get("data") == "small-world" else "ChatCORE"] = core.get("chatcore")
            values["CORE"] = run.last("core").get("core")
            values["World-Facts"] = run.last("small_world").get("world")
        if column == "BASE" and not number(values.get("CORE")) and "base" in runs:
            values["CORE"] = runs["base"].last("core").get("core")  # asked for during training
        found[column] = {name: value for name, value in values.items() if number(value)}
    return found


def chances(runs: dict[str, Run]) -> dict[str, float]:
    """What guessing would score, by task."""
    found = {str(row.get("name")): row.get("chance") for run in runs.values() for row in run.all("task")}
    if "base_eval" in runs:
        found["World-Facts"] = runs["base_eval"].last("small_world").get("chance")
    return {name: value for name, value in found.items() if number(value)}


def summary(runs: dict[str, Run]) -> str:
    """The table of the publication; for a small world, that of its own tasks too; the time."""
    values, chance = accuracies(runs), chances(runs)
    names = dict.fromkeys(name for column in values.values() for name in column)
    world = any(name.startswith("World-") for name in names)
    own = [name for name in names if name not in PUBLISHED and name not in (*WORLD, "World-Facts", "mean above chance")]
    lines = ["## Summary", ""]

    def row(name: str, *more: str) -> list[str]:
        return [name, *(shown(values[column].get(name)) for column in COLUMNS), *more]

    lines.append(table(["task", *COLUMNS, "published d20"], [row(name, shown(PUBLISHED.get(name))) for name in (*PUBLISHED, *own)]))
    lines += ["The published numbers are those of depth 20: CORE of its base model, the others after SFT.", ""]
    if world:
        lines += ["The built-in small world, asked in wordings that training did not hold:", "",
                  table(["task", *COLUMNS, "chance"], [row(name, shown(chance.get(name))) for name in ("World-Facts", *WORLD)]
                        + [row("mean above chance", "0")])]
    published = f" (published, d20 on eight H100: {PUBLISHED_TIME})" if not world else ""
    lines.append(f"Total wall-clock time: {spoken(wall_clock(runs))}{published}\n")
    return "\n".join(lines)


# ---- making it

def generate(tag: str | None = None, hourly_price: float | None = None, folder: str | Path | None = None) -> Path:
    """Write the report of a model and return the path of its copy.

    tag: unset takes the model trained or evaluated last. hourly_price: dollars for the machine. folder: where the copy goes, unset is the
    working folder. Raises UserError where there is no log, or no log of that model.
    """
    logs, report = base_dir() / "logs", base_dir() / "report"
    tag, runs = of_tag(read_runs(logs), tag, logs)
    report.mkdir(exist_ok=True)
    for old in (*report.glob("[0-9][0-9]-*.md"), *report.glob("[0-9][0-9]-*.png")):
        old.unlink()  # sections that this report may not have
    try:
        from nanochat.report.plots import draw
        plots, note = draw(runs, report), ""
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in ("matplotlib", "PIL", "numpy"):
            raise
        plots, note = {}, ("There are no plots, as matplotlib is not installed: `uv pip install '.[report]'` in the project's folder "
                           "installs it, then `python -m nanochat.report generate` again.\n")
    parts = {"overview": overview(tag, runs, hourly_price) + (f"\n{note}" if note else "")}
    parts |= {stage: section(run, plots.get(stage, [])) for stage, run in runs.items()}
    parts["summary"] = summary(runs) + "".join(f"\n![Scores]({name})\n" for name in plots.get("summary", []))
    for place, (name, text) in enumerate(parts.items()):
        with atomic_write(report / f"{place:02d}-{name}.md", "w") as file:
            file.write(text)
    whole = "\n".join(parts.values())
    with atomic_write(report / "report.md", "w") as file:
        file.write(whole)
    return _copy(whole, [name for names in plots.values() for name in names], report, Path(folder or "."))


def _copy(text: str, pictures: list[str], report: Path, folder: Path) -> Path:
    """Put a copy of the report into `folder`, its plots into report_files beside it. A report.md that is not ours is moved aside."""
    path, beside = folder / "report.md", folder / "report_files"
    if path.exists():
        with open(path, encoding="utf-8", errors="replace") as file:
            if not file.readline().startswith(TITLE):
                path.rename(free_name(folder / "report.md.old"))
    for name in pictures:
        text = text.replace(f"]({name})", f"]({beside.name}/{name})")
        with atomic_write(beside / name) as file:
            file.write((report / name).read_bytes())
    with atomic_write(path, "w") as file:
        file.write(text)
    return path


def reset() -> Path | None:
    """Put the report that stands under base_dir() aside, under a name with the time; where it went, None if there was none."""
    report = base_dir() / "report"
    if not report.exists():
        return None
    return Path(shutil.move(str(report), str(free_name(report.with_name(f"report.{time.strftime('%Y%m%d-%H%M%S')}")))))


def main(argv: Sequence[str] | None = None) -> None:
    """reset or generate, as the first word says; generate without one. Raises UserError for what the user can mend."""
    argv = list(sys.argv[1:] if argv is None else argv)
    command = argv.pop(0) if argv and not argv[0].startswith("-") else "generate"
    if command not in ("generate", "reset"):
        raise UserError(f"the report can be told to generate or to reset, not to {command!r}")
    config = parse(Config, argv, __doc__)
    if command == "reset":
        aside = reset()
        print(f"the old report was moved to {aside}" if aside else "there was no report")
        return
    if math.isnan(config.hourly_price) or math.isinf(config.hourly_price):
        raise UserError(f"--hourly-price is a number of dollars, not {config.hourly_price}")
    path = generate(config.tag or None, config.hourly_price if config.hourly_price >= 0 else None)
    print(f"the report is in {path.resolve()} and in {base_dir() / 'report' / 'report.md'}")

