"""The prefix cache: the decoding cache of earlier prompts, where prefill of a prompt with the same beginning starts.

A prompt is divided into blocks of `block` tokens. For each block, the prefix cache keeps what the layers hold for its
tokens, and their per-row tensors at its end: for d20, 35,840 bytes a token and 66,560 a block. A block is found by a
hash of all tokens up to its end. Memory is bounded; the least recently used blocks are evicted first.
"""

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterator, Sequence

from nanochat.cache import Cache, LayerCache, nbytes


class PrefixCache:
    """The prefix cache of one model.

    block: tokens of a block. max_bytes: memory of all blocks together; 0 keeps none.
    """

    def __init__(self, block: int, max_bytes: int):
        self.block, self.max_bytes, self.nbytes = block, max_bytes, 0
        # the least recently used first; a block is never older than a block that follows it, so that the one evicted
        # has no successor
        self._blocks: OrderedDict[bytes, list[LayerCache]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._blocks)

    def restore(self, tokens: Sequence[int], cache: Cache) -> int:
        """Set row 0 of `cache` to the longest kept prefix of `tokens` that leaves a token over; return its length."""
        found = []
        for key in self._keys(tokens, (len(tokens) - 1) // self.block):
            if key not in self._blocks:
                break
            found.append(key)
        cache.resize(0)
        cache.resize(1)
        if found:
            cache.reserve(len(found) * self.block)
            cache.load_blocks(0, [self._blocks[key] for key in found], self.block)
            self._used(found)
        return cache.lengths[0]

    def keep(self, tokens: Sequence[int], cache: Cache) -> None:
        """Cache the last block of `tokens`, whole blocks, which row 0 of `cache` holds.

        Evict blocks beyond max_bytes.
        """
        keys = list(self._keys(tokens, len(tokens) // self.block))
        if keys[-1] not in self._blocks:
            layers = cache.save_block(0, len(tokens) - self.block)
            size = nbytes(layers)
            if size > self.max_bytes:
                return
            self._blocks[keys[-1]] = layers
            self.nbytes += size
        self._used([key for key in keys if key in self._blocks])
        while self.nbytes > self.max_bytes:
            self.nbytes -= nbytes(self._blocks.popitem(last=False)[1])

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
