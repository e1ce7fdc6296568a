//! A vocabulary: the bytes of each token, and which two tokens merge into which.

use crate::key::{Key, Map, SHORT};
use std::collections::BTreeSet;

/// The largest id accepted: tables are indexed by id.
pub const MAX_ID: u32 = (1 << 24) - 1;

/// Returned by `Vocab::merged` for two tokens that do not merge.
pub const NONE: u32 = u32::MAX;

pub struct Vocab {
    /// the bytes of all tokens, ordered by id; unused ids are empty
    bytes: Vec<u8>,
    ends: Vec<usize>,
    tokens: usize,
    byte_ids: [u32; 256],
    short: Flat<Key>,
    long: Map<Box<[u8]>, u32>,
    /// what two bytes merge into, indexed by first and second byte; looked up first for every piece
    byte_pairs: Vec<u32>,
    /// the smallest id of a token that contains the two bytes in sequence, or `NONE`
    crossing: Vec<u32>,
    pairs: Flat<u64>,
}

/// An open-addressing table from keys to ids, filled once, at most half full.
struct Flat<K> {
    slots: Vec<(K, u32)>,
    shift: u32,
}

impl<K: Copy + Eq> Flat<K> {
    fn new(entries: &[(K, u32)], free: K, hash: impl Fn(K) -> u64) -> Flat<K> {
        let bits = (2 * entries.len().max(8)).next_power_of_two().trailing_zeros();
        let mut flat = Flat { slots: vec![(free, NONE); 1 << bits], shift: 64 - bits };
        for &(key, id) in entries {
            let mut at = (hash(key) >> flat.shift) as usize;
            while flat.slots[at].1 != NONE {
                at = (at + 1) & (flat.slots.len() - 1);
            }
            flat.slots[at] = (key, id);
        }
        flat
    }

    #[inline(always)]
    fn get(&self, key: K, hash: u64) -> u32 {
        let mask = self.slots.len() - 1;
        let mut at = (hash >> self.shift) as usize & mask;
        loop {
            let (found, id) = self.slots[at];
            if found == key || id == NONE {
                return id;
            }
            at = (at + 1) & mask;
        }
    }
}

#[inline(always)]
fn pair_hash(pair: u64) -> u64 {
    crate::key::mix(pair, 0)
}

#[inline(always)]
fn byte_pair(left: u8, right: u8) -> usize {
    usize::from(left) << 8 | usize::from(right)
}

impl Vocab {
    /// From (bytes, id) of every token, in any order. Two tokens merge where their bytes together are a token, the
    /// smallest id first, as in tiktoken. Errors name the wrong token: a token or an id that occurs twice, or a missing
    /// single byte.
    pub fn new(mut tokens: Vec<(Vec<u8>, u32)>) -> Result<Vocab, String> {
        tokens.sort_unstable_by_key(|&(_, id)| id);
        let mut vocab = Vocab {
            bytes: Vec::new(),
            ends: Vec::new(),
            tokens: tokens.len(),
            byte_ids: [NONE; 256],
            short: Flat::new(&[], Key::default(), Key::hash),
            long: Map::default(),
            byte_pairs: Vec::new(),
            crossing: vec![NONE; 1 << 16],
            pairs: Flat::new(&[], 0, pair_hash),
        };
        let mut short = Vec::new();
        let mut all: Map<&[u8], u32> = Map::default();
        for (bytes, id) in &tokens {
            if *id > MAX_ID {
                return Err(format!("token {bytes:?} has the rank {id}, the largest possible is {MAX_ID}"));
            }
            if bytes.is_empty() {
                return Err(format!("the token of rank {id} is empty"));
            }
            if vocab.ends.len() > *id as usize {
                return Err(format!("two tokens have the rank {id}"));
            }
            if let Some(other) = all.insert(bytes, *id) {
                return Err(format!("the token {bytes:?} stands twice, with ranks {other} and {id}"));
            }
            vocab.ends.resize(*id as usize, vocab.bytes.len());
            vocab.bytes.extend_from_slice(bytes);
            vocab.ends.push(vocab.bytes.len());
            if bytes.len() == 1 {
                vocab.byte_ids[bytes[0] as usize] = *id;
            }
            if bytes.len() <= SHORT {
                short.push((Key::of(bytes, 0, bytes.len()), *id));
            } else {
                vocab.long.insert(bytes.as_slice().into(), *id);
            }
        }
        if let Some(missing) = vocab.byte_ids.iter().position(|&id| id == NONE) {
            return Err(format!("no token for the single byte {missing}; all 256 must be there"));
        }
        vocab.short = Flat::new(&short, Key::default(), Key::hash);
        // only existing lengths are tried for the halves, which bounds the work for very long tokens
        let lengths: BTreeSet<usize> = tokens.iter().map(|(bytes, _)| bytes.len()).collect();
        let mut pairs = Vec::new();
        for (bytes, id) in &tokens {
            for pair in bytes.windows(2) {
                let least = &mut vocab.crossing[byte_pair(pair[0], pair[1])];
                *least = (*least).min(*id);
            }
            for &half in lengths.range(..bytes.len()).filter(|&&half| lengths.contains(&(bytes.len() - half))) {
                let (left, right) = (vocab.find(&bytes[..half]), vocab.find(&bytes[half..]));
                if left != NONE && right != NONE {
                    pairs.push((u64::from(left) << 32 | u64::from(right), *id));
                }
            }
        }
        vocab.pairs = Flat::new(&pairs, 0, pair_hash);
        let id_of = |byte: usize| vocab.byte_ids[byte];
        vocab.byte_pairs = (0..1 << 16).map(|pair| vocab.merged(id_of(pair >> 8), id_of(pair & 0xff))).collect();
        Ok(vocab)
    }

    /// From trained merges: ids below 256 are the bytes, id 256 + i is the pair at i.
    pub fn from_merges(merges: &[(u32, u32)]) -> Result<Vocab, String> {
        let mut tokens: Vec<(Vec<u8>, u32)> = (0..=255u8).map(|b| (vec![b], b.into())).collect();
        for &(left, right) in merges {
            let bytes = [&tokens[left as usize].0[..], &tokens[right as usize].0].concat();
            tokens.push((bytes, tokens.len() as u32));
        }
        Vocab::new(tokens)
    }

    /// Returns the id of the token with these bytes, or `NONE`.
    pub fn find(&self, bytes: &[u8]) -> u32 {
        if bytes.len() <= SHORT {
            let key = Key::of(bytes, 0, bytes.len());
            self.find_short(key, key.hash())
        } else {
            self.long.get(bytes).copied().unwrap_or(NONE)
        }
    }

    #[inline(always)]
    pub fn find_short(&self, key: Key, hash: u64) -> u32 {
        self.short.get(key, hash)
    }

    /// Returns the token that two neighbouring tokens merge into, or `NONE`.
    #[inline(always)]
    pub fn merged(&self, left: u32, right: u32) -> u32 {
        let pair = u64::from(left) << 32 | u64::from(right);
        self.pairs.get(pair, pair_hash(pair))
    }

    /// `merged` of the tokens of two bytes.
    #[inline(always)]
    pub fn merged_bytes(&self, left: u8, right: u8) -> u32 {
        self.byte_pairs[byte_pair(left, right)]
    }

    /// Returns the smallest id of a token that crosses the border between these two bytes; `NONE` if no token does.
    #[inline(always)]
    pub fn crossing(&self, left: u8, right: u8) -> u32 {
        self.crossing[byte_pair(left, right)]
    }

    #[inline(always)]
    pub fn byte_id(&self, byte: u8) -> u32 {
        self.byte_ids[byte as usize]
    }

    /// Returns the bytes of a token; `None` for an unused id.
    pub fn bytes_of(&self, id: u32) -> Option<&[u8]> {
        let end = *self.ends.get(id as usize)?;
        let start = if id == 0 { 0 } else { self.ends[id as usize - 1] };
        (start < end).then(|| &self.bytes[start..end])
    }

    /// The number of tokens.
    pub fn len(&self) -> usize {
        self.tokens
    }

    pub fn is_empty(&self) -> bool {
        self.tokens == 0
    }

    /// Iterates over (bytes, id) of all tokens, ordered by id.
    pub fn iter(&self) -> impl Iterator<Item = (&[u8], u32)> {
        (0..self.ends.len() as u32).filter_map(|id| Some((self.bytes_of(id)?, id)))
    }

    /// One more than the largest id.
    pub fn id_limit(&self) -> usize {
        self.ends.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_are_found_by_bytes_and_by_id_and_pairs_by_their_halves() {
        let vocab = Vocab::from_merges(&[(97, 98), (256, 99), (257, 257), (258, 258), (259, 258)]).unwrap();
        assert_eq!(vocab.len(), 261);
        for (bytes, id) in vocab.iter() {
            assert_eq!((vocab.find(bytes), vocab.bytes_of(id)), (id, Some(bytes)));
        }
        assert_eq!(vocab.bytes_of(260), Some(&b"abcabcabcabcabcabc"[..]));
        assert_eq!((vocab.merged(97, 98), vocab.merged(258, 259), vocab.merged(98, 97)), (256, 260, NONE));
        assert_eq!((vocab.find(b"abca"), vocab.bytes_of(261)), (NONE, None));
    }

    #[test]
    fn what_is_no_vocabulary_is_refused() {
        let bytes = || (0..=255u8).map(|b| (vec![b], u32::from(b))).collect::<Vec<_>>();
        let refused = |extra: &[(&[u8], u32)]| {
            let more = extra.iter().map(|&(token, id)| (token.to_vec(), id));
            Vocab::new(bytes().into_iter().chain(more).collect()).err().expect("refused")
        };
        assert!(refused(&[(b"ab", 256), (b"ab", 257)]).contains("stands twice"));
        assert!(refused(&[(b"ab", 256), (b"ac", 256)]).contains("have the rank 256"));
        assert!(refused(&[(b"", 256)]).contains("empty"));
        assert!(refused(&[(b"ab", 1 << 24)]).contains("largest possible"));
        assert!(Vocab::new(bytes()[1..].to_vec()).err().unwrap().contains("single byte 0"));
        let sparse = bytes().into_iter().chain([(b"ab".to_vec(), 300)]).collect();
        let vocab = Vocab::new(sparse).unwrap();
        assert_eq!((vocab.len(), vocab.id_limit(), vocab.bytes_of(299)), (257, 301, None));
    }
}
