"""The decoding cache of a batch of sequences: one entry a layer, made by the layer's mixer.

A cache belongs to a request, never to the model. Its rows (sequences) may have different lengths; they can be forked,
selected and copied between caches. A cache may have memory for more rows than are in use, so that rows come and go in
place.

    cache = model.new_cache(max_rows=1, max_len=2048)
    logits = model(prompt, cache=cache)                        # prefill, any length, in any number of chunks
    logits = model(padded, cache=cache, counts=[5, 9, 2])      # rows of different lengths, padded on the right
    logits = model(next_ids, cache=cache)                      # a decode step: one token a row

Nothing here asks what a layer is. It only asks of each tensor whether it holds something per token or per row.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class LayerCache:
    """The cache of one layer, as named tensors.

    per_token: tensors (rows, positions, …), such as keys and values. What is behind a row's length is unused.
    per_row: tensors (rows, …) of fixed size, such as the state of a convolution. Zeros are an empty past.
    """

    per_token: dict[str, Tensor] = field(default_factory=dict)
    per_row: dict[str, Tensor] = field(default_factory=dict)

    def map(self, per_token: Callable[[Tensor], Tensor], per_row: Callable[[Tensor], Tensor]) -> "LayerCache":
        """Return a layer cache of the functions' results."""
        return LayerCache({name: per_token(tensor) for name, tensor in self.per_token.items()},
                          {name: per_row(tensor) for name, tensor in self.per_row.items()})

    def tensors(self) -> list[Tensor]:
        """Return all tensors."""
        return [*self.per_token.values(), *self.per_row.values()]



def nbytes(layers: Iterable[LayerCache]) -> int:
    """Return the bytes of all tensors of some layers."""
    return sum(tensor.nbytes for layer in layers for tensor in layer.tensors())


class Cache:
    """The cache of B sequences through one model.

    Attributes:
        layers: a LayerCache for each layer, with memory for max_rows rows of max_len tokens. Both grow on demand.
        lengths: tokens that each row in use has seen; host integers.
        batch_invariant: whether, in decode steps, the result of a row must not depend to the last bit on other rows.
    """

    def __init__(self, mixers: Iterable, max_rows: int, max_len: int, *, device: torch.device | str,
                 dtype: torch.dtype):
        """Make an empty cache whose rows are all in use.

        Args:
            mixers: the layers' mixers (nanochat/mixer.py).
            max_rows, max_len: rows, and tokens a row, to have memory for.
            dtype: of the activations.

        Raises:
            ValueError: a mixer's tensors have not the rows and positions that were asked for.
        """
        self.max_rows, self.max_len, self.device, self.dtype = max_rows, max_len, torch.device(device), dtype
        self.lengths, self.batch_invariant = [0] * max_rows, False
        self.layers: list[LayerCache] = []
        for mixer in mixers:
            layer = mixer.new_cache(max_rows, max_len, device, dtype)
            if any(tensor.shape[:2] != (max_rows, max_len) for tensor in layer.per_token.values()) or any(
                    tensor.shape[:1] != (max_rows,) for tensor in layer.per_row.values()):
                raise ValueError(f"{type(mixer).__name__}.new_cache({max_rows}, {max_len}) must give per-token tensors "
                                 f"of shape ({max_rows}, {max_len}, …) and per-row tensors of shape ({max_rows}, …), "
                                 f"not {[tuple(tensor.shape) for tensor in layer.tensors()]}")
            self.layers.append(layer)

    @property
    def rows(self) -> int:
        """Rows in use."""
        return len(self.lengths)

    def nbytes(self) -> int:
        """Return the bytes held, unused memory included."""
        return nbytes(self.layers)

    def view(self, rows: int, length: int) -> list[LayerCache]:
        """Return the layers' first `rows` rows, and of these the first `length` positions; they share this cache's
        memory."""
        if rows == self.max_rows and length == self.max_len:
            return self.layers
        return [layer.map(lambda t: t[:rows, :length], lambda t: t[:rows]) for layer in self.layers]

    def reserve(self, T: int) -> None:
        """Make room for T more tokens on every row. Memory grows by at least half."""
        need = max(self.lengths) + T
        if need > self.max_len:
            self.grow(self.max_rows, max(need, self.max_len + max(64, self.max_len // 2)))

    def resize(self, rows: int) -> None:
        """Use `rows` rows: the last ones go, or empty ones are added behind. Memory grows by at least half."""
        if rows > self.max_rows:
            self.grow(max(rows, self.max_rows + self.max_rows // 2), self.max_len)
        before, self.lengths = self.rows, self.lengths[:rows] + [0] * (rows - self.rows)
        for layer in self.layers:
            for tensor in layer.per_row.values():
                tensor[before:rows] = 0

    def grow(self, max_rows: int, max_len: int) -> None:
        """Have memory for max_rows rows of max_len tokens; neither may be less than before."""
        def larger(old: Tensor, *shape: int) -> Tensor:
            if old.shape[:len(shape)] == shape:
                return old
            new = torch.zeros(*shape, *old.shape[len(shape):], device=old.device, dtype=old.dtype)
            new[tuple(slice(n) for n in old.shape)] = old
            return new

        self.layers = [layer.map(lambda t: larger(t, max_rows, max_len), lambda t: larger(t, max_rows))
                       for layer in self.layers]
        self.max_rows, self.max_len = max_rows, max_len

    def copy_row(self, row: int, source: "Cache", source_row: int) -> None:
        """Make `row` a copy of a row of `source`, which is this cache or another one of the same model."""
        length = source.lengths[source_row]
        if length > self.max_len:
            self.grow(self.max_rows, max(length, self.max_len + self.max_len // 2))
        for layer, other in zip(self.layers, source.layers):
            for name, tensor in layer.per_token.items():
                tensor[row, :length] = other.per_token[name][source_row, :length]
            for name, tensor in layer.per_row.items():
                tensor[row] = other.per_row[name][source_row]
        self.lengths = [*self.lengths[:row], length, *self.lengths[row + 1:]]

    def advance(self, T: int, counts: list[int] | None = None) -> None:
        """Count T more tokens on every row, or counts[b] on row b. The model calls it after its last layer."""
        self.lengths = [length + more for length, more in zip(self.lengths, counts or [T] * self.rows)]

    def select(self, rows: list[int]) -> "Cache":
        """Return a new cache of these rows, in this order, without spare memory. A row may be named more than once."""
        index, lengths = torch.tensor(rows, device=self.device), [self.lengths[i] for i in rows]
        new = object.__new__(Cache)
        new.device, new.dtype, new.batch_invariant = self.device, self.dtype, self.batch_invariant
        new.lengths, new.max_rows, new.max_len = lengths, len(rows), max(lengths)
        new.layers = [layer.map(lambda t: t[:, :new.max_len].index_select(0, index), lambda t: t.index_select(0, index))
                      for layer in self.layers]
        return new

    def fork(self, n: int) -> "Cache":
        """Return a new cache with each row n times: row 0 n times, then row 1, …"""
        return self.select([row for row in range(self.rows) for _ in range(n)])

    def save_block(self, row: int, start: int) -> list[LayerCache]:
        """Return a copy of a row's tokens from `start` to its length, and of its per-row tensors, which are those after
        the last token."""
        tokens = slice(start, self.lengths[row])
        return [layer.map(lambda t: t[row, tokens].clone(), lambda t: t[row].clone()) for layer in self.layers]

    def load_blocks(self, row: int, blocks: Sequence[list[LayerCache]], length: int) -> None:
        """Append saved blocks of `length` tokens each to a row; its per-row tensors are then those of the last
        block."""
        for number, block in enumerate(blocks):
            tokens = slice(self.lengths[row] + number * length, self.lengths[row] + (number + 1) * length)
            for layer, saved in zip(self.layers, block):
                for name, tensor in layer.per_token.items():
                    tensor[row, tokens] = saved.per_token[name]
        for layer, saved in zip(self.layers, blocks[-1]):
            for name, tensor in layer.per_row.items():
                tensor[row] = saved.per_row[name]
        self.lengths[row] += len(blocks) * length
