//! One connection: the driver's, polled by the library's runtime, and the statements sent on it.

use std::collections::VecDeque;
use std::future::{Future, poll_fn};
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, Waker};
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
use crate::sys::runtime::until;

/// The driver's half that does the reading and writing. TLS, where there is any, is beneath it, in our stream.
pub type Driver = tokio_postgres::Connection<Stream, NoTlsStream>;

/// A handle of a connection.
#[derive(Clone)]
pub struct Connection {
    shared: Arc<Shared>,
}

struct Shared {
    client: Client,
    info: Arc<ServerInfo>,
    leaving: Arc<Notify>,
    /// How long an answer may take before the statement is cancelled.
    silence: Duration,
    cancelling: Cancelling,
    /// Whether a request to cancel is under way.
    is_asked: AtomicBool,
    last_answer: Mutex<Boottime>,
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
}

/// A statement that waits to be sent.
pub struct Request {
    pub statement: Statement,
    /// Not sent any more from here on.
    pub give_up_at: Boottime,
    pub tell: oneshot::Sender<Result<InFlight, StoreError>>,
}

/// How long a server may take to cancel a statement before it counts as gone, and when it is asked again.
const CANCELLED_WITHIN: Duration = Duration::from_secs(1);
const CANCEL_AGAIN: Duration = Duration::from_millis(20);

type Running = Pin<Box<dyn Future<Output = Result<Vec<Row>, tokio_postgres::Error>> + Send>>;

/// A statement that was sent. Dropping it does not recall it; but while it is kept and not waited for, the
/// connection reads no further.
pub struct InFlight {
    running: Running,
    /// Of a statement that was answered at once.
    early: Option<Result<Vec<Row>, tokio_postgres::Error>>,
    sent: Boottime,
    connection: Connection,
}

/// What came back.
pub struct Answered {
    pub rows: Vec<Row>,
    pub sent: Boottime,
    pub received: Boottime,
    pub info: Arc<ServerInfo>,
}

impl InFlight {
    pub async fn answer(mut self) -> Result<Answered, Failure> {
        let shared = Arc::clone(&self.connection.shared);
        let mut cancelled = false;
        let result = match self.early.take() {
            Some(result) => result,
            None => match until(Boottime::now() + shared.silence, &mut self.running).await {
                Some(result) => result,
                None => {
                    cancelled = true;
                    self.cancel().await
                }
            },
        };
        *shared.last_answer.lock() = Boottime::now();
        match result {
            Ok(rows) => {
                Ok(Answered { rows, sent: self.sent, received: Boottime::now(), info: Arc::clone(&shared.info) })
            }
            Err(error) => match sqlstate::of_statement(&error, shared.info.connection) {
                // Its time is over: it is not asked again.
                failure @ Failure::Busy(_) if cancelled => Err(failure.into_error().into()),
                failure => Err(failure),
            },
        }
    }

    /// Has the server cancel a statement that takes too long, and gives its answer. A statement whose connection is
    /// only left goes on waiting in the server, with a connection of the server's.
    async fn cancel(&mut self) -> Result<Vec<Row>, tokio_postgres::Error> {
        let shared = &self.connection.shared;
        tracing::info!("no answer from {} within {:?}: the statement is cancelled", shared.info.host, shared.silence);
        let began = Boottime::now();
        // Those before it in the connection are cancelled first, one by one.
        while !((*shared.last_answer.lock()).max(began) + CANCELLED_WITHIN).has_passed() {
            self.connection.ask_to_cancel();
            // A request may reach the server between two statements: then it cancels nothing.
            if let Some(result) = until(Boottime::now() + CANCEL_AGAIN, &mut self.running).await {
                return result;
            }
        }
        tracing::info!("still no answer from {}: the connection is closed", shared.info.host);
        shared.leaving.notify_one();
        // Its end answers it.
        (&mut self.running).await
    }
}

impl Connection {
    pub fn new(client: Client, info: Arc<ServerInfo>, silence: Duration, cancelling: Cancelling) -> Connection {
        let leaving = Arc::new(Notify::new());
        let (is_asked, last_answer) = (AtomicBool::new(false), Mutex::new(Boottime::now()));
        Connection { shared: Arc::new(Shared { client, info, leaving, silence, cancelling, is_asked, last_answer }) }
    }

    /// Sends a request, and does not wait; gives it back where the connection has ended.
    pub fn start(&self, request: Request) -> Result<(), Request> {
        if self.shared.client.is_closed() {
            return Err(request);
        }
        let Request { statement, tell, .. } = request;
        let _ = tell.send(Ok(self.send(statement)));
        Ok(())
    }

    /// Sends a statement. Those of one thread go out in their order.
    pub fn send(&self, mut statement: Statement) -> InFlight {
        for value in &mut statement.values {
            if let Value::Deadline(not_after) = value {
                let latest = self.shared.info.offset.lock().deadline(*not_after);
                *value = Value::Moment(Moment::from_millis(latest));
            }
        }
        let shared = Arc::clone(&self.shared);
        let mut running: Running = Box::pin(async move {
            let values: Vec<(&(dyn ToSql + Sync), Type)> =
                statement.values.iter().map(|value| (value as &(dyn ToSql + Sync), value.sql_type())).collect();
            shared.client.query_typed(&statement.sql, &values).await
        });
        let sent = Boottime::now();
        // The first poll hands the statement to the connection; a later poll gets the reply.
        let early = match running.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(result) => Some(result),
            Poll::Pending => None,
        };
        InFlight { running, early, sent, connection: self.clone() }
    }

    /// Asks the server to cancel the statement that it is at, unless it is just being asked. Does not wait.
    fn ask_to_cancel(&self) {
        let shared = Arc::clone(&self.shared);
        if shared.is_asked.swap(true, Ordering::Relaxed) {
            return;
        }
        tokio::spawn(async move {
            let limit = Boottime::now() + CANCELLED_WITHIN;
            let asked = until(limit, &mut Box::pin(shared.cancelling.ask(limit))).await;
            if let Some(Err(error)) = asked {
                tracing::debug!("{} could not be asked to cancel a statement: {error}", shared.info.host);
            }
            shared.is_asked.store(false, Ordering::Relaxed);
        });
    }

    /// Ends the connection, also for others that have a handle of it. Does not wait.
    pub fn leave(&self) {
        self.shared.leaving.notify_one();
    }

    pub fn info(&self) -> &Arc<ServerInfo> {
        &self.shared.info
    }

    /// What tells the connection's task to end.
    pub fn leaving(&self) -> Arc<Notify> {
        Arc::clone(&self.shared.leaving)
    }
}

/// Runs a connection until it ends or is left. `notified` gets the channels of notifications; `ended` is called
/// why, before the requests that were sent are answered with the end.
pub async fn run(
    mut driver: Driver,
    info: Arc<ServerInfo>,
    leaving: Arc<Notify>,
    notified: impl Fn(&str),
    ended: impl FnOnce(&str, VecDeque<Request>),
) {
    let mut left = pin!(leaving.notified());
    let why = poll_fn(|context| {
        if left.as_mut().poll(context).is_ready() {
            return Poll::Ready("it was left".to_string());
        }
        loop {
            return match driver.poll_message(context) {
                Poll::Ready(Some(Ok(AsyncMessage::Notification(notification)))) => {
                    notified(notification.channel());
                    continue;
                }
                Poll::Ready(Some(Ok(AsyncMessage::Notice(notice)))) => {
                    tracing::debug!("{} says: {}", info.host, notice.message());
                    // The server answers that the commit is done, but a failover may forget it: it is not known.
                    if notice.routine() == Some("SyncRepWaitForLSN") {
                        return Poll::Ready("the wait for a synchronous standby was cancelled".to_string());
                    }
                    continue;
                }
                Poll::Ready(Some(Ok(_))) => continue,
                Poll::Ready(Some(Err(error))) => Poll::Ready(error.to_string()),
                Poll::Ready(None) => Poll::Ready("nobody uses it any more".to_string()),
                Poll::Pending => Poll::Pending,
            };
        }
    })
    .await;
    ended(&why, VecDeque::new());
    // Its requests are answered by this.
    drop(driver);
    *info.has_ended.lock() = true;
    info.ended.notify_waiters();
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
