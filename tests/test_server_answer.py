"""Tokens as text for clients: whole characters, stop strings wherever tokens are cut, tool calls apart."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanochat.server.answer import Answer, StopStrings, TextPiece, ToolPiece
from nanochat.tokenizer import RustBPETokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return RustBPETokenizer.train_from_iterator(["the cat sat on the mat, 2+2 = 4 and so on. " * 3], 280)


def tokens_of(tokenizer, *parts):
    """Texts, and specials by their names, as tokens; bytes one a token."""
    of_byte = {tokenizer.decode_bytes([token]): token for token in range(256)}
    ids = []
    for part in parts:
        ids += ([of_byte[bytes([byte])] for byte in part] if isinstance(part, bytes) else
                [tokenizer.encode_special(part)] if part.startswith("<|") else tokenizer.encode(part))
    return ids


def told(answer, tokens):
    """All pieces of an answer."""
    return [piece for token in tokens for piece in answer.feed(token)] + answer.finish()


def first_stop(text, stops):
    """The definition: characters come one by one; the first to complete a stop string ends it, the longer of two."""
    for end in range(len(text) + 1):
        if done := [stop for stop in stops if text[:end].endswith(stop)]:
            return text[:end - len(max(done, key=len))], True
    return text, False


@given(st.text("abc", max_size=30), st.lists(st.text("abc", min_size=1, max_size=4), max_size=4),
       st.lists(st.integers(1, 5), max_size=40))
def test_a_stop_string_is_found_wherever_the_text_is_cut(text, stops, lengths):
    search, out, stopped, at = StopStrings(stops), "", False, 0
    for length in [*lengths, len(text)]:
        piece, stopped = search.feed(text[at:at + length])
        at, out = at + length, out + piece
        if stopped:
            break
        held = text[len(out):min(at, len(text))]  # held back is only what may be the beginning of one
        assert search.held == held and (not held or any(stop.startswith(held) for stop in stops))
    assert (out + ("" if stopped else search.flush()), stopped) == first_stop(text, stops)


def test_characters_come_whole_and_broken_ones_are_marked(tokenizer):
    answer = Answer(tokenizer)
    tokens = tokens_of(tokenizer, "né 日本 🙂!".encode())
    assert [piece.text for token in tokens for piece in answer.feed(token)] == list("né 日本 🙂!")
    assert answer.finish() == []
    answer = Answer(tokenizer)
    assert "".join(piece.text for piece in told(answer, tokens[:5])) == "né \ufffd" == answer.text
    assert [entry.start for entry in answer.scored_tokens] == [0, 1, 1, 2, 3]


def test_tool_calls_are_parts_of_their_own_and_not_in_the_text(tokenizer):
    call = ["<|python_start|>", "2+2", "<|python_end|>", "<|output_start|>", "4", "<|output_end|>"]
    tokens = tokens_of(tokenizer, "so ", *call, " it is")
    answer = Answer(tokenizer)
    pieces = told(answer, tokens)
    text = "".join(piece.text for piece in pieces if isinstance(piece, TextPiece))
    assert answer.text == "so  it is" == text and answer.tokens == len(tokens)
    assert answer.parts == [{"type": "text", "text": "so "}, {"type": "python", "text": "2+2"},
                            {"type": "python_output", "text": "4"}, {"type": "text", "text": " it is"}]
    tools = [piece for piece in pieces if isinstance(piece, ToolPiece)]
    for kind, text in (("python", "2+2"), ("python_output", "4")):
        grown = [tool.text for tool in tools if tool.type == kind]
        # from the part's start on, whole at its end
        assert grown[-1] == text and all(text.startswith(part) for part in grown)
    conversation = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": answer.parts}]}
    assert tokenizer.render_conversation(conversation)[0][-1 - len(tokens):-1] == tokens  # sent back, it is what it was


@pytest.mark.parametrize("parts, text", [
    (["a", "<|python_end|>", "b"], "a<|python_end|>b"), (["a", "<|user_start|>", "b"], "a<|user_start|>b"),
    (["a", "<|python_start|>", "2"], "a"),
    (["a", "<|python_start|>", "2", "<|python_start|>", "3", "<|python_end|>", "b"], "ab"),
    (["<|python_start|>", "2", "<|output_end|>", "3", "<|python_end|>", "b"], "b"),
])
def test_tool_tokens_out_of_place_lose_no_text(tokenizer, parts, text):
    answer = Answer(tokenizer)
    told(answer, tokens_of(tokenizer, *parts))
    assert answer.text == text
    raw = Answer(tokenizer, tools=False)
    told(raw, tokens_of(tokenizer, *parts))
    assert raw.text == "".join(parts)


def test_a_stop_string_does_not_reach_over_a_tool_call_nor_into_one(tokenizer):
    tokens = tokens_of(tokenizer, "ab", "<|python_start|>", "xy", "<|python_end|>", "cd xy e")
    answer = Answer(tokenizer, ["bc", "xy"])
    told(answer, tokens)
    assert answer.stopped and answer.text == "abcd " and answer.feed(tokens[0]) == [] == answer.finish()


def test_only_tokens_that_begin_before_a_stop_string_are_told(tokenizer):
    answer = Answer(tokenizer, ["at"])
    pieces = told(answer, tokens_of(tokenizer, b"the cat sat"))
    assert answer.text == "the c" and [entry.start for entry in answer.scored_tokens] == [0, 1, 2, 3, 4]
    assert [entry for piece in pieces for entry in piece.tokens] == answer.scored_tokens
