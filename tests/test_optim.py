"""Muon + AdamW: against plain twins, and on 1, 2 and 3 ranks."""

import os
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from nanochat.distributed import Ranks
from nanochat.errors import UserError
from nanochat.optim import MuonAdamW, newton_schulz, parameter_groups
from nanochat.recipe import MUON_EXTRAS, OptimizerGroup, modern, override, published
from tests.test_distributed import told_by_ranks

ALONE = Ranks(0, 0, 1, torch.device("cpu"))
E, V, ROWS, T = 8, 11, 6, 5


class Mixer(nn.Module):
    def __init__(self, small: bool):
        super().__init__()
        self.c_q = nn.Linear(E, E, bias=False)
        self.conv1d = nn.Conv1d(E, E, 3, groups=E, bias=False)
        if small:
            self.A_proj = nn.Linear(E, 4, bias=False)  # one matrix of its shape: fewer than ranks

    def optimizer_group(self, name: str) -> str:
        return "taps" if name == "conv1d.weight" else "matrices"


class Tiny(nn.Module):
    """A model with the published names. Only row 0 of the batch uses its last block: most ranks get no gradient."""

    def __init__(self):
        super().__init__()
        self.config = SimpleNamespace(n_embd=E)
        self.stream = nn.Module()  # has no parameters
        self.transformer = nn.ModuleDict({"wte": nn.Embedding(V, E), "h": nn.ModuleList()})
        for i in range(4):
            mlp = nn.ModuleDict({"c_fc": nn.Linear(E, 4 * E, bias=False), "c_proj": nn.Linear(4 * E, E, bias=False)})
            self.transformer.h.append(nn.ModuleDict({"attn": Mixer(i == 0), "mlp": mlp}))
        self.lm_head = nn.Linear(E, V, bias=False)
        self.stream = nn.Module()

    def loss(self, row: int) -> torch.Tensor:
        """Summed loss of one row of the global batch. Rows weigh 1, 10, 100: ranks' gradients differ in size."""
        ids = torch.randint(V, (T + 1,), generator=torch.Generator().manual_seed(row))
        x = self.transformer.wte(ids[:-1])
        for block in self.transformer.h if row == 0 else list(self.transformer.h)[:-1]:
            y = block.attn.c_q(x)
            if hasattr(block.attn, "A_proj"):
                y = y + block.attn.A_proj(x).repeat(1, 2)
            y = block.attn.conv1d(nn.functional.pad(y.T[None], (2, 0)))[0].T
            x = nn.functional.rms_norm(x + y, (E,))
            x = x + block.mlp.c_proj(block.mlp.c_fc(x).relu().square())
        return 10 ** (row % 3) * nn.functional.cross_entropy(self.lm_head(x), ids[1:], reduction="sum")


def tiny(seed: int = 0) -> Tiny:
    torch.manual_seed(seed)
    return Tiny()


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def backward(model: Tiny, ranks: Ranks, optimizer: MuonAdamW | None = None) -> None:
    """Add up the gradients of this rank's rows. With an optimizer, it reduces them during the last backward pass."""
    rows = range(ranks.rank, ROWS, ranks.world_size)
    for row in rows:
        with optimizer.reducing() if optimizer is not None and row == rows[-1] else nullcontext():
            model.loss(row).backward()


def train(model: Tiny, optimizer: MuonAdamW, ranks: Ranks, steps: range, clip: float | None = 0.5) -> list[float]:
    norms = []
    for step in steps:
        optimizer.zero_grad()
        backward(model, ranks, optimizer if step % 2 == 0 else None)
        norm = optimizer.step(lr_scale=1 / (1 + step), momentum=0.85 + 0.02 * step, decay_scale=1 - 0.1 * step,
                              grad_scale=1 / (ROWS * T), clip=clip)
        norms.append(norm.item())
    return norms


def with_gradients(*shapes: tuple[int, ...], seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    parameters = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    for p in parameters:
        p.grad = torch.randn(p.shape, generator=generator)
    return parameters


def optimizer_of(kind: str, parameters: list[nn.Parameter], **group) -> MuonAdamW:
    return MuonAdamW([{"kind": kind, "names": [f"p{i}" for i in range(len(parameters))], "params": parameters,
                       "weight_decay": 0.0, "betas": (0.8, 0.95), "eps": 1e-10, **group}], ALONE)


def rates(**given: float) -> dict[str, OptimizerGroup]:
    """The published groups with rates and weight decay as given."""
    flags = {"matrix_lr": 0.02, "embedding_lr": 0.2, "unembedding_lr": 0.004, "weight_decay": 0.0}
    return override(published.groups, **{**flags, **given})


# --- the arithmetic

def plain_newton_schulz(g: torch.Tensor) -> torch.Tensor:
    """Muon's iteration, one matrix, in float64."""
    x = g.double() / (g.double().norm() + 1e-7)
    x = x.T if g.shape[0] > g.shape[1] else x
    for _ in range(5):
        A = x @ x.T
        x = 3.4445 * x + (-4.7750 * A + 2.0315 * A @ A) @ x
    return x.T if g.shape[0] > g.shape[1] else x


@pytest.mark.parametrize("rows, columns", [(24, 24), (24, 30), (64, 16), (16, 64), (16, 32), (1, 16), (2, 48)])
@pytest.mark.parametrize("spectrum", ["full", "rank one", "steep"])
def test_newton_schulz_is_the_plain_iteration(rows, columns, spectrum):
    g = torch.Generator().manual_seed(1)
    x = torch.randn(3, rows, columns, generator=g)
    if spectrum == "rank one":
        x = x[:, :, :1] @ x[:, :1, :]
    if spectrum == "steep":
        x = x * 10.0 ** torch.linspace(0, -8, columns)
    got = newton_schulz(x, torch.float32)
    expected = torch.stack([plain_newton_schulz(matrix) for matrix in x])
    # float32 rounding, 6e-8, grows at most 3.44-fold in each of 5 steps, 11.9-fold where the Gram matrix alone is kept:
    # below 1.5e-3
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=1.5e-3)
    if spectrum == "full":
        torch.testing.assert_close(got.double(), expected, rtol=0, atol=1e-4)


def test_newton_schulz_in_bfloat16_brings_singular_values_near_one():
    x = torch.randn(2, 32, 96, generator=torch.Generator().manual_seed(2))
    values = torch.linalg.svdvals(newton_schulz(x, torch.bfloat16).float())
    assert 0.6 < values.min() and values.max() < 1.3
    assert newton_schulz(torch.zeros(1, 4, 8), torch.float32).abs().max() == 0


EXTRAS = [(), *((extra,) for extra in MUON_EXTRAS), ("normuon", "cautious"), MUON_EXTRAS]


def plain_muon(w: torch.Tensor, u: torch.Tensor, moment: torch.Tensor, rate: float, decay: float,
               extras: tuple[str, ...]) -> torch.Tensor:
    """Return the new weights of one matrix, from the formulas, in float64. moment is updated."""
    rows, columns = u.shape
    if "equilibrate" in extras:
        u = torch.stack([row / row.norm() * u.norm() / rows ** 0.5 if row.norm() > 0 else row for row in u])
    o = plain_newton_schulz(u)
    if "renormalize" in extras and o.norm() > 0:
        o = o * min(rows, columns) ** 0.5 / o.norm()
    if "normuon" in extras:
        moment.copy_(0.9 * moment + 0.1 * (o ** 2).mean(1 if rows >= columns else 0, keepdim=True))
        divided = torch.where(moment > 0, o / moment.sqrt(), 0)
        o = divided * o.norm() / divided.norm() if o.norm() > 0 else o
    kept = (o * w >= 0).double() if "cautious" in extras else 1.0
    return w - rate * max(1, rows / columns) ** 0.5 * o - rate * decay * w * kept


@pytest.mark.parametrize("extras", EXTRAS, ids="+".join)
def test_muon_is_the_plain_loop_over_matrices(extras):
    shapes = [(24, 24), (32, 8), (24, 24), (8, 32), (4, 24), (24, 24), (32, 8)]
    parameters = with_gradients(*shapes)
    decay = 2.0 if extras else 0.0
    optimizer = optimizer_of("muon", parameters, lr=0.02, weight_decay=decay, extras=extras)
    twins = [p.detach().double().clone() for p in parameters]
    buffers = [torch.zeros_like(twin) for twin in twins]
    moments = [twin.new_zeros(len(twin), 1) if twin.shape[0] >= twin.shape[1] else twin.new_zeros(1, twin.shape[1])
               for twin in twins]
    for step in range(4):
        momentum, lr_scale, decay_scale = 0.85 + 0.03 * step, 1.0 - 0.2 * step, 1.0 - 0.3 * step
        for i, (p, twin) in enumerate(zip(parameters, twins)):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * step + i))
            p.grad *= torch.linspace(0.1, 3, len(p.grad))[:, None]  # rows of unlike norms
            if step == 0 and i == 1:
                p.grad[5] = 0
            if step == 0 and i == 2:
                p.grad.zero_()
            g = p.grad.double() / 3
            buffers[i] = momentum * buffers[i] + (1 - momentum) * g
            u = (1 - momentum) * g + momentum * buffers[i]
            twin.copy_(plain_muon(twin, u, moments[i], 0.02 * lr_scale, decay * decay_scale, extras))
        optimizer.step(momentum=momentum, lr_scale=lr_scale, decay_scale=decay_scale, grad_scale=1 / 3)
    for i, (p, twin) in enumerate(zip(parameters, twins)):
        torch.testing.assert_close(p.detach().double(), twin, rtol=0, atol=1e-5)
        if "normuon" in extras:
            moment = optimizer.state_dict()[f"p{i}"]["second_moment"]
            torch.testing.assert_close(moment.double(), moments[i], rtol=1e-3, atol=1e-7)
    assert ("second_moment" in optimizer.state_dict()["p0"]) == ("normuon" in extras)
    held = sum(p.numel() + ("normuon" in extras) * max(p.shape) for p in parameters)
    assert optimizer.bytes_of_state() == 4 * held


def test_the_weight_decay_of_adamw_does_not_follow_that_of_muon():
    parameters = with_gradients((5, 4))
    before = parameters[0].detach().clone()
    parameters[0].grad = None
    optimizer_of("adamw", parameters, lr=0.5, weight_decay=0.1).step(decay_scale=0.0)
    torch.testing.assert_close(parameters[0].detach(), before * 0.95)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_adamw_is_torchs(weight_decay):
    shapes = [(11, 8), (5,), (8, 1, 3)]
    parameters, twins = with_gradients(*shapes), with_gradients(*shapes)
    optimizer = optimizer_of("adamw", parameters, lr=0.2, weight_decay=weight_decay)
    twin = torch.optim.AdamW(twins, lr=0.2, betas=(0.8, 0.95), eps=1e-10, weight_decay=weight_decay)
    for step in range(5):
        for p, q in zip(parameters, twins):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step))
            q.grad = p.grad.clone()
        twin.param_groups[0]["lr"] = 0.2 / (1 + step)
        optimizer.step(lr_scale=1 / (1 + step))
        twin.step()
    for p, q in zip(parameters, twins):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_zero_rate_leaves_the_weights_and_steps_leave_the_gradients():
    model = tiny()
    optimizer = MuonAdamW(parameter_groups(model, rates(weight_decay=0.1)), ALONE)
    before = weights(model)
    backward(model, ALONE)
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    optimizer.step(lr_scale=0.0, clip=1e-3)
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) and torch.equal(p.grad, gradients[name]), name
    optimizer.step(clip=1e-3)
    for name, p in model.named_parameters():
        assert not torch.equal(p, before[name]) and torch.equal(p.grad, gradients[name]), name
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())


def test_clipping_bounds_the_gradient_that_is_used_and_the_norm_returned_is_from_before():
    parameters = with_gradients((8, 8), (8, 8), (4, 8))
    norm = torch.stack([p.grad.norm() for p in parameters]).norm() / 7
    for clip, kept in ((None, 1.0), (2 * norm.item(), 1.0), (0.1, 0.1 / (norm.item() + 1e-6))):
        optimizer = optimizer_of("muon", parameters, lr=0.0)
        torch.testing.assert_close(optimizer.step(grad_scale=torch.tensor(1 / 7), clip=clip, momentum=0.0), norm)
        torch.testing.assert_close(optimizer.state_dict()["p2"]["momentum"], parameters[2].grad * kept / 7)
    with pytest.raises(ValueError, match="clip is 0"):
        optimizer.step(clip=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_is_told_and_changes_no_weight(bad):
    model = tiny()
    optimizer = MuonAdamW(parameter_groups(model, rates(weight_decay=0.1)), ALONE)
    train(model, optimizer, ALONE, range(2))
    before = weights(model)
    model.lm_head.weight.grad[3, 2] = bad
    for clip in (None, 1.0):
        assert not optimizer.step(clip=clip).isfinite()
        assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    train(model, optimizer, ALONE, range(2, 3))
    assert all(p.isfinite().all() for p in model.parameters())


# --- groups

def test_every_parameter_is_in_the_group_and_at_the_rate_of_the_recipe():
    gpt = pytest.importorskip("nanochat.gpt")
    model = gpt.GPT(gpt.GPTConfig(sequence_len=16, vocab_size=32, n_layer=5, n_head=2, n_kv_head=1, n_embd=192))
    compiled = nn.Module()  # as torch.compile wraps it
    compiled._orig_mod, compiled.config = model, model.config
    groups = parameter_groups(compiled, rates(weight_decay=0.1))
    kind_and_rate = {name: (group["kind"], group["lr"]) for group in groups for name in group["names"]}
    assert sum(len(group["names"]) for group in groups) == len(kind_and_rate) == len(dict(model.named_parameters()))
    for group in groups:
        for name, p in zip(group["names"], group["params"]):
            assert p is model.get_parameter(name)
    for name, got in kind_and_rate.items():
        adamw = {"wte.weight": 0.2, "lm_head.weight": 0.004, "conv1d.weight": 0.02}
        rate = next((rate * 2 for ending, rate in adamw.items() if name.endswith(ending)), None)  # (192/768)^-0.5 = 2
        assert got == (("muon", 0.02) if rate is None else ("adamw", pytest.approx(rate))), name
    assert sum(name.endswith("conv1d.weight") for name in kind_and_rate) == 3
    lr = {"matrices": 1.0, "wte": 2.0, "lm_head": 3.0, "taps": 4.0}
    given = parameter_groups(model, {name: replace(group, lr=lr.get(name, 9.0), extras=("normuon",) * (name == "wte"))
                                     for name, group in published.groups.items()})
    assert [group["extras"] for group in given] == [(), ("normuon",), (), ()]
    assert [group["lr"] for group in given] == pytest.approx([1.0, 4.0, 6.0, 8.0])
    assert [group["weight_decay"] for group in groups] == [0.0, 0.1, 0.1, 0.1]
    assert all(group["betas"] == (0.8, 0.95) and group["eps"] == 1e-10 for group in groups[1:])


@pytest.mark.parametrize("where, name", [("transformer.h.0.attn", "bias"), ("lm_head", "bias"),
                                         ("transformer", "scale")])
def test_a_parameter_without_a_rule_is_an_error(where, name):
    model = tiny()
    model.get_submodule(where).register_parameter(name, nn.Parameter(torch.zeros(3)))
    with pytest.raises(ValueError, match=rf"{where}\.{name}"):
        parameter_groups(model)


def test_a_mixer_can_name_any_group_of_the_recipe_and_no_other(monkeypatch):
    monkeypatch.setattr(Mixer, "optimizer_group", lambda self, name: "own" if name == "c_q.weight" else "taps")
    with pytest.raises(ValueError, match=r"h\.0\.attn\.c_q\.weight .* group 'own', which the recipe does not have"):
        parameter_groups(tiny())
    own = replace(published.groups["taps"], lr=0.5, by_width=False, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.3)
    groups = parameter_groups(tiny(), {**published.groups, "own": own})
    assert groups[-1]["names"] == [f"transformer.h.{i}.attn.c_q.weight" for i in range(4)]
    assert {name: groups[-1][name] for name in ("kind", "lr", "betas", "eps", "weight_decay")} == {
        "kind": "adamw", "lr": 0.5, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.3}


def test_parameters_given_twice_or_not_in_float32_are_refused():
    p, q = with_gradients((4, 4), (4, 4))
    with pytest.raises(ValueError, match="p1 twice"):
        optimizer_of("muon", [p, p], lr=0.1)
    with pytest.raises(ValueError, match="p0 is torch.bfloat16"):
        optimizer_of("adamw", [nn.Parameter(q.detach().bfloat16())], lr=0.1)
    with pytest.raises(ValueError, match="kind 'sgd'"):
        optimizer_of("sgd", [p], lr=0.1)


# --- state

def test_state_that_is_not_of_this_model_is_refused_and_changes_nothing():
    model = tiny()
    optimizer = MuonAdamW(parameter_groups(model), ALONE)
    train(model, optimizer, ALONE, range(1))
    state = optimizer.state_dict()
    wrong = {name: dict(entry) for name, entry in state.items()}
    del wrong["lm_head.weight"]
    wrong["transformer.h.9.mlp.c_fc.weight"] = {"momentum": torch.zeros(4, 4)}
    wrong["transformer.wte.weight"]["exp_avg"] = torch.zeros(V + 1, E)
    wrong["transformer.h.0.attn.c_q.weight"] = {"exp_avg": torch.zeros(E, E)}
    wrong["transformer.h.1.attn.conv1d.weight"]["step"] = torch.tensor(7)
    with pytest.raises(UserError) as told:
        optimizer.load_state_dict(wrong)
    for part in ("lm_head.weight is missing", "transformer.h.9.mlp.c_fc.weight is not in this model",
                 "transformer.wte.weight exp_avg has shape (12, 8) instead of (11, 8)",
                 "transformer.h.0.attn.c_q.weight has exp_avg instead of momentum", "different steps: 1, 7"):
        assert part in str(told.value)
    same_state(optimizer.state_dict(), state)


def test_a_warm_start_takes_what_fits_and_counts_the_steps_that_made_it():
    one, other = tiny(), tiny()
    first = MuonAdamW(parameter_groups(one), ALONE)
    train(one, first, ALONE, range(3))
    other.load_state_dict(one.state_dict())
    whole, second = first.state_dict(), MuonAdamW(parameter_groups(other), ALONE)
    assert second.warm_start(whole) == [] and second.steps == 3
    same_state(second.state_dict(), whole)
    for model, optimizer in ((one, first), (other, second)):
        train(model, optimizer, ALONE, range(3, 5))
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters()))  # it is the same run

    q, head = "transformer.h.0.attn.c_q.weight", "lm_head.weight"
    part = {name: dict(state) for name, state in whole.items() if name != q} | {"of another model": whole[q]}
    third = MuonAdamW(parameter_groups(tiny()), ALONE)
    assert third.warm_start(part) == [q] and third.steps == 3
    state = third.state_dict()
    assert not state[q]["momentum"].any() and torch.equal(state[head]["exp_avg"], whole[head]["exp_avg"])

    part[head]["exp_avg"] = torch.zeros(V + 1, E)  # without one moment all of AdamW is cold, since it counts once
    cold = third.warm_start(part)
    adamw = {name for name, state in whole.items() if "step" in state}
    assert set(cold) == adamw | {q} and third.steps == 0
    state = third.state_dict()
    assert not any(state[name][key].any() for name in adamw for key in ("exp_avg", "exp_avg_sq"))
    assert torch.equal(state["transformer.h.1.attn.c_q.weight"]["momentum"],
                       whole["transformer.h.1.attn.c_q.weight"]["momentum"])

    extras = override(modern.groups, matrix_lr=0.02, embedding_lr=0.2, unembedding_lr=0.004, muon_extras="normuon")
    fourth = MuonAdamW(parameter_groups(tiny(), extras), ALONE)  # has a second moment, which the others had not
    assert set(fourth.warm_start(whole)) == set(whole) - adamw and fourth.steps == 3
    assert torch.equal(fourth.state_dict()[q]["momentum"], whole[q]["momentum"])


EXACT = {"rtol": 0, "atol": 0}


def same_weights(got: dict, expected: dict, **tolerance: float) -> None:
    assert got.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], **tolerance)


def same_state(got: dict, expected: dict, **tolerance: float) -> None:
    assert got.keys() == expected.keys()
    for name in expected:
        assert got[name].keys() == expected[name].keys(), name
        for key in expected[name]:
            torch.testing.assert_close(got[name][key], expected[name][key], **(tolerance or EXACT))


# --- ranks

# Where an update is 0 up to rounding, ranks may decay a weight that one process does not: by rate x weight decay x
# weight, which this decay keeps below the tolerance CLOSE.
RECIPES = {"published": published.groups,
           "extras": {**published.groups, "matrices": replace(published.groups["matrices"], weight_decay=0.005,
                                                              extras=MUON_EXTRAS)}}


def small_buckets(model: Tiny, ranks: Ranks, groups: dict[str, OptimizerGroup]) -> MuonAdamW:
    """The optimizer, with several buckets of matrices on 2 ranks and all in one on 3."""
    return MuonAdamW(parameter_groups(model, groups), ranks,
                     bucket_elements=600 if ranks.world_size == 2 else 25_000_000)


def held_by(optimizer: MuonAdamW) -> list[torch.Tensor]:
    return [part for bucket in optimizer.buckets for part in bucket.state.values()]


def scenario(ranks: Ranks, folder: str) -> None:
    """What each rank r of n does, with each of the groups; results go to folder/n-r.pt. n = 3 also loads what n = 2
    saved, n = 1 both."""
    told = {name: life(ranks, folder, name) for name in RECIPES}
    torch.save(told, f"{folder}/{ranks.world_size}-{ranks.rank}.pt")


def life(ranks: Ranks, folder: str, name: str) -> dict:
    told: dict = {}
    model, groups = tiny(), RECIPES[name]
    optimizer = small_buckets(model, ranks, groups)
    backward(model, ranks)
    told["without gradient"] = [name for name, p in model.named_parameters() if p.grad is None]
    told["norms"] = train(model, optimizer, ranks, range(1))
    told["state after one"] = optimizer.state_dict()
    told["norms"] += train(model, optimizer, ranks, range(1, 4))
    told["weights"], told["state"] = weights(model), optimizer.state_dict()
    told["numbers held"] = sum(part.numel() for part in held_by(optimizer))
    train(model, optimizer, ranks, range(4, 6))
    told["went on"] = weights(model)

    for world_size in range(1, 4):
        if world_size != ranks.world_size and os.path.exists(f"{folder}/{world_size}-0.pt"):
            saved = torch.load(f"{folder}/{world_size}-0.pt")[name]
            told[f"from {world_size}"] = resume(saved["weights"], saved["state"], ranks, groups)
    state = [told["state"]]
    if ranks.world_size > 1:
        torch.distributed.broadcast_object_list(state, src=0)
    told[f"from {ranks.world_size}"] = resume(told["weights"], state[0], ranks, groups)

    before, held = weights(model), [part.clone() for part in held_by(optimizer)]
    if ranks.rank == ranks.world_size - 1:
        model.lm_head.weight.grad[0, 0] = float("nan")
    told["nan"] = optimizer.step(clip=1.0).item()
    told["kept"] = (all(torch.equal(p, before[name]) for name, p in model.named_parameters())
                    and all(map(torch.equal, held_by(optimizer), held)))
    return told


def resume(saved_weights: dict, state: dict, ranks: Ranks, groups: dict[str, OptimizerGroup]
           ) -> tuple[dict | None, dict]:
    """The state as it comes out again right after loading, and the weights after two more steps."""
    model = tiny(seed=1)
    model.load_state_dict(saved_weights)
    optimizer = small_buckets(model, ranks, groups)
    optimizer.load_state_dict(state)
    again = optimizer.state_dict()
    train(model, optimizer, ranks, range(4, 6))
    return again, weights(model)


@pytest.fixture(scope="module")
def all_worlds(tmp_path_factory) -> dict[int, list[dict]]:
    """What each rank of 1, 2 and 3 told, under real processes."""
    return told_by_ranks(scenario, str(tmp_path_factory.mktemp("worlds")), ALONE, 2, 3)


@pytest.fixture(params=RECIPES)
def worlds(all_worlds, request) -> dict[int, list[dict]]:
    """The same with one of the groups."""
    return {n: [rank[request.param] for rank in ranks] for n, ranks in all_worlds.items()}


# Ranks sum gradients in another order than one process: differences of 1e-7 relative at first. Newton-Schulz raises
# them up to 3.44^5 = 484-fold where a matrix is nearly singular, and they feed back through the weights over the steps.
# Measured: 7e-6.
CLOSE = {"rtol": 5e-5, "atol": 5e-5}


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_train_the_same_weights_as_one_process(worlds, world_size):
    alone = worlds[1][0]
    assert not alone["without gradient"]
    assert len(worlds[world_size][-1]["without gradient"]) == 4  # the last block, on every rank but the first
    for rank in worlds[world_size]:
        assert rank["norms"] == pytest.approx(alone["norms"], rel=1e-5)
        assert min(rank["norms"]) > 0.5  # so clipping was active
        for key in ("weights", "went on"):
            same_weights(rank[key], alone[key], **CLOSE)
            same_weights(rank[key], worlds[world_size][0][key], **EXACT)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_clipping_is_by_the_norm_of_the_gradient_over_all_ranks(worlds, world_size):
    model = tiny()
    per_rank = []  # what clipping on each rank, before averaging, would do
    for rank in range(world_size):
        backward(model, Ranks(rank, rank, world_size, torch.device("cpu")))
        per_rank.append({name: p.grad.clone() / (ROWS * T) for name, p in model.named_parameters()
                         if p.grad is not None})
        model.zero_grad()
    total = {name: sum(g[name] for g in per_rank if name in g) for name in per_rank[0]}
    norm = torch.stack([g.norm() for g in total.values()]).norm()
    name = "transformer.h.1.mlp.c_fc.weight"
    got = worlds[world_size][0]
    assert got["norms"][0] == pytest.approx(norm.item(), rel=1e-5)
    expected = 0.15 * total[name] * 0.5 / (norm + 1e-6)  # momentum 0.85, clip 0.5
    torch.testing.assert_close(got["state after one"][name]["momentum"], expected, rtol=1e-4, atol=1e-7)
    if world_size > 1:
        norms = [torch.stack([g.norm() for g in gradient.values()]).norm() for gradient in per_rank]
        clipped_apart = 0.15 * sum(g[name] * (0.5 / n).clamp(max=1) for g, n in zip(per_rank, norms)) / world_size
        assert (clipped_apart - expected).norm() > 0.05 * expected.norm()


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_state_is_gathered_whole_and_held_in_parts(worlds, world_size):
    same_state(worlds[world_size][0]["state"], worlds[1][0]["state"], rtol=1e-3, atol=1e-5)
    assert all(rank["state"] is None for rank in worlds[world_size][1:])
    held = [rank["numbers held"] for rank in worlds[world_size]]
    assert sum(held) == worlds[1][0]["numbers held"]
    assert all(part < 0.6 * sum(held) for part in held[1:])


@pytest.mark.parametrize("saved_with, loaded_with", [(1, 1), (2, 2), (3, 3), (2, 3), (2, 1), (3, 1)])
def test_training_goes_on_from_a_state_saved_with_any_number_of_ranks(worlds, saved_with, loaded_with):
    told = worlds[loaded_with][0]
    again, went_on = told[f"from {saved_with}"]
    same_state(again, worlds[saved_with][0]["state"])
    same_weights(went_on, worlds[saved_with][0]["went on"],
                 **(EXACT if saved_with == loaded_with else CLOSE))  # with as many ranks, as if it had never stopped


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_gradient_that_is_not_finite_on_one_rank_stops_all(worlds, world_size):
    for rank in worlds[world_size]:
        assert rank["nan"] != rank["nan"] and rank["kept"]


@pytest.mark.gpu
def test_a_step_on_the_gpu_is_the_step_on_the_cpu_and_waits_for_nothing(monkeypatch):
    monkeypatch.setenv("NANOCHAT_DTYPE", "float32")
    gpu = Ranks(0, 0, 1, torch.device("cuda", 0))
    here, there = tiny(), tiny().to(gpu.device)
    optimizers = MuonAdamW(parameter_groups(here), ALONE), MuonAdamW(parameter_groups(there), gpu)
    for _ in range(3):
        optimizers[0].zero_grad()
        backward(here, ALONE)
        for p, q in zip(here.parameters(), there.parameters()):
            q.grad = p.grad.to(gpu.device)
        norm = optimizers[0].step(clip=0.5)
        torch.cuda.set_sync_debug_mode("error")
        try:
            other = optimizers[1].step(clip=0.5)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        torch.testing.assert_close(other.cpu(), norm)
    same_weights({name: p.cpu() for name, p in weights(there).items()}, weights(here), **CLOSE)
