//! Each change, and each look, as one ReQL query. A `replace` is applied to its one row atomically.
//!
//! Every query answers `[now, result]`, where now is the server's, in seconds: the clock that decided.

use std::time::Duration;

use serde_json::{Value, json};

use super::row::{REENTRANT_TYPE, TIME_TYPE, entries_value, entry_name, field};
use super::term::{
    Term, all, array, branch, data, database, error, function, function_of, no, now, null, object, union, var, variable,
};
use super::url::Config;
use crate::key::{Key, KeyHash};
use crate::protocol::{Change, Condition, Holder, Lease, NewRecord, PlainRenewal, Proof, Write};
use crate::record::Identity;
use crate::store::{Filter, StoreError};
use crate::token::{HoldId, OwnerToken};

/// The table of fence counters, beside the table of locks. Nobody deletes from it.
pub const FENCES: &str = "nblock_fences";
/// Its primary key: the number of the bucket.
pub const FENCES_KEY: &str = "bucket";
/// How many counters there are. Keys that share one skip numbers, which fences may.
const BUCKETS: u64 = 4096;

/// How the error begins that contains a row which stays as it is. The row follows, as JSON; null where no row exists.
pub const KEPT: &str = "nblock keeps ";

/// Writes queries for one table.
#[derive(Clone)]
pub struct Queries {
    database: String,
    table: String,
    durability: &'static str,
    read_mode: &'static str,
}

impl Queries {
    pub fn new(config: &Config) -> Queries {
        Queries {
            database: config.database.clone(),
            table: config.table.clone(),
            durability: config.durability,
            read_mode: config.read_mode,
        }
    }

    fn table(&self) -> Term {
        database(&self.database).table(&self.table)
    }

    fn table_read(&self) -> Term {
        database(&self.database).table_read(&self.table, self.read_mode)
    }

    fn row(&self, hash: KeyHash) -> Term {
        self.table().get(hash.base64())
    }

    /// Applies a change, as [`crate::protocol::apply`] says. The result is counts and, where the condition does not hold, an
    /// error that contains the row ([`KEPT`]). It becomes a query by [`answer`].
    ///
    /// To ask for the row in every answer (`return_changes`) costs the server more than an error now and then.
    pub fn change(&self, key: &Key, change: &Change) -> Result<Term, StoreError> {
        let kept = |row: Term| error(Term::from(KEPT) + row.json_text());
        let row = || variable(var::DOC);
        Ok(match (&change.condition, &change.write) {
            // Creating a row costs the server a good deal less than a function that is applied to it.
            (Condition::Absent, Write::Put(new)) => {
                let conflict = function_of([var::KEY, var::DOC, var::CHANGE], kept(row()));
                self.table().insert(fresh(key, new)?, conflict, self.durability)
            }
            (Condition::Absent, _) => return Err(StoreError::rejected("only a new record has no record before it")),
            (condition, write) => {
                // What it asks for is missing where there is no row, or no lock record. One default for all of it: each
                // that is taken is an exception on the server, which costs it as much as thirty terms.
                let applies = all([is_record(row()), holds(condition, write)?]).or_else(no());
                let decide = branch([applies, written(key, condition, write)?, kept(row())]);
                self.row(key.hash()).replace(function(var::DOC, decide), self.durability)
            }
        })
    }

    /// Answers `[key_hash, instance_token, n before, n afterwards]` of every row that is there, each key at
    /// most once; and nulls for one that went after it was read.
    pub fn extend_many(&self, batch: &[(KeyHash, PlainRenewal)]) -> Term {
        let row = || variable(var::DOC);
        let entry = |index| variable(var::ENTRY).nth(index);
        let ours = row().field(field::INSTANCE_TOKEN).equals(entry(0));
        let newer = row().field(field::N).or_else(0u64).less_than(entry(1));
        let applies = all([ours, is_plain(row()), newer]).or_else(no());
        let renewed = row().merge(object([(field::EXPIRES_AT, now() + entry(2)), (field::N, entry(1))]));
        let decide = variable(var::BATCH)
            .field(row().field(field::KEY_HASH))
            .bind(var::ENTRY, branch([applies, renewed, row()]));
        let after = || variable(var::CHANGE).field("new_val");
        let before = || variable(var::CHANGE).field("old_val");
        let verdict = array([
            after().field(field::KEY_HASH).or_else(null()),
            after().field(field::INSTANCE_TOKEN).or_else(null()),
            before().field(field::N).or_else(0u64),
            after().field(field::N).or_else(0u64),
        ]);
        let entries: serde_json::Map<String, Value> = batch
            .iter()
            .map(|(hash, PlainRenewal { token, write_seq, expire })| {
                (hash.base64(), json!([token.to_string(), write_seq, seconds_of(*expire)]))
            })
            .collect();
        let renewed = self
            .table()
            .get_all(variable(var::BATCH).keys())
            .replace_telling(function(var::DOC, decide), self.durability)
            .field("changes")
            // Where none of them is there, it says nothing.
            .or_else(array([]))
            .map(function(var::CHANGE, verdict));
        answer(data(&Value::Object(entries)).bind(var::BATCH, renewed))
    }

    /// Answers the row, or null.
    pub fn find(&self, key: &Key) -> Term {
        answer(self.table_read().get(key.hash().base64()))
    }

    /// A stream of rows, with the server's now, as a number, among them.
    pub fn list(&self, filter: Filter) -> Term {
        let row = || variable(var::DOC);
        let rows = match filter {
            Filter::All => self.table_read(),
            Filter::Expired => {
                let expires_at = || row().field(field::EXPIRES_AT);
                let expired = all([expires_at().type_name().equals(TIME_TYPE), expires_at().less_than(now())]);
                self.table_read().filter(function(var::DOC, expired))
            }
        };
        union(array([now().epoch_time()]), rows)
    }

    /// The next number of the key's counter; a counter that is new starts at the clock's milliseconds,
    /// which no older one has reached (R18). Answers the counter's row afterwards.
    pub fn fence(&self, key: &Key) -> Term {
        let row = || variable(var::DOC);
        let bucket = key.hash().bits() % BUCKETS;
        let counter = object([
            (FENCES_KEY, bucket.into()),
            ("fence", branch([row().equals(null()), now().epoch_millis(), row().field("fence") + 1u64.into()])),
        ]);
        let fences = database(&self.database).table(FENCES).get(bucket);
        answer(fences.replace_telling(function(var::DOC, counter), "hard").field("changes").nth(0).field("new_val"))
    }

    /// A read of a row that is never there: whether the table can be read.
    pub fn ping(&self) -> Term {
        answer(self.table_read().get(""))
    }

    /// Changes of the key's row, the present one first.
    pub fn changes(&self, key: &Key) -> Term {
        self.row(key.hash()).changes()
    }
}

/// The answer of a query: the server's now beside the result.
pub fn answer(result: Term) -> Term {
    array([now().epoch_time(), result])
}

/// The result, or null once the server's clock has passed `not_after_ms`.
pub fn unless_late(not_after_ms: i64, result: Term) -> Term {
    let late = now().epoch_time().greater_than(not_after_ms as f64 / 1000.0);
    branch([late, null(), result])
}

/// Seconds, in whole milliseconds, never fewer than the caller asked for.
fn seconds(expire: Duration) -> Term {
    seconds_of(expire).into()
}

fn seconds_of(expire: Duration) -> f64 {
    expire.as_nanos().div_ceil(1_000_000) as f64 / 1000.0
}

/// The condition of a change, on a lock record. Where something that it asks for is missing, it does not hold.
///
/// ReQL compares across types, by their names: what is ordered is checked first.
fn holds(condition: &Condition, write: &Write) -> Result<Term, StoreError> {
    let row = || variable(var::DOC);
    Ok(match condition {
        Condition::Absent => no(),
        Condition::Seen { state, over } => {
            let as_seen = all([
                // What is counted in milliseconds is compared in milliseconds.
                row().field(field::EXPIRES_AT).epoch_millis().equals(state.ends_at.0 / 1_000_000),
                has_holder(&state.holder),
            ]);
            match over {
                true => all([as_seen, row().field(field::EXPIRES_AT).less_than(now())]),
                false => as_seen,
            }
        }
        Condition::Mine(proof) => {
            let ours = match proof {
                Proof::Token(token) => all([has_token(&token.to_string()), is_plain(row())]),
                Proof::Hold(hold) => all([of_hold(row(), *hold), is_plain(row())]),
                Proof::Owner { owner, hold } => all([is_owners(row(), owner), has_hold(*hold)]),
                Proof::Object { owner, hold, object } => {
                    let entry = row().field(field::ENTRIES).field(entry_name(*object));
                    let has_entry = entry.field(field::N).type_name().equals("NUMBER");
                    all([is_owners(row(), owner), has_hold(Some(*hold)), has_entry])
                }
            };
            match write {
                Write::Extend { write_seq: Some(write_seq), .. }
                    if matches!(proof, Proof::Token(_) | Proof::Hold(_)) =>
                {
                    all([ours, row().field(field::N).or_else(0u64).less_than(*write_seq)])
                }
                Write::Entry { object: Some(object), write_seq, may_add, .. } => {
                    // An object without an entry: below every number, or above.
                    let absent: f64 = if *may_add { -1.0 } else { MOST };
                    let last = row().field(field::ENTRIES).field(entry_name(*object)).field(field::N);
                    all([ours, last.or_else(absent).less_than(*write_seq)])
                }
                _ => ours,
            }
        }
    })
}

/// Above every number that is counted with.
const MOST: f64 = (1u64 << 53) as f64;

/// Whether the row says of its holder what the state does.
fn has_holder(holder: &Holder) -> Term {
    let row = || variable(var::DOC);
    match holder {
        Holder::Plain { token, write_seq } => all([
            has_token(&token.to_string()),
            is_plain(row()),
            row().field(field::N).or_else(0u64).equals(*write_seq),
        ]),
        Holder::Foreign { token } => all([has_token(token), is_plain(row())]),
        Holder::Reentrant { owner, hold, count, entries } => all([
            is_owners(row(), owner),
            has_hold(*hold),
            row().field(field::LOCK_COUNT).equals(u64::from(*count)),
            row().field(field::ENTRIES).or_else(data(&json!({}))).equals(data(&entries_value(entries))),
        ]),
    }
}

fn has_token(token: &str) -> Term {
    variable(var::DOC).field(field::INSTANCE_TOKEN).equals(token)
}

fn has_hold(hold: Option<HoldId>) -> Term {
    let row = variable(var::DOC);
    match hold {
        Some(hold) => row.field(field::HOLD).equals(hold.to_string()),
        None => row.has_field(field::HOLD).equals(no()),
    }
}

/// What is written, on a row that fulfils the condition.
fn written(key: &Key, condition: &Condition, write: &Write) -> Result<Term, StoreError> {
    let row = || variable(var::DOC);
    Ok(match write {
        Write::Put(new) => fresh(key, new)?,
        Write::Delete => null(),
        Write::Extend { lease, write_seq } => {
            let extended = row().merge(object([(field::EXPIRES_AT, end(*lease))]));
            match (write_seq, condition) {
                // The number is the record's own only where one hold has it.
                (Some(write_seq), Condition::Mine(Proof::Token(_) | Proof::Hold(_))) => {
                    extended.merge(object([(field::N, (*write_seq).into())]))
                }
                _ => extended,
            }
        }
        Write::Entry { object: Some(object_id), count, write_seq, lease, name, .. } => {
            let entry = entry_name(*object_id);
            let before = row().field(field::ENTRIES).field(entry.clone()).field("count").or_else(0u64);
            let total = row().field(field::LOCK_COUNT) + u64::from(*count).into() + before * (-1.0).into();
            let kept = changed_entry(*lease, *name);
            let kept = match count {
                0 => kept.without(json!({ (field::ENTRIES): { entry.as_str(): true } })),
                _ => {
                    let set = json!({ entry.as_str(): { "count": count, "n": write_seq } });
                    kept.merge(object([(field::ENTRIES, data(&set))]))
                }
            };
            counted(total, kept)
        }
        Write::Entry { object: None, count, lease, name, .. } => {
            // What the entries count stands in the state that was seen.
            let Condition::Seen { state, .. } = condition else {
                return Err(StoreError::rejected("counts beyond the entries are changed only as they were read"));
            };
            let Holder::Reentrant { entries, .. } = &state.holder else { return Ok(row()) };
            let in_entries: u64 = entries.iter().map(|entry| u64::from(entry.count)).sum();
            counted((in_entries + u64::from(*count)).into(), changed_entry(*lease, *name))
        }
    })
}

/// The row of a reentrant lock with its count, which goes with the last one.
fn counted(total: Term, row: Term) -> Term {
    let total_name = || variable(var::ENTRY);
    let kept = row.merge(object([(field::LOCK_COUNT, total_name())]));
    total.bind(var::ENTRY, branch([total_name().less_than(1u64), null(), kept]))
}

/// The row with its lease and, where it has no name yet, its hold's name.
fn changed_entry(lease: Lease, name: Option<HoldId>) -> Term {
    let row = || variable(var::DOC);
    let row_with_lease = match lease {
        Lease::AsStored => row(),
        _ => row().merge(object([(field::EXPIRES_AT, end(lease))])),
    };
    match name {
        Some(name) => row_with_lease.merge(object([(field::HOLD, row().field(field::HOLD).or_else(name.to_string()))])),
        None => row_with_lease,
    }
}

/// The end of a lease.
fn end(lease: Lease) -> Term {
    let stored = || variable(var::DOC).field(field::EXPIRES_AT);
    match lease {
        Lease::FromNow(expire) => now() + seconds(expire),
        Lease::NotSooner(expire) => {
            let until = || now() + seconds(expire);
            branch([stored().less_than(until()), until(), stored()])
        }
        Lease::AsStored => stored(),
    }
}

/// The row of a new record.
fn fresh(key: &Key, new: &NewRecord) -> Result<Term, StoreError> {
    let common = [
        (field::KEY_HASH, key.hash().base64().into()),
        (field::KEY, key.as_str().into()),
        (field::EXPIRES_AT, now() + seconds(new.expire)),
        (field::OWNER, owner(&new.identity)),
    ];
    Ok(match &new.holder {
        Holder::Plain { token, write_seq } => {
            object(common).with([(field::INSTANCE_TOKEN, token.to_string().into()), (field::N, (*write_seq).into())])
        }
        Holder::Reentrant { owner, hold, count, entries } => object(common).with([
            (field::INSTANCE_TOKEN, owner.0.as_ref().into()),
            (field::LOCK_COUNT, u64::from(*count).into()),
            (field::TYPE, REENTRANT_TYPE.into()),
            (field::HOLD, hold.map_or_else(null, |hold| hold.to_string().into())),
            (field::ENTRIES, data(&entries_value(entries))),
        ]),
        Holder::Foreign { .. } => return Err(StoreError::rejected("another library's record is not ours to make")),
    })
}

fn owner(identity: &Identity) -> Term {
    object([
        ("host", identity.host.as_str().into()),
        ("pid", u64::from(identity.pid).into()),
        ("boot_id", identity.boot_id.as_str().into()),
        ("app", identity.app.as_str().into()),
        ("acquired_at", now()),
    ])
}

/// Whether a row is a lock record, apart from its token: each condition asks for that of a string.
fn is_record(row: Term) -> Term {
    let is = |name: &str, kind: &str| row.clone().field(name).type_name().equals(kind);
    all([is(field::EXPIRES_AT, TIME_TYPE), is(field::KEY, "STRING")])
}

/// Whether a row is of a reentrant lock.
fn is_reentrant(row: Term) -> Term {
    row.field(field::LOCK_COUNT).type_name().equals("NUMBER")
}

/// Whether a row is not of a reentrant lock. Most have no count, and to look for it costs less than to miss it.
fn is_plain(row: Term) -> Term {
    all([row.clone().has_field(field::LOCK_COUNT), is_reentrant(row)]).equals(no())
}

/// Whether a row carries a token of the hold, whichever attempt's.
fn of_hold(row: Term, hold: HoldId) -> Term {
    let token = || row.clone().field(field::INSTANCE_TOKEN);
    all([token().type_name().equals("STRING"), token().split(".").nth(0).equals(hold.to_string())])
}

/// Whether a row is of a reentrant lock with this owner token.
fn is_owners(row: Term, owner: &OwnerToken) -> Term {
    all([row.clone().field(field::INSTANCE_TOKEN).equals(owner.0.as_ref()), is_reentrant(row)])
}
