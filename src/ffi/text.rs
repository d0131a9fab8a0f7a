//! Text across the boundary.

use std::ffi::{CStr, CString, c_char};

use super::error::Failure;
use super::out::out_given;
use super::status::{NBL_ERR_BUFFER_TOO_SMALL, NBL_OK, nbl_status_t};

/// As a length: the text is NUL-terminated.
pub const NBL_CSTR: usize = usize::MAX;

/// The bytes of a text of the caller's; `what` it is, for messages.
///
/// # Safety
/// `text` is NULL, or points to `length` bytes, or, with NBL_CSTR, to a NUL-terminated text. Of a text
/// that is longer than `longest` nothing is read.
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
        // SAFETY: the caller says so.
        return Ok(unsafe { CStr::from_ptr(text) }.to_bytes());
    }
    if length > longest {
        return Err(Failure::invalid_argument(format!("{what} must have at most {longest} bytes (got {length})")));
    }
    // SAFETY: the caller says so.
    Ok(unsafe { std::slice::from_raw_parts(text.cast(), length) })
}

/// A NUL-terminated text of the caller's; `None` for NULL.
///
/// # Safety
/// `text` is NULL or points to a NUL-terminated text.
pub(crate) unsafe fn optional<'a>(text: *const c_char, what: &str) -> Result<Option<&'a str>, Failure> {
    if text.is_null() {
        return Ok(None);
    }
    // SAFETY: the caller says so.
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

/// A text for C, which a NUL ends: one inside it is shown as `\0`.
pub(crate) fn terminated(text: &str) -> CString {
    CString::new(text.replace('\0', "\\0")).unwrap_or_default()
}

/// Copies a text into the caller's buffer, NUL-terminated, and says how many bytes it needs with its
/// NUL. A buffer that is too small gets nothing.
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
        // SAFETY: the caller says so.
        unsafe { needed.write(text.len() + 1) };
    }
    if buffer.is_null() && size == 0 {
        // Only the size was asked for.
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
