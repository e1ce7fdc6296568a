"""GSM8K: grade-school word problems, solved in steps. A calculation such as <<12/60=0.2>> becomes a calculator call."""

import re

from tasks.base import (
    Task,
    calculator_parts,
    meant_number,
    number_after_hashes,
    one_of,
    question_and_answer,
    reference_text,
    same_number,
    text_part,
    until_assistant_end,
)
from tasks.hub import load_rows

SUBSETS, SPLITS = ("main", "socratic"), ("train", "test")
CALCULATION = re.compile(r"<<([^>]*)>>")


class GSM8K(Task):
    """openai/gsm8k, one problem per conversation. The subset "socratic" has a question before each step."""

    name = "GSM8K"

    def __init__(self, subset: str, split: str):
        one_of("subset of GSM8K", subset, SUBSETS)
        one_of("split of GSM8K", split, SPLITS)
        self.rows = load_rows("openai/gsm8k", subset, split, ("question", "answer"))

    def __len__(self) -> int:
        return len(self.rows)

    def conversation(self, i: int) -> dict:
        row = self.rows[i]
        return question_and_answer(row["question"], parts_of(row["answer"]))

    def evaluate(self, conversation: dict, answer: str) -> bool:
        """Return whether the number after the first `#### ` is that of the reference, compared as text."""
        found = number_after_hashes(until_assistant_end(answer))
        return found is not None and found == number_after_hashes(reference_text(conversation))

    def evaluate_lenient(self, conversation: dict, answer: str) -> bool:
        """Return whether the number that the answer gives, in any usual form, has the value of the reference."""
        return same_number(meant_number(until_assistant_end(answer)), number_after_hashes(reference_text(conversation)))


def parts_of(solution: str) -> list[dict[str, str]]:
    """Return the parts of a solution: text, and for each <<expression=result>> a calculator call and its output."""
    parts = []
    for number, piece in enumerate(CALCULATION.split(solution)):
        if number % 2:
            expression, equals, result = piece.rpartition("=")
            parts += calculator_parts(expression if equals else piece, result if equals else "")
        elif piece:
            parts.append(text_part(piece))
    return parts
