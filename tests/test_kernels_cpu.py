"""The CPU kernels of slc2, cross_entropy, rms_norm, rope_norm and relu2 against their twins and float64.

Also covers kernels/cpu.py and dispatch.py, and the operations rms_norm and rope_norm as a whole; the CPU kernels of
attention are in tests/test_kernel_attention_cpu.py. No result may be less exact than the twin's.
"""

import pytest
import torch
from torch import Tensor

from nanochat.kernels import cpu, dispatch, relu2
from nanochat.kernels.cross_entropy import head_loss_twin
from nanochat.kernels.cross_entropy.cpu import softcapped_cross_entropy_
from nanochat.kernels.relu2 import cpu as relu2_cpu
from nanochat.kernels.relu2 import relu_squared, relu_squared_twin
from nanochat.kernels.rms_norm import cpu as rms_norm_cpu
from nanochat.kernels.rms_norm import rms_norm, rms_norm_twin
from nanochat.kernels.rope_norm import cpu as rope_norm_cpu
from nanochat.kernels.rope_norm import rope_norm, rope_norm_twin
from nanochat.kernels.slc2 import causal_conv_twin, gated_input
from nanochat.kernels.slc2 import cpu as slc2_cpu

pytestmark = pytest.mark.skipif(cpu.cpukernels is None, reason="cpukernels is not built here; dev/setup.sh builds it")
both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def poison(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.full(shape, float("nan"), dtype=dtype)


def strided(t: Tensor, extra: int = 3) -> Tensor:
    """Return t as columns of a wider tensor that is NaN elsewhere."""
    wide = poison(*t.shape[:-1], t.shape[-1] + extra, dtype=t.dtype)
    view = wide[..., 1:1 + t.shape[-1]]
    view.copy_(t)
    return view


def no_worse(ours: Tensor, twin: Tensor, exact: Tensor, name: str = "", size: Tensor | None = None) -> None:
    """Check our error against float64: at most 1.5 times the twin's in the mean, and 3 times in the maximum.

    Some noise is allowed: a few roundings of the largest number, or of the largest term, `size`, where terms cancel.
    """
    if not exact.numel():
        return
    error, allowed = (ours.double() - exact).abs(), (twin.double() - exact).abs()
    rounding = torch.finfo(ours.dtype).eps * (exact if size is None else size).abs().max()
    noise = 4 * rounding / exact.numel() ** 0.5
    assert error.mean() <= 1.5 * allowed.mean() + noise, f"{name}: {error.mean()} beside {allowed.mean()} in the mean"
    assert error.max() <= 3 * allowed.max() + 4 * rounding, f"{name}: {error.max()} beside {allowed.max()}"


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(params=[1, 2], ids=["one thread", "two threads"])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def with_threads(n: int, make):
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        return make()
    finally:
        torch.set_num_threads(before)


def same_bits(a, b) -> bool:
    return all(torch.equal(x.view(torch.uint8), y.view(torch.uint8)) for x, y in zip(a, b))


# ---- cross-entropy


def loss_inputs(n: int, V: int, dtype: torch.dtype, scale: float = 8.0):
    z = (scale * torch.randn(n, V)).to(dtype)
    targets = torch.randint(0, V, (n,))
    targets[::5] = -1
    return z, targets, torch.rand(n) * 2


def loss_and_gradient(z: Tensor, targets: Tensor, factors: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the losses and the gradient by the twin with an identity for the weight, in the given dtype."""
    leaf = z.to(dtype, copy=True).requires_grad_()
    capped = 15 * torch.tanh((leaf if dtype == torch.float64 else leaf.float()) / 15)
    losses = torch.nn.functional.cross_entropy(capped, targets, ignore_index=-1, reduction="none")
    (losses * factors).sum().backward()
    return losses.detach(), leaf.grad


@both_dtypes
@pytest.mark.parametrize("n, V", [(1, 1), (7, 13), (33, 515), (64, 2048), (3, 65536)])
@pytest.mark.parametrize("scale", [0.5, 8.0, 60.0])
def test_softcapped_is_as_exact_as_its_twin(dtype, n, V, scale, threads):
    z, targets, factors = loss_inputs(n, V, dtype, scale)
    exact, exact_grad = loss_and_gradient(z, targets, factors.double(), torch.float64)
    twin, twin_grad = loss_and_gradient(z, targets, factors, dtype)
    ours, losses = strided(z), poison(n)
    softcapped_cross_entropy_(ours, targets, factors, losses)
    no_worse(losses, twin, exact, "loss")
    no_worse(ours, twin_grad, exact_grad, "gradient")
    assert not losses[targets == -1].any() and not ours[targets == -1].any()
    assert ours._base.isnan().sum() == 3 * n  # nothing beside the rows was written


def test_softcapped_is_the_head_loss():
    z, targets, _ = loss_inputs(9, 31, torch.float32)
    losses = poison(9)
    softcapped_cross_entropy_(z, targets, None, losses, want_grad=False)
    torch.testing.assert_close(losses, head_loss_twin(z, torch.eye(31), targets, "none"))


@both_dtypes
def test_softcapped_leaves_the_logits_where_no_gradient_is_wanted(dtype):
    z, targets, factors = loss_inputs(9, 700, dtype)
    kept, losses, again = z.clone(), poison(9), poison(9)
    softcapped_cross_entropy_(z, targets, None, losses, want_grad=False)
    assert same_bits([z], [kept])
    softcapped_cross_entropy_(z, targets, factors, again)
    assert same_bits([losses], [again])  # the factors are the gradient's alone


def test_softcapped_of_infinite_logits_is_finite_and_of_nan_is_nan():
    z = torch.tensor([[float("inf"), 1.0, float("-inf")], [float("nan"), 1.0, 2.0], [3e38, -3e38, 0.0]])
    losses = poison(3)
    softcapped_cross_entropy_(z, torch.tensor([1, 1, 1]), None, losses)
    assert losses[0].isfinite() and z[0].isfinite().all() and losses[1].isnan() and z[1].isnan().all()
    assert losses[2].isfinite() and z[2].isfinite().all()


@pytest.mark.parametrize("wrong", [-2, 13, 1 << 40])
def test_softcapped_refuses_a_target_outside_the_vocabulary_and_writes_nothing(wrong):
    z, targets, factors = loss_inputs(7, 13, torch.float32)
    kept, losses = z.clone(), poison(7)
    targets[6] = wrong
    with pytest.raises(IndexError, match="13 tokens"):
        softcapped_cross_entropy_(z, targets, factors, losses)
    assert torch.equal(z, kept) and losses.isnan().all()


# ---- SLC2


def slc2_inputs(b: int, T: int, H: int, D: int, K: int, dtype: torch.dtype, past: bool, joined: bool = True):
    """Return x, B, A, alpha, which are columns of one tensor or contiguous, and taps and past."""
    E = H * D
    z = (1.5 * torch.randn(b, T, 2 * E + D + H + 5)).to(dtype)
    parts = z.split([E, E, D, H, 5], dim=-1)[:4]
    return (*(parts if joined else [p.contiguous() for p in parts]), torch.randn(E, K).to(dtype),
            torch.randn(b, K - 1, E).to(dtype) if past else None)


def slc2_twin(x: Tensor, B: Tensor, A: Tensor, alpha: Tensor, taps: Tensor, past: Tensor | None) -> Tensor:
    return B * torch.nn.functional.silu(causal_conv_twin(gated_input(x, A, alpha), taps, past))


def slc2_gradients(inputs, dy: Tensor, dtype: torch.dtype) -> list[Tensor]:
    leaves = [None if t is None else t.detach().to(dtype, copy=True).requires_grad_() for t in inputs]
    slc2_twin(*leaves).backward(dy.to(dtype))
    return [t.grad for t in leaves if t is not None]


def cpu_gradients(inputs, dy: Tensor) -> list[Tensor]:
    """Return dx, dB, dA, dalpha, dtaps and dpast; the first four are columns of one tensor that was NaN."""
    x, B, A, alpha = inputs[:4]
    widths = [t.shape[-1] for t in (x, B, A, alpha)]
    buffer = poison(*x.shape[:2], sum(widths) + 4, dtype=x.dtype)
    outputs = buffer.split([*widths, 4], dim=-1)
    dtaps, dpast = slc2_cpu.backward(dy, *inputs, *outputs[:4])
    assert outputs[4].isnan().all()
    return [*outputs[:4], dtaps] + ([] if dpast is None else [dpast])


SHAPES = [(1, 1, 1, 1, 1), (2, 1, 3, 5, 3), (3, 2, 2, 7, 4), (2, 65, 2, 20, 3), (1, 130, 3, 33, 2), (2, 200, 2, 64, 4),
          (1, 70, 2, 16, 6)]


@both_dtypes
@pytest.mark.parametrize("past", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_slc2_is_as_exact_as_its_twin(dtype, shape, past, threads):
    inputs = slc2_inputs(*shape, dtype, past)
    dy = strided(torch.randn(inputs[0].shape).to(dtype))
    exact = slc2_twin(*(None if t is None else t.double() for t in inputs))
    no_worse(slc2_cpu.forward(*inputs), slc2_twin(*inputs), exact, "y")
    names = ["dx", "dB", "dA", "dalpha", "dtaps", "dpast"]
    ours = cpu_gradients(inputs, dy)
    twin, exact = (slc2_gradients(inputs, dy, kind) for kind in (dtype, torch.float64))
    assert len(ours) == len(exact) == 5 + past
    for each in zip(ours, twin, exact, names):
        no_worse(*each)


@both_dtypes
def test_slc2_takes_taps_and_past_of_another_dtype(dtype):
    x, B, A, alpha, taps, past = slc2_inputs(2, 9, 2, 6, 3, dtype, True)
    other = torch.float32 if dtype == torch.bfloat16 else torch.bfloat16
    taps, past = taps.to(other), past.to(other)
    exact = slc2_twin(*(t.double() for t in (x, B, A, alpha, taps, past)))
    torch.testing.assert_close(slc2_cpu.forward(x, B, A, alpha, taps, past).double(), exact, rtol=1e-2, atol=1e-2)
    gradients = cpu_gradients((x, B, A, alpha, taps, past), torch.ones_like(x))
    assert gradients[4].dtype == torch.float32 and gradients[5].dtype == other


def test_slc2_in_pieces_is_slc2_in_one_to_the_last_bit():
    x, B, A, alpha, taps, past = slc2_inputs(2, 150, 2, 12, 3, torch.float32, True)
    whole = slc2_cpu.forward(x, B, A, alpha, taps, past)
    running_past, pieces = past.clone(), []
    for cut in (slice(0, 70), *(slice(t, t + 1) for t in range(70, 80)), slice(80, 150)):
        piece = [t[:, cut] for t in (x, B, A, alpha)]
        if cut.stop - cut.start == 1:
            pieces.append(slc2_cpu.step(*piece, taps, running_past))
        else:
            pieces.append(slc2_cpu.forward(*piece, taps, running_past))
            inputs = gated_input(*(t.double() for t in (piece[0], piece[2], piece[3]))).float()
            running_past = torch.cat([running_past, inputs], dim=1)[:, -2:]
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=2e-6, atol=2e-6)


@both_dtypes
@pytest.mark.parametrize("K", [1, 2, 3, 4])
def test_step_is_the_last_row_of_forward_and_moves_the_past_on(dtype, K, threads):
    x, B, A, alpha, taps, past = slc2_inputs(5, 8, 3, 17, K, dtype, True)
    running_past = strided(past.float())
    for t in range(8):
        y = slc2_cpu.step(*(a[:, t:t + 1] for a in (x, B, A, alpha)), taps, running_past)
        assert same_bits([y[:, 0]],
                         [slc2_cpu.forward(*(a[:, :t + 1] for a in (x, B, A, alpha)), taps, past)[:, -1].contiguous()])
    u = gated_input(*(a.double() for a in (x, A, alpha)))
    torch.testing.assert_close(running_past.double(), torch.cat([past.double(), u], dim=1)[:, 8:], rtol=1e-6, atol=1e-6)
    half = past.to(torch.bfloat16, copy=True)
    slc2_cpu.step(*(a[:, :1] for a in (x, B, A, alpha)), taps, half)
    expected = torch.cat([past.double(), u[:, :1]], dim=1)[:, 1:]
    torch.testing.assert_close(half.double(), expected, rtol=2 ** -8, atol=1e-30)


# ---- rows


@both_dtypes
@pytest.mark.parametrize("n", [1, 37, 5000, 40000])
def test_relu2_is_as_exact_as_its_twin(dtype, n, threads):
    x, dy = torch.randn(n).to(dtype), torch.randn(n).to(dtype)
    x[0] = 0.0
    exact = x.double().requires_grad_()
    relu_squared_twin(exact).backward(dy.double())
    twin = x.clone().requires_grad_()
    relu_squared_twin(twin).backward(dy)
    no_worse(relu2_cpu.forward(x), relu_squared_twin(x), relu_squared_twin(x.double()))
    no_worse(relu2_cpu.backward(dy, x), twin.grad, exact.grad)
    assert same_bits([relu2_cpu.backward(dy, x)], [relu2_cpu.backward(dy, x.relu())])


@both_dtypes
@pytest.mark.parametrize("shape", [(1,), (3, 1), (5, 37), (2, 3, 64), (40, 7, 256), (3, 1280)], ids=str)
@pytest.mark.parametrize("scale", [1e-4, 1.0, 100.0])
def test_rms_norm_is_as_exact_as_its_twin(dtype, shape, scale, threads):
    x, dy = (scale * torch.randn(shape)).to(dtype), torch.randn(shape).to(dtype)
    exact, twin = x.double().requires_grad_(), x.clone().requires_grad_()
    eps = torch.finfo(torch.float32).eps
    exact_y = exact * (exact.square().mean(-1, keepdim=True) + eps).rsqrt()
    exact_y.backward(dy.double())
    twin_y = rms_norm_twin(twin)
    twin_y.backward(dy)
    for a, b in ((x, dy), (strided(x), strided(dy))):
        no_worse(rms_norm_cpu.forward(a), twin_y.detach(), exact_y.detach())
        no_worse(rms_norm_cpu.backward(b, a), twin.grad, exact.grad, size=dy * (exact_y / exact).detach())


@both_dtypes
@pytest.mark.parametrize("shape", [(1, 1, 1, 2), (2, 3, 3, 6), (3, 50, 2, 128), (2, 9, 5, 66)], ids=str)
@pytest.mark.parametrize("by_row", [False, True])
def test_rope_norm_is_as_exact_as_its_twin(dtype, shape, by_row, threads):
    B, T, H, D = shape
    x, dy = torch.randn(shape).to(dtype), torch.randn(B, H, T, D).to(dtype).transpose(1, 2)
    angles = 100 * torch.randn(*([B] if by_row else []), T, D // 2)
    rope = angles.cos().bfloat16().float(), angles.sin().bfloat16().float()
    exact, twin = x.double().requires_grad_(), x.clone().requires_grad_()
    cos, sin = (t.double().unsqueeze(-2) for t in rope)
    a, b = exact.chunk(2, -1)
    turned = torch.cat([a * cos + b * sin, b * cos - a * sin], -1)
    exact_y = turned * (turned.square().mean(-1, keepdim=True) + torch.finfo(torch.float32).eps).rsqrt()
    exact_y.backward(dy.double())
    twin_y = rope_norm_twin(twin, rope)
    twin_y.backward(dy)
    columns = strided(x.flatten(2)).unflatten(2, (H, D))
    for a, b in ((x, dy), (columns, dy.contiguous())):
        no_worse(rope_norm_cpu.forward(a, *rope), twin_y.detach(), exact_y.detach())
        no_worse(rope_norm_cpu.backward(b, a, *rope), twin.grad, exact.grad,
                 size=dy * turned.detach().square().mean(-1, True).rsqrt())


# ---- what holds for all


def everything(dtype: torch.dtype, rows: slice = slice(None)) -> list[Tensor]:
    """Return the results of every kernel for these rows of large seeded inputs."""
    torch.manual_seed(1)
    inputs = slc2_inputs(6, 150, 2, 40, 3, dtype, True)
    part = (*(t[rows] for t in inputs[:4]), inputs[4], inputs[5][rows])
    dy = torch.randn(6, 150, 80).to(dtype)[rows]
    z, targets, factors = loss_inputs(6, 30000, dtype)
    z, losses = z[rows].clone(), poison(6)[rows]
    softcapped_cross_entropy_(z, targets[rows], factors[rows], losses)
    gradients = cpu_gradients(part, dy)
    heads = dy.unflatten(2, (2, 40))
    angles = torch.randn(150, 20)
    running_past = part[5].clone()
    step = slc2_cpu.step(*(t[:, :1] for t in part[:4]), part[4], running_past)
    results = [slc2_cpu.forward(*part), *gradients[:4], gradients[5], z, losses, step, running_past,
               rms_norm_cpu.forward(dy), rms_norm_cpu.backward(dy, part[0]),
               rope_norm_cpu.forward(heads, angles.cos(), angles.sin()),
               rope_norm_cpu.backward(heads, heads + 1, angles.cos(), angles.sin()),
               relu2_cpu.forward(dy), relu2_cpu.backward(dy, part[0])]
    # the taps' is a sum over all
    return [t.contiguous() for t in results] + ([gradients[4]] if rows == slice(None) else [])


@both_dtypes
def test_number_of_threads_changes_no_bit(dtype):
    one = with_threads(1, lambda: everything(dtype))
    for n in (2, 3, 5):
        assert same_bits(one, with_threads(n, lambda: everything(dtype)))


@both_dtypes
def test_row_alone_is_the_row_in_a_batch_to_the_last_bit(dtype):
    together = everything(dtype)
    for i in range(6):
        assert same_bits([t[i:i + 1] for t in together], everything(dtype, slice(i, i + 1)))


def test_numbers_too_small_are_treated_alike_by_all_threads():
    x = torch.full((64, 4096), 1e-25)
    dy = torch.full((64, 4096), 1e-14)  # the gradient is 2e-39
    torch.set_flush_denormal(True)  # in this thread alone; conftest undoes it
    flushed = with_threads(2, lambda: relu2_cpu.backward(dy, x))
    torch.set_flush_denormal(False)
    kept = with_threads(2, lambda: relu2_cpu.backward(dy, x))
    assert not flushed.any() and (kept > 0).all()


@both_dtypes
@pytest.mark.parametrize("op, twin", [(relu_squared, relu_squared_twin), (rms_norm, rms_norm_twin)],
                         ids=["relu2", "rms_norm"])
def test_operations_have_their_twins_gradients(op, twin, dtype):
    x, dy = torch.randn(3, 5, 32).to(dtype), torch.randn(3, 5, 32).to(dtype)
    results = []
    for f in (op, twin):
        leaf = x.clone().requires_grad_()
        y = f(leaf)
        y.backward(dy)
        results.append((y.detach(), leaf.grad, f(x)))
    torch.testing.assert_close(results[0], results[1])


@both_dtypes
def test_rope_norm_has_its_twins_gradient(dtype):
    x, angles = torch.randn(2, 7, 3, 8).to(dtype), torch.randn(7, 4)
    results = []
    for f in (rope_norm, rope_norm_twin):
        leaf = x.clone().requires_grad_()
        y = f(leaf, (angles.cos(), angles.sin()))
        y.square().sum().backward()
        results.append((y.detach(), f(x, (angles.cos(), angles.sin()))))
    torch.testing.assert_close(results[0], results[1])


def test_kernels_are_not_used_for_what_they_do_not_support_or_under_tracing():
    from torch._subclasses.fake_tensor import FakeTensorMode

    x = torch.randn(4, 8)
    assert cpu.ready(x, x.bfloat16(), x[:, 1:5], torch.nn.Parameter(x))
    assert not cpu.ready(x.double()) and not cpu.ready(x.t())
    assert not cpu.ready(x, x.to("meta")) and not cpu.ready(x.sum())
    with FakeTensorMode() as mode:
        assert not cpu.ready(torch.empty(4, 8)) and rms_norm(mode.from_tensor(x)).shape == (4, 8)
    torch.testing.assert_close(torch.func.vmap(rms_norm)(x), rms_norm_twin(x))
    torch.testing.assert_close(torch.compile(rms_norm, backend="eager", fullgraph=True)(x), rms_norm_twin(x))


def test_an_operation_has_the_kernels_of_its_folder_and_none_while_the_compiler_traces():
    x = torch.randn(4, 8)
    assert dispatch.kernels_of("slc2", "cpu") is slc2_cpu and dispatch.kernels_of("relu2", "cpu") is relu2_cpu
    assert dispatch.kernels_of("fused_matvec", "cpu") is None, "it has no kernel for CPUs"
    assert dispatch.chosen_backend("relu2", relu2.BACKENDS, x) == "cpu"
    assert dispatch.chosen_backend("relu2", relu2.BACKENDS, x.double()) == "torch"

    def answer(x: Tensor) -> Tensor:
        return x + (dispatch.chosen_backend("relu2", relu2.BACKENDS, x) == "torch")
    assert torch.equal(torch.compile(answer, backend="eager", fullgraph=True)(x), x + 1)


def test_without_the_crate_all_runs_in_pytorch(monkeypatch):
    x, rope = torch.randn(2, 3, 2, 8), (torch.randn(3, 4), torch.randn(3, 4))
    monkeypatch.setattr(cpu, "cpukernels", None)
    assert not cpu.ready(x)
    assert same_bits([relu_squared(x), rms_norm(x), rope_norm(x, rope)],
                     [relu_squared_twin(x), rms_norm_twin(x), rope_norm_twin(x, rope)])


def test_second_derivative_is_refused_not_wrong():
    x = torch.randn(4, 8, requires_grad=True)
    grad, = torch.autograd.grad(rms_norm(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError):
        grad.sum().backward()


@pytest.mark.parametrize("spoil", [
    lambda i: i.update(x=i["x"].double()), lambda i: i.update(B=i["B"].bfloat16()),
    lambda i: i.update(A=i["A"][:, :, :-1]),
    lambda i: i.update(alpha=i["alpha"][:, :-1]), lambda i: i.update(taps=i["taps"][:-1]),
    lambda i: i.update(past=i["past"][:, :1]),
    lambda i: i.update(x=i["x"].transpose(1, 2).contiguous().transpose(1, 2)),
    lambda i: i.update(past=i["past"].double()),
], ids=["float64", "another dtype", "narrow A", "short alpha", "few taps", "short past", "columns apart",
        "past of float64"])
def test_slc2_refuses_what_does_not_fit(spoil):
    inputs = dict(zip(("x", "B", "A", "alpha", "taps", "past"), slc2_inputs(2, 6, 2, 4, 3, torch.float32, True)))
    slc2_cpu.forward(**inputs)
    spoil(inputs)
    with pytest.raises(ValueError):
        slc2_cpu.forward(**inputs)


def test_crate_works_on_torchs_own_threads():
    instructions, shared = cpu.cpukernels.runs_on()
    assert instructions in ("Base", "Avx2", "Avx512")
    if torch.backends.openmp.is_available() and "darwin" not in torch.__config__.show().lower():
        assert shared
