"""nanochat/tokenizer/stream.py: all readers of an answer find the same tool calls.

What each makes of them is tested in test_chat_cli.py (text for a terminal), test_server_answer.py and test_engine.py.
"""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanochat.server.answer import Answer
from nanochat.tokenizer import RustBPETokenizer
from nanochat.tokenizer.stream import PartParser, StreamDecoder, TerminalText, tool_tokens


@pytest.fixture(scope="module")
def tokenizer():
    return RustBPETokenizer.train_from_iterator(["the cat sat on the mat, 2+2 = 4 and so on. né " * 3], 280)


texts = st.text("abc né=\u65e5", min_size=1, max_size=6)
PARTS = st.lists(st.tuples(st.sampled_from(["text", "python", "result"]), texts), max_size=6)


@given(PARTS)
def test_the_parts_of_an_answer_are_found_by_every_reader(tokenizer, parts):
    special, tokens, content, calls, terminal = tokenizer.encode_special, [], [], [], ""
    for kind, text in parts:
        ids = tokenizer.encode(text)
        if kind == "text":
            tokens += ids
            if content and content[-1]["type"] == "text":
                content[-1]["text"] += text
            else:
                content.append({"type": "text", "text": text})
            terminal += text
            continue
        tokens += [special("<|python_start|>"), *ids, special("<|python_end|>")]
        content.append({"type": "python", "text": text})
        calls.append(ids)
        terminal += f"[{text}"
        if kind == "result":
            tokens += [special("<|output_start|>"), *ids, special("<|output_end|>")]
            content.append({"type": "python_output", "text": text})
            terminal += f" = {text}"
        terminal += "]"
    shown, plain, answer = TerminalText(tokenizer), TerminalText(tokenizer, tools=False), Answer(tokenizer)
    for token in tokens:
        answer.feed(token)
    answer.finish()
    assert "".join([*map(shown.feed, tokens), shown.finish()]) == terminal
    without = "".join(text for kind, text in parts if kind == "text")
    assert "".join([*map(plain.feed, tokens), plain.finish()]) == without == answer.text
    assert answer.parts == content
    parser, found = PartParser(tool_tokens(tokenizer, ("python",))), []  # as the engine has it
    for token in tokens:
        if parser.feed(token) == "end":
            found.append(parser.tokens)
    assert found == calls


@given(st.lists(st.integers(0, 279), max_size=20))
def test_with_no_parts_to_find_every_token_is_text(tokenizer, tokens):
    decoder = StreamDecoder(tokenizer, types=())
    pieces = [decoder.feed(token) for token in tokens]
    text = "".join(piece.rest + piece.text for piece in pieces) + decoder.finish()
    assert text == tokenizer.decode_bytes(tokens).decode(errors="replace")
    assert all(piece.boundary == "" and piece.before == "text" for piece in pieces)
