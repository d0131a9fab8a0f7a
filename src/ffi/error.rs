//! Error detail, and the guard around every call.

use std::any::Any;
use std::ffi::{c_char, c_int};
use std::panic::{AssertUnwindSafe, catch_unwind};

use super::fitting::fitting;
use super::status::*;
use crate::error::{Error, ErrorKind};
use crate::sys::process;

/// The size of a message in bytes, its NUL included.
pub const NBL_ERROR_MESSAGE_SIZE: usize = 1024;

/// What went wrong, with a message. The caller allocates it, sets struct_size, and passes it as the
/// last argument; NULL is allowed. Every call that takes one fills it in: after NBL_OK, with NBL_OK
/// and an empty message.
#[repr(C)]
pub struct nbl_error_t {
    /// sizeof(nbl_error_t).
    pub struct_size: u32,
    /// The status that the call returned.
    pub status: nbl_status_t,
    /// NUL-terminated UTF-8. A message that is too long ends after the last character that fits.
    pub message: [c_char; NBL_ERROR_MESSAGE_SIZE],
}

/// Why a call failed.
#[derive(Debug)]
pub(crate) struct Failure {
    pub status: nbl_status_t,
    pub message: String,
}

impl Failure {
    pub fn bad_handle(message: String) -> Failure {
        Failure { status: NBL_ERR_BAD_HANDLE, message }
    }

    pub fn invalid_argument(message: impl Into<String>) -> Failure {
        Failure { status: NBL_ERR_INVALID_ARGUMENT, message: message.into() }
    }

    /// The failure that a panic is turned into at the boundary.
    pub fn panicked(panic: &(dyn Any + Send)) -> Failure {
        let text = panic.downcast_ref::<&str>().map(|text| text.to_string());
        let text = text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_default();
        Failure { status: NBL_ERR_INTERNAL, message: format!("internal error, a bug in nblock: {text}") }
    }

    #[cold]
    fn in_callback() -> Failure {
        Failure { status: NBL_ERR_INVALID_OP, message: "the log callback must not call nblock".to_string() }
    }

    pub fn resources(message: &str) -> Failure {
        Failure { status: NBL_ERR_RESOURCES, message: message.to_string() }
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Failure {
        Failure { status: status_of(error.kind()), message: error.message().to_string() }
    }
}

pub(crate) fn status_of(kind: ErrorKind) -> nbl_status_t {
    match kind {
        ErrorKind::Unavailable => NBL_UNAVAILABLE,
        ErrorKind::Lost => NBL_LOST,
        ErrorKind::NotFound => NBL_NOT_FOUND,
        ErrorKind::Cancelled => NBL_CANCELLED,
        ErrorKind::InvalidOp => NBL_ERR_INVALID_OP,
        ErrorKind::InvalidArgument => NBL_ERR_INVALID_ARGUMENT,
        ErrorKind::Unreachable => NBL_ERR_UNREACHABLE,
        ErrorKind::Indeterminate => NBL_ERR_INDETERMINATE,
        ErrorKind::Denied => NBL_ERR_DENIED,
        ErrorKind::Store => NBL_ERR_STORE,
        ErrorKind::Forked => NBL_ERR_FORKED,
        ErrorKind::Internal => NBL_ERR_INTERNAL,
        ErrorKind::Resources => NBL_ERR_RESOURCES,
    }
}

/// While it lives, `pthread_cancel` does not end the calling thread: that would unwind the stack, which ends the
/// program at the first Rust frame.
struct NoCancellation {
    before: c_int,
}

unsafe extern "C" {
    /// POSIX, and glibc's pthread.h.
    fn pthread_setcancelstate(state: c_int, before: *mut c_int) -> c_int;
}

/// glibc's pthread.h, and musl's.
const PTHREAD_CANCEL_DISABLE: c_int = 1;

impl NoCancellation {
    fn begin() -> NoCancellation {
        let mut before = 0;
        // SAFETY: writes `before`.
        unsafe { pthread_setcancelstate(PTHREAD_CANCEL_DISABLE, &mut before) };
        NoCancellation { before }
    }
}

impl Drop for NoCancellation {
    fn drop(&mut self) {
        // SAFETY: the state came from this function; the former state is not requested.
        unsafe { pthread_setcancelstate(self.before, std::ptr::null_mut()) };
    }
}

/// Runs the body of a call. Stops panics, and fills in `err`.
#[inline]
pub(crate) fn guard(err: *mut nbl_error_t, body: impl FnOnce() -> Result<nbl_status_t, Failure>) -> nbl_status_t {
    // Not through a reference: the caller's struct may be shorter, and need not be aligned.
    // SAFETY: a non-NULL `err` points to an nbl_error_t, as the header says, which begins with its size.
    let size = (!err.is_null()).then(|| unsafe { (&raw const (*err).struct_size).read_unaligned() } as usize);
    if size.is_some_and(|size| size < std::mem::offset_of!(nbl_error_t, message) + 1) {
        // There is no room for a message.
        return NBL_ERR_INVALID_ARGUMENT;
    }
    let _not_here = NoCancellation::begin();
    let call = process::Call::begin();
    let mut outcome = catch_unwind(AssertUnwindSafe(|| match super::callback::runs_here() {
        false => body(),
        true => Err(Failure::in_callback()),
    }))
    .unwrap_or_else(|panic| Err(Failure::panicked(&*panic)));
    if call.is_the_parents() {
        // A signal handler has forked during the call, and this is the child: the result of the call is the parent's.
        outcome = Err(Error::forked_during_call().into());
    }
    let status = match &outcome {
        Ok(status) => *status,
        Err(failure) => failure.status,
    };
    if let Some(size) = size {
        // SAFETY: the caller guarantees `size` bytes, and at least one of them is the message's.
        unsafe {
            (&raw mut (*err).status).write_unaligned(status);
            match &outcome {
                Ok(_) => (&raw mut (*err).message).cast::<u8>().write(0),
                Err(failure) => tell(err, size, &failure.message),
            }
        }
    }
    status
}

/// Writes the message into the caller's struct.
///
/// # Safety
/// `err` points to `size` bytes that may be written, and at least one of them is the message's.
#[cold]
unsafe fn tell(err: *mut nbl_error_t, size: usize, message: &str) {
    let room = (size - std::mem::offset_of!(nbl_error_t, message)).min(NBL_ERROR_MESSAGE_SIZE);
    // SAFETY: `room` of the bytes are the message's.
    unsafe {
        let place = (&raw mut (*err).message).cast::<u8>();
        for (offset, byte) in fitting(message, room).enumerate() {
            place.add(offset).write(byte);
        }
    }
}
