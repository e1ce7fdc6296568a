"""The core of SLC2: gate, causal depthwise convolution and output gate, between the input projections and c_proj.

    u = silu(silu(alpha) ⊗ A) · x        c = causal_conv(u)        y = B · silu(c)

x, B, y (B, T, E); A (B, T, D); alpha (B, T, H); taps (E, K); past (B, K−1, E), the gated inputs u before the first
token, oldest first, None for zeros. E = H·D, channels head-major: h·D + d.

`slc2_mix` is training and prefill: it takes x, B, A and alpha as columns of one joined projection. Saved for backward:
its inputs alone. Written in place: nothing. It is one torch operator, which torch.compile and checkpointing see whole.
`slc2_step` is the decode step: one token a sequence, past written in place, no backward.

Both run a Triton kernel on NVIDIA GPUs from Ampere on with K ≤ 4, the crate's kernel on CPUs, and else plain PyTorch.
"""

import functools
import importlib.util
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat.kernels.dispatch import define_operator, fused

# ---- definitions


def gated_input(x: Tensor, A: Tensor, alpha: Tensor) -> Tensor:
    """Return u = silu(silu(alpha) ⊗ A) · x of shape (..., E), from x (..., E), A (..., D) and alpha (..., H)."""
    return F.silu(F.silu(alpha).unsqueeze(-1) * A.unsqueeze(-2)).flatten(-2) * x


def causal_conv(u: Tensor, taps: Tensor, past: Tensor | None = None) -> Tensor:
    """Return the causal depthwise convolution c (B, T, E), c[t] = Σ_j taps[:, j] · u[t − (K−1) + j].

    Args:
        u: (B, T, E)
        taps: (E, K); the last tap weighs the present token
        past: (B, K−1, E), the inputs before u, oldest first; None for zeros
    """
    K, T = taps.shape[1], u.shape[1]
    padded = F.pad(u, (0, 0, K - 1, 0)) if past is None else torch.cat([past, u], dim=1)
    return sum(taps[:, j] * padded[:, j:j + T] for j in range(K))


def slc2_core_twin(x: Tensor, B: Tensor, A: Tensor, alpha: Tensor, taps: Tensor, past: Tensor | None = None) -> Tensor:
    """Return y = B · silu(c) (B, T, E), where c is the convolution of the gated input. The definition.

    The formula is that of the published code.
    """
    return B * F.silu(causal_conv(gated_input(x, A, alpha), taps, past))


def split_columns(z: Tensor, n_head: int, head_width: int) -> list[Tensor]:
    """Split the joined projection z (B, T, N) into its columns [x, B, A, alpha, padding], N ≥ 2·E + D + H.

    Raises:
        ValueError: z is not three-dimensional, or too narrow
    """
    E = n_head * head_width
    used = 2 * E + head_width + n_head
    if z.dim() != 3 or z.shape[-1] < used:
        raise ValueError(f"z must be (B, T, N) with N of at least 2·E + D + H = {used}, not {tuple(z.shape)}")
    return list(z.split([E, E, head_width, n_head, z.shape[-1] - used], dim=-1))


# ---- plain PyTorch


def _silu_and_derivative(z: Tensor) -> tuple[Tensor, Tensor]:
    s = torch.sigmoid(z)
    return z * s, s * (1 + z * (1 - s))


def _forward_pytorch(x: Tensor, B: Tensor, A: Tensor, alpha: Tensor, taps: Tensor, past: Tensor | None) -> Tensor:
    return slc2_core_twin(x, B, A, alpha, taps.to(x.dtype), None if past is None else past.to(x.dtype))


def _backward_pytorch(dy: Tensor, x: Tensor, B: Tensor, A: Tensor, alpha: Tensor, taps: Tensor, past: Tensor | None,
                      dx: Tensor, dB: Tensor, dA: Tensor, dalpha: Tensor) -> tuple[Tensor, Tensor | None]:
    """Write the gradients of the twin into dx, dB, dA and dalpha; return dtaps in float32, and dpast or None.

    Gate and convolution are computed again from the inputs.
    """
    K, T, taps = taps.shape[1], x.shape[1], taps.to(x.dtype)
    silu_alpha, d_alpha = _silu_and_derivative(alpha)
    gate, d_gate = _silu_and_derivative(silu_alpha.unsqueeze(-1) * A.unsqueeze(-2))  # (B, T, H, D)
    gate, d_gate = gate.flatten(-2), d_gate.flatten(-2)
    u = F.pad(gate * x, (0, 0, K - 1, 0)) if past is None else torch.cat([past.to(x.dtype), gate * x], dim=1)
    silu_c, d_c = _silu_and_derivative(sum(taps[:, j] * u[:, j:j + T] for j in range(K)))
    torch.mul(dy, silu_c, out=dB)
    dc = dy * B * d_c
    dtaps = torch.stack([(dc * u[:, j:j + T]).sum((0, 1), dtype=torch.float32) for j in range(K)], dim=1)
    before = 0 if past is None else K - 1
    dc = F.pad(dc, (0, 0, before, K - 1))
    du = sum(taps[:, j] * dc[:, K - 1 - j:K - 1 - j + T + before] for j in range(K))  # past's first, where there is one
    dpast, du = None if past is None else du[:, :before].to(past.dtype, copy=True), du[:, before:]
    torch.mul(du, gate, out=dx)
    dz = (du * x * d_gate).unflatten(-1, (alpha.shape[-1], A.shape[-1]))  # gradient of silu(alpha) ⊗ A
    dA.copy_((dz * silu_alpha.unsqueeze(-1)).sum(-2))
    torch.mul((dz * A.unsqueeze(-2)).sum(-1), d_alpha, out=dalpha)
    return dtaps, dpast


# ---- the choice


@functools.cache
def _triton_runs_on(device: torch.device) -> bool:
    """Whether Triton is installed and this is an NVIDIA GPU, Ampere or later: the kernels contain its instructions."""
    return (importlib.util.find_spec("triton") is not None and torch.version.hip is None
            and torch.cuda.get_device_capability(device) >= (8, 0))


def uses_triton(z: Tensor, K: int = 3) -> bool:
    """Return whether the operations on z, with K taps, run the Triton kernels."""
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    return z.is_cuda and K <= 4 and z.dtype in dtypes and _triton_runs_on(z.device)


def _kernel(name: str, x: Tensor, *others: Tensor, K: int) -> Callable | None:
    """Return forward, backward or step of the kernels for these tensors, or None for plain PyTorch."""
    return fused("slc2", name, x, *others) if (uses_triton(x, K) if x.is_cuda else x.numel()) else None


def _dense(t: Tensor | None) -> Tensor | None:
    """Return t with its last dimension contiguous."""
    return t if t is None or t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


# ---- many tokens


def _mix(z: Tensor, taps: Tensor, past: Tensor | None, n_head: int, head_width: int) -> Tensor:
    *inputs, _ = split_columns(_dense(z), n_head, head_width)
    kernel = _kernel("forward", *inputs, taps, K=taps.shape[1]) or _forward_pytorch
    return kernel(*inputs, taps, _dense(past))


def _mix_shape(z, taps, past, n_head, head_width):
    return z.new_empty(z.shape[0], z.shape[1], n_head * head_width)


def _mix_backward(dy: Tensor, z: Tensor, taps: Tensor, past: Tensor | None, n_head: int,
                  head_width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return dz, zero in the padding; dtaps; and dpast, empty where there is no past."""
    K, dz = taps.shape[1], torch.empty(z.shape, dtype=z.dtype, device=z.device)
    *inputs, _ = split_columns(_dense(z), n_head, head_width)
    *gradients, padding = split_columns(dz, n_head, head_width)
    kernel, pad = _kernel("backward", *inputs, taps, K=K) or _backward_pytorch, {}
    if uses_triton(z, K):
        pad = {"pad": padding.shape[-1]}  # this kernel writes the zeros too
    else:
        padding.zero_()
    dtaps, dpast = kernel(_dense(dy), *inputs, taps, _dense(past), *gradients, **pad)
    return dz, dtaps.to(taps.dtype), z.new_empty(0) if dpast is None else dpast


def _mix_backward_shapes(dy, z, taps, past, n_head, head_width):
    dpast = z.new_empty(0) if past is None else past.new_empty(past.shape)
    return z.new_empty(z.shape), taps.new_empty(taps.shape), dpast


def _save_inputs(ctx, inputs, output) -> None:
    z, taps, past, *ctx.heads = inputs
    ctx.save_for_backward(z, taps, past)


def _gradients(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
    z, taps, past = ctx.saved_tensors  # read only once: checkpointing demands it
    dz, dtaps, dpast = torch.ops.nanochat.slc2_mix_backward(dy, z, taps, past, *ctx.heads)
    return dz, dtaps, None if past is None else dpast, None, None


_INPUTS = "Tensor z, Tensor taps, Tensor? past, int n_head, int head_width"
define_operator("slc2_mix", f"({_INPUTS}) -> Tensor", _mix, _mix_shape, _gradients, _save_inputs)
define_operator("slc2_mix_backward", f"(Tensor dy, {_INPUTS}) -> (Tensor, Tensor, Tensor)", _mix_backward,
                _mix_backward_shapes)


def slc2_mix(z: Tensor, taps: Tensor, past: Tensor | None = None, *, n_head: int, head_width: int) -> Tensor:
    """Return y (B, T, E) of the joined projection z, as `slc2_core_twin` of its columns, up to rounding.

    Under torch.compile on other devices than GPUs the twin is used, which the compiler fuses itself.

    Args:
        z: (B, T, N), columns x (E), B (E), A (head_width), alpha (n_head), then padding, whose gradient is zero
        taps: (E, K), of any dtype
        past: (B, K−1, E), of any dtype; None for zeros

    Raises:
        ValueError: z is too narrow
    """
    if torch.compiler.is_compiling() and not z.is_cuda:
        return _forward_pytorch(*split_columns(z, n_head, head_width)[:4], taps, past)
    return torch.ops.nanochat.slc2_mix(z, taps, past, n_head, head_width)


# ---- the decode step


def causal_conv_step_twin(u: Tensor, taps: Tensor, past: Tensor) -> Tensor:
    """Return c (B, 1, E) of one token's gated input u (B, 1, E). The definition.

    past is written in place: its oldest row drops out and u comes in.
    """
    c = causal_conv(u, taps, past.to(u.dtype))
    past.copy_(torch.cat([past, u.to(past.dtype)], dim=1)[:, 1:])
    return c


def causal_conv_step(u: Tensor, taps: Tensor, past: Tensor) -> Tensor:
    """Return and write what `causal_conv_step_twin` does, to the last bit, in half the operations."""
    if past.dtype != u.dtype:
        return causal_conv_step_twin(u, taps, past)
    window = torch.cat([past, u], dim=1)
    past.copy_(window[:, 1:])
    return functools.reduce(torch.add, (window * taps.t()).unbind(1)).unsqueeze(1)


def slc2_step_twin(x: Tensor, B: Tensor, A: Tensor, alpha: Tensor, taps: Tensor, past: Tensor) -> Tensor:
    """Return y (B, 1, E) of one token a sequence. The definition.

    past (B, K−1, E), of any dtype, is written in place: its oldest row drops out and the token's gated input comes in.
    """
    return B * F.silu(causal_conv_step_twin(gated_input(x, A, alpha), taps.to(x.dtype), past))


def slc2_step(x: Tensor, B: Tensor, A: Tensor, alpha: Tensor, taps: Tensor, past: Tensor) -> Tensor:
    """Return and write what `slc2_step_twin` does: by a kernel up to rounding, in plain PyTorch to the last bit.

    On GPUs a CUDA graph can capture it, once it has run.
    """
    kernel = _kernel("step", x, B, A, alpha, taps, past, K=taps.shape[1])
    if kernel is not None:
        return kernel(x, B, A, alpha, taps, past)
    return B * F.silu(causal_conv_step(gated_input(x, A, alpha), taps.to(x.dtype), past))
