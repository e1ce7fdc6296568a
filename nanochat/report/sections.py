"""The Markdown of each section of the report: overview, one section a stage, summary."""

import statistics
from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Any

from nanochat.files import in_words
from nanochat.report.runs import (
    ABOVE_CHANCE,
    COLUMNS,
    PUBLISHED,
    SMALL_WORLD_TASKS,
    TITLES,
    StageLog,
    chance_by_task,
    is_number,
    name_of_chatcore,
    scores_by_column,
    wall_clock_seconds,
)
from nanochat.stages import STAGES

HEADING = "# Report of a nanochat run"
PUBLISHED_TIME = "3 h 15 min"
GPU_PRICE = 3.0  # dollars an hour for a rented H100: an assumption, and the report says so


# ---- formatting

def format_number(value: Any, digits: int = 4) -> str:
    """A number as the report shows it: 0.1796, 1,234,567; "-" where there is none or it is not finite."""
    if not is_number(value):
        return "-"
    if isinstance(value, int) or abs(value) >= 10_000:
        return f"{value:,.0f}"
    return f"{value:.{digits}f}"


def format_duration(seconds: float) -> str:
    """Seconds in words: 42 s, 3 min 20 s, 3 h 15 min."""
    if seconds < 60:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60:,} h {minutes % 60} min"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """A Markdown table. The first `left` columns are text, aligned left; the others are numbers, aligned right."""
    rule = ["---" if i < left else "---:" for i in range(len(header))]

    def line(cells: Iterable[object]) -> str:
        return "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"
    return "\n".join(map(line, [header, rule, *rows])) + "\n"


def fenced_block(texts: Sequence[Any]) -> str:
    """Texts of the model as a code block. The fence is longer than any fence in the texts: nothing in them ends it."""
    body = "\n\n".join(str(text) for text in texts)
    fence = "~" * max(3, 1 + max((len(line) - len(line.lstrip("~")) for line in body.splitlines()), default=0))
    return f"{fence}text\n{body}\n{fence}\n"


# ---- overview

def overview_section(tag: str, logs: dict[str, StageLog], hourly_price: float | None) -> str:
    """Machine, versions, commit, time and cost.

    Args:
        tag: name of the model.
        logs: the log of each stage.
        hourly_price: dollars an hour for the whole machine; None assumes GPU_PRICE for each GPU.
    """
    starts = [log.last("start") for log in logs.values()]
    lines = [HEADING, "", f"Model `{tag}`, reported {datetime.now().astimezone():%Y-%m-%d %H:%M %Z} from the logs.", "",
             "## Machine", "", *_machine_lines(starts)]
    versions = dict.fromkeys(", ".join(f"{name} {value}" for name, value in (start.get("versions") or {}).items()
                                       if value != "not installed") for start in starts)
    commits = dict.fromkeys(_short_commit(str(start["commit"])) for start in starts if start.get("commit"))
    lines += [f"- versions: {' / '.join(filter(None, versions)) or 'unknown'}",
              f"- commit: {', '.join(commits) or 'unknown'}", "",
              "## Time and cost", "",
              markdown_table(["stage", "time", ""], [[TITLES[stage], format_duration(log.seconds), _status(log)]
                                                     for stage, log in logs.items()])]
    if missing := [TITLES[stage.name] for stage in STAGES.values() if stage.name not in logs]:
        lines.append(f"- no log, so not in this report: {', '.join(missing)}")
    wall, busy = wall_clock_seconds(logs), sum(log.seconds for log in logs.values())
    lines.append(f"- total wall-clock time, from the first start to the last end: **{format_duration(wall)}**; "
                 f"all stages together {format_duration(busy)}")
    price, reason = hourly_price, "as given"
    gpus = max((len((start.get("machine") or {}).get("gpus") or []) for start in starts), default=0)
    if price is None and gpus:
        price = gpus * GPU_PRICE
        reason = f"an assumption: {GPU_PRICE:.0f} dollars for each of {gpus} GPUs, as for a rented H100"
    if price is None:
        lines.append("- cost: not known; `--hourly-price=DOLLARS` says what the machine costs")
    else:
        lines.append(f"- cost at {price:,.2f} dollars an hour ({reason}): **{price * wall / 3600:,.2f} dollars** "
                     f"for the wall-clock time, {price * busy / 3600:,.2f} for the stages alone")
    return "\n".join(lines) + "\n"


def _machine_lines(starts: list[dict[str, Any]]) -> list[str]:
    """One line for each machine that a stage ran on."""
    machines: list[dict[str, Any]] = []
    for start in starts:
        machine = start.get("machine") or {}
        if machine and machine not in machines:
            machines.append(machine)
    lines = []
    for machine in machines:
        gpus = machine.get("gpus") or []
        models = ", ".join(f"{gpus.count(model)} × {model}" for model in sorted(set(gpus))) or "none"
        memory = in_words(machine["memory"]) if is_number(machine.get("memory")) and machine["memory"] else "unknown"
        lines.append(f"- CPU: {machine.get('cpu') or 'unknown'}, {machine.get('cores', '?')} cores, "
                     f"{memory} of memory; GPUs: {models}; {machine.get('system', '')}")
    return lines


def _short_commit(commit: str) -> str:
    name, dash, state = commit.partition("-")
    return f"{name[:12]}{dash}{state}"


def _status(log: StageLog) -> str:
    """Empty for a run that finished without an interruption."""
    resumed = f"stopped and resumed {log.resumes} time{'s' if log.resumes > 1 else ''}" if log.resumes else ""
    return ", ".join(filter(None, ["" if log.finished else "not finished", resumed]))


# ---- one stage

def stage_section(log: StageLog, plots: list[str]) -> str:
    """Settings and results of one stage. plots: file names of its pictures."""
    lines = [f"## {TITLES[log.stage]}", ""]
    if status := _status(log):
        lines += [f"This run was {status}." if log.finished else f"This run is {status}.", ""]
    rows = training_results(log) if log.trains else evaluation_results(log)
    if rows:
        lines.append(markdown_table(["result", ""], rows))
    lines += _task_tables(log) + _kernel_table(log)
    for record in log.all("skipped"):
        lines += [f"Skipped: {record.get('what', 'a part')}: {' '.join(str(record.get('why', '')).split())}", ""]
    lines += [f"![{TITLES[log.stage]}]({name})\n" for name in plots]
    texts = log.last("samples").get("texts") or log.last("loss").get("samples")
    if isinstance(texts, list) and texts:
        lines += ["Samples of the model:", "", fenced_block(texts)]
    config = log.last("start").get("config")
    if isinstance(config, dict) and config:
        flags = (f"{name} `{value}`" for name, value in config.items() if value not in ("", None))
        lines += [f"Settings: {', '.join(flags)}", ""]
    return "\n".join(lines)


def _task_tables(log: StageLog) -> list[str]:
    """The tasks of CORE and the graded chat tasks, a table each where there are some."""
    tables = []
    core = log.last("core").get("tasks")
    if isinstance(core, dict) and core:
        tables.append(markdown_table(["CORE task", "accuracy", "above chance"], [
            [name, format_number((scores or {}).get("accuracy")), format_number((scores or {}).get("centered"))]
            for name, scores in core.items()]))
    graded = {record.get("name"): record for record in log.all("task")}
    if graded:
        readings = any("cut" in record for record in graded.values())
        more = (("cut", "cut at the limit"), ("as_published", "with cut ones, as published"),
                ("lenient", "lenient reading")) if readings else ()
        header = ["task", "accuracy", "right", "of", "chance", "time", *(title for _, title in more)]
        tables.append(markdown_table(header, [
            [name, *(format_number(record.get(key)) for key in ("accuracy", "correct", "count", "chance")),
             format_duration(record["seconds"]) if is_number(record.get("seconds")) else "-",
             *(format_number(record.get(key)) for key, _ in more)]
            for name, record in graded.items()]))
    return tables


def _kernel_table(log: StageLog) -> list[str]:
    """What the fused operations ran, and the times of what was measured; nothing where the fixed rules chose."""
    about = log.last("kernels")
    chosen, asked, times, left_out = (about.get(name) if isinstance(about.get(name), dict) else {}
                                      for name in ("chosen", "asked", "milliseconds", "left_out"))
    rows = []
    for operation in sorted({*chosen, *asked}):
        others = {name: ms for name, ms in (times.get(operation) or {}).items()}
        name = asked.get(operation, chosen.get(operation))
        mine = others.pop(name, None)
        rows.append([operation, f"{name} (asked for)" if operation in asked else name,
                     ", ".join(f"{other} {format_number(ms, 3)}" for other, ms in others.items()) or "-",
                     format_number(mine, 3)])
    if not rows:
        return []
    outs = [f"- left out: `{both}`, {why}" for both, why in left_out.items()]
    return [markdown_table(["fused operation", "runs", "others, ms", "ms forward and backward"], rows, left=3),
            *([*outs, ""] if outs else [])]


def training_results(log: StageLog) -> list[list[str]]:
    """Name and value of each result of a stage that trains."""
    model, done, rows = log.last("model"), log.last("done"), []

    def add(name: str, value: Any, digits: int = 4) -> None:
        if is_number(value):
            rows.append([name, format_number(value, digits)])

    add("parameters", model.get("parameters"))
    add("FLOPs of a token", model.get("flops_per_token"), 0)
    steps = [record["step"] for kind in ("train", "rl", "done") for record in log.all(kind)
             if is_number(record.get("step"))]
    if steps:
        planned = f" of {format_number(model['num_iterations'])}" if is_number(model.get("num_iterations")) else ""
        rows.append(["steps", f"{max(steps):,}{planned}"])
    tokens = log.last("train").get("tokens")
    add("tokens", tokens)
    if is_number(tokens) and model.get("parameters"):
        add("tokens a parameter", tokens / model["parameters"], 1)
    add("conversations", model.get("conversations"))
    add("processes", model.get("world_size"))
    if model.get("dtype"):
        rows.append(["number format", str(model["dtype"]).removeprefix("torch.")])
    add("training loss at the end, smoothed", log.last("train").get("smooth_loss"))
    for key, name in (("bpb", "validation bits per byte"), ("loss", "validation loss")):
        values = log.series("val", key)[1]
        if values:
            rows.append([f"{name} at the end", format_number(values[-1])])
            rows.append([f"{name}, lowest", format_number(min(values))])
    speeds, mfus = log.series("train", "tokens_per_second")[1], log.series("train", "mfu")[1]
    if speeds:
        rows.append(["tokens a second, median", f"{statistics.median(speeds):,.0f}"])
    if mfus:
        rows.append(["model FLOPs utilisation, median", f"{statistics.median(mfus):.1%}"])
    rewards = log.series("rl", "reward")[1]
    if rewards:
        rows.append(["reward, first and last step", f"{format_number(rewards[0])}, {format_number(rewards[-1])}"])
    pass_rates = log.all("pass")
    for name in (pass_rates[-1] if pass_rates else {}):
        if name.startswith("pass@"):
            before, after = (format_number(pass_rates[i].get(name)) for i in (0, -1))
            rows.append([f"{name}, before and after", f"{before}, {after}"])
    add("CORE at the end", log.last("core").get("core"))
    if verdict := verdict_of(log):
        rows.append(["verdict, end against beginning", verdict])
    if is_number(done.get("peak_memory")):
        rows.append(["memory of the GPU, most", in_words(done["peak_memory"])])
    if is_number(done.get("seconds")):
        rows.append(["time of the last piece" if log.resumes else "time", format_duration(done["seconds"])])
    return rows


def verdict_of(log: StageLog) -> str:
    """Whether the stage taught anything, in words; "" where its log does not say."""
    verdict = log.last("verdict")
    return f"{verdict['word']}: {verdict.get('text', '')}" if isinstance(verdict.get("word"), str) else ""


def evaluation_results(log: StageLog) -> list[list[str]]:
    """Name and value of each result of a stage that does not train: every number in its last record of each kind."""
    rows = []
    for kind in dict.fromkeys(record["kind"] for record in log.records):
        if kind not in ("start", "end", "task"):
            values = {name: value for name, value in log.last(kind).items() if is_number(value)}
            rows += [[name if name == kind else f"{kind}: {name}", format_number(value)]
                     for name, value in values.items()]
    chatcore = name_of_chatcore(log.last("chatcore"))
    return [[chatcore if name == "chatcore" else name, value] for name, value in rows]


# ---- summary

def summary_section(logs: dict[str, StageLog]) -> str:
    """The scores of all stages beside the published ones; for a small world, its own tasks beside chance; the time."""
    scores, chance = scores_by_column(logs), chance_by_task(logs)
    names = dict.fromkeys(name for column in scores.values() for name in column)
    world = any(name.startswith("World-") for name in names)
    shown = (*PUBLISHED, *((*SMALL_WORLD_TASKS, "World-Facts", ABOVE_CHANCE) if world else ()))
    others = [name for name in names if name not in shown]

    def row(name: str, reference: str) -> list[str]:
        return [name, *(format_number(scores[column].get(name)) for column in COLUMNS), reference]

    lines = ["## Summary", "",
             markdown_table(["task", *COLUMNS, "published d20"],
                            [row(name, format_number(PUBLISHED.get(name))) for name in (*PUBLISHED, *others)]),
             "The published numbers are those of depth 20: CORE of its base model, the others after SFT.", ""]
    if world:
        rows = [row(name, format_number(chance.get(name))) for name in ("World-Facts", *SMALL_WORLD_TASKS)]
        lines += ["The built-in small world, asked in wordings that training did not hold:", "",
                  markdown_table(["task", *COLUMNS, "chance"], [*rows, row(ABOVE_CHANCE, "0")])]
    doubtful = [f"- **{TITLES[stage]}: {verdict_of(log)}**" for stage, log in logs.items()
                if log.last("verdict").get("word") in ("worse", "no change")]
    if doubtful:
        lines += ["Stages whose end is no better than their beginning:", "", *doubtful, ""]
    published = f" (published, d20 on eight H100: {PUBLISHED_TIME})" if not world else ""
    lines.append(f"Total wall-clock time: {format_duration(wall_clock_seconds(logs))}{published}\n")
    return "\n".join(lines)
