"""Weights of 8 bits for decoding: half of bfloat16 to read for each token, a quarter of float32.

    model = quantize(model, "int8")      # a loaded GPT, changed in place: it decodes and evaluates, and never trains again

Each row of a matrix (an output channel) has a scale, its largest weight being ±127. Inputs are rounded in the same way as they come, with a
scale for each token. A product is then one of whole numbers, which is exact: what a row of a batch gets depends in no bit on the rows
beside it, nor on the threads. Embedding, taps and activations stay as they are. What it costs in bits per byte stands in dev/LOG.md.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanochat.errors import UserError
from nanochat.layers import Linear

WAYS = ("none", "int8")
LARGEST = 127


def rounded(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return (int8, scale) with x ≈ int8 · scale; scale (..., 1), float32, is max |x| / 127 over the last dimension.

    Where scale is 0 the int8 mean nothing, and NaN in x makes scale NaN: their product is right either way.
    """
    x = x.float()
    largest = x.abs().amax(dim=-1, keepdim=True)
    return (x / largest).mul_(LARGEST).round_().to(torch.int8), largest / LARGEST


def whole_product_twin(x: Tensor, weight: Tensor) -> Tensor:
    """Return x (M, K) @ weight (N, K)ᵀ of int8 matrices, in float32: exact up to K = 1,040, and to rounding beyond. The definition."""
    return F.linear(x.float(), weight.float())


@functools.cache
def cpu_multiplies_whole_numbers() -> bool:
    """True where torch's product of int8 matrices gives the right numbers on this CPU.

    Without VNNI (x86 before 2018 or so) oneDNN adds pairs of products in 16 bits, where they do not fit: seen with torch 2.15.
    """
    draw = torch.Generator().manual_seed(0)
    for M in (1, 8, 19):
        x, weight = (torch.randint(-LARGEST, LARGEST + 1, (rows, 256), generator=draw).to(torch.int8) for rows in (M, 40))
        x[0], weight[:4] = LARGEST, LARGEST
        try:
            if not torch.equal(torch._int_mm(x, weight.t()).float(), whole_product_twin(x, weight)):
                return False
        except (AttributeError, NotImplementedError, RuntimeError):  # a torch without it
            return False
    return True


def whole_product(x: Tensor, weight: Tensor) -> Tensor:
    """Return what `whole_product_twin` returns; as int32, exact and fast, on CPUs that can. Elsewhere the twin: right, but slow."""
    if x.device.type == "cpu" and x.shape[1] > 1 and cpu_multiplies_whole_numbers():  # torch 2.11 gives memory's noise for K = 1
        return torch._int_mm(x, weight.t())
    return whole_product_twin(x, weight)


class QuantLinear(nn.Module):
    """A matrix without bias as weight (N, K) int8 and scale (N,) float32: weight[n] · scale[n] is what it stands for.

    Applied to inputs that are rounded to 8 bits too. The result has the input's dtype, or `out` where that is set.
    """

    def __init__(self, fan_in: int, fan_out: int):
        super().__init__()
        self.register_buffer("weight", torch.zeros(fan_out, fan_in, dtype=torch.int8))
        self.register_buffer("scale", torch.zeros(fan_out))
        self.out: torch.dtype | None = None

    @classmethod
    @torch.no_grad()
    def of(cls, linear: nn.Linear) -> "QuantLinear":
        """Round a matrix to 8 bits."""
        with torch.device("meta"):
            new = cls(linear.in_features, linear.out_features)
        weight, scale = rounded(linear.weight)
        new.weight, new.scale = torch.where(scale > 0, weight, 0), scale.squeeze(-1)
        return new

    def forward(self, x: Tensor) -> Tensor:
        whole, scale = rounded(x.flatten(0, -2))
        y = whole_product(whole, self.weight).float().mul_(self.scale).mul_(scale)
        return y.to(self.out or x.dtype).unflatten(0, x.shape[:-1])

    def train(self, mode: bool = True) -> "QuantLinear":
        if mode:
            raise UserError("a model with int8 weights decodes and evaluates, but cannot be trained: load it without --quantize")
        return super().train(mode)


@torch.no_grad()
def quantize(model: nn.Module, way: str = "int8") -> nn.Module:
    """Give a GPT weights of 8 bits, in place, matrix by matrix, head included; returns it, in eval mode. way "none" changes nothing.

    Quantise float32 weights, as loaded, and cast the rest afterwards: rounding twice costs more. Raises UserError for another way.
    """
    if way not in WAYS:
        raise UserError(f"there is no quantisation {way!r}: it is one of {', '.join(WAYS)}")
    if way == "none":
        return model
    model.compute_dtype = model.dtype  # no longer that of the weights
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, Linear):
                setattr(module, name, QuantLinear.of(child).eval())
    model.lm_head.out = torch.float32  # what logits are wanted in
    return model.eval().requires_grad_(False)
