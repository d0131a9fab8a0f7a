//! What the next owner of a shard does if the last one died with the mutex.
//!
//! The chains are right (`shard.rs`): before the store of its link, a change has not happened; after it, it has. The
//! free cells, the adopted chunks, and the waiters to be woken may be wrong. They are derived again from the chains and
//! the chunks. So it does not matter how far the dead thread had come, or whether it died during a repair.

use super::buffer::Buffer;
use super::checked::{self, Link};
use super::fault::Fault;
use super::layout::{CELLS, SLOTS, kind};
use super::shard::{At, Locked, Step, cells_of};

impl Locked<'_> {
    /// Derives the free cells and all other derived data again.
    #[cold]
    pub fn repair(&mut self) -> Result<(), Fault> {
        let chunks = self.file.chunks()?;
        let mut marks = Marks(vec![0; chunks as usize]);
        let (mut whole, mut largest) = (true, 0);
        for slot in 0..SLOTS {
            whole &= self.mark_chain(slot, &mut marks, &mut largest);
        }
        let mut free = Link::NONE.seal();
        // If a chain is damaged, cells that belong to it seem to be free. They are kept as they are until the damage is
        // removed, so that a person can examine them.
        if whole {
            for number in (0..chunks).filter(|&chunk| self.file.owner_of(chunk) == Some(self.index)).flat_map(cells_of)
            {
                if !marks.has(number) {
                    free = self.make_free(Link(number).seal(), self.file.mapping.cell(number), free);
                }
            }
        }
        self.shard.free.store(free);
        self.shard.adopted.store(checked::seal32(chunks));
        self.shard.largest.store(checked::seal32(largest));
        self.add_all();
        self.repaired();
        Ok(())
    }

    /// Marks the cells that a slot leads to. Returns whether all of them are undamaged.
    fn mark_chain(&self, slot: usize, marks: &mut Marks, largest: &mut u32) -> bool {
        let mut walk = self.walk(slot);
        loop {
            match walk.step(self) {
                Step::End => return true,
                Step::Record(at) => match self.mark_record(&at, marks) {
                    Some(cells) => *largest = cells.max(*largest),
                    None => return false,
                },
                Step::Broken { .. } => return false,
            }
        }
    }

    /// Marks the cells of a record. Returns their number, if they are undamaged.
    fn mark_record(&self, at: &At<'_>, marks: &mut Marks) -> Option<u32> {
        let head = at.head?;
        if !marks.set(at.number) {
            return None;
        }
        let (mut link, cells) = (head.body.more, head.body.cells());
        for _ in 1..cells {
            let number = Link::open(link)?.0;
            let cell = self.cell(number)?;
            if cell.kind.load() != kind::FURTHER || !marks.set(number) {
                return None;
            }
            link = cell.next.load();
        }
        (link == Link::NONE.seal()).then_some(cells)
    }

    /// Checks and counts everything in the shard.
    pub fn census(&self) -> Result<Census, Fault> {
        let chunks = self.file.chunks()?;
        let mut marks = Marks(vec![0; chunks as usize]);
        let mut census = Census::default();
        let (mut buffer, mut scratch) = (Vec::new(), Buffer::new());
        for slot in 0..SLOTS {
            let mut walk = self.walk(slot);
            loop {
                match walk.step(self) {
                    Step::End => break,
                    Step::Record(at) => {
                        buffer.clear();
                        census.records += 1;
                        let whole = self.mark_record(&at, &mut marks).is_some()
                            && self.append(&at, &mut buffer, &mut scratch).is_some();
                        census.damaged += usize::from(!whole);
                    }
                    Step::Broken { .. } => {
                        census.damaged += 1;
                        break;
                    }
                }
            }
        }
        census.used = marks.count();
        let mut link = self.shard.free.load();
        while link != Link::NONE.seal() {
            let cell = Link::open(link).and_then(|Link(number)| Some((number, self.cell(number)?)));
            match cell {
                Some((number, cell)) if cell.kind.load() == kind::FREE && marks.set(number) => link = cell.next.load(),
                // A damaged list of free cells is noticed when it is used, and derived again.
                _ => break,
            }
        }
        census.free = marks.count() - census.used;
        let adopted = checked::open32(self.shard.adopted.load()).unwrap_or(0);
        let owned = (0..adopted).filter(|&chunk| self.file.owner_of(chunk) == Some(self.index)).flat_map(cells_of);
        census.leaked = owned.filter(|&number| !marks.has(number)).count();
        Ok(census)
    }
}

/// What was counted in a shard, or in all of them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Census {
    pub records: usize,
    /// Damaged records and links.
    pub damaged: usize,
    /// Cells that are used by records.
    pub used: usize,
    pub free: usize,
    /// Cells that are neither used nor free, in chunks that a shard has adopted.
    pub leaked: usize,
}

impl std::ops::AddAssign for Census {
    fn add_assign(&mut self, other: Census) {
        self.records += other.records;
        self.damaged += other.damaged;
        self.used += other.used;
        self.free += other.free;
        self.leaked += other.leaked;
    }
}

/// A bit for each cell.
struct Marks(Vec<u64>);

const _: () = assert!(CELLS == u64::BITS);

impl Marks {
    /// Returns whether it was not set before.
    fn set(&mut self, number: u32) -> bool {
        let (chunk, bit) = ((number / CELLS) as usize, 1 << (number % CELLS));
        match self.0.get_mut(chunk) {
            Some(bits) if *bits & bit == 0 => {
                *bits |= bit;
                true
            }
            _ => false,
        }
    }

    fn has(&self, number: u32) -> bool {
        self.0[(number / CELLS) as usize] & 1 << (number % CELLS) != 0
    }

    fn count(&self) -> usize {
        self.0.iter().map(|bits| bits.count_ones() as usize).sum()
    }
}
