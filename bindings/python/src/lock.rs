//! Locks.

use std::ffi::CString;
use std::ptr;

use nblock::ffi::*;
use pyo3::PyTraverseError;
use pyo3::PyVisit;
use pyo3::exceptions::{PyResourceWarning, PyTypeError};
use pyo3::prelude::*;

use crate::arguments::{self, Argument};
use crate::client::Client;
use crate::failure::{self, Detail, shown_key};
use crate::holder::{self, Grantee};
use crate::once::Once;
use crate::operation::{Op, Operation};
use crate::record::Record;
use crate::scope::Scope;

/// A distributed lock: one program's object for one key.
///
/// - key: the name that is locked, any str of 1 byte to 1 MiB in UTF-8.
/// - expire: the length of a lease in seconds, 0.001 to 31622400; None means the client's.
/// - timeout: how many seconds to wait for a grant; 0 tries once, math.inf waits forever; None means the
///   client's. `acquire` does not use it: its own timeout is without limit by default.
/// - auto_refresh: whether a hold is renewed, each time after a third of its lease, until it is unlocked.
///   None means: in `with` and `acquire` yes, unless an expire is set; in `lock` and `try_lock` no.
/// - fence: whether a grant comes with a fence even if the store must be asked for it.
/// - on_lost: called as on_lost(lock), in a thread of its own, when the hold is no longer certainly ours.
/// - client: the client whose store is used; None means the default client.
///
/// Making a lock object does not take the lock, and does not wait. The object may be shared by threads, and
/// used by forked children; what the parent holds stays with the parent.
#[pyclass(frozen, subclass, weakref, module = "nblock")]
pub struct Lock {
    key: String,
    /// For a reentrant lock: its owner token; the inner `None` means a random one.
    pub owner: Option<Option<CString>>,
    /// The options that the object was made with.
    defaults: nbl_lock_options_t,
    client: Once<Py<Client>>,
    handle: Once<Handle>,
    on_lost: Option<Py<PyAny>>,
    pub grantee: Grantee,
}

/// A lock handle of the library, made when the lock is first used: importing a module that makes locks opens no
/// store.
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

/// The form of a call that takes the lock.
#[derive(Clone, Copy)]
pub enum Form {
    /// `lock`, `try_lock`: a plain lease; an error if the object is already in use.
    Bare,
    /// `with`, `acquire`: waits for its turn on the object; renewed, unless an expire is set.
    Scoped,
}

impl Lock {
    #[inline]
    pub fn handle(&self, py: Python<'_>) -> PyResult<*mut nbl_lock_t> {
        match self.handle.get() {
            Some(handle) => Ok(handle.0),
            None => self.open(py),
        }
    }

    #[cold]
    fn open(&self, py: Python<'_>) -> PyResult<*mut nbl_lock_t> {
        static DEFAULT_CLIENT: Once<Py<PyAny>> = Once::new();
        let client = self.client.get_or_try_init(|| -> PyResult<Py<Client>> {
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
        Ok(self.handle.get_or_init(|| Handle(handle)).0)
    }

    /// The options of a call: those that it sets, otherwise the object's own.
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

    /// Takes the lock, and waits for it. `false`: not granted; `detail` says why.
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

    /// The client that the lock was used with; `NULL` if it was not used yet.
    pub fn store(&self) -> *mut nbl_client_t {
        self.client.get().map_or(ptr::null_mut(), |client| client.get().handle())
    }

    /// Whether this object holds that key.
    pub fn holds(&self, py: Python<'_>, key: &str) -> bool {
        self.key == key && matches!(self.current(py), Ok(NBL_STATE_HELD | NBL_STATE_OVERDUE))
    }

    /// Unlocks, and returns the status of that.
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

    /// Makes `on_lost` be called when the hold that was just granted is no longer certainly ours. If that fails,
    /// the hold is released.
    #[cold]
    fn watch(&self, slf: &Bound<'_, Self>) -> PyResult<()> {
        static WATCH: Once<Py<PyAny>> = Once::new();
        let py = slf.py();
        let watch = || {
            let descriptor = self._lost_fileno(py)?;
            WATCH.import(py, "nblock._watch", "watch")?.call1((descriptor, slf)).map(drop)
        };
        watch().inspect_err(|_| {
            // An error of watching is reported, whatever the result of this is.
            let _ = self.give_back(py, &mut Detail::new());
        })
    }

    #[cold]
    fn unwatch(&self, py: Python<'_>) -> PyResult<()> {
        static UNWATCH: Once<Py<PyAny>> = Once::new();
        UNWATCH.import(py, "nblock._watch", "unwatch")?.call1((self._lost_fileno(py)?,)).map(drop)
    }

    /// The state: `NBL_STATE_...`.
    #[inline]
    fn current(&self, py: Python<'_>) -> PyResult<nbl_lock_state_t> {
        // A lock that was never used has no handle yet.
        let Some(handle) = self.handle.get() else { return Ok(NBL_STATE_IDLE) };
        let (mut state, mut detail) = (0, Detail::new());
        // SAFETY: a handle of ours and two locals.
        let status = unsafe { nbl_lock_state(handle.0, &raw mut state, detail.out()) };
        detail.check(py, status).map(|()| state)
    }

    fn remaining_ms(&self, py: Python<'_>) -> PyResult<u64> {
        let Some(handle) = self.handle.get() else { return Ok(0) };
        let (mut remaining, mut detail) = (0, Detail::new());
        // SAFETY: a handle of ours and two locals.
        match unsafe { nbl_lock_remaining_ms(handle.0, &raw mut remaining, detail.out()) } {
            NBL_ERR_INVALID_OP | NBL_LOST | NBL_ERR_FORKED => Ok(0),
            status => detail.check(py, status).map(|()| remaining),
        }
    }

    /// Warns when a lock is collected while it is held: nothing can release that hold any more.
    #[cold]
    fn warn_of_abandoned(&self, py: Python<'_>, kind: &str) -> PyResult<()> {
        let message = format!(
            "{} was garbage-collected while it was held: it is no longer renewed, and its lease runs out",
            self.show(py, kind)?
        );
        let message = CString::new(message.replace('\0', "\\0"))?;
        PyErr::warn(py, &py.get_type::<PyResourceWarning>(), &message, 1)
    }

    fn show(&self, py: Python<'_>, kind: &str) -> PyResult<String> {
        let key = shown_key(py, &self.key);
        let state = match self.current(py)? {
            NBL_STATE_HELD => format!("held, {:.1} s left", self.remaining_ms(py)? as f64 / 1000.0),
            state => state_name(state).to_string(),
        };
        Ok(format!("<nblock.{kind} {key} {state}>"))
    }
}

fn state_name(state: nbl_lock_state_t) -> &'static str {
    match state {
        NBL_STATE_IDLE => "idle",
        NBL_STATE_PENDING => "pending",
        NBL_STATE_HELD => "held",
        NBL_STATE_OVERDUE => "overdue",
        NBL_STATE_LOST => "lost",
        NBL_STATE_FORKED => "forked",
        _ => "unknown",
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        self.grantee.forget(self);
        let Some(handle) = self.handle.get() else { return };
        let mut state = NBL_STATE_IDLE;
        // SAFETY: a handle of ours and a local.
        let status = unsafe { nbl_lock_state(handle.0, &raw mut state, ptr::null_mut()) };
        if status != NBL_OK || !matches!(state, NBL_STATE_HELD | NBL_STATE_OVERDUE) {
            return;
        }
        Python::attach(|py| {
            // A closed client has given back what it could, and a program may end without its plain leases.
            if self.client.get().is_none_or(|client| client.get().is_closed()) {
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
            client: Once::new(),
            handle: Once::new(),
            on_lost: arguments::callable("on_lost", on_lost)?,
            grantee: Grantee::default(),
        };
        if let Some(client) = client {
            let client = arguments::client(client)?;
            lock.client.get_or_init(|| client);
        }
        Ok(lock)
    }

    /// Tries once to take the lock, as a plain lease. Returns True if it is held now, False if another holder
    /// has it.
    ///
    /// expire is the length of the lease in seconds, if it differs from the object's. Waits for the store's reply,
    /// at most op_timeout (5 s by default). Raises LockInvalidOp if this object already holds the lock, StoreError
    /// if the store does not reply.
    #[pyo3(signature = (*, expire=None))]
    fn try_lock(slf: &Bound<'_, Self>, expire: Argument<'_, '_>) -> PyResult<bool> {
        let options = slf.get().options(Form::Bare, arguments::expire(expire)?, NBL_NO_WAIT);
        Lock::take(slf, options, &mut Detail::new())
    }

    /// Takes the lock, as a plain lease, and waits for it.
    ///
    /// expire is the length of the lease, timeout how long to wait, both in seconds, if they differ from the
    /// object's. Other threads run while this waits. If a signal handler raises, the wait ends, and nothing remains
    /// in the store. Raises LockUnavailable if the lock is not granted in time, LockInvalidOp if this object
    /// already holds it, StoreError if the store does not reply.
    #[pyo3(signature = (*, expire=None, timeout=None))]
    fn lock(slf: &Bound<'_, Self>, expire: Argument<'_, '_>, timeout: Argument<'_, '_>) -> PyResult<()> {
        let options = slf.get().options(Form::Bare, arguments::expire(expire)?, arguments::timeout(timeout)?);
        Lock::demand(slf, options)
    }

    /// Releases the hold. Waits for the store's reply, at most op_timeout (5 s by default).
    ///
    /// Raises LostLock if the hold was no longer ours, LockInvalidOp if the lock is not held, ForkedError if the
    /// hold belongs to the parent process, StoreError if no reply arrived: then the release continues in the
    /// background. In each case, the lock is idle afterwards.
    fn unlock(&self, py: Python<'_>) -> PyResult<()> {
        let mut detail = Detail::new();
        let status = self.give_back(py, &mut detail)?;
        detail.check(py, status)
    }

    /// Renews the hold: its lease ends expire seconds from now. With None, the length that was given last is used
    /// again. Does not take the lock again if the hold is gone. Waits for the store's reply, at most op_timeout (5 s
    /// by default).
    ///
    /// Raises LostLock if the hold is no longer ours, LockInvalidOp if the lock is not held, ForkedError if the
    /// hold belongs to the parent process, StoreError if no reply arrived: then the hold continues, and ends as before, or
    /// earlier if the new lease is shorter.
    #[pyo3(signature = (*, expire=None))]
    fn refresh(&self, py: Python<'_>, expire: Argument<'_, '_>) -> PyResult<()> {
        self._start_refresh(py, expire)?.0.done(py)
    }

    /// Takes the lock as threading.Lock.acquire does: waits forever, at most timeout seconds, or (with
    /// blocking=False) not at all. Returns True if it is held now, False if it was not granted in time.
    ///
    /// If another thread uses this object, waits for its turn. The hold is renewed until release, unless the lock
    /// was made with an expire.
    #[pyo3(signature = (blocking=None, timeout=None), text_signature = "($self, blocking=True, timeout=-1)")]
    fn acquire(slf: &Bound<'_, Self>, blocking: Argument<'_, '_>, timeout: Argument<'_, '_>) -> PyResult<bool> {
        // Anything that is true or false will do, as there.
        let blocking = blocking.map_or(Ok(true), |blocking| blocking.is_truthy())?;
        let timeout_ms = arguments::acquire_timeout(blocking, timeout)?;
        Lock::take(slf, slf.get().options(Form::Scoped, 0, timeout_ms), &mut Detail::new())
    }

    /// Releases the hold, from any thread: the same as unlock, under the name that threading.Lock uses.
    fn release(&self, py: Python<'_>) -> PyResult<()> {
        self.unlock(py)
    }

    /// Returns whether this object is locked; also True if the hold is overdue. Does not ask the store.
    fn locked(&self, py: Python<'_>) -> PyResult<bool> {
        Ok(matches!(self.current(py)?, NBL_STATE_HELD | NBL_STATE_OVERDUE))
    }

    /// Returns a context manager that takes the lock with an expire or a timeout of its own, in seconds. With an
    /// expire, the hold is a plain lease, unless the lock was made with auto_refresh.
    #[pyo3(signature = (*, expire=None, timeout=None))]
    fn synchronize(slf: Bound<'_, Self>, expire: Argument<'_, '_>, timeout: Argument<'_, '_>) -> PyResult<Scope> {
        let (expire_ms, timeout_ms) = (arguments::expire(expire)?, arguments::timeout(timeout)?);
        Ok(Scope::new(slf.unbind(), expire_ms, timeout_ms))
    }

    /// The key.
    #[getter]
    pub fn key(&self) -> &str {
        &self.key
    }

    /// Whether the lock is held, and certainly ours at this moment. Does not ask the store.
    #[getter]
    fn held(&self, py: Python<'_>) -> PyResult<bool> {
        Ok(self.current(py)? == NBL_STATE_HELD)
    }

    /// Whether the hold can no longer be relied on: the store has reported that it is lost, or it is past its
    /// deadline, so that another caller may take it over at any moment. Does not ask the store.
    #[getter]
    fn lost(&self, py: Python<'_>) -> PyResult<bool> {
        Ok(matches!(self.current(py)?, NBL_STATE_LOST | NBL_STATE_OVERDUE))
    }

    /// "idle", "held", "overdue" (past its deadline: another caller may take it over at any moment), "lost" (the
    /// store has reported it; the next unlock or refresh will raise LostLock), "pending" (an acquire or unlock is
    /// in progress) or "forked" (held by the parent process). Does not ask the store.
    #[getter]
    fn state(&self, py: Python<'_>) -> PyResult<&'static str> {
        Ok(state_name(self.current(py)?))
    }

    /// For how many seconds the hold is certainly ours; 0.0 if it is not, or if there is no hold. Does not ask the
    /// store.
    #[getter]
    fn remaining(&self, py: Python<'_>) -> PyResult<f64> {
        Ok(self.remaining_ms(py)? as f64 / 1000.0)
    }

    /// The fence of the hold: a number that grows with every grant of this key, for a protected resource that
    /// refuses a smaller one than the largest it has seen. Raises LockInvalidOp if the lock is not held.
    ///
    /// Does not wait if the grant brought one: always, but on RethinkDB only with fence=True. Otherwise the store is
    /// asked now: waits at most twice op_timeout (10 s by default).
    #[getter]
    fn fence(&self, py: Python<'_>) -> PyResult<u64> {
        let op = self._start_fence(py)?;
        op.0.done(py)?;
        op.fence(py)
    }

    /// The callable for a loss.
    #[getter]
    fn _on_lost(&self) -> Option<&Py<PyAny>> {
        self.on_lost.as_ref()
    }

    /// Checks the callable for a loss.
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

    /// Starts finding the holder of the key, for an event loop.
    fn _start_find(&self, py: Python<'_>) -> PyResult<Op> {
        holder::start(py, self).map(Op)
    }

    /// The error for a lock that was not granted, with the holder that the operation has found.
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
        Operation::start(py, |out, err| unsafe { nbl_lock_fence_start(handle, out, err) }).map(Op)
    }

    /// A descriptor that is readable while the hold is overdue or lost. It belongs to the library.
    fn _lost_fileno(&self, py: Python<'_>) -> PyResult<i32> {
        // SAFETY: a handle of ours.
        match unsafe { nbl_lock_lost_fd(self.handle(py)?) } {
            -1 => Err(pyo3::exceptions::PyOSError::new_err("no file descriptor could be created to watch a hold")),
            descriptor => Ok(descriptor),
        }
    }

    /// Takes the lock; if another thread uses this object, waits for its turn. The hold is renewed until the end
    /// of the block, unless the lock was made with an expire.
    fn __enter__<'py>(slf: Bound<'py, Self>) -> PyResult<Bound<'py, Self>> {
        Lock::demand(&slf, slf.get().options(Form::Scoped, 0, 0))?;
        Ok(slf)
    }

    /// Releases the hold. Raises LostLock after a loss, unless the body has already raised.
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
        slf.get().show(slf.py(), &slf.get_type().name()?.to_string())
    }

    fn __reduce__(slf: &Bound<'_, Self>) -> PyResult<()> {
        let kind = slf.get_type().name()?.to_string();
        Err(PyTypeError::new_err(format!(
            "a {kind} cannot be pickled or copied: pass its key, and make a {kind} where it is needed"
        )))
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        visit.call(&self.on_lost)
    }
}
