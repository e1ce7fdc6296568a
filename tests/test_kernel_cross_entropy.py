"""nanochat.kernels.cross_entropy: the pass over a chunk by Triton (in its interpreter) and by plain PyTorch, and the
head loss.

tests/test_kernels_cpu.py has the CPU kernel.
"""

import importlib
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from nanochat.kernels import cross_entropy
from nanochat.kernels.cross_entropy import head_loss, head_loss_twin, softcap

Pass = Callable[[Tensor, Tensor, Tensor | None, Tensor, bool], tuple[Tensor, Tensor]]


def _called(module: str, name: str, *args) -> tuple:
    """Run a function that writes to its arguments, and return these."""
    getattr(importlib.import_module(module), name)(*args)
    return args


@pytest.fixture(params=["triton", "plain"])
def softcapped(request, monkeypatch) -> Pass:
    """A backend's pass as a function (z, targets, factors, losses, want_grad) → (losses, the new z)."""
    if request.param == "plain":
        monkeypatch.setitem(cross_entropy.PIECE, "cpu", 300)  # two or three rows, or one
        def run(*args):
            cross_entropy.softcapped_cross_entropy_pytorch_(*args)
            return args[3], args[0]
        return run
    pool = request.getfixturevalue("interpreter")

    def interpreted(*args):
        z, _, _, losses, _ = pool.submit(_called, "nanochat.kernels.cross_entropy.triton", "softcapped_cross_entropy_",
                                         *args).result()
        return losses, z
    return interpreted


def exact(z: Tensor, targets: Tensor, factors: Tensor | None,
          dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Return losses and gradient by the definition, in dtype."""
    z = z.detach().to(dtype).requires_grad_()
    losses = torch.nn.functional.cross_entropy(softcap(z), targets, ignore_index=-1, reduction="none")
    (losses if factors is None else losses * factors.to(dtype)).sum().backward()
    return losses.detach(), z.grad


def poison(*shape: int) -> Tensor:
    return torch.full(shape, float("nan"))


@pytest.fixture
def poisoned():
    """Fill newly allocated memory with NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n, V, factored",
                         [(1, 97, True), (5, 97, True), (7, 1, False), (3, 8193, True), (2, 20001, False),
                          (4, 64, False)])
def test_a_pass_gives_float64s_losses_and_gradient(softcapped, dtype, n, V, factored):
    torch.manual_seed(n * V)
    z = (torch.randn(n, V) * 3).to(dtype)
    targets = torch.randint(V, (n,))
    targets[1::3] = -1
    factors = torch.randn(n) if factored else None
    losses, grad = softcapped(z.clone(), targets, factors, poison(n), True)
    wanted, wanted_grad = exact(z, targets, factors)
    torch.testing.assert_close(losses.double(), wanted, rtol=2e-6, atol=2e-6)
    assert grad.dtype == dtype
    # of the written dtype: the interpreter truncates where hardware rounds
    rounding = 0.0 if dtype == torch.float32 else 2.0 ** -7
    torch.testing.assert_close(grad.double(), wanted_grad, rtol=4e-6 + rounding, atol=1e-7)
    assert (losses[targets < 0] == 0).all() and (grad[targets < 0] == 0).all()


@pytest.mark.parametrize("spread", [0.01, 0.3, 3.0, 40.0])
def test_a_pass_errs_no_more_than_the_twin(softcapped, spread):
    torch.manual_seed(0)
    z, targets = torch.randn(8, 5003) * spread, torch.randint(5003, (8,))
    losses, grad = softcapped(z.clone(), targets, None, poison(8), True)
    wanted, twin = exact(z, targets, None), exact(z, targets, None, torch.float32)
    # without the targets' entries, whose −1 would hide the error of the others
    others = torch.ones_like(grad).scatter_(1, targets.unsqueeze(1), 0)
    for got, plain, true in zip((losses, grad, grad * others), (*twin, twin[1] * others),
                                (*wanted, wanted[1] * others)):
        assert (got - true).norm() < 1.5 * (plain - true).norm() + 2e-7 * true.norm()


def test_saturated_logits_are_finite_and_right(softcapped):
    z = torch.zeros(6, 33)
    z[0, 4], z[1, 4], z[2], z[3] = 200, -200, 200, -200
    z[4, ::2], z[4, 1::2] = 200, -200
    z[5, 4], z[5, 5] = 3e4, -3e4
    targets = torch.tensor([4, 4, 0, 0, 1, 5])
    losses, grad = softcapped(z.clone(), targets, None, poison(6), True)
    wanted, wanted_grad = exact(z, targets, None)
    torch.testing.assert_close(losses.double(), wanted, rtol=2e-6, atol=1e-5)
    torch.testing.assert_close(grad.double(), wanted_grad, rtol=1e-5, atol=1e-6)


def test_without_a_gradient_the_logits_stay_as_they_are(softcapped):
    torch.manual_seed(2)
    z, targets = torch.randn(3, 300), torch.tensor([5, -1, 299])
    losses, after = softcapped(z.clone(), targets, None, poison(3), False)
    torch.testing.assert_close(losses.double(), exact(z, targets, None)[0], rtol=2e-6, atol=1e-6)
    assert torch.equal(after, z)


def test_a_target_that_does_not_count_weighs_nothing_whatever_its_factor(softcapped):
    losses, grad = softcapped(torch.randn(2, 9), torch.tensor([-1, 3]), torch.tensor([float("inf"), 1.0]), poison(2),
                              True)
    assert losses[0] == 0 and (grad[0] == 0).all() and losses.isfinite().all() and grad.isfinite().all()


def test_a_target_outside_the_vocabulary_gives_a_nan_on_a_gpu(interpreter):
    args = (torch.randn(2, 9), torch.tensor([9, -2]), None, torch.ones(2), True)
    assert interpreter.submit(_called, "nanochat.kernels.cross_entropy.triton", "softcapped_cross_entropy_",
                              *args).result()[3].isnan().all()


def test_strided_rows_are_read_and_written_in_place(softcapped):
    torch.manual_seed(3)
    wide, targets = torch.randn(4, 150), torch.randint(97, (4,))
    z = wide[:, 20:117]
    losses, grad = softcapped(z, targets, None, poison(4), True)
    wanted, wanted_grad = exact(torch.randn(4, 150, generator=torch.Generator().manual_seed(3))[:, 20:117], targets,
                                None)
    torch.testing.assert_close(losses.double(), wanted, rtol=2e-6, atol=1e-6)
    torch.testing.assert_close(grad.double(), wanted_grad, rtol=1e-5, atol=1e-7)


# ---- the whole: products, chunks, reductions

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
def test_head_loss_errs_no_more_than_its_twin(monkeypatch, poisoned, dtype, weight_dtype, reduction):
    N, E, V = 53, 24, 331
    torch.manual_seed(4)
    x, weight = torch.randn(N, E).to(dtype), (torch.randn(V, E) * E ** -0.5 * 4).to(weight_dtype)
    targets = torch.randint(-1, V, (N,))
    upstream = torch.rand(N) if reduction == "none" else torch.tensor(0.7)
    monkeypatch.setattr(cross_entropy, "CHUNK_ELEMENTS", 13 * V)

    def run(loss: Callable, *inputs: Tensor) -> list[Tensor]:
        inputs = [t.detach().clone().requires_grad_() for t in inputs]
        out = loss(*inputs, targets, reduction)
        return [out, *torch.autograd.grad(out, inputs, upstream.to(out.dtype))]

    def double(a: Tensor, b: Tensor, targets: Tensor, reduction: str) -> Tensor:
        return torch.nn.functional.cross_entropy(softcap(a @ b.T), targets, ignore_index=-1, reduction=reduction)
    true = run(double, x.double(), weight.double())
    for got, plain, wanted in zip(run(head_loss, x, weight), run(head_loss_twin, x, weight), true):
        assert got.dtype == plain.dtype and got.shape == plain.shape
        assert (got - wanted).norm() <= 1.5 * (plain - wanted).norm() + 1e-6 * wanted.norm()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("chunk", [1, 40, 1 << 26])
def test_head_loss_equals_twin_for_any_chunk(monkeypatch, reduction, chunk):
    monkeypatch.setattr(cross_entropy, "CHUNK_ELEMENTS", chunk)
    torch.manual_seed(0)
    x, weight = torch.randn(11, 7, requires_grad=True), (10 * torch.randn(13, 7)).requires_grad_()
    targets = torch.randint(-1, 13, (11,))
    fused, twin = head_loss(x, weight, targets, reduction), head_loss_twin(x, weight, targets, reduction)
    torch.testing.assert_close(fused, twin)
    upstream = torch.randn_like(twin)
    for got, wanted in zip(torch.autograd.grad(fused, (x, weight), upstream),
                           torch.autograd.grad(twin, (x, weight), upstream)):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(head_loss(x, weight, targets, reduction), twin)


def test_head_loss_without_a_target_that_counts_is_zero_in_sum_and_gives_zero_gradient():
    x, weight = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    head_loss(x, weight, torch.full((3,), -1), "sum").backward()
    assert x.grad.abs().sum() == 0 and weight.grad.abs().sum() == 0


def test_head_loss_in_bfloat16_keeps_a_float32_weight_gradient():
    torch.manual_seed(0)
    x32, weight = torch.randn(64, 16), torch.randn(50, 16)
    targets = torch.randint(50, (64,))
    exact = weight.clone().requires_grad_()
    head_loss_twin(x32, exact, targets, "sum").backward()
    got = weight.clone().requires_grad_()
    head_loss(x32.bfloat16(), got, targets, "sum").backward()
    assert got.grad.dtype == torch.float32
    assert (got.grad - exact.grad).norm() < 0.02 * exact.grad.norm()


@pytest.mark.parametrize("chunk", [1, 40, 1 << 26])
def test_factors_weigh_each_tokens_loss_and_gradient(monkeypatch, chunk):
    monkeypatch.setattr(cross_entropy, "CHUNK_ELEMENTS", chunk)
    torch.manual_seed(0)
    x, weight = torch.randn(11, 8, requires_grad=True), torch.randn(13, 8, requires_grad=True)
    targets, factors = torch.randint(-1, 13, (11,)), torch.randn(11)
    got, wanted = (loss(x, weight, targets, "sum", factors) for loss in (head_loss, head_loss_twin))
    torch.testing.assert_close(got, wanted)
    for a, b in zip(torch.autograd.grad(got, (x, weight)), torch.autograd.grad(wanted, (x, weight))):
        torch.testing.assert_close(a, b)
    with torch.no_grad():
        torch.testing.assert_close(head_loss(x, weight, targets, "sum", factors), wanted)
    with pytest.raises(ValueError, match="factors go with"):
        head_loss(x, weight, targets, "mean", factors)


def test_all_ignored_gives_what_the_twin_gives():
    targets = torch.full((3,), -1)
    for reduction in ("sum", "mean", "none"):
        both = []
        for loss in (head_loss, head_loss_twin):
            x, weight = torch.ones(3, 4, requires_grad=True), torch.ones(5, 4, requires_grad=True)
            out = loss(x, weight, targets, reduction)
            out.sum().backward()
            both.append((out, x.grad, weight.grad))
        for got, wanted in zip(*both):
            torch.testing.assert_close(got, wanted, equal_nan=True)


def test_no_tokens_at_all(poisoned):
    x, weight = torch.ones(0, 4, requires_grad=True), torch.ones(5, 4, requires_grad=True)
    none = torch.zeros(0, dtype=torch.long)
    head_loss(x, weight, none, "sum").backward()
    assert x.grad.shape == (0, 4) and (weight.grad == 0).all()
    assert head_loss(x, weight, none, "none").shape == (0,)


def test_a_gradient_can_be_asked_for_twice():
    torch.manual_seed(5)
    x, weight, targets = torch.randn(6, 4,
                                     requires_grad=True), torch.randn(9, 4, requires_grad=True), torch.randint(9, (6,))
    loss = head_loss(x, weight, targets, "sum")
    first = torch.autograd.grad(3 * loss, (x, weight), retain_graph=True)
    for _ in range(3):
        loss.backward(retain_graph=True)  # into .grad, which must not be what was saved
    for three, grad in zip(first, (x.grad, weight.grad)):
        torch.testing.assert_close(grad, three)


def test_a_head_that_is_no_plain_matrix_gives_its_own_logits():
    torch.manual_seed(6)
    x, weight, targets = torch.randn(30, 4), torch.randn(9, 4), torch.randint(-1, 9, (30,))
    got = head_loss(x, weight, targets, "none", product=lambda part: part @ weight.T)
    torch.testing.assert_close(got, head_loss_twin(x, weight, targets, "none"))


def test_memory_is_a_quarter_of_the_plain_ones():
    from bench.measure import peak_growth
    N, V, E = 4096, 2048, 64
    for dtype in (torch.float32, torch.bfloat16):
        x, weight = torch.randn(N, E).to(dtype).requires_grad_(), torch.randn(V, E, requires_grad=True)
        targets = torch.randint(V, (N,))

        def peak(loss: Callable) -> int:
            def gradients() -> tuple[Tensor, ...]:
                return torch.autograd.grad(loss(x, weight, targets, "sum"), (x, weight))  # noqa: B023
            return peak_growth(gradients, torch.device("cpu"))
        assert peak(head_loss) <= peak(head_loss_twin) / 4


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_model_compiled_as_a_whole_gives_the_same(reduction):
    torch.manual_seed(7)
    x, weight, targets = torch.randn(6, 4), torch.randn(9, 4, requires_grad=True), torch.randint(-1, 9, (6,))

    def model(x: Tensor) -> Tensor:
        return (head_loss(x * 2, weight, targets, reduction) ** 2).sum()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    (wanted,), (got,) = (torch.autograd.grad(f(x), weight) for f in (model, compiled))
    torch.testing.assert_close(got, wanted)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.parametrize("want_grad", [True, False])
@pytest.mark.parametrize("factored", [True, False])
def test_the_operator_that_compilers_see_is_well_made(factored, want_grad):
    given = torch.randn(6, 4), torch.randn(9, 4), torch.randint(-1, 9, (6,)), torch.rand(6) if factored else None
    torch.library.opcheck(torch.ops.nanochat.head_loss, (*given, want_grad))


def test_the_kernel_compiles_for_hopper_without_spilling():
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from nanochat.kernels.cross_entropy.triton import BLOCK, _cross_entropy
    names = _cross_entropy.arg_names
    source = ASTSource(_cross_entropy, {"Z": "*bf16", "TARGETS": "*i64", "FACTORS": "*fp32", "LOSSES": "*fp32",
                                        "V": "i32", "stride": "i32",
                                        **dict.fromkeys(("FACTORED", "WANT_GRAD", "BLOCK"), "constexpr")},
                       {"FACTORED": True, "WANT_GRAD": True, "BLOCK": BLOCK},
                       {(names.index("Z"),): [["tt.divisibility", 16]]})
    built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": BLOCK // 512})
    assert ".local" not in built.asm["ptx"]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("V", [97, 2048, 50257, 65536])
def test_the_kernel_on_a_gpu_gives_float64s_losses_and_gradient(dtype, V):
    torch.manual_seed(V)
    z, targets, factors = (torch.randn(300, V) * 12).to(dtype), torch.randint(-1, V, (300,)), torch.randn(300)
    wanted, wanted_grad = exact(z, targets, factors)
    z, losses = z.cuda(), poison(300).cuda()
    cross_entropy.softcapped_cross_entropy_(z, targets.cuda(), factors.cuda(), losses)
    torch.testing.assert_close(losses.cpu().double(), wanted, rtol=4e-6, atol=4e-6)
    torch.testing.assert_close(z.cpu().double(), wanted_grad, rtol=1e-5 + (2.0 ** -8 if dtype == torch.bfloat16 else 0),
                               atol=1e-7)


# ---- its benchmark

def test_the_benchmark_tables_ours_beside_the_twin_and_says_why_liger_is_left_out(monkeypatch, capsys, tmp_path):
    import json

    from bench import head
    monkeypatch.setattr(head, "matmul_flops", lambda *_: 1e9)
    head.main(["--depth=1", "--tokens=40", "--vocab-size=97", "--rounds=1", "--device=cpu", "--dtype=float32",
               f"--json={tmp_path / 'head.json'}"])
    text = capsys.readouterr().out
    assert "Liger is left out: it needs a GPU." in text
    rows = json.loads((tmp_path / "head.json").read_text())["rows"]
    assert [(row["pass"], row["how"]) for row in rows] == [(name, how) for name in head.PASSES
                                                           for how in ("ours", head.TWIN)]
    for row in rows:
        assert f"| {row['pass']} " in text and row["error"] < 1e-5 and row["seconds"] > 0 and row["memory"] > 0


def test_the_benchmark_sees_wrong_numbers():
    from bench import head
    wrong = {"ours": lambda *given: head_loss_twin(*given) * 1.01, head.TWIN: head_loss_twin}
    rows = head.compare("training", wrong, head.inputs(20, 8, 31, torch.float32, torch.device("cpu")), 1, 1e9)
    assert rows[0]["error"] > 5e-3 > 1e-5 > rows[1]["error"]
