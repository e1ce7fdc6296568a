"""Break the real commands in every way that happens to people, and print what survived.

    python -m bench.torture --minutes=5 --seed=1           # a sample of every fault; ends within that time
    python -m bench.torture --hours=8 --only=kills,flips   # a night; words of --only are beginnings of names
    python -m bench.torture --seed=1 --only=kills-mid --case=3      # that case again
    python -m bench.torture --list

The table names each fault, how often it was tried, and what became of it. Exit code 1 where anything was lost or
changed; the folder of such a case is kept and named. The code may not be edited while this runs: commands would be
copies of the old code that import the new. The moments of a kill depend on the seed and on the speed of the
machine, so a case that is repeated is of the same kind, not the same to the microsecond.
"""

import importlib
import os
import random
import re
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before PyTorch: several commands share a few cores here

from bench.measure import command_line, json_flag, provenance, provenance_line, table, write_results
from bench.torture import BEGAN, damage, disks, downloads, kills, others, ranks
from bench.torture.judge import CHANGED, LOST, SKIPPED, SURVIVED, Verdict
from bench.torture.lab import JOBS, Lab
from bench.torture.processes import Hung, OutOfTime
from nanochat.cli import FROM_ZERO, NOT_NEGATIVE, POSITIVE, SEED, STEP_OR_LAST, flag, parse, run_main
from nanochat.errors import UserError
from nanochat.logs import print_line

FORKED = ("nanochat.run", "nanochat.rl", "nanochat.chat_data", "nanochat.evaluation.chat", "nanochat.evaluation.core",
          "nanochat.dataset.importing", "tasks.recipes", "huggingface_hub")  # see `Life`; none starts a thread
MARGIN = 5.0  # seconds kept to end everything in

Case = Callable[[Lab, random.Random, str, Callable[[str], None]], Verdict]


def _of(function: Callable, *arguments: object) -> Case:
    return lambda lab, rng, name, tell: function(lab, rng, name, *arguments, tell)


FAULTS: dict[str, tuple[str, Case]] = {
    **{f"kills-{stage}": (f"SIGKILL two to five times anywhere in {stage}, also in start, save, evaluation"
                          + (", rollout" if stage == "rl" else ""), _of(kills.kills, job))
       for stage, job in JOBS.items()},
    "kills-text": ("SIGKILL while text and tokenizer are made", kills.text_and_tokenizer),
    "signals": ("SIGTERM, SIGINT, SIGHUP at any moment of any stage", kills.signals),
    "flips": ("one flipped bit in a file of the newest checkpoint, loaded", damage.flips),
    "damaged": ("newest checkpoints flipped, cut, zeroed, deleted, exchanged; the run goes on", damage.damaged),
    "all-damaged": ("every checkpoint damaged, or all metas lost", damage.all_damaged),
    "source-damaged": ("the model that a stage began from is damaged", damage.source_damaged),
    "not-finite": ("NaN or infinity in the newest checkpoint, hash correct", damage.not_finite),
    "two-runs": ("a second run in the same folder, also by a link or with --fresh", ranks.two_runs),
    "rank-killed": ("one of two ranks, or their owner, is killed", ranks.rank_killed),
    "rank-stopped": ("one of two ranks stands still for seconds (SIGSTOP)", ranks.rank_stopped),
    "rank-hangs": ("one of two ranks stands still for good (SIGSTOP)", ranks.rank_hangs),
    "node-killed": ("one of two nodes is killed and comes back", ranks.node_killed),
    "restarted": ("a rank is killed under --max-restarts", ranks.restarted),
    "full-disk": ("a disk with less room than a run needs", disks.full_disk),
    "filled": ("a disk that is filled, or becomes read-only, while a run trains", disks.filled_meanwhile),
    "full-text": ("text and tokenizer on a full disk", disks.text_on_full_disk),
    "odd-places": ("odd folder names, no UTF-8, no home, no folder", disks.odd_places),
    "downloads": ("a hub that cuts, stalls, lies, loops; the client killed", downloads.downloads),
    "diverged": ("a ruinous learning rate after a good checkpoint", others.diverged),
    "report": ("SIGKILL while a report is written again", others.report_killed),
    "grading": ("SIGKILL while a model is graded", others.grading_killed),
    "ranks-changed": ("1, 2, 3 ranks in turn between stops", ranks.ranks_changed),
}


@dataclass
class Config:
    """Flags of bench.torture."""

    minutes: float = flag(5.0, "how long; every case is ended by then", within=POSITIVE)
    hours: float = flag(0.0, "how long, in hours; above 0 it counts instead of --minutes", within=NOT_NEGATIVE)
    seed: int = flag(1, "of all that is chosen by chance", within=SEED)
    only: str = flag("", "beginnings of names of faults, with commas between; unset: all")
    case: int = flag(-1, "only the case of this number of each fault; -1 = all", within=STEP_OR_LAST)
    times: int = flag(0, "at most this many cases of each fault; 0 = as many as there is time for",
                      within=FROM_ZERO)
    scratch: str = flag("", "folder to work in, created and removed; unset: one in the system's folder for such files")
    list: bool = flag(False, "print the faults and do nothing")
    keep_failed: bool = flag(True, "keep the folder of a case in which something was lost or changed")
    verbose: bool = flag(False, "a line for every case, not only for those that something was lost in")
    json: str = json_flag()


@dataclass(frozen=True)
class Result:
    """What became of one case."""

    fault: str
    case: int
    verdict: Verdict
    seconds: float
    about: str
    folder: str


def chosen(only: str) -> list[str]:
    """Return the names of the faults to try. Raises UserError for a beginning that no name has."""
    words = [word.strip() for word in only.split(",") if word.strip()]
    for word in words:
        if not any(name.startswith(word) for name in FAULTS):
            raise UserError(f"no fault is called {word}...; there are {', '.join(FAULTS)}")
    return [name for name in FAULTS if not words or any(name.startswith(word) for word in words)]


def try_case(lab: Lab, name: str, seed: int, case: int) -> Result:
    """Run one case. Raises OutOfTime."""
    began, told, rooms = time.monotonic(), [""], len(lab.rooms)
    try:
        verdict = FAULTS[name][1](lab, random.Random(f"{seed} {name} {case}"), f"{name}-{case}",
                                  lambda text: told.__setitem__(0, text))
    except Hung as error:
        verdict = Verdict(LOST, str(error))
    except (OutOfTime, KeyboardInterrupt):
        raise
    except Exception as error:  # a night is not ended by one case
        verdict = Verdict(LOST, f"this program itself failed: {type(error).__name__}: {error}")
        traceback.print_exc()
    own = [room for room in lab.rooms[rooms:] if room.base.parent.name == f"{name}-{case}"]
    for room in own:
        room.keep = room.keep and verdict.word in (LOST, CHANGED)
        room.close()
    kept = next((str(room.base) for room in own if room.keep), "")
    return Result(name, case, verdict, time.monotonic() - began, told[0], kept)


def try_all(lab: Lab, config: Config, names: list[str]) -> list[Result]:
    """Run the cases of the faults by turns until the time is over or all are done."""
    results: list[Result] = []
    slowest: dict[str, float] = defaultdict(float)
    case = max(config.case, 0)
    last = case + 1 if config.case >= 0 else config.times or sys.maxsize
    try:
        while case < last:
            fitting = [name for name in names if time.monotonic() + slowest[name] < lab.deadline]
            if not fitting:
                break
            for name in fitting:
                if time.monotonic() + slowest[name] > lab.deadline:
                    continue
                result = try_case(lab, name, config.seed, case)
                slowest[name] = max(slowest[name], result.seconds)
                results.append(result)
                if result.verdict.word in (LOST, CHANGED) or config.verbose:
                    print_line(f"{name} case {case}: {result.verdict.word}, {result.seconds:.0f} s. {result.about}"
                               + (f"\n    {result.verdict.note}" if result.verdict.note else "")
                               + (f"\n    {result.folder}" if result.folder else ""))
            case += 1
    except OutOfTime:
        pass
    return results


def summary(results: list[Result], names: list[str]) -> str:
    """Return the table: a row for each fault."""
    rows = []
    for name in names:
        words = Counter(result.verdict.word for result in results if result.fault == name)
        tried = sum(words.values()) - words[SKIPPED]
        why = next((result.verdict.note for result in results
                    if result.fault == name and result.verdict.word == SKIPPED), "not reached in this time")
        rows.append([name, FAULTS[name][0] + ("" if tried else f" ({why})"), tried, words[SURVIVED], words[LOST],
                     words[CHANGED]])
    rows.append(["all", "", *(sum(row[i] for row in rows) for i in range(2, 6))])
    return table(["", "fault", "times", "survived", "lost", "changed"], rows, (0, 1))


def moments(results: list[Result]) -> str:
    """Return in a line where the processes were that `kills-*` killed."""
    where: Counter[str] = Counter()
    for result in results:
        if result.fault.startswith("kills-") and result.fault != "kills-text":
            for count, word in re.findall(r"(\d+) ([^,]+)", result.about):
                where[word] += int(count)
    return f"{sum(where.values())} kills: " + ", ".join(f"{count} {word}" for word, count in where.most_common())


def _stopped(number: int, frame: object) -> None:
    raise SystemExit(128 + number)


def main(argv: Sequence[str] | None = None) -> None:
    """Try the faults and print the table. Raises SystemExit(1) where anything was lost or changed."""
    config = parse(Config, argv, __doc__)
    names = chosen(config.only)
    if config.list:
        print("\n".join(f"{name:16s}{FAULTS[name][0]}" for name in names))
        return
    if not hasattr(os, "fork"):
        raise UserError("bench.torture needs a Unix system: it copies processes with fork.")
    seconds = config.hours * 3600 or config.minutes * 60
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _stopped)
    for module in FORKED:
        importlib.import_module(module)
    scratch = Path(config.scratch or tempfile.mkdtemp(prefix="torture-"))
    about = provenance(command_line("bench.torture", argv))
    with Lab(scratch, BEGAN + seconds - MARGIN) as lab:
        results = try_all(lab, config, names)
    failed = [result for result in results if result.verdict.word in (LOST, CHANGED)]
    print_line(f"\n{provenance_line(about)}\nseed {config.seed}, {time.monotonic() - BEGAN:.0f} s\n\n"
               f"{summary(results, names)}\n\n{moments(results)}")
    for result in failed:
        print_line(f"\n{result.fault} {result.case}: {result.verdict.word}: {result.verdict.note}\n    again: "
                   f"python -m bench.torture --seed={config.seed} --only={result.fault} --case={result.case}")
    write_results(config.json, about, config, [asdict(result) for result in results])
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    run_main(main)
