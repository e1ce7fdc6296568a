"""A program for tests/test_all_ranks.py: scripts.speedrun with a recipe so small that all stages take seconds.

    python -m tests.launched_speedrun 2        # stages on two ranks, on the CPU
"""

import sys
from dataclasses import replace

import torch

from nanochat.cli import run_main
from nanochat.recipe import PROFILES
from scripts import speedrun, speedrun_plan
from scripts.speedrun_plan import Machine
from tests.helpers import tiny_profile


def main() -> None:
    """Run all stages."""
    ranks = int(sys.argv[1])
    tiny = tiny_profile()
    steps = replace(tiny.base.horizon, num_iterations=8)
    PROFILES["small"] = replace(tiny, base=replace(tiny.base, horizon=steps, save_every=3))
    speedrun.find_machine = lambda: Machine(["CPU"] * ranks if ranks > 1 else [], 10**9, 1)
    speedrun_plan.compute_dtype = lambda device: torch.float32
    speedrun_plan.peak_flops = lambda device, dtype: None
    speedrun.main([])


if __name__ == "__main__":
    run_main(main)
