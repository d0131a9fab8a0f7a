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
    let ffi = Path::new(&root).join("src/ffi");
    let config = cbindgen::Config::from_file(Path::new(&root).join("cbindgen.toml")).expect("cbindgen.toml is read");
    let template = fs::read_to_string(ffi.join("nblock.h.in")).expect("src/ffi/nblock.h.in is read");
    let mut header = String::new();
    for line in template.lines() {
        match line.strip_prefix('%').and_then(|rest| rest.strip_suffix('%')) {
            Some(file) => header += &declarations(&config, &ffi.join(file).with_extension("rs")),
            None => header = header + line + "\n",
        }
    }
    fs::write(Path::new(&out).join("nblock.h"), header).expect("the header is written");
    // Where to find it: `make header` copies it, and a test compares it with the committed one.
    println!("cargo:rustc-env=NBLOCK_GENERATED_HEADER={out}/nblock.h");
}

/// What one file of `src/ffi` declares. Each is read alone, so that a section of the header has what is in its file.
fn declarations(config: &cbindgen::Config, file: &Path) -> String {
    let mut written = Vec::new();
    let builder = cbindgen::Builder::new().with_config(config.clone()).with_src(file);
    builder.generate().expect("src/ffi is what cbindgen can read").write(&mut written);
    let text = String::from_utf8(written).expect("the header is UTF-8");
    text.trim().lines().map(|line| as_c_has_it(line) + "\n").collect()
}

/// A negative constant gets parentheses, which cbindgen leaves out: `x NBL_OFF` must not compile as a subtraction. A
/// type has the name that its typedef gives it.
fn as_c_has_it(line: &str) -> String {
    match line.strip_prefix("#define ").and_then(|rest| rest.split_once(' ')) {
        Some((name, value)) if value.starts_with('-') => format!("#define {name} ({value})"),
        _ if line.starts_with("typedef struct ") => line.to_string(),
        _ => line.replace("struct nbl_", "nbl_"),
    }
}
