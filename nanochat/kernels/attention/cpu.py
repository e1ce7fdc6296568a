"""Causal attention with an optional window, and its gradients, on CPUs, by the Rust crate.

q, y (B, T, H, D); k, v (B, T, G, D); H/G neighbouring query heads share a key head. float32 or bfloat16, all of one
dtype; strides are free but for the last dimension. A query sees the keys up to its own position, with a window the last
`window` of them. Its result does not depend on later positions.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nanochat.kernels.cpu import IS_BF16, call, dense, gradient_like, heads, mismatch


def checked_shape(q: Tensor, k: Tensor, v: Tensor, window: int | None, queries: int) -> tuple[int, ...]:
    """Check the inputs of `queries` queries a row, and return (B, S, H, G, D, the most keys that a query sees)."""
    fit = q.dim() == k.dim() == 4 and k.shape == v.shape and q.dtype == k.dtype == v.dtype and q.dtype in IS_BF16
    if not fit or q.shape != (k.shape[0], queries, q.shape[2], k.shape[3]) or not k.shape[2] or q.shape[2] % k.shape[2]:
        raise mismatch(f"q is (B, {queries}, H, D), k and v (B, S, G, D) with H a multiple of G, of one dtype",
                       q=q, k=k, v=v)
    if not (dense(q) and dense(k) and dense(v)) or window is not None and window < 1:
        raise mismatch(f"the last dimension is contiguous and a window at least 1, not {window}", q=q, k=k, v=v)
    (B, S, G, D), H = k.shape, q.shape[2]
    return B, S, H, G, D, S if window is None else min(window, S)


def forward(q: Tensor, k: Tensor, v: Tensor, window: int | None = None) -> tuple[Tensor, Tensor]:
    """Return y (B, T, H, D), contiguous, and the log-sum-exp of each query's scores, (B, H, T) in float32."""
    shape = checked_shape(q, k, v, window, k.shape[1])
    B, T, H = shape[:3]
    y, lse = torch.empty(q.shape, dtype=q.dtype), torch.empty(B, H, T)
    if y.numel():
        call("attention_forward", q.dtype, shape, [heads(t) for t in (q, k, v, y)], lse.data_ptr())
    return y, lse


def backward(dy: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, lse: Tensor,
             window: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Return dq, dk and dv, contiguous, from dy and from what `forward` took and returned."""
    shape = checked_shape(q, k, v, window, k.shape[1])
    B, T, H = shape[:3]
    dy, y = gradient_like(dy, q), gradient_like(y, q)
    if lse.shape != (B, H, T) or lse.dtype != torch.float32 or not lse.is_contiguous():
        raise mismatch("lse is what forward returned", q=q, lse=lse)
    dq, dk, dv = (torch.empty(t.shape, dtype=t.dtype) for t in (q, k, v))
    if y.numel():
        call("attention_backward", q.dtype, shape, [heads(t) for t in (q, k, v, y, dy, dq, dk, dv)], lse.data_ptr())
    return dq, dk, dv


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        y, lse = forward(q, k, v, window)
        ctx.save_for_backward(q, k, v, y, lse)
        ctx.window = window
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        return *backward(dy, *ctx.saved_tensors, ctx.window), None


attend = _Attention.apply  # (q, k, v, window) → y, with gradients of q, k and v
