"""Int8 weights are close to the matrix, right for zeros, NaN and large numbers, and batch-invariant; joined
projections."""

import copy
from contextlib import contextmanager

import pytest
import torch

from bench.decode import Endless
from nanochat import loading
from nanochat.attention import Attention
from nanochat.engine import Batch, Engine, Row, invariant_rows, quantize
from nanochat.engine.quantize import (
    QuantLinear,
    cpu_has_exact_int8_product,
    int8_product,
    int8_product_twin,
    quantize_rows,
)
from nanochat.errors import UserError
from nanochat.kernels import cross_entropy
from nanochat.layers import Linear, join, project
from nanochat.loading import model_from_state, ready_to_decode
from nanochat.sampling import Settings
from tests.helpers import small_model

exact_cpu = pytest.mark.skipif(not cpu_has_exact_int8_product(),
                               reason="torch multiplies no int8 matrices exactly on this CPU")


def random_int8(*shape, seed=0):
    return torch.randint(-127, 128, shape, generator=torch.Generator().manual_seed(seed)).to(torch.int8)


def quantised(N, K, seed=0):
    """Return a QuantLinear of a random matrix (N, K), and the matrix."""
    torch.manual_seed(seed)
    linear = Linear(K, N)
    return QuantLinear.of(linear).eval(), linear


@contextmanager
def product_of_torch(monkeypatch, product):
    """Replace torch's product of int8 matrices, and clear the cached test of it before and after."""
    cpu_has_exact_int8_product.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(torch, "_int_mm", product)
        yield
    cpu_has_exact_int8_product.cache_clear()


@exact_cpu
@pytest.mark.parametrize("M, N, K", [(1, 768, 768), (1, 6, 768), (2, 97, 33), (7, 1, 1), (8, 64, 3072), (17, 33, 7),
                                     (64, 128, 40)])
def test_the_product_of_whole_numbers_is_exact(M, N, K):
    x, weight = random_int8(M, K), random_int8(N, K, seed=1)
    x[0], weight[0] = 127, -127  # the largest sum there is
    wanted = x.double() @ weight.double().T
    assert torch.equal(int8_product(x, weight).double(), wanted)
    torch.testing.assert_close(int8_product_twin(x, weight).double(), wanted, rtol=1e-6, atol=1)


def test_a_product_of_torch_that_is_wrong_or_missing_is_not_used(monkeypatch):
    def saturates(x, weight):
        return (x.int() @ weight.int()).clamp(max=2 ** 15)

    def missing(x, weight):
        raise NotImplementedError

    x, weight = random_int8(3, 64), random_int8(5, 64, seed=1)
    for product in (saturates, missing):
        with product_of_torch(monkeypatch, product):
            assert not cpu_has_exact_int8_product()
            assert torch.equal(int8_product(x, weight), int8_product_twin(x, weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_quantised_matrix_is_near_the_matrix(dtype):
    for N, K in ((64, 96), (6, 768), (33, 1)):
        quant, linear = quantised(N, K)
        assert quant.weight.dtype == torch.int8 and quant.weight.abs().amax(1).eq(127).all()
        step = quant.scale[:, None]
        assert ((quant.weight * step - linear.weight).abs() <= step * 0.5001).all()
        x = torch.randn(2, 3, K).to(dtype)
        y = quant(x)
        assert y.dtype == dtype and y.shape == (2, 3, N)
        assert (y - linear(x)).float().norm() < 0.02 * linear(x).float().norm()


def test_zeros_large_numbers_and_nan_come_out_as_they_should():
    quant, linear = quantised(5, 8)
    x = torch.randn(4, 8)
    x[0], x[1], x[2, 3] = 0, x[1] * 1e30, torch.nan
    y = quant(x)
    assert torch.equal(y[0], torch.zeros(5)) and y[2].isnan().all()
    torch.testing.assert_close(y[1] / 1e30, quant(x[1:2] / 1e30)[0])
    assert torch.equal(y[3], quant(x[3:])[0]), "a NaN in one row is seen in another"
    with torch.no_grad():
        linear.weight[2] = 0
    assert torch.equal(QuantLinear.of(linear)(x[3:])[0, 2], torch.tensor(0.0))
    assert quant(torch.zeros(0, 8)).shape == (0, 5)


@exact_cpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_does_not_depend_on_other_rows_to_the_last_bit(dtype):
    for N, K in ((64, 96), (97, 768), (768, 768)):
        quant, _ = quantised(N, K)
        rows = torch.randn(40, K).to(dtype)
        alone = torch.cat([quant(row[None]) for row in rows])
        for M in (2, 3, 7, 8, 16, 17, 32, 40):
            assert torch.equal(quant(rows[:M]), alone[:M]), M
            assert torch.equal(quant(rows[:M].flip(0)).flip(0), alone[:M]), M


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8"])
def test_rows_of_joined_matrices_are_the_same_in_any_multiple_of_the_rows_that_the_cpu_needs(kind):
    """A batch-invariant Batch depends on this, with the product that the projections are joined to."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if kind == "bfloat16" else torch.float32
    layers = [Linear(256, n).to(dtype) for n in (256, 128, 4)]
    if kind == "int8":
        layers = [QuantLinear.of(layer).eval() for layer in layers]
    join(layers)
    rows = torch.randn(64, 256).to(dtype)
    with torch.no_grad():
        least = invariant_rows(dtype)
        fewest = torch.cat([torch.cat(list(project(part, *layers)), dim=-1) for part in rows.split(least)])
        for M in range(least, 65, least):
            assert torch.equal(torch.cat(list(project(rows[:M], *layers)), dim=-1), fewest[:M]), M


@pytest.mark.parametrize("kind", [Linear, QuantLinear])
def test_joined_matrices_keep_names_and_numbers_and_follow_what_is_written(kind):
    torch.manual_seed(0)
    layers = [Linear(32, n) for n in (32, 16, 2)]
    if kind is QuantLinear:
        layers = [QuantLinear.of(layer).eval() for layer in layers]
    before, x = copy.deepcopy([layer.state_dict() for layer in layers]), torch.randn(3, 32)
    apart = [layer(x) for layer in layers]
    join(layers)

    def together():
        with torch.no_grad():
            return list(project(x, *layers))
    for layer, wanted in zip(layers, before):
        state = layer.state_dict()
        assert list(state) == list(wanted) and all(torch.equal(state[name], wanted[name]) for name in wanted)
        assert len(list(layer.modules())) == 1
    calls = []
    hook = layers[0].joined[0].register_forward_hook(lambda *args: calls.append(1))
    for got, wanted in zip(together(), apart):
        torch.testing.assert_close(got, wanted)
    assert calls == [1], "not one product"
    layers[1].load_state_dict({name: torch.zeros_like(tensor) for name, tensor in before[1].items()})
    assert not together()[1].any() and together()[0].any() and len(calls) == 3
    hook.remove()
    for layer in layers:  # moved in memory: each has its own product again
        for tensor in (*layer.parameters(), *layer.buffers()):
            tensor.data = tensor.data.clone()
    torch.testing.assert_close(together()[2], apart[2])
    assert len(calls) == 3


def test_a_gradient_reaches_each_joined_matrix():
    layers = [Linear(8, 4), Linear(8, 4)]
    join(layers)
    sum(y.sum() for y in project(torch.randn(3, 8), *layers)).backward()
    assert all(layer.weight.grad is not None for layer in layers)


# --- whole models

@pytest.fixture
def bfloat16(monkeypatch):
    monkeypatch.setattr(loading, "compute_dtype", lambda device, training: torch.bfloat16)


def test_a_quantised_model_has_int8_matrices_and_nearly_the_same_losses(monkeypatch):
    model = small_model(n_layer=4, n_embd=64)
    ids = torch.randint(97, (4, 32))
    targets = ids.roll(-1, 1)
    targets[:, -1] = -1
    with torch.no_grad():
        wanted, losses = model(ids, targets), model(ids, targets, loss_reduction="none")
    quant = ready_to_decode(copy.deepcopy(model), "int8")
    kinds = {name: tensor.dtype for name, tensor in quant.state_dict().items()}
    matrices = {name.removesuffix(".scale") for name in kinds if name.endswith(".scale")}
    assert all(kinds[f"{name}.weight"] == torch.int8 for name in matrices) and "lm_head" in matrices
    assert {name for name, dtype in kinds.items() if dtype != torch.int8 and not name.endswith(".scale")} == {
        name for name in model.state_dict() if "wte" in name or "conv1d" in name}
    assert quant.dtype == torch.float32 and quant(ids).dtype == torch.float32
    assert abs(quant(ids, targets) - wanted) < 0.02 * wanted
    got = quant(ids, targets, loss_reduction="none")
    assert got.shape == losses.shape and not got[31::32].any()
    torch.testing.assert_close(got.sum() / 124, quant(ids, targets))
    doubled = quant(ids, targets, loss_reduction="sum", factors=torch.full((4, 32), 2.0))
    torch.testing.assert_close(doubled, 2 * got.sum())
    monkeypatch.setattr(cross_entropy, "CHUNK_ELEMENTS", 97 * 5)
    torch.testing.assert_close(quant(ids, targets, loss_reduction="none"), got)


@pytest.mark.parametrize("way", ["none", "int8"])
def test_a_model_ready_to_decode_gives_the_same_through_a_cache(way):
    model = ready_to_decode(small_model(n_layer=5, n_kv_head=1), way)
    ids = torch.randint(97, (3, 12))
    cache = model.new_cache(3)
    parts = [model(part, cache=cache) for part in ids.split((5, 1, 1, 2, 1, 1, 1), dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), model(ids), rtol=1e-3, atol=1e-3)


def test_ready_to_decode_means_weights_in_the_dtype_they_are_used_in(bfloat16):
    plain, quant = (ready_to_decode(small_model(), way) for way in ("none", "int8"))
    assert {p.dtype for p in plain.parameters()} == {torch.bfloat16} and plain.dtype == quant.dtype == torch.bfloat16
    assert {name for name, p in quant.named_parameters() if p.dtype != torch.bfloat16} == set()
    assert all(t.dtype == torch.float32 for name, t in quant.state_dict().items() if name.endswith("scale"))
    assert quant(torch.tensor([[1, 2]])).dtype == torch.float32
    ids = torch.randint(97, (1, 6))
    model = small_model()
    model.compute_dtype = torch.bfloat16
    with torch.no_grad():
        torch.testing.assert_close(plain(ids), model(ids), rtol=0.05, atol=0.05)


@exact_cpu
@pytest.mark.parametrize("way", ["none", "int8"])
def test_a_batch_invariant_batch_gives_each_row_what_it_gets_alone_to_the_last_bit(bfloat16, way):
    engine = Engine(ready_to_decode(small_model(n_layer=5, n_embd=64, sequence_len=64), way), Endless())

    def scores(prompts):
        batch = Batch(engine, batch_invariant=True)
        rows = [Row(prompt, 9, Settings(seed=3), logprobs=3) for prompt in prompts]
        for row in rows:
            batch.add_prompts([row])
        while batch.rows:
            batch.step()
        return [(row.tokens, row.scores) for row in rows]
    prompts = [[5, 6, 7], [1], [9, 8, 7, 6, 5, 4, 3, 2, 1], [40] * 20, *([i] for i in range(20, 27))]
    assert scores(prompts) == [scores([prompt])[0] for prompt in prompts]


def test_a_quantised_model_cannot_be_trained():
    model = ready_to_decode(small_model(), "int8")
    with pytest.raises(UserError, match="cannot be trained"):
        model.train()
    assert not any(p.requires_grad for p in model.parameters())
    with pytest.raises(RuntimeError, match="does not require grad"):
        model(torch.tensor([[1, 2]]), torch.tensor([[2, 3]])).backward()


def test_quantised_weights_are_no_checkpoint_of_a_plain_model():
    model = small_model()
    with pytest.raises(UserError, match="not expected: .*scale"):
        model_from_state(model.config.to_dict(), ready_to_decode(copy.deepcopy(model), "int8").state_dict())


def test_an_unknown_way_is_refused_in_words():
    with pytest.raises(UserError, match="'int3': it is one of none, int8"):
        quantize.quantize(small_model(), "int3")


def test_all_projections_of_one_input_are_joined():
    model = ready_to_decode(small_model(n_layer=5))
    for block in model.transformer.h:
        parts = block.attn.projections()
        whole, = parts[0].joined
        rows = sum(part.weight.shape[0] for part in parts)
        assert len(parts) == (3 if isinstance(block.attn, Attention) else 4)
        assert rows <= whole.weight.shape[0] < rows + 16 and whole.weight.shape[0] % 16 == 0
        assert not whole.weight[rows:].any()


def test_rounding_is_to_the_nearest_of_255_steps():
    x, scale = quantize_rows(torch.tensor([[-2.54, 1.27, 0.011, 0.009, 0.0]]))
    assert x.tolist() == [[-127, 64, 1, 0, 0]] and scale.tolist() == [[pytest.approx(0.02)]]
