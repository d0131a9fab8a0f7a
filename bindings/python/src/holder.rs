//! The holder of a lock that was not granted, for the error that says so.

use std::collections::HashSet;
use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use nblock::ffi::*;
use pyo3::prelude::*;

use crate::cooperation;
use crate::failure::{self, Detail};
use crate::lock::Lock;
use crate::once::Once;
use crate::operation::Operation;
use crate::record::Record;

/// How long finding the holder for an error message may take, beyond the timeout of the lock.
pub const LIMIT_MS: i64 = 250;

/// The addresses of the lock objects of this process that were ever granted. Only a thread that has the interpreter
/// takes its mutex, so that no fork finds it locked.
static GRANTED: Mutex<Option<HashSet<usize>>> = Mutex::new(None);

/// The thread that a lock object was granted to last.
#[derive(Default)]
pub struct Grantee {
    thread: AtomicUsize,
    listed: AtomicBool,
}

impl Grantee {
    /// Records that `lock`, whose grantee this is, was granted to this thread.
    #[inline]
    pub fn note(&self, py: Python<'_>, lock: &Lock) {
        self.thread.store(this_thread(py), Ordering::Relaxed);
        if !self.listed.swap(true, Ordering::Relaxed)
            && let Ok(mut granted) = GRANTED.lock()
        {
            granted.get_or_insert_default().insert(&raw const *lock as usize);
        }
    }

    /// Forgets `lock`, which is being dropped.
    pub fn forget(&self, lock: *const Lock) {
        if self.listed.load(Ordering::Relaxed)
            && let Ok(mut granted) = GRANTED.lock()
        {
            granted.get_or_insert_default().remove(&(lock as usize));
        }
    }
}

/// A number that identifies this thread, or this greenlet of gevent, among those that exist.
#[inline]
fn this_thread(py: Python<'_>) -> usize {
    if let Some(greenlet) = cooperation::wanted(py).and_then(|cooperation| cooperation.greenlet()) {
        return greenlet;
    }
    thread_local!(static HERE: u8 = const { 0 });
    HERE.with(|here| &raw const *here as usize)
}

/// Whether an object of this process that was granted to this thread holds the key.
fn held_by_this_thread(py: Python<'_>, key: &str) -> bool {
    let this_thread = this_thread(py);
    let Ok(granted) = GRANTED.lock() else { return false };
    granted.iter().flatten().any(|address| {
        // SAFETY: an object is taken off the list when it is dropped, which needs the interpreter; we have it.
        let lock = unsafe { &*(*address as *const Lock) };
        lock.grantee.thread.load(Ordering::Relaxed) == this_thread && lock.holds(py, key)
    })
}

/// The error for a lock that was not granted; it names the holder if the store reports it soon enough.
#[cold]
pub fn unavailable(py: Python<'_>, lock: &Lock, detail: &Detail) -> PyErr {
    let record = find(py, lock);
    failure::unavailable(py, lock.key(), detail, record)
}

fn find(py: Python<'_>, lock: &Lock) -> Option<Record> {
    let op = start(py, lock).ok()?;
    let mut detail = Detail::new();
    match op.wait_at_most(py, LIMIT_MS, &mut detail) {
        Ok(NBL_OK) => Record::found(py, &op).ok(),
        _ => None,
    }
}

/// Starts looking for the record of a lock's key.
pub fn start(py: Python<'_>, lock: &Lock) -> PyResult<Operation> {
    let (client, key) = (lock.store(), lock.key());
    // SAFETY: a handle of ours, a key of that length, and what `start` gives.
    Operation::start(py, |out, err| unsafe { nbl_find_start(client, key.as_ptr().cast(), key.len(), out, err) })
}

/// The holder in a record, as a message shows it: "held by HOST:PID APP (this process), 3.1 s left".
pub fn describe(py: Python<'_>, record: &Record) -> Option<String> {
    if record.is_expired() {
        return None;
    }
    let mut text = String::from("held by ");
    match (&record.host, record.process()) {
        (None, None) => text.push_str("somebody else"),
        (host, pid) => {
            text += &printable(host.as_deref().unwrap_or("an unknown host"));
            text += &pid.map_or_else(String::new, |pid| format!(":{pid}"));
        }
    }
    if let Some(app) = &record.app {
        text += &format!(" {}", printable(app));
    }
    if let Some(relation) = relation(py, record) {
        text += &format!(" ({relation})");
    }
    match record.seconds_left() {
        left if left.is_infinite() => text.push_str(", with no end"),
        left => text += &format!(", {left:.1} s left"),
    }
    Some(text)
}

/// The holder's relation to this thread, if it is known: waiting for such a holder may never end.
fn relation(py: Python<'_>, record: &Record) -> Option<&'static str> {
    let pid = record.process()?;
    // A process id means something on its own machine, and in its own container, which has a host name of its own.
    if record.boot_id.as_deref() != Some(trimmed("/proc/sys/kernel/random/boot_id")?.as_str())
        || record.host.as_deref() != Some(trimmed("/proc/sys/kernel/hostname")?.as_str())
    {
        return None;
    }
    if pid == std::process::id() {
        return Some(if held_by_this_thread(py, &record.key) { "this thread" } else { "this process" });
    }
    let runs_under_it = is_environment_key(py, &record.key);
    if !is_ancestor(pid) {
        return None;
    }
    Some(if runs_under_it {
        "the `nblock run` that started this program, see NBLOCK_KEY"
    } else {
        "a parent of this process"
    })
}

/// Whether `nblock run` holds the key for this process, according to the environment.
fn is_environment_key(py: Python<'_>, key: &str) -> bool {
    static ENVIRONB: Once<Py<PyAny>> = Once::new();
    // Python's copy of the environment: the C library's may change while it is read.
    let environment = ENVIRONB.import(py, "os", "environb");
    let value = environment.and_then(|environment| environment.call_method1("get", (&b"NBLOCK_KEY"[..],)));
    value.is_ok_and(|value| value.extract::<Vec<u8>>().is_ok_and(|value| value == key.as_bytes()))
}

fn is_ancestor(pid: u32) -> bool {
    let mut process = std::process::id();
    // No chain of processes is that long.
    for _ in 0..1000 {
        let Ok(stat) = fs::read(format!("/proc/{process}/stat")) else { return false };
        // The name in parentheses may hold anything.
        let Some(end) = stat.iter().rposition(|byte| *byte == b')') else { return false };
        let rest = OsStr::from_bytes(&stat[end + 1..]).to_string_lossy().into_owned();
        let Some(parent) = rest.split_whitespace().nth(1).and_then(|parent| parent.parse().ok()) else { return false };
        if parent == pid {
            return true;
        }
        if parent <= 1 {
            return false;
        }
        process = parent;
    }
    false
}

fn trimmed(path: &str) -> Option<String> {
    Some(fs::read_to_string(path).ok()?.trim_end().to_owned())
}

/// Text from another program, made safe for a message.
fn printable(text: &str) -> String {
    let short: String = text.chars().take(40).collect();
    let escaped = short.escape_debug().to_string();
    if short.len() < text.len() { escaped + "..." } else { escaped }
}
