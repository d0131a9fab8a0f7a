//! Clients.

use std::ffi::c_char;

use super::error::{Failure, NBL_OK, guard, nbl_error_t, nbl_status_t};
use super::handle::{self, nbl_client_t, nbl_op_t};
use super::op::free;
use super::operation::{Op, Output};
use super::options::{self, client_options, fill, nbl_client_options_t, size_to_fill, sized_32};
use super::out::hand_out;
use super::text;
use crate::client::{Client, Ping};
use crate::options::Timeout;
use crate::sys::runtime::wait;

/// The version of the interface that this header declares. It grows with every addition. A library
/// with the same soname and an equal or larger version has everything that is declared here.
pub const NBL_ABI_VERSION: u32 = 1;

/// Returns the NBL_ABI_VERSION that the library was built with. Does not wait.
#[must_use]
#[unsafe(no_mangle)]
pub extern "C" fn nbl_abi_version() -> u32 {
    NBL_ABI_VERSION
}

/// Returns the library's version, such as "0.1.0". The text is static: do not free it. Does not
/// wait.
#[must_use]
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
/// url is NUL-terminated: "embedded:" or "embedded:/directory" (this machine, no server), "memory:"
/// or "memory:NAME" (this process, for tests), "redis://user:password@host:port/number?options",
/// "postgres://user:password@host:port/database?options", or
/// "rethinkdb://user:password@host:port,host:port/database?options". If it is NULL, the store is,
/// in this order: the environment variable NBLOCK_URL, NoBrainer's environment (RETHINKDB_URL and
/// others), /etc/nblock.conf, "embedded:". A program with more rights than its caller (set-user-id)
/// ignores the environment. The choice is made once, in this call: a forked child uses the same
/// store, and if it may not, its calls return NBL_ERR_DENIED.
///
/// options may be NULL for the defaults.
///
/// Waits for the store's reply, at most connect_timeout_ms. Returns:
///
/// - NBL_OK: *out is the client; free it with nbl_client_free.
/// - NBL_ERR_INVALID_ARGUMENT, NBL_ERR_UNREACHABLE, NBL_ERR_DENIED, NBL_ERR_STORE or
///   NBL_ERR_RESOURCES: no client was made.
#[must_use]
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

/// Starts nbl_client_new as an operation; nbl_op_take_client returns the client. Does not wait for
/// the store, but opens the files of the embedded store on the calling thread.
#[must_use]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nbl_client_new_start(
    url: *const c_char,
    options: *const nbl_client_options_t,
    out: *mut *mut nbl_op_t,
    err: *mut nbl_error_t,
) -> nbl_status_t {
    // SAFETY: as the header says.
    unsafe { hand_out(out, err, || Op::give(open(url, options)?, |client| Ok(Output::Client(client)), None)) }
}

/// Closes a client. Calls that wait on its locks return NBL_CANCELLED. Holds with auto_refresh are
/// released; other holds run out with their leases. From then on, its locks return
/// NBL_ERR_INVALID_OP. Closing again is not an error. The handle stays valid until nbl_client_free.
/// In a forked child, this closes the child's client only.
///
/// Waits until the store has accepted the releases, at most timeout_ms milliseconds. timeout_ms may
/// also be NBL_NO_WAIT, NBL_FOREVER, or 0 for the default, the client's op_timeout_ms. Returns:
///
/// - NBL_OK: closed.
/// - NBL_ERR_INDETERMINATE: closed, but the time was too short for all releases. What could not be
///   released runs out with its lease.
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

/// Frees a client. NULL is allowed. If nbl_client_close was not called before, its holds are
/// abandoned: they are no longer renewed, and run out with their leases. Its locks remain valid
/// handles that return NBL_ERR_INVALID_OP; they must still be freed. Does not wait.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nbl_client_free(client: *mut nbl_client_t) -> nbl_status_t {
    guard(std::ptr::null_mut(), || free::<Client>(client, Client::abandon))
}

/// Copies a description of where the client's store is into buffer, for people to read. It contains
/// no password.
///
/// buffer has buffer_size bytes. Unless needed is NULL, *needed is set to the size of the text in
/// bytes, its NUL included. To get only that size, pass NULL as buffer and 0 as buffer_size. Does
/// not wait. Returns:
///
/// - NBL_OK: the text, or only its size, was written.
/// - NBL_ERR_BUFFER_TOO_SMALL: buffer_size is too small. Nothing was copied, but *needed was
///   written.
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
        // SAFETY: as the header says.
        unsafe { text::copy(&location, buffer, buffer_size, needed) }
    })
}

/// What nbl_client_ping found out about the store. The caller sets struct_size; the call fills in the
/// rest. A text that is too long ends after the last character that fits.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct nbl_ping_t {
    /// sizeof(nbl_ping_t).
    pub struct_size: u32,
    /// 1 if skew_ms was measured, otherwise 0: it is the same clock, or the server does not tell.
    pub skew_measured: u32,
    /// How far the server's clock is ahead of this machine's, in milliseconds.
    pub skew_ms: i64,
    /// How long the reply took, in microseconds.
    pub round_trip_us: u64,
    /// The name, version and address of the server that replied. NUL-terminated UTF-8.
    pub server: [c_char; 256],
    /// Where the store is, as nbl_client_location. NUL-terminated UTF-8.
    pub location: [c_char; 512],
    /// Warnings: what in the server's configuration endangers locks, and what to do about it. One on
    /// each line; empty if there are none. NUL-terminated UTF-8.
    pub caveats: [c_char; 1024],
}
sized_32!(nbl_ping_t: skew_measured skew_ms round_trip_us server location caveats);

impl From<&Ping> for nbl_ping_t {
    fn from(ping: &Ping) -> nbl_ping_t {
        nbl_ping_t {
            struct_size: 0,
            skew_measured: ping.skew_ms.is_some().into(),
            skew_ms: ping.skew_ms.unwrap_or(0),
            round_trip_us: u64::try_from(ping.round_trip.as_micros()).unwrap_or(u64::MAX),
            server: text::array(&ping.server),
            location: text::array(&ping.location),
            caveats: text::array(&ping.caveats.join("\n")),
        }
    }
}

/// Checks that the store replies, and writes to *out what the reply says.
///
/// The caller sets out->struct_size, which says how many fields it knows; fields that the library
/// does not know are set to zero. Waits at most op_timeout_ms. Returns:
///
/// - NBL_OK: the store replied.
/// - NBL_ERR_UNREACHABLE, NBL_ERR_INDETERMINATE, NBL_ERR_DENIED or NBL_ERR_STORE: it did not, or
///   refused.
/// - NBL_ERR_INVALID_OP: the client is closed.
#[must_use]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nbl_client_ping(
    client: *mut nbl_client_t,
    out: *mut nbl_ping_t,
    err: *mut nbl_error_t,
) -> nbl_status_t {
    guard(err, || {
        let client = handle::get::<Client>(client)?;
        // SAFETY: as the header says.
        let size = unsafe { size_to_fill(out) }?;
        let ping = wait(client.ping())?;
        // SAFETY: the caller has `size` bytes there.
        unsafe { fill(out, size, &nbl_ping_t::from(&ping)) };
        Ok(NBL_OK)
    })
}

/// Starts nbl_client_ping as an operation; nbl_op_take_ping returns the reply. Does not wait.
#[must_use]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nbl_client_ping_start(
    client: *mut nbl_client_t,
    out: *mut *mut nbl_op_t,
    err: *mut nbl_error_t,
) -> nbl_status_t {
    let started = || Op::give(handle::get::<Client>(client)?.ping(), |ping| Ok(Output::Ping(ping)), None);
    // SAFETY: as the header says.
    unsafe { hand_out(out, err, started) }
}
