"""Read the logs of a model: the last run of each stage, with its records, times and scores.

A log (see nanochat/logs.py) holds one JSON record a line. Every run of a stage appends to its log, so that a log can
hold several runs: the last one that finished counts. A run that was interrupted and resumed is one run.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from nanochat.errors import UserError
from nanochat.logs import iter_log
from nanochat.stages import STAGES

# name of a log → title of its section, in the order of the report
TITLES = {"tok_train": "Tokenizer", "tok_eval": "Tokenizer, compression",
          **{log: title for stage in STAGES.values() for log, title in stage.sections.items()}}
# column of the summary → name of the log with its scores
COLUMNS = {stage.column: stage.graded_by for stage in STAGES.values()}
# the published run of depth 20: CORE of its base model, the other scores after SFT
PUBLISHED = {"CORE": 0.1796, "ARC-Challenge": 0.2782, "ARC-Easy": 0.3864, "GSM8K": 0.0455, "HumanEval": 0.0549,
             "MMLU": 0.3166, "SpellingBee": None, "ChatCORE": 0.2322}
THIN_BYTES = 1 << 25  # of a log; of the steps in a log n times as long every n-th is kept, enough for any plot
ABOVE_CHANCE = "mean above chance"    # what ChatCORE is called where the tasks are not the published ones
SMALL_WORLD_TASKS = ("World-Questions", "World-Choice", "World-Sums", "SpellingBee")


@dataclass
class StageLog:
    """The records of one run of a stage, in order.

    A run that was interrupted resumes from a checkpoint and trains the steps after it again. `records` holds these
    steps once, as they were trained last; `segments` holds all records of each start of the program.
    """

    stage: str
    tag: str
    records: list[dict[str, Any]] = field(default_factory=list)
    segments: list[list[dict[str, Any]]] = field(default_factory=list)

    @property
    def trains(self) -> bool:
        """Whether the run trains a model; other runs train a tokenizer or evaluate."""
        return self.stage in STAGES

    @property
    def finished(self) -> bool:
        """Whether the run came to its end."""
        if self.trains:
            return any(record["kind"] == "done" for record in self.records)
        return any(record["kind"] == "end" and record.get("exit_code") == 0 for record in self.records)

    @property
    def resumes(self) -> int:
        """How often the run was interrupted and resumed."""
        return len(self.segments) - 1

    @property
    def seconds(self) -> float:
        """Running time; the pauses between the segments do not count."""
        spans = [times_of(segment) for segment in self.segments]
        return sum((max(span) - min(span)).total_seconds() for span in spans if span)

    def all(self, kind: str) -> list[dict[str, Any]]:
        """All records of a kind."""
        return [record for record in self.records if record["kind"] == kind]

    def last(self, kind: str) -> dict[str, Any]:
        """The last record of a kind; {} where there is none."""
        return next((record for record in reversed(self.records) if record["kind"] == kind), {})

    def series(self, kind: str, name: str) -> tuple[list[float], list[float]]:
        """Steps and values of `name` in the records of a kind, where both are finite numbers."""
        pairs = [(record["step"], record[name]) for record in self.all(kind)
                 if is_number(record.get("step")) and is_number(record.get(name))]
        return [float(step) for step, _ in pairs], [float(value) for _, value in pairs]


def is_number(value: Any) -> bool:
    """Is it a finite number? A bool is none."""
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an int that no float can hold
        return False


def times_of(records: Iterable[dict[str, Any]]) -> list[datetime]:
    """The times of records, without those that have no readable time with a time zone."""
    times = []
    for record in records:
        try:
            time = datetime.fromisoformat(record.get("time", ""))
        except (TypeError, ValueError):
            continue
        if time.tzinfo:
            times.append(time)
    return times


def split_runs(records: Iterable[dict[str, Any]]) -> list[StageLog]:
    """Split the records of a log into its runs. A run that resumes from a checkpoint is joined with the run before."""
    runs: list[StageLog] = []
    for record in records:
        if not isinstance(record.get("kind"), str):
            continue
        if record["kind"] == "start":
            runs.append(StageLog(str(record.get("stage", "")), str(record.get("tag", "")), [record], [[record]]))
        elif runs:
            run = runs[-1]
            run.records.append(record)
            run.segments[-1].append(record)
            first_step = record.get("start") if record["kind"] == "model" else None
            if len(runs) > 1 and is_number(first_step) and first_step > 0 and len(run.segments) == 1:
                before = runs[-2]  # its steps after the checkpoint are trained again
                kept = [old for old in before.records
                        if not (is_number(old.get("step")) and old["step"] > first_step)]
                runs[-2:] = [StageLog(run.stage, run.tag, kept + run.records, before.segments + run.segments)]
    return runs


def read_logs(folder: Path, note: Callable[[str], object] = lambda text: None) -> dict[tuple[str, str], StageLog]:
    """Return the last finished run of every log in `folder`, by stage and tag; the last run where none finished.

    note: called with a sentence for what could not be read and is left out.
    """
    found = {}
    for path in sorted(folder.glob("*.jsonl")):
        lost: list[None] = []
        try:
            stride = 1 + path.stat().st_size // THIN_BYTES
            runs = split_runs(thinned(iter_log(path, lambda lost=lost: lost.append(None)), stride))
        except OSError as error:
            note(f"{path.name} could not be read ({error.strerror}) and is left out.")
            continue
        if lost:
            note(f"{path.name} has {len(lost)} damaged or incomplete line{'s' * (len(lost) > 1)}, left out.")
        if runs and runs[-1].stage in TITLES:
            found[runs[-1].stage, runs[-1].tag] = next((run for run in reversed(runs) if run.finished), runs[-1])
    return found


def thinned(records: Iterable[dict[str, Any]], stride: int) -> Iterator[dict[str, Any]]:
    """Yield every stride-th of the records of steps, the last one before each other record, and all other records."""
    count, waiting = 0, None
    for record in records:
        if record.get("kind") in ("train", "rl"):
            waiting = record
            if count % stride == 0:
                yield record
                waiting = None
            count += 1
            continue
        if waiting is not None:
            yield waiting
            waiting = None
        yield record
    if waiting is not None:
        yield waiting


def logs_of_model(logs: dict[tuple[str, str], StageLog], tag: str | None, folder: Path
                  ) -> tuple[str, dict[str, StageLog]]:
    """Choose the logs of one model.

    Args:
        logs: all logs, from `read_logs`.
        tag: name of the model; None takes the one that was trained or evaluated last.
        folder: where the logs are, for messages.

    Returns:
        The tag, and the log of each stage in the order of the report. The log of a tokenizer does not name a model:
        the newest one is taken.

    Raises:
        UserError: where there is no log, or none of that model.
    """
    models = [log for (stage, _), log in logs.items() if not stage.startswith("tok_")]
    if tag and all(log.tag != tag for log in models):
        known = ", ".join(sorted({log.tag for log in models})) or "none"
        raise UserError(f"no log of a model named {tag!r} in {folder}; there is {known}")
    if not logs:
        raise UserError(f"there are no logs in {folder}, so there is nothing to report. Train something first "
                        "(bash speedrun.sh), or set NANOCHAT_BASE_DIR to where it was trained.")
    ends = {id(log): max((time.timestamp() for time in times_of(log.records)), default=0.0) for log in logs.values()}
    tag = tag or max(models or logs.values(), key=lambda log: ends[id(log)]).tag
    chosen: dict[str, StageLog] = {}
    for (stage, name), log in sorted(logs.items(), key=lambda item: ends[id(item[1])]):
        if name == tag or stage.startswith("tok_") and getattr(chosen.get(stage), "tag", None) != tag:
            chosen[stage] = log
    return tag, {stage: chosen[stage] for stage in TITLES if stage in chosen}


def wall_clock_seconds(logs: dict[str, StageLog]) -> float:
    """Seconds from the first start to the last end."""
    times = [time for log in logs.values() for segment in log.segments for time in times_of(segment)]
    return (max(times) - min(times) if times else timedelta()).total_seconds()


def scores_by_column(logs: dict[str, StageLog]) -> dict[str, dict[str, float]]:
    """The scores of each column of the summary (BASE, MID, SFT, RL), by task. Only scores that exist are in it."""
    scores: dict[str, dict[str, float]] = {}
    for column, stage in COLUMNS.items():
        log, values = logs.get(stage), {}
        if log is not None:
            values = {str(record.get("name")): record.get("accuracy") for record in log.all("task")}
            chatcore = log.last("chatcore")
            values[name_of_chatcore(chatcore)] = chatcore.get("chatcore")
            values["CORE"] = log.last("core").get("core")
            values["World-Facts"] = log.last("small_world").get("world")
        if column == "BASE" and not is_number(values.get("CORE")) and "base" in logs:
            values["CORE"] = logs["base"].last("core").get("core")  # base_train can measure CORE too
        scores[column] = {name: value for name, value in values.items() if is_number(value)}
    return scores


def name_of_chatcore(record: dict[str, Any]) -> str:
    """What the mean over the tasks of this record is called: ChatCORE for the published tasks alone."""
    return "ChatCORE" if record.get("data", "hub") == "hub" else ABOVE_CHANCE


def chance_by_task(logs: dict[str, StageLog]) -> dict[str, float]:
    """The accuracy of guessing, by task."""
    found = {str(record.get("name")): record.get("chance") for log in logs.values() for record in log.all("task")}
    if "base_eval" in logs:
        found["World-Facts"] = logs["base_eval"].last("small_world").get("chance")
    return {name: value for name, value in found.items() if is_number(value)}
