//! The interface to the operating system: this process and its forks, descriptors, sockets, randomness, space for
//! files, the runtime with its timers, and a mutex.
//!
//! From the bottom up: `entries`, `mutex`, `space`; `process`; `random`, `descriptor`; `runtime`; `sockets`.

pub mod descriptor;
pub(crate) mod entries;
pub mod mutex;
pub mod process;
pub mod random;
pub mod runtime;
pub mod sockets;
pub mod space;
#[cfg(test)]
pub(crate) mod testing;
