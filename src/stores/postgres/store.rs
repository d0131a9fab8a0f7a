//! The operations of the store: a statement or two each, and what their answers mean.

use std::collections::{HashMap, HashSet};
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::sync::oneshot;
use tokio_postgres::Row;

use super::caveats::Caveats;
use super::channel::channel;
use super::connection::Answered;
use super::listening::{Deaf, Listening};
use super::row::{self, COLUMNS, Moment};
use super::servers::{self, Link, Servers};
use super::sqlstate::Failure;
use super::statements::{PAGE, Statement, Statements};
use super::table;
use super::url::Config;
use crate::key::{Key, KeyHash};
use crate::protocol::{Change, Condition, Effect, PlainRenewal, Reply, Write, apply};
use crate::record::{Identity, Record};
use crate::store::{
    Answer, ClockSteps, Cursor, Filter, Page, Pong, Readiness, Store, StoreError, StoreErrorKind, Watch,
};
use crate::stores::network::contention::Contention;
use crate::sys::mutex::Mutex;
use crate::sys::{process, runtime};

/// How often a waiter looks without a notification (R10): where it is notified of changes, and where not, first
/// and at last.
const SAFETY_CHECK: Duration = Duration::from_secs(5);
const FIRST_LOOK: Duration = Duration::from_millis(100);
const LAST_LOOK: Duration = Duration::from_secs(1);

/// The most rows that one statement renews.
const MOST_ROWS: usize = 1000;

/// How often a change is asked for again because others changed the row between its statement and the look at what
/// is there instead.
const TRIES: usize = 16;

pub struct PostgresStore {
    core: Arc<Core>,
}

/// What operations under way keep alive.
struct Core {
    link: Arc<Link>,
    statements: Statements,
    listening: Arc<Listening>,
    caveats: Caveats,
    contention: Contention,
    /// One at a time makes the table.
    making: tokio::sync::Mutex<()>,
    /// The host that answered last.
    last_host: Mutex<String>,
}

impl PostgresStore {
    pub fn new(config: Config) -> PostgresStore {
        let statements = Statements::new(&config);
        let link = Link::new(Servers::new(config));
        let listening = Listening::new(&link);
        PostgresStore {
            core: Arc::new(Core {
                link,
                statements,
                listening,
                caveats: Caveats::default(),
                contention: Contention::default(),
                making: tokio::sync::Mutex::new(()),
                last_host: Mutex::default(),
            }),
        }
    }
}

/// Runs what was begun to its end, whether anybody waits for it or not.
fn detached<T: Send + 'static>(work: impl Future<Output = Result<T, StoreError>> + Send + 'static) -> Answer<T> {
    let handle = match runtime::handle() {
        Ok(handle) => handle,
        Err(error) => return Answer::Now(Err(StoreError::resources(error.message()))),
    };
    let (tell, told) = oneshot::channel();
    handle.spawn(async move {
        let _ = tell.send(work.await);
    });
    Answer::later(async move { told.await.unwrap_or_else(|_| Err(StoreError::unknown("the library stopped"))) })
}

/// Work that its awaiter polls; dropped, it goes on in the background.
struct Continued<T: Send + 'static> {
    /// `None` when it has ended.
    work: Option<Work<T>>,
    generation: u64,
}

type Work<T> = Pin<Box<dyn Future<Output = Result<T, StoreError>> + Send>>;

impl<T: Send + 'static> Continued<T> {
    fn new(work: impl Future<Output = Result<T, StoreError>> + Send + 'static) -> Continued<T> {
        Continued { work: Some(Box::pin(work)), generation: process::generation() }
    }
}

impl<T: Send + 'static> Future for Continued<T> {
    type Output = Result<T, StoreError>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let work = self.work.as_mut().expect("it is not polled after its end");
        let output = ready!(work.as_mut().poll(context));
        self.work = None;
        Poll::Ready(output)
    }
}

impl<T: Send + 'static> Drop for Continued<T> {
    fn drop(&mut self) {
        let Some(work) = self.work.take() else { return };
        if self.generation != process::generation() {
            // The parent process's, where it goes on.
            return std::mem::forget(work);
        }
        if let Ok(handle) = runtime::handle() {
            handle.spawn(work);
        }
    }
}

type Asked = Pin<Box<dyn Future<Output = Result<Answered, Failure>> + Send>>;

impl Core {
    fn config(&self) -> &Config {
        &self.link.engine.config
    }

    /// The statement is on its way when this returns.
    fn ask(&self, statement: Statement) -> Asked {
        Box::pin(self.link.ask(statement))
    }

    /// The answer to a statement that was sent; the table is made where it is missing, and the statement sent again.
    async fn answered(&self, asked: Asked, again: impl Fn() -> Statement) -> Result<Answered, StoreError> {
        self.answered_in(asked, again).await.map_err(Failure::into_error)
    }

    /// As `answered`, and which failure it was.
    async fn answered_in(&self, mut asked: Asked, again: impl Fn() -> Statement) -> Result<Answered, Failure> {
        let mut tries = 0;
        loop {
            match asked.await {
                Ok(answered) => {
                    self.link.timed(&answered)?;
                    return Ok(answered);
                }
                Err(Failure::NoTable(said)) if tries < 3 => {
                    tracing::debug!("{said}");
                    self.make_table().await?;
                }
                Err(Failure::Busy(_)) if tries < 2 => {}
                Err(failure @ Failure::TooLate(_)) => return Err(failure),
                Err(failure) => return Err(self.explained(failure).into()),
            }
            tries += 1;
            asked = self.ask(again());
        }
    }

    /// A failure as the error of an operation.
    fn explained(&self, failure: Failure) -> StoreError {
        let Config { table, user, .. } = self.config();
        if let Failure::ReadOnly { connection, .. } = &failure {
            self.link.switch_host(*connection, "takes no writes");
        }
        match failure.into_error() {
            error if error.kind == StoreErrorKind::Denied => servers::denied(error, table, user),
            error => error,
        }
    }

    async fn make_table(&self) -> Result<(), StoreError> {
        let _alone = self.making.lock().await;
        let create = table::create(&self.config().table);
        for _ in 0..10 {
            match self.link.ask(Statement { sql: create.clone(), values: Vec::new(), recurs: false }).await {
                Ok(_) => {
                    tracing::info!("the table {} was created", self.config().table);
                    return Ok(());
                }
                // Somebody else makes it: it is there, or will be.
                Err(Failure::Race(_)) => {}
                Err(Failure::NoTable(said)) => {
                    let Config { table, .. } = self.config();
                    return Err(StoreError::bad_config(format!(
                        "{said}: create it (CREATE SCHEMA \"{}\"), or name another with table=",
                        table.schema
                    )));
                }
                Err(failure) => return Err(self.explained(failure)),
            }
        }
        Err(StoreError::unreachable(format!("the table {} is being created by another client", self.config().table)))
    }

    fn statement(&self, key: &Key, change: &Change) -> Statement {
        self.statements.change(key, change).expect("what could be written once can be written again")
    }

    /// What a change comes to, its first statement being on its way.
    async fn changed(&self, first: Asked, key: &Key, change: &Change) -> Result<Reply, StoreError> {
        match self.applying(first, key, change).await {
            Err(Failure::TooLate(_)) => Ok(Reply::TooLate),
            reply => reply.map_err(Failure::into_error),
        }
    }

    async fn applying(&self, first: Asked, key: &Key, change: &Change) -> Result<Reply, Failure> {
        let mut answered = self.answered_in(first, || self.statement(key, change)).await?;
        for _ in 0..TRIES {
            if let Some(row) = answered.rows.first() {
                return Ok(self.applied(row, key, change)?);
            }
            let look = match (&change.condition, &change.write) {
                (Condition::Absent, Write::Put(new)) => self.statements.make(key, new, change.not_after),
                _ => self.statements.look(key, change.not_after),
            };
            let looked = self.answered_in(self.ask(look.clone()), || look.clone()).await?;
            let row = looked.rows.first().ok_or_else(StoreError::unexpected_reply)?;
            if matches!(change.condition, Condition::Absent) {
                let made: Option<i64> = row.try_get(2 + COLUMNS.len()).map_err(|_| StoreError::unexpected_reply())?;
                if let Some(fence) = made {
                    return Ok(Reply::Applied { fence: u64::try_from(fence).ok() });
                }
            }
            if row.try_get::<_, bool>(1).map_err(|_| StoreError::unexpected_reply())? {
                return Ok(Reply::TooLate);
            }
            let now = now_of(row)?;
            let record = row::read(row, 2, Some(key), now)?;
            let moment = now.store_time().ok_or_else(StoreError::unexpected_reply)?;
            if apply(record.as_ref().map(|record| &record.state), moment, None, change) == Effect::Refused {
                if let (Some(record), Write::Put(new)) = (&record, &change.write) {
                    self.note_contention(key, record, &new.identity);
                }
                if record.is_none() && matches!(change.write, Write::Entry { count: 0, .. }) {
                    // An earlier request may have removed it, and its answer, after which waiters are notified, was lost.
                    self.notify(key.hash());
                }
                return Ok(Reply::Found(record.map(Box::new)));
            }
            // Others changed the row between the two: what is there now fulfils the condition.
            let statement = self.statement(key, change);
            answered = self.answered_in(self.ask(statement), || self.statement(key, change)).await?;
        }
        match answered.rows.first() {
            Some(row) => Ok(self.applied(row, key, change)?),
            None => Err(StoreError::unreachable(format!(
                "the row of {} was changed repeatedly by others, or its fields are not as nblock writes them",
                key.quoted()
            ))
            .into()),
        }
    }

    /// A change was applied: its answer. Waiters are notified where that is useful, and was not done by the change.
    fn applied(&self, row: &Row, key: &Key, change: &Change) -> Result<Reply, StoreError> {
        let fence: i64 = row.try_get(1).map_err(|_| StoreError::unexpected_reply())?;
        let removed: bool = row.try_get(2).map_err(|_| StoreError::unexpected_reply())?;
        let sooner: bool = row.try_get(3).map_err(|_| StoreError::unexpected_reply())?;
        if (sooner || removed) && !matches!(change.write, Write::Delete) {
            self.notify(key.hash());
        }
        Ok(Reply::Applied { fence: u64::try_from(fence).ok().filter(|_| !removed) })
    }

    /// Tells those who wait for a key, in a transaction of its own behind what went before. Nobody waits for that.
    fn notify(&self, hash: KeyHash) {
        if self.config().notify {
            drop(self.link.ask(self.statements.notify(&channel(hash))));
        }
    }

    /// Another process was seen to have the lock.
    fn note_contention(&self, key: &Key, record: &Record, us: &Identity) {
        if record.owner.as_ref().is_none_or(|owner| owner.pid != us.pid || owner.boot_id != us.boot_id) {
            self.contention.seen(key.hash());
        }
    }

    /// The answer to a look, or none where there is no table: looking does not make one.
    async fn looked(&self, asked: Asked) -> Result<Option<Answered>, StoreError> {
        match asked.await {
            Ok(answered) => {
                self.link.timed(&answered).map_err(Failure::into_error)?;
                Ok(Some(answered))
            }
            Err(Failure::NoTable(_)) => Ok(None),
            Err(failure) => Err(self.explained(failure)),
        }
    }

    /// Applies one part of a batch.
    async fn change_part(
        self: &Arc<Core>,
        part: Part,
        changes: &[(Key, Change)],
    ) -> Vec<(usize, Result<Reply, StoreError>)> {
        match part {
            Part::One { index, asked } => {
                let (key, change) = &changes[index];
                vec![(index, self.changed(asked, key, change).await)]
            }
            Part::Renewals { indexes, asked } => match self.renewed(&indexes, asked, changes).await {
                Ok(replies) => indexes.into_iter().zip(replies).collect(),
                Err(error) => indexes.into_iter().map(|index| (index, Err(error.clone()))).collect(),
            },
        }
    }

    fn renewals(&self, indexes: &[usize], changes: &[(Key, Change)]) -> Statement {
        let batch: Vec<(KeyHash, PlainRenewal)> = indexes
            .iter()
            .filter_map(|index| {
                let (key, change) = &changes[*index];
                Some((key.hash(), change.as_plain_renewal()?))
            })
            .collect();
        self.statements.extend_many(&batch)
    }

    /// The replies to many plain renewals, in their order.
    async fn renewed(
        self: &Arc<Core>,
        indexes: &[usize],
        asked: Asked,
        changes: &[(Key, Change)],
    ) -> Result<Vec<Result<Reply, StoreError>>, StoreError> {
        let answered = self.answered(asked, || self.renewals(indexes, changes)).await?;
        let mut applied = HashMap::with_capacity(answered.rows.len());
        for row in &answered.rows {
            let hash: &[u8] = row.try_get(1).map_err(|_| StoreError::unexpected_reply())?;
            let hash = KeyHash(hash.try_into().map_err(|_| StoreError::unexpected_reply())?);
            let fence: i64 = row.try_get(2).map_err(|_| StoreError::unexpected_reply())?;
            if row.try_get(3).map_err(|_| StoreError::unexpected_reply())? {
                self.notify(hash);
            }
            applied.insert(hash, u64::try_from(fence).ok());
        }
        let missing: Vec<KeyHash> =
            indexes.iter().map(|index| changes[*index].0.hash()).filter(|hash| !applied.contains_key(hash)).collect();
        let mut found = HashMap::new();
        if !missing.is_empty() {
            let look = self.statements.look_at_many(missing);
            for row in self.answered(self.ask(look.clone()), || look.clone()).await?.rows {
                let now = now_of(&row)?;
                let hash: Option<&[u8]> = row.try_get(1).map_err(|_| StoreError::unexpected_reply())?;
                let hash =
                    hash.and_then(|hash| hash.try_into().ok()).map(KeyHash).ok_or_else(StoreError::unexpected_reply)?;
                found.insert(hash, row::read(&row, 1, None, now).map(|record| (record, now)));
            }
        }
        let mut replies = Vec::with_capacity(indexes.len());
        for index in indexes {
            let (key, change) = &changes[*index];
            let reply = match (applied.get(&key.hash()), found.remove(&key.hash())) {
                (Some(fence), _) => Ok(Reply::Applied { fence: *fence }),
                (None, None) => Ok(Reply::Found(None)),
                (None, Some(Err(error))) => Err(error),
                (None, Some(Ok((record, now)))) => {
                    let moment = now.store_time().ok_or_else(StoreError::unexpected_reply)?;
                    let state = record.as_ref().map(|record| &record.state);
                    match apply(state, moment, None, change) {
                        Effect::Refused => Ok(Reply::Found(record.map(Box::new))),
                        // Waiting for it would hold up the renewals behind it.
                        _ => Err(StoreError::unreachable(format!(
                            "the row of {} is locked by another session, or was just changed",
                            key.quoted()
                        ))),
                    }
                }
            };
            replies.push(reply);
        }
        Ok(replies)
    }
}

fn now_of(row: &Row) -> Result<Moment, StoreError> {
    row.try_get(0).map_err(|_| StoreError::unexpected_reply())
}

/// Part of a batch, its statement on its way.
enum Part {
    One {
        index: usize,
        asked: Asked,
    },
    /// Plain renewals of different keys.
    Renewals {
        indexes: Vec<usize>,
        asked: Asked,
    },
}

impl Store for PostgresStore {
    fn change(&self, key: &Key, change: Change) -> Answer<Reply> {
        let statement = match self.core.statements.change(key, &change) {
            Ok(statement) => statement,
            Err(error) => return Answer::Now(Err(error)),
        };
        let (core, key) = (Arc::clone(&self.core), key.clone());
        let asked = core.ask(statement);
        // Of the others waiters are notified once it is known what was done, however late somebody asks for that.
        let is_done_by_itself = matches!(change.write, Write::Put(_) | Write::Delete);
        let changed = async move { core.changed(asked, &key, &change).await };
        if is_done_by_itself { Answer::Later(Box::pin(Continued::new(changed))) } else { detached(changed) }
    }

    fn change_many(&self, changes: Vec<(Key, Change)>) -> Answer<Vec<Result<Reply, StoreError>>> {
        let core = Arc::clone(&self.core);
        let mut parts = Vec::new();
        let (mut renewals, mut seen) = (Vec::new(), HashSet::new());
        for (index, (key, change)) in changes.iter().enumerate() {
            if change.as_plain_renewal().is_some() && seen.insert(key.hash()) {
                renewals.push(index);
                continue;
            }
            match core.statements.change(key, change) {
                Ok(statement) => parts.push(Part::One { index, asked: core.ask(statement) }),
                Err(error) => return Answer::Now(Err(error)),
            }
        }
        for indexes in renewals.chunks(MOST_ROWS) {
            let asked = core.ask(core.renewals(indexes, &changes));
            parts.push(Part::Renewals { indexes: indexes.to_vec(), asked });
        }
        let changes = Arc::new(changes);
        // Waiters are notified whether anybody waits for the answers or not.
        let asked: Vec<_> = parts
            .into_iter()
            .map(|part| {
                let (core, changes) = (Arc::clone(&core), Arc::clone(&changes));
                detached(async move { Ok(core.change_part(part, &changes).await) })
            })
            .collect();
        Answer::later(async move {
            let mut replies: Vec<Result<Reply, StoreError>> =
                changes.iter().map(|_| Err(StoreError::unexpected_reply())).collect();
            for answer in asked {
                for (index, reply) in answer.get().await? {
                    replies[index] = reply;
                }
            }
            Ok(replies)
        })
    }

    fn find(&self, key: &Key) -> Answer<Option<Record>> {
        let (core, key) = (Arc::clone(&self.core), key.clone());
        let asked = core.ask(core.statements.look(&key, None));
        detached(async move {
            let Some(answered) = core.looked(asked).await? else { return Ok(None) };
            let row = answered.rows.first().ok_or_else(StoreError::unexpected_reply)?;
            row::read(row, 2, Some(&key), now_of(row)?)
        })
    }

    fn list(&self, filter: Filter, from: Option<Cursor>) -> Answer<Page> {
        let core = Arc::clone(&self.core);
        let after = from.map_or_else(Box::default, |Cursor(hash)| hash);
        let asked = core.ask(core.statements.list(filter, &after));
        detached(async move {
            let mut page = Page::default();
            let Some(answered) = core.looked(asked).await? else { return Ok(page) };
            for row in &answered.rows {
                match row::read(row, 1, None, now_of(row)?) {
                    Ok(record) => page.records.extend(record),
                    // One such row must not hide all others.
                    Err(error) => tracing::warn!("left out of a list: {error}"),
                }
            }
            if answered.rows.len() == PAGE
                && let Some(last) = answered.rows.last()
            {
                let hash: &[u8] = last.try_get(1).map_err(|_| StoreError::unexpected_reply())?;
                page.next = Some(Cursor(hash.into()));
            }
            Ok(page)
        })
    }

    fn fence(&self, key: &Key) -> Answer<u64> {
        let core = Arc::clone(&self.core);
        let statement = core.statements.fence(key);
        let asked = core.ask(statement.clone());
        detached(async move {
            let answered = core.answered(asked, || statement.clone()).await?;
            let fence: i64 = answered
                .rows
                .first()
                .ok_or_else(StoreError::unexpected_reply)?
                .try_get(1)
                .map_err(|_| StoreError::unexpected_reply())?;
            u64::try_from(fence).map_err(|_| StoreError::rejected(format!("the fence of a row is {fence}")))
        })
    }

    fn watch(&self, key: &Key) -> Box<dyn Watch> {
        match self.core.config().notify {
            true => self.core.listening.watch(&self.core.link, key.hash()),
            false => Box::new(Deaf),
        }
    }

    fn prepare(&self) -> Answer<Readiness> {
        let core = Arc::clone(&self.core);
        let asked = core.ask(core.statements.ping());
        detached(async move {
            let answered = core.answered(asked, || core.statements.ping()).await?;
            *core.last_host.lock() = answered.info.host.clone();
            if answered.info.standby {
                let why = format!("{} is a standby: it takes no writes until it is promoted", answered.info.host);
                return Ok(Readiness::NotYet(StoreError::unreachable(why)));
            }
            Ok(Readiness::Ready)
        })
    }

    fn ping(&self) -> Answer<Pong> {
        let core = Arc::clone(&self.core);
        let asked = core.ask(core.statements.ping());
        detached(async move {
            let info = match asked.await {
                Ok(answered) => {
                    core.link.timed(&answered).map_err(Failure::into_error)?;
                    answered.info
                }
                // It answers, and nobody has locked anything yet.
                Err(Failure::NoTable(_)) => {
                    let asked = core.ask(Statement {
                        sql: "SELECT clock_timestamp()".to_string(),
                        values: Vec::new(),
                        recurs: false,
                    });
                    asked.await.map_err(|failure| core.explained(failure))?.info
                }
                Err(failure) => return Err(core.explained(failure)),
            };
            let hears = match core.config().notify {
                true => core.listening.hears_others(&core.link, &info).await,
                false => None,
            };
            Ok(Pong {
                server: format!("PostgreSQL {} at {}", info.version, info.host),
                skew_ms: core.link.engine.clocks.ahead_of_ours(&info.host),
                caveats: core.caveats.recent(&core.link, &info.host, hears).await,
            })
        })
    }

    fn location(&self) -> String {
        self.core.config().to_string()
    }

    fn margin(&self, expire: Duration) -> Duration {
        self.core.link.engine.clocks.margin(expire)
    }

    fn clock_steps(&self) -> Option<&Arc<ClockSteps>> {
        Some(&self.core.link.engine.clocks.steps)
    }

    fn safety_check(&self, waited: Duration) -> Duration {
        match self.core.config().poll {
            _ if self.core.listening.hears() => SAFETY_CHECK,
            Some(poll) => poll,
            None => (waited / 10).clamp(FIRST_LOOK, LAST_LOOK),
        }
    }

    fn awaited_elsewhere(&self, key: &Key) -> bool {
        self.core.contention.likely(key.hash())
    }
}
