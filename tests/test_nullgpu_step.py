"""A training step on the null GPU: memory, launches, graphs, waits, at the sizes of real runs.

The numbers of launches and of memory are recorded. Where a change moves them on purpose, record them anew: memory by
`python -m tests.nullgpu.record`, launches in LAUNCHES below.
"""

import pytest

from scripts import step_memory
from tests.nullgpu.programs import training
from tests.nullgpu.record import ALLOCATOR

# kernels of one optimizer step of d20 with one micro-batch of 32 × 2048, on one GPU, at most
LAUNCHES = {"eager": 1540, "compiled": 1060}
GB = 1e9


def of_d20() -> dict:
    return {"compiled": training(20, 32), "eager": training(20, 32, compiled=False), "rank": training(20, 32, ranks=8)}


@pytest.mark.long
def test_a_d20_step(nullgpu):
    """Compiled and eager on one GPU, and compiled on one of eight, as it is run: one graph for each kind of layer and
    of pass, the memory as recorded, no wait for the device."""
    found = nullgpu.run(of_d20, env=ALLOCATOR)
    for how, seen in found.items():
        assert seen["refused"] == [] and seen["syncs"] == [], how
        assert (seen["graphs"], seen["breaks"], seen["recompiled"]) == (0 if how == "eager" else 4, 0, 0), how
        assert abs(seen["allocated"] - step_memory.step_memory(20, 32, ranks=8 if how == "rank" else 1)) < GB, how
    for how, most in LAUNCHES.items():
        assert 0.5 * most < found[how]["launches"]["all"] <= most, (how, found[how]["launches"])


def of_larger_models(sizes: list[list[int]]) -> list[int]:
    return [training(depth, rows, ranks=8, compiled=False, steps=2)["allocated"] for depth, rows in sizes]


@pytest.mark.long
def test_the_memory_of_larger_models_is_as_recorded(nullgpu):
    """At the largest batch that 80 GB hold, not compiled: that changes the memory by less than 0.1 GB."""
    sizes = [(26, 16), (32, 8)]
    for (depth, rows), bytes_ in zip(sizes, nullgpu.run(of_larger_models, env=ALLOCATOR, sizes=sizes)):
        assert abs(bytes_ - step_memory.step_memory(depth, rows, ranks=8)) < GB, (depth, bytes_)
        assert step_memory.most_rows(depth, 85e9, ranks=8) == rows


def test_memory_between_recorded_points():
    """A recorded point is returned as it is; between and beyond them memory grows with rows and depth, not with
    ranks."""
    points = step_memory.recorded()
    for depth, by_ranks in points.items():
        for ranks, by_rows in by_ranks.items():
            for rows, bytes_ in by_rows.items():
                assert step_memory.step_memory(depth, rows, ranks) == bytes_
    of = step_memory.step_memory
    assert of(20, 8) < of(20, 12) < of(20, 32) < of(20, 64)
    assert of(12, 8) < of(16, 8) < of(20, 8) and of(32, 8) < of(40, 8) and of(2, 8) < of(4, 8)
    assert of(20, 8, 1) >= of(20, 8, 2) >= of(20, 8, 4) >= of(20, 8, 8) >= of(20, 8, 16) > 0.9 * of(20, 8, 8)
    assert of(20, 16) == pytest.approx((of(20, 8) * 2 + of(20, 32)) / 3)


def test_the_rows_that_fit_are_the_most():
    for memory in (12e9, 25e9, 42e9, 85e9, 150e9, 192e9):
        rows = step_memory.most_rows(20, memory, most=64)
        assert step_memory.needed_memory(20, rows) <= memory
        assert rows == 64 or step_memory.needed_memory(20, 2 * rows) > memory
    assert step_memory.most_rows(32, 12e9) == 0 and step_memory.most_rows(4, 192e9) == 32
