"""MMLU: questions with four choices in 57 subjects, and its auxiliary training set of 100,000 other questions."""

from nanochat.errors import UserError
from tasks import multiple_choice
from tasks.base import CATEGORICAL, Task, one_of
from tasks.hub import load_rows

SPLITS = {"all": ("test", "validation", "dev"), "auxiliary_train": ("train",)}
LETTERS = multiple_choice.LETTERS[:4]


class MMLU(Task):
    """cais/mmlu, one question per conversation. The field "subject" of a conversation names its subject."""

    name, kind, chance = "MMLU", CATEGORICAL, 0.25

    def __init__(self, subset: str, split: str):
        one_of(f"split of MMLU, {one_of('subset of MMLU', subset, SPLITS)}", split, SPLITS[subset])
        self.rows = load_rows("cais/mmlu", subset, split, ("question", "subject", "choices", "answer"))

    def __len__(self) -> int:
        return len(self.rows)

    def conversation(self, i: int) -> dict:
        row = self.rows[i]
        choices, answer = row["choices"], row["answer"]
        count = len(choices) if isinstance(choices, list) else repr(choices)[:40]
        if count != 4 or answer not in range(4):
            raise UserError(f"MMLU, question {row['question'][:60]!r}: there should be four choices and an answer from "
                            f"0 to 3, and there are {count} and {answer!r}")
        return {**multiple_choice.conversation(row["question"], choices, LETTERS, LETTERS[answer]),
                "subject": row["subject"]}
