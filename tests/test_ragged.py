"""Batches of few shapes: what is padded changes no result, and how many shapes a stage can meet on a GPU."""

import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import nanochat.attention
from nanochat import chat_data, ragged
from nanochat.chat_data import SupervisedSteps
from nanochat.distributed import Ranks
from nanochat.engine import Engine, Row
from nanochat.evaluation import core
from nanochat.evaluation.chat import evaluate_task
from nanochat.evaluation.core import Question, score_questions
from nanochat.evaluation.loss import log_likelihoods
from nanochat.ragged import length_on, padded, round_length, round_rows
from nanochat.request import Settings
from nanochat.rl import AnswerGroup, batches
from nanochat.server.messages import RowRequest
from nanochat.server.scheduler import Scheduler
from nanochat.tokenizer import RustBPETokenizer
from tasks.small_world import WorldChoice, WorldQuestions
from tests.helpers import small_model

CPU = torch.device("cpu")
ALONE = Ranks(0, 0, 1, CPU)


@pytest.fixture
def few_shapes(monkeypatch):
    """A CPU that is treated like a GPU; called with False, like a CPU again."""
    def turn(on=True):
        for module in (ragged, chat_data):
            monkeypatch.setattr(module, "has_few_shapes", lambda device: on)
    turn()
    return turn


@pytest.fixture
def shapes(monkeypatch):
    """The shapes that attention meets: (B, T, S, whether there is a mask)."""
    met = set()
    attend = nanochat.attention.attend

    def recorded(q, k, v, **options):
        met.add((*q.shape[:2], k.shape[1], options.get("mask") is not None))
        return attend(q, k, v, **options)

    monkeypatch.setattr(nanochat.attention, "attend", recorded)
    return met


@pytest.fixture(scope="module")
def world():
    texts = [message["content"] for task in (WorldQuestions("train", size=60), WorldChoice("train", size=30))
             for chat in task for message in chat["messages"]]
    tokenizer = RustBPETokenizer.train_from_iterator(texts, 400)
    return small_model(5, vocab_size=tokenizer.get_vocab_size(), sequence_len=128), tokenizer


# ---- the rule

@given(st.integers(1, 5000), st.sampled_from([32, 64, 128, 256]), st.none() | st.integers(1, 4096),
       st.sampled_from([1, 2, 4]))
def test_lengths_are_rounded_up_to_a_few_in_each_octave(n, least, most, parts):
    allowed = sorted({(least << k) * (parts + j) // parts for k in range(9) for j in range(parts)})
    length = round_length(n, least, most, parts)
    wanted = next(size for size in allowed if size >= n)
    assert length == (wanted if most is None or n > most else min(wanted, most)) and n <= length


@given(st.integers(1, 300), st.integers(0, 300))
def test_rows_are_rounded_up_by_a_quarter_at_most_within_the_full_batch(n, most):
    allowed = [*range(1, 8), *sorted((8 << k) * (4 + j) // 4 for k in range(9) for j in range(4))]
    assert round_rows(n, most) == min(next(size for size in allowed if size >= n), max(n, most))


def test_on_a_cpu_nothing_is_rounded_and_on_a_gpu_what_is_added_is_behind():
    rows = [[5, 6, 7], [8] * 50, [9]]
    ids, counts = padded(rows, "cpu", 1 << 14)
    assert ids.shape == (3, 50) and counts == [3, 50, 1] and length_on("cpu", 50) == 50
    assert length_on("cuda", 50) == 56 == length_on(torch.device("cuda", 1), 56)


def test_padded_rows_fill_the_batch_within_its_budget(few_shapes):
    rows = [[5, 6, 7], [8] * 50, [9]]
    rows *= 3
    ids, counts = padded(rows, "cpu", 1 << 14)
    assert ids.shape == (10, 56) and counts == [3, 50, 1] * 3 + [1]
    assert [row[:n].tolist() for row, n in zip(ids, counts)] == [*rows, [0]] and ids.sum() == 3 * (18 + 400 + 9)
    assert padded(rows, "cpu", 9 * 56)[0].shape == (9, 56)
    assert padded(rows, "cpu", 1 << 14, most_rows=9)[0].shape == (9, 56)


# ---- results do not depend on padding

class Chats(list):
    name = "Chats"


class Lengths:
    """A tokenizer whose conversations are numbers: how many tokens each has. The second half is the answer."""

    def get_bos_token_id(self):
        return 0

    def render_conversation(self, size, max_tokens):
        return ([0] * size)[:max_tokens], ([0] * (size // 2) + [1] * (size - size // 2))[:max_tokens]


def supervised(sizes, ranks=ALONE, **options):
    return SupervisedSteps(Lengths(), Chats(sizes), ranks=ranks, **options)


def losses_and_gradients(model, micro_batches):
    model.zero_grad()
    losses = []
    for inputs, targets, *factors in micro_batches:
        loss = model(inputs, targets, "sum", factors=factors[0] if factors else None)
        loss.backward()
        losses.append(loss.item())
    return losses, [p.grad.clone() for p in model.parameters()]


def test_training_batches_give_the_same_loss_and_gradients(few_shapes):
    model, rng = small_model(1, sequence_len=256), random.Random(0)
    sizes = [rng.randrange(4, 90) for _ in range(11)]
    options = {"examples_per_step": 11, "device_batch_size": 4, "max_tokens": 128}
    groups = []
    for rewards in ([1, 0, 0.5], [0, 1, 1]):
        rows = [Row([rng.randrange(97) for _ in range(9)], 60) for _ in rewards]
        for row in rows:
            row.tokens = [rng.randrange(97) for _ in range(rng.randrange(1, 60))]
            row.mask = [rng.randrange(2) for _ in row.tokens]
        groups.append(AnswerGroup(rows, rewards))
    found = {}
    for on in (False, True):
        few_shapes(on)
        with supervised(sizes, **options) as steps:
            supervised_batches = list(steps(0))
        reinforced = list(batches(groups, 4, 0, "cpu"))
        found[on] = [losses_and_gradients(model, part) for part in (supervised_batches, reinforced)]
        shapes = {tuple(inputs.shape) for inputs, *_ in (*supervised_batches, *reinforced)}
        assert (shapes <= {(4, 64), (4, 96), (4, 128)}) == on
    for plain, wide in zip(found[False], found[True]):
        assert wide[0] == pytest.approx(plain[0], rel=1e-5, abs=1e-4)
        for a, b in zip(plain[1], wide[1]):  # sums over rows of another number: other rounding
            torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-4 * a.abs().max().item())


def random_questions(count, rng, vocab=97):
    """Multiple choice with few or many shots before it, and language modelling."""
    questions = []
    for number in range(count):
        shots = [rng.randrange(1, vocab) for _ in range(rng.choice([0, 3, 60]))]
        context = [0, *shots, *(rng.randrange(1, vocab) for _ in range(rng.randrange(1, 30)))]
        choices = [context + [rng.randrange(1, vocab) for _ in range(rng.randrange(1, 9))]
                   for _ in range(1 if number % 3 == 0 else rng.randrange(2, 5))]
        questions.append(Question(choices, [len(context)] * len(choices), None if len(choices) == 1 else 0))
    return questions


def test_core_gives_the_same_results(few_shapes):
    model, questions = small_model(2, sequence_len=64), random_questions(60, random.Random(1))
    wide = score_questions(model, questions, 512)
    few_shapes(False)
    plain = score_questions(model, questions, 512)
    assert [one.correct for one in wide] == [one.correct for one in plain]
    assert [x for one in wide for x in one.losses] == pytest.approx([x for one in plain for x in one.losses], abs=1e-4)


def test_chat_tasks_get_the_same_answers(few_shapes, world):
    model, tokenizer = world

    def graded():
        return [evaluate_task(model, tokenizer, task, ALONE, batch_size=6, max_tokens=9).rows
                for task in (WorldChoice("test", size=20), WorldQuestions("test", size=11))]

    wide = graded()
    few_shapes(False)
    assert wide == graded()


def test_samples_of_one_prompt_and_likelihoods_are_the_same(few_shapes, world):
    model, tokenizer = world
    prompts = [[0, *(7 * i % 300 for i in range(n))] for n in (3, 40, 11)]
    texts, options = ["where is", "a"], [[" the house", " it"], ["b", "c"]]

    def found():
        rows = Engine(model, tokenizer).generate_many(prompts, 3, max_tokens=7, temperature=0.9, seed=5)
        return [row.tokens for group in rows for row in group], log_likelihoods(model, tokenizer, texts, options)

    wide = found()
    few_shapes(False)
    plain = found()
    assert wide[0] == plain[0]
    assert sum(wide[1], []) == pytest.approx(sum(plain[1], []), abs=1e-4)


def serve_prompts(scheduler, vocab=256):
    """Return the events of prompts of one to three chunks of 64, some with the same beginning."""
    rng = random.Random(3)
    begin = [rng.randrange(vocab) for _ in range(70)]
    for number, n in enumerate((1, 5, 64, 65, 100, 118)):
        prompt = [*begin, *range(n)][:n]
        scheduler.submit(RowRequest(str(number), prompt, 9, Settings(0), logprobs=2, prompt_logprobs=n > 90))
    told = {}
    while scheduler.busy:
        for event in scheduler.step():
            told.setdefault(event.id, []).append(event)
    return told


def serve(world, chunk=64):
    return serve_prompts(Scheduler(Engine(*world), chunk=chunk, max_rows=4))


def test_the_server_says_the_same(few_shapes, world):
    wide = serve(world)
    few_shapes(False)
    plain = serve(world)
    assert wide.keys() == plain.keys()
    for id, events in wide.items():
        assert [event.token for event in events] == [event.token for event in plain[id]]
        for a, b in zip(events, plain[id]):
            if a.prompt_logprobs:
                assert [x for x, _ in a.prompt_logprobs[1:]] == pytest.approx(
                    [x for x, _ in b.prompt_logprobs[1:]], abs=1e-3)


# ---- how many shapes

LENGTHS = {16, 20, 24, 28, 32, 40, 48, 56, 64, 80, 96, 112, 128}  # of prompts up to 128 tokens
ROWS = {*range(1, 9), 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 56, 64}


def modelled_lengths(count=22_400, longest=2048):
    """Tokens of conversations as the published mixture has them: half short, half log-normal with a median of 500."""
    rng = np.random.default_rng(0)
    sizes = np.minimum(np.exp(rng.normal(np.log(500), 0.8, count)), longest + 1).astype(int).clip(8)
    short = count * 114 // 224
    sizes[:short] = rng.integers(80, 350, short)
    rng.shuffle(sizes)
    return sizes.tolist()


@pytest.mark.parametrize("world_size, steps", [(8, 700), (1, 40), (3, 40), (64, 40)])
def test_fine_tuning_meets_at_most_eight_shapes(few_shapes, monkeypatch, world_size, steps):
    sizes, seen, before, ones = modelled_lengths(), set(), set(), np.ones(2049, dtype=np.int64)
    for rank in range(world_size):
        ranks = Ranks(rank, 0, world_size, CPU)
        with supervised(sizes, ranks, examples_per_step=max(32, world_size), device_batch_size=4,
                        max_tokens=2048) as stage:
            monkeypatch.setattr(stage, "_usable", lambda number: (ones[:sizes[number % len(sizes)]],) * 2)
            for step in range(steps):
                rows = stage._make(step)
                before |= {(len(rows[i:i + 4]), len(rows[i:i + 4][-1][0])) for i in range(0, len(rows), 4)}
                seen |= {tuple(inputs.shape) for inputs, _ in stage.micro_batches(rows)}
    assert len(seen) <= 8 < len(before) / 5, seen


def test_reinforcement_learning_meets_few_shapes(few_shapes, shapes):
    rng, seen = random.Random(0), set()
    for _ in range(100):
        groups = []
        for _ in range(rng.randrange(1, 4)):
            prompt = [1] * rng.randrange(50, 250)
            rows = [Row(prompt, 256, tokens=[1] * n, mask=[1] * n) for n in rng.choices(range(5, 257), k=16)]
            groups.append(AnswerGroup(rows, [rng.randrange(2) for _ in rows]))
        seen |= {tuple(inputs.shape) for inputs, *_ in batches(groups, 8, 0, "cpu")}
    assert len(seen) <= 8, seen


def test_prompts_meet_few_shapes(few_shapes, shapes, world):
    """Rollouts, and chat tasks of both kinds."""
    model, tokenizer = world
    rng = random.Random(0)
    for count in range(1, 40):
        prompts = [[rng.randrange(256) for _ in range(rng.randrange(2, 100))] for _ in range(count)]
        Engine(model, tokenizer).generate_many(prompts, 2, max_tokens=1, batch_size=32)
    evaluate_task(model, tokenizer, WorldChoice("test", size=90), ALONE, batch_size=16)
    evaluate_task(model, tokenizer, WorldQuestions("test", size=50), ALONE, batch_size=16, max_tokens=2)
    prefill = {shape for shape in shapes if shape[1] > 1}
    assert {B for B, *_ in prefill} <= ROWS and {T for _, T, *_ in prefill} <= LENGTHS
    assert len(prefill) <= 40


def test_core_meets_few_shapes(few_shapes, shapes, monkeypatch):
    monkeypatch.setattr(core, "TIE_MARGIN", 0)  # no question is scored again alone; on a GPU none is, in bfloat16
    model, rng = small_model(2, sequence_len=64), random.Random(4)
    for _ in range(12):
        score_questions(model, random_questions(50, rng), 1024)
    met = {(T, S) for _, T, S, _ in shapes if T > 1}
    assert met <= {(T, T) for T in LENGTHS} | {(T, 256) for T in LENGTHS}
    assert {B for B, *_ in shapes} <= ROWS | {1024 // T for T in LENGTHS}


def test_the_server_meets_few_shapes(few_shapes, shapes, world):
    for chunk in (32, 64):
        serve(world, chunk)
    met = {shape for shape in shapes if shape[1] > 1}
    assert {T for _, T, _, _ in met} <= LENGTHS and {S for *_, S, masked in met if masked} == {256}
