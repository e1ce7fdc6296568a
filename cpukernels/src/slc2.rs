//! The core of SLC2: u = silu(silu(alpha) ⊗ A) · x, c its causal depthwise convolution along time, y = B · silu(c).
//!
//! Time is split into chunks. Each computes again the few rows of u and of the gradient that it needs from beyond its
//! ends, so that chunks are independent. Within a chunk, tokens are processed in order of time, and `Ring`s keep the
//! last K rows of what is needed again.

use crate::math::{dot, fma, silu, silu_and_derivative, Elem};
use crate::pool::block;
use crate::simd::Kernel;
use crate::view::{AnyView, View};
use std::marker::PhantomData;
use std::ops::Range;

/// Tokens in a chunk.
pub const CHUNK: usize = 64;

/// Shapes: x, B, y (batch, T, E); A (batch, T, D); alpha (batch, T, H); E = H · D; past (batch, K−1, E), oldest first.
#[derive(Clone, Copy)]
pub struct Shape {
    pub T: usize,
    pub H: usize,
    pub D: usize,
    pub K: usize,
}

impl Shape {
    fn E(&self) -> usize {
        self.H * self.D
    }

    /// The number of chunks of a sequence.
    pub fn chunks(&self) -> usize {
        crate::pool::blocks(self.T, CHUNK)
    }

    /// The sequence of the i-th chunk of the batch, and its tokens there.
    fn chunk(&self, i: usize) -> (usize, Range<usize>) {
        (i / self.chunks(), block(i % self.chunks(), CHUNK, self.T))
    }
}

#[derive(Clone, Copy)]
pub struct Inputs {
    pub shape: Shape,
    pub x: View,
    pub B: View,
    pub A: View,
    pub alpha: View,
    /// (K, E), in float32; taps[K − 1] weighs the present token
    pub taps: usize,
    pub past: Option<AnyView>,
}

impl Inputs {
    #[inline(always)]
    fn taps(&self) -> &[f32] {
        // SAFETY: python.rs keeps the taps until the work is done
        unsafe { std::slice::from_raw_parts(self.taps as *const f32, self.shape.K * self.shape.E()) }
    }

    /// Row t < 0 of u: from the past, or zeros.
    #[inline(always)]
    fn before(&self, b: usize, t: isize, u: &mut [f32]) {
        match self.past {
            // SAFETY: the caller has checked that there are K − 1 rows, and t ≥ −(K − 1)
            Some(past) => unsafe { past.read(b, (t + self.shape.K as isize - 1) as usize, u) },
            None => u.fill(0.0),
        }
    }
}

/// The last K rows of a sequence of rows, indexed by time.
struct Ring {
    rows: Vec<f32>,
    K: usize,
    width: usize,
}

impl Ring {
    #[inline(always)]
    fn new(K: usize, width: usize) -> Ring {
        Ring { rows: vec![0.0; K * width], K, width }
    }

    #[inline(always)]
    fn place(&self, t: isize) -> Range<usize> {
        let i = t.rem_euclid(self.K as isize) as usize * self.width;
        i..i + self.width
    }

    #[inline(always)]
    fn row(&self, t: isize) -> &[f32] {
        &self.rows[self.place(t)]
    }

    #[inline(always)]
    fn row_mut(&mut self, t: isize) -> &mut [f32] {
        let place = self.place(t);
        &mut self.rows[place]
    }
}

/// into = Σ_j taps[j] · rows(j)
#[inline(always)]
fn combine<'a, const F: bool>(taps: &[f32], rows: impl Fn(usize) -> &'a [f32], into: &mut [f32]) {
    let E = into.len();
    for (j, taps) in taps.chunks_exact(E).enumerate() {
        let row = &rows(j)[..E];
        if j == 0 {
            for e in 0..E {
                into[e] = taps[e] * row[e];
            }
        } else {
            for e in 0..E {
                into[e] = fma::<F>(taps[e], row[e], into[e]);
            }
        }
    }
}

/// u = silu(silu(alpha) ⊗ A) · x of one token.
#[inline(always)]
fn gated<const F: bool, T: Elem>(x: &[T], A: &[T], alpha: &[T], u: &mut [f32]) {
    let D = A.len();
    for ((x, u), alpha) in x.chunks_exact(D).zip(u.chunks_exact_mut(D)).zip(alpha) {
        let alpha = silu::<F>(alpha.get());
        for ((x, A), u) in x.iter().zip(A).zip(u) {
            *u = silu::<F>(alpha * A.get()) * x.get();
        }
    }
}

/// y = B · silu(c)
#[inline(always)]
fn output<const F: bool, T: Elem>(B: &[T], c: &[f32], y: &mut [T]) {
    for ((B, c), y) in B.iter().zip(c).zip(y) {
        *y = T::put(B.get() * silu::<F>(*c));
    }
}

/// y of all tokens. Items are chunks.
pub struct Forward<T> {
    pub inputs: Inputs,
    pub y: View,
    pub dtype: PhantomData<T>,
}

impl<T: Elem> Kernel for Forward<T> {
    #[inline(always)]
    fn run<const F: bool>(&self, items: Range<usize>) {
        let i = &self.inputs;
        let Shape { H, D, K, .. } = i.shape;
        let E = H * D;
        let mut u = Ring::new(K, E);
        let mut c = vec![0.0f32; E];
        for item in items {
            let (b, tokens) = i.shape.chunk(item);
            for t in tokens.start as isize - (K as isize - 1)..tokens.end as isize {
                if t < 0 {
                    i.before(b, t, u.row_mut(t));
                    continue;
                }
                let at = t as usize;
                // SAFETY: the caller has checked the shapes; no two threads share a chunk
                unsafe { gated::<F, T>(i.x.row(b, at, E), i.A.row(b, at, D), i.alpha.row(b, at, H), u.row_mut(t)) };
                if at >= tokens.start {
                    combine::<F>(i.taps(), |j| u.row(t - (K - 1 - j) as isize), &mut c);
                    unsafe { output::<F, T>(i.B.row(b, at, E), &c, self.y.row_mut(b, at, E)) };
                }
            }
        }
    }
}

/// The decode step: y of one token a sequence. `past`, which is required, is updated in place. Items are sequences.
pub struct Step<T> {
    pub inputs: Inputs,
    pub y: View,
    pub dtype: PhantomData<T>,
}

impl<T: Elem> Kernel for Step<T> {
    #[inline(always)]
    fn run<const F: bool>(&self, items: Range<usize>) {
        let i = &self.inputs;
        let Shape { H, D, K, .. } = i.shape;
        let E = H * D;
        let mut window = vec![0.0f32; K * E];
        let mut c = vec![0.0f32; E];
        for b in items {
            let (before, u) = window.split_at_mut((K - 1) * E);
            for (j, row) in before.chunks_exact_mut(E).enumerate() {
                i.before(b, j as isize - (K as isize - 1), row);
            }
            // SAFETY: the caller has checked the shapes; no two threads share a sequence
            unsafe {
                gated::<F, T>(i.x.row(b, 0, E), i.A.row(b, 0, D), i.alpha.row(b, 0, H), u);
                combine::<F>(i.taps(), |j| &window[j * E..(j + 1) * E], &mut c);
                output::<F, T>(i.B.row(b, 0, E), &c, self.y.row_mut(b, 0, E));
                for (j, row) in window.chunks_exact(E).skip(1).enumerate() {
                    i.past.expect("a decode step has a past").write(b, j, row);
                }
            }
        }
    }
}

/// All gradients. Items are chunks; each writes its part of the gradient of the taps to `dtaps`, (chunks, K, E) in
/// float32.
pub struct Backward<T> {
    pub inputs: Inputs,
    pub dy: View,
    pub dx: View,
    pub dB: View,
    pub dA: View,
    pub dalpha: View,
    pub dtaps: usize,
    pub dpast: Option<AnyView>,
    pub dtype: PhantomData<T>,
}

/// Intermediate results of the last K tokens in the backward pass.
struct Kept {
    u: Ring,
    /// the gate, and x times the derivative of the silu that gives it
    gate: Ring,
    slope: Ring,
    /// silu(alpha) and its derivative, for each head
    alpha: Ring,
    alpha_slope: Ring,
    /// the gradient of c
    dc: Ring,
}

impl<T: Elem> Kernel for Backward<T> {
    #[inline(always)]
    fn run<const F: bool>(&self, items: Range<usize>) {
        let i = &self.inputs;
        let Shape { T: length, H, D, K } = i.shape;
        let E = H * D;
        let ring = |width| Ring::new(K, width);
        let mut kept =
            Kept { u: ring(E), gate: ring(E), slope: ring(E), alpha: ring(H), alpha_slope: ring(H), dc: ring(E) };
        let (mut c, mut du, mut A, mut dA) = (vec![0.0f32; E], vec![0.0f32; E], vec![0.0f32; D], vec![0.0f32; D]);
        let lag = K as isize - 1; // the gradient of a token's u needs that of c of the K − 1 tokens after it
        for item in items {
            let (b, tokens) = i.shape.chunk(item);
            // SAFETY: python.rs allocates such a part for each chunk
            let dtaps = unsafe { std::slice::from_raw_parts_mut((self.dtaps as *mut f32).add(item * K * E), K * E) };
            dtaps.fill(0.0);
            kept.dc.rows.fill(0.0);
            for t in tokens.start as isize - lag..tokens.end as isize + lag {
                let now = t.max(0) as usize;
                if t < 0 {
                    i.before(b, t, kept.u.row_mut(t));
                } else if now < length {
                    // SAFETY (here and below): the caller has checked the shapes; no two threads share a chunk
                    let (x, A, alpha) =
                        unsafe { (i.x.row::<T>(b, now, E), i.A.row::<T>(b, now, D), i.alpha.row::<T>(b, now, H)) };
                    gate::<F, T>(x, A, alpha, &mut kept, t);
                }
                if now >= length {
                    kept.dc.row_mut(t).fill(0.0);
                } else if t >= tokens.start as isize {
                    combine::<F>(i.taps(), |j| kept.u.row(t - lag + j as isize), &mut c);
                    let (B, dy) = unsafe { (i.B.row::<T>(b, now, E), self.dy.row::<T>(b, now, E)) };
                    if now < tokens.end {
                        let dB = unsafe { self.dB.row_mut::<T>(b, now, E) };
                        output_gradients::<F, T>(&c, B, dy, kept.dc.row_mut(t), dB);
                        for (j, dtaps) in dtaps.chunks_exact_mut(E).enumerate() {
                            add_products::<F>(kept.dc.row(t), kept.u.row(t - lag + j as isize), dtaps);
                        }
                    } else {
                        inner_gradient::<F, T>(&c, B, dy, kept.dc.row_mut(t)); // another chunk's token
                    }
                }
                let s = t - lag;
                if s >= tokens.start as isize {
                    combine::<F>(i.taps(), |j| kept.dc.row(t - j as isize), &mut du);
                    let s_at = s as usize;
                    unsafe {
                        crate::view::copy::<T, f32>(i.A.row(b, s_at, D), &mut A);
                        let dx = self.dx.row_mut::<T>(b, s_at, E);
                        let dalpha = self.dalpha.row_mut::<T>(b, s_at, H);
                        gate_gradients::<F, T>(&kept, s, &A, &mut du, dx, &mut dA, dalpha);
                        crate::view::copy::<f32, T>(&dA, self.dA.row_mut(b, s_at, D));
                    }
                } else if let (Some(dpast), true) = (self.dpast, s < 0 && s >= -lag && tokens.start == 0) {
                    combine::<F>(i.taps(), |j| kept.dc.row(t - j as isize), &mut du);
                    unsafe { dpast.write(b, (s + lag) as usize, &du) };
                }
            }
        }
    }
}

#[inline(always)]
fn gate<const F: bool, T: Elem>(x: &[T], A: &[T], alpha: &[T], kept: &mut Kept, t: isize) {
    let D = A.len();
    let (alphas, alpha_slopes) = (kept.alpha.row_mut(t), kept.alpha_slope.row_mut(t));
    for ((from, to), slope) in alpha.iter().zip(alphas.iter_mut()).zip(alpha_slopes) {
        (*to, *slope) = silu_and_derivative::<F>(from.get());
    }
    let (u, gates, slopes) = (kept.u.row_mut(t), kept.gate.row_mut(t), kept.slope.row_mut(t));
    for (h, &mut alpha) in alphas.iter_mut().enumerate() {
        let part = h * D..(h + 1) * D;
        let (x, u, gates, slopes) =
            (&x[part.clone()], &mut u[part.clone()], &mut gates[part.clone()], &mut slopes[part]);
        for d in 0..D {
            let (gate, slope) = silu_and_derivative::<F>(alpha * A[d].get());
            let x = x[d].get();
            u[d] = gate * x;
            gates[d] = gate;
            slopes[d] = slope * x;
        }
    }
}

/// dc = dy · B · silu'(c) and dB = dy · silu(c)
#[inline(always)]
fn output_gradients<const F: bool, T: Elem>(c: &[f32], B: &[T], dy: &[T], dc: &mut [f32], dB: &mut [T]) {
    for ((((c, B), dy), dc), dB) in c.iter().zip(B).zip(dy).zip(dc).zip(dB) {
        let (value, slope) = silu_and_derivative::<F>(*c);
        *dc = dy.get() * B.get() * slope;
        *dB = T::put(dy.get() * value);
    }
}

#[inline(always)]
fn inner_gradient<const F: bool, T: Elem>(c: &[f32], B: &[T], dy: &[T], dc: &mut [f32]) {
    for (((c, B), dy), dc) in c.iter().zip(B).zip(dy).zip(dc) {
        *dc = dy.get() * B.get() * silu_and_derivative::<F>(*c).1;
    }
}

#[inline(always)]
fn add_products<const F: bool>(a: &[f32], b: &[f32], into: &mut [f32]) {
    for ((a, b), into) in a.iter().zip(b).zip(into) {
        *into = fma::<F>(*a, *b, *into);
    }
}

/// The gradients of x, A and alpha from du of token s; du is overwritten with the gradient of silu(alpha) ⊗ A.
#[inline(always)]
fn gate_gradients<const F: bool, T: Elem>(
    kept: &Kept,
    s: isize,
    A: &[f32],
    du: &mut [f32],
    dx: &mut [T],
    dA: &mut [f32],
    dalpha: &mut [T],
) {
    let D = A.len();
    let (gates, slopes) = (kept.gate.row(s), kept.slope.row(s));
    let (alphas, alpha_slopes) = (kept.alpha.row(s), kept.alpha_slope.row(s));
    let dA = &mut dA[..D];
    dA.fill(0.0);
    for (h, dalpha) in dalpha.iter_mut().enumerate() {
        let part = h * D..(h + 1) * D;
        let (gates, slopes) = (&gates[part.clone()], &slopes[part.clone()]);
        let (du, dx) = (&mut du[part.clone()], &mut dx[part]);
        let alpha = alphas[h];
        for d in 0..D {
            dx[d] = T::put(du[d] * gates[d]);
            du[d] *= slopes[d];
            dA[d] = fma::<F>(du[d], alpha, dA[d]);
        }
        *dalpha = T::put(dot::<F, f32, f32>(du, A) * alpha_slopes[h]);
    }
}

/// dtaps (E, K): the sum of the chunks' parts (chunks, K, E), in order, in float64. Items are blocks of SUM_BLOCK
/// columns of (K, E).
pub struct SumTaps {
    pub parts: usize,
    pub count: usize,
    pub E: usize,
    pub K: usize,
    pub dtaps: usize,
}

pub const SUM_BLOCK: usize = 128;

impl Kernel for SumTaps {
    #[inline(always)]
    fn run<const F: bool>(&self, items: Range<usize>) {
        let n = self.K * self.E;
        for item in items {
            let columns = block(item, SUM_BLOCK, n);
            let mut total = [0.0f64; SUM_BLOCK];
            for i in 0..self.count {
                // SAFETY: python.rs gives so many parts, and the output; no two threads share a column
                let part = unsafe {
                    std::slice::from_raw_parts((self.parts as *const f32).add(i * n + columns.start), columns.len())
                };
                for (total, x) in total.iter_mut().zip(part) {
                    *total += *x as f64;
                }
            }
            for (total, at) in total.iter().zip(columns) {
                unsafe { *(self.dtaps as *mut f32).add(at % self.E * self.K + at / self.E) = *total as f32 };
            }
        }
    }
}
