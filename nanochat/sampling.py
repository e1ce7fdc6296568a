"""From logits to the next token: repetition penalty, temperature, top-k, top-p, and a draw that a seed reproduces.

Each row of a batch has its own settings and its own random numbers, so what it draws does not depend on the rows beside it.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nanochat.files import UserError


@dataclass(frozen=True)
class Settings:
    """How one row draws its tokens.

    temperature 0 takes the likeliest; top_k None or 0, and top_p None or 1, leave all tokens in; repetition_penalty 1 changes nothing.
    seed None draws anew each time. sample: which of several rows with that seed this is.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float = 1.0
    seed: int | None = None
    sample: int = 0

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise UserError(f"temperature must be 0 or more, not {self.temperature}")
        if self.top_k is not None and self.top_k < 0:
            raise UserError(f"top_k must be 0 (all) or more, not {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"top_p must be above 0 and at most 1, not {self.top_p}")
        if not self.repetition_penalty > 0:
            raise UserError(f"repetition_penalty must be above 0, not {self.repetition_penalty}")
        if self.seed is not None and self.seed < 0:
            raise UserError(f"seed must be 0 or more, not {self.seed}")

    def random(self) -> np.random.Generator:
        """The row's own stream of random numbers."""
        return np.random.default_rng(None if self.seed is None else [self.seed, self.sample])


def penalised(logits: Tensor, seen: Tensor, penalty: Tensor) -> Tensor:
    """Return logits (B, V) with those of seen tokens (B, V bool) divided by penalty (B,) where positive, multiplied where negative."""
    penalty = penalty.unsqueeze(1)
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def draw(logits: Tensor, u: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, widest: int) -> Tensor:
    """Return ids (B,), drawn from softmax(logits / temperature) within the top_k likeliest and the smallest set of mass top_p.

    logits (B, V); u (B,) uniform in [0, 1): the id is where the running sum of the probabilities, likeliest first, passes u.
    temperature, top_k, top_p: (B,), temperature above 0. widest: no top_k is above it. The likeliest token always stays.
    """
    values, order = logits.topk(widest, dim=-1) if widest < logits.shape[-1] else logits.sort(dim=-1, descending=True, stable=True)
    values = values / temperature.unsqueeze(1)
    values = values.masked_fill(torch.arange(values.shape[1], device=values.device) >= top_k.unsqueeze(1), -torch.inf)
    p = values.softmax(dim=-1)
    before = p.cumsum(dim=-1) - p
    p = p.masked_fill((before >= top_p.unsqueeze(1)) & (before > 0), 0.0)
    sums = p.cumsum(dim=-1)
    place = torch.searchsorted(sums, u.unsqueeze(1) * sums[:, -1:], right=True)  # right: never on a token without mass
    last = (p > 0).sum(dim=-1, keepdim=True) - 1  # where rounding carries u · sum to the sum itself
    return order.gather(1, torch.minimum(place, last)).squeeze(1)


class Sampler:
    """Draws the next token of each row. Rows come (`extend`) and go (`select`)."""

    def __init__(self, rows: Iterable[Settings], vocab_size: int, device: torch.device | str = "cpu"):
        self.vocab_size, self.device = vocab_size, torch.device(device)
        self.rows: list[Settings] = []
        self.random: list[np.random.Generator] = []
        self.seen: Tensor | None = None  # (B, V) bool, kept where a row has a repetition penalty
        self.extend(rows)

    def extend(self, rows: Iterable[Settings]) -> None:
        """Add rows behind those there are."""
        rows = list(rows)
        self.rows += rows
        self.random += [row.random() for row in rows]
        if self.seen is not None:
            self.seen = torch.cat([self.seen, self.seen.new_zeros(len(rows), self.vocab_size)])
        elif any(row.repetition_penalty != 1 for row in rows):
            self.seen = torch.zeros(len(self.rows), self.vocab_size, dtype=torch.bool, device=self.device)
        self._prepare()

    def select(self, rows: list[int]) -> None:
        """Keep these rows, in this order."""
        self.rows, self.random = [self.rows[i] for i in rows], [self.random[i] for i in rows]
        if self.seen is not None:
            self.seen = self.seen[rows]
        self._prepare()

    def saw(self, row: int, ids: list[int]) -> None:
        """Tell that these tokens stand in a row; needed by the repetition penalty alone."""
        if self.seen is not None:
            self.seen[row, ids] = True

    def _prepare(self) -> None:
        V = self.vocab_size
        ks = [min(row.top_k or V, V) for row in self.rows]
        self.widest = max((k for k, row in zip(ks, self.rows) if row.temperature > 0 and k > 1), default=1)
        self.greedy = [row.temperature == 0 or k == 1 for row, k in zip(self.rows, ks)]

        def tensor(values: Iterable[float], dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.tensor(list(values), dtype=dtype, device=self.device)

        self.temperature, self.top_p = tensor(row.temperature or 1.0 for row in self.rows), tensor(row.top_p or 1.0 for row in self.rows)
        self.top_k, self.penalty = tensor(ks, torch.long), tensor(row.repetition_penalty for row in self.rows)
        self.likeliest = tensor(self.greedy, torch.bool)

    def __call__(self, logits: Tensor) -> Tensor:
        """Return the next ids (B,) for float32 logits (B, V) of the rows in their order."""
        if self.seen is not None:
            logits = penalised(logits, self.seen, self.penalty)
        if all(self.greedy):
            return logits.argmax(dim=-1)
        u = torch.tensor([random.random(dtype=np.float32) for random in self.random], device=self.device)  # 24 bits: below 1 in float32
        drawn = draw(logits, u, self.temperature, self.top_k, self.top_p, self.widest)
        return torch.where(self.likeliest, logits.argmax(dim=-1), drawn) if any(self.greedy) else drawn
