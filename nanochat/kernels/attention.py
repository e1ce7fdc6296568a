"""Softmax attention over many positions, through the best path the device has. `attend_twin` is the definition.

    y = attend(q, k, v, causal=True)              # training, or a first chunk: T positions, each over itself and those before
    y = attend(q, k, v, causal=True, window=512)  # … over itself and the 511 before
    y = attend(q, k, v, mask=mask)                # what each query may see, as decoding says it

- Hopper GPUs, 16-bit: FlashAttention 3 where it is installed (a module `flash_attn_interface`), or, with NANOCHAT_FA3_HUB set to the
  name of a repository of kernels, through the package `kernels`. That one downloads, so it is done only where it is asked for.
- CPUs, training with a window of at most a quarter of a long row: blocks of queries, each over only the keys it sees (`_Blocks`).
- Everything else: PyTorch's scaled_dot_product_attention.
"""

import os
import sys
from collections.abc import Callable
from functools import cache, lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

FLASH3, BLOCKS, PYTORCH = "FlashAttention 3", "blocks", "PyTorch"


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


@torch.compiler.assume_constant_result
def _flash3(device: torch.device) -> bool:
    """Whether FlashAttention 3 is there for this device, a Hopper GPU; it is loaded at the first question."""
    return _load_flash3(device)


# ---- blocks of queries, for CPUs

GROUP = 1 << 18  # scores held at a time: 1 MB of float32, which stays in a core's cache


def _by_key_head(x: Tensor, G: int) -> Tensor:
    """Return (B·G, H/G, T, D) of x (B, T, H, D)."""
    return x.unflatten(2, (G, -1)).permute(0, 2, 3, 1, 4).flatten(0, 1)


def _back(x: Tensor, B: int) -> Tensor:
    """Return (B, T, H, D) of x (B·G, H/G, T, D)."""
    return x.unflatten(0, (B, -1)).flatten(1, 2).transpose(1, 2)


class _Walk:
    """The blocks of T queries with the keys each sees, and how many key heads of R query heads each go together."""

    def __init__(self, T: int, R: int, window: int | None):
        rows = min(T, 64 if T <= 256 else 128)
        width = T if window is None else min(T, rows + window - 1)
        self.window, self.heads = window, max(1, GROUP // (R * rows * width))
        self.size = self.heads * R * rows * width
        self.blocks = [(i, min(i + rows, T), 0 if window is None else max(0, i - window + 1)) for i in range(0, T, rows)]
        self.above = torch.full((rows, rows), float("-inf")).triu(1)

    def probabilities(self, q: Tensor, k: Tensor, block: tuple[int, int, int], room: Tensor) -> Tensor:
        """Return, in `room`, what queries q (N, R·n, D) of a block, scaled, give of themselves to keys k (N, T, D): (N, R·n, keys)."""
        i, j, first = block
        n = j - i
        p = room[:q.shape[0] * q.shape[1] * (j - first)].view(*q.shape[:2], j - first)
        torch.bmm(q, k[:, first:j].transpose(1, 2), out=p)
        by_head = p.unflatten(1, (-1, n))
        by_head[..., -n:] += self.above[:n, :n]
        if self.window is not None:  # what is too old lies below a diagonal of the first n keys
            by_head[..., :n].masked_fill_(torch.ones(n, n, dtype=torch.bool).tril(i - self.window - first), float("-inf"))
        return torch.softmax(p, -1, out=p)


class _Blocks(torch.autograd.Function):
    """Causal attention of q (B, T, H, D) and k, v (B, T, Hkv, D), float32 or bfloat16, any strides, on a CPU; keeps only its inputs.

    Scores, probabilities and sums are float32. In bfloat16 the probabilities are rounded before they meet v, and their gradients before
    they meet k, as PyTorch does: those products then run twice as fast. Held besides: 3 MB, and float32 keys, values and their gradients
    of the heads at work.
    """

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.window = window
        (B, T, H, D), G = q.shape, k.shape[2]
        walk = _Walk(T, H // G, window)
        qs, ks, vs = (_by_key_head(x, G) for x in (q, k, v))
        y, room = torch.empty_like(qs, memory_format=torch.contiguous_format), torch.empty(walk.size)
        for y_part, q_part, k_part, v_part in zip(*(x.split(walk.heads) for x in (y, qs, ks, vs))):
            scaled, keys, values = q_part.float() * D ** -0.5, k_part[:, 0].float(), v_part[:, 0]
            for block in walk.blocks:
                i, j, first = block
                p = walk.probabilities(scaled[:, :, i:j].flatten(1, 2), keys, block, room)
                y_part[:, :, i:j] = torch.bmm(p.to(q.dtype), values[:, first:j]).unflatten(1, (-1, j - i))
        return _back(y, B)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v = ctx.saved_tensors
        (B, T, H, D), G = q.shape, k.shape[2]
        walk, scale = _Walk(T, H // G, ctx.window), D ** -0.5
        dys, qs, ks, vs = (_by_key_head(x, G) for x in (dy, q, k, v))
        dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (qs, ks, vs))
        room, other_room = torch.empty(2, walk.size)
        parts = zip(*(x.split(walk.heads) for x in (dq, dk, dv, dys, qs, ks, vs)))
        for dq_part, dk_part, dv_part, dy_part, q_part, k_part, v_part in parts:
            scaled, dy_part = q_part.float() * scale, dy_part.float()
            keys, values = k_part[:, 0].float(), v_part[:, 0].float()
            dkeys, dvalues = torch.zeros(2, *keys.shape)
            for block in walk.blocks:
                i, j, first = block
                q_block, dy_block = scaled[:, :, i:j].flatten(1, 2), dy_part[:, :, i:j].flatten(1, 2)
                p = walk.probabilities(q_block, keys, block, room)
                dvalues[:, first:j].baddbmm_(p.transpose(1, 2), dy_block)
                ds = torch.bmm(dy_block, values[:, first:j].transpose(1, 2), out=other_room[:p.numel()].view(p.shape))
                torch._softmax_backward_data(ds, p, -1, torch.float32, grad_input=ds)
                dkeys[:, first:j].baddbmm_(ds.transpose(1, 2), q_block)
                dq_part[:, :, i:j] = torch.bmm((ds * scale).to(q.dtype), k_part[:, 0, first:j]).unflatten(1, (-1, j - i))
            dk_part[:, 0], dv_part[:, 0] = dkeys, dvalues
        return _back(dq, B), _back(dk, B), _back(dv, B), None


# ---- the choice

def path(q: Tensor, *, causal: bool = True, mask: Tensor | None = None, window: int | None = None) -> str:
    """Return the name of the path that `attend` takes for such a q: FLASH3, BLOCKS or PYTORCH."""
    if mask is None and q.dtype in (torch.bfloat16, torch.float16) and q.shape[-1] <= 256 and _flash3(q.device):
        return FLASH3
    if (causal and window is not None and q.shape[1] >= max(512, 4 * window) and q.device.type == "cpu" and q.requires_grad
            and torch.is_grad_enabled() and q.dtype in (torch.bfloat16, torch.float32) and not torch.compiler.is_compiling()):
        return BLOCKS
    return PYTORCH


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
    way = path(q, causal=causal, mask=mask, window=window)
    if way == FLASH3:
        y = _flash_attn_func(q, k, v, causal=causal, window_size=(-1, -1) if window is None else (window - 1, 0))
        return y[0] if isinstance(y, tuple) else y  # older ones return the log of the sums too
    if way == BLOCKS:
        return _Blocks.apply(q, k, v, window)
    if window is not None:
        causal, mask = False, (causal_mask if torch.compiler.is_compiling() else _kept_mask)(T, window, q.device)
    return F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask, is_causal=causal,
                                          enable_gqa=q.shape[2] != k.shape[2]).transpose(1, 2)
