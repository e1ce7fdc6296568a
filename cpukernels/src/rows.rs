//! relu(x)², RMS norm, and rotary positions with the RMS norm behind them; each with its gradient.

use crate::math::{dot, fma, Elem};
use crate::pool::block;
use crate::simd::Kernel;
use crate::view::View;
use std::marker::PhantomData;
use std::ops::Range;

/// Added to the mean of squares: what PyTorch adds to it for float32 and bfloat16 alike.
const EPS: f32 = f32::EPSILON;

/// 1 / √(mean of squares + ε), of the sum of squares.
#[inline(always)]
fn inverse_rms(squares: f32, width: usize) -> f32 {
    1.0 / (squares / width as f32 + EPS).sqrt()
}

/// Elements in an item of `Relu2`.
pub const BLOCK: usize = 4096;

/// y = relu(x)², or with dy its gradient in its place: 2 · dy · relu(x). All contiguous, `n` elements; items are blocks of BLOCK.
pub struct Relu2<T> {
    pub x: usize,
    pub dy: Option<usize>,
    pub y: usize,
    pub n: usize,
    pub dtype: PhantomData<T>,
}

impl<T: Elem> Kernel for Relu2<T> {
    #[inline(always)]
    fn run<const F: bool>(&self, items: Range<usize>) {
        for item in items {
            let part = block(item, BLOCK, self.n);
            let at = |address| View { address, strides: [1, 0] };
            // SAFETY: native.py gives contiguous tensors of n elements; a block is one thread's
            unsafe {
                let x = at(self.x).row::<T>(part.start, 0, part.len());
                let y = at(self.y).row_mut::<T>(part.start, 0, part.len());
                match self.dy {
                    None => forward_relu2(x, y),
                    Some(dy) => backward_relu2(x, at(dy).row::<T>(part.start, 0, part.len()), y),
                }
            }
        }
    }
}

/// relu that keeps a NaN.
#[inline(always)]
fn relu(x: f32) -> f32 {
    if x < 0.0 {
        0.0
    } else {
        x
    }
}

#[inline(always)]
fn forward_relu2<T: Elem>(x: &[T], y: &mut [T]) {
    for (x, y) in x.iter().zip(y) {
        let positive = relu(x.get());
        *y = T::put(positive * positive);
    }
}

#[inline(always)]
fn backward_relu2<T: Elem>(x: &[T], dy: &[T], dx: &mut [T]) {
    for ((x, dy), dx) in x.iter().zip(dy).zip(dx) {
        *dx = T::put(2.0 * dy.get() * relu(x.get()));
    }
}

/// y = x / √(mean x² + ε) of each row, or with dy its gradient in its place. Items are rows.
pub struct RmsNorm<T> {
    pub x: View,
    pub dy: Option<View>,
    pub y: View,
    pub width: usize,
    pub dtype: PhantomData<T>,
}

impl<T: Elem> Kernel for RmsNorm<T> {
    #[inline(always)]
    fn run<const F: bool>(&self, items: Range<usize>) {
        for i in items {
            // SAFETY: native.py gives tensors of so many rows of this width; a row is one thread's
            let (x, y) = unsafe { (self.x.row::<T>(i, 0, self.width), self.y.row_mut::<T>(i, 0, self.width)) };
            match self.dy {
                None => forward_norm::<F, T, T>(x, y),
                Some(dy) => backward_norm::<F, T, T, T>(x, unsafe { dy.row::<T>(i, 0, self.width) }, y),
            }
        }
    }
}

#[inline(always)]
fn forward_norm<const F: bool, A: Elem, B: Elem>(x: &[A], y: &mut [B]) {
    let r = inverse_rms(dot::<F, A, A>(x, x), x.len());
    for (x, y) in x.iter().zip(y) {
        *y = B::put(x.get() * r);
    }
}

/// dx = r · dy − x · r³ · mean(x · dy)
#[inline(always)]
fn backward_norm<const F: bool, A: Elem, B: Elem, C: Elem>(x: &[A], dy: &[B], dx: &mut [C]) {
    let r = inverse_rms(dot::<F, A, A>(x, x), x.len());
    let k = r * r * r * (dot::<F, A, B>(x, dy) / x.len() as f32);
    for ((x, dy), dx) in x.iter().zip(dy).zip(dx) {
        *dx = C::put(fma::<F>(-k, x.get(), r * dy.get()));
    }
}

/// Heads of width D at (b, t), `stride` elements from each to the next.
#[derive(Clone, Copy)]
pub struct Heads {
    pub tokens: View,
    pub stride: isize,
}

impl Heads {
    #[inline(always)]
    pub fn head<T>(&self, h: usize) -> View {
        let address = (self.tokens.address as *mut T).wrapping_offset(self.stride * h as isize) as usize;
        View { address, strides: self.tokens.strides }
    }
}

/// y = the RMS norm of x turned by its position: of pairs (x[d], x[d + D/2]), by the angles of cos and sin (D/2 of float32 at
/// (b, t)). With dy its gradient in its place. Items are the tokens b · `times` + t, each of `heads` heads of `width` D.
pub struct RopeNorm<T> {
    pub x: Heads,
    pub dy: Option<Heads>,
    pub y: Heads,
    pub cos: View,
    pub sin: View,
    pub times: usize,
    pub heads: usize,
    pub width: usize,
    pub dtype: PhantomData<T>,
}

impl<T: Elem> Kernel for RopeNorm<T> {
    #[inline(always)]
    fn run<const F: bool>(&self, items: Range<usize>) {
        let D = self.width;
        let mut turned = vec![0.0f32; D];
        let mut slope = vec![0.0f32; D];
        for item in items {
            let (b, t) = (item / self.times, item % self.times);
            for h in 0..self.heads {
                // SAFETY: native.py gives tensors of these shapes; a token is one thread's
                unsafe {
                    let (cos, sin) = (self.cos.row::<f32>(b, t, D / 2), self.sin.row::<f32>(b, t, D / 2));
                    let y = self.y.head::<T>(h).row_mut::<T>(b, t, D);
                    turn::<F, T, f32>(self.x.head::<T>(h).row(b, t, D), cos, sin, 1.0, &mut turned);
                    match self.dy {
                        None => forward_norm::<F, f32, T>(&turned, y),
                        Some(dy) => {
                            let dy = dy.head::<T>(h).row::<T>(b, t, D);
                            backward_norm::<F, f32, T, f32>(&turned, dy, &mut slope);
                            turn::<F, f32, T>(&slope, cos, sin, -1.0, y);
                        }
                    }
                }
            }
        }
    }
}

/// y1 = x1 · cos + x2 · sin, y2 = x2 · cos − x1 · sin; with `way` −1 back again, which is also the gradient.
#[inline(always)]
fn turn<const F: bool, A: Elem, B: Elem>(x: &[A], cos: &[f32], sin: &[f32], way: f32, y: &mut [B]) {
    let half = x.len() / 2;
    let (x1, x2) = x.split_at(half);
    let (y1, y2) = y.split_at_mut(half);
    let (x2, y2, cos, sin) = (&x2[..half], &mut y2[..half], &cos[..half], &sin[..half]);
    for d in 0..half {
        let (a, b, sin) = (x1[d].get(), x2[d].get(), way * sin[d]);
        y1[d] = B::put(fma::<F>(b, sin, a * cos[d]));
        y2[d] = B::put(fma::<F>(-a, sin, b * cos[d]));
    }
}
