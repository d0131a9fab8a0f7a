//! The form in which a record is stored.
//!
//! A row is a fixed part, then entries, then texts. Numbers are in this machine's byte order: a data file lives
//! on one machine, during one boot. What every row would repeat (this boot, usually this host) is left out.

use std::ops::Range;
use std::time::Duration;

use sha1::{Digest, Sha1};

use crate::clock::{self, Boottime};
use crate::key::{Key, KeyHash};
use crate::protocol::{Entry, Holder, State, StoreTime};
use crate::record::{Identity, Lease, Owner, Record};
use crate::store::StoreError;
use crate::token::{HoldId, ObjectId, OwnerToken, Token};

const FORMAT: u8 = 2;

const PLAIN: u8 = 0;
const REENTRANT: u8 = 1;

/// The fixed part, field by field.
mod field {
    use std::ops::Range;

    /// Of all that follows.
    pub const CHECK: Range<usize> = 0..4;
    pub const FORMAT: usize = 4;
    pub const KIND: usize = 5;
    /// Lengths of the texts: app, then host and boot id (both empty when they are the store's own), then
    /// the owner token. The key is the rest.
    pub const APP: usize = 6;
    pub const HOST: usize = 7;
    pub const BOOT_ID: usize = 8;
    pub const OWNER_TOKEN: usize = 9;
    pub const PID: Range<usize> = 12..16;
    pub const ENDS_AT: Range<usize> = 16..24;
    /// Of a plain hold.
    pub const WRITE_SEQ: Range<usize> = 24..32;
    pub const FENCE: Range<usize> = 32..40;
    pub const ACQUIRED_AT: Range<usize> = 40..48;
    pub const HOLD: Range<usize> = 48..64;
    /// Plain: the attempt of the hold. Reentrant: how often it is locked.
    pub const ATTEMPT_OR_COUNT: Range<usize> = 64..68;
    /// How many entries follow, before the texts.
    pub const ENTRIES: Range<usize> = 68..72;
    pub const END: usize = 72;
}

/// An entry: object, number of its write, count, and four bytes that are 0.
const ENTRY_BYTES: usize = 24;

/// Texts longer than this are cut: they are for people to read.
const TEXT_MAX: usize = 255;

/// A row longer than this is not searched for its key.
const SEARCHED_MAX: usize = 4096;

/// What the store knows of itself, and rows therefore leave out.
#[derive(Clone, Copy)]
pub struct Home<'a> {
    pub host: &'a str,
    pub boot_id: &'a str,
}

/// A row that was found whole.
#[derive(Clone, Copy)]
pub struct Row<'a> {
    bytes: &'a [u8],
}

impl<'a> Row<'a> {
    /// Looks whether the bytes are a row. `None`: they are damaged.
    #[inline]
    pub fn read(bytes: &'a [u8]) -> Option<Row<'a>> {
        let row = Row { bytes };
        let whole = bytes.len() > field::END
            && bytes[field::FORMAT] == FORMAT
            && (bytes[field::KIND] == PLAIN
                // A count of 0 is no record at all: the last unlock deletes it.
                || bytes[field::KIND] == REENTRANT && u32_in(bytes, field::ATTEMPT_OR_COUNT) > 0)
            && row.key_range().is_some()
            && u32_in(bytes, field::CHECK) == checksum(bytes);
        whole.then_some(row)
    }

    /// The row of a key. `None`: it is damaged, or another key's.
    #[inline]
    pub fn of_key(bytes: &'a [u8], key: &Key) -> Option<Row<'a>> {
        let row = Row::read(bytes)?;
        let is_its = row.key_range().is_some_and(|range| bytes[range] == *key.as_str().as_bytes());
        (is_its && !key.is_placeholder()).then_some(row)
    }

    pub fn fence(&self) -> u64 {
        u64_in(self.bytes, field::FENCE)
    }

    /// What decisions are made on.
    #[inline]
    pub fn state(&self) -> State {
        let hold = HoldId(self.bytes[field::HOLD].try_into().expect("a hold has 16 bytes"));
        let number = u32_in(self.bytes, field::ATTEMPT_OR_COUNT);
        let holder = match self.bytes[field::KIND] {
            PLAIN => Holder::Plain {
                token: Token { hold, attempt: number },
                write_seq: u64_in(self.bytes, field::WRITE_SEQ),
            },
            _ => Holder::Reentrant {
                owner: OwnerToken(self.texts().0.into()),
                hold: Some(hold),
                count: number,
                entries: self.bytes[self.entries_range()].chunks_exact(ENTRY_BYTES).map(entry).collect(),
            },
        };
        State { holder, ends_at: StoreTime(u64_in(self.bytes, field::ENDS_AT)) }
    }

    pub fn record(&self, hash: KeyHash, home: Home<'_>, now: StoreTime) -> Result<Record, StoreError> {
        let key = self.key_range().and_then(|range| Key::new(&self.bytes[range]).ok());
        // A row under another key's hash would be another key's record.
        let key = key.filter(|key| key.hash() == hash).ok_or_else(|| damaged(hash))?;
        let state = self.state();
        let lease = Lease::at(state.ends_at, now);
        let (_, [app, host, boot_id]) = self.texts();
        let or_home = |text: &str, home: &str| if text.is_empty() { home } else { text }.to_string();
        let acquired_at = StoreTime(u64_in(self.bytes, field::ACQUIRED_AT));
        Ok(Record {
            key,
            damaged: None,
            lease,
            expires_at_ms: lease.wall_millis(),
            owner: Some(Owner {
                host: or_home(host, home.host),
                pid: u32_in(self.bytes, field::PID),
                boot_id: or_home(boot_id, home.boot_id),
                app: app.to_string(),
                acquired_at_ms: clock::wall_millis().saturating_sub(now.since(acquired_at).as_millis() as u64),
            }),
            fence: Some(self.fence()),
            state,
        })
    }

    /// The row in another state; the rest stays as it is.
    pub fn with_state(&self, state: &State) -> Vec<u8> {
        let start = self.entries_range().end;
        let identity: usize =
            [field::APP, field::HOST, field::BOOT_ID].iter().map(|&at| usize::from(self.bytes[at])).sum();
        let key = self.key_range().unwrap_or(self.bytes.len()..self.bytes.len());
        let mut room = vec![0; field::END + state_len(state) + identity + key.len()];
        room[..field::END].copy_from_slice(&self.bytes[..field::END]);
        write_state(&mut room, state, [&self.bytes[start..start + identity], &[], &[]], &self.bytes[key]);
        room
    }

    fn entries_range(&self) -> Range<usize> {
        let entries = u32_in(self.bytes, field::ENTRIES) as usize;
        field::END..field::END.saturating_add(entries.saturating_mul(ENTRY_BYTES))
    }

    /// `None` when the lengths are not those of a row.
    #[inline]
    fn key_range(&self) -> Option<Range<usize>> {
        let lengths = [field::APP, field::HOST, field::BOOT_ID, field::OWNER_TOKEN];
        let texts = lengths.iter().map(|&at| usize::from(self.bytes[at])).sum();
        let start = self.entries_range().end.checked_add(texts)?;
        (start < self.bytes.len()).then_some(start..self.bytes.len())
    }

    /// The owner token; app, host and boot id.
    fn texts(&self) -> (&'a str, [&'a str; 3]) {
        let mut at = self.entries_range().end;
        let mut next = |length: u8| {
            let text = &self.bytes[at..at + usize::from(length)];
            at += usize::from(length);
            std::str::from_utf8(text).unwrap_or_default()
        };
        let app = next(self.bytes[field::APP]);
        let host = next(self.bytes[field::HOST]);
        let boot_id = next(self.bytes[field::BOOT_ID]);
        (next(self.bytes[field::OWNER_TOKEN]), [app, host, boot_id])
    }
}

/// The row of a new record, to be written.
pub struct NewRow<'a> {
    pub key: &'a Key,
    pub state: &'a State,
    pub fence: u64,
    pub acquired_at: Boottime,
    pub identity: &'a Identity,
    pub home: Home<'a>,
}

impl NewRow<'_> {
    /// App, host and boot id as they are stored.
    #[inline]
    fn identity_texts(&self) -> [&str; 3] {
        fn unless_home<'a>(text: &'a str, home: &str) -> &'a str {
            if text == home { "" } else { cut(text) }
        }
        let Identity { app, host, boot_id, .. } = self.identity;
        [cut(app), unless_home(host, self.home.host), unless_home(boot_id, self.home.boot_id)]
    }

    #[inline]
    pub fn encoded_len(&self) -> usize {
        let texts: usize = self.identity_texts().iter().map(|text| text.len()).sum();
        field::END + state_len(self.state) + texts + self.key.as_str().len()
    }

    /// Writes it into as many bytes as `encoded_len` says.
    #[inline]
    pub fn write(&self, room: &mut [u8]) {
        let texts = self.identity_texts();
        room[..field::END].fill(0);
        room[field::FORMAT] = FORMAT;
        for (text, length) in texts.iter().zip([field::APP, field::HOST, field::BOOT_ID]) {
            room[length] = text.len() as u8;
        }
        room[field::PID].copy_from_slice(&self.identity.pid.to_ne_bytes());
        room[field::FENCE].copy_from_slice(&self.fence.to_ne_bytes());
        room[field::ACQUIRED_AT].copy_from_slice(&self.acquired_at.as_nanos().to_ne_bytes());
        write_state(room, self.state, texts.map(str::as_bytes), self.key.as_str().as_bytes());
    }
}

/// How long what a state adds to the fixed part is.
#[inline]
fn state_len(state: &State) -> usize {
    match &state.holder {
        Holder::Reentrant { owner, entries, .. } => entries.len() * ENTRY_BYTES + owner.0.len(),
        Holder::Plain { .. } | Holder::Foreign { .. } => 0,
    }
}

/// Writes a row's state, texts and key: what is not of the state stands in the fixed part already.
#[inline]
fn write_state(room: &mut [u8], state: &State, identity: [&[u8]; 3], key: &[u8]) {
    room[field::ENDS_AT].copy_from_slice(&state.ends_at.0.to_ne_bytes());
    let (mut owner_token, mut entries): (&str, &[Entry]) = ("", &[]);
    match &state.holder {
        Holder::Plain { token, write_seq } => {
            room[field::KIND] = PLAIN;
            room[field::WRITE_SEQ].copy_from_slice(&write_seq.to_ne_bytes());
            room[field::HOLD].copy_from_slice(&token.hold.0);
            room[field::ATTEMPT_OR_COUNT].copy_from_slice(&token.attempt.to_ne_bytes());
        }
        Holder::Reentrant { owner, hold, count, entries: present } => {
            room[field::KIND] = REENTRANT;
            room[field::HOLD].copy_from_slice(&hold.unwrap_or(HoldId([0; 16])).0);
            room[field::ATTEMPT_OR_COUNT].copy_from_slice(&count.to_ne_bytes());
            (owner_token, entries) = (&owner.0, present);
        }
        // Only this library writes here.
        Holder::Foreign { .. } => {}
    }
    room[field::OWNER_TOKEN] = owner_token.len() as u8;
    room[field::ENTRIES].copy_from_slice(&(entries.len() as u32).to_ne_bytes());
    let mut at = field::END;
    let mut append = |bytes: &[u8]| {
        room[at..at + bytes.len()].copy_from_slice(bytes);
        at += bytes.len();
    };
    for entry in entries {
        append(&entry.object.0.to_ne_bytes());
        append(&entry.write_seq.to_ne_bytes());
        append(&entry.count.to_ne_bytes());
        append(&[0; 4]);
    }
    identity.into_iter().chain([owner_token.as_bytes(), key]).for_each(&mut append);
    let check = checksum(room);
    room[field::CHECK].copy_from_slice(&check.to_ne_bytes());
}

fn entry(bytes: &[u8]) -> Entry {
    Entry { object: ObjectId(u64_in(bytes, 0..8)), write_seq: u64_in(bytes, 8..16), count: u32_in(bytes, 16..20) }
}

/// What can be said of a row that is damaged. It can be broken, as it is.
pub fn damaged_record(bytes: &[u8], hash: KeyHash, key: Option<Key>) -> Record {
    let key = key.or_else(|| key_in(bytes, hash));
    let what = match &key {
        Some(_) => "its contents don't fit its checksum, or its key",
        None => "its contents don't fit its checksum, and its key cannot be read",
    };
    Record {
        key: key.unwrap_or_else(|| Key::of_hash(hash)),
        damaged: Some(what.to_string()),
        lease: Lease::Runs(Duration::ZERO),
        expires_at_ms: 0,
        owner: None,
        fence: None,
        state: damaged_state(bytes),
    }
}

/// What identifies a damaged row: all of it.
pub fn damaged_state(bytes: &[u8]) -> State {
    let digest = KeyHash(Sha1::digest(bytes).into());
    let token = format!("damaged {}", digest.base64()).into();
    State { holder: Holder::Foreign { token }, ends_at: StoreTime(bytes.len() as u64) }
}

/// The key of a damaged row, if it is still there: its hash proves it, whatever else the row says.
fn key_in(bytes: &[u8], hash: KeyHash) -> Option<Key> {
    let by_its_lengths =
        (bytes.len() > field::END).then(|| Row { bytes }.key_range()).flatten().map(|range| range.start);
    let searched = if bytes.len() <= SEARCHED_MAX { 0..bytes.len() } else { 0..0 };
    let key = |start: usize| bytes.get(start..).and_then(|text| Key::new(text).ok());
    by_its_lengths.into_iter().chain(searched).filter_map(key).find(|key| key.hash() == hash)
}

pub fn damaged(hash: KeyHash) -> StoreError {
    StoreError::rejected(format!("the record of the key with the hash {} is damaged", hash.base64()))
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
fn checksum(bytes: &[u8]) -> u32 {
    crc32fast::hash(&bytes[field::CHECK.end..])
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

    #[test]
    fn states_and_back() {
        let identity = Identity { host: "h".into(), pid: 1, boot_id: "other".into(), app: "a".into() };
        let home = Home { host: "h", boot_id: "b" };
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
            let row = NewRow { key: &key, state: before, fence: 5, acquired_at: now, identity: &identity, home };
            let mut bytes = vec![0xff; row.encoded_len()];
            row.write(&mut bytes);
            let changed = Row::read(&bytes).unwrap().with_state(after);
            for (bytes, state) in [(&bytes, before), (&changed, after)] {
                let row = Row::read(bytes).unwrap();
                assert!(row.state() == *state);
                let record = row.record(key.hash(), home, now.into()).unwrap();
                assert!(record.state == *state && record.key == key && record.fence == Some(5));
                let owner = record.owner.unwrap();
                assert_eq!((&*owner.host, owner.pid, &*owner.boot_id, &*owner.app), ("h", 1, "other", "a"));
            }
        }
    }

    #[test]
    fn a_reentrant_lock_that_is_not_locked_is_no_row() {
        let identity = Identity { host: "h".into(), pid: 1, boot_id: "b".into(), app: "a".into() };
        let home = Home { host: "h", boot_id: "b" };
        let key = Key::new(b"key").unwrap();
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
            let (state, acquired_at) = (state(count), Boottime::now());
            let row = NewRow { key: &key, state: &state, fence: 1, acquired_at, identity: &identity, home };
            let mut bytes = vec![0; row.encoded_len()];
            row.write(&mut bytes);
            bytes
        };
        assert!(Row::read(&written(0)).is_none(), "unlocking it would count down from 0");
        assert!(Row::read(&written(1)).is_some());
    }
}
