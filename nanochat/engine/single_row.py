"""The next token of a single row through a model that only decodes: the same numbers as the model's own forward, in half the operations.

What one conversation waits for is no arithmetic but the start of each operation and the reading of each matrix. Here a layer is five or six
kernels: every product takes the norm before it, and the activation or the sum behind it, along (kernels/fused_matvec).
"""

import torch.nn.functional as F
from torch import Tensor

from nanochat.attention import Attention
from nanochat.cache import Fixed
from nanochat.kernels.cross_entropy import softcap
from nanochat.kernels.decode_attention import append_and_attend
from nanochat.kernels.fused_matvec import fused_matvec
from nanochat.kernels.rms_norm import rms_norm
from nanochat.kernels.slc2 import slc2_step, split_columns
from nanochat.layers import Linear, joined


def _projections(mixer) -> Tensor | None:
    """The mixer's projections of its input as one matrix; None where they are not joined, or are no plain matrices."""
    whole = joined(mixer.projections())
    return whole.weight if isinstance(whole, Linear) else None


def can(model) -> bool:
    """Is the model one whose matrices are plain, in the dtype of the activations, and joined where they have one input?"""
    products = [model.lm_head, *(layer for block in model.transformer.h for layer in (block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj))]
    whole = [_projections(block.attn) for block in model.transformer.h]
    return all(isinstance(layer, Linear) and layer.weight.dtype == model.dtype for layer in products) and all(
        weight is not None and weight.dtype == model.dtype for weight in whole)


def one_token(model, ids: Tensor, memory: Fixed) -> Tensor:
    """Return float32 logits (1, 1, V) of ids (1, 1), which go on where the memory of one row stands. `can` holds for the model."""
    cos, sin = model.rope(memory.lengths[0] + 1)
    at = memory.positions(1)
    rope = cos[at], sin[at]
    x = rms_norm(F.embedding(ids, model.transformer.wte.weight).to(model.dtype))
    for block, layer in zip(model.transformer.h, memory.layers):
        mixer = block.attn
        z = fused_matvec(x, _projections(mixer), normed=True)
        if isinstance(mixer, Attention):
            widths = [part.weight.shape[0] for part in mixer.projections()]
            q, k, v = (part.unflatten(-1, (-1, mixer.head_width)) for part in z[..., :sum(widths)].split(widths, dim=-1))
            y = append_and_attend(q, k, v, rope, layer.k, layer.v, memory.at, mixer.window).flatten(2)
        else:
            branch, gate, A, alpha, _ = split_columns(z, **mixer.heads)
            y = slc2_step(branch, gate, A, alpha, mixer.conv1d.weight.squeeze(1).to(z.dtype), layer.past)
        x = fused_matvec(y, mixer.c_proj.weight, x)
        x = fused_matvec(fused_matvec(x, block.mlp.c_fc.weight, normed=True, activated=True), block.mlp.c_proj.weight, x)
    return softcap(fused_matvec(x, model.lm_head.weight, normed=True).float())
