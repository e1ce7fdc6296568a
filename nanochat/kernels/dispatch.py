"""How an operation finds its kernel, and how an operation becomes a torch operator."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor

from nanochat.kernels import cpu

_LIBRARY = torch.library.Library("nanochat", "FRAGMENT")


def fused(operation: str, name: str, *tensors: Tensor) -> Callable | None:
    """Return the kernel of an operation for these tensors, or None where plain PyTorch is to be used.

    None too while torch.compile traces, since the compiler fuses the plain form itself.

    Args:
        operation: package of nanochat.kernels
        name: function of its triton.py (tensors on CUDA) or of its cpu.py (where `cpu.ready` says yes)
        tensors: the floating-point inputs; the first says the device
    """
    if torch.compiler.is_compiling():
        return None
    if tensors[0].is_cuda:
        return getattr(_module(operation, "triton"), name, None)
    return getattr(_module(operation, "cpu"), name, None) if cpu.ready(*tensors) else None


@cache
def _module(operation: str, backend: str) -> ModuleType | None:
    """None where the operation has no such file, or where Triton is not installed."""
    try:
        return import_module(f"nanochat.kernels.{operation}.{backend}")
    except ImportError:
        return None


def on_device_of(x: Tensor) -> AbstractContextManager:
    """Return the context for a Triton launch on x's device: Triton launches on the current one.

    Without it a kernel for cuda:1 runs on cuda:0, on a stream that knows nothing of the other device's work. It is a
    `with` around every launch, since there are no other ways to say it.
    """
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()  # on a CPU Triton interprets


def define_operator(name: str, schema: str, run: Callable, shapes: Callable, backward: Callable | None = None,
                    setup_context: Callable | None = None) -> None:
    """Register torch.ops.nanochat.<name>: torch.compile, checkpointing and fake tensors see it as one operation.

    `torch.library.custom_op` would do the same, but its first call imports the whole compiler, which takes seconds.

    Args:
        name: name of the operator
        schema: its arguments and results, as torch.library writes them
        run: the implementation, for all devices
        shapes: returns empty results of the right shape, dtype and device; used for fake and meta tensors
        backward: (ctx, *output gradients) → gradients of the inputs; None for an operator that autograd does not see
        setup_context: (ctx, inputs, output) → None, saves what backward needs
    """
    _LIBRARY.define(name + schema, tags=torch.Tag.pt2_compliant_tag)
    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"nanochat::{name}", shapes, lib=_LIBRARY)
    if backward is not None:
        torch.library.register_autograd(f"nanochat::{name}", backward, setup_context=setup_context, lib=_LIBRARY)
