//! Inspection: records as they were found.

use std::ffi::{CStr, c_char};
use std::ptr;
use std::sync::Arc;

use nblock::ffi::*;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use crate::client::Client;
use crate::failure::{Detail, shown_key};
use crate::operation::Operation;

/// A list of records that the library owns.
struct List(*mut nbl_list_t);

// SAFETY: a handle is a checked id, which any thread may use.
unsafe impl Send for List {}
// SAFETY: as above.
unsafe impl Sync for List {}

impl Drop for List {
    fn drop(&mut self) {
        // SAFETY: a handle of ours.
        unsafe { nbl_list_free(self.0) };
    }
}

/// A record as it was read from the store: which process holds, or held, a lock. Never reveals a token.
#[pyclass(frozen, module = "nblock")]
pub struct Record {
    list: Arc<List>,
    index: usize,
    remaining_ms: i64,
    expires_at_ms: u64,
    acquired_at_ms: u64,
    /// The holder's process id; None if the record does not contain it.
    #[pyo3(get)]
    pid: Option<u32>,
    /// The fence of the hold; None if it has none.
    #[pyo3(get)]
    fence: Option<u64>,
    /// How many times a reentrant lock is locked; 0 for a plain lock.
    #[pyo3(get)]
    lock_count: u32,
    /// Whether the lease had run out when the record was read.
    #[pyo3(get)]
    expired: bool,
    /// The key.
    #[pyo3(get)]
    pub key: String,
    /// The key's hash, as NoBrainer stores it: base64 of SHA-1.
    #[pyo3(get)]
    key_hash: String,
    /// The holder's host name; None if the record does not contain it.
    #[pyo3(get)]
    pub host: Option<String>,
    /// The boot id of the holder's machine; None if the record does not contain it.
    #[pyo3(get)]
    pub boot_id: Option<String>,
    /// The holder's app name; None if the record does not contain it.
    #[pyo3(get)]
    pub app: Option<String>,
    /// Identifies exactly this state of the record: it changes with every renewal. Reveals no token.
    #[pyo3(get)]
    version: String,
    /// What is wrong with a damaged record; None if it is intact. A damaged record is never granted; its other fields
    /// may be empty, and `key` may be a placeholder. `nblock break` removes it.
    #[pyo3(get)]
    damaged: Option<String>,
    /// Whether nblock did not write the record: it is another library's lock or, in Redis, perhaps no lock at all, and
    /// `break_` does not delete it there.
    #[pyo3(get)]
    foreign: bool,
}

/// All records of a client's store, or the expired ones.
pub fn list(py: Python<'_>, client: &Client, filter: i32) -> PyResult<Vec<Record>> {
    let options = nbl_list_options_t { struct_size: size_of::<nbl_list_options_t>() as u32, filter };
    // A store that has many records at hand lists them before it answers.
    let op = Operation::start_detached(py, |out, err| {
        // SAFETY: a handle of ours, options that outlive the call, and what `start_detached` gives.
        unsafe { nbl_list_start(client.handle(), &raw const options, out, err) }
    })?;
    op.done(py)?;
    let list = take(py, &op)?;
    let (mut length, mut detail) = (0, Detail::new());
    // SAFETY: a handle of ours and two locals.
    let status = unsafe { nbl_list_length(list.0, &raw mut length, detail.out()) };
    detail.check(py, status)?;
    (0..length).map(|index| Record::read(py, &list, index)).collect()
}

/// The record of a key.
pub fn find(py: Python<'_>, client: &Client, key: &str) -> PyResult<Option<Record>> {
    // SAFETY: a handle of ours, a key of that length, and what `start` gives.
    let op = Operation::start(py, |out, err| unsafe {
        nbl_find_start(client.handle(), key.as_ptr().cast(), key.len(), out, err)
    })?;
    let mut detail = Detail::new();
    match op.wait(py, &mut detail)? {
        NBL_NOT_FOUND => Ok(None),
        status => {
            detail.check(py, status)?;
            Record::found(py, &op).map(Some)
        }
    }
}

fn take(py: Python<'_>, op: &Operation) -> PyResult<Arc<List>> {
    let (mut list, mut detail) = (ptr::null_mut(), Detail::new());
    // SAFETY: a handle of ours and two locals.
    let status = unsafe { nbl_op_take_list(op.handle(), &raw mut list, detail.out()) };
    detail.check(py, status)?;
    Ok(Arc::new(List(list)))
}

impl Record {
    /// The record that an operation which looked for a key has found.
    pub fn found(py: Python<'_>, op: &Operation) -> PyResult<Record> {
        Record::read(py, &take(py, op)?, 0)
    }

    pub fn is_expired(&self) -> bool {
        self.expired
    }

    pub fn process(&self) -> Option<u32> {
        self.pid
    }

    pub fn seconds_left(&self) -> f64 {
        self.remaining()
    }

    fn read(py: Python<'_>, list: &Arc<List>, index: usize) -> PyResult<Record> {
        // SAFETY: integers and pointers, all zero.
        let mut facts: nbl_record_t = unsafe { std::mem::zeroed() };
        facts.struct_size = size_of::<nbl_record_t>() as u32;
        let mut detail = Detail::new();
        // SAFETY: a handle of ours and two locals.
        let status = unsafe { nbl_list_record(list.0, index, &raw mut facts, detail.out()) };
        detail.check(py, status)?;
        // SAFETY: a text of the list, which is there, and NUL-terminated.
        let text = |text: *const c_char| String::from_utf8(unsafe { CStr::from_ptr(text) }.to_bytes().to_vec());
        let said = |given| text(given).map(|text| if text.is_empty() { None } else { Some(text) });
        // SAFETY: a text of the list of that length.
        let key = unsafe { std::slice::from_raw_parts(facts.key.cast::<u8>(), facts.key_len) };
        Ok(Record {
            list: Arc::clone(list),
            index,
            remaining_ms: facts.remaining_ms,
            expires_at_ms: facts.expires_at_ms,
            acquired_at_ms: facts.acquired_at_ms,
            pid: (facts.pid != 0).then_some(facts.pid),
            fence: (facts.fence != 0).then_some(facts.fence),
            lock_count: facts.lock_count,
            expired: facts.expired != 0,
            key: String::from_utf8(key.to_vec())?,
            key_hash: text(facts.key_hash)?,
            host: said(facts.host)?,
            boot_id: said(facts.boot_id)?,
            app: said(facts.app)?,
            version: text(facts.version)?,
            damaged: said(facts.damaged)?,
            foreign: facts.foreign != 0,
        })
    }
}

#[pymethods]
impl Record {
    /// Remaining seconds of the lease when the record was read. If it had run out: minus the seconds since then. If it
    /// has no end: math.inf.
    #[getter]
    fn remaining(&self) -> f64 {
        if self.remaining_ms == i64::MAX { f64::INFINITY } else { self.remaining_ms as f64 / 1000.0 }
    }

    /// When the lease ends, in seconds since 1970; math.inf if it has no end.
    #[getter]
    fn expires_at(&self) -> f64 {
        if self.expires_at_ms == u64::MAX { f64::INFINITY } else { self.expires_at_ms as f64 / 1000.0 }
    }

    /// When the lock was granted, in seconds since 1970; None if the record does not contain it.
    #[getter]
    fn acquired_at(&self) -> Option<f64> {
        (self.acquired_at_ms != 0).then_some(self.acquired_at_ms as f64 / 1000.0)
    }

    /// Breaks the lock by force: deletes the record if it is still exactly as it was read. Returns True if it was
    /// deleted: then the holder, if there is one, loses its hold, but may still be working. Returns False if the
    /// record has changed or is gone, and in Redis if nblock did not write it: it may be another program's data.
    ///
    /// With if_fence, if_owner ("HOST:PID") or if_version, the lock is broken only if the record has that fence,
    /// holder or version; otherwise the store is not asked, and the result is False. An if_owner that is not HOST:PID
    /// raises ValueError.
    ///
    /// Waits for the store's reply, at most op_timeout (5 s by default). Raises StoreError.
    #[pyo3(name = "break_", signature = (*, if_fence=None, if_owner=None, if_version=None))]
    fn break_it(
        &self,
        py: Python<'_>,
        if_fence: Option<u64>,
        if_owner: Option<&str>,
        if_version: Option<&str>,
    ) -> PyResult<bool> {
        if let Some(given) = if_owner
            // A host name may have colons in it.
            && !given.rsplit_once(':').is_some_and(|(host, pid)| !host.is_empty() && pid.parse::<u32>().is_ok())
        {
            return Err(PyValueError::new_err(format!(
                "if_owner must be HOST:PID, of the record's host and pid (got {})",
                shown_key(py, given)
            )));
        }
        let owner = || Some(format!("{}:{}", self.host.as_ref()?, self.pid?));
        if if_fence.is_some_and(|fence| self.fence != Some(fence))
            || if_owner.is_some_and(|given| owner().as_deref() != Some(given))
            || if_version.is_some_and(|version| self.version != version)
        {
            return Ok(false);
        }
        // SAFETY: a handle of ours, and what `start` gives.
        let op = Operation::start(py, |out, err| unsafe { nbl_break_start(self.list.0, self.index, out, err) })?;
        let mut detail = Detail::new();
        match op.wait(py, &mut detail)? {
            NBL_NOT_FOUND => Ok(false),
            status => detail.check(py, status).map(|()| true),
        }
    }

    fn __repr__(&self, py: Python<'_>) -> PyResult<String> {
        let key = shown_key(py, &self.key);
        let mut shown = format!("<nblock.Record {key}");
        if let Some(pid) = self.pid {
            shown += &format!(" held by process {pid}");
            if let Some(app) = &self.app {
                shown += &format!(" ({app})");
            }
            if let Some(host) = &self.host {
                shown += &format!(" on {host}");
            }
        } else if self.foreign {
            shown += " (foreign)";
        }
        let remaining = self.remaining();
        Ok(match self.expired {
            false if remaining.is_infinite() => format!("{shown}, with no end>"),
            false => format!("{shown}, {remaining:.1} s left>"),
            true => format!("{shown}, expired {:.1} s ago>", -remaining),
        })
    }
}
