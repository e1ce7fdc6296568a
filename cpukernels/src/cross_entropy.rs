//! Cross-entropy of softcapped logits, c = 15 · tanh(z / 15): the losses, and the gradient, which overwrites the
//! logits.

use crate::math::{exp_within, sum, tanh_and_derivative, Elem};
use crate::simd::Kernel;
use crate::view::View;
use std::marker::PhantomData;
use std::ops::Range;

pub const SOFTCAP: f32 = 15.0;
pub const IGNORE: i64 = -1;
/// Exponentials are summed in float32 within a block of so many elements, and blocks in float64.
const BLOCK: usize = 512;

/// losses[i] = log Σ_v e^c[v] − c[target], or 0 where the target is IGNORE. With `grad`, z is overwritten with
/// factor · d loss / d z = factor · (e^c / Σ − [v = target]) · (1 − tanh²), or zeros where the target is IGNORE.
/// The value at the target, one a row, is computed in float64. No maximum is subtracted: c is within ±15, so that
/// neither e^c nor its sum can overflow. Items are rows.
pub struct SoftcappedCrossEntropy<T> {
    pub z: View,
    pub targets: usize,
    pub factors: Option<usize>,
    pub losses: usize,
    pub vocab: usize,
    pub grad: bool,
    pub dtype: PhantomData<T>,
}

impl<T: Elem> Kernel for SoftcappedCrossEntropy<T> {
    #[inline(always)]
    fn run<const F: bool>(&self, items: Range<usize>) {
        let mut slopes = vec![0.0f32; if self.grad { self.vocab } else { BLOCK }];
        for i in items {
            // SAFETY: the caller has checked that there are n rows, targets, factors and losses, and that targets are
            // in the vocabulary; no two threads share a row
            unsafe {
                let target = *(self.targets as *const i64).add(i);
                let factor = self.factors.map_or(1.0, |factors| *(factors as *const f32).add(i));
                let loss = (self.losses as *mut f32).add(i);
                if target == IGNORE {
                    *loss = 0.0;
                    if self.grad {
                        self.z.row_mut::<T>(i, 0, self.vocab).fill(T::put(0.0));
                    }
                    continue;
                }
                let target = target as usize;
                let z = self.z.row::<T>(i, 0, self.vocab);
                let at_target = (z[target].get() as f64 / SOFTCAP as f64).tanh();
                let capped = SOFTCAP as f64 * at_target;
                let total = if self.grad {
                    exponentials::<F, T, true>(z, &mut slopes)
                } else {
                    exponentials::<F, T, false>(z, &mut slopes)
                };
                *loss = (total.ln() - capped) as f32;
                if self.grad {
                    let scale = (factor as f64 / total) as f32;
                    let dz = self.z.row_mut::<T>(i, 0, self.vocab);
                    for (dz, slope) in dz.iter_mut().zip(&slopes) {
                        *dz = T::put(slope * scale);
                    }
                    let there = (capped.exp() / total - 1.0) * (1.0 - at_target * at_target);
                    dz[target] = T::put((there * factor as f64) as f32);
                }
            }
        }
    }
}

/// Σ e^c over a row; with KEEP also e^c · (1 − tanh²) of each element, into `slopes`.
#[inline(always)]
fn exponentials<const F: bool, T: Elem, const KEEP: bool>(z: &[T], slopes: &mut [f32]) -> f64 {
    let mut total = 0.0f64;
    let mut part = [0.0f32; BLOCK];
    for (i, z) in z.chunks(BLOCK).enumerate() {
        let part = &mut part[..z.len()];
        if KEEP {
            let slopes = &mut slopes[i * BLOCK..][..z.len()];
            for ((z, e), slope) in z.iter().zip(part.iter_mut()).zip(slopes) {
                let (t, derivative) = tanh_and_derivative::<F>(z.get() * (1.0 / SOFTCAP));
                *e = exp_within::<F>(SOFTCAP * t);
                *slope = *e * derivative;
            }
        } else {
            for (z, e) in z.iter().zip(part.iter_mut()) {
                *e = exp_within::<F>(SOFTCAP * tanh_and_derivative::<F>(z.get() * (1.0 / SOFTCAP)).0);
            }
        }
        total += sum(part) as f64;
    }
    total
}
