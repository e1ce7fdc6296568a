"""Muon for the matrices inside the blocks, AdamW for everything else, with their state sharded over the ranks.

    optimizer = MuonAdamW(parameter_groups(model), ranks)
    ...backward, as often as wanted: p.grad holds the SUM over this rank's tokens...
    with optimizer.reducing():                  # around the last backward pass of the step; it may be left out
        loss.backward()
    norm = optimizer.step(lr_scale=1.0, momentum=0.95, grad_scale=1 / tokens_of_all_ranks, clip=1.0)
    optimizer.zero_grad()

The optimizer state is sharded over the ranks (ZeRO stage 1): each parameter lies in a bucket, and of each bucket every
rank owns a slice (nanochat/buckets.py). A step sums the gradients into each rank's slice (reduce-scatter), clips them
by the norm of the whole gradient, updates the slice, and gathers the weights (all-gather). So a rank holds 1/world_size
of the state and does 1/world_size of the work, while every rank has all weights.

Communication overlaps with computation. Within `reducing`, a bucket is sent as soon as backward has finished its
gradients. Weights are gathered in the order in which the forward pass needs them, each bucket as soon as it is updated;
within `gathering_in_forward(model)`, a step does not wait for them, but the next forward pass does, layer by layer.

A single process does the same arithmetic without communication or padding. On a GPU nothing waits for the host.

A step whose gradient or loss is not finite, or above a limit, changes nothing: the weights, the momenta, AdamW's
moments and its count of steps stay as they are, on all ranks alike. The device decides that by itself, and the host may
ask later (`applied`): in the arithmetic of such a step, the gradient is 0, and the factors that would let the state
decay are those of no step. So the number of steps that AdamW's bias correction needs is kept on the device, too.

Muon: Keller Jordan, https://kellerjordan.github.io/posts/muon. AdamW: Loshchilov and Hutter, arXiv 1711.05101.
A group's `extras` change Muon, each alone or with others: "equilibrate" scales the rows to one norm before
Newton-Schulz (MuonEq, arXiv 2603.28254); "renormalize" gives its result the norm of an orthogonal matrix (Muon+, arXiv
2602.21545); "normuon" divides the rows, or the columns where there are more of them, by a running root mean square
(arXiv 2510.05491); "cautious" applies weight decay only where it goes the way of the update (arXiv 2510.12402).
"""

import math
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import repeat
from typing import Any

import torch
from torch import Tensor, nn

from nanochat.buckets import BUCKET_ELEMENTS, STATE, Bucket, make_buckets
from nanochat.distributed import Ranks, all_reduce_sum, compute_dtype
from nanochat.errors import UserError
from nanochat.kernels.adamw import Factors, adamw_
from nanochat.kernels.newton_schulz import newton_schulz
from nanochat.recipe import OptimizerGroup, published

LARGEST = torch.finfo(torch.float32).max  # a norm up to here is finite
SMALL = 1e-15                             # a norm that is divided by is at least this
SECOND_MOMENT = 0.9                       # decay of NorMuon's second moment, as nanochat has it


def parameter_groups(model: nn.Module, groups: Mapping[str, OptimizerGroup] = published.groups) -> list[dict[str, Any]]:
    """Sort a GPT's parameters into the optimizer groups of a recipe, each into exactly one.

    The embedding is in group "wte", the head in "lm_head" and the MLPs' matrices in "matrices". A mixer says for each
    of its parameters, by `optimizer_group(name)`, which group it is in, and so does the model's `stream`.

    Args:
        model: a GPT, compiled or not.
        groups: of a recipe; the order is kept.

    Returns:
        For MuonAdamW, a dict for each group that has parameters: kind, names (without `_orig_mod.`), params, their
        positions among all parameters in the order of the forward pass, lr, weight_decay, AdamW's betas and eps, and
        Muon's extras.

    Raises:
        ValueError: a parameter that nothing gives a group to, one in a group that the recipe does not have, or one in a
            group for Muon that is not a matrix.
    """
    named = {name.replace("_orig_mod.", ""): parameter for name, parameter in model.named_parameters()}
    group_of = {"transformer.wte.weight": "wte", "lm_head.weight": "lm_head"}
    plain = getattr(model, "_orig_mod", model)
    group_of |= {f"stream.{name}": plain.stream.optimizer_group(name) for name in _names(plain.stream)}
    for i, block in enumerate(plain.transformer.h):
        for name in _names(block.attn):
            group_of[f"transformer.h.{i}.attn.{name}"] = block.attn.optimizer_group(name)
        for name in _names(block.mlp):
            group_of[f"transformer.h.{i}.mlp.{name}"] = "matrices"

    members: dict[str, list[tuple[str, nn.Parameter, int]]] = {group: [] for group in groups}
    for position, (name, parameter) in enumerate(named.items()):
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
        members[group].append((name, parameter, position))

    width_scale = (model.config.n_embd / 768) ** -0.5
    result = []
    for name, group in groups.items():
        if members[name]:
            names, parameters, positions = map(list, zip(*members[name]))
            result.append({"kind": group.optimizer, "names": names, "params": parameters, "positions": positions,
                           "lr": group.lr * width_scale if group.by_width else group.lr,
                           "weight_decay": group.weight_decay, "betas": group.betas, "eps": group.eps,
                           "extras": group.extras})
    return result


def _names(module: nn.Module) -> Iterator[str]:
    return (name.replace("_orig_mod.", "") for name, _ in module.named_parameters())


def direction(bucket: Bucket, gradient: Tensor, momentum: float, factors: Sequence[Tensor], dtype: torch.dtype
              ) -> Tensor:
    """Update Muon's state with this rank's part of the gradient; return the change of its weights at a rate of 1.

    Args:
        bucket: of a group for Muon.
        gradient: flat; it is overwritten, by the result. Zeros where the step is skipped.
        factors: 0-d, on the device: the weight of the gradient in the momentum, and that of the matrices in NorMuon's
            second moment; both 0 where the step is skipped.
        dtype: of Newton-Schulz.
    """
    average = bucket.state["momentum"].lerp_(gradient, factors[0])
    ahead = gradient.lerp_(average, momentum)  # Nesterov momentum
    extras, moments = bucket.group.get("extras", ()), repeat(None)
    if "normuon" in extras:
        moments = bucket.layouts["second_moment"].stacks(bucket.state["second_moment"])
    for x, moment in zip(bucket.stacks(ahead), moments):
        orthogonal = newton_schulz(equilibrate_(x) if "equilibrate" in extras else x, dtype)
        scale = max(1, x.shape[1] / x.shape[2]) ** 0.5
        if moment is not None or "renormalize" in extras:
            scale = scale_of(orthogonal, scale, "renormalize" in extras, moment, factors[-1])
        torch.mul(orthogonal.to(x.dtype), scale, out=x)
    return ahead


def equilibrate_(x: Tensor) -> Tensor:
    """Scale the rows of each matrix of x (N, rows, columns) to one norm, in place; a row of zeros stays.

    The norm of the matrix does not matter: Newton-Schulz scales that itself.
    """
    return x.div_(torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min_(SMALL))


def scale_of(x: Tensor, factor: float, renormalize: bool, moment: Tensor | None, weight: Tensor) -> Tensor:
    """Return what the result x (N, rows, columns) of Newton-Schulz is multiplied by.

    NorMuon divides by the roots of the second moments and scales the matrix back to the norm that it had. So a factor
    that all its second moments have in common, such as a bias correction, has no effect.

    Args:
        factor: of the whole.
        renormalize: let the norm of each matrix be √min(rows, columns), as if it were orthogonal, times factor.
        moment: (N, rows, 1) or (N, 1, columns), the second moments, which are updated; None without "normuon".
        weight: of x in these.

    Returns:
        (N, 1, 1), or in the shape of moment.
    """
    full = min(x.shape[-2:]) ** 0.5
    if moment is None:
        norm = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True, dtype=torch.float32)
        return factor * full / norm.clamp_min_(SMALL)
    over = -1 if moment.shape[-1] == 1 else -2
    norms = torch.linalg.vector_norm(x, dim=over, keepdim=True, dtype=torch.float32)
    norm = torch.linalg.vector_norm(norms, dim=(-2, -1), keepdim=True)
    of_mean = x.shape[over] ** -0.5  # a norm times this is a root mean square
    roots = norms * (full * of_mean / norm.clamp_min(SMALL) if renormalize else of_mean)
    inverse = moment.lerp_(roots.square_(), weight).clamp_min(1e-10).rsqrt_()
    after = torch.linalg.vector_norm(norms.mul_(inverse), dim=(-2, -1), keepdim=True).clamp_min_(SMALL)
    return inverse.mul_((factor * full if renormalize else norm.mul_(factor)) / after)


def add_aligned_(change: Tensor, weights: Sequence[Tensor], decay: float) -> None:
    """Add decay · weights to their change, flat, where both have the same sign."""
    if change.is_cpu:  # matrix by matrix: what one operation writes is in the cache for the next
        pairs = zip(change.split([view.numel() for view in weights]), weights)
    else:
        pairs = [(change, weights[0] if len(weights) == 1 else torch.cat(weights))]
    for part, view in pairs:
        part.addcmul_(view, (part * view).ge_(0), value=decay)


class AdamWFactors:
    """AdamW's factors, for a number of steps that the device alone knows: the weight of the gradient in exp_avg, the
    decay of exp_avg_sq, and for the bias correction, those of 1/√exp_avg_sq and of exp_avg."""

    def __init__(self, betas: tuple[float, float], device: torch.device):
        """Compute them in Python's arithmetic, up to the step from which on float32 rounds the correction to 1."""
        mean, square = betas
        longest = max((math.ceil(26 * math.log(2) / -math.log(beta)) for beta in betas if beta > 0), default=1)
        skipped = [0.0, 1.0, 1.0, 1.0]  # which leaves the state as it is
        self._table = torch.tensor([skipped, *([1 - mean, square, (1 - square ** step) ** -0.5, 1 / (1 - mean ** step)]
                                               for step in range(1, longest + 1))], device=device)

    def at(self, step: Tensor) -> Sequence[Tensor]:
        """Return the four of step number `step`, (1,) int64 on the device, which counts from 1; 0 where it is
        skipped."""
        return self._table.index_select(0, step.clamp(max=len(self._table) - 1)).squeeze(0).unbind()


class MuonAdamW:
    """The optimizer of a whole model, for any number of ranks; the top of this file says how it works."""

    def __init__(self, groups: list[dict[str, Any]], ranks: Ranks, dtype: torch.dtype | None = None, *,
                 reduce_dtype: torch.dtype = torch.float32, bucket_elements: int = BUCKET_ELEMENTS):
        """Lay out buckets and this rank's part of the state.

        With several ranks, the parameters are moved into buffers of the optimizer. Whatever gives them other memory, as
        `to` does, comes before; what writes into them may come at any time.

        Args:
            groups: from `parameter_groups`, the same on every rank.
            ranks: who shares the work.
            dtype: of Newton-Schulz; None takes the device's `compute_dtype`.
            reduce_dtype: what gradients are sent in; each rank sums what it receives in float32.
            bucket_elements: numbers that are sent at once, at least.

        Raises:
            ValueError: a parameter was given twice, or is not contiguous float32 on the ranks' kind of device. The
                weights that are trained are float32, whatever the precision of the matrix products.
        """
        self.ranks, self.dtype = ranks, dtype or compute_dtype(ranks.device)
        self._steps = torch.zeros(1, dtype=torch.int64, device=ranks.device)  # that were not skipped
        self.applied = torch.ones((), dtype=torch.bool, device=ranks.device)  # whether the last step was not skipped
        seen: set[int | str] = set()
        for group in groups:
            if group["kind"] not in STATE:
                kinds = ", ".join(STATE)
                raise ValueError(f"a parameter group is of kind {group['kind']!r}: it must be one of {kinds}")
            for name, p in zip(group["names"], group["params"], strict=True):
                if name in seen or id(p) in seen:
                    raise ValueError(f"the optimizer was given {name} twice")
                seen |= {name, id(p)}
                if p.dtype != torch.float32 or not p.is_contiguous() or p.device.type != ranks.device.type:
                    layout = "" if p.is_contiguous() else "not contiguous, "
                    raise ValueError(f"{name} is {layout}{p.dtype} on {p.device}: the optimizer trains contiguous "
                                     f"float32 on {ranks.device}; convert the model before")
        self.buckets = make_buckets(groups, ranks, reduce_dtype, bucket_elements)
        self._factors = {group["betas"]: AdamWFactors(group["betas"], ranks.device)
                         for group in groups if group["kind"] == "adamw" and "betas" in group}
        self._started = 0                     # buckets whose reduction has begun, in their order
        self._released = False                # whether these hold all that backward computed: p.grad is None
        self._missing: list[int] | None = None  # of each bucket, gradients to come; None: nobody counts them
        self._deferred = False                # whether a step leaves waiting for the weights to the next forward pass
        self._buckets_of: dict[nn.Module, list[Bucket]] = {}
        if ranks.communicates:
            for number, bucket in enumerate(self.buckets):
                for p in bucket.params:
                    if p.requires_grad:
                        p.register_post_accumulate_grad_hook(_counter(weakref.ref(self), number))

    @property
    def steps(self) -> int:
        """How many steps were done; those that were skipped do not count. Reading it waits for the device."""
        return int(self._steps)

    @steps.setter
    def steps(self, value: int) -> None:
        self._steps.fill_(value)

    def zero_grad(self) -> None:
        """Set all gradients to None. Gradients that were reduced and not used by a step are forgotten."""
        self._reduced_gradients()
        for bucket in self.buckets:
            for p in bucket.params:
                p.grad = None

    # ---- gradients

    @contextmanager
    def reducing(self) -> Iterator[None]:
        """Within the block, sum the gradients over the ranks as they come. It holds the last backward pass of a step.

        Collective. A bucket is sent as soon as all its gradients are there, on every rank in the same order; what is
        not sent by the end of the block, as parameters without a gradient, is sent then. p.grad is None afterwards. A
        single process has nothing to do.
        """
        if not self.ranks.communicates:
            yield
            return
        self._missing = [sum(p.requires_grad for p in bucket.params) for bucket in self.buckets]
        self._released = True
        try:
            yield
        finally:
            self._missing = None
        self.finish_reducing()

    def finish_reducing(self) -> None:
        """Start to sum the gradients over the ranks that no backward pass within `reducing` has started. Collective.

        `step` does so itself. All ranks must begin their collectives in the same order, so a rank that had no backward
        pass calls this before any other one.
        """
        self._start_reductions(len(self.buckets))

    def _gradient_came(self, number: int) -> None:
        """Count a gradient of bucket `number`, and start what can start."""
        if self._missing is not None:
            self._missing[number] -= 1
            ready = self._started
            while ready < len(self.buckets) and self._missing[ready] == 0:
                ready += 1
            self._start_reductions(ready)

    @torch.no_grad()
    def _start_reductions(self, end: int) -> None:
        """Start the reductions of the buckets before `end` that have not begun."""
        while self._started < end:
            self.buckets[self._started].start_reduction(release=self._released)
            self._started += 1

    @torch.no_grad()
    def _reduced_gradients(self) -> list[Tensor]:
        """Wait for the reductions that have begun; return the gradients of what this rank owns."""
        gradients = [bucket.reduced() for bucket in self.buckets[:self._started]]
        self._started, self._released = 0, False
        return gradients

    # ---- weights

    @contextmanager
    def gathering_in_forward(self, model: nn.Module) -> Iterator[None]:
        """Within the block, let a step return while the weights are on their way to the other ranks.

        The forward pass of `model`, a GPT, waits for the weights of each layer when it comes to it; `model.state_dict`
        and the end of the block wait for all. To read weights in another way, call `wait` before: until then they are
        NaN. A single process has nothing to do.
        """
        if not self.ranks.communicates:
            yield
            return
        self._deferred, model.before_use = True, self._wait_for
        handle = model.register_state_dict_pre_hook(lambda *given: self.wait())
        try:
            yield
        finally:
            self._deferred, model.before_use = False, None
            handle.remove()
            self._buckets_of.clear()
            self.wait()

    def _wait_for(self, module: nn.Module) -> None:
        """Wait for the weights of a part of the model, if they are on their way."""
        if module not in self._buckets_of:
            parameters = {id(p) for p in module.parameters()}
            self._buckets_of[module] = [bucket for bucket in self.buckets
                                        if not parameters.isdisjoint(map(id, bucket.params))]
        for bucket in self._buckets_of[module]:
            bucket.finish_gather()

    def wait(self) -> None:
        """Wait for all weights that are on their way from other ranks. On a GPU the stream waits, not the host."""
        for bucket in reversed(self.buckets):
            bucket.finish_gather()

    @torch.no_grad()
    def step(self, *, lr_scale: float = 1.0, momentum: float = 0.95, decay_scale: float = 1.0,
             grad_scale: float | Tensor = 1.0, clip: float | None = None, norm_limit: float = math.inf,
             allowed: Tensor | None = None) -> Tensor:
        """Update all weights. Collective: all ranks call it with the same arguments.

        The gradient is grad_scale times the sum over the ranks: of what was reduced within `reducing`, or else of
        p.grad, which is not changed and counts as zeros where it is None. Where its norm is not finite or above
        norm_limit, or `allowed` is False, nothing is updated: no weight, no state, no count of steps. `applied` tells.

        Args:
            lr_scale: factor of every group's learning rate.
            momentum: Muon's.
            decay_scale: factor of the weight decay of Muon's groups.
            grad_scale: factor of the gradient, such as 1 / number of tokens.
            clip: the largest norm of the gradient; a larger one is scaled down to it. None for no limit.
            norm_limit: the norm above which the step is skipped.
            allowed: 0-d bool, on the device, the same on all ranks: False skips the step. None is True.

        Returns:
            The norm of the whole gradient before clipping, 0-d, on the device; nothing waits for it.

        Raises:
            ValueError: clip is not above 0.
            RuntimeError: backward ran again after the gradients were reduced, or a parameter has other memory than the
                optimizer gave it.
        """
        if clip is not None and not clip > 0:
            raise ValueError(f"clip is {clip}: it must be above 0, or None for no clipping")
        self.wait()
        self._check()
        self.finish_reducing()
        gradients = self._reduced_gradients()
        squares = torch.stack([torch.linalg.vector_norm(gradient) for gradient in gradients]).square().sum()
        norm = all_reduce_sum(squares, self.ranks).sqrt() * grad_scale
        ok = norm <= min(norm_limit, LARGEST)  # not for NaN either. It is the same number on all ranks
        if allowed is not None:
            ok = ok & allowed
        scale = torch.where(ok, grad_scale * (1 if clip is None else (clip / (norm + 1e-6)).clamp(max=1)), 0)
        self.applied, self._steps = ok, self._steps + ok
        of_adamw = {betas: factors.at(self._steps * ok) for betas, factors in self._factors.items()}
        of_muon = [ok * (1 - momentum)]
        if any("second_moment" in bucket.state for bucket in self.buckets):
            of_muon.append(ok * (1 - SECOND_MOMENT))
        on_host = ok.is_cpu  # the host knows it at once
        skip = on_host and not ok
        for bucket in reversed(self.buckets):  # as the forward pass needs them: the first are sent while others compute
            gradient = gradients.pop()  # so that its memory is freed when the bucket is done
            weights = bucket.weights()
            if weights and not skip:
                rate = ok * (bucket.group["lr"] * lr_scale)
                if bucket.group["kind"] == "adamw":
                    adamw_(weights, gradient, bucket.state["exp_avg"], bucket.state["exp_avg_sq"],
                           Factors(ok, scale, rate, *of_adamw[bucket.group["betas"]], 1 - bucket.group["betas"][1],
                                   bucket.group["eps"], bucket.group["weight_decay"]))
                else:
                    if not on_host:
                        gradient = torch.where(ok, gradient, 0).mul_(scale)
                    else:
                        gradient = gradient * scale if bucket.borrows else gradient.mul_(scale)
                    change = direction(bucket, gradient, momentum, of_muon, self.dtype)
                    if decay := bucket.group["weight_decay"] * decay_scale:
                        if "cautious" in bucket.group.get("extras", ()):
                            add_aligned_(change, weights, decay)
                        else:
                            torch._foreach_mul_(weights, 1 - rate * decay)
                    torch._foreach_sub_(weights, change.mul_(rate).split([view.numel() for view in weights]))
            if self.ranks.communicates:
                bucket.start_gather(hide=self._deferred)
        if not self._deferred:
            self.wait()
        return norm

    def _check(self) -> None:
        """Raise RuntimeError where a step would not do what the caller believes."""
        if self._released and (late := [name for bucket in self.buckets for name, p in zip(bucket.names, bucket.params)
                                        if p.grad is not None]):
            raise RuntimeError(f"{late[0]} got a gradient after the gradients were summed over the ranks: only the "
                               "last backward pass of a step goes into `reducing`")
        if moved := [name for bucket in self.buckets for name in bucket.moved()]:
            raise RuntimeError(f"{moved[0]} was given other memory after the optimizer was made, and would be trained "
                               "no more: move and cast the model before")

    def bytes_of_state(self) -> int:
        """Return the bytes of the whole state, that of all ranks."""
        return sum(bucket.state[key].element_size() * sum(layout.sizes) for bucket in self.buckets
                   for key, layout in bucket.layouts.items())

    @torch.no_grad()
    def state_dict(self, to_host: Callable[[str, Tensor], Tensor] = lambda name, part: part.to("cpu", copy=True)
                   ) -> dict[str, dict[str, Tensor]] | None:
        """Gather the whole state, which any number of ranks can load. Collective.

        The device needs memory for the largest bucket only.

        Args:
            to_host: copies a tensor, which has this name, to the CPU. It may return before the copy is complete; the
                tensor's memory is used again by later work of the device's stream.

        Returns:
            On rank 0: of each parameter, by name, {"momentum"} for Muon, {"exp_avg", "exp_avg_sq", "step"} for AdamW.
            They are CPU tensors shaped like the parameter, "step" is 0-d int64. With "normuon" there is
            "second_moment", (rows, 1), or (1, columns) where these are more. On other ranks: None.
        """
        whole: dict[str, dict[str, Tensor]] = {}
        for bucket in self.buckets:
            for key in bucket.state:
                gathered = bucket.gather_state(key)
                if self.ranks.is_main:
                    for name, tensor in zip(bucket.names, gathered):
                        whole.setdefault(name, {})[key] = to_host(f"{name} {key}", tensor)
            if self.ranks.is_main and bucket.group["kind"] == "adamw":
                for name in bucket.names:
                    whole[name]["step"] = to_host(f"{name} step", self._steps[0])
        return whole if self.ranks.is_main else None

    @torch.no_grad()
    def load_state_dict(self, whole: dict[str, dict[str, Tensor]]) -> None:
        """Load this rank's part of a state from `state_dict`, saved with any number of ranks.

        whole: the full dict, on every rank. Raises UserError, before anything is changed, that names all parameters
        that are missing, extra, or of another kind or shape.
        """
        expected = {name: (bucket, i) for bucket in self.buckets for i, name in enumerate(bucket.names)}
        wrong = [f"{name} is missing" for name in expected if name not in whole]
        wrong += [f"{name} is not in this model" for name in whole if name not in expected]
        steps = set()
        for name in expected.keys() & whole.keys():
            bucket, i = expected[name]
            keys = {*bucket.state, *(("step",) if bucket.group["kind"] == "adamw" else ())}
            if whole[name].keys() != keys:
                wrong.append(f"{name} has {', '.join(sorted(whole[name]))} instead of {', '.join(sorted(keys))}")
                continue
            wrong += [f"{name} {key} has shape {tuple(whole[name][key].shape)} instead of {tuple(layout.shapes[i])}"
                      for key, layout in bucket.layouts.items() if whole[name][key].shape != layout.shapes[i]]
            steps |= {int(whole[name]["step"])} if "step" in keys else set()
        if len(steps) > 1:
            wrong.append(f"the parameters were saved at different steps: {', '.join(map(str, sorted(steps)))}")
        if wrong:
            raise UserError("the optimizer state is not of this model, so it was not loaded: "
                            + "; ".join(sorted(wrong))
                            + ". Resume with the flags the run began with, or start without optimizer state.")
        if steps:
            self.steps = max(steps)
        for bucket in self.buckets:
            for key, part in bucket.state.items():
                if views := bucket.layouts[key].own([whole[name][key].contiguous() for name in bucket.names]):
                    torch.cat([view.to(part) for view in views], out=part)

    @torch.no_grad()
    def warm_start(self, whole: dict[str, dict[str, Tensor]]) -> list[str]:
        """Begin with the state of another run, as `state_dict` returned it: momenta, and how many steps made them.

        AdamW's bias correction divides by how much of a mean was collected. Of a state from there that is all of it,
        so the number of steps goes with the moments: counted from 0, the first change would be too large by
        (1 − β2)^½ / (1 − β1), 1.12 at betas of 0.8 and 0.95. One number is for all parameters of AdamW, so all of them
        begin warm or none. Muon has no such number: each matrix takes what is there of its own.

        Args:
            whole: the full dict, on every rank; of another model or optimizer, what fits is taken.

        Returns:
            The names of the parameters that begin without the state, or without a part of it.
        """
        steps = {int(state["step"]) for state in whole.values() if "step" in state}
        filled: dict[str, dict[str, Tensor]] = {}
        cold: dict[str, set[str]] = {"muon": set(), "adamw": set()}
        for bucket in self.buckets:
            for i, name in enumerate(bucket.names):
                state, shapes = whole.get(name, {}), {key: layout.shapes[i] for key, layout in bucket.layouts.items()}
                fits = {key: state[key] for key, shape in shapes.items() if key in state and state[key].shape == shape}
                filled[name] = {key: fits.get(key, torch.zeros(shape)) for key, shape in shapes.items()}
                if len(fits) < len(bucket.state):
                    cold[bucket.group["kind"]].add(name)
        of_adamw = [name for bucket in self.buckets if bucket.group["kind"] == "adamw" for name in bucket.names]
        warm = len(steps) == 1 and not cold["adamw"]
        if not warm:
            cold["adamw"] = set(of_adamw)
        for name in of_adamw:
            if not warm:
                filled[name] = {key: torch.zeros_like(tensor) for key, tensor in filled[name].items()}
            filled[name]["step"] = torch.tensor(max(steps) if warm else 0)
        self.load_state_dict(filled)
        return sorted(cold["muon"] | cold["adamw"])


def _counter(optimizer: "weakref.ref[MuonAdamW]", number: int) -> Callable[[Tensor], None]:
    """Return a hook that tells the optimizer of a gradient of bucket `number`. It does not keep the optimizer alive."""
    def came(parameter: Tensor) -> None:
        if (alive := optimizer()) is not None:
            alive._gradient_came(number)
    return came
