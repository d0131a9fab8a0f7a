//! The row of a record, as NoBrainer writes and reads it, and what stands in it beside.

use serde_json::Value;

use crate::clock;
use crate::key::{Excerpt, Key};
use crate::protocol::{Entry, Holder, State, StoreTime};
use crate::record::{Lease, Owner, Record};
use crate::store::StoreError;
use crate::token::{HoldId, ObjectId, OwnerToken, Token};

/// Names of fields. The first four are NoBrainer's `Lock` (lib/no_brainer/lock.rb), the next two its
/// `ReentrantLock` (lib/no_brainer/reentrant_lock.rb, document/polymorphic.rb), the rest are ours.
pub mod field {
    /// The primary key: base64 of the SHA-1 of the key.
    pub const KEY_HASH: &str = "key_hash";
    pub const KEY: &str = "key";
    pub const INSTANCE_TOKEN: &str = "instance_token";
    pub const EXPIRES_AT: &str = "expires_at";
    pub const LOCK_COUNT: &str = "lock_count";
    /// The class of a row that is not of the root class. Plain locks have none.
    pub const TYPE: &str = "_type";
    pub const OWNER: &str = "owner";
    pub const N: &str = "n";
    pub const HOLD: &str = "hold";
    /// An object for each lock object that is in a reentrant hold: its count, and the number of its write.
    pub const ENTRIES: &str = "entries";
}

/// What NoBrainer writes into `_type` of a reentrant lock's row.
pub const REENTRANT_TYPE: &str = "NoBrainer::ReentrantLock";

/// How ReQL names the type of a time (RethinkDB src/rdb_protocol/datum.cc: `get_type_name`).
pub const TIME_TYPE: &str = "PTYPE<TIME>";

/// A row that was found to be a lock record.
#[derive(Clone, Debug, PartialEq)]
pub struct Row {
    pub key: String,
    /// Its times are of the servers' clock, which counts milliseconds.
    pub state: State,
    pub owner: Option<Owner>,
}

impl Row {
    /// Reads a row. A row that is no lock record is an error that names it, never a grant.
    pub fn read(row: &Value) -> Result<Row, StoreError> {
        let text = |name: &str| row.get(name).and_then(Value::as_str);
        let missing = |name: &str, kind: &str| {
            let shown = match (text(field::KEY), text(field::KEY_HASH)) {
                (Some(key), _) => format!("{:?}", Excerpt(key)),
                (None, Some(hash)) => format!("key_hash {:?}", Excerpt(hash)),
                (None, None) => "without a key".to_string(),
            };
            StoreError::rejected(format!("the row of {shown} is not a lock record: its {name} is not {kind}"))
        };
        let key = text(field::KEY).ok_or_else(|| missing(field::KEY, "a string"))?;
        let token = text(field::INSTANCE_TOKEN).ok_or_else(|| missing(field::INSTANCE_TOKEN, "a string"))?;
        let expires_at_ms =
            row.get(field::EXPIRES_AT).and_then(time_ms).ok_or_else(|| missing(field::EXPIRES_AT, "a time"))?;
        let count = row.get(field::LOCK_COUNT).filter(|count| count.is_number());
        let holder = match (count, Token::parse(token)) {
            (Some(count), _) => Holder::Reentrant {
                owner: OwnerToken(token.into()),
                hold: text(field::HOLD).and_then(HoldId::parse),
                count: whole(count).map_or(u32::MAX, |count| u32::try_from(count).unwrap_or(u32::MAX)),
                entries: row.get(field::ENTRIES).map(entries).unwrap_or_default(),
            },
            (None, Some(token)) => Holder::Plain { token, write_seq: row.get(field::N).and_then(whole).unwrap_or(0) },
            (None, None) => Holder::Foreign { token: token.into() },
        };
        Ok(Row {
            key: key.to_string(),
            state: State { holder, ends_at: moment(expires_at_ms) },
            owner: row.get(field::OWNER).and_then(owner),
        })
    }

    /// The record, as it stood when the server's clock showed `now_ms`.
    pub fn record(self, now_ms: u64) -> Result<Record, StoreError> {
        let key = Key::new(self.key.as_bytes()).map_err(|error| StoreError::rejected(error.message()))?;
        let lease = Lease::at(self.state.ends_at, moment(now_ms));
        Ok(Record {
            key,
            damaged: None,
            lease,
            expires_at_ms: self.state.ends_at.0 / 1_000_000,
            owner: self.owner,
            fence: None,
            state: self.state,
        })
    }
}

/// A moment of the servers' clock.
pub fn moment(ms: u64) -> StoreTime {
    StoreTime(ms.saturating_mul(1_000_000))
}

/// How an object is called in `entries`.
pub fn entry_name(object: ObjectId) -> String {
    format!("{:016x}", object.0)
}

/// Entries as they are stored.
pub fn entries_value(entries: &[Entry]) -> Value {
    let entries = entries
        .iter()
        .map(|entry| (entry_name(entry.object), serde_json::json!({ "count": entry.count, "n": entry.write_seq })));
    Value::Object(entries.collect())
}

/// Entries, where they are as we write them. What others put there is theirs.
fn entries(value: &Value) -> Vec<Entry> {
    let Some(fields) = value.as_object() else { return Vec::new() };
    let entry = |(name, entry): (&String, &Value)| {
        Some(Entry {
            object: ObjectId(u64::from_str_radix(name, 16).ok()?),
            count: u32::try_from(whole(entry.get("count")?)?).ok()?,
            write_seq: whole(entry.get("n")?)?,
        })
    };
    fields.iter().filter_map(entry).collect()
}

/// A time as the server writes it (RethinkDB src/rdb_protocol/pseudo_time.cc), in milliseconds.
fn time_ms(value: &Value) -> Option<u64> {
    if value.get("$reql_type$")?.as_str()? != "TIME" {
        return None;
    }
    Some(seconds_to_ms(value.get("epoch_time")?.as_f64()?))
}

/// Milliseconds of a server's seconds. What lies before 1970 is 1970.
pub fn seconds_to_ms(seconds: f64) -> u64 {
    (seconds * 1000.0).round() as u64
}

/// A number that counts something. The server's numbers are all floating.
pub fn whole(value: &Value) -> Option<u64> {
    let number = value.as_f64()?;
    (number >= 0.0 && number.fract() == 0.0 && number <= (1u64 << 53) as f64).then_some(number as u64)
}

/// Who holds it, where it says so as we write it. What others put there is theirs.
fn owner(value: &Value) -> Option<Owner> {
    let text = |name: &str| value.get(name).and_then(Value::as_str).map(str::to_string);
    Some(Owner {
        host: text("host")?,
        pid: u32::try_from(whole(value.get("pid")?)?).ok()?,
        boot_id: text("boot_id")?,
        app: text("app")?,
        acquired_at_ms: value.get("acquired_at").and_then(time_ms).unwrap_or_else(clock::wall_millis),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stores::rethinkdb::testing::Random;
    use serde_json::json;

    fn row() -> Value {
        json!({
            "key_hash": "h", "key": "jobs", "instance_token": "t", "n": 3,
            "expires_at": { "$reql_type$": "TIME", "epoch_time": 1_700_000_000.123, "timezone": "+00:00" },
            "owner": { "host": "a", "pid": 7, "boot_id": "b", "app": "c",
                       "acquired_at": { "$reql_type$": "TIME", "epoch_time": 1.5, "timezone": "+00:00" } },
        })
    }

    #[test]
    fn reads_what_nobrainer_and_we_write() {
        let read = Row::read(&row()).unwrap();
        assert_eq!(read.state.ends_at, moment(1_700_000_000_123));
        assert!(read.state.holder == Holder::Foreign { token: "t".into() });
        assert_eq!(read.owner.unwrap().acquired_at_ms, 1500);
        let token = Token { hold: HoldId::random(), attempt: 2 };
        let mut ours = row();
        ours["instance_token"] = json!(token.to_string());
        assert!(Row::read(&ours).unwrap().state.holder == Holder::Plain { token, write_seq: 3 });
        let mut nobrainers = row();
        let fields = nobrainers.as_object_mut().unwrap();
        fields.remove("owner");
        fields.remove("n");
        fields.insert("lock_count".into(), json!(2.0));
        fields.insert("_type".into(), json!(REENTRANT_TYPE));
        let read = Row::read(&nobrainers).unwrap();
        let holder = Holder::Reentrant { owner: OwnerToken("t".into()), hold: None, count: 2, entries: Vec::new() };
        assert!(read.owner.is_none() && read.state.holder == holder);
    }

    #[test]
    fn what_is_no_lock_record_is_named() {
        let wrong = [json!(null), json!(1), json!("2026-01-01"), json!({ "epoch_time": 5 }), json!([])];
        for name in ["expires_at", "instance_token", "key"] {
            for value in &wrong {
                if name != "expires_at" && value.is_string() {
                    continue;
                }
                let mut bad = row();
                bad[name] = value.clone();
                let error = Row::read(&bad).unwrap_err();
                assert!(error.message.contains(name), "{error}");
                assert!(error.message.contains(if name == "key" { "\"h\"" } else { "\"jobs\"" }), "{error}");
            }
        }
    }

    #[test]
    fn random_rows_never_panic() {
        let mut random = Random::seeded();
        let values = [json!(null), json!(-1), json!(1e300), json!(true), json!("x"), json!({}), json!([1]), row()];
        let names = ["key", "instance_token", "expires_at", "n", "owner", "lock_count", "hold", "key_hash"];
        for _ in 0..2000 {
            let mut changed = row();
            for _ in 0..=random.below(3) {
                changed[names[random.below(names.len())]] = values[random.below(values.len())].clone();
            }
            if let Ok(row) = Row::read(&changed) {
                let _ = row.record(random.next());
            }
        }
    }
}
