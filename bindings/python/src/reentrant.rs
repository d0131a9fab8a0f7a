//! Reentrant locks.

use nblock::ffi::*;
use pyo3::prelude::*;

use crate::arguments::{self, Argument};
use crate::lock::Lock;
use crate::text;

/// A lock that can be locked again while it is held, by every object with the same owner token: this one,
/// another one, or one in another process. The record counts how many times it is locked, and the last unlock
/// deletes it. Any object with the token may unlock.
///
/// owner_token is 1 to 255 bytes of UTF-8; None means a random one. Everything else is as for Lock.
#[pyclass(frozen, extends = Lock, module = "nblock")]
pub struct ReentrantLock;

#[pymethods]
impl ReentrantLock {
    #[new]
    #[pyo3(signature = (
        key, owner_token=None, *, expire=None, timeout=None, auto_refresh=None, fence=None, on_lost=None, client=None
    ))]
    #[allow(clippy::too_many_arguments)]
    pub fn new(
        key: &Bound<'_, PyAny>,
        owner_token: Argument<'_, '_>,
        expire: Argument<'_, '_>,
        timeout: Argument<'_, '_>,
        auto_refresh: Argument<'_, '_>,
        fence: Argument<'_, '_>,
        on_lost: Argument<'_, '_>,
        client: Argument<'_, '_>,
    ) -> PyResult<PyClassInitializer<ReentrantLock>> {
        let mut lock = Lock::new(key, expire, timeout, auto_refresh, fence, on_lost, client)?;
        lock.owner = Some(arguments::owner_token(owner_token)?);
        Ok(PyClassInitializer::from(lock).add_subclass(ReentrantLock))
    }

    /// The owner token: every object that has it may lock again, and unlock.
    #[getter]
    fn owner_token(slf: &Bound<'_, Self>) -> PyResult<String> {
        let py = slf.py();
        let handle = slf.as_super().get().handle(py)?;
        // SAFETY: a handle of ours, and what `copied` gives.
        text::copied(py, |buffer, size, needed, err| unsafe {
            nbl_lock_text(handle, NBL_TEXT_OWNER_TOKEN, buffer, size, needed, err)
        })
    }
}
