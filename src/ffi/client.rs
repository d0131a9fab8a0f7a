//! Clients.

use std::ffi::c_char;

use super::error::{Failure, guard, nbl_error_t};
use super::handle::{self, nbl_client_t, nbl_op_t};
use super::op::free;
use super::operation::{Op, Output};
use super::options::{self, client_options, fill, nbl_client_options_t, size_to_fill};
use super::out::write_out_param;
use super::ping::nbl_ping_t;
use super::status::{NBL_OK, nbl_status_t};
use super::text;
use crate::client::Client;
use crate::options::Timeout;
use crate::sys::runtime::wait;

/// # Safety
/// As the header requires of `url` and `options`.
unsafe fn open(
    url: *const c_char,
    options: *const nbl_client_options_t,
) -> Result<crate::store::Answer<Client, crate::error::Error>, Failure> {
    // SAFETY: guaranteed by the caller (see "Safety").
    let (url, options) = unsafe { (text::optional(url, "url")?, client_options(options)?) };
    crate::log::from_environment();
    Ok(Client::open(url, options))
}

/// Opens a store.
///
/// Waits for the store's reply, at most connect_timeout_ms.
///
/// The choice of the store is made once, in this call: a forked child uses the same store, and if it may
/// not, its calls return NBL_ERR_DENIED. A program with more rights than its caller (set-user-id) ignores
/// the environment.
///
/// @param url The store, NUL-terminated: `embedded:` or `embedded:/directory` (this machine, no server),
/// `memory:` or `memory:NAME` (this process, for tests), `redis://user:password@host:port/number?options`,
/// `postgres://user:password@host:port/database?options`, or
/// `rethinkdb://user:password@host:port,host:port/database?options`. NULL: in this order, the environment
/// variable NBLOCK_URL, NoBrainer's environment (RETHINKDB_URL and others), /etc/nblock.conf, `embedded:`.
/// @param options The options of the client, or NULL for the defaults.
/// @param out Receives the client. Free it with nbl_client_free().
/// @param err The error detail, or NULL.
/// @retval NBL_OK The store is open.
/// @retval NBL_ERR_UNREACHABLE The store did not reply in time, or was busy for too long.
/// @retval NBL_ERR_DENIED The store refused the credentials, or the account is not allowed to use it.
/// @retval NBL_ERR_STORE The store refused the request, or is damaged.
/// @retval NBL_ERR_RESOURCES There is no more memory, threads, descriptors or disk space.
#[must_use]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nbl_client_new(
    url: *const c_char,
    options: *const nbl_client_options_t,
    out: *mut *mut nbl_client_t,
    err: *mut nbl_error_t,
) -> nbl_status_t {
    // SAFETY: the header requires it of the caller.
    unsafe { write_out_param(out, err, || handle::register(wait(open(url, options)?)?)) }
}

/// Starts nbl_client_new() as an operation; nbl_op_take_client() returns the client.
///
/// Does not wait for the store, but opens the files of the embedded store on the calling thread.
///
/// @param url As for nbl_client_new().
/// @param options As for nbl_client_new().
/// @param out Receives the operation. Free it with nbl_op_free().
/// @param err The error detail, or NULL.
/// @retval NBL_OK The operation was started.
#[must_use]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nbl_client_new_start(
    url: *const c_char,
    options: *const nbl_client_options_t,
    out: *mut *mut nbl_op_t,
    err: *mut nbl_error_t,
) -> nbl_status_t {
    // SAFETY: the header requires it of the caller.
    unsafe {
        write_out_param(out, err, || Op::register(open(url, options)?, |client| Ok(Output::Client(client)), None))
    }
}

/// Closes a client.
///
/// Waiting calls and operations on its locks end with NBL_CANCELLED. Holds with auto_refresh are released; other
/// holds run out with their leases. From then on, its locks return NBL_ERR_INVALID_OP. Closing again is not an error.
/// The handle stays valid until nbl_client_free(). In a forked child, this closes the child's client only.
///
/// Waits until the store has accepted the releases, at most timeout_ms.
///
/// @param client The client.
/// @param timeout_ms How long to wait, in milliseconds; or NBL_NO_WAIT, or NBL_FOREVER. 0 is the default:
/// the client's op_timeout_ms.
/// @param err The error detail, or NULL.
/// @retval NBL_OK Closed.
/// @retval NBL_ERR_INDETERMINATE Closed, but the time was too short for all releases. What could not be
/// released runs out with its lease.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nbl_client_close(
    client: *mut nbl_client_t,
    timeout_ms: i64,
    err: *mut nbl_error_t,
) -> nbl_status_t {
    guard(err, || {
        let client = handle::get::<Client>(client)?;
        let default = Timeout::After(client.options().op_timeout);
        wait(client.close(options::limit(timeout_ms, default)?))?;
        Ok(NBL_OK)
    })
}

/// Frees a client.
///
/// If nbl_client_close() was not called before, its holds are abandoned: they are no longer renewed, and run
/// out with their leases. Its locks remain valid handles that return NBL_ERR_INVALID_OP; they must still be
/// freed. Does not wait.
///
/// @param client The client, or NULL.
/// @retval NBL_OK Freed, or NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nbl_client_free(client: *mut nbl_client_t) -> nbl_status_t {
    guard(std::ptr::null_mut(), || free::<Client>(client, Client::abandon))
}

/// Copies a description of where the client's store is, for people to read. It contains no password.
///
/// Does not wait.
///
/// @param client The client.
/// @param buffer Receives the text, NUL-terminated. NULL, with 0 as buffer_size, to get only its size.
/// @param buffer_size The size of the buffer in bytes.
/// @param needed Receives the size of the text in bytes, its NUL included. NULL is allowed.
/// @param err The error detail, or NULL.
/// @retval NBL_OK The text, or only its size, was written.
/// @retval NBL_ERR_BUFFER_TOO_SMALL buffer_size is too small. Nothing was copied, but needed was written.
#[must_use]
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
        // SAFETY: the header requires it of the caller.
        unsafe { text::copy(&location, buffer, buffer_size, needed) }
    })
}

/// Checks that the store replies, and reports what the reply says.
///
/// Waits at most op_timeout_ms.
///
/// @param client The client.
/// @param out Receives the reply. The caller sets its struct_size; fields that the library does not know
/// are set to zero.
/// @param err The error detail, or NULL.
/// @retval NBL_OK The store replied.
/// @retval NBL_ERR_UNREACHABLE The store could not be reached, or was busy for too long.
/// @retval NBL_ERR_INDETERMINATE No reply arrived within op_timeout_ms.
/// @retval NBL_ERR_DENIED The account is not allowed to do this.
/// @retval NBL_ERR_STORE The store refused the request.
/// @retval NBL_ERR_INVALID_OP The client is closed.
#[must_use]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nbl_client_ping(
    client: *mut nbl_client_t,
    out: *mut nbl_ping_t,
    err: *mut nbl_error_t,
) -> nbl_status_t {
    guard(err, || {
        let client = handle::get::<Client>(client)?;
        // SAFETY: the header requires it of the caller.
        let size = unsafe { size_to_fill(out) }?;
        let ping = wait(client.ping())?;
        // SAFETY: the caller guarantees `size` bytes at `out`.
        unsafe { fill(out, size, &nbl_ping_t::from(&ping)) };
        Ok(NBL_OK)
    })
}

/// Starts nbl_client_ping() as an operation; nbl_op_take_ping() returns the reply.
///
/// Does not wait.
///
/// @param client The client.
/// @param out Receives the operation. Free it with nbl_op_free().
/// @param err The error detail, or NULL.
/// @retval NBL_OK The operation was started.
#[must_use]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nbl_client_ping_start(
    client: *mut nbl_client_t,
    out: *mut *mut nbl_op_t,
    err: *mut nbl_error_t,
) -> nbl_status_t {
    let started = || Op::register(handle::get::<Client>(client)?.ping(), |ping| Ok(Output::Ping(ping)), None);
    // SAFETY: the header requires it of the caller.
    unsafe { write_out_param(out, err, started) }
}
