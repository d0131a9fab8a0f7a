//! An open file, and what its shards share: the mapping, its checks, and its name in messages.

use std::sync::atomic::{AtomicU32, Ordering};

use super::backing::Backing;
use super::checked;
use super::fault::Fault;
use super::header::Description;
use super::layout::{CELLS, DAMAGE_SEEN, RETIRED, SHARDS, Top, kind};
use super::mapping::Mapping;
use crate::store::StoreError;
use crate::sys::descriptor::Identity;
use crate::sys::process;

pub struct TableFile {
    pub(super) mapping: Mapping,
    pub(super) backing: Backing,
    description: Description,
    generation: u64,
    /// The value of the word with the number of chunks, when they were last mapped.
    mapped: AtomicU32,
    /// Distinguishes the waiters of this opener from those of others; see `wake.rs`.
    pub(super) opener: u32,
}

impl TableFile {
    pub(super) fn new(mapping: Mapping, backing: Backing, description: Description) -> TableFile {
        let opener = mapping.top().state.0.openers.fetch_add(1);
        let generation = process::generation();
        TableFile { mapping, backing, description, generation, mapped: AtomicU32::new(0), opener }
    }

    /// Whether this process opened it, and not the one that it was forked from.
    #[inline]
    pub fn is_of_this_process(&self) -> bool {
        self.is_of_generation(process::generation())
    }

    #[inline]
    pub(super) fn is_of_generation(&self, generation: u64) -> bool {
        self.generation == generation
    }

    /// Only if this process has the mapping.
    #[inline]
    pub(super) fn top(&self) -> &Top {
        self.mapping.top()
    }

    /// `None` in a forked child, which does not have the mapping.
    #[inline]
    pub(super) fn top_if_mapped(&self) -> Option<&Top> {
        self.is_of_this_process().then(|| self.top())
    }

    /// The path of the file, for messages.
    pub fn shown(&self) -> String {
        self.backing.shown()
    }

    pub fn name(&self) -> &str {
        self.backing.name()
    }

    pub fn identity(&self) -> Identity {
        self.backing.identity()
    }

    /// Whether its descriptor is still ours: the program may have closed it.
    pub fn is_open(&self) -> bool {
        self.backing.is_open()
    }

    /// Whether the file has a name left, as far as its descriptor can tell.
    pub fn has_a_name(&self) -> bool {
        self.backing.has_a_name()
    }

    pub fn description(&self) -> &Description {
        &self.description
    }

    /// The word with the number of mapped chunks, to be compared with [`TableFile::said_chunks`].
    #[inline]
    pub(super) fn mapped(&self) -> u32 {
        self.mapped.load(Ordering::Acquire)
    }

    #[inline]
    pub(super) fn said_chunks(&self) -> u32 {
        self.top().state.0.chunks.load()
    }

    /// The number of chunks with an owner. All of them are mapped after this.
    pub(super) fn chunks(&self) -> Result<u32, Fault> {
        let word = self.said_chunks();
        let chunks = checked::open32(word).ok_or_else(|| self.damaged("its number of records"))?;
        let mapped = self.mapped();
        if mapped != word {
            if !self.backing.has(chunks)? {
                return Err(self.damaged("its length, which is larger than the file,"));
            }
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

    /// The shard that a chunk belongs to, if the chunk exists and was undamaged when it was mapped.
    #[inline]
    pub(super) fn owner_of(&self, chunk: u32) -> Option<usize> {
        self.mapping.owner_of(chunk)
    }

    /// The shard that a chunk belongs to, as its first cell says.
    fn said_owner_of(&self, chunk: u32) -> Option<usize> {
        let first = self.mapping.cell(chunk * CELLS);
        let said = checked::open64(first.words[0].load())?;
        let shard = (said & 0xff) as usize;
        (first.kind.load() == kind::CHUNK && said >> 8 == u64::from(chunk) && shard < SHARDS).then_some(shard)
    }

    /// The fault of an operation in a file whose state is not "in use".
    #[cold]
    pub(super) fn not_in_use(&self) -> Fault {
        if !self.is_of_this_process() {
            return Fault::Forked;
        }
        match self.top().state.0.life.load() {
            RETIRED => Fault::Gone,
            _ => self.damaged("whether it is in use"),
        }
    }

    /// Notes damage, so that the whole file is checked when it is next opened while no process uses it.
    pub(super) fn note_damage(&self) {
        let damage = &self.top().state.0.damage;
        if damage.load() != DAMAGE_SEEN {
            damage.store(DAMAGE_SEEN);
        }
    }

    #[cold]
    pub(super) fn damaged(&self, what: &str) -> Fault {
        self.note_damage();
        StoreError::rejected(format!(
            "{} is damaged: {what} cannot be read. Break the locks that nblock list shows as damaged, or end all \
             programs that use the store: it is set aside when it is opened next",
            self.shown()
        ))
        .into()
    }
}
