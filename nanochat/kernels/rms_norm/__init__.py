"""RMS norm without parameters, over the last dimension of x (..., E), float32 or bfloat16; the result is like x.

Saved for backward: x alone. Written in place: nothing. On CPUs a kernel makes one pass over memory forward and one
backward, and has no second derivative. Elsewhere, and under torch.compile, the twin runs.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat.kernels.cpu import ready as cpu_ready
from nanochat.kernels.dispatch import Backend, Draw, TrainingShape, Trial, backend, kernels_of

EPSILON = torch.finfo(torch.float32).eps


def rms_norm_twin(x: Tensor) -> Tensor:
    """Return x / √(mean x² + ε). The definition. ε is PyTorch's default, that of float32, for bfloat16 too."""
    return F.rms_norm(x, (x.shape[-1],))


# For operations that end in a norm, and keep its result and factors instead of its input:

def norm_with_factors(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the RMS norm of float32 x (..., E), and r = 1/√(mean x² + ε), (..., 1)."""
    r = torch.rsqrt(x.square().mean(-1, keepdim=True) + EPSILON)
    return x * r, r


def gradient_from_result(dy: Tensor, y: Tensor, r: Tensor) -> Tensor:
    """Return the gradient of x in float32, r·(dy − y·mean(dy·y)), from y = r·x: the norm's result and factors."""
    dy, y = dy.float(), y.float()
    return r * (dy - y * (dy * y).mean(-1, keepdim=True))


def _cpu(x: Tensor) -> Tensor:
    return kernels_of("rms_norm", "cpu").rms_norm(x)


BACKENDS = {"cpu": Backend(_cpu, cpu_ready), "torch": Backend(rms_norm_twin)}


def rms_norm(x: Tensor) -> Tensor:
    """Return what `rms_norm_twin` returns, up to rounding."""
    return backend("rms_norm", BACKENDS, x)(x)


def trial(shape: TrainingShape, draw: Draw) -> Trial:
    """Return what the chooser measures: the norm before a mixer or an MLP."""
    return Trial(rms_norm, rms_norm_twin, (draw(shape.B, shape.T, shape.E),))
