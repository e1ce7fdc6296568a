"""The pictures of the report. Importing this needs nothing; drawing needs matplotlib, and works without a screen."""

from pathlib import Path
from typing import Any

from nanochat.report.card import COLUMNS, PUBLISHED, STAGES, TRAINING, WORLD, Run, accuracies, chances

INK, FAINT, GOOD = "#1f5fa8", "#b8cfe8", "#c8642d"


def draw(runs: dict[str, Run], folder: Path) -> dict[str, list[str]]:
    """Draw what there is to draw into `folder`. Returns the names of the files by stage, those of the whole under "summary".

    Raises ModuleNotFoundError without matplotlib.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    def save(figure: Any, name: str) -> str:
        FigureCanvasAgg(figure)  # not pyplot: no state of the whole process, no screen
        figure.savefig(folder / name, dpi=110, format="png")
        return name

    drawn: dict[str, list[str]] = {}
    for stage in TRAINING:
        if stage in runs and (panels := panels_of(runs[stage])):
            figure = Figure(figsize=(9.5, 2.9 * ((len(panels) + 1) // 2)), layout="constrained")
            figure.suptitle(STAGES[stage])
            for place, (title, lines) in enumerate(panels.items()):
                axes = figure.add_subplot((len(panels) + 1) // 2, 2, place + 1)
                curve(axes, title, lines)
            drawn[stage] = [save(figure, f"{len(drawn):02d}-{stage}.png")]
    pictures = []
    values, chance = accuracies(runs), chances(runs)
    for name, tasks, beside, label in (("tasks", list(PUBLISHED), PUBLISHED, "published d20"),
                                       ("world", ["World-Facts", *WORLD], chance, "chance")):
        present = [task for task in tasks if any(task in values[column] for column in COLUMNS)]
        if set(present) - {"SpellingBee"}:  # that one alone stands in both
            figure = Figure(figsize=(9.5, 3.6), layout="constrained")
            bars(figure.add_subplot(), present, {column: values[column] for column in COLUMNS}, beside, label)
            pictures.append(save(figure, f"90-{name}.png"))
    if pictures:
        drawn["summary"] = pictures
    return drawn


def panels_of(run: Run) -> dict[str, list[tuple[str, list[float], list[float]]]]:
    """What to plot of a stage: title → lines of (label, steps, values); only what has values."""
    kind = "rl" if run.stage == "rl" else "train"
    if kind == "rl":
        rates = sorted({name for row in run.all("pass") for name in row if name.startswith("pass@")}, key=lambda name: (len(name), name))
        wanted = {"reward": [("", kind, "reward")], "problems solved": [(name, "pass", name) for name in rates],
                  "tokens of an answer": [("", kind, "sequence_length")],
                  "learning rate, as a part of the full one": [("", kind, "lr_scale")]}
    else:
        wanted = {"training loss": [("each step", kind, "loss"), ("smoothed", kind, "smooth_loss")],
                  "validation bits per byte": [("", "val", "bpb")], "validation loss": [("", "val", "loss")],
                  "learning rate, as a part of the full one": [("", kind, "lr_scale")],
                  "tokens a second": [("", kind, "tokens_per_second")], "CORE": [("", "core", "core")]}
    panels = {}
    for title, lines in wanted.items():
        found = [(label, *run.series(kind, name)) for label, kind, name in lines]
        if found := [line for line in found if line[1]]:
            panels[title] = found
    if len(panels.get("CORE", [("", [], [])])[0][1]) < 2:
        panels.pop("CORE", None)
    return panels


def curve(axes: Any, title: str, lines: list[tuple[str, list[float], list[float]]]) -> None:
    """Lines over steps. The first of two is the faint one behind the other."""
    for place, (label, steps, values) in enumerate(lines):
        faint = len(lines) == 2 and place == 0
        colour = FAINT if faint else INK if len(lines) <= 2 else None
        axes.plot(steps, values, color=colour, linewidth=0.8 if faint else 1.4, label=label or None,
                  marker="o" if len(steps) < 30 else None, markersize=2.5)
    if title == "training loss":  # what happens later is what one wants to see, not the fall of the first steps
        late = sorted(value for _, steps, values in lines for value in values[len(values) // 20:])
        if late and late[-1] > late[0]:
            axes.set_ylim(late[0] - 0.05 * (late[-1] - late[0]), late[-1] + 0.05 * (late[-1] - late[0]))
    axes.set_title(title, fontsize=9)
    axes.set_xlabel("step", fontsize=8)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25)
    if len(lines) > 1:
        axes.legend(fontsize=7)


def bars(axes: Any, tasks: list[str], values: dict[str, dict[str, float]], beside: dict[str, float | None], label: str) -> None:
    """A group of bars for each task, one for each column that exists, and a mark at what `beside` says."""
    columns = [column for column in values if any(task in values[column] for task in tasks)]
    width = 0.8 / max(1, len(columns))
    shades = dict(zip(COLUMNS, ("#9fb8d1", "#5f93c6", INK, "#12365f")))
    for place, column in enumerate(columns):
        at = [i + width * (place - (len(columns) - 1) / 2) for i, task in enumerate(tasks) if task in values[column]]
        axes.bar(at, [values[column][task] for task in tasks if task in values[column]], width, color=shades.get(column), label=column)
    marked = [(i, beside[task]) for i, task in enumerate(tasks) if beside.get(task) is not None]
    if marked:
        axes.hlines([y for _, y in marked], [i - 0.45 for i, _ in marked], [i + 0.45 for i, _ in marked], color=GOOD, linewidth=2,
                    label=label)
    axes.set_xticks(range(len(tasks)), tasks, fontsize=8)
    axes.tick_params(axis="y", labelsize=8)
    axes.grid(axis="y", alpha=0.25)
    axes.legend(fontsize=8)
