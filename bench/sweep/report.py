"""The report of a sweep: Markdown and JSON, from the results of its runs. Every difference is against the first arm."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.measure import provenance_line, si, table, write_json
from bench.sweep.stats import Estimate, bits_per_byte, mean_of, paired_bits, paired_loss, verdict
from nanochat.files import atomic_write
from nanochat.training import clock

WINDOWS = (0.0, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0)

Results = dict[tuple[str, int], dict[str, Any]]  # by name of the arm and seed


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
        rows = []
        for seed in seeds:
            if (own := results.get((arm, seed))) is None:
                continue
            held, first = own["held_out"], results.get((arms[0], seed))
            row = {"seed": seed, "bpb": bits_per_byte(held["nats"], held["bytes"]),
                   "loss": mean_of(own["loss"][-max(1, round(last * len(own["loss"]))):]),
                   **{key: own[key] for key in ("tag", "steps", "tokens", "flops", "seconds", "tokens_per_second",
                                                "memory", "parameters")}}
            if first is not None and arm != arms[0]:
                row["bpb_difference"] = paired_bits(held["nats"], first["held_out"]["nats"], held["bytes"])
                row["loss_difference"] = paired_loss(own["loss"], first["loss"], 1 - last)
                row["windows"] = [paired_loss(own["loss"], first["loss"], *ends) for ends in zip(WINDOWS, WINDOWS[1:])]
            rows.append(row)
        entry: dict[str, Any] = {"arm": arm, "seeds": rows}
        if rows:
            entry["bpb"] = mean_of([row["bpb"].value for row in rows])
        if paired := [row for row in rows if "bpb_difference" in row]:
            entry["bpb_difference"] = mean_of([row["bpb_difference"].value for row in paired])
            base = entry["bpb"].value - entry["bpb_difference"].value
            entry["percent"] = 100 * entry["bpb_difference"].value / base
            entry["verdict"] = verdict(entry["bpb_difference"])
            losses = [row["loss_difference"] for row in paired]
            if None not in losses:
                entry["loss_difference"] = mean_of([loss.value for loss in losses])
        found.append(entry)
    return found


def markdown(found: list[dict[str, Any]], about: dict[str, Any], state: str, last: float) -> str:
    """Return the report."""
    rows = []
    for entry in found:
        seeds = entry["seeds"]
        if not seeds:
            rows.append([entry["arm"], *["-"] * 11])
            continue
        each = {key: mean_of([row[key] for row in seeds]).value for key in
                ("steps", "tokens", "flops", "tokens_per_second", "memory", "parameters")}
        difference = entry.get("bpb_difference")
        rows.append([entry["arm"], len(seeds), f"{entry['bpb'].value:.4f}", signed(difference),
                     f"{entry['percent']:+.2f} %" if difference else "-", entry.get("verdict", "first arm"),
                     signed(entry.get("loss_difference")), f"{each['steps']:,.0f}", si(each["tokens"]),
                     f"{each['flops']:.2e}", si(each["tokens_per_second"]), si(each["memory"]) + "B"])
    text = [f"# Sweep\n\n{state}\n\n{provenance_line(about)}\n",
            "Differences are against the first arm, with the same seed: the same order of documents. ± is one standard "
            "error; over seeds in the first table. Kept: below −2 errors over seeds. Harmful: above 2.\n",
            table(["arm", "seeds", "held-out bpb", "difference", "in %", "verdict",
                   f"training loss, last {100 * last:g} %", "steps", "tokens", "FLOPs", "tok/s", "memory"], rows)]
    rows = [[entry["arm"], row["seed"], f"{row['bpb'].value:.4f} ± {row['bpb'].error or 0:.4f}",
             signed(row.get("bpb_difference"), 5), f"{row['loss'].value:.4f}", signed(row.get("loss_difference")),
             clock(row["seconds"])] for entry in found for row in entry["seeds"]]
    text += ["\n## Each run\n", "± is over held-out documents, or over steps (training loss in nats).\n",
             table(["arm", "seed", "held-out bpb", "difference", "training loss", "difference", "time"], rows)]
    if windows := [[entry["arm"], row["seed"], *(signed(part) for part in row["windows"])] for entry in found
                   for row in entry["seeds"] if "windows" in row]:
        parts = [f"{100 * a:g}-{100 * b:g} %" for a, b in zip(WINDOWS, WINDOWS[1:])]
        text += ["\n## Difference of the training loss along the run\n",
                 "On the same batches, in nats; ± over steps.\n", table(["arm", "seed", *parts], windows)]
    return "\n".join(text) + "\n"


def write_report(out: Path, results: Results, arms: Sequence[tuple[str, str, Sequence[str]]], seeds: Sequence[int],
                 about: dict[str, Any], state: str, last: float) -> str:
    """Write report.md and results.json. Return the first as a text. arms: name, text and flags of each."""
    found = compare(results, [name for name, _, _ in arms], seeds, last)
    text = markdown(found, about, state, last)
    text += "\n## Arms\n\n" + table(["arm", "flags of base_train"], [[name, f"`{shlex.join(flags)}`"] for name, _, flags
                                                                    in arms], left=(0, 1)) + "\n"
    commits = sorted({result["where"]["commit"] or "unknown" for result in results.values()})
    if len(commits) > 1:
        text += f"\nThe runs are of different versions of the code: {', '.join(name[:12] for name in commits)}.\n"
    with atomic_write(out / "report.md", "w") as file:
        file.write(text)
    write_json(out / "results.json", {**about, "arms": [{"name": name, "text": said, "flags": list(flags)}
                                                       for name, said, flags in arms], "rows": _plain(found)})
    return text


def _plain(value: Any) -> Any:
    if isinstance(value, Estimate):
        return {"value": value.value, "error": value.error}
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, list | tuple) else value
