//! What forked children get in place of a mapping, which they do not inherit.
//!
//! A signal handler may fork in the middle of an operation, at any instruction. The child returns into that operation,
//! which goes on: with pages of zeros, which are nobody else's, and in which it finds that nothing is in use.

use std::ptr;
use std::sync::Once;
use std::sync::atomic::{AtomicPtr, Ordering::*};

/// How many pieces a mapping may have.
pub const PIECES: usize = 12;

/// Where each piece is mapped; null where it is not.
pub type Pieces = [AtomicPtr<u8>; PIECES];

/// One mapping of this process, or a place for one. It is never freed: a fork may come while it is looked at.
struct Note {
    pieces: AtomicPtr<Pieces>,
    lengths: &'static [usize; PIECES],
    next: *const Note,
}

static NOTES: AtomicPtr<Note> = AtomicPtr::new(ptr::null_mut());

/// The notes from the newest on.
fn notes() -> impl Iterator<Item = &'static Note> {
    // SAFETY: notes are never freed.
    let at = |note: *const Note| unsafe { note.as_ref() };
    std::iter::successors(at(NOTES.load(Acquire)), move |note| at(note.next))
}

/// Has children get zeros for a mapping with pieces of these lengths, until it is forgotten. All mappings have the same
/// lengths.
pub fn note(pieces: &Pieces, lengths: &'static [usize; PIECES]) {
    static FORKS: Once = Once::new();
    FORKS.call_once(|| {
        // SAFETY: the handler may be called in any forked child. Should it not be registered, for want of memory, a
        // child that is forked in a signal handler inside an operation ends when it goes on there.
        unsafe { libc::pthread_atfork(None, None, Some(forked)) };
    });
    let pieces = ptr::from_ref(pieces).cast_mut();
    if notes().any(|note| note.pieces.compare_exchange(ptr::null_mut(), pieces, AcqRel, Relaxed).is_ok()) {
        return;
    }
    let note = Box::leak(Box::new(Note { pieces: AtomicPtr::new(pieces), lengths, next: NOTES.load(Acquire) }));
    while let Err(newest) = NOTES.compare_exchange(note.next.cast_mut(), note, AcqRel, Acquire) {
        note.next = newest;
    }
}

/// Before the mapping goes.
pub fn forget(pieces: &Pieces) {
    let pieces = ptr::from_ref(pieces).cast_mut();
    for note in notes() {
        let _ = note.pieces.compare_exchange(pieces, ptr::null_mut(), AcqRel, Relaxed);
    }
}

/// In a child that was just forked: it makes nothing but system calls.
unsafe extern "C" fn forked() {
    for note in notes() {
        // SAFETY: what is noted is there until it is forgotten.
        let Some(pieces) = (unsafe { note.pieces.load(Acquire).as_ref() }) else { continue };
        for (mapped, length) in pieces.iter().zip(note.lengths) {
            let address = mapped.load(Relaxed);
            if !address.is_null() {
                put_zeros(address.cast(), *length);
            }
        }
        // The child's own generation forgets it: it has other mappings.
        note.pieces.store(ptr::null_mut(), Release);
    }
}

/// Maps pages of zeros, unless something is there by now.
fn put_zeros(address: *mut libc::c_void, length: usize) {
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | libc::MAP_FIXED_NOREPLACE;
    // SAFETY: nothing that is mapped is replaced.
    let mapped = unsafe { libc::mmap(address, length, protection, flags, -1, 0) };
    // A kernel before Linux 4.17 takes the address for a wish.
    if mapped != libc::MAP_FAILED && mapped != address {
        // SAFETY: it was just mapped.
        unsafe { libc::munmap(mapped, length) };
    }
}
