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


@pytest.mark.long
def test_a_d20_step_on_eight_gpus(nullgpu):
    """Compiled, as it is run: one graph for each kind of layer and of pass, no wait for the device."""
    seen = nullgpu.run(training, env=ALLOCATOR, depth=20, rows=32, ranks=8)
    assert seen["refused"] == [] and seen["syncs"] == []
    assert (seen["graphs"], seen["breaks"], seen["recompiled"]) == (4, 0, 0)
    assert abs(seen["reserved"] - step_memory.step_memory(20, 32, ranks=8)) < GB


@pytest.mark.long
@pytest.mark.parametrize("depth, rows", [(26, 16), (32, 8)])
def test_the_memory_of_larger_models_is_as_recorded(nullgpu, depth, rows):
    """The largest batch that 80 GB hold. One step: the optimizer's state is there at its end."""
    seen = nullgpu.run(training, env=ALLOCATOR, depth=depth, rows=rows, ranks=8, steps=2)
    assert seen["refused"] == [] and seen["syncs"] == []
    assert abs(seen["reserved"] - step_memory.step_memory(depth, rows, ranks=8)) < GB
    assert step_memory.most_rows(depth, 85e9, ranks=8) == rows


def eager_and_compiled() -> dict:
    return {"eager": training(20, 32, compiled=False), "compiled": training(20, 32)}


@pytest.mark.long
def test_launches_of_a_d20_step(nullgpu):
    for how, seen in nullgpu.run(eager_and_compiled, env=ALLOCATOR).items():
        assert seen["refused"] == [] and seen["syncs"] == []
        assert 0.5 * LAUNCHES[how] < seen["launches"]["all"] <= LAUNCHES[how], (how, seen["launches"])
        assert abs(seen["reserved"] - step_memory.step_memory(20, 32)) < GB
