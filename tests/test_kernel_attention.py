"""nanochat.kernels.attention: every path that runs here against the twin and float64; windows through the KV cache.

tests/test_kernel_attention_cpu.py has the CPU kernels.
"""

import sys
import types

import pytest
import torch
import torch.nn.functional as F

from nanochat.gpt import GPTConfig
from nanochat.kernels import attention, cpu
from nanochat.kernels.attention import FLASH3, NATIVE, PYTORCH, attend, attend_twin, path
from tests.helpers import small_model


def random_inputs(B, T, H, G, D, dtype, seed=0, device="cpu"):
    """Return q, k, v, dy: columns of one tensor, as a joined projection gives them; q and k are normalised."""
    torch.manual_seed(seed)
    wide = torch.randn(B, T, (H + 2 * G) * D + 16)
    q, k, v = wide[..., :(H + 2 * G) * D].unflatten(-1, (-1, D)).split([H, G, G], dim=2)
    z = torch.cat([F.rms_norm(q, (D,)), F.rms_norm(k, (D,)), v], dim=2).flatten(2)
    # rows are wider than their columns, so the strides cannot pass for contiguous
    z = F.pad(z, (0, 16)).to(device, dtype)
    dy = torch.randn(B, T, 2 * H, D).to(device, dtype)[:, :, ::2]
    q, k, v = z[..., :-16].unflatten(-1, (-1, D)).split([H, G, G], dim=2)
    assert not q.is_contiguous() or B == T == 1
    return q, k, v, dy


def answers(way, q, k, v, dy, **options):
    """Return y, dq, dk, dv of an implementation, for inputs with these strides."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    y = way(*leaves, **options)
    return y.detach(), *torch.autograd.grad(y, leaves, dy)


def far(got, exact):
    """Return the root mean square of each difference."""
    return [(a.double() - b).square().mean().sqrt().item() for a, b in zip(got, exact)]


def test_path_is_ours_on_a_cpu_and_torchs_for_masks_and_what_ours_is_not_for(monkeypatch):
    q = torch.randn(1, 9, 2, 8)
    mask = torch.ones(9, 9, dtype=torch.bool)
    assert path(q) == path(q.bfloat16()) == (PYTORCH if cpu.cpukernels is None else NATIVE)
    assert path(q, mask=mask) == path(q, causal=False) == path(q.double()) == path(q.mT.contiguous().mT) == PYTORCH
    assert path(q, q.mT.contiguous().mT, q) == PYTORCH
    monkeypatch.setattr(cpu, "cpukernels", None)
    assert path(q) == PYTORCH


@pytest.mark.parametrize("built", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("T, window", [(1, None), (1, 1), (5, None), (33, 1), (33, 2), (33, 7), (33, 40)])
def test_attention_is_the_twin_in_training_and_evaluation_whether_the_crate_is_built_or_not(
        T, window, dtype, built, monkeypatch):
    if not built:
        monkeypatch.setattr(cpu, "cpukernels", None)
    q, k, v, dy = random_inputs(2, T, 4, 2, 16, dtype)
    with torch.inference_mode():  # first, because what it caches must work in training too
        quiet = attend(q, k, v, causal=True, window=window)
    got, twin = (answers(way, q, k, v, dy, causal=True, window=window) for way in (attend, attend_twin))
    rtol = 0.05 if dtype == torch.bfloat16 else 1e-4
    for a, b in zip(got, twin):
        torch.testing.assert_close(a, b, atol=rtol, rtol=rtol)
    torch.testing.assert_close(quiet, twin[0], atol=rtol, rtol=rtol)


def test_a_mask_says_which_keys_count():
    q, k, v, _ = random_inputs(2, 7, 4, 2, 16, torch.float32)
    mask = torch.rand(2, 1, 7, 7) < 0.5
    mask |= torch.eye(7, dtype=torch.bool)
    torch.testing.assert_close(attend(q, k, v, mask=mask), attend_twin(q, k, v, mask=mask))


def test_what_makes_no_sense_is_refused():
    q, k, v, _ = random_inputs(1, 4, 2, 2, 8, torch.float32)
    for options in ({"causal": True, "mask": torch.ones(4, 4, dtype=torch.bool)}, {"window": 3},
                    {"causal": True, "window": 0}):
        with pytest.raises(ValueError):
            attend(q, k, v, **options)
    with pytest.raises(ValueError):
        attend(q[:, :2], k, v, causal=True)


# ---- windows in the model

@pytest.mark.parametrize("window", [1, 2, 5, 11, 64])
@pytest.mark.parametrize("seed", [0, 1])
def test_a_window_through_the_cache_is_one_full_forward(window, seed):
    model = small_model(seed, window=window, n_kv_head=1).double()
    torch.manual_seed(seed)
    ids = torch.randint(97, (3, 23))
    whole = model(ids)
    assert not torch.allclose(whole, small_model(seed, n_kv_head=1).double()(ids)) or window == 64
    with torch.inference_mode():
        cuts = sorted({0, 23, *torch.randint(1, 23, (4,)).tolist(), 20, 21, 22})
        for batch_invariant in (False, True):
            cache = model.new_cache(3)
            cache.batch_invariant = batch_invariant
            parts = [model(ids[:, a:b], cache=cache) for a, b in zip(cuts, cuts[1:])]
            torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("window", [1, 3, 8])
def test_a_window_over_rows_of_different_lengths_is_that_of_each_row(window):
    model = small_model(window=window).double()
    torch.manual_seed(window)
    ids = torch.randint(97, (3, 21))
    whole = model(ids)
    with torch.inference_mode():
        for batch_invariant in (False, True):
            cache, done = model.new_cache(3), [0, 0, 0]
            cache.batch_invariant = batch_invariant
            for counts in ([5, 9, 2], [1, 4, 6], [1, 1, 1], [3, 1, 2], [1, 1, 1]):
                padded = torch.zeros(3, max(counts), dtype=torch.long)
                for b, n in enumerate(counts):
                    padded[b, :n] = ids[b, done[b]:done[b] + n]
                logits = model(padded, cache=cache, counts=counts)
                for b, n in enumerate(counts):
                    torch.testing.assert_close(logits[b, :n], whole[b, done[b]:done[b] + n], atol=2e-5, rtol=1e-4)
                    done[b] += n
            at = torch.tensor(done)
            # as a captured step does
            logits = model.static_step(ids[range(3), done][:, None], at, cache, cache.max_len)
            torch.testing.assert_close(logits, whole[range(3), done], atol=2e-5, rtol=1e-4)


def test_a_window_trains_through_ours_as_through_torch(monkeypatch):
    model = small_model(window=20, sequence_len=128)
    ids = torch.randint(97, (2, 101))
    gradients = []
    for crate in (cpu.cpukernels, None):
        monkeypatch.setattr(cpu, "cpukernels", crate)
        loss = model(ids[:, :-1], ids[:, 1:])
        gradients.append([loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))])
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-3)


def test_a_window_stays_out_of_the_meta_file_where_there_is_none_and_counts_in_the_flops():
    assert "window" not in GPTConfig().to_dict() and GPTConfig(window=7).to_dict()["window"] == 7
    with pytest.raises(ValueError, match="window"):
        GPTConfig(window=0)
    full, some = small_model().flops_per_token(32), small_model(window=8).flops_per_token(32)
    layers, E = GPTConfig(n_layer=4).pattern().count("A"), 32
    assert full - some == 12 * E * layers * (16 - (8 - 1))
    assert small_model(window=99).flops_per_token(32) == full


# ---- FlashAttention 3

def stand_in(monkeypatch, custom):
    """A module that records its calls and answers with the twin, since FlashAttention 3 needs a Hopper GPU."""
    calls = []

    def flash_attn_func(q, k, v, softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None,
                        v_descale=None, window_size=(-1, -1)):
        calls.append((causal, window_size))
        return attend_twin(q, k, v, causal=causal, window=None if window_size == (-1, -1) else window_size[0] + 1)

    module = types.ModuleType("flash_attn_interface")
    module.flash_attn_func, flash_attn_func.__module__ = flash_attn_func, "flash_attn_interface"
    if custom:
        module._flash_attn_forward = torch.library.custom_op("standin::forward", lambda x: x.clone(), mutates_args=(),
                                                             schema="(Tensor x) -> Tensor")
    monkeypatch.setitem(sys.modules, "flash_attn_interface", module)
    monkeypatch.setattr(attention, "_flash_attn_func", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    load = attention._load_flash3.__wrapped__
    monkeypatch.setattr(attention, "_flash3",
                        torch.compiler.assume_constant_result(lambda device: load(torch.device("cuda"))))
    return calls


@pytest.mark.parametrize("custom", [True, False])
def test_the_compiler_sees_flash_attention_3_or_goes_around_an_older_one(custom, monkeypatch):
    torch._dynamo.reset()
    calls = stand_in(monkeypatch, custom)
    q, k, v, _ = random_inputs(2, 9, 4, 2, 16, torch.bfloat16)
    compiled = torch.compile(lambda q, k, v: attend(q * 2, k, v, causal=True) * 2, backend="eager", fullgraph=custom)
    assert torch.equal(compiled(q, k, v), attend_twin(q * 2, k, v, causal=True) * 2)
    assert calls == [(True, (-1, -1))]


def test_flash_attention_3_is_called_as_it_wants_to_be(monkeypatch):
    calls = stand_in(monkeypatch, custom=True)
    q, k, v, dy = random_inputs(2, 9, 4, 2, 16, torch.bfloat16)
    assert path(q) == FLASH3 != path(q.float()) and path(q, mask=torch.ones(9, 9, dtype=torch.bool)) == PYTORCH
    assert path(q.new_zeros(1, 9, 2, 264)) != FLASH3
    for window, wanted in ((None, (-1, -1)), (1, (0, 0)), (4, (3, 0)), (9, (-1, -1))):
        assert torch.equal(attend(q, k, v, causal=True, window=window),
                           attend_twin(q, k, v, causal=True, window=window))
        assert calls.pop() == (True, wanted)
    attend(q, k, v)
    assert calls.pop() == (False, (-1, -1))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("compiled", [False, True])
def test_the_path_of_a_gpu_errs_from_float64_as_the_twin_does(dtype, compiled):
    way = torch.compile(attend, dynamic=False) if compiled else attend
    for *shape, window in ((2, 256, 2, 2, 128, None), (3, 97, 4, 2, 64, None), (2, 515, 6, 2, 128, 100),
                           (1, 64, 2, 1, 32, 1)):
        inputs = random_inputs(*shape, dtype, device="cuda")
        options = {"causal": True, "window": window}
        exact = answers(attend_twin, *(x.double() for x in inputs), **options)
        twin, got = far(answers(attend_twin, *inputs, **options), exact), far(answers(way, *inputs, **options), exact)
        tiny = torch.finfo(dtype).eps * 0.05
        assert all(a <= 2 * b + tiny for a, b in zip(got, twin)), (path(inputs[0]), window, got, twin)
