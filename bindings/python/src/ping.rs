//! What a ping found out.

use std::ffi::{CStr, c_char};

use nblock::ffi::*;
use pyo3::prelude::*;

use crate::failure::Detail;
use crate::operation::Operation;

/// What Client.ping found out about the store.
#[pyclass(frozen, get_all, module = "nblock")]
pub struct Ping {
    /// The name, version and address of the server that replied.
    server: String,
    /// Where the store is, as Client.location.
    location: String,
    /// How long the reply took, in seconds.
    round_trip: f64,
    /// How many seconds the server's clock is ahead of this machine's; None if it is the same clock, or was not
    /// measured.
    skew: Option<f64>,
    /// Warnings: what in the server's configuration endangers locks, and what to do about it.
    caveats: Vec<String>,
}

impl Ping {
    pub fn taken_from(py: Python<'_>, op: &Operation) -> PyResult<Ping> {
        // SAFETY: integers and arrays of them, all zero.
        let mut facts: nbl_ping_t = unsafe { std::mem::zeroed() };
        facts.struct_size = size_of::<nbl_ping_t>() as u32;
        let mut detail = Detail::new();
        // SAFETY: a handle of ours and two locals.
        let status = unsafe { nbl_op_take_ping(op.handle(), &raw mut facts, detail.out()) };
        detail.check(py, status)?;
        // SAFETY: the library's texts are NUL-terminated.
        let text = |text: &[c_char]| unsafe { CStr::from_ptr(text.as_ptr()) }.to_string_lossy().into_owned();
        Ok(Ping {
            server: text(&facts.server),
            location: text(&facts.location),
            round_trip: facts.round_trip_us as f64 / 1e6,
            skew: (facts.skew_measured != 0).then_some(facts.skew_ms as f64 / 1e3),
            caveats: text(&facts.caveats).lines().map(str::to_string).collect(),
        })
    }
}

#[pymethods]
impl Ping {
    fn __repr__(&self) -> String {
        format!("<nblock.Ping {} in {:.3} ms>", self.server, self.round_trip * 1e3)
    }
}
