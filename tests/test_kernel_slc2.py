"""nanochat.kernels.slc2 in plain PyTorch and with the CPU kernels: numbers, gradients, compilers and checkpointing.

tests/test_kernel_slc2_triton.py has the GPU kernels, tests/test_kernels_cpu.py the functions of slc2/cpu.py.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from nanochat.kernels import cpu
from nanochat.kernels.slc2 import (
    causal_conv,
    causal_conv_step,
    causal_conv_step_twin,
    causal_conv_twin,
    slc2_core_twin,
    slc2_mix,
    slc2_step,
    slc2_step_twin,
    split_columns,
)

H, D, PADDING = 3, 8, 5
E = H * D


@pytest.fixture(params=["plain", "native"], autouse=True)
def backend(request, monkeypatch):
    if request.param == "plain":
        monkeypatch.setattr(cpu, "ready", lambda *tensors: False)
    elif not cpu.ready(torch.ones(1)):
        pytest.skip("the CPU kernels are not built")


def inputs(T: int = 7, K: int = 3, *, past: bool, dtype: torch.dtype = torch.float32) -> list[torch.Tensor | None]:
    torch.manual_seed(T + K)
    shapes = (2, T, 2 * E + D + H + PADDING), (E, K), (2, K - 1, E)
    z, taps, before = (torch.randn(*shape, dtype=dtype, requires_grad=True) for shape in shapes)
    return [z, taps, before if past else None]


def gradients(y: torch.Tensor, args: list[torch.Tensor | None]) -> tuple[torch.Tensor, ...]:
    dy = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    return torch.autograd.grad(y, [t for t in args if t is not None], dy)


def twin(z: torch.Tensor, taps: torch.Tensor, past: torch.Tensor | None) -> torch.Tensor:
    return slc2_core_twin(*split_columns(z, H, D)[:4], taps, past)


def mix(z: torch.Tensor, taps: torch.Tensor, past: torch.Tensor | None) -> torch.Tensor:
    return torch.ops.nanochat.slc2_mix(z, taps, past, H, D)


@pytest.mark.parametrize("past", [False, True])
@pytest.mark.parametrize("T, K", [(1, 3), (2, 4), (7, 1), (9, 2), (9, 3)])
def test_it_and_its_gradients_are_the_twins_and_zero_in_the_padding(T, K, past):
    args = inputs(T, K, past=past)
    y, wanted = slc2_mix(*args, n_head=H, head_width=D), twin(*args)
    torch.testing.assert_close(y, wanted)
    ours = gradients(y, args)
    for got, like in zip(ours, gradients(wanted, args), strict=True):
        torch.testing.assert_close(got, like)
    assert (ours[0][..., -PADDING:] == 0).all()


def test_bfloat16_is_near_float64_with_taps_and_past_in_float32():
    z, taps, past = inputs(past=True)
    args = [z.detach().bfloat16().requires_grad_(), taps, past]
    exact = [t.detach().double().requires_grad_() for t in args]
    y, wanted = slc2_mix(*args, n_head=H, head_width=D), twin(*exact)
    assert y.dtype == torch.bfloat16
    for got, like, of in zip((y, *gradients(y, args)), (wanted, *gradients(wanted, exact)), (y, *args), strict=True):
        assert got.dtype == of.dtype and (got.double() - like).norm() < 0.01 * like.norm()


@pytest.mark.parametrize("past", [False, True])
def test_the_operator_is_well_made_and_compiles_whole(past):
    args = inputs(past=past)
    torch.library.opcheck(torch.ops.nanochat.slc2_mix, (*args, H, D))
    y = torch.compile(mix, fullgraph=True, backend="aot_eager")(*args)
    torch.testing.assert_close(y, mix(*args))
    for got, like in zip(gradients(y, args), gradients(twin(*args), args), strict=True):
        torch.testing.assert_close(got, like)
    compiled = torch.compile(lambda *t: slc2_mix(*t, n_head=H, head_width=D), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*args), y)


def test_it_can_be_checkpointed_and_keeps_only_its_inputs():
    args, kept = inputs(past=True), []
    y = checkpoint(mix, *args, use_reentrant=False)
    for got, like in zip(gradients(y, args), gradients(twin(*args), args), strict=True):
        torch.testing.assert_close(got, like)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        mix(*args)
    assert {t.data_ptr() for t in kept} == {t.data_ptr() for t in args}


def test_any_strides_are_taken():
    z, taps, past = inputs(past=True)
    args = [z.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_(), taps, past]
    y = slc2_mix(*args, n_head=H, head_width=D)
    torch.testing.assert_close(y, twin(z, taps, past))
    for got, like in zip(torch.autograd.grad(y.sum(), args), torch.autograd.grad(twin(*args).sum(), args),
                         strict=True):
        torch.testing.assert_close(got, like)


def test_no_tokens_give_no_rows():
    z, taps, _ = inputs(past=False)
    y = slc2_mix(z[:, :0], taps, n_head=H, head_width=D)
    assert y.shape == (2, 0, E)
    assert (torch.autograd.grad(y.sum(), taps)[0] == 0).all()


def test_a_projection_too_narrow_is_refused():
    with pytest.raises(ValueError, match="at least"):
        slc2_mix(torch.randn(2, 7, 2 * E), torch.randn(E, 3), n_head=H, head_width=D)


@pytest.mark.parametrize("past_dtype", [torch.float32, torch.bfloat16])
def test_a_step_is_its_twins_and_moves_the_past_on(past_dtype):
    z, taps, past = inputs(1, past=True)
    ours, its = past.detach().to(past_dtype, copy=True), past.detach().to(past_dtype, copy=True)
    with torch.no_grad():
        parts = split_columns(z, H, D)[:4]
        torch.testing.assert_close(slc2_step(*parts, taps, ours), slc2_step_twin(*parts, taps, its), rtol=1e-2,
                                   atol=1e-2)
    torch.testing.assert_close(ours, its)


@settings(max_examples=30, deadline=None)
@given(B=st.integers(1, 3), T=st.integers(1, 9), H=st.integers(1, 3), D=st.integers(1, 5), K=st.integers(1, 4),
       seed=st.integers(0, 99))
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


def test_slc2_core_is_the_formula_written_out():
    torch.manual_seed(0)
    T, H, D, K = 6, 2, 3, 3
    E = H * D
    shapes = (1, T, E), (1, T, E), (1, T, D), (1, T, H), (E, K)
    x, B, A, alpha, taps = (torch.randn(*shape) for shape in shapes)
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


@settings(max_examples=40, deadline=None)
@given(B=st.integers(1, 3), T=st.integers(1, 9), E=st.integers(1, 9), K=st.integers(1, 6),
       dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]), seed=st.integers(0, 99))
def test_the_causal_conv_and_its_gradients_are_its_twins(B, T, E, K, dtype, seed):
    """Up to the rounding of each tap's product: rows shorter than the taps, and columns of a wider tensor, included."""
    torch.manual_seed(seed)
    found = []
    for run in (causal_conv, causal_conv_twin):
        torch.manual_seed(seed)
        z, taps, weight = torch.randn(B, T, E + 3), torch.randn(E, K), torch.randn(B, T, E)
        z, taps = (t.to(dtype).requires_grad_() for t in (z, taps))
        c = run(z[..., 1:E + 1], taps)
        (c * weight.to(dtype)).sum().backward()
        found.append((c.detach(), z.grad, taps.grad))
    for ours, theirs in zip(*found):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=K * torch.finfo(dtype).eps * 8 * (B * T) ** 0.5)


@settings(max_examples=40, deadline=None)
@given(B=st.integers(1, 3), E=st.integers(1, 9), K=st.integers(1, 4),
       dtype=st.sampled_from([torch.float32, torch.bfloat16]),
       past_dtype=st.sampled_from([torch.float32, torch.bfloat16]), seed=st.integers(0, 99))
def test_the_causal_conv_step_is_its_twins_to_the_last_bit(B, E, K, dtype, past_dtype, seed):
    torch.manual_seed(seed)
    u, taps = torch.randn(B, 1, E).to(dtype), torch.randn(E, K).to(dtype)
    room = torch.randn(B + 1, K - 1, E).to(past_dtype)
    ours, theirs = room.clone(), room.clone()
    assert torch.equal(causal_conv_step(u, taps, ours[:B]), causal_conv_step_twin(u, taps, theirs[:B]))
    assert torch.equal(ours, theirs) and torch.equal(ours[B], room[B]), "another row's past was written"
