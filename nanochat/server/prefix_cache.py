"""Prefix reuse: the states of prompts taken in before are kept, so that a prompt that begins like one of them begins
there.

A prompt is cut into blocks of `block` tokens. For each block, the keys and values of the attention layers over it, and
the last K−1 gated inputs of the SLC2 layers at its end, are kept: for d20, 35,840 bytes a token and 66,560 a block. A
block is found by a hash of all tokens up to its end. Memory is bounded; the blocks that were used longest ago go first.
"""

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterator, Sequence

from nanochat.cache import Cache, LayerCache, nbytes


class PrefixCache:
    """Blocks of one model's states, of max_bytes together at most; 0 keeps none."""

    def __init__(self, block: int, max_bytes: int):
        self.block, self.max_bytes, self.nbytes = block, max_bytes, 0
        # oldest use first; a block is always as recent as the blocks that begin with it, so what goes has nothing
        # behind it
        self._blocks: OrderedDict[bytes, list[LayerCache]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._blocks)

    def restore(self, tokens: Sequence[int], cache: Cache) -> int:
        """Make row 0 of `cache`, its only one, stand after the longest kept prefix of `tokens`, at most all but one
        token.

        Returns the length of that prefix.
        """
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
        """Keep the last block of `tokens`, after which row 0 of `cache` stands. Their number is a multiple of the
        block."""
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
        """Is the last whole block of `tokens` kept?"""
        *_, key = [b"", *self._keys(tokens, len(tokens) // self.block)]
        return not key or key in self._blocks

    def clear(self) -> None:
        """Let everything go."""
        self._blocks.clear()
        self.nbytes = 0

    def _keys(self, tokens: Sequence[int], blocks: int) -> Iterator[bytes]:
        """The keys of the first blocks: each a hash of everything up to its end."""
        digest = hashlib.blake2b(digest_size=16)
        for n in range(blocks):
            digest.update(array("q", tokens[n * self.block:(n + 1) * self.block]).tobytes())
            yield digest.copy().digest()

    def _used(self, keys: list[bytes]) -> None:
        for key in reversed(keys):
            self._blocks.move_to_end(key)
