"""relu² and its gradient by Triton (in its interpreter), by plain PyTorch and as a whole, against the twin.

tests/test_kernels_cpu.py has the CPU kernel.
"""

import importlib

import pytest
import torch

from nanochat.kernels import relu2
from nanochat.kernels.relu2 import backward_of_result, relu_squared, relu_squared_twin


def _call(name, *args):
    return getattr(importlib.import_module("nanochat.kernels.relu2.triton"), name)(*args)


def test_relu_squared_is_its_twin_forward_and_backward():
    x = torch.randn(7, 5, requires_grad=True)
    dy = torch.randn(7, 5)
    assert torch.equal(relu_squared(x), relu_squared_twin(x))
    (got,), (wanted,) = torch.autograd.grad(relu_squared(x), x, dy), torch.autograd.grad(relu_squared_twin(x), x, dy)
    torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("path", [relu2._ReluSquared.apply, relu2._triton], ids=["function", "operator"])
def test_the_gradient_from_the_result_is_exact_in_float32(path):
    x = torch.randn(50, 40, requires_grad=True)
    dy, kept = torch.randn(50, 40), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        y = path(x)
    assert len(kept) == 1 and kept[0].data_ptr() == y.data_ptr()  # the result alone, which its reader keeps anyway
    wanted, = torch.autograd.grad(relu_squared_twin(x), x, dy)
    assert torch.equal(torch.autograd.grad(y, x, dy)[0], wanted)


def test_the_gradient_from_the_result_is_within_bfloat16s_rounding():
    x, dy = (torch.randn(4096).bfloat16() for _ in range(2))
    exact = 2 * dy.double() * x.double().relu()
    got = backward_of_result(dy, relu_squared_twin(x)).double()
    assert ((got - exact).abs() <= exact.abs() * (2 ** -9 + 2 ** -8) * 1.01).all()  # root of a rounded square; result


@pytest.mark.parametrize("shape", [(1,), (3, 4096), (5, 1031), (0, 7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_triton_gives_the_twins_numbers(interpreter, shape, dtype):
    x, dy = (torch.randn(shape).to(dtype) for _ in range(2))
    if x.numel() > 1:
        x.view(-1)[1] = float("nan")
    y = interpreter.submit(_call, "forward", x).result()
    # bfloat16: the interpreter truncates where hardware rounds
    close = {"rtol": 0, "atol": 0} if dtype == torch.float32 else {"rtol": 2 ** -7, "atol": 0}
    torch.testing.assert_close(y, relu_squared_twin(x), equal_nan=True, **close)
    dx = interpreter.submit(_call, "backward", dy.t() if len(shape) > 1 else dy, y.t() if len(shape) > 1 else y)
    wanted = backward_of_result(dy, y)
    torch.testing.assert_close(dx.result(), wanted.t() if len(shape) > 1 else wanted, equal_nan=True, **close)
