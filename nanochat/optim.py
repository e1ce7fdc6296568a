"""Muon for the matrices inside the blocks, AdamW for everything else, with their state sharded over the ranks.

    optimizer = MuonAdamW(parameter_groups(model), ranks)
    ...backward, as often as wanted: p.grad holds the SUM over this rank's tokens...
    norm = optimizer.step(lr_scale=1.0, momentum=0.95, grad_scale=1 / tokens_of_all_ranks, clip=1.0)
    optimizer.zero_grad()

The optimizer state is sharded over the ranks (ZeRO stage 1). Each parameter is in one bucket: for Muon the matrices of
one group and shape, for AdamW all parameters of one group. A bucket is a flat buffer, cut into equal slices, one for
each rank (for Muon, a slice holds whole matrices; the last slices may be padding). A step sums the gradients into each
rank's slice (reduce-scatter), clips them by the norm of the whole gradient, updates the slice, and gathers the weights
(all-gather). So a rank holds 1/world_size of the state and does 1/world_size of the work, while every rank has all
weights. A single process does the same arithmetic without communication or padding. On a GPU nothing waits for the
host.

Muon: Keller Jordan, https://kellerjordan.github.io/posts/muon. AdamW: Loshchilov and Hutter, arXiv 1711.05101.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nanochat.distributed import Ranks, all_reduce_sum, compute_dtype
from nanochat.errors import UserError
from nanochat.recipe import OptimizerGroup, published

STATE = {"muon": ("momentum",), "adamw": ("exp_avg", "exp_avg_sq")}


def parameter_groups(model: nn.Module, groups: Mapping[str, OptimizerGroup] = published.groups) -> list[dict[str, Any]]:
    """Sort a GPT's parameters into the optimizer groups of a recipe, each into exactly one.

    The embedding is in group "wte", the head in "lm_head" and the MLPs' matrices in "matrices". A mixer says for each
    of its parameters, by `optimizer_group(name)`, which group it is in.

    Args:
        model: a GPT, compiled or not.
        groups: of a recipe; the order is kept.

    Returns:
        For MuonAdamW, a dict for each group that has parameters: kind, names (without `_orig_mod.`), params, lr,
        weight_decay, and AdamW's betas and eps.

    Raises:
        ValueError: a parameter that nothing gives a group to, one in a group that the recipe does not have, or one in a
            group for Muon that is not a matrix.
    """
    named = {name.replace("_orig_mod.", ""): parameter for name, parameter in model.named_parameters()}
    group_of = {"transformer.wte.weight": "wte", "lm_head.weight": "lm_head"}
    for i, block in enumerate(getattr(model, "_orig_mod", model).transformer.h):
        for name in _names(block.attn):
            group_of[f"transformer.h.{i}.attn.{name}"] = block.attn.optimizer_group(name)
        for name in _names(block.mlp):
            group_of[f"transformer.h.{i}.mlp.{name}"] = "matrices"

    members: dict[str, list[tuple[str, nn.Parameter]]] = {group: [] for group in groups}
    for name, parameter in named.items():
        group = group_of.get(name)
        what = f"{name} of shape {tuple(parameter.shape)}"
        if group is None:
            raise ValueError(f"nothing says which optimizer group {what} is in: see parameter_groups in "
                             "nanochat/optim.py")
        if group not in groups:
            raise ValueError(f"{what} is in the optimizer group {group!r}, which the recipe does not have: "
                             f"its groups are {', '.join(groups)}")
        if groups[group].optimizer == "muon" and parameter.ndim != 2:
            raise ValueError(f"{what} is in the optimizer group {group!r}, but Muon trains 2-D matrices alone: "
                             "its mixer's optimizer_group must name another group")
        members[group].append((name, parameter))

    width_scale = (model.config.n_embd / 768) ** -0.5
    result = []
    for name, group in groups.items():
        if members[name]:
            names, parameters = map(list, zip(*members[name]))
            result.append({"kind": group.optimizer, "names": names, "params": parameters,
                           "lr": group.lr * width_scale if group.by_width else group.lr,
                           "weight_decay": group.weight_decay, "betas": group.betas, "eps": group.eps})
    return result


def _names(module: nn.Module) -> Iterator[str]:
    return (name.replace("_orig_mod.", "") for name, _ in module.named_parameters())


def newton_schulz(x: Tensor, dtype: torch.dtype, steps: int = 5) -> Tensor:
    """Bring the singular values of each matrix near 1 (0.7 to 1.2). A zero matrix stays zero.

    This is Muon's quintic iteration X <- (a + b G + c G^2) X with G = X X^T, on the transpose where that has fewer
    rows. On a CPU in float32, long matrices are done in their Gram matrix G: all factors commute with G, so X is
    multiplied only once, by their product. That is half the arithmetic at 4:1, and within 1e-3 of the plain iteration
    for any spectrum; bfloat16 has too few digits for it.

    Args:
        x: (N, rows, columns).
        dtype: of the matrix products, and of the result.
        steps: of the iteration.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = x.size(-2) > x.size(-1)
    x = (x / (torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True) + 1e-7)).to(dtype)
    x = x.mT if tall else x
    if x.device.type == "cpu" and dtype == torch.float32 and x.size(-1) >= 2 * x.size(-2):
        gram, product = x @ x.mT, None
        for i in range(steps):
            factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
            factor.diagonal(dim1=-2, dim2=-1).add_(a)
            product = factor if product is None else factor @ product
            gram = factor @ (factor @ gram) if i < steps - 1 else gram
        x = product @ x
    else:
        for _ in range(steps):
            gram = x @ x.mT
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class _Bucket:
    """Parameters that are updated together, as a flat buffer of `world_size` slices; this rank owns [start, stop) of
    it."""

    def __init__(self, group: dict[str, Any], names: list[str], params: list[nn.Parameter], ranks: Ranks):
        self.group, self.names, self.params, self.ranks = group, names, params, ranks
        self.sizes = [p.numel() for p in params]
        total = sum(self.sizes)
        unit = self.sizes[0] if group["kind"] == "muon" else 1  # Muon needs whole matrices, so it never cuts one
        self.slice_size = math.ceil(total / unit / ranks.world_size) * unit
        self.padding = self.slice_size * ranks.world_size - total
        self.start = min(ranks.rank * self.slice_size, total)
        self.stop = min(self.start + self.slice_size, total)
        self.state = {key: params[0].new_zeros(self.stop - self.start) for key in STATE[group["kind"]]}

    def own(self, tensors: list[Tensor]) -> list[Tensor]:
        """Return flat views of what this rank owns of contiguous tensors that are shaped like the parameters, in
        order."""
        views, offset = [], 0
        for tensor in tensors:
            first, last = max(self.start - offset, 0), min(self.stop - offset, tensor.numel())
            if first < last:
                views.append(tensor.view(-1)[first:last])
            offset += tensor.numel()
        return views

    def reduce_gradients(self) -> Callable[[], Tensor]:
        """Start to sum the gradients over the ranks. Returns a function that waits for it and returns this rank's
        slice."""
        pieces = [p.new_zeros(p.numel()) if p.grad is None else p.grad.reshape(-1) for p in self.params]
        if self.padding:
            pieces.append(pieces[0].new_zeros(self.padding))
        buffer = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        if self.ranks.world_size == 1:
            return lambda: buffer
        part = buffer.new_empty(self.slice_size)
        work = dist.reduce_scatter_tensor(part, buffer, async_op=True)

        def finish() -> Tensor:
            work.wait()
            return part[:self.stop - self.start]
        return finish

    def gather(self, parts: list[Tensor]) -> Callable[[], list[Tensor]]:
        """Start to gather the slices of all ranks; this rank's is the concatenation of `parts`.

        Returns a function that waits for it and returns tensors shaped like the parameters.
        """
        buffer = self.params[0].new_empty(self.slice_size * self.ranks.world_size)
        mine = buffer[self.ranks.rank * self.slice_size:][:self.slice_size]
        if parts:
            torch.cat(parts, out=mine[:self.stop - self.start])
        work = dist.all_gather_into_tensor(buffer, mine, async_op=True) if self.ranks.world_size > 1 else None

        def finish() -> list[Tensor]:
            if work is not None:
                work.wait()
            pieces = buffer[:buffer.numel() - self.padding].split(self.sizes)
            return [piece.view(p.shape) for piece, p in zip(pieces, self.params)]
        return finish

    def direction(self, gradient: Tensor, momentum: float, step: int, dtype: torch.dtype) -> Tensor:
        """Update the state with this rank's slice of the gradient; return the change of its weights at a rate of 1.

        gradient: flat; it is overwritten. momentum: Muon's. step: counts from 1. dtype: of Newton-Schulz.
        """
        if self.group["kind"] == "muon":
            rows, columns = self.params[0].shape
            average = self.state["momentum"].lerp_(gradient, 1 - momentum)
            ahead = gradient.lerp_(average, momentum).view(-1, rows, columns)  # Nesterov momentum
            return newton_schulz(ahead, dtype).to(gradient.dtype).mul(max(1, rows / columns) ** 0.5).reshape(-1)
        beta1, beta2 = self.group["betas"]
        mean = self.state["exp_avg"].lerp_(gradient, 1 - beta1)
        square = self.state["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        root = torch.sqrt(square, out=gradient).mul_((1 - beta2 ** step) ** -0.5).add_(self.group["eps"])
        return torch.div(mean, root, out=root).mul_(1 / (1 - beta1 ** step))


class MuonAdamW:
    """The optimizer of a whole model, for any number of ranks; the top of this file says how it works."""

    def __init__(self, groups: list[dict[str, Any]], ranks: Ranks, dtype: torch.dtype | None = None):
        """Lay out buckets and this rank's part of the state.

        Args:
            groups: from `parameter_groups`, the same on every rank.
            ranks: who shares the work.
            dtype: of Newton-Schulz; None takes the device's `compute_dtype`.

        Raises:
            ValueError: a parameter was given twice, or is not contiguous float32 on the ranks' kind of device. The
                weights that are trained are float32, whatever the precision of the matrix products.
        """
        self.ranks, self.steps, self.dtype = ranks, 0, dtype or compute_dtype(ranks.device)
        self.buckets: list[_Bucket] = []
        seen: set[int | str] = set()
        for group in groups:
            if group["kind"] not in STATE:
                kinds = ", ".join(STATE)
                raise ValueError(f"a parameter group is of kind {group['kind']!r}: it must be one of {kinds}")
            stacks: dict[Any, list[tuple[str, nn.Parameter]]] = {}
            for name, p in zip(group["names"], group["params"], strict=True):
                if name in seen or id(p) in seen:
                    raise ValueError(f"the optimizer was given {name} twice")
                seen |= {name, id(p)}
                if p.dtype != torch.float32 or not p.is_contiguous() or p.device.type != ranks.device.type:
                    layout = "" if p.is_contiguous() else "not contiguous, "
                    raise ValueError(f"{name} is {layout}{p.dtype} on {p.device}: the optimizer trains contiguous "
                                     f"float32 on {ranks.device}; convert the model before")
                stacks.setdefault(p.shape if group["kind"] == "muon" else None, []).append((name, p))
            self.buckets += [_Bucket(group, *map(list, zip(*members)), ranks) for members in stacks.values()]

    def zero_grad(self) -> None:
        """Set all gradients to None."""
        for bucket in self.buckets:
            for p in bucket.params:
                p.grad = None

    @torch.no_grad()
    def step(self, *, lr_scale: float = 1.0, momentum: float = 0.95, grad_scale: float | Tensor = 1.0,
             clip: float | None = None) -> Tensor:
        """Update all weights. Collective: all ranks call it with the same arguments.

        The gradient is grad_scale times the sum of p.grad over the ranks; a p.grad of None counts as zeros. p.grad is
        not changed. Where the gradient is not finite, the weights stay, and the state is updated as by a zero gradient.

        Args:
            lr_scale: factor of every group's learning rate.
            momentum: Muon's.
            grad_scale: factor of the gradient, such as 1 / number of tokens.
            clip: the largest norm of the gradient; a larger one is scaled down to it. None for no limit.

        Returns:
            The norm of the whole gradient before clipping, 0-d, on the device; nothing waits for it.

        Raises:
            ValueError: clip is not above 0.
        """
        if clip is not None and not clip > 0:
            raise ValueError(f"clip is {clip}: it must be above 0, or None for no clipping")
        self.steps += 1
        gradients = [finish() for finish in [bucket.reduce_gradients() for bucket in self.buckets]]
        squares = torch.stack([torch.linalg.vector_norm(gradient) for gradient in gradients]).square().sum()
        norm = all_reduce_sum(squares, self.ranks).sqrt() * grad_scale
        finite = norm.isfinite()
        scale = torch.where(finite, grad_scale * (1 if clip is None else (clip / (norm + 1e-6)).clamp(max=1)), 0)
        gathers = []
        for bucket in self.buckets:
            gradient = gradients.pop(0)  # so that its memory is freed when the bucket is done
            weights = bucket.own([p.detach() for p in bucket.params])
            if weights:
                rate = finite * (bucket.group["lr"] * lr_scale)
                gradient = torch.where(finite, gradient, 0).mul_(scale)
                change = bucket.direction(gradient, momentum, self.steps, self.dtype).mul_(rate)
                if decay := bucket.group["weight_decay"]:
                    torch._foreach_mul_(weights, 1 - rate * decay)
                torch._foreach_sub_(weights, change.split([view.numel() for view in weights]))
            if self.ranks.world_size > 1:
                gathers.append(bucket.gather(weights))
        for bucket, finish in zip(self.buckets, gathers):
            torch._foreach_copy_([p.detach() for p in bucket.params], finish())
        return norm

    @torch.no_grad()
    def state_dict(self) -> dict[str, dict[str, Tensor]] | None:
        """Gather the whole state, which any number of ranks can load. Collective.

        The device needs memory for the largest bucket only.

        Returns:
            On rank 0: of each parameter, by name, {"momentum"} for Muon, {"exp_avg", "exp_avg_sq", "step"} for AdamW.
            They are CPU tensors shaped like the parameter, "step" is 0-d int64. On other ranks: None.
        """
        whole: dict[str, dict[str, Tensor]] = {}
        for bucket in self.buckets:
            for key, part in bucket.state.items():
                gathered = bucket.gather([part])()
                if self.ranks.is_main:
                    for name, tensor in zip(bucket.names, gathered):
                        whole.setdefault(name, {})[key] = tensor.to("cpu", copy=True)
            if self.ranks.is_main and bucket.group["kind"] == "adamw":
                for name in bucket.names:
                    whole[name]["step"] = torch.tensor(self.steps)
        return whole if self.ranks.is_main else None

    @torch.no_grad()
    def load_state_dict(self, whole: dict[str, dict[str, Tensor]]) -> None:
        """Load this rank's part of a state from `state_dict`, saved with any number of ranks.

        whole: the full dict, on every rank. Raises UserError, before anything is changed, that names all parameters
        that are missing, extra, or of another kind or shape.
        """
        expected = {name: (bucket, p) for bucket in self.buckets for name, p in zip(bucket.names, bucket.params)}
        wrong = [f"{name} is missing" for name in expected if name not in whole]
        wrong += [f"{name} is not in this model" for name in whole if name not in expected]
        steps = set()
        for name in expected.keys() & whole.keys():
            bucket, p = expected[name]
            keys = {*bucket.state, *(("step",) if bucket.group["kind"] == "adamw" else ())}
            if whole[name].keys() != keys:
                wrong.append(f"{name} has {', '.join(sorted(whole[name]))} instead of {', '.join(sorted(keys))}")
                continue
            wrong += [f"{name} {key} has shape {tuple(whole[name][key].shape)} instead of {tuple(p.shape)}"
                      for key in bucket.state if whole[name][key].shape != p.shape]
            steps |= {int(whole[name]["step"])} if "step" in keys else set()
        if len(steps) > 1:
            wrong.append(f"the parameters were saved at different steps: {', '.join(map(str, sorted(steps)))}")
        if wrong:
            raise UserError("the optimizer state is not of this model, so it was not loaded: "
                            + "; ".join(sorted(wrong))
                            + ". Resume with the flags the run began with, or start without optimizer state.")
        self.steps = max(steps, default=self.steps)
        for bucket in self.buckets:
            for key, part in bucket.state.items():
                if views := bucket.own([whole[name][key].contiguous() for name in bucket.names]):
                    torch.cat([view.to(part) for view in views], out=part)
