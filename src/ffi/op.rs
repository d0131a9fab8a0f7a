//! Operations: what a `_start` function returns.

use super::client::nbl_ping_t;
use super::error::{Failure, NBL_OK, guard, nbl_error_t, nbl_status_t};
use super::handle::{self, nbl_client_t, nbl_list_t, nbl_op_t};
use super::operation::{GiveBack, Op, Outcome, Output};
use super::options::{self, fill, size_to_fill};
use super::out::hand_out;
use crate::error::Error;
use crate::options::Timeout;
use crate::store::Answer;

impl Op {
    /// As `start`, with a handle.
    pub fn give<T: Send + 'static>(
        answer: Answer<T, Error>,
        convert: impl FnOnce(T) -> Outcome + Send + 'static,
        give_back: Option<GiveBack>,
    ) -> Result<*mut nbl_op_t, Failure> {
        handle::give(Op::start(answer, convert, give_back)?)
    }
}

/// Returns a descriptor that becomes readable when the operation has ended, for poll, epoll or an
/// event loop; -1 if there is none, because the handle is wrong, the operation belongs to the
/// parent process, or no descriptor could be made.
///
/// The descriptor is made at the first call, level-triggered and close-on-exec. It belongs to the
/// library, and stays open until the operation is freed: do not read or close it. Does not wait.
#[must_use]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nbl_op_fd(op: *mut nbl_op_t) -> i32 {
    let mut descriptor = -1;
    guard(std::ptr::null_mut(), || {
        descriptor = handle::get::<Op>(op)?.descriptor()?;
        Ok(NBL_OK)
    });
    descriptor
}

/// Waits until the operation has ended, at most timeout_ms milliseconds. timeout_ms may also be
/// NBL_NO_WAIT, NBL_FOREVER, or 0 for the default, which is NBL_FOREVER. Returns what nbl_op_finish
/// returns: NBL_PENDING if the operation has not ended. Any number of threads may wait. If the
/// operation is cancelled or freed, they stop waiting.
#[must_use]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nbl_op_wait(op: *mut nbl_op_t, timeout_ms: i64, err: *mut nbl_error_t) -> nbl_status_t {
    guard(err, || {
        let op = handle::get::<Op>(op)?;
        op.wait(options::limit(timeout_ms, Timeout::Forever)?)
    })
}

/// Reports the result of the operation. May be called again. Does not wait. Returns:
///
/// - NBL_PENDING: the operation is still in progress.
/// - NBL_CANCELLED: it was cancelled.
/// - NBL_ERR_FORKED: it belongs to the parent process.
/// - Otherwise, what the function without _start would have returned.
///
/// After the first NBL_OK for an acquire, the caller has the hold and must unlock it.
#[must_use]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nbl_op_finish(op: *mut nbl_op_t, err: *mut nbl_error_t) -> nbl_status_t {
    guard(err, || handle::get::<Op>(op)?.finish())
}

/// Cancels the operation. An acquire is given up, and nothing of it remains in the store; if it was
/// granted but nbl_op_finish has not reported that yet, the grant is released. An unlock or a
/// refresh continues anyway. If the operation has ended and its result was reported, nothing
/// changes. Does not wait. Returns:
///
/// - NBL_OK: done.
/// - NBL_ERR_FORKED: the operation belongs to the parent process, and continues there.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nbl_op_cancel(op: *mut nbl_op_t) -> nbl_status_t {
    guard(std::ptr::null_mut(), || {
        handle::get::<Op>(op)?.cancel()?;
        Ok(NBL_OK)
    })
}

/// Frees the operation. NULL is allowed. If it is in progress, or its result was not reported yet,
/// it is cancelled first (nbl_op_cancel). Does not wait.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nbl_op_free(op: *mut nbl_op_t) -> nbl_status_t {
    guard(std::ptr::null_mut(), || free::<Op>(op, |op| drop(op.cancel())))
}

/// Writes to *out the client that nbl_client_new_start opened, after the operation has ended with
/// NBL_OK. It can be taken once; the caller must then free it with nbl_client_free. Does not wait.
/// Returns:
///
/// - NBL_OK: *out is the client.
/// - NBL_ERR_INVALID_OP: the operation is in progress, its client was already taken, or it was
///   started by another function.
/// - Otherwise, what nbl_op_finish returns: the operation failed, or belongs to the parent process.
#[must_use]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nbl_op_take_client(
    op: *mut nbl_op_t,
    out: *mut *mut nbl_client_t,
    err: *mut nbl_error_t,
) -> nbl_status_t {
    let taken = || {
        let client =
            handle::get::<Op>(op)?.take("client", |output| match std::mem::replace(output, Output::Nothing) {
                Output::Client(client) => Some(client),
                other => {
                    *output = other;
                    None
                }
            })?;
        handle::give(client)
    };
    // SAFETY: as the header says.
    unsafe { hand_out(out, err, taken) }
}

/// Writes to *out the records that nbl_list_start or nbl_find_start found, after the operation has
/// ended with NBL_OK. They can be taken once; the caller must then free them with nbl_list_free.
/// Does not wait. Returns:
///
/// - NBL_OK: *out is the list.
/// - NBL_ERR_INVALID_OP: the operation is in progress, its list was already taken, or it was
///   started by another function.
/// - Otherwise, what nbl_op_finish returns: the operation failed, or belongs to the parent process.
#[must_use]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nbl_op_take_list(
    op: *mut nbl_op_t,
    out: *mut *mut nbl_list_t,
    err: *mut nbl_error_t,
) -> nbl_status_t {
    let taken = || {
        let list = handle::get::<Op>(op)?.take("list", |output| match std::mem::replace(output, Output::Nothing) {
            Output::List(list) => Some(list),
            other => {
                *output = other;
                None
            }
        })?;
        handle::give(list)
    };
    // SAFETY: as the header says.
    unsafe { hand_out(out, err, taken) }
}

/// Writes to *out the fence that nbl_lock_fence_start got, after the operation has ended with NBL_OK.
/// May be called again. Does not wait. Returns:
///
/// - NBL_OK: *out is the fence.
/// - NBL_ERR_INVALID_OP: the operation is in progress, or was started by another function.
/// - Otherwise, what nbl_op_finish returns: the operation failed, or belongs to the parent process.
#[must_use]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nbl_op_take_fence(op: *mut nbl_op_t, out: *mut u64, err: *mut nbl_error_t) -> nbl_status_t {
    let fence = || {
        handle::get::<Op>(op)?.take("fence", |output| match output {
            Output::Fence(fence) => Some(*fence),
            _ => None,
        })
    };
    // SAFETY: as the header says.
    unsafe { hand_out(out, err, fence) }
}

/// Writes to *out what nbl_client_ping_start found out, after the operation has ended with NBL_OK. The
/// caller sets out->struct_size, as for nbl_client_ping. May be called again. Does not wait. Returns:
///
/// - NBL_OK: *out is written.
/// - NBL_ERR_INVALID_OP: the operation is in progress, or was started by another function.
/// - Otherwise, what nbl_op_finish returns: the operation failed, or belongs to the parent process.
#[must_use]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nbl_op_take_ping(
    op: *mut nbl_op_t,
    out: *mut nbl_ping_t,
    err: *mut nbl_error_t,
) -> nbl_status_t {
    guard(err, || {
        let op = handle::get::<Op>(op)?;
        // SAFETY: as the header says.
        let size = unsafe { size_to_fill(out) }?;
        let ping = op.take("ping", |output| match output {
            Output::Ping(ping) => Some(nbl_ping_t::from(&*ping)),
            _ => None,
        })?;
        // SAFETY: the caller has `size` bytes there.
        unsafe { fill(out, size, &ping) };
        Ok(NBL_OK)
    })
}

/// Frees a handle; NULL is nothing to free.
pub(crate) fn free<T: handle::Named>(named: *mut T::Handle, leave: impl FnOnce(&T)) -> Result<nbl_status_t, Failure> {
    if named.is_null() {
        return Ok(NBL_OK);
    }
    handle::free::<T>(named, leave)?;
    Ok(NBL_OK)
}
