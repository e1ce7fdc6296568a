//! Byte-level BPE: training of merges and encoding of texts, as the Python module `rustbpe`.
//!
//! A text is split into pieces (`split`). Training counts distinct pieces (`count`) and merges pairs inside them
//! (`train`). Encoding looks pieces up or merges their bytes (`vocab`, `encode`). `python` is the interface to Python;
//! without the feature of that name the crate is plain Rust. Build: `maturin build --release`; test: `cargo test
//! --release`.

pub mod count;
pub mod encode;
pub mod key;
pub mod pool;
#[cfg(feature = "python")]
mod python;
pub mod split;
pub mod train;
pub mod unicode;
pub mod vocab;
