"""What both mixers and the model are made of: a matrix without bias, and RMS norm without parameters."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Linear(nn.Linear):
    """A matrix without bias, kept in its own dtype (float32 in training) and applied in that of its input."""

    def __init__(self, fan_in: int, fan_out: int):
        super().__init__(fan_in, fan_out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


@dataclass
class Joined:
    """What `join` makes. whole: all matrices as one, behind each other in memory. sizes: how many rows of it are each one's."""

    whole: nn.Module
    sizes: list[int]


def project(h: Tensor, *layers: nn.Module) -> Iterable[Tensor]:
    """Return h (…, E) through each of these matrices, (…, N) each; in one product where `join` has put them together."""
    joined = getattr(layers[0], "joined", None)
    # elsewhere in memory once the model was moved or cast; and a gradient belongs to each matrix itself
    if joined is None or torch.is_grad_enabled() or joined.whole.weight.data_ptr() != layers[0].weight.data_ptr():
        return [layer(h) for layer in layers]
    return joined.whole(h).split(joined.sizes, dim=-1)


@torch.no_grad()
def join(layers: list[nn.Module]) -> None:
    """Let matrices of one input, all of one kind and dtype, share one memory, for `project` to apply in one product when it decodes.

    Names, shapes and numbers of their tensors stay; what is written into one later is seen by the product.
    """
    sizes = [layer.weight.shape[0] for layer in layers]
    with torch.device("meta"):
        whole = type(layers[0])(layers[0].weight.shape[1], sum(sizes)).requires_grad_(False)
    whole.load_state_dict({name: torch.cat([layer.state_dict()[name] for layer in layers]) for name in whole.state_dict()}, assign=True)
    for name, together in whole.state_dict().items():
        for layer, part in zip(layers, together.split(sizes)):
            getattr(layer, name).data = part
    layers[0].joined = Joined(whole, sizes)


def norm(x: Tensor) -> Tensor:
    """Divide x by its root mean square over the last dimension (PyTorch's default eps)."""
    return F.rms_norm(x, (x.shape[-1],))
