"""Bits per byte: the loss of a model in a unit that does not depend on its tokenizer."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from nanochat.distributed import Ranks, all_reduce_sum
from nanochat.errors import UserError


@torch.no_grad()
def evaluate_bpb(model: torch.nn.Module, batches: Iterable[tuple[Tensor, Tensor]], token_bytes: Tensor,
                 ranks: Ranks | None = None) -> float:
    """Return Σ nats of the targets / (ln 2 · Σ bytes of the targets) over all batches of all ranks; collective.

    batches: (inputs, targets), both (B, T). token_bytes: (V,) bytes of each token; targets that are −1 or have 0 bytes (specials) count
    for neither sum. Raises UserError if no target counts.
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
        raise UserError("no text to evaluate on: the validation shard holds fewer tokens than one batch. "
                        "Use a smaller --device-batch-size or --max-seq-len, or more text.")
    return nats / (math.log(2) * size)


@torch.no_grad()
def evaluate_loss(model: torch.nn.Module, batches: Iterable[tuple[Tensor, Tensor]], ranks: Ranks) -> float:
    """Return the mean loss in nats over all supervised targets of all batches of all ranks; collective. NaN where there is none."""
    totals = torch.zeros(2, device=ranks.device)
    for inputs, targets in batches:
        totals[0] += model(inputs, targets, loss_reduction="sum")
        totals[1] += (targets != -1).sum()
    loss, count = all_reduce_sum(totals, ranks).tolist()
    return loss / count if count else math.nan


class EvalRows:
    """The first `tokens` tokens of a document source as packed rows, made once and kept on the host: rank r takes every
    world_size-th batch.

    The rows do not depend on the number of ranks, so neither does the bpb. Where the source holds fewer, all of it is taken,
    once. source, cut: as PackedLoader takes them.
    """

    def __init__(self, source, batch_size: int, sequence_len: int, tokens: int, *, ranks: Ranks, cut: bool = True):
        from nanochat.dataloader import PackedLoader  # here, so that a model can be evaluated where there is no text

        alone = Ranks(rank=0, local_rank=0, world_size=1, device=torch.device("cpu"))
        loader = PackedLoader(source, batch_size, sequence_len, ranks=alone, loop=False, cut=cut)
        self.device, self.batches = ranks.device, []
        try:
            for number in range(max(1, tokens // (batch_size * sequence_len))):
                try:
                    inputs, targets = next(loader)
                except StopIteration:
                    break
                if number % ranks.world_size == ranks.rank:
                    self.batches.append((inputs.to(torch.int32), targets.to(torch.int32)))
        finally:
            loader.close()

    def __iter__(self):
        for inputs, targets in self.batches:
            yield inputs.to(self.device).long(), targets.to(self.device).long()


@torch.no_grad()
def log_likelihoods(model: torch.nn.Module, tokenizer, prompts: list[str], choices: list[list[str]], logits_per_batch: int = 1 << 24
                    ) -> list[list[float]]:
    """Return, for each prompt, the log-likelihood in nats of each of its choices behind it (summed over the choice's tokens).

    Text is tokenised as a whole, bos first; the choice is what differs from the prompt's own tokens on. Choices that differ in their last
    token alone share one row. Padding stands behind the text, where nothing causal sees it.
    """
    bos = tokenizer.get_bos_token_id()
    rows: dict[tuple[tuple[int, ...], int], list[tuple[int, int, int]]] = {}  # (ids before the last, start) → (prompt, choice, last id)
    for number, (prompt, options) in enumerate(zip(prompts, choices)):
        head = tokenizer.encode(prompt, prepend=bos)
        for choice, ids in enumerate(tokenizer.encode([prompt + option for option in options], prepend=bos)):
            start = next((i for i, (a, b) in enumerate(zip(head, ids)) if a != b), min(len(head), len(ids)))
            rows.setdefault((tuple(ids[:-1]), start), []).append((number, choice, ids[-1]))
    order = sorted(rows, key=lambda row: len(row[0]))
    result = [[0.0] * len(options) for options in choices]
    V = model.config.vocab_size
    while order:
        count = 1
        while count < len(order) and len(order[count][0]) * (count + 1) * V <= logits_per_batch:
            count += 1
        part, order = order[:count], order[count:]
        inputs = torch.zeros(count, len(part[-1][0]), dtype=torch.long)
        for i, (ids, _) in enumerate(part):
            inputs[i, :len(ids)] = torch.tensor(ids)
        logp = model(inputs.to(model.device)).log_softmax(-1)
        for i, (ids, start) in enumerate(part):
            shared = sum(float(logp[i, j - 1, ids[j]]) for j in range(start, len(ids)))
            last = logp[i, len(ids) - 1].cpu()
            for number, choice, token in rows[ids, start]:
                result[number][choice] = shared + float(last[token])
    return result
