"""GSM8K: word problems of grade school, solved in steps. Each calculation written as <<12/60=0.2>> becomes a calculator call."""

import re

from tasks.base import Task, after_hashes, asked_and_answered, called, one_of, reference_text, spoken, text
from tasks.hub import load_rows

SUBSETS, SPLITS = ("main", "socratic"), ("train", "test")
CALCULATION = re.compile(r"<<([^>]*)>>")


class GSM8K(Task):
    """One problem of openai/gsm8k a conversation. "socratic" puts a question before each step."""

    name = "GSM8K"

    def __init__(self, subset: str, split: str):
        one_of("subset of GSM8K", subset, SUBSETS)
        self.rows = load_rows("openai/gsm8k", subset, one_of("split of GSM8K", split, SPLITS), ("question", "answer"))

    def __len__(self) -> int:
        return len(self.rows)

    def conversation(self, i: int) -> dict:
        row = self.rows[i]
        return asked_and_answered(row["question"], parts_of(row["answer"]))

    def evaluate(self, conversation: dict, answer: str) -> bool:
        """Right where the number behind the first `#### `, commas dropped, is the reference's, compared as text."""
        found = after_hashes(spoken(answer))
        return found is not None and found == after_hashes(reference_text(conversation))


def parts_of(solution: str) -> list[dict[str, str]]:
    """Return a solution as parts: text, and for each <<expression=result>> the call and its output."""
    parts = []
    for number, piece in enumerate(CALCULATION.split(solution)):
        if number % 2:
            expression, equals, result = piece.rpartition("=")
            parts += called(expression if equals else piece, result if equals else "")
        elif piece:
            parts.append(text(piece))
    return parts
