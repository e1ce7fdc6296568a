"""MLP and head with products in 8 bits: off by default, `--fp8` of base_train.

Each operand is one tensor with one scale, found anew each time from its largest magnitude ("tensorwise, dynamic").
Activations and weights are float8_e4m3fn, gradients float8_e5m2, which has less precision and more range. Sums are
float32; weights stay float32, and so does their gradient.

There are two ways to run the same code (`how`). "real": torch._scaled_mm, on GPUs of compute capability 8.9 and newer.
"emulated": operands are rounded in the same way, and then multiplied in float32. It is what the effect on the loss is
measured with where no such GPU is, and what the tests compare with.

Of the MLP, x, a = relu(x · w1ᵀ)² and the scales are saved for backward; of the head, its gradients, as in
`cross_entropy`. Written in place: nothing of the caller's. Under torch.compile the MLP is traced, and the compiler
fuses the rounding with what is before it; in eager mode that takes longer than 8 bits save. A call whose sizes are not
multiples of 16, which the products demand, is for the ordinary operations: see `fits`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from nanochat.errors import UserError
from nanochat.kernels.cross_entropy import IGNORE, softcapped_cross_entropy_
from nanochat.kernels.relu2 import backward_of_result, relu_squared_twin

REAL, EMULATED = "real", "emulated"
ACTIVATION, GRADIENT = torch.float8_e4m3fn, torch.float8_e5m2
MULTIPLE = 16  # of all sizes of a product
HEAD_TOKENS = 8192  # whose logits are alive at a time
HEAD_BYTES = 1 << 33  # of gradients of logits in 8 bits that are kept for one product, at most
HEAD_SCALE = 2.0 ** 15  # of gradients of logits, which are at most 1: below the largest float8_e5m2, 57,344


def check_fp8(how: str, device: torch.device) -> None:
    """Raise UserError where products in 8 bits cannot run in this way on the device."""
    if how == EMULATED:
        return
    needs = "--fp8 needs an NVIDIA GPU of compute capability 8.9 or newer, such as an H100 or an RTX 4090"
    way_out = "Leave out --fp8; --fp8-emulated rounds in the same way on any device, slowly, to measure the loss."
    if device.type != "cuda" or torch.version.hip is not None:
        raise UserError(f"{needs}; this run is on {device.type}. {way_out}")
    if (capability := torch.cuda.get_device_capability(device)) < (8, 9):
        name = torch.cuda.get_device_name(device)
        raise UserError(f"{needs}; {name} has {'.'.join(map(str, capability))}. {way_out}")


def fits(x: Tensor, *matrices: Tensor) -> bool:
    """Whether all sizes of the products of x (..., E) with these matrices are multiples of 16."""
    return x.numel() > 0 and not any(size % MULTIPLE for size in (x.numel() // x.shape[-1], x.shape[-1],
                                                                  *(size for m in matrices for size in m.shape)))


# ---- operands and products

def scale_of(t: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the float32 number to multiply t with, so that its largest magnitude is the largest of an 8-bit dtype."""
    return torch.finfo(dtype).max / t.abs().amax().float().clamp_min(1e-12)


def rounded(t: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return t · scale in an 8-bit dtype; what is beyond its range becomes the largest."""
    largest = torch.finfo(dtype).max
    return (t.float() * scale).clamp(-largest, largest).to(dtype)


def product(a: Tensor, b: Tensor, scale: Tensor, out_dtype: torch.dtype, how: str, fast: bool = False) -> Tensor:
    """Return a · bᵀ / scale of 8-bit operands.

    Args:
        a, b: (M, K) and (N, K), both contiguous along K: 8-bit products exist for this layout alone
        scale: of a times that of b
        fast: sum in fewer bits, which forward passes can bear
    """
    if how == EMULATED:
        return ((a.float() @ b.float().t()) / scale).to(out_dtype)
    return torch._scaled_mm(a, b.t(), scale_a=1 / scale, scale_b=torch.ones_like(scale), out_dtype=out_dtype,
                            use_fast_accum=fast)


def _turned(t: Tensor) -> Tensor:
    """Return the transpose of t, contiguous."""
    return t.t().contiguous()


# ---- the MLP

class _Fp8MLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, w1: Tensor, w2: Tensor, how: str) -> Tensor:
        of_x, of_w1, of_w2 = (scale_of(t, ACTIVATION) for t in (x, w1, w2))
        h = product(rounded(x, of_x, ACTIVATION), rounded(w1, of_w1, ACTIVATION), of_x * of_w1, x.dtype, how, True)
        a = relu_squared_twin(h)
        of_a = scale_of(a, ACTIVATION)
        y = product(rounded(a, of_a, ACTIVATION), rounded(w2, of_w2, ACTIVATION), of_a * of_w2, x.dtype, how, True)
        ctx.save_for_backward(x, a, w1, w2, of_x, of_a, of_w1, of_w2)
        ctx.how = how
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x, a, w1, w2, of_x, of_a, of_w1, of_w2 = ctx.saved_tensors
        of_dy = scale_of(dy, GRADIENT)
        dy8 = rounded(dy, of_dy, GRADIENT)
        da = product(dy8, _turned(rounded(w2, of_w2, ACTIVATION)), of_dy * of_w2, dy.dtype, ctx.how)
        dw2 = product(_turned(dy8), _turned(rounded(a, of_a, ACTIVATION)), of_dy * of_a, w2.dtype, ctx.how)
        dh = backward_of_result(da, a)
        of_dh = scale_of(dh, GRADIENT)
        dh8 = rounded(dh, of_dh, GRADIENT)
        dx = product(dh8, _turned(rounded(w1, of_w1, ACTIVATION)), of_dh * of_w1, x.dtype, ctx.how)
        dw1 = product(_turned(dh8), _turned(rounded(x, of_x, ACTIVATION)), of_dh * of_x, w1.dtype, ctx.how)
        return dx, dw1, dw2, None


def fp8_mlp(x: Tensor, w1: Tensor, w2: Tensor, how: str) -> Tensor:
    """Return relu(x · w1ᵀ)² · w2ᵀ (..., E) with products in 8 bits, from x (..., E), w1 (F, E) and w2 (E, F)."""
    return _Fp8MLP.apply(x.flatten(0, -2), w1, w2, how).unflatten(0, x.shape[:-1])


# ---- the head

def _losses_and_gradients(x: Tensor, weight: Tensor, targets: Tensor, factors: Tensor | None,
                          how: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return the losses (N,) in float32, and of Σ factors · losses the gradients of x, in its dtype, and of weight, in
    float32.

    A chunk's logits become their gradient in place, as in `cross_entropy`, times a scale that needs no search: a
    gradient is at most the largest factor. Rounded, they are kept for many chunks, so that the weight's gradient is one
    product.
    """
    (N, E), V = x.shape, len(weight)
    of_x, of_w = scale_of(x, ACTIVATION), scale_of(weight, ACTIVATION)
    x8, w8 = rounded(x, of_x, ACTIVATION), rounded(weight, of_w, ACTIVATION)
    w8_turned, x8_turned = _turned(w8), _turned(x8)
    largest = x.new_ones((), dtype=torch.float32) if factors is None else factors.abs().amax().clamp_min(1e-30)
    of_z = HEAD_SCALE / largest
    scaled = of_z.expand(N).contiguous() if factors is None else factors * of_z
    losses, dx = torch.empty(N, dtype=torch.float32, device=x.device), torch.empty_like(x)
    dweight = torch.zeros(V, E, dtype=torch.float32, device=x.device)
    group = max(MULTIPLE, min(N, HEAD_BYTES // V) // MULTIPLE * MULTIPLE)
    for first in range(0, N, group):
        end = min(first + group, N)
        z8_turned = torch.empty(V, end - first, dtype=GRADIENT, device=x.device)
        for start in range(first, end, HEAD_TOKENS):
            part = slice(start, min(start + HEAD_TOKENS, end))
            z = product(x8[part], w8, of_x * of_w, x.dtype, how, True)
            softcapped_cross_entropy_(z, targets[part], scaled[part], losses[part])
            z8 = z.to(GRADIENT)
            dx[part] = product(z8, w8_turned, of_z * of_w, x.dtype, how)
            z8_turned[:, start - first:part.stop - first] = z8.t()
        of_group = x8_turned if end - first == N else x8_turned[:, first:end].contiguous()
        dweight += product(z8_turned, of_group, of_z * of_x, torch.float32, how)
    return losses, dx, dweight


class _Fp8SumLoss(torch.autograd.Function):
    """Σ factors · losses. The forward pass computes the gradients too and saves them."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, targets: Tensor, factors: Tensor | None, how: str) -> Tensor:
        losses, dx, dweight = _losses_and_gradients(x, weight, targets, factors, how)
        ctx.save_for_backward(dx, dweight)
        ctx.weight_dtype = weight.dtype
        return (losses if factors is None else losses * factors).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor) -> tuple[Tensor | None, ...]:
        dx, dweight = ctx.saved_tensors
        return dx * upstream.to(dx.dtype), (dweight * upstream).to(ctx.weight_dtype), None, None, None


def fp8_head_loss(x: Tensor, weight: Tensor, targets: Tensor, reduction: str, factors: Tensor | None,
                  how: str) -> Tensor:
    """Return the loss as `cross_entropy.head_loss` does, with products in 8 bits; reduction is "mean" or "sum"."""
    if reduction == "mean":
        factors = (1 / (targets != IGNORE).sum()).expand(len(targets))
    return _Fp8SumLoss.apply(x, weight, targets, None if factors is None else factors.float().contiguous(), how)


# ---- definitions

def _quantised(t: Tensor, dtype: torch.dtype) -> Tensor:
    scale = scale_of(t, dtype)
    return rounded(t, scale, dtype).double() / scale.double()


def fp8_mlp_twin(x: Tensor, w1: Tensor, w2: Tensor, dy: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the result of `fp8_mlp` and the gradients of x, w1 and w2, from operands rounded to 8 bits and back. The
    definition; products are float64, x is (N, E)."""
    x8, w1_8, w2_8 = (_quantised(t, ACTIVATION) for t in (x, w1, w2))
    dy8 = _quantised(dy, GRADIENT)
    a = relu_squared_twin(F.linear(x8, w1_8).to(x.dtype))
    a8 = _quantised(a, ACTIVATION)
    dh = backward_of_result((dy8 @ w2_8).to(dy.dtype), a)
    dh8 = _quantised(dh, GRADIENT)
    return F.linear(a8, w2_8), dh8 @ w1_8, dh8.t() @ x8, dy8.t() @ a8
