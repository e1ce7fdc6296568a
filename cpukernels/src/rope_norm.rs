//! Rotary positions followed by the RMS norm of each head, and the gradient.

use crate::math::{fma, Elem};
use crate::rms_norm::{backward_norm, forward_norm};
use crate::simd::Kernel;
use crate::view::{Heads, View};
use std::marker::PhantomData;
use std::ops::Range;

/// Without dy: y is the RMS norm of each head of x after the rotation of its pairs (x[d], x[d + D/2]) by the angles of
/// the position; cos and sin have D/2 float32 at (b, t). With dy: y is the gradient of x instead. Items are the tokens
/// b · T + t, each of H heads of width D.
pub struct RopeNorm<E> {
    pub x: Heads,
    pub dy: Option<Heads>,
    pub y: Heads,
    pub cos: View,
    pub sin: View,
    pub T: usize,
    pub H: usize,
    pub D: usize,
    pub dtype: PhantomData<E>,
}

impl<E: Elem> Kernel for RopeNorm<E> {
    #[inline(always)]
    fn run<const F: bool>(&self, items: Range<usize>) {
        let D = self.D;
        let mut rotated = vec![0.0f32; D];
        let mut slope = vec![0.0f32; D];
        for item in items {
            let (b, t) = (item / self.T, item % self.T);
            for h in 0..self.H {
                // SAFETY: the caller has checked the shapes; no two threads share a token
                unsafe {
                    let (cos, sin) = (self.cos.row::<f32>(b, t, D / 2), self.sin.row::<f32>(b, t, D / 2));
                    let y = self.y.head::<E>(h).row_mut::<E>(b, t, D);
                    rotate::<F, E, f32>(self.x.head::<E>(h).row(b, t, D), cos, sin, 1.0, &mut rotated);
                    match self.dy {
                        None => forward_norm::<F, f32, E>(&rotated, y),
                        Some(dy) => {
                            let dy = dy.head::<E>(h).row::<E>(b, t, D);
                            backward_norm::<F, f32, E, f32>(&rotated, dy, &mut slope);
                            rotate::<F, f32, E>(&slope, cos, sin, -1.0, y);
                        }
                    }
                }
            }
        }
    }
}

/// y1 = x1 · cos + x2 · sin, y2 = x2 · cos − x1 · sin. `sign` −1 rotates back, which is also the gradient.
#[inline(always)]
fn rotate<const F: bool, A: Elem, B: Elem>(x: &[A], cos: &[f32], sin: &[f32], sign: f32, y: &mut [B]) {
    let half = x.len() / 2;
    let (x1, x2) = x.split_at(half);
    let (y1, y2) = y.split_at_mut(half);
    let (x2, y2, cos, sin) = (&x2[..half], &mut y2[..half], &cos[..half], &sin[..half]);
    for d in 0..half {
        let (a, b, sin) = (x1[d].get(), x2[d].get(), sign * sin[d]);
        y1[d] = B::put(fma::<F>(b, sin, a * cos[d]));
        y2[d] = B::put(fma::<F>(-a, sin, b * cos[d]));
    }
}
