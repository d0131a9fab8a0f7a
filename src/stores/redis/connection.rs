//! Commands and replies on a connection, and the server's pushes.

use std::collections::{HashSet, VecDeque};
use std::io;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::oneshot;

use super::commands::Command;
use super::greeting::ServerInfo;
use super::resp::{self, Decoder, Value};
use super::watches::{Watched, Watches};
use crate::clock::Boottime;
use crate::store::StoreError;
use crate::stores::network::pipeline::{self, Heard, Pipeline, ended};
use crate::stores::network::stream::Stream;
use crate::stores::network::{connection, link};

/// Commands that are sent together, and waited for together.
pub struct Request {
    pub commands: Arc<[Command]>,
    /// Whether all scripts are sent with their text, because the server has forgotten them.
    pub whole_scripts: bool,
    /// Not sent any more from here on.
    pub give_up_at: Boottime,
    pub tell: Tell,
}

impl link::Request for Request {
    fn give_up_at(&self) -> Boottime {
        self.give_up_at
    }

    fn fail(self, error: StoreError) {
        self.tell.answer(Err(error));
    }
}

/// Where the answer goes.
pub enum Tell {
    Caller(oneshot::Sender<Result<Answered, StoreError>>),
    /// The look that arms a watch.
    Watched(Arc<Watched>),
}

impl Tell {
    pub fn answer(self, answer: Result<Answered, StoreError>) {
        match self {
            // A caller that has gone wants no answer; what it asked for is done.
            Tell::Caller(caller) => drop(caller.send(answer)),
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

pub type Connection = connection::Connection<Pipeline<RedisProtocol>>;

/// What is known of a connection.
pub struct Common {
    pub info: ServerInfo,
    pub watches: Arc<Watches>,
}

/// Takes over a server that has let us in.
pub fn run(
    stream: Stream,
    common: Common,
    patience: Duration,
) -> (Connection, connection::Task<Pipeline<RedisProtocol>>) {
    let poller = stream.poller();
    Connection::new(Pipeline::new(Box::new(stream), patience, RedisProtocol::default()), poller, common)
}

/// What a request is answered with: the connection's end is an answer too.
pub fn answer_of(
    told: Result<Result<Answered, StoreError>, oneshot::error::RecvError>,
) -> Result<Answered, StoreError> {
    told.unwrap_or_else(|_| Err(ended("it was closed")))
}

/// A request that was sent.
struct Sent {
    /// `None`: a sign of life, which nobody waits for.
    tell: Option<Tell>,
    at: Boottime,
    count: usize,
    replies: Vec<Value>,
}

#[derive(Default)]
pub struct RedisProtocol {
    decoder: Decoder,
    /// The hashes of scripts that were sent with their text on this connection: the server knows them.
    scripts: HashSet<[u8; 40]>,
    /// Requests under way, in the order of their replies.
    sent: VecDeque<Sent>,
}

pub enum Said {
    Answer {
        tell: Tell,
        replies: Vec<Value>,
        sent: Boottime,
        received: Boottime,
    },
    /// Keys that were changed; `None`: perhaps all.
    Changed(Option<Vec<Vec<u8>>>),
}

impl pipeline::Protocol for RedisProtocol {
    type Request = Request;
    type Said = Said;
    type Common = Common;

    fn write(&mut self, request: Request, at: Boottime, out: &mut Vec<u8>, common: &Common) {
        for command in request.commands.iter() {
            let first = command.script_hash().is_some_and(|hash| self.scripts.insert(hash));
            command.write(out, first || request.whole_scripts, &common.info);
        }
        let count = request.commands.len();
        self.sent.push_back(Sent { tell: Some(request.tell), at, count, replies: Vec::with_capacity(count) });
    }

    fn write_ping(&mut self, out: &mut Vec<u8>) {
        resp::command(out, &[b"PING"]);
        self.sent.push_back(Sent { tell: None, at: Boottime::now(), count: 1, replies: Vec::new() });
    }

    fn read(&mut self, bytes: &[u8], at: Boottime, heard: &mut Vec<Heard<RedisProtocol>>) -> io::Result<()> {
        let violation = |message: &str| io::Error::new(io::ErrorKind::InvalidData, message.to_string());
        self.decoder.push(bytes);
        loop {
            match self.decoder.next_value() {
                Ok(None) => return Ok(()),
                Err(resp::Malformed(why)) => return Err(violation(why)),
                Ok(Some(Value::Push(items))) => {
                    heard.extend(changed(items).map(|keys| Heard::Said(Said::Changed(keys))));
                }
                Ok(Some(value)) => {
                    let sent = self.sent.front_mut().ok_or_else(|| violation("a reply without a request"))?;
                    sent.replies.push(value);
                    if sent.replies.len() == sent.count
                        && let Some(Sent { tell: Some(tell), at: sent, replies, .. }) = self.sent.pop_front()
                    {
                        heard.push(Heard::Said(Said::Answer { tell, replies, sent, received: at }));
                    }
                }
            }
        }
    }

    fn under_way(&self) -> usize {
        self.sent.len()
    }

    /// A watch that is being armed counts as one that is, and nobody waits for a sign of life.
    fn is_awaited(request: &Request) -> bool {
        matches!(request.tell, Tell::Caller(_))
    }

    fn awaited(&self) -> usize {
        self.sent.iter().filter(|sent| matches!(sent.tell, Some(Tell::Caller(_)))).take(2).count()
    }

    fn watched(common: &Common) -> usize {
        common.watches.awaited()
    }

    fn pass_on(said: Said, core: &connection::Core<Pipeline<RedisProtocol>>) {
        match said {
            Said::Answer { tell, replies, sent, received } => {
                let connection = core.handle().ok_or_else(|| ended("it was closed"));
                tell.answer(connection.map(|connection| Answered { replies, sent, received, connection }));
            }
            Said::Changed(Some(keys)) => keys.iter().for_each(|key| core.common.watches.changed(key)),
            Said::Changed(None) => core.common.watches.all_changed(),
        }
    }

    fn end(self, error: StoreError, common: &Common) {
        for tell in self.sent.into_iter().filter_map(|sent| sent.tell) {
            tell.answer(Err(error.clone()));
        }
        // Nothing is pushed any more, and something may have been that did not come.
        common.watches.all_changed();
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
