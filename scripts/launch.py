"""Run a script as several processes, one a GPU, as torchrun does.

    python -m scripts.launch --ranks=8 scripts.base_train -- --depth=20 --run=NAME

Beside torchrun: after Ctrl-C, SIGTERM, or when the terminal closes it waits as long as a save takes (torchrun kills
after 30 s); where a rank fails, its error is the last line; where this process is killed, the ranks save and end. See
nanochat/launcher.py. On several machines, the same command on each, with its own --node-rank (scripts/nodes.py):

    python -m scripts.launch --nnodes=2 --node-rank=0 --master-addr=host0 --ranks=8 scripts.base_train -- --depth=20
"""

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from nanochat.cli import FROM_ZERO, Range, flag, parser_of, run_main
from nanochat.launcher import Group, Job, Owner, tell_owner
from nanochat.watch import hang_seconds
from scripts.nodes import Leader, follow, persist, place_of


@dataclass
class Flags:
    """Flags of launch, before the script and its own."""

    ranks: int = flag(0, "processes; 0 = one a GPU", short="n", within=Range(0, 1024))
    max_restarts: int = flag(0, "how often to start all ranks again where one is killed, fails or hangs; they go on "
                                "from the last checkpoint", within=FROM_ZERO)
    nnodes: str = flag("", "machines; unset: NNODES of the environment, else 1")
    node_rank: str = flag("", "of this machine, from 0 on; unset: NODE_RANK")
    master_addr: str = flag("", "address of node 0; unset: MASTER_ADDR")
    master_port: str = flag("", "port at which node 0 listens; unset: MASTER_PORT, else 29500")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the ranks. Raises SystemExit with the exit code of the one that failed first."""
    parser = parser_of(Flags, __doc__ or "")
    parser.add_argument("script", help="module to run, such as scripts.base_train")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="of the script")
    flags = parser.parse_args(sys.argv[1:] if argv is None else argv)
    ranks = flags.ranks or count_gpus() or 1
    arguments = flags.arguments[flags.arguments[:1] == ["--"]:]
    argv = [sys.executable, "-m", flags.script, *arguments]
    names = ("nnodes", "node_rank", "master_addr", "master_port")
    place = place_of(*(getattr(flags, name) or os.environ.get(name.upper(), "") for name in names))
    hang_seconds()  # raises for settings that are wrong

    def start(group: Group | None = None) -> Job:
        return owner.start(flags.script, argv, ranks=ranks, group=group)

    with Owner() as owner:
        if place is None:
            job = persist(owner, start, flags.max_restarts)
        elif place.node == 0:
            with Leader(place, ranks, [shlex.join(argv[2:])]) as leader:
                job = persist(owner, lambda: leader.start(owner, 0, start), flags.max_restarts)
                leader.code = job.code
        else:
            follow(owner, place, ranks, [shlex.join(argv[2:])], lambda number, group: start(group),
                   again=flags.max_restarts > 0)
            return
    if job.code:
        tell_owner(reason=job.reason, mend=job.mend)
        raise SystemExit(job.code)


def count_gpus() -> int:
    """Return how many GPUs a program that is started here sees."""
    import torch  # takes seconds, so only where --ranks is not given
    return torch.cuda.device_count()


if __name__ == "__main__":
    run_main(main)
