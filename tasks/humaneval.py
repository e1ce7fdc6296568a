"""HumanEval: complete a Python function from its signature and docstring. The sandbox runs the answer against tests."""

import ast
import re
import textwrap
import warnings
from collections.abc import Iterator

from tasks.base import Task, question_and_answer, until_assistant_end
from tasks.hub import load_rows

FENCED = re.compile(r"```\w*[ \t\r]*\n(.*?)\n```", re.DOTALL)
ANY_FENCE = re.compile(r"^[ \t]*(```|~~~)[^\n]*\n(.*?)(?:^[ \t]*\1|\Z)", re.DOTALL | re.MULTILINE)  # or not closed
CODE_BEGINS = re.compile(r"^(?:import |from |def |async def |class |@)", re.MULTILINE)
FUTURE = re.compile(r"^from __future__ import .*\n?", re.MULTILINE)
LONGEST = 100_000  # characters of an answer that are looked at


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
        """Run the program of `program_of` and return whether it passes its tests.

        nanochat/tools/sandbox.py says how the program is confined. Raises UserError if this machine cannot confine it.
        """
        prompt, name = conversation["messages"][0]["content"], conversation["entry_point"]
        return _passes(program_of(prompt, until_assistant_end(answer), name), conversation)

    def evaluate_lenient(self, conversation: dict, answer: str) -> bool:
        """Return whether any reading of the answer passes: the code between words, or all its fenced blocks together.

        Only readings that differ from that of `evaluate` are run.
        """
        prompt, name = conversation["messages"][0]["content"], conversation["entry_point"]
        answer = until_assistant_end(answer)
        run = {program_of(prompt, answer, name)}
        for code in readings(answer):
            program = _completed(prompt, code, name)
            if program not in run and _passes(program, conversation):
                return True
            run.add(program)
        return False


def _passes(program: str, conversation: dict) -> bool:
    from nanochat.tools.sandbox import passes
    return passes(program, f"{conversation['test']}\ncheck({conversation['entry_point']})\n").ok


def program_of(prompt: str, answer: str, name: str | None = None) -> str:
    """Return the program to run: all that the prompt defines but the function asked for, then the answer's code.

    The code is the first fenced block of the answer, or all of it, as the publication reads it; where that block does
    not define the function and another one does, that one. Code that does not define the function is taken for its
    body, as the original harness does, which lets a model continue the prompt.

    Args:
        prompt: of the problem: imports, perhaps helpers, then signature and docstring of the function asked for.
        answer: of the model.
        name: of the function; None takes the last one of the prompt.
    """
    name = name or _last_function(prompt)
    blocks = FENCED.findall(answer[:LONGEST])
    code = next((block for block in blocks if _defines(block.strip(), name)), blocks[0] if blocks else answer[:LONGEST])
    return _completed(prompt, code, name)


def readings(answer: str) -> Iterator[str]:
    """Yield the code of an answer as a person would find it: all fenced blocks in one; without any, what is not words.

    A fence may be indented, of tildes, or not closed.
    """
    blocks = [textwrap.dedent(block) for _, block in ANY_FENCE.findall(answer[:LONGEST])]
    if blocks:
        yield "\n\n".join(blocks)
    elif begins := CODE_BEGINS.search(answer[:LONGEST]):
        lines = answer[begins.start():LONGEST].splitlines()
        for end in range(len(lines), max(0, len(lines) - 30), -1):  # words behind the code
            if _parsed("\n".join(lines[:end])) is not None:
                yield "\n".join(lines[:end])
                return


def _completed(prompt: str, code: str, name: str) -> str:
    """Return the program of a prompt and the code of an answer."""
    stripped = code.strip()
    program = f"{setting_of(prompt, name)}\n\n{stripped}"
    if stripped and not _defines(stripped, name):
        bodies = (code.rstrip(), textwrap.indent(textwrap.dedent(code.strip("\n")), "    "), f"    {stripped}")
        wholes = (f"{prompt.rstrip()}\n{body}\n" for body in bodies)
        program = next((whole for whole in wholes if _has_body(whole, name)), program)
    if futures := FUTURE.findall(program):  # they must come first
        program = "".join(line.rstrip() + "\n" for line in dict.fromkeys(futures)) + FUTURE.sub("", program)
    return program


def setting_of(prompt: str, name: str) -> str:
    """Return the lines of the prompt that define anything but the function asked for: imports, constants, helpers.

    Models often leave them out of the answer, and the tests may call a helper.
    """
    tree = _parsed(prompt) or _parsed(f"{prompt.rstrip()}\n    pass\n")  # a signature without a docstring
    if tree is None:
        found = [*re.finditer(rf"^(?:async )?def {re.escape(name)}\b", prompt, re.MULTILINE)] if name else []
        return prompt[:found[-1].start()].rstrip() if found else ""
    asked = next((node for node in reversed(tree.body) if getattr(node, "name", None) == name), None)
    kept = {number for node in tree.body if node is not asked for number in _lines_of(node)}
    lines = prompt.splitlines()
    return "\n".join(lines[number - 1] for number in sorted(kept) if number <= len(lines))


def _lines_of(node: ast.stmt) -> range:
    first = min([node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", ()))])
    return range(first, node.end_lineno + 1)


def _last_function(prompt: str) -> str:
    """Return the name of the last function of a prompt; "" where there is none."""
    found = re.findall(r"^(?:async )?def (\w+)", prompt, re.MULTILINE)
    return found[-1] if found else ""


def _parsed(code: str) -> ast.Module | None:
    """Return the syntax tree; None where the code is no Python."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd escapes in strings
            return ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _defines(code: str, name: str) -> bool:
    """Return whether code defines a name at its top level; of code that is no Python, whether it has its `def`."""
    tree = _parsed(code)
    if tree is None:
        return bool(re.search(rf"^[ \t]*(?:async )?def {re.escape(name)}\b", code, re.MULTILINE))
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if getattr(node, "name", None) == name or any(getattr(target, "id", None) == name for target in targets):
            return True
    return False


def _has_body(program: str, name: str) -> bool:
    """Return whether the function of this name holds more than a docstring."""
    tree = _parsed(program)
    return tree is not None and any(
        getattr(node, "name", None) == name and not all(
            isinstance(part, ast.Expr) and isinstance(part.value, ast.Constant) for part in node.body)
        for node in tree.body)
