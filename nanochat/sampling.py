"""From logits to the next token: repetition penalty, temperature, top-k, top-p, and sampling that a seed reproduces.

Each row of a batch has its own settings and its own random numbers, so its tokens do not depend on the other rows.
"""

from collections.abc import Iterable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat.request import Settings

BLOCK = 256  # tokens whose probabilities are summed together
COLD = 1e-5  # temperatures below are taken as 0, which they may be in float32


def penalize(logits: Tensor, seen: Tensor, penalty: Tensor) -> Tensor:
    """Apply the repetition penalty (B,) to logits (B, V) of seen tokens (B, V) bool: divide positive ones, multiply
    negative ones."""
    penalty = penalty.unsqueeze(1)
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def sample(logits: Tensor, u: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, max_top_k: int,
           max_nucleus: int | None = None) -> Tensor:
    """Sample from softmax(logits / temperature), restricted to the top_k and to the smallest set of probability top_p.

    Tokens as likely as the last one let in are let in too, so that nothing depends on the order of a sort. What a row
    gets depends neither on max_top_k and max_nucleus nor on other rows.

    Args:
        logits: (B, V).
        u: (B,) uniform in [0, 1). The id is the one where the running sum of the probabilities, in order of ids, passes
            u.
        temperature, top_k, top_p: (B,); temperature above 0.
        max_top_k: the largest top_k below V; 0 if there is none.
        max_nucleus: among how many most likely tokens every top_p below 1 ends; 0 if there is none, V where it is None.

    Returns:
        ids (B,).
    """
    V, logits = logits.shape[-1], logits / temperature.unsqueeze(1)
    max_nucleus = V if max_nucleus is None else max_nucleus
    precise = torch.float32 if logits.device.type == "mps" else torch.float64  # mps has no float64
    if max_top_k:
        largest = logits.topk(max_top_k, dim=-1).values
        least = largest.gather(1, top_k.clamp(max=max_top_k).unsqueeze(1) - 1)
        logits = logits.masked_fill((logits < least) & (top_k < V).unsqueeze(1), -torch.inf)
    p = logits.softmax(dim=-1)
    if max_nucleus:
        ranked = p.topk(max_nucleus, dim=-1).values
        before = ranked.cumsum(dim=-1, dtype=precise) - ranked
        least = ranked.masked_fill((before >= top_p.unsqueeze(1)) & (before > 0), torch.inf).amin(dim=-1, keepdim=True)
        p = p.masked_fill((p < least) & (top_p < 1).unsqueeze(1), 0.0)
    # a running sum over all of V is slow: find the block first, then the token in it
    blocks = F.pad(p, (0, -V % BLOCK)).unflatten(-1, (-1, BLOCK))
    masses = blocks.sum(dim=-1, dtype=precise)
    sums = masses.cumsum(dim=-1)
    block, rest = _first_above(sums, u.unsqueeze(1) * sums[:, -1:])
    rest += masses.gather(1, block) - sums.gather(1, block)
    inside, _ = _first_above(
        blocks.gather(1, block.unsqueeze(2).expand(-1, 1, BLOCK)).squeeze(1).cumsum(dim=-1, dtype=precise), rest)
    return (block * BLOCK + inside).squeeze(1)


def _first_above(sums: Tensor, mark: Tensor) -> tuple[Tensor, Tensor]:
    """Return where running sums (B, n) first pass a mark (B, 1), and the mark, clamped to the sums against rounding."""
    mark = torch.minimum(mark.clamp(min=0), sums[:, -1:] * (1 - 2 ** -23))
    # right=True: never a token of probability 0
    return torch.searchsorted(sums, mark, right=True).clamp(max=sums.shape[-1] - 1), mark


def sample_or_argmax(logits: Tensor, u: Tensor, greedy: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor,
                     max_top_k: int, max_nucleus: int) -> Tensor:
    """Return the most likely id of the rows where `greedy` (B,) is true, and a sampled one of the others; as
    `sample`."""
    sampled = sample(logits, u, temperature, top_k, top_p, max_top_k, max_nucleus)
    return torch.where(greedy, logits.argmax(dim=-1), sampled)


def reorder(buffer: Tensor, order: list[int]) -> None:
    """Set buffer[i] to what buffer[order[i]] was. It never waits for the device, as indexing by a list would."""
    for i, row in [(i, buffer[source].clone()) for i, source in enumerate(order) if i != source]:
        buffer[i] = row


class Sampler:
    """Samples the next token of each row of a batch. Rows are added by `extend` and kept by `select`.

    Attributes:
        rows: the settings of each row.
        int_settings: (2, B) int32 on the host: top_k, and whether the row is greedy.
        float_settings: (3, B) float32 on the host: temperature, top_p, repetition penalty.
        max_top_k, max_nucleus: as in `sample`.
        greedy: whether all rows are.
        has_penalty: whether any row has a repetition penalty.
        seen: which tokens are in each row, bool (at least B, V); None until a row has a penalty, unless it was given.
    """

    def __init__(self, rows: Iterable[Settings], vocab_size: int, device: torch.device | str = "cpu"):
        self.vocab_size, self.device = vocab_size, torch.device(device)
        self.rows: list[Settings] = []
        self.random: list[np.random.Generator] = []
        self.seen: Tensor | None = None
        self.extend(rows)

    def extend(self, rows: Iterable[Settings], random: Iterable[np.random.Generator] | None = None) -> None:
        """Add rows at the end. random: their generators, where these continue; made from the settings where None."""
        rows, before = list(rows), len(self.rows)
        self.rows += rows
        self.random += [row.random() for row in rows] if random is None else random
        self._tabulate()
        if self.seen is None and self.has_penalty:
            self.seen = torch.zeros(len(self.rows), self.vocab_size, dtype=torch.bool, device=self.device)
        elif self.seen is not None:
            self.seen[before:len(self.rows)] = False
            if (more := len(self.rows) - len(self.seen)) > 0:
                self.seen = torch.cat([self.seen, self.seen.new_zeros(more, self.vocab_size)])

    def select(self, rows: list[int]) -> None:
        """Keep these rows, in this order."""
        self.rows, self.random = [self.rows[i] for i in rows], [self.random[i] for i in rows]
        if self.seen is not None:
            reorder(self.seen, rows)
        self._tabulate()

    def mark_seen(self, row: int, ids: list[int]) -> None:
        """Record that these tokens are in a row. Only the repetition penalty needs it."""
        if self.rows[row].repetition_penalty != 1:
            self.seen[row, ids] = True

    def _tabulate(self) -> None:
        """Compute the attributes that follow from the rows' settings."""
        V = self.vocab_size
        ks = [min(row.top_k or V, V) for row in self.rows]
        greedy = [row.temperature < COLD or k == 1 for row, k in zip(self.rows, ks)]
        sampled = [(k, row.top_p or 1.0) for row, k, is_greedy in zip(self.rows, ks, greedy) if not is_greedy]
        self.greedy = len(sampled) == 0
        self.max_top_k = max((k for k, _ in sampled if k < V), default=0)
        self.max_nucleus = max((k for k, top_p in sampled if top_p < 1), default=0)
        self.has_penalty = any(row.repetition_penalty != 1 for row in self.rows)
        self.int_settings = np.array([ks, greedy], dtype=np.int32)
        self.float_settings = np.array(
            [[1.0 if is_greedy else row.temperature for row, is_greedy in zip(self.rows, greedy)],
             [row.top_p or 1.0 for row in self.rows], [row.repetition_penalty for row in self.rows]], dtype=np.float32)
        self._on_device: tuple[Tensor, Tensor] | None = None

    def uniform(self) -> np.ndarray:
        """Return the next random number of each row, (B,) float32 in [0, 1)."""
        # float32 from 24 random bits: always below 1
        return np.array([random.random(dtype=np.float32) for random in self.random], dtype=np.float32)

    def __call__(self, logits: Tensor) -> Tensor:
        """Return the next ids (B,) for float32 logits (B, V) of the rows in their order."""
        if self._on_device is None:
            self._on_device = tuple(
                torch.from_numpy(table).to(self.device) for table in (self.int_settings, self.float_settings))
        (top_k, greedy), (temperature, top_p, penalty) = self._on_device
        if self.has_penalty:
            logits = penalize(logits, self.seen[:len(self.rows)], penalty)
        if self.greedy:
            return logits.argmax(dim=-1)
        u = torch.from_numpy(self.uniform()).to(self.device)
        return sample_or_argmax(logits, u, greedy > 0, temperature, top_k.long(), top_p, self.max_top_k,
                                self.max_nucleus)
