//! One connection: the driver's, and the statements sent on it.
//!
//! The thread that has a statement polls the driver, which writes it to the socket, so that no other must be woken for
//! it; and while it waits for the answer it reads what comes. A task polls the driver where no thread waits. Each
//! of them takes in all answers: one that nobody waits for delays no other.

use std::collections::{HashMap, VecDeque};
use std::future::{Future, poll_fn};
use std::mem;
use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll, Wake, Waker};
use std::time::Duration;

use tokio::sync::{Notify, OnceCell, oneshot};
use tokio_postgres::tls::NoTlsStream;
use tokio_postgres::types::{ToSql, Type};
use tokio_postgres::{AsyncMessage, CancelToken, Client, NoTls, Row};

use super::row::Moment;
use super::socket::{self, KeptOpen};
use super::sqlstate::{self, Failure};
use super::statements::{Statement, Value};
use crate::clock::Boottime;
use crate::store::StoreError;
use crate::stores::network::address::Address;
use crate::stores::network::skew::{Clocks, Offset};
use crate::stores::network::stream::{self, Stream};
use crate::stores::network::tls::Connector;
use crate::sys::mutex::Mutex;
use crate::sys::runtime::{self, Driven, Source, until};
use crate::sys::sockets::SocketPoller;

/// The driver's half that does the reading and writing. TLS, where there is any, is beneath it, in our stream.
pub type Driver = tokio_postgres::Connection<Stream, NoTlsStream>;

/// A handle of a connection. Dropping all of them ends it.
#[derive(Clone)]
pub struct Connection {
    shared: Arc<Shared>,
}

struct Shared {
    client: Arc<Client>,
    core: Arc<Core>,
    /// How long an answer may take before the statement is cancelled.
    silence: Duration,
    cancelling: Cancelling,
    /// Whether a request to cancel is under way.
    is_asked: AtomicBool,
}

/// What handles, the task, and threads that wait have in common.
struct Core {
    /// `None` when the connection has ended.
    io_state: Mutex<Option<ConnectionIo>>,
    poller: SocketPoller,
    waker: Arc<TaskWaker>,
    leaving: AtomicBool,
    info: Arc<ServerInfo>,
    told: Told,
    last_answer: Mutex<Boottime>,
    /// The statements that recur, by their text; `None` of one that is being prepared. Not there: none is to be
    /// prepared on this connection.
    prepared: Mutex<Option<HashMap<String, Option<Prepared>>>>,
}

/// What is under way on the socket.
struct ConnectionIo {
    driver: Driver,
    /// Statements that were sent, in the order of their answers.
    running: VecDeque<Running>,
    /// What came in, and was not passed on yet.
    heard: Vec<Heard>,
    /// Why the connection is to end.
    over: Option<String>,
}

type Rows = Pin<Box<dyn Future<Output = Result<Vec<Row>, tokio_postgres::Error>> + Send>>;
type Prepared = tokio_postgres::Statement;

/// A statement that was sent.
struct Running {
    rows: Rows,
    sent: Boottime,
    tell: Tell,
}

enum Heard {
    Answer(Tell, Result<Answered, Failure>),
    Notification(String),
}

/// What is notified of messages that are not answers.
#[derive(Clone)]
pub struct Told {
    pub notified: Option<Notified>,
    /// How many channels are listened to.
    pub listened: Arc<AtomicUsize>,
}

pub type Notified = Arc<dyn Fn(&str) + Send + Sync>;

/// Wakes the task, but for what the thread that polls the driver finds out anyway.
#[derive(Default)]
struct TaskWaker {
    state: AtomicU8,
    task: Mutex<Option<Waker>>,
}

/// Somebody polls; and something was woken meanwhile.
const POLLING: u8 = 1;
const WOKEN: u8 = 2;

impl TaskWaker {
    fn wake_task(&self) {
        let task = self.task.lock().clone();
        if let Some(task) = task {
            task.wake();
        }
    }
}

impl Wake for TaskWaker {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        if self.state.fetch_or(WOKEN, Ordering::SeqCst) & POLLING == 0 {
            self.wake_task();
        }
    }
}

/// How the server of a connection is asked to cancel what it does there, which takes a connection of its own.
pub struct Cancelling {
    token: CancelToken,
    address: Address,
    tls: Option<Connector>,
}

impl Cancelling {
    pub fn new(client: &Client, address: Address, tls: Option<Connector>) -> Cancelling {
        Cancelling { token: client.cancel_token(), address, tls }
    }

    /// Asks once, and waits until the server hangs up, as it does when it has tried. It does not say whether there
    /// was anything to cancel.
    async fn ask(&self, limit: Boottime) -> Result<(), StoreError> {
        let mut socket = KeptOpen(socket::open(&self.address, self.tls.as_ref(), limit).await?);
        let asked = self.token.cancel_query_raw(&mut socket, NoTls).await;
        asked.map_err(|error| StoreError::unreachable(error.to_string()))?;
        stream::read(&mut socket.0).await.map(drop)
    }
}

/// A server as it answers on one connection.
pub struct ServerInfo {
    /// Its host, as the URL names it.
    pub host: String,
    /// Which host of the URL that is.
    pub index: usize,
    pub version: String,
    /// Whether it was a standby when it let us in.
    pub standby: bool,
    /// The connection's number.
    pub connection: u64,
    /// Whether nothing stands between us and the server, whose session is this connection's alone then.
    pub is_direct: bool,
    /// Whether this connection receives notifications; not known until it was tried.
    pub hears: OnceCell<bool>,
    offset: Mutex<Offset>,
    ended: Notify,
    has_ended: Mutex<bool>,
}

impl ServerInfo {
    pub fn new(greeting: &Greeting, host: String, index: usize, clocks: &Clocks, connection: u64) -> ServerInfo {
        let offset = clocks.observe(&host, &host, greeting.sent, greeting.received, greeting.now.millis());
        ServerInfo {
            host,
            index,
            version: greeting.version.clone(),
            standby: greeting.standby,
            connection,
            is_direct: greeting.is_direct,
            hears: OnceCell::new(),
            offset: Mutex::new(offset),
            ended: Notify::new(),
            has_ended: Mutex::new(false),
        }
    }

    /// Notes a time that this server answered with.
    pub fn observe(&self, clocks: &Clocks, sent: Boottime, received: Boottime, now: Moment) {
        *self.offset.lock() = clocks.observe(&self.host, &self.host, sent, received, now.millis());
    }

    /// Until the connection has ended.
    pub async fn ended(&self) {
        let mut ended = pin!(self.ended.notified());
        // Before the look at what may have come already.
        ended.as_mut().enable();
        if !*self.has_ended.lock() {
            ended.await;
        }
    }
}

/// What a server says of itself when it has let us in.
pub struct Greeting {
    pub now: Moment,
    pub sent: Boottime,
    pub received: Boottime,
    pub version: String,
    pub standby: bool,
    /// Whether it has the same connection as we: the same addresses at both ends.
    pub is_direct: bool,
}

/// A statement that waits to be sent.
pub struct Request {
    pub statement: Statement,
    /// Not sent any more from here on.
    pub give_up_at: Boottime,
    pub tell: Tell,
}

/// Where the answer goes.
pub struct Tell {
    asker: oneshot::Sender<Result<Answered, Failure>>,
    sent_on: Arc<OnceLock<(Connection, Boottime)>>,
}

impl Tell {
    pub fn answer(self, answer: Result<Answered, Failure>) {
        // An asker that has gone wants no answer; what it asked for is done.
        let _ = self.asker.send(answer);
    }
}

/// The answer to a statement.
pub struct Pending {
    told: oneshot::Receiver<Result<Answered, Failure>>,
    /// The connection that it was sent on, and when.
    sent_on: Arc<OnceLock<(Connection, Boottime)>>,
}

pub fn answer() -> (Tell, Pending) {
    let (asker, told) = oneshot::channel();
    let sent_on: Arc<OnceLock<_>> = Arc::default();
    (Tell { asker, sent_on: Arc::clone(&sent_on) }, Pending { told, sent_on })
}

/// How long a server may take to cancel a statement before it counts as gone, and when it is asked again.
const CANCELLED_WITHIN: Duration = Duration::from_secs(1);
const CANCEL_AGAIN: Duration = Duration::from_millis(20);

/// What came back.
pub struct Answered {
    pub rows: Vec<Row>,
    pub sent: Boottime,
    pub received: Boottime,
    pub info: Arc<ServerInfo>,
}

impl Pending {
    /// The answer. `wait` is called whenever there is none yet. A statement that takes longer than `silence` is
    /// cancelled.
    pub async fn get(self, silence: Duration, wait: impl Fn() + Unpin) -> Result<Answered, Failure> {
        let Pending { mut told, sent_on } = self;
        let mut told = poll_fn(move |context| {
            let told = Pin::new(&mut told).poll(context);
            if told.is_pending() {
                wait();
            }
            told.map(|told| told.unwrap_or_else(|_| Err(StoreError::unreachable("the store was closed").into())))
        });
        // It may have been sent long before this is first asked for.
        let mut limit = sent_on.get().map_or_else(Boottime::now, |(_, sent)| *sent) + silence;
        loop {
            if let Some(answer) = until(limit, &mut told).await {
                return answer;
            }
            match sent_on.get() {
                Some((connection, sent)) if (*sent + silence).has_passed() => {
                    return match connection.cancel(&mut told).await {
                        // Its time is over: it is not asked again.
                        Err(failure @ Failure::Busy(_)) => Err(failure.into_error().into()),
                        answer => answer,
                    };
                }
                Some((_, sent)) => limit = *sent + silence,
                // Until it is sent, the link says how long it may take.
                None => limit = Boottime::now() + silence,
            }
        }
    }
}

impl Connection {
    /// The task is to be run for as long as the connection lives.
    pub fn new(
        client: Client,
        driver: Driver,
        poller: SocketPoller,
        info: Arc<ServerInfo>,
        silence: Duration,
        cancelling: Cancelling,
        told: Told,
    ) -> (Connection, Task) {
        let prepares = info.is_direct;
        let io_state = ConnectionIo { driver, running: VecDeque::new(), heard: Vec::new(), over: None };
        let core = Arc::new(Core {
            io_state: Mutex::new(Some(io_state)),
            poller,
            waker: Arc::default(),
            leaving: AtomicBool::new(false),
            info,
            told,
            last_answer: Mutex::new(Boottime::now()),
            prepared: Mutex::new(prepares.then(HashMap::new)),
        });
        let task = Task(Arc::clone(&core));
        let is_asked = AtomicBool::new(false);
        (
            Connection { shared: Arc::new(Shared { client: Arc::new(client), core, silence, cancelling, is_asked }) },
            task,
        )
    }

    /// Sends a request, and does not wait; gives it back where the connection has ended. Those of one thread go out in
    /// their order.
    pub fn start(&self, request: Request) -> Result<(), Request> {
        let core = &self.shared.core;
        let mut io_state = core.io_state.lock();
        let Some(present) = io_state.as_mut().filter(|present| present.over.is_none()) else { return Err(request) };
        if self.shared.client.is_closed() || core.leaving.load(Ordering::SeqCst) {
            return Err(request);
        }
        let Request { mut statement, tell, .. } = request;
        for value in &mut statement.values {
            if let Value::Deadline(not_after) = value {
                let latest = core.info.offset.lock().deadline(*not_after);
                *value = Value::Moment(Moment::from_millis(latest));
            }
        }
        let sent = Boottime::now();
        let _ = tell.sent_on.set((self.clone(), sent));
        let (prepared, preparing) = match statement.recurs {
            true => self.prepared(&statement),
            false => (None, None),
        };
        let client = Arc::clone(&self.shared.client);
        let rows: Rows = Box::pin(async move {
            let Statement { sql, values, .. } = statement;
            match prepared {
                Some(prepared) => {
                    let values: Vec<_> = values.iter().map(|value| value as &(dyn ToSql + Sync)).collect();
                    client.query(&prepared, &values).await
                }
                None => {
                    let typed = |value: &Value| value.sql_type();
                    let values: Vec<_> =
                        values.iter().map(|value| (value as &(dyn ToSql + Sync), typed(value))).collect();
                    client.query_typed(&sql, &values).await
                }
            }
        });
        // Whatever is prepared is so behind the statement, in what is written together.
        let preparing = preparing.map(|rows| Running { rows, sent, tell: answer().0 });
        for mut running in [Some(Running { rows, sent, tell }), preparing].into_iter().flatten() {
            // Polled for the first time, it is handed to the driver.
            match core.polled(|context| running.rows.as_mut().poll(context)) {
                Poll::Ready(rows) => present.heard.push(running.answered(rows, core)),
                Poll::Pending => present.running.push_back(running),
            }
        }
        core.work(present);
        // Who sends may hold what would be needed to pass it on.
        if present.over.is_some() || !present.heard.is_empty() {
            core.waker.wake_task();
        }
        Ok(())
    }

    /// A statement that recurs as the server has prepared it; or what prepares it.
    fn prepared(&self, statement: &Statement) -> (Option<Prepared>, Option<Rows>) {
        let core = &self.shared.core;
        let mut prepared = core.prepared.lock();
        let Some(all) = prepared.as_mut() else { return (None, None) };
        if let Some(known) = all.get(&statement.sql) {
            return (known.clone(), None);
        }
        all.insert(statement.sql.clone(), None);
        let (client, core) = (Arc::clone(&self.shared.client), Arc::downgrade(core));
        let sql = statement.sql.clone();
        let types: Vec<Type> = statement.values.iter().map(Value::sql_type).collect();
        let preparing: Rows = Box::pin(async move {
            let ready = client.prepare_typed(&sql, &types).await?;
            if let Some(core) = core.upgrade()
                && let Some(all) = core.prepared.lock().as_mut()
            {
                all.insert(sql, Some(ready));
            }
            Ok(Vec::new())
        });
        (None, Some(preparing))
    }

    /// Has the server cancel a statement that takes too long, and gives its answer. A statement whose connection is
    /// only left goes on waiting in the server, with a connection of the server's.
    async fn cancel<F: Future<Output = Result<Answered, Failure>> + Unpin>(
        &self,
        told: &mut F,
    ) -> Result<Answered, Failure> {
        let Shared { core, silence, .. } = &*self.shared;
        let host = &core.info.host;
        tracing::info!("no answer from {host} within {silence:?}: the statement is cancelled");
        let began = Boottime::now();
        // Those before it in the connection are cancelled first, one by one.
        while !((*core.last_answer.lock()).max(began) + CANCELLED_WITHIN).has_passed() {
            self.ask_to_cancel();
            // A request may reach the server between two statements: then it cancels nothing.
            if let Some(answer) = until(Boottime::now() + CANCEL_AGAIN, told).await {
                return answer;
            }
        }
        tracing::info!("still no answer from {host}: the connection is left");
        self.leave();
        // Its end answers it.
        told.await
    }

    /// Asks the server to cancel the statement that it is at, unless it is just being asked. Does not wait.
    fn ask_to_cancel(&self) {
        let Ok(handle) = runtime::handle() else { return };
        let shared = Arc::clone(&self.shared);
        if shared.is_asked.swap(true, Ordering::Relaxed) {
            return;
        }
        handle.spawn(async move {
            let limit = Boottime::now() + CANCELLED_WITHIN;
            let asked = until(limit, &mut Box::pin(shared.cancelling.ask(limit))).await;
            if let Some(Err(error)) = asked {
                tracing::debug!("{} could not be asked to cancel a statement: {error}", shared.core.info.host);
            }
            shared.is_asked.store(false, Ordering::Relaxed);
        });
    }

    /// Ends the connection, also for others that have a handle of it. Does not wait.
    pub fn leave(&self) {
        self.shared.core.leaving.store(true, Ordering::SeqCst);
        self.shared.core.waker.wake_task();
    }

    /// What a thread runs that waits for an answer.
    pub fn driven(&self) -> Arc<dyn Driven> {
        Arc::clone(&self.shared.core) as Arc<dyn Driven>
    }
}

impl Core {
    /// Polls the driver, and takes in what it returns.
    fn work(&self, io_state: &mut ConnectionIo) {
        // What is woken meanwhile is polled once more.
        while io_state.over.is_none() {
            self.polled(|context| io_state.poll(context, self));
            if self.waker.state.load(Ordering::SeqCst) & WOKEN == 0 {
                break;
            }
        }
        if self.waker.state.swap(0, Ordering::SeqCst) & WOKEN != 0 {
            self.waker.wake_task();
        }
    }

    /// Polls something, with the lock. The task is not woken meanwhile: `work` is to follow.
    fn polled<T>(&self, poll: impl FnOnce(&mut Context<'_>) -> T) -> T {
        self.waker.state.store(POLLING, Ordering::SeqCst);
        let waker = Waker::from(Arc::clone(&self.waker));
        poll(&mut Context::from_waker(&waker))
    }

    /// To be called without the lock: who is woken may have more to send.
    fn pass_on(&self, heard: Vec<Heard>) {
        for heard in heard {
            match heard {
                Heard::Answer(tell, answer) => tell.answer(answer),
                Heard::Notification(channel) => {
                    if let Some(notified) = &self.told.notified {
                        notified(&channel);
                    }
                }
            }
        }
    }
}

impl ConnectionIo {
    fn poll(&mut self, context: &mut Context<'_>, core: &Core) {
        loop {
            match self.driver.poll_message(context) {
                Poll::Ready(Some(Ok(AsyncMessage::Notification(notification)))) => {
                    self.heard.push(Heard::Notification(notification.channel().to_string()));
                }
                Poll::Ready(Some(Ok(AsyncMessage::Notice(notice)))) => {
                    tracing::debug!("{} says: {}", core.info.host, notice.message());
                    // The server answers that the commit is done, but a failover may forget it: it is not known.
                    if notice.routine() == Some("SyncRepWaitForLSN") {
                        self.over = Some("the wait for a synchronous standby was cancelled".to_string());
                        return;
                    }
                }
                Poll::Ready(Some(Ok(_))) => {}
                Poll::Ready(Some(Err(error))) => {
                    self.over = Some(error.to_string());
                    return;
                }
                Poll::Ready(None) => {
                    self.over = Some("nobody uses it any more".to_string());
                    return;
                }
                Poll::Pending => break,
            }
        }
        self.poll_answers(context, core);
    }

    fn poll_answers(&mut self, context: &mut Context<'_>, core: &Core) {
        while let Some(first) = self.running.front_mut()
            && let Poll::Ready(rows) = first.rows.as_mut().poll(context)
        {
            let answered = self.running.pop_front().map(|running| running.answered(rows, core));
            self.heard.extend(answered);
        }
    }
}

impl Running {
    fn answered(self, rows: Result<Vec<Row>, tokio_postgres::Error>, core: &Core) -> Heard {
        let Running { sent, tell, .. } = self;
        let received = Boottime::now();
        *core.last_answer.lock() = received;
        let answer = match rows {
            Ok(rows) => Ok(Answered { rows, sent, received, info: Arc::clone(&core.info) }),
            Err(error) => {
                if sqlstate::is_of_preparing(&error) {
                    // Sent again, and from now on, as it is.
                    *core.prepared.lock() = None;
                }
                Err(sqlstate::of_statement(&error, core.info.connection))
            }
        };
        Heard::Answer(tell, answer)
    }
}

impl Driven for Core {
    fn source(&self) -> &dyn Source {
        &self.poller
    }

    fn take_in(&self) -> bool {
        let mut heard = Vec::new();
        let goes_on = self.io_state.lock().as_mut().is_some_and(|io_state| {
            self.work(io_state);
            mem::swap(&mut heard, &mut io_state.heard);
            io_state.over.is_none()
        });
        self.pass_on(heard);
        if !goes_on {
            // It ends the connection.
            self.waker.wake_task();
        }
        goes_on
    }

    fn awaited(&self) -> usize {
        let awaited = |running: &&Running| !running.tell.asker.is_closed();
        let answers = |io_state: &Option<ConnectionIo>| {
            io_state.as_ref().map_or(1, |io| io.running.iter().filter(awaited).count())
        };
        self.told.listened.load(Ordering::SeqCst) + answers(&self.io_state.lock())
    }
}

/// The task's own part.
pub struct Task(Arc<Core>);

impl Task {
    /// Runs the connection until it ends or is left. `ended` is called with the reason, before the statements that were
    /// sent are answered with the end.
    pub async fn run(self, ended: impl FnOnce(&str, VecDeque<Request>)) {
        let core = self.0;
        let why = poll_fn(|context| {
            *core.waker.task.lock() = Some(context.waker().clone());
            let mut heard = Vec::new();
            let over = match core.io_state.lock().as_mut() {
                Some(io_state) if !core.leaving.load(Ordering::SeqCst) => {
                    core.work(io_state);
                    mem::swap(&mut heard, &mut io_state.heard);
                    io_state.over.clone()
                }
                _ => Some("it was left".to_string()),
            };
            core.pass_on(heard);
            over.map_or(Poll::Pending, Poll::Ready)
        })
        .await;
        let io_state = core.io_state.lock().take();
        ended(&why, VecDeque::new());
        if let Some(ConnectionIo { driver, running, mut heard, .. }) = io_state {
            // Its statements are answered by this.
            drop(driver);
            let mut context = Context::from_waker(Waker::noop());
            for mut running in running {
                let answer = match running.rows.as_mut().poll(&mut context) {
                    Poll::Ready(rows) => running.answered(rows, &core),
                    Poll::Pending => {
                        let unknown = StoreError::unknown(format!("the connection broke: {why}"));
                        Heard::Answer(running.tell, Err(unknown.into()))
                    }
                };
                heard.push(answer);
            }
            core.pass_on(heard);
        }
        *core.info.has_ended.lock() = true;
        core.info.ended.notify_waiters();
    }
}

/// What `future` gives, the connection being run meanwhile.
pub async fn drive<T>(driver: &mut Driver, future: impl Future<Output = T>) -> Result<T, tokio_postgres::Error> {
    let mut future = pin!(future);
    poll_fn(|context| {
        if let Poll::Ready(output) = future.as_mut().poll(context) {
            return Poll::Ready(Ok(output));
        }
        let ended = loop {
            match driver.poll_message(context) {
                Poll::Ready(Some(Ok(_))) => {}
                Poll::Ready(Some(Err(error))) => break Some(error),
                Poll::Ready(None) | Poll::Pending => break None,
            }
        };
        match (future.as_mut().poll(context), ended) {
            (Poll::Ready(output), _) => Poll::Ready(Ok(output)),
            (Poll::Pending, Some(error)) => Poll::Ready(Err(error)),
            (Poll::Pending, None) => Poll::Pending,
        }
    })
    .await
}
