"""Multiple-choice prompts in the published format: each choice is followed by its letter, which alone is the answer."""

from collections.abc import Sequence

from tasks.base import question_and_answer

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def prompt(question: str, choices: Sequence[str], letters: Sequence[str]) -> str:
    """Return the user's text. There is no space before a letter, so that its token is the one of the answer."""
    lines = "".join(f"- {choice}={letter}\n" for choice, letter in zip(choices, letters))
    return f"Multiple Choice question: {question}\n{lines}\nRespond only with the letter of the correct answer."


def conversation(question: str, choices: Sequence[str], letters: Sequence[str], answer: str) -> dict:
    """Return a conversation whose answer is a letter. Its field "letters" lists the possible answers.

    Args:
        question: the text of the question.
        choices, letters: of the same length.
        answer: one of `letters`.
    """
    return {**question_and_answer(prompt(question, choices, letters), answer), "letters": list(letters)}
