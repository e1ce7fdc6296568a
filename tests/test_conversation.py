"""A conversation that is not well-formed is refused, and the error says which part is wrong and why."""

import copy

import pytest

from nanochat.errors import UserError
from nanochat.tokenizer.conversation import turns_of


def user(content="hi"):
    return {"role": "user", "content": content}


def assistant(content="hello"):
    return {"role": "assistant", "content": content}


def system(content="be brief"):
    return {"role": "system", "content": content}


def test_text_and_parts_become_turns_in_order():
    parts = [{"type": "text", "text": "a"}, {"type": "python", "text": "1+1"}, {"type": "python_output", "text": "2"}]
    assert turns_of({"messages": [user(), assistant(parts), user("more"), assistant("")], "letters": ["A"]}) == [
        ("user", [("text", "hi")]), ("assistant", [("text", "a"), ("python", "1+1"), ("python_output", "2")]),
        ("user", [("text", "more")]), ("assistant", [("text", "")])]


def test_a_system_message_becomes_the_head_of_the_first_user_text():
    conversation = {"messages": [system(), user(), assistant(), user("more")]}
    before = copy.deepcopy(conversation)
    assert turns_of(conversation)[0] == ("user", [("text", "be brief\n\nhi")])
    assert turns_of(conversation)[2] == ("user", [("text", "more")])
    assert conversation == before


@pytest.mark.parametrize("conversation, message", [
    (None, "at least one message"), ([user()], "at least one message"), ({}, "at least one message"),
    ({"messages": []}, "at least one message"), ({"messages": "hi"}, "at least one message"),
    ({"messages": [assistant()]}, "message 1 of 1 has the role 'assistant' where 'user' should be"),
    ({"messages": [user(), user()]}, "message 2 of 2 has the role 'user' where 'assistant' should be"),
    ({"messages": [user(), assistant(), assistant()]}, "message 3 of 3 has the role 'assistant'"),
    ({"messages": [user(), assistant(), system()]}, "message 3 of 3 has the role 'system'"),
    ({"messages": [system(), system(), user()]}, "message 2 of 3 has the role 'system'"),
    ({"messages": [system(), assistant()]}, "message 2 of 2 has the role 'assistant'"),
    ({"messages": [system()]}, "no user message after it"),
    ({"messages": [system(None), user()]}, r"message 1 of 2 \(system\) has no content"),
    ({"messages": ["hi"]}, "message 1 of 1 has the role None"),
    ({"messages": [{"content": "hi"}]}, "has the role None"),
    ({"messages": [{"role": "user"}]}, r"message 1 of 1 \(user\) has no content"),
    ({"messages": [user(5)]}, "should be text and is int"),
    ({"messages": [user([{"type": "text", "text": "hi"}])]}, "should be text and is list"),
    ({"messages": [user(), assistant([])]}, r"message 2 of 2 \(assistant\) has an empty list"),
    ({"messages": [user(), assistant(["hi"])]}, "part 1 has the type None"),
    ({"messages": [user(), assistant([{"type": "image", "text": "x"}])]},
     "part 1 has the type 'image'; there are text, python"),
    ({"messages": [user(), assistant([{"type": ["text"], "text": "x"}])]}, r"part 1 has the type \['text'\]"),
    ({"messages": [user(), assistant([{"type": "text"}])]}, r"message 2 of 2 \(assistant\), part 1 has no content"),
    ({"messages": [user(), assistant({"type": "text"})]}, "should be text and is dict"),
])
def test_a_malformed_conversation_is_named(conversation, message):
    with pytest.raises(UserError, match=message):
        turns_of(conversation)
