"""AdamW's update: the CPU kernel and the operation against the twin."""

import pytest
import torch

from nanochat.kernels import cpu as cpu_kernels
from nanochat.kernels.adamw import BACKENDS, Factors, adamw_, adamw_twin_, cpu, trial
from nanochat.kernels.dispatch import TrainingShape, chosen_backend

built = pytest.mark.skipif(not cpu.built(), reason="this cpukernels is not built here; dev/setup.sh builds it")


def factors(ok: bool = True, weight: float = 0.2, weight_decay: float = 0.1) -> Factors:
    numbers = (0.37, 0.013, weight, 0.995, 3.1, 2.3) if ok else (0.0, 0.0, 0.0, 1.0, 1.0, 1.0)
    return Factors(torch.tensor(ok), *torch.tensor(numbers).unbind(), 0.005, 1e-10, weight_decay)


def state(sizes: list[int]) -> tuple[list[torch.Tensor], ...]:
    """Return (weights, gradient, exp_avg, exp_avg_sq); the weights lie apart, with NaN between them."""
    dice, n = torch.Generator().manual_seed(3), sum(sizes)
    weights = []
    for size in sizes:
        room = torch.full((size + 2,), float("nan"))
        weights.append(room[1:-1].copy_(torch.randn(size, generator=dice)))
    gradient, mean = torch.randn(2, n, generator=dice)
    return weights, gradient, mean, torch.rand(n, generator=dice)


@built
@pytest.mark.parametrize("sizes", [[1], [5, 4096, 3], [4097], [0, 40_000]])
@pytest.mark.parametrize("weight, weight_decay", [(0.2, 0.1), (0.7, 0.0)])
@pytest.mark.parametrize("threads", [1, 2])
def test_the_kernel_is_the_twin(sizes, weight, weight_decay, threads):
    by = factors(weight=weight, weight_decay=weight_decay)
    ours, twin = state(sizes), state(sizes)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        cpu.adamw_(*ours, by)
    finally:
        torch.set_num_threads(before)
    adamw_twin_(*twin, by)
    assert torch.equal(ours[1], state(sizes)[1])  # the gradient is left alone
    # a unit or two in the last place, where a compiler fuses operations and where torch's square root, which is MKL's
    # on some machines, is not the nearest number
    torch.testing.assert_close(ours[2:], twin[2:], rtol=3e-7, atol=1e-7)
    for got, expected in zip(ours[0], twin[0]):
        torch.testing.assert_close(got, expected, rtol=3e-7, atol=3e-7)
        assert got._base[[0, -1]].isnan().all()


@pytest.mark.parametrize("update", [adamw_, adamw_twin_])
def test_a_step_that_is_not_done_changes_nothing(update):
    weights, gradient, mean, square = state([7, 300])
    gradient[5] = float("nan")
    update(weights, gradient, mean, square, factors(ok=False))
    for got, expected in zip((*weights, mean, square), (*state([7, 300])[0], *state([7, 300])[2:])):
        assert torch.equal(got, expected)


def test_the_operation_takes_the_kernel_where_it_can(monkeypatch):
    weights, *flat = state([7, 9])
    assert chosen_backend("adamw", BACKENDS, weights, *flat) == ("cpu" if cpu.built() else "torch")
    assert chosen_backend("adamw", BACKENDS, [weights[0].double()], *flat) == "torch"
    monkeypatch.setattr(cpu_kernels, "cpukernels", None)
    assert chosen_backend("adamw", BACKENDS, weights, *flat) == "torch"


@built
def test_what_does_not_fit_together_is_refused():
    weights, gradient, mean, square = state([7, 9])
    for wrong in ((weights[:1], gradient, mean, square), (weights, gradient.double(), mean, square),
                  (weights, gradient, mean, torch.rand(32)[::2])):
        with pytest.raises(ValueError, match="as many numbers as the weights"):
            cpu.adamw_(*wrong, factors())


def test_what_the_chooser_measures_runs():
    def draw(*sizes: int, grad: bool = True, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(sizes, dtype=dtype, generator=torch.Generator().manual_seed(0))

    given = trial(TrainingShape(B=1, T=2, E=4, H=1, G=1, D=4, K=3, V=5), draw)
    torch.testing.assert_close(given.function(*given.args), given.twin(*given.args))
