//! RMS norm and its gradient.

use crate::math::{dot, fma, Elem};
use crate::simd::Kernel;
use crate::view::View;
use std::marker::PhantomData;
use std::ops::Range;

/// ε, added to the mean of squares: PyTorch's default, the same for float32 and bfloat16.
const EPS: f32 = f32::EPSILON;

/// 1 / √(mean of squares + ε), from the sum of squares.
#[inline(always)]
fn inverse_rms(squares: f32, width: usize) -> f32 {
    1.0 / (squares / width as f32 + EPS).sqrt()
}

/// Without dy: y = x / √(mean x² + ε) of each row. With dy: y is the gradient of x instead. Items are rows.
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
            // SAFETY: the caller has checked the shapes; no two threads share a row
            let (x, y) = unsafe { (self.x.row::<T>(i, 0, self.width), self.y.row_mut::<T>(i, 0, self.width)) };
            match self.dy {
                None => forward_norm::<F, T, T>(x, y),
                Some(dy) => backward_norm::<F, T, T, T>(x, unsafe { dy.row::<T>(i, 0, self.width) }, y),
            }
        }
    }
}

#[inline(always)]
pub fn forward_norm<const F: bool, A: Elem, B: Elem>(x: &[A], y: &mut [B]) {
    let r = inverse_rms(dot::<F, A, A>(x, x), x.len());
    for (x, y) in x.iter().zip(y) {
        *y = B::put(x.get() * r);
    }
}

/// dx = r · dy − x · r³ · mean(x · dy)
#[inline(always)]
pub fn backward_norm<const F: bool, A: Elem, B: Elem, C: Elem>(x: &[A], dy: &[B], dx: &mut [C]) {
    let r = inverse_rms(dot::<F, A, A>(x, x), x.len());
    let k = r * r * r * (dot::<F, A, B>(x, dy) / x.len() as f32);
    for ((x, dy), dx) in x.iter().zip(dy).zip(dx) {
        *dx = C::put(fma::<F>(-k, x.get(), r * dy.get()));
    }
}
