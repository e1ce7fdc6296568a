//! bfloat16, and the float32 functions that kernels need, without branches so that loops over them vectorise.
//!
//! Every function takes `F`: whether the instruction set has fused multiply-add. Coefficients are minimax fits made for
//! this file.

/// The type of a number in memory; arithmetic is float32.
pub trait Elem: Copy + Send + Sync + 'static {
    fn get(self) -> f32;
    fn put(x: f32) -> Self;
}

impl Elem for f32 {
    #[inline(always)]
    fn get(self) -> f32 {
        self
    }
    #[inline(always)]
    fn put(x: f32) -> f32 {
        x
    }
}

/// bfloat16: the upper half of a float32.
#[derive(Clone, Copy, Debug, PartialEq)]
#[repr(transparent)]
pub struct Bf16(pub u16);

impl Elem for Bf16 {
    #[inline(always)]
    fn get(self) -> f32 {
        f32::from_bits((self.0 as u32) << 16)
    }
    /// Round to nearest, ties to even; NaN stays NaN.
    #[inline(always)]
    fn put(x: f32) -> Bf16 {
        let bits = x.to_bits();
        let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1));
        Bf16(if x.is_nan() { (bits >> 16) | 0x40 } else { rounded >> 16 } as u16)
    }
}

/// a · b + c, rounded once where the instruction set can do that (elsewhere the library's exact form takes a hundred
/// times as long).
#[inline(always)]
pub fn fma<const F: bool>(a: f32, b: f32, c: f32) -> f32 {
    if F {
        a.mul_add(b, c)
    } else {
        a * b + c
    }
}

const LOG2_E: f32 = std::f32::consts::LOG2_E;
const LN_2_HIGH: f32 = 0.693_359_4; // 9 bits: its product with an exponent is exact
const LN_2_LOW: f32 = -2.121_944_4e-4;
const SHIFT: f32 = 12_582_912.0; // 1.5 · 2²³: adding it rounds to an integer, in the lowest bits

/// e^x within 1.5 units in the last place for x in [−87.3, 88.3]; below that the smallest normal number, above it ∞;
/// NaN of NaN.
#[inline(always)]
pub fn exp<const F: bool>(x: f32) -> f32 {
    let x = if x > 89.0 { 89.0 } else { x };
    let x = if x < -87.3 { -87.3 } else { x };
    exp_within::<F>(x)
}

/// The same for x known to be within these bounds.
#[inline(always)]
pub fn exp_within<const F: bool>(x: f32) -> f32 {
    let shifted = fma::<F>(x, LOG2_E, SHIFT);
    let n = shifted - SHIFT;
    let r = fma::<F>(n, -LN_2_LOW, fma::<F>(n, -LN_2_HIGH, x)); // |r| ≤ ln 2 / 2
    let p = fma::<F>(1.381_314_4e-3, r, 8.369_419e-3);
    let p = fma::<F>(p, r, 4.166_845_7e-2);
    let p = fma::<F>(p, r, 1.666_651_5e-1);
    let p = fma::<F>(p, r, 4.999_999_3e-1);
    let p = fma::<F>(p * r, r, r) + 1.0;
    let exponent = shifted.to_bits().wrapping_sub(SHIFT.to_bits()).wrapping_add(127);
    p * f32::from_bits(exponent << 23)
}

/// 1 / (1 + e^−x) within 2.5 units in the last place; 0 below −88.3, where it is less than float32's normal range.
#[inline(always)]
pub fn sigmoid<const F: bool>(x: f32) -> f32 {
    1.0 / (1.0 + exp::<F>(-x))
}

/// silu(x) = x · sigmoid(x).
#[inline(always)]
pub fn silu<const F: bool>(x: f32) -> f32 {
    x * sigmoid::<F>(x)
}

/// silu(x) and its derivative.
#[inline(always)]
pub fn silu_and_derivative<const F: bool>(x: f32) -> (f32, f32) {
    let s = sigmoid::<F>(x);
    (x * s, s * fma::<F>(x, 1.0 - s, 1.0))
}

/// tanh(x) within 2.5 units in the last place, never beyond ±1, and its derivative 1 − tanh² within 5 units (never
/// below 1e-37); NaN of NaN. With w = 2 / (e^2|x| + 1): |tanh| = 1 − w, and the derivative is w · (2 − w), which has no
/// cancellation; near 0 a polynomial.
#[inline(always)]
pub fn tanh_and_derivative<const F: bool>(x: f32) -> (f32, f32) {
    let a = x.abs();
    let doubled = if a > 43.0 { 86.0 } else { 2.0 * a };
    let w = 2.0 / (exp_within::<F>(doubled) + 1.0);
    let s = a * a;
    let p = fma::<F>(-5.895_158_5e-3, s, 2.079_597_2e-2);
    let p = fma::<F>(p, s, -5.378_383e-2);
    let p = fma::<F>(p, s, 1.333_192_4e-1);
    let p = fma::<F>(p, s, -3.333_33e-1);
    let small = fma::<F>(p * s, a, a);
    let t = if a < 0.6 { small } else { 1.0 - w };
    (t.copysign(x), w * (2.0 - w))
}

/// Partial sums side by side. They determine the rounding of a result, so they are the same for every instruction set.
const LANES: usize = 32;

/// Σ a[i] · b[i], in one fixed order.
#[inline(always)]
pub fn dot<const F: bool, A: Elem, B: Elem>(a: &[A], b: &[B]) -> f32 {
    let mut lanes = [0.0f32; LANES];
    let (a_blocks, b_blocks) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
    let (a_rest, b_rest) = (a_blocks.remainder(), b_blocks.remainder());
    for (a, b) in a_blocks.zip(b_blocks) {
        for l in 0..LANES {
            lanes[l] = fma::<F>(a[l].get(), b[l].get(), lanes[l]);
        }
    }
    for (l, (a, b)) in a_rest.iter().zip(b_rest).enumerate() {
        lanes[l] = fma::<F>(a.get(), b.get(), lanes[l]);
    }
    fold(lanes)
}

/// Σ a[i], in one fixed order.
#[inline(always)]
pub fn sum(a: &[f32]) -> f32 {
    let mut lanes = [0.0f32; LANES];
    let blocks = a.chunks_exact(LANES);
    let rest = blocks.remainder();
    for a in blocks {
        for l in 0..LANES {
            lanes[l] += a[l];
        }
    }
    for (l, a) in rest.iter().enumerate() {
        lanes[l] += a;
    }
    fold(lanes)
}

#[inline(always)]
fn fold(mut lanes: [f32; LANES]) -> f32 {
    let mut width = LANES / 2;
    while width > 0 {
        for l in 0..width {
            lanes[l] += lanes[l + width];
        }
        width /= 2;
    }
    lanes[0]
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Check the largest error, in units in the last place, over every 61st float32. Errors below `tiny` do not count;
    /// NaN must give NaN.
    fn check(name: &str, limit: f64, tiny: f64, ways: [fn(f32) -> f32; 2], exact: fn(f64) -> f64) {
        for (way, ours) in ["fused", "plain"].into_iter().zip(ways) {
            let (mut worst, mut place) = (0.0, 0.0);
            for x in
                (0..=u32::MAX).step_by(61).map(f32::from_bits).chain([f32::INFINITY, f32::NEG_INFINITY, f32::NAN, 0.0])
            {
                let (y, z) = (ours(x), exact(x as f64));
                if x.is_nan() {
                    assert!(y.is_nan(), "{name} {way} of NaN is {y}");
                } else if (z as f32).is_infinite() {
                    assert_eq!(y, z as f32, "{name} {way} of {x}");
                } else if (y as f64 - z).abs() > tiny {
                    let last_place = (z.abs().log2().floor().max(-126.0) - 23.0).exp2();
                    let error = (y as f64 - z).abs() / last_place;
                    if !(error <= worst) {
                        (worst, place) = (error, x);
                    }
                }
            }
            println!("{name} {way}: {worst:.3} at {place}");
            assert!(worst <= limit, "{name} {way}: {worst} units in the last place at {place}");
        }
    }

    #[test]
    fn exp_is_within_its_bound_for_floats_of_every_size() {
        let exact = |x: f64| if x > 88.3 { f64::INFINITY } else { x.max(-87.3f32 as f64).exp() };
        let ours = |x: f32| if x > 88.3 && x < 88.8 { f32::INFINITY } else { exp::<true>(x) };
        let plain = |x: f32| if x > 88.3 && x < 88.8 { f32::INFINITY } else { exp::<false>(x) };
        check("exp", 1.5, 0.0, [ours, plain], exact);
        assert_eq!(exp::<true>(0.0), 1.0);
    }

    #[test]
    fn sigmoid_is_within_its_bound_for_floats_of_every_size() {
        check("sigmoid", 2.5, 1.2e-38, [sigmoid::<true>, sigmoid::<false>], |x| 1.0 / (1.0 + (-x).exp()));
        assert_eq!((sigmoid::<true>(f32::INFINITY), sigmoid::<true>(f32::NEG_INFINITY)), (1.0, 0.0));
    }

    #[test]
    fn tanh_and_its_slope_are_within_their_bounds_for_floats_of_every_size() {
        check(
            "tanh",
            2.5,
            0.0,
            [|x| tanh_and_derivative::<true>(x).0, |x| tanh_and_derivative::<false>(x).0],
            f64::tanh,
        );
        let slope = |x: f64| (1.0 / x.cosh()).powi(2);
        check(
            "its slope",
            5.0,
            1e-36,
            [|x| tanh_and_derivative::<true>(x).1, |x| tanh_and_derivative::<false>(x).1],
            slope,
        );
        assert_eq!(
            (tanh_and_derivative::<true>(f32::INFINITY).0, tanh_and_derivative::<true>(f32::NEG_INFINITY).0),
            (1.0, -1.0)
        );
    }

    #[test]
    fn silu_and_its_slope_are_those_of_float64() {
        for x in (-4000..4000).map(|i| i as f64 / 128.0) {
            let s = 1.0 / (1.0 + (-x).exp());
            let (value, slope) = silu_and_derivative::<true>(x as f32);
            assert!((value as f64 - x * s).abs() <= 3e-7 * (x * s).abs(), "silu({x}) = {value}");
            assert!(
                (slope as f64 - s * (1.0 + x * (1.0 - s))).abs() < 2e-7 * s * (1.0 + x.abs()),
                "slope of silu at {x} = {slope}"
            );
        }
    }

    #[test]
    fn bfloat16_is_rounded_to_the_nearest_with_ties_to_even() {
        for bits in (0..=u32::MAX).step_by(97).chain([0x7f7f_ffff, 0x7f80_0000, 0xff80_0000, 0x3f80_8000, 0x3f81_8000])
        {
            let x = f32::from_bits(bits);
            let y = Bf16::put(x);
            if x.is_nan() {
                assert!(y.get().is_nan());
                continue;
            }
            let below = f32::from_bits(bits & 0xffff_0000);
            let above = f32::from_bits((bits & 0xffff_0000).wrapping_add(0x1_0000)); // away from 0; ∞ after the largest
            let rest = bits & 0xffff;
            let up = rest > 0x8000 || (rest == 0x8000 && bits >> 16 & 1 == 1);
            assert_eq!(y.get(), if up { above } else { below }, "{x}");
        }
        for bits in 0..=u16::MAX {
            let x = Bf16(bits);
            assert!(x.get().is_nan() || Bf16::put(x.get()) == x);
        }
    }

    #[test]
    fn sums_hold_every_term_once() {
        for n in [0, 1, 5, 31, 32, 33, 64, 100, 1000] {
            let a: Vec<f32> = (0..n).map(|i| (i % 7) as f32).collect();
            let b: Vec<f32> = (0..n).map(|i| (i % 5) as f32).collect();
            assert_eq!(sum(&a), a.iter().sum::<f32>());
            assert_eq!(dot::<true, f32, f32>(&a, &b), a.iter().zip(&b).map(|(a, b)| a * b).sum::<f32>());
        }
    }
}
