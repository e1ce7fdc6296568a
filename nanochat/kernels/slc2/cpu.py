"""The core of SLC2 on CPUs, by the Rust crate: forward, backward and the decode step, without autograd.

x, B (B, T, E); A (B, T, D); alpha (B, T, H); E = H·D; all of one dtype. taps (E, K) and past (B, K−1, E), oldest first,
may each be of the other dtype; past None means zeros. Strides are free but for the last dimension.
"""

import torch
from torch import Tensor

from nanochat.kernels.cpu import IS_BF16, call, dense, gradient_like, mismatch, rows, rows_with_dtype


def _checked(x: Tensor, B: Tensor, A: Tensor, alpha: Tensor, taps: Tensor, past: Tensor | None) -> tuple:
    """Check the inputs and return them as the crate takes them."""
    shape, dtype = x.shape, x.dtype
    (b, T, E), D, H, K = shape, A.shape[-1], alpha.shape[-1], taps.shape[-1]
    if not (dtype in IS_BF16 and E == H * D > 0 and T > 0 and B.shape == shape and A.shape == (b, T, D)
            and alpha.shape == (b, T, H) and B.dtype == A.dtype == alpha.dtype == dtype
            and dense(x) and dense(B) and dense(A) and dense(alpha)):
        raise mismatch("x and B are (B, T, E), A (B, T, D), alpha (B, T, H), E = H·D, of one dtype, "
                       "the last dimension contiguous", x=x, B=B, A=A, alpha=alpha)
    if not (taps.dtype in IS_BF16 and taps.shape == (E, K) and K > 0
            and (past is None or past.dtype in IS_BF16 and past.shape == (b, K - 1, E) and (dense(past) or K == 1))):
        raise mismatch("taps are (E, K) and past (B, K − 1, E), its last dimension contiguous",
                       x=x, taps=taps, past=past)
    return ((b, T, H, D, K), rows(x), rows(B), rows(A), rows(alpha), rows_with_dtype(taps),
            None if past is None else rows_with_dtype(past))


def forward(x: Tensor, B: Tensor, A: Tensor, alpha: Tensor, taps: Tensor, past: Tensor | None = None) -> Tensor:
    """Return y = B · silu(c) (B, T, E), contiguous; c is the causal convolution of u = silu(silu(alpha) ⊗ A) · x."""
    inputs = _checked(x, B, A, alpha, taps, past)
    y = torch.empty(x.shape, dtype=x.dtype)
    call("slc2_forward", x.dtype, inputs, rows(y))
    return y


def backward(dy: Tensor, x: Tensor, B: Tensor, A: Tensor, alpha: Tensor, taps: Tensor, past: Tensor | None,
             dx: Tensor, dB: Tensor, dA: Tensor, dalpha: Tensor) -> tuple[Tensor, Tensor | None]:
    """Compute all gradients from the inputs of `forward` alone.

    Args:
        dy: gradient of y, (B, T, E)
        x, B, A, alpha, taps, past: as `forward` took them
        dx, dB, dA, dalpha: written in place, every element; of the shapes of x, B, A, alpha, with free strides

    Returns:
        dtaps (E, K) in float32, and dpast of past's shape and dtype (None without a past)
    """
    inputs = _checked(x, B, A, alpha, taps, past)
    dy = gradient_like(dy, x)
    for given, like in ((dx, x), (dB, B), (dA, A), (dalpha, alpha)):
        if given.shape != like.shape or given.dtype != x.dtype or not dense(given):
            raise mismatch("dx, dB, dA and dalpha have their inputs' shapes and dtype, the last dimension contiguous",
                           dx=dx, dB=dB, dA=dA, dalpha=dalpha)
    dtaps = torch.empty(taps.shape, dtype=torch.float32)
    dpast = None if past is None else torch.empty(past.shape, dtype=past.dtype)
    call("slc2_backward", x.dtype, inputs, rows(dy), (rows(dx), rows(dB), rows(dA), rows(dalpha)), dtaps.data_ptr(),
         None if past is None else rows_with_dtype(dpast))
    return dtaps, dpast


def step(x: Tensor, B: Tensor, A: Tensor, alpha: Tensor, taps: Tensor, past: Tensor) -> Tensor:
    """Return y (B, 1, E) of one token a sequence, with the bits of `forward`.

    past is written in place: its oldest gated input drops out and that of this token comes in.
    """
    if x.shape[1] != 1 or past is None:
        raise mismatch("a decode step takes one token and a past", x=x, past=past)
    inputs = _checked(x, B, A, alpha, taps, past)
    y = torch.empty(x.shape, dtype=x.dtype)
    call("slc2_step", x.dtype, inputs, rows(y))
    return y
