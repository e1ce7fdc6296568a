"""The head and the loss in one: softcapped cross-entropy, without ever holding all logits.

`head_loss_twin` is the definition. `head_loss` walks over the tokens in chunks and, where a gradient is wanted, computes it on the way,
so that at most a chunk of float32 logits lives at a time: for 65,536 tokens and V = 65,536 that is 0.27 GB instead of 17 GB.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

SOFTCAP = 15.0
IGNORE = -1
CHUNK_ELEMENTS = 1 << 26  # logits in a chunk: 256 MB of float32


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


def _chunks(N: int, V: int) -> list[slice]:
    rows = max(1, min(N, CHUNK_ELEMENTS // V))
    return [slice(i, min(i + rows, N)) for i in range(0, N, rows)]


class _SumLoss(torch.autograd.Function):
    """Sum of losses over all tokens, each times its factor; the gradients of x and weight are made in the forward pass, chunk by chunk."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, targets: Tensor, factors: Tensor | None) -> Tensor:
        w = weight.to(x.dtype)
        total = torch.zeros((), dtype=torch.float32, device=x.device)
        dx = torch.empty_like(x)
        dweight = torch.zeros_like(weight, dtype=torch.float32)
        for part in _chunks(*(x.shape[0], weight.shape[0])):
            chunk, target = x[part], targets[part]
            counted = (target != IGNORE).float()
            if factors is not None:
                counted *= factors[part]
            z = F.linear(chunk, w).float().div_(SOFTCAP).tanh_()  # logits / 15, within ±1
            slope = 1 - z.square()  # d softcap / d logit
            z.mul_(SOFTCAP)
            lse = z.logsumexp(dim=1, keepdim=True)
            index = target.clamp_min(0).unsqueeze(1)
            total += ((lse - z.gather(1, index)).squeeze(1) * counted).sum()
            grad = z.sub_(lse).exp_()  # softmax
            grad.scatter_add_(1, index, torch.full_like(lse, -1.0))
            grad.mul_(slope).mul_(counted.unsqueeze(1))
            grad = grad.to(x.dtype)
            torch.mm(grad, w, out=dx[part])
            if dweight.dtype == x.dtype:
                dweight.addmm_(grad.T, chunk)
            else:
                dweight += grad.T @ chunk
        ctx.save_for_backward(dx, dweight)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx, upstream: Tensor) -> tuple[Tensor, Tensor, None, None]:
        dx, dweight = ctx.saved_tensors
        return dx * upstream.to(dx.dtype), (dweight * upstream).to(ctx.weight_dtype), None, None


def head_loss(x: Tensor, weight: Tensor, targets: Tensor, reduction: str = "mean", factors: Tensor | None = None) -> Tensor:
    """Return what `head_loss_twin` returns (arguments and shapes as there), holding one chunk of logits at a time.

    "none" is for evaluation; where a gradient of it is wanted, the twin serves.
    """
    if factors is not None and reduction != "sum":
        raise ValueError(f"factors go with the reduction 'sum', not {reduction!r}")
    if reduction == "none":
        if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
            return head_loss_twin(x, weight, targets, reduction)
        return torch.cat([head_loss_twin(x[part], weight, targets[part], "none") for part in _chunks(x.shape[0], weight.shape[0])])
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction is 'mean', 'sum' or 'none', not {reduction!r}")
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        total = _SumLoss.apply(x, weight, targets, factors)
    else:
        total = torch.stack([head_loss_twin(x[part], weight, targets[part], "sum", None if factors is None else factors[part])
                             for part in _chunks(x.shape[0], weight.shape[0])]).sum()
    return total if reduction == "sum" else total / (targets != IGNORE).sum()
