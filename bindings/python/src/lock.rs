//! Locks.

use std::ffi::CString;
use std::ptr;

use nblock::ffi::*;
use pyo3::PyTraverseError;
use pyo3::PyVisit;
use pyo3::exceptions::{PyResourceWarning, PyTypeError};
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;

use crate::arguments::{self, Argument};
use crate::client::Client;
use crate::failure::{self, Detail, shown_key};
use crate::holder::{self, Grantee};
use crate::operation::{Op, Operation};
use crate::record::Record;
use crate::scope::Scope;

/// A distributed lock: one program's object for one key.
///
/// key: what is locked, any str of 1 byte to 1 MiB in UTF-8. expire: how long a lease lasts, in seconds
/// (0.001 to 31622400). timeout: how many seconds to wait for a grant; 0 tries once, math.inf waits for
/// ever. Where they are None, the client's count. auto_refresh: whether a hold is renewed, at a third of
/// its lease, until it is unlocked; None means: yes in `with` and `acquire` unless an expire is named, no
/// in `lock` and `try_lock`. fence: whether a grant comes with a fence even where the store has to be
/// asked for it. on_lost: called as on_lost(lock), in a thread of its own, when a hold is not certainly
/// ours any more. client: whose store; None means the default client's.
///
/// Making a lock object takes nothing and does not wait. It may be shared by threads, and used by forked
/// children: what the parent holds stays the parent's.
#[pyclass(frozen, subclass, weakref, module = "nblock")]
pub struct Lock {
    key: String,
    /// Of a reentrant lock: its owner token, or `None` inside for a random one.
    pub owner: Option<Option<CString>>,
    /// What the object was made with.
    defaults: nbl_lock_options_t,
    client: PyOnceLock<Py<Client>>,
    handle: PyOnceLock<Handle>,
    on_lost: Option<Py<PyAny>>,
    pub grantee: Grantee,
}

/// A lock handle of the library's, made when the lock is first used: a module that makes its locks while it
/// is imported opens no store then.
struct Handle(*mut nbl_lock_t);

// SAFETY: a handle is a checked id, which any thread may use.
unsafe impl Send for Handle {}
// SAFETY: as above.
unsafe impl Sync for Handle {}

impl Drop for Handle {
    fn drop(&mut self) {
        // SAFETY: a handle of ours.
        unsafe { nbl_lock_free(self.0) };
    }
}

/// How a grant is asked for.
#[derive(Clone, Copy)]
pub enum Form {
    /// `lock`, `try_lock`: a plain lease; an error where the object is in use already.
    Bare,
    /// `with`, `acquire`: waits its turn on the object; renewed, unless an expire is named.
    Scoped,
}

impl Lock {
    #[inline]
    pub fn handle(&self, py: Python<'_>) -> PyResult<*mut nbl_lock_t> {
        match self.handle.get(py) {
            Some(handle) => Ok(handle.0),
            None => self.open(py),
        }
    }

    #[cold]
    fn open(&self, py: Python<'_>) -> PyResult<*mut nbl_lock_t> {
        static DEFAULT_CLIENT: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
        let client = self.client.get_or_try_init(py, || -> PyResult<Py<Client>> {
            let client = DEFAULT_CLIENT.import(py, "nblock._default", "client")?.call0()?;
            Ok(client.cast_into::<Client>()?.unbind())
        })?;
        let (mut handle, mut detail) = (ptr::null_mut(), Detail::new());
        let (key, key_len) = (self.key.as_ptr().cast(), self.key.len());
        let client = client.get().handle();
        // SAFETY: handles of ours, a key of that length, texts and options that outlive the call, locals.
        let status = unsafe {
            match &self.owner {
                None => nbl_lock_new(client, key, key_len, &self.defaults, &raw mut handle, detail.out()),
                Some(owner) => {
                    let owner = owner.as_ref().map_or(ptr::null(), |owner| owner.as_ptr());
                    let defaults = &raw const self.defaults;
                    nbl_reentrant_lock_new(client, key, key_len, owner, defaults, &raw mut handle, detail.out())
                }
            }
        };
        detail.check(py, status)?;
        // Another thread may have been first: then theirs is everybody's.
        Ok(self.handle.get_or_init(py, || Handle(handle)).0)
    }

    /// The options of a call: what it names, where the object's own are not meant.
    #[inline]
    pub fn options(&self, form: Form, expire_ms: i64, timeout_ms: i64) -> nbl_lock_options_t {
        let mut options = nbl_lock_options_t { expire_ms, timeout_ms, fence: 0, ..self.defaults };
        if let Form::Scoped = form {
            options.if_held = NBL_IF_HELD_WAIT;
            // A lease that nobody chose is one to renew (R12).
            if options.auto_refresh == 0 && expire_ms == 0 && self.defaults.expire_ms == 0 {
                options.auto_refresh = NBL_ON;
            }
        }
        options
    }

    #[inline]
    fn ask(&self, py: Python<'_>, options: nbl_lock_options_t) -> PyResult<Operation> {
        let handle = self.handle(py)?;
        // SAFETY: a handle of ours, options that outlive the call, and what `start` gives.
        Operation::start(py, |out, err| unsafe { nbl_lock_start(handle, &raw const options, out, err) })
    }

    /// Asks for a grant and waits for it. `false`: not granted; `detail` says why.
    #[inline]
    fn take(slf: &Bound<'_, Self>, options: nbl_lock_options_t, detail: &mut Detail) -> PyResult<bool> {
        let (py, lock) = (slf.py(), slf.get());
        let op = lock.ask(py, options)?;
        match op.wait(py, detail)? {
            NBL_OK => {
                drop(op);
                lock.grantee.note(py, lock);
                if lock.on_lost.is_some() {
                    lock.watch(slf)?;
                }
                Ok(true)
            }
            NBL_UNAVAILABLE => Ok(false),
            status => Err(detail.exception(py, status)),
        }
    }

    /// Takes the lock or raises.
    #[inline]
    pub fn demand(slf: &Bound<'_, Self>, options: nbl_lock_options_t) -> PyResult<()> {
        let mut detail = Detail::new();
        if Lock::take(slf, options, &mut detail)? {
            Ok(())
        } else {
            Err(holder::unavailable(slf.py(), slf.get(), &detail))
        }
    }

    /// The client that the lock was used with. `NULL` before.
    pub fn store(&self, py: Python<'_>) -> *mut nbl_client_t {
        self.client.get(py).map_or(ptr::null_mut(), |client| client.get().handle())
    }

    /// Whether this object holds that key.
    pub fn holds(&self, py: Python<'_>, key: &str) -> bool {
        self.key == key && matches!(self.status(py), NBL_OK | NBL_OVERDUE)
    }

    /// Unlocks; the status is the store's answer.
    #[inline]
    fn give_back(&self, py: Python<'_>, detail: &mut Detail) -> PyResult<nbl_status_t> {
        let handle = self.handle(py)?;
        if self.on_lost.is_some() {
            self.unwatch(py)?;
        }
        // SAFETY: a handle of ours, and what `start` gives.
        Operation::start(py, |out, err| unsafe { nbl_unlock_start(handle, out, err) })?.wait(py, detail)
    }

    /// Leaves a `with` block. After a loss it raises, unless the body already has.
    pub fn leave(&self, py: Python<'_>, exc: &Bound<'_, PyAny>) -> PyResult<()> {
        let mut detail = Detail::new();
        let error = match self.give_back(py, &mut detail) {
            // Where it is not locked, the body has unlocked it, or closed its client: nothing is left.
            Ok(NBL_OK | NBL_ERR_INVALID_OP) => return Ok(()),
            Ok(status) => detail.exception(py, status),
            Err(error) => error,
        };
        if exc.is_none() || !error.is_instance_of::<pyo3::exceptions::PyException>(py) {
            return Err(error);
        }
        // What the body raised goes on its way, and says what else went wrong where it can (Python 3.11).
        let _ = exc.call_method1("add_note", (format!("on leaving the block: {error}"),));
        Ok(())
    }

    /// Has `on_lost` called when the hold that was just granted is not certainly ours any more. Where that
    /// cannot be, the hold is given back.
    #[cold]
    fn watch(&self, slf: &Bound<'_, Self>) -> PyResult<()> {
        static WATCH: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
        let py = slf.py();
        let watch = || {
            let descriptor = self._lost_fileno(py)?;
            WATCH.import(py, "nblock._watch", "watch")?.call1((descriptor, slf)).map(drop)
        };
        watch().inspect_err(|_| {
            // What went wrong with watching is told, whatever becomes of this.
            let _ = self.give_back(py, &mut Detail::new());
        })
    }

    #[cold]
    fn unwatch(&self, py: Python<'_>) -> PyResult<()> {
        static UNWATCH: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
        UNWATCH.import(py, "nblock._watch", "unwatch")?.call1((self._lost_fileno(py)?,)).map(drop)
    }

    /// `NBL_OK`, `NBL_OVERDUE`, `NBL_LOST`, `NBL_PENDING`, `NBL_ERR_INVALID_OP` (idle), `NBL_ERR_FORKED`.
    #[inline]
    fn status(&self, py: Python<'_>) -> nbl_status_t {
        match self.handle.get(py) {
            // SAFETY: a handle of ours.
            Some(handle) => unsafe { nbl_lock_state(handle.0) },
            None => NBL_ERR_INVALID_OP,
        }
    }

    fn remaining_ms(&self, py: Python<'_>) -> u64 {
        let mut remaining = 0;
        if let Some(handle) = self.handle.get(py) {
            // Not held, and so on: nothing is left.
            // SAFETY: a handle of ours and a local.
            unsafe { nbl_lock_remaining_ms(handle.0, &raw mut remaining, ptr::null_mut()) };
        }
        remaining
    }

    /// What is left of the lock, when it is collected: a hold that nobody can give back any more.
    #[cold]
    fn warn_of_abandoned(&self, py: Python<'_>, kind: &str) -> PyResult<()> {
        let message = format!(
            "{} was collected while it was held: it is not renewed any more, and its lease runs out",
            self.show(py, kind)
        );
        let message = CString::new(message.replace('\0', "\\0"))?;
        PyErr::warn(py, &py.get_type::<PyResourceWarning>(), &message, 1)
    }

    fn show(&self, py: Python<'_>, kind: &str) -> String {
        let key = shown_key(py, &self.key);
        let state = match self.status(py) {
            NBL_OK => format!("held, {:.1} s left", self.remaining_ms(py) as f64 / 1000.0),
            NBL_PENDING => "pending".to_string(),
            status => state_name(status).to_string(),
        };
        format!("<nblock.{kind} {key} {state}>")
    }
}

fn state_name(status: nbl_status_t) -> &'static str {
    match status {
        NBL_OK => "held",
        NBL_OVERDUE => "overdue",
        NBL_LOST => "lost",
        NBL_PENDING => "pending",
        NBL_ERR_FORKED => "forked",
        _ => "idle",
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        self.grantee.forget(self);
        let Some(handle) = self.handle.get_mut() else { return };
        // SAFETY: a handle of ours.
        if !matches!(unsafe { nbl_lock_state(handle.0) }, NBL_OK | NBL_OVERDUE) {
            return;
        }
        Python::attach(|py| {
            // A closed client has given back what it could, and a program may end without its plain leases.
            if self.client.get(py).is_none_or(|client| client.get().is_closed()) {
                return;
            }
            // An exception may be on its way while objects are collected.
            let raised = PyErr::take(py);
            let kind = if self.owner.is_some() { "ReentrantLock" } else { "Lock" };
            if let Err(error) = self.warn_of_abandoned(py, kind) {
                error.write_unraisable(py, None);
            }
            if let Some(raised) = raised {
                raised.restore(py);
            }
        });
    }
}

#[pymethods]
impl Lock {
    #[new]
    #[pyo3(signature = (key, *, expire=None, timeout=None, auto_refresh=None, fence=None, on_lost=None, client=None))]
    #[allow(clippy::too_many_arguments)]
    pub fn new(
        key: &Bound<'_, PyAny>,
        expire: Argument<'_, '_>,
        timeout: Argument<'_, '_>,
        auto_refresh: Argument<'_, '_>,
        fence: Argument<'_, '_>,
        on_lost: Argument<'_, '_>,
        client: Argument<'_, '_>,
    ) -> PyResult<Lock> {
        let lock = Lock {
            key: arguments::key(key)?.to_string(),
            owner: None,
            defaults: arguments::lock_options(expire, timeout, auto_refresh, fence)?,
            client: PyOnceLock::new(),
            handle: PyOnceLock::new(),
            on_lost: arguments::callable("on_lost", on_lost)?,
            grantee: Grantee::default(),
        };
        if let Some(client) = client {
            let _ = lock.client.set(key.py(), arguments::client(client)?);
        }
        Ok(lock)
    }

    /// Tries once to take the lock, for a plain lease. True: held. False: somebody else holds it. Raises
    /// LockInvalidOp when this object holds it already, StoreError when the store does not answer.
    ///
    /// expire: the lease's length in seconds, where it is not the object's. Waits for the store's answer,
    /// 5 s at most.
    #[pyo3(signature = (*, expire=None))]
    fn try_lock(slf: &Bound<'_, Self>, expire: Argument<'_, '_>) -> PyResult<bool> {
        let options = slf.get().options(Form::Bare, arguments::expire(expire)?, NBL_NO_WAIT);
        Lock::take(slf, options, &mut Detail::new())
    }

    /// Takes the lock, for a plain lease, and waits for it. Raises LockUnavailable when it is not granted
    /// in time, LockInvalidOp when this object holds it already, StoreError when the store does not answer.
    ///
    /// expire: the lease's length, timeout: how long to wait, both in seconds, where they are not the
    /// object's. Other threads run meanwhile; a signal handler that raises ends the wait, and nothing
    /// stays behind.
    #[pyo3(signature = (*, expire=None, timeout=None))]
    fn lock(slf: &Bound<'_, Self>, expire: Argument<'_, '_>, timeout: Argument<'_, '_>) -> PyResult<()> {
        let options = slf.get().options(Form::Bare, arguments::expire(expire)?, arguments::timeout(timeout)?);
        Lock::demand(slf, options)
    }

    /// Gives the hold back. Raises LostLock when it was not ours any more, LockInvalidOp when it is not
    /// locked, ForkedError when it is the parent process's, StoreError when no answer came: then the
    /// release goes on in the background. In each case the lock is idle afterwards.
    ///
    /// Waits for the store's answer, 5 s at most.
    fn unlock(&self, py: Python<'_>) -> PyResult<()> {
        let mut detail = Detail::new();
        let status = self.give_back(py, &mut detail)?;
        detail.check(py, status)
    }

    /// Renews the hold: its lease ends expire seconds from now; None: as long from now as it was given
    /// last. It never takes the lock anew. Raises LostLock when it is not ours any more, LockInvalidOp
    /// when it is not locked, StoreError when no answer came: then the hold is as it was.
    ///
    /// Waits for the store's answer, 5 s at most.
    #[pyo3(signature = (*, expire=None))]
    fn refresh(&self, py: Python<'_>, expire: Argument<'_, '_>) -> PyResult<()> {
        self._start_refresh(py, expire)?.0.done(py)
    }

    /// Takes the lock as threading.Lock.acquire does: waits for ever, timeout seconds, or not at all. True:
    /// held. False: not granted in time. Waits its turn where another thread uses this very object. The
    /// hold is renewed until release, unless the lock was made with an expire.
    #[pyo3(signature = (blocking=None, timeout=None), text_signature = "($self, blocking=True, timeout=-1)")]
    fn acquire(slf: &Bound<'_, Self>, blocking: Argument<'_, '_>, timeout: Argument<'_, '_>) -> PyResult<bool> {
        // Anything that is true or false will do, as there.
        let blocking = blocking.map_or(Ok(true), |blocking| blocking.is_truthy())?;
        let timeout_ms = arguments::acquire_timeout(blocking, timeout)?;
        Lock::take(slf, slf.get().options(Form::Scoped, 0, timeout_ms), &mut Detail::new())
    }

    /// Gives the hold back, from any thread: unlock under the name that threading.Lock has for it.
    fn release(&self, py: Python<'_>) -> PyResult<()> {
        self.unlock(py)
    }

    /// Whether this object is locked, be it overdue. Asks no store.
    fn locked(&self, py: Python<'_>) -> bool {
        matches!(self.status(py), NBL_OK | NBL_OVERDUE)
    }

    /// A context manager that takes the lock with an expire or a timeout of its own, in seconds. With an
    /// expire the hold is a plain lease, unless the lock was made with auto_refresh.
    #[pyo3(signature = (*, expire=None, timeout=None))]
    fn synchronize(slf: Bound<'_, Self>, expire: Argument<'_, '_>, timeout: Argument<'_, '_>) -> PyResult<Scope> {
        let (expire_ms, timeout_ms) = (arguments::expire(expire)?, arguments::timeout(timeout)?);
        Ok(Scope::new(slf.unbind(), expire_ms, timeout_ms))
    }

    /// What is locked.
    #[getter]
    pub fn key(&self) -> &str {
        &self.key
    }

    /// Whether the lock is held, and certainly ours at this moment. Asks no store.
    #[getter]
    fn held(&self, py: Python<'_>) -> bool {
        self.status(py) == NBL_OK
    }

    /// Whether there was a hold that cannot be relied on any more: the store said that it is lost, or it is
    /// past its deadline, so that others may take it over at any moment. Asks no store.
    #[getter]
    fn lost(&self, py: Python<'_>) -> bool {
        matches!(self.status(py), NBL_LOST | NBL_OVERDUE)
    }

    /// "idle", "held", "overdue" (past its deadline: others may take it over at any moment), "lost" (the
    /// store said so; unlock or refresh will raise LostLock), "pending" (an acquire or unlock is under
    /// way) or "forked" (held by the parent process). Asks no store.
    #[getter]
    fn state(&self, py: Python<'_>) -> &'static str {
        state_name(self.status(py))
    }

    /// For how many seconds the hold is certainly ours; 0.0 when it is not, or not held. Asks no store.
    #[getter]
    fn remaining(&self, py: Python<'_>) -> f64 {
        self.remaining_ms(py) as f64 / 1000.0
    }

    /// The fence of the hold: a number that grows with every grant of this key, for a resource that refuses
    /// what comes with a smaller one than it has seen. Raises LockInvalidOp when it is not locked.
    ///
    /// Does not wait where the grant brought one (on one machine, or with fence=True); otherwise the store
    /// is asked now, 10 s at most.
    #[getter]
    fn fence(&self, py: Python<'_>) -> PyResult<u64> {
        let op = self._start_fence(py)?;
        op.0.done(py)?;
        op.fence(py)
    }

    /// What is to be called at a loss.
    #[getter]
    fn _on_lost(&self) -> Option<&Py<PyAny>> {
        self.on_lost.as_ref()
    }

    /// Checks what is to be called at a loss.
    #[staticmethod]
    fn _check_on_lost(on_lost: Option<&Bound<'_, PyAny>>) -> PyResult<()> {
        arguments::callable("on_lost", on_lost).map(drop)
    }

    /// Starts an acquire, for an event loop.
    #[pyo3(signature = (*, scoped=false, blocking=true, expire=None, timeout=None))]
    fn _start_lock(
        &self,
        py: Python<'_>,
        scoped: bool,
        blocking: bool,
        expire: Argument<'_, '_>,
        timeout: Argument<'_, '_>,
    ) -> PyResult<Op> {
        let form = if scoped { Form::Scoped } else { Form::Bare };
        let timeout_ms = if blocking { arguments::timeout(timeout)? } else { NBL_NO_WAIT };
        self.ask(py, self.options(form, arguments::expire(expire)?, timeout_ms)).map(Op)
    }

    /// Starts looking who holds the key, for an event loop.
    fn _start_find(&self, py: Python<'_>) -> PyResult<Op> {
        holder::start(py, self).map(Op)
    }

    /// The error for what was not granted, with the holder that such an operation has found.
    fn _unavailable(&self, py: Python<'_>, found: PyRef<'_, Op>) -> Py<PyAny> {
        let record = Record::found(py, &found.0).ok();
        failure::unavailable(py, &self.key, &Detail::new(), record).into_value(py).into_any()
    }

    /// Starts an unlock, for an event loop.
    fn _start_unlock(&self, py: Python<'_>) -> PyResult<Op> {
        let handle = self.handle(py)?;
        // SAFETY: a handle of ours, and what `start` gives.
        Operation::start(py, |out, err| unsafe { nbl_unlock_start(handle, out, err) }).map(Op)
    }

    /// Starts a refresh, for an event loop.
    #[pyo3(signature = (*, expire=None))]
    fn _start_refresh(&self, py: Python<'_>, expire: Argument<'_, '_>) -> PyResult<Op> {
        let options = nbl_lock_options_t { expire_ms: arguments::expire(expire)?, ..self.defaults };
        // The lock's own expire is for its grants: a refresh goes on with the hold's.
        let handle = self.handle(py)?;
        // SAFETY: a handle of ours, options that outlive the call, and what `start` gives.
        Operation::start(py, |out, err| unsafe { nbl_refresh_start(handle, &raw const options, out, err) }).map(Op)
    }

    /// Starts asking for the fence, for an event loop.
    fn _start_fence(&self, py: Python<'_>) -> PyResult<Op> {
        let handle = self.handle(py)?;
        // SAFETY: a handle of ours, and what `start` gives.
        Operation::start(py, |out, err| unsafe { nbl_fence_start(handle, out, err) }).map(Op)
    }

    /// A descriptor that is readable while the hold is overdue or lost. It stays the library's.
    fn _lost_fileno(&self, py: Python<'_>) -> PyResult<i32> {
        // SAFETY: a handle of ours.
        match unsafe { nbl_lock_lost_fd(self.handle(py)?) } {
            -1 => Err(pyo3::exceptions::PyOSError::new_err("no descriptor could be made to watch a hold")),
            descriptor => Ok(descriptor),
        }
    }

    /// Takes the lock, and waits its turn where another thread uses this very object. The hold is renewed
    /// until the end of the block, unless the lock was made with an expire.
    fn __enter__<'py>(slf: Bound<'py, Self>) -> PyResult<Bound<'py, Self>> {
        Lock::demand(&slf, slf.get().options(Form::Scoped, 0, 0))?;
        Ok(slf)
    }

    /// Gives the hold back. Raises LostLock after a loss, unless the body has raised already.
    fn __exit__(
        &self,
        py: Python<'_>,
        _exc_type: &Bound<'_, PyAny>,
        exc: &Bound<'_, PyAny>,
        _traceback: &Bound<'_, PyAny>,
    ) -> PyResult<()> {
        self.leave(py, exc)
    }

    fn __repr__(slf: &Bound<'_, Self>) -> PyResult<String> {
        Ok(slf.get().show(slf.py(), &slf.get_type().name()?.to_string()))
    }

    fn __reduce__(slf: &Bound<'_, Self>) -> PyResult<()> {
        let kind = slf.get_type().name()?.to_string();
        Err(PyTypeError::new_err(format!(
            "a {kind} cannot be pickled or copied: pass the key, and make a {kind} of it where it is needed"
        )))
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        visit.call(&self.on_lost)
    }
}
