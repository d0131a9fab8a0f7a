//! What is where in the file.
//!
//! ```text
//! Top      header: what the file is, written once; then what all shards share
//!          64 shards: a mutex, the free cells, a range of fences
//!          64 × 1,024 slots: the first record of a chain, and a word to sleep on
//! chunks   64 cells of 256 bytes each; the first says which shard the others belong to
//! ```
//!
//! A record's key hash says its slot for good. Only its shard's mutex guards it, its chain, and the cells
//! of the shard's chunks.

use std::mem::{offset_of, size_of};

use super::word::{Word32, Word64};

pub const MAGIC: u64 = u64::from_ne_bytes(*b"nblock\0T");
/// Raised when anything in the file changes its meaning or place.
pub const FORMAT: u64 = 2;

pub const SHARDS: usize = 64;
pub const SLOTS: usize = 1024;

pub const CHUNK_BYTES: u64 = 16 << 10;
pub const CELLS: u32 = 64;
/// Cells of a chunk that hold records: all but the first.
pub const USABLE_CELLS: u32 = CELLS - 1;
/// More chunks could not be numbered by links.
pub const MAX_CHUNKS: u32 = (1 << 17) - 1;

/// Longest key and record, in bytes. A length beyond them is damage.
pub const MAX_KEY: usize = 1 << 20;
pub const MAX_PAYLOAD: usize = 4 << 20;

/// The word is 0 in no state, so that a page of zeros is noticed.
pub const IN_USE: u32 = u32::from_ne_bytes(*b"live");
/// The file has been replaced: nothing may be granted in it any more.
pub const RETIRED: u32 = u32::from_ne_bytes(*b"over");
/// Nobody has found damage since the last complete check.
pub const NO_DAMAGE: u32 = u32::from_ne_bytes(*b"none");
pub const DAMAGE_SEEN: u32 = u32::from_ne_bytes(*b"seen");

/// On lines of its own: two, since processors fetch them in pairs.
#[repr(C, align(128))]
pub struct Line<T>(pub T);

/// How many words describe the file; see `header.rs`.
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

/// Read by every operation, and hardly ever changed.
#[repr(C)]
pub struct State {
    /// [`IN_USE`] or [`RETIRED`].
    pub life: Word32,
    /// [`NO_DAMAGE`] or [`DAMAGE_SEEN`].
    pub damage: Word32,
    /// Checked: so many chunks have an owner. It only grows.
    pub chunks: Word32,
    /// How often the file was opened: numbers its openers.
    pub openers: Word32,
    /// Checked: where the numbers of threads in the mutexes mean something.
    pub pid_namespace: Word64,
}

/// For growth, and for handing ranges of fences to shards.
#[repr(C)]
pub struct Central {
    pub mutex: Word32,
    /// Checked: so many chunks the file has space for.
    pub allocated: Word32,
    /// Checked: the fences from `next` up to `end` are reserved, and no shard has them.
    pub next: Word64,
    pub end: Word64,
}

#[repr(C)]
pub struct Shard {
    pub mutex: Word32,
    /// A slot whose waiters are about to be woken: its number and 1. See `wake.rs`.
    pub note: Word32,
    /// Link to the first free cell.
    pub free: Word32,
    /// Checked: all chunks below this one were looked at for those of this shard.
    pub adopted: Word32,
    /// Checked: no record has more cells. So many are kept free, for records to be replaced where there is no space
    /// for new ones.
    pub largest: Word32,
    /// Checked: the fences from `next` up to `end` are this shard's to give out.
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

/// Where the ceiling of the file's fences is.
pub const FENCE_CEILING_AT: u64 = (offset_of!(Top, central) + offset_of!(Central, end)) as u64;

/// Where the chunks begin: at a page, on machines with pages of 64 KiB too.
pub const CHUNKS_AT: u64 = (size_of::<Top>() as u64).next_multiple_of(64 << 10);

const _: () = assert!(size_of::<Cell>() == 256 && CELLS as u64 * 256 == CHUNK_BYTES);
const _: () = assert!(CHUNKS_AT.is_multiple_of(CHUNK_BYTES));

/// The shard of a key, and its slot there.
#[inline]
pub fn slot_of(hash: &[u8; 20]) -> (usize, usize) {
    let bits = u32::from_le_bytes(*hash.first_chunk().expect("a hash has 20 bytes")) as usize;
    (bits % SHARDS, bits / SHARDS % SLOTS)
}

/// How many cells a body of so many words takes.
pub const fn cells_for(words: usize) -> u32 {
    const FIRST: usize = WORDS - HEAD_WORDS;
    if words <= FIRST { 1 } else { 1 + (words - FIRST).div_ceil(WORDS) as u32 }
}
