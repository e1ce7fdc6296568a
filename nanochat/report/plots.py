"""The plots of the report. Only drawing imports matplotlib, and it needs no display."""

import io
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from nanochat.report.runs import (
    COLUMNS,
    PUBLISHED,
    SMALL_WORLD_TASKS,
    TITLES,
    StageLog,
    chance_by_task,
    scores_by_column,
)

BLUE, LIGHT_BLUE, ORANGE = "#1f5fa8", "#b8cfe8", "#c8642d"
COLUMN_COLOURS = dict(zip(COLUMNS, ("#9fb8d1", "#5f93c6", BLUE, "#12365f")))

Line = tuple[str, list[float], list[float]]  # label, steps, values


@contextmanager
def plain_matplotlib() -> Iterator[None]:
    """Within the block, matplotlib is as it ships: no settings of the user, no display, no backend but Agg.

    Notebooks set MPLBACKEND for every process that they start, to a module of their own environment. Where that module
    is missing, matplotlib cannot be imported.
    """
    users = os.environ.pop("MPLBACKEND", None)
    try:
        import matplotlib
    finally:
        if users is not None:
            os.environ["MPLBACKEND"] = users
    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of letters that no font has, for example
        matplotlib.rcdefaults()
        yield


def draw(logs: dict[str, StageLog], note: Callable[[str], object] = lambda text: None) -> dict[str, dict[str, bytes]]:
    """Draw the curves of each stage that trains, and the scores of all stages. What cannot be drawn is left out.

    note: called with a sentence for what is left out, and why.

    Returns:
        By stage, PNG files by name; those of the scores under "summary".
    """
    drawn: dict[str, dict[str, bytes]] = {}
    try:
        with plain_matplotlib():
            for stage, log in logs.items():
                if log.trains:
                    _try_to_draw(drawn, stage, f"{len(drawn):02d}-{stage}.png", note,
                                 lambda figure, log=log: _draw_stage(figure, log))
            for name in ("tasks", "world"):
                _try_to_draw(drawn, "summary", f"90-{name}.png", note,
                             lambda figure, name=name: _draw_scores(figure, logs, name))
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in ("matplotlib", "PIL", "numpy"):
            note(f"There are no plots: {_in_words(error)}.")
        else:
            note("There are no plots, as matplotlib is not installed: `uv pip install '.[report]'` in the project's "
                 "folder installs it, then `python -m nanochat.report generate` again.")
    except Exception as error:  # an installation that is broken in any way costs the pictures, not the report
        note(f"There are no plots: matplotlib cannot be used ({_in_words(error)}).")
    return drawn


def _try_to_draw(drawn: dict[str, dict[str, bytes]], stage: str, name: str, note: Callable[[str], object],
                 fill: Callable[[Any], bool]) -> None:
    """Draw one picture and add it to `drawn`. fill: draws on a figure, and returns whether there is anything."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    data = io.BytesIO()
    try:
        figure = Figure(layout="constrained")
        FigureCanvasAgg(figure)  # not pyplot, which keeps global state and may look for a display
        if not fill(figure):
            return
        figure.savefig(data, dpi=110, format="png")
    except Exception as error:  # whatever the library does not like in the numbers or the fonts
        note(f"The plot of {TITLES.get(stage, 'the scores')} could not be drawn ({_in_words(error)}).")
        return
    drawn.setdefault(stage, {})[name] = data.getvalue()


def _in_words(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _draw_stage(figure: Any, log: StageLog) -> bool:
    """Draw the curves of a stage."""
    panels = panels_of(log)
    rows = (len(panels) + 1) // 2
    figure.set_size_inches(9.5, 2.9 * max(1, rows))
    figure.suptitle(TITLES[log.stage])
    for number, (title, lines) in enumerate(panels.items(), start=1):
        draw_curves(figure.add_subplot(rows, 2, number), title, lines)
    return bool(panels)


def _draw_scores(figure: Any, logs: dict[str, StageLog], name: str) -> bool:
    """Draw the scores of all stages on the published tasks (name "tasks"), or on those of the small world."""
    scores = scores_by_column(logs)
    tasks, reference, label = (list(PUBLISHED), PUBLISHED, "published d20") if name == "tasks" else (
        ["World-Facts", *SMALL_WORLD_TASKS], chance_by_task(logs), "chance")
    present = [task for task in tasks if any(task in scores[column] for column in COLUMNS)]
    if not set(present) - {"SpellingBee"}:  # this task is in both lists
        return False
    figure.set_size_inches(9.5, 3.6)
    draw_bars(figure.add_subplot(), present, scores, reference, label)
    return True


def panels_of(log: StageLog) -> dict[str, list[Line]]:
    """The panels of a stage: title → lines. Only lines with values, and panels with lines, are in it."""
    kind = "rl" if log.stage == "rl" else "train"
    learning_rate = [("", kind, "lr_scale")]
    if kind == "rl":
        pass_rates = sorted({name for record in log.all("pass") for name in record if name.startswith("pass@")},
                            key=lambda name: (len(name), name))
        wanted = {"reward": [("", kind, "reward")], "problems solved": [(name, "pass", name) for name in pass_rates],
                  "tokens of an answer": [("", kind, "sequence_length")],
                  "learning rate, as a part of the full one": learning_rate}
    else:
        wanted = {"training loss": [("each step", kind, "loss"), ("smoothed", kind, "smooth_loss")],
                  "validation bits per byte": [("", "val", "bpb")], "validation loss": [("", "val", "loss")],
                  "learning rate, as a part of the full one": learning_rate,
                  "tokens a second": [("", kind, "tokens_per_second")], "CORE": [("", "core", "core")]}
    panels = {}
    for title, lines in wanted.items():
        found = [(label, *log.series(kind, name)) for label, kind, name in lines]
        if found := [line for line in found if line[1]]:
            panels[title] = found
    if "CORE" in panels and len(panels["CORE"][0][1]) < 2:
        del panels["CORE"]  # one point is no curve
    return panels


def draw_curves(axes: Any, title: str, lines: list[Line]) -> None:
    """Draw lines over steps. The first of two lines is drawn lighter: it is the noisy one."""
    for number, (label, steps, values) in enumerate(lines):
        light = len(lines) == 2 and number == 0
        colour = LIGHT_BLUE if light else BLUE if len(lines) <= 2 else None
        axes.plot(steps, values, color=colour, linewidth=0.8 if light else 1.4, label=label or None,
                  marker="o" if len(steps) < 30 else None, markersize=2.5)
    if title == "training loss":  # scale to what follows the first 5 %, which would hide all later changes
        late = sorted(value for _, _, values in lines for value in values[len(values) // 20:])
        if late and late[-1] > late[0]:
            margin = 0.05 * (late[-1] - late[0])
            axes.set_ylim(late[0] - margin, late[-1] + margin)
    axes.set_title(title, fontsize=9)
    axes.set_xlabel("step", fontsize=8)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25)
    if len(lines) > 1:
        axes.legend(fontsize=7)


def draw_bars(axes: Any, tasks: list[str], scores: dict[str, dict[str, float]], reference: dict[str, float | None],
              label: str) -> None:
    """Draw a group of bars for each task, one bar for each column with scores, and a mark at the reference value.

    Args:
        axes: where to draw.
        tasks: names of the groups, from left to right.
        scores: score of each task, by column.
        reference: value of each mark, by task; None or absent for no mark.
        label: name of the marks in the legend.
    """
    columns = [column for column in scores if any(task in scores[column] for task in tasks)]
    width = 0.8 / max(1, len(columns))
    for number, column in enumerate(columns):
        offset = width * (number - (len(columns) - 1) / 2)
        present = [(i + offset, scores[column][task]) for i, task in enumerate(tasks) if task in scores[column]]
        axes.bar([x for x, _ in present], [y for _, y in present], width, label=column,
                 color=COLUMN_COLOURS.get(column))
    marks = [(i, reference[task]) for i, task in enumerate(tasks) if reference.get(task) is not None]
    if marks:
        axes.hlines([y for _, y in marks], [i - 0.45 for i, _ in marks], [i + 0.45 for i, _ in marks], color=ORANGE,
                    linewidth=2, label=label)
    axes.set_xticks(range(len(tasks)), tasks, fontsize=8)
    axes.tick_params(axis="y", labelsize=8)
    axes.grid(axis="y", alpha=0.25)
    axes.legend(fontsize=8)
