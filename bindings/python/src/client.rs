//! Clients.

use std::ffi::CString;
use std::ptr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use nblock::ffi::*;
use pyo3::exceptions::PyTypeError;
use pyo3::prelude::*;
use pyo3::types::PyType;

use crate::arguments;
use crate::cooperation;
use crate::failure::Detail;
use crate::lock::Lock;
use crate::operation::{Op, Operation};
use crate::ping::Ping;
use crate::record::{Record, find, list};
use crate::reentrant::ReentrantLock;
use crate::text;

/// An open store plus default options.
///
/// url is the store: "embedded:" or "embedded:/directory" (this machine, no server), "memory:" or
/// "memory:NAME" (this process, for tests), "redis://host:port", "postgres://user:password@host/database", or
/// "rethinkdb://user:password@host:port/database". With None, the store is, in this order: the environment
/// variable NBLOCK_URL, NoBrainer's environment, /etc/nblock.conf, "embedded:".
///
/// - expire: the length of a lease, for locks that set none.
/// - timeout: how long to wait for a grant, for locks that set none; 0 tries once, math.inf waits forever.
/// - app: the name that is shown when locks are listed; by default, the program's name.
/// - op_timeout: the limit for one request to the store, 0.001 to 3600; 5 by default.
/// - connect_timeout: the limit for opening the store, 0.001 to 3600; 5 by default.
///
/// Times are in seconds (int or float), or a datetime.timedelta.
///
/// Waits for the store's reply, at most connect_timeout. Raises StoreError if the store does not reply,
/// ValueError or TypeError for wrong arguments. As a context manager, the client is closed at the end of the
/// block. A client may be used by all threads, and by forked children.
#[pyclass(frozen, weakref, module = "nblock")]
pub struct Client {
    handle: *mut nbl_client_t,
    closed: AtomicBool,
}

// SAFETY: a handle is a checked id, which any thread may use.
unsafe impl Send for Client {}
// SAFETY: as above.
unsafe impl Sync for Client {}

/// The arguments that a client is opened with. Owns the texts that the library's options point to.
struct Opening {
    url: Option<CString>,
    app: CString,
    expire_ms: i64,
    timeout_ms: i64,
    op_timeout_ms: i64,
    connect_timeout_ms: i64,
}

impl Opening {
    fn new(
        py: Python<'_>,
        url: Option<&Bound<'_, PyAny>>,
        expire: Option<&Bound<'_, PyAny>>,
        timeout: Option<&Bound<'_, PyAny>>,
        app: Option<&Bound<'_, PyAny>>,
        op_timeout: Option<&Bound<'_, PyAny>>,
        connect_timeout: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<Opening> {
        let program;
        let app = match app {
            Some(app) => app,
            None => {
                program = py.import("nblock._default")?.call_method0("program_name")?;
                &program
            }
        };
        Ok(Opening {
            url: url.map(|url| arguments::c_text("url", url)).transpose()?,
            app: arguments::c_text("app", app)?,
            expire_ms: arguments::expire(expire)?,
            timeout_ms: arguments::timeout(timeout)?,
            op_timeout_ms: arguments::limit("op_timeout", op_timeout)?,
            connect_timeout_ms: arguments::limit("connect_timeout", connect_timeout)?,
        })
    }

    fn start(self, py: Python<'_>) -> PyResult<Operation> {
        Operation::start_detached(py, move |out, err| {
            let options = nbl_client_options_t {
                struct_size: size_of::<nbl_client_options_t>() as u32,
                reserved: 0,
                expire_ms: self.expire_ms,
                timeout_ms: self.timeout_ms,
                op_timeout_ms: self.op_timeout_ms,
                connect_timeout_ms: self.connect_timeout_ms,
                app: self.app.as_ptr(),
            };
            let url = self.url.as_ref().map_or(ptr::null(), |url| url.as_ptr());
            // SAFETY: texts and options that outlive the call, and what `start_detached` gives.
            unsafe { nbl_client_new_start(url, &raw const options, out, err) }
        })
    }
}

impl Client {
    pub fn handle(&self) -> *mut nbl_client_t {
        self.handle
    }

    pub fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Relaxed)
    }

    pub fn taken_from(py: Python<'_>, op: &Operation) -> PyResult<Client> {
        let (mut handle, mut detail) = (ptr::null_mut(), Detail::new());
        // SAFETY: a handle of ours and two locals.
        let status = unsafe { nbl_op_take_client(op.handle(), &raw mut handle, detail.out()) };
        detail.check(py, status)?;
        Ok(Client { handle, closed: AtomicBool::new(false) })
    }

    fn close_until(&self, py: Python<'_>, limit: Option<Instant>) -> PyResult<()> {
        const SLICE: Duration = Duration::from_millis(50);
        self.closed.store(true, Ordering::Relaxed);
        loop {
            let left = limit.map_or(SLICE, |limit| limit.saturating_duration_since(Instant::now()).min(SLICE));
            let cooperative = cooperation::wanted(py);
            let at_once = left.is_zero() || cooperative.is_some();
            let timeout_ms = if at_once { NBL_NO_WAIT } else { (left.as_millis() as i64).max(1) };
            let mut detail = Detail::new();
            let status = py.detach(|| self.close_within(timeout_ms, &mut detail));
            if status != NBL_ERR_INDETERMINATE || left.is_zero() {
                return detail.check(py, status);
            }
            // Closing again goes on waiting.
            py.check_signals()?;
            if let Some(cooperative) = cooperative {
                cooperative.pause()?;
            }
        }
    }

    fn close_within(&self, timeout_ms: i64, detail: &mut Detail) -> nbl_status_t {
        // SAFETY: a handle and a detail of ours.
        unsafe { nbl_client_close(self.handle, timeout_ms, detail.out()) }
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        // SAFETY: a handle of ours.
        unsafe { nbl_client_free(self.handle) };
    }
}

#[pymethods]
impl Client {
    #[new]
    #[pyo3(signature = (url=None, *, expire=None, timeout=None, app=None, op_timeout=None, connect_timeout=None))]
    fn new(
        py: Python<'_>,
        url: Option<&Bound<'_, PyAny>>,
        expire: Option<&Bound<'_, PyAny>>,
        timeout: Option<&Bound<'_, PyAny>>,
        app: Option<&Bound<'_, PyAny>>,
        op_timeout: Option<&Bound<'_, PyAny>>,
        connect_timeout: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<Client> {
        let op = Opening::new(py, url, expire, timeout, app, op_timeout, connect_timeout)?.start(py)?;
        op.done(py)?;
        Client::taken_from(py, &op)
    }

    /// Starts opening a client, for an event loop.
    #[classmethod]
    #[pyo3(signature = (url=None, *, expire=None, timeout=None, app=None, op_timeout=None, connect_timeout=None))]
    fn _start(
        class: &Bound<'_, PyType>,
        url: Option<&Bound<'_, PyAny>>,
        expire: Option<&Bound<'_, PyAny>>,
        timeout: Option<&Bound<'_, PyAny>>,
        app: Option<&Bound<'_, PyAny>>,
        op_timeout: Option<&Bound<'_, PyAny>>,
        connect_timeout: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<Op> {
        let py = class.py();
        Ok(Op(Opening::new(py, url, expire, timeout, app, op_timeout, connect_timeout)?.start(py)?))
    }

    /// Checks the arguments of a client without opening one.
    #[staticmethod]
    #[pyo3(signature = (url=None, *, expire=None, timeout=None, app=None, op_timeout=None, connect_timeout=None))]
    fn _check(
        py: Python<'_>,
        url: Option<&Bound<'_, PyAny>>,
        expire: Option<&Bound<'_, PyAny>>,
        timeout: Option<&Bound<'_, PyAny>>,
        app: Option<&Bound<'_, PyAny>>,
        op_timeout: Option<&Bound<'_, PyAny>>,
        connect_timeout: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<()> {
        Opening::new(py, url, expire, timeout, app, op_timeout, connect_timeout).map(drop)
    }

    /// Makes a lock on this client's store: Lock(key, ..., client=self). Does not take it, and does not wait.
    #[pyo3(signature = (key, *, expire=None, timeout=None, auto_refresh=None, fence=None, on_lost=None))]
    #[allow(clippy::too_many_arguments)]
    fn lock(
        slf: &Bound<'_, Self>,
        key: &Bound<'_, PyAny>,
        expire: Option<&Bound<'_, PyAny>>,
        timeout: Option<&Bound<'_, PyAny>>,
        auto_refresh: Option<&Bound<'_, PyAny>>,
        fence: Option<&Bound<'_, PyAny>>,
        on_lost: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<Lock> {
        Lock::new(key, expire, timeout, auto_refresh, fence, on_lost, Some(slf.as_any()))
    }

    /// Makes a reentrant lock on this client's store: ReentrantLock(key, ..., client=self). Does not take it,
    /// and does not wait.
    #[pyo3(signature = (key, owner_token=None, *, expire=None, timeout=None, auto_refresh=None, fence=None, on_lost=None))]
    #[allow(clippy::too_many_arguments)]
    fn reentrant_lock<'py>(
        slf: &Bound<'py, Self>,
        key: &Bound<'py, PyAny>,
        owner_token: Option<&Bound<'py, PyAny>>,
        expire: Option<&Bound<'py, PyAny>>,
        timeout: Option<&Bound<'py, PyAny>>,
        auto_refresh: Option<&Bound<'py, PyAny>>,
        fence: Option<&Bound<'py, PyAny>>,
        on_lost: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<Bound<'py, ReentrantLock>> {
        let lock =
            ReentrantLock::new(key, owner_token, expire, timeout, auto_refresh, fence, on_lost, Some(slf.as_any()))?;
        Bound::new(slf.py(), lock)
    }

    /// Returns all records of the store, in no particular order. Waits for the store's reply, at most
    /// op_timeout (5 s by default). Raises StoreError.
    fn locks(&self, py: Python<'_>) -> PyResult<Vec<Record>> {
        list(py, self, NBL_LIST_ALL)
    }

    /// Returns the records whose lease has run out. Waits for the store's reply, at most op_timeout (5 s by
    /// default). Raises StoreError.
    fn expired(&self, py: Python<'_>) -> PyResult<Vec<Record>> {
        list(py, self, NBL_LIST_EXPIRED)
    }

    /// Returns the record of a key, or None if there is none. A record whose lease has ended is found too. Waits for
    /// the store's reply, at most op_timeout (5 s by default). Raises StoreError.
    fn find(&self, py: Python<'_>, key: &Bound<'_, PyAny>) -> PyResult<Option<Record>> {
        find(py, self, arguments::key(key)?)
    }

    /// Checks that the store replies, and returns what the reply says. Waits at most op_timeout (5 s by default).
    /// Raises StoreError if it does not reply.
    fn ping(&self, py: Python<'_>) -> PyResult<Ping> {
        // SAFETY: a handle of ours, and what `start` gives.
        let op = Operation::start(py, |out, err| unsafe { nbl_client_ping_start(self.handle, out, err) })?;
        op.done(py)?;
        Ping::taken_from(py, &op)
    }

    /// Closes the client. Calls that wait on its locks raise LockInvalidOp, holds that are renewed are
    /// released, other holds run out with their leases. Closing again is not an error.
    ///
    /// Waits until the store has accepted the releases, at most timeout seconds (None: 5 s). Raises StoreError
    /// if that was too short: what could not be released runs out with its lease.
    #[pyo3(signature = (timeout=None))]
    fn close(&self, py: Python<'_>, timeout: Option<&Bound<'_, PyAny>>) -> PyResult<()> {
        const DEFAULT: Duration = Duration::from_secs(5);
        let limit = match arguments::timeout(timeout)? {
            0 => Some(Instant::now() + DEFAULT),
            NBL_NO_WAIT => Some(Instant::now()),
            NBL_FOREVER => None,
            timeout_ms => Some(Instant::now() + Duration::from_millis(timeout_ms as u64)),
        };
        self.close_until(py, limit)
    }

    /// Whether close was called.
    #[getter]
    fn closed(&self) -> bool {
        self.is_closed()
    }

    /// Where the store is, for people to read. Contains no password.
    #[getter]
    fn location(&self, py: Python<'_>) -> PyResult<String> {
        // SAFETY: a handle of ours, and what `copied` gives.
        text::copied(py, |buffer, size, needed, err| unsafe {
            nbl_client_location(self.handle, buffer, size, needed, err)
        })
    }

    fn __enter__(slf: PyRef<'_, Self>) -> PyRef<'_, Self> {
        slf
    }

    fn __exit__(
        &self,
        py: Python<'_>,
        exc_type: &Bound<'_, PyAny>,
        _exc: &Bound<'_, PyAny>,
        _traceback: &Bound<'_, PyAny>,
    ) -> PyResult<()> {
        match self.close(py, None) {
            // What the body raised matters more.
            Err(_) if !exc_type.is_none() => Ok(()),
            closed => closed,
        }
    }

    fn __reduce__(&self) -> PyResult<()> {
        Err(PyTypeError::new_err(
            "a Client cannot be pickled or copied: pass its URL, and open a Client where it is needed",
        ))
    }

    fn __repr__(&self, py: Python<'_>) -> PyResult<String> {
        Ok(format!("<nblock.Client {}{}>", self.location(py)?, if self.is_closed() { " closed" } else { "" }))
    }
}
