//! Values that are made once, when they are first needed.

use once_cell::race::OnceBox;
use pyo3::PyTypeCheck;
use pyo3::prelude::*;

/// A value that is made once. Unlike pyo3's cells and `intern!`, a thread never waits for another one that is making it:
/// in a forked child that thread does not exist, and the wait would never end (R16). Threads that meet each make a
/// value, and the first one is kept.
pub struct Once<T>(OnceBox<T>);

impl<T> Once<T> {
    pub const fn new() -> Once<T> {
        Once(OnceBox::new())
    }

    #[inline]
    pub fn get(&self) -> Option<&T> {
        self.0.get()
    }

    pub fn get_or_init(&self, make: impl FnOnce() -> T) -> &T {
        self.0.get_or_init(|| Box::new(make()))
    }

    pub fn get_or_try_init<E>(&self, make: impl FnOnce() -> Result<T, E>) -> Result<&T, E> {
        self.0.get_or_try_init(|| make().map(Box::new))
    }
}

impl<T: PyTypeCheck> Once<Py<T>> {
    /// What a module has under that name.
    pub fn import<'py>(&self, py: Python<'py>, module: &str, name: &str) -> PyResult<&Bound<'py, T>> {
        let imported = self.get_or_try_init(|| -> PyResult<Py<T>> {
            Ok(py.import(module)?.getattr(name)?.cast_into::<T>()?.unbind())
        })?;
        Ok(imported.bind(py))
    }
}
