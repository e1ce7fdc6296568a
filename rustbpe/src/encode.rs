//! Text to token ids. A piece that is itself a token becomes that token. The bytes of any other piece are merged, the
//! pair with the smallest id first and the leftmost among equals, as in tiktoken. Recent pieces come from a small
//! cache.

use crate::key::{Block, Key, SHORT};
use crate::split::Splitter;
use crate::vocab::{Vocab, NONE};
use std::cmp::Reverse;
use std::collections::BinaryHeap;

/// The cache has 2^SET_BITS sets of two entries of 32 bytes: 4 MB.
const SET_BITS: u32 = 16;
/// The most ids of a piece that is cached.
const INLINE: usize = 3;
/// Up to so many tokens are merged by scanning all pairs each time, more with a heap. A power of two, at most 128.
const SCANNED: usize = 128;

#[derive(Clone, Copy, Default)]
struct Entry {
    key: Key,
    n: u32,
    ids: [u32; INLINE],
}

/// Two entries in one cache line, the most recently used first.
#[derive(Clone, Copy, Default)]
#[repr(align(64))]
struct Set([Entry; 2]);

/// The token ids of short pieces, kept by a thread between texts. It belongs to one vocabulary.
pub struct Cache {
    sets: Vec<Set>,
    splitter: Splitter,
}

impl Cache {
    /// It has its own splitter, since threads that share a regular expression wait for each other.
    pub fn new(splitter: &Splitter) -> Cache {
        Cache { sets: vec![Set::default(); 1 << SET_BITS], splitter: splitter.clone() }
    }
}

/// Appends the ids of `text`. An error means that the regular expression failed on it; `out` is then unusable.
pub fn encode(vocab: &Vocab, cache: &mut Cache, text: &str, out: &mut Vec<u32>) -> Result<(), String> {
    let bytes = text.as_bytes();
    let Cache { sets, splitter } = cache;
    let mut block = Block::new();
    splitter.pieces(text, |start, end| {
        if end - start <= SHORT {
            if block.push(Key::of(bytes, start, end)) {
                encode_block(vocab, sets, &mut block, out);
            }
        } else {
            encode_block(vocab, sets, &mut block, out);
            encode_piece(vocab, &bytes[start..end], out);
        }
    })?;
    encode_block(vocab, sets, &mut block, out);
    Ok(())
}

#[inline(never)]
fn encode_block(vocab: &Vocab, sets: &mut [Set], block: &mut Block, out: &mut Vec<u32>) {
    let index = |hash: u64| (hash >> (64 - SET_BITS)) as usize;
    for &(key, hash) in block.take(|hash| sets[index(hash)].0[0].key.word()) {
        let Set([newer, older]) = &mut sets[index(hash)];
        if newer.key != key {
            std::mem::swap(newer, older);
            if newer.key != key {
                encode_new(vocab, key, hash, newer, out);
                continue;
            }
        }
        // append all ids that an entry can hold, then keep those it has: no branch on their number, which is
        // unpredictable
        let n = out.len();
        out.extend_from_slice(&newer.ids);
        out.truncate(n + newer.n as usize);
    }
}

/// Encodes a short piece that is not in the cache, and replaces the older entry of its set.
#[inline(never)]
fn encode_new(vocab: &Vocab, key: Key, hash: u64, entry: &mut Entry, out: &mut Vec<u32>) {
    let before = out.len();
    match vocab.find_short(key, hash) {
        NONE => merge_bytes(vocab, &key.bytes()[..key.len()], out),
        id => out.push(id),
    }
    let new = &out[before..];
    if new.len() <= INLINE {
        *entry = Entry { key, n: new.len() as u32, ids: [0; INLINE] };
        entry.ids[..new.len()].copy_from_slice(new);
    }
}

#[inline(never)]
fn encode_piece(vocab: &Vocab, piece: &[u8], out: &mut Vec<u32>) {
    match vocab.find(piece) {
        NONE => merge_bytes(vocab, piece, out),
        id => out.push(id),
    }
}

#[inline(never)]
fn merge_bytes(vocab: &Vocab, piece: &[u8], out: &mut Vec<u32>) {
    let first = out.len();
    first_tokens(vocab, piece, out);
    merge_tokens(vocab, out, first);
}

fn merge_tokens(vocab: &Vocab, out: &mut Vec<u32>, first: usize) {
    if out.len() - first <= SCANNED {
        merge_scanning(vocab, out, first);
    } else {
        merge_with_heap(vocab, out, first);
    }
}

/// Appends the initial tokens: bytes, with those of characters of two or three bytes merged as far as is certain. A
/// merge inside a character precedes every merge across its borders if its id is below that of every token that
/// contains the two bytes at a border. Most text that is not ASCII then needs far fewer steps.
fn first_tokens(vocab: &Vocab, piece: &[u8], out: &mut Vec<u32>) {
    let mut i = 0;
    while i < piece.len() {
        let width = match piece[i] {
            0xc0..=0xdf => 2,
            0xe0..=0xef => 3,
            _ => 1,
        };
        let Some(character) = piece.get(i..i + width).filter(|_| width > 1) else {
            out.push(vocab.byte_id(piece[i]));
            i += 1;
            continue;
        };
        let border =
            |at: usize| if at > 0 && at < piece.len() { vocab.crossing(piece[at - 1], piece[at]) } else { NONE };
        let limit = border(i).min(border(i + width));
        let begin = out.len();
        out.extend(character.iter().map(|&b| vocab.byte_id(b)));
        while out.len() - begin > 1 {
            let pairs = out[begin..].windows(2).map(|pair| vocab.merged(pair[0], pair[1]));
            let (merged, at) = pairs.zip(begin..).min().expect("two tokens or three");
            if merged >= limit {
                break;
            }
            out[at] = merged;
            out.remove(at + 1);
        }
        i += width;
    }
}

/// Merges the tokens from `out[first]` on. Tokens keep their index and are linked to their neighbours. `merges[i]`
/// holds what token i and the next one merge into and, in the low bits, i: the smallest value is the next merge, the
/// leftmost among equals. All are scanned each time, which for so few is faster than keeping them sorted.
fn merge_scanning(vocab: &Vocab, out: &mut Vec<u32>, first: usize) {
    const PLACE: u32 = SCANNED as u32 - 1;
    const NEVER: i32 = i32::MAX; // above any id and place
    let n = out.len() - first;
    let packed = |id: u32, i: usize| if id == NONE { NEVER } else { (id << PLACE.count_ones() | i as u32) as i32 };
    let (mut ids, mut merges) = ([0; SCANNED], [NEVER; SCANNED]);
    let (mut next, mut previous) = ([0; SCANNED], [0; SCANNED]); // n means the end, and before the start
    ids[..n].copy_from_slice(&out[first..]);
    out.truncate(first);
    for i in 0..n {
        next[i] = i as u8 + 1;
        previous[i] = if i == 0 { n } else { i - 1 } as u8;
        if i + 1 < n {
            merges[i] = packed(vocab.merged(ids[i], ids[i + 1]), i);
        }
    }
    let merges = &mut merges[..n.next_multiple_of(8)];
    loop {
        let best = merges.iter().fold(NEVER, |least, &merge| least.min(merge));
        if best == NEVER {
            break;
        }
        let i = (best as u32 & PLACE) as usize;
        ids[i] = best as u32 >> PLACE.count_ones();
        let gone = next[i] as usize;
        let (left, right) = (previous[i] as usize, next[gone] as usize);
        next[i] = right as u8;
        (merges[i], merges[gone]) = (NEVER, NEVER);
        if right < n {
            previous[right] = i as u8;
            merges[i] = packed(vocab.merged(ids[i], ids[right]), i);
        }
        if left < n {
            merges[left] = packed(vocab.merged(ids[left], ids[i]), left);
        }
    }
    let mut i = 0;
    while i < n {
        out.push(ids[i]);
        i = next[i] as usize;
    }
}

/// The same in n log n steps, with the merges in a heap, ordered by id and then by index. Merges that are no longer
/// possible are skipped when they are popped.
fn merge_with_heap(vocab: &Vocab, out: &mut Vec<u32>, first: usize) {
    struct Token {
        id: u32,
        /// what this token and the next one merge into
        merged: u32,
        previous: usize,
        next: usize,
    }
    let n = out.len() - first; // also means the end, and before the start
    let packed = |id: u32, i: usize| Reverse(u128::from(id) << 64 | i as u128);
    let link =
        |(i, &id): (usize, &u32)| Token { id, merged: NONE, previous: if i == 0 { n } else { i - 1 }, next: i + 1 };
    let mut tokens: Vec<Token> = out[first..].iter().enumerate().map(link).collect();
    out.truncate(first);
    let mut merges = Vec::new();
    for i in 0..n {
        if i + 1 < n {
            let merged = vocab.merged(tokens[i].id, tokens[i + 1].id);
            tokens[i].merged = merged;
            if merged != NONE {
                merges.push(packed(merged, i));
            }
        }
    }
    let mut heap = BinaryHeap::from(merges);
    while let Some(Reverse(best)) = heap.pop() {
        let (id, i) = ((best >> 64) as u32, best as usize);
        if tokens[i].merged != id {
            continue;
        }
        let gone = tokens[i].next;
        let (left, right) = (tokens[i].previous, tokens[gone].next);
        (tokens[i].merged, tokens[gone].merged) = (NONE, NONE);
        (tokens[i].id, tokens[i].next) = (id, right);
        if right < n {
            tokens[right].previous = i;
        }
        for (a, b) in [(left, i), (i, right)] {
            if a < n && b < n {
                let merged = vocab.merged(tokens[a].id, tokens[b].id);
                tokens[a].merged = merged;
                if merged != NONE {
                    heap.push(packed(merged, a));
                }
            }
        }
    }
    let mut i = 0;
    while i < n {
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
            for length in 1..=SCANNED {
                let piece = &random_text(&mut seed, length, &letters).into_bytes()[..length];
                let (mut scanned, mut heaped) = (Vec::new(), Vec::new());
                let bytes = || piece.iter().map(|&b| vocab.byte_id(b));
                scanned.extend(bytes());
                merge_scanning(&vocab, &mut scanned, 0);
                heaped.extend([7, 7].into_iter().chain(bytes()));
                merge_with_heap(&vocab, &mut heaped, 2);
                assert_eq!(heaped.drain(..2).collect::<Vec<_>>(), [7, 7]);
                assert_eq!(scanned, heaped, "{piece:?}");
                let spelt: Vec<u8> = scanned.iter().flat_map(|&id| vocab.bytes_of(id).unwrap()).copied().collect();
                assert_eq!(spelt, piece);
            }
        }
    }

    #[test]
    fn beginning_with_what_is_sure_to_merge_changes_nothing() {
        let mut seed = 13;
        let mut shortened = 0;
        for letters in ["日本語の木", "éèaàüñ", "aé日😀の", "をんにちは。カキク、"] {
            let letters: Vec<char> = letters.chars().collect();
            for size in [3, 10, 40, 300] {
                // random byte strings are tokens of random ranks, so that many cross the borders of characters and come
                // first
                let text = random_text(&mut seed, 3000, &letters).into_bytes();
                let mut stretches: Vec<Vec<u8>> = (0..size).map(|i| text[7 * i..7 * i + 2 + i % 5].to_vec()).collect();
                stretches.sort();
                stretches.dedup();
                stretches.sort_by_key(|bytes| crate::key::hash_bytes(bytes));
                let bytes = (0..=255u8).map(|b| vec![b]);
                let vocab = Vocab::new(bytes.chain(stretches).zip(0..).collect()).unwrap();
                for length in 1..60 {
                    let piece = random_text(&mut seed, length, &letters).into_bytes();
                    let (mut plain, mut begun) = (piece.iter().map(|&b| vocab.byte_id(b)).collect(), Vec::new());
                    merge_with_heap(&vocab, &mut plain, 0);
                    first_tokens(&vocab, &piece, &mut begun);
                    shortened += usize::from(begun.len() < piece.len());
                    merge_tokens(&vocab, &mut begun, 0);
                    assert_eq!(begun, plain, "{piece:?}");
                }
            }
        }
        assert!(shortened > 500);
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
            ids.extend(bytes.iter().map(|&b| vocab.byte_id(b)));
            merge_with_heap(&vocab, &mut ids, 0);
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
