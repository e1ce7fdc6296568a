//! Short byte strings as fixed-size keys, and the hashes of the crate's tables.
//!
//! Nearly all pieces of a text have at most 15 bytes. Such a piece and its length fit in two machine words, so that
//! comparing and hashing take a few instructions and follow no pointer.

use std::hash::{BuildHasherDefault, Hasher};

/// The longest byte string that a `Key` can hold.
pub const SHORT: usize = 15;

/// 1 to 15 bytes, padded with zeros, the length in the top byte of `hi`. All zeros mark a free slot.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub struct Key {
    lo: u64,
    hi: u64,
}

const MASKS: [u128; SHORT + 1] = {
    let mut masks = [0; SHORT + 1];
    let mut n = 0;
    while n <= SHORT {
        masks[n] = (1 << (8 * n)) - 1;
        n += 1;
    }
    masks
};

impl Key {
    /// The key of `text[start..end]`, which must hold 1 to 15 bytes.
    #[inline(always)]
    pub fn of(text: &[u8], start: usize, end: usize) -> Key {
        let n = end - start;
        let raw = match text.get(start..start + 16) {
            // one load; the bytes after the piece are masked out
            Some(window) => u128::from_le_bytes(window.try_into().unwrap()) & MASKS[n],
            None => {
                let mut window = [0; 16];
                window[..n].copy_from_slice(&text[start..end]);
                u128::from_le_bytes(window)
            }
        };
        Key { lo: raw as u64, hi: (raw >> 64) as u64 | (n as u64) << 56 }
    }

    /// The length and some of the bytes; reading it loads the cache line.
    #[inline(always)]
    pub fn word(self) -> u64 {
        self.hi
    }

    pub fn is_free(self) -> bool {
        self.hi == 0
    }

    pub fn len(self) -> usize {
        (self.hi >> 56) as usize
    }

    pub fn is_empty(self) -> bool {
        self.is_free()
    }

    /// The bytes, padded with zeros; the first `len` are those of the piece.
    pub fn bytes(self) -> [u8; 16] {
        (u128::from(self.lo) | u128::from(self.hi & !(0xff << 56)) << 64).to_le_bytes()
    }

    #[inline(always)]
    pub fn hash(self) -> u64 {
        mix(self.lo, self.hi)
    }
}

/// Keys to be looked up together. A lookup in a table larger than the L1 cache waits for memory; independent lookups
/// wait at the same time. So keys are collected, their slots are touched, and only then are they looked up.
pub struct Block {
    n: usize,
    keys: [(Key, u64); Block::SIZE],
}

impl Block {
    const SIZE: usize = 32;

    pub fn new() -> Block {
        Block { n: 0, keys: [(Key::default(), 0); Block::SIZE] }
    }

    /// Adds a key; returns true when the block is full, and `take` must follow.
    #[inline(always)]
    pub fn push(&mut self, key: Key) -> bool {
        self.keys[self.n] = (key, key.hash());
        self.n += 1;
        self.n == Block::SIZE
    }

    /// Returns the keys with their hashes, in order, after `touch` has read from the slot of each.
    #[inline(always)]
    pub fn take(&mut self, touch: impl Fn(u64) -> u64) -> &[(Key, u64)] {
        let keys = &self.keys[..std::mem::take(&mut self.n)];
        std::hint::black_box(keys.iter().fold(0, |sum, &(_, hash)| sum ^ touch(hash)));
        keys
    }
}

impl Default for Block {
    fn default() -> Block {
        Block::new()
    }
}

/// Hashes two words to one, each bit of which depends on all bits of both (the halves of a 128-bit product, xored).
#[inline(always)]
pub fn mix(a: u64, b: u64) -> u64 {
    let product = u128::from(a ^ 0x9e37_79b9_7f4a_7c15) * u128::from(b ^ 0xd6e8_feb8_6659_fd93);
    product as u64 ^ (product >> 64) as u64
}

/// Hash of a byte string of any length.
pub fn hash_bytes(bytes: &[u8]) -> u64 {
    let mut state = bytes.len() as u64;
    let mut chunks = bytes.chunks_exact(8);
    for chunk in &mut chunks {
        state = mix(state, u64::from_le_bytes(chunk.try_into().unwrap()));
    }
    let mut last = [0; 8];
    last[..chunks.remainder().len()].copy_from_slice(chunks.remainder());
    mix(state, u64::from_le_bytes(last))
}

/// The same hash for the maps of std.
#[derive(Default)]
pub struct MixHasher(u64);

impl Hasher for MixHasher {
    fn write(&mut self, bytes: &[u8]) {
        self.0 = mix(self.0, hash_bytes(bytes));
    }

    fn write_u64(&mut self, value: u64) {
        self.0 = mix(self.0, value);
    }

    fn write_usize(&mut self, value: usize) {
        self.0 = mix(self.0, value as u64);
    }

    fn finish(&self) -> u64 {
        self.0
    }
}

pub type Map<K, V> = std::collections::HashMap<K, V, BuildHasherDefault<MixHasher>>;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_gives_back_its_bytes_wherever_they_stand() {
        let text = b"0123456789abcdefghij";
        for start in 0..text.len() {
            for end in start + 1..=text.len().min(start + SHORT) {
                let key = Key::of(text, start, end);
                assert_eq!(&key.bytes()[..key.len()], &text[start..end]);
                assert_eq!(key, Key::of(&text[start..end], 0, end - start));
            }
        }
    }

    #[test]
    fn zeros_of_different_lengths_are_different_keys() {
        let keys: Vec<Key> = (1..=SHORT).map(|n| Key::of(&[0; SHORT], 0, n)).collect();
        for (i, key) in keys.iter().enumerate() {
            assert!(!key.is_free() && keys[..i].iter().all(|other| other != key));
        }
    }
}
