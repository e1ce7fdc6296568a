"""What a task is: a fixed list of conversations, with a way to grade the answers of a model.

    task[i]                   conversation i; the last message is the assistant's reference answer
    task[100:200], task[::2]  a view of some of them
    Mixture([a, b, b])        all of a, and all of b twice, in one shuffled order that stays the same
    TaskSequence([a, b])      all of a, then all of b

A conversation is {"messages": [...]} (nanochat/tokenizer/conversation.py). Conversation i depends only on the task's
arguments and on i, in every process. So ranks can read different conversations, and training can resume at any one.
"""

import bisect
import hashlib
import itertools
import random
import re
from array import array
from collections.abc import Collection, Iterator
from decimal import Decimal, InvalidOperation
from typing import Any, overload

from nanochat.dataset.identity import digest_of
from nanochat.errors import UserError

CATEGORICAL, GENERATIVE, NONE = "categorical", "generative", "none"
IDENTITY_SAMPLE = 64  # conversations of a task that its digest covers
TEST_SHARE = 0.1   # of the words and pairs of numbers that a hash splits
HASHES = re.compile(r"#### (-?[0-9.,]+)")
NUMBER = re.compile(r"(?:(?<![\w.])-)?\d[\d,]*(?:\.\d+)?")
AMOUNT = re.compile(r"(?P<sign>(?<![\w.)])[-−]\s?)?(?:[$€£]\s?(?P<minus>-)?)?(?<!\d[-/:^*×])(?<![\w.])"
                    r"(?P<digits>\d[\d,]*(?:\.\d+)?|\.\d+)(?![\d.,]*\s?[-/:^*×]\s?\d)(?!\w*\d)")
DIGIT = re.compile(r"\d")


class Task:
    """A data set of conversations. A subclass defines __len__ and conversation(i), and evaluate if answers are graded.

    Attributes:
        name: what logs and reports call it.
        kind: CATEGORICAL, the answer is one of conversation["letters"]; GENERATIVE, it is free text; NONE, there is
            no grading and the data is only for training.
        chance: accuracy of guessing.
    """

    name: str = "Task"
    kind: str = GENERATIVE
    chance: float = 0.0

    def __len__(self) -> int:
        raise NotImplementedError

    def conversation(self, i: int) -> dict:
        """Return conversation i, 0 <= i < len(self)."""
        raise NotImplementedError

    def evaluate(self, conversation: dict, answer: str) -> bool:
        """Return whether the answer is right.

        Args:
            conversation: of this task; its last message is the reference answer.
            answer: the letter of a categorical task, else the decoded text of the model with special tokens by name.
        """
        if self.kind == CATEGORICAL:
            return answer == conversation["messages"][-1]["content"]
        raise NotImplementedError(f"{self.name} is not graded")

    def evaluate_lenient(self, conversation: dict, answer: str) -> bool:
        """Return whether an answer that `evaluate` refuses is right in another usual form.

        Published scores depend on the form that `evaluate` wants; this one is told beside them.
        """
        return False

    def reward(self, conversation: dict, answer: str) -> float:
        """Return the reward of an answer in reinforcement learning, 0 to 1."""
        return float(self.evaluate(conversation, answer))

    def identity(self) -> dict[str, str]:
        """Return by name a digest of what this task is made of, the same on every machine with the same data.

        It is that of the length and of some conversations; a subclass that has files adds theirs.
        """
        some = range(0, len(self), max(1, len(self) // IDENTITY_SAMPLE))
        return {self.name: digest_of([len(self), *(self[i] for i in some)])}

    @overload
    def __getitem__(self, i: int) -> dict: ...
    @overload
    def __getitem__(self, i: slice) -> "Task": ...

    def __getitem__(self, i: int | slice) -> "dict | Task":
        """Return conversation i (negative: from the end), or a view for a slice. Raises IndexError out of range."""
        if isinstance(i, slice):
            return View(self, range(len(self))[i])
        size = len(self)
        if not -size <= i < size:
            raise IndexError(f"{self.name} has {size} conversations; there is no number {i}")
        return self.conversation(i % size)

    def __iter__(self) -> Iterator[dict]:
        return (self[i] for i in range(len(self)))


class View(Task):
    """Some conversations of a task, graded like the task."""

    def __init__(self, task: Task, numbers: range):
        self.task, self.numbers = task, numbers
        self.name, self.kind, self.chance = task.name, task.kind, task.chance

    def __len__(self) -> int:
        return len(self.numbers)

    def conversation(self, i: int) -> dict:
        return self.task[self.numbers[i]]

    def evaluate(self, conversation: dict, answer: str) -> bool:
        return self.task.evaluate(conversation, answer)

    def evaluate_lenient(self, conversation: dict, answer: str) -> bool:
        return self.task.evaluate_lenient(conversation, answer)

    def reward(self, conversation: dict, answer: str) -> float:
        return self.task.reward(conversation, answer)


class TaskSequence(Task):
    """The conversations of several tasks one after the other, to train on."""

    name, kind = "TaskSequence", NONE

    def __init__(self, tasks: list[Task]):
        self.tasks = list(tasks)
        self.ends = list(itertools.accumulate(len(task) for task in self.tasks))

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def identity(self) -> dict[str, str]:
        found: dict[str, str] = {}
        for task in self.tasks:
            for name, digest in task.identity().items():
                names = itertools.chain([name], (f"{name} {number}" for number in itertools.count(2)))
                found[next(free for free in names if free not in found)] = digest
        return found

    def conversation(self, i: int) -> dict:
        which = bisect.bisect_right(self.ends, i)
        return self.tasks[which][i - (self.ends[which - 1] if which else 0)]


class Mixture(TaskSequence):
    """The conversations of several tasks in one shuffled order, to train on. A task listed twice counts twice."""

    name = "Mixture"

    def __init__(self, tasks: list[Task], seed: int = 42):
        super().__init__(tasks)
        order = list(range(super().__len__()))
        random.Random(seed).shuffle(order)
        self.order = array("q", order)

    def conversation(self, i: int) -> dict:
        return super().conversation(self.order[i])


# ---- helpers for tasks


def one_of(what: str, value: Any, known: Collection[str]) -> Any:
    """Return the value. Raises UserError with all known values if it is not one of them; `what` names it."""
    if value not in known:
        raise UserError(f"there is no {what} {value!r}; there is {', '.join(known)}")
    return value


def non_negative(what: str, value: Any) -> int:
    """Return the value. Raises UserError unless it is a whole number, 0 or more; `what` names it."""
    if type(value) is not int or value < 0:
        raise UserError(f"{what} is {value!r}; it must be a whole number, 0 or more")
    return value


def rng_for(*key: str | int) -> random.Random:
    """Return the random generator for a key, such as (task, split, seed, i)."""
    return random.Random(" ".join(map(str, key)))


def in_test(key: str) -> bool:
    """Return whether a word or a pair of numbers belongs to the test split. The answer depends on the key alone."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") < TEST_SHARE * 2**64


def question_and_answer(question: str, answer: str | list[dict[str, str]]) -> dict:
    """Return a conversation with one question and its answer."""
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def calculator_parts(expression: str, output: str) -> list[dict[str, str]]:
    """Return the two parts of a calculator call: the expression and its output."""
    return [{"type": "python", "text": expression}, {"type": "python_output", "text": output}]


def text_part(words: str) -> dict[str, str]:
    """Return a part of plain text."""
    return {"type": "text", "text": words}


def reference_text(conversation: dict) -> str:
    """Return the text of the reference answer, without its calculator calls."""
    content = conversation["messages"][-1]["content"]
    return content if isinstance(content, str) else "".join(part["text"] for part in content if part["type"] == "text")


def until_assistant_end(answer: str) -> str:
    """Return the answer up to its closing token, if that was decoded too."""
    return answer.split("<|assistant_end|>", 1)[0]


def number_after_hashes(words: str) -> str | None:
    """Return the number after the first `#### ` as text, without commas; None if there is none."""
    found = HASHES.search(words)
    return found[1].replace(",", "") if found else None


def last_number(words: str) -> str | None:
    """Return the last number after the last tool output as text, without commas; None if there is none.

    Looks at the whole text if it has no tool output.
    """
    found = NUMBER.findall(words.rsplit("<|output_end|>", 1)[-1].replace("−", "-"))
    return found[-1].replace(",", "") if found else None


def same_number(one: str | None, other: str | None) -> bool:
    """Return whether two numbers as text have the same value: 15, 15.0 and +15 do. None has no value."""
    try:
        return one is not None and other is not None and Decimal(one) == Decimal(other)
    except InvalidOperation:
        return False


def meant_number(words: str) -> str | None:
    """Return the number that an answer gives, in any usual form, as text without commas; None if there is none.

    It is the first number behind the last `####`; without that mark the one in \\boxed{}, else the last number behind
    the last tool output. A sign, a currency before it, a unit or a full stop behind it do no harm. What belongs to a
    date, a range, a fraction or a product is no number.
    """
    _, mark, rest = words.rpartition("####")
    if not mark and "\\boxed{" in words:
        mark, rest = "boxed", words.rsplit("\\boxed{", 1)[1].partition("}")[0]
    rest = rest if mark else words.rsplit("<|output_end|>", 1)[-1]
    which = 0 if mark else -1
    digits, amounts = [*DIGIT.finditer(rest)], [*AMOUNT.finditer(rest)]
    if not amounts or not amounts[which].start() <= digits[which].start() < amounts[which].end():
        return None
    chosen = amounts[which]
    return ("-" if chosen["sign"] or chosen["minus"] else "") + chosen["digits"].replace(",", "")
