"""Training gives the golden losses of tests/golden/train_d2.txt, which `python -m tests.golden.make` wrote."""

import pytest

from tests.golden import make


def test_fifty_steps_of_a_small_hybrid_give_the_golden_losses(tiny_base):
    header, *lines = make.CURVE.read_text(encoding="utf-8").splitlines()
    golden, losses = [float(line) for line in lines], make.train()
    same_cpu = header.endswith(f"on: {make.instruction_set()}")
    assert len(golden) == make.STEPS and golden[-1] < golden[0] - 3  # it learns
    assert losses == pytest.approx(golden, rel=0, abs=1e-5 if same_cpu else 1e-3)
