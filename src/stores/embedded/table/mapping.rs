//! The file in memory, in pieces that are never moved.
//!
//! The first piece has the top and the first chunks; each further piece has as many chunks as all before it. A piece is
//! mapped when the file has the first of its chunks, even if the file is not long enough for all of them yet:
//! [`Mapping::has_chunk`], and not the mapping, limits what may be accessed.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::ptr;
use std::sync::atomic::{AtomicPtr, AtomicU8, AtomicU32, Ordering::*};

use super::children;
use super::layout::{CELLS, CHUNK_BYTES, CHUNKS_AT, Cell, Top};
use crate::sys::process;

const FIRST_CHUNKS: u32 = 64;
const PIECES: usize = 12;

pub struct Mapping {
    pieces: [Piece; PIECES],
    /// The number of chunks that are known to have an owner, and space in the file.
    chunks: AtomicU32,
    generation: u64,
}

/// A piece of the mapping. Null if it is not mapped yet.
struct Piece {
    address: AtomicPtr<u8>,
    /// For each chunk of the piece, the number of its shard plus 1, or 0. This is a private copy of what the first cell
    /// of a chunk says, which never changes: reading the first cell at every access would double the memory that is
    /// read.
    owners: AtomicPtr<AtomicU8>,
}

impl Piece {
    const fn unmapped() -> Piece {
        Piece { address: AtomicPtr::new(ptr::null_mut()), owners: AtomicPtr::new(ptr::null_mut()) }
    }
}

/// The piece that a chunk is in.
#[inline]
fn piece_of(chunk: u32) -> usize {
    (u32::BITS - (chunk / FIRST_CHUNKS).leading_zeros()) as usize
}

/// The first chunk of a piece, and how many chunks it has.
#[inline]
fn chunks_of(piece: usize) -> (u32, u32) {
    match piece {
        0 => (0, FIRST_CHUNKS),
        _ => (FIRST_CHUNKS << (piece - 1), FIRST_CHUNKS << (piece - 1)),
    }
}

/// The offsets in the file at which a piece begins and ends.
#[inline]
fn extent(piece: usize) -> (u64, u64) {
    let (first, length) = chunks_of(piece);
    let end_of = |chunk: u32| CHUNKS_AT + u64::from(chunk) * CHUNK_BYTES;
    (if piece == 0 { 0 } else { end_of(first) }, end_of(first + length))
}

impl Mapping {
    /// Maps the first piece of a file, which must be as long as a top at least.
    pub fn new(file: &File) -> io::Result<Mapping> {
        let mapping = Mapping {
            pieces: [const { Piece::unmapped() }; PIECES],
            chunks: AtomicU32::new(0),
            generation: process::generation(),
        };
        mapping.map(0, file)?;
        Ok(mapping)
    }

    #[inline]
    pub fn top(&self) -> &Top {
        // SAFETY: mapped by `new` for as long as `self` lives, aligned as mappings are, within the file; a top is
        // nothing but atomics, for which every value is valid.
        unsafe { &*self.pieces[0].address.load(Acquire).cast::<Top>() }
    }

    /// Whether a chunk is known to be in the file, and mapped.
    #[inline]
    pub fn has_chunk(&self, chunk: u32) -> bool {
        chunk < self.chunks.load(Acquire)
    }

    /// Notes that the file has this many chunks, and maps their pieces. Their owners are noted by [`Mapping::learn`].
    pub fn now_has(&self, chunks: u32, file: &File) -> io::Result<()> {
        let Some(last) = chunks.checked_sub(1) else { return Ok(()) };
        for piece in 0..=piece_of(last) {
            if self.pieces[piece].address.load(Acquire).is_null() {
                self.map(piece, file)?;
            }
        }
        self.chunks.fetch_max(chunks, AcqRel);
        Ok(())
    }

    /// The shard that a chunk belongs to, if it was noted by [`Mapping::learn`].
    #[inline]
    pub fn owner_of(&self, chunk: u32) -> Option<usize> {
        usize::from(self.owner(chunk)?.load(Acquire)).checked_sub(1)
    }

    /// Where the owner of a chunk is noted, if the chunk's piece is mapped.
    #[inline]
    fn owner(&self, chunk: u32) -> Option<&AtomicU8> {
        let piece = piece_of(chunk);
        let owners = self.pieces.get(piece)?.owners.load(Acquire);
        // SAFETY: a piece has as many owners as chunks, from `map` until `self` is dropped.
        (!owners.is_null()).then(|| unsafe { &*owners.add((chunk - chunks_of(piece).0) as usize) })
    }

    /// A cell, if its chunk belongs to this shard.
    #[inline]
    pub fn cell_of(&self, shard: usize, number: u32) -> Option<&Cell> {
        // SAFETY: `learn` sets an owner only for chunks for which `has_chunk` holds.
        (self.owner_of(number / CELLS) == Some(shard)).then(|| unsafe { self.cell_there(number) })
    }

    /// Notes which shard a chunk belongs to. Panics unless [`Mapping::has_chunk`] holds for it.
    pub fn learn(&self, chunk: u32, shard: usize) {
        assert!(self.has_chunk(chunk), "a chunk that was not looked for");
        self.owner(chunk).expect("it is mapped").store(shard as u8 + 1, Release);
    }

    /// A cell of a chunk for which [`Mapping::has_chunk`] holds. Panics for others.
    #[inline]
    pub fn cell(&self, number: u32) -> &Cell {
        assert!(self.has_chunk(number / CELLS), "a chunk that was not looked for");
        // SAFETY: checked by the assertion.
        unsafe { self.cell_there(number) }
    }

    /// # Safety
    /// [`Mapping::has_chunk`] holds for the cell's chunk.
    #[inline]
    unsafe fn cell_there(&self, number: u32) -> &Cell {
        let piece = piece_of(number / CELLS);
        let at = CHUNKS_AT + u64::from(number) * size_of::<Cell>() as u64 - extent(piece).0;
        // SAFETY: the chunk is in the file and its piece is mapped, for as long as `self` lives; cells lie at
        // multiples of their size; a cell is nothing but atomics.
        unsafe { &*self.pieces[piece].address.load(Acquire).add(at as usize).cast::<Cell>() }
    }

    fn map(&self, piece: usize, file: &File) -> io::Result<()> {
        self.make_owners(piece);
        let (from, to) = extent(piece);
        let (protection, length) = (libc::PROT_READ | libc::PROT_WRITE, (to - from) as usize);
        // SAFETY: a new mapping, at an address of the kernel's choice.
        let address =
            unsafe { libc::mmap(ptr::null_mut(), length, protection, libc::MAP_SHARED, file.as_raw_fd(), from as i64) };
        if address == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        // A forked child must not have it: it could release a mutex that its parent holds.
        // SAFETY: the mapping was just made.
        let kept = unsafe { libc::madvise(address, length, libc::MADV_DONTFORK) } != 0;
        let error = io::Error::last_os_error();
        if !kept {
            children::note(address, length);
            if self.pieces[piece].address.compare_exchange(ptr::null_mut(), address.cast(), AcqRel, Acquire).is_ok() {
                return Ok(());
            }
            children::forget(address);
        }
        // SAFETY: as above, and no other code has the address: either `madvise` failed, or another thread has mapped
        // the same piece meanwhile.
        unsafe { libc::munmap(address, length) };
        if kept { Err(error) } else { Ok(()) }
    }

    fn make_owners(&self, piece: usize) {
        let nobody: Box<[AtomicU8]> = (0..chunks_of(piece).1).map(|_| AtomicU8::new(0)).collect();
        let nobody = Box::into_raw(nobody).cast::<AtomicU8>();
        if self.pieces[piece].owners.compare_exchange(ptr::null_mut(), nobody, AcqRel, Acquire).is_err() {
            // SAFETY: no other code has the pointer.
            unsafe { free_owners(piece, nobody) };
        }
    }
}

/// # Safety
/// `owners` was made by `make_owners` for this piece, and is not used any more.
unsafe fn free_owners(piece: usize, owners: *mut AtomicU8) {
    // SAFETY: guaranteed by the caller: the slice has the length with which it was made.
    drop(unsafe { Box::from_raw(ptr::slice_from_raw_parts_mut(owners, chunks_of(piece).1 as usize)) });
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // A forked child does not have it, and may have something else there.
        if self.generation != process::generation() {
            return;
        }
        for (piece, Piece { address, owners }) in self.pieces.iter_mut().enumerate() {
            let (from, to) = extent(piece);
            let (address, owners) = (*address.get_mut(), *owners.get_mut());
            if !owners.is_null() {
                // SAFETY: made by `map`; every reference to one borrows `self`.
                unsafe { free_owners(piece, owners) };
            }
            if !address.is_null() {
                children::forget(address.cast());
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
        }
        assert!(piece_of(super::super::layout::MAX_CHUNKS) < PIECES);
    }
}
