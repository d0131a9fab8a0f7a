//! Operations: what a `_start` function returns.

use super::error::{Failure, guard, nbl_error_t};
use super::handle::{self, nbl_client_t, nbl_list_t, nbl_op_t};
use super::operation::{GiveBack, Op, Outcome, Output};
use super::options::{self, fill, size_to_fill};
use super::out::write_out_param;
use super::ping::nbl_ping_t;
use super::status::{NBL_OK, nbl_status_t};
use crate::error::Error;
use crate::options::Timeout;
use crate::store::Answer;

impl Op {
    /// As `start`, but returns a handle.
    pub fn register<T: Send + 'static>(
        answer: Answer<T, Error>,
        convert: impl FnOnce(T) -> Outcome + Send + 'static,
        give_back: Option<GiveBack>,
    ) -> Result<*mut nbl_op_t, Failure> {
        handle::register(Op::start(answer, convert, give_back)?)
    }
}

/// Returns a descriptor that becomes readable when the operation has ended, for poll, epoll or an event loop.
///
/// The descriptor is made at the first call, level-triggered and close-on-exec. It belongs to the library,
/// and stays open until the operation is freed: do not read or close it. Does not wait.
///
/// @param op The operation.
/// @return The descriptor; -1 if there is none, because the handle is wrong, the operation belongs to the
/// parent process, or none could be made.
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

/// Waits until the operation has ended, and reports its result, as nbl_op_finish() does.
///
/// Any number of threads may wait. If the operation is cancelled or freed, they stop waiting. Waits at most
/// timeout_ms.
///
/// @param op The operation.
/// @param timeout_ms How long to wait, in milliseconds; or NBL_NO_WAIT, or NBL_FOREVER. 0 is the default:
/// NBL_FOREVER. To ask without waiting, call nbl_op_finish().
/// @param err The error detail, or NULL.
/// @return What nbl_op_finish() returns: NBL_PENDING if the operation has not ended.
#[must_use]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nbl_op_wait(op: *mut nbl_op_t, timeout_ms: i64, err: *mut nbl_error_t) -> nbl_status_t {
    guard(err, || {
        let op = handle::get::<Op>(op)?;
        op.wait(options::limit(timeout_ms, Timeout::Forever)?)
    })
}

/// Reports the result of the operation. May be called again.
///
/// After the first NBL_OK for nbl_lock_start(), the caller has the hold and must unlock it. Does not wait.
///
/// @param op The operation.
/// @param err The error detail, or NULL.
/// @retval NBL_PENDING The operation is still in progress.
/// @retval NBL_CANCELLED It was cancelled.
/// @retval NBL_ERR_FORKED It belongs to the parent process.
/// @return Otherwise, what the function without _start would have returned.
#[must_use]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nbl_op_finish(op: *mut nbl_op_t, err: *mut nbl_error_t) -> nbl_status_t {
    guard(err, || handle::get::<Op>(op)?.finish())
}

/// Cancels the operation.
///
/// An nbl_lock_start() is given up, and nothing of it remains in the store; if it was granted but neither
/// nbl_op_finish() nor nbl_op_wait() has reported that yet, the grant is released. An unlock, a refresh or a break
/// continues anyway. A ping, a list, a find or a fence is given up. A client or a list that was not taken is freed.
/// If the operation has ended and its result was reported, nothing changes. Does not wait.
///
/// @param op The operation.
/// @retval NBL_OK Done.
/// @retval NBL_ERR_FORKED The operation belongs to the parent process, and continues there.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nbl_op_cancel(op: *mut nbl_op_t) -> nbl_status_t {
    guard(std::ptr::null_mut(), || {
        handle::get::<Op>(op)?.cancel()?;
        Ok(NBL_OK)
    })
}

/// Frees the operation.
///
/// If it is in progress, or its result was not reported yet, it is cancelled first (nbl_op_cancel()). Does
/// not wait. Remove its descriptor from what you poll before.
///
/// @param op The operation, or NULL.
/// @retval NBL_OK Freed, or NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nbl_op_free(op: *mut nbl_op_t) -> nbl_status_t {
    guard(std::ptr::null_mut(), || free::<Op>(op, |op| drop(op.cancel())))
}

/// Returns the client that nbl_client_new_start() opened, after the operation has ended with NBL_OK.
///
/// It can be taken once. Does not wait.
///
/// @param op The operation.
/// @param out Receives the client. Free it with nbl_client_free().
/// @param err The error detail, or NULL.
/// @retval NBL_OK out was written.
/// @retval NBL_PENDING The operation is still in progress.
/// @retval NBL_ERR_INVALID_OP The client was already taken, or the operation was started by another function.
/// @return Otherwise, what nbl_op_finish() returns: the operation failed, or belongs to the parent process.
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
        handle::register(client)
    };
    // SAFETY: the header requires it of the caller.
    unsafe { write_out_param(out, err, taken) }
}

/// Returns the records that nbl_list_start() or nbl_find_start() found, after the operation has ended with
/// NBL_OK.
///
/// They can be taken once. Does not wait.
///
/// @param op The operation.
/// @param out Receives the list. Free it with nbl_list_free().
/// @param err The error detail, or NULL.
/// @retval NBL_OK out was written.
/// @retval NBL_PENDING The operation is still in progress.
/// @retval NBL_ERR_INVALID_OP The list was already taken, or the operation was started by another function.
/// @return Otherwise, what nbl_op_finish() returns: the operation failed, or belongs to the parent process.
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
        handle::register(list)
    };
    // SAFETY: the header requires it of the caller.
    unsafe { write_out_param(out, err, taken) }
}

/// Returns the fence that nbl_lock_fence_start() got, after the operation has ended with NBL_OK.
///
/// May be called again. Does not wait.
///
/// @param op The operation.
/// @param out Receives the fence.
/// @param err The error detail, or NULL.
/// @retval NBL_OK out was written.
/// @retval NBL_PENDING The operation is still in progress.
/// @retval NBL_ERR_INVALID_OP The operation was started by another function.
/// @return Otherwise, what nbl_op_finish() returns: the operation failed, or belongs to the parent process.
#[must_use]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nbl_op_take_fence(op: *mut nbl_op_t, out: *mut u64, err: *mut nbl_error_t) -> nbl_status_t {
    let fence = || {
        handle::get::<Op>(op)?.take("fence", |output| match output {
            Output::Fence(fence) => Some(*fence),
            _ => None,
        })
    };
    // SAFETY: the header requires it of the caller.
    unsafe { write_out_param(out, err, fence) }
}

/// Returns the reply that nbl_client_ping_start() got, after the operation has ended with NBL_OK.
///
/// May be called again. Does not wait.
///
/// @param op The operation.
/// @param out Receives the reply. The caller sets its struct_size; fields that the library does not know
/// are set to zero.
/// @param err The error detail, or NULL.
/// @retval NBL_OK out was written.
/// @retval NBL_PENDING The operation is still in progress.
/// @retval NBL_ERR_INVALID_OP The operation was started by another function.
/// @return Otherwise, what nbl_op_finish() returns: the operation failed, or belongs to the parent process.
#[must_use]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nbl_op_take_ping(
    op: *mut nbl_op_t,
    out: *mut nbl_ping_t,
    err: *mut nbl_error_t,
) -> nbl_status_t {
    guard(err, || {
        let op = handle::get::<Op>(op)?;
        // SAFETY: the header requires it of the caller.
        let size = unsafe { size_to_fill(out) }?;
        let ping = op.take("ping", |output| match output {
            Output::Ping(ping) => Some(nbl_ping_t::from(&*ping)),
            _ => None,
        })?;
        // SAFETY: the caller guarantees `size` bytes at `out`.
        unsafe { fill(out, size, &ping) };
        Ok(NBL_OK)
    })
}

/// Frees a handle. NULL is ignored.
pub(crate) fn free<T: handle::HandleType>(
    named: *mut T::Handle,
    leave: impl FnOnce(&T),
) -> Result<nbl_status_t, Failure> {
    if named.is_null() {
        return Ok(NBL_OK);
    }
    handle::free::<T>(named, leave)?;
    Ok(NBL_OK)
}
