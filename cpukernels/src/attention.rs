//! Causal softmax attention with an optional window, and its gradients. A block of queries goes through the blocks of
//! keys that it sees, one after the other, so that scores never leave the CPU's cache and hidden keys cost nothing.
//!
//! Blocks are converted once to float32 in panels (see `N`), so that every operand of `multiply` has strides known to
//! the compiler.

use crate::math::{dot, exp, Elem};
use crate::pool::{block, blocks};
use crate::simd::Kernel;
use crate::view::Heads;
use std::cell::Cell;
use std::marker::PhantomData;
use std::ops::Range;

/// Queries, or keys, in a block.
const BLOCK: usize = 64;
/// Columns of a panel: a matrix (rows, columns) is stored as panels (rows, N), one after the other.
const N: usize = 16;
/// Rows of a tile: its M · N sums stay in registers.
const M: usize = 4;

/// The running maximum is raised, and the sums rescaled, only where a score exceeds it by more than this.
const LEEWAY: f32 = 8.0;

/// q, y (B, T, H, D); k, v (B, T, G, D); H / G neighbouring query heads share a key head. A query sees the last
/// `window` keys up to its own position.
#[derive(Clone, Copy)]
pub struct Shape {
    pub T: usize,
    pub H: usize,
    pub G: usize,
    pub D: usize,
    pub window: usize,
}

impl Shape {
    pub fn blocks(&self) -> usize {
        blocks(self.T, BLOCK)
    }

    /// Roughly the operations that a head takes.
    pub fn operations(&self) -> usize {
        self.T.saturating_mul(self.T.min(self.window)).saturating_mul(self.D)
    }

    /// D, rounded up to whole panels.
    #[inline(always)]
    fn depth(&self) -> usize {
        self.D.div_ceil(N) * N
    }

    /// The i-th block of queries or keys.
    #[inline(always)]
    fn block(&self, i: usize) -> Range<usize> {
        block(i, BLOCK, self.T)
    }

    /// The keys of a block that at least one of these queries sees, counted from the block's start.
    #[inline(always)]
    fn keys(&self, queries: Range<usize>, keys: &Range<usize>) -> Range<usize> {
        let first = (queries.start + 1).saturating_sub(self.window).clamp(keys.start, keys.end);
        let end = queries.end.min(keys.end).max(first);
        first - keys.start..end - keys.start
    }

    /// The queries of a block that see at least one of these keys, counted from the block's start.
    #[inline(always)]
    fn queries(&self, keys: Range<usize>, queries: &Range<usize>) -> Range<usize> {
        let first = keys.start.clamp(queries.start, queries.end);
        let end = (keys.end - 1).saturating_add(self.window).min(queries.end).max(first);
        first - queries.start..end - queries.start
    }
}

/// sums[r, l] += Σ a[r, p] · b[p, l] over p in `terms`. `a` begins with the tile's first row, `b` with the panel. With
/// TRANSPOSED, a is given as its transpose.
///
/// # Safety
/// All these elements exist.
#[inline(always)]
unsafe fn tile<const F: bool, const TRANSPOSED: bool>(
    a: *const f32,
    b: *const f32,
    terms: Range<usize>,
    sums: &mut [[f32; N]; M],
) {
    let mut kept = *sums;
    for p in terms {
        let b = &*(b.add(p * N) as *const [f32; N]);
        for r in 0..M {
            let a = *a.add(if TRANSPOSED { p * N + r } else { r * N + p % N });
            for l in 0..N {
                kept[r][l] = crate::math::fma::<F>(a, b[l], kept[r][l]);
            }
        }
    }
    *sums = kept;
}

/// c = a · b, or with ADD c += a · b, in `tiles` rows of tiles. All are in panels; a and c have BLOCK rows, b has
/// `b_rows`. With TRANSPOSED, a is given as its transpose. The i-th row of tiles is computed only for the panels
/// `columns(i)` of b, and sums only over `terms(i)`.
#[inline(always)]
fn multiply<const F: bool, const TRANSPOSED: bool, const ADD: bool>(
    (a, b, c): (&[f32], &[f32], &mut [f32]),
    b_rows: usize,
    tiles: usize,
    columns: impl Fn(usize) -> Range<usize>,
    terms: impl Fn(usize) -> Range<usize>,
) {
    for panel in 0..b.len() / (b_rows * N) {
        let b = &b[panel * b_rows * N..(panel + 1) * b_rows * N];
        let c = &mut c[panel * BLOCK * N..(panel + 1) * BLOCK * N];
        for i in 0..tiles {
            let terms = terms(i);
            if !columns(i).contains(&panel) {
                continue;
            }
            let c: &mut [f32; M * N] = (&mut c[i * M * N..(i + 1) * M * N]).try_into().expect("a tile");
            let mut sums = [[0.0f32; N]; M];
            if ADD {
                for r in 0..M {
                    for l in 0..N {
                        sums[r][l] = c[r * N + l];
                    }
                }
            }
            assert!(terms.end <= b_rows);
            if TRANSPOSED {
                assert!(terms.end <= BLOCK && (i * M / N + 1) * BLOCK * N <= a.len());
                // SAFETY: the panel that starts at column i · M has BLOCK rows, b has b_rows
                unsafe {
                    tile::<F, true>(a.as_ptr().add(i * M / N * BLOCK * N + i * M % N), b.as_ptr(), terms, &mut sums)
                };
            } else {
                assert!(terms.end.div_ceil(N) * BLOCK * N <= a.len() && (i + 1) * M <= BLOCK);
                let mut start = terms.start;
                while start < terms.end {
                    let end = (start / N * N + N).min(terms.end);
                    // SAFETY: the panel with column `start` has BLOCK rows, b has b_rows
                    unsafe {
                        tile::<F, false>(
                            a.as_ptr().add(start / N * BLOCK * N + i * M * N),
                            b.as_ptr(),
                            start..end,
                            &mut sums,
                        )
                    };
                    start = end;
                }
            }
            for r in 0..M {
                for l in 0..N {
                    c[r * N + l] = sums[r][l];
                }
            }
        }
    }
}

/// Row i of a panel.
#[inline(always)]
fn row(panel: &mut [f32], i: usize) -> &mut [f32; N] {
    (&mut panel[i * N..(i + 1) * N]).try_into().expect("N columns")
}

/// Rows of a head times `factor`, written as panels of BLOCK rows. Columns beyond D, and the rows that complete the
/// last tile, become zeros; further rows stay as they are. `line` is scratch memory for a row.
#[inline(always)]
fn pack<T: Elem>(
    (x, b, h): (Heads, usize, usize),
    rows: &Range<usize>,
    D: usize,
    factor: f32,
    line: &mut [f32],
    into: &mut [f32],
) {
    let view = x.head::<T>(h);
    line[D..].fill(0.0);
    for i in 0..rows.len().div_ceil(M) * M {
        if i < rows.len() {
            // SAFETY: the caller has checked the shapes
            let x = unsafe { view.row::<T>(b, rows.start + i, D) };
            for (x, to) in x.iter().zip(line.iter_mut()) {
                *to = x.get() * factor;
            }
        } else {
            line.fill(0.0);
        }
        for (from, panel) in line.chunks_exact(N).zip(into.chunks_exact_mut(BLOCK * N)) {
            row(panel, i).copy_from_slice(from);
        }
    }
}

/// The transpose of a block in panels, (depth, BLOCK); columns beyond its rows may be anything.
#[inline(always)]
fn transpose_block(from: &[f32], rows: usize, depth: usize, into: &mut [f32]) {
    for (j, to) in into.chunks_exact_mut(depth * N).enumerate().take(rows.div_ceil(N)) {
        for (from, to) in from.chunks_exact(BLOCK * N).zip(to.chunks_exact_mut(N * N)) {
            let from: &[f32; N * N] = from[j * N * N..(j + 1) * N * N].try_into().expect("N rows of N");
            transpose(from, to.try_into().expect("N rows of N"));
        }
    }
}

/// The transpose of N rows of N. An element's index has two digits of 4 bits, row and column. Each step rotates the
/// index by one bit; after four steps the digits have changed places.
#[inline(always)]
pub fn transpose(from: &[f32; N * N], to: &mut [f32; N * N]) {
    let (mut x, mut y) = ([0.0f32; N * N], [0.0f32; N * N]);
    interleave(from, to);
    interleave(to, &mut x);
    interleave(&x, &mut y);
    interleave(&y, to);
}

#[inline(always)]
fn interleave(x: &[f32; N * N], y: &mut [f32; N * N]) {
    for i in 0..N * N / 2 {
        y[2 * i] = x[i];
        y[2 * i + 1] = x[i + N * N / 2];
    }
}

/// Rows of panels, each times its factor, written to a head: the reverse of `pack`.
#[inline(always)]
fn unpack<T: Elem>(
    from: &[f32],
    (x, b, h): (Heads, usize, usize),
    rows: &Range<usize>,
    D: usize,
    factor: impl Fn(usize) -> f32,
    line: &mut [f32],
) {
    let view = x.head::<T>(h);
    for (i, t) in rows.clone().enumerate() {
        for (to, panel) in line.chunks_exact_mut(N).zip(from.chunks_exact(BLOCK * N)) {
            to.copy_from_slice(&panel[i * N..(i + 1) * N]);
        }
        let factor = factor(i);
        // SAFETY: the caller has checked the shapes; no two threads share a block of a head
        let x = unsafe { view.row_mut::<T>(b, t, D) };
        for (x, from) in x.iter_mut().zip(line.iter()) {
            *x = T::put(*from * factor);
        }
    }
}

/// Scratch memory of a thread, kept for the next call, since allocating costs time. Forward takes 2 · T · D floats and
/// some blocks, backward 3 · T · D · H / G.
#[derive(Clone, Copy)]
#[repr(align(64))]
struct Line(#[allow(dead_code)] [f32; 16]);

thread_local! {
    static KEPT: Cell<Vec<Line>> = const { Cell::new(Vec::new()) };
}

struct Scratch {
    lines: Vec<Line>,
    used: usize,
}

impl Scratch {
    fn new(floats: usize) -> Scratch {
        let mut lines = KEPT.with(|kept| kept.take());
        if lines.len() * 16 < floats {
            lines = vec![Line([0.0; 16]); floats.div_ceil(16)];
        }
        Scratch { lines, used: 0 }
    }

    /// So many uninitialised numbers, a multiple of 16.
    fn take<'a>(&mut self, floats: usize) -> &'a mut [f32] {
        assert!(floats % 16 == 0 && self.used + floats <= self.lines.len() * 16);
        // SAFETY: no part is handed out twice, and none outlives the kernel's run, which drops the scratch memory last
        let part =
            unsafe { std::slice::from_raw_parts_mut((self.lines.as_mut_ptr() as *mut f32).add(self.used), floats) };
        self.used += floats;
        part
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        KEPT.with(|kept| kept.set(std::mem::take(&mut self.lines)));
    }
}

/// y, and with `lse` (B, H, T) in float32 the log-sum-exp of each query's scores. Items are blocks of queries.
pub struct Forward<T> {
    pub shape: Shape,
    pub q: Heads,
    pub k: Heads,
    pub v: Heads,
    pub y: Heads,
    pub lse: Option<usize>,
    pub dtype: PhantomData<T>,
}

impl<T: Elem> Kernel for Forward<T> {
    #[inline(always)]
    fn run<const F: bool>(&self, items: Range<usize>) {
        let s = &self.shape;
        let (count, depth, panels) = (s.blocks(), s.depth(), s.depth() / N);
        let size = BLOCK * depth;
        let mut scratch = Scratch::new(2 * count * size + 3 * size + BLOCK * BLOCK + depth);
        let (keys, values) = (scratch.take(count * size), scratch.take(count * size));
        let (q, y, spare, p) =
            (scratch.take(size), scratch.take(size), scratch.take(size), scratch.take(BLOCK * BLOCK));
        let line = scratch.take(depth);
        let mut packed = vec![false; count];
        let mut at = None;
        for item in items {
            let (b, h) = (item / (s.H * count), item / count % s.H);
            // early and late blocks alternate, so that threads get equal work
            let i = item % count;
            let i = if i % 2 == 0 { i / 2 } else { count - 1 - i / 2 };
            let g = h / (s.H / s.G);
            if at != Some((b, g)) {
                packed.fill(false);
                at = Some((b, g));
            }
            let queries = s.block(i);
            let tiles = queries.len().div_ceil(M);
            pack::<T>((self.q, b, h), &queries, s.D, 1.0 / (s.D as f32).sqrt(), line, q);
            y.fill(0.0);
            let mut top = [f32::MIN; BLOCK];
            let mut sums = [[0.0f32; N]; BLOCK];
            for j in (queries.start + 1).saturating_sub(s.window) / BLOCK..i + 1 {
                let seen = s.block(j);
                let part = j * size..(j + 1) * size;
                let (keys, values) = (&mut keys[part.clone()], &mut values[part]);
                if !packed[j] {
                    pack::<T>((self.k, b, g), &seen, s.D, 1.0, line, spare);
                    transpose_block(spare, seen.len(), depth, keys);
                    pack::<T>((self.v, b, g), &seen, s.D, 1.0, line, values);
                    packed[j] = true;
                }
                let of_tile =
                    |r: usize| s.keys(queries.start + r * M..(queries.start + (r + 1) * M).min(queries.end), &seen);
                let columns = |r: usize| {
                    let keys = of_tile(r);
                    keys.start / N..keys.end.div_ceil(N)
                };
                multiply::<F, false, false>((q, keys, p), depth, tiles, columns, |_| 0..s.D);
                for (r, t) in queries.clone().enumerate() {
                    let mine = s.keys(t..t + 1, &seen);
                    let columns = columns(r / M);
                    let (before, now) = (top[r], highest(p, r, &columns, &mine));
                    if now > before + LEEWAY {
                        top[r] = now;
                        if before > f32::MIN {
                            let factor = exp::<F>(before - now);
                            sums[r].iter_mut().for_each(|sum| *sum *= factor);
                            for panel in y.chunks_exact_mut(BLOCK * N) {
                                row(panel, r).iter_mut().for_each(|y| *y *= factor);
                            }
                        }
                    }
                    exponentials::<F>(p, r, &columns, &mine, top[r], &mut sums[r]);
                }
                multiply::<F, false, true>((p, values, y), BLOCK, tiles, |_| 0..panels, of_tile);
            }
            let mut total = [0.0f32; BLOCK];
            for (total, sums) in total.iter_mut().zip(&sums) {
                *total = crate::math::sum(sums);
            }
            unpack::<T>(y, (self.y, b, h), &queries, s.D, |r| 1.0 / total[r], line);
            if let Some(address) = self.lse {
                // SAFETY: the caller gives (B, H, T) of float32; no two threads share a block of a head
                let to = unsafe {
                    std::slice::from_raw_parts_mut(
                        (address as *mut f32).add((b * s.H + h) * s.T + queries.start),
                        queries.len(),
                    )
                };
                for ((to, top), total) in to.iter_mut().zip(&top).zip(&total) {
                    *to = top + total.ln();
                }
            }
        }
    }
}

/// The highest score of row r among the columns `mine`, which lie in the panels `columns`.
#[inline(always)]
fn highest(scores: &[f32], r: usize, columns: &Range<usize>, mine: &Range<usize>) -> f32 {
    let mut lanes = [f32::MIN; N];
    for c in columns.clone() {
        let row: &[f32; N] = scores[c * BLOCK * N + r * N..][..N].try_into().expect("a row of a panel");
        let (first, end) = (mine.start as i32 - (c * N) as i32, mine.end as i32 - (c * N) as i32);
        for l in 0..N {
            let x = if l as i32 >= first && (l as i32) < end { row[l] } else { f32::MIN };
            lanes[l] = if x > lanes[l] { x } else { lanes[l] };
        }
    }
    let mut width = N / 2;
    while width > 0 {
        for l in 0..width {
            lanes[l] = if lanes[l + width] > lanes[l] { lanes[l + width] } else { lanes[l] };
        }
        width /= 2;
    }
    lanes[0]
}

/// Overwrite row r of the scores with e^(score − top), 0 outside of `mine`, and add it to the sums, lane by lane.
#[inline(always)]
fn exponentials<const F: bool>(
    p: &mut [f32],
    r: usize,
    columns: &Range<usize>,
    mine: &Range<usize>,
    top: f32,
    sums: &mut [f32; N],
) {
    let mut lanes = *sums;
    for c in columns.clone() {
        let row: &mut [f32; N] = (&mut p[c * BLOCK * N + r * N..][..N]).try_into().expect("a row of a panel");
        let (first, end) = (mine.start as i32 - (c * N) as i32, mine.end as i32 - (c * N) as i32);
        for l in 0..N {
            let x = exp::<F>(row[l] - top);
            row[l] = if l as i32 >= first && (l as i32) < end { x } else { 0.0 };
            lanes[l] += row[l];
        }
    }
    *sums = lanes;
}

/// dq, dk and dv, from y and the lse of the forward pass. Items are the key heads of all sequences.
pub struct Backward<T> {
    pub shape: Shape,
    pub q: Heads,
    pub k: Heads,
    pub v: Heads,
    pub y: Heads,
    pub dy: Heads,
    pub lse: usize,
    pub dq: Heads,
    pub dk: Heads,
    pub dv: Heads,
    pub dtype: PhantomData<T>,
}

impl<T: Elem> Kernel for Backward<T> {
    #[inline(always)]
    fn run<const F: bool>(&self, items: Range<usize>) {
        let s = &self.shape;
        let (D, count, depth, panels, sharing) = (s.D, s.blocks(), s.depth(), s.depth() / N, s.H / s.G);
        let (size, scale) = (BLOCK * depth, 1.0 / (D as f32).sqrt());
        let mut scratch =
            Scratch::new((3 * sharing * count + 6) * size + 2 * BLOCK * BLOCK + sharing * count * BLOCK + depth);
        let [q, dy, dq] = [(); 3].map(|_| scratch.take(sharing * count * size));
        let [k, k_transposed, v, v_transposed, dk, dv] = [(); 6].map(|_| scratch.take(size));
        let (p, ds) = (scratch.take(BLOCK * BLOCK), scratch.take(BLOCK * BLOCK));
        let (deltas, line) = (scratch.take(sharing * count * BLOCK), scratch.take(depth));
        for item in items {
            let (b, g) = (item / s.G, item % s.G);
            for part in 0..sharing * count {
                let (h, queries, place) =
                    (g * sharing + part / count, s.block(part % count), part * size..(part + 1) * size);
                pack::<T>((self.q, b, h), &queries, D, scale, line, &mut q[place.clone()]);
                pack::<T>((self.dy, b, h), &queries, D, 1.0, line, &mut dy[place.clone()]);
                dq[place].fill(0.0);
                let (dy, y) = (self.dy.head::<T>(h), self.y.head::<T>(h));
                for (delta, t) in deltas[part * BLOCK..].iter_mut().zip(queries) {
                    // SAFETY: the caller has checked the shapes
                    *delta = unsafe { dot::<F, T, T>(dy.row(b, t, D), y.row(b, t, D)) };
                }
            }
            for j in 0..count {
                let keys = s.block(j);
                pack::<T>((self.k, b, g), &keys, D, 1.0, line, k);
                transpose_block(k, keys.len(), depth, k_transposed);
                pack::<T>((self.v, b, g), &keys, D, 1.0, line, v);
                transpose_block(v, keys.len(), depth, v_transposed);
                dk.fill(0.0);
                dv.fill(0.0);
                let last = (keys.end - 1).saturating_add(s.window - 1).min(s.T - 1) / BLOCK;
                for part in (0..sharing).flat_map(|r| r * count + j..r * count + last + 1) {
                    let queries = s.block(part % count);
                    let place = part * size..(part + 1) * size;
                    let (q, dy, dq) = (&q[place.clone()], &dy[place.clone()], &mut dq[place]);
                    let tiles = queries.len().div_ceil(M);
                    let of_tile =
                        |r: usize| s.keys(queries.start + r * M..(queries.start + (r + 1) * M).min(queries.end), &keys);
                    let columns = |r: usize| {
                        let keys = of_tile(r);
                        keys.start / N..keys.end.div_ceil(N)
                    };
                    multiply::<F, false, false>((q, k_transposed, p), depth, tiles, columns, |_| 0..D);
                    multiply::<F, false, false>((dy, v_transposed, ds), depth, tiles, columns, |_| 0..D);
                    let h = g * sharing + part / count;
                    // SAFETY: the caller gives (B, H, T) of float32
                    let lse =
                        unsafe { std::slice::from_raw_parts((self.lse as *const f32).add((b * s.H + h) * s.T), s.T) };
                    for (r, t) in queries.clone().enumerate() {
                        slopes::<F>(
                            (p, ds),
                            r,
                            &columns(r / M),
                            &s.keys(t..t + 1, &keys),
                            lse[t],
                            deltas[part * BLOCK + r],
                        );
                    }
                    let by_key =
                        |c: usize| s.queries(keys.start + c * M..(keys.start + (c + 1) * M).min(keys.end), &queries);
                    let tiles_of_keys = keys.len().div_ceil(M);
                    multiply::<F, true, true>((p, dy, dv), BLOCK, tiles_of_keys, |_| 0..panels, by_key);
                    multiply::<F, true, true>((ds, q, dk), BLOCK, tiles_of_keys, |_| 0..panels, by_key);
                    multiply::<F, false, true>((ds, k, dq), BLOCK, tiles, |_| 0..panels, of_tile);
                }
                unpack::<T>(dk, (self.dk, b, g), &keys, D, |_| 1.0, line);
                unpack::<T>(dv, (self.dv, b, g), &keys, D, |_| 1.0, line);
            }
            for part in 0..sharing * count {
                let h = g * sharing + part / count;
                unpack::<T>(
                    &dq[part * size..(part + 1) * size],
                    (self.dq, b, h),
                    &s.block(part % count),
                    D,
                    |_| scale,
                    line,
                );
            }
        }
    }
}

/// Overwrite row r of the scores with the probabilities p, and the gradients of the probabilities with those of the
/// scores. Both are 0 outside of `mine`.
#[inline(always)]
fn slopes<const F: bool>(
    (p, ds): (&mut [f32], &mut [f32]),
    r: usize,
    columns: &Range<usize>,
    mine: &Range<usize>,
    lse: f32,
    delta: f32,
) {
    for c in columns.clone() {
        let at = c * BLOCK * N + r * N;
        let p: &mut [f32; N] = (&mut p[at..at + N]).try_into().expect("a row of a panel");
        let ds: &mut [f32; N] = (&mut ds[at..at + N]).try_into().expect("a row of a panel");
        let (first, end) = (mine.start as i32 - (c * N) as i32, mine.end as i32 - (c * N) as i32);
        for l in 0..N {
            let seen = l as i32 >= first && (l as i32) < end;
            let x = exp::<F>(p[l] - lse);
            p[l] = if seen { x } else { 0.0 };
            ds[l] = if seen { x * (ds[l] - delta) } else { 0.0 };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simd::{assert_levels_agree, run_at, Level};
    use crate::view::View;

    /// y, lse, dq, dk and dv of two sequences with a window.
    fn results(level: Level) -> Vec<f32> {
        let shape = Shape { T: 150, H: 2, G: 1, D: 21, window: 70 };
        let (T, H, G, D) = (shape.T, shape.H, shape.G, shape.D);
        let numbers =
            |n: usize, step: usize| (0..n).map(|i| (i * step % 1009) as f32 / 252.0 - 2.0).collect::<Vec<f32>>();
        let heads = |t: &mut Vec<f32>, count: usize| Heads {
            tokens: View {
                address: t.as_mut_ptr() as usize,
                strides: [(T * count * D) as isize, (count * D) as isize],
            },
            stride: D as isize,
        };
        let [wide, narrow] = [2 * T * H * D, 2 * T * G * D];
        let (mut q, mut k, mut v, mut dy) =
            (numbers(wide, 7919), numbers(narrow, 7907), numbers(narrow, 7901), numbers(wide, 7883));
        let (mut lse, mut y, mut dq) = (vec![f32::NAN; 2 * H * T], vec![f32::NAN; wide], vec![f32::NAN; wide]);
        let (mut dk, mut dv) = (vec![f32::NAN; narrow], vec![f32::NAN; narrow]);
        let [q, dy, y_heads, dq_heads] = [&mut q, &mut dy, &mut y, &mut dq].map(|t| heads(t, H));
        let [k, v, dk_heads, dv_heads] = [&mut k, &mut v, &mut dk, &mut dv].map(|t| heads(t, G));
        let at = lse.as_mut_ptr() as usize;
        let forward = Forward::<f32> { shape, q, k, v, y: y_heads, lse: Some(at), dtype: PhantomData };
        run_at(level, &forward, 0..2 * H * shape.blocks());
        let (y_in, dtype) = (y_heads, PhantomData);
        let backward =
            Backward::<f32> { shape, q, k, v, y: y_in, dy, lse: at, dq: dq_heads, dk: dk_heads, dv: dv_heads, dtype };
        run_at(level, &backward, 0..2 * G);
        [y, lse, dq, dk, dv].concat()
    }

    #[test]
    fn instruction_sets_agree_on_attention_and_those_with_fused_multiply_add_to_the_last_bit() {
        assert_levels_agree(results);
    }
}
