//! The layout of the file.
//!
//! ```text
//! Top      header: what the file is, written once; then what all shards share
//!          64 shards: a mutex, the free cells, a range of fences
//!          64 × 1,024 slots: the first record of a chain, and a word to sleep on
//! chunks   64 cells of 256 bytes each; the first says which shard the others belong to
//! ```
//!
//! The hash of a key determines its slot. The mutex of the shard guards the shard, its chains, and the cells of its
//! chunks.

use std::mem::{offset_of, size_of};

use super::word::{Word32, Word64};

pub const MAGIC: u64 = u64::from_ne_bytes(*b"nblock\0T");
/// Raised when the meaning or the place of anything in the file changes.
pub const FORMAT: u64 = 2;

pub const SHARDS: usize = 64;
pub const SLOTS: usize = 1024;

pub const CHUNK_BYTES: u64 = 16 << 10;
pub const CELLS: u32 = 64;
/// Cells of a chunk that hold records: all but the first.
pub const USABLE_CELLS: u32 = CELLS - 1;
/// The largest number of chunks that links can refer to.
pub const MAX_CHUNKS: u32 = (1 << 17) - 1;

/// The longest key and record, in bytes. A greater length is damage.
pub const MAX_KEY: usize = 1 << 20;
pub const MAX_PAYLOAD: usize = 4 << 20;

/// The word is never 0, so that a page of zeros is noticed.
pub const IN_USE: u32 = u32::from_ne_bytes(*b"live");
/// The file has been replaced: nothing may be granted in it any more.
pub const RETIRED: u32 = u32::from_ne_bytes(*b"over");
/// No damage was found since the last complete check.
pub const NO_DAMAGE: u32 = u32::from_ne_bytes(*b"none");
pub const DAMAGE_SEEN: u32 = u32::from_ne_bytes(*b"seen");

/// Alone on its cache lines: two, since processors fetch them in pairs.
#[repr(C, align(128))]
pub struct Line<T>(pub T);

/// The number of words that describe the file; see `header.rs`.
pub const DESCRIPTION: usize = 48;

#[repr(C, align(4096))]
pub struct Top {
    pub description: Line<[Word64; DESCRIPTION]>,
    pub state: Line<State>,
    pub central: Line<Central>,
    pub listeners: Line<Word32>,
    pub shards: [Line<Shard>; SHARDS],
    pub slots: [[Slot; SLOTS]; SHARDS],
}

/// Read by every operation, and rarely changed.
#[repr(C)]
pub struct State {
    /// [`IN_USE`] or [`RETIRED`].
    pub life: Word32,
    /// [`NO_DAMAGE`] or [`DAMAGE_SEEN`].
    pub damage: Word32,
    /// With check bits: the number of chunks with an owner. It only grows.
    pub chunks: Word32,
    /// How often the file was opened. Each opener gets a number.
    pub openers: Word32,
    /// With check bits: the PID namespace of the thread numbers in the mutexes.
    pub pid_namespace: Word64,
}

/// For extending the file, and for giving fences to shards.
#[repr(C)]
pub struct Central {
    pub mutex: Word32,
    /// With check bits: the number of chunks that the file has space for.
    pub allocated: Word32,
    /// With check bits: the fences from `next` up to `end` are reserved, and no shard has them.
    pub next: Word64,
    pub end: Word64,
}

#[repr(C)]
pub struct Shard {
    pub mutex: Word32,
    /// The number, plus 1, of a slot whose waiters are about to be woken. See `wake.rs`.
    pub note: Word32,
    /// Link to the first free cell.
    pub free: Word32,
    /// With check bits: this shard has adopted its chunks among all chunks below this one.
    pub adopted: Word32,
    /// With check bits: the largest number of cells of a record. This many cells are kept free, so that records can be
    /// replaced if there is no space for new ones.
    pub largest: Word32,
    /// With check bits: the fences from `next` up to `end` are this shard's.
    pub next: Word64,
    pub end: Word64,
}

#[repr(C)]
pub struct Slot {
    /// Link to the first record.
    pub first: Word32,
    /// See `wake.rs`.
    pub wake: Word32,
}

/// A cell: the first of a record, a further one, a free one, or the first of a chunk.
#[repr(C, align(256))]
pub struct Cell {
    /// Link to the next record of the slot, the next cell of the record, or the next free cell.
    pub next: Word32,
    /// What kind of cell it is; [`kind`].
    pub kind: Word32,
    pub words: [Word64; WORDS],
}

pub const WORDS: usize = 31;
/// Words of a record's first cell that describe it; see `record.rs`.
pub const HEAD_WORDS: usize = 6;

pub mod kind {
    pub const FREE: u32 = u32::from_ne_bytes(*b"free");
    pub const RECORD: u32 = u32::from_ne_bytes(*b"reco");
    pub const FURTHER: u32 = u32::from_ne_bytes(*b"more");
    pub const CHUNK: u32 = u32::from_ne_bytes(*b"chun");
}

/// The offset of the fence ceiling.
pub const FENCE_CEILING_AT: u64 = (offset_of!(Top, central) + offset_of!(Central, end)) as u64;

/// The offset of the chunks: at the beginning of a page, also if pages have 64 KiB.
pub const CHUNKS_AT: u64 = (size_of::<Top>() as u64).next_multiple_of(64 << 10);

const _: () = assert!(size_of::<Cell>() == 256 && CELLS as u64 * 256 == CHUNK_BYTES);
const _: () = assert!(CHUNKS_AT.is_multiple_of(CHUNK_BYTES));

/// The shard of a key, and its slot there.
#[inline]
pub fn slot_of(hash: &[u8; 20]) -> (usize, usize) {
    let bits = u32::from_le_bytes(*hash.first_chunk().expect("a hash has 20 bytes")) as usize;
    (bits % SHARDS, bits / SHARDS % SLOTS)
}

/// The number of cells for a body of this many words.
pub const fn cells_for(words: usize) -> u32 {
    const FIRST: usize = WORDS - HEAD_WORDS;
    if words <= FIRST { 1 } else { 1 + (words - FIRST).div_ceil(WORDS) as u32 }
}
