"""The core of SLC2: gate, causal depthwise convolution and output gate, between the input projections and c_proj.

`slc2_core_twin` is the definition, in a few lines. `slc2_mix` gives the same numbers, up to rounding, from the joined projection, as one
operator that torch.compile and checkpointing see whole: on GPUs a Triton kernel each way, on CPUs our crate's, elsewhere plain PyTorch that
keeps no more for backward.
"""

import functools
import importlib.util
import types

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat.kernels import native


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


def slc2_core_twin(x: Tensor, B: Tensor, A: Tensor, alpha: Tensor, taps: Tensor, past: Tensor | None = None) -> Tensor:
    """Return y = B · silu(c) of shape (B, T, E), where c convolves the gated input; the definition of the fused form.

    x, B (B, T, E); A (B, T, D); alpha (B, T, H); taps (E, K); past as in `causal_taps`. The formula is that of the published code.
    """
    return B * F.silu(causal_taps(gated_input(x, A, alpha), taps, past))


def _silu_and_slope(z: Tensor) -> tuple[Tensor, Tensor]:
    """Return silu(z) and its derivative."""
    s = torch.sigmoid(z)
    return z * s, s * (1 + z * (1 - s))


def _plain_forward(x: Tensor, B: Tensor, A: Tensor, alpha: Tensor, taps: Tensor, past: Tensor | None = None) -> Tensor:
    return slc2_core_twin(x, B, A, alpha, taps.to(x.dtype), None if past is None else past.to(x.dtype))


def _plain_backward(dy: Tensor, x: Tensor, B: Tensor, A: Tensor, alpha: Tensor, taps: Tensor, past: Tensor | None,
                    dx: Tensor, dB: Tensor, dA: Tensor, dalpha: Tensor) -> tuple[Tensor, Tensor | None]:
    """Write the gradients of the twin into dx, dB, dA, dalpha, recomputing gate and convolution; return dtaps in float32, and dpast."""
    K, T, taps = taps.shape[1], x.shape[1], taps.to(x.dtype)
    silu_alpha, slope_alpha = _silu_and_slope(alpha)
    gate, slope_gate = _silu_and_slope(silu_alpha.unsqueeze(-1) * A.unsqueeze(-2))  # (B, T, H, D)
    gate, slope_gate = gate.flatten(-2), slope_gate.flatten(-2)
    u = F.pad(gate * x, (0, 0, K - 1, 0)) if past is None else torch.cat([past.to(x.dtype), gate * x], dim=1)
    silu_c, slope_c = _silu_and_slope(sum(taps[:, j] * u[:, j:j + T] for j in range(K)))
    torch.mul(dy, silu_c, out=dB)
    dc = dy * B * slope_c
    dtaps = torch.stack([(dc * u[:, j:j + T]).sum((0, 1), dtype=torch.float32) for j in range(K)], dim=1)
    before = 0 if past is None else K - 1
    dc = F.pad(dc, (0, 0, before, K - 1))
    du = sum(taps[:, j] * dc[:, K - 1 - j:K - 1 - j + T + before] for j in range(K))  # of past, too, where there is one
    dpast, du = None if past is None else du[:, :before].to(past.dtype, copy=True), du[:, before:]
    torch.mul(du, gate, out=dx)
    dz = (du * x * slope_gate).unflatten(-1, (alpha.shape[-1], A.shape[-1]))  # gradient of silu(alpha) ⊗ A
    dA.copy_((dz * silu_alpha.unsqueeze(-1)).sum(-2))
    torch.mul((dz * A.unsqueeze(-2)).sum(-1), slope_alpha, out=dalpha)
    return dtaps, dpast


_NATIVE = types.SimpleNamespace(forward=native.slc2_forward, backward=native.slc2_backward, step=native.slc2_step)
_PLAIN = types.SimpleNamespace(forward=_plain_forward, backward=_plain_backward)


@functools.cache
def _triton_runs_on(device: torch.device) -> bool:
    """Is Triton installed, and this a GPU of NVIDIA's, Ampere or later?"""
    return (importlib.util.find_spec("triton") is not None and torch.version.hip is None
            and torch.cuda.get_device_capability(device) >= (8, 0))


def uses_triton(z: Tensor, K: int = 3) -> bool:
    """Do SLC2's operations on z, with K taps, run our Triton kernels?"""
    return z.is_cuda and K <= 4 and z.dtype in (torch.bfloat16, torch.float16, torch.float32) and _triton_runs_on(z.device)


def kernels_for(x: Tensor, *others: Tensor, K: int) -> types.ModuleType | types.SimpleNamespace | None:
    """Return what offers forward, backward and step for these tensors: Triton's kernels, those for CPUs, or None."""
    if uses_triton(x, K):
        from nanochat.kernels.triton import slc2
        return slc2
    return _NATIVE if x.numel() and native.ready(x, *others) else None


def _dense(t: Tensor | None) -> Tensor | None:
    """Return t with its last dimension contiguous."""
    return t if t is None or t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


def columns(z: Tensor, n_head: int, head_width: int) -> list[Tensor]:
    """Return x, B, A, alpha and what is left, which is padding, of the joined projection z (B, T, N): its columns in this order."""
    E = n_head * head_width
    used = 2 * E + head_width + n_head
    if z.dim() != 3 or z.shape[-1] < used:
        raise ValueError(f"z must be (B, T, N) with N of at least 2·E + D + H = {used}, not {tuple(z.shape)}")
    return list(z.split([E, E, head_width, n_head, z.shape[-1] - used], dim=-1))


def _mix(z: Tensor, taps: Tensor, past: Tensor | None, n_head: int, head_width: int) -> Tensor:
    *inputs, _ = columns(_dense(z), n_head, head_width)
    kernels = kernels_for(*inputs, taps, K=taps.shape[1]) or _PLAIN
    return kernels.forward(*inputs, taps, _dense(past))


def _mix_shape(z, taps, past, n_head, head_width):
    return z.new_empty(z.shape[0], z.shape[1], n_head * head_width)


def _mix_backward(dy: Tensor, z: Tensor, taps: Tensor, past: Tensor | None, n_head: int, head_width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return dz, zero in the padding; dtaps; and dpast, empty where there is no past."""
    dz = torch.empty(z.shape, dtype=z.dtype, device=z.device)
    *inputs, _ = columns(_dense(z), n_head, head_width)
    *gradients, padding = columns(dz, n_head, head_width)
    kernels, pad = kernels_for(*inputs, taps, K=taps.shape[1]) or _PLAIN, {}
    if uses_triton(z, taps.shape[1]):
        pad = {"pad": padding.shape[-1]}  # written in passing
    else:
        padding.zero_()
    dtaps, dpast = kernels.backward(_dense(dy), *inputs, taps, _dense(past), *gradients, **pad)
    return dz, dtaps.to(taps.dtype), z.new_empty(0) if dpast is None else dpast


def _mix_backward_shapes(dy, z, taps, past, n_head, head_width):
    return z.new_empty(z.shape), taps.new_empty(taps.shape), z.new_empty(0) if past is None else past.new_empty(past.shape)


def _keep_inputs(ctx, inputs, output) -> None:
    z, taps, past, *ctx.heads = inputs
    ctx.save_for_backward(z, taps, past)


def _gradients(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
    z, taps, past = ctx.saved_tensors  # read once, as checkpointing demands
    dz, dtaps, dpast = torch.ops.nanochat.slc2_mix_backward(dy, z, taps, past, *ctx.heads)
    return dz, dtaps, None if past is None else dpast, None, None


# Not by `torch.library.custom_op`: its first call imports the whole compiler, which takes seconds.
_LIBRARY = torch.library.Library("nanochat", "FRAGMENT")
_INPUTS = "Tensor z, Tensor taps, Tensor? past, int n_head, int head_width"
for name, schema, run, shapes in (
        ("slc2_mix", f"({_INPUTS}) -> Tensor", _mix, _mix_shape),
        ("slc2_mix_backward", f"(Tensor dy, {_INPUTS}) -> (Tensor, Tensor, Tensor)", _mix_backward, _mix_backward_shapes)):
    _LIBRARY.define(name + schema, tags=torch.Tag.pt2_compliant_tag)
    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"nanochat::{name}", shapes, lib=_LIBRARY)
torch.library.register_autograd("nanochat::slc2_mix", _gradients, setup_context=_keep_inputs, lib=_LIBRARY)


def slc2_mix(z: Tensor, taps: Tensor, past: Tensor | None = None, *, n_head: int, head_width: int) -> Tensor:
    """Return y = B · silu(c) of shape (B, T, E), E = n_head · head_width, of the joined projection z.

    z (B, T, N): columns x (E), B (E), A (head_width), alpha (n_head), then padding, whose gradient is zero. taps (E, K) and past
    (B, K−1, E), the gated inputs before z, oldest first, may have dtypes of their own. Nothing but the inputs is kept for backward.
    Under torch.compile on other devices than GPUs the twin is used, which the compiler fuses itself.
    """
    if torch.compiler.is_compiling() and not z.is_cuda:
        return _plain_forward(*columns(z, n_head, head_width)[:4], taps, past)
    return torch.ops.nanochat.slc2_mix(z, taps, past, n_head, head_width)
