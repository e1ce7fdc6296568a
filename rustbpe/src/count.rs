//! Count distinct pieces on many threads, with each distinct piece stored once.
//!
//! A thread counts into a small table of its own, which fits in its CPU cache. When that is full it is emptied into 64
//! shared tables, chosen by hash, each behind a lock. So memory depends on the number of distinct pieces and hardly on
//! that of threads, and the sums do not depend on which thread counted what.

use crate::key::{hash_bytes, Block, Key, Map, SHORT};
use crate::split::Splitter;
use std::sync::Mutex;

const SHARD_BITS: u32 = 6;
/// Slots of a thread's own table, 24 bytes each; it is emptied when half of them are used.
const LOCAL_BITS: u32 = 15;
/// Long pieces that a thread's table may hold, in number and in bytes, before it is emptied.
const LOCAL_LONG: usize = 1 << 14;
const LOCAL_LONG_BYTES: usize = 1 << 20;

#[derive(Clone, Copy, Default)]
struct Slot {
    key: Key,
    count: u64,
}

/// Counts of pieces: open addressing for those that fit a `Key`, a map for longer ones.
struct Table {
    slots: Vec<Slot>,
    bits: u32,
    taken: usize,
    /// leading bits of the hash to ignore, since all pieces of the table share them
    skip: u32,
    long: Map<Box<[u8]>, u64>,
    long_bytes: usize,
}

impl Table {
    fn new(bits: u32, skip: u32) -> Table {
        Table { slots: vec![Slot::default(); 1 << bits], bits, taken: 0, skip, long: Map::default(), long_bytes: 0 }
    }

    /// Adds to the count of a short piece; the caller keeps the table at most half full.
    #[inline(always)]
    fn add(&mut self, key: Key, hash: u64, count: u64) {
        let mask = self.slots.len() - 1;
        let mut at = self.home(hash);
        loop {
            let slot = &mut self.slots[at];
            if slot.key == key {
                slot.count += count;
                return;
            }
            if slot.key.is_free() {
                *slot = Slot { key, count };
                self.taken += 1;
                return;
            }
            at = (at + 1) & mask;
        }
    }

    #[inline(always)]
    fn home(&self, hash: u64) -> usize {
        ((hash << self.skip) >> (64 - self.bits)) as usize
    }

    #[inline(never)]
    fn add_block(&mut self, block: &mut Block) {
        for &(key, hash) in block.take(|hash| self.slots[self.home(hash)].key.word()) {
            self.add(key, hash, 1);
        }
    }

    fn add_growing(&mut self, key: Key, hash: u64, count: u64) {
        if self.taken * 8 >= self.slots.len() * 5 {
            let mut larger = Table::new(self.bits + 1, self.skip);
            for slot in self.slots.iter().filter(|slot| !slot.key.is_free()) {
                larger.add(slot.key, slot.key.hash(), slot.count);
            }
            (self.slots, self.bits) = (larger.slots, larger.bits);
        }
        self.add(key, hash, count);
    }

    #[inline(never)]
    fn add_long(&mut self, piece: &[u8]) {
        match self.long.get_mut(piece) {
            Some(count) => *count += 1,
            None => {
                self.long_bytes += piece.len();
                self.long.insert(piece.into(), 1);
            }
        }
    }

    fn is_full(&self) -> bool {
        self.taken * 2 > self.slots.len() || self.long.len() > LOCAL_LONG || self.long_bytes > LOCAL_LONG_BYTES
    }
}

pub struct PieceCounter {
    splitter: Splitter,
    shards: Vec<Mutex<Table>>,
    /// tables of threads that are not counting at the moment
    locals: Mutex<Vec<(Splitter, Table)>>,
}

impl PieceCounter {
    pub fn new(splitter: Splitter) -> PieceCounter {
        let shards = (0..1 << SHARD_BITS).map(|_| Mutex::new(Table::new(8, SHARD_BITS))).collect();
        PieceCounter { splitter, shards, locals: Mutex::new(Vec::new()) }
    }

    /// Adds the pieces of the texts; called from several threads at once. `go_on` is called between texts; false ends
    /// the work.
    pub fn count<'t>(&self, texts: impl Iterator<Item = &'t str>, go_on: impl Fn() -> bool) -> Result<(), String> {
        let idle = self.locals.lock().unwrap().pop();
        // every thread has its own splitter, since threads that share a regular expression wait for each other
        let (splitter, mut table) = idle.unwrap_or_else(|| (self.splitter.clone(), Table::new(LOCAL_BITS, 0)));
        let mut outcome = Ok(());
        let mut block = Block::new();
        for text in texts {
            if outcome.is_err() || !go_on() {
                break;
            }
            let bytes = text.as_bytes();
            outcome = splitter.pieces(text, |start, end| {
                if end - start > SHORT {
                    table.add_long(&bytes[start..end]);
                } else if block.push(Key::of(bytes, start, end)) {
                    table.add_block(&mut block);
                } else {
                    return;
                }
                if table.is_full() {
                    self.empty(&mut table);
                }
            });
        }
        table.add_block(&mut block);
        self.locals.lock().unwrap().push((splitter, table));
        outcome
    }

    /// Moves a thread's counts into the shared tables. Slots are ordered by hash, so a shard's lock is taken once for
    /// all of its slots.
    #[cold]
    fn empty(&self, local: &mut Table) {
        let shard_of = |hash: u64| (hash >> (64 - SHARD_BITS)) as usize;
        let (mut held, mut shard) = (0, self.shards[0].lock().unwrap());
        for slot in local.slots.iter_mut().filter(|slot| !slot.key.is_free()) {
            let hash = slot.key.hash();
            if shard_of(hash) != held {
                drop(shard);
                held = shard_of(hash);
                shard = self.shards[held].lock().unwrap();
            }
            shard.add_growing(slot.key, hash, slot.count);
            *slot = Slot::default();
        }
        drop(shard);
        for (piece, count) in local.long.drain() {
            *self.shards[shard_of(hash_bytes(&piece))].lock().unwrap().long.entry(piece).or_insert(0) += count;
        }
        (local.taken, local.long_bytes) = (0, 0);
    }

    /// Returns all pieces of two bytes or more with their counts, the most frequent first, equals in no particular
    /// order. Pieces of one byte contain no pair, so there is nothing to learn from them.
    pub fn finish(self) -> Vec<(Piece, u64)> {
        for (_, mut table) in std::mem::take(&mut *self.locals.lock().unwrap()) {
            self.empty(&mut table);
        }
        let mut pieces = Vec::new();
        for shard in self.shards {
            let table = shard.into_inner().unwrap();
            let short = table.slots.into_iter().filter(|slot| slot.key.len() > 1);
            pieces.extend(short.map(|slot| (Piece::Short(slot.key), slot.count)));
            pieces.extend(table.long.into_iter().map(|(piece, count)| (Piece::Long(piece), count)));
        }
        pieces.sort_unstable_by_key(|&(_, count)| std::cmp::Reverse(count));
        pieces
    }
}

pub enum Piece {
    Short(Key),
    Long(Box<[u8]>),
}

impl Piece {
    pub fn with_bytes<R>(&self, f: impl FnOnce(&[u8]) -> R) -> R {
        match self {
            Piece::Short(key) => f(&key.bytes()[..key.len()]),
            Piece::Long(bytes) => f(bytes),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::split::DEFAULT_PATTERN;
    use std::collections::HashMap;

    #[test]
    fn counts_equal_those_of_a_plain_map_on_any_number_of_threads() {
        let mut texts: Vec<String> = (0..60_000u64)
            .map(|i| format!("w{} word{} {}", i % 7, i * i % 50_021, "x".repeat((i % 40) as usize)))
            .collect();
        texts.push("長い一続きの文字列".repeat(20));
        let splitter = Splitter::new(DEFAULT_PATTERN).unwrap();
        let mut plain: HashMap<Vec<u8>, u64> = HashMap::new();
        for text in &texts {
            splitter.pieces(text, |s, e| *plain.entry(text.as_bytes()[s..e].to_vec()).or_insert(0) += 1).unwrap();
        }
        plain.retain(|piece, _| piece.len() > 1);
        for threads in [1, 3] {
            let counter = PieceCounter::new(splitter.clone());
            std::thread::scope(|scope| {
                for part in texts.chunks(texts.len().div_ceil(threads)) {
                    let counter = &counter;
                    scope.spawn(move || counter.count(part.iter().map(String::as_str), || true).unwrap());
                }
            });
            let pieces = counter.finish();
            assert!(pieces.windows(2).all(|pair| pair[0].1 >= pair[1].1));
            let counted: HashMap<Vec<u8>, u64> =
                pieces.iter().map(|(piece, count)| (piece.with_bytes(<[u8]>::to_vec), *count)).collect();
            assert_eq!((counted.len(), &counted), (pieces.len(), &plain));
        }
    }
}
