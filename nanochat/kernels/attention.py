"""Softmax attention over many positions, through the best path the device has. `attend_twin` is the definition.

    y = attend(q, k, v, causal=True)              # training, or a first chunk: T positions, each over itself and those before
    y = attend(q, k, v, causal=True, window=512)  # … over itself and the 511 before
    y = attend(q, k, v, mask=mask)                # what each query may see, as decoding says it

On Hopper GPUs FlashAttention 3 is taken where it is installed (a module `flash_attn_interface`), or, with NANOCHAT_FA3_HUB set to the
name of a repository of kernels (and the package `kernels` installed), from there; the latter downloads, so it is done only when asked for.
"""

import os
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor


def attend_twin(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, mask: Tensor | None = None, window: int | None = None) -> Tensor:
    """Return softmax(q · k / √D) · v of shape (B, T, H, D), from q (B, T, H, D) and k, v (B, S, Hkv, D); the definition.

    Query heads h·H/Hkv to (h+1)·H/Hkv − 1 share key head h. causal: position t sees keys up to t (T = S); window: the last `window` of
    them. mask: bool, True where a query may see a key, and broadcasts to (B, H, T, S). Inside it is float32, or float64 for such inputs.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    q, k, v = (x.transpose(1, 2).to(wide) for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    scores = q @ k.transpose(2, 3) * q.shape[-1] ** -0.5
    if causal:
        mask = causal_mask(q.shape[2], window, q.device)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return (scores.softmax(dim=-1) @ v).transpose(1, 2)


@cache
def causal_mask(T: int, window: int | None, device: torch.device) -> Tensor:
    """Return what each of T positions may see, bool (T, T): itself and those before, `window` in all."""
    with torch.inference_mode(False):  # evaluation may make it, and training use it
        seen = torch.ones(T, T, dtype=torch.bool, device=device).tril()
        return seen if window is None else seen.triu(1 - window)


@cache
def _flash3():
    """FlashAttention 3's `flash_attn_func`, or None where it is not installed."""
    try:
        if hub := os.environ.get("NANOCHAT_FA3_HUB"):
            from kernels import get_kernel
            module = get_kernel(hub)
            return getattr(module, "flash_attn_interface", module).flash_attn_func
        from flash_attn_interface import flash_attn_func
        return flash_attn_func
    except ImportError:
        return None


@cache
def _hopper(device: torch.device) -> bool:
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device)[0] == 9


def path(q: Tensor, *, mask: Tensor | None = None) -> str:
    """Return the name of the path that `attend` takes for such a q: "FlashAttention 3", or "PyTorch"."""
    flash = mask is None and q.dtype in (torch.bfloat16, torch.float16) and q.shape[-1] <= 256 and _hopper(q.device) and _flash3()
    return "FlashAttention 3" if flash else "PyTorch"


def attend(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, mask: Tensor | None = None, window: int | None = None) -> Tensor:
    """Return what `attend_twin` does, up to rounding, in q's dtype. Any strides with a contiguous last dimension.

    Raises ValueError for causal with as many keys as there are not queries, for a window that is not causal, and for causal with a mask.
    """
    T, S = q.shape[1], k.shape[1]
    if causal and (T != S or mask is not None) or window is not None and (not causal or window < 1):
        raise ValueError(f"causal attention takes no mask and one key a query, not {S} for {T}; a window is causal, and at least 1")
    if window is not None and window >= T:
        window = None
    if path(q, mask=mask) == "FlashAttention 3":
        y = _flash3()(q, k, v, causal=causal, window_size=(-1 if window is None else window - 1, 0 if window is not None else -1))
        return y[0] if isinstance(y, tuple) else y  # older ones return the log of the sums too
    if window is not None:
        causal, mask = False, causal_mask(T, window, q.device)
    return F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask, is_causal=causal,
                                          enable_gqa=q.shape[2] != k.shape[2]).transpose(1, 2)
