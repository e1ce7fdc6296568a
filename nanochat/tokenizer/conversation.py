"""Check a conversation and split it into turns. tokenizer.py turns these into tokens.

    {"messages": [{"role": "system", "content": "..."},          # optional
                  {"role": "user", "content": "..."},
                  {"role": "assistant", "content": "..." or a list of parts},
                  {"role": "user", ...}, ...]}

A part is {"type": "text" | "python" | "python_output", "text": "..."}.
"""

from typing import Any

from nanochat.errors import UserError

PART_TYPES = ("text", "python", "python_output")
Turn = tuple[str, list[tuple[str, str]]]


def turns_of(conversation: Any) -> list[Turn]:
    """Return [(role, [(part type, text), ...]), ...] with roles user, assistant, user, ... The input is not changed.

    A leading system message is put before the first user text, with two newlines between them.

    Raises:
        UserError: names the message and what is wrong: no messages, roles out of order, no content, unknown part type.
    """
    messages = conversation.get("messages") if isinstance(conversation, dict) else None
    if not isinstance(messages, (list, tuple)) or not messages:
        raise UserError('a conversation is {"messages": [...]} with at least one message; this one has none')
    turns, system = [], None
    for i, message in enumerate(messages):
        where = f"message {i + 1} of {len(messages)}"
        role = message.get("role") if isinstance(message, dict) else None
        if i == 0 and role == "system":
            if len(messages) == 1:
                raise UserError(f"{where} is a system message, with no user message after it")
            system = _text(message.get("content"), f"{where} (system)")
            continue
        expected = "assistant" if len(turns) % 2 else "user"
        if role != expected:
            raise UserError(f"{where} has the role {_short_repr(role)} where {expected!r} should be: user and "
                            "assistant take turns, user first; only the first message may be a system message")
        parts = _parts(message.get("content"), role, f"{where} ({role})")
        if system is not None and not turns:
            parts = [("text", f"{system}\n\n{parts[0][1]}")]
        turns.append((role, parts))
    return turns


def _parts(content: Any, role: str, where: str) -> list[tuple[str, str]]:
    if role == "user" or not isinstance(content, (list, tuple)):
        return [("text", _text(content, where))]
    if not content:
        raise UserError(f"{where} has an empty list as its content")
    for j, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in PART_TYPES:
            raise UserError(f"{where}, part {j + 1} has the type {_short_repr(kind)}; "
                            f"there are {', '.join(PART_TYPES)}")
    return [(part["type"], _text(part.get("text"), f"{where}, part {j + 1}")) for j, part in enumerate(content)]


def _text(value: Any, where: str) -> str:
    if value is None:
        raise UserError(f"{where} has no content")
    if not isinstance(value, str):
        raise UserError(f"{where} should be text and is {type(value).__name__}")
    return value


def _short_repr(value: Any) -> str:
    return repr(value)[:40]
