"""Run a script as several processes, one a GPU, as torchrun does.

    python -m scripts.launch --ranks=8 scripts.base_train -- --depth=20 --run=NAME

Beside torchrun: after Ctrl-C, SIGTERM, or when the terminal closes it waits as long as a save takes (torchrun kills
after 30 s); where a rank fails, its error is the last line; where this process is killed, the ranks save and end. See
nanochat/launcher.py. For several machines there is torchrun.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from nanochat.cli import Range, flag, parser_of, run_main
from nanochat.launcher import Owner, tell_owner


@dataclass
class Flags:
    """Flags of launch, before the script and its own."""

    ranks: int = flag(0, "processes; 0 = one a GPU", short="n", within=Range(0, 1024))


def main(argv: Sequence[str] | None = None) -> None:
    """Run the ranks. Raises SystemExit with the exit code of the one that failed first."""
    parser = parser_of(Flags, __doc__ or "")
    parser.add_argument("script", help="module to run, such as scripts.base_train")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="of the script")
    flags = parser.parse_args(sys.argv[1:] if argv is None else argv)
    ranks = flags.ranks or count_gpus() or 1
    arguments = flags.arguments[flags.arguments[:1] == ["--"]:]
    with Owner() as owner:
        job = owner.start(flags.script, [sys.executable, "-m", flags.script, *arguments], ranks=ranks)
        code = owner.wait(job)
    if code:
        tell_owner(reason=job.reason)
        raise SystemExit(code)


def count_gpus() -> int:
    """Return how many GPUs a program that is started here sees."""
    import torch  # takes seconds, so only where --ranks is not given
    return torch.cuda.device_count()


if __name__ == "__main__":
    run_main(main)
