"""How well a model uses what stands in its context, apart from how well it knows the language. Every row is random.

Copying: a random sequence twice, `bos s s`. The loss of the second copy is that of finding the place and going on.
Lookup: pairs of a key and a value, then the same pairs in another order. The loss, and the accuracy, of the value that
is asked again is that of finding the key.

Tokens are drawn as frequent as they are in the held-out text: those that a model has met. The rows depend on that text
and the length of a row alone, so that they are the same for all models that are compared.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

ROWS, BATCH = 96, 16
PAIRS = 12  # at most, in a row; short enough that a small model can learn it at all


def copy_rows(frequent: np.ndarray, T: int, bos: int, rng: np.random.Generator) -> tuple[np.ndarray, slice]:
    """Return rows (ROWS, T' + 1), T' ≤ T, and the targets of the second copy, its first token left out."""
    n = T // 2
    drawn = rng.choice(frequent, (ROWS, n))
    first = np.full((ROWS, 1), bos)
    return np.concatenate([first, drawn, drawn], 1), slice(n + 1, 2 * n)


def lookup_rows(frequent: np.ndarray, T: int, bos: int, rng: np.random.Generator) -> tuple[np.ndarray, slice]:
    """Return rows (ROWS, T' + 1), T' ≤ T, and the targets of the values that are asked again. No key is a value."""
    tokens = np.unique(frequent)
    n = min(PAIRS, T // 4, len(tokens) // 2)
    rows = np.full((ROWS, 1 + 4 * n), bos)
    for row in rows:
        keys, values = rng.choice(tokens, n, replace=False), np.empty(0, dtype=np.int64)
        while len(values) < n:
            drawn = rng.choice(frequent, n)
            values = np.concatenate([values, drawn[~np.isin(drawn, keys)]])
        pairs = np.stack([keys, values[:n]], 1)
        row[1:1 + 2 * n] = pairs.ravel()
        row[1 + 2 * n:] = pairs[rng.permutation(n)].ravel()
    return rows, slice(2 * n + 1, 4 * n, 2)


@torch.no_grad()
def recall(model: Any, frequent: np.ndarray, bos: int) -> dict[str, list[float]]:
    """Return the means of each row: nats of a token in the first copy ("first") and in the second ("copy"), nats of a
    value asked again ("lookup"), and how often it is the likeliest token ("found").

    Args:
        model: ids (B, T) → logits (B, T, V).
        frequent: 1-D tokens of a text, to draw from. bos: precedes each row.
    """
    T, rng = model.config.sequence_len, np.random.default_rng(0)
    found: dict[str, list[float]] = {"first": [], "copy": [], "lookup": [], "found": []}
    for name, make in (("copy", copy_rows), ("lookup", lookup_rows)):
        rows, asked = make(frequent, T, bos, rng)
        for start in range(0, ROWS, BATCH):
            part = torch.from_numpy(rows[start:start + BATCH].astype(np.int64)).to(model.device)
            nats, right = _losses(model, part)
            found[name] += nats[:, asked].mean(1).tolist()
            if name == "copy":
                found["first"] += nats[:, 1:T // 2].mean(1).tolist()
            else:
                found["found"] += right[:, asked].mean(1).tolist()
    return found


def _losses(model: Any, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return nats of each target, and 1 where it is the likeliest token, 0 elsewhere; both (B, T) on the CPU."""
    logits, targets = model(rows[:, :-1]).float(), rows[:, 1:]
    nats = logits.logsumexp(-1) - logits.gather(-1, targets[..., None])[..., 0]
    return nats.cpu(), (logits.argmax(-1) == targets).float().cpu()
