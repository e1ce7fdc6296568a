"""Check a GPU in one command of eight minutes: whether it computes the right numbers, and how fast it is.

    python dev/gpu_check.py               # from the top of the checkout; writes dev/gpu_check_out/gpu_check.{json,md}
    python dev/gpu_check.py --golden ../shared/golden --minutes 8 --out results
    python dev/gpu_check.py --only=step,collectives
    python dev/gpu_check.py --more        # the measurements that do not fit into the eight minutes too

Sections come in the order of what a first minute must tell: the driver and what Triton needs; one real compiled d20
step; collectives; kernels against float64; the model; speed. Each section is a process with a time limit of its own,
and its results are written as soon as they are there: one that hangs, crashes or spoils the GPU's memory ends alone,
and what it had found until then is kept. The exit code is 0 where every check of correctness held, and 1 where one
failed, broke or found no time. Goals of speed are listed in a table of their own and do not count.

Needs Python, torch (with triton, to compile), tiktoken and numpy; pyarrow and our rustbpe for the loader's part. On a
CPU, or with --tiny, it runs small shapes, which shows that it works.
"""

import faulthandler
import json
import os
import shlex
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:  # run as a file, without an installed package
    sys.path.insert(0, str(ROOT))

from bench.measure import provenance, provenance_line, table, write_json  # noqa: E402
from dev import gpu_correctness as right  # noqa: E402
from dev import gpu_first as first  # noqa: E402
from dev import gpu_kernels as single  # noqa: E402
from dev import gpu_parts as parts  # noqa: E402
from dev import gpu_speed as fast  # noqa: E402
from dev.gpu_correctness import Report, Run, Skipped  # noqa: E402
from nanochat.cli import POSITIVE, flag, parse, run_main  # noqa: E402
from nanochat.distributed import init_ranks  # noqa: E402
from nanochat.errors import UserError  # noqa: E402
from nanochat.files import atomic_write  # noqa: E402


@dataclass
class Config:
    """Flags of gpu_check."""

    out: str = flag("", "folder for gpu_check.json and gpu_check.md; unset is $OUT, else dev/gpu_check_out")
    minutes: float = flag(8.0, "time it may take, in minutes", within=POSITIVE)
    tiny: bool = flag(False, "small shapes, as on a CPU")
    golden: str = flag("", "folder of golden values; unset is ../shared/golden where that is")
    compile: str = flag("auto", "check and time compiled blocks too: yes, no, or auto (on GPUs)")
    device: str = flag("", "cuda or cpu; unset takes the GPU if there is one")
    only: str = flag("", "names of sections to run, separated by commas; unset means all but those of --more")
    more: bool = flag(False, "run the sections too for which eight minutes are not enough")
    one_process: bool = flag(False, "run all sections in this process: no time limits, and a crash ends them all")
    child: bool = flag(False, "this is the process of the one section in --only; it writes its results alone")


@dataclass(frozen=True)
class Part:
    """One function of a section.

    Attributes:
        name: of its results
        work: does it
        counts: whether a failure fails the check
    """

    name: str
    work: Callable[[Run, Report], None]
    counts: bool = True


@dataclass(frozen=True)
class Section:
    """Parts of the check that share a process.

    Attributes:
        name: as --only takes it
        parts: done in this order
        seconds: the time it is thought to take on an H100, the start of its process included
        more: whether it runs only with --more or --only
    """

    name: str
    parts: tuple[Part, ...]
    seconds: float
    more: bool = False

    @property
    def limit(self) -> float:
        """The seconds after which its process is ended."""
        return 1.5 * self.seconds + 15


SECTIONS = (
    Section("machine", (Part("environment", first.environment, False), Part("toolchain", first.toolchain),
                        Part("ceilings", fast.ceilings, False)), 25),
    Section("step", (Part("first_step", first.first_step),), 100),
    Section("collectives", (Part("collectives", first.collectives),), 25),
    Section("kernels", (Part("slc2", single.slc2), Part("loss_kernel", single.loss_kernel),
                        Part("attention", single.attention), Part("one_token", single.one_token),
                        Part("projections", single.projections)), 80),
    Section("model", (Part("twin", right.twin), Part("golden", right.golden), Part("head_loss", right.head_loss),
                      Part("state", right.state)), 40),
    Section("engine", (Part("graphs", single.graphs), Part("engine", right.engine)), 40),
    Section("training", (Part("compiled", right.compiled), Part("optimizer", right.optimizer),
                         Part("no_waiting", right.no_waiting), Part("learning", right.learning)), 70),
    Section("training_speed", (Part("training", fast.training, False),), 55),
    Section("decoding_speed", (Part("decoding", fast.decoding, False),), 45),
    Section("choice", (Part("choice", parts.choice),), 80, more=True),
    Section("slc2_speed", (Part("slc2_speed", parts.slc2_speed, False),), 50, more=True),
    Section("profile", (Part("kernels", fast.kernels, False),), 40, more=True),
    Section("head_speed", (Part("head_speed", parts.head_speed, False),), 25, more=True),
    Section("fp8_speed", (Part("fp8", parts.fp8, False),), 20, more=True),
    Section("loader", (Part("loader", fast.loader),), 30, more=True),
    Section("kernel_table", (Part("kernel_table", parts.kernel_table, False),), 35, more=True),
    Section("evaluation", (Part("evaluation", parts.evaluation, False),), 35, more=True),
    Section("training_more", (Part("training_more", fast.training_more, False),), 100, more=True),
)


# --- in the process of a section --------------------------------------------------------------------------------------

def do(part: Part, run: Run, save: Callable[[dict[str, Any]], None] = lambda result: None) -> dict[str, Any]:
    """Run one part and return what happened; it never raises.

    "status" is passed, failed, measured, skipped or broken. save is called with the results so far, "status" being
    "running", where the part asks for it.
    """
    report, began, result = Report(), time.monotonic(), {"name": part.name, "counts": part.counts}

    def now(status: str) -> dict[str, Any]:
        return {**result, "status": status, "seconds": time.monotonic() - began, **asdict(report)}
    run.save = lambda: save(now("running"))
    run.save()
    try:
        part.work(run, report)
        held = all(check["ok"] for check in report.checks)
        status = "measured" if not report.checks else "passed" if held else "failed"
    except Skipped as reason:
        status, result["why"] = "skipped", str(reason)
    except Exception as error:  # anything may break here; the other parts still count
        status, result["why"] = "broken", f"{type(error).__name__}: {str(error)[:2000]}"
        result["trace"] = traceback.format_exc()[-6000:]
    return now(status)


def do_section(section: Section, run: Run, path: Path | None = None) -> list[dict[str, Any]]:
    """Run the parts of a section here. Their results so far are written to `path` whenever one begins or ends."""
    done: list[dict[str, Any]] = []
    about = provenance("") if path is not None else {}

    def save(result: dict[str, Any]) -> None:
        if path is not None:
            write_json(path, {"about": about, "parts": [*done, result]})
    for part in section.parts:
        result = do(part, run, save)
        save(result)
        done.append(result)
        fast.clean(run)
    return done


PROGRAM = [sys.executable, str(Path(__file__).resolve())]


# --- in the process that starts the sections --------------------------------------------------------------------------

def run_apart(section: Section, config: Config, out: Path, seconds: float) -> dict[str, Any]:
    """Run a section in a process of its own, for `seconds` at most.

    Returns "about", the machine, and "parts", the results.

    What the process prints goes to <out>/<section>.log. Where it crashed or was ended, the part at work is "broken",
    with the end of that log, and the parts behind it are "no time".
    """
    path, log = out / f"{section.name}.json", out / f"{section.name}.log"
    path.unlink(missing_ok=True)
    flags = {**asdict(config), "only": section.name, "out": str(out), "minutes": seconds / 60, "child": True}
    command = [*PROGRAM,
               *(f"--{name.replace('_', '-')}" + ("" if value is True else f"={value}")
                 for name, value in flags.items() if value is not False and value != "")]
    began = time.monotonic()
    with open(log, "wb") as output:
        child = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True, cwd=ROOT)
        try:
            code = child.wait(timeout=seconds)
            how = f"exit code {code}" if code >= 0 else f"killed by {signal.Signals(-code).name}"
        except subprocess.TimeoutExpired:
            how = f"no end after {seconds:.0f} s"
            child.send_signal(signal.SIGABRT)  # faulthandler prints where it hangs
            with suppress(subprocess.TimeoutExpired):
                child.wait(timeout=5)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)  # compiler processes of the section too
            child.wait()
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = {"about": None, "parts": []}
    results = found["parts"] = [*found["parts"], *no_time(section)[len(found["parts"]):]]
    crashed = next((result for result in results if result["status"] in ("running", "no time")), None)
    if crashed is not None:
        crashed["status"], crashed["why"] = "broken", how
        crashed["seconds"] = crashed["seconds"] or time.monotonic() - began
        crashed["trace"] = log.read_text(encoding="utf-8", errors="replace")[-6000:]
    return found


def no_time(section: Section) -> list[dict[str, Any]]:
    """Return the results of a section that was not begun."""
    return [{"name": part.name, "counts": part.counts, "status": "no time", "seconds": 0.0, **asdict(Report())}
            for part in section.parts]


def good(results: list[dict[str, Any]]) -> bool:
    """Return whether every part that counts passed or had a reason to be skipped.

    A failed check counts in any part.
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
            provenance_line(about) if "machine" in about else f"`{about['command']}`", "",
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


def wanted_sections(config: Config) -> list[Section]:
    """Return the sections that the flags ask for. Raises UserError for a name that is none."""
    if not config.only:
        return [section for section in SECTIONS if config.more or not section.more]
    names = [name.strip() for name in config.only.split(",")]
    if unknown := set(names) - {section.name for section in SECTIONS}:
        raise UserError(f"--only={config.only}: there is no section {', '.join(sorted(unknown))}; there are "
                        f"{', '.join(section.name for section in SECTIONS)}")
    return [section for section in SECTIONS if section.name in names]


def run_here(config: Config, sections: Sequence[Section], golden: Path | None, out: Path) -> list[dict[str, Any]]:
    """Run sections in this process and return the results of their parts."""
    device = init_ranks(config.device).device
    on_gpu = device.type == "cuda"
    compiled = config.compile == "yes" or config.compile == "auto" and on_gpu
    run = Run(device, config.tiny or not on_gpu, compiled, golden, time.monotonic() + 60 * config.minutes)
    if not config.child:
        return [result for section in sections for result in do_section(section, run)]
    faulthandler.enable()
    return do_section(sections[0], run, out / f"{sections[0].name}.json")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the sections and return the exit code.

    Raises:
        UserError: a flag is wrong
    """
    began = time.monotonic()
    config = parse(Config, argv, __doc__)
    if config.compile not in ("auto", "yes", "no"):
        raise UserError(f"--compile is yes, no or auto, not {config.compile!r}")
    sections = wanted_sections(config)
    golden = Path(config.golden).expanduser() if config.golden else ROOT.parent / "shared" / "golden"
    if config.golden and not golden.is_dir():
        raise UserError(f"--golden={config.golden} is no folder")
    out = Path(config.out or os.environ.get("OUT") or ROOT / "dev" / "gpu_check_out").expanduser().resolve()
    out.mkdir(parents=True, exist_ok=True)
    if config.child:
        run_here(config, sections, golden if golden.is_dir() else None, out)
        return 0
    command = shlex.join(["python", "dev/gpu_check.py", *(sys.argv[1:] if argv is None else argv)])
    tiny = config.tiny or config.device == "cpu" or not torch.cuda.is_available()
    about: dict[str, Any] = {"command": command}
    results: list[dict[str, Any]] = []

    def keep(section: Section, found: list[dict[str, Any]]) -> None:
        """Print and write what there is now, so that a kill loses the section at work alone."""
        for result in found:
            results.append({**result, "section": section.name})
            print(f"{section.name} / {result['name']}: {result['status']}, {result['seconds']:.1f} s "
                  f"{result.get('why', '')[:200]}", flush=True)
        write_json(out / "gpu_check.json",
                   {"about": about, "config": asdict(config), "tiny": tiny, "good": good(results),
                    "seconds": time.monotonic() - began, "parts": results})
        with atomic_write(out / "gpu_check.md") as file:
            file.write(markdown(about, results, tiny).encode())

    for section in sections:
        left = 60 * config.minutes - (time.monotonic() - began)
        if config.one_process:
            about |= provenance(command)
            keep(section, run_here(config, [section], golden if golden.is_dir() else None, out))
        elif left < section.seconds and not tiny:
            keep(section, no_time(section))
        else:
            found = run_apart(section, config, out, min(section.limit, max(left, section.seconds)))
            about |= {**(found["about"] or {}), "command": command}
            keep(section, found["parts"])
    verdict = "all checks held" if good(results) else "NOT all checks held"
    print(f"\n{markdown(about, results, tiny)}\n{verdict}; {time.monotonic() - began:.0f} s; "
          f"numbers in {out / 'gpu_check.json'}", flush=True)
    return 0 if good(results) else 1


def _run() -> None:
    raise SystemExit(main())


if __name__ == "__main__":
    run_main(_run)
