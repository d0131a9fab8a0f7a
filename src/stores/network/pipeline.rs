//! Requests one behind the other on a socket, whose answers are bytes that the engine's protocol takes apart.

use std::collections::VecDeque;
use std::io;
use std::task::Poll;
use std::time::Duration;

use super::connection::{Core, Traffic};
use super::link::Request;
use super::stream::{self, Duplex};
use super::wire::{READS_IN_A_ROW, Received, Silence, Wire};
use crate::clock::Boottime;
use crate::store::StoreError;

/// How an engine writes requests, and takes answers apart.
pub trait Protocol: Send + Sized + 'static {
    type Request: Request;
    /// What the server says, for those who wait for it.
    type Said: Send;
    type Common: Send + Sync;

    /// Writes a request.
    fn write(&mut self, request: Self::Request, at: Boottime, out: &mut Vec<u8>, common: &Self::Common);

    /// Writes something that the server answers whatever its state. Nobody waits for the answer.
    fn write_ping(&mut self, out: &mut Vec<u8>);

    /// Takes bytes that came in.
    fn read(&mut self, bytes: &[u8], at: Boottime, heard: &mut Vec<Heard<Self>>) -> io::Result<()>;

    /// How many requests were sent and not answered.
    fn under_way(&self) -> usize;

    /// Whether a thread waits for the answer to a request.
    fn is_awaited(_request: &Self::Request) -> bool {
        true
    }

    /// How many threads wait for answers to what was sent. More than two need not be counted.
    fn awaited(&self) -> usize {
        self.under_way()
    }

    /// How much is to come that somebody waits for, beside answers.
    fn watched(_common: &Self::Common) -> usize {
        0
    }

    /// Passes on what the server said.
    fn pass_on(said: Self::Said, core: &Core<Pipeline<Self>>);

    /// Answers what was sent with the connection's end.
    fn end(self, error: StoreError, common: &Self::Common);
}

pub enum Heard<P: Protocol> {
    Said(P::Said),
    TooLate(P::Request),
}

/// What is under way on the socket.
pub struct Pipeline<P: Protocol> {
    pub wire: Wire,
    pub protocol: P,
    /// Requests for which there was no room yet.
    waiting: VecDeque<P::Request>,
}

impl<P: Protocol> Pipeline<P> {
    /// `patience`: as [`Wire::new`] has it.
    pub fn new(stream: Box<dyn Duplex>, patience: Duration, protocol: P) -> Pipeline<P> {
        Pipeline { wire: Wire::new(stream, patience), protocol, waiting: VecDeque::new() }
    }

    /// Afterwards either nothing waits, or the socket is full and wakes the task when it is not.
    fn write(&mut self, core: &Core<Self>, heard: &mut Vec<Heard<P>>) -> io::Result<()> {
        loop {
            while self.wire.has_room()
                && let Some(request) = self.waiting.pop_front()
            {
                let at = Boottime::now();
                if request.give_up_at() <= at {
                    heard.push(Heard::TooLate(request));
                } else {
                    self.protocol.write(request, at, &mut self.wire.out, &core.common);
                }
            }
            self.wire.write(&mut core.context())?;
            if self.waiting.is_empty() || !self.wire.has_room() {
                return Ok(());
            }
        }
    }
}

impl<P: Protocol> Traffic for Pipeline<P> {
    type Request = P::Request;
    type Heard = Heard<P>;
    type Common = P::Common;

    fn start(&mut self, request: P::Request, _core: &Core<Self>, _heard: &mut Vec<Heard<P>>) {
        self.waiting.push_back(request);
    }

    fn send(&mut self, core: &Core<Self>, heard: &mut Vec<Heard<P>>) -> Result<(), String> {
        self.write(core, heard).or_else(|error| {
            // There may be answers that came before.
            self.take_in(core, heard)?;
            Err(stream::why(&error))
        })
    }

    fn take_in(&mut self, core: &Core<Self>, heard: &mut Vec<Heard<P>>) -> Result<(), String> {
        let Pipeline { wire, protocol, .. } = self;
        for _ in 0..READS_IN_A_ROW {
            let received = wire.read(&mut core.context(), |bytes, at| protocol.read(bytes, at, heard));
            match received.map_err(|error| stream::why(&error))? {
                Received::Bytes => {}
                Received::Nothing => return Ok(()),
                Received::End => return Err("the server closed the connection".to_string()),
            }
        }
        core.context().waker().wake_by_ref();
        Ok(())
    }

    /// Writes, and asks a silent server for a sign of life.
    fn tend(&mut self, core: &Core<Self>, heard: &mut Vec<Heard<P>>) -> Result<(), String> {
        self.send(core, heard)?;
        while let Poll::Ready(silence) = self.wire.poll_silence(&mut core.context(), self.protocol.under_way() == 0) {
            match silence {
                Silence::TooLong => return Err("the server does not respond".to_string()),
                Silence::Ask => {
                    self.protocol.write_ping(&mut self.wire.out);
                    self.send(core, heard)?;
                }
            }
        }
        Ok(())
    }

    fn awaited(&self, common: &P::Common) -> usize {
        let waiting = self.waiting.iter().filter(|request| P::is_awaited(request)).take(2).count();
        self.protocol.awaited() + waiting + P::watched(common)
    }

    fn pass_on(heard: Heard<P>, core: &Core<Self>) {
        match heard {
            Heard::Said(said) => P::pass_on(said, core),
            Heard::TooLate(request) => {
                request.fail(StoreError::unreachable("the request could not be sent in time"));
            }
        }
    }

    fn close(&mut self) -> VecDeque<P::Request> {
        self.wire.shut_down();
        std::mem::take(&mut self.waiting)
    }

    fn end(self, why: &str, core: &Core<Self>) {
        self.protocol.end(ended(why), &core.common);
    }
}

/// The answer to a request that was sent on a connection that has ended.
pub fn ended(why: &str) -> StoreError {
    StoreError::unknown(format!("the connection ended before the reply arrived: {why}"))
}

#[cfg(test)]
mod tests {
    use std::future::Future;
    use std::pin::{Pin, pin};
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::task::{Context, Wake, Waker};

    use tokio::sync::oneshot;

    use super::super::connection::Task;
    use super::super::link::{self, Connection as _};
    use super::super::testing::Scripted;
    use super::*;
    use crate::store::StoreErrorKind;
    use crate::sys::mutex::Mutex;
    use crate::sys::sockets::SocketPoller;

    /// Each byte is the answer to a request.
    #[derive(Default)]
    struct Bytes(VecDeque<oneshot::Sender<Answer>>);

    type Answer = Result<u8, StoreError>;
    type Connection = super::super::connection::Connection<Pipeline<Bytes>>;

    struct TestRequest {
        bytes: Vec<u8>,
        give_up_at: Boottime,
        tell: oneshot::Sender<Answer>,
    }

    impl Request for TestRequest {
        fn give_up_at(&self) -> Boottime {
            self.give_up_at
        }

        fn fail(self, error: StoreError) {
            let _ = self.tell.send(Err(error));
        }
    }

    impl Protocol for Bytes {
        type Request = TestRequest;
        type Said = (oneshot::Sender<Answer>, u8);
        type Common = ();

        fn write(&mut self, request: TestRequest, _at: Boottime, out: &mut Vec<u8>, (): &()) {
            out.extend_from_slice(&request.bytes);
            self.0.push_back(request.tell);
        }

        fn write_ping(&mut self, _out: &mut Vec<u8>) {}

        fn read(&mut self, bytes: &[u8], _at: Boottime, heard: &mut Vec<Heard<Bytes>>) -> io::Result<()> {
            for byte in bytes {
                let tell = self.0.pop_front().ok_or(io::ErrorKind::InvalidData)?;
                heard.push(Heard::Said((tell, *byte)));
            }
            Ok(())
        }

        fn under_way(&self) -> usize {
            self.0.len()
        }

        fn pass_on((tell, byte): (oneshot::Sender<Answer>, u8), _core: &Core<Pipeline<Bytes>>) {
            let _ = tell.send(Ok(byte));
        }

        fn end(self, error: StoreError, (): &()) {
            self.0.into_iter().for_each(|tell| drop(tell.send(Err(error.clone()))));
        }
    }

    fn connection(socket: &Scripted) -> (Connection, Task<Pipeline<Bytes>>) {
        let pipeline = Pipeline::new(Box::new(socket.clone()), Duration::from_secs(60), Bytes::default());
        Connection::new(pipeline, SocketPoller::default(), ())
    }

    fn request(bytes: &[u8], give_up_at: Boottime) -> (TestRequest, oneshot::Receiver<Answer>) {
        let (tell, told) = oneshot::channel();
        (TestRequest { bytes: bytes.to_vec(), give_up_at, tell }, told)
    }

    /// Starts a request that has all the time it wants.
    fn start(connection: &Connection, bytes: &[u8]) -> oneshot::Receiver<Answer> {
        let (request, told) = request(bytes, Boottime::NEVER);
        assert!(connection.start(request).is_ok());
        told
    }

    fn kind(told: &mut oneshot::Receiver<Answer>) -> StoreErrorKind {
        told.try_recv().expect("it is answered").expect_err("by an error").kind
    }

    #[derive(Default)]
    struct Wakes(AtomicUsize);

    impl Wake for Wakes {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::SeqCst);
        }
    }

    impl Wakes {
        fn taken(&self) -> usize {
            self.0.swap(0, Ordering::SeqCst)
        }
    }

    /// Starts a request when it is woken, and leaves the connection.
    struct Starts(Mutex<Option<(Connection, TestRequest)>>);

    impl Wake for Starts {
        fn wake(self: Arc<Self>) {
            if let Some((connection, request)) = self.0.lock().take() {
                assert!(connection.start(request).is_ok());
                link::Connection::leave(&connection);
            }
        }
    }

    /// Where a thread sends and takes in, no other has to be woken: the task is for what could not be sent, for what
    /// was too late, and for the end.
    #[test]
    fn a_thread_that_waits_needs_no_task() {
        let socket = Scripted::default();
        let (connection, task) = connection(&socket);
        let driven = connection.driven().unwrap();
        let wakes = Arc::<Wakes>::default();
        let waker = Waker::from(Arc::clone(&wakes));
        let mut context = Context::from_waker(&waker);
        let mut task = pin!(task.run(|_, _| ()));
        assert!(task.as_mut().poll(&mut context).is_pending());

        let mut told = start(&connection, b"q");
        assert_eq!(socket.0.lock().taken, b"q");
        socket.0.lock().says.push(b'a');
        assert!(driven.take_in());
        assert_eq!(told.try_recv().unwrap(), Ok(b'a'));
        assert_eq!(wakes.taken(), 0);

        let (late, mut late_told) = request(b"q", Boottime::ZERO);
        assert!(connection.start(late).is_ok());
        assert_eq!(socket.0.lock().taken, b"q");
        assert_eq!(wakes.taken(), 1);
        assert!(task.as_mut().poll(&mut context).is_pending());
        assert_eq!(kind(&mut late_told), StoreErrorKind::Unreachable);

        // Until the socket takes something, the task could do nothing either.
        socket.0.lock().is_full = true;
        let long = vec![b' '; 2 << 20];
        let _told = [start(&connection, &long), start(&connection, b"r")];
        assert_eq!(wakes.taken(), 0);
        socket.make_room();
        assert_eq!(wakes.taken(), 1);
        assert!(task.as_mut().poll(&mut context).is_pending());
        assert_eq!(socket.0.lock().taken, [b"q", &long[..], b"r"].concat());

        socket.0.lock().has_ended = true;
        assert!(!driven.take_in());
        assert_eq!(wakes.taken(), 1);
        assert!(task.as_mut().poll(&mut context).is_ready());
    }

    /// A request that was too late comes in between the last look at what came in and the end of the connection: it is
    /// known that it was not sent, and so that nothing was applied.
    #[test]
    fn what_was_too_late_when_the_connection_ended_was_not_sent() {
        let socket = Scripted::saying(b"a");
        let (connection, task) = connection(&socket);
        let mut told = start(&connection, b"q");
        let mut never_told = start(&connection, b"q");
        let (late, mut late_told) = request(b"q", Boottime::ZERO);
        let waker = Waker::from(Arc::new(Starts(Mutex::new(Some((connection.clone(), late))))));
        assert!(Pin::new(&mut told).poll(&mut Context::from_waker(&waker)).is_pending());
        assert!(pin!(task.run(|_, _| ())).poll(&mut Context::from_waker(Waker::noop())).is_ready());
        assert_eq!(told.try_recv().unwrap(), Ok(b'a'));
        assert_eq!(kind(&mut never_told), StoreErrorKind::Unknown, "it was sent");
        assert_eq!(kind(&mut late_told), StoreErrorKind::Unreachable, "it was not sent");
    }

    /// What had come in when a request could not be written any more.
    #[test]
    fn answers_that_came_before_the_connection_broke_count() {
        let socket = Scripted::default();
        let (connection, task) = connection(&socket);
        let mut told = start(&connection, b"q");
        socket.0.lock().says.push(b'a');
        socket.0.lock().is_broken = true;
        let mut unknown = start(&connection, b"q");
        let (next, _told) = request(b"q", Boottime::NEVER);
        assert!(connection.start(next).is_err(), "it goes out on the next connection");
        assert!(pin!(task.run(|_, _| ())).poll(&mut Context::from_waker(Waker::noop())).is_ready());
        assert_eq!(told.try_recv().unwrap(), Ok(b'a'));
        assert_eq!(kind(&mut unknown), StoreErrorKind::Unknown);
    }

    /// A thread whose request has no room yet reads for one whose request was sent: both wait.
    #[test]
    fn a_request_without_room_is_awaited_too() {
        let socket = Scripted::default();
        socket.0.lock().is_full = true;
        let (connection, _task) = connection(&socket);
        let driven = connection.driven().unwrap();
        let _long = start(&connection, &vec![b' '; 2 << 20]);
        assert_eq!(driven.awaited(), 1);
        let _short = start(&connection, b"q");
        assert_eq!(driven.awaited(), 2);
    }

    /// A connection that was left, or has ended, writes no more, and gives requests back: they go out on the next one.
    #[test]
    fn what_has_ended_gives_requests_back() {
        let socket = Scripted::default();
        socket.0.lock().is_full = true;
        let (connection, task) = connection(&socket);
        let mut sent = start(&connection, &vec![b' '; 2 << 20]);
        let _unsent = start(&connection, b"q");
        link::Connection::leave(&connection);
        assert!(connection.start(request(b"q", Boottime::NEVER).0).is_err());
        let given_back = AtomicUsize::new(0);
        let task = task.run(|why, unsent| {
            assert_eq!(why, "another host of the URL is tried");
            given_back.store(unsent.len(), Ordering::SeqCst);
        });
        assert!(pin!(task).poll(&mut Context::from_waker(Waker::noop())).is_ready());
        assert_eq!(given_back.into_inner(), 1);
        assert_eq!(kind(&mut sent), StoreErrorKind::Unknown);
        assert!(connection.start(request(b"q", Boottime::NEVER).0).is_err());
        let driven = connection.driven().unwrap();
        assert!(!driven.take_in());
    }
}
