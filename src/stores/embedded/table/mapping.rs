//! The file in memory, in pieces that are never moved.
//!
//! The first piece has the top and the first chunks; each further piece has as many chunks as all before
//! it. A piece is mapped when a link first leads into it, even where the file is not that long yet: what is
//! touched is bounded by [`Mapping::has_chunk`], not by the mapping.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::ptr;
use std::sync::atomic::{AtomicPtr, AtomicU8, AtomicU32, Ordering::*};

use super::children;
use super::layout::{CELLS, CHUNK_BYTES, CHUNKS_AT, Cell, MAX_CHUNKS, Top};
use crate::sys::process;

const FIRST_CHUNKS: u32 = 64;
const PIECES: usize = 12;

pub struct Mapping {
    pieces: [AtomicPtr<u8>; PIECES],
    /// For each chunk, its shard and 1, or 0. A private copy of what chunks say themselves: an owner never
    /// changes, and to look at the chunk for each of its cells would double the memory that is touched.
    owners: Box<[AtomicU8]>,
    /// So many chunks are known to have an owner, and space in the file.
    chunks: AtomicU32,
    generation: u64,
}

/// The piece that a chunk is in.
#[inline]
fn piece_of(chunk: u32) -> usize {
    (u32::BITS - (chunk / FIRST_CHUNKS).leading_zeros()) as usize
}

/// The owners of no chunk. Memory that is all zeros costs nothing until it is changed.
fn no_owners() -> Box<[AtomicU8]> {
    let zeros = vec![0u8; MAX_CHUNKS as usize].into_boxed_slice();
    // SAFETY: an `AtomicU8` is in memory what a `u8` is, and nobody else has the box.
    unsafe { Box::from_raw(Box::into_raw(zeros) as *mut [AtomicU8]) }
}

/// From where to where a piece reaches in the file.
#[inline]
fn extent(piece: usize) -> (u64, u64) {
    let chunks_before = if piece == 0 { 0 } else { u64::from(FIRST_CHUNKS) << (piece - 1) };
    let end = CHUNKS_AT + (u64::from(FIRST_CHUNKS) << piece) * CHUNK_BYTES;
    if piece == 0 { (0, end) } else { (CHUNKS_AT + chunks_before * CHUNK_BYTES, end) }
}

impl Mapping {
    /// Maps the first piece of a file, which must be as long as a top at least.
    pub fn new(file: &File) -> io::Result<Mapping> {
        let mapping = Mapping {
            pieces: [const { AtomicPtr::new(ptr::null_mut()) }; PIECES],
            owners: no_owners(),
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
        usize::from(self.owners.get(chunk as usize)?.load(Acquire)).checked_sub(1)
    }

    /// A cell, if its chunk belongs to this shard.
    #[inline]
    pub fn cell_of(&self, shard: usize, number: u32) -> Option<&Cell> {
        // SAFETY: only chunks that are there have an owner (`learn`).
        (self.owner_of(number / CELLS) == Some(shard)).then(|| unsafe { self.cell_there(number) })
    }

    /// Notes which shard a chunk belongs to that is there.
    pub fn learn(&self, chunk: u32, shard: usize) {
        assert!(self.has_chunk(chunk), "a chunk that was not looked for");
        self.owners[chunk as usize].store(shard as u8 + 1, Release);
    }

    /// A cell of a chunk that is there ([`Mapping::has_chunk`]).
    #[inline]
    pub fn cell(&self, number: u32) -> &Cell {
        assert!(self.has_chunk(number / CELLS), "a chunk that was not looked for");
        // SAFETY: the chunk is there.
        unsafe { self.cell_there(number) }
    }

    /// # Safety
    /// The cell's chunk is there.
    #[inline]
    unsafe fn cell_there(&self, number: u32) -> &Cell {
        let piece = piece_of(number / CELLS);
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
        if !kept {
            children::note(address, length);
            if self.pieces[piece].compare_exchange(ptr::null_mut(), address.cast(), AcqRel, Acquire).is_ok() {
                return Ok(());
            }
            children::forget(address);
        }
        // SAFETY: as above, and nobody else has seen it. Another thread mapped the same piece meanwhile.
        unsafe { libc::munmap(address, length) };
        if kept { Err(error) } else { Ok(()) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // A forked child does not have it, and may have something else there.
        if self.generation != process::generation() {
            return;
        }
        for (piece, mapped) in self.pieces.iter_mut().enumerate() {
            let (from, to) = extent(piece);
            let address = *mapped.get_mut();
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
