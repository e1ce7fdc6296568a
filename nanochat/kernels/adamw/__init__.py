"""AdamW's update of parameters that lie one behind the other: Loshchilov and Hutter, arXiv 1711.05101.

weights: the flat parts of parameters, of n numbers together; gradient, exp_avg and exp_avg_sq (n,), all float32.
Written in place: weights, exp_avg, exp_avg_sq; gradient is left alone. All other numbers are 0-d tensors on the same
device, so that a GPU needs no word from the host. Where `ok` is False, nothing changes. There is no backward.

Implementations: "cpu", a kernel that makes one pass over memory, where the twin makes twelve; "torch", the twin. They
round each operation alike, so that on x86 the state has the same bits. A weight may differ by a unit in the last place
of its change, where torch's square root, which is MKL's, is not the nearest number; the kernel's is.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from nanochat.kernels.cpu import ready as cpu_ready
from nanochat.kernels.dispatch import Backend, Draw, TrainingShape, Trial, backend, kernels_of


class Factors(NamedTuple):
    """What a step of AdamW multiplies by.

    ok: 0-d bool, whether the step is done; scale: of the gradient; rate: the learning rate, 0 where it is not done
    weight: of the gradient in exp_avg; decay: of exp_avg_sq; of_root, of_mean: the bias corrections of 1/√exp_avg_sq
        and of exp_avg. In a step that is not done, those that leave the state as it is
    square_weight: of the squared gradient in exp_avg_sq; eps, weight_decay: floats
    """

    ok: Tensor
    scale: Tensor
    rate: Tensor
    weight: Tensor
    decay: Tensor
    of_root: Tensor
    of_mean: Tensor
    square_weight: float
    eps: float
    weight_decay: float


def adamw_twin_(weights: Sequence[Tensor], gradient: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, by: Factors) -> None:
    """Update the state and the weights. The definition."""
    gradient = torch.where(by.ok, gradient, 0).mul_(by.scale)
    mean = exp_avg.lerp_(gradient, by.weight)
    square = exp_avg_sq.mul_(by.decay).addcmul_(gradient, gradient, value=by.square_weight)
    root = torch.sqrt(square, out=gradient).mul_(by.of_root).add_(by.eps)
    change = torch.div(mean, root, out=root).mul_(by.of_mean).mul_(by.rate)
    if by.weight_decay:
        torch._foreach_mul_(list(weights), 1 - by.rate * by.weight_decay)
    torch._foreach_sub_(list(weights), change.split([view.numel() for view in weights]))


def _cpu(*args) -> None:
    kernels_of("adamw", "cpu").adamw_(*args)


def _cpu_takes(weights: Sequence[Tensor], *flat: Tensor) -> bool:
    return kernels_of("adamw", "cpu").built() and cpu_ready(*weights, *flat) and flat[0].dtype == torch.float32


BACKENDS = {"cpu": Backend(_cpu, _cpu_takes), "torch": Backend(adamw_twin_)}


def adamw_(weights: Sequence[Tensor], gradient: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, by: Factors) -> None:
    """Do what `adamw_twin_` does."""
    flat = gradient, exp_avg, exp_avg_sq
    backend("adamw", BACKENDS, weights, *flat)(weights, *flat, by)


def trial(shape: TrainingShape, draw: Draw) -> Trial:
    """Return what the chooser measures: the update of the embedding."""
    n = shape.V * shape.E
    tensors = [draw(n, grad=False, dtype=torch.float32) for _ in range(4)]
    numbers = torch.tensor([0.5, 0.1, 0.2, 0.95, 3.0, 2.0], device=tensors[0].device)
    by = Factors(torch.ones((), dtype=torch.bool, device=numbers.device), *numbers.unbind(), 0.05, 1e-10, 0.01)

    def updated(update, *given: Tensor) -> Tensor:
        weights, gradient, mean, square = (t.float().clone() for t in given)
        update([weights], gradient, mean, square.square_(), by)
        return torch.cat([weights, mean, square])

    return Trial(lambda *given: updated(adamw_, *given), lambda *given: updated(adamw_twin_, *given), tuple(tensors),
                 asked=([tensors[0]], *tensors[1:]), inside_blocks=False)
