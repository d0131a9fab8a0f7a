//! What forked children get in place of the mapping, which they do not inherit.
//!
//! A signal handler may fork in the middle of an operation, at any instruction. The child returns into that operation
//! and continues it, on private pages of zeros, in which it finds that the table is not in use.

use std::ffi::c_void;
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicUsize, Ordering::*};

use crate::sys::entries::Entries;
use crate::sys::process;

/// Part of a mapping of this process.
struct Range {
    /// [`FREE`] if the entry is unused, [`TAKEN`] while the rest is written.
    address: AtomicPtr<c_void>,
    length: AtomicUsize,
}

const FREE: *mut c_void = ptr::null_mut();
/// An address at which nothing is ever mapped.
const TAKEN: *mut c_void = ptr::without_provenance_mut(1);

static MAPPED: Entries<Range> = Entries::new();

/// From now on, until `forget`, forked children get pages of zeros at this mapping's address.
///
/// If there is no memory for this note, a child that a signal handler forks inside an operation crashes when it
/// continues the operation.
pub fn note(address: *mut c_void, length: usize) {
    static REGISTERED: AtomicBool = AtomicBool::new(false);
    process::at_fork(&REGISTERED, forked);
    let free = |range: &&Range| range.address.compare_exchange(FREE, TAKEN, AcqRel, Relaxed).is_ok();
    let range = MAPPED
        .iter()
        .find(free)
        .unwrap_or_else(|| MAPPED.add(Range { address: AtomicPtr::new(TAKEN), length: AtomicUsize::new(0) }));
    range.length.store(length, Relaxed);
    range.address.store(address, Release);
}

/// To be called before the mapping is removed.
pub fn forget(address: *mut c_void) {
    for range in MAPPED.iter() {
        let _ = range.address.compare_exchange(address, FREE, AcqRel, Relaxed);
    }
}

/// Runs in a child that was just forked, and makes system calls only.
extern "C" fn forked() {
    for range in MAPPED.iter() {
        let address = range.address.swap(FREE, AcqRel);
        if ![FREE, TAKEN].contains(&address) {
            put_zeros(address, range.length.load(Relaxed));
        }
    }
}

/// Maps pages of zeros, unless something is there by now.
fn put_zeros(address: *mut c_void, length: usize) {
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | libc::MAP_FIXED_NOREPLACE;
    // SAFETY: nothing that is mapped is replaced.
    let mapped = unsafe { libc::mmap(address, length, protection, flags, -1, 0) };
    // To a kernel before Linux 4.17, the address is only a hint.
    if mapped != libc::MAP_FAILED && mapped != address {
        // SAFETY: it was just mapped.
        unsafe { libc::munmap(mapped, length) };
    }
}
