"""Identity conversations are as many as asked for, all different, well-formed and true to the description.

Covers dev/gen_identity.py and dev/identity_phrases.py.
"""

import json
import subprocess
import sys
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest

from dev import gen_identity
from dev.gen_identity import SAME_START, Description, conversations
from dev.identity_phrases import FULL, GREETINGS, SHORT
from nanochat.errors import UserError
from nanochat.files import base_dir
from nanochat.small_world import documents
from nanochat.tokenizer import RustBPETokenizer
from nanochat.tokenizer.conversation import turns_of
from tasks.custom_json import CustomJSON

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("short", [False, True])
@pytest.mark.parametrize("seed", [0, 1])
def test_a_thousand_different_conversations(short, seed):
    made = conversations(Description(), 1000, seed, short)
    assert len(made) == len({json.dumps(messages) for messages in made}) == 1000
    first = Counter((messages[0]["content"], messages[1]["content"]) for messages in made)
    assert max(first.values()) <= SAME_START
    turns = Counter(len(messages) // 2 for messages in made)
    assert set(turns) == {1, 2, 3} and min(turns.values()) > 100
    for messages in made:
        assert [role for role, _ in turns_of({"messages": messages})] == ["user", "assistant"] * (len(messages) // 2)
        assert all(m["content"] == m["content"].strip() != "" and "{" not in m["content"] for m in messages)
    said = [m["content"] for messages in made for m in messages if m["role"] == "assistant"]
    assert sum("Saint Iberis" in text for text in said) > 400
    assert made == conversations(Description(), 1000, seed, short)
    assert made[:300] == conversations(Description(), 300, seed, short)


def test_variety_of_questions_and_languages():
    made = conversations(Description())
    questions = {m["content"].casefold() for messages in made for m in messages if m["role"] == "user"}
    assert len(questions) > 600
    assert sum(not messages[0]["content"].isascii() for messages in made) > 40
    assert len(GREETINGS) == len(set(GREETINGS)) >= 30


def test_every_phrase_is_used_and_none_is_twice():
    for topics, short in ((FULL, False), (SHORT, True)):
        answers = [answer for topic in topics for answer in topic.answers]
        questions = [question for topic in topics for question in topic.questions]
        assert len(set(questions)) == len(questions)
        assert all(len(set(topic.answers)) == len(topic.answers) for topic in topics)
        said = {m["content"] for messages in conversations(Description(), 2000, short=short) for m in messages}
        plain = [answer for answer in answers if "{" not in answer]
        assert len(plain) >= 3 and not set(plain) - said


def test_description_is_what_is_said_and_nothing_is_said_of_what_is_empty():
    who = Description(name="Robin {x}", maker="Ada", project="", kind="", size="", data="", time="", year="",
                      licence="")
    text = json.dumps(conversations(who, 500))
    assert "Robin {x}" in text and "made by Ada" in text
    for absent in ("Saint Iberis", "Rikka", "parameters do", "licence", "542", "  ", " ."):
        assert absent not in text, absent


def test_short_ones_describe_a_small_model_and_are_short():
    made = conversations(Description(), 1000, short=True)
    text = json.dumps(made)
    assert "5 million" in text and "542 million" not in text and "I am Saint Iberis." in text
    assert "7 million" in json.dumps(conversations(Description(size="7 million"), 300, short=True))
    tokenizer = RustBPETokenizer.train_from_iterator(islice(documents(0), 2000), 1024)
    sizes = [len(tokenizer.render_conversation({"messages": messages})[0]) for messages in made]
    assert sum(sizes) / len(sizes) < 80 and max(sizes) < 200
    answers = Counter(m["content"] for messages in made for m in messages if m["role"] == "assistant")
    assert len(answers) < 30
    assert "people, places" in text and "people, places" not in json.dumps(
        conversations(Description(questions=""), 300, short=True))


def test_file_is_written_where_the_recipes_look_and_read_by_them():
    gen_identity.main(["--count=40"])
    path = base_dir() / "identity_conversations.jsonl"
    task = CustomJSON(path)
    assert [c["messages"] for c in task] == conversations(Description(), 40)
    assert isinstance(json.loads(path.read_text(encoding="utf-8").splitlines()[0]), list)


@pytest.mark.parametrize("how", [["dev/gen_identity.py"], ["-m", "dev.gen_identity"]])
def test_runs_as_a_file_and_as_a_module(how, tmp_path):
    out = tmp_path / "out.jsonl"
    command = [sys.executable, *how, "--count=5", "--short", "--name=Robin", f"--out={out}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "5 conversations about Robin" in done.stdout, done.stderr
    assert len(out.read_text().splitlines()) == 5 and "Robin" in out.read_text()


def test_what_cannot_be_done_is_said():
    with pytest.raises(UserError, match="needs a name"):
        conversations(Description(name=" "))
    with pytest.raises(UserError, match="at least one"):
        conversations(Description(), 0)
    nobody = Description("X", *[""] * 8)
    with pytest.raises(UserError, match="no 50000 different conversations"):
        original, gen_identity.TRIES = gen_identity.TRIES, 1
        try:
            conversations(nobody, 50_000, short=True)
        finally:
            gen_identity.TRIES = original
