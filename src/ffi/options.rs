//! Options structs: fields are only ever appended, and zero means the default.

use std::ffi::c_char;
use std::mem::MaybeUninit;
use std::time::Duration;

use super::error::Failure;
use super::out::out_given;
use super::status::nbl_status_t;
use super::text;
use crate::clock::Boottime;
use crate::error::Error;
use crate::options::{ClientOptions, IfHeld, LockOptions, Timeout};
use crate::store::Filter;

/// timeout_ms: try once, without waiting.
pub const NBL_NO_WAIT: i64 = -2;
/// timeout_ms: wait forever. (-1, as for poll.)
pub const NBL_FOREVER: i64 = -1;
/// auto_refresh, fence: yes.
pub const NBL_ON: i32 = 1;
/// auto_refresh, fence: no.
pub const NBL_OFF: i32 = -1;
/// if_held: if this lock object is already in use, return NBL_ERR_INVALID_OP. The default.
pub const NBL_IF_HELD_ERROR: i32 = 1;
/// if_held: if this lock object is already in use, wait for its turn, first come, first served.
/// For lock objects that threads share. nbl_try_lock returns NBL_UNAVAILABLE at once.
pub const NBL_IF_HELD_WAIT: i32 = 2;
/// filter of nbl_list(): all records. The default.
pub const NBL_LIST_ALL: i32 = 1;
/// filter of nbl_list(): records whose lease has run out.
pub const NBL_LIST_EXPIRED: i32 = 2;

/// Options of a client. NULL, or zero in a field, means the default.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct nbl_client_options_t {
    /// sizeof(nbl_client_options_t).
    pub struct_size: u32,
    /// Must be zero.
    pub reserved: u32,
    /// Length of a lease in milliseconds, for locks that set none: 1 to 31622400000 (366 days).
    /// Default 60000.
    pub expire_ms: i64,
    /// How long nbl_lock waits, in milliseconds, for locks that set none; or NBL_NO_WAIT, or
    /// NBL_FOREVER. Default 10000.
    pub timeout_ms: i64,
    /// Limit for one request to the store, in milliseconds: 1 to 3600000. Default 5000.
    pub op_timeout_ms: i64,
    /// Limit for opening the store, in milliseconds: 1 to 3600000. Default 5000.
    pub connect_timeout_ms: i64,
    /// The app name that is shown when locks are listed. NUL-terminated UTF-8, at most 255 bytes.
    /// Default: the program's name.
    pub app: *const c_char,
}

/// Options of a lock, or of one call on it. NULL, or zero in a field, means: as the lock was made
/// with, otherwise as its client was made with.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct nbl_lock_options_t {
    /// sizeof(nbl_lock_options_t).
    pub struct_size: u32,
    /// NBL_ON: renew the hold, each time after a third of its expire, until it is unlocked. Default
    /// NBL_OFF.
    pub auto_refresh: i32,
    /// Length of the lease in milliseconds: 1 to 31622400000 (366 days).
    pub expire_ms: i64,
    /// How long to wait for a grant, in milliseconds; or NBL_NO_WAIT, or NBL_FOREVER.
    pub timeout_ms: i64,
    /// What to do if this lock object is already in use: NBL_IF_HELD_ERROR or NBL_IF_HELD_WAIT.
    pub if_held: i32,
    /// NBL_ON: the grant comes with a fence. Default NBL_OFF; every store except
    /// RethinkDB gives one in any case.
    pub fence: i32,
}

/// Options of nbl_list. NULL, or zero in a field, means the default.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct nbl_list_options_t {
    /// sizeof(nbl_list_options_t).
    pub struct_size: u32,
    /// NBL_LIST_ALL or NBL_LIST_EXPIRED.
    pub filter: i32,
}

/// A struct that starts with its size, which distinguishes programs with older and newer headers.
///
/// # Safety
/// Only for `repr(C)` structs of integers and pointers without padding, whose first field is the `u32` size.
pub(crate) unsafe trait VersionedStruct: Copy {
    const NAME: &'static str;
    /// The offsets of its fields. An older struct ends at one of them.
    const FIELDS: &'static [usize];
}
macro_rules! sized_32 {
    ($type:ident: $($field:ident)+) => {
        // SAFETY: see its definition.
        unsafe impl $crate::ffi::options::VersionedStruct for $type {
            const NAME: &'static str = stringify!($type);
            const FIELDS: &'static [usize] = &[$(std::mem::offset_of!($type, $field)),+];
        }
    };
}
pub(crate) use sized_32;
sized_32!(nbl_client_options_t: reserved expire_ms timeout_ms op_timeout_ms connect_timeout_ms app);
sized_32!(nbl_lock_options_t: auto_refresh expire_ms timeout_ms if_held fence);
sized_32!(nbl_list_options_t: filter);

/// Reads an options struct of any version. An older one is shorter. In a newer one, fields that are not known here must
/// be zero.
///
/// # Safety
/// `options` is NULL or points to as many bytes as its first field says.
unsafe fn read<T: VersionedStruct>(options: *const T) -> Result<Option<T>, Failure> {
    if options.is_null() {
        return Ok(None);
    }
    let known = size_of::<T>();
    // SAFETY: a struct begins with its size.
    let given = checked_size::<T>(unsafe { options.cast::<u32>().read_unaligned() })?;
    let mut whole = MaybeUninit::<T>::zeroed();
    // SAFETY: `given` bytes are there, and at most `known` fit.
    unsafe { std::ptr::copy_nonoverlapping(options.cast::<u8>(), whole.as_mut_ptr().cast::<u8>(), given.min(known)) };
    for offset in known..given {
        // SAFETY: `given` bytes are there.
        if unsafe { options.cast::<u8>().add(offset).read() } != 0 {
            return Err(Failure::invalid_argument(format!(
                "{} has a field set at byte {offset}, which this version of the library does not know",
                T::NAME
            )));
        }
    }
    // SAFETY: integers and pointers, all bytes set.
    Ok(Some(unsafe { whole.assume_init() }))
}

/// Checks a `struct_size` as far as possible: it may be that of an older struct, which ends where a later field begins,
/// or of a newer one. No struct will ever be larger than 4096 bytes.
fn checked_size<T: VersionedStruct>(given: u32) -> Result<usize, Failure> {
    let (name, size) = (T::NAME, given as usize);
    if !(4..=4096).contains(&size) {
        return Err(Failure::invalid_argument(format!("{name}.struct_size must be sizeof({name}) (got {given})")));
    }
    if size < size_of::<T>() && !T::FIELDS.contains(&size) {
        // A field is read or written as a whole.
        return Err(Failure::invalid_argument(format!(
            "{name}.struct_size must be sizeof({name}) (got {given}, which is in the middle of a field)"
        )));
    }
    Ok(size)
}

/// The size of the caller's struct, of any version, that is to be filled in.
///
/// # Safety
/// `out` is NULL or points to as many bytes as its first field says.
pub(crate) unsafe fn size_to_fill<T: VersionedStruct>(out: *mut T) -> Result<usize, Failure> {
    out_given(out)?;
    // SAFETY: a struct begins with its size.
    checked_size::<T>(unsafe { out.cast::<u32>().read() })
}

/// Fills in the caller's struct of `size` bytes. An older one gets the fields that it has. In a newer one, the bytes
/// that are not known here become zero. Its `struct_size` is not changed.
///
/// # Safety
/// `out` must be writable, and `size` must have been returned for it by `size_to_fill`.
pub(crate) unsafe fn fill<T: VersionedStruct>(out: *mut T, size: usize, value: &T) {
    let (known, first) = (size.min(size_of::<T>()), size_of::<u32>());
    let (from, to) = (std::ptr::from_ref(value).cast::<u8>(), out.cast::<u8>());
    // SAFETY: `size` bytes are there, and `known` of them in `value`.
    unsafe {
        std::ptr::copy_nonoverlapping(from.add(first), to.add(first), known - first);
        to.add(known).write_bytes(0, size - known);
    }
}

fn length(name: &str, milliseconds: i64) -> Result<Option<Duration>, Failure> {
    match milliseconds {
        0 => Ok(None),
        1.. => Ok(Some(Duration::from_millis(milliseconds as u64))),
        _ => Err(Failure::invalid_argument(format!(
            "{name} must be a positive number of milliseconds, or 0 for the default (got {milliseconds})"
        ))),
    }
}

/// How long to wait; `None` for the default.
fn timeout(milliseconds: i64) -> Result<Option<Timeout>, Failure> {
    Ok(match milliseconds {
        0 => None,
        NBL_NO_WAIT => Some(Timeout::NoWait),
        NBL_FOREVER => Some(Timeout::Forever),
        1.. => Some(Timeout::After(Duration::from_millis(milliseconds as u64))),
        _ => {
            return Err(Failure::invalid_argument(format!(
                "timeout_ms must be a positive number of milliseconds, NBL_NO_WAIT, NBL_FOREVER, or 0 for the default \
                 (got {milliseconds})"
            )));
        }
    })
}

/// The time until which a call waits.
pub(crate) fn limit(timeout_ms: i64, default: Timeout) -> Result<Boottime, Failure> {
    Ok(timeout(timeout_ms)?.unwrap_or(default).from(Boottime::now()))
}

fn switch(name: &str, value: i32) -> Result<Option<bool>, Failure> {
    match value {
        0 => Ok(None),
        NBL_ON => Ok(Some(true)),
        NBL_OFF => Ok(Some(false)),
        _ => Err(Failure::invalid_argument(format!(
            "{name} must be NBL_ON, NBL_OFF, or 0 for the default (got {value})"
        ))),
    }
}

/// # Safety
/// As the header requires of options.
pub(crate) unsafe fn client_options(options: *const nbl_client_options_t) -> Result<ClientOptions, Failure> {
    let defaults = ClientOptions::default();
    // SAFETY: guaranteed by the caller (see "Safety").
    let Some(given) = (unsafe { read(options) })? else { return Ok(defaults) };
    if given.reserved != 0 {
        return Err(Failure::invalid_argument(format!("reserved must be 0 (got {})", given.reserved)));
    }
    // SAFETY: guaranteed by the caller (see "Safety").
    let app = unsafe { text::optional(given.app, "app") }?;
    Ok(ClientOptions {
        expire: length("expire_ms", given.expire_ms)?.unwrap_or(defaults.expire),
        timeout: timeout(given.timeout_ms)?.unwrap_or(defaults.timeout),
        op_timeout: length("op_timeout_ms", given.op_timeout_ms)?.unwrap_or(defaults.op_timeout),
        connect_timeout: length("connect_timeout_ms", given.connect_timeout_ms)?.unwrap_or(defaults.connect_timeout),
        app: app.unwrap_or_default().to_string(),
    })
}

/// # Safety
/// As the header requires of options.
#[inline]
pub(crate) unsafe fn lock_options(options: *const nbl_lock_options_t) -> Result<LockOptions, Failure> {
    // SAFETY: guaranteed by the caller (see "Safety").
    let Some(given) = (unsafe { read(options) })? else { return Ok(LockOptions::default()) };
    let options = LockOptions {
        expire: length("expire_ms", given.expire_ms)?,
        timeout: timeout(given.timeout_ms)?,
        auto_refresh: switch("auto_refresh", given.auto_refresh)?,
        if_held: match given.if_held {
            0 => None,
            NBL_IF_HELD_ERROR => Some(IfHeld::Error),
            NBL_IF_HELD_WAIT => Some(IfHeld::Wait),
            other => {
                return Err(Failure::invalid_argument(format!(
                    "if_held must be NBL_IF_HELD_ERROR, NBL_IF_HELD_WAIT, or 0 for the default (got {other})"
                )));
            }
        },
        fence: switch("fence", given.fence)?,
    };
    options.check().map_err(|error: Error| Failure::from(error))?;
    Ok(options)
}

/// # Safety
/// As the header requires of options.
pub(crate) unsafe fn list_filter(options: *const nbl_list_options_t) -> Result<Filter, Failure> {
    // SAFETY: guaranteed by the caller (see "Safety").
    let filter = unsafe { read(options) }?.map_or(0, |given| given.filter);
    match filter {
        0 | NBL_LIST_ALL => Ok(Filter::All),
        NBL_LIST_EXPIRED => Ok(Filter::Expired),
        _ => Err(Failure::invalid_argument(format!(
            "filter must be NBL_LIST_ALL, NBL_LIST_EXPIRED, or 0 for the default (got {filter})"
        ))),
    }
}

const _: () = assert!(size_of::<nbl_status_t>() == 4);
