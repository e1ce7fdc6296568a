"""One row being decoded."""

from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch

from nanochat.errors import UserError
from nanochat.sampling import Settings


@dataclass(eq=False)
class Row:
    """One row being decoded: its prompt, its settings, and what came behind the prompt so far.

    tokens and mask (1 sampled, 0 forced) hold the closing token too. ended: "" while it runs, "stop" after a closing token, "length"
    after max_tokens. stops: the tokens that close it, the engine's if None. tools: whether the calculator answers its calls. logprobs:
    if it is a number n, scores gets for each token (log-probability, the n likeliest as (id, log-probability)), of the model's own
    distribution, before temperature and penalties.
    """

    prompt: Sequence[int]
    max_tokens: int
    settings: Settings = Settings()
    tokens: list[int] = field(default_factory=list)
    mask: list[int] = field(default_factory=list)
    ended: Literal["", "stop", "length"] = ""
    name: Any = None                                              # the caller's own
    stops: Collection[int] | None = None
    tools: bool = True
    logprobs: int | None = None
    scores: list[tuple[float, list[tuple[int, float]]]] = field(default_factory=list)
    random: np.random.Generator = None                            # its own stream of random numbers
    _forced: deque[int] = field(default_factory=deque)
    _call: list[int] | None = None                                # the tokens of a tool call being written

    def __post_init__(self) -> None:
        if not self.prompt:
            raise UserError("the prompt is empty: it must hold at least one token, <|bos|> say")
        if self.random is None:
            self.random = self.settings.random()


def scored(logits: torch.Tensor, token: int, n: int) -> tuple[float, list[tuple[int, float]]]:
    """Return the log-probability of a token and the n likeliest as (id, log-probability), likeliest first; logits (V,)."""
    logp = logits.log_softmax(dim=-1)
    if not n:
        return float(logp[token]), []
    least = logp.topk(min(n, len(logp))).values[-1]
    ids = (logp >= least).nonzero().squeeze(1)  # all that are as likely as the last one: which of them topk takes is not said
    values, order = logp[ids].sort(descending=True, stable=True)
    return float(logp[token]), list(zip(ids[order][:n].tolist(), values[:n].tolist()))
