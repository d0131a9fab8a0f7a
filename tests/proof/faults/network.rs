//! A store behind a bad network: requests and answers are delayed, lost, applied late, or twice.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::sync::Semaphore;

use nblock::clock::Boottime;
use nblock::key::Key;
use nblock::protocol::{Change, Reply};
use nblock::record::Record;
use nblock::store::{Answer, Cursor, Filter, Notice, Page, Pong, Readiness, Store, StoreError, Watch};
use nblock::stores::memory;
use nblock::sys::runtime::{handle, sleep_until};

use crate::support::{LONG, Random};

/// What happens to one request and its answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Applied and answered at once.
    Good,
    /// Takes so long to get there, and its answer so long to come back.
    Slow(Duration, Duration),
    /// Nothing was sent.
    Unreachable,
    /// The connection ends before the request is applied.
    CutBefore,
    /// The connection ends after the request was applied.
    CutAfter,
    /// The connection ends, and the server applies the request so long afterwards.
    CutThenApplied(Duration),
    /// No answer, until the connection ends after so long. Applied at once.
    Silence(Duration),
    /// As `Silence`, and applied only when the connection has ended and so long again has passed.
    SilenceThenApplied(Duration),
    /// Applied and answered, and applied once more so long afterwards.
    Twice(Duration),
    /// On its way until the gate is opened.
    GateBefore,
    /// Applied at once; the answer waits at the gate.
    GateAfter,
    /// The connection ends, and the server applies the request when the gate is opened.
    CutThenGate,
    /// Arrives at once, is applied so long afterwards with the clock of its arrival, then answered (R3): as a
    /// server does that was stopped, or whose primary was busy. On the memory store alone, as the next one.
    Stalled(Duration),
    /// As `Stalled`, and the connection ends when it has arrived.
    CutThenStalled(Duration),
}

impl Fault {
    /// Whether it needs a store whose clock can be the one of the arrival. The embedded store has none: there
    /// a request arrives when the mutex is its own.
    pub fn keeps_the_clock(self) -> bool {
        matches!(self, Fault::Stalled(_) | Fault::CutThenStalled(_))
    }

    /// Whether it may leave something that takes a free lock when nobody can prevent it any more, for one lease
    /// from its arrival at most (R7).
    pub fn may_leave_an_orphan(self) -> bool {
        matches!(self, Fault::Twice(_) | Fault::CutThenStalled(_))
    }
}

/// How requests fare from here on.
pub enum NetworkProfile {
    Fair,
    /// Every request meets this fault.
    Always(Fault),
    /// These faults, one request after the other, then fair.
    Script(VecDeque<Fault>),
    /// A fault at random for one request of so many, any of these.
    Storm(Random, usize, Faults),
}

/// The faults that a storm draws from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Faults {
    /// Those that any store can meet.
    OfAnyStore,
    /// Those, but nothing that was answered is applied once more.
    AppliedOnce,
    /// Requests that are applied late with the clock of their arrival are among them.
    WithEarlyClocks,
}

pub struct Network {
    store: Arc<dyn Store>,
    profile: Mutex<NetworkProfile>,
    /// Has no permits; closing it lets everybody through.
    gate: Arc<Semaphore>,
    /// What happens while the next request is handed over.
    meanwhile: Mutex<Option<Meanwhile>>,
    /// Whether grants bring no fence, as on a store that draws it afterwards.
    fenceless: AtomicBool,
    /// How many requests were handed over.
    requests: AtomicUsize,
    /// How many answers came to the gate.
    at_gate: AtomicUsize,
    /// Whether each look at a watch tells of a change.
    restless: AtomicBool,
    /// Whether watches tell of a new holder, and nothing else makes a waiter look.
    announcing: AtomicBool,
}

type Meanwhile = Box<dyn FnOnce() + Send>;

impl Network {
    pub fn before(store: Arc<dyn Store>, profile: NetworkProfile) -> Arc<Network> {
        Arc::new(Network {
            store,
            profile: Mutex::new(profile),
            gate: Arc::new(Semaphore::new(0)),
            meanwhile: Mutex::new(None),
            fenceless: AtomicBool::new(false),
            requests: AtomicUsize::new(0),
            at_gate: AtomicUsize::new(0),
            restless: AtomicBool::new(false),
            announcing: AtomicBool::new(false),
        })
    }

    /// Lets through what waits at the gate, and all that comes to it later.
    pub fn open_gate(&self) {
        self.gate.close();
    }

    /// Does something on the thread of the next request, before it is on its way.
    pub fn meanwhile(&self, something: impl FnOnce() + Send + 'static) {
        *self.meanwhile.lock().unwrap() = Some(Box::new(something));
    }

    pub fn without_fences(&self) {
        self.fenceless.store(true, Ordering::Relaxed);
    }

    /// From now on watches tell of a new holder, with a long lease, and nothing else makes a waiter look.
    pub fn announcing(&self) {
        self.announcing.store(true, Ordering::Relaxed);
    }

    /// How many answers came to the gate.
    pub fn at_gate(&self) -> usize {
        self.at_gate.load(Ordering::SeqCst)
    }

    /// From now on each look at a watch tells of a change.
    pub fn restless(&self) {
        self.restless.store(true, Ordering::Relaxed);
    }

    /// How many requests were handed over.
    pub fn requests(&self) -> usize {
        self.requests.load(Ordering::SeqCst)
    }

    pub fn set(&self, profile: NetworkProfile) {
        *self.profile.lock().unwrap() = profile;
    }

    fn fault(&self) -> Fault {
        match &mut *self.profile.lock().unwrap() {
            NetworkProfile::Fair => Fault::Good,
            NetworkProfile::Always(fault) => *fault,
            NetworkProfile::Script(faults) => faults.pop_front().unwrap_or(Fault::Good),
            NetworkProfile::Storm(random, one_in, faults) => match random.below(*one_in) {
                0 => any_fault(random, *faults),
                _ => Fault::Slow(some_time(random, 4), some_time(random, 4)),
            },
        }
    }

    fn deliver<T: Send + 'static>(&self, request: impl Fn(&dyn Store) -> Answer<T> + Send + 'static) -> Answer<T> {
        let meanwhile = self.meanwhile.lock().unwrap().take();
        let fault = self.fault();
        if let Some(something) = meanwhile {
            something();
        }
        self.requests.fetch_add(1, Ordering::SeqCst);
        let (store, gate) = (Arc::clone(&self.store), Arc::clone(&self.gate));
        let cut = || Err(StoreError::unknown("the connection ended"));
        match fault {
            Fault::Good => request(&*store),
            Fault::GateBefore => Answer::later(async move {
                let _ = gate.acquire().await;
                request(&*store).get().await
            }),
            Fault::GateAfter => {
                let result = request(&*store);
                self.at_gate.fetch_add(1, Ordering::SeqCst);
                Answer::later(async move {
                    let result = result.get().await;
                    let _ = gate.acquire().await;
                    result
                })
            }
            Fault::CutThenGate => {
                handle().expect("the runtime starts").spawn(async move {
                    let _ = gate.acquire().await;
                    let _ = request(&*store).get().await;
                });
                Answer::later(async move { cut() })
            }
            Fault::Unreachable => Answer::Now(Err(StoreError::unreachable("no way there"))),
            Fault::CutBefore => Answer::later(async move { cut() }),
            Fault::CutAfter => Answer::later(async move {
                let _ = request(&*store).get().await;
                cut()
            }),
            Fault::Slow(there, back) => Answer::later(async move {
                pass(there).await;
                let result = request(&*store).get().await;
                pass(back).await;
                result
            }),
            Fault::CutThenApplied(late) => {
                afterwards(late, store, request);
                Answer::later(async move { cut() })
            }
            Fault::Silence(length) => Answer::later(async move {
                let _ = request(&*store).get().await;
                pass(length).await;
                cut()
            }),
            Fault::SilenceThenApplied(length) => {
                afterwards(length * 2, store, request);
                Answer::later(async move {
                    pass(length).await;
                    cut()
                })
            }
            Fault::Twice(late) => Answer::later(async move {
                let result = request(&*store).get().await;
                afterwards(late, store, request);
                result
            }),
            Fault::Stalled(length) => {
                let arrival = Boottime::now();
                Answer::later(async move {
                    pass(length).await;
                    memory::as_of(arrival, || request(&*store)).get().await
                })
            }
            Fault::CutThenStalled(length) => {
                let arrival = Boottime::now();
                afterwards(length, store, move |store| memory::as_of(arrival, || request(store)));
                Answer::later(async move { cut() })
            }
        }
    }
}

/// One of all faults that are not good.
pub fn any_fault(random: &mut Random, faults: Faults) -> Fault {
    let length = some_time(random, 120);
    let count = match faults {
        Faults::AppliedOnce => 7,
        Faults::OfAnyStore => 8,
        Faults::WithEarlyClocks => 12,
    };
    match random.below(count) {
        0 => Fault::Slow(some_time(random, 60), length),
        1 => Fault::Unreachable,
        2 => Fault::CutBefore,
        3 => Fault::CutAfter,
        4 => Fault::CutThenApplied(length),
        5 => Fault::Silence(length),
        6 => Fault::SilenceThenApplied(length),
        7 => Fault::Twice(length),
        8 | 9 => Fault::Stalled(some_time(random, 300)),
        _ => Fault::CutThenStalled(some_time(random, 300)),
    }
}

fn some_time(random: &mut Random, milliseconds: usize) -> Duration {
    Duration::from_micros(random.below(milliseconds * 1000) as u64)
}

async fn pass(time: Duration) {
    sleep_until(Boottime::now() + time).await;
}

fn changed<T: Send + 'static>(answer: Answer<T>, change: impl FnOnce(&mut T) + Send + 'static) -> Answer<T> {
    let change = |mut value: T| {
        change(&mut value);
        value
    };
    match answer {
        Answer::Now(result) => Answer::Now(result.map(change)),
        Answer::Later(answer) => Answer::later(async move { answer.await.map(change) }),
    }
}

/// Applies a request that nobody waits for.
fn afterwards<T: Send + 'static>(
    late: Duration,
    store: Arc<dyn Store>,
    request: impl Fn(&dyn Store) -> Answer<T> + Send + 'static,
) {
    handle().expect("the runtime starts").spawn(async move {
        pass(late).await;
        let _ = request(&*store).get().await;
    });
}

struct Restless;

impl Watch for Restless {
    fn poll_change(&mut self, _: &mut Context<'_>) -> Poll<Notice> {
        Poll::Ready(Notice::Look)
    }
}

struct Announcing(Box<dyn Watch>);

impl Watch for Announcing {
    fn poll_change(&mut self, context: &mut Context<'_>) -> Poll<Notice> {
        self.0.poll_change(context).map(|_| Notice::Held { expires_in: LONG })
    }
}

impl Store for Network {
    fn change(&self, key: &Key, change: Change) -> Answer<Reply> {
        // It arrives when it is delivered.
        let (key, change) = (key.clone(), change.delayed());
        let fenceless = self.fenceless.load(Ordering::Relaxed);
        self.deliver(move |store| {
            changed(store.change(&key, change.clone()), move |reply| match reply {
                Reply::Applied { fence } if fenceless => *fence = None,
                _ => {}
            })
        })
    }

    fn change_many(&self, changes: Vec<(Key, Change)>) -> Answer<Vec<Result<Reply, StoreError>>> {
        self.deliver(move |store| store.change_many(changes.clone()))
    }

    fn find(&self, key: &Key) -> Answer<Option<Record>> {
        let key = key.clone();
        self.deliver(move |store| store.find(&key))
    }

    fn list(&self, filter: Filter, from: Option<Cursor>) -> Answer<Page> {
        self.deliver(move |store| store.list(filter, from.clone()))
    }

    fn fence(&self, key: &Key) -> Answer<u64> {
        let key = key.clone();
        self.deliver(move |store| store.fence(&key))
    }

    fn watch(&self, key: &Key) -> Box<dyn Watch> {
        if self.restless.load(Ordering::Relaxed) {
            return Box::new(Restless);
        }
        match self.announcing.load(Ordering::Relaxed) {
            true => Box::new(Announcing(self.store.watch(key))),
            false => self.store.watch(key),
        }
    }

    fn prepare(&self) -> Answer<Readiness> {
        self.store.prepare()
    }

    fn ping(&self) -> Answer<Pong> {
        self.store.ping()
    }

    fn location(&self) -> String {
        format!("{} behind a bad network", self.store.location())
    }

    fn margin(&self, expire: Duration) -> Duration {
        self.store.margin(expire)
    }

    fn safety_check(&self, _waited: Duration) -> Duration {
        match self.announcing.load(Ordering::Relaxed) {
            true => LONG,
            // A hint that is lost may not cost more than this.
            false => Duration::from_millis(20),
        }
    }

    fn awaited_elsewhere(&self, key: &Key) -> bool {
        self.store.awaited_elsewhere(key)
    }
}
