"""RMS norm without parameters, over the last dimension of x (..., E), float32 or bfloat16; the result is like x.

Saved for backward: x alone. Written in place: nothing. On CPUs a kernel makes one pass over memory forward and one
backward, and has no second derivative. Elsewhere, and under torch.compile, the twin runs.
"""

import torch.nn.functional as F
from torch import Tensor

from nanochat.kernels.cpu import ready as cpu_ready
from nanochat.kernels.dispatch import Backend, Draw, TrainingShape, Trial, backend, kernels_of


def rms_norm_twin(x: Tensor) -> Tensor:
    """Return x / √(mean x² + ε). The definition. ε is PyTorch's default, that of float32, for bfloat16 too."""
    return F.rms_norm(x, (x.shape[-1],))


def _cpu(x: Tensor) -> Tensor:
    return kernels_of("rms_norm", "cpu").rms_norm(x)


BACKENDS = {"cpu": Backend(_cpu, cpu_ready), "torch": Backend(rms_norm_twin)}


def rms_norm(x: Tensor) -> Tensor:
    """Return what `rms_norm_twin` returns, up to rounding."""
    return backend("rms_norm", BACKENDS, x)(x)


def trial(shape: TrainingShape, draw: Draw) -> Trial:
    """Return what the chooser measures: the norm before a mixer or an MLP."""
    return Trial(rms_norm, rms_norm_twin, (draw(shape.B, shape.T, shape.E),))
