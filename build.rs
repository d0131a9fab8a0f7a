//! Generates the C header from `src/ffi`, and gives the shared library its soname.

use std::path::Path;
use std::{env, fs};

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-changed=cbindgen.toml");
    println!("cargo:rerun-if-changed=src/ffi");

    // The number changes when the ABI breaks, and only then.
    println!("cargo:rustc-cdylib-link-arg=-Wl,-soname,libnblock.so.0");
    // The library's threads run its code: it stays mapped after dlclose.
    println!("cargo:rustc-cdylib-link-arg=-Wl,-z,nodelete");

    let root = env::var("CARGO_MANIFEST_DIR").expect("cargo names the package's directory");
    let out = env::var("OUT_DIR").expect("cargo names a directory for output");
    let config = cbindgen::Config::from_file(Path::new(&root).join("cbindgen.toml")).expect("cbindgen.toml is read");
    let mut builder = cbindgen::Builder::new().with_config(config);
    // In the order in which the header is read.
    for file in ["error", "handle", "text", "options", "client", "lock", "op", "list", "log"] {
        builder = builder.with_src(Path::new(&root).join(format!("src/ffi/{file}.rs")));
    }
    let mut header = Vec::new();
    builder.generate().expect("src/ffi is what cbindgen can read").write(&mut header);
    let header = String::from_utf8(header).expect("the header is UTF-8");
    let header: String = header.lines().map(|line| parenthesized(line) + "\n").collect();
    fs::write(Path::new(&out).join("nblock.h"), header).expect("the header is written");
    // Where to find it: `make header` copies it, and a test compares it with the committed one.
    println!("cargo:rustc-env=NBLOCK_GENERATED_HEADER={out}/nblock.h");
}

/// A negative constant gets parentheses, which cbindgen leaves out: `x NBL_OFF` must not compile as a subtraction.
fn parenthesized(line: &str) -> String {
    match line.strip_prefix("#define ").and_then(|rest| rest.split_once(' ')) {
        Some((name, value)) if value.starts_with('-') => format!("#define {name} ({value})"),
        _ => line.to_string(),
    }
}
