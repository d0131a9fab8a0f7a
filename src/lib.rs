//! Distributed locks with leases, fencing and loss detection, on one machine or many.
//!
//! This is the library behind the C interface (`nblock.h`), the Python package, the Ruby gem and the command. Rust
//! programs can use it directly.
//!
//! ```
//! use nblock::{Client, ClientOptions, Key, LockOptions, wait};
//!
//! # fn main() -> Result<(), nblock::Error> {
//! // "embedded:" is the store of this machine; None takes $NBLOCK_URL and then the other settings.
//! let client = wait(Client::open(Some("memory:"), ClientOptions::default()))?;
//! let lock = client.lock(Key::new(b"jobs:report")?, LockOptions { auto_refresh: Some(true), ..Default::default() })?;
//!
//! if wait(lock.lock(LockOptions::default()))? {
//!     // Held, and renewed until the unlock. An error of the kind `Lost` says that another process may have worked
//!     // at the same time.
//!     wait(lock.unlock())?;
//! } else {
//!     // Not granted within 10 s, the default timeout.
//! }
//! # Ok(())
//! # }
//! ```
//!
//! # Waiting, and async
//!
//! A call that may have to wait for the store returns an [`Answer`]. A thread gets its value with [`wait`]; async code
//! awaits [`Answer::get`], which needs no particular executor. Dropping the future of an acquire cancels it, and leaves
//! nothing in the store.
//!
//! ```
//! use nblock::{Client, ClientOptions, Error, Key, LockOptions};
//!
//! async fn report(client: &Client) -> Result<(), Error> {
//!     let lock = client.lock(Key::new(b"jobs:report")?, LockOptions::default())?;
//!     if lock.try_lock(LockOptions::default()).get().await? {
//!         // ...
//!         lock.unlock().get().await?;
//!     }
//!     Ok(())
//! }
//! # fn main() -> Result<(), Error> {
//! # let client = nblock::wait(Client::open(Some("memory:"), ClientOptions::default()))?;
//! # nblock::wait(nblock::Answer::later(async move { report(&client).await }))
//! # }
//! ```
//!
//! # The types
//!
//! | type | what it is |
//! |---|---|
//! | [`Client`], [`ClientOptions`] | an open store plus default options |
//! | [`Lock`], [`LockOptions`], [`LockState`] | one program's object for one key, plain or reentrant |
//! | [`Key`] | the name that is locked |
//! | [`Record`], [`Lease`], [`Owner`], [`Filter`] | what inspection shows |
//! | [`Error`], [`ErrorKind`] | why a call failed |
//! | [`Answer`], [`wait`] | the result of a call that may take time |
//!
//! All of them may be used from any thread, and after a fork (a hold belongs to the parent). Logs go to the program's
//! [`tracing`] subscriber.
//!
//! The feature `internals` makes public what the project's own packages use: it is not documented, and may change in any
//! release.
#![deny(missing_docs)]
// Without the feature, code for our own packages is unused. With the feature, these lints find code that is never used.
#![cfg_attr(not(feature = "internals"), allow(dead_code, unused_imports))]

#[cfg(not(all(target_os = "linux", target_pointer_width = "64")))]
compile_error!(
    "nblock runs on 64-bit Linux: its embedded store needs Linux's robust mutexes, futexes and CLOCK_BOOTTIME"
);

pub mod client;
pub mod clock;
pub mod error;
#[cfg(feature = "internals")]
#[doc(hidden)]
pub mod ffi;
#[cfg(not(feature = "internals"))]
mod ffi;
pub mod key;
pub mod lock;
#[cfg(feature = "internals")]
#[doc(hidden)]
pub mod log;
#[cfg(not(feature = "internals"))]
mod log;
pub mod options;
#[cfg(feature = "internals")]
#[doc(hidden)]
pub mod protocol;
#[cfg(not(feature = "internals"))]
mod protocol;
pub mod record;
#[cfg(feature = "internals")]
#[doc(hidden)]
pub mod store;
#[cfg(not(feature = "internals"))]
mod store;
#[cfg(feature = "internals")]
#[doc(hidden)]
pub mod stores;
#[cfg(not(feature = "internals"))]
mod stores;
#[cfg(feature = "internals")]
#[doc(hidden)]
pub mod sys;
#[cfg(not(feature = "internals"))]
mod sys;
#[cfg(feature = "internals")]
#[doc(hidden)]
pub mod token;
#[cfg(not(feature = "internals"))]
mod token;
#[cfg(feature = "internals")]
#[doc(hidden)]
pub mod url;
#[cfg(not(feature = "internals"))]
mod url;

mod backoff;

pub use self::client::{Broken, Client, Ping};
pub use self::error::{Error, ErrorKind};
pub use self::key::Key;
pub use self::lock::{Lock, LockState};
pub use self::options::{ClientOptions, IfHeld, LockOptions, Timeout};
pub use self::record::{Lease, Owner, Record};
pub use self::store::{Answer, Filter};
pub use self::sys::runtime::wait;
