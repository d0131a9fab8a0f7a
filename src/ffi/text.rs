//! Text that is passed between C and Rust.

use std::ffi::{CStr, CString, c_char};

use super::error::Failure;
use super::out::out_given;
use super::status::{NBL_ERR_BUFFER_TOO_SMALL, NBL_OK, nbl_status_t};

/// As a length: the text is NUL-terminated.
pub const NBL_CSTR: usize = usize::MAX;

/// The bytes of a caller's text. `what` names it in messages.
///
/// # Safety
/// `text` is NULL, or points to `length` bytes, or, with NBL_CSTR, to a NUL-terminated text. If `length` exceeds
/// `longest`, nothing is read.
pub(crate) unsafe fn bytes<'a>(
    text: *const c_char,
    length: usize,
    longest: usize,
    what: &str,
) -> Result<&'a [u8], Failure> {
    if text.is_null() {
        return Err(Failure::invalid_argument(format!("{what} must not be NULL")));
    }
    if length == NBL_CSTR {
        // SAFETY: guaranteed by the caller (see "Safety").
        return Ok(unsafe { CStr::from_ptr(text) }.to_bytes());
    }
    if length > longest {
        return Err(Failure::invalid_argument(format!("{what} must have at most {longest} bytes (got {length})")));
    }
    // SAFETY: guaranteed by the caller (see "Safety").
    Ok(unsafe { std::slice::from_raw_parts(text.cast(), length) })
}

/// A caller's NUL-terminated text; `None` for NULL.
///
/// # Safety
/// `text` is NULL or points to a NUL-terminated text.
pub(crate) unsafe fn optional<'a>(text: *const c_char, what: &str) -> Result<Option<&'a str>, Failure> {
    if text.is_null() {
        return Ok(None);
    }
    // SAFETY: guaranteed by the caller (see "Safety").
    let bytes = unsafe { CStr::from_ptr(text) }.to_bytes();
    match std::str::from_utf8(bytes) {
        Ok(text) => Ok(Some(text)),
        Err(error) => Err(Failure::invalid_argument(format!(
            "{what} must be UTF-8 (got {:?}, with an invalid byte at offset {})",
            String::from_utf8_lossy(&bytes[..bytes.len().min(64)]),
            error.valid_up_to()
        ))),
    }
}

/// A NUL-terminated text for C. A NUL inside the text is replaced by `\0`.
pub(crate) fn terminated(text: &str) -> CString {
    CString::new(text.replace('\0', "\\0")).unwrap_or_default()
}

/// Copies a text into the caller's buffer, NUL-terminated, and reports how many bytes it needs, including its NUL. If
/// the buffer is too small, nothing is copied.
///
/// # Safety
/// `buffer` is NULL or has `size` bytes; `needed` is NULL or may be written.
pub(crate) unsafe fn copy(
    text: &str,
    buffer: *mut c_char,
    size: usize,
    needed: *mut usize,
) -> Result<nbl_status_t, Failure> {
    if !needed.is_null() {
        out_given(needed)?;
        // SAFETY: guaranteed by the caller (see "Safety").
        unsafe { needed.write(text.len() + 1) };
    }
    if buffer.is_null() && size == 0 {
        // Only the size was requested.
        return Ok(NBL_OK);
    }
    if buffer.is_null() {
        return Err(Failure::invalid_argument(format!("buffer must have buffer_size bytes (got NULL and {size})")));
    }
    if size < text.len() + 1 {
        return Err(Failure {
            status: NBL_ERR_BUFFER_TOO_SMALL,
            message: format!("buffer_size must be at least {}, for the text and its NUL (got {size})", text.len() + 1),
        });
    }
    // SAFETY: the buffer has room for the text and its NUL.
    unsafe {
        std::ptr::copy_nonoverlapping(text.as_ptr(), buffer.cast(), text.len());
        buffer.add(text.len()).write(0);
    }
    Ok(NBL_OK)
}
