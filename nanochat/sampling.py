"""From logits to the next token: repetition penalty, temperature, top-k, top-p, and a draw that a seed reproduces.

Each row of a batch has its own settings and its own random numbers, so what it draws does not depend on the rows beside it.
"""

from collections.abc import Iterable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat.request import Settings

BLOCK = 256  # tokens whose probabilities are summed up together
COLD = 1e-5  # a temperature below is as good as 0, and may be 0 in float32


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
    blocks = F.pad(p, (0, -V % BLOCK)).unflatten(-1, (-1, BLOCK))  # one sum over all of V is slow: first the block, then the token in it
    masses = blocks.sum(dim=-1, dtype=precise)
    sums = masses.cumsum(dim=-1)
    block, left = _passed(sums, u.unsqueeze(1) * sums[:, -1:])
    left += masses.gather(1, block) - sums.gather(1, block)
    inside, _ = _passed(blocks.gather(1, block.unsqueeze(2).expand(-1, 1, BLOCK)).squeeze(1).cumsum(dim=-1, dtype=precise), left)
    return (block * BLOCK + inside).squeeze(1)


def _passed(sums: Tensor, mark: Tensor) -> tuple[Tensor, Tensor]:
    """Return where running sums (B, n) first pass a mark (B, 1), and that mark: moved inside, should rounding have put it outside."""
    mark = torch.minimum(mark.clamp(min=0), sums[:, -1:] * (1 - 2 ** -23))
    return torch.searchsorted(sums, mark, right=True).clamp(max=sums.shape[-1] - 1), mark  # right: never on what has no mass


def choose(logits: Tensor, u: Tensor, likeliest: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, widest: int, nucleus: int
           ) -> Tensor:
    """Return the likeliest id of the rows where `likeliest` (B,) is true, what `draw` gives for the others."""
    return torch.where(likeliest, logits.argmax(dim=-1), draw(logits, u, temperature, top_k, top_p, widest, nucleus))


def reorder(memory: Tensor, order: list[int]) -> None:
    """Let memory[i] be what memory[order[i]] was. It never waits for the device, as an index made of a list would."""
    for i, row in [(i, memory[source].clone()) for i, source in enumerate(order) if i != source]:
        memory[i] = row


class Sampler:
    """Draws the next token of each row. Rows come (`extend`) and go (`select`).

    The settings of all rows as numbers on the host, (…, B) each: `whole` top_k and whether the likeliest is taken, `real` temperature,
    top_p and penalty. widest, nucleus: as in `draw`; penalises: whether a row has a repetition penalty. seen: which tokens stand in each
    row, (room, V) bool with room for as many rows as there are at least; there once a row has a penalty, or where it was given.
    """

    def __init__(self, rows: Iterable[Settings], vocab_size: int, device: torch.device | str = "cpu"):
        self.vocab_size, self.device = vocab_size, torch.device(device)
        self.rows: list[Settings] = []
        self.random: list[np.random.Generator] = []
        self.seen: Tensor | None = None
        self.extend(rows)

    def extend(self, rows: Iterable[Settings], random: Iterable[np.random.Generator] | None = None) -> None:
        """Add rows behind those there are. random: where the random numbers of rows that were here before go on."""
        rows, before = list(rows), len(self.rows)
        self.rows += rows
        self.random += [row.random() for row in rows] if random is None else random
        self._prepare()
        if self.seen is None and self.penalises:
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
        self._prepare()

    def saw(self, row: int, ids: list[int]) -> None:
        """Tell that these tokens stand in a row; needed by the repetition penalty alone."""
        if self.rows[row].repetition_penalty != 1:
            self.seen[row, ids] = True

    def _prepare(self) -> None:
        V = self.vocab_size
        ks = [min(row.top_k or V, V) for row in self.rows]
        greedy = [row.temperature < COLD or k == 1 for row, k in zip(self.rows, ks)]
        drawing = [(k, row.top_p or 1.0) for row, k, likeliest in zip(self.rows, ks, greedy) if not likeliest]
        self.greedy = len(drawing) == 0
        self.widest = max((k for k, _ in drawing if k < V), default=0)
        self.nucleus = max((k for k, top_p in drawing if top_p < 1), default=0)
        self.penalises = any(row.repetition_penalty != 1 for row in self.rows)
        self.whole = np.array([ks, greedy], dtype=np.int32)
        self.real = np.array([[1.0 if likeliest else row.temperature for row, likeliest in zip(self.rows, greedy)],
                              [row.top_p or 1.0 for row in self.rows], [row.repetition_penalty for row in self.rows]], dtype=np.float32)
        self._on_device: tuple[Tensor, Tensor] | None = None

    def uniform(self) -> np.ndarray:
        """The next random number of each row, (B,) float32 in [0, 1)."""
        return np.array([random.random(dtype=np.float32) for random in self.random], dtype=np.float32)  # 24 bits: below 1

    def __call__(self, logits: Tensor) -> Tensor:
        """Return the next ids (B,) for float32 logits (B, V) of the rows in their order."""
        if self._on_device is None:
            self._on_device = torch.from_numpy(self.whole).to(self.device), torch.from_numpy(self.real).to(self.device)
        (top_k, likeliest), (temperature, top_p, penalty) = self._on_device
        if self.penalises:
            logits = penalised(logits, self.seen[:len(self.rows)], penalty)
        if self.greedy:
            return logits.argmax(dim=-1)
        u = torch.from_numpy(self.uniform()).to(self.device)
        return choose(logits, u, likeliest > 0, temperature, top_k.long(), top_p, self.widest, self.nucleus)
