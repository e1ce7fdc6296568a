"""Int8 weights for decoding: half the bytes of bfloat16 to read for each token, a quarter of float32's.

    model = quantize(model, "int8")      # a loaded GPT, changed in place; it can no longer be trained

Each row of a matrix (an output channel) has a scale, so that its largest weight is ±127. Inputs are quantised in the
same way, dynamically, with a scale for each token. The product is then one of integers, which is exact: the result of a
row does not depend, to the last bit, on other rows or on the number of threads. Embedding, taps and activations are not
quantised. dev/LOG.md says what it costs in bits per byte.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanochat.errors import UserError
from nanochat.layers import Linear

WAYS = ("none", "int8")
MAX_INT8 = 127


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise x (…, K) along its last dimension.

    Returns:
        int8 (…, K) and scale (…, 1) float32 with x ≈ int8 · scale, scale = max |x| / 127. Where scale is 0 or NaN the
        int8 may be anything; the product is still right.
    """
    x = x.float()
    largest = x.abs().amax(dim=-1, keepdim=True)
    return (x / largest).mul_(MAX_INT8).round_().to(torch.int8), largest / MAX_INT8


def int8_product_twin(x: Tensor, weight: Tensor) -> Tensor:
    """Return x (M, K) @ weight (N, K)ᵀ of int8 matrices, in float32. The definition: exact up to K = 1,040, rounded
    beyond."""
    return F.linear(x.float(), weight.float())


@functools.cache
def cpu_has_exact_int8_product() -> bool:
    """Return whether torch's int8 matrix product gives the right numbers on this CPU.

    Without VNNI (x86 before about 2018) oneDNN adds pairs of products in 16 bits, which overflow: seen with torch 2.15.
    """
    rng = torch.Generator().manual_seed(0)
    for M in (1, 8, 19):
        x, weight = (torch.randint(-MAX_INT8, MAX_INT8 + 1, (rows, 256), generator=rng).to(torch.int8)
                     for rows in (M, 40))
        x[0], weight[:4] = MAX_INT8, MAX_INT8
        try:
            if not torch.equal(torch._int_mm(x, weight.t()).float(), int8_product_twin(x, weight)):
                return False
        except (AttributeError, NotImplementedError, RuntimeError):  # a torch without it
            return False
    return True


def int8_product(x: Tensor, weight: Tensor) -> Tensor:
    """Return what `int8_product_twin` returns: as int32, exact and fast, on CPUs that can; elsewhere by the twin,
    slowly."""
    # K = 1: torch 2.11 returns uninitialised memory
    if x.device.type == "cpu" and x.shape[1] > 1 and cpu_has_exact_int8_product():
        return torch._int_mm(x, weight.t())
    return int8_product_twin(x, weight)


class QuantLinear(nn.Module):
    """A matrix without bias as weight (N, K) int8 and scale (N,) float32; row n of the matrix is weight[n] · scale[n].

    Inputs are quantised to int8 too. The result has the input's dtype, or `out` where that is set.
    """

    def __init__(self, fan_in: int, fan_out: int):
        super().__init__()
        self.register_buffer("weight", torch.zeros(fan_out, fan_in, dtype=torch.int8))
        self.register_buffer("scale", torch.zeros(fan_out))
        self.out: torch.dtype | None = None

    @classmethod
    @torch.no_grad()
    def of(cls, linear: nn.Linear) -> "QuantLinear":
        """Quantise a matrix to int8."""
        with torch.device("meta"):
            new = cls(linear.in_features, linear.out_features)
        weight, scale = quantize_rows(linear.weight)
        new.weight, new.scale = torch.where(scale > 0, weight, 0), scale.squeeze(-1)
        return new

    def forward(self, x: Tensor) -> Tensor:
        whole, scale = quantize_rows(x.flatten(0, -2))
        y = int8_product(whole, self.weight).float().mul_(self.scale).mul_(scale)
        return y.to(self.out or x.dtype).unflatten(0, x.shape[:-1])

    def train(self, mode: bool = True) -> "QuantLinear":
        if mode:
            raise UserError("a model with int8 weights decodes and evaluates, but cannot be trained: load it without "
                            "--quantize")
        return super().train(mode)


@torch.no_grad()
def quantize(model: nn.Module, way: str = "int8") -> nn.Module:
    """Quantise the matrices of a GPT in place, the head included.

    Do it on float32 weights, as loaded, and cast the rest afterwards: rounding twice loses more.

    Args:
        model: a GPT.
        way: one of WAYS; "none" changes nothing.

    Returns:
        The model, in eval mode.

    Raises:
        UserError: there is no such way.
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
