//! Listing all records, a few slots at a time, so that nobody is held up.

use super::Table;
use super::checked::Link;
use super::fault::Fault;
use super::layout::{SHARDS, SLOTS};
use super::mutex::Patience;
use super::shard::{Locked, Step};

/// How much is copied in one turn, with the mutex of one shard held.
const SLOTS_A_TURN: usize = 64;
const BYTES_A_TURN: usize = 1 << 20;

/// Where a listing goes on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cursor(pub(super) usize);

/// Some of the records.
#[derive(Debug, Default)]
pub struct Page {
    bytes: Vec<u8>,
    items: Vec<Item>,
}

#[derive(Debug)]
enum Item {
    Record { hash: [u8; 20], key_len: usize, payload: std::ops::Range<usize>, at: usize },
    Damaged(Damaged),
}

/// One entry of a listing.
#[derive(Debug, PartialEq, Eq)]
pub enum Listed<'p> {
    Record {
        hash: [u8; 20],
        key: &'p [u8],
        payload: &'p [u8],
    },
    /// Something that is not whole, and can be removed with [`Table::remove_damaged`]. Until then, keys of the
    /// same slot that are not found answer that the store is damaged.
    Damaged(Damaged),
}

/// Where something is that is not whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Damaged {
    shard: usize,
    slot: usize,
    /// The link that leads there, as it stands.
    link: u32,
}

impl Page {
    pub fn iter(&self) -> impl Iterator<Item = Listed<'_>> {
        self.items.iter().map(|item| match item {
            Item::Record { hash, key_len, payload, at } => Listed::Record {
                hash: *hash,
                key: &self.bytes[*at..at + key_len],
                payload: &self.bytes[at + payload.start..at + payload.end],
            },
            Item::Damaged(damaged) => Listed::Damaged(*damaged),
        })
    }

    fn clear(&mut self) {
        self.bytes.clear();
        self.items.clear();
    }
}

impl Table {
    /// Copies the next records into the page. Answers where to go on: `None` after the last.
    ///
    /// What is changed while a listing goes on may be listed as it was or as it is. What is there all the time is
    /// listed once.
    pub fn list(&self, from: Cursor, page: &mut Page, patience: &mut Patience) -> Result<Option<Cursor>, Fault> {
        page.clear();
        // What is copied with the mutex held should find its space there.
        page.bytes.reserve(BYTES_A_TURN);
        let (shard, mut slot) = (from.0 / SLOTS, from.0 % SLOTS);
        if shard >= SHARDS {
            return Ok(None);
        }
        let mut scratch = Vec::new();
        let locked = self.lock(shard, patience)?;
        for _ in 0..SLOTS_A_TURN {
            self.copy_slot(&locked, slot, page, &mut scratch);
            slot += 1;
            if slot == SLOTS || page.bytes.len() >= BYTES_A_TURN {
                break;
            }
        }
        self.give_back(locked);
        let next = shard * SLOTS + slot;
        Ok((next < SHARDS * SLOTS).then_some(Cursor(next)))
    }

    fn copy_slot(&self, locked: &Locked<'_>, slot: usize, page: &mut Page, scratch: &mut Vec<u8>) {
        let damaged = |link| Item::Damaged(Damaged { shard: locked.index, slot, link });
        let mut walk = locked.walk(slot);
        loop {
            page.items.push(match walk.step(locked) {
                Step::End => return,
                Step::Broken { link, .. } => {
                    self.note_damage();
                    page.items.push(damaged(link));
                    return;
                }
                Step::Record(record) => {
                    let at = page.bytes.len();
                    match locked.append(&record, &mut page.bytes, scratch) {
                        Some(head) => {
                            Item::Record { hash: head.hash, key_len: head.key_len, payload: head.payload(), at }
                        }
                        None => {
                            self.note_damage();
                            damaged(Link(record.number).seal())
                        }
                    }
                }
            });
        }
    }

    /// Removes what was listed as damaged, if it still is. Where a link is damaged, what it led to is lost.
    pub fn remove_damaged(&self, damaged: Damaged, patience: &mut Patience) -> Result<bool, Fault> {
        let mut locked = self.lock(damaged.shard, patience)?;
        let removed = locked.cut(damaged.slot, damaged.link);
        if matches!(removed, Ok(true)) {
            locked.call(damaged.slot);
        }
        self.give_back(locked);
        removed
    }
}
