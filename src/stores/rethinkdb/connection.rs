//! One connection, with many queries in flight on it.
//!
//! The thread that has a query writes it to the socket, so that no other must be woken for it; and while it waits for
//! the answer it reads what comes. A task reads where no thread waits, and writes what the socket did not take at once.

use std::collections::{HashMap, VecDeque};
use std::future::{Future, poll_fn};
use std::pin::{Pin, pin};
use std::sync::{Arc, OnceLock, Weak};
use std::task::{Context, Poll, Waker, ready};
use std::time::Duration;
use std::{io, mem};

use tokio::sync::{Notify, oneshot};

use super::frame::{self, Decoder};
use super::reply;
use super::server_info::{FIRST_TOKEN, ServerInfo};
use crate::clock::Boottime;
use crate::store::StoreError;
use crate::stores::network::skew::Offset;
use crate::stores::network::stream::{self, Duplex};
use crate::stores::network::wire::{READS_IN_A_ROW, Received, Silence, Wire};
use crate::sys::mutex::Mutex;
use crate::sys::process;
use crate::sys::runtime::{self, Driven, Source};
use crate::sys::sockets::SocketPoller;

/// RethinkDB ql2.proto: Query.QueryType.
const CONTINUE: &[u8] = b"[2]";
const STOP: &[u8] = b"[3]";
const SERVER_INFO: &[u8] = b"[5]";

/// A body of a query, written when it is known which server gets it: what it says of time is in that
/// server's clock.
pub type Body = Arc<dyn Fn(&Offset) -> Vec<u8> + Send + Sync>;

/// One query that waits to be sent.
pub struct Query {
    pub body: Body,
    /// Not sent any more from here on.
    pub give_up_at: Boottime,
    pub tell: Tell,
}

/// Where an answer goes.
pub enum Tell {
    Asker(oneshot::Sender<Result<Answered, StoreError>>),
    /// Who follows a stream. Called by the thread that read the answer.
    Follower(Arc<dyn Follow>),
}

impl Tell {
    pub fn answer(self, answer: Result<Answered, StoreError>) {
        match self {
            Tell::Asker(asker) => {
                if let Err(Ok(unwanted)) = asker.send(answer)
                    && reply::has_more(&unwanted.body)
                {
                    // Nobody waits for it any more, and the server would keep its stream forever.
                    unwanted.rest().stop();
                }
            }
            Tell::Follower(follower) => follower.told(answer),
        }
    }
}

/// Follows a stream, part by part.
pub trait Follow: Send + Sync {
    fn told(&self, answer: Result<Answered, StoreError>);
}

/// What came back.
pub struct Answered {
    pub body: Vec<u8>,
    /// When the query was handed to the socket, and when its answer was there.
    pub sent: Boottime,
    pub received: Boottime,
    pub token: u64,
    pub connection: Connection,
}

impl Answered {
    /// What the server keeps of the stream that this is a part of.
    pub fn rest(&self) -> Rest {
        Rest { shared: Arc::downgrade(&self.connection.handle.0), token: self.token }
    }
}

/// A stream that a server keeps for us. Does not keep the connection alive.
#[derive(Clone)]
pub struct Rest {
    shared: Weak<ConnectionCore>,
    token: u64,
}

impl Rest {
    /// Asks for more of it.
    pub fn resume(&self, tell: Tell) {
        let mut tell = Some(tell);
        if let Some(shared) = self.shared.upgrade() {
            shared.give(|io_state| tell.take().map(|tell| io_state.resume(self.token, tell)));
        }
        if let Some(tell) = tell {
            tell.answer(Err(ended("it was closed")));
        }
    }

    /// Ends it. Who follows it hears nothing more.
    pub fn stop(&self) {
        if let Some(shared) = self.shared.upgrade() {
            shared.give(|io_state| io_state.stop(self.token));
        }
    }
}

/// A handle of a connection. Dropping all of them ends it.
#[derive(Clone)]
pub struct Connection {
    handle: Arc<Handle>,
    pub info: Arc<ServerInfo>,
}

struct Handle(Arc<ConnectionCore>);

impl Drop for Handle {
    fn drop(&mut self) {
        self.0.end("the store was closed");
    }
}

/// What handles, the task and threads that wait have in common.
struct ConnectionCore {
    /// `None` when the connection has ended.
    io_state: Mutex<Option<ConnectionIo>>,
    /// Tells the task that there is something to do.
    task: Notify,
    /// Why the connection is to end.
    ending: OnceLock<&'static str>,
    /// The process whose connection it is.
    generation: u64,
    poller: SocketPoller,
    /// For answers, which come with a handle; weak, so that the task does not keep itself alive.
    own: Weak<Handle>,
    info: Arc<ServerInfo>,
}

impl ConnectionCore {
    fn end(&self, why: &'static str) {
        // The first reason stays.
        let _ = self.ending.set(why);
        self.task.notify_one();
    }

    /// Lets `work` say what is to be sent, and sends it as far as the socket takes it at once. `None` when the
    /// connection has ended, or is the parent process's.
    fn give<T>(&self, work: impl FnOnce(&mut ConnectionIo) -> T) -> Option<T> {
        if self.generation != process::generation() || self.ending.get().is_some() {
            return None;
        }
        let mut io_state = self.io_state.lock();
        let given = io_state.as_mut().map(|io_state| (work(io_state), io_state.write_at_once()));
        drop(io_state);
        // What `work` gives is dropped out here, by the caller: it may be the last that somebody waits for.
        let (given, all_written) = given?;
        if !all_written {
            self.task.notify_one();
        }
        Some(given)
    }

    fn pass_on(&self, heard: Vec<Heard>) {
        for heard in heard {
            match heard {
                Heard::TooLate(tell) => {
                    tell.answer(Err(StoreError::unreachable("the query could not be sent in time")));
                }
                Heard::Answer { tell, body, sent, received, token } => {
                    let Some(handle) = self.own.upgrade() else {
                        tell.answer(Err(ended("it was closed")));
                        continue;
                    };
                    let connection = Connection { handle, info: Arc::clone(&self.info) };
                    tell.answer(Ok(Answered { body, sent, received, token, connection }));
                }
            }
        }
    }
}

impl Driven for ConnectionCore {
    fn source(&self) -> &dyn Source {
        &self.poller
    }

    fn take_in(&self) -> bool {
        let mut heard = Vec::new();
        let goes_on = self.io_state.lock().as_mut().is_some_and(|io_state| {
            let goes_on = io_state.take_in();
            mem::swap(&mut heard, &mut io_state.heard);
            goes_on
        });
        // Outside the lock: who is woken may have more to send.
        self.pass_on(heard);
        if !goes_on {
            // It finds out why, and ends the connection.
            self.task.notify_one();
        }
        goes_on
    }

    fn awaited(&self) -> usize {
        self.io_state.lock().as_ref().map_or(1, |io_state| io_state.sent.len() + io_state.waiting.len())
    }
}

impl Connection {
    /// Takes over a socket, which `poller` polls. The driver is to be run for as long as the connection lives.
    pub fn new(
        stream: Box<dyn Duplex>,
        poller: SocketPoller,
        info: Arc<ServerInfo>,
        patience: Duration,
    ) -> (Connection, Driver) {
        let handle = Arc::new_cyclic(|own: &Weak<Handle>| {
            Handle(Arc::new(ConnectionCore {
                io_state: Mutex::new(Some(ConnectionIo::new(stream, Arc::clone(&info), patience))),
                task: Notify::new(),
                ending: OnceLock::new(),
                generation: process::generation(),
                poller,
                own: own.clone(),
                info: Arc::clone(&info),
            }))
        });
        let driver = Driver { shared: Arc::clone(&handle.0) };
        (Connection { handle, info }, driver)
    }

    /// What a thread runs that waits for an answer.
    pub fn driven(&self) -> Arc<dyn Driven> {
        Arc::clone(&self.handle.0) as Arc<dyn Driven>
    }

    /// Sends a query; gives it back where the connection has ended.
    pub fn start(&self, query: Query) -> Result<(), Query> {
        let mut query = Some(query);
        self.handle.0.give(|io_state| query.take().map(|query| io_state.start(query)));
        query.map_or(Ok(()), Err)
    }

    /// Ends the connection for all its handles: streams too begin again, on the next one.
    pub fn leave(&self) {
        self.handle.0.end("another host of the URL is tried");
    }
}

/// More of the stream that `answered` is a part of.
pub fn more_of(answered: &Answered) -> impl Future<Output = Result<Answered, StoreError>> + Send + Unpin + use<> {
    let (tell, told) = oneshot::channel();
    answered.rest().resume(Tell::Asker(tell));
    let driven = answered.connection.driven();
    answer_of(told, move || runtime::drive(Arc::clone(&driven)))
}

/// What a query is answered with: the connection's end is an answer too. `drive` is called while it has to be waited for.
pub fn answer_of(
    told: oneshot::Receiver<Result<Answered, StoreError>>,
    drive: impl Fn() + Send + Unpin,
) -> impl Future<Output = Result<Answered, StoreError>> + Send + Unpin {
    struct Told<D> {
        told: oneshot::Receiver<Result<Answered, StoreError>>,
        drive: D,
    }
    impl<D: Fn() + Unpin> Future for Told<D> {
        type Output = Result<Answered, StoreError>;
        fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
            let told = Pin::new(&mut self.told).poll(context);
            if told.is_pending() {
                (self.drive)();
            }
            told.map(|told| told.unwrap_or_else(|_| Err(ended("it was closed"))))
        }
    }
    impl<D> Drop for Told<D> {
        /// An answer that came and was not taken may be the beginning of a stream, which the server would keep.
        fn drop(&mut self) {
            self.told.close();
            if let Ok(Ok(untaken)) = self.told.try_recv()
                && reply::has_more(&untaken.body)
            {
                untaken.rest().stop();
            }
        }
    }
    Told { told, drive }
}

fn ended(why: &str) -> StoreError {
    StoreError::unknown(format!("the connection ended before the reply arrived: {why}"))
}

/// A query that was sent.
struct Sent {
    /// `None`: a sign of life, which nobody waits for.
    tell: Option<Tell>,
    at: Boottime,
}

/// What is under way on the socket.
struct ConnectionIo {
    wire: Wire,
    info: Arc<ServerInfo>,
    /// What went wrong on a thread that is not the task's.
    failure: Option<io::Error>,
    /// Wakes the task. What other threads read is read for it.
    task: Option<Waker>,
    /// Queries for which there was no room yet.
    waiting: VecDeque<Query>,
    decoder: Decoder,
    /// Queries under way, by token.
    sent: HashMap<u64, Sent>,
    next_token: u64,
    /// Answers that nobody was given yet.
    heard: Vec<Heard>,
}

enum Heard {
    Answer {
        tell: Tell,
        body: Vec<u8>,
        sent: Boottime,
        received: Boottime,
        token: u64,
    },
    /// It could not be sent in time.
    TooLate(Tell),
}

/// The task's own part.
pub struct Driver {
    shared: Arc<ConnectionCore>,
}

impl Driver {
    /// Runs the connection to its end, and says why it ended, with the queries that were not sent: before those that
    /// were sent are answered.
    pub async fn run(self, ended_with: impl FnOnce(&str, VecDeque<Query>)) {
        let why = self.until_the_end().await;
        let ended_io = self.shared.io_state.lock().take();
        let Some(ConnectionIo { mut wire, waiting, sent, heard, .. }) = ended_io else { return };
        wire.shut_down();
        ended_with(&why, waiting);
        // What came in since the last look: queries that were too late to be sent.
        self.shared.pass_on(heard);
        for tell in sent.into_values().filter_map(|sent| sent.tell) {
            tell.answer(Err(ended(&why)));
        }
    }

    async fn until_the_end(&self) -> String {
        let mut woken = pin!(self.shared.task.notified());
        poll_fn(|context| {
            loop {
                let mut heard = Vec::new();
                let outcome = match self.shared.io_state.lock().as_mut() {
                    Some(io_state) => {
                        io_state.task = Some(context.waker().clone());
                        let outcome = io_state.poll(context);
                        mem::swap(&mut heard, &mut io_state.heard);
                        outcome
                    }
                    None => return Poll::Ready("it has ended".to_string()),
                };
                // Outside the lock: a task that is woken, or gone, may have more to send.
                self.shared.pass_on(heard);
                if outcome.is_ready() {
                    return outcome;
                }
                if let Some(why) = self.shared.ending.get() {
                    return Poll::Ready(why.to_string());
                }
                ready!(woken.as_mut().poll(context));
                woken.set(self.shared.task.notified());
            }
        })
        .await
    }
}

impl ConnectionIo {
    fn new(stream: Box<dyn Duplex>, info: Arc<ServerInfo>, patience: Duration) -> ConnectionIo {
        ConnectionIo {
            wire: Wire::new(stream, patience),
            info,
            failure: None,
            task: None,
            waiting: VecDeque::new(),
            decoder: Decoder::default(),
            sent: HashMap::new(),
            next_token: FIRST_TOKEN,
            heard: Vec::new(),
        }
    }

    fn start(&mut self, query: Query) {
        if self.waiting.is_empty() && self.wire.has_room() {
            self.send(query);
        } else {
            self.waiting.push_back(query);
        }
    }

    fn resume(&mut self, token: u64, tell: Tell) {
        frame::write(&mut self.wire.out, token, CONTINUE);
        self.sent.insert(token, Sent { tell: Some(tell), at: Boottime::now() });
    }

    /// Gives back what is waited for no more.
    fn stop(&mut self, token: u64) -> Option<Sent> {
        frame::write(&mut self.wire.out, token, STOP);
        self.sent.remove(&token)
    }

    fn send(&mut self, query: Query) {
        let at = Boottime::now();
        if query.give_up_at <= at {
            return self.heard.push(Heard::TooLate(query.tell));
        }
        let body = (query.body)(&self.info.offset());
        let token = self.next_token;
        self.next_token += 1;
        frame::write(&mut self.wire.out, token, &body);
        self.sent.insert(token, Sent { tell: Some(query.tell), at });
    }

    /// Ready with the reason when the connection has ended.
    fn poll(&mut self, context: &mut Context<'_>) -> Poll<String> {
        match self.poll_work(context) {
            Poll::Pending => Poll::Pending,
            Poll::Ready(Ok(why)) => Poll::Ready(why.to_string()),
            Poll::Ready(Err(error)) => Poll::Ready(stream::why(&error)),
        }
    }

    fn poll_work(&mut self, context: &mut Context<'_>) -> Poll<io::Result<&'static str>> {
        if !self.read(context)? {
            return Poll::Ready(Ok("the server closed the connection"));
        }
        if let Some(error) = self.failure.take() {
            return Poll::Ready(Err(error));
        }
        loop {
            while self.wire.has_room()
                && let Some(query) = self.waiting.pop_front()
            {
                self.send(query);
            }
            self.wire.write(context)?;
            if self.waiting.is_empty() || !self.wire.has_room() {
                break;
            }
        }
        self.poll_keepalive(context)
    }

    /// Writes what the socket takes now. `false`: there is something for the task to do.
    fn write_at_once(&mut self) -> bool {
        match self.wire.write(&mut Context::from_waker(Waker::noop())) {
            Ok(()) => self.wire.is_written() && self.heard.is_empty() && self.waiting.is_empty(),
            Err(error) => {
                self.failure.get_or_insert(error);
                false
            }
        }
    }

    /// Reads what has come, on a thread that waits. `false`: the task has to do it.
    fn take_in(&mut self) -> bool {
        let Some(task) = self.task.clone() else { return false };
        match self.read(&mut Context::from_waker(&task)) {
            Ok(goes_on) => goes_on,
            Err(error) => {
                self.failure.get_or_insert(error);
                false
            }
        }
    }

    /// `false`: the other end has hung up.
    fn read(&mut self, context: &mut Context<'_>) -> io::Result<bool> {
        for _ in 0..READS_IN_A_ROW {
            match self.wire.read(context, |bytes, _| {
                self.decoder.push(bytes);
                Ok(())
            })? {
                Received::Bytes => self.take_answers()?,
                Received::Nothing => return Ok(true),
                Received::End => return Ok(false),
            }
        }
        context.waker().wake_by_ref();
        Ok(true)
    }

    fn take_answers(&mut self) -> io::Result<()> {
        let violation = |message: String| io::Error::new(io::ErrorKind::InvalidData, message);
        loop {
            let frame = match self.decoder.next_frame() {
                Ok(Some(frame)) => frame,
                Ok(None) => return Ok(()),
                Err(frame::TooLong(length)) => return Err(violation(format!("a reply claims {length} bytes"))),
            };
            if frame.token < FIRST_TOKEN || frame.token >= self.next_token {
                return Err(violation("a reply to a query that was never sent".to_string()));
            }
            let Some(sent) = self.sent.remove(&frame.token) else {
                // Of a stream that was stopped.
                continue;
            };
            let Some(tell) = sent.tell else { continue };
            let received = self.wire.heard_at();
            self.heard.push(Heard::Answer { tell, body: frame.body, sent: sent.at, received, token: frame.token });
        }
    }

    /// Asks a silent server for a sign of life, and ends the connection when none comes.
    fn poll_keepalive(&mut self, context: &mut Context<'_>) -> Poll<io::Result<&'static str>> {
        loop {
            match ready!(self.wire.poll_silence(context, self.sent.is_empty())) {
                Silence::TooLong => return Poll::Ready(Ok("the server does not respond")),
                Silence::Ask => {
                    let token = self.next_token;
                    self.next_token += 1;
                    frame::write(&mut self.wire.out, token, SERVER_INFO);
                    self.sent.insert(token, Sent { tell: None, at: Boottime::now() });
                    self.wire.write(context)?;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::task::Wake;

    use super::*;
    use crate::store::StoreErrorKind;
    use crate::stores::network::testing::{Full, Says};
    use crate::stores::rethinkdb::testing::{Written, connection, connection_over};
    use crate::sys::runtime::block_on;

    /// A waiter that is granted while its feed begins: the answer is there, and nobody reads it.
    #[test]
    fn a_stream_whose_beginning_nobody_takes_is_stopped() {
        let written = Written::default();
        let (connection, _driver) = connection(&written);
        let at = Boottime::now();
        let mut stop = Vec::new();
        frame::write(&mut stop, 7, STOP);
        for (body, expected) in [(&br#"{"t":2,"r":[]}"#[..], Vec::new()), (br#"{"t":3,"r":[]}"#, stop)] {
            let (tell, told) = oneshot::channel();
            let future = answer_of(told, || ());
            let connection = connection.clone();
            let answered = Answered { body: body.to_vec(), sent: at, received: at, token: 7, connection };
            assert!(tell.send(Ok(answered)).is_ok());
            drop(future);
            assert_eq!(*written.0.lock(), expected);
        }
    }

    fn query(body: &'static [u8], give_up_at: Boottime) -> (Query, oneshot::Receiver<Result<Answered, StoreError>>) {
        let (tell, told) = oneshot::channel();
        (Query { body: Arc::new(move |_| body.to_vec()), give_up_at, tell: Tell::Asker(tell) }, told)
    }

    /// Written by the caller, without the task; what is too late is not.
    #[test]
    fn queries_are_written_at_once() {
        let written = Written::default();
        let (connection, driver) = connection(&written);
        let (good, _told) = query(b"[1]", Boottime::NEVER);
        assert!(connection.start(good).is_ok());
        let mut expected = Vec::new();
        frame::write(&mut expected, FIRST_TOKEN, b"[1]");
        assert_eq!(*written.0.lock(), expected);

        let (late, mut told) = query(b"[1]", Boottime::ZERO);
        assert!(connection.start(late).is_ok());
        assert_eq!(*written.0.lock(), expected);
        let heard = mem::take(&mut driver.shared.io_state.lock().as_mut().unwrap().heard);
        driver.shared.pass_on(heard);
        assert!(told.try_recv().unwrap().is_err());
    }

    /// Starts a query when it is woken.
    struct Starts(Mutex<Option<(Connection, Query)>>);

    impl Wake for Starts {
        fn wake(self: Arc<Self>) {
            if let Some((connection, query)) = self.0.lock().take() {
                assert!(connection.start(query).is_ok());
            }
        }
    }

    /// A query that was too late comes in between the last look at what came in and the end of the connection: it is
    /// known that it was not sent.
    #[test]
    fn what_was_too_late_when_the_connection_ended_was_not_sent() {
        let mut reply = Vec::new();
        frame::write(&mut reply, FIRST_TOKEN, br#"{"t":1,"r":[1]}"#);
        let (connection, driver) = connection_over(Box::new(Says(reply)));
        let (answered, mut told) = query(b"[1]", Boottime::NEVER);
        assert!(connection.start(answered).is_ok());
        let (late, mut late_told) = query(b"[1]", Boottime::ZERO);
        let starts = Arc::new(Starts(Mutex::new(Some((connection, late)))));
        let waker = Waker::from(starts);
        assert!(Pin::new(&mut told).poll(&mut Context::from_waker(&waker)).is_pending());
        block_on(driver.run(|_, _| ())).unwrap();
        assert!(told.try_recv().unwrap().is_ok());
        let error = late_told.try_recv().expect("it is answered").err().expect("it was not sent");
        assert_eq!(error.kind, StoreErrorKind::Unreachable, "{error}");
    }

    struct Told(Mutex<Vec<bool>>);

    impl Follow for Told {
        fn told(&self, answer: Result<Answered, StoreError>) {
            self.0.lock().push(answer.is_ok());
        }
    }

    /// The link leaves a host while a part of a stream comes in: who follows it has to begin again on the next one.
    #[test]
    fn a_part_that_comes_when_the_connection_was_left_is_the_end_of_its_stream() {
        let mut reply = Vec::new();
        frame::write(&mut reply, FIRST_TOKEN, br#"{"t":3,"r":[]}"#);
        let (connection, driver) = connection_over(Box::new(Says(reply)));
        let told = Arc::new(Told(Mutex::default()));
        let tell = Tell::Follower(Arc::clone(&told) as Arc<dyn Follow>);
        let changes = Query { body: Arc::new(|_| b"[1]".to_vec()), give_up_at: Boottime::NEVER, tell };
        assert!(connection.start(changes).is_ok());
        connection.leave();
        drop(connection);
        block_on(driver.run(|_, _| ())).unwrap();
        assert_eq!(*told.0.lock(), [false]);
    }

    /// A thread whose query has no room yet reads for one whose query was sent: both wait.
    #[test]
    fn a_query_without_room_is_awaited_too() {
        let (connection, driver) = connection_over(Box::new(Full));
        let long = Query { body: Arc::new(|_| vec![b' '; 2 << 20]), ..query(b"", Boottime::NEVER).0 };
        let (short, _told) = query(b"[1]", Boottime::NEVER);
        assert!(connection.start(long).is_ok());
        assert_eq!(driver.shared.awaited(), 1);
        assert!(connection.start(short).is_ok());
        assert_eq!(driver.shared.awaited(), 2);
    }

    /// A connection that was left, or has ended, gives queries back, and writes no more.
    #[test]
    fn what_has_ended_gives_queries_back() {
        let written = Written::default();
        let (connection, driver) = connection(&written);
        connection.leave();
        let (unsent, _told) = query(b"[1]", Boottime::NEVER);
        assert!(connection.start(unsent).is_err());
        drop(driver.shared.io_state.lock().take());
        Rest { shared: Arc::downgrade(&connection.handle.0), token: 3 }.stop();
        assert!(written.0.lock().is_empty());
    }
}
