"""relu(x)² and its gradient on CPUs, by the Rust crate. Any shape, float32 or bfloat16; results are contiguous."""

import torch
from torch import Tensor

from nanochat.kernels.cpu import IS_BF16, call, differentiable, gradient_like, mismatch


def _relu2(x: Tensor, dy: Tensor | None) -> Tensor:
    if x.dtype not in IS_BF16:
        raise mismatch("x is float32 or bfloat16", x=x)
    x, dy = x.contiguous(), None if dy is None else gradient_like(dy, x).contiguous()
    y = torch.empty(x.shape, dtype=x.dtype)
    call("relu2", x.dtype, x.numel(), x.data_ptr(), None if dy is None else dy.data_ptr(), y.data_ptr())
    return y


def forward(x: Tensor) -> Tensor:
    """Return relu(x)²."""
    return _relu2(x, None)


def backward(dy: Tensor, x: Tensor) -> Tensor:
    """Return 2 · dy · relu(x). x may be the input of `forward`, or its relu: the result is the same."""
    return _relu2(x, dy)


relu_squared = differentiable(forward, backward)
