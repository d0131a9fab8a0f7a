//! What all shards share: space in the file, and fences.
//!
//! Both are guarded by one mutex. It is taken only when a shard has run out of one of them, and never together with a
//! shard's: to extend the file, or to write a new ceiling, takes milliseconds.

use std::ops::Range;

use super::Table;
use super::checked::{self, LIMIT64, Link};
use super::fault::Fault;
use super::layout::{CELLS, CHUNK_BYTES, CHUNKS_AT, MAX_CHUNKS, SHARDS, USABLE_CELLS, kind};
use super::mutex::{self, Held, Patience};
use crate::store::StoreError;
use crate::sys::process;

/// The file is doubled, within these bounds.
const SMALLEST_STEP: u32 = 16;
/// 4 MiB: allocating that takes a few milliseconds.
const LARGEST_STEP: u32 = 256;

/// The number of fences that a shard gets at once.
const FENCES: u64 = 4096;

/// Where fences come from: a ceiling that survives this file and the boot.
pub trait FenceSource: Send + Sync {
    /// Reserves fences permanently. They are at or above `floor`, above all that were reserved before, and below 2^53.
    /// May wait, and write to a disk.
    fn reserve(&self, floor: u64, patience: &mut Patience) -> Result<Range<u64>, StoreError>;
}

impl Table {
    fn lock_central(&self, patience: &mut Patience) -> Result<Held<'_>, Fault> {
        let mut held = mutex::take(&self.file.top().central.0.mutex, process::generation(), patience)
            .map_err(|unavailable| self.unavailable(unavailable, patience))?;
        // Each change here is one store, or two that are safe to separate: nothing needs to be repaired.
        held.needs_repair = false;
        Ok(held)
    }

    /// Gives a shard chunks with this many cells, unless it was given some since there were `known` chunks.
    #[cold]
    pub(super) fn grow(&self, shard: usize, cells: u32, known: u32, patience: &mut Patience) -> Result<(), Fault> {
        let _held = self.lock_central(patience)?;
        let state = &self.file.top().state.0;
        let used = self.file.chunks()?;
        if (known..used).any(|chunk| self.file.owner_of(chunk) == Some(shard)) {
            return Ok(());
        }
        let wanted = used + cells.div_ceil(USABLE_CELLS);
        if wanted > MAX_CHUNKS {
            return Err(StoreError::resources(format!(
                "store full: {} has reached its largest size, 2 GiB: release \
                 locks",
                self.file.shown()
            ))
            .into());
        }
        self.make_space(used, wanted)?;
        for chunk in used..wanted {
            let first = self.file.mapping.cell(chunk * CELLS);
            first.next.store(Link::NONE.seal());
            first.words[0].store(checked::seal64(u64::from(chunk) << 8 | shard as u64));
            first.kind.store(kind::CHUNK);
        }
        state.chunks.store(checked::seal32(wanted));
        Ok(())
    }

    /// Makes sure that the file has space for this many chunks, and that they are mapped here.
    fn make_space(&self, used: u32, wanted: u32) -> Result<(), Fault> {
        let central = &self.file.top().central.0;
        let has = checked::open32(central.allocated.load())
            .filter(|&has| has >= used && has <= MAX_CHUNKS)
            .ok_or_else(|| self.file.damaged("its length"))?;
        if wanted > has {
            let step = has.clamp(SMALLEST_STEP, LARGEST_STEP);
            let generous = wanted.max(has + step).min(MAX_CHUNKS);
            let at = |chunk: u32| CHUNKS_AT + u64::from(chunk) * CHUNK_BYTES;
            let made = match self.file.backing.allocate(at(has), at(generous)) {
                Err(_) if generous > wanted => self.file.backing.allocate(at(has), at(wanted)).map(|()| wanted),
                made => made.map(|()| generous),
            };
            central.allocated.store(checked::seal32(made?));
        }
        self.file.backing.map(&self.file.mapping, wanted)
    }

    /// Gives a shard more fences, unless another thread has done so.
    #[cold]
    pub(super) fn provide_fences(&self, shard: usize, patience: &mut Patience) -> Result<(), Fault> {
        let some = self.take_fences(patience)?;
        let locked = self.lock(shard, patience)?;
        let shard = locked.shard;
        let end = checked::open64(shard.end.load());
        let spent = match (checked::open64(shard.next.load()), end) {
            (Some(next), Some(end)) => next >= end,
            _ => true,
        };
        // Another thread may have given the shard a later range meanwhile: fences must not go back.
        if spent && end.is_none_or(|end| some.start >= end) {
            // If the process is killed between the two stores, the shard has no fences: the new start is not below the
            // old end.
            shard.next.store(checked::seal64(some.start));
            shard.end.store(checked::seal64(some.end));
        }
        drop(locked);
        Ok(())
    }

    /// Takes a range of fences, which no other shard gets.
    fn take_fences(&self, patience: &mut Patience) -> Result<Range<u64>, Fault> {
        let held = self.lock_central(patience)?;
        let left = self.reserved_fences(&held, patience)?;
        let some = left.start..left.end.min(left.start + FENCES);
        self.file.top().central.0.next.store(checked::seal64(some.end));
        Ok(some)
    }

    /// The fences that are reserved, and that no shard has. Never empty.
    fn reserved_fences(&self, _held: &Held<'_>, patience: &mut Patience) -> Result<Range<u64>, Fault> {
        let central = &self.file.top().central.0;
        let end = checked::open64(central.end.load());
        match (checked::open64(central.next.load()), end) {
            (Some(next), Some(end)) if next < end => return Ok(next..end),
            // Also if one of the two is damaged: then the range counts as used.
            _ => {}
        }
        // It may write to a disk.
        if patience.limit().is_zero() {
            return Err(Fault::Busy { owner: 0, waited: patience.limit() });
        }
        let floor = end.unwrap_or(0);
        let some = self.fences.reserve(floor, patience)?;
        if some.is_empty() || some.start < floor || some.end > LIMIT64 {
            let what = format!("fences must be at least {floor} and below 2^53 (got {some:?})");
            return Err(StoreError::rejected(what).into());
        }
        central.next.store(checked::seal64(some.start));
        central.end.store(checked::seal64(some.end));
        Ok(some)
    }

    /// Makes sure that there are fences, and that they are at or above `floor`, the ceiling of a file that this one has
    /// replaced.
    pub fn prepare_fences(&self, floor: u64, patience: &mut Patience) -> Result<(), Fault> {
        let central = &self.file.top().central.0;
        let held = self.lock_central(patience)?;
        let too_low = checked::open64(central.end.load()).is_none_or(|end| end < floor);
        if too_low {
            // If the process is killed between the two stores, there are no reserved fences.
            central.next.store(checked::seal64(floor));
            central.end.store(checked::seal64(floor));
        }
        self.reserved_fences(&held, patience)?;
        drop(held);
        for shard in (0..SHARDS).filter(|_| too_low) {
            let locked = self.lock(shard, patience)?;
            // The rest of its range is below the floor.
            locked.shard.next.store(locked.shard.end.load());
            drop(locked);
        }
        Ok(())
    }

    /// A number at or above every fence of this table, as far as it can be read. 0 in a forked child.
    pub fn fence_ceiling(&self) -> u64 {
        self.file.top_if_mapped().and_then(|top| checked::open64(top.central.0.end.load())).unwrap_or(0)
    }
}
