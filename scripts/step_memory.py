"""How much memory a training step takes on a GPU: from recorded points, no formula of ours.

    step_memory(depth=20, rows=32, ranks=8)                 # bytes of tensors on one rank, at the peak
    most_rows(depth=20, memory=85e9, ranks=8)               # rows that fit a GPU, a power of two

The points are in step_memory.json. They were seen, not estimated: a real step (forward, backward, optimizer, one
validation batch), compiled, with the allocator that a run uses, on a stand-in for CUDA that computes nothing
(tests/nullgpu). A test compares three of them with what a step takes now. Made again, in some minutes, by

    python -m tests.nullgpu.record
"""

import json
import math
from functools import cache
from pathlib import Path

ROW = 2048  # tokens of a row in the recorded steps; what counts is the number of tokens
OUTSIDE = 1.5e9  # bytes that the allocator does not see: the context, cuBLAS's and cuDNN's code, NCCL's buffers
GAPS = 1.05  # memory that the allocator needs for a byte of tensors; it takes more, and gives back, while there is more
POINTS = Path(__file__).with_name("step_memory.json")


@cache
def recorded() -> dict[int, dict[int, dict[int, float]]]:
    """Return bytes by depth, ranks and rows, as they were recorded."""
    points: dict[int, dict[int, dict[int, float]]] = {}
    for point in json.loads(POINTS.read_text(encoding="utf-8"))["points"]:
        points.setdefault(point["depth"], {}).setdefault(point["ranks"], {})[point["rows"]] = point["allocated"]
    return points


def step_memory(depth: int, rows: float, ranks: int = 1) -> float:
    """Return the bytes of all tensors of a training step on one rank, at the peak.

    A recorded point is returned as it is. Between points: in the rows the larger of two things, the optimizer's part,
    which no row adds to, and a line through the two longest batches; in the ranks a part that is shared and one that is
    not; in the depth a power law.

    Args:
        depth: of a model as --depth makes it, with the published vocabulary
        rows: of 2048 tokens in a micro-batch; other rows by their tokens
        ranks: that share the optimizer's state
    """
    points = recorded()
    if depth in points:
        return _at_ranks(points[depth], rows, ranks)
    depths = sorted(points)
    above = next((i for i, other in enumerate(depths) if other > depth), len(depths) - 1)
    low, high = depths[max(0, above - 1)], depths[max(1, above)]
    first, last = (_at_ranks(points[d], rows, ranks) for d in (low, high))
    return first * (last / first) ** (math.log(depth / low) / math.log(high / low))


def _at_ranks(points: dict[int, dict[int, float]], rows: float, ranks: int) -> float:
    """Return the bytes at one depth. points: by ranks and rows."""
    if ranks in points:
        return _at_rows(points[ranks], rows)
    few, many = sorted(ranks for ranks in points if ranks > 1)  # one rank alone needs no buffers to communicate
    first, last = _at_rows(points[few], rows), _at_rows(points[many], rows)
    shared = (first - last) / (1 / few - 1 / many)
    return last + shared * (1 / ranks - 1 / many)


def _at_rows(points: dict[int, float], rows: float) -> float:
    """Return the bytes at one depth and number of ranks. points: by rows."""
    if rows in points:
        return points[rows]
    least, few, many = sorted(points)
    return max(points[least], points[few] + (points[many] - points[few]) / (many - few) * (rows - few))


def most_rows(depth: int, memory: float, ranks: int = 1, most: int = 32) -> int:
    """Return the largest power of two, up to `most`, of rows of 2048 tokens that fit. 0 where not even one does.

    Args:
        depth, ranks: as for `step_memory`
        memory: bytes of the GPU, as CUDA tells them
        most: rows that are enough
    """
    rows = 1 << int(math.log2(most))
    while rows and needed_memory(depth, rows, ranks) > memory:
        rows //= 2
    return rows


def needed_memory(depth: int, rows: float, ranks: int = 1) -> float:
    """Return the bytes that a GPU must have for `step_memory`."""
    return GAPS * step_memory(depth, rows, ranks) + OUTSIDE
