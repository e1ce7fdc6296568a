"""Bits per byte, mean loss, and log-likelihoods of continuations.

Bits per byte is the loss in a unit that does not depend on the tokenizer: models with different vocabularies compare.
"""

import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from nanochat.distributed import Ranks, all_reduce_sum
from nanochat.errors import UserError


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
        UserError: where no target counts.
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
    """Return the mean loss in nats over the targets that are not −1, of all batches of all ranks. Collective.

    batches: (inputs, targets), both (B, T) ids. NaN where no target counts.
    """
    totals = torch.zeros(2, device=ranks.device)
    for inputs, targets in batches:
        totals[0] += model(inputs, targets, loss_reduction="sum")
        totals[1] += (targets != -1).sum()
    loss, count = all_reduce_sum(totals, ranks).tolist()
    return loss / count if count else math.nan


class EvalRows:
    """The first tokens of a document source as packed batches, kept in host memory. Iterating gives those of this rank.

    Rank r has every world_size-th batch, starting with batch r. The batches do not depend on the number of ranks, so
    that the bits per byte do not either.

    Args:
        source: as PackedLoader takes it.
        batch_size, sequence_len: B and T of a batch.
        tokens: of all batches together; fewer where the source is shorter.
        ranks: this rank, and the device that batches are moved to.
        cut: as PackedLoader takes it.
    """

    def __init__(self, source, batch_size: int, sequence_len: int, tokens: int, *, ranks: Ranks, cut: bool = True):
        from nanochat.dataloader import PackedLoader  # not at the top: a model can be evaluated where there is no text

        one_rank = Ranks(rank=0, local_rank=0, world_size=1, device=torch.device("cpu"))
        loader = PackedLoader(source, batch_size, sequence_len, ranks=one_rank, loop=False, cut=cut)
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

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for inputs, targets in self.batches:
            yield inputs.to(self.device).long(), targets.to(self.device).long()


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
        while B < len(waiting) and len(waiting[B][0]) * (B + 1) * V <= logits_per_batch:
            B += 1
        batch, waiting = waiting[:B], waiting[B:]
        inputs = torch.zeros(B, len(batch[-1][0]), dtype=torch.long)
        for i, (ids, _) in enumerate(batch):
            inputs[i, :len(ids)] = torch.tensor(ids)
        logp = model(inputs.to(model.device)).log_softmax(-1)
        for i, (ids, start) in enumerate(batch):
            shared = sum(float(logp[i, j - 1, ids[j]]) for j in range(start, len(ids)))
            last = logp[i, len(ids) - 1].cpu()
            for number, choice, token in sequences[ids, start]:
                result[number][choice] = shared + float(last[token])
    return result
