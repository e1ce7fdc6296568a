"""How an operation finds its kernel, how an operation becomes a torch operator, and how a Triton kernel is launched.

Each operation's package lists its implementations, once, in a dict BACKENDS from a name to a `Backend`:

    BACKENDS = {"cpu": Backend(_cpu, cpu_ready), "triton": Backend(_triton, triton_ready, "eager"),
                "torch": Backend(_pytorch)}

    def relu_squared(x):
        return backend("relu2", BACKENDS, x)(x)

Where nothing was chosen, the first that is ready is taken. A training run on a GPU measures them and chooses
(nanochat/kernels/choose.py); `--kernels=relu2:torch` and NANOCHAT_KERNELS choose by hand.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

LAUNCH_OPTIONS = {"enable_fp_fusion": True}  # of every Triton kernel

_LIBRARY = torch.library.Library("nanochat", "FRAGMENT")


# ---- the implementations of an operation


class Backend(NamedTuple):
    """One implementation of an operation.

    run: takes and returns what the operation's public function does, gradients included; in eager mode and under
        torch.compile, which either traces it or, where it calls an operator of `define_operator`, sees one operation
    ready: whether it can take these arguments of the public function; on what device they are, for example
    default: where it may be taken though nobody chose it: "always", in "eager" mode alone (under torch.compile the
        compiler's own fusion comes first), or "never"
    """

    run: Callable
    ready: Callable[..., bool] = lambda *args: True
    default: Literal["always", "eager", "never"] = "always"


class Trial(NamedTuple):
    """What the chooser runs to check and time the implementations of an operation.

    function: the operation's public function. twin: its definition, with the same arguments
    args: random ones; those that require a gradient get one
    asked: what the public function gives `backend`, where that is something else than args
    inside_blocks: whether it runs inside the model's blocks, which torch.compile may compile
    also: trials of the operation's further functions, such as a decode step, which are checked and not timed
    """

    function: Callable
    twin: Callable
    args: tuple
    asked: tuple | None = None
    inside_blocks: bool = True
    also: tuple["Trial", ...] = ()


@dataclass(frozen=True)
class TrainingShape:
    """The sizes that a model is trained with: rows B of T tokens a device, width E, query heads H and key/value heads G
    of width D, taps K, vocabulary V, the window of attention (None for all positions), and how many matrices (4·E, E)
    the optimizer updates at once on a device."""

    B: int
    T: int
    E: int
    H: int
    G: int
    D: int
    K: int
    V: int
    window: int | None = None
    matrices: int = 1


# (*sizes, grad=True, dtype=the training's) → random normal numbers on the device, a leaf that requires a gradient
Draw = Callable[..., Tensor]

_chosen: dict[str, str] = {}  # by operation; what was measured or asked for
_measured_rows: dict[str, tuple[int, int]] = {}  # by operation, where it was measured: rows and tokens of a batch
_left_out: dict[tuple[str, str], str] = {}  # (operation, backend) that failed a trial, and how


def set_choice(chosen: Mapping[str, str], left_out: Mapping[tuple[str, str], str] | None = None,
               measured_rows: Mapping[str, tuple[int, int]] | None = None) -> None:
    """Let every operation named in `chosen` run the implementation named there, from now on.

    Set it before anything is compiled: it is a constant for torch.compile, and changing it compiles anew.

    Args:
        chosen: a name of its BACKENDS for each operation; an implementation that is not ready for some arguments leaves
            them to the others
        left_out: implementations, by (operation, name), that are not taken unless they are chosen, and why
        measured_rows: (B, T) of the batches at which the chosen one was measured; none where it was asked for
    """
    for known, new in ((_chosen, chosen), (_left_out, left_out or {}), (_measured_rows, measured_rows or {})):
        known.clear()
        known.update(new)


def chosen_for(operation: str, B: int, T: int) -> bool:
    """Return whether the choice, if there is one, counts for batches of B rows of T tokens: where an implementation is
    good at the shape it was measured at and may be bad at others, as in attention."""
    return _measured_rows.get(operation, (B, T)) == (B, T)


def chosen_backend(operation: str, backends: Mapping[str, Backend], *args: Any) -> str:
    """Return the name of the implementation that the operation runs for these arguments.

    It is the chosen one if that is ready, else the default.
    """
    name = _chosen.get(operation)
    if name is not None and backends[name].ready(*args):
        return name
    return default_backend(operation, backends, *args)


def default_backend(operation: str, backends: Mapping[str, Backend], *args: Any, compiled: bool = False) -> str:
    """Return the name of the implementation that runs where nobody chose: the first of `backends` that is ready, was
    not left out and may be taken by default; else the last.

    compiled: say what would run under torch.compile, while it does not trace.
    """
    unwanted = ("never", "eager") if compiled or torch.compiler.is_compiling() else ("never",)
    for name, candidate in backends.items():
        if candidate.default not in unwanted and (operation, name) not in _left_out and candidate.ready(*args):
            return name
    return name


def backend(operation: str, backends: Mapping[str, Backend], *args: Any) -> Callable:
    """Return the function that runs the operation for these arguments: see `chosen_backend`."""
    return backends[chosen_backend(operation, backends, *args)].run


# ---- kernels


def triton_ready(x: Tensor, *others: Any) -> bool:
    """Whether Triton kernels can run on the device of x: a GPU, with Triton installed."""
    return x.is_cuda and _has_triton()


def constant(function: Callable) -> Callable:
    """Remember the results of a function, which are constants for torch.compile.

    It sets what torch.compiler.assume_constant_result does, without that one's import of the compiler, which takes 3.7
    s.
    """
    remembered = cache(function)

    def call(*args: Any) -> Any:
        return remembered(*args)
    call._dynamo_marked_constant = True
    call.cache_clear = remembered.cache_clear
    return call


@constant
def _has_triton() -> bool:
    return find_spec("triton") is not None


@constant
def has_triton(device: torch.device, least: tuple[int, int] = (8, 0)) -> bool:
    """Return whether Triton is installed and this is an NVIDIA GPU of compute capability `least` or later.

    8.0 is what Triton promises to support; torch.compile needs 7.0.
    """
    return (device.type == "cuda" and _has_triton() and torch.version.hip is None
            and torch.cuda.get_device_capability(device) >= least)


def state_fp_fusion() -> None:
    """State the same for the kernels that torch.compile writes, from now on. Call it before compiling."""
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Launch a Triton kernel on the device of its first tensor. All launches go through here.

    Floating-point fusion (a·b + c rounded once) is stated, since its default differs between versions of Triton; the
    kernels' error bounds and register counts were found with it.

    Args:
        kernel: a function under triton.jit
        grid: programs in each dimension
        args, options: those of the kernel; options may hold num_warps and the like
    """
    given = (getattr(arg, "base", arg) for arg in args)  # of a tensor descriptor, its tensor
    first = next(arg for arg in given if isinstance(arg, Tensor))
    with torch.cuda.device_of(first):  # Triton launches on the current device
        kernel[grid](*args, **LAUNCH_OPTIONS, **options)


@cache
def kernels_of(operation: str, file: str) -> ModuleType | None:
    """Return a file of an operation's package, triton or cpu; None where there is none, or Triton is not installed.

    Importing an operation must not import Triton, which takes seconds: call this where the kernel runs.
    """
    try:
        return import_module(f"nanochat.kernels.{operation}.{file}")
    except ImportError:
        return None


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
