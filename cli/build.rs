//! Finds out what the command is linked with: see src/libraries.rs.

use std::env;
use std::path::Path;
use std::process::Command;

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-env-changed=CC");
    println!("cargo:rustc-check-cfg=cfg(static_unwinder)");
    if env::var("CARGO_CFG_TARGET_ENV").is_ok_and(|env| env == "gnu") && has_static_unwinder() {
        println!("cargo:rustc-cfg=static_unwinder");
    }
}

/// Whether the C compiler, which links, has its unwinder as an archive too. (Asked for what it does not have, it answers the
/// bare name.)
fn has_static_unwinder() -> bool {
    let compiler = env::var("CC").unwrap_or_else(|_| "cc".to_string());
    let found = Command::new(compiler).arg("-print-file-name=libgcc_eh.a").output();
    found.is_ok_and(|found| Path::new(String::from_utf8_lossy(&found.stdout).trim()).is_absolute())
}
