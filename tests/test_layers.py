"""nanochat/layers.py: one product of several matrices, and its gradients."""

import pytest
import torch

from nanochat.layers import Linear, project, together


def layers_of(*sizes, fan_in=24):
    return [Linear(fan_in, size) for size in sizes]


def products(h, layers):
    return [h @ layer.weight.to(h.dtype).T for layer in layers]


@pytest.mark.parametrize("sizes", [(24, 24, 8, 3), (16, 16), (5,), (7, 1, 24)])
def test_one_product_gives_what_each_matrix_gives(sizes):
    layers, h = layers_of(*sizes), torch.randn(3, 5, 24)
    z = together(h, *layers)
    assert z.shape == (3, 5, -(-sum(sizes) // 16) * 16) and not z[..., sum(sizes):].any()
    for got, expected in zip(project(h, *layers), products(h, layers), strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_matrix_gets_its_own_gradient(dtype):
    layers, h = layers_of(24, 24, 8, 3), torch.randn(3, 5, 24, dtype=dtype, requires_grad=True)
    upstream = [torch.randn(3, 5, layer.out_features, dtype=dtype) for layer in layers]
    torch.autograd.backward(project(h, *layers), upstream)
    exact_h = h.detach().double()
    exact = sum(up.double() @ layer.weight.detach().to(dtype).double() for up, layer in zip(upstream, layers))
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 2 ** -7, "atol": 0.05}
    torch.testing.assert_close(h.grad.double(), exact, **tolerance)
    for up, layer in zip(upstream, layers):
        assert layer.weight.grad.dtype == torch.float32 and layer.weight.grad.is_contiguous()
        expected = torch.einsum("btn,bte->ne", up.double(), exact_h)
        torch.testing.assert_close(layer.weight.grad.double(), expected, **tolerance)


def test_a_matrix_whose_output_is_not_used_gets_a_zero_gradient():
    layers, h = layers_of(8, 4), torch.randn(2, 3, 24)
    project(h, *layers)[0].sum().backward()
    assert layers[0].weight.grad.any() and not layers[1].weight.grad.any()
