"""Rotary positions with RMS norm: by Triton (in its interpreter) and by plain PyTorch, against the twin in float64.

tests/test_kernels_cpu.py has the CPU kernel and the operation on CPUs.
"""

import pytest
import torch

from nanochat.kernels import rope_norm as operation
from nanochat.kernels.rope_norm import rope_norm_twin
from tests.helpers import forms_of

kernel = forms_of(operation)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("B, T, H, D, by_row", [(1, 1, 1, 2, False), (2, 3, 5, 16, True), (1, 4, 10, 128, False),
                                                (2, 2, 3, 6, True)])
def test_result_and_gradient_are_the_twins(kernel, B, T, H, D, by_row, dtype):
    torch.manual_seed(B + T + H + D)
    x = torch.randn(B, T, 2 * H + 1, D).to(dtype)[:, :, 1:H + 1]  # some columns of a joined projection
    angles = torch.randn(B, T, D // 2) if by_row else torch.randn(T, D // 2)
    rope = angles.cos(), angles.sin()
    dy = torch.randn(B, H, T, D).to(dtype).transpose(1, 2)
    y, r = kernel("forward", x, *rope)
    exact = x.double().requires_grad_()
    wanted = rope_norm_twin(exact, tuple(table.double() for table in rope))
    # the interpreter truncates to bfloat16 where hardware rounds
    close = {"rtol": 4e-6, "atol": 4e-6} if dtype == torch.float32 else {"rtol": 2 ** -7, "atol": 2 ** -7}
    torch.testing.assert_close(y.double(), wanted, **close)
    assert y.dtype == dtype and r.dtype == torch.float32 and r.shape == (B, T, H, 1)
    gradient, = torch.autograd.grad(wanted, exact, dy.double())
    size = float(gradient.abs().max())
    got = kernel("backward", dy, y, r, *rope)
    torch.testing.assert_close(got.double(), gradient, rtol=close["rtol"], atol=2 * close["atol"] * size)


@pytest.mark.parametrize("path", [lambda x, rope: operation._RopeNorm.apply(x, *rope), operation._triton],
                         ids=["function", "operator"])
def test_autograd_gives_the_twins_gradient_and_keeps_the_result_in_its_own_dtype(path):
    x = torch.randn(2, 3, 4, 16).bfloat16().requires_grad_()
    angles, dy, kept = torch.randn(3, 8), torch.randn(2, 3, 4, 16).bfloat16(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        y = path(x, (angles.cos(), angles.sin()))
    assert [tuple(t.shape) for t in kept if t.dtype == torch.float32] == [(2, 3, 4, 1), (3, 8), (3, 8)]
    assert [t.data_ptr() for t in kept if t.dtype == torch.bfloat16] == [y.data_ptr()]
    wanted, = torch.autograd.grad(rope_norm_twin(x, (angles.cos(), angles.sin())), x, dy)
    torch.testing.assert_close(torch.autograd.grad(y, x, dy)[0], wanted, rtol=2 ** -6, atol=2 ** -6)
