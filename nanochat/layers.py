"""What both mixers and the model are made of: a matrix without bias, and RMS norm without parameters."""

import torch.nn.functional as F
from torch import Tensor, nn


class Linear(nn.Linear):
    """A matrix without bias, kept in its own dtype (float32 in training) and applied in that of its input."""

    def __init__(self, fan_in: int, fan_out: int):
        super().__init__(fan_in, fan_out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


def norm(x: Tensor) -> Tensor:
    """Divide x by its root mean square over the last dimension (PyTorch's default eps)."""
    return F.rms_norm(x, (x.shape[-1],))
