"""The core of SLC2: gate, causal depthwise convolution and output gate, between the input projections and c_proj.

`slc2_core_twin` is the definition, in a few lines. `slc2_core` gives the same numbers with less memory traffic in training.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def gated_input(x: Tensor, A: Tensor, alpha: Tensor) -> Tensor:
    """Return u = silu(silu(alpha) ⊗ A) · x of shape (..., E), from x (..., E), A (..., D), alpha (..., H); head-major, E = H·D."""
    return F.silu(F.silu(alpha).unsqueeze(-1) * A.unsqueeze(-2)).flatten(-2) * x


def causal_taps(u: Tensor, taps: Tensor, past: Tensor | None = None) -> Tensor:
    """Return c (B, T, E) with c[t] = Σ_j taps[:, j] · u[t − (K−1) + j]: depthwise, the last tap on the present.

    u (B, T, E); taps (E, K); past (B, K−1, E): the inputs before u, oldest first; zeros where it is None.
    """
    K, T = taps.shape[1], u.shape[1]
    padded = F.pad(u, (0, 0, K - 1, 0)) if past is None else torch.cat([past, u], dim=1)
    return sum(taps[:, j] * padded[:, j:j + T] for j in range(K))


def slc2_core_twin(x: Tensor, B: Tensor, A: Tensor, alpha: Tensor, taps: Tensor) -> Tensor:
    """Return y = B · silu(c) of shape (B, T, E), where c convolves the gated input; the definition of the fused form.

    x, B (B, T, E); A (B, T, D); alpha (B, T, H); taps (E, K). The formula is that of the published code.
    """
    return B * F.silu(causal_taps(gated_input(x, A, alpha), taps))


def _silu_and_slope(z: Tensor) -> tuple[Tensor, Tensor]:
    """Return silu(z) and its derivative."""
    s = torch.sigmoid(z)
    return z * s, s * (1 + z * (1 - s))


class _Core(torch.autograd.Function):
    """The twin with a backward that recomputes gate and convolution: only the inputs are kept for it."""

    @staticmethod
    def forward(ctx, x: Tensor, B: Tensor, A: Tensor, alpha: Tensor, taps: Tensor) -> Tensor:
        ctx.save_for_backward(x, B, A, alpha, taps)
        return slc2_core_twin(x, B, A, alpha, taps)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, ...]:
        x, B, A, alpha, taps = ctx.saved_tensors
        K, T = taps.shape[1], x.shape[1]
        silu_alpha, slope_alpha = _silu_and_slope(alpha)
        gate, slope_gate = _silu_and_slope(silu_alpha.unsqueeze(-1) * A.unsqueeze(-2))  # (B, T, H, D)
        gate, slope_gate = gate.flatten(-2), slope_gate.flatten(-2)
        u = F.pad(gate * x, (0, 0, K - 1, 0))
        silu_c, slope_c = _silu_and_slope(sum(taps[:, j] * u[:, j:j + T] for j in range(K)))
        dB = dy * silu_c
        dc = dy * B * slope_c
        dtaps = torch.stack([(dc * u[:, j:j + T]).sum((0, 1), dtype=torch.float32) for j in range(K)], dim=1).to(taps.dtype)
        dc = F.pad(dc, (0, 0, 0, K - 1))
        du = sum(taps[:, j] * dc[:, K - 1 - j:K - 1 - j + T] for j in range(K))
        dz = (du * x * slope_gate).unflatten(-1, (alpha.shape[-1], A.shape[-1]))  # gradient of silu(alpha) ⊗ A
        dA = (dz * silu_alpha.unsqueeze(-1)).sum(-2)
        dalpha = (dz * A.unsqueeze(-2)).sum(-1) * slope_alpha
        return du * gate, dB, dA, dalpha, dtaps


def slc2_core(x: Tensor, B: Tensor, A: Tensor, alpha: Tensor, taps: Tensor) -> Tensor:
    """Return what `slc2_core_twin` returns, keeping only the inputs for backward. Shapes as there; taps in x's dtype.

    Under torch.compile the twin is used: the compiler fuses it and its backward itself.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return slc2_core_twin(x, B, A, alpha, taps)
    return _Core.apply(x, B, A, alpha, taps)
