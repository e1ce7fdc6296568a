"""The report of a sweep: Markdown, JSON and plots, from the results of its runs.

Every difference is against the first arm, of the same depth and seed.
"""

import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench.measure import provenance_line, si, table, write_json
from bench.sweep.arms import Arm
from bench.sweep.draw import draw
from bench.sweep.series import fit_arms, section
from bench.sweep.stats import ERRORS, Estimate, bits_per_byte, mean_of, paired_bits, paired_loss, verdict
from nanochat.files import atomic_write
from nanochat.training import clock

WINDOWS = (0.0, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0)
RECALL = ("first", "copy", "lookup", "found")
FIGURES = ("tag", "steps", "tokens", "flops", "seconds", "tokens_per_second", "memory", "parameters", "skipped")

Results = dict[tuple[str, int], dict[str, Any]]  # of a depth, by name of the arm and seed


def signed(estimate: Estimate | None, digits: int = 4) -> str:
    """Return an estimate with its sign and error; a dash where there is none."""
    if estimate is None:
        return "-"
    error = f" ± {estimate.error:.{digits}f}" if estimate.error is not None else ""
    return f"{estimate.value:+.{digits}f}{error}"


def compare(results: Results, arms: Sequence[str], seeds: Sequence[int], last: float) -> list[dict[str, Any]]:
    """Return the figures of each arm: of each of its seeds, and over seeds. last: the part of the run at its end."""
    found = []
    for arm in arms:
        own = {seed: results[arm, seed] for seed in seeds if (arm, seed) in results}
        first = {seed: results[arms[0], seed] for seed in own if (arms[0], seed) in results} if arm != arms[0] else {}
        rows = [_of_run(seed, result, first.get(seed), last) for seed, result in own.items()]
        entry: dict[str, Any] = {"arm": arm, "seeds": rows}
        if rows:
            entry["bpb"] = mean_of([row["bpb"].value for row in rows])
        if rows and all("recall" in row for row in rows):
            entry["recall"] = {name: mean_of([row["recall"][name] for row in rows]) for name in RECALL}
        if paired := [row for row in rows if "bpb_difference" in row]:
            entry["bpb_difference"] = mean_of([row["bpb_difference"].value for row in paired])
            base = np.mean([row["bpb"].value - row["bpb_difference"].value for row in paired])
            entry["percent"] = float(100 * entry["bpb_difference"].value / base)
            entry["verdict"] = verdict(entry["bpb_difference"])
            if all("recall_difference" in row for row in paired):
                entry["recall_difference"] = {name: mean_of([row["recall_difference"][name].value for row in paired])
                                              for name in RECALL}
            if all(row["loss_difference"] is not None for row in paired):
                entry["loss_difference"] = mean_of([row["loss_difference"].value for row in paired])
        found.append(entry)
    return found


def _of_run(seed: int, own: dict[str, Any], first: dict[str, Any] | None, last: float) -> dict[str, Any]:
    """Return the figures of a run, and its differences from that of the first arm, None where that is not done."""
    held = own["held_out"]
    row = {"seed": seed, "bpb": bits_per_byte(held["nats"], held["bytes"]),
           "loss": mean_of(own["loss"][-max(1, round(last * len(own["loss"]))):]),
           **{key: own[key] for key in FIGURES}}
    if "recall" in own:  # runs of an earlier version have none
        row["recall"] = {name: float(np.mean(own["recall"][name])) for name in RECALL}
    if first is not None:
        row["bpb_difference"] = paired_bits(held["nats"], first["held_out"]["nats"], held["bytes"])
        row["loss_difference"] = paired_loss(own["loss"], first["loss"], 1 - last)
        row["windows"] = [paired_loss(own["loss"], first["loss"], *ends) for ends in zip(WINDOWS, WINDOWS[1:])]
        if "recall" in own and "recall" in first:
            row["recall_difference"] = {name: mean_of(np.subtract(own["recall"][name], first["recall"][name]))
                                        for name in RECALL}
    return row


def markdown(found: list[dict[str, Any]], last: float) -> str:
    """Return the tables of a depth."""
    rows = []
    for entry in found:
        seeds = entry["seeds"]
        if not seeds:
            rows.append([entry["arm"], *["-"] * 11])
            continue
        each = {key: mean_of([row[key] for row in seeds]).value for key in FIGURES if key != "tag"}
        difference = entry.get("bpb_difference")
        rows.append([entry["arm"], len(seeds), f"{entry['bpb'].value:.4f}", signed(difference),
                     f"{entry['percent']:+.2f} %" if difference else "-", entry.get("verdict", "-"),
                     signed(entry.get("loss_difference")), f"{each['steps']:,.0f}", si(each["tokens"]),
                     f"{each['flops']:.2e}", si(each["tokens_per_second"]), si(each["memory"]) + "B"])
    text = [table(["arm", "seeds", "held-out bpb", "difference", "in %", "verdict",
                   f"training loss, last {100 * last:g} %", "steps", "tokens", "FLOPs", "tok/s", "memory"], rows)]
    rows = []
    for entry in (entry for entry in found if "recall" in entry):
        own, less = entry["recall"], entry.get("recall_difference") or dict.fromkeys(RECALL)
        rows.append([entry["arm"], f"{own['first'].value:.3f}", f"{own['copy'].value:.3f}", signed(less["copy"], 3),
                     f"{own['lookup'].value:.3f}", signed(less["lookup"], 3), f"{100 * own['found'].value:.1f} %",
                     signed(less["found"], 3)])
    if rows:
        text += ["\nRecall, apart from the language: nats of random tokens, read for the first time and when they are "
                 "repeated; nats of a value whose key is asked again, and how often it is the likeliest token.\n",
                 table(["arm", "random", "repeated", "difference", "asked again", "difference", "right", "difference"],
                       rows)]
    rows = [[entry["arm"], row["seed"], f"{row['bpb'].value:.4f} ± {row['bpb'].error or 0:.4f}",
             signed(row.get("bpb_difference"), 5), f"{row['loss'].value:.4f}", signed(row.get("loss_difference")),
             clock(row["seconds"]), row["skipped"]] for entry in found for row in entry["seeds"]]
    if rows:
        text += ["\nEach run; ± is over held-out documents, or over steps (training loss, in nats).\n",
                 table(["arm", "seed", "held-out bpb", "difference", "training loss", "difference", "time",
                        "steps skipped"], rows)]
    if windows := [[entry["arm"], row["seed"], *(signed(part) for part in row["windows"])] for entry in found
                   for row in entry["seeds"] if row.get("loss_difference")]:
        parts = [f"{100 * a:g}-{100 * b:g} %" for a, b in zip(WINDOWS, WINDOWS[1:])]
        text += ["\nDifference of the training loss along the run, on the same batches, in nats; ± over steps.\n",
                 table(["arm", "seed", *parts], windows)]
    return "\n".join(text) + "\n"


def write_report(out: Path, results: dict[int, Results], arms: dict[int, Sequence[Arm]], seeds: Sequence[int],
                 about: dict[str, Any], state: str, last: float, say: Callable[[str], object]) -> str:
    """Write report.md, results.json and the plots. Return the first as a text.

    Args:
        results, arms: by depth. about: from `bench.measure.provenance`, and the flags.
        state: a line that says what is done. say: called where nothing can be drawn.
    """
    names = [arm.name for arm in next(iter(arms.values()))]
    found = {depth: compare(results[depth], names, seeds, last) for depth in arms}
    fits = fit_arms(found) if len(arms) > 1 else []
    differences = {depth: {name: [np.subtract(own["loss"], first["loss"]) for seed in seeds
                                  if (own := results[depth].get((name, seed)))
                                  and (first := results[depth].get((names[0], seed)))
                                  and len(own["loss"]) == len(first["loss"])] for name in names[1:]} for depth in arms}
    plots = draw(out, found, differences, fits, say)
    text = [f"# Sweep\n\n{state}\n\n{provenance_line(about)}\n",
            f"Differences are against the first arm, {names[0]}, with the same seed: the same order of documents. ± is "
            "one standard error; in the first table over seeds, and those decide: kept is below "
            f"−{ERRORS:g} errors, harmful above {ERRORS:g}.\n"]
    for depth, entries in found.items():
        text += [f"## d{depth}\n", markdown(entries, last)]
    if fits:
        text.append(section(found, fits))
    text += [f"![{name}]({name})" for name in plots]
    text += ["\n## Arms\n", table(["arm", "depth", "flags of base_train"],
                                 [[arm.name, f"d{depth}", f"`{shlex.join(arm.flags)}`"] for depth, each in arms.items()
                                  for arm in each], left=(0, 1, 2))]
    commits = sorted({result["where"]["commit"] or "unknown" for each in results.values() for result in each.values()})
    if len(commits) > 1:
        text.append(f"\nThe runs are of different versions of the code: {', '.join(name[:12] for name in commits)}.")
    with atomic_write(out / "report.md", "w") as file:
        file.write("\n".join(text) + "\n")
    write_json(out / "results.json", {
        **about, "rows": _plain([{"depth": depth, **entry} for depth, entries in found.items() for entry in entries]),
        "series": _plain(fits), "arms": [{"depth": depth, "name": arm.name, "text": arm.text, "flags": arm.flags}
                                         for depth, each in arms.items() for arm in each]})
    return "\n".join(text)


def _plain(value: Any) -> Any:
    if isinstance(value, Estimate):
        return {"value": value.value, "error": value.error}
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, list | tuple) else value
