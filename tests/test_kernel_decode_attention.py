"""nanochat.kernels.decode_attention: the twins and the Triton kernel (in its interpreter, or on a GPU) against float64.

tests/test_kernel_attention_cpu.py has the CPU kernel.
"""

import math

import pytest
import torch
from torch import Tensor

from nanochat.kernels.decode_attention import (
    append_and_attend,
    append_and_attend_twin,
    decode_attention,
    decode_attention_twin,
)
from nanochat.kernels.rope_norm import rope_norm_twin

# B, S, H, G, D, window: one key; rows of several ranges; grouped heads of odd sizes; windows within a range and
# across ranges
SHAPES = [(1, 1, 1, 1, 2, None), (3, 140, 4, 2, 20, None), (2, 193, 2, 2, 64, None), (2, 150, 2, 2, 128, 100),
          (3, 64, 3, 1, 16, 7), (1, 129, 2, 2, 96, 1), (2, 129, 20, 1, 8, 100)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
GAINS = (1.0, 1.44, 0.3)  # of the scores, by the seed: those of the published model, of qk_gain 1.2, and any


def case(B: int, S: int, H: int, G: int, D: int, dtype: torch.dtype, seed: int, device: str = "cpu") -> list[Tensor]:
    """Return q, k, v, rope, keys, values and positions: columns of wider tensors, NaN where nothing may be read."""
    rng = torch.Generator().manual_seed(seed)
    positions = torch.randint(S, (B,), generator=rng)
    positions[0] = (S - 1, 0, S // 2)[seed % 3]
    z = torch.randn(B, 1, (H + 2 * G) * D + 16, generator=rng).to(dtype).to(device)
    q, k, v = (part.unflatten(-1, (-1, D)) for part in z.split([H * D, G * D, G * D, 16], dim=-1)[:3])
    unwritten = torch.arange(S + 3) >= positions[:, None]
    caches = [torch.full((B + 1, S + 3, G, D), torch.nan) for _ in range(2)]
    for cache in caches:
        cache[:B] = torch.randn(B, S + 3, G, D, generator=rng).masked_fill(unwritten[:, :, None, None], torch.nan)
    angles = 9 * torch.rand(B, 1, D // 2, generator=rng)
    return [q, k, v, (angles.cos().to(device), angles.sin().to(device)),
            *(cache.to(dtype).to(device) for cache in caches),
            positions.to(device)]


def exact(q: Tensor, k: Tensor, v: Tensor, rope: tuple[Tensor, Tensor], keys: Tensor, values: Tensor, positions: Tensor,
          window: int | None, gain: float) -> Tensor:
    """The definition in float64, one row and one head at a time. Query and key are rounded as stored."""
    B, _, H, D = q.shape
    angle = torch.complex(*rope).unsqueeze(2).conj()

    def rotated(x: Tensor) -> Tensor:
        x1, x2 = x.double().chunk(2, dim=-1)
        both = torch.complex(x1, x2) * angle
        x = torch.cat([both.real, both.imag], dim=-1)
        return (x * (x.square().mean(-1, keepdim=True) + 2.0 ** -23).rsqrt()).to(q.dtype)
    q, k = rotated(q), rotated(k)
    y = torch.empty(B, 1, H, D, dtype=torch.float64)
    for b, place in enumerate(positions.tolist()):
        for h in range(H):
            g = h * k.shape[2] // H
            first = max(0, place + 1 - (window or place + 1))
            ks = torch.cat([keys[b, first:place, g], k[b, :, g]]).double()
            vs = torch.cat([values[b, first:place, g], v[b, :, g]]).double()
            y[b, 0, h] = (gain * (ks @ q[b, 0, h].double()) / math.sqrt(D)).softmax(0) @ vs
    return y


def check(run, shape: tuple, dtype: torch.dtype, seed: int, device: str = "cpu") -> float:
    """Run `run` on a case, compare all that it wrote, and return its error against float64 as a share of the twin's."""
    *sizes, window = shape
    B, S = sizes[:2]
    gain = GAINS[seed]
    q, k, v, rope, keys, values, positions = case(*sizes, dtype, seed, device)
    wanted = exact(*(t.cpu() for t in (q, k, v)), tuple(t.cpu() for t in rope),
                   *(t.cpu() for t in (keys, values, positions)),
                   window, gain)
    left, right = (keys.clone(), values.clone()), (keys.clone(), values.clone())
    twin = append_and_attend_twin(q, k, v, rope, *(cache[:B, :S] for cache in left), positions, window, gain)
    got, *right = run(q, k, v, rope, *right, positions, window, gain, B, S)
    row = torch.arange(B, device=device)
    assert torch.allclose(right[0][row, positions], left[0][row, positions], rtol=2 * torch.finfo(dtype).eps,
                          atol=1e-6), "another key"
    right[0][row, positions] = left[0][row, positions]
    for ours, theirs in zip(right, left):
        assert torch.equal(ours.nan_to_num(99.0), theirs.nan_to_num(99.0)), "the buffers differ from the twin's"
    assert got.shape == q.shape and got.dtype == dtype
    scale = wanted.norm()
    error, limit = (got.cpu() - wanted).norm() / scale, (twin.cpu() - wanted).norm() / scale
    return float(error / (limit + torch.finfo(dtype).eps))


def interpreted(q, k, v, rope, keys, values, positions, window, gain, B, S):
    from nanochat.kernels.decode_attention import triton as kernels

    def poisoned(*shape, **given) -> Tensor:
        return torch.full(shape[0] if len(shape) == 1 else shape, torch.nan, **given)

    empty, torch.empty = torch.empty, poisoned
    try:
        got = kernels.append_and_attend(q, k, v, rope, keys[:B, :S], values[:B, :S], positions, window, gain)
        return got, keys, values
    finally:
        torch.empty = empty


def chosen(q, k, v, rope, keys, values, positions, window, gain, B, S):
    return append_and_attend(q, k, v, rope, keys[:B, :S], values[:B, :S], positions, window, gain), keys, values


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_twin_is_attention_up_to_each_rows_position(shape, dtype):
    *sizes, window = shape
    for seed in range(3):
        q, k, v, rope, keys, values, positions = case(*sizes, dtype, seed)
        gain = GAINS[seed]
        wanted, before = exact(q, k, v, rope, keys, values, positions, window, gain), keys.clone()
        got = append_and_attend_twin(q, k, v, rope, keys[:sizes[0], :sizes[1]], values[:sizes[0], :sizes[1]], positions,
                                     window, gain)
        assert (got - wanted).norm() <= 4 * torch.finfo(dtype).eps * wanted.norm()
        row = torch.arange(len(positions))
        rotated = rope_norm_twin(k, rope)[:, 0]
        assert torch.equal(keys[row, positions], rotated) and torch.equal(values[row, positions], v[:, 0])
        before[row, positions] = rotated
        assert torch.equal(keys.nan_to_num(99.0), before.nan_to_num(99.0)), "more than the new key was written"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_kernel_is_as_exact_as_the_twin(shape, dtype, interpreter):
    if dtype == torch.bfloat16 and shape[2] != shape[3]:
        pytest.skip("the interpreter multiplies bfloat16 matrices as integers; float16 goes the same way")
    for seed in range(3):
        assert interpreter.submit(check, interpreted, shape, dtype, seed).result() < 1.5


@pytest.mark.parametrize("dtype, width", [("bf16", 2), ("fp32", 4)])
@pytest.mark.parametrize("G, D", [(1, 128), (4, 80)])
def test_the_kernels_compile_for_hopper(dtype, width, G, D):
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from nanochat.kernels.decode_attention import triton as kernels
    if not isinstance(kernels._split, triton.JITFunction):
        pytest.skip("Triton interprets here")
    split, N = kernels.sizes(1, 2048, 10, D, width)
    wide = triton.next_power_of_2(D)
    constants_of = {kernels._split: {"SHARED": G, "D": D, "SPLIT": split, "N": N, "BLOCK_H": 1 if G == 1 else 16,
                                     "BLOCK_D": wide, "ONE": False},
               kernels._combine: {"H": 10, "D": D, "SPLIT": split, "SPLITS": 32, "BLOCK_D": wide}}
    kinds = {"positions": "*i64", "scale": "fp32"}
    kinds |= dict.fromkeys(("parts", "tops", "sums", "cos", "sin"), "*fp32")
    kinds |= dict.fromkeys(("q", "k", "v", "keys", "values", "y"), "*" + dtype)
    for kernel, constants in constants_of.items():
        signature = {name: "constexpr" if name in constants else kinds.get(name, "i32") for name in kernel.arg_names}
        constexprs = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
        compiled = triton.compile(ASTSource(kernel, signature=signature, constexprs=constexprs),
                                  target=GPUTarget("cuda", 90, 32))
        assert "st.local" not in compiled.asm["ptx"] and compiled.metadata.shared < 100_000


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (64, 2048, 10, 10, 128, None), (1, 2048, 10, 2, 128, 1024)], ids=str)
def test_on_a_gpu_the_kernel_is_as_exact_as_the_twin(shape, dtype):
    for seed in range(3):
        assert check(chosen, shape, dtype, seed, "cuda") < 1.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("B, H, G, D, S", [(1, 6, 6, 128, 100), (2, 6, 2, 16, 33), (1, 1, 1, 2, 1), (3, 4, 1, 32, 7)])
def test_decode_attention_attends_like_torch(B, H, G, D, S, dtype):
    torch.manual_seed(0)
    shapes = (B, 1, H, D), (B, S + 9, G, D), (B, S + 9, G, D)
    q, k, v = (torch.randn(*shape).to(dtype) for shape in shapes)
    k[:, S:], v[:, S:] = torch.nan, torch.nan  # unused memory of the cache
    k, v = k[:, :S], v[:, :S]
    wanted = decode_attention_twin(q.double(), k.double(), v.double())
    got = decode_attention(q, k, v)
    assert got.dtype == dtype and got.shape == (B, 1, H, D)
    assert (got - wanted).norm() < (0.02 if dtype == torch.bfloat16 else 1e-5) * wanted.norm()
    assert torch.equal(got[:1], decode_attention(q[:1], k[:1], v[:1])), "what a row gets depends on the others"
