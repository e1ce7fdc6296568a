"""A program for tests/test_all_ranks.py: one rank that runs several scripts in order, with a fault if one is wanted.

    python -m scripts.launch --ranks=2 tests.launched_scripts -- '[["scripts.base_train", ["--depth=2"]]]' slow

One process for all scripts: each of their own would import torch anew. The faults: "slow", rank 1 loses time in some
steps; "raise", rank 1 alone fails in its third step.
"""

import json
import sys
import time

import torch

from nanochat import distributed, rl, training
from nanochat.cli import run_main
from nanochat.distributed import init_ranks, joined_ranks
from scripts import chat_rl
from tests.helpers import module_of

FOR_ONE = ("scripts.tok_train",)


def with_fault(fault: str, rank: int) -> None:
    """Put the fault into the training step of rank 1."""
    right, steps = training.train_step, []

    def step(*args, **kwargs):
        if rank == 1:
            steps.append(1)
            if fault == "slow" and len(steps) % 3 == 1:
                time.sleep(1.5)
            if fault == "raise" and len(steps) == 3:
                raise RuntimeError("made up")
        return right(*args, **kwargs)

    training.train_step = chat_rl.train_step = step


def main() -> None:
    """Run the scripts."""
    scripts, fault = json.loads(sys.argv[1]), sys.argv[2]
    torch.set_num_threads(1)
    rl.reward_of = lambda task, conversation, row, text: float(len(text) % 2)  # so that it differs
    close, distributed.close_ranks = distributed.close_ranks, lambda: None  # the scripts share one group
    with joined_ranks("cpu") as ranks:
        with_fault(fault, ranks.rank)
        for module, flags in scripts:
            if module not in FOR_ONE or ranks.is_main:
                module_of(module).main(flags)
            distributed.barrier(ranks, module)
    assert init_ranks("cpu") == ranks
    close()


if __name__ == "__main__":
    run_main(main)
