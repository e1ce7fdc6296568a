"""Muon's orthogonalisation of matrices, by the Newton-Schulz iteration.

x (N, rows, columns); the result is like x, in the dtype of the products. Written in place: nothing. There is no
backward. Keller Jordan, https://kellerjordan.github.io/posts/muon.

Shapes are few and fixed: those of the model's matrices. So an implementation may compile for each of them.
"""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from nanochat.kernels.dispatch import Backend, Draw, TrainingShape, Trial, backend, state_fp_fusion

A, B, C = 3.4445, -4.7750, 2.0315  # Keller Jordan's coefficients


def newton_schulz_twin(x: Tensor, dtype: torch.dtype, steps: int = 5) -> Tensor:
    """Bring the singular values of each matrix near 1 (0.7 to 1.2). A zero matrix stays zero. The definition.

    This is Muon's quintic iteration X <- (a + b G + c G^2) X with G = X X^T, on the transpose where that has fewer
    rows.

    Args:
        x: (N, rows, columns).
        dtype: of the matrix products, and of the result.
        steps: of the iteration.
    """
    x, tall = _scaled(x, dtype)
    for _ in range(steps):
        gram = x @ x.mT
        x = A * x + (B * gram + C * gram @ gram) @ x
    return x.mT if tall else x


def _scaled(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, bool]:
    """Return x with norms of at most 1 and no more rows than columns, and whether it was transposed for that."""
    tall = x.size(-2) > x.size(-1)
    x = (x / (torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True) + 1e-7)).to(dtype)
    return x.mT if tall else x, tall


def _iterate(x: Tensor, dtype: torch.dtype, steps: int) -> Tensor:
    """The twin with its sums fused into the products."""
    x, tall = _scaled(x, dtype)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=B, alpha=C), x, beta=A)
    return x.mT if tall else x


def _in_gram(x: Tensor, dtype: torch.dtype, steps: int) -> Tensor:
    """The iteration in the Gram matrix G: all factors commute with G, so X is multiplied only once, by their product.

    That is half the arithmetic at 4:1, and within 1e-3 of the plain iteration for any spectrum; bfloat16 has too few
    digits for it.
    """
    x, tall = _scaled(x, dtype)
    gram, product = x @ x.mT, None
    for i in range(steps):
        factor = torch.baddbmm(gram, gram, gram, beta=B, alpha=C)
        factor.diagonal(dim1=-2, dim2=-1).add_(A)
        product = factor if product is None else factor @ product
        gram = factor @ (factor @ gram) if i < steps - 1 else gram
    x = product @ x
    return x.mT if tall else x


def _one_by_one(x: Tensor, dtype: torch.dtype, steps: int) -> Tensor:
    """A product for each matrix: for large ones a batched product may be slower."""
    return torch.cat([_iterate(matrix, dtype, steps) for matrix in x.split(1)])


@cache
def _compiler() -> Callable:
    state_fp_fusion()
    return torch.compile(_iterate, dynamic=False)


def _compiled(x: Tensor, dtype: torch.dtype, steps: int) -> Tensor:
    return _compiler()(x, dtype, steps)


def _gram_takes(x: Tensor, dtype: torch.dtype, steps: int) -> bool:
    long = max(x.shape[1:]) >= 2 * min(x.shape[1:])
    return x.device.type == "cpu" and dtype == torch.float32 and long


BACKENDS = {"gram": Backend(_in_gram, _gram_takes),
            "compiled": Backend(_compiled, lambda x, *others: x.is_cuda, "never"),
            "one_by_one": Backend(_one_by_one, lambda x, *others: x.is_cuda and len(x) > 0, "never"),
            "torch": Backend(_iterate)}


def newton_schulz(x: Tensor, dtype: torch.dtype, steps: int = 5) -> Tensor:
    """Return what `newton_schulz_twin` returns, up to rounding. On a CPU in float32, long matrices are done in their
    Gram matrix."""
    return backend("newton_schulz", BACKENDS, x, dtype, steps)(x, dtype, steps)


def trial(shape: TrainingShape, draw: Draw) -> Trial:
    """Return what the chooser measures: the first matrices of the MLPs, as many as a device updates at once."""
    x = draw(shape.matrices, 4 * shape.E, shape.E, grad=False)

    def twin(x: Tensor) -> Tensor:
        return newton_schulz_twin(x, x.dtype)

    return Trial(lambda x: newton_schulz(x.float(), x.dtype), twin, (x,), asked=(x, x.dtype, 5), inside_blocks=False)
