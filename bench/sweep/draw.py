"""The plots of a sweep, as SVG files. Only drawing imports matplotlib."""

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench.sweep.stats import ERRORS, Estimate
from nanochat.files import atomic_write
from nanochat.report.plots import BLUE, LIGHT_BLUE, ORANGE, plain_matplotlib

POINTS = 60  # of a line along a run: means over so many equal parts


def draw(out: Path, found: dict[int, list[dict[str, Any]]], losses: dict[int, dict[str, list[np.ndarray]]],
         fits: Sequence[dict[str, Any]], say: Callable[[str], object]) -> list[str]:
    """Draw what there is, and return the names of the files.

    Args:
        out: folder of the files.
        found: by depth, what `bench.sweep.report.compare` returns.
        losses: by depth and arm, the difference of the training loss at each step, of each seed.
        fits: what `bench.sweep.series.fit_arms` returns; empty without a miniseries.
        say: called where nothing can be drawn.
    """
    names = []
    try:
        with plain_matplotlib():
            for depth, entries in found.items():
                several = f"_d{depth}" if len(found) > 1 else ""
                names += _save(out, f"loss{several}.svg", lambda figure, depth=depth: _along(figure, losses[depth]))
                names += _save(out, f"bpb{several}.svg", lambda figure, entries=entries: _final(figure, entries))
            if fits:
                names += _save(out, "depths.svg", lambda figure: _series(figure, fits))
    except ImportError as error:
        say(f"no plots: {error}")
    return names


def _save(out: Path, name: str, fill: Callable[[Any], bool]) -> list[str]:
    """Write a figure that `fill` draws. Return its name, nothing where there was nothing to draw."""
    import matplotlib
    from matplotlib.figure import Figure
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": name})
    figure = Figure(figsize=(7.5, 3.8), layout="constrained")
    if not fill(figure):
        return []
    picture = io.BytesIO()
    figure.savefig(picture, format="svg", metadata={"Date": None})
    with atomic_write(out / name) as file:
        file.write(picture.getvalue())
    return [name]


def _along(figure: Any, losses: dict[str, list[np.ndarray]]) -> bool:
    """Draw the difference of the training loss along the run: mean over seeds, and one error over seeds each way."""
    axes = figure.add_subplot()
    drawn = False
    for arm, each in losses.items():
        if not each:
            continue
        parts = np.array([[part.mean() for part in np.array_split(one, min(POINTS, len(one)))] for one in each])
        steps = np.array([part.mean() + 1 for part in np.array_split(np.arange(len(each[0])), parts.shape[1])])
        line, = axes.plot(steps, parts.mean(0), linewidth=1.4, label=arm)
        if len(each) > 1:
            error = parts.std(0, ddof=1) / np.sqrt(len(each))
            axes.fill_between(steps, parts.mean(0) - error, parts.mean(0) + error, color=line.get_color(), alpha=0.2,
                              linewidth=0)
        late = parts[:, parts.shape[1] // 5:]  # the beginning of a run would hide all that follows
        low, high = axes.get_ylim() if drawn else (0.0, 0.0)
        axes.set_ylim(min(low, 1.15 * late.min()), max(high, 1.15 * late.max()))
        drawn = True
    if drawn:
        _finish(axes, "training loss minus that of the first arm, same batches", "step", "nats")
    return drawn


def _final(figure: Any, entries: Sequence[dict[str, Any]]) -> bool:
    """Draw the difference of the held-out bits per byte of each arm: each seed, their mean and two errors each way."""
    rows = [entry for entry in entries if "bpb_difference" in entry]
    if not rows:
        return False
    axes = figure.add_subplot()
    for place, entry in enumerate(rows):
        seeds = [row["bpb_difference"].value for row in entry["seeds"] if "bpb_difference" in row]
        axes.plot(seeds, [place - 0.12] * len(seeds), "o", color=LIGHT_BLUE, markersize=4)
        mean: Estimate = entry["bpb_difference"]
        axes.errorbar(mean.value, place, xerr=ERRORS * (mean.error or 0.0), fmt="D", color=BLUE, markersize=5,
                      capsize=3)
    axes.set_yticks(range(len(rows)), [entry["arm"] for entry in rows], fontsize=8)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.axvline(0, color=ORANGE, linewidth=1)
    _finish(axes, "held-out bits per byte minus the first arm's: seeds, mean, ± 2 errors", "bits per byte", "",
            legend=False)
    return True


def _series(figure: Any, fits: Sequence[dict[str, Any]]) -> bool:
    """Draw bits per byte against FLOPs, both logarithmic, and the fitted lines between the points."""
    axes = figure.add_subplot()
    for fit in fits:
        flops, bpb = np.array(fit["flops"]), np.array(fit["bpb"])
        points, = axes.plot(flops, bpb, "o", markersize=4, label=fit["arm"])
        if "slope" in fit:
            line = np.geomspace(flops.min(), flops.max(), 50)
            axes.plot(line, np.exp(fit["intercept"]) * line ** fit["slope"].value, color=points.get_color(),
                      linewidth=1.2)
    axes.set_xscale("log")
    axes.set_yscale("log")
    for formatter in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        formatter("{x:.3g}")
    _finish(axes, "held-out bits per byte by depth", "training FLOPs", "bits per byte")
    return True


def _finish(axes: Any, title: str, x: str, y: str, legend: bool = True) -> None:
    axes.set_title(title, fontsize=9)
    axes.set_xlabel(x, fontsize=8)
    axes.set_ylabel(y, fontsize=8)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25)
    if legend:
        axes.legend(fontsize=7)
