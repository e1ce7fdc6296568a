"""Residual sum with RMS norm: by Triton (in its interpreter) and by plain PyTorch, against the twin in float64.

And what a block keeps for backward.
"""

import pytest
import torch

from nanochat.gpt import GPT, GPTConfig
from nanochat.kernels import add_norm as operation
from nanochat.kernels.add_norm import add_norm, add_norm_twin
from nanochat.positions import Positions
from tests.helpers import forms_of

kernel = forms_of(operation)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1, 64), (2, 3, 129), (5, 1280), (3, 1)])
def test_sum_norm_and_gradient_are_the_twins(kernel, shape, dtype):
    torch.manual_seed(sum(shape))
    x, y, ds, dh = (torch.randn(shape).to(dtype) for _ in range(4))
    s, h, r = kernel("forward", x, y)
    # the interpreter truncates to bfloat16 where hardware rounds
    close = {"rtol": 2e-6, "atol": 2e-6} if dtype == torch.float32 else {"rtol": 2 ** -7, "atol": 2 ** -7}
    torch.testing.assert_close(s, x + y, **close)
    exact = s.double().requires_grad_()  # the norm is that of the rounded sum
    wanted = add_norm_twin(exact, torch.zeros_like(exact))[1]
    torch.testing.assert_close(h.double(), wanted, **close)
    assert r.dtype == torch.float32 and r.shape == (*shape[:-1], 1) and s.dtype == h.dtype == dtype
    of_norm, = torch.autograd.grad(wanted, exact, dh.double())
    for given, gradient in ((ds, of_norm + ds), (None, of_norm)):
        got = kernel("backward", given, dh, h, r).double()
        torch.testing.assert_close(got, gradient, rtol=close["rtol"], atol=4 * close["atol"])


def test_on_cpus_it_is_the_twin_to_the_last_bit_up_to_the_norm():
    x, y = torch.randn(3, 5, 64), torch.randn(3, 5, 64)
    (s, h), (wanted_s, wanted_h) = add_norm(x, y), add_norm_twin(x, y)
    assert torch.equal(s, wanted_s)
    torch.testing.assert_close(h, wanted_h)


@pytest.mark.parametrize("path", [operation._AddNorm.apply, operation._triton], ids=["function", "operator"])
@pytest.mark.parametrize("used", ["both", "sum", "norm"])
def test_gradients_flow_through_whichever_result_is_used(used, path):
    x, y = (torch.randn(4, 32, requires_grad=True) for _ in range(2))
    weights = torch.randn(2, 4, 32)
    if used != "both":
        weights[used == "sum"] = 0
    results = path(x, y), add_norm_twin(x, y)
    loss, wanted = ((s * weights[0] * (used != "norm")).sum() + (h * weights[1] * (used != "sum")).sum()
                    for s, h in results)
    if used != "both":  # the other result is not read at all
        loss = (results[0][used == "norm"] * weights[int(used == "norm")]).sum()
    for got, exact in zip(torch.autograd.grad(loss, (x, y)), torch.autograd.grad(wanted, (x, y))):
        torch.testing.assert_close(got, exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("letter, mixer", [("S", 2.5625 + 1), ("A", 3 + 2)])
def test_a_block_keeps_no_residual_stream_and_nothing_twice(letter, mixer):
    """Kept for backward, in units of (B, T, E) in bfloat16: three norms (the last is the next block's), relu², and of
    the mixer the joined projections, and what c_proj reads; or queries and keys once more, rotated.

    Seen on the meta device, which takes the path of GPUs.
    """
    B, T, E, kept = 2, 64, 256, {}

    def keep(t):
        kept[t.untyped_storage()._cdata] = t.untyped_storage()  # held, so that no other gets the same place
        return t
    with torch.device("meta"):
        model = GPT(GPTConfig.from_depth(4, vocab_size=64, layer_pattern=letter * 4))
        block = model.transformer.h[0].bfloat16()
        x, h = (torch.zeros(B, T, E, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
        positions = Positions(tuple(torch.zeros(T, 64) for _ in range(2)), T)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("nanochat.attention.attend", lambda q, k, v, **_: q + k + v)  # keeps nothing
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
                results = block(x * 1, h * 1, positions)
    if letter == "A":
        mixer += 0.0625  # the norms' factors
    unit = B * T * E * 2
    own = {p.untyped_storage()._cdata for p in block.parameters()}
    sizes = [storage.nbytes() / unit for key, storage in kept.items() if key not in own]
    joined = sum(p.weight.numel() for p in block.attn.projections()) * 2 / unit
    assert len(results) == 2 and sum(sizes) < 3 + 4 + mixer + 1.05 * joined + 0.1, sorted(sizes)
