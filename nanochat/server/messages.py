"""What happened to a request: the scheduler tells it, the worker passes it on, the HTTP side makes an answer of it.

It has a file of its own since the server's process has no PyTorch, which the scheduler needs.
"""

from typing import Literal, NamedTuple

Scores = tuple[float | None, list[tuple[int, float]]]  # of a token: its log-probability, the likeliest ones and theirs


class Event(NamedTuple):
    """What happened to a request.

    started: its prompt is being taken in; `cached` tokens of it had been before. prompt: prompt_logprobs, one (log-probability, likeliest)
    a token, None for the first. token: one more; the closing one is not told. ended: why, and for errors a message; "refused": too many
    wait; "shutdown": the server ends.
    """

    id: str
    kind: Literal["started", "prompt", "token", "ended"]
    token: int = -1
    forced: bool = False
    logprob: float | None = None
    top: list[tuple[int, float]] | None = None
    prompt_logprobs: list[Scores] | None = None
    finish: Literal["stop", "length", "cancelled", "timeout", "error", "refused", "shutdown", ""] = ""
    message: str = ""
    cached: int = 0
