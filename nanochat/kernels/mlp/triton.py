"""The two products of the MLP that end with its activation, on GPUs: relu(x · w1ᵀ)², and 2 · (dy · w2) · √a.

Matrices are contiguous, in 16 bits (float32 in the interpreter); sums are float32, rounded once when a result is
written. Any sizes.

A program takes tiles (BLOCK_M, BLOCK_N) of the result one after the other, as many programs as the GPU has
multiprocessors, or twice as many. Neighbouring tiles take the same rows of either matrix, GROUP rows of tiles at a
time, so that these are read from the L2 cache. From Hopper on, tiles are moved by the tensor memory accelerator
(`_mlp_with_descriptors`), where rows are multiples of 16 bytes; else by ordinary loads (`_mlp_with_pointers`). The two
halves of a tile's columns are finished one after the other: less shared memory, so that more is left for the tiles read
ahead.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from nanochat.kernels.dispatch import launch

GROUP = 8  # rows of tiles that are taken together


class Tile(NamedTuple):
    """How a product is cut: a tile of the result, the depth of one step, steps read ahead, warps."""

    m: int
    n: int
    k: int
    stages: int
    warps: int


def tile_of(shared: int, backward: bool, small: bool) -> Tile:
    """Return the tile for the bytes of shared memory that a program may have.

    By the compiler's count none spills: for sm_90 157 registers forward and 227 backward, the small ones 156 and 168.

    Args:
        shared: as the device says (opt-in)
        backward: of `activation_gradient`, which reads a too
        small: so small that two programs fit on a multiprocessor: the end of one's tile overlaps the other's products
    """
    if shared >= 200_000:  # Hopper, datacentre Blackwell
        if small:
            return Tile(128, 128, 64, 2 if backward else 3, 4)
        return Tile(128, 256, 64, 3 if backward else 4, 8)
    if shared >= 160_000:  # A100
        if small:
            return Tile(128, 64, 32, 3, 4)
        return Tile(128, 128, 64, 4, 8) if backward else Tile(128, 256, 64, 3, 8)
    if shared >= 96_000:  # consumer cards, from 8.6 to 12.0
        return Tile(128, 64, 32, 3, 4) if small else Tile(128, 128, 32, 3, 8)
    return Tile(64, 64, 32, 2, 4)


@triton.jit
def _place(tile, tiles_m, tiles_n, GROUP: tl.constexpr):
    """Return row and column of a tile: down the rows of a group, then on to the next column."""
    group = tile // (GROUP * tiles_n)
    rows = tl.minimum(tiles_m - group * GROUP, GROUP)
    within = tile % (GROUP * tiles_n)
    return group * GROUP + within % rows, within // rows


@triton.jit
def _activated(sums):
    h = tl.where(sums <= 0, 0.0, sums)  # NaN stays NaN
    return h * h


@triton.jit
def _gradient(sums, a):
    return 2 * sums * tl.sqrt(a.to(tl.float32))


@triton.jit
def _halves(sums, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Return the left and the right half of the columns."""
    return tl.split(tl.permute(tl.reshape(sums, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)))


@triton.jit
def _mlp_with_descriptors(X, W, A, C, M, N, K, BACKWARD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                          BLOCK_K: tl.constexpr, GROUP: tl.constexpr, PROGRAMS: tl.constexpr):
    """C = relu(X · Wᵀ)², X (M, K), W (N, K); BACKWARD: C = 2 · (X · W) · √A, W (K, N). All are tensor descriptors."""
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, PROGRAMS, flatten=True):
        m, n = _place(tile, tiles_m, tiles_n, GROUP)
        sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(tl.cdiv(K, BLOCK_K)):
            x = X.load([m * BLOCK_M, k * BLOCK_K])
            if BACKWARD:
                sums = tl.dot(x, W.load([k * BLOCK_K, n * BLOCK_N]), sums)
            else:
                sums = tl.dot(x, W.load([n * BLOCK_N, k * BLOCK_K]).T, sums)
        left, right = _halves(sums, BLOCK_M, BLOCK_N)
        column = n * BLOCK_N
        if BACKWARD:
            C.store([m * BLOCK_M, column], _gradient(left, A.load([m * BLOCK_M, column])).to(C.dtype))
            column += BLOCK_N // 2
            C.store([m * BLOCK_M, column], _gradient(right, A.load([m * BLOCK_M, column])).to(C.dtype))
        else:
            C.store([m * BLOCK_M, column], _activated(left).to(C.dtype))
            C.store([m * BLOCK_M, column + BLOCK_N // 2], _activated(right).to(C.dtype))


@triton.jit
def _mlp_with_pointers(X, W, A, C, M, N, K, BACKWARD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                       BLOCK_K: tl.constexpr, GROUP: tl.constexpr, PROGRAMS: tl.constexpr):
    """Do what `_mlp_with_descriptors` does, of matrices by their addresses. Offsets are 64 bits wide."""
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    for tile in range(tl.program_id(0), tiles_m * tiles_n, PROGRAMS):
        m, n = _place(tile, tiles_m, tiles_n, GROUP)
        row, column = m * BLOCK_M + tl.arange(0, BLOCK_M), n * BLOCK_N + tl.arange(0, BLOCK_N)
        depth = tl.arange(0, BLOCK_K)
        # rows and columns outside take those inside again: what comes of them is not stored
        x = X + (row % M).to(tl.int64)[:, None] * K + depth[None, :]
        if BACKWARD:
            w = W + depth.to(tl.int64)[:, None] * N + (column % N)[None, :]
        else:
            w = W + (column % N).to(tl.int64)[None, :] * K + depth[:, None]
        sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(tl.cdiv(K, BLOCK_K)):
            inside = depth < K - k * BLOCK_K
            part = tl.load(x, mask=inside[None, :], other=0.0)
            sums = tl.dot(part, tl.load(w, mask=inside[:, None], other=0.0), sums)
            x += BLOCK_K
            w += BLOCK_K * N if BACKWARD else BLOCK_K
        left, right = _halves(sums, BLOCK_M, BLOCK_N)
        _finish(left, A, C, row, n * BLOCK_N, M, N, BACKWARD, BLOCK_N // 2)
        _finish(right, A, C, row, n * BLOCK_N + BLOCK_N // 2, M, N, BACKWARD, BLOCK_N // 2)


@triton.jit
def _finish(sums, A, C, row, first, M, N, BACKWARD: tl.constexpr, COLUMNS: tl.constexpr):
    column = first + tl.arange(0, COLUMNS)
    at = row.to(tl.int64)[:, None] * N + column[None, :]
    inside = (row < M)[:, None] & (column < N)[None, :]
    if BACKWARD:
        sums = _gradient(sums, tl.load(A + at, mask=inside, other=0.0))
    else:
        sums = _activated(sums)
    tl.store(C + at, sums.to(C.dtype.element_ty), mask=inside)


def _product(x: Tensor, w: Tensor, a: Tensor | None, small: bool) -> Tensor:
    """Return relu(x · wᵀ)², or with a 2 · (x · w) · √a."""
    (M, K), N, backward = x.shape, w.shape[0 if a is None else 1], a is not None
    c = torch.empty(M, N, dtype=x.dtype, device=x.device)
    if not c.numel():
        return c
    if x.is_cuda:
        properties = torch.cuda.get_device_properties(x.device)
        capability, shared = (properties.major, properties.minor), properties.shared_memory_per_block_optin
        programs = properties.multi_processor_count * (2 if small else 1)
    else:  # interpreted
        capability, shared, programs = (9, 0), 0, 3
    tile = tile_of(shared, backward, small)
    programs = min(programs, triton.cdiv(M, tile.m) * triton.cdiv(N, tile.n))
    a = c if a is None else a
    options = {"BACKWARD": backward, "BLOCK_M": tile.m, "BLOCK_N": tile.n, "BLOCK_K": tile.k, "GROUP": GROUP,
               "PROGRAMS": programs, "num_stages": tile.stages, "num_warps": tile.warps}
    if capability >= (9, 0) and _describable(x, w, a, c):
        half, of_w = [tile.m, tile.n // 2], [tile.k, tile.n] if backward else [tile.n, tile.k]
        parts = [TensorDescriptor.from_tensor(t, block) for t, block in ((x, [tile.m, tile.k]), (w, of_w), (a, half),
                                                                        (c, half))]
        launch(_mlp_with_descriptors, (programs,), *parts, M, N, K, **options)
    else:
        launch(_mlp_with_pointers, (programs,), x, w, a, c, M, N, K, **options)
    return c


def _describable(*matrices: Tensor) -> bool:
    """Whether the tensor memory accelerator can address them: 16 bytes aligned, rows multiples of 16 bytes."""
    return all(t.data_ptr() % 16 == 0 and t.stride(0) * t.element_size() % 16 == 0 for t in matrices)


def activated_product(x: Tensor, w1: Tensor, small: bool = False) -> Tensor:
    """Return relu(x · w1ᵀ)² (M, N), from x (M, K) and w1 (N, K)."""
    return _product(x, w1, None, small)


def activation_gradient(dy: Tensor, w2: Tensor, a: Tensor, small: bool = False) -> Tensor:
    """Return 2 · (dy · w2) · √a (M, N), from dy (M, K), w2 (K, N) and a (M, N)."""
    return _product(dy, w2, a, small)
