//! The C layer: what `include/nblock.h` declares.
//!
//! Every function is safe to call with any handle and any sizes. The header states what cannot be checked: a pointer
//! that is not NULL must point to memory of the size that its type or the length says, and text must not change while
//! the call reads it.

#![allow(non_camel_case_types)]
// The conditions are the same for all functions. They are listed above, and in the header's preface.
#![allow(clippy::missing_safety_doc)]

mod callback;
mod client;
mod error;
mod fitting;
mod handle;
mod list;
mod lock;
mod log;
mod op;
mod operation;
mod options;
mod out;
mod ping;
mod records;
mod status;
mod text;
mod version;

pub use client::*;
pub use error::*;
pub use list::*;
pub use lock::*;
pub use log::{NBL_LOG_DEBUG, NBL_LOG_ERROR, NBL_LOG_INFO, NBL_LOG_TRACE, NBL_LOG_WARN, nbl_log_set};
pub use op::*;
pub use options::*;
pub use ping::*;
pub use status::*;
pub use text::*;
pub use version::*;

pub use self::log::nbl_log_fn;
pub use handle::{nbl_client_t, nbl_list_t, nbl_lock_t, nbl_op_t};
