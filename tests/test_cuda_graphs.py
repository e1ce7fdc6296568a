"""nanochat/engine/cuda_graphs.py: the static decode steps of StaticDecoder give the results of ordinary decode steps.

Without a GPU the same functions run without capture.
"""

import copy
import random

import pytest
import torch
from hypothesis import example, given, settings
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

MODELS = [{}, {"n_kernel": 1, "n_kv_head": 1}, {"n_kernel": 2, "layer_pattern": "AAAA"},
          {"n_kernel": 4, "layer_pattern": "SSSS"}, {"n_embd": 48, "n_head": 6, "n_kv_head": 3, "window": 5}]
SAMPLED = {"temperature": 1.3, "top_k": 30, "top_p": 0.95, "repetition_penalty": 1.1}


@pytest.fixture(scope="module")
def tokenizer():
    texts = ["what is 12+30? it is 42", "spell: a,b,c 'word'.count('o') 0123456789 + - * /"]
    return RustBPETokenizer.train_from_iterator(texts * 3, 280)


@pytest.fixture(scope="module", params=MODELS, ids=str)
def model(request, tokenizer):
    return small_model(3, vocab_size=tokenizer.get_vocab_size(), sequence_len=64, **request.param)


@pytest.fixture
def gpt(tokenizer):
    return small_model(4, vocab_size=tokenizer.get_vocab_size(), sequence_len=64)


@pytest.fixture(autouse=True)
def small_buckets(monkeypatch):
    """Make buckets so small that rows of a few tokens move from one bucket to the next, and memory grows."""
    monkeypatch.setattr(graphs, "MIN_LENGTH", 4)
    monkeypatch.setattr(batch_module, "MIN_LENGTH", 4)
    monkeypatch.setattr(graphs, "MIN_TOP_K", 2)


def engines(model, tokenizer, **options):
    """Return an engine with ordinary decode steps and one with static decode steps."""
    return Engine(model, tokenizer, graphs=False, **options), Engine(model, tokenizer, graphs=True, **options)


def prompts_of(seed, count, longest=20):
    chance = random.Random(seed)
    return [[chance.randrange(256) for _ in range(chance.randint(1, longest))] for _ in range(count)]


def outputs(answers):
    return [[(row.tokens, row.mask, row.ended) for row in rows] for rows in answers]


def test_logits_and_cache_are_those_of_ordinary_steps_while_rows_join_and_leave(model, tokenizer):
    chance = random.Random(1)
    plain, graphed = (Batch(engine) for engine in engines(model, tokenizer))
    kinds = [Settings(temperature=0), Settings(1.2, 9, None, 1.2, seed=1), Settings(0.8, None, 0.9, seed=2),
             Settings(seed=3)]
    for step in range(40):
        if step % 5 == 0:
            prompts = prompts_of(step, chance.randint(1, 4))
            joining = [(prompt, chance.randint(1, 25), chance.choice(kinds)) for prompt in prompts]
            for batch in (plain, graphed):
                batch.add_prompts([Row(prompt, most, own, stops=()) for prompt, most, own in joining])
        if step == 17:  # a request is cancelled
            for batch in (plain, graphed):
                batch.remove([batch.rows[0]])
        assert [row.tokens for row in graphed.step()] == [row.tokens for row in plain.step()]
        assert graphed._static is not None
        n = len(graphed.rows)
        assert [row.tokens for row in graphed.rows] == [row.tokens for row in plain.rows]
        live = [i for i, row in enumerate(graphed.rows) if not row.ended]
        assert [graphed._cache.lengths[i] for i in live] == [plain._cache.lengths[i] for i in live]
        if n:
            assert torch.allclose(graphed._logits[live], plain._logits[live], atol=1e-4)
        for mine, other in zip(graphed._cache.layers if n else (), plain._cache.layers if n else ()):
            for name in mine.per_row:
                assert torch.allclose(mine.per_row[name][live], other.per_row[name][live], atol=1e-4)


def test_a_single_row_of_a_model_that_only_decodes_gets_the_same_in_fewer_operations(model, tokenizer, monkeypatch):
    ready = ready_to_decode(copy.deepcopy(model))
    assert ready.has_single_row_step() and not model.has_single_row_step()
    calls, single_row_step = [0], Block.single_row_step

    def counted(*args):
        calls[0] += 1
        return single_row_step(*args)

    monkeypatch.setattr(Block, "single_row_step", counted)
    plain, graphed = (Batch(engine) for engine in engines(ready, tokenizer))
    for batch in (plain, graphed):
        batch.add_prompts([Row([3, 1, 4, 1, 5], 30, Settings(seed=1), stops=())])
    for _ in range(29):
        assert [row.tokens for row in graphed.step()] == [row.tokens for row in plain.step()]
        assert torch.allclose(graphed._logits, plain._logits, atol=1e-4)
    assert calls[0] >= 29 * model.config.n_layer
    assert not quantize(copy.deepcopy(model)).has_single_row_step()


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 999), count=st.integers(1, 9), num_samples=st.integers(1, 3), batch_size=st.integers(1, 9),
       options=st.sampled_from([{"temperature": 0}, SAMPLED, {"temperature": 1.0}, {"temperature": 0.9, "top_p": 0.8}]))
@example(seed=254, count=8, num_samples=2, batch_size=1, options={"temperature": 0.9, "top_p": 0.8})  # in float32 not
def test_a_seed_gives_the_same_tokens_with_and_without(tokenizer, seed, count, num_samples, batch_size, options):
    model = small_model(seed % 3, vocab_size=tokenizer.get_vocab_size(), sequence_len=64, n_kv_head=1 + seed % 2)
    plain, graphed = engines(model.double(), tokenizer)  # in float32 rounding decides one token in some ten thousand
    prompts = prompts_of(seed, count)
    options = {"num_samples": num_samples, "batch_size": batch_size, "max_tokens": 15, "seed": seed, **options}
    for _ in range(2):  # the second time reuses the memory
        assert outputs(graphed.generate_many(prompts, **options)) == outputs(plain.generate_many(prompts, **options))
    assert list(graphed.generate(prompts[0], 3, max_tokens=9)) == list(plain.generate(prompts[0], 3, max_tokens=9))


def test_a_static_decode_step_reads_nothing_on_the_host_and_depends_on_shapes_alone(model, tokenizer):
    """Fake tensors have no values, so reading one on the host fails. No tensor may be made from values of the host."""
    class Watched(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            assert not any(name in func.name() for name in ("lift_fresh", "_local_scalar", "nonzero")), func
            return func(*args, **(kwargs or {}))

    static = StaticDecoder(ready_to_decode(copy.deepcopy(model)))
    with torch.inference_mode():
        static.reserve(8, 32)
        static.model.rope(32)  # makes the table of rotary angles, which is made once
    with FakeTensorMode(allow_non_fake_inputs=True) as fake, torch.inference_mode(), Watched():
        for layer in static.cache.layers:
            for part in (layer.per_token, layer.per_row):
                part.update({name: fake.from_tensor(tensor) for name, tensor in part.items()})
        for name in ("logits", "tokens", "seen", "_inputs"):
            setattr(static, name, fake.from_tensor(getattr(static, name)))
        static._forward(4, 16)
        static._forward(1, 32)
        static._sample(4, False, 8, 16, True)
        static._sample(4, True, 0, 0, False)
        # what the test forbids does fail
        for forbidden in (lambda: int(static.tokens[0]), lambda: torch.tensor([1]), lambda: static.seen.nonzero()):
            with pytest.raises((AssertionError, DataDependentOutputException, DynamicOutputShapeException)):
                forbidden()


def test_unused_memory_may_hold_anything(gpt, tokenizer):
    plain, graphed = engines(gpt, tokenizer)
    prompts = prompts_of(5, 3)
    with torch.inference_mode():
        graphed.static.reserve(8, 64)
        for layer in graphed.static.cache.layers:
            for tensor in layer.tensors():
                tensor.fill_(torch.nan)
        graphed.static.logits.fill_(torch.nan)
    wanted = outputs(plain.generate_many(prompts, max_tokens=15, **SAMPLED))
    assert outputs(graphed.generate_many(prompts, max_tokens=15, **SAMPLED)) == wanted


def test_warm_up_and_capture_change_no_row(gpt, tokenizer):
    batch = Batch(Engine(gpt, tokenizer, graphs=True))
    batch.add_prompts([Row(prompt, 9, Settings(*SAMPLED.values(), seed=1)) for prompt in prompts_of(1, 3)])
    static = batch._static

    def contents():
        parts = [static.logits[:3], static.tokens[:3], static.seen[:3]]
        for layer in static.cache.layers:
            parts += [tensor[:3] for tensor in layer.per_row.values()]
            parts += [tensor[i, :length] for tensor in layer.per_token.values()
                      for i, length in enumerate(static.cache.lengths)]
        return [part.clone() for part in parts]

    for _ in range(3):
        before = contents()
        static._drop_graphs()
        with torch.inference_mode():
            assert static.prepare(batch.rows, batch._sampler) and len(static._runners) == 2
        assert all(map(torch.equal, contents(), before))
        batch.step()


def test_log_probabilities_and_forced_tokens_are_those_of_ordinary_steps(gpt, tokenizer):
    """Two rows of one batch: one asks for log-probabilities, in the other the model calls the tool."""
    special = tokenizer.encode_special
    call = [special("<|python_start|>"), *tokenizer.encode("1+1"), special("<|python_end|>")]
    for numbers in (None, 2):
        rows = []
        for engine in engines(gpt, tokenizer):
            batch = Batch(engine)
            mine = [Row([5, 6], 20, Settings(seed=1), logprobs=numbers, stops=()),
                    Row([7], 20, Settings(seed=2), stops=())]
            batch.add_prompts(mine)
            for step in range(20):
                batch.step()
                if step in (3, 9):  # as if the row had written a call
                    for token in call:
                        engine.take(mine[1], token)
                    del mine[1].tokens[-len(call):], mine[1].mask[-len(call):]
            rows.append(mine)
        for plain, graphed in zip(*rows):
            assert plain.tokens == graphed.tokens and plain.mask == graphed.mask
            wanted = [[(id, pytest.approx(p, abs=1e-4)) for id, p in top] for _, top in plain.scores]
            assert [top for _, top in graphed.scores] == wanted
        assert rows[0][1].mask.count(0) >= 6 and len(rows[1][0].scores) == (20 if numbers else 0)


def test_two_batches_at_once_do_not_share_memory(gpt, tokenizer):
    plain, graphed = engines(gpt, tokenizer)
    wanted = [list(plain.generate(prompt, 2, max_tokens=12, seed=1)) for prompt in ([1, 2], [3])]
    together = [graphed.generate(prompt, 2, max_tokens=12, seed=1) for prompt in ([1, 2], [3])]
    got = [[], []]
    while any(columns := [next(stream, None) for stream in together]):
        for into, column in zip(got, columns):
            into += [column] if column else []
    assert got == wanted
    cache = graphed.static.cache
    assert list(graphed.generate([3], 2, max_tokens=12, seed=1)) == wanted[1] and graphed.static.cache is cache


def test_moved_weights_are_noticed(gpt, tokenizer):
    plain, graphed = engines(gpt, tokenizer)
    before = outputs(graphed.generate_many([[1, 2, 3]], max_tokens=9, temperature=0))
    cache = graphed.static.cache
    other = small_model(9, vocab_size=tokenizer.get_vocab_size(), sequence_len=64)
    gpt.load_state_dict(other.state_dict(), assign=True)
    after = outputs(graphed.generate_many([[1, 2, 3]], max_tokens=9, temperature=0))
    assert after != before and after == outputs(plain.generate_many([[1, 2, 3]], max_tokens=9, temperature=0))
    assert graphed.static.cache is not cache


@pytest.mark.parametrize("fails", range(1, 7))
def test_where_memory_is_short_rows_continue_without_static_steps(gpt, tokenizer, monkeypatch, caplog, fails):
    plain, graphed = engines(gpt, tokenizer)
    calls, grow, captured = [0], type(gpt.new_cache()).grow, StaticDecoder._captured

    def scarce(real):
        def run(*args):
            calls[0] += 1
            if calls[0] == fails:
                raise torch.OutOfMemoryError("no more")
            return real(*args)
        return run

    prompts = prompts_of(2, 4, longest=3)
    wanted = outputs(plain.generate_many(prompts, 2, max_tokens=30, batch_size=5, **SAMPLED))
    monkeypatch.setattr("nanochat.cache.Cache.grow", scarce(grow))
    monkeypatch.setattr(StaticDecoder, "_captured", scarce(captured))
    for _ in range(2):
        assert outputs(graphed.generate_many(prompts, 2, max_tokens=30, batch_size=5, **SAMPLED)) == wanted
    assert caplog.text.count("too little memory") == 1


def test_a_server_with_static_steps_gives_the_events_of_one_without(gpt, tokenizer):
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

    plain, graphed = engines(gpt, tokenizer)
    alone = run(plain, 1, lambda: False)
    for rows in (1, 3, 5):
        events = run(graphed, rows, lambda: chance.random() < 0.6)
        assert {id: [e for e in mine if e[0] != "started"] for id, mine in events.items()} == {
            id: [e for e in mine if e[0] != "started"] for id, mine in alone.items()}
    assert graphed.static._runners


def test_captured_graphs_are_dropped_when_memory_moves(gpt, tokenizer):
    engine = Engine(gpt, tokenizer, graphs=True)
    static = engine.static
    engine.generate_many([[1, 2]], max_tokens=5)
    assert static._runners
    for max_rows, max_len in ((static.cache.max_rows, 2 * static.cache.max_len), (2 * static.cache.max_rows, 1)):
        with torch.inference_mode():
            static.reserve(max_rows, max_len)
        assert not static._runners and len(static.tokens) == static.cache.max_rows
        engine.generate_many([[1, 2]], max_tokens=5)
        runners = dict(static._runners)
        engine.generate_many([[1, 2]], max_tokens=5)
        assert static._runners == runners and runners


def test_the_number_of_graphs_is_bounded(gpt, tokenizer, monkeypatch):
    monkeypatch.setattr(graphs, "MAX_GRAPHS", 3)
    plain, graphed = engines(gpt, tokenizer)
    prompts = prompts_of(6, 7)
    wanted = outputs(plain.generate_many(prompts, max_tokens=20, **SAMPLED))
    assert outputs(graphed.generate_many(prompts, max_tokens=20, **SAMPLED)) == wanted
    assert len(graphed.static._runners) == 3


def test_static_steps_are_for_gpus_and_can_be_turned_off(gpt, tokenizer, monkeypatch):
    assert Engine(gpt, tokenizer).static is None and Engine(gpt, tokenizer, graphs=True).static is not None
    monkeypatch.setattr(type(gpt), "device", torch.device("cuda"))
    monkeypatch.setattr(engine_module, "StaticDecoder", lambda model: "static")
    assert Engine(gpt, tokenizer).static == "static" and Engine(gpt, tokenizer, graphs=False).static is None
    monkeypatch.setenv("NANOCHAT_GRAPHS", "0")
    assert Engine(gpt, tokenizer).static is None and Engine(gpt, tokenizer, graphs=True).static == "static"


def test_a_static_decode_step_is_one_token_a_row(gpt):
    with pytest.raises(ValueError, match="one token a row, not of 3"):
        gpt.static_step(torch.zeros(2, 3, dtype=torch.long), torch.zeros(2, dtype=torch.long), gpt.new_cache(2, 8), 8)


def test_buckets_are_powers_of_two():
    assert [bucket(n) for n in (0, 1, 2, 3, 4, 5, 64, 65)] == [1, 1, 2, 4, 4, 8, 64, 128] and bucket(3, 256) == 256


# --- on a GPU, with capture

@pytest.fixture
def on_gpu(tokenizer):
    def make(dtype=torch.float32, **given):
        shape = {"n_embd": 128, "n_head": 2, "sequence_len": 64, "vocab_size": tokenizer.get_vocab_size(), **given}
        return small_model(5, **shape).to("cuda", dtype)
    return make


@pytest.mark.gpu
@pytest.mark.parametrize("given", MODELS[:4], ids=str)
def test_on_a_gpu_captured_steps_give_the_tokens_of_ordinary_ones(on_gpu, tokenizer, given):
    plain, graphed = engines(on_gpu(**given), tokenizer)
    prompts = prompts_of(1, 12, longest=30)
    for options in ({"temperature": 0}, SAMPLED, {"temperature": 1.0}, {"temperature": 0.9, "top_p": 0.8}):
        for batch_size in (1, 5, 64):
            options = {"num_samples": 2, "max_tokens": 30, "batch_size": batch_size, **options}
            wanted = outputs(plain.generate_many(prompts, **options))
            got = outputs(graphed.generate_many(prompts, **options))
            different = sum(a != b for rows, others in zip(wanted, got) for a, b in zip(rows, others))
            assert different <= 1  # two logits may be nearly equal
    assert graphed.static._can_capture
    assert all(runner.func is graphs._replay for runner in graphed.static._runners.values())


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
    rows = [Row(prompt, 40, Settings(*SAMPLED.values(), seed=i), stops=()) for i, prompt in enumerate(prompts_of(2, 5))]
    batch.add_prompts(rows)
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
    plain, graphed = engines(on_gpu(), tokenizer)
    forward = StaticDecoder._forward

    def reads(self, B, S):
        forward(self, B, S)
        self.tokens.sum().item()

    monkeypatch.setattr(StaticDecoder, "_forward", reads)
    options = {"num_samples": 2, "max_tokens": 9, "temperature": 0}
    assert outputs(graphed.generate_many([[1, 2]], **options)) == outputs(plain.generate_many([[1, 2]], **options))
    assert caplog.text.count("cannot be captured") == 1
