"""A batch of rows that are decoded together, which come and go between decode steps (continuous batching)."""

import functools
import logging
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from nanochat.cache import Cache
from nanochat.engine.cuda_graphs import MIN_LENGTH, StaticDecoder, bucket
from nanochat.engine.row import Row, scored
from nanochat.ragged import length_on, padded
from nanochat.sampling import Sampler

if TYPE_CHECKING:
    from nanochat.engine.engine import Engine

PREFILL_TOKENS = 1 << 14  # prompt tokens in one call of the model, padding included
ROW_MULTIPLES = (8, 16, 32)

log = logging.getLogger(__name__)


@functools.cache
def invariant_rows(dtype: torch.dtype) -> int:
    """Return the number of rows that CPU matrix products need a multiple of, so that a row gets the same to the last
    bit.

    Libraries use other kernels for products of few rows. Which is few depends on the CPU: below 8 on AMD, below 16 with
    MKL's AVX-512 kernels. So it is tried out, once a process, in some milliseconds.
    """
    rng = torch.Generator().manual_seed(0)
    for multiple in ROW_MULTIPLES:
        for N, K in ((400, 256), (1024, 256), (256, 1024)):
            x, weight = (torch.randn(rows, K, generator=rng).to(dtype) for rows in (64, N))
            fewest = torch.cat([F.linear(part, weight) for part in x.split(multiple)])
            larger = (F.linear(x[:rows], weight) for rows in range(multiple, 65, multiple))
            if not all(torch.equal(y, fewest[:len(y)]) for y in larger):
                break
        else:
            return multiple
    log.warning("decoding: matrix products of this CPU give a row other last bits beside other rows: the answers of a "
                "server may differ slightly under load")
    return ROW_MULTIPLES[-1]


class Batch:
    """Rows decoded together. They are added between any two steps, and removed when they have ended or when told to.

    batch_invariant: on a CPU, what a row computes is the same to the last bit whatever rows are beside it. This has a
    cost: products are padded to a multiple of `row_multiple` rows, and attention runs row by row. On a GPU a row is the
    same up to rounding.
    """

    def __init__(self, engine: "Engine", batch_invariant: bool = False):
        self.engine, self.model = engine, engine.model
        self.batch_invariant = batch_invariant and self.model.device.type == "cpu"
        self.row_multiple = invariant_rows(self.model.dtype) if self.batch_invariant else 1
        self.rows: list[Row] = []
        self._cache: Cache | None = None
        self._keeps_memory = self.batch_invariant   # whether the cache stays when the last row is removed
        self._logits: torch.Tensor | None = None    # (B, V), for the next token of each row
        self._static: StaticDecoder | None = None   # whose cache and logits are in use, while there are rows
        self._borrowed = False                      # whether the cache is that of the engine's static decoder
        self._ran_ahead = False                     # whether the model runs on the last tokens already
        self._sampler = Sampler([], self.model.config.vocab_size, self.model.device)

    @property
    def active(self) -> list[Row]:
        """The rows that have not ended."""
        return [row for row in self.rows if not row.ended]

    @torch.inference_mode()
    def add_prompts(self, rows: list[Row], samples: int = 1) -> None:
        """Prefill the prompts of new rows, together and padded on the right, and add the rows. A batch-invariant batch
        prefills them one by one.

        samples: each run of `samples` rows has the same prompt, which is prefilled once.
        """
        self.remove([row for row in self.rows if row.ended])
        heads = rows[::samples]
        while heads:
            count, longest = 0, 0
            while count < len(heads):
                longer = max(longest, length_on(self.model.device, len(heads[count].prompt)))
                if count and (self.batch_invariant or longer * (count + 1) > PREFILL_TOKENS):
                    break
                longest, count = longer, count + 1
            self._prefill(heads[:count], rows[:count * samples], samples)
            heads, rows = heads[count:], rows[count * samples:]

    def _prefill(self, heads: list[Row], rows: list[Row], samples: int) -> None:
        """Prefill one prompt for each of `heads`, and add `rows`: `samples` for each of them."""
        ids, counts = padded([row.prompt for row in heads], self.model.device, PREFILL_TOKENS)
        cache = self.model.new_cache(len(ids), ids.shape[1] + min(max(row.max_tokens for row in rows), 128))
        ragged = counts if min(counts) < ids.shape[1] else None
        logits = self.model(ids, cache=cache, counts=ragged, last_only=True)[:len(heads), -1]
        cache.resize(len(heads))
        if samples > 1:
            cache, logits = cache.fork(samples), logits.repeat_interleave(samples, dim=0)
        self.add_prefilled(rows, cache, logits)

    @torch.inference_mode()
    def add_prefilled(self, rows: list[Row], cache: Cache, logits: torch.Tensor, max_len: int = 0,
                      max_rows: int = 0) -> None:
        """Add rows that are prefilled already.

        Args:
            rows: in the order of the cache's rows.
            cache: holds their prompts and tokens so far. The batch takes it over if it has no cache and max_rows is 0.
            logits: (len(rows), V), for their next tokens.
            max_len, max_rows: tokens a row and rows to allocate memory for, where the batch allocates its own.
        """
        before, count = len(self.rows), len(self.rows) + len(rows)
        self._keeps_memory = self._keeps_memory or max_rows > 0
        static = None if self.batch_invariant or before else self.engine.static
        if static is not None and static.acquire(self):
            self._static = static
        if self._static is not None:
            soon = max(length + min(row.max_tokens - len(row.tokens), 128) for row, length in zip(rows, cache.lengths))
            if self._static.try_reserve(max_rows or bucket(count), max_len or bucket(soon, MIN_LENGTH)):
                self._cache, self._sampler.seen, self._borrowed = self._static.cache, self._static.seen, True
            else:
                self._leave_static()
        if self._cache is None and not self._keeps_memory:
            self._cache = cache
        else:
            if self._cache is None:
                self._cache = self.model.new_cache(max(max_rows, len(rows)), max(max_len, cache.max_len))
                self._cache.batch_invariant = self.batch_invariant
            self._cache.resize(count)
            for i in range(len(rows)):
                self._cache.copy_row(before + i, cache, i)
        if self._static is not None:
            self._static.logits[before:count] = logits
            self._logits = self._static.logits[:count]
        else:
            self._logits = logits if not before else torch.cat([self._logits, logits])
        self._sampler.extend([row.settings for row in rows], [row.random for row in rows])
        self.rows = self.rows + rows
        for i, row in enumerate(rows, before):
            self._sampler.mark_seen(i, [*row.prompt, *row.tokens])

    def step(self) -> list[Row]:
        """Give every active row its next token; return those rows. The new token is the last of a row's tokens and
        mask."""
        active = self.sample()
        self.decode()
        return active

    @torch.inference_mode()
    def sample(self) -> list[Row]:
        """Do the first half of a step: sample a token for each active row and remove rows that ended; return those
        rows."""
        active = self.active
        if not active:
            return []
        sampled = self._sampled()
        for i, (row, token) in enumerate(zip(self.rows, sampled)):
            if not row.ended:
                self.engine.take(row, token)
                if row.logprobs is not None:
                    row.scores.append(scored(self._logits[i], row.tokens[-1], row.logprobs))
                if self._static is None:
                    self._sampler.mark_seen(i, row.tokens[-1:])
        ended = [row for row in self.rows if row.ended]
        if self.batch_invariant or 4 * len(ended) >= len(self.rows):  # moving rows costs a few steps of the ended ones
            self.remove(ended)
        return active

    def _sampled(self) -> list[int]:
        """Return the next token of each row.

        A static step may start the model on these tokens at once, if a row continues after them and no row needs the
        logits that they were sampled from.
        """
        if not self._uses_static():
            return self._sampler(self._logits).tolist()
        continues = any(not row.ended and len(row.tokens) + 1 < row.max_tokens for row in self.rows)
        self._ran_ahead = continues and all(row.logprobs is None for row in self.rows)
        return self._static.sample(self.rows, self._sampler, self._ran_ahead)

    def _uses_static(self) -> bool:
        """Return whether the next half of a step is a static one, prepared."""
        if self._static is not None and not self._static.prepare(self.rows, self._sampler):
            self._leave_static()
        return self._static is not None

    def _leave_static(self) -> None:
        """Decode without the static decoder until the last row is removed."""
        self._logits, self._static = self._logits.clone() if self.rows else None, None

    @torch.inference_mode()
    def decode(self) -> None:
        """Do the second half of a step: run the model on the last token of each row."""
        if not self.rows or self._ran_ahead:
            self._ran_ahead = False
            return
        if self._uses_static():
            self._static.decode(self.rows)
            return
        B, ids = len(self.rows), [row.tokens[-1:] for row in self.rows]
        padding = -B % self.row_multiple
        self._cache.resize(B + padding)
        logits = self.model(torch.tensor(ids + [[0]] * padding, device=self.model.device), cache=self._cache)
        self._cache.resize(B)
        self._logits = logits[:B, -1]

    @torch.inference_mode()
    def remove(self, rows: list[Row]) -> None:
        """Remove rows. The last rows move into their slots."""
        removed = {id(row) for row in rows}
        order = list(range(len(self.rows)))
        for i in reversed(order):
            if id(self.rows[order[i]]) in removed:
                last = order.pop()
                if i < len(order):
                    order[i] = last
        if len(order) == len(self.rows):
            return
        for i, source in enumerate(order):
            if i != source:
                self._cache.copy_row(i, self._cache, source)
        if self._cache is not None:
            self._cache.resize(len(order))
        self.rows = [self.rows[i] for i in order]
        self._sampler.select(order)
        if self._static is not None:
            self._static.select(order)
            self._logits = self._static.logits[:len(order)]
        else:
            self._logits = self._logits[order]
        if not order and (self._borrowed or not self._keeps_memory):
            self._cache = self._logits = self._static = self._sampler.seen = None
            self._borrowed = self._ran_ahead = False
