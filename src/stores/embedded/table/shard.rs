//! A shard whose mutex this thread holds: its cells, chains and fences.
//!
//! A change never touches what can be reached from a slot. It writes to free cells, then changes *one* link by one
//! store, then frees the cells that this made unreachable. So the chains are right at every moment, and everything else
//! (which cells are free, which chunks belong to the shard) can be derived from them: see `recovery.rs`.

use std::mem::ManuallyDrop;

use super::buffer::Buffer;
use super::checked::{self, Link, Sum};
use super::fault::{Damaged, Fault};
use super::file::TableFile;
use super::layout::{self, CELLS, Cell, MAX_KEY, MAX_PAYLOAD, Shard, Slot, USABLE_CELLS, WORDS, kind};
use super::mutex::Held;
use super::record::{self, Body, Head, KeyRef};
use super::wake::Wakeups;
use super::word::Word32;
use crate::store::StoreError;

/// A shard whose mutex this thread holds. On drop, the mutex is released, and then the waiters of the changed key are
/// woken.
pub struct Locked<'a> {
    pub file: &'a TableFile,
    pub index: usize,
    pub shard: &'a Shard,
    wakeups: Wakeups,
    held: ManuallyDrop<Held<'a>>,
}

impl Drop for Locked<'_> {
    #[inline]
    fn drop(&mut self) {
        // SAFETY: dropped here and nowhere else, and not used afterwards.
        unsafe { ManuallyDrop::drop(&mut self.held) };
        self.wakeups.send(self.file, self.index);
    }
}

/// The largest number of cells of a record.
const MOST_CELLS: u32 = layout::cells_for(MAX_PAYLOAD / 8 + MAX_KEY / 8);

/// One step along a chain.
pub enum Step<'a> {
    End,
    Record(At<'a>),
    /// The link does not lead to a record: it is damaged, leads elsewhere, or leads back.
    Broken {
        place: &'a Word32,
        link: u32,
    },
}

/// A record in its chain.
#[derive(Clone, Copy)]
pub struct At<'a> {
    /// The link that leads to it.
    pub place: &'a Word32,
    pub link: u32,
    pub number: u32,
    pub cell: &'a Cell,
    /// `None` if it is damaged.
    pub head: Option<Head>,
}

impl At<'_> {
    /// The sealed link to the second cell, if it can be read.
    pub fn more(&self) -> u32 {
        self.head.map_or(Link::NONE.seal(), |head| head.body.more)
    }
}

/// The record of a key.
#[derive(Clone, Copy)]
struct Found<'a> {
    place: &'a Word32,
    link: u32,
    cell: &'a Cell,
    body: Body,
}

/// A cell that was free.
struct Taken<'a> {
    link: u32,
    number: u32,
    cell: &'a Cell,
}

/// A walk along the chain of a slot. It ends even if the links are damaged.
pub struct Walk<'a> {
    slot: usize,
    place: &'a Word32,
    link: u32,
    /// Brent's algorithm: if the walk comes back to this cell, the chain is a loop.
    seen: u32,
    steps: u64,
}

impl<'a> Locked<'a> {
    #[inline]
    pub fn new(file: &'a TableFile, index: usize, shard: &'a Shard, held: Held<'a>) -> Locked<'a> {
        Locked { file, index, shard, wakeups: Wakeups::default(), held: ManuallyDrop::new(held) }
    }

    /// Notes the wake-ups that a dead process has not sent.
    #[inline]
    pub fn read_note(&mut self) {
        self.wakeups.read_note(self.shard);
    }

    /// Wakes all sleepers of the shard, after the mutex is released.
    pub fn add_all(&mut self) {
        self.wakeups.add_all(self.shard, &self.file.top().slots[self.index]);
    }

    /// Wakes the sleepers of a slot, after the mutex is released. Returns whether another opener waits there.
    #[inline]
    pub fn call(&mut self, slot: usize) -> bool {
        let word = &self.file.top().slots[self.index][slot].wake;
        self.wakeups.add(self.shard, slot, word, self.file.opener)
    }

    pub fn needs_repair(&self) -> bool {
        self.held.needs_repair
    }

    pub fn repaired(&mut self) {
        self.held.needs_repair = false;
    }

    /// Lets the next thread that takes the mutex repair the shard.
    pub fn leave_for_repair(&mut self) {
        self.held.abandon();
    }

    pub fn slot(&self, slot: usize) -> &'a Slot {
        &self.file.top().slots[self.index][slot]
    }

    /// A cell of this shard that can hold a record.
    #[inline]
    pub fn cell(&self, number: u32) -> Option<&'a Cell> {
        if number.is_multiple_of(CELLS) { None } else { self.file.mapping.cell_of(self.index, number) }
    }

    #[inline]
    pub fn walk(&self, slot: usize) -> Walk<'a> {
        let place = &self.slot(slot).first;
        Walk { slot, place, link: place.load(), seen: u32::MAX, steps: 0 }
    }

    /// The record of a key. An error if damage hides whether there is one.
    #[inline(always)]
    fn find(&self, key: &KeyRef<'_>, slot: usize) -> Result<Option<Found<'a>>, Fault> {
        let place = &self.slot(slot).first;
        let link = place.load();
        if link == Link::NONE.seal() {
            return Ok(None);
        }
        // Most chains have one record.
        if let Some(Link(number)) = Link::open(link)
            && let Some(cell) = self.cell(number)
            && let Some(head) = Head::read(cell, number)
            && head.is_of(key)
        {
            return Ok(Some(Found { place, link, cell, body: head.body }));
        }
        self.find_along(key, slot)
    }

    fn find_along(&self, key: &KeyRef<'_>, slot: usize) -> Result<Option<Found<'a>>, Fault> {
        let mut walk = self.walk(slot);
        let mut damaged = false;
        loop {
            match walk.step(self) {
                Step::Record(at) => match at.head {
                    Some(head) if head.is_of(key) => {
                        return Ok(Some(Found { place: at.place, link: at.link, cell: at.cell, body: head.body }));
                    }
                    Some(_) => {}
                    None => damaged = true,
                },
                Step::End if !damaged => return Ok(None),
                Step::End | Step::Broken { .. } => return Err(self.damage_in(slot)),
            }
        }
    }

    /// The damage that hides whether a key has a record: the first damage in the chain.
    #[cold]
    fn damage_in(&self, slot: usize) -> Fault {
        self.file.note_damage();
        let mut walk = self.walk(slot);
        loop {
            match walk.step(self) {
                Step::End => return Fault::Spoiled,
                Step::Broken { link, .. } => return Fault::Damaged(self.damaged_link(slot, link)),
                Step::Record(at) if at.head.is_none() => {
                    return Fault::Damaged(self.damaged_record(slot, at.link, at.cell, at.more()));
                }
                Step::Record(_) => {}
            }
        }
    }

    /// Identifies a damaged record as it is now. `more` is the sealed link to its second cell.
    #[cold]
    pub fn damaged_record(&self, slot: usize, link: u32, first: &Cell, mut more: u32) -> Damaged {
        let mut sum = Sum::new(u64::from(link));
        let mut add = |cell: &Cell| sum.add_all(&std::array::from_fn::<_, WORDS, _>(|at| cell.words[at].load()));
        add(first);
        // The checksum is of all cells that can be reached.
        let mut cells = 0;
        while let Some(cell) = Link::open(more).and_then(|Link(number)| self.cell(number))
            && cells < MOST_CELLS
        {
            add(cell);
            (more, cells) = (cell.next.load(), cells + 1);
        }
        Damaged { shard: self.index, slot, link, contents: sum.finish() }
    }

    /// Identifies a damaged link.
    pub fn damaged_link(&self, slot: usize, link: u32) -> Damaged {
        Damaged { shard: self.index, slot, link, contents: 0 }
    }

    /// Copies the body of a record, if its checksum is right.
    #[inline]
    fn copy(&self, first: &'a Cell, body: &Body, into: &mut Buffer) -> Option<()> {
        record::copy(first, body, into, |number| self.cell(number))
    }

    /// Copies a record to the end of a buffer. Returns its head, if all of it is undamaged.
    pub fn append(&self, at: &At<'a>, buffer: &mut Vec<u8>, scratch: &mut Buffer) -> Option<Head> {
        let head = at.head?;
        self.copy(at.cell, &head.body, scratch)?;
        buffer.extend_from_slice(scratch.bytes());
        Some(head)
    }

    /// Writes a record into free cells, with `next` as the next one; no link leads to it yet. It will replace a record
    /// with `replaced` cells.
    ///
    /// A lease must be renewable although the disk is full. So a change that makes a record larger leaves enough free
    /// cells to replace any record of the shard by one of the same size.
    #[inline(always)]
    fn write(&mut self, key: &KeyRef<'_>, payload: &[u8], next: u32, replaced: u32) -> Result<u32, Fault> {
        if payload.len() > MAX_PAYLOAD || key.bytes.len() > MAX_KEY {
            return Err(too_long(key, payload));
        }
        if !Link::is_whole(next) {
            return Err(self.damaged("what follows the record"));
        }
        let cells = layout::cells_for(record::body_words(key.bytes.len(), payload.len()));
        let spare = if cells <= replaced {
            0
        } else {
            let largest = checked::open32(self.shard.largest.load());
            let largest = largest.filter(|&cells| cells <= MOST_CELLS).ok_or(Fault::Spoiled)?;
            if cells > largest {
                self.need_free(cells + cells)?;
                self.shard.largest.store(checked::seal32(cells));
            }
            largest.max(cells)
        };
        let first = match self.take_free(cells - 1 + spare)? {
            Some(first) => first,
            None => {
                self.need_free(cells + spare)?;
                self.take_free(0)?.ok_or(Fault::Spoiled)?
            }
        };
        let (more, sum) = record::write(first.cell, key.bytes, payload, || {
            let further = self.take_free(0)?.ok_or(Fault::Spoiled)?;
            Ok::<_, Fault>((further.cell, further.link))
        })?;
        let body = Body { more, key_len: key.bytes.len(), payload_len: payload.len(), sum };
        let head = Head { body, hash: key.hash };
        head.write(first.cell, first.number);
        first.cell.next.store(next);
        Ok(first.link)
    }

    /// Takes a free cell, unless fewer than `more` would be left free.
    #[inline(always)]
    fn take_free(&self, more: u32) -> Result<Option<Taken<'a>>, Fault> {
        let link = self.shard.free.load();
        let number = match Link::open(link) {
            Some(Link::NONE) => return Ok(None),
            Some(Link(number)) => number,
            None => return Err(Fault::Spoiled),
        };
        let cell = self.cell(number).ok_or(Fault::Spoiled)?;
        let next = cell.next.load();
        // A cell that is in use must not be taken, even if the list is damaged.
        if cell.kind.load() != kind::FREE {
            return Err(Fault::Spoiled);
        }
        match Link::open(next) {
            None => return Err(Fault::Spoiled),
            Some(Link::NONE) if more > 0 => return Ok(None),
            Some(_) if more > 1 && !self.has_free(next, more)? => return Ok(None),
            Some(_) => {}
        }
        self.shard.free.store(next);
        Ok(Some(Taken { link, number, cell }))
    }

    /// Makes sure that this many cells are free, before one is taken.
    #[cold]
    fn need_free(&mut self, cells: u32) -> Result<(), Fault> {
        if !self.has_free(self.shard.free.load(), cells)? {
            self.adopt()?;
            if !self.has_free(self.shard.free.load(), cells)? {
                return Err(Fault::Full(cells));
            }
        }
        Ok(())
    }

    /// Whether the list from this link on has this many cells.
    fn has_free(&self, mut link: u32, cells: u32) -> Result<bool, Fault> {
        for left in (0..cells).rev() {
            match Link::open(link) {
                Some(Link::NONE) => return Ok(false),
                // The last cell is checked when it is taken.
                Some(_) if left == 0 => {}
                Some(Link(number)) => link = self.cell(number).ok_or(Fault::Spoiled)?.next.load(),
                None => return Err(Fault::Spoiled),
            }
        }
        Ok(true)
    }

    /// Adopts the chunks that this shard was given since the last call.
    fn adopt(&self) -> Result<(), Fault> {
        let from = checked::open32(self.shard.adopted.load()).ok_or(Fault::Spoiled)?;
        let to = self.file.chunks()?;
        for chunk in (from..to).filter(|&chunk| self.file.owner_of(chunk) == Some(self.index)) {
            let mut free = self.shard.free.load();
            for number in cells_of(chunk) {
                free = self.make_free(Link(number).seal(), self.file.mapping.cell(number), free);
            }
            self.shard.free.store(free);
        }
        if from != to {
            self.shard.adopted.store(checked::seal32(to));
        }
        Ok(())
    }

    /// Puts a cell before a list of free cells. Returns the link to the new list.
    #[inline]
    pub fn make_free(&self, link: u32, cell: &Cell, free: u32) -> u32 {
        cell.kind.store(kind::FREE);
        cell.next.store(free);
        link
    }

    /// Frees the cells of a record to which no link leads any more.
    #[inline]
    fn free(&mut self, record: &Found<'a>) {
        let mut link = record.body.more;
        self.shard.free.store(self.make_free(record.link, record.cell, self.shard.free.load()));
        for _ in 1..record.body.cells() {
            let further = Link::open(link).and_then(|Link(number)| self.cell(number));
            let Some(cell) = further.filter(|cell| cell.kind.load() == kind::FURTHER) else {
                return self.leave_for_repair();
            };
            let freed = link;
            link = cell.next.load();
            self.shard.free.store(self.make_free(freed, cell, self.shard.free.load()));
        }
        if link != Link::NONE.seal() {
            // It led to more cells than it should have: a repair finds the free ones.
            self.leave_for_repair();
        }
    }

    /// Puts a new record at the beginning of its slot's chain.
    #[inline(always)]
    fn insert(&mut self, key: &KeyRef<'_>, slot: usize, payload: &[u8]) -> Result<(), Fault> {
        let place = &self.slot(slot).first;
        let link = self.write(key, payload, place.load(), 0)?;
        place.store(link);
        Ok(())
    }

    /// Replaces a record.
    fn replace(&mut self, key: &KeyRef<'_>, old: &Found<'a>, payload: &[u8]) -> Result<(), Fault> {
        let link = self.write(key, payload, old.cell.next.load(), old.body.cells())?;
        old.place.store(link);
        self.free(old);
        Ok(())
    }

    /// Removes a record from its chain.
    #[inline]
    fn unlink(&mut self, record: &Found<'a>) -> Result<(), Fault> {
        let next = record.cell.next.load();
        if !Link::is_whole(next) {
            return Err(self.damaged("what follows the record"));
        }
        record.place.store(next);
        self.free(record);
        Ok(())
    }

    /// Removes a damaged record, or a damaged link, from its chain, if it has not changed since it was listed.
    pub fn cut(&mut self, damaged: &Damaged) -> Result<bool, Fault> {
        let slot = damaged.slot;
        let mut walk = self.walk(slot);
        let mut scratch = Buffer::new();
        let (place, next) = loop {
            match walk.step(self) {
                Step::End => return Ok(false),
                Step::Broken { place, link } if self.damaged_link(slot, link) == *damaged => {
                    break (place, Link::NONE.seal());
                }
                Step::Broken { .. } => return Ok(false),
                Step::Record(at) if at.link == damaged.link => {
                    let whole = at.head.and_then(|head| self.copy(at.cell, &head.body, &mut scratch)).is_some();
                    if whole || self.damaged_record(slot, at.link, at.cell, at.more()) != *damaged {
                        return Ok(false);
                    }
                    break (at.place, at.cell.next.load());
                }
                Step::Record(_) => {}
            }
        };
        place.store(next);
        // A repair finds the cells that became unreachable.
        self.leave_for_repair();
        Ok(true)
    }

    #[cold]
    pub fn damaged(&self, what: &str) -> Fault {
        self.file.damaged(what)
    }
}

#[cold]
fn too_long(key: &KeyRef<'_>, payload: &[u8]) -> Fault {
    StoreError::rejected(format!(
        "a record must have at most {MAX_PAYLOAD} bytes, and its key {MAX_KEY} (got {} and {})",
        payload.len(),
        key.bytes.len()
    ))
    .into()
}

/// The cells of a chunk that can hold records.
pub fn cells_of(chunk: u32) -> std::ops::Range<u32> {
    let first = chunk * CELLS;
    first + 1..first + 1 + USABLE_CELLS
}

impl<'a> Walk<'a> {
    #[inline]
    pub fn step(&mut self, locked: &Locked<'a>) -> Step<'a> {
        let (place, link) = (self.place, self.link);
        if link == Link::NONE.seal() {
            return Step::End;
        }
        let number = match Link::open(link) {
            Some(Link(number)) if number != self.seen => number,
            _ => return Step::Broken { place, link },
        };
        let Some(cell) = locked.cell(number).filter(|cell| cell.kind.load() == kind::RECORD) else {
            return Step::Broken { place, link };
        };
        self.steps += 1;
        if self.steps.is_power_of_two() {
            self.seen = number;
        }
        let head = Head::read(cell, number);
        let here = head.filter(|head| layout::slot_of(&head.hash) == (locked.index, self.slot));
        (self.place, self.link) = (&cell.next, cell.next.load());
        Step::Record(At { place, link, number, cell, head: here })
    }
}

/// The entry of one key, while this thread holds the mutex of its shard.
pub struct Entry<'e, 'a, 'k> {
    locked: &'e mut Locked<'a>,
    key: &'e KeyRef<'k>,
    slot: usize,
    /// What the last search found. All changes of the shard are made through this entry, so it stays valid.
    found: Option<Option<Found<'a>>>,
}

impl<'e, 'a, 'k> Entry<'e, 'a, 'k> {
    #[inline]
    pub fn new(locked: &'e mut Locked<'a>, key: &'e KeyRef<'k>, slot: usize) -> Self {
        Entry { locked, key, slot, found: None }
    }

    /// Searches for the record, if that was not done yet.
    #[inline(always)]
    fn look(&mut self) -> Result<(), Fault> {
        if self.found.is_none() {
            self.found = Some(self.locked.find(self.key, self.slot)?);
        }
        Ok(())
    }

    /// What a search has found. A change makes another search necessary.
    #[inline(always)]
    fn take_found(&mut self) -> Result<Option<Found<'a>>, Fault> {
        match self.found.take() {
            Some(found) => Ok(found),
            None => self.locked.find_along(self.key, self.slot),
        }
    }

    /// The payload of the key, copied into the buffer and checked.
    #[inline(always)]
    pub fn get<'b>(&mut self, buffer: &'b mut Buffer) -> Result<Option<&'b [u8]>, Fault> {
        self.look()?;
        let Some(Some(Found { link, cell, body, .. })) = self.found else { return Ok(None) };
        if self.locked.copy(cell, &body, buffer).is_none() {
            self.locked.file.note_damage();
            return Err(Fault::Damaged(self.locked.damaged_record(self.slot, link, cell, body.more)));
        }
        let copy = buffer.bytes();
        if copy[..body.key_len] != *self.key.bytes {
            return Err(StoreError::rejected("another key with the same SHA-1 is stored: rename one of the two").into());
        }
        Ok(Some(&copy[body.payload()]))
    }

    /// Stores a payload, in place of the present one if there is any.
    ///
    /// Return [`Fault::Full`] to the caller: the operation is then started again.
    #[inline(always)]
    pub fn put(&mut self, payload: &[u8]) -> Result<(), Fault> {
        match self.take_found()? {
            None => self.locked.insert(self.key, self.slot, payload),
            Some(old) => self.locked.replace(self.key, &old, payload),
        }
    }

    /// Removes the record, if there is one. It may be damaged.
    #[inline(always)]
    pub fn delete(&mut self) -> Result<bool, Fault> {
        let Some(record) = self.take_found()? else { return Ok(false) };
        self.locked.unlink(&record).map(|()| true)
    }

    /// A number above every one that was returned for this key before.
    ///
    /// Return [`Fault::FencesSpent`] to the caller: the operation is then started again.
    #[inline]
    pub fn next_fence(&mut self) -> Result<u64, Fault> {
        let shard = self.locked.shard;
        match (checked::open64(shard.next.load()), checked::open64(shard.end.load())) {
            (Some(next), Some(end)) if next < end => {
                // Stored before the record: if the process is killed in between, the number is skipped, and not given
                // out twice.
                shard.next.store(checked::seal64(next + 1));
                Ok(next)
            }
            _ => Err(Fault::FencesSpent),
        }
    }

    /// Wakes all waiters for this key, after the mutex is released. Returns whether another opener of the file waits
    /// for it (or for another key of its slot).
    #[inline]
    pub fn wake(&mut self) -> bool {
        self.locked.call(self.slot)
    }
}
