//! The way to the servers: the present connection, the next one when it ends, and what waits meanwhile.

use std::collections::VecDeque;
use std::future::Future;
use std::mem;
use std::sync::{Arc, Weak};
use std::time::Duration;

use super::address::Address;
use super::dial::Reached;
use crate::backoff::Backoff;
use crate::clock::Boottime;
use crate::error::Error;
use crate::store::{StoreError, StoreErrorKind};
use crate::sys::mutex::Mutex;
use crate::sys::runtime::{self, Driven, sleep_until, until};

/// How long a server is kept although it cannot do what it is asked: while a primary is elected, none of them can.
const STAY: Duration = Duration::from_secs(1);

/// A connection that ends sooner than this did not serve: the next one is not made at once.
const SERVED: Duration = Duration::from_secs(1);

/// An engine, as a link sees it.
pub trait Engine: Sized + Send + Sync + 'static {
    type Connection: Connection;
    /// A server that has let us in, before anything runs the connection.
    type Greeted: Send;

    /// The hosts of the URL.
    fn hosts(&self) -> &[Address];

    /// Reaches one of the hosts and greets it, the one numbered `first` before the others. The connect timeout of
    /// each host is the engine's to keep. Run on the library's runtime; dropped when nobody waits for it any more.
    fn reach(&self, first: usize) -> impl Future<Output = Result<Reached<Self::Greeted>, StoreError>> + Send;

    /// Begins to run a connection, in a task of its own that says to `tie` when it has ended. Does not wait.
    fn run(&self, greeted: Self::Greeted, tie: Tie<Self>) -> Result<Self::Connection, Error>;
}

/// A handle of a connection, cheap to clone.
pub trait Connection: Clone + Send + Sync + 'static {
    type Request: Request;

    /// Sends a request, and does not wait; gives it back where the connection has ended.
    fn start(&self, request: Self::Request) -> Result<(), Self::Request>;

    /// Ends the connection, also for others that have a handle of it. Does not wait.
    fn leave(&self);

    /// What a thread runs that waits for an answer on it; `None`: only the library's own threads run it.
    fn driven(&self) -> Option<Arc<dyn Driven>> {
        None
    }
}

/// What waits to be sent.
pub trait Request: Send + 'static {
    /// From when on it is not sent any more.
    fn give_up_at(&self) -> Boottime;

    /// Answers it: nothing was sent.
    fn fail(self, error: StoreError);
}

type RequestOf<E> = <<E as Engine>::Connection as Connection>::Request;

/// Connects when there is something to send, and again when a connection has ended.
///
/// A link belongs to the process that made it. A forked child makes its own, and leaves this one alone.
pub struct Link<E: Engine> {
    /// Shared with what dials, which must not keep the link alive: what waits is answered when the link goes.
    pub engine: Arc<E>,
    own: Weak<Link<E>>,
    state: Mutex<State<E>>,
}

struct State<E: Engine> {
    present: Option<Present<E::Connection>>,
    /// How many connections there were.
    connections: u64,
    /// What is sent as soon as there is a connection, in the order of giving up.
    waiting: VecDeque<RequestOf<E>>,
    dialling: bool,
    /// Whether a server ever let us in: from then on trouble is taken for passing.
    ever_connected: bool,
    /// How many connections in a row ended before they served.
    useless: u32,
    /// The host of the URL that is tried first.
    first: usize,
}

struct Present<C> {
    connection: C,
    number: u64,
    host: usize,
    since: Boottime,
}

/// What ties a connection to its link. Dropped, it says that the connection has ended.
pub struct Tie<E: Engine> {
    link: Weak<Link<E>>,
    number: u64,
    host: usize,
    since: Boottime,
    unsent: VecDeque<RequestOf<E>>,
}

impl<E: Engine> Tie<E> {
    /// The connection's number, as [`Link::switch_host`] wants it.
    pub fn number(&self) -> u64 {
        self.number
    }

    /// The connection has ended: what it has not sent goes out on the next one. To be called before requests that
    /// were sent are answered with the end, so that a caller that tries again finds the connection gone.
    pub fn ended(mut self, why: &str, unsent: VecDeque<RequestOf<E>>) {
        if let Some(link) = self.link.upgrade() {
            tracing::debug!("the connection to {} ended: {why}", link.engine.hosts()[self.host]);
        }
        self.unsent = unsent;
    }
}

impl<E: Engine> Drop for Tie<E> {
    fn drop(&mut self) {
        if let Some(link) = self.link.upgrade() {
            link.connection_ended(self.number, self.since, mem::take(&mut self.unsent));
        }
    }
}

impl<E: Engine> Link<E> {
    /// Does not connect yet.
    pub fn new(engine: E) -> Arc<Link<E>> {
        Arc::new_cyclic(|own| Link {
            engine: Arc::new(engine),
            own: own.clone(),
            state: Mutex::new(State {
                present: None,
                connections: 0,
                waiting: VecDeque::new(),
                dialling: false,
                ever_connected: false,
                useless: 0,
                first: 0,
            }),
        })
    }

    /// Sends a request, or keeps it until there is a connection. It is on its way when this returns.
    pub fn send(&self, request: RequestOf<E>) {
        self.send_waiting(|state| state.waiting.push_back(request));
    }

    /// To be called by a future that waits for what comes on the connection: where a thread waits for that future
    /// alone, it runs the connection meanwhile.
    pub fn drive(&self) {
        let driven = self.state.lock().present.as_ref().and_then(|present| present.connection.driven());
        if let Some(driven) = driven {
            runtime::drive(driven);
        }
    }

    /// Leaves the server of a connection that cannot do what it is asked, where the URL names others: it may be cut
    /// off from them, and we not.
    ///
    /// What it has not answered yet is answered with the connection's end.
    pub fn switch_host(&self, number: u64, why: &str) {
        let mut state = self.state.lock();
        let count = self.engine.hosts().len();
        let to_be_left = |present: &mut Present<_>| present.number == number && (present.since + STAY).has_passed();
        if count > 1
            && let Some(left) = state.present.take_if(to_be_left)
        {
            tracing::info!("{} {why}: another host is tried", self.engine.hosts()[left.host]);
            left.connection.leave();
            state.first = (state.first + 1) % count;
        }
    }

    fn connection_ended(&self, number: u64, since: Boottime, unsent: VecDeque<RequestOf<E>>) {
        self.send_waiting(|state| {
            if (since + SERVED).has_passed() {
                state.useless = 0;
            } else {
                state.useless += 1;
                state.first = (state.first + 1) % self.engine.hosts().len();
            }
            state.present.take_if(|present| present.number == number);
            for request in unsent.into_iter().rev() {
                state.waiting.push_front(request);
            }
        });
    }

    /// Does something, and then sends what waits, or ensures that there will be a connection.
    fn send_waiting(&self, first: impl FnOnce(&mut State<E>)) {
        let mut locked = self.state.lock();
        let state = &mut *locked;
        first(state);
        if let Some(present) = &state.present {
            while let Some(request) = state.waiting.pop_front() {
                if let Err(request) = present.connection.start(request) {
                    // It has ended, and its task is about to say so.
                    state.waiting.push_front(request);
                    state.present = None;
                    break;
                }
            }
        }
        if state.waiting.is_empty() || state.dialling {
            return;
        }
        match runtime::handle() {
            Ok(handle) => {
                state.dialling = true;
                handle.spawn(keep_dialling(Weak::clone(&self.own)));
            }
            Err(error) => {
                let failed = mem::take(&mut state.waiting);
                drop(locked);
                fail(failed, &StoreError::resources(error.message()));
            }
        }
    }

    /// Takes over a server that let us in.
    fn connected(&self, greeted: E::Greeted, host: usize) {
        let since = Boottime::now();
        let number = {
            let mut state = self.state.lock();
            state.connections += 1;
            state.connections
        };
        let tie = Tie { link: self.own.clone(), number, host, since, unsent: VecDeque::new() };
        let connection = match self.engine.run(greeted, tie) {
            Ok(connection) => connection,
            Err(error) => return self.give_up_for_good(&StoreError::resources(error.message())),
        };
        self.send_waiting(|state| {
            let address = &self.engine.hosts()[host];
            match state.ever_connected {
                false => tracing::debug!("connected to {address}"),
                true => tracing::info!("connected again, to {address}"),
            }
            state.ever_connected = true;
            state.dialling = false;
            state.first = host;
            state.present = Some(Present { connection, number, host, since });
        });
    }

    /// Answers what has waited long enough; says when the next will have.
    fn give_up_on_the_late(&self, why: &str) -> Option<Boottime> {
        let mut state = self.state.lock();
        let now = Boottime::now();
        let late = state.waiting.iter().take_while(|request| request.give_up_at() <= now).count();
        let late: Vec<_> = state.waiting.drain(..late).collect();
        let next = state.waiting.front().map(Request::give_up_at);
        if next.is_none() {
            state.dialling = false;
        }
        drop(state);
        fail(late, &unreached(why));
        next
    }

    /// Answers all that waits, where asking again would not help.
    fn give_up_for_good(&self, error: &StoreError) {
        let mut state = self.state.lock();
        state.dialling = false;
        let waiting = mem::take(&mut state.waiting);
        drop(state);
        fail(waiting, error);
    }
}

/// Answers requests. Without the link's mutex: who is woken may have more to send.
fn fail<R: Request>(requests: impl IntoIterator<Item = R>, error: &StoreError) {
    requests.into_iter().for_each(|request| request.fail(error.clone()));
}

/// When a request is given up that still waits for a connection: a little before its caller stops waiting, so that the
/// caller learns that nothing was sent, and why.
pub fn give_up_unsent_at(op_timeout: Duration) -> Boottime {
    Boottime::now() + (op_timeout - (op_timeout / 20).min(Duration::from_millis(100)))
}

fn unreached(why: &str) -> StoreError {
    StoreError::unreachable(format!("no server could be reached: {why}"))
}

/// Dials until a server lets us in, or until nobody waits for that any more.
async fn keep_dialling<E: Engine>(link: Weak<Link<E>>) {
    let useless = link.upgrade().map_or(0, |link| link.state.lock().useless);
    let mut backoff = Backoff::after(useless);
    let mut why = "the server keeps closing the connection".to_string();
    loop {
        let mut pause = sleep_until(Boottime::now() + backoff.pause());
        loop {
            let Some(limit) = link.upgrade().and_then(|link| link.give_up_on_the_late(&why)) else { return };
            if until(limit, &mut pause).await.is_some() {
                break;
            }
        }
        drop(pause);
        let (engine, first) = match link.upgrade() {
            Some(link) => (Arc::clone(&link.engine), link.state.lock().first),
            None => return,
        };
        let mut reaching = Box::pin(engine.reach(first));
        let outcome = loop {
            let Some(limit) = link.upgrade().and_then(|link| link.give_up_on_the_late(&why)) else { return };
            if let Some(outcome) = until(limit, &mut reaching).await {
                break outcome;
            }
        };
        let Some(strong) = link.upgrade() else { return };
        match outcome {
            Ok(Reached { value, host, .. }) => return strong.connected(value, host),
            Err(error) => {
                // A server that is being started, or a proxy before one that is away, hangs up on us or says
                // anything; but a password that is wrong stays wrong.
                let passing = matches!(error.kind, StoreErrorKind::Unreachable | StoreErrorKind::BadConfig);
                if !passing || !strong.state.lock().ever_connected {
                    let unreachable = error.kind == StoreErrorKind::Unreachable;
                    return strong.give_up_for_good(&if unreachable { unreached(&error.message) } else { error });
                }
                tracing::debug!("no server could be reached: {error}");
                why = error.message.to_string();
                // Not the host that was just lost, where there is another.
                strong.state.lock().first = (first + 1) % strong.engine.hosts().len();
            }
        }
        backoff.failed();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    /// An engine whose servers are in the test.
    struct Fake {
        hosts: Vec<Address>,
        /// What reaching a server comes to; it is waited for.
        outcomes: tokio::sync::Mutex<tokio::sync::mpsc::UnboundedReceiver<Result<usize, StoreError>>>,
        connected: mpsc::Sender<(Tie<Fake>, mpsc::Receiver<u32>)>,
    }

    #[derive(Clone)]
    struct FakeConnection(mpsc::Sender<u32>);

    struct FakeRequest {
        number: u32,
        give_up_at: Boottime,
        failed: mpsc::Sender<(u32, StoreError)>,
        /// What is sent when this fails, as a caller's waker may.
        then: Option<(Arc<Link<Fake>>, Box<FakeRequest>)>,
    }

    impl Request for FakeRequest {
        fn give_up_at(&self) -> Boottime {
            self.give_up_at
        }

        fn fail(self, error: StoreError) {
            if let Some((link, then)) = self.then {
                link.send(*then);
            }
            let _ = self.failed.send((self.number, error));
        }
    }

    impl Connection for FakeConnection {
        type Request = FakeRequest;

        fn start(&self, request: FakeRequest) -> Result<(), FakeRequest> {
            self.0.send(request.number).map_err(|_| request)
        }

        fn leave(&self) {}
    }

    impl Engine for Fake {
        type Connection = FakeConnection;
        type Greeted = ();

        fn hosts(&self) -> &[Address] {
            &self.hosts
        }

        async fn reach(&self, _first: usize) -> Result<Reached<()>, StoreError> {
            let outcome = self.outcomes.lock().await.recv().await;
            let host = outcome.unwrap_or_else(|| Err(StoreError::unreachable("the test is over")))?;
            Ok(Reached { value: (), host, limit: Boottime::NEVER })
        }

        fn run(&self, (): (), tie: Tie<Fake>) -> Result<FakeConnection, Error> {
            let (send, sent) = mpsc::channel();
            let _ = self.connected.send((tie, sent));
            Ok(FakeConnection(send))
        }
    }

    struct Scene {
        link: Arc<Link<Fake>>,
        outcomes: tokio::sync::mpsc::UnboundedSender<Result<usize, StoreError>>,
        connected: mpsc::Receiver<(Tie<Fake>, mpsc::Receiver<u32>)>,
        fail: mpsc::Sender<(u32, StoreError)>,
        failed: mpsc::Receiver<(u32, StoreError)>,
    }

    fn scene() -> Scene {
        let (outcomes, wanted) = tokio::sync::mpsc::unbounded_channel();
        let (connect, connected) = mpsc::channel();
        let (fail, failed) = mpsc::channel();
        let hosts = (1..=2).map(|port| Address::Tcp { host: "h".into(), port }).collect();
        let link = Link::new(Fake { hosts, outcomes: wanted.into(), connected: connect });
        Scene { link, outcomes, connected, fail, failed }
    }

    impl Scene {
        fn request(&self, number: u32, give_up_at: Boottime) -> FakeRequest {
            FakeRequest { number, give_up_at, failed: self.fail.clone(), then: None }
        }

        fn send(&self, number: u32) {
            self.link.send(self.request(number, Boottime::NEVER));
        }
    }

    #[test]
    fn what_waits_goes_out_in_order_on_the_next_connection() {
        let scene = scene();
        (1..=3).for_each(|number| scene.send(number));
        scene.outcomes.send(Ok(0)).unwrap();
        let (tie, sent) = scene.connected.recv().unwrap();
        assert_eq!(sent.iter().take(3).collect::<Vec<_>>(), [1, 2, 3]);
        scene.send(4);
        assert_eq!(sent.recv(), Ok(4));
        // Four was not sent after all.
        drop(sent);
        tie.ended("a test", VecDeque::from([scene.request(4, Boottime::NEVER)]));
        scene.send(5);
        // A server that is away, and one whose replies cannot be read, may recover.
        scene.outcomes.send(Err(StoreError::unreachable("away"))).unwrap();
        scene.outcomes.send(Err(StoreError::bad_config("no such server"))).unwrap();
        scene.outcomes.send(Ok(1)).unwrap();
        let (_tie, sent) = scene.connected.recv().unwrap();
        assert_eq!(sent.iter().take(2).collect::<Vec<_>>(), [4, 5]);
        assert!(scene.failed.try_recv().is_err());
    }

    #[test]
    fn what_helps_nobody_to_wait_for_is_told_at_once() {
        let scene = scene();
        // Before a server ever let us in, that is everything.
        let denied = StoreError::new(StoreErrorKind::Denied, "who are you");
        for (error, told) in [
            (StoreError::unreachable("away"), StoreError::unreachable("no server could be reached: away")),
            (denied.clone(), denied),
        ] {
            scene.send(1);
            scene.outcomes.send(Err(error)).unwrap();
            assert_eq!(scene.failed.recv().unwrap(), (1, told));
        }
        scene.send(2);
        scene.outcomes.send(Ok(0)).unwrap();
        let (tie, sent) = scene.connected.recv().unwrap();
        assert_eq!(sent.recv(), Ok(2));
        drop((tie, sent));
        scene.send(3);
        let denied = StoreError::new(StoreErrorKind::Denied, "who are you");
        scene.outcomes.send(Err(StoreError::unreachable("away"))).unwrap();
        scene.outcomes.send(Err(denied.clone())).unwrap();
        assert_eq!(scene.failed.recv().unwrap(), (3, denied));
    }

    #[test]
    fn nothing_waits_longer_than_it_may() {
        let scene = scene();
        scene.link.send(scene.request(1, Boottime::now() + Duration::from_millis(1)));
        let (number, error) = scene.failed.recv().unwrap();
        assert_eq!((number, error.kind), (1, StoreErrorKind::Unreachable));
    }

    /// Requests that have waited for too long, and such for which waiting would not help.
    #[test]
    fn a_failure_may_make_its_caller_send_again() {
        for (limit, outcome) in
            [(Duration::from_millis(1), None), (Duration::MAX, Some(StoreError::unreachable("away")))]
        {
            let scene = scene();
            let then = Some((Arc::clone(&scene.link), Box::new(scene.request(2, Boottime::NEVER))));
            scene.link.send(FakeRequest { then, ..scene.request(1, Boottime::now() + limit) });
            outcome.into_iter().for_each(|error| scene.outcomes.send(Err(error)).unwrap());
            assert_eq!(scene.failed.recv().unwrap().0, 1);
            scene.outcomes.send(Ok(0)).unwrap();
            let (_tie, sent) = scene.connected.recv().unwrap();
            assert_eq!(sent.recv(), Ok(2));
        }
    }

    /// Nobody keeps a link alive that is only dialling.
    #[test]
    fn what_waits_is_dropped_with_the_link() {
        let Scene { link, outcomes: _outcomes, fail, failed, .. } = scene();
        link.send(FakeRequest { number: 1, give_up_at: Boottime::NEVER, failed: fail, then: None });
        drop(link);
        // The last sender went with the request.
        assert!(failed.recv().is_err());
    }
}
