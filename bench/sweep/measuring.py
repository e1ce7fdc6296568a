"""What a run of a sweep measures of its model after training."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.sweep.recall import recall
from nanochat.tokenizer import get_token_bytes

EVAL_ROWS = 16  # rows of a batch


def peak_memory() -> int:
    """Return the peak of this process: bytes of the allocator on a GPU, of resident memory on a CPU."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@torch.no_grad()
def held_out_nats(model: torch.nn.Module, tokenizer: Any, path: Path) -> dict[str, list]:
    """Return the loss of each held-out document in nats, its bytes and its tokens.

    A document is read in rows of the model's length, each with a bos before it and without what precedes: as in
    training. Special tokens in the text have no bytes, and do not count.
    """
    with np.load(path) as kept:
        ids, ends = kept["ids"].astype(np.int64), kept["ends"]
    T, device = model.config.sequence_len, model.device
    sizes = get_token_bytes(device)
    nats, size, count = (np.zeros(len(ends)) for _ in range(3))
    for owners, rows in batches(ids, ends, T, tokenizer.get_bos_token_id()):
        rows = torch.from_numpy(rows).to(device)
        targets = rows[:, 1:].contiguous()
        loss = model(rows[:, :-1].clamp_min(0).contiguous(), targets, loss_reduction="none").view(targets.shape)
        own = torch.where(targets >= 0, sizes[targets.clamp_min(0)], 0)
        np.add.at(nats, owners, torch.where(own > 0, loss.float(), 0).double().sum(1).cpu().numpy()
                  if device.type != "mps" else (loss * (own > 0)).sum(1).cpu().numpy())
        np.add.at(size, owners, own.sum(1).cpu().numpy())
        np.add.at(count, owners, (own > 0).sum(1).cpu().numpy())
    return {"nats": nats.tolist(), "bytes": size.astype(int).tolist(), "tokens": count.astype(int).tolist()}


def batches(ids: np.ndarray, ends: np.ndarray, T: int, bos: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield (document of each row (B,), rows (B, T + 1)), −1 where there is no token."""
    pieces = [(number, start, min(start + T, end)) for number, (begin, end) in enumerate(zip([0, *ends[:-1]], ends))
              for start in range(begin, end, T)]
    for first in range(0, len(pieces), EVAL_ROWS):
        part = pieces[first:first + EVAL_ROWS]
        rows = np.full((len(part), T + 1), -1, dtype=np.int64)
        rows[:, 0] = bos
        for row, (_, start, end) in zip(rows, part):
            row[1:1 + end - start] = ids[start:end]
        yield np.array([number for number, _, _ in part]), rows


def recall_of(model: torch.nn.Module, tokenizer: Any, path: Path) -> dict[str, list[float]]:
    """Return what `bench.sweep.recall.recall` measures, with tokens as frequent as in the held-out documents."""
    with np.load(path) as kept:
        ids = kept["ids"].astype(np.int64)
    return recall(model, ids[get_token_bytes().numpy()[ids] > 0], tokenizer.get_bos_token_id())
