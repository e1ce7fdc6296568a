"""Multiple choice as published weights were trained on it: each choice with its letter behind it, the letter alone as the answer."""

from collections.abc import Sequence

from tasks.base import asked_and_answered

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def prompt(question: str, choices: Sequence[str], letters: Sequence[str]) -> str:
    """Return the user's text. No space stands before a letter, so that the token is the one the assistant answers with."""
    lines = "".join(f"- {choice}={letter}\n" for choice, letter in zip(choices, letters))
    return f"Multiple Choice question: {question}\n{lines}\nRespond only with the letter of the correct answer."


def conversation(question: str, choices: Sequence[str], letters: Sequence[str], answer: str) -> dict:
    """Return the conversation, `answer` being one of the letters; "letters" in it are what an answer is chosen from."""
    return {**asked_and_answered(prompt(question, choices, letters), answer), "letters": list(letters)}
