"""The positions of one forward pass's tokens in their sequences, which all layers share."""

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

ROPE_BASE = 10_000.0

Rope = tuple[Tensor, Tensor]


def rope_table(length: int, head_width: int, device: torch.device | str, base: float = ROPE_BASE) -> Rope:
    """Return cos and sin (length, D/2) of the rotary angles, float32 rounded to bfloat16: the published weights were
    trained with that rounding. With base 0 all angles are 0: a rotation that changes nothing."""
    if base == 0:
        return tuple(torch.full((length, head_width // 2), value, device=device) for value in (1.0, 0.0))
    channels = torch.arange(0, head_width, 2, dtype=torch.float32, device=device)
    positions = torch.arange(length, dtype=torch.float32, device=device)
    angles = torch.outer(positions, base ** -(channels / head_width))
    return angles.cos().bfloat16().float(), angles.sin().bfloat16().float()


class Positions:
    """The positions of T tokens in each of B rows, and what follows from them: rotary tables, masks, places in a cache.

    There are three kinds, one for each constructor:

    - `Positions.of_full_rows`: rows without a cache, from position 0 on. Training and evaluation.
    - `Positions.after_cache`: T tokens a row behind what the cache holds. Prefill in any number of chunks, decoding.
    - `Positions.static`: one token a row at positions that lie on the device. Nothing here depends on numbers of the
      host, so the step can be captured as a CUDA graph.

    Attributes:
        rope: cos and sin of the tokens' rotary angles, (T, D/2), or (B, T, D/2) where rows are at different
            positions.
        lengths: tokens that each row has in the cache before these; host integers. Empty without a cache, and if
            static.
        counts: how many of the T tokens of each row are real, (B,) int64 on the device; the rest, on the right, is
            padding. None where all are real.
        index: if static, the position of each row's token, (B,) int64 on the device; else None.
        end: positions of the cache that may be read: up to the end of the longest row, these tokens included, or beyond
            where a mask hides the rest; if static, the positions of the bucket.
        batch_invariant: whether the result of a row must not depend, to the last bit, on the rows beside it.
        ids: the tokens themselves, (B, T), for mixers that look something up; the model sets it.
    """

    ids: Tensor

    def __init__(self, rope: Rope, T: int, *, lengths: Sequence[int] = (), indices: Tensor | None = None,
                 counts: Tensor | None = None, index: Tensor | None = None, end: int | None = None,
                 batch_invariant: bool = False):
        self.rope, self.T, self.lengths, self.counts, self.index = rope, T, lengths, counts, index
        self.batch_invariant = batch_invariant
        self.end = max(lengths, default=0) + T if end is None else end
        self._uniform = len(lengths) > 0 and min(lengths) == max(lengths)
        self._indices = indices  # positions (B, T); (T,) for uniform rows, which are at the same one
        self._masks: dict[int | None, Tensor | None] = {}

    @classmethod
    def of_full_rows(cls, table: Rope, T: int) -> "Positions":
        """Positions 0 to T − 1 of every row. `table`: cos and sin of at least T positions."""
        return cls((table[0][:T], table[1][:T]), T)

    @classmethod
    def after_cache(cls, table: Rope, lengths: Sequence[int], T: int, counts: Tensor | None = None,
                    batch_invariant: bool = False, end: int | None = None) -> "Positions":
        """The next T positions of rows that have `lengths` tokens in the cache; other arguments as the attributes.

        end: may be beyond the end of the longest row where several tokens follow a cache that is not empty: there is a
            mask then.
        """
        device = table[0].device
        if min(lengths) == max(lengths):
            indices = torch.arange(lengths[0], lengths[0] + T, device=device)
        else:
            indices = torch.tensor(lengths, device=device)[:, None] + torch.arange(T, device=device)
        return cls((table[0][indices], table[1][indices]), T, lengths=lengths, indices=indices, counts=counts,
                   batch_invariant=batch_invariant, end=end)

    @classmethod
    def static(cls, table: Rope, index: Tensor, end: int) -> "Positions":
        """One token a row, at position index[b] < end of row b. `index` (B,) int64 may change between replays."""
        indices = index[:, None]
        return cls((table[0][indices], table[1][indices]), 1, indices=indices, index=index, end=end)

    @cached_property
    def _rows(self) -> Tensor:
        """The numbers of the rows, (B, 1), to index with; made once for all layers."""
        B = len(self.lengths) if self.index is None else len(self.index)
        return torch.arange(B, device=self._indices.device)[:, None]

    def write(self, buffer: Tensor, new: Tensor) -> None:
        """Write the tokens' entries `new` (B, T, …) to their positions in `buffer` (B, S, …), a per-token tensor."""
        if self._uniform:
            buffer[:, self.lengths[0]:self.lengths[0] + self.T] = new
        else:
            buffer[self._rows, self._indices] = new.to(buffer.dtype)

    def mask(self, window: int | None) -> Tensor | None:
        """Return which cached positions each token may see: bool (B or 1, 1, T, S), S = `end`.

        It is made once for all layers with the same window. None where plain causal attention sees the same: at the
        start of uniform rows, and for one token a uniform row (where the caller cuts the window).
        """
        if self._uniform and (self.lengths[0] == 0 or self.T == 1):
            return None
        if window not in self._masks:
            keys, own = torch.arange(self.end, device=self._indices.device), self._indices.unsqueeze(-1)
            seen = keys <= own
            if window is not None:
                seen &= keys > own - window
            self._masks[window] = seen.view(-1, 1, *seen.shape[-2:])
        return self._masks[window]

    def last(self, entries: Tensor, n: int) -> Tensor:
        """Return the n newest real entries (B, n, …) of `entries` (B, n + T, …).

        The first n entries were cached, the others are those of the T tokens. Where all tokens are real, older entries
        may be left out.
        """
        if self.counts is None:
            return entries[:, entries.shape[1] - n:]
        return entries[self._rows, self.counts[:, None] + torch.arange(n, device=entries.device)]

    def remember(self, past: Tensor, entries: Tensor) -> None:
        """Bring the newest entries of each row, past (B, n, …), up to date in place with those of the T tokens."""
        past.copy_(self.last(torch.cat([past, entries.to(past.dtype)], dim=1), past.shape[1]))
