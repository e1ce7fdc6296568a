"""An operation that no model has, with implementations of every kind of misbehaviour: for tests/test_kernel_choice.py.

x (B, T, E) → x², and its gradient.
"""

import os
import time

import torch
from torch import Tensor

from nanochat.kernels.dispatch import Backend, Draw, TrainingShape, Trial, backend


def square_twin(x: Tensor) -> Tensor:
    """Return x². The definition."""
    return x * x


def _slow(x: Tensor) -> Tensor:
    for _ in range(40):
        x = x + 0
    return x * x


def _ragged(x: Tensor) -> Tensor:
    """Wrong for rows beyond a multiple of 64: as a kernel that forgets its last, incomplete block."""
    whole = x.shape[1] // 64 * 64
    return torch.cat([x[:, :whole] ** 2, x[:, whole:]], dim=1)


class _WrongBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, dy: Tensor) -> Tensor:
        x, = ctx.saved_tensors
        return dy * x  # the 2 is missing


def _raises(x: Tensor) -> Tensor:
    raise NotImplementedError("this card is unknown\nand more lines")


def _hangs(x: Tensor) -> Tensor:
    while True:
        time.sleep(0.1)


def _aborts(x: Tensor) -> Tensor:
    os.write(2, b"a last word\n")
    os.abort()


BACKENDS = {
    "slow": Backend(_slow),
    "fast": Backend(lambda x: x.square(), default="never"),
    "ragged": Backend(_ragged),
    "wrong_backward": Backend(_WrongBackward.apply),
    "nan": Backend(lambda x: x * x + float("nan")),
    "raises": Backend(_raises),
    "hangs": Backend(_hangs),
    "aborts": Backend(_aborts),
    "elsewhere": Backend(_aborts, lambda x: x.is_cuda),
    "torch": Backend(square_twin),
}


def square(x: Tensor) -> Tensor:
    """Return what `square_twin` returns."""
    return backend("toy", BACKENDS, x)(x)


def trial(shape: TrainingShape, draw: Draw) -> Trial:
    """Return what the chooser measures."""
    return Trial(square, square_twin, (draw(shape.B, shape.T, shape.E),))
