//! One connection, with many commands in flight on it, and the server's pushes.
//!
//! The thread that has a request writes it to the socket, so that no other must be woken for it. A task reads the
//! replies, and writes what the socket did not take at once.

use std::collections::{HashSet, VecDeque};
use std::future::{Future, poll_fn};
use std::pin::{Pin, pin};
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

/// What handles and the task have in common.
struct ConnectionCore {
    /// `None` when the connection has ended.
    io_state: Mutex<Option<ConnectionIo>>,
    /// Tells the task that there is something to do.
    task: Notify,
    /// Why the connection is to end.
    ending: OnceLock<&'static str>,
    /// The process whose connection it is.
    generation: u64,
}

impl ConnectionCore {
    fn end(&self, why: &'static str) {
        // The first reason stays.
        let _ = self.ending.set(why);
        self.task.notify_one();
    }
}

impl Connection {
    /// Takes over a socket. The driver is to be run for as long as the connection lives.
    pub fn new(
        stream: Box<dyn Duplex>,
        info: Arc<ServerInfo>,
        patience: Duration,
        watches: Arc<Watches>,
    ) -> (Connection, Driver) {
        let shared = Arc::new(ConnectionCore {
            io_state: Mutex::new(Some(ConnectionIo::new(stream, Arc::clone(&info), patience))),
            task: Notify::new(),
            ending: OnceLock::new(),
            generation: process::generation(),
        });
        let handle = Arc::new(Handle(Arc::clone(&shared)));
        let driver = Driver { shared, own: Arc::downgrade(&handle), info: Arc::clone(&info), watches };
        (Connection { handle, info }, driver)
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
    told: oneshot::Receiver<Result<Answered, StoreError>>,
) -> impl Future<Output = Result<Answered, StoreError>> + Send + Unpin {
    struct Told(oneshot::Receiver<Result<Answered, StoreError>>);
    impl Future for Told {
        type Output = Result<Answered, StoreError>;
        fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
            Pin::new(&mut self.0).poll(context).map(|told| told.unwrap_or_else(|_| Err(ended("it was closed"))))
        }
    }
    Told(told)
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
    /// What went wrong while a thread wrote that is not the task's.
    failure: Option<io::Error>,
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
    /// For answers, which come with a handle; weak, so that the task does not keep itself alive.
    own: Weak<Handle>,
    info: Arc<ServerInfo>,
    watches: Arc<Watches>,
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
        self.pass_on(heard);
        for tell in sent.into_iter().filter_map(|sent| sent.tell) {
            tell.answer(Err(ended(&why)));
        }
        // Nothing is pushed any more, and something may have been that did not come.
        self.watches.all_changed();
    }

    async fn until_the_end(&self) -> String {
        let mut woken = pin!(self.shared.task.notified());
        poll_fn(|context| {
            loop {
                let mut heard = Vec::new();
                let outcome = match self.shared.io_state.lock().as_mut() {
                    Some(io_state) => {
                        let outcome = io_state.poll(context);
                        mem::swap(&mut heard, &mut io_state.heard);
                        outcome
                    }
                    None => return Poll::Ready("it has ended".to_string()),
                };
                // Outside the lock: the woken task may have more to send.
                self.pass_on(heard);
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

impl ConnectionIo {
    fn new(stream: Box<dyn Duplex>, info: Arc<ServerInfo>, patience: Duration) -> ConnectionIo {
        ConnectionIo {
            wire: Wire::new(stream, patience),
            info,
            failure: None,
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
