"""Rotary positions followed by the RMS norm, which queries and keys go through.

x (B, T, H, D), D even; rope is (cos, sin), each (T, D/2) or (B, T, D/2), float32. The result has x's shape and dtype.

Saved for backward: x, cos and sin; only x gets a gradient. Written in place: nothing. On CPUs, for x of float32 or
bfloat16, a kernel makes one pass over memory forward and one backward, and has no second derivative. Elsewhere, and
under torch.compile, the twin runs.
"""

import torch
from torch import Tensor

from nanochat.kernels.cpu import ready as cpu_ready
from nanochat.kernels.dispatch import Backend, Draw, TrainingShape, Trial, backend, kernels_of
from nanochat.kernels.rms_norm import rms_norm_twin


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Return x with each pair (x[d], x[d + D/2]) rotated by its position's angle; float32 for the norm after it."""
    cos, sin = (table.unsqueeze(-2) for table in rope)
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat([x1 * cos + x2 * sin, x2 * cos - x1 * sin], dim=-1)


def rope_norm_twin(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Return the RMS norm over D of the rotated x, in x's dtype. The definition."""
    return rms_norm_twin(rotate(x, rope)).to(x.dtype)


def _cpu(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    return kernels_of("rope_norm", "cpu").rope_norm(x, *rope)


def _cpu_takes(x: Tensor, rope: tuple[Tensor, Tensor]) -> bool:
    return cpu_ready(x, *rope) and all(table.dtype == torch.float32 for table in rope)


BACKENDS = {"cpu": Backend(_cpu, _cpu_takes), "torch": Backend(rope_norm_twin)}


def rope_norm(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Return what `rope_norm_twin` returns, up to rounding."""
    return backend("rope_norm", BACKENDS, x, rope)(x, rope)


def trial(shape: TrainingShape, draw: Draw) -> Trial:
    """Return what the chooser measures: the queries of attention."""
    x = draw(shape.B, shape.T, shape.H, shape.D)
    angles = torch.rand(shape.T, shape.D // 2, device=x.device) * 6
    return Trial(rope_norm, rope_norm_twin, (x, (angles.cos(), angles.sin())))
