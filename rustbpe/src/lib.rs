//! Byte-level BPE: learning the merges of a text and turning texts into token ids, as the Python module `rustbpe`.
//!
//! The way of the data: a text is cut into pieces (`split`), training counts distinct pieces (`count`) and merges pairs inside
//! them (`train`); encoding looks pieces up or merges their bytes (`vocab`, `encode`). `python` is the thin layer to Python;
//! without the feature of that name the crate is plain Rust. Build: `maturin build --release`; test: `cargo test --release`.

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
