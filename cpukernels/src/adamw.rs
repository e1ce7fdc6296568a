//! AdamW's update of float32 weights and their state.

use crate::math::fma;
use crate::pool::block;
use crate::simd::Kernel;
use crate::view::View;
use std::ops::Range;

/// Elements in an item of `AdamW`.
pub const BLOCK: usize = 4096;

/// What a step multiplies by; nanochat/kernels/adamw explains them. `kept` is what weight decay leaves of a weight.
#[derive(Clone, Copy)]
pub struct Factors {
    pub scale: f32,
    pub weight: f32,
    pub decay: f32,
    pub square_weight: f32,
    pub of_root: f32,
    pub eps: f32,
    pub of_mean: f32,
    pub rate: f32,
    pub kept: f32,
}

/// All are contiguous, of `n` elements; the weights, `mean` and `square` are updated. Items are blocks of BLOCK elements.
pub struct AdamW {
    pub weights: usize,
    pub gradient: usize,
    pub mean: usize,
    pub square: usize,
    pub n: usize,
    pub by: Factors,
}

impl Kernel for AdamW {
    #[inline(always)]
    fn run<const F: bool>(&self, items: Range<usize>) {
        for item in items {
            let part = block(item, BLOCK, self.n);
            let at = |address| View { address, strides: [1, 0] };
            // SAFETY: the caller has checked that all have n contiguous elements; no two threads share a block
            unsafe {
                update::<F>(
                    at(self.weights).row_mut(part.start, 0, part.len()),
                    at(self.gradient).row(part.start, 0, part.len()),
                    at(self.mean).row_mut(part.start, 0, part.len()),
                    at(self.square).row_mut(part.start, 0, part.len()),
                    &self.by,
                )
            }
        }
    }
}

/// Every step rounds as torch's operations do, one after the other.
#[inline(always)]
fn update<const F: bool>(weights: &mut [f32], gradient: &[f32], mean: &mut [f32], square: &mut [f32], by: &Factors) {
    let by = *by;
    for (((w, g), m), s) in weights.iter_mut().zip(gradient).zip(mean).zip(square) {
        let g = g * by.scale;
        *m = if by.weight < 0.5 { fma::<F>(by.weight, g - *m, *m) } else { fma::<F>(*m - g, 1.0 - by.weight, g) };
        *s = fma::<F>(by.square_weight * g, g, *s * by.decay);
        let root = s.sqrt() * by.of_root + by.eps;
        *w = *w * by.kept - *m / root * by.of_mean * by.rate;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simd::{assert_levels_agree, run_at};

    #[test]
    fn instruction_sets_agree() {
        let n = 3 * BLOCK + 17;
        let numbers = |seed: usize| (0..n).map(|i| ((i * seed) % 1009) as f32 / 504.5 - 1.0).collect::<Vec<f32>>();
        assert_levels_agree(|level| {
            let (mut weights, gradient, mut mean) = (numbers(7919), numbers(6007), numbers(4001));
            let mut square: Vec<f32> = numbers(3001).iter().map(|x| x * x).collect();
            let kernel = AdamW {
                weights: weights.as_mut_ptr() as usize,
                gradient: gradient.as_ptr() as usize,
                mean: mean.as_mut_ptr() as usize,
                square: square.as_mut_ptr() as usize,
                n,
                by: Factors {
                    scale: 0.5,
                    weight: 0.2,
                    decay: 0.95,
                    square_weight: 0.05,
                    of_root: 1.5,
                    eps: 1e-10,
                    of_mean: 2.0,
                    rate: 0.01,
                    kept: 0.999,
                },
            };
            run_at(level, &kernel, 0..4);
            [weights, mean, square].concat()
        });
    }
}
