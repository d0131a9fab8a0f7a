//! The native half of the Python package `nblock`, over the C functions of the library.
//!
//! Whatever may wait is started as an operation: that asks the store without ever waiting itself, and
//! what is answered at once (an uncontended lock on one machine) is done without giving up the
//! interpreter. Only an operation that is still under way is waited for, with the interpreter given up.

use pyo3::prelude::*;

mod arguments;
mod client;
mod cooperation;
mod failure;
mod holder;
mod lock;
mod once;
mod operation;
mod ping;
mod record;
mod reentrant;
mod scope;
mod text;

#[pymodule]
mod _nblock {
    use std::ffi::CStr;

    use pyo3::prelude::*;

    #[pymodule_export]
    use crate::client::Client;
    #[pymodule_export]
    use crate::lock::Lock;
    #[pymodule_export]
    use crate::operation::Op;
    #[pymodule_export]
    use crate::ping::Ping;
    #[pymodule_export]
    use crate::record::Record;
    #[pymodule_export]
    use crate::reentrant::ReentrantLock;
    #[pymodule_export]
    use crate::scope::Scope;

    #[pymodule_init]
    fn init(module: &Bound<'_, PyModule>) -> PyResult<()> {
        // SAFETY: static text.
        let version = unsafe { CStr::from_ptr(nblock::ffi::nbl_version()) };
        module.add("__version__", version.to_string_lossy())
    }
}
