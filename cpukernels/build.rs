//! `#[target_feature]` accepts AVX-512 from Rust 1.89 on; an older compiler builds the crate without it.

use std::process::Command;

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    let rustc = std::env::var("RUSTC").unwrap_or_else(|_| "rustc".into());
    let version =
        Command::new(rustc).arg("--version").output().map(|o| String::from_utf8_lossy(&o.stdout).into_owned());
    let minor = version.ok().and_then(|v| v.split('.').nth(1)?.parse::<u32>().ok());
    if minor.unwrap_or(0) >= 89 {
        println!("cargo:rustc-cfg=avx512");
    }
}
