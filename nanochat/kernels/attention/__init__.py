"""Softmax attention over many positions: training, evaluation and prefill. `attend_twin` is the definition.

    y = attend(q, k, v, causal=True)              # each of T positions sees itself and those before
    y = attend(q, k, v, causal=True, window=512)  # ... only the last 512 of these, itself included
    y = attend(q, k, v, mask=mask)                # a mask says what each query sees: prefill behind cached keys

q (B, T, H, D); k, v (B, S, G, D); y (B, T, H, D) in q's dtype. H/G neighbouring query heads share a key head. Strides
are free but for the last dimension. Written in place: nothing.

The choice, which `path` tells. At the batch size that a training run measured (nanochat/kernels/choose.py), what was
fastest there: flash3, or one of PyTorch's cudnn, flash and efficient, or what PyTorch itself takes. Otherwise:
- Hopper GPUs, 16-bit, D ≤ 256, no mask: FlashAttention 3 where it is installed (a module `flash_attn_interface`). With
  NANOCHAT_FA3_HUB set to the name of a kernel repository, the package `kernels` downloads it from there; nothing is
  downloaded unless that is set.
- CPUs, causal, float32 or bfloat16: the kernels of cpu.py, which compute nothing that the mask hides and store no
  scores. Saved for backward: q, k, v, y and the log-sum-exp of each query's scores, (B, H, T) in float32. A position's
  result depends neither on the other rows nor on later positions. They have no second derivative.
- Everything else, and CPUs under torch.compile: PyTorch's scaled_dot_product_attention; outside of a compiled step
  never by cuDNN, which would plan every shape anew (nanochat/kernels/sdpa.py).
"""

import os
import sys
from collections.abc import Callable
from functools import cache, lru_cache, partial

import torch
from torch import Tensor

from nanochat.kernels.cpu import ready as cpu_ready
from nanochat.kernels.dispatch import (
    Backend,
    Draw,
    TrainingShape,
    Trial,
    chosen_backend,
    chosen_for,
    default_backend,
    kernels_of,
)
from nanochat.kernels.sdpa import sdpa

FLASH3, NATIVE, PYTORCH = "flash3", "cpu", "torch"


def attend_twin(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, mask: Tensor | None = None,
                window: int | None = None) -> Tensor:
    """Return softmax(q · k / √D) · v. The definition; computes in float32, or in float64 for such inputs.

    Args:
        q, k, v: (B, T, H, D) and twice (B, S, G, D)
        causal: position t sees the keys up to t; T = S
        mask: bool, True where a query sees a key; broadcasts to (B, H, T, S)
        window: with causal, only the last `window` of these keys are seen
    """
    dtype, wide = q.dtype, torch.promote_types(q.dtype, torch.float32)
    q, k, v = (x.transpose(1, 2).to(wide) for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    scores = q @ k.transpose(2, 3) * q.shape[-1] ** -0.5
    if causal:
        mask = causal_mask(q.shape[2], window, q.device)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return (scores.softmax(dim=-1) @ v).transpose(1, 2).to(dtype)


def causal_mask(T: int, window: int | None, device: torch.device) -> Tensor:
    """Return the bool mask (T, T) of causal attention: True for the own position and those before, `window` in all."""
    seen = torch.ones(T, T, dtype=torch.bool, device=device).tril()
    return seen if window is None else seen.triu(1 - window)


@lru_cache(maxsize=8)
def _cached_mask(T: int, window: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # evaluation may make the mask that training uses later
        return causal_mask(T, window, device)


# ---- FlashAttention 3

_flash_attn_func: Callable | None = None  # a global, since the compiler traces through a function held by one


@cache
def _load_flash3(device: torch.device) -> bool:
    global _flash_attn_func
    if device.type != "cuda" or torch.version.hip is not None or torch.cuda.get_device_capability(device)[0] != 9:
        return False
    try:
        if hub := os.environ.get("NANOCHAT_FA3_HUB"):
            from kernels import get_kernel
            module = get_kernel(hub)
            module = getattr(module, "flash_attn_interface", module)
        else:
            import flash_attn_interface as module
    except ImportError:
        return False
    _flash_attn_func = module.flash_attn_func
    forward = getattr(sys.modules.get(_flash_attn_func.__module__), "_flash_attn_forward", None)
    if not isinstance(forward, torch.library.CustomOpDef):  # an older version, which the compiler cannot trace
        _flash_attn_func = torch.compiler.disable(_flash_attn_func)
    return True


def _flash3(device: torch.device) -> bool:
    """Whether FlashAttention 3 can be used on this device, a Hopper GPU. The first call loads it."""
    return _load_flash3(device)


# What torch.compiler.assume_constant_result sets, but without its import of the whole compiler, which takes 3.7 s.
_flash3._dynamo_marked_constant = True


def _run_flash3(q: Tensor, k: Tensor, v: Tensor, causal: bool, mask: None, window: int | None) -> Tensor:
    y = _flash_attn_func(q, k, v, causal=causal, window_size=(-1, -1) if window is None else (window - 1, 0))
    return y[0] if isinstance(y, tuple) else y  # older versions return the log-sum-exp too


def _flash3_takes(q: Tensor, k: Tensor, v: Tensor, causal: bool, mask: Tensor | None, window: int | None) -> bool:
    return mask is None and q.dtype in (torch.bfloat16, torch.float16) and q.shape[-1] <= 256 and _flash3(q.device)


# ---- others

def _run_cpu(q: Tensor, k: Tensor, v: Tensor, causal: bool, mask: None, window: int | None) -> Tensor:
    return kernels_of("attention", "cpu").attend(q, k, v, window)


def _run_flash(q: Tensor, k: Tensor, v: Tensor, causal: bool, mask: None, window: int | None) -> Tensor:
    """PyTorch's FlashAttention 2, in our layout; it knows windows and shared key heads itself."""
    left, right = (None, None) if window is None else (window - 1, 0)
    return torch.ops.aten._flash_attention_forward(
        q, k, v, None, None, q.shape[1], k.shape[1], 0.0, causal, False, window_size_left=left,
        window_size_right=right)[0]


def _run_sdpa(operator: str, q: Tensor, k: Tensor, v: Tensor, causal: bool, mask: None, window: None) -> Tensor:
    """One of the operators that scaled_dot_product_attention takes its pick of; `True` keeps the log-sum-exp for
    backward."""
    shared = q.shape[2] // k.shape[2]
    k, v = (x if shared == 1 else x.repeat_interleave(shared, dim=2) for x in (k, v))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return getattr(torch.ops.aten, operator)(q, k, v, None, True, 0.0, causal)[0].transpose(1, 2)


def _run_pytorch(q: Tensor, k: Tensor, v: Tensor, causal: bool, mask: Tensor | None, window: int | None) -> Tensor:
    if window is not None:
        T, causal = q.shape[1], False
        mask = (causal_mask if torch.compiler.is_compiling() else _cached_mask)(T, window, q.device)
    return sdpa(q, k, v, causal=causal, mask=mask)


def _on_cuda(q: Tensor, k: Tensor, v: Tensor, causal: bool, mask: Tensor | None, window: int | None) -> bool:
    return q.is_cuda and mask is None and window is None and q.shape[-1] % 8 == 0


def _flash_takes(q: Tensor, k: Tensor, v: Tensor, causal: bool, mask: Tensor | None, window: int | None) -> bool:
    half = q.dtype in (torch.bfloat16, torch.float16)
    return half and q.shape[-1] <= 256 and _on_cuda(q, k, v, causal, mask, None)


# ---- the choice

BACKENDS = {
    FLASH3: Backend(_run_flash3, _flash3_takes),
    NATIVE: Backend(_run_cpu, lambda q, k, v, causal, mask, window: causal and mask is None and cpu_ready(q, k, v)),
    "cudnn": Backend(partial(_run_sdpa, "_scaled_dot_product_cudnn_attention"), _on_cuda, "never"),
    "flash": Backend(_run_flash, _flash_takes, "never"),
    "efficient": Backend(partial(_run_sdpa, "_scaled_dot_product_efficient_attention"), _on_cuda, "never"),
    PYTORCH: Backend(_run_pytorch),
}


def _path(*args: Tensor | bool | int | None) -> str:
    # what is fastest for the rows of training may be slow for others: cuDNN plans every new shape for a second
    B, T = args[0].shape[:2]
    return (chosen_backend if chosen_for("attention", B, T) else default_backend)("attention", BACKENDS, *args)


def path(q: Tensor, k: Tensor | None = None, v: Tensor | None = None, *, causal: bool = True,
         mask: Tensor | None = None, window: int | None = None) -> str:
    """Return the name in BACKENDS that `attend` takes; k and v are like q where not given."""
    return _path(q, q if k is None else k, q if v is None else v, causal, mask, window)


def attend(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, mask: Tensor | None = None,
           window: int | None = None) -> Tensor:
    """Return what `attend_twin` returns for these arguments, up to rounding.

    Raises:
        ValueError: causal with a mask or with S ≠ T, or a window that is not causal or is below 1
    """
    T, S = q.shape[1], k.shape[1]
    if causal and (T != S or mask is not None):
        raise ValueError(f"causal attention takes no mask and as many keys as queries, not {S} keys for {T} queries")
    if window is not None and (not causal or window < 1):
        raise ValueError(f"a window needs causal attention and is at least 1, not {window}")
    if window is not None and window >= T:
        window = None
    args = q, k, v, causal, mask, window
    return BACKENDS[_path(*args)].run(*args)


def trial(shape: TrainingShape, draw: Draw) -> Trial:
    """Return what the chooser measures: causal attention, with the model's window where it has one."""
    q = draw(shape.B, shape.T, shape.H, shape.D)
    k, v = (draw(shape.B, shape.T, shape.G, shape.D) for _ in "kv")
    options = {"causal": True, "window": shape.window}
    window = None if shape.window is None or shape.window >= shape.T else shape.window
    return Trial(partial(attend, **options), partial(attend_twin, **options), (q, k, v),
                 asked=(q, k, v, True, None, window))
