//! Locks.

use std::ffi::c_char;

use super::error::{Failure, guard, nbl_error_t};
use super::handle::{self, nbl_client_t, nbl_lock_t, nbl_op_t};
use super::list::key_of;
use super::op::free;
use super::operation::{Op, Output, unavailable};
use super::options::{lock_options, nbl_lock_options_t};
use super::out::write_out_param;
use super::status::{NBL_OK, nbl_status_t};
use super::text;
use crate::client::Client;
use crate::lock::{Lock, LockState};
use crate::sys::runtime::wait;

/// The state of a lock object.
pub type nbl_lock_state_t = i32;

/// Not locked by this object.
pub const NBL_STATE_IDLE: nbl_lock_state_t = 1;
/// An acquire or unlock is in progress.
pub const NBL_STATE_PENDING: nbl_lock_state_t = 2;
/// Held, and certainly ours at this moment.
pub const NBL_STATE_HELD: nbl_lock_state_t = 3;
/// Held, but past its deadline: another caller may take it over at any moment.
pub const NBL_STATE_OVERDUE: nbl_lock_state_t = 4;
/// Lost. The object cannot be locked again until nbl_unlock() or nbl_refresh() has reported it.
pub const NBL_STATE_LOST: nbl_lock_state_t = 5;
/// Held by the process that this one was forked from.
pub const NBL_STATE_FORKED: nbl_lock_state_t = 6;

/// field of nbl_lock_text(): the key.
pub const NBL_TEXT_KEY: i32 = 1;
/// field of nbl_lock_text(): the hash of the key as NoBrainer stores it, base64 of SHA-1.
pub const NBL_TEXT_KEY_HASH: i32 = 2;
/// field of nbl_lock_text(): the instance token of the hold. Keep it secret: anybody who has it can end the hold.
pub const NBL_TEXT_INSTANCE_TOKEN: i32 = 3;
/// field of nbl_lock_text(), of a reentrant lock: its owner token.
pub const NBL_TEXT_OWNER_TOKEN: i32 = 4;

/// Makes a lock object for a key. This does not take the lock.
///
/// Does not wait.
///
/// @param client The client.
/// @param key The key: 1 byte to 1 MiB of UTF-8.
/// @param key_len The length of the key in bytes, or NBL_CSTR if it is NUL-terminated.
/// @param defaults The options of every call on this object, or NULL for those of the client.
/// @param out Receives the lock object. Free it with nbl_lock_free(), even if its client was freed before.
/// @param err The error detail, or NULL.
/// @retval NBL_OK The lock object was made.
/// @retval NBL_ERR_INVALID_OP The client is closed.
#[must_use]
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
        // SAFETY: the header requires it of the caller.
        let (key, defaults) = unsafe { (key_of(key, key_len)?, lock_options(defaults)?) };
        handle::register(client.lock(key, defaults)?)
    };
    // SAFETY: the header requires it of the caller.
    unsafe { write_out_param(out, err, made) }
}

/// Makes a reentrant lock object for a key. This does not take the lock.
///
/// Every lock object with the same owner token may lock the key again while it is held: this object,
/// another one, or one in another process. The record counts how many times it is locked, and the last
/// unlock deletes it. Any object with the token may unlock. Does not wait.
///
/// @param client The client.
/// @param key The key: 1 byte to 1 MiB of UTF-8.
/// @param key_len The length of the key in bytes, or NBL_CSTR if it is NUL-terminated.
/// @param owner_token The owner token: NUL-terminated, 1 to 255 bytes of UTF-8. NULL for a random one.
/// @param defaults The options of every call on this object, or NULL for those of the client.
/// @param out Receives the lock object. Free it with nbl_lock_free(), even if its client was freed before.
/// @param err The error detail, or NULL.
/// @retval NBL_OK The lock object was made.
/// @retval NBL_ERR_INVALID_OP The client is closed.
#[must_use]
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
        // SAFETY: the header requires it of the caller.
        let (key, owner, defaults) = unsafe {
            let owner = text::optional(owner_token, "owner_token")?;
            (key_of(key, key_len)?, owner, lock_options(defaults)?)
        };
        handle::register(client.reentrant_lock(key, owner, defaults)?)
    };
    // SAFETY: the header requires it of the caller.
    unsafe { write_out_param(out, err, made) }
}

/// Frees a lock object.
///
/// A hold is abandoned, not released: it is no longer renewed, its lease runs out, and a line is logged.
///
/// A call that waits for its turn on this object (NBL_IF_HELD_WAIT) returns NBL_CANCELLED at once. A call that waits
/// for the lock is not woken: it returns NBL_UNAVAILABLE at its timeout, or NBL_CANCELLED when it would be granted, and
/// that grant is released. To end such a wait, use nbl_lock_start() and nbl_op_cancel(), or nbl_client_close().
///
/// Does not wait, and may run in a finalizer, on any thread.
///
/// @param lock The lock, or NULL.
/// @retval NBL_OK Freed, or NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nbl_lock_free(lock: *mut nbl_lock_t) -> nbl_status_t {
    guard(std::ptr::null_mut(), || free::<Lock>(lock, Lock::abandon))
}

/// Tries once to take the lock.
///
/// After a failure, nothing remains in the store. The exception: if the network prevents the removal, a
/// record may remain for at most one lease.
///
/// Waits for the store's reply, at most op_timeout_ms.
///
/// @param lock The lock.
/// @param options The differences for this call, or NULL. timeout_ms in them is ignored.
/// @param err The error detail, or NULL.
/// @retval NBL_OK The lock is held.
/// @retval NBL_UNAVAILABLE Another holder has it.
/// @retval NBL_CANCELLED The client was closed, or the lock was freed, during the call.
/// @retval NBL_ERR_INVALID_OP This object already holds it (but see NBL_IF_HELD_WAIT), also if the hold is overdue,
/// or lost and not reported yet: call nbl_unlock() first. Or its client is closed.
/// @retval NBL_ERR_UNREACHABLE The store could not be reached, or was busy for too long.
/// @retval NBL_ERR_INDETERMINATE No reply arrived within op_timeout_ms.
/// @retval NBL_ERR_DENIED The account is not allowed to do this.
/// @retval NBL_ERR_STORE The store refused the request, or the record of the key is damaged.
/// @retval NBL_ERR_RESOURCES There is no more memory, threads, descriptors or disk space.
#[must_use]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nbl_try_lock(
    lock: *mut nbl_lock_t,
    options: *const nbl_lock_options_t,
    err: *mut nbl_error_t,
) -> nbl_status_t {
    guard(err, || {
        let lock = handle::get::<Lock>(lock)?;
        // SAFETY: the header requires it of the caller.
        let options = unsafe { lock_options(options) }?;
        if wait(lock.try_lock(options))? { Ok(NBL_OK) } else { Err(unavailable(lock.key())) }
    })
}

/// Takes the lock, and waits for it.
///
/// Waits at most timeout_ms (see nbl_lock_options_t). The threads of this process that wait for a plain lock are
/// served in the order of their calls. The call keeps waiting during an outage of the store.
///
/// @param lock The lock.
/// @param options The differences for this call, or NULL.
/// @param err The error detail, or NULL.
/// @retval NBL_OK The lock is held.
/// @retval NBL_UNAVAILABLE It was not granted in time.
/// @retval NBL_CANCELLED The client was closed, or the lock was freed, during the call.
/// @retval NBL_ERR_INVALID_OP This object already holds it (but see NBL_IF_HELD_WAIT), also if the hold is overdue,
/// or lost and not reported yet: call nbl_unlock() first. Or its client is closed.
/// @retval NBL_ERR_UNREACHABLE The store could not be reached when the timeout ended.
/// @retval NBL_ERR_INDETERMINATE As NBL_ERR_UNREACHABLE: no reply arrived.
/// @retval NBL_ERR_DENIED The account is not allowed to do this.
/// @retval NBL_ERR_STORE The store refused the request, or the record of the key is damaged.
/// @retval NBL_ERR_RESOURCES There is no more memory, threads, descriptors or disk space.
#[must_use]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nbl_lock(
    lock: *mut nbl_lock_t,
    options: *const nbl_lock_options_t,
    err: *mut nbl_error_t,
) -> nbl_status_t {
    guard(err, || {
        let lock = handle::get::<Lock>(lock)?;
        // SAFETY: the header requires it of the caller.
        let options = unsafe { lock_options(options) }?;
        if wait(lock.lock(options))? { Ok(NBL_OK) } else { Err(unavailable(lock.key())) }
    })
}

/// Starts nbl_lock() as an operation; with NBL_NO_WAIT as timeout_ms, nbl_try_lock().
///
/// If the operation is cancelled or freed before nbl_op_finish() or nbl_op_wait() has reported its grant, the grant
/// is released. Does not wait.
///
/// @param lock The lock.
/// @param options The differences for this call, or NULL.
/// @param out Receives the operation. Free it with nbl_op_free().
/// @param err The error detail, or NULL.
/// @retval NBL_OK The operation was started.
#[must_use]
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
        // SAFETY: the header requires it of the caller.
        let answer = lock.ask(unsafe { lock_options(options) }?);
        let granted = move |hold: Option<_>| hold.map(Output::Granted).ok_or_else(|| unavailable(&key));
        Op::register(answer, granted, Some(give_back))
    };
    // SAFETY: the header requires it of the caller.
    unsafe { write_out_param(out, err, started) }
}

/// Releases the hold. For a reentrant lock: releases the innermost step, that is, what was locked last.
///
/// Waits at most op_timeout_ms.
///
/// @param lock The lock.
/// @param err The error detail, or NULL.
/// @retval NBL_OK Released, and nobody else had the lock meanwhile, even if the lease had run out. The lock is idle.
/// @retval NBL_LOST The hold was no longer ours. This is reported once; the lock is idle. For a reentrant
/// lock, a loss ends everything that this object has locked, and the nbl_unlock() of each of these steps
/// returns NBL_LOST.
/// @retval NBL_ERR_INDETERMINATE No reply arrived within op_timeout_ms. The lock is idle, and the release
/// continues in the background.
/// @retval NBL_ERR_DENIED The account is not allowed to do this. The lock is idle; its lease runs out.
/// @retval NBL_ERR_STORE The store refused the request. The lock is idle; its lease runs out.
/// @retval NBL_ERR_FORKED The hold belongs to the parent process. This is reported once.
/// @retval NBL_ERR_INVALID_OP The lock is not held, or its client is closed.
#[must_use]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nbl_unlock(lock: *mut nbl_lock_t, err: *mut nbl_error_t) -> nbl_status_t {
    guard(err, || {
        wait(handle::get::<Lock>(lock)?.unlock())?;
        Ok(NBL_OK)
    })
}

/// Starts nbl_unlock() as an operation.
///
/// Even if the operation is cancelled or freed, the release continues. Does not wait.
///
/// @param lock The lock.
/// @param out Receives the operation. Free it with nbl_op_free().
/// @param err The error detail, or NULL.
/// @retval NBL_OK The operation was started.
#[must_use]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nbl_unlock_start(
    lock: *mut nbl_lock_t,
    out: *mut *mut nbl_op_t,
    err: *mut nbl_error_t,
) -> nbl_status_t {
    let started = || Op::register(handle::get::<Lock>(lock)?.unlock(), |()| Ok(Output::Nothing), None);
    // SAFETY: the header requires it of the caller.
    unsafe { write_out_param(out, err, started) }
}

/// Renews the hold: its lease ends expire_ms from now.
///
/// Does not take the lock again if the hold is gone. Waits at most op_timeout_ms.
///
/// @param lock The lock.
/// @param options Only expire_ms in them is used. If they set none, or are NULL, the length that was given
/// last is used again.
/// @param err The error detail, or NULL.
/// @retval NBL_OK Renewed; also if the lease had run out and nobody else had the lock meanwhile.
/// @retval NBL_LOST The hold is no longer ours. This is reported once; the lock is idle.
/// @retval NBL_ERR_INDETERMINATE No reply arrived within op_timeout_ms. The hold continues; it ends as
/// before, or earlier if the new lease is shorter.
/// @retval NBL_ERR_UNREACHABLE The store could not be reached, or was busy for too long. The hold continues as before.
/// @retval NBL_ERR_DENIED The account is not allowed to do this. The hold continues as before.
/// @retval NBL_ERR_STORE The store refused the request. The hold continues as before.
/// @retval NBL_ERR_FORKED The hold belongs to the parent process. This is reported once.
/// @retval NBL_ERR_INVALID_OP The lock is not held, or its client is closed.
#[must_use]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nbl_refresh(
    lock: *mut nbl_lock_t,
    options: *const nbl_lock_options_t,
    err: *mut nbl_error_t,
) -> nbl_status_t {
    guard(err, || {
        let lock = handle::get::<Lock>(lock)?;
        // SAFETY: the header requires it of the caller.
        let options = unsafe { lock_options(options) }?;
        wait(lock.refresh(options.expire))?;
        Ok(NBL_OK)
    })
}

/// Starts nbl_refresh() as an operation.
///
/// Even if the operation is cancelled or freed, the renewal continues. Does not wait.
///
/// @param lock The lock.
/// @param options As for nbl_refresh().
/// @param out Receives the operation. Free it with nbl_op_free().
/// @param err The error detail, or NULL.
/// @retval NBL_OK The operation was started.
#[must_use]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nbl_refresh_start(
    lock: *mut nbl_lock_t,
    options: *const nbl_lock_options_t,
    out: *mut *mut nbl_op_t,
    err: *mut nbl_error_t,
) -> nbl_status_t {
    let started = || {
        let lock = handle::get::<Lock>(lock)?;
        // SAFETY: the header requires it of the caller.
        let options = unsafe { lock_options(options) }?;
        Op::register(lock.refresh(options.expire), |()| Ok(Output::Nothing), None)
    };
    // SAFETY: the header requires it of the caller.
    unsafe { write_out_param(out, err, started) }
}

/// Reports the state of the lock object.
///
/// Does not ask the store, and does not wait.
///
/// @param lock The lock.
/// @param out Receives the state, NBL_STATE_IDLE to NBL_STATE_FORKED.
/// @param err The error detail, or NULL.
/// @retval NBL_OK out was written.
#[must_use]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nbl_lock_state(
    lock: *mut nbl_lock_t,
    out: *mut nbl_lock_state_t,
    err: *mut nbl_error_t,
) -> nbl_status_t {
    let state = || {
        Ok(match handle::get::<Lock>(lock)?.state() {
            LockState::Idle => NBL_STATE_IDLE,
            LockState::Pending => NBL_STATE_PENDING,
            LockState::Held => NBL_STATE_HELD,
            LockState::Overdue => NBL_STATE_OVERDUE,
            LockState::Lost => NBL_STATE_LOST,
            LockState::Forked => NBL_STATE_FORKED,
        })
    };
    // SAFETY: the header requires it of the caller.
    unsafe { write_out_param(out, err, state) }
}

/// Reports for how long the hold is certainly ours.
///
/// This is counted from before the last request was sent, minus a margin, so it is never longer than the
/// store's own lease. Does not wait.
///
/// @param lock The lock.
/// @param out Receives the time in milliseconds; 0 if the hold is overdue.
/// @param err The error detail, or NULL.
/// @retval NBL_OK out was written.
/// @retval NBL_ERR_INVALID_OP The lock is not held.
/// @retval NBL_LOST The hold was lost. Later calls return it again.
/// @retval NBL_ERR_FORKED The hold belongs to the parent process. Later calls return it again.
#[must_use]
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
    // SAFETY: the header requires it of the caller.
    unsafe { write_out_param(out, err, remaining) }
}

/// Reports when the lease of the hold ends, for people to read.
///
/// Does not wait.
///
/// @param lock The lock.
/// @param out Receives the wall-clock time, in milliseconds since 1970.
/// @param err The error detail, or NULL.
/// @retval NBL_OK out was written.
/// @retval NBL_ERR_INVALID_OP The lock is not held.
/// @retval NBL_LOST The hold was lost. Later calls return it again.
/// @retval NBL_ERR_FORKED The hold belongs to the parent process. Later calls return it again.
#[must_use]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nbl_lock_expires_at_ms(
    lock: *mut nbl_lock_t,
    out: *mut u64,
    err: *mut nbl_error_t,
) -> nbl_status_t {
    // SAFETY: the header requires it of the caller.
    unsafe { write_out_param(out, err, || Ok(handle::get::<Lock>(lock)?.expires_at_ms()?)) }
}

/// Reports the fence of the hold: a number below 2^53 that grows with every grant of this key.
///
/// The protected resource must refuse a request whose fence is smaller than the largest it has seen.
///
/// Unlike nbl_lock_state(), this may ask the store: if the grant brought no fence, the store is asked for one now, and
/// the hold is proven before the fence is returned: this waits at most 2 * op_timeout_ms. Otherwise it does not wait.
///
/// @param lock The lock.
/// @param out Receives the fence.
/// @param err The error detail, or NULL.
/// @retval NBL_OK out was written.
/// @retval NBL_LOST The hold is no longer ours.
/// @retval NBL_ERR_INVALID_OP The lock is not held, or its client is closed.
/// @retval NBL_ERR_FORKED The hold belongs to the parent process.
/// @retval NBL_ERR_UNREACHABLE The store could not be reached, or was busy for too long.
/// @retval NBL_ERR_INDETERMINATE No reply arrived. The hold continues.
/// @retval NBL_ERR_DENIED The account is not allowed to do this. The hold continues.
/// @retval NBL_ERR_STORE The store refused the request. The hold continues.
#[must_use]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nbl_lock_fence(lock: *mut nbl_lock_t, out: *mut u64, err: *mut nbl_error_t) -> nbl_status_t {
    // SAFETY: the header requires it of the caller.
    unsafe { write_out_param(out, err, || Ok(wait(handle::get::<Lock>(lock)?.fence())?)) }
}

/// Starts nbl_lock_fence() as an operation; nbl_op_take_fence() returns the number.
///
/// Does not wait.
///
/// @param lock The lock.
/// @param out Receives the operation. Free it with nbl_op_free().
/// @param err The error detail, or NULL.
/// @retval NBL_OK The operation was started.
#[must_use]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nbl_lock_fence_start(
    lock: *mut nbl_lock_t,
    out: *mut *mut nbl_op_t,
    err: *mut nbl_error_t,
) -> nbl_status_t {
    let started = || Op::register(handle::get::<Lock>(lock)?.fence(), |fence| Ok(Output::Fence(fence)), None);
    // SAFETY: the header requires it of the caller.
    unsafe { write_out_param(out, err, started) }
}

/// Returns a descriptor that is readable while the hold is overdue or lost, for poll, epoll or an event loop.
///
/// The descriptor is made at the first call, level-triggered and close-on-exec. It may be asked for before the lock
/// is taken, and serves every later hold of this object: it stops being readable when a renewal succeeds, or when the
/// loss was reported. It belongs to the library, and stays open until the lock is freed: do not read or close it, and
/// remove it from what you poll before nbl_lock_free(). A forked child must call this again for a descriptor of its
/// own. Does not wait.
///
/// @param lock The lock.
/// @return The descriptor; -1 if there is none, because the handle is wrong or none could be made.
#[must_use]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nbl_lock_lost_fd(lock: *mut nbl_lock_t) -> i32 {
    let mut descriptor = -1;
    guard(std::ptr::null_mut(), || {
        descriptor = handle::get::<Lock>(lock)?.lost_fd()?;
        Ok(NBL_OK)
    });
    descriptor
}

/// Copies a text of the lock.
///
/// Does not wait.
///
/// @param lock The lock.
/// @param field NBL_TEXT_KEY, NBL_TEXT_KEY_HASH, NBL_TEXT_INSTANCE_TOKEN or NBL_TEXT_OWNER_TOKEN. A key may
/// contain NUL bytes: needed says how long it is.
/// @param buffer Receives the text, NUL-terminated. NULL, with 0 as buffer_size, to get only its size.
/// @param buffer_size The size of the buffer in bytes.
/// @param needed Receives the size of the text in bytes, its NUL included. NULL is allowed.
/// @param err The error detail, or NULL.
/// @retval NBL_OK The text, or only its size, was written.
/// @retval NBL_ERR_BUFFER_TOO_SMALL buffer_size is too small. Nothing was copied, but needed was written.
/// @retval NBL_ERR_INVALID_OP For NBL_TEXT_INSTANCE_TOKEN: the lock is not held.
/// @retval NBL_LOST For NBL_TEXT_INSTANCE_TOKEN: the hold was lost.
/// @retval NBL_ERR_FORKED For NBL_TEXT_INSTANCE_TOKEN: the hold belongs to the parent process.
#[must_use]
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
                    "field must be NBL_TEXT_KEY, _KEY_HASH, _INSTANCE_TOKEN or _OWNER_TOKEN (got {field})"
                )));
            }
        };
        // SAFETY: the header requires it of the caller.
        unsafe { text::copy(&text, buffer, buffer_size, needed) }
    })
}
