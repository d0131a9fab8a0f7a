//! Operations: what a `_start` function returns.

use std::time::Duration;

use super::error::{Failure, NBL_OK, guard, nbl_error_t, nbl_status_t};
use super::handle::{self, nbl_client_t, nbl_list_t, nbl_op_t};
use super::operation::{GiveBack, Op, Outcome, Output};
use super::options::{NBL_FOREVER, NBL_NO_WAIT};
use super::out::hand_out;
use crate::clock::Boottime;
use crate::error::Error;
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

/// A descriptor that becomes readable when the operation has ended, for poll, epoll or an event loop.
/// It is made on first request, level-triggered, close-on-exec, and the library's, open until the
/// operation is freed: do not read or close it. -1 when there is none: a wrong handle, an operation of
/// the parent process's, or no descriptor could be made. Does not wait.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nbl_op_fd(op: *mut nbl_op_t) -> i32 {
    let mut descriptor = -1;
    guard(std::ptr::null_mut(), || {
        descriptor = handle::get::<Op>(op)?.descriptor()?;
        Ok(NBL_OK)
    });
    descriptor
}

/// Waits until the operation has ended, timeout_ms milliseconds at most (or NBL_NO_WAIT, or
/// NBL_FOREVER), and answers as nbl_op_finish does: NBL_PENDING when it has not. Any number of threads
/// may wait; when the operation is cancelled or freed they wait no longer.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nbl_op_wait(op: *mut nbl_op_t, timeout_ms: i64, err: *mut nbl_error_t) -> nbl_status_t {
    guard(err, || {
        let op = handle::get::<Op>(op)?;
        let until = match timeout_ms {
            NBL_NO_WAIT => Boottime::ZERO,
            NBL_FOREVER => Boottime::NEVER,
            0.. => Boottime::now() + Duration::from_millis(timeout_ms as u64),
            _ => {
                return Err(Failure::invalid_argument(format!(
                    "timeout_ms is {timeout_ms}: it is a number of milliseconds, NBL_NO_WAIT or NBL_FOREVER"
                )));
            }
        };
        op.wait(until)
    })
}

/// What came of the operation: what the call without _start would have answered; NBL_PENDING while it
/// is under way; NBL_CANCELLED when it was cancelled; NBL_ERR_FORKED: it is the parent process's. May be
/// asked again. From the first time that it answers NBL_OK to an acquire, the hold is the caller's to
/// unlock. Does not wait.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nbl_op_finish(op: *mut nbl_op_t, err: *mut nbl_error_t) -> nbl_status_t {
    guard(err, || handle::get::<Op>(op)?.finish())
}

/// Cancels the operation. An acquire is given up, and nothing of it stays in the store; one that was
/// granted, but not finished, is released. An unlock or refresh goes on all the same. Cancelling what
/// has ended, and was told, changes nothing. NBL_OK; NBL_ERR_FORKED: it is the parent process's, and
/// goes on there. Does not wait.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nbl_op_cancel(op: *mut nbl_op_t) -> nbl_status_t {
    guard(std::ptr::null_mut(), || {
        handle::get::<Op>(op)?.cancel()?;
        Ok(NBL_OK)
    })
}

/// Frees the operation; one that is under way, or not finished, is cancelled first. NULL is fine.
/// Does not wait.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nbl_op_free(op: *mut nbl_op_t) -> nbl_status_t {
    guard(std::ptr::null_mut(), || free::<Op>(op, |op| drop(op.cancel())))
}

/// The client that nbl_client_start opened, once it has ended with NBL_OK. It can be taken once, and
/// is then the caller's to free. NBL_ERR_INVALID_OP: under way, taken already, or of another function.
/// Does not wait.
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

/// The records that nbl_list_start or nbl_find_start found, once it has ended with NBL_OK. They can
/// be taken once, and are then the caller's to free. NBL_ERR_INVALID_OP: under way, taken already, or of
/// another function. Does not wait.
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

/// The fence that nbl_fence_start got, once it has ended with NBL_OK. NBL_ERR_INVALID_OP: under way, or
/// of another function. Does not wait.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nbl_op_fence(op: *mut nbl_op_t, out: *mut u64, err: *mut nbl_error_t) -> nbl_status_t {
    let fence = || {
        handle::get::<Op>(op)?.take("fence", |output| match output {
            Output::Fence(fence) => Some(*fence),
            _ => None,
        })
    };
    // SAFETY: as the header says.
    unsafe { hand_out(out, err, fence) }
}

/// Frees a handle; NULL is nothing to free.
pub(crate) fn free<T: handle::Named>(named: *mut T::Handle, leave: impl FnOnce(&T)) -> Result<nbl_status_t, Failure> {
    if named.is_null() {
        return Ok(NBL_OK);
    }
    handle::free::<T>(named, leave)?;
    Ok(NBL_OK)
}
