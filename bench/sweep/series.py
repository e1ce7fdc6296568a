"""A miniseries: the same arms at several depths, and lines through their losses."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from bench.measure import table
from bench.sweep.stats import Estimate


def line_through(x: Sequence[float], y: Sequence[float]) -> tuple[Estimate, float, float]:
    """Return slope, intercept and the largest residual of the least-squares line through log x, log y.

    The error of the slope is that of independent residuals; None with two points, which have none.
    """
    a, b = np.log(np.asarray(x, dtype=np.float64)), np.log(np.asarray(y, dtype=np.float64))
    centred = a - a.mean()
    slope = float((centred * b).sum() / (centred ** 2).sum())
    intercept = float(b.mean() - slope * a.mean())
    residuals = b - intercept - slope * a
    error = math.sqrt((residuals ** 2).sum() / (len(a) - 2) / (centred ** 2).sum()) if len(a) > 2 else None
    return Estimate(slope, error), intercept, float(np.abs(residuals).max())


def fit_arms(found: dict[int, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Return for each arm its depths, FLOPs and bits per byte, and the line through them in log-log.

    found: by depth, what `bench.sweep.report.compare` returns.
    """
    fits: dict[str, dict[str, Any]] = {}
    for depth, entries in sorted(found.items()):
        for entry in entries:
            if entry["seeds"]:
                fit = fits.setdefault(entry["arm"], {"arm": entry["arm"], "depths": [], "flops": [], "bpb": []})
                fit["depths"].append(depth)
                fit["flops"].append(float(np.mean([row["flops"] for row in entry["seeds"]])))
                fit["bpb"].append(entry["bpb"].value)
    for fit in fits.values():
        if len(set(fit["flops"])) > 1:
            fit["slope"], fit["intercept"], fit["residual"] = line_through(fit["flops"], fit["bpb"])
    return list(fits.values())


def equivalent(fit: dict[str, Any], bpb: float) -> float | None:
    """Return the FLOPs at which the line of an arm has this loss; None outside what was measured of it."""
    if "slope" not in fit or not min(fit["bpb"]) <= bpb <= max(fit["bpb"]) or not fit["slope"].value:
        return None
    return math.exp((math.log(bpb) - fit["intercept"]) / fit["slope"].value)


def section(found: dict[int, list[dict[str, Any]]], fits: Sequence[dict[str, Any]]) -> str:
    """Return the report's section on a miniseries."""
    from bench.sweep.report import signed

    first = fits[0]
    rows = []
    for entry in (entry for entries in found.values() for entry in entries):
        depth = next(depth for depth, entries in found.items() if any(each is entry for each in entries))
        if "bpb_difference" not in entry:
            continue
        flops = float(np.mean([row["flops"] for row in entry["seeds"]]))
        needed = equivalent(first, entry["bpb"].value) if first["arm"] != entry["arm"] else None
        rows.append([entry["arm"], f"d{depth}", f"{flops:.2e}", f"{entry['bpb'].value:.4f}",
                     signed(entry["bpb_difference"]), f"{entry['percent']:+.2f} %", entry["verdict"],
                     f"{needed / flops:.2f}" if needed else "outside"])
    slopes = [[fit["arm"], ", ".join(f"d{depth}" for depth in fit["depths"]), signed(fit["slope"]),
               f"{100 * fit['residual']:.2f} %"] for fit in fits if "slope" in fit]
    return "\n".join([
        "\n## By depth\n",
        "A straight line through log bits per byte against log FLOPs. A power law with an offset would have a third "
        "number, which so few depths, within one or two powers of ten, cannot tell from the slope. Nothing is said of "
        "FLOPs outside what was measured: where the lines lead beyond, nobody knows.\n",
        table(["arm", "depths", "slope", "largest residual"], slopes, left=(0, 1)), "",
        "FLOPs factor: how many times the arm's FLOPs the first arm needs for the same loss, by its line; \"outside\" "
        "where that line was not measured.\n",
        table(["arm", "depth", "FLOPs", "held-out bpb", "difference", "in %", "verdict", "FLOPs factor"], rows)]) + "\n"
