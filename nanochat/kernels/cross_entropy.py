"""The head and the loss in one: softcapped cross-entropy, without ever holding all logits.

`head_loss_twin` is the definition. `head_loss` walks over the tokens in chunks: a product gives a chunk's logits in x's dtype, one pass
over them gives the losses and, where a gradient is wanted, leaves the logits' gradient in their place, and two products take it on to x
and to the weight. What lives at a time is a chunk: for 65,536 tokens and V = 65,536 in bfloat16 on a GPU 1 GB instead of 69 GB.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat.kernels import native, triton_kernels

SOFTCAP = 15.0
IGNORE = -1
CHUNK_ELEMENTS = 1 << 29  # logits in a chunk, at most: 1 GB of bfloat16
TOKENS = {"cpu": 2048}  # in a chunk, at most; see `_rows`
MANY_TOKENS = 8192  # the same on accelerators
PIECE = {"cpu": 1 << 18}  # logits in hand at a time in plain PyTorch: with what is made of them, they stay in a CPU's cache
LARGE_PIECE = 1 << 26


def softcap(logits: Tensor) -> Tensor:
    """Return 15 · tanh(logits / 15): every logit within ±15."""
    return SOFTCAP * torch.tanh(logits / SOFTCAP)


def head_loss_twin(x: Tensor, weight: Tensor, targets: Tensor, reduction: str = "mean", factors: Tensor | None = None) -> Tensor:
    """Return the cross-entropy in nats of softcap(x @ weight.T) against targets; the definition of the fused form.

    x (N, E); weight (V, E); targets (N,), −1 where there is nothing to predict. reduction "mean" (over the targets that count),
    "sum", or "none": (N,) losses, 0 where the target is −1. factors (N,), with "sum" alone: what each loss is multiplied with.
    """
    logits = softcap(F.linear(x, weight.to(x.dtype)).float())
    if factors is not None:
        return (F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="none") * factors).sum()
    return F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction=reduction)


def softcapped_(z: Tensor, targets: Tensor, factors: Tensor | None, losses: Tensor, want_grad: bool = True) -> None:
    """Write the loss of each row of raw logits z to losses; with want_grad, overwrite z with the gradient of Σ factors·losses.

    z (n, V) bfloat16 or float32, contiguous; targets (n,) int64, where −1 the loss and the gradient are 0; factors (n,) float32, or None
    for 1; losses (n,) float32, not multiplied with the factors. Without want_grad z stays as it is.
    """
    if z.is_cuda and (kernel := triton_kernels("cross_entropy")) is not None:
        kernel.softcapped_(z, targets, factors, losses, want_grad)
    elif native.ready(z):
        native.softcapped_(z, targets, factors, losses, want_grad)
    else:
        softcapped_plain_(z, targets, factors, losses, want_grad)


def softcapped_plain_(z: Tensor, targets: Tensor, factors: Tensor | None, losses: Tensor, want_grad: bool = True) -> None:
    """`softcapped_` in PyTorch, a piece of z at a time: with t = tanh(z/15), softmax(15·t) is the gradient's main part, 1 − t² its slope.

    For bfloat16, tanh is 2·sigmoid(2z/15) − 1: off by up to 1e-7, nothing beside the rounding of such logits, and a CPU does it four times
    as fast. A probability is never below e^−30 / V, which float32 holds, so its logarithm is the loss.
    """
    rows = max(1, PIECE.get(z.device.type, LARGE_PIECE) // z.shape[1])
    for part in (slice(i, i + rows) for i in range(0, z.shape[0], rows)):
        piece, target = z[part], targets[part]
        counted = target != IGNORE
        index = target.where(counted, 0).unsqueeze(1)
        t = piece.float() * (1 / SOFTCAP)
        t = t.tanh_() if piece.dtype == torch.float32 else t.mul_(2).sigmoid_().mul_(2).sub_(1)
        p = (t * SOFTCAP).softmax(1)
        at_target = p.gather(1, index)
        losses[part] = torch.where(counted, -at_target.squeeze(1).log(), 0.0)
        if want_grad:
            p.scatter_(1, index, at_target - 1)
            p.mul_((counted.float() if factors is None else factors[part].where(counted, 0.0)).unsqueeze(1))
            piece.copy_(p.addcmul_(p, t.square_(), value=-1))


def _rows(x: Tensor, V: int) -> int:
    """Tokens in a chunk.

    Each chunk reads and writes the weight's gradient, 8·V·E bytes, beside its 6·n·V·E FLOPs: whatever V and E are, what that costs falls
    with n and is a few percent at 8,192 tokens on a GPU, which does some 240 FLOPs in the time of a byte, and at 2,048 on a CPU.
    More would only cost memory. Fewer, where that is needed to save some: a quarter of the tokens, but not so few that their
    logits are smaller than the weight's gradient, which has to be held anyway.
    """
    N, E = x.shape
    return max(1, min(TOKENS.get(x.device.type, MANY_TOKENS), max(-(-N // 4), 4 * E // x.element_size()), CHUNK_ELEMENTS // V))


def _chunks(N: int, rows: int) -> list[slice]:
    return [slice(i, min(i + rows, N)) for i in range(0, N, rows)]


def _add_product_(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """total += a @ b, total in float32 (first: = a @ b): in the product's own epilogue where the device can do that."""
    if a.dtype == total.dtype:
        torch.addmm(total, a, b, beta=0 if first else 1, out=total)
    elif a.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, beta=0 if first else 1, out=total)
    elif first:
        total.copy_(a @ b)
    else:
        total += a @ b


def _walk(x: Tensor, weight: Tensor, targets: Tensor, factors: Tensor | None, want_grad: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return losses (N,) in float32, and of Σ factors·losses the gradients of x, in its dtype, and of weight, in float32.

    Without want_grad the gradients are empty.
    """
    (N, _), w, rows = x.shape, weight.to(x.dtype), _rows(x, len(weight))
    losses, dx, dweight = _room(x, weight, want_grad)
    logits = x.new_empty(min(rows, N), len(weight))
    for part in _chunks(N, rows):
        z = torch.mm(x[part], w.T, out=logits[:part.stop - part.start])
        softcapped_(z, targets[part], None if factors is None else factors[part], losses[part], want_grad)
        if want_grad:
            torch.mm(z, w, out=dx[part])
            _add_product_(dweight, z.T, x[part], first=part.start == 0)
    return losses, dx, dweight


def _room(x: Tensor, weight: Tensor, want_grad: bool) -> tuple[Tensor, Tensor, Tensor]:
    """What `_walk` returns, yet to be filled."""
    losses = torch.empty(len(x), dtype=torch.float32, device=x.device)
    if not want_grad:
        return losses, x.new_empty(0), losses.new_empty(0)
    return losses, torch.empty_like(x), (torch.empty_like if len(x) else torch.zeros_like)(weight, dtype=torch.float32)


_opaque_walk = torch.library.custom_op("nanochat::head_loss", _walk, mutates_args=())  # for compilers, which shall not look inside
_opaque_walk.register_fake(lambda x, weight, targets, factors, want_grad: _room(x, weight, want_grad))


def _losses(*given: Tensor | None | bool) -> tuple[Tensor, Tensor, Tensor]:
    return (_opaque_walk if torch.compiler.is_compiling() else _walk)(*given)


class _SumLoss(torch.autograd.Function):
    """Σ factors·losses; the gradients are made in the forward pass, chunk by chunk, and saved: N·E in x's dtype, V·E in float32."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, targets: Tensor, factors: Tensor | None) -> Tensor:
        losses, dx, dweight = _losses(x, weight, targets, factors, True)
        ctx.save_for_backward(dx, dweight)
        ctx.weight_dtype = weight.dtype
        return (losses if factors is None else losses * factors).sum()

    @staticmethod
    def backward(ctx, upstream: Tensor) -> tuple[Tensor, Tensor, None, None]:
        dx, dweight = ctx.saved_tensors
        if upstream.device.type == "cpu" and not torch.compiler.is_compiling() and upstream == 1:  # nearly always: spares two copies
            return dx, dweight.to(ctx.weight_dtype), None, None
        return dx * upstream.to(dx.dtype), (dweight * upstream).to(ctx.weight_dtype), None, None


class _TokenLosses(torch.autograd.Function):
    """Each token's loss; saves its inputs and makes the logits again in the backward pass, when the losses' factors are known."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, targets)
        return _losses(x, weight, targets, None, False)[0]

    @staticmethod
    def backward(ctx, upstream: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, targets = ctx.saved_tensors
        _, dx, dweight = _losses(x, weight, targets, upstream.contiguous(), True)
        return dx, dweight.to(weight.dtype), None


def head_loss(x: Tensor, weight: Tensor, targets: Tensor, reduction: str = "mean", factors: Tensor | None = None,
              product: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """Return what `head_loss_twin` returns (arguments and shapes as there), holding one chunk of logits at a time.

    product: for a head that is no plain matrix, and measured without a gradient: it gives raw logits (n, V) of x (n, E).
    """
    if factors is not None and reduction != "sum":
        raise ValueError(f"factors go with the reduction 'sum', not {reduction!r}")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction is 'mean', 'sum' or 'none', not {reduction!r}")
    if reduction == "mean":
        factors = (1 / (targets != IGNORE).sum()).expand(len(targets))
    if factors is not None:
        factors = factors.float().contiguous()
    if product is None and torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return _TokenLosses.apply(x, weight, targets) if reduction == "none" else _SumLoss.apply(x, weight, targets, factors)
    losses = _losses(x, weight, targets, factors, False)[0] if product is None else _measured(x, product, len(weight), targets)
    if reduction == "none":
        return losses
    return (losses if factors is None else losses * factors).sum()


@torch.no_grad()
def _measured(x: Tensor, product: Callable[[Tensor], Tensor], V: int, targets: Tensor) -> Tensor:
    """Return the loss of each token, (N,) float32, of logits that `product` gives."""
    losses = torch.empty(len(x), dtype=torch.float32, device=x.device)
    for part in _chunks(len(x), _rows(x, V)):
        softcapped_(product(x[part]), targets[part], None, losses[part], want_grad=False)
    return losses
