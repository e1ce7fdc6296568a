import subprocess
import sys

import pytest
import torch

from nanochat.checkpoint import save_checkpoint
from nanochat.engine import Engine
from nanochat.errors import UserError
from nanochat.loading import load_for_decoding
from nanochat.tokenizer import RustBPETokenizer
from nanochat.tokenizer.stream import TerminalText
from tests.conftest import ROOT
from tests.helpers import small_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint with its tokenizer, in the published format."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = RustBPETokenizer.train_from_iterator(["one two three four five, what is 2+2? über"] * 3, 290)
    tokenizer.save(folder)
    model = small_model(4, vocab_size=tokenizer.get_vocab_size(), sequence_len=64)
    save_checkpoint(folder, 3, model.state_dict(), {"model_config": model.config, "tokenizer": tokenizer.fingerprint()})
    return folder


@pytest.fixture(scope="module")
def llm(folder):
    from nanochat import LLM
    return LLM(folder, device="cpu")


OPTIONS = {"max_tokens": 12, "temperature": 1.2, "seed": 5}


def test_a_question_a_conversation_and_a_list_of_them_give_the_same_answers(llm):
    chats = [[{"role": "user", "content": text}] for text in ("one two", "three", "what is 2+2?")]
    together = llm.chat(chats, **OPTIONS)
    assert together == [llm.chat(chat, **OPTIONS) for chat in chats]
    assert together[1] == llm.chat("three", **OPTIONS) and len(set(together)) == 3


def test_a_stream_is_the_answer_in_pieces_of_whole_characters(llm):
    for text in ("one", "two three", "über"):
        pieces = list(llm.stream(text, **OPTIONS))
        assert "".join(pieces) == llm.chat(text, **OPTIONS) and all(pieces)


def test_texts_go_on_as_the_engine_says(llm):
    texts = ["one two", "five"]
    answers = llm.generate(texts, **OPTIONS)
    assert answers[1] == llm.generate("five", **OPTIONS)
    ids = llm.tokenizer.encode("one two", prepend="<|bos|>")
    rows, _ = Engine(llm.model, llm.tokenizer).generate_batch(ids, **OPTIONS)
    shown = TerminalText(llm.tokenizer)
    assert answers[0] == "".join([*map(shown.feed, rows[0][len(ids):]), shown.finish()])


def test_tool_calls_are_shown_in_brackets_or_left_out(llm):
    tokenizer = llm.tokenizer
    ids = []
    for part in ("It is ", "<|python_start|>", "2+2", "<|python_end|>", "<|output_start|>", "4", "<|output_end|>",
                 "four ü"):
        ids += [tokenizer.encode_special(part)] if part.startswith("<|") else tokenizer.encode(part)
    for tools, wanted in ((True, "It is [2+2 = 4]four ü"), (False, "It is four ü")):
        shown = TerminalText(tokenizer, tools)
        assert "".join([*map(shown.feed, ids), shown.finish()]) == wanted
        cut = TerminalText(tokenizer, tools)
        text = "".join([*map(cut.feed, ids[:ids.index(tokenizer.encode_special("<|python_end|>"))]), cut.finish()])
        assert text == ("It is [2+2]" if tools else "It is ")


def test_weights_of_8_bits_answer_too(folder, llm):
    from nanochat import LLM
    small = LLM(folder, device="cpu", quantize="int8")
    assert small.model.lm_head.weight.dtype == torch.int8 and llm.model.lm_head.weight.dtype == torch.float32
    assert isinstance(small.chat("one", **OPTIONS), str)
    with pytest.raises(UserError, match="no quantisation 'int4'"):
        LLM(folder, device="cpu", quantize="int4")


def test_loading_for_decoding_says_what_was_loaded(folder):
    model, tokenizer, meta = load_for_decoding(folder, "cpu", step=3)
    assert meta["loaded"].startswith("step 3 of") and model.config.vocab_size == tokenizer.get_vocab_size()
    assert not model.training


def test_what_cannot_be_had_is_said_in_words(llm, monkeypatch):
    from nanochat import LLM
    with pytest.raises(UserError, match="no folder nowhere: a model is one of base, mid, sft, rl"):
        LLM("nowhere")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match="someone/model is no folder, and cannot be fetched from the hub"):
        LLM("someone/model")
    with pytest.raises(UserError, match="nothing to answer"):
        llm.chat([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
    with pytest.raises(UserError, match="at least one message"):
        llm.chat([])


def test_importing_the_package_imports_no_torch():
    code = "import sys, nanochat; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True).stdout == "False\n"


def test_nothing_that_takes_seconds_is_imported_before_it_is_needed():
    code = ("import sys, nanochat.llm, nanochat.training; "
            "print([m for m in ('torch._dynamo', 'triton', 'datasets') if m in sys.modules])")
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
                          check=True).stdout.strip() == "[]"
