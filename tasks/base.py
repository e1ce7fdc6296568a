"""What a task is: a fixed list of conversations, with a way to grade what a model answers.

    task[i]                   conversation i; the last message is the assistant's reference answer
    task[100:200], task[::2]  a view of some of them
    Mixture([a, b, b])        all of a, and all of b twice, in one shuffled order that stays the same
    Sequence([a, b])          all of a, then all of b

A conversation is {"messages": [...]} (nanochat/tokenizer/conversation.py). Conversation i depends on the task's arguments and on i
alone, in any process, so ranks may read different ones and training resumes where it was."""

import bisect
import hashlib
import itertools
import random
import re
from array import array
from collections.abc import Collection, Iterator
from typing import Any, overload

from nanochat.errors import UserError

CATEGORICAL, GENERATIVE, NONE = "categorical", "generative", "none"
TEST_SHARE = 0.1   # of what is split by a hash: words, pairs of numbers
HASHES = re.compile(r"#### (-?[0-9.,]+)")
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


class Task:
    """A data set of conversations. A subclass gives __len__ and conversation(i), and where answers are graded, evaluate."""

    name: str = "Task"
    kind: str = GENERATIVE   # categorical: one of conversation["letters"]; generative: free text; none: training data only
    chance: float = 0.0      # accuracy of guessing

    def __len__(self) -> int:
        raise NotImplementedError

    def conversation(self, i: int) -> dict:
        """Return conversation i, 0 <= i < len(self)."""
        raise NotImplementedError

    def evaluate(self, conversation: dict, answer: str) -> bool:
        """Is the answer right? `answer` is a letter of a categorical task, else the text that the model wrote, specials as their names."""
        if self.kind == CATEGORICAL:
            return answer == conversation["messages"][-1]["content"]
        raise NotImplementedError(f"{self.name} is not graded")

    def reward(self, conversation: dict, answer: str) -> float:
        """Return what an answer is worth in reinforcement learning, 0 to 1."""
        return float(self.evaluate(conversation, answer))

    @overload
    def __getitem__(self, i: int) -> dict: ...
    @overload
    def __getitem__(self, i: slice) -> "Task": ...

    def __getitem__(self, i: int | slice) -> "dict | Task":
        """Return conversation i (negative: from the end), or for a slice a view. Raises IndexError outside."""
        if isinstance(i, slice):
            return View(self, range(len(self))[i])
        size = len(self)
        if not -size <= i < size:
            raise IndexError(f"{self.name} has {size} conversations; there is no number {i}")
        return self.conversation(i % size)

    def __iter__(self) -> Iterator[dict]:
        return (self[i] for i in range(len(self)))


class View(Task):
    """Some conversations of a task, graded as the task does."""

    def __init__(self, task: Task, numbers: range):
        self.task, self.numbers = task, numbers
        self.name, self.kind, self.chance = task.name, task.kind, task.chance

    def __len__(self) -> int:
        return len(self.numbers)

    def conversation(self, i: int) -> dict:
        return self.task[self.numbers[i]]

    def evaluate(self, conversation: dict, answer: str) -> bool:
        return self.task.evaluate(conversation, answer)

    def reward(self, conversation: dict, answer: str) -> float:
        return self.task.reward(conversation, answer)


class Sequence(Task):
    """Tasks one after the other, to train on."""

    name, kind = "Sequence", NONE

    def __init__(self, tasks: list[Task]):
        self.tasks = list(tasks)
        self.ends = list(itertools.accumulate(len(task) for task in self.tasks))

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def conversation(self, i: int) -> dict:
        which = bisect.bisect_right(self.ends, i)
        return self.tasks[which][i - (self.ends[which - 1] if which else 0)]


class Mixture(Sequence):
    """All conversations of all tasks in one shuffled order, to train on. A task that is listed twice counts twice."""

    name = "Mixture"

    def __init__(self, tasks: list[Task], seed: int = 42):
        super().__init__(tasks)
        order = list(range(super().__len__()))
        random.Random(seed).shuffle(order)
        self.order = array("q", order)

    def conversation(self, i: int) -> dict:
        return super().conversation(self.order[i])


# ---- what tasks are made with


def one_of(what: str, value: Any, known: Collection[str]) -> Any:
    """Return the value. Raises UserError that lists what there is, where it is not among `known`."""
    if value not in known:
        raise UserError(f"there is no {what} {value!r}; there is {', '.join(known)}")
    return value


def whole(what: str, value: Any) -> int:
    """Return a number of conversations. Raises UserError unless it is a whole number, not negative."""
    if type(value) is not int or value < 0:
        raise UserError(f"{what} is {value!r}; it must be a whole number, 0 or more")
    return value


def rng_for(*key: str | int) -> random.Random:
    """Return the generator of random numbers for a key, such as (task, split, seed, i)."""
    return random.Random(" ".join(map(str, key)))


def in_test(key: str) -> bool:
    """Does something split by its hash (a word, a pair of numbers) belong to the test split? The same for every seed and task."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") < TEST_SHARE * 2**64


def asked_and_answered(question: str, answer: str | list[dict[str, str]]) -> dict:
    """Return a conversation of one question and its answer."""
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def called(expression: str, output: str) -> list[dict[str, str]]:
    """Return the two parts of a calculator call: what is asked, and what comes back."""
    return [{"type": "python", "text": expression}, {"type": "python_output", "text": output}]


def text(words: str) -> dict[str, str]:
    """Return a part of plain text."""
    return {"type": "text", "text": words}


def reference_text(conversation: dict) -> str:
    """Return the text of the reference answer, without its calculator calls."""
    content = conversation["messages"][-1]["content"]
    return content if isinstance(content, str) else "".join(part["text"] for part in content if part["type"] == "text")


def spoken(answer: str) -> str:
    """Return what a model wrote up to its closing token, where that was decoded too."""
    return answer.split("<|assistant_end|>", 1)[0]


def after_hashes(words: str) -> str | None:
    """Return the number behind the first `#### `, commas dropped, as text; None where there is none."""
    found = HASHES.search(words)
    return found[1].replace(",", "") if found else None


def last_number(words: str) -> str | None:
    """Return the last number behind the last tool output (anywhere where no tool was called), commas dropped; None without one."""
    found = NUMBER.findall(words.rsplit("<|output_end|>", 1)[-1])
    return found[-1].replace(",", "") if found else None
