"""From logits to the next token: repetition penalty, temperature, top-k, top-p, and a draw that a seed reproduces.

Each row of a batch has its own settings and its own random numbers, so what it draws does not depend on the rows beside it.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nanochat.files import UserError

COLD = 1e-5  # a temperature below is as good as 0, and may be 0 in float32


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


def draw(logits: Tensor, u: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, widest: int, nucleus: int | None = None) -> Tensor:
    """Return ids (B,), drawn from softmax(logits / temperature) within the top_k likeliest and the smallest set of mass top_p.

    logits (B, V); u (B,) uniform in [0, 1): the id is where the running sum of the probabilities, in the order of the ids, passes u.
    temperature, top_k, top_p: (B,), temperature above 0. Tokens as likely as the last one let in are in too, so that nothing hangs on the
    order of a sort. widest: the largest top_k below V, 0 if there is none; nucleus: among how many of the likeliest tokens every top_p
    below 1 ends, 0 if there is none; V if not given. What a row draws does not depend on these two, nor on the rows beside it.
    """
    V, logits = logits.shape[-1], logits / temperature.unsqueeze(1)
    nucleus = V if nucleus is None else nucleus
    precise = torch.float32 if logits.device.type == "mps" else torch.float64  # mps has no other
    if widest:
        largest = logits.topk(widest, dim=-1).values
        least = largest.gather(1, top_k.clamp(max=widest).unsqueeze(1) - 1)
        logits = logits.masked_fill((logits < least) & (top_k < V).unsqueeze(1), -torch.inf)
    p = logits.softmax(dim=-1)
    if nucleus:
        ranked = p.topk(nucleus, dim=-1).values
        before = ranked.cumsum(dim=-1, dtype=precise) - ranked
        least = ranked.masked_fill((before >= top_p.unsqueeze(1)) & (before > 0), torch.inf).amin(dim=-1, keepdim=True)
        p = p.masked_fill((p < least) & (top_p < 1).unsqueeze(1), 0.0)
    sums = p.cumsum(dim=-1, dtype=precise)
    below = torch.minimum(u.unsqueeze(1) * sums[:, -1:], sums[:, -1:] * (1 - 2 ** -23))  # also where rounding would reach the sum itself
    return torch.searchsorted(sums, below, right=True).squeeze(1).clamp(max=V - 1)  # right: never on a token without mass


class Sampler:
    """Draws the next token of each row. Rows come (`extend`) and go (`select`)."""

    def __init__(self, rows: Iterable[Settings], vocab_size: int, device: torch.device | str = "cpu"):
        self.vocab_size, self.device = vocab_size, torch.device(device)
        self.rows: list[Settings] = []
        self.random: list[np.random.Generator] = []
        self.seen: Tensor | None = None  # (B, V) bool, kept where a row has a repetition penalty
        self.extend(rows)

    def extend(self, rows: Iterable[Settings], random: Iterable[np.random.Generator] | None = None) -> None:
        """Add rows behind those there are. random: where the random numbers of rows that were here before go on."""
        rows = list(rows)
        self.rows += rows
        self.random += [row.random() for row in rows] if random is None else random
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
        self.greedy = [row.temperature < COLD or k == 1 for row, k in zip(self.rows, ks)]
        drawing = [(k, row.top_p or 1.0) for row, k, greedy in zip(self.rows, ks, self.greedy) if not greedy]
        self.widest = max((k for k, _ in drawing if k < V), default=0)
        self.nucleus = max((k for k, top_p in drawing if top_p < 1), default=0)

        def tensor(values: Iterable[float], dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.tensor(list(values), dtype=dtype, device=self.device)

        self.temperature = tensor(1.0 if greedy else row.temperature for row, greedy in zip(self.rows, self.greedy))
        self.top_p = tensor(row.top_p or 1.0 for row in self.rows)
        self.top_k, self.penalty = tensor(ks, torch.long), tensor(row.repetition_penalty for row in self.rows)
        self.likeliest = tensor(self.greedy, torch.bool)

    def __call__(self, logits: Tensor) -> Tensor:
        """Return the next ids (B,) for float32 logits (B, V) of the rows in their order."""
        if self.seen is not None:
            logits = penalised(logits, self.seen, self.penalty)
        if all(self.greedy):
            return logits.argmax(dim=-1)
        u = torch.tensor([random.random(dtype=np.float32) for random in self.random], device=self.device)  # 24 bits: below 1 in float32
        drawn = draw(logits, u, self.temperature, self.top_k, self.top_p, self.widest, self.nucleus)
        return torch.where(self.likeliest, logits.argmax(dim=-1), drawn) if any(self.greedy) else drawn
