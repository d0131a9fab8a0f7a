//! Operations under way, and waiting for them.

use std::ptr;

use nblock::ffi::*;
use pyo3::exceptions::PyOSError;
use pyo3::prelude::*;

use crate::client::Client;
use crate::cooperation;
use crate::failure::Detail;
use crate::once::Once;

/// An operation of the library. It is freed when it is dropped: an acquire that is in progress, or whose grant
/// was not reported yet, leaves nothing in the store (R14); an unlock or refresh continues.
pub struct Operation(*mut nbl_op_t);

// SAFETY: a handle is a checked id, which any thread may use.
unsafe impl Send for Operation {}
// SAFETY: as above.
unsafe impl Sync for Operation {}

/// How often a waiting main thread checks for signals. The system may deliver a signal to any thread, but Python
/// runs handlers on the main thread only, which can notice the signal only by checking.
const SIGNALS_EVERY_MS: i64 = 50;

/// How long an event loop may be blocked before a warning is issued.
const UNNOTICED_MS: i64 = 10;

impl Operation {
    /// Starts one with a `_start` function, which does not wait.
    #[inline]
    pub fn start(
        py: Python<'_>,
        start: impl FnOnce(*mut *mut nbl_op_t, *mut nbl_error_t) -> nbl_status_t,
    ) -> PyResult<Operation> {
        let mut op = ptr::null_mut();
        let mut detail = Detail::new();
        let status = start(&raw mut op, detail.out());
        detail.check(py, status)?;
        Ok(Operation(op))
    }

    /// `start` with the interpreter released: for functions that may read files or resolve host names first.
    pub fn start_detached(
        py: Python<'_>,
        start: impl FnOnce(*mut *mut nbl_op_t, *mut nbl_error_t) -> nbl_status_t + Send,
    ) -> PyResult<Operation> {
        let mut detail = Detail::new();
        let (op, status) = py.detach(|| {
            let mut op = ptr::null_mut();
            let status = start(&raw mut op, detail.out());
            (Operation(op), status)
        });
        detail.check(py, status)?;
        Ok(op)
    }

    pub fn handle(&self) -> *mut nbl_op_t {
        self.0
    }

    /// Waits until it has ended, and returns its status. Other threads of the program run meanwhile. An `Err` is
    /// what a signal handler raised.
    #[inline]
    pub fn wait(&self, py: Python<'_>, detail: &mut Detail) -> PyResult<nbl_status_t> {
        match self.finish(detail) {
            NBL_PENDING => self.wait_detached(py, detail),
            status => Ok(status),
        }
    }

    /// `wait`, where every status but `NBL_OK` is an error.
    #[inline]
    pub fn done(&self, py: Python<'_>) -> PyResult<()> {
        let mut detail = Detail::new();
        let status = self.wait(py, &mut detail)?;
        detail.check(py, status)
    }

    /// `wait` with a time limit: `NBL_PENDING` if it has not ended by then. Signal handlers run afterwards.
    pub fn wait_at_most(&self, py: Python<'_>, limit_ms: i64, detail: &mut Detail) -> PyResult<nbl_status_t> {
        match (self.finish(detail), cooperation::wanted(py)) {
            (NBL_PENDING, None) => Ok(py.detach(|| self.wait_for(limit_ms, detail))),
            (NBL_PENDING, Some(cooperative)) => {
                cooperative.wait(self.descriptor(py)?, Some(limit_ms))?;
                Ok(self.finish(detail))
            }
            (status, _) => Ok(status),
        }
    }

    #[cold]
    fn wait_detached(&self, py: Python<'_>, detail: &mut Detail) -> PyResult<nbl_status_t> {
        if let Some(cooperative) = cooperation::wanted(py) {
            loop {
                cooperative.wait(self.descriptor(py)?, None)?;
                match self.finish(detail) {
                    NBL_PENDING => {}
                    status => return Ok(status),
                }
            }
        }
        if cooperation::in_event_loop(py) {
            match py.detach(|| self.wait_for(UNNOTICED_MS, detail)) {
                NBL_PENDING => cooperation::warn_of_standstill(py)?,
                status => return Ok(status),
            }
        }
        let slice_ms = if in_main_thread(py)? { SIGNALS_EVERY_MS } else { NBL_FOREVER };
        loop {
            py.check_signals()?;
            let status = py.detach(|| self.wait_for(slice_ms, detail));
            if status != NBL_PENDING {
                return Ok(status);
            }
        }
    }

    /// The descriptor that becomes readable when it has ended.
    fn descriptor(&self, py: Python<'_>) -> PyResult<i32> {
        // SAFETY: a handle of ours.
        match unsafe { nbl_op_fd(self.0) } {
            -1 => {
                // A child process, or no descriptors left: the first says so itself.
                let mut detail = Detail::new();
                let status = self.finish(&mut detail);
                if status == NBL_PENDING {
                    return Err(PyOSError::new_err("no file descriptor could be created for a waiting operation"));
                }
                Err(detail.exception(py, status))
            }
            descriptor => Ok(descriptor),
        }
    }

    fn finish(&self, detail: &mut Detail) -> nbl_status_t {
        // SAFETY: a handle and a detail of ours.
        unsafe { nbl_op_finish(self.0, detail.out()) }
    }

    fn wait_for(&self, timeout_ms: i64, detail: &mut Detail) -> nbl_status_t {
        // SAFETY: a handle and a detail of ours.
        unsafe { nbl_op_wait(self.0, timeout_ms, detail.out()) }
    }
}

impl Drop for Operation {
    fn drop(&mut self) {
        // SAFETY: a handle of ours.
        unsafe { nbl_op_free(self.0) };
    }
}

/// Whether this is the thread that Python runs signal handlers on.
fn in_main_thread(py: Python<'_>) -> PyResult<bool> {
    static MAIN_THREAD: Once<Py<PyAny>> = Once::new();
    static IDENT: Once<Py<PyAny>> = Once::new();
    let main = MAIN_THREAD.import(py, "threading", "main_thread")?.call0()?.getattr("ident")?;
    main.eq(IDENT.import(py, "threading", "get_ident")?.call0()?)
}

/// An operation in progress, for an event loop: its descriptor becomes readable when it has ended.
///
/// An operation that is dropped or cancelled before ``finish`` has reported its result leaves no hold behind.
#[pyclass(frozen, module = "nblock._nblock")]
pub struct Op(pub Operation);

#[pymethods]
impl Op {
    /// The descriptor to watch for reading. It belongs to the library, which closes it with the operation.
    fn fileno(&self, py: Python<'_>) -> PyResult<i32> {
        self.0.descriptor(py)
    }

    /// Returns True if it has succeeded, False if it is still in progress. Raises if it has failed. Does not wait.
    fn finish(&self, py: Python<'_>) -> PyResult<bool> {
        let mut detail = Detail::new();
        match self.0.finish(&mut detail) {
            NBL_PENDING => Ok(false),
            status => detail.check(py, status).map(|()| true),
        }
    }

    /// Cancels it. An acquire leaves nothing in the store; an unlock or refresh continues. Does not wait.
    fn cancel(&self) {
        // SAFETY: a handle of ours.
        unsafe { nbl_op_cancel(self.0.handle()) };
    }

    /// The fence that was asked for.
    pub fn fence(&self, py: Python<'_>) -> PyResult<u64> {
        let (mut fence, mut detail) = (0, Detail::new());
        // SAFETY: a handle and two locals.
        let status = unsafe { nbl_op_take_fence(self.0.handle(), &raw mut fence, detail.out()) };
        detail.check(py, status).map(|()| fence)
    }

    /// The client that was opened. It can be taken once.
    fn take_client(&self, py: Python<'_>) -> PyResult<Client> {
        Client::taken_from(py, &self.0)
    }
}
