//! From the library's statuses to Python's exceptions.

use std::ffi::{CStr, c_char};
use std::mem::MaybeUninit;

use nblock::ffi::*;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::{PyString, PyType};

use crate::holder;
use crate::once::Once;
use crate::record::Record;

/// The status of a call, with its message.
pub struct Detail(MaybeUninit<nbl_error_t>);

impl Detail {
    pub fn new() -> Detail {
        let mut detail = MaybeUninit::<nbl_error_t>::uninit();
        let place = detail.as_mut_ptr();
        // SAFETY: fields of the local. The message is large, and is not set to zero for each call.
        unsafe {
            (&raw mut (*place).struct_size).write(size_of::<nbl_error_t>() as u32);
            (&raw mut (*place).message).cast::<c_char>().write(0);
        }
        Detail(detail)
    }

    pub fn out(&mut self) -> *mut nbl_error_t {
        self.0.as_mut_ptr()
    }

    pub fn message(&self) -> String {
        // SAFETY: a call has filled it in, NUL-terminated; it was empty before.
        unsafe { CStr::from_ptr((&raw const (*self.0.as_ptr()).message).cast()) }.to_string_lossy().into_owned()
    }

    /// The exception for a status that the caller did not expect.
    pub fn exception(&self, py: Python<'_>, status: nbl_status_t) -> PyErr {
        exception(py, status, &self.message())
    }

    /// `Ok` for `NBL_OK`, else its exception.
    pub fn check(&self, py: Python<'_>, status: nbl_status_t) -> PyResult<()> {
        if status == NBL_OK { Ok(()) } else { Err(self.exception(py, status)) }
    }
}

/// A key as Python shows text, shortened if it is long.
pub fn shown_key(py: Python<'_>, key: &str) -> String {
    const MOST: usize = 80;
    let cut = key.char_indices().nth(MOST).map(|(end, _)| &key[..end]);
    let shown = PyString::new(py, cut.unwrap_or(key)).repr().map_or_else(|_| String::new(), |shown| shown.to_string());
    if cut.is_some() { shown + "..." } else { shown }
}

/// `LockUnavailable`, with the record of the holder if it was found.
#[cold]
pub fn unavailable(py: Python<'_>, key: &str, detail: &Detail, record: Option<Record>) -> PyErr {
    let mut message = detail.message();
    if let Some(held) = record.as_ref().and_then(|record| holder::describe(py, record)) {
        message = format!("lock on {} unavailable: {held}", shown_key(py, key));
    }
    let error = exception(py, NBL_UNAVAILABLE, &message);
    match error.value(py).setattr("holder", record) {
        Ok(()) => error,
        Err(failed) => failed,
    }
}

#[cold]
fn exception(py: Python<'_>, status: nbl_status_t, message: &str) -> PyErr {
    static ERROR: Once<Py<PyType>> = Once::new();
    static UNAVAILABLE: Once<Py<PyType>> = Once::new();
    static LOST: Once<Py<PyType>> = Once::new();
    static INVALID_OP: Once<Py<PyType>> = Once::new();
    static STORE: Once<Py<PyType>> = Once::new();
    static FORKED: Once<Py<PyType>> = Once::new();
    let (cell, name) = match status {
        NBL_ERR_INVALID_ARGUMENT => return PyValueError::new_err(message.to_string()),
        NBL_UNAVAILABLE => (&UNAVAILABLE, "LockUnavailable"),
        NBL_LOST => (&LOST, "LostLock"),
        NBL_ERR_INVALID_OP | NBL_CANCELLED => (&INVALID_OP, "LockInvalidOp"),
        NBL_ERR_UNREACHABLE | NBL_ERR_INDETERMINATE | NBL_ERR_DENIED | NBL_ERR_STORE | NBL_ERR_RESOURCES => {
            (&STORE, "StoreError")
        }
        NBL_ERR_FORKED => (&FORKED, "ForkedError"),
        _ => (&ERROR, "Error"),
    };
    // SAFETY: static text.
    let status_name = unsafe { CStr::from_ptr(nbl_status_name(status)) }.to_string_lossy();
    let made = cell
        .import(py, "nblock._errors", name)
        .and_then(|class| class.call1((message,)))
        .and_then(|error| error.setattr("status", &*status_name).map(|()| error));
    match made {
        Ok(error) => PyErr::from_value(error),
        Err(error) => error,
    }
}
