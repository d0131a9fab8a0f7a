//! Whether this thread runs the program's log callback.

use std::cell::Cell;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::sys::process;

/// Whether some thread runs callbacks: most programs have none, and no call looks further.
static ANY: AtomicBool = AtomicBool::new(false);

thread_local! {
    /// The generation whose callbacks this thread runs; 0 on every other thread. A child that was
    /// forked inside a callback is free to call.
    static IN_CALLBACK: Cell<u64> = const { Cell::new(0) };
}

/// From now on, this thread runs callbacks.
pub fn begin() {
    ANY.store(true, Ordering::Relaxed);
    IN_CALLBACK.set(process::generation());
}

/// Calls into the library from its own log callback could wait for what waits for them.
#[inline]
pub fn runs_here() -> bool {
    // What this very thread has stored, it sees.
    ANY.load(Ordering::Relaxed) && is_of_this_thread()
}

#[cold]
fn is_of_this_thread() -> bool {
    let generation = IN_CALLBACK.try_with(Cell::get).unwrap_or(0);
    generation != 0 && generation == process::generation()
}
