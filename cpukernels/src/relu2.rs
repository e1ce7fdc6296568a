//! relu(x)² and its gradient.

use crate::math::Elem;
use crate::pool::block;
use crate::simd::Kernel;
use crate::view::View;
use std::marker::PhantomData;
use std::ops::Range;

/// Elements in an item of `Relu2`.
pub const BLOCK: usize = 4096;

/// Without dy: y = relu(x)². With dy: y is the gradient of x instead, 2 · dy · relu(x). All are contiguous, of `n`
/// elements. Items are blocks of BLOCK elements.
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
            // SAFETY: the caller has checked that all have n contiguous elements; no two threads share a block
            unsafe {
                let x = at(self.x).row::<T>(part.start, 0, part.len());
                let y = at(self.y).row_mut::<T>(part.start, 0, part.len());
                match self.dy {
                    None => forward(x, y),
                    Some(dy) => backward(x, at(dy).row::<T>(part.start, 0, part.len()), y),
                }
            }
        }
    }
}

/// relu; the relu of NaN is NaN.
#[inline(always)]
fn relu(x: f32) -> f32 {
    if x < 0.0 {
        0.0
    } else {
        x
    }
}

#[inline(always)]
fn forward<T: Elem>(x: &[T], y: &mut [T]) {
    for (x, y) in x.iter().zip(y) {
        let positive = relu(x.get());
        *y = T::put(positive * positive);
    }
}

#[inline(always)]
fn backward<T: Elem>(x: &[T], dy: &[T], dx: &mut [T]) {
    for ((x, dy), dx) in x.iter().zip(dy).zip(dx) {
        *dx = T::put(2.0 * dy.get() * relu(x.get()));
    }
}
