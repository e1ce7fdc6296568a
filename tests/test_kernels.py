"""Fused operations against their twins, and the twins' gradients against float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.kernels import cross_entropy
from nanochat.kernels.cross_entropy import head_loss, head_loss_twin
from nanochat.kernels.relu2 import relu_squared, relu_squared_twin
from nanochat.kernels.slc2 import slc2_core_twin, slc2_mix


@settings(max_examples=30, deadline=None)
@given(B=st.integers(1, 3), T=st.integers(1, 9), H=st.integers(1, 3), D=st.integers(1, 5), K=st.integers(1, 4), seed=st.integers(0, 99))
def test_slc2_mix_and_its_backward_are_those_of_the_twin(B, T, H, D, K, seed):
    torch.manual_seed(seed)
    E = H * D
    inputs = [torch.randn(*shape, dtype=torch.float64, requires_grad=True)
              for shape in ((B, T, E), (B, T, E), (B, T, D), (B, T, H), (E, K))]
    dy = torch.randn(B, T, E, dtype=torch.float64)
    twin = slc2_core_twin(*inputs)
    mixed = slc2_mix(torch.cat(inputs[:4], dim=-1), inputs[4], n_head=H, head_width=D)
    torch.testing.assert_close(mixed, twin, rtol=1e-12, atol=1e-12)
    for got, wanted in zip(torch.autograd.grad(mixed, inputs, dy), torch.autograd.grad(twin, inputs, dy)):
        # the taps' gradient is summed in float32
        torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-5 if wanted.shape == (E, K) else 1e-9)


def test_relu_squared_is_its_twin_forward_and_backward():
    x = torch.randn(7, 5, requires_grad=True)
    dy = torch.randn(7, 5)
    assert torch.equal(relu_squared(x), relu_squared_twin(x))
    (got,), (wanted,) = torch.autograd.grad(relu_squared(x), x, dy), torch.autograd.grad(relu_squared_twin(x), x, dy)
    torch.testing.assert_close(got, wanted)


def test_slc2_core_is_the_formula_written_out():
    torch.manual_seed(0)
    T, H, D, K = 6, 2, 3, 3
    E = H * D
    x, B, A, alpha, taps = torch.randn(1, T, E), torch.randn(1, T, E), torch.randn(1, T, D), torch.randn(1, T, H), torch.randn(E, K)
    silu = torch.nn.functional.silu
    wanted = torch.zeros(T, E)
    for t in range(T):
        for h in range(H):
            for d in range(D):
                e, c = h * D + d, 0.0
                for j in range(K):
                    s = t - (K - 1) + j
                    if s >= 0:
                        c += taps[e, j] * silu(silu(alpha[0, s, h]) * A[0, s, d]) * x[0, s, e]
                wanted[t, e] = B[0, t, e] * silu(c)
    torch.testing.assert_close(slc2_core_twin(x, B, A, alpha, taps)[0], wanted)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("chunk", [1, 40, 1 << 26])
def test_head_loss_equals_twin_for_any_chunk(monkeypatch, reduction, chunk):
    monkeypatch.setattr(cross_entropy, "CHUNK_ELEMENTS", chunk)
    torch.manual_seed(0)
    x, weight = torch.randn(11, 7, requires_grad=True), (10 * torch.randn(13, 7)).requires_grad_()
    targets = torch.randint(-1, 13, (11,))
    fused, twin = head_loss(x, weight, targets, reduction), head_loss_twin(x, weight, targets, reduction)
    torch.testing.assert_close(fused, twin)
    upstream = torch.randn_like(twin)
    for got, wanted in zip(torch.autograd.grad(fused, (x, weight), upstream), torch.autograd.grad(twin, (x, weight), upstream)):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(head_loss(x, weight, targets, reduction), twin)


def test_head_loss_without_a_target_that_counts_is_zero_in_sum_and_gives_zero_gradient():
    x, weight = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    head_loss(x, weight, torch.full((3,), -1), "sum").backward()
    assert x.grad.abs().sum() == 0 and weight.grad.abs().sum() == 0


def test_head_loss_in_bfloat16_keeps_a_float32_weight_gradient():
    torch.manual_seed(0)
    x32, weight = torch.randn(64, 16), torch.randn(50, 16)
    targets = torch.randint(50, (64,))
    exact = weight.clone().requires_grad_()
    head_loss_twin(x32, exact, targets, "sum").backward()
    got = weight.clone().requires_grad_()
    head_loss(x32.bfloat16(), got, targets, "sum").backward()
    assert got.grad.dtype == torch.float32
    assert (got.grad - exact.grad).norm() < 0.02 * exact.grad.norm()


@pytest.mark.parametrize("chunk", [1, 40, 1 << 26])
def test_factors_weigh_each_tokens_loss_and_gradient(monkeypatch, chunk):
    monkeypatch.setattr(cross_entropy, "CHUNK_ELEMENTS", chunk)
    torch.manual_seed(0)
    x, weight = torch.randn(11, 8, requires_grad=True), torch.randn(13, 8, requires_grad=True)
    targets, factors = torch.randint(-1, 13, (11,)), torch.randn(11)
    got, wanted = (loss(x, weight, targets, "sum", factors) for loss in (head_loss, head_loss_twin))
    torch.testing.assert_close(got, wanted)
    for a, b in zip(torch.autograd.grad(got, (x, weight)), torch.autograd.grad(wanted, (x, weight))):
        torch.testing.assert_close(a, b)
    with torch.no_grad():
        torch.testing.assert_close(head_loss(x, weight, targets, "sum", factors), wanted)
    with pytest.raises(ValueError, match="factors go with"):
        head_loss(x, weight, targets, "mean", factors)
