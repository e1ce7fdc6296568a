"""Time of each stage and scores of a whole run, from its logs: the numbers behind the table of the README.

    bash speedrun.sh                                       # first; the logs are under $NANOCHAT_BASE_DIR
    python -m bench.speedrun --json=bench/results/speedrun_small.json

Nothing is trained or timed here. Machine and versions are those of this process: run it where the logs were written.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bench.measure import command_line, json_flag, provenance, provenance_line, table, write_results
from nanochat.cli import flag, parse, run_main
from nanochat.files import base_dir
from nanochat.report.runs import (
    StageLog,
    chance_by_task,
    logs_of_model,
    read_logs,
    scores_by_column,
    wall_clock_seconds,
)
from nanochat.report.sections import format_duration, format_number


@dataclass
class Config:
    """Flags of bench.speedrun."""

    tag: str = flag("", "which model; unset takes the one trained or evaluated last")
    json: str = json_flag()


def result_rows(logs: dict[str, StageLog]) -> list[dict[str, Any]]:
    """One row for the time of each stage, and one for each score."""
    chance = chance_by_task(logs)
    rows: list[dict[str, Any]] = [{"stage": stage, "seconds": log.seconds, "finished": log.finished,
                                   "commit": log.last("start").get("commit")} for stage, log in logs.items()]
    return rows + [{"column": column, "task": task, "score": score, "chance": chance.get(task)}
                   for column, scores in scores_by_column(logs).items() for task, score in scores.items()]


def main(argv: Sequence[str] | None = None) -> None:
    """Print and write the numbers of a run. Raises UserError where there are no logs."""
    config = parse(Config, argv, __doc__)
    folder = base_dir() / "logs"
    tag, logs = logs_of_model(read_logs(folder), config.tag or None, folder)
    about = provenance(command_line("bench.speedrun", argv))
    rows = result_rows(logs)
    times = [[row["stage"], format_duration(row["seconds"])] for row in rows if "stage" in row]
    scores = [[row["column"], row["task"], format_number(row["score"]), format_number(row["chance"])]
              for row in rows if "task" in row]
    print(f"{provenance_line(about)}\nmodel {tag}, {format_duration(wall_clock_seconds(logs))} from start to end\n\n"
          f"{table(['stage', 'time'], times)}\n\n{table(['column', 'task', 'score', 'chance'], scores, (0, 1))}",
          flush=True)
    write_results(config.json, about, config, rows, tag=tag, wall_clock_seconds=wall_clock_seconds(logs))


if __name__ == "__main__":
    run_main(main)
