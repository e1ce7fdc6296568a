"""Chatting in the terminal: what is shown, what is remembered, and how it is stopped."""

import os
import signal
import subprocess
import sys
import time
from contextlib import closing

import pytest
import torch

from nanochat.checkpoint import save_checkpoint
from nanochat.engine import Engine
from nanochat.errors import UserError
from nanochat.files import base_dir
from nanochat.tokenizer import SPECIAL_TOKENS, RustBPETokenizer
from nanochat.tokenizer.stream import TerminalText
from scripts import chat_cli
from scripts.chat_cli import HELP, Config, Conversation, command, converse, turns_to_drop, without_unfinished_call
from tests.conftest import ROOT
from tests.helpers import small_model


@pytest.fixture(scope="module")
def tokenizer():
    return RustBPETokenizer.train_from_iterator(["the cat sat on the mat, 2+2 = 4 and so on. " * 3], 280)


@pytest.fixture(scope="module")
def model(tokenizer):
    """It never ends an answer by itself: among the five most likely tokens there is no closing one."""
    model = small_model(vocab_size=tokenizer.get_vocab_size(), sequence_len=96)
    with torch.no_grad():
        for name in SPECIAL_TOKENS:
            model.lm_head.weight[tokenizer.encode_special(name)] = 0
    return model


def ids(tokenizer, *parts):
    """Texts, and specials by their names, as tokens."""
    encoded = ([tokenizer.encode_special(part)] if part.startswith("<|") else tokenizer.encode(part) for part in parts)
    return [token for tokens in encoded for token in tokens]


class Scripted:
    """An engine that says what it is told, and keeps what it was asked."""

    def __init__(self, model, tokenizer, *answers):
        self.model, self.tokenizer, self.answers, self.prompts = model, tokenizer, list(answers), []
        self.stops = Engine(model, tokenizer).stops

    def generate(self, tokens, max_tokens, **options):
        self.prompts.append(list(tokens))
        for token in self.answers.pop(0)[:max_tokens]:
            yield [token], [1]


# ---- what is shown

def test_characters_come_whole_and_broken_ones_are_marked(tokenizer):
    of_byte = {tokenizer.decode_bytes([token]): token for token in range(256)}
    tokens = [of_byte[bytes([byte])] for byte in "né 日本 🙂!".encode()]
    shown = TerminalText(tokenizer)
    assert [piece for piece in map(shown.feed, tokens) if piece] == list("né 日本 🙂!") and shown.finish() == ""
    shown = TerminalText(tokenizer)
    assert "".join(map(shown.feed, tokens[:5])) == "né " and shown.finish() == "\ufffd"


@pytest.mark.parametrize("parts, told", [
    (["so ", "<|python_start|>", "2+2", "<|python_end|>", "<|output_start|>", "4", "<|output_end|>", " it is"],
     "so [2+2 = 4] it is"),
    (["<|python_start|>", "2+", "<|python_end|>", " on"], "[2+] on"),
    (["<|python_start|>", "2+", "<|python_end|>"], "[2+]"),
    (["<|python_start|>", "2+"], "[2+]"),
    (["<|python_start|>", "2", "<|python_start|>", "3", "<|python_end|>"], "[2][3]"),
    (["<|output_start|>", "4", "<|output_end|>"], "[4]"),
    (["a", "<|user_start|>", "b"], "a<|user_start|>b"),
    (["a", "<|python_end|>", "b"], "a<|python_end|>b"),
    (["a\x1b[2Jb\tc\nd\x7f"], "a\u241b[2Jb\tc\nd\u2421"),
])
def test_tool_calls_stand_in_brackets_and_no_control_character_gets_through(tokenizer, parts, told):
    shown = TerminalText(tokenizer)
    assert "".join(map(shown.feed, ids(tokenizer, *parts))) + shown.finish() == told


# ---- what is remembered

def test_the_oldest_turns_go_when_the_conversation_is_too_long():
    turns = [[1] * 10, [2] * 20, [3] * 30]
    assert [turns_to_drop(turns, [0] * 9, room) for room in (70, 69, 60, 59, 40, 39, 10)] == [0, 1, 1, 2, 2, 3, 3]
    with pytest.raises(UserError, match="that is 10 tokens; the model can read 9 .*say it shorter"):
        turns_to_drop(turns, [0] * 10, 10)


def test_half_a_tool_call_is_not_remembered(tokenizer):
    for parts, left in ((["a", "<|python_start|>", "2"], 1), (["a", "<|python_start|>", "2", "<|python_end|>"], 4),
                        (["a"], 1), (["a", "<|python_start|>", "2", "<|python_end|>", "<|output_start|>"], 4)):
        tokens = ids(tokenizer, *parts)
        assert without_unfinished_call(tokens, tokenizer) == tokens[:left]


def test_the_model_sees_the_whole_conversation_as_it_was_trained_on(model, tokenizer):
    call = ["<|python_start|>", "2", "<|python_end|>", "<|output_start|>", "2", "<|output_end|>"]
    engine = Scripted(model, tokenizer, ids(tokenizer, "so ", *call, "<|assistant_end|>"),
                      ids(tokenizer, "on", "<|assistant_end|>"), ids(tokenizer, "a", "<|bos|>"))
    chat = Conversation(engine, Config())
    assert "".join(chat.ask("the cat")) == "so [2 = 2]" and "".join(chat.ask("and")) == "on"
    assert "".join(chat.ask("?")) == "a"
    messages = [{"role": "user", "content": "the cat"},
                {"role": "assistant", "content": [{"type": "text", "text": "so "}, {"type": "python", "text": "2"},
                                                  {"type": "python_output", "text": "2"}]},
                {"role": "user", "content": "and"}, {"role": "assistant", "content": "on"},
                {"role": "user", "content": "?"}]
    for asked, upto in zip(engine.prompts, (1, 3, 5)):
        assert asked == tokenizer.render_for_completion({"messages": messages[:upto]})


def test_it_is_said_when_turns_are_forgotten_and_why_an_answer_ends(model, tokenizer):
    endless = ids(tokenizer, "<|user_start|>") * 200  # one token each
    engine = Scripted(model, tokenizer, *[endless] * 5)
    chat = Conversation(engine, Config(max_tokens=40))
    assert "[the answer ends after 40 tokens: --max-tokens sets how many]" in "".join(chat.ask("the"))
    said = "".join(chat.ask("cat"))
    assert "forgotten" not in said and len(chat.turns) == 2
    said = "".join(chat.ask("mat"))
    assert said.startswith("[the conversation no longer fits the model's 96 tokens: its oldest 1 turn is forgotten]\n")
    assert [turn[1] for turn in chat.turns] == [tokenizer.encode(text)[0] for text in ("cat", "mat")]
    chat.config.max_tokens = 500
    assert "the model's 96 are full; /clear begins anew]" in "".join(chat.ask("the"))
    assert all(len(prompt) < 96 for prompt in engine.prompts)
    with pytest.raises(UserError, match="say it shorter"):
        list(chat.ask("the cat sat " * 100))


def test_a_stopped_answer_counts_as_said(model, tokenizer):
    engine = Scripted(model, tokenizer, ids(tokenizer, "a", "b", "c"))
    chat = Conversation(engine, Config())
    with closing(chat.ask("the")) as pieces:
        assert next(pieces) == "a" and next(pieces) == "b"
    assert chat.turns == [ids(tokenizer, "<|user_start|>", "the", "<|user_end|>", "<|assistant_start|>", "a", "b",
                              "<|assistant_end|>")]


# ---- the session

def test_commands():
    chat = Conversation(None, Config(), [[1]])
    assert command("/quit", chat) is None and command("/help", chat) == HELP
    assert command("/clear", chat) == "[a new conversation]" and chat.turns == []
    assert command("/temperature 0.25", chat) == "[temperature 0.25]" and chat.config.temperature == 0.25
    assert command("/topk 7", chat) == "[top_k 7]" and chat.config.top_k == 7
    for wrong in ("/temperature", "/temperature hot", "/temperature -1", "/temperature nan", "/topk 1.5", "/topk -1"):
        assert "takes a number from 0 on" in command(wrong, chat)
    assert (chat.config.temperature, chat.config.top_k) == (0.25, 7)
    assert command("/temprature 1", chat) == f"[there is no /temprature]\n{HELP}"


def test_ctrl_c_at_the_prompt_leaves_the_second_time_and_ctrl_d_at_once(monkeypatch, model, tokenizer, capsys):
    keys = [KeyboardInterrupt, "the", KeyboardInterrupt, KeyboardInterrupt, "never read"]

    def read(prompt):
        key = keys.pop(0)
        if isinstance(key, str):
            return key
        raise key
    monkeypatch.setattr("builtins.input", read)
    converse(Conversation(Scripted(model, tokenizer, ids(tokenizer, "on", "<|assistant_end|>")), Config()))
    assert keys == ["never read"] and "Model: on\n" in capsys.readouterr().out
    keys[:] = ["", EOFError, "never read"]
    converse(Conversation(None, Config()))
    assert keys == ["never read"]


@pytest.fixture
def saved(model, tokenizer):
    """The model as a fine-tuned one in base_dir(), with room for a long answer."""
    tokenizer.save(base_dir() / "tokenizer")
    save_checkpoint(base_dir() / "chatsft_checkpoints" / "d1", 7, model.state_dict(),
                    {"model_config": model.config.to_dict() | {"sequence_len": 100_000},
                     "tokenizer": tokenizer.fingerprint()})
    return {**os.environ, "NANOCHAT_BASE_DIR": str(base_dir()), "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"}


def test_one_question_gives_one_answer_and_nothing_else(saved, capsys):
    flags = ["-p", "the cat", "--seed=3", "--max-tokens=9", "-k", "5", "--device-type=cpu"]
    chat_cli.main(flags)
    first = capsys.readouterr().out
    answer = first.split("\n[the answer ends after 9 tokens")[0]
    assert answer and "You:" not in first
    done = subprocess.run([sys.executable, "-m", "scripts.chat_cli", "-i", "sft", "-g", "d1", "-s", "7", *flags],
                          cwd=ROOT, env=saved, capture_output=True, text=True, encoding="utf-8")
    assert (done.returncode, done.stdout) == (0, first), done.stderr
    for wrong, told in ((["-s", "8"], "8"), (["-i", "rl"], "chatrl|rl"),
                        (["--max-tokens=0"], "--max-tokens is 0; it must be")):
        with pytest.raises(UserError, match=told):
            chat_cli.main([*flags, *wrong])


@pytest.mark.skipif(os.name == "nt", reason="signals of another kind")
def test_ctrl_c_stops_the_answer_and_the_session_goes_on(saved):
    flags = ["-k", "5", "--max-tokens=90000", "--device-type=cpu"]
    chat = subprocess.Popen([sys.executable, "-u", "-m", "scripts.chat_cli", *flags], cwd=ROOT, env=saved,
                            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        os.set_blocking(chat.stdout.fileno(), False)

        def until(mark, more=0, seconds=120):
            """What is printed until `mark`, and `more` bytes behind it."""
            text, end = b"", time.monotonic() + seconds
            while mark not in text or len(text) < text.index(mark) + len(mark) + more:
                assert time.monotonic() < end and chat.poll() is None, text[-500:]
                text += chat.stdout.read() or b""
                time.sleep(0.01)
            return text

        def say(line):
            chat.stdin.write(line + b"\n")
            chat.stdin.flush()
        assert b"/help for help" in until(b"You: ")
        say(b"the cat")
        until(b"Model: ", more=20)
        chat.send_signal(signal.SIGINT)
        assert b"[stopped; Ctrl-C again leaves]" in until(b"You: ")
        say(b"/temperature 0")
        assert b"[temperature 0]" in until(b"You: ")
        say(b"and on")
        until(b"Model: ", more=5)
        chat.send_signal(signal.SIGINT)
        until(b"You: ")
        chat.send_signal(signal.SIGINT)
        assert chat.wait(20) == 0
    finally:
        chat.kill()
        chat.wait()
        chat.stdin.close()
        chat.stdout.close()
