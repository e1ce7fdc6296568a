"""HumanEval: complete a Python function from its head and docstring. What the model writes is run, in the sandbox, against tests."""

import re

from tasks.base import Task, asked_and_answered, spoken
from tasks.hub import load_rows

FENCED = re.compile(r"```\w*[ \t\r]*\n(.*?)\n```", re.DOTALL)


class HumanEval(Task):
    """The 164 problems of openai/openai_humaneval; "entry_point" and "test" in a conversation are what grading needs."""

    name = "HumanEval"

    def __init__(self):
        columns = ("task_id", "prompt", "canonical_solution", "test", "entry_point")
        self.rows = load_rows("openai/openai_humaneval", "openai_humaneval", "test", columns)

    def __len__(self) -> int:
        return len(self.rows)

    def conversation(self, i: int) -> dict:
        row = self.rows[i]
        return {**asked_and_answered(row["prompt"], row["prompt"] + row["canonical_solution"]),
                **{key: row[key] for key in ("task_id", "entry_point", "test")}}

    def evaluate(self, conversation: dict, answer: str) -> bool:
        """Right where the program passes its tests. Runs it: nanochat/tools/sandbox.py says how it is held, and where it refuses."""
        from nanochat.tools.sandbox import passes
        checks = f"{conversation['test']}\ncheck({conversation['entry_point']})\n"
        return passes(program_of(conversation["messages"][0]["content"], spoken(answer)), checks).ok


def program_of(prompt: str, answer: str) -> str:
    """Return what is run: the imports that the prompt begins with, then the answer's first fenced block, or else all of it."""
    fenced = FENCED.search(answer)
    return imports_of(prompt) + "\n\n" + (fenced[1] if fenced else answer).strip()


def imports_of(prompt: str) -> str:
    """Return the imports that stand before anything else, since a model often leaves them out."""
    found = []
    for line in prompt.splitlines():
        if line.startswith(("import ", "from ")):
            found.append(line)
        elif line.strip() and not line.startswith("#"):
            break
    return "\n".join(found)
