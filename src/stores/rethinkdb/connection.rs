//! Queries and their answers on a connection, and the streams that a server keeps for it.

use std::collections::HashMap;
use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::{Arc, Weak};
use std::task::{Context, Poll};

use tokio::sync::oneshot;

use super::frame::{self, Decoder};
use super::reply;
use super::server_info::{FIRST_TOKEN, ServerInfo};
use crate::clock::Boottime;
use crate::store::StoreError;
use crate::stores::network::connection::{self, Core};
use crate::stores::network::link::{self, Connection as _};
use crate::stores::network::pipeline::{self, Heard, Pipeline, ended};
use crate::stores::network::skew::Offset;
use crate::sys::runtime;

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

impl link::Request for Query {
    fn give_up_at(&self) -> Boottime {
        self.give_up_at
    }

    fn fail(self, error: StoreError) {
        self.tell.answer(Err(error));
    }
}

/// Where an answer goes.
pub enum Tell {
    Caller(oneshot::Sender<Result<Answered, StoreError>>),
    /// Who follows a stream. Called by the thread that read the answer.
    Follower(Arc<dyn Follow>),
}

impl Tell {
    pub fn answer(self, answer: Result<Answered, StoreError>) {
        match self {
            Tell::Caller(caller) => {
                if let Err(Ok(unwanted)) = caller.send(answer)
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
        Rest { core: self.connection.downgrade(), token: self.token }
    }
}

/// A stream that a server keeps for us. Does not keep the connection alive.
#[derive(Clone)]
pub struct Rest {
    core: Weak<Core<Pipeline<ReqlProtocol>>>,
    token: u64,
}

impl Rest {
    /// Asks for more of it.
    pub fn resume(&self, tell: Tell) {
        let mut tell = Some(tell);
        if let Some(core) = self.core.upgrade() {
            core.give(|pipeline, _| {
                frame::write(&mut pipeline.wire.out, self.token, CONTINUE);
                pipeline.protocol.sent.insert(self.token, Sent { tell: tell.take(), at: Boottime::now() })
            });
        }
        if let Some(tell) = tell {
            tell.answer(Err(ended("it was closed")));
        }
    }

    /// Ends it. Who follows it hears nothing more.
    pub fn stop(&self) {
        if let Some(core) = self.core.upgrade() {
            core.give(|pipeline, _| {
                frame::write(&mut pipeline.wire.out, self.token, STOP);
                pipeline.protocol.sent.remove(&self.token)
            });
        }
    }
}

pub type Connection = connection::Connection<Pipeline<ReqlProtocol>>;

/// More of the stream that `answered` is a part of.
pub fn more_of(answered: &Answered) -> impl Future<Output = Result<Answered, StoreError>> + Send + Unpin + use<> {
    let (tell, told) = oneshot::channel();
    answered.rest().resume(Tell::Caller(tell));
    let driven = answered.connection.driven();
    answer_of(told, move || driven.clone().into_iter().for_each(runtime::drive))
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

/// A query that was sent.
struct Sent {
    /// `None`: a sign of life, which nobody waits for.
    tell: Option<Tell>,
    at: Boottime,
}

pub struct ReqlProtocol {
    decoder: Decoder,
    /// Queries under way, by token.
    sent: HashMap<u64, Sent>,
    next_token: u64,
}

pub struct Said {
    tell: Tell,
    body: Vec<u8>,
    sent: Boottime,
    received: Boottime,
    token: u64,
}

impl Default for ReqlProtocol {
    fn default() -> ReqlProtocol {
        ReqlProtocol { decoder: Decoder::default(), sent: HashMap::new(), next_token: FIRST_TOKEN }
    }
}

impl ReqlProtocol {
    fn write_query(&mut self, body: &[u8], sent: Sent, out: &mut Vec<u8>) {
        let token = self.next_token;
        self.next_token += 1;
        frame::write(out, token, body);
        self.sent.insert(token, sent);
    }
}

impl pipeline::Protocol for ReqlProtocol {
    type Request = Query;
    type Said = Said;
    type Common = ServerInfo;

    fn write(&mut self, query: Query, at: Boottime, out: &mut Vec<u8>, info: &ServerInfo) {
        self.write_query(&(query.body)(&info.offset()), Sent { tell: Some(query.tell), at }, out);
    }

    fn write_ping(&mut self, out: &mut Vec<u8>) {
        self.write_query(SERVER_INFO, Sent { tell: None, at: Boottime::now() }, out);
    }

    fn read(&mut self, bytes: &[u8], at: Boottime, heard: &mut Vec<Heard<ReqlProtocol>>) -> io::Result<()> {
        let violation = |message: String| io::Error::new(io::ErrorKind::InvalidData, message);
        self.decoder.push(bytes);
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
            let said = Said { tell, body: frame.body, sent: sent.at, received: at, token: frame.token };
            heard.push(Heard::Said(said));
        }
    }

    fn under_way(&self) -> usize {
        self.sent.len()
    }

    fn pass_on(said: Said, core: &Core<Pipeline<ReqlProtocol>>) {
        let Said { tell, body, sent, received, token } = said;
        let connection = core.handle().ok_or_else(|| ended("it was closed"));
        tell.answer(connection.map(|connection| Answered { body, sent, received, token, connection }));
    }

    fn end(self, error: StoreError, _info: &ServerInfo) {
        for tell in self.sent.into_values().filter_map(|sent| sent.tell) {
            tell.answer(Err(error.clone()));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stores::network::testing::Scripted;
    use crate::stores::rethinkdb::testing::connection;
    use crate::sys::mutex::Mutex;
    use crate::sys::runtime::block_on;

    /// A waiter that is granted while its feed begins: the answer is there, and nobody reads it.
    #[test]
    fn a_stream_whose_beginning_nobody_takes_is_stopped() {
        let socket = Scripted::default();
        let (connection, _task) = connection(&socket);
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
            assert_eq!(socket.0.lock().taken, expected);
        }
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
        let (connection, task) = connection(&Scripted::saying(&reply));
        let told = Arc::new(Told(Mutex::default()));
        let tell = Tell::Follower(Arc::clone(&told) as Arc<dyn Follow>);
        let changes = Query { body: Arc::new(|_| b"[1]".to_vec()), give_up_at: Boottime::NEVER, tell };
        assert!(connection.start(changes).is_ok());
        connection.leave("a test");
        drop(connection);
        block_on(task.run(|_, _| ())).unwrap();
        assert_eq!(*told.0.lock(), [false]);
    }

    /// A connection that was left keeps no stream any more.
    #[test]
    fn nothing_is_stopped_on_a_connection_that_was_left() {
        let socket = Scripted::default();
        let (connection, _task) = connection(&socket);
        connection.leave("a test");
        Rest { core: connection.downgrade(), token: 3 }.stop();
        assert!(socket.0.lock().taken.is_empty());
    }
}
