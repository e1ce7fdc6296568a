"""attention/cpu.py, with all gradients, and decode_attention/cpu.py, against the twins and float64."""

from functools import partial

import pytest
import torch
from torch import Tensor

from nanochat.kernels.attention import attend, attend_twin
from nanochat.kernels.attention import cpu as attention
from nanochat.kernels.cpu import cpukernels
from nanochat.kernels.decode_attention.cpu import decode_attention
from tests.test_kernels_cpu import no_worse, same_bits, strided, with_threads

pytestmark = pytest.mark.skipif(cpukernels is None, reason="cpukernels is not built here; dev/setup.sh builds it")
both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def random_inputs(B: int, T: int, H: int, G: int, D: int, dtype: torch.dtype) -> list[Tensor]:
    """Return q, k, v and dy, columns of wider tensors that are NaN elsewhere; scores have a few units."""
    torch.manual_seed(T + D)
    z = strided(torch.randn(B, T, (H + 2 * G) * D).to(dtype)).unflatten(-1, (-1, D))
    return [*z.split([H, G, G], dim=2), strided(torch.randn(B, T, H, 2 * D).to(dtype))[..., D:]]


def by_twin(inputs: list[Tensor], window: int | None, dtype: torch.dtype) -> list[Tensor]:
    """Return y, dq, dk and dv in the given dtype."""
    leaves = [t.detach().to(dtype, copy=True).requires_grad_() for t in inputs[:3]]
    y = attend_twin(*leaves, causal=True, window=window)
    return [y.detach(), *torch.autograd.grad(y, leaves, inputs[3].to(dtype))]


def ours(inputs: list[Tensor], window: int | None = None) -> list[Tensor]:
    """Return y, dq, dk, dv and the log-sum-exp."""
    q, k, v, dy = inputs
    y, sums = attention.forward(q, k, v, window)
    return [y, *attention.backward(dy, q, k, v, y, sums, window), sums]


@pytest.fixture(autouse=True)
def unwritten_memory_is_nan(monkeypatch):
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(float("nan")))


SHAPES = [(1, 1, 2, 1, 8), (2, 5, 3, 3, 1), (1, 63, 4, 2, 16), (3, 64, 2, 2, 32), (2, 65, 6, 1, 13), (1, 131, 4, 4, 40),
          (2, 257, 2, 2, 128), (1, 301, 3, 1, 24), (1, 129, 1, 1, 200)]


@both_dtypes
@pytest.mark.parametrize("B, T, H, G, D", SHAPES)
def test_attention_and_its_gradients_are_as_exact_as_the_twins(B, T, H, G, D, dtype):
    for window in sorted({1, 2, 16, 37, 64, 65, T - 1, T, T + 9} - {0}) + [None]:
        inputs = random_inputs(B, T, H, G, D, dtype)
        exact, twin = by_twin(inputs, window, torch.float64), by_twin(inputs, window, dtype)
        assert exact[0].isfinite().all()
        got = with_threads(1 + T % 2, partial(ours, inputs, window))
        for name, a, b, c in zip(("y", "dq", "dk", "dv"), got, twin, exact):
            if name in ("dq", "dk") and min(window or T, T) <= (2 if dtype == torch.float32 else 1):
                # sums over D cancel out: their rounding is what is left
                torch.testing.assert_close(a.double(), c, atol=1e-5, rtol=1e-6)
            else:
                no_worse(a, b, c, f"{name}, window {window}")
        seen = torch.ones(T, T, dtype=torch.bool).tril().triu(1 - (window or T))
        q, k = (t.double().transpose(1, 2) for t in inputs[:2])
        scores = q @ k.repeat_interleave(H // G, 1).mT / D ** 0.5
        torch.testing.assert_close(got[4].double(), scores.masked_fill(~seen, float("-inf")).logsumexp(-1), atol=2e-6,
                                   rtol=1e-6)


@both_dtypes
def test_large_scores_neither_overflow_nor_lose_the_sum(dtype):
    q, k, v, dy = random_inputs(2, 150, 2, 1, 32, dtype)
    inputs = [q * 60, k * 60, v, dy]
    exact, twin = by_twin(inputs, None, torch.float64), by_twin(inputs, None, dtype)
    for name, a, b, c in zip(("y", "dq", "dk", "dv"), ours(inputs), twin, exact):
        assert a.isfinite().all()
        no_worse(a, b, c, name, size=exact[3] * 60)


@both_dtypes
@pytest.mark.parametrize("window", [None, 50])
def test_number_of_threads_changes_no_bit(dtype, window):
    inputs = random_inputs(3, 200, 6, 2, 48, dtype)
    one = with_threads(1, lambda: ours(inputs, window))
    for n in (2, 3, 5):
        assert same_bits(one, with_threads(n, lambda: ours(inputs, window)))


@both_dtypes
@pytest.mark.parametrize("window", [None, 50])
def test_row_alone_is_the_row_in_a_batch_and_a_beginning_alone_is_that_of_the_row(dtype, window):
    inputs = random_inputs(4, 200, 4, 2, 48, dtype)
    together = ours(inputs, window)
    for b in range(4):
        assert same_bits([t[b:b + 1] for t in together], ours([t[b:b + 1] for t in inputs], window))
    for T in (1, 2, 64, 65, 130, 199):
        y, sums = attention.forward(*(t[:, :T] for t in inputs[:3]), window)
        assert same_bits([y, sums], [together[0][:, :T].contiguous(), together[4][:, :, :T].contiguous()])


def test_strides_change_no_bit_and_inputs_stay_as_they_are():
    inputs = random_inputs(2, 70, 4, 2, 24, torch.bfloat16)
    dense = [t.contiguous() for t in inputs]
    kept = [t.clone() for t in inputs]
    by_head = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in inputs]
    assert same_bits(ours(inputs), ours(dense)) and same_bits(ours(by_head), ours(dense))
    assert same_bits([t.contiguous() for t in inputs], [t.contiguous() for t in kept])


def test_nan_reaches_those_who_see_it_and_no_block_before():
    q, k, v, _ = random_inputs(1, 200, 2, 2, 16, torch.float32)
    v = v.clone()
    v[0, 100, 0, 3] = float("nan")
    y, _ = attention.forward(q, k, v)
    assert y[0, 100:, 0, 3].isnan().all() and y[0, :100].isfinite().all() and y[0, :, 1].isfinite().all()
    y, _ = attention.forward(q, k, v, 20)
    assert y[0, 100:120, 0, 3].isnan().all() and y[0, 128:].isfinite().all()


def test_nothing_in_nothing_out():
    for shape in ((0, 5, 2, 8), (2, 0, 2, 8)):
        t = torch.zeros(shape)
        assert all(x.shape == shape for x in ours([t] * 4)[:4])


def test_what_does_not_fit_together_is_refused():
    q, k, v, dy = random_inputs(1, 8, 4, 2, 8, torch.float32)
    y, sums = attention.forward(q, k, v)
    turned = k.transpose(2, 3).contiguous().transpose(2, 3)
    for wrong in ((q, k[:, :7], v), (q, k, v[..., :7]), (q[:, :, :3], k, v), (q, k.bfloat16(), v), (q, turned, v),
                  (q[0], k[0], v[0])):
        with pytest.raises(ValueError):
            attention.forward(*wrong)
    with pytest.raises(ValueError):
        attention.forward(q, k, v, 0)
    for given in ((dy[:, :7], q, k, v, y, sums), (dy, q, k, v, y.double(), sums), (dy, q, k, v, y, sums[:, :3])):
        with pytest.raises(ValueError):
            attention.backward(*given)


@both_dtypes
def test_attend_has_its_twins_gradients(dtype):
    inputs = random_inputs(2, 90, 4, 2, 16, dtype)
    leaves = [t.detach().requires_grad_() for t in inputs[:3]]
    y = attend(*leaves, causal=True, window=33)
    assert same_bits([y.detach(), *torch.autograd.grad(y, leaves, inputs[3])], ours(inputs, 33)[:4])


# ---- the decode step


def decode_by_twin(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], window: int | None) -> Tensor:
    first = [0 if window is None else max(0, n - window) for n in lengths]
    return torch.cat([attend_twin(q[b:b + 1], k[b:b + 1, i:n], v[b:b + 1, i:n])
                      for b, (i, n) in enumerate(zip(first, lengths))])


def decode_inputs(lengths: list[int], H: int, G: int, D: int, dtype: torch.dtype) -> list[Tensor]:
    """Return one query for each row, and keys and values in longer caches that are NaN after each row's length."""
    torch.manual_seed(len(lengths) + D)
    q, k, v = (strided(torch.randn(len(lengths), n, heads * D).to(dtype)).unflatten(-1, (-1, D))
               for n, heads in ((1, H), (max(lengths) + 3, G), (max(lengths) + 3, G)))
    for b, n in enumerate(lengths):
        k[b, n:], v[b, n:] = float("nan"), float("nan")
    return [3 * q, k, v]


@both_dtypes
@pytest.mark.parametrize("lengths, H, G, D",
                         [([1], 1, 1, 1), ([1, 2, 15, 16, 17], 4, 2, 16), ([127, 128, 129], 3, 1, 13),
                          ([700, 1], 6, 6, 128), ([257, 400], 2, 2, 40)])
def test_decode_attention_is_as_exact_as_its_twin_and_reads_nothing_behind_the_row(lengths, H, G, D, dtype):
    q, k, v = decode_inputs(lengths, H, G, D, dtype)
    for window in (None, 1, 5, 128, 300):
        exact = decode_by_twin(q.double(), k.double(), v.double(), lengths, window)
        no_worse(with_threads(2, partial(decode_attention, q, k, v, lengths, window)),
                 decode_by_twin(q, k, v, lengths, window), exact)


@both_dtypes
def test_decode_attention_depends_on_nothing_but_its_row(dtype):
    lengths = [300, 1, 129, 515]
    q, k, v = decode_inputs(lengths, 4, 2, 24, dtype)
    for window in (None, 140):
        together = with_threads(1, partial(decode_attention, q, k, v, lengths, window))
        for n in (2, 3, 5):
            assert same_bits([together], [with_threads(n, partial(decode_attention, q, k, v, lengths, window))])
        for b, n in enumerate(lengths):
            alone = decode_attention(q[b:b + 1], k[b:b + 1, :n], v[b:b + 1, :n], window=window)
            assert same_bits([alone], [together[b:b + 1]])


def test_decode_attention_refuses_lengths_that_the_buffer_lacks():
    q, k, v = decode_inputs([5, 5], 2, 1, 8, torch.float32)
    for lengths in ([5], [5, 0], [5, 9]):
        with pytest.raises(ValueError, match="length"):
            decode_attention(q, k, v, lengths)
    for wrong in ((q, k[:1], v[:1]), (q.expand(2, 2, 2, 8), k, v), (q, k, v[:, :4])):
        with pytest.raises(ValueError):
            decode_attention(*wrong)
