//! The stored form of a record: the payload that a table keeps for a key.
//!
//! A row is a fixed part, then entries, then texts. Numbers are in this machine's byte order, because a table is used
//! on one machine, during one boot. What most rows would repeat (this boot, this host) is left out. The table verifies
//! the checksum of the bytes; here, only their structure is checked.

use std::ops::Range;

use super::table::Buffer;
use crate::key::Key;
use crate::protocol::{Entry, Holder, State, StoreTime};
use crate::record::{Identity, Lease, Owner, Record, wall_millis_at};
use crate::token::{HoldId, ObjectId, OwnerToken, Token};

const FORMAT: u8 = 3;

const PLAIN: u8 = 0;
const REENTRANT: u8 = 1;

/// Offsets in the fixed part.
mod field {
    use std::ops::Range;

    pub const FORMAT: usize = 0;
    pub const KIND: usize = 1;
    /// Lengths of the texts: app, then host and boot id (both empty when they are the store's own), then
    /// the owner token.
    pub const APP: usize = 2;
    pub const HOST: usize = 3;
    pub const BOOT_ID: usize = 4;
    pub const OWNER_TOKEN: usize = 5;
    pub const PID: Range<usize> = 8..12;
    /// Plain: the number of the attempt that was granted. Reentrant: how often it is locked.
    pub const ATTEMPT_OR_COUNT: Range<usize> = 12..16;
    pub const ENDS_AT: Range<usize> = 16..24;
    /// Plain holds only.
    pub const WRITE_SEQ: Range<usize> = 24..32;
    pub const FENCE: Range<usize> = 32..40;
    pub const ACQUIRED_AT: Range<usize> = 40..48;
    pub const HOLD: Range<usize> = 48..64;
    /// How many entries follow, before the texts. Four bytes of 0 follow this number.
    pub const ENTRIES: Range<usize> = 64..68;
    pub const END: usize = 72;
}

/// An entry: object, number of its write, count, and four bytes of 0.
const ENTRY_BYTES: usize = 24;

/// Longer texts are cut: they are for people to read.
const TEXT_MAX: usize = 255;

/// The host and boot id of the store, which its rows leave out.
#[derive(Clone, Copy)]
pub struct HostIdentity<'a> {
    pub host: &'a str,
    pub boot_id: &'a str,
}

/// A row whose structure was checked.
#[derive(Clone, Copy)]
pub struct Row<'a> {
    fixed: &'a [u8; field::END],
    /// The whole row.
    bytes: &'a [u8],
}

impl<'a> Row<'a> {
    /// Checks the structure of a row. `None`: it is damaged.
    #[inline]
    pub fn read(bytes: &'a [u8]) -> Option<Row<'a>> {
        let fixed = bytes.first_chunk()?;
        let row = Row { fixed, bytes };
        let whole = fixed[field::FORMAT] == FORMAT
            && (fixed[field::KIND] == PLAIN
                // The count is never 0: the last unlock deletes the record.
                || fixed[field::KIND] == REENTRANT && u32_in(fixed, field::ATTEMPT_OR_COUNT) > 0);
        (whole && row.length() == Some(bytes.len())).then_some(row)
    }

    pub fn fence(&self) -> u64 {
        u64_in(self.fixed, field::FENCE)
    }

    /// The token of a plain hold.
    #[inline]
    pub fn plain_token(&self) -> Option<Token> {
        (self.fixed[field::KIND] == PLAIN).then(|| Token { hold: self.hold(), attempt: self.attempt_or_count() })
    }

    #[inline]
    fn hold(&self) -> HoldId {
        HoldId(self.fixed[field::HOLD].try_into().expect("a hold has 16 bytes"))
    }

    #[inline]
    fn attempt_or_count(&self) -> u32 {
        u32_in(self.fixed, field::ATTEMPT_OR_COUNT)
    }

    /// The state, on which decisions are made.
    #[inline]
    pub fn state(&self) -> State {
        let holder = match self.plain_token() {
            Some(token) => Holder::Plain { token, write_seq: u64_in(self.fixed, field::WRITE_SEQ) },
            None => Holder::Reentrant {
                owner: OwnerToken(self.texts().0.into()),
                hold: Some(self.hold()),
                count: self.attempt_or_count(),
                entries: self.bytes[self.entries_range()].chunks_exact(ENTRY_BYTES).map(entry).collect(),
            },
        };
        State { holder, ends_at: StoreTime(u64_in(self.fixed, field::ENDS_AT)) }
    }

    pub fn record(&self, key: Key, host_identity: HostIdentity<'_>, now: StoreTime) -> Record {
        let state = self.state();
        let lease = Lease::at(state.ends_at, now);
        let (_, [app, host, boot_id]) = self.texts();
        let or_own = |text: &str, own: &str| if text.is_empty() { own } else { text }.to_string();
        let acquired_at = StoreTime(u64_in(self.fixed, field::ACQUIRED_AT));
        Record {
            key,
            damaged: None,
            lease,
            expires_at_ms: lease.wall_millis(),
            owner: Some(Owner {
                host: or_own(host, host_identity.host),
                pid: u32_in(self.fixed, field::PID),
                boot_id: or_own(boot_id, host_identity.boot_id),
                app: app.to_string(),
                acquired_at_ms: wall_millis_at(acquired_at, now),
            }),
            fence: Some(self.fence()),
            state,
        }
    }

    /// Writes the row with another state; the rest stays as it is.
    pub fn write_with_state<'b>(&self, state: &State, buffer: &'b mut Buffer) -> &'b [u8] {
        let start = self.entries_range().end;
        let identity: usize =
            [field::APP, field::HOST, field::BOOT_ID].iter().map(|&at| usize::from(self.fixed[at])).sum();
        let begin = |fixed: &mut [u8; field::END]| *fixed = *self.fixed;
        write(buffer, begin, state, [&self.bytes[start..start + identity], &[], &[]])
    }

    #[inline]
    fn entries_range(&self) -> Range<usize> {
        let entries = u32_in(self.fixed, field::ENTRIES) as usize;
        field::END..field::END.saturating_add(entries.saturating_mul(ENTRY_BYTES))
    }

    /// The length of the row by its own numbers. `None` if they overflow.
    #[inline]
    fn length(&self) -> Option<usize> {
        let lengths = [field::APP, field::HOST, field::BOOT_ID, field::OWNER_TOKEN];
        let texts = lengths.iter().map(|&at| usize::from(self.fixed[at])).sum();
        self.entries_range().end.checked_add(texts)
    }

    /// The owner token; app, host and boot id.
    fn texts(&self) -> (&'a str, [&'a str; 3]) {
        let mut at = self.entries_range().end;
        let mut next = |length: u8| {
            let text = &self.bytes[at..at + usize::from(length)];
            at += usize::from(length);
            std::str::from_utf8(text).unwrap_or_default()
        };
        let app = next(self.fixed[field::APP]);
        let host = next(self.fixed[field::HOST]);
        let boot_id = next(self.fixed[field::BOOT_ID]);
        (next(self.fixed[field::OWNER_TOKEN]), [app, host, boot_id])
    }
}

/// A new record, to be written as a row.
pub struct NewRow<'a> {
    pub state: &'a State,
    pub fence: u64,
    pub acquired_at: StoreTime,
    pub identity: &'a Identity,
    pub host_identity: HostIdentity<'a>,
}

impl NewRow<'_> {
    /// App, host and boot id in their stored form.
    #[inline]
    fn identity_texts(&self) -> [&str; 3] {
        fn unless_own<'a>(text: &'a str, own: &str) -> &'a str {
            if text == own { "" } else { cut(text) }
        }
        let Identity { app, host, boot_id, .. } = self.identity;
        [cut(app), unless_own(host, self.host_identity.host), unless_own(boot_id, self.host_identity.boot_id)]
    }

    #[inline]
    pub fn write<'b>(&self, buffer: &'b mut Buffer) -> &'b [u8] {
        let texts = self.identity_texts();
        let begin = |fixed: &mut [u8; field::END]| {
            fixed.fill(0);
            fixed[field::FORMAT] = FORMAT;
            for (text, length) in texts.iter().zip([field::APP, field::HOST, field::BOOT_ID]) {
                fixed[length] = text.len() as u8;
            }
            fixed[field::PID].copy_from_slice(&self.identity.pid.to_ne_bytes());
            fixed[field::FENCE].copy_from_slice(&self.fence.to_ne_bytes());
            fixed[field::ACQUIRED_AT].copy_from_slice(&self.acquired_at.0.to_ne_bytes());
        };
        write(buffer, begin, self.state, texts.map(str::as_bytes))
    }
}

/// Writes a row. `begin` writes the fields of the fixed part that are not in the state.
#[inline]
fn write<'b>(
    buffer: &'b mut Buffer,
    begin: impl FnOnce(&mut [u8; field::END]),
    state: &State,
    identity: [&[u8]; 3],
) -> &'b [u8] {
    let (owner_token, entries): (&str, &[Entry]) = match &state.holder {
        Holder::Reentrant { owner, entries, .. } => (&owner.0, entries),
        Holder::Plain { .. } | Holder::Foreign { .. } => ("", &[]),
    };
    let texts = [identity[0], identity[1], identity[2], owner_token.as_bytes()];
    let length = field::END + entries.len() * ENTRY_BYTES + texts.iter().map(|text| text.len()).sum::<usize>();
    let room = buffer.room(length);
    let (fixed, mut rest) = room.split_first_chunk_mut().expect("there is room for the fixed part");
    begin(fixed);
    fixed[field::ENDS_AT].copy_from_slice(&state.ends_at.0.to_ne_bytes());
    match &state.holder {
        Holder::Plain { token, write_seq } => {
            fixed[field::KIND] = PLAIN;
            fixed[field::WRITE_SEQ].copy_from_slice(&write_seq.to_ne_bytes());
            fixed[field::HOLD].copy_from_slice(&token.hold.0);
            fixed[field::ATTEMPT_OR_COUNT].copy_from_slice(&token.attempt.to_ne_bytes());
        }
        Holder::Reentrant { hold, count, .. } => {
            fixed[field::KIND] = REENTRANT;
            fixed[field::HOLD].copy_from_slice(&hold.unwrap_or(HoldId([0; 16])).0);
            fixed[field::ATTEMPT_OR_COUNT].copy_from_slice(&count.to_ne_bytes());
        }
        // Other libraries do not write to this store.
        Holder::Foreign { .. } => {}
    }
    fixed[field::OWNER_TOKEN] = owner_token.len() as u8;
    fixed[field::ENTRIES].copy_from_slice(&(entries.len() as u32).to_ne_bytes());
    for entry in entries {
        let (place, later) = rest.split_at_mut(ENTRY_BYTES);
        place[0..8].copy_from_slice(&entry.object.0.to_ne_bytes());
        place[8..16].copy_from_slice(&entry.write_seq.to_ne_bytes());
        place[16..20].copy_from_slice(&entry.count.to_ne_bytes());
        place[20..].fill(0);
        rest = later;
    }
    for text in texts {
        // Most are empty.
        if !text.is_empty() {
            let (place, later) = rest.split_at_mut(text.len());
            place.copy_from_slice(text);
            rest = later;
        }
    }
    room
}

fn entry(bytes: &[u8]) -> Entry {
    Entry { object: ObjectId(u64_in(bytes, 0..8)), write_seq: u64_in(bytes, 8..16), count: u32_in(bytes, 16..20) }
}

#[inline]
fn cut(text: &str) -> &str {
    let mut length = text.len().min(TEXT_MAX);
    while !text.is_char_boundary(length) {
        length -= 1;
    }
    &text[..length]
}

#[inline]
fn u32_in(bytes: &[u8], range: Range<usize>) -> u32 {
    u32::from_ne_bytes(bytes[range].try_into().expect("four bytes"))
}

#[inline]
fn u64_in(bytes: &[u8], range: Range<usize>) -> u64 {
    u64::from_ne_bytes(bytes[range].try_into().expect("eight bytes"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::Boottime;

    #[test]
    fn states_and_back() {
        let identity = Identity { host: "h".into(), pid: 1, boot_id: "other".into(), app: "a".into() };
        let host_identity = HostIdentity { host: "h", boot_id: "b" };
        let key = Key::new(b"key").unwrap();
        let now = Boottime::now();
        let plain = State {
            holder: Holder::Plain { token: Token { hold: HoldId([3; 16]), attempt: 2 }, write_seq: 9 },
            ends_at: StoreTime(77),
        };
        let entries = vec![
            Entry { object: ObjectId(1), count: 2, write_seq: 3 },
            Entry { object: ObjectId(u64::MAX), count: 1, write_seq: 1 },
        ];
        let reentrant = State {
            holder: Holder::Reentrant {
                owner: OwnerToken("owner".into()),
                hold: Some(HoldId([7; 16])),
                count: 3,
                entries,
            },
            ends_at: StoreTime(u64::MAX),
        };
        for (before, after) in [(&plain, &reentrant), (&reentrant, &plain), (&plain, &plain)] {
            let (mut bytes, mut changed) = (Buffer::new(), Buffer::new());
            // Old contents of the buffer must not end up in a row.
            bytes.room(9).fill(0xff);
            changed.room(500).fill(0xff);
            let row = NewRow { state: before, fence: 5, acquired_at: now.into(), identity: &identity, host_identity };
            row.write(&mut bytes);
            Row::read(bytes.bytes()).unwrap().write_with_state(after, &mut changed);
            for (bytes, state) in [(&bytes, before), (&changed, after)] {
                let row = Row::read(bytes.bytes()).unwrap();
                assert!(row.state() == *state);
                let record = row.record(key.clone(), host_identity, now.into());
                assert!(record.state == *state && record.key == key && record.fence == Some(5));
                let owner = record.owner.unwrap();
                assert_eq!((&*owner.host, owner.pid, &*owner.boot_id, &*owner.app), ("h", 1, "other", "a"));
            }
        }
    }

    #[test]
    fn a_reentrant_lock_that_is_not_locked_is_no_row() {
        let identity = Identity { host: "h".into(), pid: 1, boot_id: "b".into(), app: "a".into() };
        let host_identity = HostIdentity { host: "h", boot_id: "b" };
        let state = |count| State {
            holder: Holder::Reentrant {
                owner: OwnerToken("owner".into()),
                hold: Some(HoldId([7; 16])),
                count,
                entries: Vec::new(),
            },
            ends_at: StoreTime(1),
        };
        let written = |count| {
            let (state, mut bytes) = (state(count), Buffer::new());
            let acquired_at = Boottime::now().into();
            NewRow { state: &state, fence: 1, acquired_at, identity: &identity, host_identity }.write(&mut bytes);
            bytes
        };
        assert!(Row::read(written(0).bytes()).is_none(), "unlocking it would count down from 0");
        assert!(Row::read(written(1).bytes()).is_some());
    }
}
