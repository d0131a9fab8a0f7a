//! A table in shared memory: what the processes of one machine keep their records in.
//!
//! It maps keys to payloads, which mean nothing here. A file is mapped by all who use it; 64 shards have a
//! mutex each; a thread takes one, makes its change, and releases it. Nothing is
//! synced: the table is of one boot, since no holder of a lock outlives it.
//!
//! A process may be killed between any two instructions. Its mutex is handed on by the kernel (`thread.rs`,
//! `mutex.rs`), its change has happened or has not (`shard.rs`), and the next owner derives anew what it may
//! have left half done (`recovery.rs`). Whatever is read is checked (`checked.rs`, `record.rs`), and every loop
//! along links is bounded: damage is an error and never a wrong answer.
//!
//! From the bottom up: `word`, `layout`, `checked`; `mapping`, `backing`, `header`; `futex`, `thread`,
//! `mutex`; `record`, `shard`, `recovery`, `central`, `wake`, `listing`; `opening`.

mod backing;
mod central;
mod checked;
mod fault;
mod futex;
mod header;
mod layout;
mod listing;
mod mapping;
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

use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use self::backing::Backing;
use self::layout::{CELLS, DAMAGE_SEEN, IN_USE, RETIRED, SHARDS, Top, kind};
use self::mapping::Mapping;
use self::mutex::Unavailable;
use self::shard::Locked;
use crate::store::StoreError;
use crate::sys::process;

pub use self::backing::FileId;
pub use self::central::FenceSource;
pub use self::fault::Fault;
pub use self::futex::Woken;
pub use self::header::{Description, Machine};
pub use self::listing::{Cursor, Damaged, Listed, Page};
pub use self::mutex::Patience;
pub use self::opening::open;
pub use self::record::KeyRef;
pub use self::recovery::Census;
pub use self::shard::Entry;
pub use self::wake::{OWN_BIT, Sleeper, bell_bit};

/// The directory that the table's file is in: opened, and found trustworthy. Names are those of files in it,
/// wherever its path leads by now. No descriptor may have the number of standard input, output or error.
pub trait Directory: Send + Sync {
    /// Opens a file for reading and writing, if it is there. Refuses one that others could have written.
    fn open(&self, name: &str) -> Result<Option<File>, StoreError>;
    /// Makes a file that is not there, for those who may use the store.
    fn create(&self, name: &str) -> Result<File, StoreError>;
    /// Gives a file another name as well, unless that is taken.
    fn link(&self, name: &str, other: &str) -> Result<(), StoreError>;
    fn rename(&self, from: &str, to: &str) -> Result<(), StoreError>;
    /// Removes a file, if it is there.
    fn remove(&self, name: &str) -> Result<(), StoreError>;
    fn names(&self) -> Result<Vec<String>, StoreError>;
    /// What messages call a file.
    fn shown(&self, name: &str) -> String;
}

/// An open table. Usable from any thread, until the process is forked: a child opens its own.
pub struct Table {
    mapping: Mapping,
    backing: Backing,
    description: Description,
    fences: Arc<dyn FenceSource>,
    generation: u64,
    /// The word that says how many chunks there are, as of when they were mapped.
    mapped: AtomicU32,
}

impl Table {
    fn new(mapping: Mapping, backing: Backing, description: Description, fences: Arc<dyn FenceSource>) -> Table {
        Table { mapping, backing, description, fences, generation: process::generation(), mapped: AtomicU32::new(0) }
    }

    /// Does something with one key, with the mutex of its shard held: `work` must neither wait nor use another key.
    ///
    /// Runs on this thread, and waits no longer than `patience` for other processes; with none it does not
    /// sleep. Where space or fences have run out, they are provided and `work` is called again: it hands on
    /// what fails in the entry, and has changed nothing by then.
    #[inline]
    pub fn with<T>(
        &self,
        key: KeyRef<'_>,
        patience: &mut Patience,
        mut work: impl FnMut(&mut Entry<'_, '_, '_>) -> Result<T, Fault>,
    ) -> Result<T, Fault> {
        /// Others may use up what was provided; not that often.
        const ATTEMPTS: usize = 64;
        let (shard, slot) = layout::slot_of(&key.hash);
        for _ in 0..ATTEMPTS {
            let mut locked = self.lock(shard, patience)?;
            let known = self.mapped.load(Ordering::Acquire);
            let done = work(&mut Entry::new(&mut locked, key, slot));
            if matches!(done, Err(Fault::Spoiled)) {
                locked.leave_for_repair();
            }
            self.give_back(locked);
            match done {
                Err(Fault::Full(cells)) => {
                    let known = checked::open32(known).unwrap_or(0);
                    self.grow(shard, cells, known, patience)?;
                }
                Err(Fault::FencesSpent) => self.provide_fences(shard, patience)?,
                Err(Fault::Spoiled) => {}
                // The operation went on in a child that a signal handler forked: nothing happened.
                Ok(_) if self.generation != process::generation() => return Err(Fault::Forked),
                done => return done,
            }
        }
        Err(Fault::Spoiled)
    }

    /// Takes the mutex of a shard, repairs it if need be, and sees to it that all its cells are mapped.
    #[inline]
    fn lock(&self, shard: usize, patience: &mut Patience) -> Result<Locked<'_>, Fault> {
        if self.generation != process::generation() {
            return Err(Fault::Forked);
        }
        loop {
            let words = &self.top().shards[shard].0;
            let held = mutex::take(&words.mutex, &self.mapping, patience)
                .map_err(|unavailable| self.unavailable(unavailable, patience))?;
            let mut locked = Locked::new(self, shard, words, held);
            let state = &self.top().state.0;
            if state.life.load() != IN_USE {
                return Err(self.not_in_use());
            }
            // What others have adopted meanwhile, they have said to be there before.
            if state.chunks.load() != self.mapped.load(Ordering::Acquire) {
                drop(locked);
                self.chunks()?;
                continue;
            }
            if locked.needs_repair() {
                locked.repair()?;
            }
            locked.read_note();
            return Ok(locked);
        }
    }

    /// Gives the mutex back, and then wakes whom the operation frees.
    #[inline]
    fn give_back(&self, mut locked: Locked<'_>) {
        let (shard, calls) = (locked.index, std::mem::take(&mut locked.calls));
        drop(locked);
        calls.make(self, shard);
    }

    /// Only where this process has the mapping: in [`Table::lock`] and what comes after it.
    #[inline]
    fn top(&self) -> &Top {
        self.mapping.top()
    }

    /// `None` in a forked child, which does not have the mapping.
    #[inline]
    fn top_if_mapped(&self) -> Option<&Top> {
        (self.generation == process::generation()).then(|| self.top())
    }

    fn mapping(&self) -> &Mapping {
        &self.mapping
    }

    /// What messages call the file.
    pub fn name(&self) -> String {
        self.backing.shown()
    }

    /// Which file it is.
    pub fn file_id(&self) -> FileId {
        self.backing.id()
    }

    pub fn description(&self) -> &Description {
        &self.description
    }

    /// How many chunks have an owner; all of them are mapped then.
    fn chunks(&self) -> Result<u32, Fault> {
        let word = self.top().state.0.chunks.load();
        let chunks = checked::open32(word).ok_or_else(|| self.damaged("how many records it has"))?;
        let mapped = self.mapped.load(Ordering::Acquire);
        if mapped != word {
            self.backing.map(&self.mapping, chunks)?;
            for chunk in checked::open32(mapped).unwrap_or(0)..chunks {
                if let Some(owner) = self.said_owner_of(chunk) {
                    self.mapping.learn(chunk, owner);
                }
            }
            self.mapped.store(word, Ordering::Release);
        }
        Ok(chunks)
    }

    /// The shard that a chunk belongs to, if there is such a chunk and it was whole when it was mapped.
    #[inline]
    fn owner_of(&self, chunk: u32) -> Option<usize> {
        self.mapping.owner_of(chunk)
    }

    /// The shard that a chunk says it belongs to.
    fn said_owner_of(&self, chunk: u32) -> Option<usize> {
        let first = self.mapping.cell(chunk * CELLS);
        let said = checked::open64(first.words[0].load())?;
        let shard = (said & 0xff) as usize;
        (first.kind.load() == kind::CHUNK && said >> 8 == u64::from(chunk) && shard < SHARDS).then_some(shard)
    }

    /// Says to all who use the file that nothing may be granted in it any more: it was replaced.
    pub fn retire(&self) {
        if let Some(top) = self.top_if_mapped() {
            top.state.0.life.store(RETIRED);
            self.wake_everybody();
        }
    }

    /// Looks at everything, shard by shard.
    pub fn census(&self, patience: &mut Patience) -> Result<Census, Fault> {
        let mut census = Census::default();
        for shard in 0..SHARDS {
            let locked = self.lock(shard, patience)?;
            let found = locked.census();
            self.give_back(locked);
            census += found?;
        }
        if census.damaged > 0 {
            self.note_damage();
        }
        Ok(census)
    }

    #[cold]
    fn not_in_use(&self) -> Fault {
        if self.generation != process::generation() {
            return Fault::Forked;
        }
        match self.top().state.0.life.load() {
            RETIRED => Fault::Gone,
            _ => self.damaged("whether it is in use"),
        }
    }

    /// Has the file looked at as a whole when nobody uses it.
    fn note_damage(&self) {
        let damage = &self.top().state.0.damage;
        if damage.load() != DAMAGE_SEEN {
            damage.store(DAMAGE_SEEN);
        }
    }

    #[cold]
    fn damaged(&self, what: &str) -> Fault {
        self.note_damage();
        StoreError::rejected(format!(
            "{} was damaged: {what} cannot be read. Break what is listed as damaged, or end the programs that use it: \
             it is set aside when it is opened next",
            self.name()
        ))
        .into()
    }

    #[cold]
    fn unavailable(&self, unavailable: Unavailable, patience: &Patience) -> Fault {
        let waited = patience.limit().as_secs_f64();
        let message = match unavailable {
            Unavailable::Inside => {
                "store busy: this thread is in a signal handler that interrupted an operation on it".to_string()
            }
            Unavailable::NoRobustList => {
                "the embedded store needs a kernel with robust futexes (CONFIG_FUTEX): this one keeps no list of a \
                 thread's mutexes"
                    .to_string()
            }
            Unavailable::Busy { owner } => match thread::process_of(owner) {
                Some(process) => format!(
                    "store busy: process {process} has not given back a part of it within {waited:.1} s (is it stopped?)"
                ),
                None => format!("store busy: no turn within {waited:.1} s"),
            },
        };
        StoreError::unreachable(message).into()
    }
}
