//! Listing all records, a few slots at a time, so that other operations need not wait.

use super::Table;
use super::buffer::Buffer;
use super::checked::Link;
use super::fault::{Damaged, Fault};
use super::layout::{SHARDS, SLOTS};
use super::mutex::Patience;
use super::shard::{Locked, Step};

/// How much is copied in one turn, with the mutex of one shard held.
const SLOTS_A_TURN: usize = 64;
const BYTES_A_TURN: usize = 1 << 20;
/// A page is returned when it has this many records.
const RECORDS_A_PAGE: usize = 1000;
const ALL_SLOTS: usize = SHARDS * SLOTS;
/// How many bytes of a damaged record are shown.
const BODY_OF_DAMAGED: usize = 4096;

/// Where a listing continues.
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
    Damaged { what: Damaged, hash: Option<[u8; 20]>, body: std::ops::Range<usize> },
}

/// One entry of a listing.
#[derive(Debug, PartialEq, Eq)]
pub enum Listed<'p> {
    Record {
        hash: [u8; 20],
        key: &'p [u8],
        payload: &'p [u8],
    },
    /// A damaged record or link, which can be removed with [`Table::remove_damaged`]. Until then, operations on keys of
    /// the same slot that are not found fail with an error about the damage.
    Damaged {
        what: Damaged,
        /// The hash of its key, if that can be read.
        hash: Option<[u8; 20]>,
        /// As much of its key and payload as could be read.
        body: &'p [u8],
    },
}

impl Page {
    pub fn iter(&self) -> impl Iterator<Item = Listed<'_>> {
        self.items.iter().map(|item| match item {
            Item::Record { hash, key_len, payload, at } => Listed::Record {
                hash: *hash,
                key: &self.bytes[*at..at + key_len],
                payload: &self.bytes[at + payload.start..at + payload.end],
            },
            Item::Damaged { what, hash, body } => {
                Listed::Damaged { what: *what, hash: *hash, body: &self.bytes[body.clone()] }
            }
        })
    }

    fn has_room(&self) -> bool {
        self.items.len() < RECORDS_A_PAGE && self.bytes.len() < BYTES_A_TURN
    }

    fn clear(&mut self) {
        self.bytes.clear();
        self.items.clear();
    }
}

impl Cursor {
    pub fn to_bytes(self) -> [u8; 4] {
        (self.0 as u32).to_le_bytes()
    }

    pub fn from_bytes(bytes: [u8; 4]) -> Cursor {
        Cursor(u32::from_le_bytes(bytes) as usize)
    }
}

impl Table {
    /// Copies the next records into the page. Returns where to continue; `None` after the last.
    ///
    /// A record that changes during a listing is listed as it was or as it is. A record that does not change is listed
    /// once.
    pub fn list(&self, from: Cursor, page: &mut Page, patience: &mut Patience) -> Result<Option<Cursor>, Fault> {
        page.clear();
        // Reserved now, so that no memory is allocated while the mutex is held.
        page.bytes.reserve(BYTES_A_TURN);
        let mut scratch = Buffer::new();
        let mut at = self.next_used(from.0);
        while at < ALL_SLOTS && page.has_room() {
            at = self.next_used(self.copy_some(at, page, &mut scratch, patience)?);
        }
        Ok((at < ALL_SLOTS).then_some(Cursor(at)))
    }

    /// The first used slot from this one on. A slot that is just being used for the first time may be missed.
    fn next_used(&self, from: usize) -> usize {
        let Some(top) = self.file.top_if_mapped() else { return from };
        let nothing = Link::NONE.seal();
        let mut at = from;
        while at < ALL_SLOTS {
            let mut slots = top.slots[at / SLOTS][at % SLOTS..].iter();
            match slots.position(|slot| slot.first.load() != nothing) {
                Some(after) => return at + after,
                None => at = (at / SLOTS + 1) * SLOTS,
            }
        }
        ALL_SLOTS
    }

    /// Copies the records of some slots, in one turn. Returns where to continue.
    fn copy_some(
        &self,
        from: usize,
        page: &mut Page,
        scratch: &mut Buffer,
        patience: &mut Patience,
    ) -> Result<usize, Fault> {
        let (shard, mut slot) = (from / SLOTS, from % SLOTS);
        let locked = self.lock(shard, patience)?;
        for _ in 0..SLOTS_A_TURN {
            self.copy_slot(&locked, slot, page, scratch);
            slot += 1;
            if slot == SLOTS || page.bytes.len() >= BYTES_A_TURN {
                break;
            }
        }
        Ok(shard * SLOTS + slot)
    }

    fn copy_slot(&self, locked: &Locked<'_>, slot: usize, page: &mut Page, scratch: &mut Buffer) {
        let mut walk = locked.walk(slot);
        loop {
            page.items.push(match walk.step(locked) {
                Step::End => return,
                Step::Broken { link, .. } => {
                    self.file.note_damage();
                    page.items.push(Item::Damaged { what: locked.damaged_link(slot, link), hash: None, body: 0..0 });
                    return;
                }
                Step::Record(record) => {
                    let at = page.bytes.len();
                    match locked.append(&record, &mut page.bytes, scratch) {
                        Some(head) => Item::Record {
                            hash: head.hash,
                            key_len: head.body.key_len,
                            payload: head.body.payload(),
                            at,
                        },
                        None => {
                            self.file.note_damage();
                            let hash = record.head.map(|head| head.hash);
                            // The beginning of its contents, although their checksum is wrong.
                            if hash.is_some() {
                                let body = scratch.bytes();
                                page.bytes.extend_from_slice(&body[..body.len().min(BODY_OF_DAMAGED)]);
                            }
                            let what = locked.damaged_record(slot, record.link, record.cell, record.more());
                            Item::Damaged { what, hash, body: at..page.bytes.len() }
                        }
                    }
                }
            });
        }
    }

    /// Removes what was listed as damaged, if it has not changed. If a link is damaged, the records behind it are lost.
    pub fn remove_damaged(&self, damaged: Damaged, patience: &mut Patience) -> Result<bool, Fault> {
        if damaged.shard >= SHARDS || damaged.slot >= SLOTS {
            return Ok(false);
        }
        let mut locked = self.lock(damaged.shard, patience)?;
        let removed = locked.cut(&damaged);
        if matches!(removed, Ok(true)) {
            locked.call(damaged.slot);
        }
        removed
    }
}
