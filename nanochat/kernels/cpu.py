"""What the CPU kernels share: the Rust crate `cpukernels`, where it can be used, and how tensors are passed to it.

The `forward` and `backward` of the <operation>/cpu.py files know nothing of autograd. They check shapes, dtypes and
strides, raise ValueError for what does not fit together, and allocate the results; the crate does not check them again.

- Tensors are float32 or bfloat16 with a contiguous last dimension; all other strides are free.
- Arithmetic is float32, rounded once when a result is written.
- The result of a row depends neither on the other rows nor on the number of threads.
- The crate works on torch's own threads, `torch.get_num_threads()` of them.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

try:
    import cpukernels
    from cpukernels import runs_on  # noqa: F401  (the source folder imports as an empty package)
except ImportError:
    cpukernels = None

IS_BF16 = {torch.float32: False, torch.bfloat16: True}  # the crate's flag for each dtype it takes
_PLAIN_TYPES = {Tensor, nn.Parameter}


def ready(*tensors: Tensor) -> bool:
    """Whether the crate is built and can take these tensors: on a CPU, float32 or bfloat16, last dimension contiguous.

    False while torch.compile traces, under vmap and other functorch transforms, and under fake tensors.
    """
    if torch.compiler.is_compiling() or cpukernels is None:
        return False
    if torch._C._are_functorch_transforms_active() or torch._C._len_torch_dispatch_stack():
        return False
    return all(type(t) in _PLAIN_TYPES and t.is_cpu and t.dtype in IS_BF16 and dense(t) for t in tensors)


def differentiable(forward: Callable[..., Tensor], backward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return forward(x, ...) with a first derivative with respect to x, which is backward(dy, x, ...).

    All arguments are tensors. They are what is saved for backward.
    """
    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs: Tensor) -> Tensor:
            ctx.save_for_backward(*inputs)
            return forward(*inputs)

        @staticmethod
        @once_differentiable
        def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
            saved = ctx.saved_tensors  # read only once: activation checkpointing demands it
            return backward(dy, *saved), *[None] * (len(saved) - 1)

    def run(x: Tensor, *others: Tensor) -> Tensor:
        return (Function.apply if torch.is_grad_enabled() and x.requires_grad else forward)(x, *others)
    return run


def dense(t: Tensor) -> bool:
    """Whether the last dimension is contiguous."""
    return t.dim() > 0 and (t.stride(-1) == 1 or t.shape[-1] == 1)


def call(name: str, dtype: torch.dtype, *arguments: object) -> None:
    """Call a function of the crate, on torch's threads; dtype is that of the tensors that have one in common."""
    getattr(cpukernels, name)(torch.get_num_threads(), IS_BF16[dtype], *arguments)


def mismatch(rule: str, **tensors: Tensor | None) -> ValueError:
    """Return the error to raise where tensors break a rule."""
    given = {name: t for name, t in tensors.items() if t is not None}
    seen = (f"{name} {tuple(t.shape)} {t.dtype} with strides {t.stride()}" for name, t in given.items())
    return ValueError(f"{rule}; got {', '.join(seen)}")


def gradient_like(dy: Tensor, x: Tensor) -> Tensor:
    """Return dy with a contiguous last dimension. Raises ValueError where it has not x's shape and dtype."""
    if dy.shape != x.shape or dy.dtype != x.dtype:
        raise mismatch("dy has x's shape and dtype", dy=dy, x=x)
    return dy if dense(dy) else dy.contiguous()


def rows(t: Tensor) -> tuple[int, int, int]:
    """Return how the crate takes t (I, J, ...): its address and its first two strides, in elements."""
    return t.data_ptr(), t.stride(0), t.stride(1)


def rows_with_dtype(t: Tensor) -> tuple[bool, tuple[int, int, int]]:
    """Return how the crate takes a tensor whose dtype may differ from that of the others."""
    return IS_BF16[t.dtype], rows(t)


def heads(t: Tensor) -> tuple[tuple[int, int, int], int]:
    """Return how the crate takes t (B, T, H, D)."""
    return rows(t), t.stride(2)
