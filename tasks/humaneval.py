"""HumanEval: complete a Python function from its signature and docstring. The sandbox runs the answer against tests."""

import re

from tasks.base import Task, question_and_answer, until_assistant_end
from tasks.hub import load_rows

FENCED = re.compile(r"```\w*[ \t\r]*\n(.*?)\n```", re.DOTALL)


class HumanEval(Task):
    """openai/openai_humaneval, 164 problems. The fields "entry_point" and "test" of a conversation are for grading."""

    name = "HumanEval"

    def __init__(self):
        columns = ("task_id", "prompt", "canonical_solution", "test", "entry_point")
        self.rows = load_rows("openai/openai_humaneval", "openai_humaneval", "test", columns)

    def __len__(self) -> int:
        return len(self.rows)

    def conversation(self, i: int) -> dict:
        row = self.rows[i]
        return {**question_and_answer(row["prompt"], row["prompt"] + row["canonical_solution"]),
                **{key: row[key] for key in ("task_id", "entry_point", "test")}}

    def evaluate(self, conversation: dict, answer: str) -> bool:
        """Run the program and return whether it passes its tests.

        nanochat/tools/sandbox.py says how the program is confined. Raises UserError if this machine cannot confine it.
        """
        from nanochat.tools.sandbox import passes
        checks = f"{conversation['test']}\ncheck({conversation['entry_point']})\n"
        return passes(program_of(conversation["messages"][0]["content"], until_assistant_end(answer)), checks).ok


def program_of(prompt: str, answer: str) -> str:
    """Return the program to run: the prompt's imports, then the first fenced block of the answer, or all of it."""
    fenced = FENCED.search(answer)
    return imports_of(prompt) + "\n\n" + (fenced[1] if fenced else answer).strip()


def imports_of(prompt: str) -> str:
    """Return the imports at the start of the prompt. Models often leave them out of the answer."""
    found = []
    for line in prompt.splitlines():
        if line.startswith(("import ", "from ")):
            found.append(line)
        elif line.strip() and not line.startswith("#"):
            break
    return "\n".join(found)
