//! One connection: a task that owns the socket, with many queries in flight on it.

use std::collections::HashMap;
use std::future::{Future, poll_fn};
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::{mpsc, oneshot};

use super::frame::{self, Decoder};
use super::introduce::{FIRST_TOKEN, Introduced};
use super::link::Link;
use super::reply;
use super::skew::{Clocks, Offset};
use super::wire::{self, Stream};
use crate::clock::Boottime;
use crate::mutex::Mutex;
use crate::runtime::{Sleep, sleep_until};
use crate::store::StoreError;

/// RethinkDB ql2.proto: Query.QueryType.
const CONTINUE: &[u8] = b"[2]";
const STOP: &[u8] = b"[3]";
const SERVER_INFO: &[u8] = b"[5]";

/// How many bytes are read in one go.
const READ_SIZE: usize = 16 << 10;
/// How many reads the task does before it lets others run.
const READS_IN_A_ROW: usize = 16;
/// While more than this waits to be written, no more queries are taken.
const MAX_UNWRITTEN: usize = 1 << 20;

/// A body of a query, written when it is known which server gets it: what it says of time is in that
/// server's clock.
pub type Body = Arc<dyn Fn(&Offset) -> Vec<u8> + Send + Sync>;

/// One query that waits to be sent.
pub struct Query {
    pub body: Body,
    /// Not sent any more from here on.
    pub give_up_at: Boottime,
    pub tell: oneshot::Sender<Result<Answered, StoreError>>,
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

enum Order {
    Start(Query),
    Continue { token: u64, tell: oneshot::Sender<Result<Answered, StoreError>> },
    Stop { token: u64 },
    Leave,
}

/// A handle of a connection. Dropping all of them ends it.
#[derive(Clone)]
pub struct Connection {
    orders: mpsc::UnboundedSender<Order>,
    pub about: Arc<About>,
}

/// What is known of the server at the other end.
pub struct About {
    /// As in the URL.
    pub host: String,
    pub version: String,
    /// Which server of its cluster it is, and how people call it; its host where it says neither.
    pub id: String,
    pub name: String,
    /// When it let us in.
    pub since: Boottime,
    offset: Mutex<Offset>,
}

impl About {
    pub fn new(host: String, version: String, introduced: Introduced, clocks: &Clocks) -> About {
        let Introduced { id, name, seconds, sent, received } = introduced;
        let name = name.or_else(|| id.clone()).unwrap_or_else(|| host.clone());
        let id = id.unwrap_or_else(|| name.clone());
        let offset = Mutex::new(clocks.observe(&id, &name, sent, received, seconds));
        About { host, version, id, name, since: Boottime::now(), offset }
    }

    pub fn offset(&self) -> Offset {
        *self.offset.lock()
    }

    /// Notes a time that this server answered with.
    pub fn observe(&self, clocks: &Clocks, sent: Boottime, received: Boottime, seconds: f64) {
        *self.offset.lock() = clocks.observe(&self.id, &self.name, sent, received, seconds);
    }
}

impl Connection {
    /// Sends a query; gives it back where the connection has ended.
    pub fn start(&self, query: Query) -> Result<(), Query> {
        self.orders.send(Order::Start(query)).map_err(|refused| match refused.0 {
            Order::Start(query) => query,
            Order::Continue { .. } | Order::Stop { .. } | Order::Leave => {
                unreachable!("what is refused is what was sent")
            }
        })
    }

    /// Asks for more of a stream.
    pub fn resume(&self, token: u64) -> impl Future<Output = Result<Answered, StoreError>> + Send + Unpin + use<> {
        let (tell, told) = oneshot::channel();
        // Where the connection has ended, `tell` is dropped, and that is the answer.
        let _ = self.orders.send(Order::Continue { token, tell });
        answer_of(told)
    }

    /// Ends the connection, whoever has a handle of it: streams too begin anew, on the next one.
    pub fn leave(&self) {
        let _ = self.orders.send(Order::Leave);
    }

    /// Ends a stream.
    pub fn stop(&self, token: u64) {
        let _ = self.orders.send(Order::Stop { token });
    }
}

/// What a query is answered with: the connection's end is an answer too.
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
    impl Drop for Told {
        /// An answer that came and was not taken may be the beginning of a stream, which the server would keep.
        fn drop(&mut self) {
            self.0.close();
            if let Ok(Ok(untaken)) = self.0.try_recv()
                && reply::leaves_a_stream(&untaken.body)
            {
                untaken.connection.stop(untaken.token);
            }
        }
    }
    Told(told)
}

fn ended(why: &str) -> StoreError {
    StoreError::unknown(format!("the connection ended before the answer came: {why}"))
}

/// A query that was sent.
struct Sent {
    /// `None`: a sign of life, which nobody waits for.
    tell: Option<oneshot::Sender<Result<Answered, StoreError>>>,
    at: Boottime,
}

enum Orders {
    Taken,
    /// Too much is unwritten: the rest is taken when that has gone.
    Postponed,
    /// Nobody has a handle any more.
    NoMore,
    /// The connection was left for another.
    Left,
}

/// The task's own part.
pub struct Driver {
    stream: Box<dyn Stream>,
    orders: mpsc::UnboundedReceiver<Order>,
    /// For answers, which come with a handle; weak, so that the task does not keep itself alive.
    own: mpsc::WeakUnboundedSender<Order>,
    about: Arc<About>,
    out: Vec<u8>,
    written: usize,
    unflushed: bool,
    decoder: Decoder,
    /// Queries under way, by token.
    sent: HashMap<u64, Sent>,
    next_token: u64,
    life: Life,
}

/// Whether the other end lives.
struct Life {
    heard_at: Boottime,
    /// When it was asked for a sign of life that it has not given yet.
    asked_at: Option<Boottime>,
    /// How long an answer may take before a sign of life is asked for, and how long that may take.
    patience: Duration,
    alarm: Sleep,
}

impl Driver {
    pub fn new(stream: Box<dyn Stream>, about: Arc<About>, patience: Duration) -> (Connection, Driver) {
        let (sender, orders) = mpsc::unbounded_channel();
        let now = Boottime::now();
        let driver = Driver {
            stream,
            orders,
            own: sender.downgrade(),
            about: Arc::clone(&about),
            out: Vec::new(),
            written: 0,
            unflushed: false,
            decoder: Decoder::default(),
            sent: HashMap::new(),
            next_token: FIRST_TOKEN,
            life: Life { heard_at: now, asked_at: None, patience, alarm: sleep_until(now + patience) },
        };
        (Connection { orders: sender, about }, driver)
    }

    /// Runs the connection to its end. Queries that were not sent go back to the link.
    pub async fn run(mut self, link: std::sync::Weak<Link>) {
        let why = poll_fn(|context| self.poll(context)).await;
        // So that the server hears of it even where a forked child has inherited the socket.
        poll_fn(|context| {
            let _ = Pin::new(&mut self.stream).poll_shutdown(context);
            Poll::Ready(())
        })
        .await;
        self.orders.close();
        let mut unsent = Vec::new();
        while let Ok(order) = self.orders.try_recv() {
            match order {
                Order::Start(query) => unsent.push(query),
                Order::Continue { tell, .. } => drop(tell.send(Err(ended(&why)))),
                Order::Stop { .. } | Order::Leave => {}
            }
        }
        // The link first: whoever is told of the end finds it gone.
        match link.upgrade() {
            Some(link) => {
                tracing::debug!("the connection to {} ended: {why}", self.about.host);
                link.connection_ended(&self.about, unsent);
            }
            None => drop(unsent),
        }
        for (_, sent) in self.sent.drain() {
            if let Some(tell) = sent.tell {
                let _ = tell.send(Err(ended(&why)));
            }
        }
    }

    /// Ready with the reason when the connection has ended.
    fn poll(&mut self, context: &mut Context<'_>) -> Poll<String> {
        match self.poll_work(context) {
            Poll::Pending => Poll::Pending,
            Poll::Ready(Ok(why)) => Poll::Ready(why.to_string()),
            Poll::Ready(Err(error)) => Poll::Ready(wire::why(&error)),
        }
    }

    fn poll_work(&mut self, context: &mut Context<'_>) -> Poll<io::Result<&'static str>> {
        if !self.read(context)? {
            return Poll::Ready(Ok("the server hung up"));
        }
        loop {
            let orders = self.take_orders(context);
            self.write(context)?;
            match orders {
                Orders::NoMore => return Poll::Ready(Ok("the store was closed")),
                Orders::Left => return Poll::Ready(Ok("another host of the URL is tried")),
                Orders::Taken => break,
                Orders::Postponed if self.written < self.out.len() => break,
                Orders::Postponed => {}
            }
        }
        self.poll_life(context)
    }

    /// Takes what is to be sent, as long as it can be sent.
    fn take_orders(&mut self, context: &mut Context<'_>) -> Orders {
        while self.out.len() - self.written < MAX_UNWRITTEN {
            match self.orders.poll_recv(context) {
                Poll::Ready(Some(Order::Leave)) => return Orders::Left,
                Poll::Ready(Some(order)) => self.obey(order),
                Poll::Ready(None) => return Orders::NoMore,
                Poll::Pending => return Orders::Taken,
            }
        }
        Orders::Postponed
    }

    fn obey(&mut self, order: Order) {
        let at = Boottime::now();
        match order {
            Order::Start(query) if query.give_up_at <= at => {
                let _ = query.tell.send(Err(StoreError::unreachable("the query could not be sent in time")));
            }
            Order::Start(query) => {
                let body = (query.body)(&self.about.offset());
                let token = self.next_token;
                self.next_token += 1;
                frame::write(&mut self.out, token, &body);
                self.sent.insert(token, Sent { tell: Some(query.tell), at });
            }
            Order::Continue { token, tell } => {
                frame::write(&mut self.out, token, CONTINUE);
                self.sent.insert(token, Sent { tell: Some(tell), at });
            }
            Order::Stop { token } => {
                frame::write(&mut self.out, token, STOP);
                self.sent.remove(&token);
            }
            Order::Leave => unreachable!("it ends the taking of orders"),
        }
    }

    fn write(&mut self, context: &mut Context<'_>) -> io::Result<()> {
        while self.written < self.out.len() {
            match Pin::new(&mut self.stream).poll_write(context, &self.out[self.written..])? {
                Poll::Ready(0) => return Err(io::ErrorKind::WriteZero.into()),
                Poll::Ready(written) => {
                    self.written += written;
                    self.unflushed = true;
                }
                Poll::Pending => break,
            }
        }
        if self.written == self.out.len() {
            self.out.clear();
            self.written = 0;
            self.out.shrink_to(MAX_UNWRITTEN);
        }
        if self.unflushed && Pin::new(&mut self.stream).poll_flush(context)?.is_ready() {
            self.unflushed = false;
        }
        Ok(())
    }

    /// `false`: the other end has hung up.
    fn read(&mut self, context: &mut Context<'_>) -> io::Result<bool> {
        let mut space = [std::mem::MaybeUninit::uninit(); READ_SIZE];
        for _ in 0..READS_IN_A_ROW {
            let mut buffer = ReadBuf::uninit(&mut space);
            match Pin::new(&mut self.stream).poll_read(context, &mut buffer)? {
                Poll::Pending => return Ok(true),
                Poll::Ready(()) if buffer.filled().is_empty() => return Ok(false),
                Poll::Ready(()) => {}
            }
            self.decoder.push(buffer.filled());
            self.life.heard_at = Boottime::now();
            self.life.asked_at = None;
            self.take_answers()?;
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
                Err(frame::TooLong(length)) => return Err(violation(format!("an answer claims {length} bytes"))),
            };
            if frame.token < FIRST_TOKEN || frame.token >= self.next_token {
                return Err(violation("an answer to a query that was never sent".to_string()));
            }
            let Some(sent) = self.sent.remove(&frame.token) else {
                // Of a stream that was stopped.
                continue;
            };
            let Some(tell) = sent.tell else { continue };
            let Some(orders) = self.own.upgrade() else { continue };
            let answered = Answered {
                body: frame.body,
                sent: sent.at,
                received: self.life.heard_at,
                token: frame.token,
                connection: Connection { orders, about: Arc::clone(&self.about) },
            };
            if let Err(Ok(unwanted)) = tell.send(Ok(answered))
                && reply::leaves_a_stream(&unwanted.body)
            {
                // Nobody waits for it any more, and the server would keep its stream for ever.
                frame::write(&mut self.out, unwanted.token, STOP);
            }
        }
    }

    /// How long the server may say nothing, unasked.
    fn silence(&self) -> Duration {
        // Where nobody waits for anything, asking now and then keeps routers from forgetting us.
        if self.sent.is_empty() { self.life.patience * 8 } else { self.life.patience }
    }

    /// Asks a silent server for a sign of life, and ends the connection when none comes.
    fn poll_life(&mut self, context: &mut Context<'_>) -> Poll<io::Result<&'static str>> {
        while Pin::new(&mut self.life.alarm).poll(context).is_ready() {
            let now = Boottime::now();
            let next = match self.life.asked_at {
                Some(asked_at) if asked_at + self.life.patience <= now => {
                    return Poll::Ready(Ok("the server gives no sign of life"));
                }
                Some(asked_at) => asked_at + self.life.patience,
                None if self.life.heard_at + self.silence() <= now => {
                    let token = self.next_token;
                    self.next_token += 1;
                    frame::write(&mut self.out, token, SERVER_INFO);
                    self.sent.insert(token, Sent { tell: None, at: now });
                    self.life.asked_at = Some(now);
                    self.write(context)?;
                    now + self.life.patience
                }
                None => now + self.life.patience,
            };
            self.life.alarm = sleep_until(next);
        }
        Poll::Pending
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A waiter that is granted while its feed begins: the answer is there, and nobody reads it.
    #[test]
    fn a_stream_whose_beginning_nobody_takes_is_stopped() {
        let (orders, mut ordered) = mpsc::unbounded_channel();
        let at = Boottime::now();
        let introduced = Introduced { id: None, name: None, seconds: 1.0, sent: at, received: at };
        let clocks = Clocks::new(Duration::ZERO);
        let about = About::new("h".into(), "2".into(), introduced, &clocks);
        let connection = Connection { orders, about: Arc::new(about) };
        for (body, left_open) in [(&br#"{"t":3,"r":[]}"#[..], true), (br#"{"t":2,"r":[]}"#, false)] {
            let (tell, told) = oneshot::channel();
            let future = answer_of(told);
            let connection = connection.clone();
            let answered = Answered { body: body.to_vec(), sent: at, received: at, token: 7, connection };
            assert!(tell.send(Ok(answered)).is_ok());
            drop(future);
            let stopped = matches!(ordered.try_recv(), Ok(Order::Stop { token: 7 }));
            assert_eq!(stopped, left_open);
        }
    }
}
