"""The head and the loss in one: softcapped cross-entropy without all logits in memory at once.

`head_loss_twin` is the definition.

`head_loss` goes over the tokens in chunks. One matrix product gives a chunk's logits in x's dtype, one pass over them
gives the losses and, where a gradient is wanted, overwrites the logits with their gradient, and two products turn that
into the gradients of x and of the weight. Only one chunk of logits is alive at a time: 2 GB instead of 69 for 65,536
tokens and V = 65,536 in bfloat16 on a GPU.

Saved for backward: with reduction "sum" or "mean" the gradients themselves, computed in the forward pass, N·E in x's
dtype and V·E in float32; with "none" the inputs, from which backward computes the logits again. Written in place:
nothing of the caller's. Under torch.compile the whole is one operator.

The pass over a chunk, `softcapped_cross_entropy_`, is a Triton kernel on CUDA, one of the crate on CPUs, else plain
PyTorch.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat.kernels.cpu import ready as cpu_ready
from nanochat.kernels.dispatch import (
    Backend,
    Draw,
    TrainingShape,
    Trial,
    backend,
    define_operator,
    kernels_of,
    triton_ready,
)

SOFTCAP = 15.0
IGNORE = -1
CHUNK_ELEMENTS = 1 << 30  # logits in a chunk, at most: 2 GB of bfloat16
CHUNK_TOKENS = {"cpu": 2048}  # tokens in a chunk, at most; see `chunk_tokens`
CHUNK_TOKENS_ELSEWHERE = 16384  # the same on accelerators
PIECE = {"cpu": 1 << 18}  # logits that plain PyTorch works on at a time: they and the temporaries fit in a cache
PIECE_ELSEWHERE = 1 << 26


def softcap(logits: Tensor) -> Tensor:
    """Return 15 · tanh(logits / 15): every logit within ±15."""
    return SOFTCAP * torch.tanh(logits / SOFTCAP)


def head_loss_twin(x: Tensor, weight: Tensor, targets: Tensor, reduction: str = "mean",
                   factors: Tensor | None = None) -> Tensor:
    """Return the cross-entropy in nats of softcap(x @ weight.T) against targets. The definition.

    Args:
        x: (N, E)
        weight: (V, E)
        targets: (N,) token ids, −1 where there is nothing to predict
        reduction: "mean" over the targets that are not −1, "sum", or "none": the losses (N,), 0 where the target is −1
        factors: (N,), each loss is multiplied with its factor; only with "sum"
    """
    logits = softcap(F.linear(x, weight.to(x.dtype)).float())
    if factors is not None:
        return (F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="none") * factors).sum()
    return F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction=reduction)


def softcapped_cross_entropy_(z: Tensor, targets: Tensor, factors: Tensor | None, losses: Tensor,
                              want_grad: bool = True) -> None:
    """Write the softcapped cross-entropy of each row of raw logits, and overwrite the logits with their gradient.

    Args:
        z: (N, V) bfloat16 or float32, contiguous; with want_grad overwritten with the gradient of Σ factors · losses
        targets: (N,) int64; where it is −1, loss and gradient are 0
        factors: (N,) float32; None for 1
        losses: (N,) float32, written in place; not multiplied with the factors
        want_grad: False leaves z as it is
    """
    backend("cross_entropy", BACKENDS, z)(z, targets, factors, losses, want_grad)


def softcapped_cross_entropy_pytorch_(z: Tensor, targets: Tensor, factors: Tensor | None, losses: Tensor,
                                      want_grad: bool = True) -> None:
    """Do what `softcapped_cross_entropy_` does in plain PyTorch, a piece of z at a time.

    With t = tanh(z/15) and p = softmax(15·t), the gradient is (p − [target]) · (1 − t²). For bfloat16, tanh is computed
    as 2·sigmoid(2z/15) − 1, which a CPU does four times as fast: it is off by up to 1e-7, far below the rounding of
    such logits. A probability is never below e^−30 / V, which float32 can represent, so that the loss is its logarithm.
    """
    rows = max(1, PIECE.get(z.device.type, PIECE_ELSEWHERE) // z.shape[1])
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


def _triton(*args: Tensor | None | bool) -> None:
    kernels_of("cross_entropy", "triton").softcapped_cross_entropy_(*args)


def _cpu(*args: Tensor | None | bool) -> None:
    kernels_of("cross_entropy", "cpu").softcapped_cross_entropy_(*args)


BACKENDS = {"triton": Backend(_triton, triton_ready), "cpu": Backend(_cpu, cpu_ready),
            "torch": Backend(softcapped_cross_entropy_pytorch_)}


def chunk_tokens(x: Tensor, V: int) -> int:
    """Return how many tokens of x (N, E) a chunk has.

    A chunk of n tokens does 6·n·V·E FLOPs, and reads and writes the weight's gradient, 8·V·E bytes. For any V and E the
    cost of the second falls with n. It is about two percent at 16,384 tokens on a GPU, which does some 240 FLOPs in the
    time of a byte, and at 2,048 on a CPU. More tokens would only cost memory. Where there are few tokens, a chunk is a
    quarter of them to save memory, but not so few that its logits take less memory than the weight's gradient, which is
    held anyway.
    """
    N, E = x.shape
    most = CHUNK_TOKENS.get(x.device.type, CHUNK_TOKENS_ELSEWHERE)
    return max(1, min(most, max(-(-N // 4), 4 * E // x.element_size()), CHUNK_ELEMENTS // V))


def _chunks(N: int, tokens: int) -> list[slice]:
    return [slice(i, min(i + tokens, N)) for i in range(0, N, tokens)]


def _add_product_(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """total += a @ b (first: = a @ b), total in float32; fused into the product where the device can do that."""
    if a.dtype == total.dtype:
        torch.addmm(total, a, b, beta=0 if first else 1, out=total)
    elif a.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, beta=0 if first else 1, out=total)
    elif first:
        total.copy_(a @ b)
    else:
        total += a @ b


def _losses_and_gradients(x: Tensor, weight: Tensor, targets: Tensor, factors: Tensor | None,
                          want_grad: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return the losses (N,) in float32, and of Σ factors · losses the gradients of x and weight.

    The gradient of x has x's dtype, that of weight float32. Without want_grad both are empty.
    """
    (N, _), w, tokens = x.shape, weight.to(x.dtype), chunk_tokens(x, len(weight))
    losses, dx, dweight = _empty_results(x, weight, targets, factors, want_grad)
    logits = x.new_empty(min(tokens, N), len(weight))
    for part in _chunks(N, tokens):
        z = torch.mm(x[part], w.T, out=logits[:part.stop - part.start])
        its_factors = None if factors is None else factors[part]
        softcapped_cross_entropy_(z, targets[part], its_factors, losses[part], want_grad)
        if want_grad:
            torch.mm(z, w, out=dx[part])
            _add_product_(dweight, z.T, x[part], first=part.start == 0)
    return losses, dx, dweight


def _empty_results(x: Tensor, weight: Tensor, targets: Tensor, factors: Tensor | None,
                   want_grad: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return uninitialised results of `_losses_and_gradients`; zeros where no chunk would write them."""
    losses = torch.empty(len(x), dtype=torch.float32, device=x.device)
    if not want_grad:
        return losses, x.new_empty(0), losses.new_empty(0)
    return losses, torch.empty_like(x), (torch.empty_like if len(x) else torch.zeros_like)(weight, dtype=torch.float32)


_SCHEMA = "(Tensor x, Tensor weight, Tensor targets, Tensor? factors, bool want_grad) -> (Tensor, Tensor, Tensor)"
define_operator("head_loss", _SCHEMA, _losses_and_gradients, _empty_results)


def _run(*given: Tensor | None | bool) -> tuple[Tensor, Tensor, Tensor]:
    return (torch.ops.nanochat.head_loss if torch.compiler.is_compiling() else _losses_and_gradients)(*given)


class _SumLoss(torch.autograd.Function):
    """Σ factors · losses. The forward pass computes the gradients too and saves them."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, targets: Tensor, factors: Tensor | None) -> Tensor:
        losses, dx, dweight = _run(x, weight, targets, factors, True)
        ctx.save_for_backward(dx, dweight)
        ctx.weight_dtype = weight.dtype
        return (losses if factors is None else losses * factors).sum()

    @staticmethod
    def backward(ctx, upstream: Tensor) -> tuple[Tensor, Tensor, None, None]:
        dx, dweight = ctx.saved_tensors
        if upstream.device.type == "cpu" and not torch.compiler.is_compiling() and upstream == 1:
            # the usual case; saves two copies
            return dx, dweight.to(ctx.weight_dtype), None, None
        return dx * upstream.to(dx.dtype), (dweight * upstream).to(ctx.weight_dtype), None, None


class _TokenLosses(torch.autograd.Function):
    """The loss of each token. Saves its inputs; backward, which knows the factors, computes the logits again."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, targets)
        return _run(x, weight, targets, None, False)[0]

    @staticmethod
    def backward(ctx, upstream: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, targets = ctx.saved_tensors
        _, dx, dweight = _run(x, weight, targets, upstream.contiguous(), True)
        return dx, dweight.to(weight.dtype), None


def head_loss(x: Tensor, weight: Tensor, targets: Tensor, reduction: str = "mean", factors: Tensor | None = None,
              product: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """Return what `head_loss_twin` returns, up to rounding, with one chunk of logits alive at a time.

    Args:
        x, weight, targets, reduction, factors: as in `head_loss_twin`; gradients are those of x and weight
        product: computes the raw logits (n, V) of x (n, E), where the head is no plain matrix (quantised weights); the
            loss then has no gradient

    Raises:
        ValueError: factors with another reduction than "sum", or an unknown reduction
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
        if reduction == "none":
            return _TokenLosses.apply(x, weight, targets)
        return _SumLoss.apply(x, weight, targets, factors)
    if product is None:
        losses = _run(x, weight, targets, factors, False)[0]
    else:
        losses = _losses_of_product(x, product, len(weight), targets)
    if reduction == "none":
        return losses
    return (losses if factors is None else losses * factors).sum()


@torch.no_grad()
def _losses_of_product(x: Tensor, product: Callable[[Tensor], Tensor], V: int, targets: Tensor) -> Tensor:
    """Return the loss of each token, (N,) float32, from logits that `product` computes."""
    losses = torch.empty(len(x), dtype=torch.float32, device=x.device)
    for part in _chunks(len(x), chunk_tokens(x, V)):
        softcapped_cross_entropy_(product(x[part]), targets[part], None, losses[part], want_grad=False)
    return losses


def trial(shape: TrainingShape, draw: Draw) -> Trial:
    """Return what the chooser measures: the whole head, of which the pass over the logits is a part."""
    x, weight = draw(shape.B * shape.T, shape.E), draw(shape.V, shape.E, dtype=torch.float32)
    targets = torch.randint(-1, shape.V, (len(x),), device=x.device)
    return Trial(head_loss, head_loss_twin, (x, weight, targets), asked=(x,), inside_blocks=False)
