//! Distributed locks with leases, fencing and loss detection.

#[cfg(not(all(target_os = "linux", target_pointer_width = "64")))]
compile_error!(
    "nblock runs on 64-bit Linux: its embedded store needs Linux's robust mutexes, futexes and CLOCK_BOOTTIME"
);

pub mod client;
pub mod clock;
pub mod error;
pub mod ffi;
pub mod key;
pub mod lock;
pub mod log;
pub mod options;
pub mod protocol;
pub mod record;
pub mod store;
pub mod stores;
pub mod sys;
pub mod token;
pub mod url;

mod backoff;
