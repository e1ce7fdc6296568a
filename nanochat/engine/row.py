"""One row of a batch: a prompt and the tokens decoded after it."""

from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch

from nanochat.errors import UserError
from nanochat.request import Settings
from nanochat.tokenizer.stream import PartParser


@dataclass(eq=False)
class Row:
    """One row being decoded: its prompt, its settings, and the tokens so far.

    Args:
        prompt: token ids, at least one. Raises UserError for none.
        max_tokens: new tokens at most.
        settings: how its tokens are sampled.
        tokens: the new tokens, the stop token included.
        mask: for each of them 1 if it was sampled, 0 if a tool forced it.
        ended: "" while it is decoded, "stop" after a stop token, "length" after max_tokens.
        name: for the caller's own use.
        stops: the tokens that end it; None for the engine's.
        tools: whether the calculator answers its calls.
        logprobs: None, or how many of the most likely tokens to keep in `scores` beside each token.
        scores: one a token: its log-probability, and the most likely ids with theirs; of the model's own distribution,
            before temperature and penalties.
        random: the row's own random numbers.
    """

    prompt: Sequence[int]
    max_tokens: int
    settings: Settings = Settings()
    tokens: list[int] = field(default_factory=list)
    mask: list[int] = field(default_factory=list)
    ended: Literal["", "stop", "length"] = ""
    name: Any = None
    stops: Collection[int] | None = None
    tools: bool = True
    logprobs: int | None = None
    scores: list[tuple[float, list[tuple[int, float]]]] = field(default_factory=list)
    random: np.random.Generator = None
    _forced: deque[int] = field(default_factory=deque)  # tokens of a tool's result that have not been taken
    _parser: PartParser | None = None                   # finds the ends of tool calls; made at the first call

    def __post_init__(self) -> None:
        if not self.prompt:
            raise UserError("the prompt is empty: it must hold at least one token, <|bos|> for example")
        if self.random is None:
            self.random = self.settings.random()


def scored(logits: torch.Tensor, token: int, n: int) -> tuple[float, list[tuple[int, float]]]:
    """Return a token's log-probability, and the n most likely tokens as (id, log-probability), most likely first.

    logits: (V,). Equally likely tokens come in the order of their ids, which topk alone does not promise.
    """
    logp = logits.log_softmax(dim=-1)
    if not n:
        return float(logp[token]), []
    least = logp.topk(min(n, len(logp))).values[-1]
    ids = (logp >= least).nonzero().squeeze(1)
    values, order = logp[ids].sort(descending=True, stable=True)
    return float(logp[token]), list(zip(ids[order][:n].tolist(), values[:n].tolist()))
