//! Attention, and the elementwise parts of training and decoding, on a CPU, each in one pass over memory, as the Python module
//! `cpukernels`.
//!
//! `math` has the numbers (bfloat16, exp, tanh, sigmoid), `simd` compiles a kernel once for each instruction set, `pool` shares
//! its rows out to torch's own threads. `rows`, `slc2`, `softcap`, `attention` and `one_query` are the kernels; `python` hands them
//! addresses and strides, which nanochat/kernels/native.py has checked. Without the feature `python` the crate is plain Rust.
//!
//! What holds for every kernel: arithmetic is float32 and rounded once on the way out; the result of a row depends neither on
//! the rows beside it nor on the number of threads.

#![allow(non_snake_case)] // B, T, E, H, D, K as everywhere in this project

pub mod attention;
pub mod math;
pub mod one_query;
pub mod pool;
#[cfg(feature = "python")]
mod python;
pub mod rows;
pub mod simd;
pub mod slc2;
pub mod softcap;
pub mod view;
