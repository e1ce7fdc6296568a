"""What decoding remembers of each sequence: keys and values of the attention layers, the last K−1 gated inputs of the SLC2 layers.

A state belongs to a request, never to the model. Rows (sequences) may be of different lengths; they can be forked, selected, and put
into another state. A state has room for more rows than are in use, so that rows can come and go in place.

    state = State(model.config, batch=1, capacity=2048, device=device, dtype=torch.bfloat16)
    logits = model(prompt, state=state)          # prefill, any length, in any number of chunks
    logits = model(padded, state=state, counts=[5, 9, 2])     # rows of different lengths, padded on the right
    logits = model(next_ids, state=state)        # one token a row
"""

import torch
from torch import Tensor


class KeysValues:
    """Keys and values of one attention layer: k, v (room, S, Hkv, D); what lies behind a row's length, or behind the rows, is unused."""

    def __init__(self, state: "State", k: Tensor, v: Tensor):
        self.state, self.k, self.v = state, k, v

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write k, v (B, T, Hkv, D) behind what each row has; return all keys and values (B, S', Hkv, D) up to the longest row."""
        lengths, (B, T) = self.state.lengths, k.shape[:2]
        if self.state.uniform:
            here = slice(lengths[0], lengths[0] + T)
            self.k[:B, here], self.v[:B, here] = k, v
        else:
            where = self.state.positions(T)
            row = torch.arange(B, device=k.device)[:, None]
            self.k[row, where], self.v[row, where] = k.to(self.k.dtype), v.to(self.v.dtype)
        end = max(lengths) + T
        return self.k[:B, :end], self.v[:B, :end]

    def tensors(self) -> list[Tensor]:
        return [self.k, self.v]


class Taps:
    """The last K−1 gated inputs of one SLC2 layer, oldest first: all (room, K−1, E), past (B, K−1, E) of it; zeros before the start."""

    def __init__(self, state: "State", all: Tensor):
        self.state, self.all = state, all

    @property
    def past(self) -> Tensor:
        return self.all[:self.state.batch]

    def append(self, u: Tensor) -> None:
        """Take u (B, T, E) in: the last K−1 rows of what was and the real part of u together stay."""
        both = torch.cat([self.past, u.to(self.all.dtype)], dim=1)
        ends = self.state.ends
        if ends is None:
            self.past.copy_(both[:, u.shape[1]:])
        else:
            where = ends[:, None] + torch.arange(self.all.shape[1], device=u.device)
            self.past.copy_(both[torch.arange(len(ends), device=u.device)[:, None], where])

    def tensors(self) -> list[Tensor]:
        return [self.all]


class State:
    """The memory of B sequences through one model.

    lengths: tokens each row has seen (host integers). capacity: tokens a row has room for; room: rows there is memory for. Both grow on
    demand. by_row: in decoding, let each row attend by itself, so that what it computes does not depend on the others to the last bit.
    ends: while the model runs on rows padded on the right, how many of the tokens are real, (B,); None where all are.
    """

    def __init__(self, config, batch: int, capacity: int, *, device: torch.device | str, dtype: torch.dtype):
        self.config, self.capacity, self.room, self.device, self.dtype = config, capacity, batch, torch.device(device), dtype
        self.lengths, self.by_row = [0] * batch, False
        self.ends: Tensor | None = None
        self._mask: tuple[object, Tensor | None] = (None, None)
        D = config.n_embd // config.n_head

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(batch, *shape, device=device, dtype=dtype)

        self.layers: list[KeysValues | Taps] = [
            KeysValues(self, zeros(capacity, config.n_kv_head, D), zeros(capacity, config.n_kv_head, D)) if kind == "A"
            else Taps(self, zeros(config.n_kernel - 1, config.n_embd)) for kind in config.pattern()]

    @property
    def batch(self) -> int:
        return len(self.lengths)

    @property
    def uniform(self) -> bool:
        """Are all rows of one length?"""
        return min(self.lengths) == max(self.lengths)

    def nbytes(self) -> int:
        """Bytes held, unused capacity included."""
        return sum(t.numel() * t.element_size() for layer in self.layers for t in layer.tensors())

    def reserve(self, T: int, counts: list[int] | None = None) -> None:
        """Make room for T more tokens on every row, of which counts[b] are real; grows by at least half the capacity when it has to."""
        self.ends = None if counts is None else torch.tensor(counts, device=self.device)
        need = max(self.lengths) + T
        if need > self.capacity:
            self.grow(max(need, self.capacity + max(64, self.capacity // 2)), self.room)

    def resize(self, batch: int) -> None:
        """Have `batch` rows: the last ones go, or new ones, that have seen nothing, come behind. Memory grows when it has to, by half."""
        if batch > self.room:
            self.grow(self.capacity, max(batch, self.room + self.room // 2))
        old, self.lengths = self.batch, self.lengths[:batch] + [0] * (batch - self.batch)
        for layer in self.layers:
            if isinstance(layer, Taps):
                layer.all[old:batch] = 0

    def grow(self, capacity: int, room: int) -> None:
        """Have memory for `room` rows of `capacity` tokens, neither less than there is."""
        def larger(old: Tensor, *shape: int) -> Tensor:
            new = torch.zeros(room, *shape, device=self.device, dtype=self.dtype)
            new[tuple(slice(n) for n in old.shape)] = old
            return new

        for layer in self.layers:
            if isinstance(layer, KeysValues):
                layer.k, layer.v = (larger(t, capacity, *t.shape[2:]) for t in layer.tensors())
            elif room > self.room:
                layer.all = larger(layer.all, *layer.all.shape[1:])
        self.capacity, self.room = capacity, room

    def put(self, row: int, source: "State", source_row: int) -> None:
        """Let a row be what a row of `source` (this state, or another of the same model) is. One copy of what it has seen."""
        length = source.lengths[source_row]
        if length > self.capacity:
            self.grow(max(length, self.capacity + self.capacity // 2), self.room)
        for mine, other in zip(self.layers, source.layers):
            end = (slice(length),) if isinstance(mine, KeysValues) else ()
            for to, of in zip(mine.tensors(), other.tensors()):
                to[(row, *end)] = of[(source_row, *end)]
        self.lengths = [*self.lengths[:row], length, *self.lengths[row + 1:]]

    def advance(self, T: int, counts: list[int] | None = None) -> None:
        """Count T tokens more on every row, or counts[b] on row b: the model calls it when all layers have taken them in."""
        self.lengths = [length + more for length, more in zip(self.lengths, counts or [T] * self.batch)]
        self.ends = None

    def positions(self, T: int) -> Tensor:
        """Return the positions (B, T) of the next T tokens of each row; (T,) where all rows stand at one place."""
        if self.uniform:
            return torch.arange(self.lengths[0], self.lengths[0] + T, device=self.device)
        return torch.tensor(self.lengths, device=self.device)[:, None] + torch.arange(T, device=self.device)

    def mask(self, T: int) -> Tensor | None:
        """Return which keys the next T tokens may see: bool (B or 1, 1, T, S'); None where causal attention says the same."""
        if self.uniform and (self.lengths[0] == 0 or T == 1):
            return None
        if self._mask[0] != (self.lengths, T):  # made once, for all attention layers
            keys, own = torch.arange(max(self.lengths) + T, device=self.device), self.positions(T).unsqueeze(-1)
            seen = keys <= own
            if self.config.window is not None:
                seen &= keys > own - self.config.window
            self._mask = (self.lengths, T), seen.view(-1, 1, *seen.shape[-2:])
        return self._mask[1]

    def select(self, rows: list[int]) -> "State":
        """Return a new state holding these rows, in this order; a row may be named more than once (a fork). It has no room to spare."""
        index, lengths = torch.tensor(rows, device=self.device), [self.lengths[i] for i in rows]
        new = object.__new__(State)
        new.config, new.device, new.dtype, new.by_row = self.config, self.device, self.dtype, self.by_row
        new.lengths, new.capacity, new.room = lengths, max(lengths), len(rows)
        new._mask, new.ends = (None, None), None
        new.layers = [KeysValues(new, *(t[:, :new.capacity].index_select(0, index) for t in layer.tensors()))
                      if isinstance(layer, KeysValues) else Taps(new, layer.all.index_select(0, index)) for layer in self.layers]
        return new

    def fork(self, n: int) -> "State":
        """Return a new state with each row n times: row 0 n times, then row 1, …"""
        return self.select([row for row in range(self.batch) for _ in range(n)])


class Fixed:
    """The first B rows of a state, and S positions of each, for a step of one token a row whose shapes and addresses stay the same.

    It stands for a state where a model runs on it, and moves on what a state holds, but counts nothing: `at` (B,), where each row stands,
    lies on the device and may be another one in each step. Every row must stand before S.
    """

    def __init__(self, state: State, S: int, at: Tensor):
        self.at, self.batch, self.ends, self.by_row = at, len(at), None, False
        self.lengths = [S - 1]  # as far as any row may stand: what the model makes its tables for
        self.layers = [Taps(self, layer.all) if isinstance(layer, Taps)
                       else KeysValues(self, layer.k[:self.batch, :S], layer.v[:self.batch, :S]) for layer in state.layers]

    def reserve(self, T: int, counts: list[int] | None = None) -> None:
        """There is room."""
        if T != 1 or counts is not None:
            raise ValueError(f"a step at fixed addresses is one of one token a row, not of {T}")

    def advance(self, T: int, counts: list[int] | None = None) -> None:
        """Whose `at` this is moves it on."""

    def positions(self, T: int) -> Tensor:
        """Return the position (B, 1) of each row's token."""
        return self.at.unsqueeze(1)
