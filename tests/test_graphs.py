"""nanochat/engine/cuda_graphs.py: steps at fixed addresses give what ordinary steps give. Without a GPU the same pieces
run uncaptured."""

import copy
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode

from nanochat.engine import Batch, Engine, Row
from nanochat.engine import batch as batch_module
from nanochat.engine import cuda_graphs as graphs
from nanochat.engine import engine as engine_module
from nanochat.engine.cuda_graphs import StaticDecoder, bucket
from nanochat.engine.quantize import quantize
from nanochat.gpt import Block
from nanochat.loading import ready_to_decode
from nanochat.sampling import Settings
from nanochat.server.messages import RowRequest
from nanochat.server.scheduler import Scheduler
from nanochat.tokenizer import RustBPETokenizer
from tests.helpers import small_model

MODELS = [{}, {"n_kernel": 1, "n_kv_head": 1}, {"n_kernel": 2, "layer_pattern": "AAAA"}, {"n_kernel": 4, "layer_pattern": "SSSS"},
          {"n_embd": 48, "n_head": 6, "n_kv_head": 3, "window": 5}]
DRAWN = {"temperature": 1.3, "top_k": 30, "top_p": 0.95, "repetition_penalty": 1.1}


@pytest.fixture(scope="module")
def tokenizer():
    return RustBPETokenizer.train_from_iterator(["what is 12+30? it is 42", "spell: a,b,c 'word'.count('o') 0123456789 + - * /"] * 3, 280)


@pytest.fixture(scope="module", params=MODELS, ids=str)
def model(request, tokenizer):
    return small_model(3, vocab_size=tokenizer.get_vocab_size(), sequence_len=64, **request.param)


@pytest.fixture
def one(tokenizer):
    return small_model(4, vocab_size=tokenizer.get_vocab_size(), sequence_len=64)


@pytest.fixture(autouse=True)
def small_buckets(monkeypatch):
    """Buckets so small that rows of a few tokens go from one to the next, and memory grows."""
    monkeypatch.setattr(graphs, "MIN_LENGTH", 4)
    monkeypatch.setattr(batch_module, "MIN_LENGTH", 4)
    monkeypatch.setattr(graphs, "MIN_TOP_K", 2)


def both(model, tokenizer, **options):
    """An engine that decodes step by step as it comes, and one whose steps stand at fixed addresses."""
    return Engine(model, tokenizer, graphs=False, **options), Engine(model, tokenizer, graphs=True, **options)


def prompts_of(seed, count, longest=20):
    chance = random.Random(seed)
    return [[chance.randrange(256) for _ in range(chance.randint(1, longest))] for _ in range(count)]


def said(answers):
    return [[(row.tokens, row.mask, row.ended) for row in rows] for rows in answers]


def test_logits_and_state_are_those_of_ordinary_steps_while_rows_join_and_leave(model, tokenizer):
    chance = random.Random(1)
    ours, theirs = (Batch(engine) for engine in reversed(both(model, tokenizer)))
    kinds = [Settings(temperature=0), Settings(1.2, 9, None, 1.2, seed=1), Settings(0.8, None, 0.9, seed=2), Settings(seed=3)]
    for step in range(40):
        if step % 5 == 0:
            joining = [(prompt, chance.randint(1, 25), chance.choice(kinds)) for prompt in prompts_of(step, chance.randint(1, 4))]
            for batch in (ours, theirs):
                batch.add_prompts([Row(prompt, most, own, stops=()) for prompt, most, own in joining])
        if step == 17:  # somebody gives up
            for batch in (ours, theirs):
                batch.remove([batch.rows[0]])
        assert [row.tokens for row in ours.step()] == [row.tokens for row in theirs.step()]
        assert ours._static is not None
        n = len(ours.rows)
        assert [row.tokens for row in ours.rows] == [row.tokens for row in theirs.rows]
        live = [i for i, row in enumerate(ours.rows) if not row.ended]
        assert [ours._cache.lengths[i] for i in live] == [theirs._cache.lengths[i] for i in live]
        if n:
            assert torch.allclose(ours._logits[live], theirs._logits[live], atol=1e-4)
        for mine, other in zip(ours._cache.layers if n else (), theirs._cache.layers if n else ()):
            for name in mine.per_row:
                assert torch.allclose(mine.per_row[name][live], other.per_row[name][live], atol=1e-4)


def test_a_single_row_of_a_model_that_only_decodes_gets_the_same_in_fewer_operations(model, tokenizer, monkeypatch):
    ready = ready_to_decode(copy.deepcopy(model))
    assert ready.has_single_row_step() and not model.has_single_row_step()
    called, real = [0], Block.single_row_step

    def counted(*args):
        called[0] += 1
        return real(*args)

    monkeypatch.setattr(Block, "single_row_step", counted)
    (ours, theirs), row = (Batch(engine) for engine in reversed(both(ready, tokenizer))), ([3, 1, 4, 1, 5], 30, Settings(seed=1))
    for batch in (ours, theirs):
        batch.add_prompts([Row(*row, stops=())])
    for _ in range(29):
        assert [row.tokens for row in ours.step()] == [row.tokens for row in theirs.step()]
        assert torch.allclose(ours._logits, theirs._logits, atol=1e-4)
    assert called[0] >= 29 * model.config.n_layer
    assert not quantize(copy.deepcopy(model)).has_single_row_step()


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 999), count=st.integers(1, 9), num_samples=st.integers(1, 3), batch_size=st.integers(1, 9),
       options=st.sampled_from([{"temperature": 0}, DRAWN, {"temperature": 1.0}, {"temperature": 0.9, "top_p": 0.8}]))
def test_a_seed_gives_the_same_tokens_with_and_without(tokenizer, seed, count, num_samples, batch_size, options):
    model = small_model(seed % 3, vocab_size=tokenizer.get_vocab_size(), sequence_len=64, n_kv_head=1 + seed % 2)
    plain, fixed = both(model, tokenizer)
    prompts = prompts_of(seed, count)
    options = {"num_samples": num_samples, "batch_size": batch_size, "max_tokens": 15, "seed": seed, **options}
    for _ in range(2):  # the second time in the memory that is there
        assert said(fixed.generate_many(prompts, **options)) == said(plain.generate_many(prompts, **options))
    assert list(fixed.generate(prompts[0], 3, max_tokens=9)) == list(plain.generate(prompts[0], 3, max_tokens=9))


def test_a_step_reads_nothing_on_the_host_and_hangs_on_shapes_alone(model, tokenizer):
    """On tensors without numbers in them any reading fails; and no tensor is made of the host's numbers on the way."""
    class Watched(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            assert "lift_fresh" not in func.name() and "_local_scalar" not in func.name() and "nonzero" not in func.name(), func
            return func(*args, **(kwargs or {}))

    steps = StaticDecoder(ready_to_decode(copy.deepcopy(model)))
    with torch.inference_mode():
        steps.reserve(8, 32)
        steps.model.rope(32)  # a table made once
    with FakeTensorMode(allow_non_fake_inputs=True) as fake, torch.inference_mode(), Watched():
        for layer in steps.cache.layers:
            for part in (layer.per_token, layer.per_row):
                part.update({name: fake.from_tensor(tensor) for name, tensor in part.items()})
        for name in ("logits", "tokens", "seen", "_inputs"):
            setattr(steps, name, fake.from_tensor(getattr(steps, name)))
        steps._forward(4, 16)
        steps._forward(1, 32)
        steps._sample(4, False, 8, 16, True)
        steps._sample(4, True, 0, 0, False)
        for forbidden in (lambda: int(steps.tokens[0]), lambda: torch.tensor([1]), lambda: steps.seen.nonzero()):
            with pytest.raises((AssertionError, DataDependentOutputException, DynamicOutputShapeException)):  # so the test can fail
                forbidden()


def test_what_nobody_uses_may_be_anything(one, tokenizer):
    plain, fixed = both(one, tokenizer)
    prompts = prompts_of(5, 3)
    with torch.inference_mode():
        fixed.static.reserve(8, 64)
        for layer in fixed.static.cache.layers:
            for tensor in layer.tensors():
                tensor.fill_(torch.nan)
        fixed.static.logits.fill_(torch.nan)
    assert said(fixed.generate_many(prompts, max_tokens=15, **DRAWN)) == said(plain.generate_many(prompts, max_tokens=15, **DRAWN))


def test_getting_ready_changes_nothing_that_counts(one, tokenizer):
    batch = Batch(Engine(one, tokenizer, graphs=True))
    batch.add_prompts([Row(prompt, 9, Settings(*DRAWN.values(), seed=1)) for prompt in prompts_of(1, 3)])
    steps = batch._static

    def counts():
        parts = [steps.logits[:3], steps.tokens[:3], steps.seen[:3]]
        for layer in steps.cache.layers:
            parts += [tensor[:3] for tensor in layer.per_row.values()]
            parts += [tensor[i, :length] for tensor in layer.per_token.values() for i, length in enumerate(steps.cache.lengths)]
        return [part.clone() for part in parts]

    for _ in range(3):
        before = counts()
        steps._drop_graphs()
        with torch.inference_mode():
            assert steps.prepare(batch.rows, batch._sampler) and len(steps._runners) == 2
        assert all(map(torch.equal, counts(), before))
        batch.step()


def test_log_probabilities_are_told_and_forced_tokens_taken_as_ever(one, tokenizer):
    """Of rows side by side, one that wants log-probabilities and one whose model calls the tool all the time."""
    special = tokenizer.encode_special
    call = [special("<|python_start|>"), *tokenizer.encode("1+1"), special("<|python_end|>")]
    for numbers in (None, 2):
        rows = []
        for engine in both(one, tokenizer):
            batch, mine = Batch(engine), [Row([5, 6], 20, Settings(seed=1), logprobs=numbers, stops=()),
                                          Row([7], 20, Settings(seed=2), stops=())]
            batch.add_prompts(mine)
            for step in range(20):
                batch.step()
                if step in (3, 9):  # as if the row had written a call
                    for token in call:
                        engine.take(mine[1], token)
                    del mine[1].tokens[-len(call):], mine[1].mask[-len(call):]
            rows.append(mine)
        for plain, fixed in zip(*rows):
            assert plain.tokens == fixed.tokens and plain.mask == fixed.mask
            assert [top for _, top in fixed.scores] == [[(id, pytest.approx(p, abs=1e-4)) for id, p in top] for _, top in plain.scores]
        assert rows[0][1].mask.count(0) >= 6 and len(rows[1][0].scores) == (20 if numbers else 0)


def test_two_batches_at_once_do_not_share_memory(one, tokenizer):
    plain, fixed = both(one, tokenizer)
    wanted = [list(plain.generate(prompt, 2, max_tokens=12, seed=1)) for prompt in ([1, 2], [3])]
    together = [fixed.generate(prompt, 2, max_tokens=12, seed=1) for prompt in ([1, 2], [3])]
    got = [[], []]
    while any(columns := [next(stream, None) for stream in together]):
        for into, column in zip(got, columns):
            into += [column] if column else []
    assert got == wanted
    cache = fixed.static.cache
    assert list(fixed.generate([3], 2, max_tokens=12, seed=1)) == wanted[1] and fixed.static.cache is cache


def test_weights_elsewhere_are_noticed(one, tokenizer):
    plain, fixed = both(one, tokenizer)
    before = said(fixed.generate_many([[1, 2, 3]], max_tokens=9, temperature=0))
    cache = fixed.static.cache
    other = small_model(9, vocab_size=tokenizer.get_vocab_size(), sequence_len=64)
    one.load_state_dict(other.state_dict(), assign=True)
    after = said(fixed.generate_many([[1, 2, 3]], max_tokens=9, temperature=0))
    assert after != before and after == said(plain.generate_many([[1, 2, 3]], max_tokens=9, temperature=0))
    assert fixed.static.cache is not cache


@pytest.mark.parametrize("fails", range(1, 7))
def test_where_memory_is_short_rows_go_on_without(one, tokenizer, monkeypatch, caplog, fails):
    plain, fixed = both(one, tokenizer)
    calls, grow, captured = [0], type(one.new_cache()).grow, StaticDecoder._captured

    def scarce(real):
        def run(*args):
            calls[0] += 1
            if calls[0] == fails:
                raise torch.OutOfMemoryError("no more")
            return real(*args)
        return run

    prompts = prompts_of(2, 4, longest=3)
    wanted = said(plain.generate_many(prompts, 2, max_tokens=30, batch_size=5, **DRAWN))
    monkeypatch.setattr("nanochat.cache.Cache.grow", scarce(grow))
    monkeypatch.setattr(StaticDecoder, "_captured", scarce(captured))
    for _ in range(2):
        assert said(fixed.generate_many(prompts, 2, max_tokens=30, batch_size=5, **DRAWN)) == wanted
    assert caplog.text.count("too little memory") == 1


def test_a_server_on_such_steps_says_what_one_without_says(one, tokenizer):
    chance = random.Random(2)

    def requests():
        return [RowRequest(f"r{i}", prompt, 12, Settings(1.2, 40, 0.95, 1.1, seed=i), logprobs=2 if i == 3 else None)
                for i, prompt in enumerate(prompts_of(3, 9, longest=40))]

    def run(engine, rows, waits):
        scheduler, events, coming = Scheduler(engine, max_rows=rows, max_waiting=99, chunk=8), {}, requests()
        scheduler._batch.batch_invariant = scheduler._batch._keeps_memory = False  # as on a GPU
        while coming or scheduler.busy:
            if coming and not waits():
                scheduler.submit(coming.pop())
            for event in scheduler.step():
                events.setdefault(event.id, []).append((event.kind, event.token, event.finish))
        return events

    plain, fixed = both(one, tokenizer)
    alone = run(plain, 1, lambda: False)
    for rows in (1, 3, 5):
        events = run(fixed, rows, lambda: chance.random() < 0.6)
        assert {id: [e for e in mine if e[0] != "started"] for id, mine in events.items()} == {
            id: [e for e in mine if e[0] != "started"] for id, mine in alone.items()}
    assert fixed.static._runners


def test_what_was_captured_goes_when_memory_moves(one, tokenizer):
    engine = Engine(one, tokenizer, graphs=True)
    steps = engine.static
    engine.generate_many([[1, 2]], max_tokens=5)
    assert steps._runners
    for max_rows, max_len in ((steps.cache.max_rows, 2 * steps.cache.max_len), (2 * steps.cache.max_rows, 1)):
        with torch.inference_mode():
            steps.reserve(max_rows, max_len)
        assert not steps._runners and len(steps.tokens) == steps.cache.max_rows
        engine.generate_many([[1, 2]], max_tokens=5)
        known = dict(steps._runners)
        engine.generate_many([[1, 2]], max_tokens=5)
        assert steps._runners == known and known


def test_what_is_known_is_bounded(one, tokenizer, monkeypatch):
    monkeypatch.setattr(graphs, "MAX_GRAPHS", 3)
    plain, fixed = both(one, tokenizer)
    prompts = prompts_of(6, 7)
    assert said(fixed.generate_many(prompts, max_tokens=20, **DRAWN)) == said(plain.generate_many(prompts, max_tokens=20, **DRAWN))
    assert len(fixed.static._runners) == 3


def test_it_is_for_gpus_and_can_be_turned_off(one, tokenizer, monkeypatch):
    assert Engine(one, tokenizer).static is None and Engine(one, tokenizer, graphs=True).static is not None
    monkeypatch.setattr(type(one), "device", torch.device("cuda"))
    monkeypatch.setattr(engine_module, "StaticDecoder", lambda model: "static")
    assert Engine(one, tokenizer).static == "static" and Engine(one, tokenizer, graphs=False).static is None
    monkeypatch.setenv("NANOCHAT_GRAPHS", "0")
    assert Engine(one, tokenizer).static is None and Engine(one, tokenizer, graphs=True).static == "static"


def test_a_fixed_step_is_one_token_a_row(one):
    with pytest.raises(ValueError, match="one token a row, not of 3"):
        one.static_step(torch.zeros(2, 3, dtype=torch.long), torch.zeros(2, dtype=torch.long), one.new_cache(2, 8), 8)


def test_buckets_are_powers_of_two():
    assert [bucket(n) for n in (0, 1, 2, 3, 4, 5, 64, 65)] == [1, 1, 2, 4, 4, 8, 64, 128] and bucket(3, 256) == 256


# --- on a GPU: captured for real

@pytest.fixture
def on_gpu(tokenizer):
    def make(dtype=torch.float32, **given):
        shape = {"n_embd": 128, "n_head": 2, "sequence_len": 64, "vocab_size": tokenizer.get_vocab_size(), **given}
        return small_model(5, **shape).to("cuda", dtype)
    return make


@pytest.mark.gpu
@pytest.mark.parametrize("given", MODELS[:4], ids=str)
def test_on_a_gpu_captured_steps_give_the_tokens_of_ordinary_ones(on_gpu, tokenizer, given):
    plain, fixed = both(on_gpu(**given), tokenizer)
    prompts = prompts_of(1, 12, longest=30)
    for options in ({"temperature": 0}, DRAWN, {"temperature": 1.0}, {"temperature": 0.9, "top_p": 0.8}):
        for batch_size in (1, 5, 64):
            options = {"num_samples": 2, "max_tokens": 30, "batch_size": batch_size, **options}
            wanted, got = said(plain.generate_many(prompts, **options)), said(fixed.generate_many(prompts, **options))
            assert sum(a != b for one, other in zip(wanted, got) for a, b in zip(one, other)) <= 1  # a near tie of two sums
    assert fixed.static._can_capture and all(piece.func is graphs._replay for piece in fixed.static._runners.values())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_on_a_gpu_captured_logits_are_those_of_a_full_forward(on_gpu, tokenizer, dtype):
    model = on_gpu(dtype)
    batch = Batch(Engine(model, tokenizer))
    batch.add_prompts([Row(prompt, 40, Settings(seed=i), stops=()) for i, prompt in enumerate(prompts_of(2, 5))])
    for _ in range(30):
        batch.step()
        for i, row in enumerate(batch.rows):
            with torch.no_grad():
                wanted = model(torch.tensor([[*row.prompt, *row.tokens]], device="cuda"))[0, -1]
            assert (batch._logits[i] - wanted).norm() < (1e-4 if dtype == torch.float32 else 0.1) * wanted.norm()


@pytest.mark.gpu
def test_on_a_gpu_a_single_row_gets_the_logits_of_a_full_forward(on_gpu, tokenizer, monkeypatch):
    monkeypatch.setenv("NANOCHAT_DTYPE", "bfloat16")
    model = ready_to_decode(on_gpu())
    batch = Batch(Engine(model, tokenizer))
    batch.add_prompts([Row([1, 2, 3], 40, Settings(seed=1), stops=())])
    for _ in range(30):
        batch.step()
        with torch.no_grad():
            wanted = model(torch.tensor([[*batch.rows[0].prompt, *batch.rows[0].tokens]], device="cuda"))[0, -1]
        assert (batch._logits[0] - wanted).norm() < 0.1 * wanted.norm()


@pytest.mark.gpu
def test_on_a_gpu_a_step_waits_for_nothing_but_its_tokens(on_gpu, tokenizer, monkeypatch):
    monkeypatch.setattr(graphs, "MIN_LENGTH", 64)
    batch = Batch(Engine(on_gpu(), tokenizer))
    batch.add_prompts([Row(prompt, 40, Settings(*DRAWN.values(), seed=i), stops=()) for i, prompt in enumerate(prompts_of(2, 5))])
    for _ in range(3):
        batch.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(5):
            batch.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_on_a_gpu_what_cannot_be_captured_runs_uncaptured(on_gpu, tokenizer, monkeypatch, caplog):
    plain, fixed = both(on_gpu(), tokenizer)
    forward = StaticDecoder._forward

    def reads(self, B, S):
        forward(self, B, S)
        self.tokens.sum().item()

    monkeypatch.setattr(StaticDecoder, "_forward", reads)
    options = {"num_samples": 2, "max_tokens": 9, "temperature": 0}
    assert said(fixed.generate_many([[1, 2]], **options)) == said(plain.generate_many([[1, 2]], **options))
    assert caplog.text.count("cannot be captured") == 1
