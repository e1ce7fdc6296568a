"""Parameters in flat buffers, so that many are reduced or gathered by one collective, and who owns which of them.

    buckets = make_buckets(groups, ranks)       # in the order in which backward finishes their gradients
    bucket.start_reduction()                    # sum the gradients over the ranks, asynchronously
    gradient = bucket.reduced()                 # wait for it: flat, of what this rank owns
    bucket.weights()                            # what it owns of the weights, to be updated in place
    bucket.start_gather(hide=True)              # send them to the other ranks, asynchronously
    bucket.finish_gather()                      # wait for it

A bucket's buffer is cut into equal slices, one for each rank. AdamW changes each number by itself, so its parameters
lie one behind the other, and a slice may begin inside of one. Muon needs whole matrices: a slice holds those that its
rank owns, the ones of equal shape together, and ends with padding. Several ranks keep their weights in such buffers,
and the parameters are views of them: weights are gathered to where they are used, without a copy.

Matrices are dealt out such that the slices are equally full and all ranks have equally much to compute. Of each size,
as many as the ranks can share equally form buckets of about `bucket_elements`, from the last layer to the first. What
is left over, fewer matrices of each size than there are ranks, forms a last bucket.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nanochat.distributed import Ranks

STATE = {"muon": ("momentum",), "adamw": ("exp_avg", "exp_avg_sq")}  # shaped like the parameters
BUCKET_ELEMENTS = 25_000_000  # 100 MB in float32: long enough for the full bandwidth of NVLink, a few per cent of d20
ALIGNED = 64                  # elements: slices of float32 that begin at multiples of 256 bytes, as allocations do


@dataclass(frozen=True)
class Member:
    """A parameter of a bucket. position: when the forward pass needs it, among all parameters of the model."""

    name: str
    parameter: nn.Parameter
    position: int

    @property
    def shape(self) -> torch.Size:
        return self.parameter.shape


def newton_schulz_flops(rows: int, columns: int, steps: int = 5) -> int:
    """Return the FLOPs of `newton_schulz` for one matrix: in each step the Gram matrix, its square, and a product."""
    short, long = sorted((rows, columns))
    return steps * (4 * short * short * long + 2 * short ** 3)


def owners_of(shapes: Sequence[tuple[int, int]], world_size: int, spent: list[int]) -> list[int]:
    """Return which rank owns each of the matrices of a bucket.

    The largest first, each goes to the rank that holds least of this bucket, and among equals to the one that has least
    to compute. spent: FLOPs of each rank in all buckets so far; those of this one are added.
    """
    owners, held = [0] * len(shapes), [0] * world_size
    for i in sorted(range(len(shapes)), key=lambda i: (-math.prod(shapes[i]), shapes[i], i)):
        owners[i] = min(range(world_size), key=lambda rank: (held[rank], spent[rank], rank))
        held[owners[i]] += math.prod(shapes[i])
        spent[owners[i]] += newton_schulz_flops(*shapes[i])
    return owners


def shared_out(members: Sequence[Member], world_size: int, bucket_elements: int) -> list[list[Member]]:
    """Return the buckets of Muon's matrices; the top of this file says how they are chosen."""
    by_size: dict[int, list[Member]] = {}
    for member in sorted(members, key=lambda member: -member.position):
        by_size.setdefault(member.parameter.numel(), []).append(member)
    buckets, rest = [], []
    for size, same in by_size.items():
        count = len(same) // world_size * world_size if len(same) * size >= bucket_elements else 0
        chunk = world_size * math.ceil(bucket_elements / (world_size * size))
        buckets += [same[i:min(i + chunk, count)] for i in range(0, count, chunk)]
        rest += same[count:]
    return buckets + ([rest] if rest else [])


class Layout:
    """Where tensors lie in a flat buffer that is cut into equal slices, one for each rank."""

    def __init__(self, shapes: Sequence[Sequence[int]], owners: Sequence[int] | None, ranks: Ranks):
        """Lay out tensors of these shapes in their order; with owners, those of a lower rank come first.

        owners: of each, the rank whose slice holds the whole of it. None cuts all into equal slices.
        """
        self.shapes = [torch.Size(shape) for shape in shapes]
        self.sizes = [shape.numel() for shape in self.shapes]
        total = sum(self.sizes)
        held = [0] * ranks.world_size  # elements of each rank
        if owners is None:
            share = math.ceil(total / ranks.world_size)
            self.slice_size = share if not ranks.communicates else math.ceil(share / ALIGNED) * ALIGNED
            self.offsets = [sum(self.sizes[:i]) for i in range(len(self.sizes))]
            held = [min(max(total - rank * self.slice_size, 0), self.slice_size) for rank in range(ranks.world_size)]
        else:
            within = []  # the slice of its owner
            for owner, size in zip(owners, self.sizes):
                within.append(held[owner])
                held[owner] += size
            self.slice_size = max(held) if not ranks.communicates else math.ceil(max(held) / ALIGNED) * ALIGNED
            self.offsets = [owner * self.slice_size + offset for owner, offset in zip(owners, within)]
        self.padding = self.slice_size * ranks.world_size - total
        self.start = ranks.rank * self.slice_size     # of this rank's slice
        self.stop = self.start + held[ranks.rank]     # of what is real in it

    def cut(self, flat: Tensor) -> list[Tensor]:
        """Return views of a buffer of this layout that have the tensors' shapes, in their order."""
        return [flat[offset:offset + size].view(shape)
                for offset, size, shape in zip(self.offsets, self.sizes, self.shapes)]

    def own(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return flat views of what this rank owns of contiguous tensors of these shapes, in order."""
        views = []
        for tensor, offset, size in zip(tensors, self.offsets, self.sizes):
            first, last = max(self.start - offset, 0), min(self.stop - offset, size)
            if first < last:
                views.append(tensor.view(-1)[first:last])
        return views

    def stacks(self, flat: Tensor) -> Iterator[Tensor]:
        """Yield the matrices that this rank owns, from a tensor of what it owns: those of each shape as (N, rows,
        columns)."""
        runs: list[tuple[torch.Size, int]] = []
        for shape, offset in zip(self.shapes, self.offsets):
            if self.start <= offset < self.stop:
                again = bool(runs) and runs[-1][0] == shape
                runs[-1:] = [(shape, runs[-1][1] + 1)] if again else [*runs[-1:], (shape, 1)]
        for (shape, count), part in zip(runs, flat.split([count * shape.numel() for shape, count in runs])):
            yield part.view(count, *shape)


def second_moment_shape(shape: torch.Size) -> tuple[int, int]:
    """Return the shape of NorMuon's second moment of a matrix: a number for each of its rows, or of its columns where
    it has more of these."""
    rows, columns = shape
    return (rows, 1) if rows >= columns else (1, columns)


class Bucket(Layout):
    """Parameters that are reduced, updated and gathered together; the top of this file says how they lie."""

    def __init__(self, group: dict[str, Any], members: Sequence[Member], owners: Sequence[int] | None, ranks: Ranks,
                 reduce_dtype: torch.dtype = torch.float32):
        """Lay out the buffer and make this rank's part of the state.

        Args:
            group: of `parameter_groups`.
            members: in the order in which they lie; with owners, those of a lower rank first.
            owners: of each member, the rank whose slice holds the whole of it. None cuts all into equal slices.
            ranks: who shares the work.
            reduce_dtype: what gradients are sent in. Their sum is float32.
        """
        super().__init__([member.shape for member in members], owners, ranks)
        self.group, self.ranks, self.reduce_dtype = group, ranks, reduce_dtype
        self.names, self.params = [m.name for m in members], [m.parameter for m in members]
        self.first = min(m.position for m in members)
        self.layouts: dict[str, Layout] = {key: self for key in STATE[group["kind"]]}  # of each part of the state
        if "normuon" in group.get("extras", ()):
            self.layouts["second_moment"] = Layout([second_moment_shape(m.shape) for m in members], owners, ranks)
        self.state = {key: self.params[0].new_zeros(layout.stop - layout.start) for key, layout in self.layouts.items()}
        self._reduction: tuple[dist.Work, Tensor, Tensor] | None = None
        self._gradient: Tensor | None = None  # a single process's
        self.borrows = False                  # whether the gradient is in the memory of p.grad: it is not to be changed
        self._gather: dist.Work | None = None
        self._hidden = False
        if ranks.communicates:
            self._move_weights()

    @torch.no_grad()
    def _move_weights(self) -> None:
        """Make the parameters views of one flat buffer."""
        self.flat = self.params[0].new_zeros(self.slice_size * self.ranks.world_size)
        self.views = self.cut(self.flat)
        self._nothing = self.flat.new_full((), float("nan"))
        for p, view in zip(self.params, self.views):
            p.data = view.copy_(p)

    # ---- gradients

    def start_reduction(self, release: bool = False) -> None:
        """Start to sum the gradients over the ranks. Collective. A p.grad of None counts as zeros.

        In float32 the backend sums (reduce-scatter). In another dtype every rank gets all ranks' gradients of its slice
        (all-to-all, as many bytes) and sums them in float32: each is rounded once, and the sum is not.

        release: set p.grad to None, so that its memory is free as soon as it is sent.
        """
        if not self.ranks.communicates:
            pieces = [p.new_zeros(p.numel()) if p.grad is None else p.grad.reshape(-1) for p in self.params]
            self._gradient = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
            self.borrows = len(pieces) == 1 and self.params[0].grad is not None
            return
        grads = [p.grad for p in self.params]
        if len(grads) == 1 and grads[0] is not None and not self.padding and self.reduce_dtype == torch.float32:
            send = grads[0].reshape(-1)
        else:
            send = self.flat.new_empty(self.flat.shape, dtype=self.reduce_dtype)
            pairs = [(view, grad) for view, grad in zip(self.cut(send), grads) if grad is not None]
            if pairs:
                torch._foreach_copy_(*map(list, zip(*pairs)))
            for view, grad in zip(self.cut(send), grads):
                if grad is None:
                    view.zero_()
        if release:
            for p in self.params:
                p.grad = None
        if self.reduce_dtype == torch.float32:
            part = send.new_empty(self.slice_size)
            work = dist.reduce_scatter_tensor(part, send, async_op=True)
        else:
            part = torch.empty_like(send)
            work = dist.all_to_all_single(part, send, async_op=True)
        self._reduction = work, send, part

    def reduced(self) -> Tensor:
        """Wait for the reduction and return the gradient of what this rank owns, flat, float32. On a GPU the stream
        waits, not the host."""
        if not self.ranks.communicates:
            gradient, self._gradient = self._gradient, None
            return gradient
        work, _, part = self._reduction  # what is sent is kept until here: its memory is not used again before
        work.wait()
        self._reduction = None
        count = self.stop - self.start
        if self.reduce_dtype == torch.float32:
            return part[:count]
        return part.view(self.ranks.world_size, -1)[:, :count].sum(0, dtype=torch.float32)

    # ---- weights

    def weights(self) -> list[Tensor]:
        """Return flat views of the weights that this rank owns, to be updated in place."""
        if not self.ranks.communicates:
            return self.own([p.detach() for p in self.params])
        return [self.flat[self.start:self.stop]] if self.stop > self.start else []

    def start_gather(self, hide: bool) -> None:
        """Start to gather the weights that the ranks own into those of all. Collective.

        hide: until `finish_gather`, let the parameters read as NaN, so that nobody takes old or half-written weights
        for the new ones.
        """
        mine = self.flat[self.ranks.rank * self.slice_size:][:self.slice_size]
        self._gather = dist.all_gather_into_tensor(self.flat, mine, async_op=True)
        if hide:
            self._hidden = True
            for p in self.params:
                p.data = self._nothing.expand(p.shape)

    def finish_gather(self) -> None:
        """Wait until the weights of all ranks are there, if they are on their way. On a GPU the stream waits, not the
        host."""
        if self._gather is not None:
            self._gather.wait()
            self._gather = None
        if self._hidden:
            self._hidden = False
            for p, view in zip(self.params, self.views):
                p.data = view

    def moved(self) -> list[str]:
        """Return the names of parameters that are not in the buffer any more: something gave them other memory."""
        if not self.ranks.communicates:
            return []
        return [name for name, p, view in zip(self.names, self.params, self.views) if p.data_ptr() != view.data_ptr()]

    # ---- state

    def gather_state(self, key: str) -> list[Tensor]:
        """Return this part of the state of all parameters, each in its shape. Collective."""
        part, layout = self.state[key], self.layouts[key]
        if not self.ranks.communicates:
            return layout.cut(part)
        whole = self.flat.new_empty(layout.slice_size * self.ranks.world_size)
        mine = whole[layout.start:][:layout.slice_size]
        mine[:len(part)] = part
        dist.all_gather_into_tensor(whole, mine)
        return layout.cut(whole)


def make_buckets(groups: Sequence[dict[str, Any]], ranks: Ranks, reduce_dtype: torch.dtype = torch.float32,
                 bucket_elements: int = BUCKET_ELEMENTS) -> list[Bucket]:
    """Return the buckets of all parameters, the same on every rank, in the order in which backward finishes them.

    Args:
        groups: of `parameter_groups`. Without "positions", the parameters are in the order of the forward pass.
        ranks: who shares the work. A single process has a bucket for all matrices of a shape in a group, and one for
            each other group.
        reduce_dtype: what gradients are sent in.
        bucket_elements: of Muon's buckets, at least.
    """
    buckets: list[Bucket] = []
    spent, count = [0] * ranks.world_size, 0
    for group in groups:
        positions = group.get("positions", range(count, count + len(group["params"])))
        members = [Member(*given) for given in zip(group["names"], group["params"], positions, strict=True)]
        count += len(members)
        if group["kind"] == "adamw":
            buckets.append(Bucket(group, members, None, ranks, reduce_dtype))
        elif not ranks.communicates:
            stacks: dict[torch.Size, list[Member]] = {}
            for member in members:
                stacks.setdefault(member.shape, []).append(member)
            buckets += [Bucket(group, same, [0] * len(same), ranks) for same in stacks.values()]
        else:
            for some in shared_out(members, ranks.world_size, bucket_elements):
                owned = sorted(zip(owners_of([m.shape for m in some], ranks.world_size, spent), some),
                               key=lambda pair: (pair[0], pair[1].shape, pair[1].position))
                owners, some = zip(*owned)
                buckets.append(Bucket(group, some, owners, ranks, reduce_dtype))
    return buckets if not ranks.communicates else sorted(buckets, key=lambda bucket: -bucket.first)
