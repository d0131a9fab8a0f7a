//! Blocks with options of their own.

use pyo3::prelude::*;

use crate::lock::{Form, Lock};

/// The context manager that Lock.synchronize returns. It may be entered any number of times.
#[pyclass(frozen, module = "nblock._nblock")]
pub struct Scope {
    lock: Py<Lock>,
    expire_ms: i64,
    timeout_ms: i64,
}

impl Scope {
    pub fn new(lock: Py<Lock>, expire_ms: i64, timeout_ms: i64) -> Scope {
        Scope { lock, expire_ms, timeout_ms }
    }
}

#[pymethods]
impl Scope {
    fn __enter__<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, Lock>> {
        let lock = self.lock.bind(py).clone();
        Lock::demand(&lock, lock.get().options(Form::Scoped, self.expire_ms, self.timeout_ms))?;
        Ok(lock)
    }

    fn __exit__(
        &self,
        py: Python<'_>,
        _exc_type: &Bound<'_, PyAny>,
        exc: &Bound<'_, PyAny>,
        _traceback: &Bound<'_, PyAny>,
    ) -> PyResult<()> {
        self.lock.get().leave(py, exc)
    }
}
