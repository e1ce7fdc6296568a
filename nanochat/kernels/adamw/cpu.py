"""AdamW's update on CPUs, by the Rust crate, in one pass over memory. All tensors are float32 and contiguous."""

from collections.abc import Sequence

import torch
from torch import Tensor

from nanochat.kernels import cpu
from nanochat.kernels.adamw import Factors
from nanochat.kernels.cpu import mismatch


def built() -> bool:
    """Whether the crate that is installed has this kernel; those built before it came do not."""
    return hasattr(cpu.cpukernels, "adamw")


def adamw_(weights: Sequence[Tensor], gradient: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, by: Factors) -> None:
    """Update the state and the weights."""
    flat = gradient, exp_avg, exp_avg_sq
    n = sum(view.numel() for view in weights)
    if any(t.dtype != torch.float32 or not t.is_contiguous() for t in (*weights, *flat)) or any(
            t.shape != (n,) for t in flat):
        raise mismatch("gradient, exp_avg and exp_avg_sq have as many numbers as the weights, float32 and contiguous",
                       gradient=gradient, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq,
                       **{f"weights {i}": view for i, view in enumerate(weights)})
    if not by.ok:
        return
    kept = 1 - by.rate * by.weight_decay
    numbers = [float(x) for x in (by.scale, by.weight, by.decay, by.square_weight, by.of_root, by.eps, by.of_mean,
                                  by.rate, kept)]
    addresses, at = [t.data_ptr() for t in flat], 0
    for view in weights:
        cpu.cpukernels.adamw(torch.get_num_threads(), view.numel(), view.data_ptr(),
                             [address + 4 * at for address in addresses], numbers)
        at += view.numel()
