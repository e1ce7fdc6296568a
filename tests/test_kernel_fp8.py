"""Products in 8 bits: the emulation against its definition, against float32, and what is refused."""

import pytest
import torch
import torch.nn.functional as F

from nanochat.distributed import Ranks
from nanochat.errors import UserError
from nanochat.gpt import GPT, GPTConfig
from nanochat.kernels import fp8
from nanochat.kernels.cross_entropy import head_loss
from nanochat.kernels.fp8 import ACTIVATION, EMULATED, GRADIENT, REAL, fp8_head_loss, fp8_mlp, fp8_mlp_twin
from nanochat.kernels.mlp import mlp_twin
from scripts import base_train


@pytest.mark.parametrize("dtype", [ACTIVATION, GRADIENT])
@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
def test_rounding_to_8_bits_uses_the_whole_range_and_errs_by_half_a_step(dtype, size):
    torch.manual_seed(0)
    t = torch.randn(1000) * size
    scale = fp8.scale_of(t, dtype)
    back = fp8.rounded(t, scale, dtype).float() / scale
    step = torch.finfo(dtype).eps
    normal = t.abs() * scale > torch.finfo(dtype).tiny
    assert ((back - t).abs() <= t.abs() * step / 2 * 1.001)[normal].all() and back.isfinite().all()
    assert float((back * scale).abs().max()) == torch.finfo(dtype).max
    assert (fp8.rounded(torch.zeros(4), fp8.scale_of(torch.zeros(4), dtype), dtype).float() == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("N", [16, 48])
def test_the_mlp_is_its_definition(N, dtype):
    torch.manual_seed(N)
    x, w1, w2 = torch.randn(N, 32), torch.randn(128, 32) / 6, torch.randn(32, 128) / 12
    x, dy = x.to(dtype).requires_grad_(), torch.randn(N, 32).to(dtype)
    w1, w2 = w1.requires_grad_(), w2.requires_grad_()
    y = fp8_mlp(x, w1, w2, EMULATED)
    got = y, *torch.autograd.grad(y, (x, w1, w2), dy)
    # float32 sums may round a number to the other side of a step in 8 bits; few do, by 1/8 or 1/4 of their size
    for mine, exact in zip(got, fp8_mlp_twin(x.detach(), w1.detach(), w2.detach(), dy)):
        assert float((mine.detach().double() - exact).norm() / exact.norm()) < 0.01
    assert [t.dtype for t in got] == [dtype, dtype, torch.float32, torch.float32]
    # and 8 bits are near the exact result, as near as 3 bits of mantissa forward and 2 backward allow
    wide = [t.detach().double().requires_grad_() for t in (x, w1, w2)]
    plain = mlp_twin(*wide)
    for mine, exact in zip([t.detach() for t in got], (plain.detach(), *torch.autograd.grad(plain, wide, dy.double()))):
        assert 0.002 < float((mine.double() - exact).norm() / exact.norm()) < 0.15


@pytest.mark.parametrize("factored", [True, False])
def test_the_head_is_near_the_exact_one_whatever_the_groups(factored, monkeypatch):
    torch.manual_seed(3)
    N, E, V = 96, 32, 48
    x, weight = torch.randn(N, E, requires_grad=True), torch.randn(V, E, requires_grad=True)
    targets, factors = torch.randint(-1, V, (N,)), torch.rand(N) * 1e-3 if factored else None
    results = [head_loss(x, weight, targets, "sum", factors)]
    results.append(fp8_head_loss(x, weight, targets, "sum", factors, EMULATED))
    monkeypatch.setattr(fp8, "HEAD_TOKENS", 16)
    monkeypatch.setattr(fp8, "HEAD_BYTES", 40 * V)  # 32 tokens
    results.append(fp8_head_loss(x, weight, targets, "sum", factors, EMULATED))
    (exact, *exact_gradients), *got = [(loss, *torch.autograd.grad(loss, (x, weight))) for loss in results]
    for loss, *gradients in got:
        torch.testing.assert_close(loss, exact, rtol=0.02, atol=0)
        for mine, wanted in zip(gradients, exact_gradients):
            assert 0.002 < float((mine - wanted).norm() / wanted.norm()) < 0.15
    for one, several in zip(*got):
        torch.testing.assert_close(one, several, rtol=1e-4, atol=1e-6)
    mean = fp8_head_loss(x, weight, targets, "mean", None, EMULATED)
    torch.testing.assert_close(mean, head_loss(x, weight, targets), rtol=0.02, atol=0)


def test_sizes_that_8_bit_products_do_not_take_go_the_ordinary_way():
    assert fp8.fits(torch.empty(2, 8, 32), torch.empty(64, 32))
    for x, w in (((2, 9, 32), (64, 32)), ((2, 8, 40), (64, 40)), ((2, 8, 32), (65, 32)), ((0, 32), (64, 32))):
        assert not fp8.fits(torch.empty(x), torch.empty(w))


def test_a_model_trains_in_8_bits_and_evaluates_without():
    torch.manual_seed(0)
    model, ids = GPT(GPTConfig.from_depth(2, vocab_size=64, sequence_len=16)), torch.randint(64, (2, 16))
    for p in model.parameters():
        if p.ndim == 2 and p.abs().max() == 0:
            p.data.normal_(std=0.05)
    plain = model(ids, ids)
    model.train_in_fp8(EMULATED)
    loss = model(ids, ids)
    loss.backward()
    assert loss != plain and abs(float((loss - plain).detach())) < 0.05
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.dtype == p.dtype for p in model.parameters())
    with torch.no_grad():
        assert model(ids, ids) == plain
        assert torch.equal(model(ids), F.linear(model.hidden(ids), model.lm_head.weight).div(15).tanh().mul(15))


def test_a_device_without_8_bit_products_is_refused_with_the_way_out(monkeypatch):
    model = GPT(GPTConfig.from_depth(2, vocab_size=64))
    with pytest.raises(UserError, match="--fp8 needs an NVIDIA GPU .* this run is on cpu. Leave out --fp8"):
        model.train_in_fp8(REAL)
    assert model.fp8 is None
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    with pytest.raises(UserError, match="NVIDIA A100 has 8.0"):
        fp8.check_fp8(REAL, torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    fp8.check_fp8(REAL, torch.device("cuda"))
    fp8.check_fp8(EMULATED, torch.device("cpu"))


def test_base_train_refuses_before_it_reads_anything():
    with pytest.raises(UserError, match="--fp8-emulated rounds in the same way"):
        base_train.run(base_train.Config(fp8=True), Ranks(0, 0, 1, torch.device("cpu")))
