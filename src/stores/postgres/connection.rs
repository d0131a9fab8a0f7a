//! Statements on a connection, which tokio_postgres' driver writes and whose answers it reads.
//!
//! The thread or task that moves the connection polls the driver, and then the futures of the statements, in the order of
//! their answers: one that nobody waits for delays no other.

use std::collections::{HashMap, VecDeque};
use std::future::{Future, poll_fn};
use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
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
use crate::stores::network::connection::{self, Core, Traffic};
use crate::stores::network::link;
use crate::stores::network::skew::{Clocks, Offset};
use crate::stores::network::stream::{self, Stream};
use crate::stores::network::tls::Connector;
use crate::sys::mutex::Mutex;
use crate::sys::runtime::{self, until};

/// The driver's half that does the reading and writing. TLS, where there is any, is beneath it, in our stream.
pub type Driver = tokio_postgres::Connection<Stream, NoTlsStream>;

pub type Connection = connection::Connection<StatementTraffic>;

/// What is known of a connection.
pub struct Common {
    info: Arc<ServerInfo>,
    told: Told,
    last_answer: Mutex<Boottime>,
    /// How long an answer may take before the statement is cancelled.
    silence: Duration,
    cancelling: Cancelling,
    /// Whether a request to cancel is under way.
    is_asked: AtomicBool,
}

impl Common {
    pub fn new(info: Arc<ServerInfo>, told: Told, silence: Duration, cancelling: Cancelling) -> Common {
        let last_answer = Mutex::new(Boottime::now());
        Common { info, told, last_answer, silence, cancelling, is_asked: AtomicBool::new(false) }
    }
}

/// The statements under way on a connection, and what moves them.
pub struct StatementTraffic {
    client: Option<Arc<Client>>,
    driver: Driver,
    /// Statements that were handed to the driver, in the order of their answers.
    running: VecDeque<Running>,
    prepared: PreparedStatements,
}

type Rows = Pin<Box<dyn Future<Output = Result<Vec<Row>, tokio_postgres::Error>> + Send>>;
type Prepared = tokio_postgres::Statement;

/// The statements that recur, by their text; `None` of one that is being prepared. Not there: none is to be prepared on
/// this connection.
type PreparedStatements = Arc<Mutex<Option<HashMap<String, Option<Prepared>>>>>;

/// A statement that was sent.
struct Running {
    rows: Rows,
    sent: Boottime,
    tell: Tell,
}

pub enum Heard {
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

impl link::Request for Request {
    fn give_up_at(&self) -> Boottime {
        self.give_up_at
    }

    fn fail(self, error: StoreError) {
        self.tell.answer(Err(error.into()));
    }
}

/// Where the answer goes.
pub struct Tell {
    caller: oneshot::Sender<Result<Answered, Failure>>,
    sent_on: Arc<OnceLock<(Connection, Boottime)>>,
}

impl Tell {
    pub fn answer(self, answer: Result<Answered, Failure>) {
        // A caller that has gone wants no answer; what it asked for is done.
        let _ = self.caller.send(answer);
    }
}

/// The answer to a statement.
pub struct Pending {
    told: oneshot::Receiver<Result<Answered, Failure>>,
    /// The connection that it was sent on, and when.
    sent_on: Arc<OnceLock<(Connection, Boottime)>>,
}

pub fn answer() -> (Tell, Pending) {
    let (caller, told) = oneshot::channel();
    let sent_on: Arc<OnceLock<_>> = Arc::default();
    (Tell { caller, sent_on: Arc::clone(&sent_on) }, Pending { told, sent_on })
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
    /// Has the server cancel a statement that takes too long, and gives its answer. A statement whose connection is
    /// only left goes on waiting in the server, with a connection of the server's.
    async fn cancel<F: Future<Output = Result<Answered, Failure>> + Unpin>(
        &self,
        told: &mut F,
    ) -> Result<Answered, Failure> {
        let Common { info, silence, last_answer, .. } = &**self;
        let host = &info.host;
        tracing::info!("no answer from {host} within {silence:?}: the statement is cancelled");
        let began = Boottime::now();
        // Those before it in the connection are cancelled first, one by one.
        while !((*last_answer.lock()).max(began) + CANCELLED_WITHIN).has_passed() {
            self.ask_to_cancel();
            // A request may reach the server between two statements: then it cancels nothing.
            if let Some(answer) = until(Boottime::now() + CANCEL_AGAIN, told).await {
                return answer;
            }
        }
        tracing::info!("still no answer from {host}: the connection is left");
        self.leave("the server does not respond");
        // Its end answers it.
        told.await
    }

    /// Asks the server to cancel the statement that it is at, unless it is just being asked. Does not wait.
    fn ask_to_cancel(&self) {
        let Ok(handle) = runtime::handle() else { return };
        let connection = self.clone();
        if connection.is_asked.swap(true, Ordering::Relaxed) {
            return;
        }
        handle.spawn(async move {
            let limit = Boottime::now() + CANCELLED_WITHIN;
            let asked = until(limit, &mut Box::pin(connection.cancelling.ask(limit))).await;
            if let Some(Err(error)) = asked {
                tracing::debug!("{} could not be asked to cancel a statement: {error}", connection.info.host);
            }
            connection.is_asked.store(false, Ordering::Relaxed);
        });
    }
}

impl StatementTraffic {
    /// `prepares`: whether the server's session is this connection's alone.
    pub fn new(client: Client, driver: Driver, prepares: bool) -> StatementTraffic {
        let prepared = Arc::new(Mutex::new(prepares.then(HashMap::new)));
        StatementTraffic { client: Some(Arc::new(client)), driver, running: VecDeque::new(), prepared }
    }

    /// A statement that recurs as the server has prepared it; or what prepares it.
    fn prepared(&self, client: &Arc<Client>, statement: &Statement) -> (Option<Prepared>, Option<Rows>) {
        let mut prepared = self.prepared.lock();
        let Some(all) = prepared.as_mut() else { return (None, None) };
        if let Some(known) = all.get(&statement.sql) {
            return (known.clone(), None);
        }
        all.insert(statement.sql.clone(), None);
        let (client, prepared) = (Arc::clone(client), Arc::clone(&self.prepared));
        let sql = statement.sql.clone();
        let types: Vec<Type> = statement.values.iter().map(Value::sql_type).collect();
        let preparing: Rows = Box::pin(async move {
            let ready = client.prepare_typed(&sql, &types).await?;
            if let Some(all) = prepared.lock().as_mut() {
                all.insert(sql, Some(ready));
            }
            Ok(Vec::new())
        });
        (None, Some(preparing))
    }

    /// Polls the driver, and takes the answers that it brings.
    fn poll(&mut self, core: &Core<StatementTraffic>, heard: &mut Vec<Heard>) -> Result<(), String> {
        loop {
            match self.driver.poll_message(&mut core.context()) {
                Poll::Ready(Some(Ok(AsyncMessage::Notification(notification)))) => {
                    heard.push(Heard::Notification(notification.channel().to_string()));
                }
                Poll::Ready(Some(Ok(AsyncMessage::Notice(notice)))) => {
                    tracing::debug!("{} says: {}", core.common.info.host, notice.message());
                    // The server answers that the commit is done, but a failover may forget it: it is not known.
                    if notice.routine() == Some("SyncRepWaitForLSN") {
                        return Err("the wait for a synchronous standby was cancelled".to_string());
                    }
                }
                Poll::Ready(Some(Ok(_))) => {}
                Poll::Ready(Some(Err(error))) => return Err(error.to_string()),
                Poll::Ready(None) => return Err("nobody uses it any more".to_string()),
                Poll::Pending => break,
            }
        }
        while let Some(first) = self.running.front_mut()
            && let Poll::Ready(rows) = first.rows.as_mut().poll(&mut core.context())
        {
            let answered = self.running.pop_front().map(|running| running.answered(rows, &self.prepared, &core.common));
            heard.extend(answered);
        }
        Ok(())
    }
}

impl Traffic for StatementTraffic {
    type Request = Request;
    type Heard = Heard;
    type Common = Common;

    fn start(&mut self, request: Request, core: &Core<StatementTraffic>, heard: &mut Vec<Heard>) {
        let Some(client) = self.client.clone() else { return };
        let Request { mut statement, tell, .. } = request;
        for value in &mut statement.values {
            if let Value::Deadline(not_after) = value {
                let latest = core.common.info.offset.lock().deadline(*not_after);
                *value = Value::Moment(Moment::from_millis(latest));
            }
        }
        let sent = Boottime::now();
        if let Some(connection) = core.handle() {
            let _ = tell.sent_on.set((connection, sent));
        }
        let (prepared, preparing) = match statement.recurs {
            true => self.prepared(&client, &statement),
            false => (None, None),
        };
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
            match running.rows.as_mut().poll(&mut core.context()) {
                Poll::Ready(rows) => heard.push(running.answered(rows, &self.prepared, &core.common)),
                Poll::Pending => self.running.push_back(running),
            }
        }
    }

    fn send(&mut self, core: &Core<StatementTraffic>, heard: &mut Vec<Heard>) -> Result<(), String> {
        self.take_in(core, heard)
    }

    fn take_in(&mut self, core: &Core<StatementTraffic>, heard: &mut Vec<Heard>) -> Result<(), String> {
        // What was woken before is polled now.
        core.was_woken();
        loop {
            self.poll(core, heard)?;
            if !core.was_woken() {
                return Ok(());
            }
        }
    }

    fn awaited(&self, common: &Common) -> usize {
        let awaited = |running: &&Running| !running.tell.caller.is_closed();
        common.told.listened.load(Ordering::SeqCst) + self.running.iter().filter(awaited).count()
    }

    fn pass_on(heard: Heard, core: &Core<StatementTraffic>) {
        match heard {
            Heard::Answer(tell, answer) => tell.answer(answer),
            Heard::Notification(channel) => {
                if let Some(notified) = &core.common.told.notified {
                    notified(&channel);
                }
            }
        }
    }

    /// Says goodbye, where nothing is under way any more.
    fn close(&mut self) -> VecDeque<Request> {
        self.client = None;
        if self.running.is_empty() {
            let _ = self.driver.poll_message(&mut Context::from_waker(Waker::noop()));
        }
        VecDeque::new()
    }

    fn end(self, why: &str, core: &Core<StatementTraffic>) {
        let StatementTraffic { driver, running, prepared, .. } = self;
        // Statements are answered by this.
        drop(driver);
        let mut context = Context::from_waker(Waker::noop());
        for mut running in running {
            let answered = match running.rows.as_mut().poll(&mut context) {
                Poll::Ready(rows) => running.answered(rows, &prepared, &core.common),
                Poll::Pending => {
                    let unknown = StoreError::unknown(format!("the connection broke: {why}"));
                    Heard::Answer(running.tell, Err(unknown.into()))
                }
            };
            StatementTraffic::pass_on(answered, core);
        }
        let info = &core.common.info;
        *info.has_ended.lock() = true;
        info.ended.notify_waiters();
    }
}

impl Running {
    fn answered(
        self,
        rows: Result<Vec<Row>, tokio_postgres::Error>,
        prepared: &PreparedStatements,
        common: &Common,
    ) -> Heard {
        let Running { sent, tell, .. } = self;
        let received = Boottime::now();
        *common.last_answer.lock() = received;
        let answer = match rows {
            Ok(rows) => Ok(Answered { rows, sent, received, info: Arc::clone(&common.info) }),
            Err(error) => {
                if sqlstate::is_of_preparing(&error) {
                    // Sent again, and from now on, as it is.
                    *prepared.lock() = None;
                }
                Err(sqlstate::of_statement(&error, common.info.connection))
            }
        };
        Heard::Answer(tell, answer)
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

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::{TcpListener, TcpStream};

    use super::*;
    use crate::stores::network::connection::Task;
    use crate::stores::network::link::Connection as _;
    use crate::sys::runtime::block_on;
    use crate::sys::sockets::Socket;

    const MINUTE: Duration = Duration::from_secs(60);

    /// A connection to a server that has let us in, and is the test's from then on.
    fn connection() -> (Connection, Task<StatementTraffic>, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let server = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut length = [0; 4];
            stream.read_exact(&mut length).unwrap();
            stream.read_exact(&mut vec![0; u32::from_be_bytes(length) as usize - 4]).unwrap();
            // AuthenticationOk, ReadyForQuery.
            stream.write_all(b"R\0\0\0\x08\0\0\0\0Z\0\0\0\x05I").unwrap();
            stream
        });
        let connected = async {
            let stream = Stream::Tcp(Socket::connect(address, MINUTE).await.unwrap());
            let poller = stream.poller();
            let (client, driver) = tokio_postgres::Config::new().user("u").connect_raw(stream, NoTls).await.unwrap();
            (client, driver, poller)
        };
        let (client, driver, poller) = block_on(connected).unwrap();
        let cancelling = Cancelling::new(&client, Address::Tcp { host: "h".into(), port: 1 }, None);
        let (now, at) = (Moment::from_millis(1000), Boottime::now());
        let version = String::new();
        let greeting = Greeting { now, sent: at, received: at, version, standby: false, is_direct: true };
        let info = Arc::new(ServerInfo::new(&greeting, "h".into(), 0, &Clocks::new("", Duration::ZERO), 1));
        let told = Told { notified: None, listened: Arc::default() };
        let common = Common::new(info, told, MINUTE, cancelling);
        let (connection, task) = Connection::new(StatementTraffic::new(client, driver, true), poller, common);
        (connection, task, server.join().unwrap())
    }

    fn start(connection: &Connection, sql: String) -> Pending {
        let (tell, pending) = answer();
        let statement = Statement { sql, values: Vec::new(), recurs: false };
        assert!(connection.start(Request { statement, give_up_at: Boottime::NEVER, tell }).is_ok());
        pending
    }

    /// A thread whose statement has no room yet reads for one whose statement was sent: both wait.
    #[test]
    fn a_statement_without_room_is_awaited_too() {
        // The server takes nothing but what its socket does.
        let (connection, _task, _server) = connection();
        let driven = connection.driven().unwrap();
        let _long = start(&connection, " ".repeat(32 << 20));
        assert_eq!(driven.awaited(), 1);
        let short = start(&connection, "SELECT 1".to_string());
        assert_eq!(driven.awaited(), 2);
        drop(short);
        assert_eq!(driven.awaited(), 1);
    }

    #[test]
    fn a_connection_that_nobody_has_any_more_says_goodbye() {
        let (connection, task, mut server) = connection();
        drop(connection);
        block_on(task.run(|why, _| assert_eq!(why, "the store was closed"))).unwrap();
        let mut said = Vec::new();
        server.read_to_end(&mut said).unwrap();
        assert_eq!(said, b"X\0\0\0\x04");
    }

    #[test]
    fn what_was_sent_when_the_connection_ended_is_not_known() {
        let (connection, task, server) = connection();
        let mut sent = start(&connection, "SELECT 1".to_string());
        drop(server);
        block_on(task.run(|_, _| ())).unwrap();
        let failure = sent.told.try_recv().unwrap().err().expect("there was no answer");
        assert_eq!(failure.into_error().kind, crate::store::StoreErrorKind::Unknown);
        block_on(connection.info.ended()).unwrap();
    }
}
