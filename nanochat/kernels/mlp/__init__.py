"""The MLP as one operation: y = relu(x · w1ᵀ)² · w2ᵀ.

x (..., E); w1 (F, E) and w2 (E, F), of x's dtype or kept in another and rounded to it; y is like x. F = 4·E.

Saved for backward: x, a = relu(x · w1ᵀ)² (..., F), and both matrices in x's dtype; what is before the activation is not
kept, since relu(x · w1ᵀ) = √a (see `relu2`). Written in place: nothing.

Implementations: "torch", three operations, of which `relu2` has implementations of its own: the activation reads and
writes 2·F numbers a token forward and 3·F backward. "triton", for bfloat16 on NVIDIA GPUs from Ampere on: the
activation is the epilogue of the product before it, and its gradient that of the product dy · w2, so that F numbers a
token are read backward and nothing else; the other four products are PyTorch's. It is one operator, which torch.compile
sees whole. "triton_small": the same in smaller tiles, two at a time on a multiprocessor.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat.kernels.dispatch import (
    Backend,
    Draw,
    TrainingShape,
    Trial,
    backend,
    define_operator,
    has_triton,
    kernels_of,
    triton_ready,
)
from nanochat.kernels.relu2 import backward_of_result, relu_squared, relu_squared_twin


def mlp_twin(x: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    """Return relu(x · w1ᵀ)² · w2ᵀ. The definition."""
    return F.linear(relu_squared_twin(F.linear(x, w1.to(x.dtype))), w2.to(x.dtype))


def _pytorch(x: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    return F.linear(relu_squared(F.linear(x, w1.to(x.dtype))), w2.to(x.dtype))


def activated_product(x: Tensor, w1: Tensor, small: bool) -> Tensor:
    """Return relu(x · w1ᵀ)² (N, F), from x (N, E) and w1 (F, E)."""
    if triton_ready(x):
        return kernels_of("mlp", "triton").activated_product(x, w1, small)
    return relu_squared_twin(F.linear(x, w1))


def activation_gradient(dy: Tensor, w2: Tensor, a: Tensor, small: bool) -> Tensor:
    """Return the gradient of x · w1ᵀ, 2 · (dy · w2) · √a (N, F), from dy (N, E), w2 (E, F) and a (N, F)."""
    if triton_ready(dy):
        return kernels_of("mlp", "triton").activation_gradient(dy, w2, a, small)
    return backward_of_result(dy @ w2, a)


def _forward(x: Tensor, w1: Tensor, w2: Tensor, small: bool) -> tuple[Tensor, Tensor]:
    a = activated_product(x.flatten(0, -2).contiguous(), w1.contiguous(), small).unflatten(0, x.shape[:-1])
    return F.linear(a, w2), a


def _backward(dy: Tensor, x: Tensor, a: Tensor, w1: Tensor, w2: Tensor, small: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x, w1 and w2."""
    dy, a = dy.flatten(0, -2).contiguous(), a.flatten(0, -2)
    dw2 = dy.t() @ a
    dh = activation_gradient(dy, w2.contiguous(), a, small)
    return (dh @ w1).unflatten(0, x.shape[:-1]), dh.t() @ x.flatten(0, -2), dw2


def _save(ctx, inputs: tuple[Tensor, Tensor, Tensor, bool], output: tuple[Tensor, Tensor]) -> None:
    x, w1, w2, ctx.small = inputs
    ctx.save_for_backward(x, output[1], w1, w2)


def _gradients(ctx, dy: Tensor, da: None) -> tuple[Tensor, Tensor, Tensor, None]:
    return *torch.ops.nanochat.mlp_backward(dy, *ctx.saved_tensors, ctx.small), None


define_operator("mlp", "(Tensor x, Tensor w1, Tensor w2, bool small) -> (Tensor, Tensor)", _forward,
                lambda x, w1, w2, small: (x.new_empty(x.shape), x.new_empty((*x.shape[:-1], len(w1)))), _gradients,
                _save)
define_operator("mlp_backward", "(Tensor dy, Tensor x, Tensor a, Tensor w1, Tensor w2, bool small) "
                "-> (Tensor, Tensor, Tensor)", _backward, lambda dy, x, a, w1, w2, small: (
                    x.new_empty(x.shape), w1.new_empty(w1.shape), w2.new_empty(w2.shape)))


def _triton(x: Tensor, w1: Tensor, w2: Tensor, small: bool = False) -> Tensor:
    return torch.ops.nanochat.mlp(x, w1.to(x.dtype), w2.to(x.dtype), small)[0]


def _triton_takes(x: Tensor, w1: Tensor, w2: Tensor) -> bool:
    return x.dtype == torch.bfloat16 and has_triton(x.device)


# by default three operations: cuBLAS is known to be fast, our products are not until they were measured
BACKENDS = {"triton": Backend(_triton, _triton_takes, "never"),
            "triton_small": Backend(partial(_triton, small=True), _triton_takes, "never"), "torch": Backend(_pytorch)}


def mlp(x: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    """Return what `mlp_twin` returns, up to rounding."""
    return backend("mlp", BACKENDS, x, w1, w2)(x, w1, w2)


def trial(shape: TrainingShape, draw: Draw) -> Trial:
    """Return what the chooser measures: the MLP of a layer, its matrices in the dtype of the products."""
    E = shape.E
    return Trial(mlp, mlp_twin, (draw(shape.B, shape.T, E), draw(4 * E, E), draw(E, 4 * E)))
