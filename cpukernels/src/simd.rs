//! One source, several instruction sets: a kernel's body is inlined into one function for each of them, and the processor at hand
//! picks. On aarch64 the baseline already has what the loops want (NEON, fused multiply-add).

use std::ops::Range;

/// Work on rows or blocks, each of which can be done alone.
pub trait Kernel: Sync {
    /// Do these items. To be `#[inline(always)]`, as all it calls: what is not inlined is compiled for the baseline.
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

/// What this processor has, best last.
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

/// Do these items with the instructions of a level, which is one of `levels()`.
pub fn run_at<K: Kernel>(level: Level, kernel: &K, items: Range<usize>) {
    match level {
        Level::Base => kernel.run::<{ cfg!(any(target_arch = "aarch64", target_feature = "fma")) }>(items),
        // SAFETY: `levels` found these instructions here
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
