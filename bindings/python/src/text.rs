//! Texts that the library copies into a buffer.

use std::ffi::c_char;
use std::ptr;

use nblock::ffi::*;
use pyo3::prelude::*;

use crate::failure::Detail;

/// The text that a getter of the library copies: `copy` gets (buffer, buffer_size, needed, err). The first call says
/// how long it is; a text that has become longer since is asked for again.
pub fn copied(
    py: Python<'_>,
    copy: impl Fn(*mut c_char, usize, *mut usize, *mut nbl_error_t) -> nbl_status_t,
) -> PyResult<String> {
    let (mut needed, mut detail) = (0, Detail::new());
    let status = copy(ptr::null_mut(), 0, &raw mut needed, detail.out());
    detail.check(py, status)?;
    loop {
        let mut buffer = vec![0u8; needed];
        match copy(buffer.as_mut_ptr().cast(), buffer.len(), &raw mut needed, detail.out()) {
            NBL_ERR_BUFFER_TOO_SMALL => {}
            status => {
                detail.check(py, status)?;
                // Its NUL is not part of it; a key may hold others.
                buffer.truncate(needed - 1);
                return Ok(String::from_utf8(buffer)?);
            }
        }
    }
}
