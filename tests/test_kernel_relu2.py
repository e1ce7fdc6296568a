"""relu² against its twin in plain PyTorch. tests/test_kernels_cpu.py has the CPU kernel."""

import torch

from nanochat.kernels.relu2 import relu_squared, relu_squared_twin


def test_relu_squared_is_its_twin_forward_and_backward():
    x = torch.randn(7, 5, requires_grad=True)
    dy = torch.randn(7, 5)
    assert torch.equal(relu_squared(x), relu_squared_twin(x))
    (got,), (wanted,) = torch.autograd.grad(relu_squared(x), x, dy), torch.autograd.grad(relu_squared_twin(x), x, dy)
    torch.testing.assert_close(got, wanted)
