"""nanochat/engine/: many prompts in one batch give the tokens of single rows; tool calls; limits and stop tokens."""


import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.engine import Engine, Row
from nanochat.errors import UserError
from nanochat.tokenizer import RustBPETokenizer
from tests.helpers import PARTS, small_model

TEXTS = ["what is 12+30? it is 42", "spell: a,b,c 'word'.count('o') 1 2 3 4 5 6 7 8 9 0 + - * /"] * 3


@pytest.fixture(scope="module")
def tokenizer():
    return RustBPETokenizer.train_from_iterator(TEXTS, 280)


@pytest.fixture(scope="module")
def engine(tokenizer):
    return Engine(small_model(3, vocab_size=tokenizer.get_vocab_size(), sequence_len=64), tokenizer)


@pytest.fixture(scope="module")
def float64_engines(tokenizer):
    """For batches of other shapes on random prompts: in float32 rounding decides one token in some ten thousand. The
    published model, and one with optional parts."""
    return [Engine(small_model(3, vocab_size=tokenizer.get_vocab_size(), sequence_len=64, **parts).double(), tokenizer)
            for parts in ({}, {**PARTS["modern"], "smear": True, "attn_conv": 3})]


def plain_greedy(engine, prompt, max_tokens):
    """The definition: a full forward pass over the whole row for each token, without a cache and without tools."""
    ids = list(prompt)
    for _ in range(max_tokens):
        with torch.no_grad():
            ids.append(int(engine.model(torch.tensor([ids]))[0, -1].argmax()))
        if ids[-1] in engine.stops:
            break
    return ids[len(prompt):]


prompt_lists = st.lists(st.lists(st.integers(0, 255), min_size=1, max_size=20), min_size=1, max_size=9)


@settings(max_examples=15, deadline=None)
@given(st.sampled_from([0, 1]), prompt_lists, st.integers(1, 12), st.integers(1, 8))
def test_many_prompts_together_equal_full_forwards(float64_engines, parts, prompts, max_tokens, batch_size):
    engine = float64_engines[parts]
    answers = engine.generate_many(prompts, max_tokens=max_tokens, temperature=0, batch_size=batch_size)
    for prompt, [row] in zip(prompts, answers):
        if sum(row.mask) == len(row.mask):  # no tool was called
            assert row.tokens == plain_greedy(engine, prompt, max_tokens)


@settings(max_examples=15, deadline=None)
@given(st.sampled_from([0, 1]), prompt_lists, st.integers(1, 3), st.integers(1, 9), st.integers(0, 5))
def test_sampled_rows_equal_those_of_one_prompt_alone(float64_engines, parts, prompts, num_samples, batch_size, seed):
    engine = float64_engines[parts]
    options = {"max_tokens": 10, "temperature": 1.3, "top_k": 30, "top_p": 0.95, "repetition_penalty": 1.1}
    seeds = [seed + i for i in range(len(prompts))]
    together = engine.generate_many(prompts, num_samples, seed=seeds, batch_size=batch_size, **options)
    for prompt, own, rows in zip(prompts, seeds, together):
        alone = engine.generate_many([prompt], num_samples, seed=own, **options)[0]
        wanted = [(row.tokens, row.mask, row.ended) for row in alone]
        assert [(row.tokens, row.mask, row.ended) for row in rows] == wanted
        assert [list(tokens) for tokens, _ in engine.generate(prompt, num_samples, seed=own, **options)][0] == [
            row.tokens[0] for row in alone]


def test_samples_differ_from_the_first_token_and_a_seed_reproduces_them(engine):
    columns = list(engine.generate([1, 2, 3], num_samples=32, max_tokens=3, seed=7))
    assert len(set(columns[0][0])) > 3
    assert columns == list(engine.generate([1, 2, 3], num_samples=32, max_tokens=3, seed=7))
    assert columns != list(engine.generate([1, 2, 3], num_samples=32, max_tokens=3, seed=8))


def written(engine, tokens, max_tokens=99):
    """Return a row whose model samples these tokens, with what the engine adds to them."""
    row = Row([0], max_tokens)
    for token in tokens:
        if row.ended:
            break
        while row._forced:
            engine.take(row, 5)  # a forced token replaces what is sampled
        engine.take(row, token)
    while row._forced and not row.ended:
        engine.take(row, 5)
    return row


def test_the_calculator_answers_between_python_start_and_end(engine, tokenizer):
    names = ("python_start", "python_end", "output_start", "output_end")
    start, end, out, done = (tokenizer.encode_special(f"<|{name}|>") for name in names)
    call, answer = tokenizer.encode("12+30"), tokenizer.encode("42")
    row = written(engine, [7, start, *call, end, 9])
    assert row.tokens == [7, start, *call, end, out, *answer, done, 9]
    assert row.mask == [1] * (3 + len(call)) + [0] * (2 + len(answer)) + [1]
    count = tokenizer.encode("'word'.count('o')")
    assert tokenizer.decode(written(engine, [start, *count, end]).tokens).endswith("<|output_start|>1<|output_end|>")
    for nothing in ("import os", "", "1/0"):  # no value: nothing is forced
        tokens = [start, *tokenizer.encode(nothing), end]
        assert written(engine, tokens).tokens == tokens


def test_forced_tokens_count_towards_max_tokens_and_closing_tokens_end_a_row(engine, tokenizer):
    names = ("python_start", "python_end", "assistant_end")
    start, end, stop = (tokenizer.encode_special(f"<|{name}|>") for name in names)
    row = written(engine, [start, *tokenizer.encode("1+1"), end], max_tokens=6)
    assert row.ended == "length" and len(row.tokens) == 6 and row.mask[-1] == 0
    row = written(engine, [3, stop, 4])
    assert row.ended == "stop" and row.tokens == [3, stop]


def test_a_model_that_calls_the_tool_reads_the_tools_answer(tokenizer):
    """A model trained to write 99 as the output of 12+30 gets 42, the calculator's output, and continues from it."""
    torch.manual_seed(0)
    model = small_model(1, vocab_size=tokenizer.get_vocab_size(), sequence_len=64)
    parts = [{"type": "python", "text": "12+30"}, {"type": "python_output", "text": "99"},
             {"type": "text", "text": "done"}]
    chat = {"messages": [{"role": "user", "content": "12+30?"}, {"role": "assistant", "content": parts}]}
    ids, _ = tokenizer.render_conversation(chat)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    row = torch.tensor([ids])
    for _ in range(60):
        optimizer.zero_grad()
        model(row[:, :-1], row[:, 1:]).backward()
        optimizer.step()
    engine = Engine(model, tokenizer)
    [[answer]] = engine.generate_many([tokenizer.render_for_completion(chat)], max_tokens=30, temperature=0)
    text = tokenizer.decode(answer.tokens)
    assert text.startswith("<|python_start|>12+30<|python_end|><|output_start|>42<|output_end|>"), text
    rows, masks = engine.generate_batch(tokenizer.render_for_completion(chat), max_tokens=30, temperature=0)
    assert rows[0][-len(answer.tokens) + 1:] == answer.tokens[:-1] or answer.ended == "length"
    assert 0 in masks[0][len(tokenizer.render_for_completion(chat)):]


def test_rows_that_have_ended_leave_the_batch(engine, monkeypatch):
    sizes = []
    forward = type(engine.model).forward

    def watched(self, ids, *args, **options):
        sizes.append(ids.shape[0])
        return forward(self, ids, *args, **options)

    monkeypatch.setattr(type(engine.model), "forward", watched)
    rows = engine.generate_many([[1]], num_samples=40, max_tokens=200, temperature=2.0)[0]
    assert any(row.ended == "stop" for row in rows)
    assert sizes[-1] < 40 and sizes[1:] == sorted(sizes[1:], reverse=True)


@pytest.mark.parametrize("call, message", [
    ({"tokens": []}, "empty"), ({"tokens": [1], "num_samples": 0}, "num_samples"),
    ({"tokens": [1], "temperature": -1}, "temperature"),
])
def test_impossible_requests_are_refused_in_words(engine, call, message):
    with pytest.raises(UserError, match=message):
        list(engine.generate(**call))


def test_a_full_context_gives_nothing(engine):
    assert list(engine.generate([1] * 64)) == []
    [[row]] = engine.generate_many([[1] * 64])
    assert row.ended == "length" and row.tokens == []
