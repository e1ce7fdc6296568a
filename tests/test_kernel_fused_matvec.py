"""nanochat.kernels.fused_matvec: the twin and the Triton kernel (in its interpreter, or on a GPU) against float64."""

import pytest
import torch
from torch import Tensor

from nanochat.kernels.fused_matvec import fused_matvec, fused_matvec_twin

SHAPES = [(1, 1), (37, 48), (130, 2500), (33, 1280), (5, 2048)]  # N, K
KINDS = [(False, False, False), (True, False, False), (True, True, False), (False, False, True), (True, True, True)]
DTYPES = [torch.float32, torch.bfloat16]


def exact(x: Tensor, weight: Tensor, add: Tensor | None, normed: bool, activated: bool) -> Tensor:
    x = x.double()
    if normed:
        x = x * (x.square().mean() + 2.0 ** -23).rsqrt()
    y = x @ weight.double().T
    y = y.clamp(min=0).square() if activated else y
    return y if add is None else y + add.double()


def worst(run, N: int, K: int, dtype: torch.dtype, device: str = "cpu") -> float:
    """Return the largest error of `run` against float64 over all kinds, as a share of the twin's."""
    shares = []
    for seed, (normed, activated, added) in enumerate(KINDS):
        rng = torch.Generator().manual_seed(seed)
        # NaN around the matrix
        x, room = 3 * torch.randn(1, 1, K, generator=rng), torch.full((N + 3, K + 8), torch.nan)
        room[1:N + 1, :K] = torch.randn(N, K, generator=rng) * K ** -0.5
        x, weight = x.to(dtype).to(device), room.to(dtype).to(device)[1:N + 1, :K]
        add = torch.randn(1, 1, N, generator=rng).to(dtype).to(device) if added else None
        wanted = exact(x, weight, add, normed, activated)
        got = run(x, weight, add, normed=normed, activated=activated)
        assert got.shape == (1, 1, N) and got.dtype == dtype
        twin = fused_matvec_twin(x, weight, add, normed=normed, activated=activated)
        scale = wanted.norm() + 1e-9
        shares.append(float((got - wanted).norm() / scale / ((twin - wanted).norm() / scale + torch.finfo(dtype).eps)))
    return max(shares)


def interpreted(x: Tensor, weight: Tensor, add: Tensor | None, **kind: bool) -> Tensor:
    from nanochat.kernels.fused_matvec import triton as kernels
    empty, torch.empty = torch.empty, lambda *shape, **given: torch.full(shape, torch.nan, **given)
    try:
        return kernels.fused_matvec(x, weight, add, **kind)
    finally:
        torch.empty = empty


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_twin_is_the_formula(dtype):
    torch.manual_seed(0)
    for N, K in SHAPES:
        x, weight, add = torch.randn(1, 1, K).to(dtype), torch.randn(N, K).to(dtype), torch.randn(1, 1, N).to(dtype)
        for normed, activated, added in KINDS:
            wanted = exact(x, weight, add if added else None, normed, activated)
            got = fused_matvec_twin(x, weight, add if added else None, normed=normed, activated=activated)
            assert (got - wanted).norm() <= 64 * torch.finfo(dtype).eps * (wanted.norm() + add.norm())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("N, K", SHAPES)
def test_the_kernel_is_as_exact_as_the_twin(N, K, dtype, interpreter):
    assert interpreter.submit(worst, interpreted, N, K, dtype).result() < 1.5


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_the_kernel_compiles_for_hopper(dtype):
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from nanochat.kernels.fused_matvec.triton import _fused_matvec, sizes
    if not isinstance(_fused_matvec, triton.JITFunction):
        pytest.skip("Triton interprets here")
    for K in (1280, 5120):
        block_n, block_k = sizes(K)
        constants = {"K": K, "NORMED": True, "ACTIVATED": True, "ADD": True, "BLOCK_N": block_n, "BLOCK_K": block_k}
        signature = {name: "constexpr" if name in constants else "i32" if name in ("N", "row") else "*" + dtype
                     for name in _fused_matvec.arg_names}
        constexprs = {(_fused_matvec.arg_names.index(name),): value for name, value in constants.items()}
        compiled = triton.compile(ASTSource(_fused_matvec, signature=signature, constexprs=constexprs),
                                  target=GPUTarget("cuda", 90, 32))
        assert "st.local" not in compiled.asm["ptx"]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("N, K", [*SHAPES, (2704, 1280), (1280, 5120), (65536, 1280)])
def test_on_a_gpu_the_kernel_is_as_exact_as_the_twin(N, K, dtype):
    assert worst(fused_matvec, N, K, dtype, "cuda") < 1.5
