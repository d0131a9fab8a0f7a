//! Each change, and each look, as SQL. A change is one statement on its one row.
//!
//! The clock stands in the expressions of the UPDATE itself: they are evaluated with the row's lock held, and again
//! where the row was changed meanwhile. `now()` would stand still from the beginning of the transaction, and what
//! stands in an INSERT's values is evaluated before the lock. A wait behind somebody who locked the row and did not
//! change it evaluates nothing again. `lock_timeout` bounds such a wait, but several may follow each other: a statement
//! with a moment after which it takes nothing checks that moment once more in its RETURNING, which is evaluated last,
//! and fails where it has passed.
//!
//! A row whose token is null is free. It stays, and keeps its fence; what belongs to reentrant holds is null then.

use std::error::Error as StdError;
use std::fmt::Write as _;
use std::time::Duration;

use tokio_postgres::types::private::BytesMut;
use tokio_postgres::types::{IsNull, ToSql, Type, to_sql_checked};

use super::channel::channel;
use super::row::{COLUMNS, Moment, entries_text, entry_name};
use super::url::Config;
use crate::clock::Boottime;
use crate::key::{Key, KeyHash};
use crate::protocol::{Change, Condition, Holder, Lease, NewRecord, PlainRenewal, Proof, Write};
use crate::store::{Filter, StoreError};
use crate::token::ObjectId;

/// How many rows one part of a list has.
pub const PAGE: usize = 500;

/// A statement and what is put in for its `$1`, `$2` and so on.
#[derive(Clone, Debug, Default)]
pub struct Statement {
    pub sql: String,
    pub values: Vec<Value>,
    /// Whether it is sent again and again, with other values.
    pub recurs: bool,
}

#[derive(Clone)]
pub enum Value {
    Bytes(Vec<u8>),
    Text(Option<String>),
    Number(i64),
    Moment(Moment),
    /// A moment of ours, which becomes one of the server's when the statement is sent.
    Deadline(Boottime),
    ManyBytes(Vec<Vec<u8>>),
    ManyNumbers(Vec<i64>),
}

/// A token proves a hold: it never gets into a log by accident.
impl std::fmt::Debug for Value {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Value(..)")
    }
}

impl Value {
    pub fn sql_type(&self) -> Type {
        match self {
            Value::Bytes(_) => Type::BYTEA,
            Value::Text(_) => Type::TEXT,
            Value::Number(_) => Type::INT8,
            Value::Moment(_) | Value::Deadline(_) => Type::TIMESTAMPTZ,
            Value::ManyBytes(_) => Type::BYTEA_ARRAY,
            Value::ManyNumbers(_) => Type::INT8_ARRAY,
        }
    }
}

impl ToSql for Value {
    fn to_sql(&self, ty: &Type, out: &mut BytesMut) -> Result<IsNull, Box<dyn StdError + Sync + Send>> {
        match self {
            Value::Bytes(bytes) => bytes.as_slice().to_sql(ty, out),
            Value::Text(text) => text.to_sql(ty, out),
            // A moment is sent as a number is.
            Value::Number(number) | Value::Moment(Moment(number)) => number.to_sql(ty, out),
            Value::Deadline(_) => Err("a moment of ours was sent as it was".into()),
            Value::ManyBytes(many) => many.to_sql(ty, out),
            Value::ManyNumbers(many) => many.to_sql(ty, out),
        }
    }

    fn accepts(_: &Type) -> bool {
        true
    }

    to_sql_checked!();
}

impl Statement {
    /// Puts a value in: how the statement calls it.
    fn put(&mut self, value: Value) -> String {
        self.values.push(value);
        format!("${}", self.values.len())
    }

    fn bytes(&mut self, bytes: impl AsRef<[u8]>) -> String {
        self.put(Value::Bytes(bytes.as_ref().to_vec()))
    }

    fn number(&mut self, number: u64) -> String {
        self.put(Value::Number(number_of(number)))
    }
}

fn number_of(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

/// Writes statements for one table.
#[derive(Clone)]
pub struct Statements {
    /// As it stands in SQL, schema and all.
    pub table: String,
    /// What sets the longest wait for a row's lock, for this statement alone.
    lock_timeout: String,
    soft: bool,
    notify: bool,
}

/// The server's microseconds since 1970, or one more than the last: it grows also over a row that was deleted, and
/// over a failover that forgot the last ones.
const NEXT_FENCE: &str = "greatest(fence + 1, (extract(epoch FROM clock_timestamp()) * 1000000)::bigint)";
const FIRST_FENCE: &str = "(extract(epoch FROM clock_timestamp()) * 1000000)::bigint";

/// By the number of the type, which costs the server less than its name.
const IS_TIMESTAMPTZ: &str = "pg_typeof(held.ends_at)::oid = 1184";

impl Statements {
    pub fn new(config: &Config) -> Statements {
        let ms = config.lock_timeout().as_millis();
        Statements {
            table: config.table.to_string(),
            lock_timeout: format!("set_config('lock_timeout', '{ms}', true)"),
            soft: config.soft,
            notify: config.notify,
        }
    }

    /// A condition that is always true, and makes the settings when a row is looked at, before it is locked. Set for
    /// the transaction alone, they pass poolers. `synced`: whether the answer waits for the disk.
    fn settings(&self, synced: bool) -> String {
        let lock_timeout = &self.lock_timeout;
        match synced && !self.soft {
            true => format!("{lock_timeout} IS NOT NULL"),
            false => format!("{lock_timeout} || set_config('synchronous_commit', 'off', true) IS NOT NULL"),
        }
    }

    /// Applies a change to a row that is there, as [`crate::protocol::apply`] says. Answers a row where it was
    /// applied: now, the fence, whether the record went, and whether its lease ends sooner.
    pub fn change(&self, key: &Key, change: &Change) -> Result<Statement, StoreError> {
        let mut statement = Statement::default();
        let hash = statement.bytes(key.hash().0);
        let condition = holds(&mut statement, &change.condition, &change.write)?;
        let (late, last_check) = match change.not_after {
            Some(not_after) => {
                let not_after = statement.put(Value::Deadline(not_after));
                (format!(" AND clock_timestamp() <= {not_after}"), last_check(&not_after))
            }
            None => Default::default(),
        };
        let set = written(&mut statement, &change.condition, &change.write)?;
        let removes =
            matches!(change.write, Write::Delete) || matches!(change.write, Write::Entry { count, .. } if count == 0);
        // A release that is forgotten costs a wait, and never makes two holders.
        let settings = self.settings(!removes);
        let sooner = match &change.write {
            Write::Extend { lease: Lease::FromNow(_), .. } | Write::Entry { lease: Lease::FromNow(_), .. } => {
                "before.ends_at > held.ends_at"
            }
            _ => "false",
        };
        let (from, joined) = match sooner {
            "false" => (String::new(), ""),
            _ => (format!(" FROM {} AS before", self.table), " AND before.key_hash = held.key_hash"),
        };
        // Within the release, whose commit does not wait for the disk: a notification takes one lock for the whole
        // server until its commit.
        let notified = match change.write {
            Write::Delete if self.notify => {
                let channel = statement.put(Value::Text(Some(channel(key.hash()))));
                format!(", pg_notify({channel}, '')")
            }
            _ => String::new(),
        };
        statement.sql = format!(
            "UPDATE {table} AS held SET {set}{from} WHERE held.key_hash = {hash}{joined} AND {condition}{late} AND {settings} \
             RETURNING clock_timestamp(), held.fence, held.token IS NULL, {sooner}{last_check}{notified}",
            table = self.table,
        );
        statement.recurs = matches!(
            (&change.condition, &change.write),
            (Condition::Absent, Write::Put(_))
                | (Condition::Mine(Proof::Token(_)), Write::Delete | Write::Extend { .. })
        );
        Ok(statement)
    }

    /// Makes the row of a key that has none, for a grant of what is absent. Answers always, with the columns of
    /// [`look`](Statements::look) before the fence, which is null where the row was not made.
    pub fn make(&self, key: &Key, new: &NewRecord, not_after: Option<Boottime>) -> Statement {
        let mut statement = Statement::default();
        let hash = statement.bytes(key.hash().0);
        let name = statement.bytes(key.as_str());
        let not_after = not_after.map(|not_after| statement.put(Value::Deadline(not_after)));
        let late = not_after.as_ref().map_or(String::new(), |moment| format!("clock_timestamp() <= {moment} AND "));
        let fields = fresh(&mut statement, new);
        let names: Vec<&str> = fields.iter().map(|(name, _)| *name).collect();
        let values: Vec<&str> = fields.iter().map(|(_, value)| value.as_str()).collect();
        statement.sql = format!(
            "WITH made AS (INSERT INTO {table} AS held (key_hash, key, fence, {names}) \
             SELECT {hash}, {name}, {FIRST_FENCE}, {values} WHERE {late}{settings} \
             ON CONFLICT (key_hash) DO NOTHING RETURNING fence{last_check}) \
             SELECT clock_timestamp(), {is_late}, {columns}, made.fence \
             FROM (SELECT 1) AS one LEFT JOIN made ON true LEFT JOIN {table} AS held ON held.key_hash = {hash}",
            table = self.table,
            names = names.join(", "),
            values = values.join(", "),
            settings = self.settings(true),
            last_check = not_after.as_deref().map(last_check).unwrap_or_default(),
            is_late = is_late(not_after.as_deref()),
            columns = columns(),
        );
        statement
    }

    /// Answers now, whether that is after `not_after`, and the columns of the row, which are null where there is
    /// none.
    pub fn look(&self, key: &Key, not_after: Option<Boottime>) -> Statement {
        let mut statement = Statement::default();
        let hash = statement.bytes(key.hash().0);
        let not_after = not_after.map(|not_after| statement.put(Value::Deadline(not_after)));
        statement.sql = format!(
            "SELECT clock_timestamp(), {is_late}, {columns} \
             FROM (SELECT 1) AS one LEFT JOIN {table} AS held ON held.key_hash = {hash}",
            is_late = is_late(not_after.as_deref()),
            columns = columns(),
            table = self.table,
        );
        statement
    }

    /// Renews rows that are there, each by its key, token and number. Answers those that were renewed: now, the
    /// key's hash, the fence, and whether the lease ends sooner.
    ///
    /// A row that another session has locked is left out: the others are not to wait for it.
    pub fn extend_many(&self, batch: &[(KeyHash, PlainRenewal)]) -> Statement {
        let mut statement = Statement::default();
        let hashes = statement.put(Value::ManyBytes(batch.iter().map(|(hash, _)| hash.0.to_vec()).collect()));
        let tokens = statement
            .put(Value::ManyBytes(batch.iter().map(|(_, renewal)| renewal.token.to_string().into_bytes()).collect()));
        let numbers =
            statement.put(Value::ManyNumbers(batch.iter().map(|(_, renewal)| number_of(renewal.write_seq)).collect()));
        let expires =
            statement.put(Value::ManyNumbers(batch.iter().map(|(_, renewal)| micros(renewal.expire)).collect()));
        statement.sql = format!(
            "WITH free AS (SELECT key_hash FROM {table} WHERE key_hash = ANY({hashes}) AND token = ANY({tokens}) \
             FOR NO KEY UPDATE SKIP LOCKED) \
             UPDATE {table} AS held SET write_seq = asked.write_seq, \
             ends_at = clock_timestamp() + asked.expire * interval '1 microsecond' \
             FROM unnest({hashes}, {tokens}, {numbers}, {expires}) AS asked (key_hash, token, write_seq, expire), \
             {table} AS before, free \
             WHERE held.key_hash = asked.key_hash AND free.key_hash = asked.key_hash AND before.key_hash = asked.key_hash \
             AND held.token = asked.token AND held.lock_count IS NULL AND held.write_seq < asked.write_seq \
             AND (SELECT {settings}) \
             RETURNING clock_timestamp(), held.key_hash, held.fence, before.ends_at > held.ends_at",
            table = self.table,
            settings = self.settings(true),
        );
        statement
    }

    /// Answers the rows of these keys that are there and held: now, and the columns.
    pub fn look_at_many(&self, hashes: Vec<KeyHash>) -> Statement {
        let mut statement = Statement::default();
        let hashes = statement.put(Value::ManyBytes(hashes.into_iter().map(|hash| hash.0.to_vec()).collect()));
        statement.sql = format!(
            "SELECT clock_timestamp(), {columns} FROM {table} AS held \
             WHERE held.key_hash = ANY({hashes}) AND held.token IS NOT NULL",
            columns = columns(),
            table = self.table,
        );
        statement
    }

    /// One part of a list, after this hash: now, and the columns, in the order of the hashes.
    pub fn list(&self, filter: Filter, after: &[u8]) -> Statement {
        let mut statement = Statement::default();
        let after = statement.bytes(after);
        let over = match filter {
            Filter::All => "",
            Filter::Expired => " AND held.ends_at < clock_timestamp()",
        };
        statement.sql = format!(
            "SELECT clock_timestamp(), {columns} FROM {table} AS held \
             WHERE held.key_hash > {after} AND held.token IS NOT NULL{over} ORDER BY held.key_hash LIMIT {PAGE}",
            columns = columns(),
            table = self.table,
        );
        statement
    }

    /// Draws a fence that is larger than all before it. Answers now and the fence.
    pub fn fence(&self, key: &Key) -> Statement {
        let mut statement = Statement::default();
        let hash = statement.bytes(key.hash().0);
        let name = statement.bytes(key.as_str());
        statement.sql = format!(
            "INSERT INTO {table} AS held (key_hash, key, ends_at, fence) \
             SELECT {hash}, {name}, 'epoch', {FIRST_FENCE} WHERE {settings} \
             ON CONFLICT (key_hash) DO UPDATE SET fence = {next} RETURNING clock_timestamp(), fence",
            table = self.table,
            next = NEXT_FENCE.replace("fence +", "held.fence +"),
            settings = self.settings(true),
        );
        statement
    }

    /// Whether the table can be read and written. Answers now.
    pub fn ping(&self) -> Statement {
        let mut statement = Statement::default();
        let columns = columns();
        statement.sql = format!(
            "SELECT clock_timestamp(), (SELECT count(*) FROM (SELECT {columns} FROM {} AS held LIMIT 0) AS none)",
            self.table
        );
        statement
    }

    /// Tells those who listen to a channel. It takes one lock for the whole server until its commit, which must
    /// not wait for the disk.
    pub fn notify(&self, channel: &str) -> Statement {
        let mut statement = Statement::default();
        let channel = statement.put(Value::Text(Some(channel.to_string())));
        statement.sql = format!(
            "SELECT pg_notify({channel}, '') FROM (SELECT set_config('synchronous_commit', 'off', true)) AS done"
        );
        statement
    }
}

fn columns() -> String {
    let mut columns = String::new();
    for name in COLUMNS {
        let separator = if columns.is_empty() { "" } else { ", " };
        // The server's text of it is what is read.
        let cast = if name == "entries" { "::text" } else { "" };
        let _ = write!(columns, "{separator}held.{name}{cast}");
    }
    columns
}

fn is_late(not_after: Option<&str>) -> String {
    not_after.map_or("false".to_string(), |moment| format!("clock_timestamp() > {moment}"))
}

/// One more column of a RETURNING: a division by zero, which undoes the statement, where the moment has passed.
fn last_check(not_after: &str) -> String {
    format!(", 1 / (clock_timestamp() <= {not_after})::int")
}

/// Whole microseconds, never fewer than the caller asked for.
fn micros(expire: Duration) -> i64 {
    i64::try_from(expire.as_nanos().div_ceil(1000)).unwrap_or(i64::MAX)
}

/// So long from now, by the clock at the moment of the write.
fn from_now(statement: &mut Statement, expire: Duration) -> String {
    let expire = statement.put(Value::Number(micros(expire)));
    format!("clock_timestamp() + {expire} * interval '1 microsecond'")
}

/// The end of a lease.
fn end(statement: &mut Statement, lease: Lease) -> String {
    match lease {
        Lease::FromNow(expire) => from_now(statement, expire),
        Lease::NotSooner(expire) => format!("greatest(held.ends_at, {})", from_now(statement, expire)),
        Lease::AsStored => "held.ends_at".to_string(),
    }
}

/// The condition of a change, on a row that is there. What is null makes it false.
fn holds(statement: &mut Statement, condition: &Condition, write: &Write) -> Result<String, StoreError> {
    let mut all = match condition {
        // The clock's type is asked for where nothing else compares with it: a lease must not end by another zone's.
        Condition::Absent if matches!(write, Write::Put(_)) => {
            format!("held.token IS NULL AND {IS_TIMESTAMPTZ}")
        }
        Condition::Absent => return Err(StoreError::rejected("only a new record has no record before it")),
        Condition::Seen { state, over } => {
            let ends_at = statement.put(Value::Moment(Moment::of(state.ends_at)));
            let holder = has_holder(statement, &state.holder);
            let over = if *over { " AND held.ends_at < clock_timestamp()" } else { "" };
            format!("held.ends_at = {ends_at} AND {IS_TIMESTAMPTZ} AND {holder}{over}")
        }
        Condition::Mine(Proof::Token(token)) => is_plain(statement, token.to_string()),
        Condition::Mine(Proof::Hold(hold)) => {
            let prefix = statement.bytes(format!("{hold}."));
            format!("substr(held.token, 1, length({prefix})) = {prefix} AND held.lock_count IS NULL")
        }
        Condition::Mine(Proof::Owner { owner, hold }) => {
            let owner = statement.bytes(&*owner.0);
            let hold = statement.put(Value::Text(hold.map(|hold| hold.to_string())));
            format!("held.token = {owner} AND held.lock_count IS NOT NULL AND held.hold IS NOT DISTINCT FROM {hold}")
        }
        Condition::Mine(Proof::Object { owner, hold, object }) => {
            let owner = statement.bytes(&*owner.0);
            let hold = statement.put(Value::Text(Some(hold.to_string())));
            let entry = entry(statement, *object);
            format!(
                "held.token = {owner} AND held.lock_count IS NOT NULL AND held.hold = {hold} AND {entry} IS NOT NULL"
            )
        }
    };
    match (condition, write) {
        (Condition::Mine(Proof::Token(_) | Proof::Hold(_)), Write::Extend { write_seq: Some(write_seq), .. }) => {
            let write_seq = statement.number(*write_seq);
            let _ = write!(all, " AND held.write_seq < {write_seq}");
        }
        (_, Write::Entry { object, write_seq, may_add, .. }) => {
            all.push_str(" AND held.lock_count IS NOT NULL");
            if let (Condition::Mine(_), Some(object)) = (condition, object) {
                // An object without an entry: below every number, or above.
                let absent = if *may_add { -1 } else { i64::MAX };
                let (entry, write_seq) = (entry(statement, *object), statement.number(*write_seq));
                let _ = write!(all, " AND coalesce(({entry}->>'n')::bigint, {absent}) < {write_seq}");
            }
        }
        _ => {}
    }
    Ok(all)
}

/// An object's entry, or null.
fn entry(statement: &mut Statement, object: ObjectId) -> String {
    let name = statement.put(Value::Text(Some(entry_name(object))));
    format!("(held.entries->{name})")
}

fn is_plain(statement: &mut Statement, token: String) -> String {
    let token = statement.bytes(token);
    format!("held.token = {token} AND held.lock_count IS NULL")
}

/// Whether the row says of its holder what the state does.
fn has_holder(statement: &mut Statement, holder: &Holder) -> String {
    match holder {
        Holder::Plain { token, write_seq } => {
            let plain = is_plain(statement, token.to_string());
            let write_seq = statement.number(*write_seq);
            format!("{plain} AND held.write_seq = {write_seq}")
        }
        Holder::Foreign { token } => is_plain(statement, token.to_string()),
        Holder::Reentrant { owner, hold, count, entries } => {
            let owner = statement.bytes(&*owner.0);
            let hold = statement.put(Value::Text(hold.map(|hold| hold.to_string())));
            let count = statement.number(u64::from(*count));
            let entries = statement.put(Value::Text(Some(entries_text(entries))));
            format!(
                "held.token = {owner} AND held.lock_count = {count} AND held.hold IS NOT DISTINCT FROM {hold} \
                 AND coalesce(held.entries, '{{}}') = {entries}::jsonb"
            )
        }
    }
}

/// What is written, on a row that fulfils the condition.
fn written(statement: &mut Statement, condition: &Condition, write: &Write) -> Result<String, StoreError> {
    Ok(match write {
        Write::Put(new) => {
            let fields = fresh(statement, new);
            let fields: Vec<String> = fields.iter().map(|(name, value)| format!("{name} = {value}")).collect();
            format!("fence = {}, {}", NEXT_FENCE.replace("fence +", "held.fence +"), fields.join(", "))
        }
        // The last holder stays, for people to read. A plain hold has nothing else.
        Write::Delete => match condition {
            Condition::Mine(Proof::Token(_) | Proof::Hold(_)) => "token = NULL".to_string(),
            _ => "token = NULL, lock_count = NULL, hold = NULL, entries = NULL".to_string(),
        },
        Write::Extend { lease, write_seq } => {
            let ends_at = end(statement, *lease);
            match write_seq {
                Some(write_seq) => {
                    let write_seq = statement.number(*write_seq);
                    // The number is the record's own only where one hold has it.
                    format!(
                        "ends_at = {ends_at}, \
                         write_seq = CASE WHEN held.lock_count IS NULL THEN {write_seq} ELSE held.write_seq END"
                    )
                }
                None => format!("ends_at = {ends_at}"),
            }
        }
        Write::Entry { object: Some(object), count, write_seq, lease, name, .. } => {
            let ends_at = end(statement, *lease);
            let entry = entry(statement, *object);
            let object = statement.put(Value::Text(Some(entry_name(*object))));
            let given = statement.number(u64::from(*count));
            // The stored count decides, and not the entries.
            let total = format!("held.lock_count + {given} - coalesce(({entry}->>'count')::bigint, 0)");
            let entries = match count {
                0 => format!("held.entries - {object}"),
                _ => {
                    let write_seq = statement.number(*write_seq);
                    format!(
                        "coalesce(held.entries, '{{}}') \
                         || jsonb_build_object({object}, jsonb_build_object('count', {given}, 'n', {write_seq}))"
                    )
                }
            };
            let name = statement.put(Value::Text(name.map(|name| name.to_string())));
            let kept = |value: &str| format!("CASE WHEN {total} < 1 THEN NULL ELSE {value} END");
            format!(
                "token = {token}, lock_count = {left}, hold = {hold}, entries = {entries}, ends_at = {ends_at}",
                token = kept("held.token"),
                left = kept(&format!("least({total}, {})", u32::MAX)),
                hold = kept(&format!("coalesce(held.hold, {name})")),
                entries = kept(&entries),
            )
        }
        Write::Entry { object: None, count, lease, name, .. } => {
            // What the entries count, and what is beyond them, stands in the state that was seen.
            let Condition::Seen { state, .. } = condition else {
                return Err(StoreError::rejected("counts beyond the entries are changed only as they were read"));
            };
            let Holder::Reentrant { count: total, entries, .. } = &state.holder else {
                // The condition is false of what is not reentrant.
                return Ok("token = held.token".to_string());
            };
            let counted: u64 = entries.iter().map(|entry| u64::from(entry.count)).sum();
            let before = u64::from(*total).saturating_sub(counted);
            let after = (u64::from(*total) + u64::from(*count)).saturating_sub(before).min(u64::from(u32::MAX));
            if after == 0 {
                return written(statement, condition, &Write::Delete);
            }
            let (after, ends_at) = (statement.number(after), end(statement, *lease));
            let name = statement.put(Value::Text(name.map(|name| name.to_string())));
            format!("lock_count = {after}, hold = coalesce(held.hold, {name}), ends_at = {ends_at}")
        }
    })
}

/// The fields of a new record, but for its key and fence.
fn fresh(statement: &mut Statement, new: &NewRecord) -> Vec<(&'static str, String)> {
    let (token, write_seq, reentrant) = match &new.holder {
        Holder::Plain { token, write_seq } => (token.to_string(), *write_seq, None),
        Holder::Foreign { token } => (token.to_string(), 0, None),
        Holder::Reentrant { owner, hold, count, entries } => {
            (owner.0.to_string(), 0, Some((*hold, *count, entries_text(entries))))
        }
    };
    let mut fields = vec![
        ("token", statement.bytes(token)),
        ("write_seq", statement.number(write_seq)),
        ("ends_at", from_now(statement, new.expire)),
    ];
    match reentrant {
        None => fields.extend(["lock_count", "hold", "entries"].map(|name| (name, "NULL".to_string()))),
        Some((hold, count, entries)) => {
            fields.push(("lock_count", statement.number(u64::from(count))));
            fields.push(("hold", statement.put(Value::Text(hold.map(|hold| hold.to_string())))));
            fields.push(("entries", format!("{}::jsonb", statement.put(Value::Text(Some(entries))))));
        }
    }
    // PostgreSQL's texts have no NUL.
    let mut text = |text: &str| statement.put(Value::Text(Some(text.replace('\0', "\u{fffd}"))));
    let (host, boot_id, app) = (text(&new.identity.host), text(&new.identity.boot_id), text(&new.identity.app));
    fields.extend([("owner_host", host), ("owner_boot_id", boot_id), ("owner_app", app)]);
    fields.push(("owner_pid", statement.number(u64::from(new.identity.pid))));
    fields.push(("acquired_at", "clock_timestamp()".to_string()));
    fields
}
