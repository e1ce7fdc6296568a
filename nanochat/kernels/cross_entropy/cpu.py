"""Softcapped cross-entropy of a chunk of logits and its gradient on CPUs, by the Rust crate."""

import torch
from torch import Tensor

from nanochat.kernels.cpu import IS_BF16, call, dense, mismatch, rows


def softcapped_cross_entropy_(z: Tensor, targets: Tensor, factors: Tensor | None, losses: Tensor,
                              want_grad: bool = True) -> None:
    """Write the losses and, with want_grad, overwrite z with its gradient.

    The contract is that of `nanochat.kernels.cross_entropy.softcapped_cross_entropy_`; the rows of z may have any
    stride. Raises IndexError, and writes nothing, where a target is neither −1 nor in the vocabulary.
    """
    if z.dim() != 2 or z.dtype not in IS_BF16 or not z.numel() or not dense(z):
        raise mismatch("z is (N, V), float32 or bfloat16, its rows contiguous", z=z)
    N, V = z.shape
    for t, dtype in ((targets, torch.int64), (losses, torch.float32), (factors, torch.float32)):
        if t is not None and (t.shape != (N,) or t.dtype != dtype or not dense(t)):
            raise mismatch("targets (N,) are int64, losses and factors (N,) float32, all contiguous",
                           z=z, targets=targets, losses=losses, factors=factors)
    call("softcapped_cross_entropy_", z.dtype, N, V, rows(z), targets.data_ptr(),
         None if factors is None else factors.data_ptr(), losses.data_ptr(), want_grad)
