//! Whether this thread runs the program's log callback.

use std::cell::Cell;

use crate::sys::process;

thread_local! {
    /// The generation whose callbacks this thread runs; 0 on every other thread. A child that was
    /// forked inside a callback is free to call.
    pub static IN_CALLBACK: Cell<u64> = const { Cell::new(0) };
}

/// Calls into the library from its own log callback could wait for what waits for them.
pub fn runs_here() -> bool {
    let generation = IN_CALLBACK.try_with(Cell::get).unwrap_or(0);
    generation != 0 && generation == process::generation()
}
