//! Each operation as one ReQL query. A `replace` is applied to its one row atomically.
//!
//! Every query answers `[now, result]`, where now is the server's, in seconds: the clock that decided.

use std::time::Duration;

use serde_json::{Value, json};

use super::row::{REENTRANT_TYPE, TIME_TYPE, field};
use super::term::{
    Term, all, any, array, branch, data, database, function, no, now, null, object, union, var, variable,
};
use super::url::Config;
use crate::key::{Key, KeyHash};
use crate::record::Record;
use crate::store::{Attempt, Claim, Filter, Identity, OwnerToken};
use crate::token::{HoldId, ObjectId, Token};

/// The table of fence counters, beside the table of locks. Nobody deletes from it.
pub const FENCES: &str = "nblock_fences";
/// Its primary key: the number of the bucket.
pub const FENCES_KEY: &str = "bucket";
/// How many counters there are. Keys that share one skip numbers, which fences may.
const BUCKETS: u64 = 4096;

/// One row of a batch of renewals.
pub struct Renewed {
    pub hash: KeyHash,
    pub token: Token,
    pub n: u64,
    pub expire: Duration,
}

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

    /// Creates the row of a new hold, if there is none (R2, its first arm). Answers the row afterwards, or null
    /// beyond `not_after_ms` of the server's clock.
    pub fn create(&self, key: &Key, attempt: &Attempt, not_after_ms: i64) -> Term {
        unless_late(not_after_ms, self.table().insert_telling(fresh(key, attempt), self.durability))
    }

    /// Answers the row afterwards, or null beyond `not_after_ms` of the server's clock.
    ///
    /// NoBrainer's condition (lib/no_brainer/lock.rb: `try_lock`), behind a check of types, since ReQL
    /// compares across them, and before it the arm that makes a repeated request safe (R2).
    pub fn acquire(&self, key: &Key, attempt: &Attempt, not_after_ms: i64) -> Term {
        let row = || variable(var::DOC);
        let Attempt { token, n, expire, .. } = *attempt;
        let fresh = fresh(key, attempt);
        let again = row().merge(object([(field::EXPIRES_AT, now() + seconds(expire)), (field::N, n.into())]));
        let decide = branch([
            row().equals(null()),
            fresh.clone(),
            no_record(row()),
            row(),
            of_hold(row(), token.hold),
            branch([row().field(field::N).or_else(0u64).less_than(n), again, row()]),
            row().field(field::EXPIRES_AT).less_than(now()),
            fresh,
            row(),
        ]);
        unless_late(not_after_ms, self.replace_row(key, decide))
    }

    /// Answers counts: `deleted` is 1 only where our branch deleted.
    pub fn release(&self, key: &Key, claim: Claim) -> Term {
        let row = || variable(var::DOC);
        let ours = match claim {
            Claim::Token(token) => row().field(field::INSTANCE_TOKEN).or_else(null()).equals(token.to_string()),
            Claim::AnyOf(hold) => of_hold(row(), hold),
        };
        self.delete_if(key, ours)
    }

    /// Answers the row afterwards.
    pub fn refresh_one(&self, key: &Key, token: Token, n: u64, expire: Duration) -> Term {
        let row = || variable(var::DOC);
        let ours = row().field(field::INSTANCE_TOKEN).or_else(null()).equals(token.to_string());
        let newer = row().field(field::N).or_else(0u64).less_than(n);
        let renewed = row().merge(object([(field::EXPIRES_AT, now() + seconds(expire)), (field::N, n.into())]));
        answer(self.replace_row(key, branch([all([ours, newer]), renewed, row()])))
    }

    /// Answers `[key_hash, instance_token, n before, n afterwards]` of every row that is there, each key at
    /// most once; and nulls for one that went after it was read.
    pub fn refresh_many(&self, batch: &[Renewed]) -> Term {
        let row = || variable(var::DOC);
        let entry = |index| variable(var::ENTRY).nth(index);
        let ours = row().field(field::INSTANCE_TOKEN).or_else(null()).equals(entry(0));
        let newer = row().field(field::N).or_else(0u64).less_than(entry(1));
        let renewed = row().merge(object([(field::EXPIRES_AT, now() + entry(2)), (field::N, entry(1))]));
        let decide = variable(var::BATCH)
            .field(row().field(field::KEY_HASH))
            .bind(var::ENTRY, branch([all([ours, newer]), renewed, row()]));
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
            .map(|renewed| {
                let entry = json!([renewed.token.to_string(), renewed.n, seconds_of(renewed.expire)]);
                (renewed.hash.base64(), entry)
            })
            .collect();
        let renewed = self
            .table()
            .get_all(variable(var::BATCH).keys())
            .replace_telling(function(var::DOC, decide), self.durability)
            .field("changes")
            .map(function(var::CHANGE, verdict));
        answer(data(&Value::Object(entries)).bind(var::BATCH, renewed))
    }

    /// Answers the row afterwards. Never lowers the lease's end.
    pub fn refresh_reentrant(&self, key: &Key, owner: &OwnerToken, hold: HoldId, expire: Duration) -> Term {
        let row = || variable(var::DOC);
        let ours = all([is_owners(row(), owner), row().field(field::HOLD).or_else(null()).equals(hold.to_string())]);
        let renewed = row().merge(object([(field::EXPIRES_AT, not_earlier(row(), expire))]));
        answer(self.replace_row(key, branch([ours, renewed, row()])))
    }

    /// One `Enter`. Answers the row afterwards, or null beyond `not_after_ms`.
    #[allow(clippy::too_many_arguments)]
    pub fn enter(
        &self,
        key: &Key,
        owner_token: &OwnerToken,
        (object_id, number): (ObjectId, u64),
        hold: Option<HoldId>,
        fresh: HoldId,
        expire: Duration,
        not_after_ms: i64,
        identity: &Identity,
    ) -> Term {
        let row = || variable(var::DOC);
        let created = object([
            (field::KEY_HASH, key.hash().base64().into()),
            (field::KEY, key.as_str().into()),
            (field::INSTANCE_TOKEN, owner_token.0.as_ref().into()),
            (field::EXPIRES_AT, now() + seconds(expire)),
            (field::LOCK_COUNT, 1u64.into()),
            (field::TYPE, REENTRANT_TYPE.into()),
            (field::HOLD, fresh.to_string().into()),
            (field::OPS, operation(object_id, number)),
            (field::OWNER, owner(identity)),
        ]);
        let expired = || row().field(field::EXPIRES_AT).less_than(now());
        let name = || row().field(field::HOLD).or_else(null());
        let goes_on = match hold {
            Some(hold) => any([name().equals(hold.to_string()), name().equals(fresh.to_string())]),
            None => name().equals(fresh.to_string()),
        };
        let last = last_operation(row(), object_id);
        let entered = row().merge(object([
            (field::EXPIRES_AT, not_earlier(row(), expire)),
            (field::LOCK_COUNT, row().field(field::LOCK_COUNT) + 1u64.into()),
            (field::HOLD, row().field(field::HOLD).or_else(fresh.to_string())),
            (field::OPS, operation(object_id, number)),
        ]));
        // Entered by an earlier request of the same number.
        let again = row().merge(object([(field::EXPIRES_AT, not_earlier(row(), expire))]));
        let decide = branch([
            row().equals(null()),
            created.clone(),
            no_record(row()),
            row(),
            all([is_owners(row(), owner_token), any([expired().equals(no()), goes_on])]),
            branch([last.clone().less_than(number), entered, last.equals(number), again, row()]),
            expired(),
            created,
            row(),
        ]);
        unless_late(not_after_ms, self.replace_row(key, decide))
    }

    /// One `Leave`. Answers the row before and afterwards.
    pub fn leave(
        &self,
        key: &Key,
        owner_token: &OwnerToken,
        (object_id, number): (ObjectId, u64),
        hold: Option<HoldId>,
        enter: Option<u64>,
        fresh: HoldId,
    ) -> Term {
        let row = || variable(var::DOC);
        // A hold that NoBrainer made has no name; it gets the one that this step is sent with.
        let name = hold.unwrap_or(fresh).to_string();
        let named = match hold {
            Some(_) => row().field(field::HOLD).or_else(null()).equals(name.clone()),
            None => row().field(field::HOLD).or_else(name.clone()).equals(name.clone()),
        };
        let left = row().merge(object([
            (field::LOCK_COUNT, row().field(field::LOCK_COUNT) + (-1.0).into()),
            (field::HOLD, name.into()),
            (field::OPS, operation(object_id, number)),
        ]));
        let last = last_operation(row(), object_id);
        let counted = match enter {
            Some(enter) => last.equals(enter),
            None => last.less_than(number),
        };
        let applies = all([is_owners(row(), owner_token), named, counted]);
        let decide =
            branch([applies, branch([row().field(field::LOCK_COUNT).greater_than(1u64), left, null()]), row()]);
        answer(self.replace_row(key, decide))
    }

    /// Takes an `Enter` back, or forbids it.
    pub fn undo(&self, key: &Key, owner_token: &OwnerToken, (object_id, number): (ObjectId, u64), enter: u64) -> Term {
        let row = || variable(var::DOC);
        let last = last_operation(row(), object_id);
        let forbidden = object([(field::OPS, operation(object_id, number))]);
        let taken_back = row()
            .merge(forbidden.clone())
            .merge(object([(field::LOCK_COUNT, row().field(field::LOCK_COUNT) + (-1.0).into())]));
        let decide = branch([
            is_owners(row(), owner_token).equals(no()),
            row(),
            last.clone().equals(enter),
            branch([row().field(field::LOCK_COUNT).greater_than(1u64), taken_back, null()]),
            last.less_than(number),
            row().merge(forbidden),
            row(),
        ]);
        answer(self.replace_row(key, decide))
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

    /// Deletes the row if it is in the very state that was seen (R20). Answers counts.
    pub fn break_seen(&self, record: &Record) -> Term {
        let row = || variable(var::DOC);
        let (count, hold) = match &record.reentrant {
            Some(reentrant) => (u64::from(reentrant.count).into(), reentrant.hold.map(|hold| hold.to_string())),
            None => (null(), None),
        };
        let mut as_seen = all([
            row().field(field::INSTANCE_TOKEN).or_else(null()).equals(&*record.seen.token),
            row().field(field::EXPIRES_AT).type_name().or_else(null()).equals(TIME_TYPE),
            row().field(field::EXPIRES_AT).epoch_millis().equals(record.seen.expires_at),
            row().field(field::N).or_else(0u64).equals(record.seen.n),
            row().field(field::LOCK_COUNT).or_else(null()).equals(count),
        ]);
        if record.reentrant.is_some() {
            let hold = hold.map_or_else(null, Term::from);
            as_seen = all([as_seen, row().field(field::HOLD).or_else(null()).equals(hold)]);
        }
        self.delete_if(&record.key, as_seen)
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

    fn replace_row(&self, key: &Key, decide: Term) -> Term {
        self.row(key.hash()).replace_telling(function(var::DOC, decide), self.durability)
    }

    fn delete_if(&self, key: &Key, condition: Term) -> Term {
        let decide = branch([condition, null(), variable(var::DOC)]);
        answer(self.row(key.hash()).replace(function(var::DOC, decide), self.durability))
    }
}

/// The answer of a query: the server's now beside the result.
pub fn answer(result: Term) -> Term {
    array([now().epoch_time(), result])
}

/// The result, or null once the server's clock has passed `not_after_ms`.
fn unless_late(not_after_ms: i64, result: Term) -> Term {
    let late = now().epoch_time().greater_than(not_after_ms as f64 / 1000.0);
    answer(branch([late, null(), result]))
}

/// Seconds, in whole milliseconds, never fewer than the caller asked for.
fn seconds(expire: Duration) -> Term {
    seconds_of(expire).into()
}

fn seconds_of(expire: Duration) -> f64 {
    expire.as_nanos().div_ceil(1_000_000) as f64 / 1000.0
}

fn not_earlier(row: Term, expire: Duration) -> Term {
    let until = || now() + seconds(expire);
    let present = || row.clone().field(field::EXPIRES_AT);
    branch([present().less_than(until()), until(), present()])
}

/// The row of a new hold.
fn fresh(key: &Key, attempt: &Attempt) -> Term {
    object([
        (field::KEY_HASH, key.hash().base64().into()),
        (field::KEY, key.as_str().into()),
        (field::INSTANCE_TOKEN, attempt.token.to_string().into()),
        (field::EXPIRES_AT, now() + seconds(attempt.expire)),
        (field::N, attempt.n.into()),
        (field::OWNER, owner(&attempt.identity)),
    ])
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

/// Whether a row is anything but a lock record.
fn no_record(row: Term) -> Term {
    let is = |name: &str, kind: &str| row.clone().field(name).type_name().or_else(null()).equals(kind);
    all([is(field::EXPIRES_AT, TIME_TYPE), is(field::INSTANCE_TOKEN, "STRING"), is(field::KEY, "STRING")]).equals(no())
}

/// Whether a row carries a token of the hold, whichever attempt's.
fn of_hold(row: Term, hold: HoldId) -> Term {
    let token = row.field(field::INSTANCE_TOKEN).or_else("").coerced_to_text();
    token.split(".").nth(0).or_else("").equals(hold.to_string())
}

/// Whether a row is of a reentrant lock with this owner token.
fn is_owners(row: Term, owner: &OwnerToken) -> Term {
    all([
        row.clone().field(field::INSTANCE_TOKEN).or_else(null()).equals(owner.0.as_ref()),
        row.field(field::LOCK_COUNT).type_name().or_else(null()).equals("NUMBER"),
    ])
}

/// The number of the last step of an object that a row knows of; 0 where it knows of none.
fn last_operation(row: Term, object: ObjectId) -> Term {
    row.field(field::OPS).field(operation_name(object)).or_else(0u64)
}

fn operation(object_id: ObjectId, number: u64) -> Term {
    object([(operation_name(object_id).as_str(), number.into())])
}

/// How an object is called in `ops`.
pub fn operation_name(object: ObjectId) -> String {
    format!("{:016x}", object.0)
}
