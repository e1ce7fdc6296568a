"""Matrices without bias, each applied alone or several in one product."""

import math
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


def is_plain(layer: nn.Module | None, dtype: torch.dtype) -> bool:
    """Whether a layer is a matrix, not quantised, in `dtype`."""
    return isinstance(layer, Linear) and layer.weight.dtype == dtype


@torch.no_grad()
def init_linear(layer: nn.Linear, zero: bool = False) -> None:
    """Draw a matrix normal with std min(1, √(fan_out/fan_in))/√fan_in, as published; or set it to zero."""
    if zero:
        layer.weight.zero_()
    else:
        fan_out, fan_in = layer.weight.shape
        layer.weight.normal_(std=min(1.0, math.sqrt(fan_out / fan_in)) / math.sqrt(fan_in))


ALIGNED = 16  # columns: rows of a product that begin at multiples of 32 bytes are read and written fast on GPUs


def joined(layers: Sequence[nn.Module]) -> nn.Module | None:
    """Return the one matrix that `join` made of these layers.

    None where `join` was not called, or the layers were moved or cast since, so that their memory is elsewhere.
    """
    whole, = getattr(layers[0], "joined", [None])
    return whole if whole is not None and whole.weight.data_ptr() == layers[0].weight.data_ptr() else None


def together(h: Tensor, *layers: nn.Module) -> Tensor:
    """Apply several matrices to h (…, E) in one product.

    Each matrix stays a parameter of its own and gets its own gradient.

    Returns:
        (…, N): the columns of one matrix behind those of the other, then zeros up to a multiple of ALIGNED.
    """
    # with gradients, each matrix itself has to be in the product
    if not torch.is_grad_enabled() and (whole := joined(layers)) is not None:
        return whole(h)
    padding = -sum(layer.weight.shape[0] for layer in layers) % ALIGNED
    if not isinstance(layers[0], Linear):
        return F.pad(torch.cat([layer(h) for layer in layers], dim=-1), (0, padding))
    weights = [layer.weight.to(h.dtype) for layer in layers]
    return F.linear(h, torch.cat([*weights, weights[0].new_zeros(padding, h.shape[-1])] if padding else weights))


def columns_of(z: Tensor, *layers: nn.Module) -> tuple[Tensor, ...]:
    """Cut what `together` returned into the columns of each of its layers, (…, N_i) each, without the padding."""
    sizes = [layer.weight.shape[0] for layer in layers]
    return z.split([*sizes, z.shape[-1] - sum(sizes)], dim=-1)[:len(sizes)]


def project(h: Tensor, *layers: nn.Module) -> tuple[Tensor, ...]:
    """Apply several matrices to h (…, E) in one product; return the result of each, (…, N_i)."""
    return columns_of(together(h, *layers), *layers)


@torch.no_grad()
def join(layers: Sequence[nn.Module]) -> None:
    """Make matrices of one input share one memory, so that `together` applies them without a copy in decoding.

    The layers are of one kind and dtype. Names, shapes and numbers of their tensors stay, and what is written into one
    later is seen by the product.
    """
    sizes = [layer.weight.shape[0] for layer in layers]
    padding = -sum(sizes) % ALIGNED
    with torch.device("meta"):
        whole = type(layers[0])(layers[0].weight.shape[1], sum(sizes) + padding).requires_grad_(False)
    own = {name: [layer.state_dict()[name] for layer in layers] for name in whole.state_dict()}
    whole.load_state_dict({name: torch.cat([*parts, parts[0].new_zeros(padding, *parts[0].shape[1:])])
                           for name, parts in own.items()}, assign=True)
    for name, all_rows in whole.state_dict().items():
        for layer, part in zip(layers, all_rows.split([*sizes, padding])):
            getattr(layer, name).data = part
    layers[0].joined = [whole]  # in a list: a submodule would be in the state_dict
