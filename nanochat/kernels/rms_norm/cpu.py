"""RMS norm and its gradient on CPUs, by the Rust crate. x (..., E), float32 or bfloat16; results are contiguous."""

import torch
from torch import Tensor

from nanochat.kernels.cpu import IS_BF16, call, dense, differentiable, gradient_like, mismatch


def _matrix(t: Tensor) -> Tensor:
    """Return t (..., E) as (N, E) with a contiguous last dimension; a copy where its strides do not allow a view."""
    return (t if dense(t) else t.contiguous()).reshape(-1, t.shape[-1])


def _rms_norm(x: Tensor, dy: Tensor | None) -> Tensor:
    if x.dtype not in IS_BF16 or not x.dim():
        raise mismatch("x is (..., E), float32 or bfloat16", x=x)
    y = torch.empty(x.shape, dtype=x.dtype)
    if y.numel():
        matrix, dy = _matrix(x), None if dy is None else _matrix(gradient_like(dy, x))
        N, E = matrix.shape
        call("rms_norm", x.dtype, N, E, (matrix.data_ptr(), matrix.stride(0), 0),
             None if dy is None else (dy.data_ptr(), dy.stride(0), 0), (y.data_ptr(), E, 0))
    return y


def forward(x: Tensor) -> Tensor:
    """Return x / √(mean x² + 2⁻²³) over the last dimension."""
    return _rms_norm(x, None)


def backward(dy: Tensor, x: Tensor) -> Tensor:
    """Return the gradient of x from that of `forward(x)`."""
    return _rms_norm(x, dy)


rms_norm = differentiable(forward, backward)
