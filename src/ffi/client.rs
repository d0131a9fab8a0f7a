//! Clients.

use std::ffi::c_char;

use super::error::{Failure, NBL_OK, guard, nbl_error_t, nbl_status_t};
use super::handle::{self, nbl_client_t, nbl_op_t};
use super::op::free;
use super::operation::{Op, Output};
use super::options::{NBL_FOREVER, NBL_NO_WAIT, client_options, nbl_client_options_t};
use super::out::hand_out;
use super::text;
use crate::client::Client;
use crate::clock::Boottime;
use crate::sys::runtime::wait;

/// The version of the interface that this header declares: grows with every addition to it. A library
/// of the same soname with an equal or larger one has all that is declared here.
pub const NBL_ABI_VERSION: u32 = 1;

/// The NBL_ABI_VERSION that the library was built with. Does not wait.
#[unsafe(no_mangle)]
pub extern "C" fn nbl_abi_version() -> u32 {
    NBL_ABI_VERSION
}

/// The library's version, such as "0.1.0". Static text. Does not wait.
#[unsafe(no_mangle)]
pub extern "C" fn nbl_version() -> *const c_char {
    const VERSION: &str = concat!(env!("CARGO_PKG_VERSION"), "\0");
    VERSION.as_ptr().cast()
}

/// # Safety
/// As the header says of `url` and `options`.
unsafe fn open(
    url: *const c_char,
    options: *const nbl_client_options_t,
) -> Result<crate::store::Answer<Client, crate::error::Error>, Failure> {
    // SAFETY: the caller says so.
    let (url, options) = unsafe { (text::optional(url, "url")?, client_options(options)?) };
    crate::log::from_environment();
    Ok(Client::open(url, options))
}

/// Opens a store.
///
/// url: "embedded:" or "embedded:/directory" (this machine, no server), "memory:" or "memory:NAME"
/// (this process, for tests), or "rethinkdb://user:password@host:port,host:port/database?options".
/// NULL: what NBLOCK_URL says, else NoBrainer's environment (RETHINKDB_URL and so on), else
/// /etc/nblock.conf, else "embedded:". The environment counts for nothing in a program that has more rights
/// than its caller (set-user-id). The choice is made here, once: a forked child uses the same store, or its
/// calls answer NBL_ERR_DENIED where it may not.
///
/// Waits for the store's answer, connect_timeout_ms at most. NBL_OK: *out is the client, for
/// nbl_client_free. NBL_ERR_INVALID_ARGUMENT, NBL_ERR_UNREACHABLE, NBL_ERR_DENIED, NBL_ERR_STORE,
/// NBL_ERR_RESOURCES.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nbl_client_new(
    url: *const c_char,
    options: *const nbl_client_options_t,
    out: *mut *mut nbl_client_t,
    err: *mut nbl_error_t,
) -> nbl_status_t {
    // SAFETY: as the header says.
    unsafe { hand_out(out, err, || handle::give(wait(open(url, options)?)?)) }
}

/// nbl_client_new as an operation; nbl_op_take_client has the client. Files of the embedded store are
/// opened on the calling thread.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nbl_client_start(
    url: *const c_char,
    options: *const nbl_client_options_t,
    out: *mut *mut nbl_op_t,
    err: *mut nbl_error_t,
) -> nbl_status_t {
    // SAFETY: as the header says.
    unsafe { hand_out(out, err, || Op::give(open(url, options)?, |client| Ok(Output::Client(client)), None)) }
}

/// Closes a client: calls that wait on its locks end with NBL_CANCELLED, holds that are renewed are
/// released, other holds run out with their leases, and its locks answer NBL_ERR_INVALID_OP from here
/// on. Closing again is no error. The handle stays valid until nbl_client_free.
///
/// Waits for the store to take the releases, timeout_ms milliseconds at most; or NBL_NO_WAIT, or
/// NBL_FOREVER, or 0 for the client's op_timeout_ms. NBL_OK, or NBL_ERR_INDETERMINATE when that was
/// not long enough: what could not be released runs out with its lease. In a forked child it closes the
/// child's client alone.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nbl_client_close(
    client: *mut nbl_client_t,
    timeout_ms: i64,
    err: *mut nbl_error_t,
) -> nbl_status_t {
    guard(err, || {
        let client = handle::get::<Client>(client)?;
        let now = Boottime::now();
        let limit = match timeout_ms {
            0 => now + client.options().op_timeout,
            NBL_NO_WAIT => now,
            NBL_FOREVER => Boottime::NEVER,
            1.. => now + std::time::Duration::from_millis(timeout_ms as u64),
            _ => {
                return Err(Failure::invalid_argument(format!(
                    "timeout_ms is {timeout_ms}: it is a number of milliseconds, NBL_NO_WAIT, NBL_FOREVER, or 0"
                )));
            }
        };
        wait(client.close(limit))?;
        Ok(NBL_OK)
    })
}

/// Frees a client. Without nbl_client_close before, its holds are abandoned: nothing is renewed any
/// more, and leases run out. Its locks stay valid handles and answer NBL_ERR_INVALID_OP. NULL is fine.
/// Does not wait.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nbl_client_free(client: *mut nbl_client_t) -> nbl_status_t {
    guard(std::ptr::null_mut(), || free::<Client>(client, Client::abandon))
}

/// Where the client's store is, for people to read, without any password: copied into buffer, which
/// has buffer_size bytes. *needed (if not NULL) is the size that it takes, its NUL included; with
/// buffer NULL and buffer_size 0 only that is told. NBL_OK; NBL_ERR_INVALID_ARGUMENT: the buffer is too
/// small, and nothing was copied, but *needed is written. Does not wait.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nbl_client_location(
    client: *mut nbl_client_t,
    buffer: *mut c_char,
    buffer_size: usize,
    needed: *mut usize,
    err: *mut nbl_error_t,
) -> nbl_status_t {
    guard(err, || {
        let location = handle::get::<Client>(client)?.location()?;
        // SAFETY: as the header says.
        unsafe { text::copy(&location, buffer, buffer_size, needed) }
    })
}

/// Asks the store for a sign of life. NBL_OK: it gave one. NBL_ERR_UNREACHABLE, NBL_ERR_INDETERMINATE,
/// NBL_ERR_DENIED, NBL_ERR_STORE; NBL_ERR_INVALID_OP: the client is closed. Waits op_timeout_ms at most.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nbl_ping(client: *mut nbl_client_t, err: *mut nbl_error_t) -> nbl_status_t {
    guard(err, || {
        wait(handle::get::<Client>(client)?.ping())?;
        Ok(NBL_OK)
    })
}

/// nbl_ping as an operation.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nbl_ping_start(
    client: *mut nbl_client_t,
    out: *mut *mut nbl_op_t,
    err: *mut nbl_error_t,
) -> nbl_status_t {
    let started = || Op::give(handle::get::<Client>(client)?.ping(), |_| Ok(Output::Nothing), None);
    // SAFETY: as the header says.
    unsafe { hand_out(out, err, started) }
}
