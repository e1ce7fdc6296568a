"""Buckets: who owns what, when they are sent, and that overlapping with computation changes no number."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from nanochat.buckets import Bucket, Member, newton_schulz_flops, owners_of
from nanochat.distributed import Ranks, all_reduce_sum
from nanochat.gpt import GPT, GPTConfig
from nanochat.optim import MuonAdamW, newton_schulz, parameter_groups
from nanochat.recipe import published
from nanochat.training import train_step
from tests.helpers import PARTS, small_model
from tests.test_distributed import told_by_ranks

ALONE = Ranks(0, 0, 1, torch.device("cpu"))
STEPS, ROWS, T = 5, 7, 16
GROUPS = published.groups | {name: replace(published.groups[name], lr=0.01)
                             for name in ("wte", "value_embeds", "x0_scales", "scalars")}


# --- the plan

def of_rank(model: nn.Module, rank: int, world_size: int, **given) -> MuonAdamW:
    return MuonAdamW(parameter_groups(model), Ranks(rank, rank, world_size, torch.device("meta")), **given)


def work_of(optimizer: MuonAdamW) -> int:
    """The FLOPs of Newton-Schulz that a rank does, by the matrices that it computes with."""
    return sum(newton_schulz_flops(*stack.shape[1:]) * len(stack) for bucket in optimizer.buckets
               if bucket.group["kind"] == "muon"
               for stack in bucket.stacks(torch.empty(bucket.stop - bucket.start, device="meta")))


@pytest.mark.parametrize("depth", [20, 26, 32])
def test_eight_ranks_own_equally_much_and_compute_equally_much(monkeypatch, depth):
    monkeypatch.setattr(torch.Tensor, "normal_", lambda tensor, *given, **named: tensor)  # torch imports sympy for it
    with torch.device("meta"):
        model = GPT(GPTConfig.from_depth(depth, vocab_size=65536))
    ranks = [of_rank(model, rank, 8) for rank in range(8)]
    work = [work_of(optimizer) for optimizer in ranks]
    mean = sum(work) / 8
    assert max(work) < 1.05 * mean and min(work) > 0.95 * mean
    buckets = ranks[0].buckets
    whole = sum(p.numel() for p in model.parameters())
    assert sum(bucket.slice_size * 8 for bucket in buckets) < 1.03 * whole  # what is sent, padding included
    for optimizer in ranks[1:]:  # all ranks issue the same collectives
        assert [(b.names, b.offsets, b.slice_size) for b in optimizer.buckets] == [
            (b.names, b.offsets, b.slice_size) for b in buckets]
    place = {name: i for i, (name, _) in enumerate(model.named_parameters())}
    assert all(a > b for a, b in pairwise(min(place[name] for name in bucket.names) for bucket in buckets))
    muon = [bucket for bucket in buckets if bucket.group["kind"] == "muon"]
    early = sum(sum(bucket.sizes) for bucket in muon if bucket.first > place["transformer.h.3.attn.c_proj.weight"])
    assert early > 0.7 * sum(sum(bucket.sizes) for bucket in muon)  # sent before backward comes to the first layers
    assert max(bucket.slice_size * 8 for bucket in muon) < 0.15 * whole


class Products(TorchDispatchMode):
    """Counts the FLOPs of batched matrix products."""

    flops = 0

    def __torch_dispatch__(self, function, types, given=(), named=None):
        if function in (torch.ops.aten.bmm.default, torch.ops.aten.baddbmm.default):
            left, right = given[-2:]
            self.flops += 2 * left.numel() * right.shape[-1]
        return function(*given, **(named or {}))


def test_the_flops_of_newton_schulz_are_those_of_its_products():
    for rows, columns in ((24, 24), (40, 16), (16, 40)):
        with Products() as counted:
            newton_schulz(torch.randn(3, rows, columns), torch.bfloat16)
        assert counted.flops == 3 * newton_schulz_flops(rows, columns)


@given(st.lists(st.sampled_from([(4, 4), (4, 16), (16, 4), (1, 4), (5, 3)]), min_size=1, max_size=40),
       st.integers(1, 9))
def test_matrices_are_dealt_out_evenly(shapes, world_size):
    spent = [0] * world_size
    owners = owners_of(shapes, world_size, spent)
    held = [sum(math.prod(shape) for shape, owner in zip(shapes, owners) if owner == rank)
            for rank in range(world_size)]
    assert sum(held) == sum(map(math.prod, shapes))
    assert max(held) - min(held) <= max(map(math.prod, shapes))
    assert spent == [sum(newton_schulz_flops(*shape) for shape, owner in zip(shapes, owners) if owner == rank)
                     for rank in range(world_size)]


@given(st.lists(st.sampled_from([(4, 4), (4, 16), (16, 4), (1, 4), (5, 3)]), min_size=1, max_size=30),
       st.integers(2, 5), st.sampled_from([1, 40, 10**6]), st.booleans())
def test_every_number_lies_in_the_slice_of_one_rank(shapes, world_size, bucket_elements, muon):
    """Write into the parameters and read what the ranks own: all numbers are there once, matrices of Muon whole."""
    total = sum(map(math.prod, shapes))
    numbers = torch.arange(1.0, total + 1).split([math.prod(shape) for shape in shapes])
    found, state = [], []
    for rank in range(world_size):
        parameters = [nn.Parameter(part.view(shape).clone()) for part, shape in zip(numbers, shapes)]
        group = {"kind": "muon" if muon else "adamw", "names": [str(i) for i in range(len(shapes))],
                 "params": parameters}
        optimizer = MuonAdamW([group], Ranks(rank, rank, world_size, torch.device("cpu")),
                              bucket_elements=bucket_elements)
        for p, part in zip(parameters, numbers):
            assert torch.equal(p.detach().view(-1), part)  # moving them into the buffers changed nothing
        for bucket in optimizer.buckets:
            mine = torch.cat([*bucket.weights(), torch.empty(0)])
            assert torch.equal(mine, torch.cat([*bucket.own([p.detach() for p in bucket.params]), torch.empty(0)]))
            assert bucket.stop - bucket.start <= bucket.slice_size
            found.append(mine)
            state += [part.numel() for part in bucket.state.values()]
            if muon:
                stacks = list(bucket.stacks(mine))
                assert sum(stack.numel() for stack in stacks) == len(mine)
                assert len({stack.shape[1:] for stack in stacks}) == len(stacks)  # one product for each shape
                for matrix in (matrix for stack in stacks for matrix in stack):
                    assert any(matrix.shape == p.shape and torch.equal(matrix, p) for p in bucket.params)
    assert torch.equal(torch.cat(found).sort().values, torch.arange(1.0, total + 1))
    assert sum(state) == total * (1 if muon else 2)


# --- ranks

def rows_of(step: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The micro-batches of all ranks in a step, of one row each. Step 2 has fewer than there are ranks."""
    dice = torch.Generator().manual_seed(step)
    ids = torch.randint(97, (ROWS if step != 2 else 1, T), generator=dice)
    targets = torch.where(torch.rand(ids.shape, generator=dice) < 0.3, -1, ids.roll(-1, 1))
    return list(zip(ids.split(1), targets.split(1)))


def evaluate(model: GPT) -> torch.Tensor:
    with torch.no_grad():
        return torch.stack([model(*row) for row in rows_of(100)])


def copy_of(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in state.items()}


def plain_step(model: GPT, optimizer: MuonAdamW, batches: list, ranks: Ranks) -> None:
    """A step that communicates after backward, and waits for all weights."""
    optimizer.zero_grad()
    tokens = torch.zeros(())
    for ids, targets in batches:
        model(ids, targets, "sum").backward()
        tokens += (targets != -1).sum()
    optimizer.step(grad_scale=1 / all_reduce_sum(tokens, ranks), clip=0.5)


def run_plain(ranks: Ranks, **given) -> tuple:
    model = small_model(**PARTS["modern"], smear=True)
    optimizer = MuonAdamW(parameter_groups(model, GROUPS), ranks, bucket_elements=4000, **given)
    seen = []
    for step in range(STEPS):
        plain_step(model, optimizer, rows_of(step)[ranks.rank::ranks.world_size], ranks)
        seen.append((evaluate(model), copy_of(model.state_dict())))
    return seen, copy_of(model.state_dict()), optimizer.state_dict()


def run_overlapped(ranks: Ranks, events: list, **given) -> tuple:
    """Train as `run_plain` does, by train_step; note what happened in which order."""
    model = small_model(**PARTS["modern"], smear=True)
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(lambda p: events.append(("gradient", None)))
    optimizer = MuonAdamW(parameter_groups(model, GROUPS), ranks, bucket_elements=4000, **given)
    seen = []

    def on_the_way() -> int:
        return sum(bucket._hidden for bucket in optimizer.buckets)

    for i, block in enumerate(model.transformer.h):
        block.attn.register_forward_pre_hook(lambda *given, i=i: events.append((f"layer {i}", on_the_way())))
    reduce = dist.reduce_scatter_tensor
    dist.reduce_scatter_tensor = lambda *given, **named: events.append(("reduce", "")) or reduce(*given, **named)
    try:
        with optimizer.gathering_in_forward(model):
            for step in range(STEPS):
                events.append(("step", step))
                train_step(model, optimizer, rows_of(step)[ranks.rank::ranks.world_size], ranks, clip=0.5)
                events.append(("done", step))
                assert on_the_way() == (len(optimizer.buckets) if ranks.world_size > 1 else 0)
                if ranks.world_size > 1:
                    assert all(p.isnan().all() for p in model.parameters())  # nobody can take them for weights
                if step in (1, 4):
                    seen.append(evaluate(model))
                elif step == 3:
                    seen.append(copy_of(model.state_dict()))
                # after steps 0 and 2, the next forward pass of training is the first to read them
    finally:
        dist.reduce_scatter_tensor = reduce
    assert on_the_way() == 0 and model.before_use is None
    return seen, copy_of(model.state_dict()), optimizer.state_dict()


def sum_in_bfloat16(ranks: Ranks) -> None:
    """A bucket's gradient in bfloat16 is the float32 sum of each rank's, rounded once."""
    shapes = [(8, 8), (8, 8), (3, 5), (2, 8)]
    for kind in ("adamw", "muon"):
        parameters = [nn.Parameter(torch.zeros(shape)) for shape in shapes]
        owners = None if kind == "adamw" else [0, 1, 1, 1]
        bucket = Bucket({"kind": kind}, [Member(str(i), p, i) for i, p in enumerate(parameters)], owners, ranks,
                        torch.bfloat16)
        gradients = [[torch.randn(shape, generator=torch.Generator().manual_seed(10 * rank + i)) * 10**rank
                      for i, shape in enumerate(shapes)] for rank in range(ranks.world_size)]
        for i, p in enumerate(parameters[:3]):  # the last has no gradient
            p.grad = gradients[ranks.rank][i]
        bucket.start_reduction(release=True)
        got = bucket.reduced()
        expected = [sum(gradients[rank][i].bfloat16().double() for rank in range(ranks.world_size)) for i in range(3)]
        expected = torch.cat([*bucket.own([*expected, torch.zeros(2, 8).double()]), torch.empty(0).double()])
        assert got.dtype == torch.float32 and all(p.grad is None for p in parameters)
        torch.testing.assert_close(got.double(), expected, rtol=1e-6, atol=1e-6 * 10 ** (ranks.world_size - 1))


def mistakes(ranks: Ranks) -> list[str]:
    """What is refused, in words. All ranks make the same mistake."""
    told = []
    model = small_model(**PARTS["modern"], smear=True)
    optimizer = MuonAdamW(parameter_groups(model), ranks)
    with optimizer.reducing():
        model(*rows_of(0)[0], "sum").backward()
    assert all(p.grad is None for p in model.parameters())
    model(*rows_of(0)[0], "sum").backward()
    with pytest.raises(RuntimeError) as error:
        optimizer.step()
    told.append(str(error.value))
    optimizer.zero_grad()  # forgets them
    before = copy_of(model.state_dict())
    with optimizer.gathering_in_forward(model):
        optimizer.step()
        with pytest.raises(RuntimeError):
            model.load_state_dict(before)  # it would be overwritten by what is on its way
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())  # a zero gradient
    model.double().float()
    with pytest.raises(RuntimeError) as error:
        optimizer.step()
    return [*told, str(error.value)]


def scenario(ranks: Ranks, folder: str) -> None:
    """What each rank r of n does; results go to folder/n-r.pt."""
    events: list = []
    told = {"plain": run_plain(ranks), "overlapped": run_overlapped(ranks, events), "events": events,
            "bfloat16": run_plain(ranks, reduce_dtype=torch.bfloat16)}
    if ranks.world_size > 1:
        sum_in_bfloat16(ranks)
        told["bfloat16, overlapped"] = run_overlapped(ranks, [], reduce_dtype=torch.bfloat16)
        told["mistakes"] = mistakes(ranks)
    torch.save(told, f"{folder}/{ranks.world_size}-{ranks.rank}.pt")


@pytest.fixture(scope="module")
def worlds(tmp_path_factory) -> dict[int, list[dict]]:
    """What each rank of 1, 2 and 4 told, under real processes."""
    return told_by_ranks(scenario, str(tmp_path_factory.mktemp("worlds")), ALONE, 2, 4)


def same(got: dict, expected: dict, **tolerance: float) -> None:
    assert got.keys() == expected.keys()
    for name in expected:
        if isinstance(expected[name], dict):
            same(got[name], expected[name], **tolerance)
        else:
            torch.testing.assert_close(got[name], expected[name], **(tolerance or {"rtol": 0, "atol": 0}))


@pytest.mark.parametrize("world_size, how", [(1, ""), (2, ""), (4, ""), (2, "bfloat16"), (4, "bfloat16")])
def test_overlap_changes_no_number_and_nobody_reads_old_weights(worlds, world_size, how):
    for rank in worlds[world_size]:
        plain, state, optimizer_state = rank[how or "plain"]
        seen, overlapped, overlapped_state = rank[f"{how}, overlapped" if how else "overlapped"]
        assert torch.equal(seen[0], plain[1][0])  # evaluated right after step 1
        same(seen[1], plain[3][1])                # saved right after step 3
        assert torch.equal(seen[2], plain[4][0])
        same(overlapped, state)
        same(overlapped_state or {}, optimizer_state or {})


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_train_as_one_process_does(worlds, world_size):
    for rank in worlds[world_size]:
        # only the order of float32 sums differs; where a gradient is near zero, Adam enlarges the difference to a
        # fraction of its learning rate (0.05 here)
        same(rank["overlapped"][1], worlds[1][0]["overlapped"][1], rtol=2e-3, atol=2e-4)
        same(rank["overlapped"][1], worlds[world_size][0]["overlapped"][1])
    same(worlds[world_size][0]["overlapped"][2], worlds[1][0]["overlapped"][2], rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("world_size", [2, 4])
def test_gradients_sent_in_bfloat16_train_nearly_the_same(worlds, world_size):
    """Each gradient is rounded once, to 2^-9 of it, and the errors of ranks and weights do not add up."""
    exact, rounded = (torch.stack([losses for losses, _ in worlds[world_size][0][how][0]])
                      for how in ("plain", "bfloat16"))
    assert 0 < (rounded - exact).abs().max() < 0.02 * exact.mean()


@pytest.mark.parametrize("world_size", [2, 4])
def test_gradients_are_sent_before_backward_ends_and_weights_awaited_layer_by_layer(worlds, world_size):
    for number, rank in enumerate(worlds[world_size]):
        events = rank["events"]
        for step in range(STEPS):
            events = events[events.index(("step", step)):]
            names = [name for name, _ in events[:events.index(("done", step))]]
            buckets = names.count("reduce")
            assert buckets >= 8
            if step == 2 and number:  # it has nothing to learn from, and sends all the same
                assert names == ["step"] + ["reduce"] * buckets
                continue
            if step in (1, 3):  # the first forward pass after a step: the weights are on their way
                on_the_way = [count for name, count in events if name.startswith("layer")][:4]
                assert on_the_way == sorted(on_the_way, reverse=True) and on_the_way[0] >= 4 and on_the_way[3] >= 1
            last_backward = names[len(names) - names[::-1].index("layer 3"):]
            assert last_backward[:2] == ["gradient", "reduce"]  # the head's is the first
            end = len(last_backward) - last_backward[::-1].index("gradient")
            assert last_backward[:end].count("reduce") >= 0.6 * buckets
            assert "reduce" not in names[:-len(last_backward)]  # micro-batches before the last send nothing


@pytest.mark.parametrize("world_size", [2, 4])
def test_what_would_lose_a_gradient_or_train_other_memory_is_refused(worlds, world_size):
    for rank in worlds[world_size]:
        late, moved = rank["mistakes"]
        assert "got a gradient after" in late and "was given other memory" in moved
