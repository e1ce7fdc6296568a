"""Your own conversations to train on: a file of JSON lines, one conversation per line.

    [{"role": "user", "content": "Who are you?"}, {"role": "assistant", "content": "I am Saint Iberis."}]

A line may also be {"messages": [...]}, and the file may be gzipped (.gz). nanochat/tokenizer/conversation.py says what
messages may hold.
"""

from pathlib import Path
from typing import Any

from nanochat.dataset.identity import digest_of
from nanochat.errors import UserError
from nanochat.tokenizer.conversation import turns_of
from tasks.base import NONE, Task
from tasks.lines import JsonLines


class CustomJSON(Task):
    """The conversations of a file. All lines are checked when it is opened."""

    kind = NONE

    def __init__(self, path: str | Path):
        """Open and check a file.

        Raises UserError, with file and line, if a line is not JSON or not a conversation, or if there is no line.
        """
        self.name = Path(path).name
        self.lines = JsonLines(path, lambda value: _check(_conversation(value)))

    def __len__(self) -> int:
        return len(self.lines)

    def identity(self) -> dict[str, str]:
        return {self.name: digest_of(self.lines.data)}  # of all bytes

    def conversation(self, i: int) -> dict:
        return _conversation(self.lines[i])


def _conversation(value: Any) -> dict:
    if isinstance(value, list):
        return {"messages": value}
    if isinstance(value, dict) and "messages" in value:
        return {"messages": value["messages"]}
    raise UserError('a line is a JSON array of messages, or {"messages": [...]}')


def _check(conversation: dict) -> None:
    if len(turns_of(conversation)) < 2:  # a conversation that ends with the user is common and does no harm
        raise UserError("there is no answer in it, so there is nothing to learn")
