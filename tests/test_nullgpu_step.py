"""A training step on the null GPU: memory, launches, graphs, waits, at the sizes of real runs.

The numbers of launches and of memory are recorded. Where a change moves them on purpose, record them anew: memory by
`python -m tests.nullgpu.record`, launches in LAUNCHES below.
"""

import pytest
import torch

from nanochat.gpt import GPTConfig
from nanochat.memory import memory_of_step
from tests.helpers import PARTS
from tests.nullgpu.programs import training
from tests.nullgpu.record import ALLOCATOR, LARGE, ROW, counted, recorded

# kernels of one optimizer step of d20 with one micro-batch of 32 × 2048, on one GPU, at most
RECENT = tuple(map(int, torch.__version__.split("+")[0].split(".")[:2])) >= (2, 15)
LAUNCHES = {"eager": 1110, "compiled": 1020} if RECENT else {"eager": 1160, "compiled": 1080}
LAUNCHES["modern"] = LAUNCHES["eager"] + 130  # what the optimizer groups of that recipe add
GB = 1e9


def of_d20() -> dict:
    """Return what was seen of each way to run a d20 step, in one process."""
    return {"compiled": training(20, 32), "eager": training(20, 32, compiled=False, steps=2),
            "modern": training(20, 32, compiled=False, steps=2, groups="modern"),
            "rank": training(20, 32, ranks=8, steps=2)}


@pytest.mark.long
def test_a_d20_step(nullgpu):
    """Compiled and eager on one GPU, eager with the groups of the modern recipe, and compiled on one of eight, as it is
    run: one graph for each kind of layer and of pass, the memory as recorded, no wait for the device."""
    found = nullgpu.run(of_d20, env=ALLOCATOR)
    for how, seen in found.items():
        assert seen["refused"] == [] and seen["syncs"] == [], how
        graphs = 4 if how in ("compiled", "rank") else 0
        assert (seen["graphs"], seen["breaks"], seen["recompiled"]) == (graphs, 0, 0), how
        known = recorded()[20, 32, 8 if how == "rank" else 1]["allocated"]
        assert abs(seen["allocated"] - known) < 0.3 * GB, (how, seen["allocated"])
    for how, most in LAUNCHES.items():
        assert 0.5 * most < found[how]["launches"]["all"] <= most, (how, found[how]["launches"])


def of_parts(rows: int, vocab_size: int) -> dict[str, int]:
    return {name: training(12, rows, compiled=False, steps=2, vocab_size=vocab_size, **parts)["allocated"]
            for name, parts in PARTS.items()}


@pytest.mark.long
def test_the_optional_parts_are_counted(nullgpu):
    found = nullgpu.run(of_parts, face=LARGE, env=ALLOCATOR, rows=16, vocab_size=32768)
    for name, parts in PARTS.items():
        config = GPTConfig.from_depth(12, vocab_size=32768, sequence_len=ROW, **parts)
        need = memory_of_step(config, 16, ROW, accumulate=False)
        assert need == pytest.approx(found[name], rel=0.01, abs=0.15 * GB), name


def of_larger_models(sizes: list[list[int]]) -> list[int]:
    return [training(depth, rows, ranks, compiled=False, steps=2)["allocated"] for depth, rows, ranks in sizes]


@pytest.mark.slow
def test_the_memory_of_larger_models_is_as_recorded(nullgpu):
    """Not compiled: that changes the memory by less than 0.1 GB."""
    sizes = [(26, 8, 8), (26, 32, 8), (32, 8, 1), (32, 8, 8)]
    for size, bytes_ in zip(sizes, nullgpu.run(of_larger_models, env=ALLOCATOR, sizes=sizes)):
        assert abs(bytes_ - recorded()[size]["allocated"]) < 0.3 * GB, (size, bytes_)


def test_what_is_counted_for_a_step_is_what_it_takes():
    """`nanochat.memory.memory_of_step`, by which a run and its plan choose the rows, beside the recorded steps."""
    for (depth, rows, ranks), point in recorded().items():
        assert counted(depth, rows, ranks) == pytest.approx(point["allocated"], rel=0.01, abs=0.3 * GB), (
            depth, rows, ranks)
