"""The model against the published numbers, against a second implementation, and with a KV cache against without."""

import glob
import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.twin import TwinGPT
from nanochat.evaluation.loss import evaluate_bpb
from nanochat.gpt import GPT, GPTConfig, meta_model
from tests.conftest import ROOT
from tests.helpers import PARTS, small_model

GOLDEN = ["hybrid_a", "orig_mod_b"]


def golden(shared, name):
    folder = shared / "golden" / name
    meta = json.loads(open(glob.glob(f"{folder}/meta_*.json")[0]).read())
    model = GPT(GPTConfig(**meta["model_config"]))
    state = torch.load(glob.glob(f"{folder}/model_*.pt")[0], weights_only=True)
    model.load_state_dict({k.removeprefix("_orig_mod."): v for k, v in state.items()}, strict=True)
    return model.eval(), np.load(folder / "expected.npz"), json.loads((folder / "expected.json").read_text()), folder


def test_d20_has_the_published_shape():
    with torch.device("meta"):
        model = GPT(GPTConfig.from_depth(20, vocab_size=65536, sequence_len=2048))
    assert sum(p.numel() for p in model.parameters()) == 542_035_200
    assert [i for i, letter in enumerate(model.config.pattern()) if letter == "A"] == [1, 4, 7, 10, 13, 16, 19]
    assert model.flops_per_token() == pytest.approx(2.8587e9, rel=1e-4)
    assert model.flops_per_token() - 6 * 7 * 1280 * 2048 == pytest.approx(2.7486e9, rel=1e-4)


def test_old_meta_files_lack_fields_and_new_ones_add_none():
    config = GPTConfig(sequence_len=128, vocab_size=1024, n_layer=5, n_head=2, n_kv_head=2, n_embd=64)
    assert (config.n_kernel, config.slc_rate) == (3, 3)
    assert "layer_pattern" not in config.to_dict() and GPTConfig(**config.to_dict()) == config
    assert len(config.to_dict()) == 8, "published code knows eight fields"
    for parts in PARTS.values():
        other = replace(config, **parts)
        assert other.to_dict() == {**config.to_dict(), **parts} and GPTConfig(**other.to_dict()) == other


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_logits_loss_and_gradients(shared, name):
    model, expected, more, _ = golden(shared, name)
    ids, targets = torch.from_numpy(expected["ids"]), torch.from_numpy(expected["targets"])
    assert sum(p.numel() for p in model.parameters()) == more["parameters"]
    assert [i for i, letter in enumerate(model.config.pattern()) if letter == "A"] == more["attention_layers"]
    with torch.no_grad():
        assert np.abs(model(ids).numpy() - expected["logits"]).max() < 1e-4
    loss = model(ids, targets)
    assert abs(loss.item() - float(expected["loss"])) < 1e-4
    loss.backward()
    for key, p in model.named_parameters():
        assert float(p.grad.double().norm()) == pytest.approx(more["grad_norms"][key], rel=1e-3, abs=1e-6), key


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_bits_per_byte(shared, name):
    model, expected, _, folder = golden(shared, name)
    token_bytes = torch.load(folder / "token_bytes.pt", weights_only=True)
    batch = (torch.from_numpy(expected["ids"]), torch.from_numpy(expected["targets"]))
    assert evaluate_bpb(model, [batch], token_bytes) == pytest.approx(float(expected["bpb"]), abs=1e-4)


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_greedy_decoding(shared, name):
    model, expected, _, _ = golden(shared, name)
    greedy = {"temperature": 0, "top_k": 0, "top_p": 1, "repetition_penalty": 1}
    for row in expected["greedy"].tolist():
        assert list(model.generate(torch.tensor([row[:16]]), 40, **greedy)) == row[16:]


@pytest.mark.parametrize("shape", [{}, {"n_kv_head": 1}, {"n_kernel": 2}, {"n_kernel": 4}, {"layer_pattern": "AAAA"},
                                   {"layer_pattern": "SSSS"}, {"n_head": 4, "n_kv_head": 2, "n_layer": 7},
                                   {**PARTS["modern"], "n_kv_head": 1, "value_embeds": "AS", "smear": True},
                                   *PARTS.values()])
def test_model_equals_plain_twin(shape):
    model = small_model(**shape)
    twin = TwinGPT(model.config)
    twin.load_state_dict(model.state_dict(), strict=True)
    ids, targets = torch.randint(97, (3, 17)), torch.randint(-1, 97, (3, 17))
    torch.testing.assert_close(model(ids), twin(ids), rtol=1e-4, atol=1e-4)
    loss, twin_loss = model(ids, targets), twin(ids, targets)
    torch.testing.assert_close(loss, twin_loss, rtol=1e-5, atol=1e-5)
    loss.backward()
    twin_loss.backward()
    twins = dict(twin.named_parameters())
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, twins[name].grad, rtol=1e-3, atol=2e-5,
                                   msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("parts", [{}, *PARTS.values()])
def test_every_parameter_gets_a_gradient_within_two_steps(parts):
    torch.manual_seed(0)
    model = GPT(GPTConfig(sequence_len=32, vocab_size=97, n_layer=4, n_head=2, n_kv_head=2, n_embd=32, **parts))
    moved = set()
    for _ in range(3):  # the head starts at zero, then c_proj: a layer below gets a gradient a step later
        ids = torch.randint(97, (4, 32))
        model(ids, ids.roll(-1, 1)).backward()
        moved |= {name for name, p in model.named_parameters() if p.grad.abs().sum() > 0}
        with torch.no_grad():
            for p in model.parameters():
                p -= 0.1 * p.grad
                p.grad = None
    assert moved == {name for name, _ in model.named_parameters()}


def test_initialisation_is_the_published_one_and_the_taps_are_defined():
    torch.manual_seed(0)
    with torch.device("meta"):
        model = GPT(GPTConfig(n_layer=2, n_embd=256, n_head=2, n_kv_head=2, vocab_size=500))
    model.to_empty(device="cpu")
    for p in model.parameters():
        p.data.fill_(float("nan"))  # uninitialised memory may hold anything
    model.init_weights()
    weights = {name: p.detach() for name, p in model.named_parameters()}
    assert not any(p.isnan().any() for p in weights.values())
    assert weights["lm_head.weight"].abs().max() == 0 and weights["transformer.h.0.attn.c_proj.weight"].abs().max() == 0
    assert weights["transformer.wte.weight"].std() == pytest.approx(1, rel=0.02)
    assert weights["transformer.h.0.mlp.c_fc.weight"].std() == pytest.approx(1 / 16, rel=0.02)
    assert weights["transformer.h.0.attn.A_proj.weight"].std() == pytest.approx((128 / 256) ** 0.5 / 16, rel=0.03)
    taps = weights["transformer.h.0.attn.conv1d.weight"]
    assert taps.shape == (256, 1, 3) and taps.abs().max() <= 3 ** -0.5 and taps.std() == pytest.approx(1 / 3, rel=0.05)


sizes = st.fixed_dictionaries({
    "n_kernel": st.integers(2, 4), "n_head": st.sampled_from([2, 4]), "n_kv_head": st.sampled_from([1, 2]),
    "n_layer": st.integers(1, 5), "slc_rate": st.integers(1, 4)})
shapes = st.builds(lambda size, parts: {**size, **parts}, sizes, st.sampled_from([{}, *PARTS.values()]))


@settings(max_examples=40, deadline=None)
@given(shapes, st.integers(1, 3), st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(0, 9))
def test_any_split_through_a_cache_equals_one_full_forward(shape, B, chunks, seed):
    model = small_model(seed, **shape)
    ids = torch.randint(97, (B, sum(chunks)))
    with torch.no_grad():
        full = model(ids)
        cache = model.new_cache(B, max_len=4)  # too short: it has to grow
        parts = torch.cat([model(part, cache=cache) for part in ids.split(chunks, dim=1)], dim=1)
    # float32 sums in another order: logits of ±15 agree to a few units in the fifth digit
    torch.testing.assert_close(parts, full, rtol=1e-4, atol=1e-4)


@settings(max_examples=25, deadline=None)
@given(shapes, st.lists(st.integers(1, 12), min_size=2, max_size=4), st.booleans(), st.integers(0, 9))
def test_rows_of_different_lengths_decode_as_if_alone(shape, lengths, batch_invariant, seed):
    model = small_model(seed, **shape)
    rows = [torch.randint(97, (1, n + 3)) for n in lengths]
    with torch.no_grad():
        joined = model.new_cache(1, max_len=2)  # too few rows and too short: it has to grow
        joined.batch_invariant = batch_invariant
        for i, row in enumerate(rows):
            cache = model.new_cache(1, max_len=row.shape[1])
            model(row[:, :-3], cache=cache)
            joined.resize(i + 1)
            joined.copy_row(i, cache, 0)
        steps = [model(torch.cat([row[:, [i - 3]] for row in rows]), cache=joined) for i in range(1)]
        steps.append(model(torch.cat([row[:, -2:] for row in rows]), cache=joined))  # a ragged chunk of two
        got = torch.cat(steps, dim=1)
        for row, own in zip(rows, got):
            torch.testing.assert_close(own, model(row)[0, -3:], rtol=1e-4, atol=1e-4)


@settings(max_examples=25, deadline=None)
@given(shapes, st.lists(st.lists(st.integers(1, 8), min_size=3, max_size=3), min_size=1, max_size=4), st.integers(0, 9))
def test_padding_on_the_right_changes_nothing(shape, pieces, seed):
    model = small_model(seed, **shape)
    rows = [torch.randint(97, (sum(lengths),)) for lengths in pieces]
    cache, done = model.new_cache(len(rows), max_len=4), [0] * len(rows)
    with torch.no_grad():
        for step in range(3):
            counts = [lengths[step] for lengths in pieces]
            ids = torch.randint(97, (len(rows), max(counts)))  # the ids in the padding must not matter
            for b, count in enumerate(counts):
                ids[b, :count] = rows[b][done[b]:done[b] + count]
            x = model.hidden(ids, cache=cache, counts=counts)
            for b, count in enumerate(counts):
                alone = model.hidden(rows[b][None, :done[b] + count])[0, done[b]:]
                torch.testing.assert_close(x[b, :count], alone, rtol=1e-4, atol=1e-4)
                done[b] += count
            assert cache.lengths == done
        ids = torch.stack([torch.cat([row, row.new_zeros(24 - len(row))]) for row in rows])
        last = model(ids, counts=done, last_only=True)
        for b, row in enumerate(rows):
            torch.testing.assert_close(last[b, 0], model(row[None])[0, -1], rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="counts must be"):
        model(ids, counts=[0] * len(rows))


@pytest.mark.parametrize("parts", [{}, *PARTS.values()])
def test_forked_and_selected_rows_are_independent(parts):
    model = small_model(**parts)
    ids = torch.randint(97, (2, 9))
    with torch.no_grad():
        cache = model.new_cache(2)
        model(ids, cache=cache)
        forked = cache.fork(2)  # rows 0, 0, 1, 1
        more = torch.randint(97, (4, 5))
        model(more, cache=forked)
        kept = forked.select([3, 0])
        last = torch.randint(97, (2, 2))
        got = model(last, cache=kept)
        whole = torch.cat([ids[[1, 0]], more[[3, 0]], last], dim=1)
        torch.testing.assert_close(got, model(whole)[:, -2:], rtol=1e-4, atol=1e-4)
        assert cache.lengths == [9, 9] and kept.lengths == [16, 16]  # the first cache is unchanged
        whole = torch.cat([ids, last], dim=1)
        torch.testing.assert_close(model(last, cache=cache), model(whole)[:, -2:], rtol=1e-4, atol=1e-4)


def test_the_cache_holds_the_bytes_it_should():
    config = GPTConfig.from_depth(20, vocab_size=65536, sequence_len=2048)
    with torch.device("meta"):
        model = GPT(config)
    model.compute_dtype = torch.bfloat16
    cache = model.new_cache(1, 2048)
    assert cache.nbytes() == 73_400_320 + 66_560


@pytest.mark.parametrize("parts", [{}, *PARTS.values()])
def test_the_future_does_not_reach_the_past(parts):
    model = small_model(**parts)
    ids = torch.randint(97, (1, 20))
    other = ids.clone()
    other[0, 12:] = (other[0, 12:] + 1) % 97
    with torch.no_grad():
        assert torch.equal(model(ids)[:, :12], model(other)[:, :12])
        assert not torch.equal(model(ids)[:, 12:], model(other)[:, 12:])


@pytest.mark.parametrize("dtype, error", [(torch.bfloat16, 0.05), (torch.float16, 0.01)])
def test_16_bit_compute_stays_near_float32_and_weights_stay_float32(dtype, error):
    model = small_model()
    ids = torch.randint(97, (2, 24))
    with torch.no_grad():
        exact = model(ids)
        model.compute_dtype = dtype
        rounded = model(ids)
    assert rounded.dtype == torch.float32 and model.lm_head.weight.dtype == torch.float32
    assert (rounded - exact).abs().mean() < error * exact.abs().mean()


@pytest.mark.parametrize("wrong", [
    {"value_embeds": "AX"}, {"value_embeds": "SS"}, {"qk_gain": 0.0}, {"rope_base": -1.0}, {"mlp_ratio": float("nan")},
    {"head_init": -0.1}, {"slc_gate": "half"}, {"slc_gate_init": "one"}, {"attn_conv": -1},
    {"n_layer": 0}, {"n_embd": 30, "n_head": 4}, {"n_head": 3, "n_kv_head": 2, "n_embd": 48},
    {"layer_pattern": "SX"}, {"layer_pattern": "SA", "n_layer": 3}, {"vocab_size": 0}])
def test_impossible_shapes_are_refused_in_words(wrong):
    with pytest.raises(ValueError, match=min(wrong, key=len) if len(wrong) == 1 else "n_|layer_pattern"):
        GPTConfig(**wrong)


@pytest.mark.parametrize("depth", range(1, 33))
def test_every_depth_makes_a_model_of_its_width(depth):
    config = GPTConfig.from_depth(depth)
    assert config.n_embd == 64 * depth and config.n_embd // config.n_head <= 128
    if depth % 2 == 0:
        assert config.n_head == -(-config.n_embd // 128)


def test_generate_takes_one_row_and_stops_before_the_closing_token():
    model = small_model()
    with pytest.raises(ValueError, match="Engine"):
        next(model.generate(torch.zeros(2, 3, dtype=torch.long)))
    plain = list(model.generate(torch.tensor([[1, 2]]), 12, temperature=0))
    stopped = list(model.generate(torch.tensor([[1, 2]]), 12, temperature=0, eos_token_id=plain[5]))
    assert stopped == plain[:plain.index(plain[5])]


def test_a_model_that_has_generated_can_be_trained():
    model = small_model()
    # beyond sequence_len: the rotary tables are made again
    list(model.generate(torch.tensor([[1, 2]]), max_new_tokens=40))
    ids = torch.randint(97, (2, 40))
    model(ids, ids).backward()
    assert model.lm_head.weight.grad is not None


def _gradients(model, batches):
    model.zero_grad()
    for ids, targets in batches:
        model(ids, targets, "sum").backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [{}, {"window": 5}, *PARTS.values()])
def test_activation_checkpointing_changes_no_gradient_and_keeps_less(dtype, shape):
    model = small_model(**shape).train()
    model.compute_dtype = dtype
    ids = torch.randint(97, (4, 25))
    batches = [(part[:, :-1], torch.where(part[:, 1:] < 20, -1, part[:, 1:])) for part in ids.split([3, 1])]
    kept, calls = [], []
    handle = model.transformer.h[1].mlp.register_forward_pre_hook(lambda *_: calls.append(torch.is_grad_enabled()))

    def pack(x):
        kept.append(x.untyped_storage().nbytes())
        return x

    found = []
    for model.recompute in (False, True):
        kept.clear(), calls.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            gradients = _gradients(model, batches)
        found.append((gradients, sum(kept), len(calls)))
    handle.remove()
    for name, gradient in found[0][0].items():
        assert gradient.any() and torch.equal(gradient, found[1][0][name]), name
    assert found[1][1] < 0.5 * found[0][1], "what is kept for backward"
    assert (found[0][2], found[1][2]) == (2, 4), "each block is computed twice"
    with torch.no_grad():  # nothing is kept, so nothing is computed again
        calls.clear()
        assert torch.isfinite(model(*batches[0]))


@pytest.mark.parametrize("parts", PARTS.values(), ids=PARTS)
def test_blocks_are_whole_graphs_one_for_each_kind_of_layer(parts):
    """By torch.compile without code generation: what breaks a graph, or makes another one for a layer of the same kind,
    is seen."""
    model, ids = small_model(layer_pattern="SASA", **parts), torch.randint(97, (2, 9))
    wanted, graphs = _gradients(model, [(ids, ids)]), []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    for block in model.transformer.h:
        block.compile(backend=keep, fullgraph=True, dynamic=False)
    model._compiled_for = tuple(ids.shape)
    for name, gradient in _gradients(model, [(ids, ids)]).items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-4, atol=1e-5)
    assert len(graphs) == 2


def test_a_model_without_memory_has_the_shapes_and_imports_no_compiler():
    config = {"vocab_size": 97, "n_layer": 3, "n_head": 2, "n_kv_head": 1, "n_embd": 32}
    wanted = {name: p.shape for name, p in GPT(GPTConfig(**config)).named_parameters()}
    model = meta_model(GPTConfig(**config))
    assert {name: p.shape for name, p in model.named_parameters()} == wanted
    assert {p.device.type for p in model.parameters()} == {"meta"} and all(p.requires_grad for p in model.parameters())
    program = ("import sys; from nanochat.gpt import GPTConfig, meta_model\n"
               f"meta_model(GPTConfig(**{config})); assert 'sympy' not in sys.modules")
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)
