//! Attention of one query a row over a range of keys in the KV cache: the decode step. Keys are split into chunks at
//! fixed positions; chunks are computed independently and combined in order.

use crate::attention::transpose;
use crate::math::{exp, fma, sum, Elem};
use crate::pool::{block, blocks};
use crate::simd::Kernel;
use crate::view::Heads;
use std::marker::PhantomData;
use std::ops::Range;

/// Keys in a chunk.
pub const CHUNK: usize = 128;

/// Keys that are read together; also the lanes of a sum.
const N: usize = 16;

/// q, y (B, 1, H, D); k, v (B, S, G, D); H / G neighbouring query heads share a key head. `ranges`: the keys that
/// count, of each row.
pub struct Shape {
    pub H: usize,
    pub G: usize,
    pub D: usize,
    pub ranges: Vec<Range<usize>>,
}

impl Shape {
    /// The chunks that contain the keys of a row.
    #[inline(always)]
    fn chunks(&self, b: usize) -> Range<usize> {
        self.ranges[b].start / CHUNK..blocks(self.ranges[b].end, CHUNK)
    }

    /// The largest number of chunks of a row.
    pub fn max_chunks(&self) -> usize {
        (0..self.ranges.len()).map(|b| self.chunks(b).len()).max().unwrap_or(0)
    }

    pub fn keys(&self) -> usize {
        self.ranges.iter().map(|range| range.len()).sum()
    }

    /// D, rounded up to a multiple of N.
    #[inline(always)]
    fn depth(&self) -> usize {
        self.D.div_ceil(N) * N
    }

    /// Numbers that a chunk gives for a query head: the highest score, the sum of exponentials, and the weighted sum of
    /// values.
    pub fn part(&self) -> usize {
        self.depth() + 2
    }
}

/// The first pass: partial results of the chunks, (B, G, max_chunks, H / G, part) of float32. Items are (b, g, i-th
/// chunk of the row).
pub struct Split<'a, T> {
    pub shape: &'a Shape,
    pub q: Heads,
    pub k: Heads,
    pub v: Heads,
    pub parts: usize,
    pub dtype: PhantomData<T>,
}

impl<T: Elem> Kernel for Split<'_, T> {
    #[inline(always)]
    fn run<const F: bool>(&self, items: Range<usize>) {
        let s = self.shape;
        let (D, sharing, max_chunks) = (s.D, s.H / s.G, s.max_chunks());
        let scale = 1.0 / (D as f32).sqrt();
        let depth = s.depth();
        let (mut q, mut p, mut rows) =
            (vec![0.0f32; sharing * depth], vec![0.0f32; sharing * CHUNK], vec![0.0f32; N * depth]);
        for item in items {
            let (b, g, i) = (item / (s.G * max_chunks), item / max_chunks % s.G, item % max_chunks);
            let chunks = s.chunks(b);
            if i >= chunks.len() {
                continue;
            }
            let range = &s.ranges[b];
            let keys = block(chunks.start + i, CHUNK, range.end);
            let keys = keys.start.max(range.start)..keys.end;
            let n = keys.len();
            let (k, v) = (self.k.head::<T>(g), self.v.head::<T>(g));
            for (r, q) in q.chunks_exact_mut(depth).enumerate() {
                // SAFETY (here and below): the caller has checked the shapes, and that the ranges lie within S
                read(unsafe { self.q.head::<T>(g * sharing + r).row::<T>(b, 0, D) }, q, scale);
            }
            for j in (0..n).step_by(N) {
                let count = N.min(n - j);
                for (i, row) in rows.chunks_exact_mut(depth).take(count).enumerate() {
                    read(unsafe { k.row::<T>(b, keys.start + j + i, D) }, row, 1.0);
                }
                for (q, p) in q.chunks_exact(depth).zip(p.chunks_exact_mut(CHUNK)) {
                    scores::<F>(q, &rows, p[j..j + N].as_mut().try_into().expect("N scores"));
                }
            }
            let size = sharing * s.part();
            // SAFETY: python.rs allocates such a part for each item
            let parts = unsafe { std::slice::from_raw_parts_mut((self.parts as *mut f32).add(item * size), size) };
            for (p, part) in p.chunks_exact_mut(CHUNK).zip(parts.chunks_exact_mut(s.part())) {
                let p = &mut p[..n];
                let top = p.iter().fold(f32::MIN, |top, &x| if x > top { x } else { top });
                for x in p.iter_mut() {
                    *x = exp::<F>(*x - top);
                }
                part.fill(0.0);
                (part[0], part[1]) = (top, sum(p));
            }
            for j in (0..n).step_by(N) {
                let count = N.min(n - j);
                for (i, row) in rows.chunks_exact_mut(depth).take(count).enumerate() {
                    read(unsafe { v.row::<T>(b, keys.start + j + i, D) }, row, 1.0);
                }
                for (p, part) in p.chunks_exact(CHUNK).zip(parts.chunks_exact_mut(s.part())) {
                    weigh::<F>(&p[j..j + count], &rows, &mut part[2..]);
                }
            }
        }
    }
}

/// A row times a factor; elements of `to` beyond the row stay as they are.
#[inline(always)]
fn read<T: Elem>(from: &[T], to: &mut [f32], factor: f32) {
    for (from, to) in from.iter().zip(to) {
        *to = from.get() * factor;
    }
}

#[inline(always)]
fn lanes(x: &[f32]) -> &[f32; N] {
    x.try_into().expect("N numbers")
}

/// The dot products of q with each of N rows.
#[inline(always)]
fn scores<const F: bool>(q: &[f32], rows: &[f32], to: &mut [f32; N]) {
    let mut sums = [0.0f32; N * N];
    for (row, sums) in rows.chunks_exact(q.len()).zip(sums.chunks_exact_mut(N)) {
        let mut kept = [0.0f32; N];
        for (q, x) in q.chunks_exact(N).zip(row.chunks_exact(N)) {
            let (q, x) = (lanes(q), lanes(x));
            for l in 0..N {
                kept[l] = fma::<F>(q[l], x[l], kept[l]);
            }
        }
        sums.copy_from_slice(&kept);
    }
    let mut transposed = [0.0f32; N * N];
    transpose(&sums, &mut transposed);
    let mut kept = [0.0f32; N];
    for sums in transposed.chunks_exact(N) {
        let sums = lanes(sums);
        for l in 0..N {
            kept[l] += sums[l];
        }
    }
    *to = kept;
}

/// y += Σ p[i] · row i
#[inline(always)]
fn weigh<const F: bool>(p: &[f32], rows: &[f32], y: &mut [f32]) {
    let depth = y.len();
    for (c, y) in y.chunks_exact_mut(N).enumerate() {
        let y: &mut [f32; N] = y.try_into().expect("N numbers");
        let mut kept = *y;
        for (p, row) in p.iter().zip(rows.chunks_exact(depth)) {
            let row = lanes(&row[c * N..(c + 1) * N]);
            for l in 0..N {
                kept[l] = fma::<F>(*p, row[l], kept[l]);
            }
        }
        *y = kept;
    }
}

/// The second pass: y from the partial results. Items are the query heads of all rows.
pub struct Combine<'a, T> {
    pub shape: &'a Shape,
    pub parts: usize,
    pub y: Heads,
    pub dtype: PhantomData<T>,
}

impl<T: Elem> Kernel for Combine<'_, T> {
    #[inline(always)]
    fn run<const F: bool>(&self, items: Range<usize>) {
        let s = self.shape;
        let (D, sharing, max_chunks) = (s.D, s.H / s.G, s.max_chunks());
        let mut y = vec![0.0f32; D];
        for item in items {
            let (b, h) = (item / s.H, item % s.H);
            let part = |i: usize| {
                let at = (((b * s.G + h / sharing) * max_chunks + i) * sharing + h % sharing) * s.part();
                // SAFETY: `Split` has written it
                unsafe { std::slice::from_raw_parts((self.parts as *const f32).add(at), s.part()) }
            };
            let count = s.chunks(b).len();
            let top = (0..count).map(|i| part(i)[0]).fold(f32::MIN, |top, x| if x > top { x } else { top });
            let mut total = 0.0;
            y.fill(0.0);
            for i in 0..count {
                let part = part(i);
                let factor = exp::<F>(part[0] - top);
                total += part[1] * factor;
                for (y, part) in y.iter_mut().zip(&part[2..]) {
                    *y = fma::<F>(factor, *part, *y);
                }
            }
            // SAFETY: the caller has checked the shape; no two threads share a head
            let to = unsafe { self.y.head::<T>(h).row_mut::<T>(b, 0, D) };
            for (to, y) in to.iter_mut().zip(&y) {
                *to = T::put(*y / total);
            }
        }
    }
}
