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
from collections.abc import Callable
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from nanochat.kernels.cpu import ready as cpu_ready
from nanochat.kernels.dispatch import (
    Backend,
    Draw,
    TrainingShape,
    Trial,
    backend,
    chosen_backend,
    define_operator,
    has_triton,
    kernels_of,
)

# ---- definitions


def gated_input(x: Tensor, A: Tensor, alpha: Tensor) -> Tensor:
    """Return u = silu(silu(alpha) ⊗ A) · x of shape (..., E), from x (..., E), A (..., D) and alpha (..., H)."""
    return F.silu(F.silu(alpha).unsqueeze(-1) * A.unsqueeze(-2)).flatten(-2) * x


def causal_conv_twin(u: Tensor, taps: Tensor, past: Tensor | None = None) -> Tensor:
    """Return the causal depthwise convolution c (B, T, E), c[t] = Σ_j taps[:, j] · u[t − (K−1) + j].

    Args:
        u: (B, T, E)
        taps: (E, K); the last tap weighs the present token
        past: (B, K−1, E), the inputs before u, oldest first; None for zeros
    """
    K, T = taps.shape[1], u.shape[1]
    padded = F.pad(u, (0, 0, K - 1, 0)) if past is None else torch.cat([past, u], dim=1)
    return sum(taps[:, j] * padded[:, j:j + T] for j in range(K))


def _conv_gradients(dc: Tensor, u: Tensor, taps: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of u (B, T, E), without a past, and of the taps, in float32 or wider."""
    du, dtaps = dc * taps[:, -1], []
    for back, tap in enumerate(taps.t().flip(0)):
        later, earlier = dc[:, back:], u[:, :max(0, u.shape[1] - back)]
        if back:
            du[:, :-back].addcmul_(later, tap)
        dtaps.insert(0, (later * earlier).sum((0, 1), dtype=torch.promote_types(dc.dtype, torch.float32)))
    return du, torch.stack(dtaps, dim=1)


class _CausalConv(torch.autograd.Function):
    """The convolution of whole rows in a third of the passes over memory that autograd makes; it keeps u and the taps
    alone."""

    @staticmethod
    def forward(ctx, u: Tensor, taps: Tensor) -> Tensor:
        ctx.save_for_backward(u, taps)
        c = u * taps[:, -1]
        for back, tap in enumerate(taps.t().flip(0)[1:], start=1):
            c[:, back:].addcmul_(u[:, :-back], tap)
        return c

    @staticmethod
    @once_differentiable
    def backward(ctx, dc: Tensor) -> tuple[Tensor, Tensor]:
        u, taps = ctx.saved_tensors
        du, dtaps = _conv_gradients(dc, u, taps)
        return du, dtaps.to(taps.dtype)


def causal_conv(u: Tensor, taps: Tensor, past: Tensor | None = None) -> Tensor:
    """Return what `causal_conv_twin` returns, up to rounding."""
    if past is None and u.device.type == "cpu" and not torch.compiler.is_compiling():  # a compiler fuses the twin
        return _CausalConv.apply(u, taps)
    return causal_conv_twin(u, taps, past)


def slc2_core_twin(x: Tensor, B: Tensor, A: Tensor, alpha: Tensor, taps: Tensor, past: Tensor | None = None) -> Tensor:
    """Return y = B · silu(c) (B, T, E), where c is the convolution of the gated input. The definition.

    The formula is that of the published code.
    """
    return B * F.silu(causal_conv_twin(gated_input(x, A, alpha), taps, past))


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
    """Write the gradients of the twin into dx, dB, dA and dalpha; return dtaps in float32 or wider, and dpast or None.

    Gate and convolution are computed again from the inputs.
    """
    taps = taps.to(x.dtype)
    silu_alpha, d_alpha = _silu_and_derivative(alpha)
    gate, d_gate = _silu_and_derivative(silu_alpha.unsqueeze(-1) * A.unsqueeze(-2))  # (B, T, H, D)
    gate, d_gate = gate.flatten(-2), d_gate.flatten(-2)
    before, u = 0, gate * x
    if past is not None:
        before, u = past.shape[1], torch.cat([past.to(x.dtype), u], dim=1)
    silu_c, d_c = _silu_and_derivative(causal_conv_twin(u, taps)[:, before:])
    torch.mul(dy, silu_c, out=dB)
    du, dtaps = _conv_gradients(F.pad(dy * B * d_c, (0, 0, before, 0)), u, taps)  # past's first, where there is one
    dpast, du = None if past is None else du[:, :before].to(past.dtype, copy=True), du[:, before:]
    torch.mul(du, gate, out=dx)
    dz = (du * x * d_gate).unflatten(-1, (alpha.shape[-1], A.shape[-1]))  # gradient of silu(alpha) ⊗ A
    dA.copy_((dz * silu_alpha.unsqueeze(-1)).sum(-2))
    torch.mul((dz * A.unsqueeze(-2)).sum(-1), d_alpha, out=dalpha)
    return dtaps, dpast


# ---- the choice


def uses_triton(z: Tensor, K: int = 3) -> bool:
    """Return whether the operations on z, with K taps, run the Triton kernels."""
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    return z.is_cuda and K <= 4 and z.dtype in dtypes and has_triton(z.device)


def _kernels(taps: Tensor, *others: Tensor) -> ModuleType | None:
    """Return the module of the kernels for these tensors, triton.py or cpu.py, or None for plain PyTorch."""
    name = chosen_backend("slc2", BACKENDS, taps, *others)
    return None if name == "torch" else kernels_of("slc2", name)


def _dense(t: Tensor | None) -> Tensor | None:
    """Return t with its last dimension contiguous."""
    return t if t is None or t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


# ---- many tokens


def _mix(z: Tensor, taps: Tensor, past: Tensor | None, n_head: int, head_width: int) -> Tensor:
    *inputs, _ = split_columns(_dense(z), n_head, head_width)
    kernels = _kernels(taps, *inputs)
    return (kernels.forward if kernels else _forward_pytorch)(*inputs, taps, _dense(past))


def _mix_shape(z, taps, past, n_head, head_width):
    return z.new_empty(z.shape[0], z.shape[1], n_head * head_width)


def _mix_backward(dy: Tensor, z: Tensor, taps: Tensor, past: Tensor | None, n_head: int,
                  head_width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return dz, zero in the padding; dtaps; and dpast, empty where there is no past."""
    dz = torch.empty(z.shape, dtype=z.dtype, device=z.device)
    *inputs, _ = split_columns(_dense(z), n_head, head_width)
    *gradients, padding = split_columns(dz, n_head, head_width)
    kernels, pad = _kernels(taps, *inputs), {}
    if chosen_backend("slc2", BACKENDS, taps, *inputs) == "triton":
        pad = {"pad": padding.shape[-1]}  # this kernel writes the zeros too
    else:
        padding.zero_()
    run = kernels.backward if kernels else _backward_pytorch
    dtaps, dpast = run(_dense(dy), *inputs, taps, _dense(past), *gradients, **pad)
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


def _operator(z: Tensor, taps: Tensor, past: Tensor | None, n_head: int, head_width: int) -> Tensor:
    return torch.ops.nanochat.slc2_mix(z, taps, past, n_head, head_width)


def _pytorch(z: Tensor, taps: Tensor, past: Tensor | None, n_head: int, head_width: int) -> Tensor:
    """In eager mode the operator, whose plain form saves its inputs alone; the twin where the compiler fuses it."""
    if not torch.compiler.is_compiling():
        return _operator(z, taps, past, n_head, head_width)
    return _forward_pytorch(*split_columns(z, n_head, head_width)[:4], taps, past)


BACKENDS = {"triton": Backend(_operator, lambda taps, x, *others: uses_triton(x, taps.shape[1])),
            "cpu": Backend(_operator, lambda taps, x, *others: cpu_ready(taps, x, *others) and x.numel() > 0),
            "torch": Backend(_pytorch)}


def slc2_mix(z: Tensor, taps: Tensor, past: Tensor | None = None, *, n_head: int, head_width: int) -> Tensor:
    """Return y (B, T, E) of the joined projection z, as `slc2_core_twin` of its columns, up to rounding.

    Args:
        z: (B, T, N), columns x (E), B (E), A (head_width), alpha (n_head), then padding, whose gradient is zero
        taps: (E, K), of any dtype
        past: (B, K−1, E), of any dtype; None for zeros

    Raises:
        ValueError: z is too narrow
    """
    return backend("slc2", BACKENDS, taps, z)(z, taps, past, n_head, head_width)


def trial(shape: TrainingShape, draw: Draw) -> Trial:
    """Return what the chooser measures: the core of a layer, from its joined projections."""
    heads = {"n_head": shape.H, "head_width": shape.D}
    used = 2 * shape.E + shape.D + shape.H
    z, taps = draw(shape.B, shape.T, used + -used % 16), draw(shape.E, shape.K)

    def twin(z: Tensor, taps: Tensor) -> Tensor:
        return slc2_core_twin(*split_columns(z, **heads)[:4], taps)
    *columns, _ = (column[:, :1] for column in split_columns(z.detach(), **heads))
    past = draw(shape.B, shape.K - 1, shape.E, grad=False)

    def on_a_copy(step: Callable) -> Callable:
        return lambda past, *inputs: step(*inputs, past.clone())  # the step writes it
    step = Trial(on_a_copy(slc2_step), on_a_copy(slc2_step_twin), (past, *columns, taps.detach()))
    return Trial(functools.partial(slc2_mix, **heads), twin, (z, taps), asked=(taps, z), also=(step,))


# ---- the decode step


def causal_conv_step_twin(u: Tensor, taps: Tensor, past: Tensor) -> Tensor:
    """Return c (B, 1, E) of one token's gated input u (B, 1, E). The definition.

    past is written in place: its oldest row drops out and u comes in.
    """
    c = causal_conv_twin(u, taps, past.to(u.dtype))
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
    if kernels := _kernels(taps, x, B, A, alpha, past):
        return kernels.step(x, B, A, alpha, taps, past)
    return B * F.silu(causal_conv_step(gated_input(x, A, alpha), taps.to(x.dtype), past))
