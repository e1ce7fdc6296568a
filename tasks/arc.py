"""ARC: science questions of school exams with mostly four choices; ARC-Easy, and ARC-Challenge, which simple methods get wrong."""

from nanochat.errors import UserError
from tasks import multiple_choice
from tasks.base import CATEGORICAL, Task, one_of
from tasks.hub import load_rows

SUBSETS, SPLITS = ("ARC-Easy", "ARC-Challenge"), ("train", "validation", "test")


class ARC(Task):
    """One question of allenai/ai2_arc a conversation. Letters are the row's own labels, which in a few rows are 1 to 4."""

    kind, chance = CATEGORICAL, 0.25

    def __init__(self, subset: str, split: str):
        self.name = one_of("subset of ARC", subset, SUBSETS)
        self.rows = load_rows("allenai/ai2_arc", subset, one_of("split of ARC", split, SPLITS), ("question", "choices", "answerKey"))

    def __len__(self) -> int:
        return len(self.rows)

    def conversation(self, i: int) -> dict:
        row = self.rows[i]
        if not isinstance(row["choices"], dict) or not {"text", "label"} <= row["choices"].keys():
            raise UserError(f"{self.name}, question {row['question'][:60]!r}: its choices are {repr(row['choices'])[:60]}, and should be "
                            "two lists, text and label")
        choices, letters, answer = row["choices"]["text"], row["choices"]["label"], row["answerKey"]
        if answer not in letters or len(choices) != len(letters):
            raise UserError(f"{self.name}, question {row['question'][:60]!r}: the answer {answer!r} or the number of choices "
                            f"does not fit the labels {', '.join(map(str, letters))}")
        return multiple_choice.conversation(row["question"], choices, letters, answer)
