//! Threads that run more than one flow of control: gevent's greenlets, asyncio's tasks.

use pyo3::prelude::*;
use pyo3::types::{PyDict, PyString};

use crate::once::Once;

/// Waiting as gevent's greenlets do: the other greenlets of the thread run meanwhile.
pub struct Cooperation<'py>(Bound<'py, PyAny>);

/// How to wait if gevent has patched the standard library. Otherwise this costs one look into a dict.
#[inline]
pub fn wanted(py: Python<'_>) -> Option<Cooperation<'_>> {
    static NAME: Once<Py<PyString>> = Once::new();
    module_if_loaded(py, named(py, &NAME, "gevent.monkey"))?;
    let here = py.import("nblock._gevent").ok()?;
    let wanted = here.call_method0("wanted").is_ok_and(|wanted| wanted.is_truthy().unwrap_or(false));
    wanted.then(|| Cooperation(here.into_any()))
}

impl Cooperation<'_> {
    /// Waits until a descriptor is readable, at most the given time.
    pub fn wait(&self, descriptor: i32, limit_ms: Option<i64>) -> PyResult<()> {
        let seconds = limit_ms.map(|limit_ms| limit_ms as f64 / 1000.0);
        self.0.call_method1("wait", (descriptor, seconds)).map(drop)
    }

    /// Which greenlet this is.
    pub fn greenlet(&self) -> Option<usize> {
        self.0.call_method0("flow").ok()?.extract().ok()
    }

    /// Lets others run for a moment.
    pub fn pause(&self) -> PyResult<()> {
        self.0.call_method0("pause").map(drop)
    }
}

/// Whether this thread runs an event loop of asyncio, which is blocked while the thread waits.
pub fn in_event_loop(py: Python<'_>) -> bool {
    static NAME: Once<Py<PyString>> = Once::new();
    let running = || module_if_loaded(py, named(py, &NAME, "asyncio"))?.call_method0("_get_running_loop").ok();
    running().is_some_and(|running| !running.is_none())
}

/// Warns that an event loop is blocked, at the line of the program that can be changed.
pub fn warn_of_standstill(py: Python<'_>) -> PyResult<()> {
    py.import("nblock._standstill")?.call_method0("warn").map(drop)
}

/// A text that is made once: cheaper to look up than a new one.
#[inline]
fn named<'py>(py: Python<'py>, name: &'static Once<Py<PyString>>, text: &str) -> &'py Bound<'py, PyString> {
    name.get_or_init(|| PyString::intern(py, text).unbind()).bind(py)
}

#[inline]
fn module_if_loaded<'py>(py: Python<'py>, name: &Bound<'py, PyString>) -> Option<Bound<'py, PyAny>> {
    static MODULES: Once<Py<PyDict>> = Once::new();
    let modules = MODULES.get_or_try_init(|| {
        py.import("sys")?.getattr("modules")?.cast_into::<PyDict>().map(Bound::unbind).map_err(PyErr::from)
    });
    modules.ok()?.bind(py).get_item(name).ok().flatten()
}
