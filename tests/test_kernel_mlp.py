"""The MLP as one operation: the products with their epilogues in Triton's interpreter, the operator's gradients on
random ragged sizes, and what the kernels take of a GPU, by the compiler.
"""

import importlib
import importlib.util
import os
import subprocess
import sys

import pytest
import torch

from nanochat.kernels import mlp as operation
from nanochat.kernels.mlp import mlp, mlp_twin
from tests.conftest import ROOT


def _call(name, described, *args):
    module = importlib.import_module("nanochat.kernels.mlp.triton")
    before = module._describable
    module._describable = lambda *matrices: described and before(*matrices)
    try:
        return getattr(module, name)(*args)
    finally:
        module._describable = before


@pytest.mark.parametrize("described", [True, False], ids=["descriptors", "pointers"])
@pytest.mark.parametrize("M, K, N", [(1, 1, 1), (5, 7, 3), (70, 96, 200), (130, 40, 136), (257, 72, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])  # the interpreter multiplies no bfloat16
def test_the_products_end_with_the_activation_and_its_gradient(interpreter, M, K, N, dtype, described):
    torch.manual_seed(M + K + N)
    x, w1, dy, w2 = (torch.randn(shape).to(dtype) for shape in ((M, K), (N, K), (M, K), (K, N)))
    a = interpreter.submit(_call, "activated_product", described, x, w1).result()
    wanted = (x.double() @ w1.double().T).relu().square()
    rounding = {torch.float32: 2e-6, torch.float16: 2 ** -10}[dtype]
    assert a.dtype == dtype
    torch.testing.assert_close(a.double(), wanted, rtol=rounding, atol=rounding * float(wanted.max()))
    got = interpreter.submit(_call, "activation_gradient", described, dy, w2, a).result()
    gradient = 2 * (dy.double() @ w2.double()) * a.double().sqrt()
    torch.testing.assert_close(got.double(), gradient, rtol=rounding, atol=rounding * float(gradient.abs().max()))


def test_a_nan_stays_a_nan_in_the_products(interpreter):
    x, w = torch.ones(4, 8), torch.ones(8, 8)
    x[2, 3] = float("nan")
    for described in (True, False):
        a = interpreter.submit(_call, "activated_product", described, x, w).result()
        assert torch.equal(a.isnan().any(1), torch.tensor([False, False, True, False])) and (a[0] == 64).all()


@pytest.mark.parametrize("shape", [(6, 8), (2, 3, 8), (1, 1, 8), (0, 8)])
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_operator_has_the_twins_gradients(shape, dtype, weights):
    if dtype == torch.float32 and weights != dtype:
        pytest.skip("weights are never narrower than activations")
    torch.manual_seed(1)
    x = torch.randn(shape).to(dtype).requires_grad_()
    w1, w2 = ((torch.randn(size) / 3).to(weights).requires_grad_() for size in ((32, 8), (8, 32)))
    dy = torch.randn(shape).to(dtype)
    results = [(f(x, w1, w2), torch.autograd.grad(f(x, w1, w2), (x, w1, w2), dy))
               for f in (operation._triton, mlp, mlp_twin)]
    for y, gradients in results[:2]:
        for got, wanted in zip((y, *gradients), (results[2][0], *results[2][1])):
            assert got.dtype == wanted.dtype
            close = {torch.float32: 1e-5, torch.bfloat16: 2 ** -5}[dtype]  # several roundings of sums of 32
            torch.testing.assert_close(got, wanted, rtol=close, atol=close)


def test_the_operator_keeps_what_the_products_read_and_nothing_else():
    x, w1, w2 = (torch.randn(shape, requires_grad=True) for shape in ((6, 8), (32, 8), (8, 32)))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(tuple(t.shape)), t)[1], lambda t: t):
        operation._triton(x, w1, w2)
    assert sorted(kept) == [(6, 8), (6, 32), (8, 32), (32, 8)]


def test_torch_compile_sees_one_operator():
    x, w1, w2 = (torch.randn(shape, requires_grad=True) for shape in ((6, 8), (32, 8), (8, 32)))
    dy, function = torch.randn(6, 8), torch.compile(operation._triton, backend="aot_eager", fullgraph=True)
    for got, wanted in zip(torch.autograd.grad(function(x, w1, w2), (x, w1, w2), dy),
                           torch.autograd.grad(mlp_twin(x, w1, w2), (x, w1, w2), dy)):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


SHARED = {90: 232448, 80: 166912, 89: 101376}  # bytes of shared memory that a program may have
COMPILED = """
import itertools
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from nanochat.kernels.dispatch import LAUNCH_OPTIONS
from nanochat.kernels.mlp import triton as mlp

cards = [tuple(map(int, card.split(":"))) for card in sys.argv[1:]]
for (capability, shared), small, backward in itertools.product(cards, (False, True), (False, True)):
    kernel = mlp._mlp_with_descriptors if capability >= 90 else mlp._mlp_with_pointers
    tile = mlp.tile_of(shared, backward, small)
    constants = {"BACKWARD": backward, "BLOCK_M": tile.m, "BLOCK_N": tile.n, "BLOCK_K": tile.k,
                 "GROUP": mlp.GROUP, "PROGRAMS": 132}
    of_w = (tile.k, tile.n) if backward else (tile.n, tile.k)
    blocks = {"X": (tile.m, tile.k), "W": of_w, "A": (tile.m, tile.n // 2), "C": (tile.m, tile.n // 2)}
    signature, attributes = {}, {}
    for i, name in enumerate(kernel.arg_names):
        described = name in blocks and capability >= 90
        kind = f"tensordesc<bf16[{blocks[name][0]},{blocks[name][1]}]>" if described else "*bf16"
        signature[name] = "constexpr" if name in constants else "i32" if name in "MNK" else kind
        if name not in constants and not described:
            attributes[i,] = [["tt.divisibility", 16]]
    options = {"num_warps": tile.warps, "num_stages": tile.stages, **LAUNCH_OPTIONS}
    binary = triton.compile(ASTSource(kernel, signature, constants, attrs=attributes),
                            target=GPUTarget("cuda", capability, 32), options=options)
    print(capability, small, binary.metadata.shared, len(binary.asm["cubin"]))
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_the_kernels_compile_within_the_shared_memory_of_each_card():
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", COMPILED, *(f"{card}:{SHARED[card]}" for card in SHARED)], cwd=ROOT,
                          env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert len(lines) == 12
    for capability, small, shared, _ in lines:
        assert int(shared) <= SHARED[int(capability)], lines
        if capability == "90" and small == "True":  # two fit on a multiprocessor: 1 KB of each is the system's
            assert 2 * (int(shared) + 1024) <= 233472
