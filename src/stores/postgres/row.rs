//! The row of a record, as it is read.

use serde_json::Value;
use tokio_postgres::Row as PgRow;
use tokio_postgres::types::{FromSql, Type};

use crate::key::{Excerpt, Key};
use crate::protocol::{Entry, Holder, State, StoreTime};
use crate::record::{Lease, Owner, Record};
use crate::store::StoreError;
use crate::token::{HoldId, ObjectId, OwnerToken, Token};

/// The columns that a record is read from, in the order of [`read`].
pub const COLUMNS: [&str; 14] = [
    "key_hash",
    "key",
    "token",
    "write_seq",
    "ends_at",
    "fence",
    "lock_count",
    "hold",
    "entries",
    "owner_host",
    "owner_pid",
    "owner_boot_id",
    "owner_app",
    "acquired_at",
];

/// Seconds from 1970 to 2000, which PostgreSQL's clock counts from.
const EPOCH_SECONDS: i64 = 946_684_800;

/// A moment as the server sends it: microseconds since 2000.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Moment(pub i64);

impl Moment {
    /// `infinity`.
    pub const NEVER: Moment = Moment(i64::MAX);

    /// The moment as the protocol counts; `None` before 1970 and where that counts no further, in 2554.
    pub fn store_time(self) -> Option<StoreTime> {
        if self == Moment::NEVER {
            return Some(StoreTime::NEVER);
        }
        let micros = u64::try_from(self.0.checked_add(EPOCH_SECONDS * 1_000_000)?).ok()?;
        micros.checked_mul(1000).map(StoreTime)
    }

    pub fn of(moment: StoreTime) -> Moment {
        match moment {
            StoreTime::NEVER => Moment::NEVER,
            // At most 2^64 / 1000.
            StoreTime(nanos) => Moment((nanos / 1000) as i64 - EPOCH_SECONDS * 1_000_000),
        }
    }

    /// So many milliseconds after 1970.
    pub fn from_millis(ms: i64) -> Moment {
        Moment(ms.saturating_mul(1000).saturating_sub(EPOCH_SECONDS * 1_000_000))
    }

    /// Milliseconds since 1970; nothing before.
    pub fn millis(self) -> u64 {
        u64::try_from(self.0.saturating_add(EPOCH_SECONDS * 1_000_000) / 1000).unwrap_or(0)
    }
}

impl<'a> FromSql<'a> for Moment {
    fn from_sql(_: &Type, raw: &'a [u8]) -> Result<Moment, Box<dyn std::error::Error + Sync + Send>> {
        Ok(Moment(i64::from_be_bytes(raw.try_into()?)))
    }

    fn accepts(ty: &Type) -> bool {
        *ty == Type::TIMESTAMPTZ
    }
}

/// Reads the record of `key`, or of any key, from the columns that begin at `first`; `None` where there is no row,
/// or one that nobody holds. What is no lock record is an error that names it, never a grant.
pub fn read(row: &PgRow, first: usize, key: Option<&Key>, now: Moment) -> Result<Option<Record>, StoreError> {
    let wrong = |column: usize, why: &str| {
        let name = COLUMNS[column];
        let shown = match (key, row.try_get::<_, Option<&[u8]>>(first + 1)) {
            (Some(key), _) => key.quoted().to_string(),
            (None, Ok(Some(key))) => format!("{:?}", Excerpt(&String::from_utf8_lossy(key))),
            (None, _) => "a key".to_string(),
        };
        StoreError::rejected(format!("the row of {shown} is not a lock record: its {name} {why}"))
    };
    /// A column of its type.
    macro_rules! get {
        ($column:expr, $type:ty) => {
            row.try_get::<_, $type>(first + $column).map_err(|error| wrong($column, &reason(&error)))
        };
    }
    if get!(0, Option<&[u8]>)?.is_none() {
        return Ok(None);
    }
    // Also of a free row: nothing is granted by a clock of another kind.
    let ends_at = get!(4, Option<Moment>)?.ok_or_else(|| wrong(4, "is null"))?;
    let Some(token) = get!(2, Option<&[u8]>)? else { return Ok(None) };
    let present = get!(1, Option<&[u8]>)?.ok_or_else(|| wrong(1, "is null"))?;
    let found = match key {
        Some(key) if key.as_str().as_bytes() == present => key.clone(),
        Some(_) => return Err(wrong(1, "is another key, which does not match key_hash")),
        None => Key::new(present).map_err(|error| wrong(1, error.message()))?,
    };
    let ends_at = ends_at.store_time().ok_or_else(|| wrong(4, "is before 1970 or after 2554"))?;
    let token = std::str::from_utf8(token).map_err(|_| wrong(2, "is not UTF-8"))?;
    let write_seq = get!(3, Option<i64>)?.and_then(|number| u64::try_from(number).ok()).unwrap_or(0);
    let holder = match (get!(6, Option<i64>)?, Token::parse(token)) {
        (Some(count), _) => Holder::Reentrant {
            owner: OwnerToken(token.into()),
            hold: get!(7, Option<&str>)?.and_then(HoldId::parse),
            count: u32::try_from(count).unwrap_or(if count < 0 { 0 } else { u32::MAX }),
            entries: entries(get!(8, Option<&str>)?),
        },
        (None, Some(token)) => Holder::Plain { token, write_seq },
        (None, None) => Holder::Foreign { token: token.into() },
    };
    let now = now.store_time().ok_or_else(|| StoreError::unknown("the server's clock is before 1970"))?;
    let (host, pid) = (get!(9, Option<&str>)?, get!(10, Option<i64>)?);
    let (boot_id, app) = (get!(11, Option<&str>)?, get!(12, Option<&str>)?);
    let owner = match (host, pid.and_then(|pid| u32::try_from(pid).ok()), boot_id, app) {
        (Some(host), Some(pid), Some(boot_id), Some(app)) => Some(Owner {
            host: host.to_string(),
            pid,
            boot_id: boot_id.to_string(),
            app: app.to_string(),
            acquired_at_ms: get!(13, Option<Moment>)?.map_or(0, Moment::millis),
        }),
        _ => None,
    };
    let fence = get!(5, Option<i64>)?.and_then(|fence| u64::try_from(fence).ok());
    Ok(Some(Record {
        damaged: None,
        key: found,
        lease: Lease::at(ends_at, now),
        expires_at_ms: if ends_at == StoreTime::NEVER { u64::MAX } else { ends_at.0 / 1_000_000 },
        owner,
        fence,
        state: State { holder, ends_at },
    }))
}

/// What the driver says of a column.
fn reason(error: &tokio_postgres::Error) -> String {
    let source = std::error::Error::source(error);
    format!("cannot be read: {}", source.map_or_else(|| error.to_string(), ToString::to_string))
}

/// How an object is called in `entries`.
pub fn entry_name(object: ObjectId) -> String {
    format!("{:016x}", object.0)
}

/// Entries as they are stored.
pub fn entries_text(entries: &[Entry]) -> String {
    let entries = entries
        .iter()
        .map(|entry| (entry_name(entry.object), serde_json::json!({ "count": entry.count, "n": entry.write_seq })));
    Value::Object(entries.collect()).to_string()
}

/// Entries, where they are as we write them. What others put there is theirs.
fn entries(text: Option<&str>) -> Vec<Entry> {
    let Some(Ok(Value::Object(fields))) = text.map(serde_json::from_str) else { return Vec::new() };
    let entry = |(name, entry): (&String, &Value)| {
        Some(Entry {
            object: ObjectId(u64::from_str_radix(name, 16).ok()?),
            count: u32::try_from(entry.get("count")?.as_u64()?).ok()?,
            write_seq: entry.get("n")?.as_u64()?,
        })
    };
    fields.iter().filter_map(entry).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments_there_and_back() {
        for moment in [Moment(0), Moment(-EPOCH_SECONDS * 1_000_000), Moment(1_234_567_890_123_456), Moment::NEVER] {
            assert_eq!(Moment::of(moment.store_time().unwrap()), moment);
        }
        for moment in [Moment(i64::MIN), Moment(-EPOCH_SECONDS * 1_000_000 - 1), Moment(i64::MAX - 1)] {
            assert_eq!(moment.store_time(), None, "{moment:?}");
        }
        assert_eq!(Moment::from_millis(EPOCH_SECONDS * 1000), Moment(0));
        assert_eq!(Moment(0).millis(), EPOCH_SECONDS as u64 * 1000);
        assert_eq!(Moment(i64::MIN).millis(), 0);
    }

    #[test]
    fn entries_there_and_back() {
        let all = [
            Entry { object: ObjectId(1), count: 2, write_seq: 3 },
            Entry { object: ObjectId(u64::MAX), count: u32::MAX, write_seq: u64::MAX >> 1 },
        ];
        assert_eq!(entries(Some(&entries_text(&all))), all);
        for text in ["", "[]", "null", "{\"x\": 1}", "{\"1\": {\"count\": -1, \"n\": 1}}", "{\"1\": {\"count\": 1}}"] {
            assert_eq!(entries(Some(text)), [], "{text}");
        }
        assert_eq!(entries(None), []);
    }
}
