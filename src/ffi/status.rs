//! Statuses: what a call returns.

use std::ffi::c_char;

/// The result of a call: 0 on success, positive for an expected outcome, negative for a failure.
/// Numbers are never reused.
pub type nbl_status_t = i32;

/// Success. From nbl_lock and nbl_try_lock: the lock is held.
pub const NBL_OK: nbl_status_t = 0;
/// The lock was not granted: another holder had it for as long as the call waited.
pub const NBL_UNAVAILABLE: nbl_status_t = 1;
/// The hold ended without our unlock: its lease ran out and another holder took it over, or it was
/// broken.
pub const NBL_LOST: nbl_status_t = 2;
/// There is no such record, or it has changed since it was read.
pub const NBL_NOT_FOUND: nbl_status_t = 3;
/// The operation is still in progress.
pub const NBL_PENDING: nbl_status_t = 4;
/// The operation was cancelled, or its client was closed.
pub const NBL_CANCELLED: nbl_status_t = 5;
/// The call does not fit the state: already locked, not locked, client closed.
pub const NBL_ERR_INVALID_OP: nbl_status_t = -1;
/// An argument is wrong. Nothing was done.
pub const NBL_ERR_INVALID_ARGUMENT: nbl_status_t = -2;
/// A handle is NULL, was freed, is of another type, or was not made by this library. Nothing was
/// done.
pub const NBL_ERR_BAD_HANDLE: nbl_status_t = -3;
/// The store could not be reached, or was busy for too long. Nothing was applied.
pub const NBL_ERR_UNREACHABLE: nbl_status_t = -4;
/// No reply arrived: the request may or may not have been applied.
pub const NBL_ERR_INDETERMINATE: nbl_status_t = -5;
/// The store refused the credentials, or the account is not allowed to do this.
pub const NBL_ERR_DENIED: nbl_status_t = -6;
/// The store refused the request, or a record in it is damaged.
pub const NBL_ERR_STORE: nbl_status_t = -7;
/// The hold or the operation belongs to the process that this one was forked from.
pub const NBL_ERR_FORKED: nbl_status_t = -8;
/// A defect of the library.
pub const NBL_ERR_INTERNAL: nbl_status_t = -9;
/// The system has no more memory, threads, descriptors or disk space. Nothing was applied.
pub const NBL_ERR_RESOURCES: nbl_status_t = -10;

/// The caller's buffer is too small for the text. Nothing was copied; the size that is needed was
/// reported.
pub const NBL_ERR_BUFFER_TOO_SMALL: nbl_status_t = -11;

/// Every status with its name.
const STATUSES: [(nbl_status_t, &std::ffi::CStr); 17] = [
    (NBL_OK, c"NBL_OK"),
    (NBL_UNAVAILABLE, c"NBL_UNAVAILABLE"),
    (NBL_LOST, c"NBL_LOST"),
    (NBL_NOT_FOUND, c"NBL_NOT_FOUND"),
    (NBL_PENDING, c"NBL_PENDING"),
    (NBL_CANCELLED, c"NBL_CANCELLED"),
    (NBL_ERR_INVALID_OP, c"NBL_ERR_INVALID_OP"),
    (NBL_ERR_INVALID_ARGUMENT, c"NBL_ERR_INVALID_ARGUMENT"),
    (NBL_ERR_BAD_HANDLE, c"NBL_ERR_BAD_HANDLE"),
    (NBL_ERR_UNREACHABLE, c"NBL_ERR_UNREACHABLE"),
    (NBL_ERR_INDETERMINATE, c"NBL_ERR_INDETERMINATE"),
    (NBL_ERR_DENIED, c"NBL_ERR_DENIED"),
    (NBL_ERR_STORE, c"NBL_ERR_STORE"),
    (NBL_ERR_FORKED, c"NBL_ERR_FORKED"),
    (NBL_ERR_INTERNAL, c"NBL_ERR_INTERNAL"),
    (NBL_ERR_RESOURCES, c"NBL_ERR_RESOURCES"),
    (NBL_ERR_BUFFER_TOO_SMALL, c"NBL_ERR_BUFFER_TOO_SMALL"),
];

/// Returns the name of a status, such as "NBL_LOST".
///
/// Does not wait.
///
/// @param status A status.
/// @return The name, or "NBL_UNKNOWN" for a number that is not a status. The text is static: do not free
/// it.
#[must_use]
#[unsafe(no_mangle)]
pub extern "C" fn nbl_status_name(status: nbl_status_t) -> *const c_char {
    STATUSES.iter().find(|(number, _)| *number == status).map_or(c"NBL_UNKNOWN", |(_, name)| name).as_ptr()
}
