//! What each operation does to the records of a table.
//!
//! The rules are in [`crate::protocol`]. Here, a change is applied to the record of one key, with the mutex of its
//! shard held.

use super::row::{HostIdentity, NewRow, Row};
use super::table::{self, Buffer, Damaged, Entry, Fault, KeyRef, Listed, Patience, Table};
use crate::clock::Boottime;
use crate::key::{Key, KeyHash};
use crate::protocol::{Change, Condition, Effect, Holder, Proof, Reply, State, StoreTime, Write, apply};
use crate::record::{Lease, Record};
use crate::store::{Filter, StoreError};
use crate::token::Token;

/// The result of an operation on one key.
pub struct Done<T> {
    pub value: T,
    /// Which waiters it woke, if any.
    pub woke: Woke,
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Woke {
    Nobody,
    /// Only waiters of this process, if there are any.
    Here,
    Others,
}

fn host_identity(table: &Table) -> HostIdentity<'_> {
    let description = table.file.description();
    HostIdentity { host: &description.host, boot_id: &description.boot_id }
}

/// Runs `work` with the entry of a key, and the mutex of its shard held.
#[inline]
fn with<T>(
    table: &Table,
    key: &Key,
    patience: &mut Patience,
    mut work: impl FnMut(&mut Entry<'_, '_, '_>, &mut Buffer) -> Result<(T, Woke), Fault>,
) -> Result<Done<T>, Fault> {
    let key = KeyRef { bytes: key.as_str().as_bytes(), hash: key.hash().0 };
    let mut buffer = Buffer::new();
    table.with(key, patience, |entry| {
        let (value, woke) = work(entry, &mut buffer)?;
        Ok(Done { value, woke })
    })
}

#[inline]
fn wake(entry: &mut Entry<'_, '_, '_>) -> Woke {
    if entry.wake() { Woke::Others } else { Woke::Here }
}

/// Applies a change. Its time is when it was sent, if that is known, and otherwise a reading of the clock with the
/// mutex held.
#[inline(always)]
pub fn change(table: &Table, key: &Key, change: &Change, patience: &mut Patience) -> Result<Done<Reply>, Fault> {
    if let Some(token) = change.as_plain_release() {
        match release(table, key, token, patience) {
            // The record is another hold's, or damaged: the general case decides.
            Ok(None) | Err(Fault::Damaged(_)) => {}
            Ok(Some(done)) => return Ok(done),
            Err(fault) => return Err(fault),
        }
    }
    change_any(table, key, change, patience)
}

/// Not inlined, as [`release`]: as one function, they would spill most registers to the stack.
#[inline(never)]
fn change_any(table: &Table, key: &Key, change: &Change, patience: &mut Patience) -> Result<Done<Reply>, Fault> {
    if let (Condition::Seen { state, .. }, Write::Delete) = (&change.condition, &change.write)
        && let Some(damaged) = damaged_in(state)
    {
        return break_damaged(table, key, damaged, patience);
    }
    let not_after = change.not_after.map(StoreTime::from);
    let done = with(table, key, patience, |entry, buffer| {
        let found = match entry.get(buffer)? {
            Some(bytes) => Some(Row::read(bytes).ok_or_else(|| damaged_error(key))?),
            None => None,
        };
        let now = || StoreTime::from(change.sent.unwrap_or_else(Boottime::now));
        let at = if change.is_timeless() { StoreTime(0) } else { now() };
        let present = found.map(|row| row.state());
        let mut woke = Woke::Nobody;
        let reply = match apply(present.as_ref(), at, not_after, change) {
            Effect::TooLate => Reply::TooLate,
            Effect::Refused => {
                let at = if change.is_timeless() { now() } else { at };
                let record = found.map(|row| row.record(key.clone(), host_identity(table), at));
                Reply::Found(record.map(Box::new))
            }
            Effect::Remove => {
                entry.delete()?;
                woke = wake(entry);
                Reply::Applied { fence: None }
            }
            Effect::Update(state) => {
                let Some(row) = found else { return Ok((Reply::Found(None), woke)) };
                entry.put(row.write_with_state(&state, &mut Buffer::new()))?;
                let fence = row.fence();
                if present.is_some_and(|present| state.ends_at < present.ends_at) {
                    // A waiter sleeps until the end of the lease, which is earlier now.
                    woke = wake(entry);
                }
                Reply::Applied { fence: Some(fence) }
            }
            Effect::Put(state) => {
                let Write::Put(new) = &change.write else { return Ok((Reply::Found(None), woke)) };
                let fence = entry.next_fence()?;
                let row = NewRow {
                    state: &state,
                    fence,
                    acquired_at: at,
                    identity: &new.identity,
                    host_identity: host_identity(table),
                };
                entry.put(row.write(buffer))?;
                Reply::Applied { fence: Some(fence) }
            }
        };
        Ok((reply, woke))
    });
    match done {
        Err(Fault::Damaged(what)) => match (&change.condition, &change.write) {
            // It has changed since it was read.
            (Condition::Seen { .. }, Write::Delete) => {
                let damaged = damaged_record(&what, Some(key.clone()));
                Ok(Done { value: Reply::Found(Some(Box::new(damaged))), woke: Woke::Nobody })
            }
            _ => Err(damaged_error(key).into()),
        },
        done => done,
    }
}

/// Deletes the record of a plain hold, with the result that [`apply`] gives, but reads less of the record. `None`: it
/// is not the record of this hold.
#[inline(never)]
fn release(table: &Table, key: &Key, token: Token, patience: &mut Patience) -> Result<Option<Done<Reply>>, Fault> {
    let done = with(table, key, patience, |entry, buffer| {
        let row = entry.get(buffer)?.and_then(Row::read);
        let ours = row.is_some_and(|row| row.plain_token() == Some(token));
        debug_assert_eq!(ours, row.is_some_and(|row| is_released(row, token)));
        if ours {
            entry.delete()?;
        }
        Ok((ours, if ours { wake(entry) } else { Woke::Nobody }))
    })?;
    Ok(done.value.then_some(Done { value: Reply::Applied { fence: None }, woke: done.woke }))
}

/// Whether a release removes the record, according to [`apply`].
fn is_released(row: Row<'_>, token: Token) -> bool {
    let release = Change::new(Condition::Mine(Proof::Token(token)), Write::Delete);
    apply(Some(&row.state()), StoreTime(0), None, &release) == Effect::Remove
}

/// Deletes a damaged record, if it has not changed since it was listed.
fn break_damaged(table: &Table, key: &Key, damaged: Damaged, patience: &mut Patience) -> Result<Done<Reply>, Fault> {
    let broken = table.remove_damaged(damaged, patience)?;
    let value = match broken {
        true => Reply::Applied { fence: None },
        false if key.is_placeholder() => Reply::Found(None),
        false => Reply::Found(find(table, key, patience)?.value.map(Box::new)),
    };
    Ok(Done { value, woke: if broken { Woke::Here } else { Woke::Nobody } })
}

pub fn find(table: &Table, key: &Key, patience: &mut Patience) -> Result<Done<Option<Record>>, Fault> {
    let done = with(table, key, patience, |entry, buffer| {
        let Some(bytes) = entry.get(buffer)? else { return Ok((None, Woke::Nobody)) };
        let row = Row::read(bytes).ok_or_else(|| damaged_error(key))?;
        Ok((Some(row.record(key.clone(), host_identity(table), Boottime::now().into())), Woke::Nobody))
    });
    match done {
        Err(Fault::Damaged(what)) => {
            let damaged = damaged_record(&what, Some(key.clone()));
            Ok(Done { value: Some(damaged), woke: Woke::Nobody })
        }
        done => done,
    }
}

/// Takes the next fence, without a grant.
pub fn fence(table: &Table, key: &Key, patience: &mut Patience) -> Result<Done<u64>, Fault> {
    with(table, key, patience, |entry, _| Ok((entry.next_fence()?, Woke::Nobody)))
}

/// A page of a list, and where the next one begins.
pub fn list(
    table: &Table,
    filter: Filter,
    from: table::Cursor,
    patience: &mut Patience,
) -> Result<(Vec<Record>, Option<table::Cursor>), Fault> {
    let mut page = table::Page::default();
    let next = table.list(from, &mut page, patience)?;
    let now = Boottime::now().into();
    let records = page.iter().filter_map(|listed| match listed {
        Listed::Record { hash, key, payload } => {
            // The stored hash must be the key's own: otherwise the record belongs to another key.
            let key = Key::new(key).ok().filter(|key| key.hash().0 == hash);
            let record = match (key, Row::read(payload)) {
                (Some(key), Some(row)) => row.record(key, host_identity(table), now),
                // Its checksum is right, but it is not a record: a process that can write to the file has made it.
                _ => return None,
            };
            (filter == Filter::All || record.lease.expired()).then_some(record)
        }
        // It is not known whether its lease is over.
        Listed::Damaged { .. } if filter == Filter::Expired => None,
        Listed::Damaged { what, hash, body } => {
            let hash = hash.map(KeyHash);
            let key = hash.and_then(|hash| key_in(body, hash).or_else(|| Some(Key::of_hash(hash))));
            Some(damaged_record(&what, key))
        }
    });
    Ok((records.collect(), next))
}

/// The key at the beginning of a damaged record, if it is intact: a prefix with the right hash is the key.
fn key_in(body: &[u8], hash: KeyHash) -> Option<Key> {
    (1..=body.len()).rev().filter_map(|length| Key::new(&body[..length]).ok()).find(|key| key.hash() == hash)
}

fn damaged_error(key: &Key) -> StoreError {
    StoreError::rejected(format!("the record of {} is damaged", key.quoted()))
}

/// A record that stands for a damaged one, which can be broken.
fn damaged_record(what: &Damaged, key: Option<Key>) -> Record {
    let described = match key.as_ref().filter(|key| !key.is_placeholder()) {
        Some(_) => "its contents do not match its checksum",
        None => "its contents do not match its checksum, and its key cannot be read",
    };
    Record {
        key: key.unwrap_or_else(|| Key::of_hash(place_as_hash(what))),
        damaged: Some(described.to_string()),
        lease: Lease::Runs(std::time::Duration::ZERO),
        expires_at_ms: 0,
        owner: None,
        fence: None,
        state: damaged_state(what),
    }
}

/// Stands for a key whose hash is not known either. It is made from the place of the record.
fn place_as_hash(what: &Damaged) -> KeyHash {
    let mut hash = [0; 20];
    for (bytes, number) in hash.chunks_exact_mut(4).zip([what.shard as u32, what.slot as u32, what.link]) {
        bytes.copy_from_slice(&number.to_be_bytes());
    }
    KeyHash(hash)
}

const DAMAGED: &str = "damaged";

/// Identifies a damaged record by its place and a checksum of its contents.
fn damaged_state(what: &Damaged) -> State {
    let Damaged { shard, slot, link, contents } = what;
    let token = format!("{DAMAGED} {shard} {slot} {link} {contents}").into();
    State { holder: Holder::Foreign { token }, ends_at: StoreTime(0) }
}

/// The damaged record that a state identifies, if it was made by [`damaged_state`].
fn damaged_in(state: &State) -> Option<Damaged> {
    let Holder::Foreign { token } = &state.holder else { return None };
    let mut words = token.split(' ');
    (words.next()? == DAMAGED).then_some(())?;
    let mut number = || words.next()?.parse::<u64>().ok();
    let (shard, slot, link, contents) = (number()?, number()?, number()?, number()?);
    Some(Damaged { shard: shard as usize, slot: slot as usize, link: u32::try_from(link).ok()?, contents })
}
