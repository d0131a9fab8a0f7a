//! Versions of the interface and of the library.

use std::ffi::c_char;

/// The version of the interface that this header declares. It grows with every addition. A library
/// with the same soname and an equal or larger version has everything that is declared here.
pub const NBL_ABI_VERSION: u32 = 1;

/// Returns the version of the interface that the library has.
///
/// Does not wait.
///
/// @return The NBL_ABI_VERSION that the library was built with.
#[must_use]
#[unsafe(no_mangle)]
pub extern "C" fn nbl_abi_version() -> u32 {
    NBL_ABI_VERSION
}

/// Returns the version of the library.
///
/// Does not wait.
///
/// @return The version, such as "0.1.0". The text is static: do not free it.
#[must_use]
#[unsafe(no_mangle)]
pub extern "C" fn nbl_version() -> *const c_char {
    const VERSION: &str = concat!(env!("CARGO_PKG_VERSION"), "\0");
    VERSION.as_ptr().cast()
}
