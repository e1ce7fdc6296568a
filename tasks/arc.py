"""ARC: science questions of school exams, most with four choices. Simple methods fail on those of ARC-Challenge."""

from nanochat.errors import UserError
from tasks import multiple_choice
from tasks.base import CATEGORICAL, Task, one_of
from tasks.hub import load_rows

SUBSETS, SPLITS = ("ARC-Easy", "ARC-Challenge"), ("train", "validation", "test")


class ARC(Task):
    """allenai/ai2_arc, one question per conversation. Letters are the row's labels, which are 1 to 4 in a few rows."""

    kind, chance = CATEGORICAL, 0.25

    def __init__(self, subset: str, split: str):
        self.name = one_of("subset of ARC", subset, SUBSETS)
        one_of("split of ARC", split, SPLITS)
        self.rows = load_rows("allenai/ai2_arc", subset, split, ("question", "choices", "answerKey"))

    def __len__(self) -> int:
        return len(self.rows)

    def conversation(self, i: int) -> dict:
        row = self.rows[i]
        where = f"{self.name}, question {row['question'][:60]!r}"
        if not isinstance(row["choices"], dict) or not {"text", "label"} <= row["choices"].keys():
            raise UserError(f"{where}: its choices are {repr(row['choices'])[:60]}, and should be two lists, "
                            "text and label")
        choices, letters, answer = row["choices"]["text"], row["choices"]["label"], row["answerKey"]
        if answer not in letters or len(choices) != len(letters):
            raise UserError(f"{where}: the answer {answer!r} or the number of choices does not match the labels "
                            f"{', '.join(map(str, letters))}")
        return multiple_choice.conversation(row["question"], choices, letters, answer)
