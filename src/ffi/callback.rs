//! Whether this thread runs the program's log callback.

use std::cell::Cell;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::sys::process;

/// Whether any thread runs callbacks. Most programs have no callback, and then no call checks further.
static ANY: AtomicBool = AtomicBool::new(false);

thread_local! {
    /// The generation whose callbacks this thread runs; 0 on every other thread. A child that was forked inside a
    /// callback may call the library.
    static IN_CALLBACK: Cell<u64> = const { Cell::new(0) };
}

/// Marks this thread as one that runs callbacks.
pub fn begin() {
    ANY.store(true, Ordering::Relaxed);
    IN_CALLBACK.set(process::generation());
}

/// Whether this thread runs callbacks. A call into the library from its own log callback could wait for something that
/// waits for the callback.
#[inline]
pub fn runs_here() -> bool {
    // A thread sees its own stores, so relaxed order is sufficient.
    ANY.load(Ordering::Relaxed) && is_of_this_thread()
}

#[cold]
fn is_of_this_thread() -> bool {
    let generation = IN_CALLBACK.try_with(Cell::get).unwrap_or(0);
    generation != 0 && generation == process::generation()
}
