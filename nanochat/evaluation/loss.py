"""Bits per byte, mean loss, and log-likelihoods of continuations.

Bits per byte is the loss in a unit that does not depend on the tokenizer: models with different vocabularies compare.
"""

import hashlib
import math
import uuid
from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nanochat.distributed import Ranks, all_reduce_sum, barrier, broadcast_object, machine_first
from nanochat.errors import NotWritten, UserError
from nanochat.files import atomic_write, base_dir, sweep, to_json
from nanochat.logs import print_line
from nanochat.ragged import length_on, padded

EVAL_ROWS_FORMAT = 2  # higher after a change of what a file of rows holds, or of how documents are packed
KEPT_EVAL_ROWS = 8    # files; 42 MB each in the published recipe


@torch.no_grad()
def evaluate_bpb(model: torch.nn.Module, batches: Iterable[tuple[Tensor, Tensor]], token_bytes: Tensor,
                 ranks: Ranks | None = None) -> float:
    """Return Σ loss of the targets in nats / (ln 2 · Σ bytes of the targets) over all batches of all ranks. Collective.

    Args:
        model: called as model(inputs, targets, loss_reduction="none") → losses (B · T,).
        batches: (inputs, targets), both (B, T) ids.
        token_bytes: (V,) bytes of each token. Targets that are −1 or have 0 bytes (special tokens) are in neither sum.
        ranks: None does not reduce over ranks.

    Raises:
        UserError: where no target counts, or the loss is not finite.
    """
    device = token_bytes.device
    totals = torch.zeros(2, dtype=torch.float64 if device.type != "mps" else torch.float32, device=device)
    for inputs, targets in batches:
        nats = model(inputs, targets, loss_reduction="none")
        flat = targets.flatten()
        size = torch.where(flat >= 0, token_bytes[flat.clamp_min(0)], 0)
        totals[0] += (nats * (size > 0)).sum(dtype=totals.dtype)
        totals[1] += size.sum()
    if ranks is not None:
        totals = all_reduce_sum(totals, ranks)
    nats, size = totals.tolist()
    if size == 0:
        raise UserError("no text to evaluate on: the validation shard holds fewer tokens than one row. "
                        "Use a smaller --max-seq-len, or more text.")
    return _finite(nats / (math.log(2) * size), "bits per byte are")


@torch.no_grad()
def evaluate_loss(model: torch.nn.Module, batches: Iterable[tuple[Tensor, Tensor]], ranks: Ranks) -> float:
    """Return the mean loss in nats over the targets that are not −1, of all batches of all ranks. Collective.

    batches: (inputs, targets), both (B, T) ids. NaN where no target counts. Raises UserError where it is not finite.
    """
    totals = torch.zeros(2, dtype=torch.float64 if ranks.device.type != "mps" else torch.float32, device=ranks.device)
    for inputs, targets in batches:
        totals[0] += model(inputs, targets, loss_reduction="sum")
        totals[1] += (targets != -1).sum()
    loss, count = all_reduce_sum(totals, ranks).tolist()
    return _finite(loss / count, "loss is") if count else math.nan


def _finite(value: float, what: str) -> float:
    """Return a result. Raises UserError where it is none."""
    if not math.isfinite(value):
        raise UserError(f"the {what} {value} on the validation data: the weights are damaged, or training has "
                        "diverged. Use an earlier checkpoint; lower the learning rates if it happens again.")
    return value


class EvalRows:
    """The first tokens of a document source as packed batches. Iterating gives those of this rank. Collective to make.

    Rank r has every world_size-th batch, starting with batch r. The rows do not depend on the number of ranks or the
    rows of a batch, so that the bits per byte do not either, up to rounding.

    The documents are tokenised once a machine, by its first rank, into a file in base_dir()/eval_rows that all ranks
    read. Rows of text are kept there, and a later run of the same text, tokenizer and length finds them.

    Args:
        source: as PackedLoader takes it.
        batch_size, sequence_len: B and T of a batch. The last one is filled up with rows without targets.
        tokens: of all rows together, one row at least; fewer where the source is shorter.
        ranks: this rank, and the device that batches are moved to.
        cut: as PackedLoader takes it.

    Raises:
        UserError: on all ranks, where the rows of a machine cannot be made.
    """

    def __init__(self, source, batch_size: int, sequence_len: int, tokens: int, *, ranks: Ranks, cut: bool = True):
        self.ranks, self.bos, self.batch_size = ranks, source.bos, batch_size
        count = max(1, tokens // sequence_len)
        paths = [(path.name, path.stat().st_mtime_ns) for path in getattr(source, "paths", ())]
        about = [EVAL_ROWS_FORMAT, source.fingerprint(), paths, source.tokenizer_fingerprint, source.bos, sequence_len,
                 count, cut]
        keeps = bool(paths) and source.tokenizer_fingerprint is not None  # else its fingerprint does not say all
        if not keeps:
            about.append(broadcast_object(uuid.uuid4().hex, ranks))
        name = hashlib.sha256(to_json(about).encode()).hexdigest()[:20]
        path = base_dir() / "eval_rows" / f"{name}.npy"

        def rows() -> np.ndarray:
            if (found := _read_rows(path)) is None:
                made = _packed_rows(source, sequence_len, count, cut)
                try:
                    _write_rows(path, made)
                except NotWritten as error:  # costs time and memory: each rank tokenises for itself
                    print_line(f"warning: the tokenised validation text is not kept: {error}")
                    return made
                found = _read_rows(path)
            return found

        self._rows = machine_first(rows, ranks)  # (rows, T + 1), −1 where there is no token
        if not keeps:
            barrier(ranks, "tokenising the validation text")
            path.unlink(missing_ok=True)  # who has opened it keeps it

    def __len__(self) -> int:
        """The batches of all ranks."""
        return -(-len(self._rows) // self.batch_size)

    @property
    def shape(self) -> list[int]:
        """B and T of a batch."""
        return [self.batch_size, self._rows.shape[1] - 1]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self.first(len(self))

    def unigram_bpb(self, token_bytes: Tensor) -> float:
        """Return the bits per byte of a model that knows how frequent each token is in these rows, and nothing else."""
        sizes = token_bytes.cpu().numpy()
        targets = self._rows[:, 1:]
        counts = np.bincount(targets[targets >= 0], minlength=len(sizes)).astype(np.float64) * (sizes > 0)
        size, seen = float((counts * sizes).sum()), counts[counts > 0]
        return float(-(seen * np.log2(seen / seen.sum())).sum()) / size if size else math.inf

    def first(self, count: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield this rank's part of the first `count` batches."""
        B = self.batch_size
        for number in range(self.ranks.rank, min(count, len(self)), self.ranks.world_size):
            rows = np.full((B, self._rows.shape[1]), -1, dtype=np.int32)
            part = self._rows[number * B:(number + 1) * B]
            rows[:len(part)] = part
            rows = torch.from_numpy(rows).to(self.ranks.device).long()
            inputs = rows[:, :-1]
            yield torch.where(inputs < 0, self.bos, inputs), rows[:, 1:].contiguous()


def _packed_rows(source, sequence_len: int, count: int, cut: bool) -> np.ndarray:
    """Return the first `count` rows of a source, fewer where it ends: (rows, T + 1), −1 where there is no token."""
    from nanochat.dataloader import PackedLoader  # not at the top: a model can be evaluated where there is no text

    one_rank = Ranks(rank=0, local_rank=0, world_size=1, device=torch.device("cpu"))
    rows = np.empty((count, sequence_len + 1), dtype=np.int32)
    made = 0
    with PackedLoader(source, 1, sequence_len, ranks=one_rank, loop=False, cut=cut, prefetch=32) as loader:
        for inputs, targets in islice(loader, count):
            rows[made, 0], rows[made, 1:] = inputs[0, 0], targets[0]
            made += 1
    return rows[:made]


def _read_rows(path: Path) -> np.ndarray | None:
    """Return the array of a file, mapped into memory; None where there is no such file, or it is broken."""
    for mode in ("r", None):  # an array without entries cannot be mapped
        with suppress(OSError, ValueError, EOFError):
            return np.load(path, mmap_mode=mode)
    return None


def _write_rows(path: Path, rows: np.ndarray) -> None:
    """Write a file of rows, and remove the oldest ones beside it."""
    with atomic_write(path) as file:
        np.save(file, rows)
    sweep(path.parent)
    with suppress(OSError):  # another run may remove the same ones
        for old in sorted(path.parent.glob("*.npy"), key=lambda path: -path.stat().st_mtime)[KEPT_EVAL_ROWS:]:
            old.unlink()


@torch.no_grad()
def log_likelihoods(model: torch.nn.Module, tokenizer, prompts: list[str], choices: list[list[str]],
                    logits_per_batch: int = 1 << 24) -> list[list[float]]:
    """Return the log-likelihood of each choice as the continuation of its prompt, summed over the tokens of the choice.

    Prompt and choice are encoded as one text, BOS first; the choice begins where the ids differ from those of the
    prompt alone. Choices that differ in their last token only are scored with one sequence. Padding is on the right,
    where a causal model does not see it.

    Args:
        model: ids (B, T) → logits (B, T, V).
        tokenizer: its tokenizer.
        prompts: texts.
        choices: for each prompt, texts that can follow it.
        logits_per_batch: at most, B · T · V.

    Returns:
        For each prompt, nats of each choice.
    """
    bos = tokenizer.get_bos_token_id()
    # (input ids, index where the choice begins) → its choices: (index of the prompt, index of the choice, last id)
    sequences: dict[tuple[tuple[int, ...], int], list[tuple[int, int, int]]] = {}
    for number, (prompt, options) in enumerate(zip(prompts, choices)):
        context = tokenizer.encode(prompt, prepend=bos)
        for choice, ids in enumerate(tokenizer.encode([prompt + option for option in options], prepend=bos)):
            shorter = min(len(context), len(ids))
            start = next((i for i in range(shorter) if context[i] != ids[i]), shorter)
            sequences.setdefault((tuple(ids[:-1]), start), []).append((number, choice, ids[-1]))
    waiting = sorted(sequences, key=lambda sequence: len(sequence[0]))
    result = [[0.0] * len(options) for options in choices]
    V = model.config.vocab_size
    while waiting:
        B = 1
        while B < len(waiting) and length_on(model.device, len(waiting[B][0])) * (B + 1) * V <= logits_per_batch:
            B += 1
        batch, waiting = waiting[:B], waiting[B:]
        inputs, _ = padded([ids for ids, _ in batch], model.device, logits_per_batch // V)
        logp = model(inputs).log_softmax(-1)
        for i, (ids, start) in enumerate(batch):
            shared = sum(float(logp[i, j - 1, ids[j]]) for j in range(start, len(ids)))
            last = logp[i, len(ids) - 1].cpu()
            for number, choice, token in sequences[ids, start]:
                result[number][choice] = shared + float(last[token])
    return result
