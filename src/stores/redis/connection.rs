//! One connection, with many commands in flight on it, and the server's pushes.
//!
//! The thread that has a request writes it to the socket, so that no other must be woken for it; and while it waits for
//! the answer it reads what comes. A task reads where no thread waits, and writes what the socket did not take at once.

use std::collections::{HashSet, VecDeque};
use std::future::{Future, poll_fn};
use std::pin::pin;
use std::sync::{Arc, OnceLock, Weak};
use std::task::{Context, Poll, Waker, ready};
use std::time::Duration;
use std::{io, mem};

use tokio::sync::{Notify, oneshot};

use super::commands::Command;
use super::greeting::ServerInfo;
use super::resp::{self, Decoder, Value};
use super::watches::{Watched, Watches};
use crate::clock::Boottime;
use crate::store::StoreError;
use crate::stores::network::stream::{self, Duplex};
use crate::stores::network::wire::{READS_IN_A_ROW, Received, Silence, Wire};
use crate::sys::mutex::Mutex;
use crate::sys::process;
use crate::sys::runtime::{Driven, Source};
use crate::sys::sockets::SocketPoller;

/// Commands that are sent together, and waited for together.
pub struct Request {
    pub commands: Arc<[Command]>,
    /// Whether all scripts are sent with their text, because the server has forgotten them.
    pub whole_scripts: bool,
    /// Not sent any more from here on.
    pub give_up_at: Boottime,
    pub tell: Tell,
}

/// Where the answer goes.
pub enum Tell {
    Asker(oneshot::Sender<Result<Answered, StoreError>>),
    /// The look that arms a watch.
    Watched(Arc<Watched>),
}

impl Tell {
    pub fn answer(self, answer: Result<Answered, StoreError>) {
        match self {
            // An asker that has gone wants no answer; what it asked for is done.
            Tell::Asker(asker) => drop(asker.send(answer)),
            Tell::Watched(watched) => watched.armed(answer.map(|answered| (answered.replies, answered.received))),
        }
    }
}

/// What came back.
pub struct Answered {
    /// One for each command.
    pub replies: Vec<Value>,
    /// When the commands were handed to the socket, and when the last reply was there.
    pub sent: Boottime,
    pub received: Boottime,
    pub connection: Connection,
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
    watches: Arc<Watches>,
}

impl ConnectionCore {
    fn end(&self, why: &'static str) {
        // The first reason stays.
        let _ = self.ending.set(why);
        self.task.notify_one();
    }

    fn pass_on(&self, heard: Vec<Heard>) {
        for heard in heard {
            match heard {
                Heard::TooLate(tell) => {
                    tell.answer(Err(StoreError::unreachable("the request could not be sent in time")));
                }
                Heard::Changed(Some(keys)) => keys.iter().for_each(|key| self.watches.changed(key)),
                Heard::Changed(None) => self.watches.all_changed(),
                Heard::Answer { tell, replies, sent, received } => {
                    let Some(handle) = self.own.upgrade() else { continue };
                    let connection = Connection { handle, info: Arc::clone(&self.info) };
                    tell.answer(Ok(Answered { replies, sent, received, connection }));
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
        // More than two are no more than two.
        let watches = self.watches.0.lock().values().flatten().take(2).count();
        watches + self.io_state.lock().as_ref().map_or(1, |io_state| io_state.sent.len() + io_state.waiting.len())
    }
}

impl Connection {
    /// Takes over a socket, which `poller` polls. The driver is to be run for as long as the connection lives.
    pub fn new(
        stream: Box<dyn Duplex>,
        poller: SocketPoller,
        info: Arc<ServerInfo>,
        patience: Duration,
        watches: Arc<Watches>,
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
                watches,
            }))
        });
        let driver = Driver { shared: Arc::clone(&handle.0) };
        (Connection { handle, info }, driver)
    }

    /// What a thread runs that waits for an answer.
    pub fn driven(&self) -> Arc<dyn Driven> {
        Arc::clone(&self.handle.0) as Arc<dyn Driven>
    }

    /// Sends a request; gives it back where the connection has ended, or is the parent process's.
    pub fn start(&self, request: Request) -> Result<(), Request> {
        let shared = &self.handle.0;
        if shared.generation != process::generation() || shared.ending.get().is_some() {
            return Err(request);
        }
        let mut io_state = shared.io_state.lock();
        let Some(present) = io_state.as_mut() else { return Err(request) };
        present.start(request);
        let all_written = present.write_at_once();
        drop(io_state);
        if !all_written {
            shared.task.notify_one();
        }
        Ok(())
    }

    /// Ends the connection, also for others that have a handle of it.
    pub fn leave(&self, why: &'static str) {
        self.handle.0.end(why);
    }
}

/// What a request is answered with: the connection's end is an answer too.
pub fn answer_of(
    told: Result<Result<Answered, StoreError>, oneshot::error::RecvError>,
) -> Result<Answered, StoreError> {
    told.unwrap_or_else(|_| Err(ended("it was closed")))
}

fn ended(why: &str) -> StoreError {
    StoreError::unknown(format!("the connection ended before the reply arrived: {why}"))
}

/// A request that was sent.
struct Sent {
    /// `None`: a sign of life, which nobody waits for.
    tell: Option<Tell>,
    at: Boottime,
    count: usize,
    replies: Vec<Value>,
}

/// What is under way on the socket.
struct ConnectionIo {
    wire: Wire,
    info: Arc<ServerInfo>,
    /// What went wrong on a thread that is not the task's.
    failure: Option<io::Error>,
    /// Wakes the task. What other threads read is read for it.
    task: Option<Waker>,
    /// Requests that did not fit yet.
    waiting: VecDeque<Request>,
    decoder: Decoder,
    /// The hashes of scripts that were sent with their text on this connection: the server knows them.
    scripts: HashSet<[u8; 40]>,
    /// Requests under way, in the order of their replies.
    sent: VecDeque<Sent>,
    /// What was read, and not passed on yet.
    heard: Vec<Heard>,
}

enum Heard {
    Answer {
        tell: Tell,
        replies: Vec<Value>,
        sent: Boottime,
        received: Boottime,
    },
    /// Keys that were changed; `None`: perhaps all.
    Changed(Option<Vec<Vec<u8>>>),
    /// It could not be sent in time.
    TooLate(Tell),
}

/// The task's own part.
pub struct Driver {
    shared: Arc<ConnectionCore>,
}

impl Driver {
    /// Runs the connection to its end, and says why it ended, with the requests that were not sent: before those that
    /// were sent are answered.
    pub async fn run(self, ended_with: impl FnOnce(&str, VecDeque<Request>)) {
        let why = self.until_the_end().await;
        let ended_io = self.shared.io_state.lock().take();
        let Some(ConnectionIo { wire, waiting, sent, heard, .. }) = ended_io else { return };
        wire.shut_down();
        ended_with(&why, waiting);
        // What came in since the last look: requests that were too late to be sent.
        self.shared.pass_on(heard);
        for tell in sent.into_iter().filter_map(|sent| sent.tell) {
            tell.answer(Err(ended(&why)));
        }
        // Nothing is pushed any more, and something may have been that did not come.
        self.shared.watches.all_changed();
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
                // Outside the lock: the woken task may have more to send.
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
            scripts: HashSet::new(),
            sent: VecDeque::new(),
            heard: Vec::new(),
        }
    }

    fn start(&mut self, request: Request) {
        if self.waiting.is_empty() && self.wire.has_room() {
            self.send(request);
        } else {
            self.waiting.push_back(request);
        }
    }

    fn send(&mut self, request: Request) {
        let at = Boottime::now();
        if request.give_up_at <= at {
            return self.heard.push(Heard::TooLate(request.tell));
        }
        for command in request.commands.iter() {
            let first = command.script_hash().is_some_and(|hash| self.scripts.insert(hash));
            command.write(&mut self.wire.out, first || request.whole_scripts, &self.info);
        }
        let count = request.commands.len();
        self.sent.push_back(Sent { tell: Some(request.tell), at, count, replies: Vec::with_capacity(count) });
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
                && let Some(request) = self.waiting.pop_front()
            {
                self.send(request);
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
            match self.wire.read(context, |bytes| self.decoder.push(bytes))? {
                Received::Bytes => self.take_values()?,
                Received::Nothing => return Ok(true),
                Received::End => return Ok(false),
            }
        }
        context.waker().wake_by_ref();
        Ok(true)
    }

    fn take_values(&mut self) -> io::Result<()> {
        let violation = |message: &str| io::Error::new(io::ErrorKind::InvalidData, message.to_string());
        loop {
            match self.decoder.next_value() {
                Ok(None) => return Ok(()),
                Err(resp::Malformed(why)) => return Err(violation(why)),
                Ok(Some(Value::Push(items))) => self.heard.extend(changed(items).map(Heard::Changed)),
                Ok(Some(value)) => {
                    let sent = self.sent.front_mut().ok_or_else(|| violation("a reply without a request"))?;
                    sent.replies.push(value);
                    if sent.replies.len() == sent.count
                        && let Some(Sent { tell: Some(tell), at, replies, .. }) = self.sent.pop_front()
                    {
                        self.heard.push(Heard::Answer { tell, replies, sent: at, received: self.wire.heard_at() });
                    }
                }
            }
        }
    }

    /// Asks a silent server for a sign of life, and ends the connection when none comes.
    fn poll_keepalive(&mut self, context: &mut Context<'_>) -> Poll<io::Result<&'static str>> {
        loop {
            match ready!(self.wire.poll_silence(context, self.sent.is_empty())) {
                Silence::TooLong => return Poll::Ready(Ok("the server does not respond")),
                Silence::Ask => {
                    resp::command(&mut self.wire.out, &[b"PING"]);
                    self.sent.push_back(Sent { tell: None, at: Boottime::now(), count: 1, replies: Vec::new() });
                    self.wire.write(context)?;
                }
            }
        }
    }
}

/// The keys that a push says were changed. Other pushes are not for us.
fn changed(push: Vec<Value>) -> Option<Option<Vec<Vec<u8>>>> {
    let mut items = push.into_iter();
    if items.next()?.as_text() != Some("invalidate") {
        return None;
    }
    match items.next()? {
        Value::Array(keys) => Some(Some(
            keys.into_iter()
                .filter_map(|key| match key {
                    Value::Text(key) => Some(key),
                    _ => None,
                })
                .collect(),
        )),
        // All data was flushed.
        _ => Some(None),
    }
}

#[cfg(test)]
mod tests {
    use std::future::Future;
    use std::pin::Pin;
    use std::task::Wake;

    use super::super::greeting::Introduction;
    use super::*;
    use crate::store::StoreErrorKind;
    use crate::stores::network::address::Address;
    use crate::stores::network::skew::Clocks;
    use crate::stores::network::testing::{Full, Says};
    use crate::sys::runtime::block_on;

    fn connection(says: &[u8]) -> (Connection, Driver) {
        connection_over(Box::new(Says(says.to_vec())))
    }

    fn connection_over(stream: Box<dyn Duplex>) -> (Connection, Driver) {
        let at = Boottime::now();
        let (software, version) = (String::new(), String::new());
        let introduction = Introduction { software, version, tells: true, now_ms: 1000, sent: at, received: at };
        let address = Address::Tcp { host: "h".into(), port: 1 };
        let info = Arc::new(ServerInfo::new(&address, introduction, &Clocks::new("", Duration::ZERO)));
        Connection::new(stream, SocketPoller::default(), info, Duration::from_secs(60), Arc::default())
    }

    type Told = oneshot::Receiver<Result<Answered, StoreError>>;

    fn request(give_up_at: Boottime) -> (Request, Told) {
        let (tell, told) = oneshot::channel();
        let commands = Arc::new([Command::plain(&[b"PING"])]);
        (Request { commands, whole_scripts: false, give_up_at, tell: Tell::Asker(tell) }, told)
    }

    /// Starts a request when it is woken.
    struct Starts(Mutex<Option<(Connection, Request)>>);

    impl Wake for Starts {
        fn wake(self: Arc<Self>) {
            if let Some((connection, request)) = self.0.lock().take() {
                assert!(connection.start(request).is_ok());
            }
        }
    }

    /// A request that was too late comes in between the last look at what came in and the end of the connection: it is
    /// known that it was not sent, and so that nothing was applied.
    #[test]
    fn what_was_too_late_when_the_connection_ended_was_not_sent() {
        let (connection, driver) = connection(b"+PONG\r\n");
        let (answered, mut told) = request(Boottime::NEVER);
        assert!(connection.start(answered).is_ok());
        let (unanswered, mut never_told) = request(Boottime::NEVER);
        assert!(connection.start(unanswered).is_ok());
        let (late, mut late_told) = request(Boottime::ZERO);
        let waker = Waker::from(Arc::new(Starts(Mutex::new(Some((connection, late))))));
        assert!(Pin::new(&mut told).poll(&mut Context::from_waker(&waker)).is_pending());
        block_on(driver.run(|_, _| ())).unwrap();
        assert!(told.try_recv().unwrap().is_ok());
        let kind = |told: &mut Told| told.try_recv().expect("it is answered").err().expect("by an error").kind;
        assert_eq!(kind(&mut never_told), StoreErrorKind::Unknown, "it was sent");
        assert_eq!(kind(&mut late_told), StoreErrorKind::Unreachable, "it was not sent");
    }

    /// A thread whose request has no room yet reads for one whose request was sent: both wait.
    #[test]
    fn a_request_without_room_is_awaited_too() {
        let (connection, driver) = connection_over(Box::new(Full));
        let long = Request { commands: Arc::new([Command::plain(&[&[b' '; 2 << 20]])]), ..request(Boottime::NEVER).0 };
        let (short, _told) = request(Boottime::NEVER);
        assert!(connection.start(long).is_ok());
        assert_eq!(driver.shared.awaited(), 1);
        assert!(connection.start(short).is_ok());
        assert_eq!(driver.shared.awaited(), 2);
    }

    /// A connection that was left, or has ended, gives requests back: they go out on the next one.
    #[test]
    fn what_has_ended_gives_requests_back() {
        let (connection, driver) = connection(b"");
        connection.leave("a test");
        assert!(connection.start(request(Boottime::NEVER).0).is_err());
        drop(driver.shared.io_state.lock().take());
        assert!(connection.start(request(Boottime::NEVER).0).is_err());
    }
}
