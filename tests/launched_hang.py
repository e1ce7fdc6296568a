"""A program for tests/test_watch.py and tests/test_nodes.py: ranks that meet in five steps; one has an
accident in step 2.

    python -m scripts.launch --ranks=2 tests.launched_hang -- hang 1           # rank 1 sleeps for ever
    python -m scripts.launch --ranks=2 tests.launched_hang -- kill 1 FILE      # only where FILE is not there yet
    python -m scripts.launch --ranks=2 tests.launched_hang -- until FILE       # meet until FILE is there
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from nanochat.cli import run_main
from nanochat.distributed import barrier, joined_ranks, on_main
from nanochat.launcher import RESTARTED, at_step


def accident(what: str) -> None:
    """Have an accident in this process."""
    if what == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif what == "kill":
        time.sleep(0.5)  # no faster than steps are told
        os.kill(os.getpid(), signal.SIGKILL)
    elif what == "hang":
        time.sleep(600)
    elif what == "slow":
        ends = time.monotonic() + 6
        while time.monotonic() < ends:
            sum(range(100_000))


def main() -> None:
    """Run the steps."""
    what, who, *once = sys.argv[1:]
    with joined_ranks("cpu") as ranks:
        happens = not (once and Path(once[0]).exists())
        barrier(ranks, "the look for the file")
        if what == "until":
            print("met", flush=True)
        while what == "until":
            ends = torch.tensor(float(Path(who).exists()))
            dist.all_reduce(ends)
            if ends > 0:
                return
            time.sleep(0.1)
        for step in range(5):
            at_step(step)
            time.sleep(0.3)
            if step == 2 and happens and ranks.rank == int(who):
                if once:
                    Path(once[0]).touch()
                accident(what)
            dist.all_reduce(torch.ones(3))
        if what == "slow":
            on_main("slow work", lambda: time.sleep(6), ranks)
        if ranks.is_main and RESTARTED in os.environ:
            print(json.dumps([0, os.environ[RESTARTED]]), flush=True)


if __name__ == "__main__":
    run_main(main)
