"""The report of a run, made from its logs: machine, time, cost, results of every stage, plots, samples, scores.

    python -m nanochat.report generate --hourly-price=24
    python -m nanochat.report reset                        # moves an old report aside; the logs stay

Sections go to report/*.md under $NANOCHAT_BASE_DIR, joined to report/report.md with the plots beside it, and are
copied to ./report.md, whose plots are in ./report_files. The old report is replaced when the new one is complete; what
could not be drawn, read or copied is left out and named. Where a log holds several runs, the last finished one counts;
a run that was stopped and resumed is one run. The report only reads logs: it can be written at any time, also while a
stage still trains.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from nanochat.cli import Range, flag, parse, run_main
from nanochat.errors import UserError
from nanochat.report.writing import reset, write


@dataclass
class Config:
    """Flags of the report."""

    tag: str = flag("", "which model; unset takes the one trained or evaluated last")
    hourly_price: float = flag(-1.0, "dollars an hour for the whole machine; unset assumes 3 for each GPU, "
                                     "and nothing without one", within=Range(0, also=-1))


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command that the first word names, `generate` or `reset`; `generate` without one.

    Raises UserError for a mistake of the user.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    command = argv.pop(0) if argv and not argv[0].startswith("-") else "generate"
    if command not in ("generate", "reset"):
        raise UserError(f"the commands of the report are generate and reset, not {command!r}")
    config = parse(Config, argv, __doc__)
    if command == "reset":
        old = reset()
        print(f"the old report was moved to {old}" if old else "there was no report")
        return
    written = write(config.tag or None, config.hourly_price if config.hourly_price >= 0 else None)
    for note in written.notes:
        print(f"note: {note}")
    places = [str(path.absolute()) for path in (written.copy, written.report) if path is not None]
    print(f"the report is in {' and in '.join(places)}")


if __name__ == "__main__":
    run_main(main)
