//! The operations of the store: a query each, and what its answer means.

use std::collections::HashMap;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use serde_json::Value;

use super::caveats::Caveats;
use super::connection::{self, Answered, Body};
use super::ddl::Named;
use super::feed::FeedWatch;
use super::queries::{FENCES, FENCES_KEY, KEPT, Queries, answer, unless_late};
use super::reply::{self, Failure, ServerAnswer};
use super::row::{Row, field, seconds_to_ms, whole};
use super::servers::{Link, Servers, TimedReply};
use super::tables::{self, Tables};
use super::url::Config;
use crate::clock::Boottime;
use crate::key::Key;
use crate::protocol::{Change, Holder, Reply, State, StoreTime, Write};
use crate::record::{self, Identity, Record};
use crate::store::{
    Answer, ClockSteps, Cursor, Filter, Page, Pong, Readiness, Store, StoreError, StoreErrorKind, Watch,
};
use crate::stores::network::contention::Contention;
use crate::stores::network::skew::Offset;
use crate::sys::runtime;
use crate::token::Token;

/// How often a waiter looks without a notification (R10).
const SAFETY_CHECK: Duration = Duration::from_secs(5);

/// The most rows, and bytes of keys, that one query renews. The server answers below its limit of
/// 100,000 elements (RethinkDB src/rdb_protocol/configured_limits.hpp), and keeps the rows in memory.
const MOST_ROWS: usize = 1000;
const MOST_KEY_BYTES: usize = 4 << 20;

pub struct RethinkStore {
    core: Arc<Core>,
}

/// What operations under way keep alive.
struct Core {
    link: Arc<Link>,
    queries: Queries,
    tables: Arc<Tables>,
    locks: Named,
    fences: Named,
    caveats: Arc<Caveats>,
    contention: Contention,
}

impl RethinkStore {
    pub fn new(config: Config) -> RethinkStore {
        let table = |table: &str, primary_key| Named::Table {
            database: config.database.clone(),
            table: table.to_string(),
            primary_key,
        };
        RethinkStore {
            core: Arc::new(Core {
                queries: Queries::new(&config),
                locks: table(&config.table, field::KEY_HASH),
                fences: table(FENCES, FENCES_KEY),
                tables: Arc::default(),
                caveats: Arc::default(),
                contention: Contention::default(),
                link: Link::new(Servers::new(config)),
            }),
        }
    }

    /// Sends a query on a table, which is made if it is missing.
    fn ask_on<T: 'static>(
        &self,
        table: &Named,
        body: Body,
        read: impl FnOnce(TimedReply) -> Result<T, StoreError> + Send + 'static,
    ) -> Answer<T> {
        let asking = self.core.asking(table, body);
        Answer::later(async move { read(asking.await?) })
    }
}

impl Core {
    /// Sends a query, at once; and again when what it needs was missing and has been made.
    fn asking(
        self: &Arc<Core>,
        table: &Named,
        body: Body,
    ) -> impl Future<Output = Result<TimedReply, StoreError>> + Send + use<> {
        let sent_at = Boottime::now();
        let mut asked = self.link.ask(Arc::clone(&body));
        let (core, table) = (Arc::clone(self), table.clone());
        async move {
            // The database, then the table; and each may be there twice for a moment.
            for _ in 0..4 {
                match asked.await.map_err(Failure::from).and_then(|answered| core.timed(answered, &table)) {
                    Ok(timed) => {
                        core.caveats.warn_once(&core.link);
                        return Ok(timed);
                    }
                    Err(failure) => core.make_what_is_missing(failure, &table, sent_at).await?,
                }
                asked = core.link.ask(Arc::clone(&body));
            }
            match asked.await.map_err(Failure::from).and_then(|answered| core.timed(answered, &table)) {
                Ok(timed) => Ok(timed),
                Err(Failure::Store(error)) => Err(error),
                Err(Failure::NoTable(message) | Failure::NoDatabase(message) | Failure::Ambiguous(message)) => {
                    Err(StoreError::unreachable(message))
                }
            }
        }
    }

    async fn make_what_is_missing(
        &self,
        failure: Failure,
        table: &Named,
        missing_at: Boottime,
    ) -> Result<(), StoreError> {
        let config = &self.link.engine.config;
        let missing = match failure {
            Failure::Store(error) => return Err(error),
            Failure::NoTable(_) => table.clone(),
            // Somebody makes it, too; it is used when it is alone.
            Failure::Ambiguous(message) if message.starts_with("Database") => Named::Database(config.database.clone()),
            Failure::Ambiguous(_) => table.clone(),
            Failure::NoDatabase(_) => {
                let database = Named::Database(config.database.clone());
                if !config.create {
                    return Err(tables::missing(&database));
                }
                database
            }
        };
        // In a task of its own: begun, it is done, even where the operation is given up.
        let making = tables::make(Arc::clone(&self.tables), Arc::clone(&self.link), missing, missing_at);
        let handle = runtime::handle().map_err(|error| StoreError::resources(error.message()))?;
        handle.spawn(making).await.unwrap_or_else(|_| Err(StoreError::unreachable("the library stopped")))
    }

    /// Sends a change, at once.
    fn changing(
        self: &Arc<Core>,
        key: &Key,
        change: &Change,
    ) -> Result<impl Future<Output = Result<TimedReply, StoreError>> + Send + use<>, StoreError> {
        let result = self.queries.change(key, change)?;
        let body: Body = match change.not_after {
            None => {
                let body = answer(result).start();
                Arc::new(move |_| body.clone())
            }
            // By the clock of the server that is asked, which a repeated request may find changed.
            Some(not_after) => {
                Arc::new(move |offset: &Offset| answer(unless_late(offset.deadline(not_after), result.clone())).start())
            }
        };
        Ok(self.asking(&self.locks, body))
    }

    /// The result of a change.
    fn changed(&self, timed: TimedReply, key: &Key, change: &Change) -> Result<Reply, StoreError> {
        if timed.result.is_null() {
            return Ok(Reply::TooLate);
        }
        let nonsense = || StoreError::unknown("the server's reply does not say what happened to the row");
        if let Some(kept) = kept(&timed.result) {
            let row: Value = serde_json::from_str(kept).map_err(|_| nonsense())?;
            let record = if row.is_null() { None } else { Some(Row::read(&row)?.record(timed.now_ms)?) };
            if let (Some(record), Write::Put(new)) = (&record, &change.write) {
                self.note_contention(key, record, &new.identity);
            }
            return Ok(Reply::Found(record.map(Box::new)));
        }
        no_errors(&timed.result, key)?;
        let count = |name| timed.result.get(name).and_then(whole).unwrap_or(0);
        match ["inserted", "replaced", "unchanged", "deleted"].map(count).iter().sum() {
            1 => Ok(Reply::Applied { fence: None }),
            _ => Err(nonsense()),
        }
    }

    /// Another process was seen to have the lock.
    fn note_contention(&self, key: &Key, record: &Record, us: &Identity) {
        if record.owner.as_ref().is_none_or(|owner| owner.pid != us.pid || owner.boot_id != us.boot_id) {
            self.contention.seen(key.hash());
        }
    }

    /// No table, no locks: looking does not make one. Opening a client does, and so does locking.
    fn nothing_where_there_is_no_table(&self, failure: Failure) -> Result<(), StoreError> {
        match failure {
            Failure::NoTable(_) => Ok(()),
            Failure::Ambiguous(message) => Err(StoreError::unreachable(message)),
            Failure::NoDatabase(_) => Err(tables::missing(&Named::Database(self.link.engine.config.database.clone()))),
            Failure::Store(error) => Err(error),
        }
    }

    /// What a query on a table was answered with. The server's words for a permission that is missing do not name
    /// the table.
    fn timed(&self, answered: Answered, table: &Named) -> Result<TimedReply, Failure> {
        self.link.timed(answered).map_err(|failure| self.naming_the_table(failure, table))
    }

    fn naming_the_table(&self, failure: Failure, table: &Named) -> Failure {
        match failure {
            Failure::Store(error) if error.kind == StoreErrorKind::Denied => {
                let (shown, said) = (table.shown(), error.message.trim_end_matches('.'));
                let grant = table.grant(&self.link.engine.config.user);
                StoreError::new(error.kind, format!("{shown}: {said}. To grant it: {grant}")).into()
            }
            failure => failure,
        }
    }
}

impl Store for RethinkStore {
    fn change(&self, key: &Key, change: Change) -> Answer<Reply> {
        match self.core.changing(key, &change) {
            Ok(asked) => {
                let (core, key) = (Arc::clone(&self.core), key.clone());
                Answer::later(async move { core.changed(asked.await?, &key, &change) })
            }
            Err(error) => Answer::Now(Err(error)),
        }
    }

    fn change_many(&self, changes: Vec<(Key, Change)>) -> Answer<Vec<Result<Reply, StoreError>>> {
        let parts = parts(&changes);
        let asked: Vec<_> = parts.iter().map(|part| self.change_part(part, &changes)).collect();
        let again = RethinkStore { core: Arc::clone(&self.core) };
        Answer::later(async move {
            let mut replies: Vec<Option<Result<Reply, StoreError>>> = changes.iter().map(|_| None).collect();
            let mut missing = Vec::new();
            for (part, asked) in parts.into_iter().zip(asked) {
                match asked.await {
                    Ok(found) => {
                        for (index, reply) in found {
                            replies[index] = Some(Ok(reply));
                        }
                        missing.extend(part.into_iter().filter(|index| replies[*index].is_none()));
                    }
                    Err(error) => {
                        for index in part {
                            replies[index] = Some(Err(error.clone()));
                        }
                    }
                }
            }
            // A read may have missed a row; only a write knows for sure that it is gone.
            let asked: Vec<_> = missing.iter().map(|index| again.change_part(&[*index], &changes)).collect();
            for (index, asked) in missing.into_iter().zip(asked) {
                let reply =
                    asked.await.map(|found| found.into_iter().next().map_or(Reply::Found(None), |(_, reply)| reply));
                replies[index] = Some(reply);
            }
            Ok(replies.into_iter().map(|reply| reply.unwrap_or(Ok(Reply::Found(None)))).collect())
        })
    }

    fn find(&self, key: &Key) -> Answer<Option<Record>> {
        let body = self.core.queries.find(key).start();
        let asked = self.core.link.ask(Arc::new(move |_| body.clone()));
        let core = Arc::clone(&self.core);
        Answer::later(async move {
            match asked.await.map_err(Failure::from).and_then(|answered| core.timed(answered, &core.locks)) {
                Ok(TimedReply { result: Value::Null, .. }) => Ok(None),
                Ok(timed) => Row::read(&timed.result)?.record(timed.now_ms).map(Some),
                Err(failure) => core.nothing_where_there_is_no_table(failure).map(|()| None),
            }
        })
    }

    fn list(&self, filter: Filter, _from: Option<Cursor>) -> Answer<Page> {
        let body = self.core.queries.list(filter).start();
        let asked = self.core.link.ask(Arc::new(move |_| body.clone()));
        let core = Arc::clone(&self.core);
        Answer::later(async move {
            match all_items(asked.await?).await.map_err(|failure| core.naming_the_table(failure, &core.locks)) {
                // The server sends the list in parts by itself.
                Ok(items) => Ok(Page { records: records(items)?, next: None }),
                Err(failure) => core.nothing_where_there_is_no_table(failure).map(|()| Page::default()),
            }
        })
    }

    fn fence(&self, key: &Key) -> Answer<u64> {
        let body = self.core.queries.fence(key).start();
        self.ask_on(&self.core.fences, Arc::new(move |_| body.clone()), |timed| {
            timed.result.get("fence").and_then(whole).ok_or_else(|| {
                StoreError::rejected(format!("a row of the table {FENCES} is not a fence counter: {}", timed.result))
            })
        })
    }

    fn watch(&self, key: &Key) -> Box<dyn Watch> {
        Box::new(FeedWatch::new(&self.core.link, &self.core.queries, key))
    }

    fn prepare(&self) -> Answer<Readiness> {
        let body = self.core.queries.ping().start();
        let asking = self.core.asking(&self.core.locks, Arc::new(move |_| body.clone()));
        let core = Arc::clone(&self.core);
        Answer::later(async move {
            match asking.await {
                Ok(_) => Ok(Readiness::Ready),
                Err(error) if sees_no_primary(&error) => {
                    let why = format!("{}: {}", core.locks.shown(), error.message);
                    Ok(Readiness::NotYet(StoreError::unreachable(why)))
                }
                Err(error) => Err(error),
            }
        })
    }

    fn ping(&self) -> Answer<Pong> {
        let body = self.core.queries.ping().start();
        let asked = self.core.link.ask(Arc::new(move |_| body.clone()));
        let core = Arc::clone(&self.core);
        Answer::later(async move {
            let answered = asked.await?;
            let info = answered.connection.clone();
            if let Err(failure) = core.timed(answered, &core.locks) {
                core.nothing_where_there_is_no_table(failure)?;
            }
            Ok(Pong {
                server: format!("RethinkDB {} at {} ({})", info.version, info.host, info.name),
                skew_ms: core.link.engine.clocks.ahead_of_ours(&info.id),
                caveats: core.caveats.recent(&core.link).await,
            })
        })
    }

    fn location(&self) -> String {
        self.core.link.engine.config.to_string()
    }

    fn margin(&self, expire: Duration) -> Duration {
        self.core.link.engine.clocks.margin(expire)
    }

    fn clock_steps(&self) -> Option<&Arc<ClockSteps>> {
        Some(&self.core.link.engine.clocks.steps)
    }

    fn safety_check(&self, _waited: Duration) -> Duration {
        SAFETY_CHECK
    }

    fn awaited_elsewhere(&self, key: &Key) -> bool {
        self.core.contention.likely(key.hash())
    }
}

type Part = Vec<usize>;
type Asked = Pin<Box<dyn Future<Output = Result<Vec<(usize, Reply)>, StoreError>> + Send>>;

impl RethinkStore {
    /// Applies one part of a batch. What it says nothing about, it has not found.
    fn change_part(&self, part: &[usize], changes: &[(Key, Change)]) -> Asked {
        if let [index] = *part {
            let (key, change) = &changes[index];
            let asked = self.change(key, change.clone());
            return Box::pin(async move { Ok(vec![(index, asked.get().await?)]) });
        }
        let mut entries = Vec::with_capacity(part.len());
        let mut by_hash = HashMap::with_capacity(part.len());
        for &index in part {
            let (key, change) = &changes[index];
            if let Some(renewal) = change.as_plain_renewal() {
                by_hash.insert(key.hash().base64(), (index, key.clone(), renewal));
                entries.push((key.hash(), renewal));
            }
        }
        let body = self.core.queries.extend_many(&entries).start();
        let asked = self.core.asking(&self.core.locks, Arc::new(move |_| body.clone()));
        Box::pin(async move {
            let timed = asked.await.map_err(|error| match error.kind {
                // Some rows may have been written before others failed.
                StoreErrorKind::Unreachable => StoreError::unknown(error.message),
                _ => error,
            })?;
            let rows = timed.result.as_array().ok_or_else(StoreError::unexpected_reply)?;
            let mut found = Vec::with_capacity(rows.len());
            for row in rows {
                let hash = row.get(0).and_then(Value::as_str).unwrap_or_default();
                let Some((index, key, renewal)) = by_hash.get(hash) else { continue };
                let token = row.get(1).and_then(Value::as_str).unwrap_or_default();
                let number = |index| row.get(index).and_then(whole).unwrap_or(0);
                let (before, after) = (number(2), number(3));
                let reply = match Token::parse(token) {
                    Some(token)
                        if token == renewal.token && before < renewal.write_seq && after == renewal.write_seq =>
                    {
                        Reply::Applied { fence: None }
                    }
                    Some(token) => {
                        Reply::Found(Some(Box::new(found_instead(key, Holder::Plain { token, write_seq: after }))))
                    }
                    None => Reply::Found(Some(Box::new(found_instead(key, Holder::Foreign { token: token.into() })))),
                };
                found.push((*index, reply));
            }
            Ok(found)
        })
    }
}

/// What a batch says of a row: its holder, and nothing else.
fn found_instead(key: &Key, holder: Holder) -> Record {
    Record {
        key: key.clone(),
        damaged: None,
        lease: record::Lease::Endless,
        expires_at_ms: u64::MAX,
        owner: None,
        fence: None,
        state: State { holder, ends_at: StoreTime::NEVER },
    }
}

/// Splits a batch into parts that one query each can apply: many plain renewals of different keys, or one change.
fn parts(changes: &[(Key, Change)]) -> Vec<Part> {
    let mut alone = Vec::new();
    let mut parts: Vec<Part> = Vec::new();
    let mut seen = std::collections::HashSet::new();
    let (mut present, mut bytes) = (Part::new(), 0);
    for (index, (key, change)) in changes.iter().enumerate() {
        if change.as_plain_renewal().is_none() || !seen.insert(key.hash()) {
            alone.push(vec![index]);
            continue;
        }
        let length = key.as_str().len();
        if present.len() == MOST_ROWS || (bytes + length > MOST_KEY_BYTES && !present.is_empty()) {
            parts.push(std::mem::take(&mut present));
            bytes = 0;
        }
        present.push(index);
        bytes += length;
    }
    parts.push(present);
    parts.append(&mut alone);
    parts.retain(|part| !part.is_empty());
    parts
}

/// The row for which the condition of a change did not hold, as JSON.
fn kept(result: &Value) -> Option<&str> {
    result.get("first_error")?.as_str()?.strip_prefix(KEPT)
}

fn no_errors(result: &Value, key: &Key) -> Result<(), StoreError> {
    match result.get("first_error").and_then(Value::as_str) {
        None => Ok(()),
        Some(said) => Err(StoreError::rejected(format!("the row of {}: {said}", key.quoted()))),
    }
}

/// All of a stream.
async fn all_items(mut answered: Answered) -> Result<Vec<Value>, Failure> {
    let mut all = Vec::new();
    loop {
        match reply::read(&answered.body)? {
            ServerAnswer::Atom(Value::Array(items)) => {
                all.extend(items);
                return Ok(all);
            }
            ServerAnswer::Atom(_) => return Err(StoreError::unexpected_reply().into()),
            ServerAnswer::Items { items, more } => {
                all.extend(items);
                if !more {
                    return Ok(all);
                }
            }
        }
        answered = connection::more_of(&answered).await?;
    }
}

fn sees_no_primary(error: &StoreError) -> bool {
    Failure::Store(error.clone()).sees_no_primary()
}

/// The records of a list, in whose midst the server's now stands.
fn records(items: Vec<Value>) -> Result<Vec<Record>, StoreError> {
    let now = items.iter().find_map(Value::as_f64);
    let now_ms = seconds_to_ms(now.ok_or_else(|| StoreError::unknown("the server's list has no time"))?);
    let rows = items.iter().filter(|item| !item.is_number());
    let read = rows.filter_map(|row| match Row::read(row).and_then(|row| row.record(now_ms)) {
        Ok(record) => Some(record),
        Err(error) => {
            // One such row must not hide all others.
            tracing::warn!("left out of a list: {error}");
            None
        }
    });
    Ok(read.collect())
}
