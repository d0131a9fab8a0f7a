//! A table in shared memory, in which the processes of one machine keep their records.
//!
//! It maps keys to payloads, which it does not interpret. All processes that use it map one file. It has 64 shards with
//! a mutex each: a thread takes the mutex, makes its change, and releases it. Nothing is synced: a table is used during
//! one boot, because no holder of a lock survives a reboot.
//!
//! A process may be killed between any two instructions. The kernel hands its mutex on (`thread.rs`, `mutex.rs`), its
//! change has happened completely or not at all (`shard.rs`), and the next owner of the mutex derives again what may be
//! half done (`recovery.rs`). Everything that is read is checked (`checked.rs`, `record.rs`), and every loop along
//! links is bounded: damage is an error and never a wrong result.
//!
//! From the bottom up: `word`, `layout`, `checked`; `children`, `mapping`, `backing`, `header`, `file`; `futex`, `thread`,
//! `mutex`; `buffer`, `record`, `wake`, `shard`, `recovery`; the table, which is this file; `opening`.

mod backing;
mod buffer;
mod central;
pub mod checked;
mod children;
mod fault;
mod file;
mod futex;
pub mod header;
pub mod layout;
mod listing;
pub mod mapping;
mod mutex;
mod opening;
mod record;
mod recovery;
mod shard;
#[cfg(test)]
mod tests;
mod thread;
mod wake;
mod word;

use std::sync::Arc;
use std::time::Duration;

use self::file::TableFile;
use self::layout::{IN_USE, RETIRED, SHARDS};
use self::mutex::{OWNER_DIED, Unavailable};
use self::shard::Locked;
use crate::store::StoreError;
use crate::sys::process;

pub use self::buffer::Buffer;
pub use self::central::FenceSource;
pub use self::fault::{Damaged, Fault};
pub use self::futex::Woken;
pub use self::layout::FORMAT;
pub use self::listing::{Cursor, Listed, Page};
pub use self::mutex::Patience;
pub use self::opening::open;
pub use self::record::KeyRef;
pub use self::recovery::Census;
pub use self::shard::Entry;
pub use self::wake::{Sleeper, listener_bit};

/// An open table. Usable from any thread, until the process is forked: a child opens its own.
pub struct Table {
    pub file: TableFile,
    fences: Arc<dyn FenceSource>,
}

impl Table {
    /// Runs `work` with the entry of one key, and the mutex of its shard held. `work` must neither wait nor use another
    /// key.
    ///
    /// Runs on this thread, and waits for other processes no longer than `patience`; with [`Patience::none`] it does
    /// not sleep. If space or fences have run out, they are provided, and `work` is called again: it must return the
    /// faults of the entry, and must have changed nothing before.
    #[inline]
    pub fn with<T>(
        &self,
        key: KeyRef<'_>,
        patience: &mut Patience,
        mut work: impl FnMut(&mut Entry<'_, '_, '_>) -> Result<T, Fault>,
    ) -> Result<T, Fault> {
        /// Other operations may use up what was provided, but not this often.
        const ATTEMPTS: usize = 64;
        let (shard, slot) = layout::slot_of(&key.hash);
        for _ in 0..ATTEMPTS {
            let mut locked = self.take(shard, patience)?;
            if !self.is_ready(&locked) {
                locked = self.make_ready(locked, patience)?;
            }
            locked.read_note();
            let known = self.file.mapped();
            match work(&mut Entry::new(&mut locked, &key, slot)) {
                Ok(value) => {
                    drop(locked);
                    // If a signal handler forked, the child is in this operation too, but without the mapping: it has
                    // changed nothing.
                    return if self.file.is_of_this_process() { Ok(value) } else { Err(Fault::Forked) };
                }
                Err(fault) => self.overcome(fault, locked, known, patience)?,
            }
        }
        Err(Fault::Spoiled)
    }

    /// Provides what an operation lacked; the caller then starts it again. Returns other faults.
    #[cold]
    fn overcome(&self, fault: Fault, mut locked: Locked<'_>, known: u32, patience: &mut Patience) -> Result<(), Fault> {
        let shard = locked.index;
        if matches!(fault, Fault::Spoiled) {
            locked.leave_for_repair();
        }
        drop(locked);
        match fault {
            Fault::Full(cells) => self.grow(shard, cells, checked::open32(known).unwrap_or(0), patience),
            Fault::FencesSpent => self.provide_fences(shard, patience),
            Fault::Spoiled => Ok(()),
            fault => Err(fault),
        }
    }

    /// Takes the mutex of a shard, repairs the shard if necessary, and ensures that all its cells are mapped.
    fn lock(&self, shard: usize, patience: &mut Patience) -> Result<Locked<'_>, Fault> {
        let locked = self.take(shard, patience)?;
        let mut locked = self.make_ready(locked, patience)?;
        locked.read_note();
        Ok(locked)
    }

    #[inline(always)]
    fn take(&self, shard: usize, patience: &mut Patience) -> Result<Locked<'_>, Fault> {
        let generation = process::generation();
        if !self.file.is_of_generation(generation) {
            return Err(Fault::Forked);
        }
        let words = &self.file.top().shards[shard].0;
        match mutex::take(&words.mutex, generation, patience) {
            Ok(held) => Ok(Locked::new(&self.file, shard, words, held)),
            Err(unavailable) => Err(self.unavailable(unavailable, patience)),
        }
    }

    /// Whether a shard can be used without further work.
    #[inline]
    fn is_ready(&self, locked: &Locked<'_>) -> bool {
        let file = &self.file;
        file.top().state.0.life.load() == IN_USE && file.said_chunks() == file.mapped() && !locked.needs_repair()
    }

    #[cold]
    fn make_ready<'a>(&'a self, mut locked: Locked<'a>, patience: &mut Patience) -> Result<Locked<'a>, Fault> {
        let file = &self.file;
        loop {
            if file.top().state.0.life.load() != IN_USE {
                return Err(file.not_in_use());
            }
            // A chunk is counted before a shard adopts it. So if the count has not changed, all chunks of the shard are
            // mapped here.
            if file.said_chunks() == file.mapped() {
                break;
            }
            let shard = locked.index;
            drop(locked);
            file.chunks()?;
            locked = self.take(shard, patience)?;
        }
        if locked.needs_repair() {
            locked.repair()?;
        }
        Ok(locked)
    }

    /// Finishes the work of a process that was killed in the shard of a key: repairs the shard and sends the wake-ups.
    /// If there is nothing to do, this costs two loads. It does not wait.
    pub fn tidy_up(&self, hash: &[u8; 20]) {
        let Some(top) = self.file.top_if_mapped() else { return };
        let (shard, _) = layout::slot_of(hash);
        let words = &top.shards[shard].0;
        if words.note.load_in_order() != 0 || words.mutex.load_in_order() & OWNER_DIED != 0 {
            // A fault is reported to the next caller that uses the shard.
            drop(self.lock(shard, &mut Patience::new(Duration::ZERO)));
        }
    }

    /// Marks the file as replaced, so that no process grants anything in it any more, and wakes all waiters.
    pub fn retire(&self) {
        if let Some(top) = self.file.top_if_mapped() {
            top.state.0.life.store(RETIRED);
            self.file.wake_everybody();
        }
    }

    /// If the file was removed, marks it as replaced, so that the processes that use it open the new one.
    pub fn retire_if_removed(&self) {
        let in_use = self.file.top_if_mapped().is_some_and(|top| top.state.0.life.load() == IN_USE);
        if in_use && !self.file.has_a_name() {
            self.retire();
        }
    }

    /// Checks and counts everything, shard by shard.
    pub fn census(&self, patience: &mut Patience) -> Result<Census, Fault> {
        let mut census = Census::default();
        for shard in 0..SHARDS {
            let locked = self.lock(shard, patience)?;
            let found = locked.census();
            drop(locked);
            census += found?;
        }
        if census.damaged > 0 {
            self.file.note_damage();
        }
        Ok(census)
    }

    #[cold]
    fn unavailable(&self, unavailable: Unavailable, patience: &Patience) -> Fault {
        let message = match unavailable {
            Unavailable::Busy { owner } => return Fault::Busy { owner, waited: patience.limit() },
            Unavailable::Inside => {
                "store busy: this thread is in a signal handler that interrupted an operation on it: call the library \
                 after the handler has returned"
            }
            Unavailable::NoRobustList => {
                "the embedded store needs a kernel with robust futexes (CONFIG_FUTEX), and this one has none"
            }
        };
        StoreError::unreachable(message).into()
    }
}
