//! The file in memory, in pieces that are never moved.
//!
//! The first piece has the top and the first chunks; each further piece has as many chunks as all before
//! it. A piece is mapped when a link first leads into it, even where the file is not that long yet: what is
//! touched is bounded by [`Mapping::has_chunk`], not by the mapping.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::ptr;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicPtr, AtomicU8, AtomicU32, Ordering::*};

use super::layout::{CELLS, CHUNK_BYTES, CHUNKS_AT, Cell, Top};
use crate::sys::process;

const FIRST_CHUNKS: u32 = 64;
const PIECES: usize = 12;

/// Where each piece is mapped; null where it is not.
type Pieces = [AtomicPtr<u8>; PIECES];

pub struct Mapping {
    /// At an address that forked children know; see [`children`].
    pieces: Box<Pieces>,
    /// For each chunk of a piece, its shard and 1, or 0. A private copy of what chunks say themselves: an owner never
    /// changes, and to look at the chunk for each of its cells would double the memory that is touched.
    owners: [OnceLock<Box<[AtomicU8]>>; PIECES],
    /// So many chunks are known to have an owner, and space in the file.
    chunks: AtomicU32,
    generation: u64,
}

/// The piece that a chunk is in.
#[inline]
fn piece_of(chunk: u32) -> usize {
    (u32::BITS - (chunk / FIRST_CHUNKS).leading_zeros()) as usize
}

/// The piece that a chunk is in, and which of its chunks it is.
#[inline]
fn place_of(chunk: u32) -> (usize, usize) {
    let piece = piece_of(chunk);
    let before = if piece == 0 { 0 } else { FIRST_CHUNKS << (piece - 1) };
    (piece, (chunk - before) as usize)
}

/// From where to where a piece reaches in the file.
fn extent(piece: usize) -> (u64, u64) {
    let chunks_before = if piece == 0 { 0 } else { u64::from(FIRST_CHUNKS) << (piece - 1) };
    let end = CHUNKS_AT + (u64::from(FIRST_CHUNKS) << piece) * CHUNK_BYTES;
    if piece == 0 { (0, end) } else { (CHUNKS_AT + chunks_before * CHUNK_BYTES, end) }
}

impl Mapping {
    /// Maps the first piece of a file, which must be as long as a top at least.
    pub fn new(file: &File) -> io::Result<Mapping> {
        let mapping = Mapping {
            pieces: Box::new([const { AtomicPtr::new(ptr::null_mut()) }; PIECES]),
            owners: [const { OnceLock::new() }; PIECES],
            chunks: AtomicU32::new(0),
            generation: process::generation(),
        };
        mapping.map(0, file)?;
        children::note(&mapping.pieces);
        Ok(mapping)
    }

    #[inline]
    pub fn top(&self) -> &Top {
        // SAFETY: mapped by `new` for as long as `self` lives, aligned as mappings are, within the file; a top is
        // nothing but atomics, for which every value is valid.
        unsafe { &*self.pieces[0].load(Acquire).cast::<Top>() }
    }

    /// Whether a chunk is known to be there: in the file, and mapped.
    #[inline]
    pub fn has_chunk(&self, chunk: u32) -> bool {
        chunk < self.chunks.load(Acquire)
    }

    /// Says that so many chunks are in the file, and maps what has them. Their owners are read by [`Mapping::learn`].
    pub fn now_has(&self, chunks: u32, file: &File) -> io::Result<()> {
        let Some(last) = chunks.checked_sub(1) else { return Ok(()) };
        for piece in 0..=piece_of(last) {
            if self.pieces[piece].load(Acquire).is_null() {
                self.map(piece, file)?;
            }
        }
        self.chunks.fetch_max(chunks, AcqRel);
        Ok(())
    }

    /// The shard that a chunk belongs to, if it was said to [`Mapping::learn`].
    #[inline]
    pub fn owner_of(&self, chunk: u32) -> Option<usize> {
        let (piece, at) = place_of(chunk);
        let owner = self.owners.get(piece)?.get()?[at].load(Acquire);
        usize::from(owner).checked_sub(1)
    }

    /// Notes which shard a chunk belongs to.
    pub fn learn(&self, chunk: u32, shard: usize) {
        let (piece, at) = place_of(chunk);
        let chunks = if piece == 0 { FIRST_CHUNKS } else { FIRST_CHUNKS << (piece - 1) };
        let owners = self.owners[piece].get_or_init(|| (0..chunks).map(|_| AtomicU8::new(0)).collect());
        owners[at].store(shard as u8 + 1, Release);
    }

    /// A cell of a chunk that is there ([`Mapping::has_chunk`]).
    #[inline]
    pub fn cell(&self, number: u32) -> &Cell {
        let chunk = number / CELLS;
        assert!(self.has_chunk(chunk), "a chunk that was not looked for");
        let piece = piece_of(chunk);
        let at = CHUNKS_AT + u64::from(number) * size_of::<Cell>() as u64 - extent(piece).0;
        // SAFETY: the chunk is in the file and its piece is mapped, for as long as `self` lives; cells lie at
        // multiples of their size; a cell is nothing but atomics.
        unsafe { &*self.pieces[piece].load(Acquire).add(at as usize).cast::<Cell>() }
    }

    fn map(&self, piece: usize, file: &File) -> io::Result<()> {
        let (from, to) = extent(piece);
        let (protection, length) = (libc::PROT_READ | libc::PROT_WRITE, (to - from) as usize);
        // SAFETY: a new mapping, at an address of the kernel's choice.
        let address =
            unsafe { libc::mmap(ptr::null_mut(), length, protection, libc::MAP_SHARED, file.as_raw_fd(), from as i64) };
        if address == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        // A forked child must not have it: it could give back a mutex in its parent's name.
        // SAFETY: the mapping was just made.
        let kept = unsafe { libc::madvise(address, length, libc::MADV_DONTFORK) } != 0;
        let error = io::Error::last_os_error();
        if !kept && self.pieces[piece].compare_exchange(ptr::null_mut(), address.cast(), AcqRel, Acquire).is_ok() {
            return Ok(());
        }
        // SAFETY: as above, and nobody else has seen it. Another thread mapped the same piece meanwhile.
        unsafe { libc::munmap(address, length) };
        if kept { Err(error) } else { Ok(()) }
    }
}

/// What forked children get in place of what they do not inherit.
///
/// A signal handler may fork in the middle of an operation, at any instruction. The child returns into that operation,
/// which goes on: with pages of zeros, which are nobody else's, and in which it finds that nothing is in use.
mod children {
    use std::ptr;
    use std::sync::Once;
    use std::sync::atomic::{AtomicPtr, Ordering::*};

    use super::{Pieces, extent};

    /// One mapping of this process, or a place for one. It is never freed: a fork may come while it is looked at.
    struct Note {
        pieces: AtomicPtr<Pieces>,
        next: *const Note,
    }

    static NOTES: AtomicPtr<Note> = AtomicPtr::new(ptr::null_mut());

    /// The notes from the newest on.
    fn notes() -> impl Iterator<Item = &'static Note> {
        // SAFETY: notes are never freed.
        let at = |note: *const Note| unsafe { note.as_ref() };
        std::iter::successors(at(NOTES.load(Acquire)), move |note| at(note.next))
    }

    /// Has children get zeros for a mapping, until it is forgotten.
    pub fn note(pieces: &Pieces) {
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
        let note = Box::leak(Box::new(Note { pieces: AtomicPtr::new(pieces), next: NOTES.load(Acquire) }));
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
            for (piece, mapped) in pieces.iter().enumerate() {
                let (address, (from, to)) = (mapped.load(Relaxed), extent(piece));
                if !address.is_null() {
                    put_zeros(address.cast(), (to - from) as usize);
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
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // A forked child does not have it, and may have something else there.
        if self.generation != process::generation() {
            return;
        }
        children::forget(&self.pieces);
        for (piece, mapped) in self.pieces.iter_mut().enumerate() {
            let (from, to) = extent(piece);
            let address = *mapped.get_mut();
            if !address.is_null() {
                // SAFETY: mapped by `map`; every reference into it borrows `self`.
                unsafe { libc::munmap(address.cast(), (to - from) as usize) };
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_lie_end_to_end() {
        for piece in 1..PIECES {
            assert_eq!(extent(piece).0, extent(piece - 1).1);
        }
        for chunk in (0..70).chain((7..17).flat_map(|bits| (1 << bits) - 1..(1 << bits) + 2)) {
            let (from, to) = extent(piece_of(chunk));
            let at = CHUNKS_AT + u64::from(chunk) * CHUNK_BYTES;
            assert!((from..to).contains(&at), "chunk {chunk}");
            let (piece, nth) = place_of(chunk);
            assert_eq!(extent(piece).0.max(CHUNKS_AT) + nth as u64 * CHUNK_BYTES, at);
        }
        assert!(piece_of(super::super::layout::MAX_CHUNKS) < PIECES);
    }
}
