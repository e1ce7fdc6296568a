"""Conversations from a file (tasks/custom_json.py, lines.py): every line is checked, errors name the line."""

import gzip
import json

import pytest

from nanochat.errors import UserError
from nanochat.tokenizer.conversation import turns_of
from tasks.custom_json import CustomJSON

GOOD = [{"role": "user", "content": "Who are you?"}, {"role": "assistant", "content": "I am a model."}]


def write(path, *lines):
    data = "\n".join(line if isinstance(line, str) else json.dumps(line, ensure_ascii=False) for line in lines).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz"])
def test_arrays_and_objects_are_read_and_blank_lines_left_out(tmp_path, ending):
    japanese = [{"role": "user", "content": "名前は?"},
                {"role": "assistant", "content": [{"type": "text", "text": "セイント"}]}]
    task = CustomJSON(write(tmp_path / f"own.{ending}", GOOD, "", {"messages": japanese, "source": "me"}, "  ", GOOD))
    assert [c["messages"] for c in task] == [GOOD, japanese, GOOD]
    assert (task.name, task.kind, len(task)) == (f"own.{ending}", "none", 3)


@pytest.mark.parametrize("line, what", [
    ("{torn", "is not JSON"), ('"text"', "is a JSON array of messages"), ("[]", "at least one message"),
    ("{}", "is a JSON array of messages"),
    (json.dumps({"messages": "x"}), "at least one message"),
    (json.dumps(GOOD[1:]), "has the role 'assistant' where 'user' should be"),
    (json.dumps(GOOD[:1]), "there is no answer in it"),
    (json.dumps([{"role": "system", "content": "x"}]), "system message"),
    (json.dumps([GOOD[0], {"role": "assistant", "content": [{"type": "image", "text": "x"}]}]),
     "part 1 has the type 'image'"),
    (json.dumps([GOOD[0], {"role": "assistant"}]), "has no content"), ("[" * 100_000, "is not JSON")])
def test_a_line_that_is_no_conversation_is_named(tmp_path, line, what):
    path = write(tmp_path / "own.jsonl", GOOD, "", line, GOOD)
    with pytest.raises(UserError, match=f"own.jsonl, line 3.*{what}"):
        CustomJSON(path)


def test_files_that_are_missing_empty_or_folders(tmp_path):
    with pytest.raises(UserError, match="there is no file .*none.jsonl"):
        CustomJSON(tmp_path / "none.jsonl")
    with pytest.raises(UserError, match="empty.jsonl holds nothing"):
        CustomJSON(write(tmp_path / "empty.jsonl"))
    with pytest.raises(UserError, match="cannot be read: Is a directory"):
        CustomJSON(tmp_path)
    (tmp_path / "x.jsonl.gz").write_bytes(b"plain")
    with pytest.raises(UserError, match="not a complete gzip file"):
        CustomJSON(tmp_path / "x.jsonl.gz")


def test_published_identity_conversations_are_read(shared):
    task = CustomJSON(shared / "data/chat/identity_conversations.jsonl.gz")
    assert len(task) > 900
    for conversation in task:
        turns_of(conversation)
