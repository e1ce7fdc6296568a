//! One source for several instruction sets: a kernel's body is inlined into one function for each, and the best that
//! the CPU has is called. On aarch64 the baseline already has NEON and fused multiply-add.

use std::ops::Range;

/// Work on items (rows or blocks) that are independent of each other.
pub trait Kernel: Sync {
    /// Do these items; F says whether there is fused multiply-add. Must be `#[inline(always)]`, as must all that it
    /// calls: a function that is not inlined is compiled for the baseline.
    fn run<const F: bool>(&self, items: Range<usize>);
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Level {
    Base,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(all(target_arch = "x86_64", avx512))]
    Avx512,
}

/// The levels that this CPU has, the best last.
pub fn levels() -> Vec<Level> {
    let mut levels = vec![Level::Base];
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
        levels.push(Level::Avx2);
        #[cfg(avx512)]
        if is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vl")
        {
            levels.push(Level::Avx512);
        }
    }
    levels
}

pub fn best() -> Level {
    static BEST: std::sync::OnceLock<Level> = std::sync::OnceLock::new();
    *BEST.get_or_init(|| *levels().last().expect("the baseline"))
}

/// Do these items with the instructions of a level, one of `levels()`.
pub fn run_at<K: Kernel>(level: Level, kernel: &K, items: Range<usize>) {
    match level {
        Level::Base => kernel.run::<{ cfg!(any(target_arch = "aarch64", target_feature = "fma")) }>(items),
        // SAFETY: `levels` has found that the CPU has these instructions
        #[cfg(target_arch = "x86_64")]
        Level::Avx2 => unsafe { run_avx2(kernel, items) },
        #[cfg(all(target_arch = "x86_64", avx512))]
        Level::Avx512 => unsafe { run_avx512(kernel, items) },
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
unsafe fn run_avx2<K: Kernel>(kernel: &K, items: Range<usize>) {
    kernel.run::<true>(items)
}

#[cfg(all(target_arch = "x86_64", avx512))]
#[target_feature(enable = "avx2,fma,avx512f,avx512bw,avx512dq,avx512vl")]
unsafe fn run_avx512<K: Kernel>(kernel: &K, items: Range<usize>) {
    kernel.run::<true>(items)
}

/// For tests: every level gives the baseline's results up to rounding, and those with fused multiply-add give the same
/// bits.
#[cfg(test)]
pub(crate) fn assert_levels_agree(results: impl Fn(Level) -> Vec<f32>) {
    let base = results(Level::Base);
    assert!(base.iter().all(|x| x.is_finite()));
    let mut fused: Option<Vec<u32>> = None;
    for level in levels().into_iter().skip(1) {
        let ours = results(level);
        for (a, b) in ours.iter().zip(&base) {
            assert!((a - b).abs() <= 2e-5 * (1.0 + b.abs()), "{level:?}: {a} and {b}");
        }
        let bits: Vec<u32> = ours.iter().map(|x| x.to_bits()).collect();
        assert!(fused.as_ref().map_or(true, |other| *other == bits), "{level:?} differs");
        fused = Some(bits);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cross_entropy::SoftcappedCrossEntropy;
    use crate::slc2::{Backward, Inputs, Shape};
    use crate::view::View;
    use std::marker::PhantomData;

    fn numbers(n: usize, scale: f32) -> Vec<f32> {
        (0..n).map(|i| scale * ((i * 7919 % 1009) as f32 / 504.5 - 1.0)).collect()
    }

    fn rows(t: &mut [f32], length: usize, width: usize) -> View {
        View { address: t.as_mut_ptr() as usize, strides: [(length * width) as isize, width as isize] }
    }

    /// Losses and gradients of 3 rows, and all gradients of two short sequences.
    fn results(level: Level) -> Vec<f32> {
        let (n, vocab) = (3, 1301);
        let (mut z, targets, mut losses) = (numbers(n * vocab, 40.0), [5i64, -1, 1300], vec![f32::NAN; n]);
        let cross_entropy = SoftcappedCrossEntropy::<f32> {
            z: rows(&mut z, 1, vocab),
            targets: targets.as_ptr() as usize,
            factors: None,
            losses: losses.as_mut_ptr() as usize,
            vocab,
            grad: true,
            dtype: PhantomData,
        };
        run_at(level, &cross_entropy, 0..n);
        let shape = Shape { T: 9, H: 2, D: 37, K: 3 };
        let (T, E) = (shape.T, shape.H * shape.D);
        let (mut x, mut B, mut dy) = (numbers(2 * T * E, 2.0), numbers(2 * T * E, 1.5), numbers(2 * T * E, 1.0));
        let (mut A, mut alpha, taps) =
            (numbers(2 * T * shape.D, 3.0), numbers(2 * T * shape.H, 2.0), numbers(3 * E, 1.0));
        let mut outputs =
            [2 * T * E, 2 * T * E, 2 * T * shape.D, 2 * T * shape.H, 2 * 3 * E].map(|n| vec![f32::NAN; n]);
        let inputs = Inputs {
            shape,
            x: rows(&mut x, T, E),
            B: rows(&mut B, T, E),
            A: rows(&mut A, T, shape.D),
            alpha: rows(&mut alpha, T, shape.H),
            taps: taps.as_ptr() as usize,
            past: None,
        };
        let backward = Backward::<f32> {
            inputs,
            dy: rows(&mut dy, T, E),
            dx: rows(&mut outputs[0], T, E),
            dB: rows(&mut outputs[1], T, E),
            dA: rows(&mut outputs[2], T, shape.D),
            dalpha: rows(&mut outputs[3], T, shape.H),
            dtaps: outputs[4].as_mut_ptr() as usize,
            dpast: None,
            dtype: PhantomData,
        };
        run_at(level, &backward, 0..2);
        [z, losses].into_iter().chain(outputs).flatten().collect()
    }

    #[test]
    fn instruction_sets_agree_and_those_with_fused_multiply_add_to_the_last_bit() {
        assert_levels_agree(results);
    }
}
