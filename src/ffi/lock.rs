//! Locks.

use std::ffi::c_char;

use super::error::{
    Failure, NBL_ERR_FORKED, NBL_ERR_INVALID_OP, NBL_LOST, NBL_OK, NBL_OVERDUE, NBL_PENDING, guard, nbl_error_t,
    nbl_status_t,
};
use super::handle::{self, nbl_client_t, nbl_lock_t, nbl_op_t};
use super::list::{NBL_TEXT_INSTANCE_TOKEN, NBL_TEXT_KEY, NBL_TEXT_KEY_HASH, NBL_TEXT_OWNER_TOKEN, key_of};
use super::op::free;
use super::operation::{Op, Output, unavailable};
use super::options::{lock_options, nbl_lock_options_t};
use super::out::hand_out;
use super::text;
use crate::client::Client;
use crate::lock::{Lock, LockState};
use crate::sys::runtime::wait;

/// Makes a lock object for a key: 1 byte to 1 MiB of UTF-8, key_len bytes long, or up to its NUL with
/// NBL_CSTR. It takes nothing yet. defaults: options of every call on it. NBL_OK: *out is the lock,
/// for nbl_lock_free, also after its client was freed. NBL_ERR_INVALID_ARGUMENT; NBL_ERR_INVALID_OP: the
/// client is closed. Does not wait.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nbl_lock_new(
    client: *mut nbl_client_t,
    key: *const c_char,
    key_len: usize,
    defaults: *const nbl_lock_options_t,
    out: *mut *mut nbl_lock_t,
    err: *mut nbl_error_t,
) -> nbl_status_t {
    let made = || {
        let client = handle::get::<Client>(client)?;
        // SAFETY: as the header says.
        let (key, defaults) = unsafe { (key_of(key, key_len)?, lock_options(defaults)?) };
        handle::give(client.lock(key, defaults)?)
    };
    // SAFETY: as the header says.
    unsafe { hand_out(out, err, made) }
}

/// Makes a reentrant lock object. Whoever presents the owner token (1 to 255 bytes of UTF-8; NULL:
/// random) may lock again, from this object, another one or another process; the record counts, and
/// the last unlock deletes it. Any object with the token may unlock. Otherwise as nbl_lock_new.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nbl_reentrant_lock_new(
    client: *mut nbl_client_t,
    key: *const c_char,
    key_len: usize,
    owner_token: *const c_char,
    defaults: *const nbl_lock_options_t,
    out: *mut *mut nbl_lock_t,
    err: *mut nbl_error_t,
) -> nbl_status_t {
    let made = || {
        let client = handle::get::<Client>(client)?;
        // SAFETY: as the header says.
        let (key, owner, defaults) = unsafe {
            let owner = text::optional(owner_token, "owner_token")?;
            (key_of(key, key_len)?, owner, lock_options(defaults)?)
        };
        handle::give(client.reentrant_lock(key, owner, defaults)?)
    };
    // SAFETY: as the header says.
    unsafe { hand_out(out, err, made) }
}

/// Frees a lock object. A hold is abandoned, not released: it is not renewed any more, its lease runs
/// out, and a line is logged. A call on it that is under way ends with NBL_CANCELLED: at once where it
/// queues for this object, otherwise when it would be granted, which is given back. NULL is fine. Does
/// not wait, and may run in a finaliser, on any thread.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nbl_lock_free(lock: *mut nbl_lock_t) -> nbl_status_t {
    guard(std::ptr::null_mut(), || free::<Lock>(lock, Lock::abandon))
}

/// Tries once to take the lock. options: NULL, or what is different for this call; its timeout_ms is
/// not looked at. NBL_OK: held. NBL_UNAVAILABLE: somebody else holds it. NBL_ERR_INVALID_OP: this
/// object holds it already (but see NBL_IF_HELD_WAIT), or its client is closed. NBL_ERR_UNREACHABLE,
/// NBL_ERR_INDETERMINATE, NBL_ERR_DENIED, NBL_ERR_STORE, NBL_ERR_RESOURCES: it is not held. Waits for the
/// store's answer, op_timeout_ms at most; after a failure nothing stays behind in the store, but for one
/// lease at most where the network keeps us from removing it.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nbl_try_lock(
    lock: *mut nbl_lock_t,
    options: *const nbl_lock_options_t,
    err: *mut nbl_error_t,
) -> nbl_status_t {
    guard(err, || {
        let lock = handle::get::<Lock>(lock)?;
        // SAFETY: as the header says.
        let options = unsafe { lock_options(options) }?;
        if wait(lock.try_lock(options))? { Ok(NBL_OK) } else { Err(unavailable(lock.key())) }
    })
}

/// Takes the lock, and waits for it timeout_ms at most, in the order in which the threads of this
/// process asked. NBL_OK: held. NBL_UNAVAILABLE: not granted in time. NBL_CANCELLED: the client was
/// closed, or the lock freed. Otherwise as nbl_try_lock. An outage of the store is waited through; one that lasts longer
/// than the timeout answers NBL_ERR_UNREACHABLE or NBL_ERR_INDETERMINATE.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nbl_lock(
    lock: *mut nbl_lock_t,
    options: *const nbl_lock_options_t,
    err: *mut nbl_error_t,
) -> nbl_status_t {
    guard(err, || {
        let lock = handle::get::<Lock>(lock)?;
        // SAFETY: as the header says.
        let options = unsafe { lock_options(options) }?;
        if wait(lock.lock(options))? { Ok(NBL_OK) } else { Err(unavailable(lock.key())) }
    })
}

/// nbl_lock as an operation, or, with NBL_NO_WAIT as timeout_ms, nbl_try_lock. One that is cancelled
/// or freed before nbl_op_finish has told of its grant is released.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nbl_lock_start(
    lock: *mut nbl_lock_t,
    options: *const nbl_lock_options_t,
    out: *mut *mut nbl_op_t,
    err: *mut nbl_error_t,
) -> nbl_status_t {
    let started = || {
        let lock = handle::get::<Lock>(lock)?;
        let (key, give_back) = (lock.key().clone(), Box::new(lock.give_back_unseen()));
        // SAFETY: as the header says.
        let answer = lock.ask(unsafe { lock_options(options) }?);
        let granted = move |hold: Option<_>| hold.map(Output::Granted).ok_or_else(|| unavailable(&key));
        Op::give(answer, granted, Some(give_back))
    };
    // SAFETY: as the header says.
    unsafe { hand_out(out, err, started) }
}

/// Gives the hold back. NBL_OK: it was ours to the end. NBL_LOST: it was not ours any more, which is
/// told once. Either way the lock is idle then. NBL_ERR_INDETERMINATE: no answer within op_timeout_ms;
/// the lock is idle, and the release goes on in the background. NBL_ERR_FORKED: the hold is the parent
/// process's; told once. NBL_ERR_INVALID_OP: not locked. Of a reentrant lock, gives back what was locked
/// last; a loss takes everything that this object has locked, and each nbl_unlock of that answers
/// NBL_LOST. Waits op_timeout_ms at most.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nbl_unlock(lock: *mut nbl_lock_t, err: *mut nbl_error_t) -> nbl_status_t {
    guard(err, || {
        wait(handle::get::<Lock>(lock)?.unlock())?;
        Ok(NBL_OK)
    })
}

/// nbl_unlock as an operation. Cancelled or freed, it goes on all the same.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nbl_unlock_start(
    lock: *mut nbl_lock_t,
    out: *mut *mut nbl_op_t,
    err: *mut nbl_error_t,
) -> nbl_status_t {
    let started = || Op::give(handle::get::<Lock>(lock)?.unlock(), |()| Ok(Output::Nothing), None);
    // SAFETY: as the header says.
    unsafe { hand_out(out, err, started) }
}

/// Renews the hold: its lease ends expire_ms from now, or, where options name none, as long from now
/// as it was given last. It never takes the lock anew. NBL_OK; NBL_LOST: it is not ours any more, told
/// once, and the lock is idle; NBL_ERR_INDETERMINATE: no answer within op_timeout_ms, and the hold is
/// as it was; NBL_ERR_FORKED: the hold is the parent process's, told once; NBL_ERR_INVALID_OP: not locked.
/// Of options only expire_ms is looked at. Waits op_timeout_ms at most.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nbl_refresh(
    lock: *mut nbl_lock_t,
    options: *const nbl_lock_options_t,
    err: *mut nbl_error_t,
) -> nbl_status_t {
    guard(err, || {
        let lock = handle::get::<Lock>(lock)?;
        // SAFETY: as the header says.
        let options = unsafe { lock_options(options) }?;
        wait(lock.refresh(options.expire))?;
        Ok(NBL_OK)
    })
}

/// nbl_refresh as an operation. Cancelled or freed, it goes on all the same.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nbl_refresh_start(
    lock: *mut nbl_lock_t,
    options: *const nbl_lock_options_t,
    out: *mut *mut nbl_op_t,
    err: *mut nbl_error_t,
) -> nbl_status_t {
    let started = || {
        let lock = handle::get::<Lock>(lock)?;
        // SAFETY: as the header says.
        let options = unsafe { lock_options(options) }?;
        Op::give(lock.refresh(options.expire), |()| Ok(Output::Nothing), None)
    };
    // SAFETY: as the header says.
    unsafe { hand_out(out, err, started) }
}

/// The state of the lock object: NBL_OK: held. NBL_OVERDUE: held, but past its deadline, so that
/// others may take it over at any moment. NBL_LOST: lost, which nbl_unlock or nbl_refresh will tell.
/// NBL_PENDING: an acquire or unlock is under way. NBL_ERR_INVALID_OP: idle. NBL_ERR_FORKED: held by
/// the parent process. Asks no store: does not wait.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nbl_lock_state(lock: *mut nbl_lock_t) -> nbl_status_t {
    guard(std::ptr::null_mut(), || {
        Ok(match handle::get::<Lock>(lock)?.state() {
            LockState::Held => NBL_OK,
            LockState::Overdue => NBL_OVERDUE,
            LockState::Lost => NBL_LOST,
            LockState::Pending => NBL_PENDING,
            LockState::Idle => NBL_ERR_INVALID_OP,
            LockState::Forked => NBL_ERR_FORKED,
        })
    })
}

/// How long the hold is certainly ours, in milliseconds; 0 when it is overdue. Counted from before the
/// last request left, with a margin: never longer than the store's own lease. NBL_OK; NBL_ERR_INVALID_OP:
/// not locked; NBL_LOST, NBL_ERR_FORKED: as nbl_lock_state says, and told again. Does not wait.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nbl_lock_remaining_ms(
    lock: *mut nbl_lock_t,
    out: *mut u64,
    err: *mut nbl_error_t,
) -> nbl_status_t {
    let remaining = || {
        let remaining = handle::get::<Lock>(lock)?.remaining()?;
        Ok(u64::try_from(remaining.as_millis()).unwrap_or(u64::MAX))
    };
    // SAFETY: as the header says.
    unsafe { hand_out(out, err, remaining) }
}

/// Wall-clock time at which the hold's lease ends, in milliseconds since 1970: for people to read.
/// Answers as nbl_lock_remaining_ms does. Does not wait.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nbl_lock_expires_at_ms(
    lock: *mut nbl_lock_t,
    out: *mut u64,
    err: *mut nbl_error_t,
) -> nbl_status_t {
    // SAFETY: as the header says.
    unsafe { hand_out(out, err, || Ok(handle::get::<Lock>(lock)?.expires_at_ms()?)) }
}

/// The fence of the hold: a number below 2^53 that grows with every grant of this key, for a resource
/// that refuses what comes with a smaller one than it has seen. Where the grant brought none, it is
/// asked for now, and the hold is proven before it is handed out: that waits, 2 * op_timeout_ms at
/// most. NBL_OK; NBL_LOST; NBL_ERR_INVALID_OP: not locked; NBL_ERR_FORKED; and as nbl_refresh.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nbl_lock_fence(lock: *mut nbl_lock_t, out: *mut u64, err: *mut nbl_error_t) -> nbl_status_t {
    // SAFETY: as the header says.
    unsafe { hand_out(out, err, || Ok(wait(handle::get::<Lock>(lock)?.fence())?)) }
}

/// nbl_lock_fence as an operation; nbl_op_fence has the number.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nbl_fence_start(
    lock: *mut nbl_lock_t,
    out: *mut *mut nbl_op_t,
    err: *mut nbl_error_t,
) -> nbl_status_t {
    let started = || Op::give(handle::get::<Lock>(lock)?.fence(), |fence| Ok(Output::Fence(fence)), None);
    // SAFETY: as the header says.
    unsafe { hand_out(out, err, started) }
}

/// A descriptor that is readable while the hold is overdue or lost, for poll, epoll or an event loop.
/// Made on first request, level-triggered, close-on-exec; the library's, open until the lock is freed: do
/// not read or close it. A forked child asks for its own. -1 when there is none: a wrong handle, or no
/// descriptor could be made. Does not wait.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nbl_lock_lost_fd(lock: *mut nbl_lock_t) -> i32 {
    let mut descriptor = -1;
    guard(std::ptr::null_mut(), || {
        descriptor = handle::get::<Lock>(lock)?.lost_fd()?;
        Ok(NBL_OK)
    });
    descriptor
}

/// A text of the lock: NBL_TEXT_KEY, _KEY_HASH, _INSTANCE_TOKEN (of its hold) or _OWNER_TOKEN (of a
/// reentrant one), copied as nbl_client_location does. For _INSTANCE_TOKEN, answers as
/// nbl_lock_remaining_ms does where there is no hold. Does not wait.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nbl_lock_text(
    lock: *mut nbl_lock_t,
    field: i32,
    buffer: *mut c_char,
    buffer_size: usize,
    needed: *mut usize,
    err: *mut nbl_error_t,
) -> nbl_status_t {
    guard(err, || {
        let lock = handle::get::<Lock>(lock)?;
        let text = match field {
            NBL_TEXT_KEY => lock.key().as_str().to_string(),
            NBL_TEXT_KEY_HASH => lock.key().hash().base64(),
            NBL_TEXT_INSTANCE_TOKEN => lock.instance_token()?,
            NBL_TEXT_OWNER_TOKEN => match lock.owner_token() {
                Some(owner) => owner.to_string(),
                None => return Err(Failure::invalid_argument("a plain lock has no owner token")),
            },
            _ => {
                return Err(Failure::invalid_argument(format!(
                    "field is {field}: a lock has NBL_TEXT_KEY, _KEY_HASH, _INSTANCE_TOKEN and _OWNER_TOKEN"
                )));
            }
        };
        // SAFETY: as the header says.
        unsafe { text::copy(&text, buffer, buffer_size, needed) }
    })
}
