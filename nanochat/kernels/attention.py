"""Softmax attention over many positions, through the best path the device has. `attend_twin` is the definition.

    y = attend(q, k, v, causal=True)              # training, or a first chunk: T positions, each over itself and those before
    y = attend(q, k, v, causal=True, window=512)  # … over itself and the 511 before
    y = attend(q, k, v, mask=mask)                # what each query may see, as decoding says it

- Hopper GPUs, 16-bit: FlashAttention 3 where it is installed (a module `flash_attn_interface`), or, with NANOCHAT_FA3_HUB set to the
  name of a repository of kernels, through the package `kernels`. That one downloads, so it is done only where it is asked for.
- CPUs, causal: our kernels (kernels/native.py), which go over what is seen alone and keep no scores. A position's result depends
  neither on the rows beside it nor on what comes later.
- Everything else: PyTorch's scaled_dot_product_attention.
"""

import os
import sys
from collections.abc import Callable
from functools import cache, lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from nanochat.kernels import native

FLASH3, NATIVE, PYTORCH = "FlashAttention 3", "native", "PyTorch"


def attend_twin(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, mask: Tensor | None = None, window: int | None = None) -> Tensor:
    """Return softmax(q · k / √D) · v of shape (B, T, H, D), from q (B, T, H, D) and k, v (B, S, Hkv, D); the definition.

    H/Hkv neighbouring query heads share a key head. causal: position t sees keys up to t (T = S); window: only the last `window` of them.
    mask: bool, True where a query may see a key, and broadcasts to (B, H, T, S). Inside it is float32, or float64 for such inputs.
    """
    kept, wide = q.dtype, torch.promote_types(q.dtype, torch.float32)
    q, k, v = (x.transpose(1, 2).to(wide) for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    scores = q @ k.transpose(2, 3) * q.shape[-1] ** -0.5
    if causal:
        mask = causal_mask(q.shape[2], window, q.device)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return (scores.softmax(dim=-1) @ v).transpose(1, 2).to(kept)


def causal_mask(T: int, window: int | None, device: torch.device) -> Tensor:
    """Return what each of T positions may see, bool (T, T): itself and those before, `window` in all."""
    seen = torch.ones(T, T, dtype=torch.bool, device=device).tril()
    return seen if window is None else seen.triu(1 - window)


@lru_cache(maxsize=8)
def _kept_mask(T: int, window: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # evaluation may make it, and training use it
        return causal_mask(T, window, device)


# ---- FlashAttention 3

_flash_attn_func: Callable | None = None  # a global, since the compiler looks into what such a one holds


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
    own = getattr(sys.modules.get(_flash_attn_func.__module__), "_flash_attn_forward", None)
    if not isinstance(own, torch.library.CustomOpDef):  # an older one: the compiler cannot look into it, and has to go around
        _flash_attn_func = torch.compiler.disable(_flash_attn_func)
    return True


def _flash3(device: torch.device) -> bool:
    """Whether FlashAttention 3 is there for this device, a Hopper GPU; it is loaded at the first question."""
    return _load_flash3(device)


# What torch.compiler.assume_constant_result sets, without its import of the whole compiler: 3.7 s at every command's start.
_flash3._dynamo_marked_constant = True


# ---- CPUs


class _Native(torch.autograd.Function):
    """Keeps its inputs, the output, and of each query the logarithm of its sum of exponentials."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        y, sums = native.attention_forward(q, k, v, window)
        ctx.save_for_backward(q, k, v, y, sums)
        ctx.window = window
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        return *native.attention_backward(dy, *ctx.saved_tensors, ctx.window), None


# ---- the choice

def path(q: Tensor, *others: Tensor, causal: bool = True, mask: Tensor | None = None) -> str:
    """Return the name of the path that `attend` takes for q, and for k and v as given or like it: FLASH3, NATIVE or PYTORCH."""
    if mask is None and q.dtype in (torch.bfloat16, torch.float16) and q.shape[-1] <= 256 and _flash3(q.device):
        return FLASH3
    return NATIVE if causal and mask is None and native.ready(q, *others) else PYTORCH


def attend(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, mask: Tensor | None = None, window: int | None = None) -> Tensor:
    """Return what `attend_twin` does, up to rounding, in q's dtype. Any strides with a contiguous last dimension.

    Raises ValueError for causal attention with a mask or with other than T keys, and for a window that is not causal or below 1.
    """
    T, S = q.shape[1], k.shape[1]
    if causal and (T != S or mask is not None):
        raise ValueError(f"causal attention takes no mask, and a key for each query, not {S} for {T}")
    if window is not None and (not causal or window < 1):
        raise ValueError(f"a window is a part, of at least 1, of what causal attention sees, not {window}")
    if window is not None and window >= T:
        window = None
    way = path(q, k, v, causal=causal, mask=mask)
    if way == FLASH3:
        y = _flash_attn_func(q, k, v, causal=causal, window_size=(-1, -1) if window is None else (window - 1, 0))
        return y[0] if isinstance(y, tuple) else y  # older ones return the log of the sums too
    if way == NATIVE:
        return _Native.apply(q, k, v, window)
    if window is not None:
        causal, mask = False, (causal_mask if torch.compiler.is_compiling() else _kept_mask)(T, window, q.device)
    return F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask, is_causal=causal,
                                          enable_gqa=q.shape[2] != k.shape[2]).transpose(1, 2)
