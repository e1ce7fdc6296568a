"""What both mixers and the model are made of: matrices without bias, each alone or several in one product."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Linear(nn.Linear):
    """A matrix without bias, kept in its own dtype (float32 in training) and applied in that of its input."""

    def __init__(self, fan_in: int, fan_out: int):
        super().__init__(fan_in, fan_out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))

ALIGNED = 16  # columns: rows of a product that begin at multiples of 32 bytes are read and written fast on GPUs


def joined(layers: Sequence[nn.Module]) -> nn.Module | None:
    """The one matrix that `join` made of these; None where it did not, or they were moved or cast since and lie elsewhere."""
    whole, = getattr(layers[0], "joined", [None])
    return whole if whole is not None and whole.weight.data_ptr() == layers[0].weight.data_ptr() else None


def together(h: Tensor, *layers: nn.Module) -> Tensor:
    """Return h (…, E) through all of these matrices in one product: (…, N), one's columns behind the other's, then padding.

    N is a multiple of ALIGNED and the padding zero. Each matrix stays a parameter of its own and gets its own gradient.
    """
    if not torch.is_grad_enabled() and (whole := joined(layers)) is not None:  # a gradient belongs to each matrix itself
        return whole(h)
    padding = -sum(layer.weight.shape[0] for layer in layers) % ALIGNED
    if not isinstance(layers[0], Linear):
        return F.pad(torch.cat([layer(h) for layer in layers], dim=-1), (0, padding))
    weights = [layer.weight.to(h.dtype) for layer in layers]
    return F.linear(h, torch.cat([*weights, weights[0].new_zeros(padding, h.shape[-1])] if padding else weights))


def project(h: Tensor, *layers: nn.Module) -> tuple[Tensor, ...]:
    """Return h (…, E) through each of these matrices, (…, N) each: columns of what `together` returns."""
    z, sizes = together(h, *layers), [layer.weight.shape[0] for layer in layers]
    return z.split([*sizes, z.shape[-1] - sum(sizes)], dim=-1)[:len(sizes)]


@torch.no_grad()
def join(layers: Sequence[nn.Module]) -> None:
    """Let matrices of one input, all of one kind and dtype, share one memory, for `together` to apply without a copy when it decodes.

    Names, shapes and numbers of their tensors stay; what is written into one later is seen by the product.
    """
    sizes = [layer.weight.shape[0] for layer in layers]
    padding = -sum(sizes) % ALIGNED
    with torch.device("meta"):
        whole = type(layers[0])(layers[0].weight.shape[1], sum(sizes) + padding).requires_grad_(False)
    own = {name: [layer.state_dict()[name] for layer in layers] for name in whole.state_dict()}
    whole.load_state_dict({name: torch.cat([*parts, parts[0].new_zeros(padding, *parts[0].shape[1:])]) for name, parts in own.items()},
                          assign=True)
    for name, all_rows in whole.state_dict().items():
        for layer, part in zip(layers, all_rows.split([*sizes, padding])):
            getattr(layer, name).data = part
    layers[0].joined = [whole]  # in a list: a submodule would stand in the state_dict
