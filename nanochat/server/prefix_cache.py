"""The prefix cache: the decoding state of earlier prompts, where prefill of a prompt with the same beginning starts.

A prompt is divided into blocks of `block` tokens. For each block, the cache keeps the KV cache of the attention layers
over its tokens, and the last K-1 gated inputs of the SLC2 layers at its end: for d20, 35,840 bytes a token and 66,560 a
block. A block is found by a hash of all tokens up to its end. Memory is bounded; the least recently used blocks are
evicted first.
"""

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterator, Sequence

from torch import Tensor

from nanochat.cache import KeysValues, State


class PrefixCache:
    """The prefix cache of one model.

    block: tokens of a block. max_bytes: memory of all blocks together; 0 keeps none.
    """

    def __init__(self, block: int, max_bytes: int):
        self.block, self.max_bytes, self.nbytes = block, max_bytes, 0
        # the least recently used first; a block is never older than a block that follows it, so that the one evicted
        # has no successor
        self._blocks: OrderedDict[bytes, list[Tensor]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._blocks)

    def restore(self, tokens: Sequence[int], state: State) -> int:
        """Set row 0 of `state` to the longest cached prefix of `tokens` that leaves a token over; return its length."""
        found = []
        for key in self._keys(tokens, (len(tokens) - 1) // self.block):
            if key not in self._blocks:
                break
            found.append(key)
        state.resize(0)
        state.resize(1)
        if not found:
            return 0
        length = len(found) * self.block
        state.reserve(length)
        for i, layer in enumerate(state.layers):
            parts = [self._blocks[key][i] for key in found]
            if isinstance(layer, KeysValues):
                for n, part in enumerate(parts):
                    here = slice(n * self.block, (n + 1) * self.block)
                    layer.k[0, here], layer.v[0, here] = part[0], part[1]
            else:
                layer.all[0] = parts[-1]
        state.advance(length)
        self._used(found)
        return length

    def keep(self, tokens: Sequence[int], state: State) -> None:
        """Cache the last block of `tokens`, whole blocks, which row 0 of `state` holds.

        Evict blocks beyond max_bytes.
        """
        keys = list(self._keys(tokens, len(tokens) // self.block))
        if keys[-1] not in self._blocks:
            here = slice(len(tokens) - self.block, len(tokens))
            parts = [layer.k[0, here].new_empty(2, self.block, *layer.k.shape[2:]) if isinstance(layer, KeysValues)
                     else layer.all[0].clone() for layer in state.layers]
            for layer, part in zip(state.layers, parts):
                if isinstance(layer, KeysValues):
                    part[0], part[1] = layer.k[0, here], layer.v[0, here]
            size = sum(part.numel() * part.element_size() for part in parts)
            if size > self.max_bytes:
                return
            self._blocks[keys[-1]] = parts
            self.nbytes += size
        self._used([key for key in keys if key in self._blocks])
        while self.nbytes > self.max_bytes:
            _, parts = self._blocks.popitem(last=False)
            self.nbytes -= sum(part.numel() * part.element_size() for part in parts)

    def holds(self, tokens: Sequence[int]) -> bool:
        """Return whether the last whole block of `tokens` is cached."""
        *_, key = [b"", *self._keys(tokens, len(tokens) // self.block)]
        return not key or key in self._blocks

    def clear(self) -> None:
        """Evict all blocks."""
        self._blocks.clear()
        self.nbytes = 0

    def _keys(self, tokens: Sequence[int], blocks: int) -> Iterator[bytes]:
        """Yield the keys of the first `blocks` blocks, each a hash of all tokens up to its end."""
        digest = hashlib.blake2b(digest_size=16)
        for n in range(blocks):
            digest.update(array("q", tokens[n * self.block:(n + 1) * self.block]).tobytes())
            yield digest.copy().digest()

    def _used(self, keys: list[bytes]) -> None:
        for key in reversed(keys):
            self._blocks.move_to_end(key)
