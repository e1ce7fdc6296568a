"""PyTorch's scaled_dot_product_attention in our layout, and which of its backends runs.

On Hopper and Blackwell PyTorch prefers cuDNN, which plans every new shape: about half a second forward, and as much
backward. That is well spent on the one shape of a compiled training step, and on no other. So a call that is not being
compiled takes flash, or with a mask memory-efficient attention: neither plans.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def sdpa(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, mask: Tensor | None = None) -> Tensor:
    """Return softmax(q · k / √D) · v, (B, T, H, D), for q (B, T, H, D) and k, v (B, S, G, D).

    Args:
        causal: position t sees the keys up to t; T = S
        mask: bool, True where a query sees a key; broadcasts to (B, H, T, S)
    """
    if torch.compiler.is_compiling() or not q.is_cuda:
        return _sdpa(q, k, v, causal, mask)
    allowed = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)  # a backward pass is of the same backend as its forward pass
    try:
        return _sdpa(q, k, v, causal, mask)
    finally:
        torch.backends.cuda.enable_cudnn_sdp(allowed)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, causal: bool, mask: Tensor | None) -> Tensor:
    return F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask,
                                          is_causal=causal, enable_gqa=q.shape[2] != k.shape[2]).transpose(1, 2)
