"""Check a GPU in one command of a few minutes: whether it computes the right numbers, and how fast it is.

    python dev/gpu_check.py               # from the top of the checkout; writes dev/gpu_check_out/gpu_check.{json,md}
    python dev/gpu_check.py --golden ../shared/golden --minutes 8 --out results

Needs Python, torch (with triton, to compile), tiktoken and numpy; pyarrow and our rustbpe for the loader's part. On a
CPU, or with --tiny, it runs small shapes, which shows that it works. The most important sections come first. None
starts when the time is up, and one that fails does not stop the rest. The exit code is 0 where every check of
correctness held, and 1 where one failed, broke or found no time. Goals of speed are listed in a table of their own and
do not count.
"""

import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:  # run as a file, without an installed package
    sys.path.insert(0, str(ROOT))

from bench.measure import provenance, provenance_line, table, write_json  # noqa: E402
from dev import gpu_correctness as right  # noqa: E402
from dev import gpu_kernels as single  # noqa: E402
from dev import gpu_parts as parts  # noqa: E402
from dev import gpu_speed as fast  # noqa: E402
from dev.gpu_correctness import Report, Run, Skipped  # noqa: E402
from nanochat.cli import flag, parse, run_main  # noqa: E402
from nanochat.distributed import init_ranks  # noqa: E402
from nanochat.errors import UserError  # noqa: E402
from nanochat.files import atomic_write  # noqa: E402


@dataclass
class Config:
    """Flags of gpu_check."""

    out: str = flag("", "folder for gpu_check.json and gpu_check.md; unset is $OUT, else dev/gpu_check_out")
    minutes: float = flag(8.0, "time it may take, in minutes")
    tiny: bool = flag(False, "small shapes, as on a CPU")
    golden: str = flag("", "folder of golden values; unset is ../shared/golden where that is")
    compile: str = flag("auto", "check and time compiled blocks too: yes, no, or auto (on GPUs)")
    device: str = flag("", "cuda or cpu; unset takes the GPU if there is one")
    only: str = flag("", "names of sections to run, separated by commas; unset means all")


@dataclass(frozen=True)
class Section:
    """A part of the check.

    Attributes:
        name: as --only takes it
        work: does it
        counts: whether a failure fails the check
        seconds: the time it may take on a GPU
    """

    name: str
    work: Callable[[Run, Report], None]
    counts: bool
    seconds: float


SECTIONS = (
    Section("environment", fast.environment, False, 5),
    Section("ceilings", fast.ceilings, False, 10),
    Section("slc2", single.slc2, True, 60),
    Section("loss_kernel", single.loss_kernel, True, 15),
    Section("attention", single.attention, True, 10),
    Section("one_token", single.one_token, True, 20),
    Section("projections", single.projections, True, 5),
    Section("twin", right.twin, True, 10),
    Section("golden", right.golden, True, 15),
    Section("head_loss", right.head_loss, True, 5),
    Section("state", right.state, True, 15),
    Section("graphs", single.graphs, True, 30),
    Section("slc2_speed", parts.slc2_speed, False, 40),
    Section("compiled", right.compiled, True, 60),
    Section("training", fast.training, False, 60),
    Section("decoding", fast.decoding, False, 50),
    Section("head_speed", parts.head_speed, False, 15),
    Section("engine", right.engine, True, 20),
    Section("optimizer", right.optimizer, True, 5),
    Section("no_waiting", right.no_waiting, True, 40),
    Section("learning", right.learning, True, 15),
    Section("fp8", parts.fp8, False, 10),
    Section("kernels", fast.kernels, False, 30),
    Section("loader", fast.loader, True, 20),
    Section("kernel_table", parts.kernel_table, False, 25),
    Section("evaluation", parts.evaluation, False, 25),
    Section("training_more", fast.training_more, False, 30),
)


def do(section: Section, run: Run) -> dict[str, Any]:
    """Run one section and return what happened; it never raises.

    "status" is passed, failed, measured, skipped, broken or no time.
    """
    report, began, result = Report(), time.monotonic(), {"name": section.name, "counts": section.counts}
    if run.left() < (0 if run.tiny else section.seconds):
        return {**result, "status": "no time", "seconds": 0.0, **asdict(report)}
    try:
        section.work(run, report)
        held = all(check["ok"] for check in report.checks)
        status = "measured" if not report.checks else "passed" if held else "failed"
    except Skipped as reason:
        status, result["why"] = "skipped", str(reason)
    except Exception as error:  # anything may break here; the other sections still count
        status, result["why"] = "broken", f"{type(error).__name__}: {str(error)[:2000]}"
        result["trace"] = traceback.format_exc()[-6000:]
    return {**result, "status": status, "seconds": time.monotonic() - began, **asdict(report)}


def good(results: list[dict[str, Any]]) -> bool:
    """Return whether every section that counts passed or had a reason to be skipped.

    A failed check counts in any section.
    """
    bad = [r for r in results if r["counts"] and r["status"] in ("failed", "broken", "no time")
           or not all(c["ok"] for c in r["checks"])]
    return not bad


def markdown(about: dict[str, Any], results: list[dict[str, Any]], tiny: bool) -> str:
    """Return all results as one page: what held, then the tables, then what failed."""
    rows = []
    for r in results:
        worst = [f"{c['name']}: {show(c['value'])} (must be {c['limit']})" for c in r["checks"] if not c["ok"]]
        held = f"{sum(c['ok'] for c in r['checks'])} of {len(r['checks'])}" if r["checks"] else "-"
        rows.append([r["name"], r["status"], held, f"{r['seconds']:.1f}",
                     "; ".join(worst) or r.get("why", "").split("\n")[0][:200]])
    text = ["# GPU check" + (" (small shapes: no speed below means anything)" if tiny else ""), "",
            provenance_line(about), "",
            table(["section", "status", "checks", "seconds", "what"], rows, (0, 1, 4))]
    goals = [[g["goal"], f"{g['sign']} {show(g['wish'])}", "-" if g["measured"] is None else show(g["measured"]),
              {True: "yes", False: "no", None: "-"}[g["held"]]] for r in results for g in r["goals"]]
    if goals:
        text += ["", "## goals", "", table(["goal", "wished for", "measured", "held"], goals)]
    for r in results:
        for part in r["tables"]:
            text += ["", f"## {r['name']}", "", part]
    checks = [[r["name"], c["name"], show(c["value"]), c["limit"], "yes" if c["ok"] else "NO"] for r in results
              for c in r["checks"]]
    text += ["", "## checks", "", table(["section", "check", "value", "limit", "ok"], checks, (0, 1, 4))]
    for r in results:
        if plain := fast.brief(r["numbers"]):
            text += ["", f"{r['name']}: `{plain}`"]
        if "trace" in r:
            text += ["", f"{r['name']} broke:", "", "```", r["trace"].strip(), "```"]
    return "\n".join(text) + "\n"


def show(value: Any) -> str:
    """Return a value for people: three digits, or all digits of a large one."""
    if isinstance(value, bool) or not isinstance(value, float | int):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the sections and return the exit code.

    Raises:
        UserError: a flag is wrong
    """
    began = time.monotonic()
    config = parse(Config, argv, __doc__)
    if config.compile not in ("auto", "yes", "no"):
        raise UserError(f"--compile is yes, no or auto, not {config.compile!r}")
    wanted = [name.strip()
              for name in config.only.split(",")] if config.only else [section.name for section in SECTIONS]
    if unknown := set(wanted) - {section.name for section in SECTIONS}:
        raise UserError(f"--only={config.only}: there is no section {', '.join(sorted(unknown))}; there are "
                        f"{', '.join(section.name for section in SECTIONS)}")
    golden = Path(config.golden).expanduser() if config.golden else ROOT.parent / "shared" / "golden"
    if config.golden and not golden.is_dir():
        raise UserError(f"--golden={config.golden} is no folder")
    out = Path(config.out or os.environ.get("OUT") or ROOT / "dev" / "gpu_check_out").expanduser()
    out.mkdir(parents=True, exist_ok=True)
    device = init_ranks(config.device).device
    on_gpu = device.type == "cuda"
    run = Run(device, config.tiny or not on_gpu, config.compile == "yes" or config.compile == "auto" and on_gpu,
              golden if golden.is_dir() else None, began + 60 * config.minutes)
    about, results = provenance("python dev/gpu_check.py " + " ".join(sys.argv[1:] if argv is None else argv)), []
    for section in SECTIONS:
        if section.name in wanted:
            results.append(do(section, run))
            last = results[-1]
            print(f"{section.name}: {last['status']}, {last['seconds']:.1f} s {last.get('why', '')[:200]}", flush=True)
            page = markdown(about, results, run.tiny)  # written after every section, so that a kill loses only one
            write_json(out / "gpu_check.json",
                       {"about": about, "config": asdict(config), "device": str(device), "tiny": run.tiny,
                        "seconds": time.monotonic() - began, "good": good(results), "sections": results})
            with atomic_write(out / "gpu_check.md") as file:
                file.write(page.encode())
    verdict = "all checks held" if good(results) else "NOT all checks held"
    print(f"\n{page}\n{verdict}; {time.monotonic() - began:.0f} s; "
          f"numbers in {out / 'gpu_check.json'}", flush=True)
    return 0 if good(results) else 1


def _run() -> None:
    raise SystemExit(main())


if __name__ == "__main__":
    run_main(_run)
