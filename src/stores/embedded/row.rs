//! The form in which a record is stored.
//!
//! A row is a fixed part, then texts. Numbers are in this machine's byte order: a data file lives on one
//! machine, during one boot. What every row would repeat (this boot, usually this host) is left out.

use std::ops::Range;
use std::time::Duration;

use sha1::{Digest, Sha1};

use crate::clock::{self, Boottime};
use crate::key::{Key, KeyHash};
use crate::record::{Lease, Owner, Record, Reentrant, Seen};
use crate::store::{Identity, OwnerToken, StoreError};
use crate::token::{HoldId, ObjectId, Token};

const FORMAT: u8 = 1;

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
    pub const EXPIRES_AT: Range<usize> = 16..24;
    pub const N: Range<usize> = 24..32;
    pub const FENCE: Range<usize> = 32..40;
    pub const ACQUIRED_AT: Range<usize> = 40..48;
    pub const HOLD: Range<usize> = 48..64;
    /// Plain: the attempt of the hold. Reentrant: how often it is locked.
    pub const ATTEMPT_OR_COUNT: Range<usize> = 64..68;
    /// How many last steps follow, before the texts.
    pub const STEPS: Range<usize> = 68..72;
    pub const END: usize = 72;
}

/// A last step: object, number, and when it was made.
const STEP_BYTES: usize = 24;

/// Texts longer than this are cut: they are for people to read.
const TEXT_MAX: usize = 255;

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

    pub fn is_plain(&self) -> bool {
        self.bytes[field::KIND] == PLAIN
    }

    /// The token of a plain lock.
    pub fn token(&self) -> Option<Token> {
        self.is_plain().then(|| Token { hold: self.hold(), attempt: u32_in(self.bytes, field::ATTEMPT_OR_COUNT) })
    }

    pub fn hold(&self) -> HoldId {
        HoldId(self.bytes[field::HOLD].try_into().expect("a hold has 16 bytes"))
    }

    pub fn expires_at(&self) -> Boottime {
        Boottime::from_nanos(u64_in(self.bytes, field::EXPIRES_AT))
    }

    pub fn n(&self) -> u64 {
        u64_in(self.bytes, field::N)
    }

    pub fn fence(&self) -> u64 {
        u64_in(self.bytes, field::FENCE)
    }

    pub fn expired(&self, now: Boottime) -> bool {
        self.expires_at() < now
    }

    /// A reentrant lock's state, taken out to be changed.
    pub fn reentrant(&self) -> Option<ReentrantRow> {
        if self.is_plain() {
            return None;
        }
        let (owner, _) = self.texts();
        let steps = self.bytes[self.steps_range()].chunks_exact(STEP_BYTES).map(|step| LastStep {
            object: ObjectId(u64_in(step, 0..8)),
            number: u64_in(step, 8..16),
            until: Boottime::from_nanos(u64_in(step, 16..24)),
        });
        Some(ReentrantRow {
            owner: OwnerToken(owner.into()),
            hold: self.hold(),
            count: u32_in(self.bytes, field::ATTEMPT_OR_COUNT),
            steps: steps.collect(),
            expires_at: self.expires_at(),
            fence: self.fence(),
            acquired_at: self.acquired_at(),
            pid: u32_in(self.bytes, field::PID),
            identity_texts: self.bytes[self.identity_range()].to_vec(),
            identity_lengths: [self.bytes[field::APP], self.bytes[field::HOST], self.bytes[field::BOOT_ID]],
        })
    }

    /// Whether the owner token is this one.
    pub fn is_owned_by(&self, owner: &OwnerToken) -> bool {
        !self.is_plain() && self.texts().0 == &*owner.0
    }

    pub fn record(&self, hash: KeyHash, home: Home<'_>, now: Boottime) -> Result<Record, StoreError> {
        let key = self.key_range().and_then(|range| Key::new(&self.bytes[range]).ok());
        // A row under another key's hash would be another key's record.
        let key = key.filter(|key| key.hash() == hash).ok_or_else(|| damaged(hash))?;
        let lease = Lease::from_nanos(self.expires_at().as_nanos(), now.as_nanos());
        let (owner_token, [app, host, boot_id]) = self.texts();
        let or_home = |text: &str, home: &str| if text.is_empty() { home } else { text }.to_string();
        let (token, reentrant) = match self.token() {
            Some(token) => (token.to_string(), None),
            None => {
                let count = u32_in(self.bytes, field::ATTEMPT_OR_COUNT);
                (owner_token.to_string(), Some(Reentrant { count, hold: Some(self.hold()) }))
            }
        };
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
                acquired_at_ms: clock::wall_millis().saturating_sub(now.since(self.acquired_at()).as_millis() as u64),
            }),
            fence: Some(self.fence()),
            reentrant,
            seen: Seen { token: token.into(), expires_at: self.expires_at().as_nanos(), n: self.n() },
        })
    }

    /// Whether the row is in the very state that was seen (R20).
    pub fn is_as_seen(&self, seen: &Seen, reentrant: Option<&Reentrant>) -> bool {
        let same_holder = match self.token() {
            Some(token) => reentrant.is_none() && *seen.token == *token.to_string(),
            None => {
                let count = u32_in(self.bytes, field::ATTEMPT_OR_COUNT);
                *seen.token == *self.texts().0 && reentrant == Some(&Reentrant { count, hold: Some(self.hold()) })
            }
        };
        same_holder && self.expires_at().as_nanos() == seen.expires_at && self.n() == seen.n
    }

    fn acquired_at(&self) -> Boottime {
        Boottime::from_nanos(u64_in(self.bytes, field::ACQUIRED_AT))
    }

    fn steps_range(&self) -> Range<usize> {
        field::END..field::END + u32_in(self.bytes, field::STEPS) as usize * STEP_BYTES
    }

    fn identity_range(&self) -> Range<usize> {
        let start = self.steps_range().end;
        let length =
            [field::APP, field::HOST, field::BOOT_ID].iter().map(|&at| usize::from(self.bytes[at])).sum::<usize>();
        start..start + length
    }

    /// `None` when the lengths are not those of a row.
    #[inline]
    fn key_range(&self) -> Option<Range<usize>> {
        let start = self.identity_range().end + usize::from(self.bytes[field::OWNER_TOKEN]);
        (start < self.bytes.len()).then_some(start..self.bytes.len())
    }

    /// The owner token; app, host and boot id.
    fn texts(&self) -> (&'a str, [&'a str; 3]) {
        let mut at = self.steps_range().end;
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

/// A grant of a plain lock, to be written.
pub struct PlainRow<'a> {
    pub key: &'a Key,
    pub token: Token,
    pub n: u64,
    pub expires_at: Boottime,
    pub acquired_at: Boottime,
    pub fence: u64,
    pub identity: &'a Identity,
}

impl PlainRow<'_> {
    /// App, host and boot id as they are stored.
    #[inline]
    fn identity_texts(&self, home: Home<'_>) -> [&str; 3] {
        identity_texts(self.identity, home)
    }

    #[inline]
    pub fn len(&self, home: Home<'_>) -> usize {
        field::END + self.identity_texts(home).iter().map(|text| text.len()).sum::<usize>() + self.key.as_str().len()
    }

    /// Writes it into as many bytes as `len` says.
    #[inline]
    pub fn write(&self, home: Home<'_>, bytes: &mut [u8]) {
        let texts = self.identity_texts(home);
        bytes[..field::END].fill(0);
        bytes[field::FORMAT] = FORMAT;
        bytes[field::KIND] = PLAIN;
        bytes[field::PID].copy_from_slice(&self.identity.pid.to_ne_bytes());
        bytes[field::EXPIRES_AT].copy_from_slice(&self.expires_at.as_nanos().to_ne_bytes());
        bytes[field::N].copy_from_slice(&self.n.to_ne_bytes());
        bytes[field::FENCE].copy_from_slice(&self.fence.to_ne_bytes());
        bytes[field::ACQUIRED_AT].copy_from_slice(&self.acquired_at.as_nanos().to_ne_bytes());
        bytes[field::HOLD].copy_from_slice(&self.token.hold.0);
        bytes[field::ATTEMPT_OR_COUNT].copy_from_slice(&self.token.attempt.to_ne_bytes());
        let mut at = field::END;
        for (text, length) in texts.into_iter().zip([field::APP, field::HOST, field::BOOT_ID]) {
            bytes[length] = text.len() as u8;
            bytes[at..at + text.len()].copy_from_slice(text.as_bytes());
            at += text.len();
        }
        bytes[at..].copy_from_slice(self.key.as_str().as_bytes());
        seal(bytes);
    }
}

/// A reentrant lock's record, taken out of its row, or to be put into one.
pub struct ReentrantRow {
    pub owner: OwnerToken,
    pub hold: HoldId,
    pub count: u32,
    pub steps: Vec<LastStep>,
    pub expires_at: Boottime,
    pub fence: u64,
    pub acquired_at: Boottime,
    pid: u32,
    identity_texts: Vec<u8>,
    identity_lengths: [u8; 3],
}

/// The last step that an object made (R17).
#[derive(Clone, Copy)]
pub struct LastStep {
    pub object: ObjectId,
    pub number: u64,
    /// Until when it is remembered.
    pub until: Boottime,
}

impl ReentrantRow {
    pub fn new(owner: OwnerToken, hold: HoldId, identity: &Identity, home: Home<'_>) -> ReentrantRow {
        let texts = identity_texts(identity, home);
        ReentrantRow {
            owner,
            hold,
            count: 0,
            steps: Vec::new(),
            expires_at: Boottime::ZERO,
            fence: 0,
            acquired_at: Boottime::ZERO,
            pid: identity.pid,
            identity_texts: texts.concat().into_bytes(),
            identity_lengths: texts.map(|text| text.len() as u8),
        }
    }

    pub fn write(&self, key: &Key) -> Vec<u8> {
        let mut bytes = vec![0; field::END];
        bytes[field::FORMAT] = FORMAT;
        bytes[field::KIND] = REENTRANT;
        bytes[field::APP] = self.identity_lengths[0];
        bytes[field::HOST] = self.identity_lengths[1];
        bytes[field::BOOT_ID] = self.identity_lengths[2];
        bytes[field::OWNER_TOKEN] = self.owner.0.len() as u8;
        bytes[field::PID].copy_from_slice(&self.pid.to_ne_bytes());
        bytes[field::EXPIRES_AT].copy_from_slice(&self.expires_at.as_nanos().to_ne_bytes());
        bytes[field::FENCE].copy_from_slice(&self.fence.to_ne_bytes());
        bytes[field::ACQUIRED_AT].copy_from_slice(&self.acquired_at.as_nanos().to_ne_bytes());
        bytes[field::HOLD].copy_from_slice(&self.hold.0);
        bytes[field::ATTEMPT_OR_COUNT].copy_from_slice(&self.count.to_ne_bytes());
        bytes[field::STEPS].copy_from_slice(&(self.steps.len() as u32).to_ne_bytes());
        for step in &self.steps {
            bytes.extend_from_slice(&step.object.0.to_ne_bytes());
            bytes.extend_from_slice(&step.number.to_ne_bytes());
            bytes.extend_from_slice(&step.until.as_nanos().to_ne_bytes());
        }
        bytes.extend_from_slice(&self.identity_texts);
        bytes.extend_from_slice(self.owner.0.as_bytes());
        bytes.extend_from_slice(key.as_str().as_bytes());
        seal(&mut bytes);
        bytes
    }
}

/// Gives a row a new lease.
pub fn renew(bytes: &mut [u8], n: u64, expires_at: Boottime) {
    bytes[field::N].copy_from_slice(&n.to_ne_bytes());
    bytes[field::EXPIRES_AT].copy_from_slice(&expires_at.as_nanos().to_ne_bytes());
    seal(bytes);
}

/// A row longer than this is not searched for its key.
const SEARCHED_MAX: usize = 4096;

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
        reentrant: None,
        seen: seen_damaged(bytes),
    }
}

/// What identifies a damaged row: all of it.
pub fn seen_damaged(bytes: &[u8]) -> Seen {
    let digest = KeyHash(Sha1::digest(bytes).into());
    Seen { token: format!("damaged {}", digest.base64()).into(), expires_at: 0, n: bytes.len() as u64 }
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
fn identity_texts<'a>(identity: &'a Identity, home: Home<'_>) -> [&'a str; 3] {
    let unless = |text: &'a str, home: &str| if text == home { "" } else { cut(text) };
    [cut(&identity.app), unless(&identity.host, home.host), unless(&identity.boot_id, home.boot_id)]
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
fn seal(bytes: &mut [u8]) {
    let check = checksum(bytes);
    bytes[field::CHECK].copy_from_slice(&check.to_ne_bytes());
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
    fn a_damaged_row_keeps_its_key_where_the_hash_proves_it() {
        let identity = Identity { host: "h".into(), pid: 1, boot_id: "b".into(), app: "a".into() };
        let home = Home { host: "h", boot_id: "b" };
        let key = Key::new("jobs:grün".as_bytes()).unwrap();
        let mut row = ReentrantRow::new(OwnerToken("owner".into()), HoldId([7; 16]), &identity, home);
        row.count = 1;
        let whole = row.write(&key);
        let first_of_key = whole.len() - key.as_str().len();
        for at in 0..whole.len() {
            let mut bytes = whole.clone();
            bytes[at] ^= 0xff;
            let record = damaged_record(&bytes, key.hash(), None);
            assert!(record.damaged.is_some() && record.key.hash() == key.hash(), "byte {at}");
            assert_eq!(record.key.is_placeholder(), at >= first_of_key, "byte {at}");
            assert!(record.key.is_placeholder() || record.key == key, "byte {at}");
            assert!(record.seen != seen_damaged(&whole) && record.seen == seen_damaged(&bytes));
        }
        assert!(damaged_record(&[], key.hash(), None).key.is_placeholder());
        assert_eq!(damaged_record(&[], key.hash(), Some(key.clone())).key, key);
    }

    #[test]
    fn a_reentrant_lock_that_is_not_locked_is_no_row() {
        let identity = Identity { host: "h".into(), pid: 1, boot_id: "b".into(), app: "a".into() };
        let home = Home { host: "h", boot_id: "b" };
        let key = Key::new(b"key").unwrap();
        let mut row = ReentrantRow::new(OwnerToken("owner".into()), HoldId([7; 16]), &identity, home);
        assert!(Row::read(&row.write(&key)).is_none(), "unlocking it would count down from 0");
        row.count = 1;
        assert!(Row::read(&row.write(&key)).is_some());
    }
}
