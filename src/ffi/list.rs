//! Inspection: lists of records.

use std::ffi::c_char;

use super::error::{Failure, guard, nbl_error_t};
use super::handle::{self, nbl_client_t, nbl_list_t, nbl_op_t};
use super::op::free;
use super::operation::{Op, Output, not_found};
use super::options::{fill, list_filter, nbl_list_options_t, size_to_fill, sized_32};
use super::out::write_out_param;
use super::records::List;
use super::status::{NBL_OK, nbl_status_t};
use super::text;
use crate::client::Client;
use crate::key::Key;
use crate::record::{Lease, Record};
use crate::sys::runtime::wait;

/// One record. The caller sets struct_size; nbl_list_record fills in the rest.
///
/// The texts belong to the list, are NUL-terminated and never NULL, and stay valid until nbl_list_free.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct nbl_record_t {
    /// sizeof(nbl_record_t).
    pub struct_size: u32,
    /// The holder's process id; 0 if the record does not contain it.
    pub pid: u32,
    /// Remaining time of the lease by the store's clock, in milliseconds. If the lease has run out:
    /// minus the milliseconds since then, at most -1. INT64_MAX if the lease has no end.
    pub remaining_ms: i64,
    /// Wall-clock time at which the lease ends, in milliseconds since 1970. UINT64_MAX if the lease has
    /// no end.
    pub expires_at_ms: u64,
    /// Wall-clock time of the grant, in milliseconds since 1970; 0 if the record does not contain
    /// it.
    pub acquired_at_ms: u64,
    /// The fence of the hold; 0 if it has none.
    pub fence: u64,
    /// How many times a reentrant lock is locked; 0 for a plain lock.
    pub lock_count: u32,
    /// 1 if the lease has run out, otherwise 0.
    pub expired: u32,
    /// The key. It may contain NUL bytes: key_len says how long it is.
    pub key: *const c_char,
    /// The length of the key in bytes.
    pub key_len: usize,
    /// The hash of the key as NoBrainer stores it, base64 of SHA-1.
    pub key_hash: *const c_char,
    /// The holder's host name; empty if the record does not contain it.
    pub host: *const c_char,
    /// The boot id of the holder's machine; empty if the record does not contain it.
    pub boot_id: *const c_char,
    /// The holder's app name; empty if the record does not contain it.
    pub app: *const c_char,
    /// The version of the record, 16 characters that identify exactly this state of it. It changes
    /// with every renewal, and reveals no token.
    pub version: *const c_char,
    /// What is wrong with a damaged record; empty if the record is intact. Only the embedded store lists
    /// damaged records. Of these fields, key_hash is then valid, and key if key_hash is its hash. The key
    /// stays locked until the record is broken (nbl_break).
    pub damaged: *const c_char,
    /// 1 if nblock did not write the record: it is another library's lock or, in Redis, perhaps no lock
    /// at all, and nbl_break does not delete it there. Otherwise 0.
    pub foreign: u32,
    /// Always zero.
    pub reserved: u32,
}
sized_32!(nbl_record_t: pid remaining_ms expires_at_ms acquired_at_ms fence lock_count expired key key_len key_hash
    host boot_id app version damaged foreign reserved);

/// # Safety
/// As the header requires of keys.
pub(crate) unsafe fn key_of(key: *const c_char, key_len: usize) -> Result<Key, Failure> {
    // SAFETY: guaranteed by the caller (see "Safety").
    Ok(Key::new(unsafe { text::bytes(key, key_len, Key::MAX_BYTES, "key") }?)?)
}

fn found(client: &Client, record: Option<Record>, key: &Key) -> Result<List, Failure> {
    match record {
        Some(record) => Ok(List::new(vec![record], client)),
        None => Err(not_found(format!("there is no record of {}", key.quoted()))),
    }
}

/// Lists records: all, or those whose lease has run out.
///
/// Waits at most op_timeout_ms for each part of the list.
///
/// @param client The client.
/// @param options Which records to list, or NULL for all.
/// @param out Receives the list, which may be empty, in no particular order. Free it with nbl_list_free(),
/// even if its client was freed before.
/// @param err The error detail, or NULL.
/// @retval NBL_OK out was written.
/// @retval NBL_ERR_UNREACHABLE The store could not be reached, or was busy for too long.
/// @retval NBL_ERR_INDETERMINATE No reply arrived within op_timeout_ms.
/// @retval NBL_ERR_DENIED The account is not allowed to do this.
/// @retval NBL_ERR_STORE The store refused the request.
/// @retval NBL_ERR_INVALID_OP The client is closed.
#[must_use]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nbl_list(
    client: *mut nbl_client_t,
    options: *const nbl_list_options_t,
    out: *mut *mut nbl_list_t,
    err: *mut nbl_error_t,
) -> nbl_status_t {
    let listed = || {
        let client = handle::get::<Client>(client)?;
        // SAFETY: the header requires it of the caller.
        let records = wait(client.list(unsafe { list_filter(options) }?))?;
        handle::register(List::new(records, &client))
    };
    // SAFETY: the header requires it of the caller.
    unsafe { write_out_param(out, err, listed) }
}

/// Starts nbl_list() as an operation; nbl_op_take_list() returns the list.
///
/// Does not wait.
///
/// @param client The client.
/// @param options As for nbl_list().
/// @param out Receives the operation. Free it with nbl_op_free().
/// @param err The error detail, or NULL.
/// @retval NBL_OK The operation was started.
#[must_use]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nbl_list_start(
    client: *mut nbl_client_t,
    options: *const nbl_list_options_t,
    out: *mut *mut nbl_op_t,
    err: *mut nbl_error_t,
) -> nbl_status_t {
    let started = || {
        let client = handle::get::<Client>(client)?;
        // SAFETY: the header requires it of the caller.
        let answer = client.list(unsafe { list_filter(options) }?);
        let of = (*client).clone();
        Op::register(answer, move |records| Ok(Output::List(List::new(records, &of))), None)
    };
    // SAFETY: the header requires it of the caller.
    unsafe { write_out_param(out, err, started) }
}

/// Finds the record of a key.
///
/// Waits at most op_timeout_ms.
///
/// @param client The client.
/// @param key The key: 1 byte to 1 MiB of UTF-8.
/// @param key_len The length of the key in bytes, or NBL_CSTR if it is NUL-terminated.
/// @param out Receives a list with one record. Free it with nbl_list_free().
/// @param err The error detail, or NULL.
/// @retval NBL_OK out was written.
/// @retval NBL_NOT_FOUND There is no record; the key was never locked, or was unlocked.
/// @retval NBL_ERR_UNREACHABLE The store could not be reached, or was busy for too long.
/// @retval NBL_ERR_INDETERMINATE No reply arrived within op_timeout_ms.
/// @retval NBL_ERR_DENIED The account is not allowed to do this.
/// @retval NBL_ERR_STORE The store refused the request.
/// @retval NBL_ERR_INVALID_OP The client is closed.
#[must_use]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nbl_find(
    client: *mut nbl_client_t,
    key: *const c_char,
    key_len: usize,
    out: *mut *mut nbl_list_t,
    err: *mut nbl_error_t,
) -> nbl_status_t {
    let list = || {
        let client = handle::get::<Client>(client)?;
        // SAFETY: the header requires it of the caller.
        let key = unsafe { key_of(key, key_len) }?;
        handle::register(found(&client, wait(client.find(&key))?, &key)?)
    };
    // SAFETY: the header requires it of the caller.
    unsafe { write_out_param(out, err, list) }
}

/// Starts nbl_find() as an operation; nbl_op_take_list() returns the list with one record.
///
/// Does not wait.
///
/// @param client The client.
/// @param key As for nbl_find().
/// @param key_len As for nbl_find().
/// @param out Receives the operation. Free it with nbl_op_free().
/// @param err The error detail, or NULL.
/// @retval NBL_OK The operation was started.
#[must_use]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nbl_find_start(
    client: *mut nbl_client_t,
    key: *const c_char,
    key_len: usize,
    out: *mut *mut nbl_op_t,
    err: *mut nbl_error_t,
) -> nbl_status_t {
    let started = || {
        let client = handle::get::<Client>(client)?;
        // SAFETY: the header requires it of the caller.
        let key = unsafe { key_of(key, key_len) }?;
        let (answer, of) = (client.find(&key), (*client).clone());
        Op::register(answer, move |record| Ok(Output::List(found(&of, record, &key)?)), None)
    };
    // SAFETY: the header requires it of the caller.
    unsafe { write_out_param(out, err, started) }
}

/// Reports how many records the list has.
///
/// Does not wait.
///
/// @param list The list.
/// @param out Receives the number.
/// @param err The error detail, or NULL.
/// @retval NBL_OK out was written.
#[must_use]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nbl_list_length(
    list: *mut nbl_list_t,
    out: *mut usize,
    err: *mut nbl_error_t,
) -> nbl_status_t {
    // SAFETY: the header requires it of the caller.
    unsafe { write_out_param(out, err, || Ok(handle::get::<List>(list)?.records.len())) }
}

/// Returns one record of the list.
///
/// Does not wait.
///
/// @param list The list.
/// @param index Which record, counted from 0.
/// @param out Receives the record. The caller sets its struct_size; fields that the library does not know
/// are set to zero. Its texts are valid until nbl_list_free().
/// @param err The error detail, or NULL.
/// @retval NBL_OK out was written.
/// @retval NBL_ERR_INVALID_ARGUMENT There is no such index, or struct_size is impossible.
#[must_use]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nbl_list_record(
    list: *mut nbl_list_t,
    index: usize,
    out: *mut nbl_record_t,
    err: *mut nbl_error_t,
) -> nbl_status_t {
    guard(err, || {
        let list = handle::get::<List>(list)?;
        // SAFETY: the header requires it of the caller.
        let size = unsafe { size_to_fill(out) }?;
        let record = list.get(index)?;
        let (owner, texts) = (record.owner.as_ref(), list.texts(index));
        let facts = nbl_record_t {
            struct_size: 0,
            pid: owner.map_or(0, |owner| owner.pid),
            remaining_ms: remaining_ms(record.lease),
            expires_at_ms: record.expires_at_ms,
            acquired_at_ms: owner.map_or(0, |owner| owner.acquired_at_ms),
            fence: record.fence.unwrap_or(0),
            lock_count: record.lock_count().unwrap_or(0),
            expired: record.lease.expired().into(),
            key: texts.key.as_ptr().cast(),
            key_len: record.key.as_str().len(),
            key_hash: texts.key_hash.as_ptr(),
            host: texts.host.as_ptr(),
            boot_id: texts.boot_id.as_ptr(),
            app: texts.app.as_ptr(),
            version: texts.version.as_ptr(),
            damaged: texts.damaged.as_ptr(),
            foreign: record.is_foreign().into(),
            reserved: 0,
        };
        // SAFETY: the caller guarantees `size` bytes at `out`.
        unsafe { fill(out, size, &facts) };
        Ok(NBL_OK)
    })
}

/// Negative if the lease is over.
fn remaining_ms(lease: Lease) -> i64 {
    let millis = |length: std::time::Duration| i64::try_from(length.as_millis()).unwrap_or(i64::MAX);
    match lease {
        Lease::Runs(left) => millis(left),
        Lease::RanOut(ago) => -millis(ago).max(1),
        Lease::Endless => i64::MAX,
    }
}

/// Frees a list, and the texts of its records.
///
/// Does not wait.
///
/// @param list The list, or NULL.
/// @retval NBL_OK Freed, or NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nbl_list_free(list: *mut nbl_list_t) -> nbl_status_t {
    guard(std::ptr::null_mut(), || free::<List>(list, |_| {}))
}

/// Breaks a lock by force: deletes a record if it is still exactly as it was read.
///
/// The holder, if there is one, loses its hold, but may still be working. To break one particular hold, find
/// the record, compare its fence, its holder or its version with what was read before, and break it through
/// that list. Waits at most op_timeout_ms.
///
/// @param list The list.
/// @param index Which record, counted from 0.
/// @param err The error detail, or NULL.
/// @retval NBL_OK Deleted.
/// @retval NBL_NOT_FOUND The record has changed, as it does with every renewal, or is gone; or it is in Redis
/// and nblock did not write it: it may be another program's data. Nothing was deleted.
/// @retval NBL_ERR_UNREACHABLE The store could not be reached, or was busy for too long.
/// @retval NBL_ERR_INDETERMINATE No reply arrived within op_timeout_ms.
/// @retval NBL_ERR_DENIED The account is not allowed to do this.
/// @retval NBL_ERR_STORE The store refused the request.
/// @retval NBL_ERR_INVALID_OP The client is closed.
#[must_use]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nbl_break(list: *mut nbl_list_t, index: usize, err: *mut nbl_error_t) -> nbl_status_t {
    guard(err, || match wait(handle::get::<List>(list)?.break_seen(index)?)? {
        None => Ok(NBL_OK),
        Some(why) => Err(not_found(why)),
    })
}

/// Starts nbl_break() as an operation.
///
/// Does not wait.
///
/// @param list The list.
/// @param index As for nbl_break().
/// @param out Receives the operation. Free it with nbl_op_free().
/// @param err The error detail, or NULL.
/// @retval NBL_OK The operation was started.
#[must_use]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nbl_break_start(
    list: *mut nbl_list_t,
    index: usize,
    out: *mut *mut nbl_op_t,
    err: *mut nbl_error_t,
) -> nbl_status_t {
    let started = || {
        let answer = handle::get::<List>(list)?.break_seen(index)?;
        let verdict = |not_broken| match not_broken {
            None => Ok(Output::Nothing),
            Some(why) => Err(not_found(why)),
        };
        Op::register(answer, verdict, None)
    };
    // SAFETY: the header requires it of the caller.
    unsafe { write_out_param(out, err, started) }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn what_ran_out_just_now_is_told_from_what_runs() {
        assert_eq!(remaining_ms(Lease::Runs(Duration::from_micros(10))), 0);
        assert_eq!(remaining_ms(Lease::RanOut(Duration::from_micros(10))), -1);
        assert_eq!(remaining_ms(Lease::RanOut(Duration::from_millis(7))), -7);
    }
}
