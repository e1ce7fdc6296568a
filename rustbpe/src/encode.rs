//! Text to token ids. A piece that is a token as a whole is that token; else its bytes are merged, the pair with the smallest
//! id first and the leftmost among equals, as tiktoken does. Pieces met before come out of a small cache.

use crate::key::{Block, Key, SHORT};
use crate::split::Splitter;
use crate::vocab::{Vocab, NONE};
use std::cmp::Reverse;
use std::collections::BinaryHeap;

/// The cache has 2^SET_BITS sets of two entries of 32 bytes: 4 MB.
const SET_BITS: u32 = 16;
/// Ids an entry holds itself.
const INLINE: usize = 3;
/// Pieces up to this many bytes are merged by looking at all pairs again; longer ones with a heap.
const SCANNED: usize = 96;

#[derive(Clone, Copy, Default)]
struct Entry {
    key: Key,
    n: u32,
    ids: [u32; INLINE],
}

/// Two entries, the one used last first, in one cache line.
#[derive(Clone, Copy, Default)]
#[repr(align(64))]
struct Set([Entry; 2]);

/// What one thread keeps from text to text: token ids of short pieces. It belongs to one vocabulary.
pub struct Cache {
    sets: Vec<Set>,
    splitter: Splitter,
    scratch: Vec<u32>,
}

impl Cache {
    /// With a splitter of its own, since threads that share a regular expression wait for one another.
    pub fn new(splitter: &Splitter) -> Cache {
        Cache { sets: vec![Set::default(); 1 << SET_BITS], splitter: splitter.clone(), scratch: Vec::new() }
    }
}

/// Appends the ids of `text`. Errors where a regular expression gives up on it; `out` is then of no use.
pub fn encode(vocab: &Vocab, cache: &mut Cache, text: &str, out: &mut Vec<u32>) -> Result<(), String> {
    let bytes = text.as_bytes();
    let Cache { sets, splitter, scratch } = cache;
    let mut block = Block::new();
    splitter.pieces(text, |start, end| {
        if end - start <= SHORT {
            if block.push(Key::of(bytes, start, end)) {
                encode_block(vocab, sets, &mut block, scratch, out);
            }
        } else {
            encode_block(vocab, sets, &mut block, scratch, out);
            encode_piece(vocab, &bytes[start..end], scratch, out);
        }
    })?;
    encode_block(vocab, sets, &mut block, scratch, out);
    Ok(())
}

#[inline(never)]
fn encode_block(vocab: &Vocab, sets: &mut [Set], block: &mut Block, scratch: &mut Vec<u32>, out: &mut Vec<u32>) {
    let index = |hash: u64| (hash >> (64 - SET_BITS)) as usize;
    for &(key, hash) in block.take(|hash| sets[index(hash)].0[0].key.word()) {
        let Set([newer, older]) = &mut sets[index(hash)];
        if newer.key != key {
            std::mem::swap(newer, older);
            if newer.key != key {
                encode_new(vocab, key, hash, newer, scratch, out);
                continue;
            }
        }
        // all ids an entry can hold are written and those it has are kept: no branch on their number, which nobody can foresee
        let n = out.len();
        out.extend_from_slice(&newer.ids);
        out.truncate(n + newer.n as usize);
    }
}

/// A short piece that is not in the cache: encoded, and put where the older entry of its set was.
#[inline(never)]
fn encode_new(vocab: &Vocab, key: Key, hash: u64, entry: &mut Entry, scratch: &mut Vec<u32>, out: &mut Vec<u32>) {
    let before = out.len();
    match vocab.find_short(key, hash) {
        NONE => merge_bytes(vocab, &key.bytes()[..key.len()], scratch, out),
        id => out.push(id),
    }
    let new = &out[before..];
    if new.len() <= INLINE {
        *entry = Entry { key, n: new.len() as u32, ids: [0; INLINE] };
        entry.ids[..new.len()].copy_from_slice(new);
    }
}

#[inline(never)]
fn encode_piece(vocab: &Vocab, piece: &[u8], scratch: &mut Vec<u32>, out: &mut Vec<u32>) {
    match vocab.find(piece) {
        NONE => merge_bytes(vocab, piece, scratch, out),
        id => out.push(id),
    }
}

#[inline(never)]
fn merge_bytes(vocab: &Vocab, piece: &[u8], scratch: &mut Vec<u32>, out: &mut Vec<u32>) {
    if piece.len() <= SCANNED {
        merge_scanning(vocab, piece, scratch, out);
    } else {
        merge_with_heap(vocab, piece, out);
    }
}

/// `merged[i]` is what tokens i and i + 1 merge into; the smallest is taken until there is none.
fn merge_scanning(vocab: &Vocab, piece: &[u8], merged: &mut Vec<u32>, out: &mut Vec<u32>) {
    let first = out.len();
    out.extend(piece.iter().map(|&b| vocab.byte_id(b)));
    merged.clear();
    merged.extend(piece.windows(2).map(|pair| vocab.merged_bytes(pair[0], pair[1])));
    while let Some(best) = merged.iter().copied().min().filter(|&best| best != NONE) {
        let i = merged.iter().position(|&id| id == best).unwrap();
        out[first + i] = best;
        out.remove(first + i + 1);
        merged.remove(i);
        let tokens = &out[first..];
        if i > 0 {
            merged[i - 1] = vocab.merged(tokens[i - 1], best);
        }
        if i < merged.len() {
            merged[i] = vocab.merged(best, tokens[i + 1]);
        }
    }
}

/// The same in n log n steps: tokens in a linked list, their merges in a heap, those that came to nothing skipped when met.
fn merge_with_heap(vocab: &Vocab, piece: &[u8], out: &mut Vec<u32>) {
    const END: usize = usize::MAX;
    struct Token {
        id: u32,
        /// what it and the next token merge into
        merged: u32,
        previous: usize,
        next: usize,
    }
    let n = piece.len();
    let mut tokens: Vec<Token> = (0..n)
        .map(|i| Token {
            id: vocab.byte_id(piece[i]),
            merged: NONE,
            previous: i.wrapping_sub(1),
            next: if i + 1 < n { i + 1 } else { END },
        })
        .collect();
    let mut heap = BinaryHeap::new();
    for i in 0..n - 1 {
        tokens[i].merged = vocab.merged_bytes(piece[i], piece[i + 1]);
        if tokens[i].merged != NONE {
            heap.push(Reverse((tokens[i].merged, i)));
        }
    }
    while let Some(Reverse((id, i))) = heap.pop() {
        if tokens[i].merged != id {
            continue;
        }
        let gone = tokens[i].next;
        let next = tokens[gone].next;
        tokens[gone].merged = NONE;
        tokens[i].id = id;
        tokens[i].next = next;
        if next != END {
            tokens[next].previous = i;
        }
        for (left, right) in [(tokens[i].previous, i), (i, next)] {
            if left != END && right != END {
                let merged = vocab.merged(tokens[left].id, tokens[right].id);
                tokens[left].merged = merged;
                if merged != NONE {
                    heap.push(Reverse((merged, left)));
                }
            } else if left == i {
                tokens[i].merged = NONE;
            }
        }
    }
    let mut i = 0;
    while i != END {
        out.push(tokens[i].id);
        i = tokens[i].next;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::count::PieceCounter;
    use crate::split::DEFAULT_PATTERN;
    use crate::train::{learn, Corpus};

    fn trained(text: &str, merges: usize) -> (Vocab, Splitter) {
        let splitter = Splitter::new(DEFAULT_PATTERN).unwrap();
        let counter = PieceCounter::new(splitter.clone());
        counter.count([text].into_iter(), || true).unwrap();
        (Vocab::from_merges(&learn(Corpus::new(counter.finish()).unwrap(), merges, |_| true)).unwrap(), splitter)
    }

    fn random_text(seed: &mut u64, length: usize, letters: &[char]) -> String {
        let mut random = || {
            *seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            letters[(*seed >> 33) as usize % letters.len()]
        };
        (0..length).map(|_| random()).collect()
    }

    #[test]
    fn scanning_and_heap_give_the_same_tokens_and_spell_the_piece() {
        let mut seed = 5;
        for letters in ["ab", "abcdeé", "a"] {
            let letters: Vec<char> = letters.chars().collect();
            let (vocab, _) = trained(&random_text(&mut seed, 3000, &letters), 300);
            for length in 1..200 {
                let piece = random_text(&mut seed, length, &letters);
                let (mut scanned, mut heaped) = (Vec::new(), Vec::new());
                merge_scanning(&vocab, piece.as_bytes(), &mut Vec::new(), &mut scanned);
                merge_with_heap(&vocab, piece.as_bytes(), &mut heaped);
                assert_eq!(scanned, heaped, "{piece}");
                let spelt: Vec<u8> = scanned.iter().flat_map(|&id| vocab.bytes_of(id).unwrap()).copied().collect();
                assert_eq!(spelt, piece.as_bytes());
            }
        }
    }

    #[test]
    fn a_cache_met_before_changes_nothing() {
        let mut seed = 9;
        let letters: Vec<char> = "abcdefgh  .1é日".chars().collect();
        let (vocab, splitter) = trained(&random_text(&mut seed, 5000, &letters), 200);
        let mut old = Cache::new(&splitter);
        for _ in 0..300 {
            let text = random_text(&mut seed, 400, &letters);
            let (mut with, mut without) = (Vec::new(), Vec::new());
            encode(&vocab, &mut old, &text, &mut with).unwrap();
            encode(&vocab, &mut Cache::new(&splitter), &text, &mut without).unwrap();
            assert_eq!(with, without);
        }
    }

    #[test]
    fn every_token_is_its_own_encoding() {
        let mut seed = 11;
        let letters: Vec<char> = "aab ".chars().collect();
        let (vocab, _) = trained(&random_text(&mut seed, 20_000, &letters), 500);
        for (bytes, id) in vocab.iter() {
            let mut ids = Vec::new();
            merge_with_heap(&vocab, bytes, &mut ids);
            assert_eq!(ids, [id]);
        }
    }

    #[test]
    fn a_megabyte_of_one_letter_is_encoded_at_once() {
        let (vocab, splitter) = trained(&"a".repeat(5000), 20);
        let mut ids = Vec::new();
        encode(&vocab, &mut Cache::new(&splitter), &"a".repeat(1 << 20), &mut ids).unwrap();
        let largest = vocab.iter().map(|(bytes, _)| bytes.len()).max().unwrap();
        assert!(ids.len() <= (1 << 20) / largest * 2 + 20);
    }
}
