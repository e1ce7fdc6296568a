//! Learn the merges: repeatedly, the most frequent pair of neighbouring tokens becomes a token; among equally frequent
//! pairs the smaller one (by first id, then by second id). Counts are exact at every step.
//!
//! All distinct pieces are stored in one flat array, one slot a byte, with a boundary before and after each piece. A
//! token of n bytes takes n slots: the first holds its id with the START mark, the last its id without it (for n = 1
//! they are one slot, with the mark). So both neighbours of a token are found in one step, and a merge writes two or
//! three slots and moves nothing. For each pair the positions where it occurs are stored; positions that a later merge
//! has changed are recognised when they are visited. So the cost of a merge is the number of its occurrences, even
//! inside one piece of a million bytes.

use crate::count::Piece;
use crate::key::Map;
use std::cmp::Reverse;
use std::collections::binary_heap::PeekMut;
use std::collections::BinaryHeap;

const START: u32 = 1 << 31;
const BOUNDARY: u32 = u32::MAX;

/// The distinct pieces, stored as described above, the most frequent first.
pub struct Corpus {
    slots: Vec<u32>,
    /// (first slot, count of each piece from here on), ordered by slot
    counts: Vec<(u32, u64)>,
}

impl Corpus {
    /// `pieces` are ordered by falling count. Fails where the distinct pieces take more than 4 GB.
    pub fn new(pieces: Vec<(Piece, u64)>) -> Result<Corpus, String> {
        let size = 1 + pieces.iter().map(|(piece, _)| 1 + piece.with_bytes(<[u8]>::len)).sum::<usize>();
        if u32::try_from(size).is_err() {
            return Err(format!(
                "the distinct pieces of the text take {size} bytes, 4 GB is the most; train on less text"
            ));
        }
        let mut corpus = Corpus { slots: Vec::with_capacity(size), counts: Vec::new() };
        corpus.slots.push(BOUNDARY);
        for (piece, count) in pieces {
            if corpus.counts.last().map_or(true, |&(_, last)| last != count) {
                corpus.counts.push((corpus.slots.len() as u32, count));
            }
            piece.with_bytes(|bytes| corpus.slots.extend(bytes.iter().map(|&b| START | u32::from(b))));
            corpus.slots.push(BOUNDARY);
        }
        Ok(corpus)
    }
}

struct Pair {
    count: u64,
    /// where it may occur: the part of `Trainer::places` that starts here, in rising order
    first: usize,
    places: u32,
}

/// How a merge changes the counts of pairs that have a given other token on one side.
#[derive(Clone, Copy, Default)]
struct Change {
    lost: u64,
    gained: u64,
    /// the number of places recorded for the new pair, later the index where the next of them is written
    places: usize,
    touched: bool,
}

struct Trainer {
    corpus: Corpus,
    lengths: Vec<u32>,
    pairs: Map<u64, Pair>,
    places: Vec<u32>,
    heap: BinaryHeap<(u64, Reverse<u64>)>,
}

fn key(left: u32, right: u32) -> u64 {
    u64::from(left) << 32 | u64::from(right)
}

/// Learns up to `merges` merges and returns them in order: token 256 + i is the pair at i. There are fewer where no
/// pair is left. `tick(done)` is called often; when it returns false the work ends and the merges learnt so far are
/// returned.
pub fn learn(corpus: Corpus, merges: usize, mut tick: impl FnMut(usize) -> bool) -> Vec<(u32, u32)> {
    let mut trainer =
        Trainer { corpus, lengths: vec![1; 256], pairs: Map::default(), places: Vec::new(), heap: BinaryHeap::new() };
    trainer.index_bytes();
    let mut learnt = Vec::new();
    // left[x]: changes of the pair (x, merged); right[x]: of (merged, x)
    let mut left = vec![Change::default(); 256];
    let mut right = left.clone();
    while learnt.len() < merges && tick(learnt.len()) {
        let Some((a, b)) = trainer.pop_best() else { break };
        left.push(Change::default());
        right.push(Change::default());
        if !trainer.merge(a, b, &mut left, &mut right, || tick(learnt.len())) {
            break;
        }
        learnt.push((a, b));
    }
    learnt
}

impl Trainer {
    /// Counts the pairs of bytes and records where they occur.
    fn index_bytes(&mut self) {
        let byte_pair = |pair: &[u32]| {
            (pair[0] != BOUNDARY && pair[1] != BOUNDARY).then(|| ((pair[0] & 0xff) << 8 | pair[1] & 0xff) as usize)
        };
        let slots = &self.corpus.slots;
        let mut pairs = vec![(0u64, 0usize); 1 << 16]; // count, number of places
        let mut run = 0;
        for (at, pair) in slots.windows(2).enumerate() {
            if let Some(index) = byte_pair(pair) {
                while self.corpus.counts.get(run + 1).is_some_and(|&(from, _)| from as usize <= at) {
                    run += 1;
                }
                pairs[index].0 += self.corpus.counts[run].1;
                pairs[index].1 += 1;
            }
        }
        let mut first = 0;
        let mut next = vec![0; 1 << 16];
        for (index, &(count, places)) in pairs.iter().enumerate().filter(|(_, pair)| pair.0 > 0) {
            let key = key(index as u32 >> 8, index as u32 & 0xff);
            self.pairs.insert(key, Pair { count, first, places: places as u32 });
            self.heap.push((count, Reverse(key)));
            next[index] = first;
            first += places;
        }
        self.places = vec![0; first];
        for (at, pair) in slots.windows(2).enumerate() {
            if let Some(index) = byte_pair(pair) {
                self.places[next[index]] = at as u32;
                next[index] += 1;
            }
        }
    }

    /// Returns the pair to merge next. Counts in the heap may be too high but never too low: after the merge that
    /// created it, a pair only loses occurrences.
    fn pop_best(&mut self) -> Option<(u32, u32)> {
        loop {
            let mut top = self.heap.peek_mut()?;
            let (count, Reverse(key)) = *top;
            match self.pairs.get(&key) {
                Some(pair) if pair.count == count => {
                    PeekMut::pop(top);
                    return Some(((key >> 32) as u32, key as u32));
                }
                Some(pair) => top.0 = pair.count,
                None => {
                    PeekMut::pop(top);
                }
            }
        }
    }

    /// Replaces all (a, b) by a new token, from left to right. Returns false where `tick` ended the work; the trainer
    /// is then unusable.
    fn merge(
        &mut self,
        a: u32,
        b: u32,
        left: &mut [Change],
        right: &mut [Change],
        mut tick: impl FnMut() -> bool,
    ) -> bool {
        let pair = self.pairs.remove(&key(a, b)).expect("the best pair is known");
        let new = self.lengths.len() as u32;
        let (a_length, b_length) = (self.lengths[a as usize] as usize, self.lengths[b as usize] as usize);
        self.lengths.push((a_length + b_length) as u32);
        let mut lefts: Vec<u32> = Vec::new(); // tokens changed in `left` and `right`
        let mut rights: Vec<u32> = Vec::new();
        let mut seen: Vec<(u32, u32, bool)> = Vec::new(); // (other token, place, whether it is on the left) of new pairs
        let slots = &mut self.corpus.slots;
        let counts = &self.corpus.counts;
        let mut run = 0;
        for visit in pair.first..pair.first + pair.places as usize {
            if visit % (1 << 16) == 0 && !tick() {
                return false;
            }
            let at = self.places[visit] as usize;
            let second = at + a_length;
            if slots[at] != START | a || slots[second] != START | b {
                continue;
            }
            if counts.get(run + 1).is_some_and(|&(from, _)| from as usize <= at) {
                run += counts[run + 1..].partition_point(|&(from, _)| from as usize <= at);
            }
            let count = counts[run].1;
            let end = second + b_length;
            if slots[at - 1] != BOUNDARY {
                let other = slots[at - 1] & !START;
                // the new token itself is on the left: its pair with `a` was counted one step ago
                if other == new {
                    right[a as usize].gained -= count;
                } else {
                    touch(left, other, &mut lefts).lost += count;
                }
                let change = touch(left, other, &mut lefts);
                change.gained += count;
                change.places += 1;
                seen.push((other, (at - self.lengths[other as usize] as usize) as u32, true));
            }
            if slots[end] != BOUNDARY {
                let other = slots[end] & !START;
                let change = touch(right, other, &mut rights);
                change.lost += count;
                change.gained += count;
                change.places += 1;
                seen.push((other, at as u32, false));
            }
            slots[second] = 0;
            slots[end - 1] = new;
            slots[at] = START | new;
        }
        for &other in &lefts {
            self.lose(key(other, a), left[other as usize].lost);
            self.gain(key(other, new), &mut left[other as usize]);
        }
        for &other in &rights {
            self.lose(key(b, other), right[other as usize].lost);
            self.gain(key(new, other), &mut right[other as usize]);
        }
        for (other, at, is_left) in seen {
            let change = if is_left { &mut left[other as usize] } else { &mut right[other as usize] };
            if change.gained > 0 {
                self.places[change.places] = at;
                change.places += 1;
            }
        }
        lefts.iter().for_each(|&other| left[other as usize] = Change::default());
        rights.iter().for_each(|&other| right[other as usize] = Change::default());
        true
    }

    fn lose(&mut self, key: u64, count: u64) {
        if count > 0 {
            // in a run of the token a, the pair (a, a) that is being merged is already removed
            if let Some(pair) = self.pairs.get_mut(&key) {
                pair.count -= count;
                if pair.count == 0 {
                    self.pairs.remove(&key);
                }
            }
        }
    }

    /// Creates the pair and reserves space for its places; `change.places` becomes the index of the first of them.
    fn gain(&mut self, key: u64, change: &mut Change) {
        if change.gained > 0 {
            let first = self.places.len();
            self.places.resize(first + change.places, 0);
            self.pairs.insert(key, Pair { count: change.gained, first, places: change.places as u32 });
            self.heap.push((change.gained, Reverse(key)));
            change.places = first;
        }
    }
}

fn touch<'c>(changes: &'c mut [Change], other: u32, touched: &mut Vec<u32>) -> &'c mut Change {
    let change = &mut changes[other as usize];
    if !change.touched {
        change.touched = true;
        touched.push(other);
    }
    change
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::count::PieceCounter;
    use crate::split::{Splitter, DEFAULT_PATTERN};

    fn learn_texts(pattern: &str, texts: &[String], merges: usize) -> Vec<(u32, u32)> {
        let counter = PieceCounter::new(Splitter::new(pattern).unwrap());
        counter.count(texts.iter().map(String::as_str), || true).unwrap();
        learn(Corpus::new(counter.finish()).unwrap(), merges, |_| true)
    }

    /// The definition: count all pairs again before every merge.
    fn learn_plainly(pattern: &str, texts: &[String], merges: usize) -> Vec<(u32, u32)> {
        let splitter = Splitter::regex(pattern).unwrap();
        let mut words: Vec<Vec<u32>> = Vec::new();
        for text in texts {
            splitter
                .pieces(text, |s, e| words.push(text.as_bytes()[s..e].iter().map(|&b| b.into()).collect()))
                .unwrap();
        }
        let mut learnt = Vec::new();
        while learnt.len() < merges {
            let mut counts = std::collections::HashMap::new();
            words
                .iter()
                .flat_map(|word| word.windows(2))
                .for_each(|pair| *counts.entry((pair[0], pair[1])).or_insert(0) += 1);
            let Some((_, Reverse(best))) = counts.into_iter().map(|(pair, count)| (count, Reverse(pair))).max() else {
                break;
            };
            for word in &mut words {
                let mut i = 0;
                while i + 1 < word.len() {
                    if (word[i], word[i + 1]) == best {
                        word[i] = 256 + learnt.len() as u32;
                        word.remove(i + 1);
                    }
                    i += 1;
                }
            }
            learnt.push(best);
        }
        learnt
    }

    #[test]
    fn merges_equal_those_of_counting_everything_anew() {
        let mut seed = 7u64;
        let mut random = |below: usize| {
            seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (seed >> 33) as usize % below
        };
        for round in 0..400 {
            let letters = ["a", "ab", "aab ", "abcdefgh  ", "aé'日 \n1"][round % 5];
            let letters: Vec<char> = letters.chars().collect();
            let texts: Vec<String> =
                (0..1 + random(6)).map(|_| (0..random(60)).map(|_| letters[random(letters.len())]).collect()).collect();
            for pattern in [DEFAULT_PATTERN, r"(?s).+"] {
                assert_eq!(learn_texts(pattern, &texts, 80), learn_plainly(pattern, &texts, 80), "{texts:?}");
            }
        }
    }

    #[test]
    fn no_text_gives_no_merges_and_an_end_asked_for_ends() {
        assert!(learn_texts(DEFAULT_PATTERN, &[], 10).is_empty());
        assert!(learn_texts(DEFAULT_PATTERN, &["a b c".into()], 10) == vec![(32, 98), (32, 99)]);
        let counter = PieceCounter::new(Splitter::new(DEFAULT_PATTERN).unwrap());
        counter.count(["abcdef"].into_iter(), || true).unwrap();
        assert_eq!(learn(Corpus::new(counter.finish()).unwrap(), 10, |done| done < 2).len(), 2);
    }

    #[test]
    fn one_piece_of_a_million_bytes_is_no_worse_than_many() {
        let mut seed = 3u64;
        let letters = (0..1_000_000).map(|_| {
            seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (b'a' + (seed >> 33) as u8 % 26) as char
        });
        assert_eq!(learn_texts(DEFAULT_PATTERN, &[letters.collect()], 2000).len(), 2000);
    }
}
