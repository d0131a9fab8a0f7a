//! What each operation does to the rows, inside one transaction.
//!
//! Every function here may be run again from its beginning: when the data file had to grow, or more
//! fences to be reserved, the transaction is thrown away and the operation done anew.

use super::database::{Fault, Place, Transaction};
use super::fence;
use super::row::{self, Home, NewRow, Row};
use super::wake::Freed;
use crate::clock::Boottime;
use crate::key::{Key, KeyHash};
use crate::protocol::{Change, Condition, Effect, Reply, StoreTime, Write, apply};
use crate::record::{Identity, Record};
use crate::store::{Filter, StoreError};

/// A row that is no lock's: writing to it gives the transaction a number of its own.
const COUNTER: &[u8] = b"fence";

/// One operation's transaction, and what belongs to it.
pub struct Scope<'a> {
    pub transaction: Transaction<'a>,
    /// Read after the mutex was ours.
    pub now: Boottime,
    /// Base and ceiling.
    pub fences: Option<(u64, u64)>,
    pub home: Home<'a>,
    pub changed: bool,
    pub freed: Freed,
}

impl Scope<'_> {
    /// The one fence of this transaction.
    fn next_fence(&self) -> Result<u64, Fault> {
        let (base, ceiling) = self.fences.ok_or(Fault::FencesSpent)?;
        let next = base.saturating_add(self.transaction.number());
        if next < ceiling.min(fence::LIMIT) { Ok(next) } else { Err(Fault::FencesSpent) }
    }
}

/// Applies a change.
pub fn change(scope: &mut Scope, key: &Key, change: &Change) -> Result<Reply, Fault> {
    if let (Condition::Absent, Write::Put(new)) = (&change.condition, &change.write) {
        return create(scope, key, change, &new.identity);
    }
    let (now, hash) = (StoreTime::from(scope.now), key.hash());
    let found = match scope.transaction.find(&hash.0)? {
        Some(bytes) => match Row::of_key(bytes, key) {
            Some(row) => Some(row),
            None => return break_damaged(scope, row::damaged_record(bytes, hash, Some(key.clone())), change),
        },
        None => None,
    };
    let present = found.map(|row| row.state());
    match apply(present.as_ref(), now, change.not_after.map(StoreTime::from), change) {
        Effect::TooLate => Ok(Reply::TooLate),
        Effect::Refused => Ok(Reply::Found(match found {
            Some(row) => Some(Box::new(row.record(hash, scope.home, now)?)),
            None => None,
        })),
        Effect::Remove => {
            scope.transaction.delete(&hash.0)?;
            scope.changed = true;
            scope.freed.push(hash);
            Ok(Reply::Applied { fence: None })
        }
        Effect::Update(state) => {
            let Some(row) = found else { return Ok(Reply::Found(None)) };
            let (fence, bytes) = (row.fence(), row.with_state(&state));
            if present.is_some_and(|present| state.ends_at < present.ends_at) {
                // A waiter that sleeps until the lease's end is to sleep less.
                scope.freed.push(hash);
            }
            scope.transaction.replace(&hash.0, bytes.len())?.copy_from_slice(&bytes);
            scope.changed = true;
            Ok(Reply::Applied { fence: Some(fence) })
        }
        Effect::Put(state) => {
            let Write::Put(new) = &change.write else { return Ok(Reply::Found(None)) };
            let fence = scope.next_fence()?;
            let row =
                NewRow { key, state: &state, fence, acquired_at: scope.now, identity: &new.identity, home: scope.home };
            row.write(scope.transaction.replace(&hash.0, row.encoded_len())?);
            scope.changed = true;
            Ok(Reply::Applied { fence: Some(fence) })
        }
    }
}

/// Makes a record where there is none: one look at the table, and not two.
fn create(scope: &mut Scope, key: &Key, change: &Change, identity: &Identity) -> Result<Reply, Fault> {
    let (now, hash) = (StoreTime::from(scope.now), key.hash());
    let state = match apply(None, now, change.not_after.map(StoreTime::from), change) {
        Effect::Put(state) => state,
        Effect::TooLate => return Ok(Reply::TooLate),
        Effect::Update(_) | Effect::Remove | Effect::Refused => return Ok(Reply::Found(None)),
    };
    let fence = scope.next_fence()?;
    let row = NewRow { key, state: &state, fence, acquired_at: scope.now, identity, home: scope.home };
    match scope.transaction.insert(&hash.0, row.encoded_len())? {
        Place::Made(room) => row.write(room),
        Place::Taken(bytes) => {
            return match Row::of_key(bytes, key) {
                Some(row) => Ok(Reply::Found(Some(Box::new(row.record(hash, scope.home, now)?)))),
                None => Err(damaged(key).into()),
            };
        }
    }
    scope.changed = true;
    Ok(Reply::Applied { fence: Some(fence) })
}

/// A damaged record can be deleted, by a change that has seen it as it is. A change that asks for anything else of
/// it is an error.
fn break_damaged(scope: &mut Scope, damaged: Record, change: &Change) -> Result<Reply, Fault> {
    match (&change.condition, &change.write) {
        (Condition::Seen { state, .. }, Write::Delete) if **state != damaged.state => {
            Ok(Reply::Found(Some(Box::new(damaged))))
        }
        (Condition::Seen { .. }, Write::Delete) => {
            let hash = damaged.key.hash();
            scope.transaction.delete(&hash.0)?;
            scope.changed = true;
            scope.freed.push(hash);
            Ok(Reply::Applied { fence: None })
        }
        _ => Err(self::damaged(&damaged.key).into()),
    }
}

fn damaged(key: &Key) -> StoreError {
    StoreError::rejected(format!("the record of {} is damaged", key.quoted()))
}

/// The record of a row. `None`: it is damaged.
fn record(bytes: &[u8], hash: KeyHash, home: Home<'_>, now: StoreTime) -> Option<Record> {
    Row::read(bytes)?.record(hash, home, now).ok()
}

pub fn find(scope: &mut Scope, key: &Key) -> Result<Option<Record>, Fault> {
    let Some(found) = scope.transaction.find(&key.hash().0)? else { return Ok(None) };
    let record = record(found, key.hash(), scope.home, scope.now.into());
    Ok(Some(record.unwrap_or_else(|| row::damaged_record(found, key.hash(), Some(key.clone())))))
}

/// Part of a list: what was found, and the hash after which to go on.
pub struct Page {
    pub records: Vec<Record>,
    pub next: Option<KeyHash>,
}

/// How much one transaction looks at before it lets others have their turn.
const PAGE_ROWS: usize = 256;
const PAGE_BYTES: usize = 1 << 20;

pub fn list(scope: &mut Scope, filter: Filter, after: Option<KeyHash>) -> Result<Page, Fault> {
    let (now, home) = (StoreTime::from(scope.now), scope.home);
    let mut page = Page { records: Vec::new(), next: None };
    let (mut rows, mut bytes, mut last) = (0, 0, None);
    let from = after.map_or([0; 20], |hash| hash.0);
    scope.transaction.walk(&from, |key, value| {
        let Ok(hash) = key.try_into().map(KeyHash) else { return Ok(true) };
        if Some(hash) == after {
            return Ok(true);
        }
        if rows == PAGE_ROWS || bytes >= PAGE_BYTES {
            page.next = last;
            return Ok(false);
        }
        rows += 1;
        bytes += value.len();
        last = Some(hash);
        match record(value, hash, home, now) {
            Some(record) if filter == Filter::All || record.lease.expired() => page.records.push(record),
            Some(_) => {}
            // Whether its lease is over is not known.
            None if filter == Filter::All => page.records.push(row::damaged_record(value, hash, None)),
            None => {}
        }
        Ok(true)
    })?;
    Ok(page)
}

/// A fence without a grant: above all that were given out, since the transaction is.
pub fn fence(scope: &mut Scope) -> Result<u64, Fault> {
    let fence = scope.next_fence()?;
    scope.transaction.replace(COUNTER, size_of::<u64>())?.copy_from_slice(&fence.to_ne_bytes());
    scope.changed = true;
    Ok(fence)
}
