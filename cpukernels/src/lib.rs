//! The CPU kernels of Liquid-Time nanochat, each in one pass over memory, as the Python module `cpukernels`.
//!
//! One file an operation, named as in nanochat/kernels: `adamw`, `attention`, `cross_entropy`, `decode_attention`,
//! `relu2`, `rms_norm`, `rope_norm`, `slc2`. `math` has bfloat16, exp, tanh and sigmoid; `simd` compiles a kernel once for each
//! instruction set; `pool` distributes its items over torch's threads; `view` describes tensors. `python` receives
//! addresses and strides that nanochat/kernels has checked. Without the feature `python` the crate is plain Rust.
//!
//! For every kernel: arithmetic is float32, rounded once when a result is written; the result of a row depends neither
//! on the other rows nor on the number of threads.

#![allow(non_snake_case)] // B, T, E, H, D, K as everywhere in this project

pub mod adamw;
pub mod attention;
pub mod cross_entropy;
pub mod decode_attention;
pub mod math;
pub mod pool;
#[cfg(feature = "python")]
mod python;
pub mod relu2;
pub mod rms_norm;
pub mod rope_norm;
pub mod simd;
pub mod slc2;
pub mod view;
