//! Has the module export nothing but its entry point.

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    // The C functions come in through an archive, whose symbols would be exported as well: a host program
    // with a libnblock of its own could then take the place of ours. (Under LTO there is no archive any
    // more: the release profile goes without.)
    println!("cargo:rustc-cdylib-link-arg=-Wl,--exclude-libs,ALL");
    // The library's threads run this code: it stays mapped.
    println!("cargo:rustc-cdylib-link-arg=-Wl,-z,nodelete");
}
