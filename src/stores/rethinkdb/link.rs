//! The way to the servers: the present connection, the next one when it ends, and what waits meanwhile.

use std::collections::VecDeque;
use std::future::Future;
use std::sync::{Arc, Weak};
use std::time::Duration;

use serde_json::Value;
use tokio::sync::{Semaphore, oneshot};

use super::connection::{About, Answered, Body, Connection, Query, answer_of};
use super::dial::{Connected, dial};
use super::introduce::{self, Introduced};
use super::reply::{self, Failure, ServerAnswer};
use super::skew::Clocks;
use super::term;
use super::url::Config;
use crate::backoff::Backoff;
use crate::clock::Boottime;
use crate::mutex::Mutex;
use crate::runtime::{self, sleep_until, until};
use crate::store::{StoreError, StoreErrorKind};

/// How long a server is kept although it sees no primary: while one is elected, none of them does.
const STAY: Duration = Duration::from_secs(1);

/// How many change feeds there may be. A server reads no more from a connection while 1024 of its queries are
/// unanswered, and a feed is one (RethinkDB src/client_protocol/server.cc: `connection_loop`).
const MOST_FEEDS: usize = 768;

/// A connection that ends sooner than this was of no use: the next one is not made at once.
const OF_USE: Duration = Duration::from_secs(1);

/// Connects when there is something to send, and again when a connection has ended.
pub struct Link {
    pub config: Arc<Config>,
    pub clocks: Clocks,
    /// Room for feeds. Who waits for a lock without one looks at it now and then (R10).
    pub feeds: Arc<Semaphore>,
    own: Weak<Link>,
    state: Mutex<State>,
}

struct State {
    present: Option<Connection>,
    connected_at: Boottime,
    /// What is sent as soon as there is a connection, in the order of giving up.
    waiting: VecDeque<Query>,
    dialling: bool,
    /// Whether a server ever let us in: from then on trouble is taken for passing.
    ever_connected: bool,
    /// How many connections in a row were of no use.
    useless: u32,
    /// The host of the URL that is tried first.
    first: usize,
}

impl Link {
    pub fn new(config: Arc<Config>) -> Arc<Link> {
        Arc::new_cyclic(|own| Link {
            clocks: Clocks::new(config.skew),
            feeds: Arc::new(Semaphore::new(MOST_FEEDS)),
            config,
            own: own.clone(),
            state: Mutex::new(State {
                present: None,
                connected_at: Boottime::now(),
                waiting: VecDeque::new(),
                dialling: false,
                ever_connected: false,
                useless: 0,
                first: 0,
            }),
        })
    }

    /// Sends a query, or keeps it until there is a connection, for `op_timeout` at most. It is on its
    /// way when this returns, whether the future is awaited or not.
    pub fn ask(&self, body: Body) -> impl Future<Output = Result<Answered, StoreError>> + Send + Unpin + use<> {
        let (tell, told) = oneshot::channel();
        let query = Query { body, give_up_at: Boottime::now() + self.config.op_timeout, tell };
        let mut state = self.state.lock();
        state.waiting.push_back(query);
        self.send_waiting(&mut state);
        drop(state);
        answer_of(told)
    }

    /// The server's answer to a term, `[now, result]`: the result, and when it was so.
    pub async fn ask_term(&self, term: &term::Term) -> Result<Timed, Failure> {
        let body = term.start();
        self.timed(self.ask(Arc::new(move |_| body.clone())).await?)
    }

    /// Takes `[now, result]` apart, and notes what it tells of the server's clock.
    pub fn timed(&self, answered: Answered) -> Result<Timed, Failure> {
        let nonsense = || StoreError::unknown("the server's answer makes no sense");
        let reply = reply::read(&answered.body).inspect_err(|failure| {
            if failure.sees_no_primary() {
                self.look_elsewhere(&answered.connection.about);
            }
        })?;
        let ServerAnswer::Atom(Value::Array(parts)) = reply else { return Err(nonsense().into()) };
        let Ok([now, result]) = <[Value; 2]>::try_from(parts) else { return Err(nonsense().into()) };
        let now = now.as_f64().ok_or_else(nonsense)?;
        answered.connection.about.observe(&self.clocks, answered.sent, answered.received, now);
        Ok(Timed { result, now_ms: super::row::seconds_to_ms(now) })
    }

    /// What a connection does last.
    pub fn connection_ended(&self, ended: &Arc<About>, unsent: VecDeque<Query>) {
        let mut state = self.state.lock();
        if (ended.since + OF_USE).has_passed() {
            state.useless = 0;
        } else {
            state.useless += 1;
            state.first = (state.first + 1) % self.config.hosts.len();
        }
        if state.present.as_ref().is_some_and(|present| Arc::ptr_eq(&present.about, ended)) {
            state.present = None;
        }
        for query in unsent.into_iter().rev() {
            state.waiting.push_front(query);
        }
        self.send_waiting(&mut state);
    }

    /// Leaves a server that sees no primary, where the URL names others: it may be cut off from them, and we not.
    ///
    /// What it has not answered yet is answered with the connection's end, and asked again by whoever needs it.
    fn look_elsewhere(&self, about: &Arc<About>) {
        let mut state = self.state.lock();
        let count = self.config.hosts.len();
        if count > 1
            && (state.connected_at + STAY).has_passed()
            && let Some(left) = state.present.take_if(|present| Arc::ptr_eq(&present.about, about))
        {
            tracing::info!("{} sees no primary of the table: another host is tried", about.host);
            left.leave();
            state.first = (state.first + 1) % count;
        }
    }

    /// Sends what waits, or sees to it that there will be a connection.
    fn send_waiting(&self, state: &mut State) {
        if let Some(connection) = &state.present {
            while let Some(query) = state.waiting.pop_front() {
                if let Err(query) = connection.start(query) {
                    // It has ended, and its task is about to say so.
                    state.waiting.push_front(query);
                    state.present = None;
                    break;
                }
            }
        }
        if !state.waiting.is_empty() {
            self.see_to_a_connection(state);
        }
    }

    fn see_to_a_connection(&self, state: &mut State) {
        if state.dialling {
            return;
        }
        let Some(own) = self.own.upgrade() else { return };
        match runtime::handle() {
            Ok(handle) => {
                state.dialling = true;
                handle.spawn(keep_dialling(Arc::downgrade(&own), Arc::clone(&self.config)));
            }
            Err(error) => {
                for query in state.waiting.drain(..) {
                    let _ = query.tell.send(Err(StoreError::resources(error.message())));
                }
            }
        }
    }

    /// Takes over a server that let us in.
    fn connected(&self, connection: Connection, host: usize) {
        let mut state = self.state.lock();
        if !state.ever_connected {
            tracing::debug!("connected to {}", connection.about.host);
        } else {
            tracing::info!("connected again, to {}", connection.about.host);
        }
        state.ever_connected = true;
        state.dialling = false;
        state.first = host;
        state.connected_at = Boottime::now();
        state.present = Some(connection);
        self.send_waiting(&mut state);
    }

    /// Answers what has waited long enough; says when the next will have.
    fn give_up_on_the_late(&self, why: &str) -> Option<Boottime> {
        let mut state = self.state.lock();
        let now = Boottime::now();
        while state.waiting.front().is_some_and(|query| query.give_up_at <= now) {
            if let Some(query) = state.waiting.pop_front() {
                let _ = query.tell.send(Err(StoreError::unreachable(format!("no server could be reached: {why}"))));
            }
        }
        let next = state.waiting.front().map(|query| query.give_up_at);
        if next.is_none() {
            state.dialling = false;
        }
        next
    }

    /// Answers all that waits, where asking again would not help.
    fn give_up_for_good(&self, error: &StoreError) {
        let mut state = self.state.lock();
        state.dialling = false;
        for query in state.waiting.drain(..) {
            let _ = query.tell.send(Err(error.clone()));
        }
    }
}

/// A result, and the server's time that belongs to it.
pub struct Timed {
    pub result: Value,
    pub now_ms: u64,
}

/// Dials until a server lets us in, or until nobody waits for that any more.
async fn keep_dialling(link: Weak<Link>, config: Arc<Config>) {
    let useless = link.upgrade().map_or(0, |link| link.state.lock().useless);
    let mut backoff = Backoff::after(useless);
    let mut why = "the server hangs up on us again and again".to_string();
    loop {
        let mut pause = sleep_until(Boottime::now() + backoff.pause());
        loop {
            let Some(limit) = link.upgrade().and_then(|link| link.give_up_on_the_late(&why)) else { return };
            if until(limit, &mut pause).await.is_some() {
                break;
            }
        }
        drop(pause);
        let first = match link.upgrade() {
            Some(link) => link.state.lock().first,
            None => return,
        };
        let mut round = Box::pin(dial_and_look(&config, first));
        let outcome = loop {
            let Some(limit) = link.upgrade().and_then(|link| link.give_up_on_the_late(&why)) else { return };
            if let Some(outcome) = until(limit, &mut round).await {
                break outcome;
            }
        };
        let Some(strong) = link.upgrade() else { return };
        match outcome {
            Ok((connected, introduced)) => {
                let host = config.hosts[connected.host].to_string();
                let about = About::new(host, connected.version, introduced, &strong.clocks);
                let patience = config.op_timeout / 2;
                let (connection, driver) = Connection::new(connected.stream, Arc::new(about), patience);
                match runtime::handle() {
                    Ok(handle) => drop(handle.spawn(driver.run(link.clone()))),
                    Err(error) => return strong.give_up_for_good(&StoreError::resources(error.message())),
                }
                return strong.connected(connection, connected.host);
            }
            Err(error) => {
                // A server that is being started, or a proxy before one that is away, hangs up on us or says
                // anything; but a password that is wrong stays wrong.
                let passing = matches!(error.kind, StoreErrorKind::Unreachable | StoreErrorKind::BadConfig);
                if !passing || !strong.state.lock().ever_connected {
                    return strong.give_up_for_good(&error);
                }
                tracing::debug!("no server could be reached: {error}");
                why = error.message.to_string();
                // Not the host that was just lost, where there is another.
                strong.state.lock().first = (first + 1) % config.hosts.len();
            }
        }
        backoff.failed();
    }
}

/// Gets a connection, and a first look at the server: who it is, and its clock.
async fn dial_and_look(config: &Arc<Config>, first: usize) -> Result<(Connected, Introduced), StoreError> {
    let mut connected = dial(config, first).await?;
    let mut looking = Box::pin(introduce::look(&mut *connected.stream));
    let looked = until(connected.limit, &mut looking).await;
    drop(looking);
    let looked = looked
        .unwrap_or_else(|| Err(StoreError::unreachable(format!("no answer within {:?}", config.connect_timeout))));
    let host = &config.hosts[connected.host];
    let introduced = looked.map_err(|error| StoreError::new(error.kind, format!("{host}: {}", error.message)))?;
    Ok((connected, introduced))
}
