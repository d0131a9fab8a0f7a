//! What each operation does to the rows, inside one transaction.
//!
//! Every function here may be run again from its beginning: when the data file had to grow, or more
//! fences to be reserved, the transaction is thrown away and the operation done anew.

use std::time::Duration;

use super::database::{Fault, Place, Transaction};
use super::fence;
use super::row::{self, Home, LastStep, PlainRow, ReentrantRow, Row};
use super::wake::Freed;
use crate::clock::Boottime;
use crate::key::{Key, KeyHash};
use crate::record::Record;
use crate::store::{
    Acquired, Action, Attempt, Broken, Claim, Filter, Proof, Released, Renewal, Renewed, Step, Stepped, StoreError,
};

/// How long a reentrant record remembers an object's last step, when that was a way out. Longer than any request may be late
/// (an op_timeout is at most an hour).
const REMEMBERED: Duration = Duration::from_secs(2 * 3600);

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

    fn delete(&mut self, hash: KeyHash) -> Result<(), Fault> {
        self.transaction.delete(&hash.0)?;
        self.changed = true;
        self.freed.push(hash);
        Ok(())
    }

    fn put(&mut self, key: &Key, row: &ReentrantRow) -> Result<(), Fault> {
        let bytes = row.write(key);
        self.transaction.replace(&key.hash().0, bytes.len())?.copy_from_slice(&bytes);
        self.changed = true;
        Ok(())
    }

    /// Gives a row a new lease, and leaves the rest as it is.
    fn renew(&mut self, hash: KeyHash, n: u64, expires_at: Boottime) -> Result<(), Fault> {
        let found = self.transaction.find(&hash.0)?.ok_or_else(|| row::damaged(hash))?;
        // Room for a row of the same length may hold the row, or anything.
        let bytes = found.to_vec();
        let room = self.transaction.replace(&hash.0, bytes.len())?;
        room.copy_from_slice(&bytes);
        row::renew(room, n, expires_at);
        self.changed = true;
        Ok(())
    }
}

/// A row as it is, or an error that names the key.
fn read<'a>(bytes: &'a [u8], key: &Key) -> Result<Row<'a>, Fault> {
    Row::read(bytes).ok_or_else(|| StoreError::rejected(format!("the record of {} is damaged", key.quoted())).into())
}

pub fn acquire(scope: &mut Scope, key: &Key, attempt: &Attempt) -> Result<Acquired, Fault> {
    let (now, home) = (scope.now, scope.home);
    if now > attempt.not_after {
        return Ok(Acquired::TooLate);
    }
    let fence = scope.next_fence()?;
    let fresh = PlainRow {
        key,
        token: attempt.token,
        n: attempt.n,
        expires_at: now + attempt.expire,
        acquired_at: now,
        fence,
        identity: &attempt.identity,
    };
    let length = fresh.len(home);
    let hash = key.hash();
    match scope.transaction.insert(&hash.0, length)? {
        Place::Made(room) => fresh.write(home, room),
        Place::Taken(found) => {
            let found = read(found, key)?;
            match found.token() {
                Some(token) if token.hold == attempt.token.hold => {
                    let (applied, fence) = (found.n() < attempt.n, Some(found.fence()));
                    if applied {
                        scope.renew(hash, attempt.n, now + attempt.expire)?;
                    }
                    return Ok(Acquired::Granted { token, applied, fence });
                }
                _ if found.expired(now) => fresh.write(home, scope.transaction.replace(&hash.0, length)?),
                _ => return Ok(Acquired::Held { expires_in: found.expires_at().since(now) }),
            }
        }
    }
    scope.changed = true;
    Ok(Acquired::Granted { token: attempt.token, applied: true, fence: Some(fence) })
}

pub fn release(scope: &mut Scope, key: &Key, claim: Claim) -> Result<Released, Fault> {
    let hash = key.hash();
    let Some(found) = scope.transaction.find(&hash.0)? else { return Ok(Released::NotOurs) };
    let ours = match (read(found, key)?.token(), claim) {
        (Some(token), Claim::Token(ours)) => token == ours,
        (Some(token), Claim::AnyOf(hold)) => token.hold == hold,
        (None, _) => false,
    };
    if !ours {
        return Ok(Released::NotOurs);
    }
    scope.delete(hash)?;
    Ok(Released::Released)
}

pub fn refresh(scope: &mut Scope, renewal: &Renewal) -> Result<Renewed, Fault> {
    let (now, key) = (scope.now, &renewal.key);
    let Some(found) = scope.transaction.find(&key.hash().0)? else { return Ok(Renewed::Lost) };
    let found = read(found, key)?;
    let (before, until) = (found.expires_at(), now + renewal.expire);
    match &renewal.proof {
        Proof::Plain(ours) if found.token() == Some(*ours) => {
            let applied = found.n() < renewal.n;
            if applied {
                scope.renew(key.hash(), renewal.n, until)?;
                if until < before {
                    // Who sleeps until the lease's end is to sleep less.
                    scope.freed.push(key.hash());
                }
            }
            Ok(Renewed::Renewed { applied })
        }
        Proof::Reentrant { owner, hold } if found.is_owned_by(owner) && found.hold() == *hold => {
            if until > before {
                scope.renew(key.hash(), found.n(), until)?;
            }
            Ok(Renewed::Renewed { applied: true })
        }
        _ => Ok(Renewed::Lost),
    }
}

pub fn step(scope: &mut Scope, key: &Key, step: &Step) -> Result<Stepped, Fault> {
    let now = scope.now;
    let found = match scope.transaction.find(&key.hash().0)? {
        Some(bytes) => Some(read(bytes, key)?),
        None => None,
    };
    let expired = found.is_some_and(|row| row.expired(now));
    let held_for = found.map(|row| row.expires_at().since(now));
    let ours = found.filter(|row| row.is_owned_by(&step.owner)).and_then(|row| row.reentrant());
    match &step.action {
        Action::Enter { hold, fresh, expire, not_after, identity } => {
            if now > *not_after {
                return Ok(Stepped::TooLate);
            }
            let until = now + *expire;
            if let Some(mut row) = ours
                && (!expired || *hold == Some(row.hold) || *fresh == row.hold)
            {
                let last = last_number(&row, step);
                if last > step.number {
                    return Ok(Stepped::TooLate);
                }
                if last < step.number {
                    row.count += 1;
                    remember(&mut row, step, now);
                }
                if last < step.number || until > row.expires_at {
                    row.expires_at = row.expires_at.max(until);
                    scope.put(key, &row)?;
                }
                return Ok(Stepped::Entered {
                    hold: row.hold,
                    count: row.count,
                    applied: true,
                    fence: Some(row.fence),
                });
            }
            if let Some(expires_in) = held_for.filter(|_| !expired) {
                return Ok(Stepped::Held { expires_in });
            }
            let mut row = ReentrantRow::new(step.owner.clone(), *fresh, identity, scope.home);
            row.count = 1;
            row.expires_at = until;
            row.acquired_at = now;
            row.fence = scope.next_fence()?;
            remember(&mut row, step, now);
            scope.put(key, &row)?;
            Ok(Stepped::Entered { hold: *fresh, count: 1, applied: true, fence: Some(row.fence) })
        }
        Action::Leave { hold, enter, .. } => {
            let Some(mut row) = ours.filter(|row| *hold == Some(row.hold)) else { return Ok(Stepped::NotOurs) };
            let last = last_number(&row, step);
            if last < step.number {
                if enter.is_some_and(|enter| enter != last) {
                    return Ok(Stepped::NotOurs);
                }
                row.count -= 1;
                if row.count == 0 {
                    scope.delete(key.hash())?;
                } else {
                    remember(&mut row, step, now);
                    scope.put(key, &row)?;
                }
            }
            Ok(Stepped::Left { count: row.count })
        }
        Action::Undo { enter } => {
            let Some(mut row) = ours else { return Ok(Stepped::Undone) };
            let last = last_number(&row, step);
            row.count -= u32::from(last == *enter);
            if row.count == 0 {
                scope.delete(key.hash())?;
            } else if last < step.number {
                remember(&mut row, step, now);
                scope.put(key, &row)?;
            }
            Ok(Stepped::Undone)
        }
    }
}

fn last_number(row: &ReentrantRow, step: &Step) -> u64 {
    row.steps.iter().find(|last| last.object == step.object).map_or(0, |last| last.number)
}

/// Notes the step as the object's last, and forgets those that nobody can ask about any more.
fn remember(row: &mut ReentrantRow, step: &Step, now: Boottime) {
    row.steps.retain(|last| last.object != step.object && last.until > now);
    let until = match step.action {
        // Its way out asks for it, whenever that comes.
        Action::Enter { .. } => Boottime::NEVER,
        Action::Leave { .. } | Action::Undo { .. } => now + REMEMBERED,
    };
    row.steps.push(LastStep { object: step.object, number: step.number, until });
}

/// The record of a row. `None`: it is damaged.
fn record(bytes: &[u8], hash: KeyHash, home: Home<'_>, now: Boottime) -> Option<Record> {
    Row::read(bytes)?.record(hash, home, now).ok()
}

pub fn find(scope: &mut Scope, key: &Key) -> Result<Option<Record>, Fault> {
    let Some(found) = scope.transaction.find(&key.hash().0)? else { return Ok(None) };
    let record = record(found, key.hash(), scope.home, scope.now);
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
    let (now, home) = (scope.now, scope.home);
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
            // Nobody knows whether its lease is over.
            None if filter == Filter::All => page.records.push(row::damaged_record(value, hash, None)),
            None => {}
        }
        Ok(true)
    })?;
    Ok(page)
}

pub fn break_seen(scope: &mut Scope, record: &Record) -> Result<Broken, Fault> {
    let hash = record.key.hash();
    let Some(found) = scope.transaction.find(&hash.0)? else { return Ok(Broken::Changed) };
    let as_seen = match Row::read(found) {
        Some(row) if record.damaged.is_none() => row.is_as_seen(&record.seen, record.reentrant.as_ref()),
        // One that was damaged when it was seen, also if that was its key alone; it is compared byte by byte.
        _ => record.damaged.is_some() && row::seen_damaged(found) == record.seen,
    };
    if !as_seen {
        return Ok(Broken::Changed);
    }
    scope.delete(hash)?;
    Ok(Broken::Broken)
}

/// A fence without a grant: above all that were given out, since the transaction is.
pub fn fence(scope: &mut Scope) -> Result<u64, Fault> {
    let fence = scope.next_fence()?;
    scope.transaction.replace(COUNTER, size_of::<u64>())?.copy_from_slice(&fence.to_ne_bytes());
    scope.changed = true;
    Ok(fence)
}
