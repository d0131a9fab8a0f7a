//! A connection that many requests share. What goes over it is the engine's ([`Traffic`]); here is who moves it.
//!
//! The thread that has a request hands it to the socket, so that no other must be woken for it; and while it waits for
//! the answer it takes in what comes. A task does that where no thread waits, and sends what the socket did not take at
//! once. Each of them takes in all that has come, and passes it on without the lock.

use std::collections::VecDeque;
use std::future::poll_fn;
use std::mem;
use std::ops::Deref;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, OnceLock, Weak};
use std::task::{Context, Poll, Wake, Waker};

use super::link;
use crate::sys::mutex::Mutex;
use crate::sys::process;
use crate::sys::runtime::{Driven, Source};
use crate::sys::sockets::SocketPoller;

/// What is under way on a connection. An error is the reason why the connection is over: nothing is called after it but
/// `close` and `end`.
///
/// All but `pass_on` and `end` is called with the lock. What is for others waits in `heard` until the lock is free: a
/// caller that is woken may have more to send.
pub trait Traffic: Send + Sized + 'static {
    type Request: link::Request;
    /// What came in, or could not be sent.
    type Heard: Send;
    /// What is known of the connection without the lock.
    type Common: Send + Sync;

    /// Takes a request. `send` follows.
    fn start(&mut self, request: Self::Request, core: &Core<Self>, heard: &mut Vec<Self::Heard>);

    /// Hands the socket what it takes now. For the rest the task is woken later.
    fn send(&mut self, core: &Core<Self>, heard: &mut Vec<Self::Heard>) -> Result<(), String>;

    /// Takes in what has come. For what comes later the task is woken, unless a thread drives.
    fn take_in(&mut self, core: &Core<Self>, heard: &mut Vec<Self::Heard>) -> Result<(), String>;

    /// Does what only the task does, whenever it is woken: it has taken in what has come.
    fn tend(&mut self, _core: &Core<Self>, _heard: &mut Vec<Self::Heard>) -> Result<(), String> {
        Ok(())
    }

    /// How much is to come that somebody waits for, requests that were not sent yet included: their threads may have
    /// the socket's turn, and stand still. What comes to more than one may be counted as two.
    fn awaited(&self, common: &Self::Common) -> usize;

    /// Passes on what was heard.
    fn pass_on(heard: Self::Heard, core: &Core<Self>);

    /// Closes the socket. Gives back what was not sent.
    fn close(&mut self) -> VecDeque<Self::Request>;

    /// Answers what was sent with the connection's end.
    fn end(self, why: &str, core: &Core<Self>);
}

/// A handle of a connection. Dropping all of them ends it.
pub struct Connection<T: Traffic>(Arc<Handle<T>>);

impl<T: Traffic> Clone for Connection<T> {
    fn clone(&self) -> Connection<T> {
        Connection(Arc::clone(&self.0))
    }
}

impl<T: Traffic> Deref for Connection<T> {
    type Target = T::Common;

    fn deref(&self) -> &T::Common {
        &self.0.0.common
    }
}

struct Handle<T: Traffic>(Arc<Core<T>>);

impl<T: Traffic> Drop for Handle<T> {
    fn drop(&mut self) {
        self.0.end("the store was closed");
    }
}

/// What handles, the task and threads that wait share.
pub struct Core<T: Traffic> {
    /// `None` when the connection has ended.
    state: Mutex<Option<State<T>>>,
    task: Arc<TaskWaker>,
    /// `task`, as what is polled gets it.
    waker: Waker,
    /// Why the connection is to end.
    ending: OnceLock<&'static str>,
    /// The process whose connection it is.
    generation: u64,
    poller: SocketPoller,
    /// For answers, which come with a handle; weak, so that the task does not keep itself alive.
    own: Weak<Handle<T>>,
    pub common: T::Common,
}

struct State<T: Traffic> {
    traffic: T,
    /// What was not passed on yet.
    heard: Vec<T::Heard>,
    /// Why the connection is over.
    over: Option<String>,
}

/// Wakes the task, but not for what is woken while the traffic is polled: that is seen when it has been.
#[derive(Default)]
struct TaskWaker {
    state: AtomicU8,
    task: Mutex<Option<Waker>>,
}

/// Somebody polls; and something was woken meanwhile.
const POLLING: u8 = 1;
const WOKEN: u8 = 2;

impl TaskWaker {
    fn wake_task(&self) {
        let task = self.task.lock().clone();
        if let Some(task) = task {
            task.wake();
        }
    }
}

impl Wake for TaskWaker {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        if self.state.fetch_or(WOKEN, Ordering::SeqCst) & POLLING == 0 {
            self.wake_task();
        }
    }
}

impl<T: Traffic> State<T> {
    /// Lets the traffic do something, unless it is over. `true`: something was woken meanwhile.
    fn poll(&mut self, core: &Core<T>, work: impl FnOnce(&mut T, &mut Vec<T::Heard>) -> Result<(), String>) -> bool {
        core.task.state.store(POLLING, Ordering::SeqCst);
        if self.over.is_none() {
            self.over = work(&mut self.traffic, &mut self.heard).err();
        }
        core.task.state.swap(0, Ordering::SeqCst) & WOKEN != 0
    }
}

impl<T: Traffic> Core<T> {
    /// What the traffic is polled with.
    pub fn context(&self) -> Context<'_> {
        Context::from_waker(&self.waker)
    }

    /// Whether something was woken since the traffic is polled, or since this was asked. What is polled again for that
    /// needs no task.
    pub fn was_woken(&self) -> bool {
        self.task.state.swap(POLLING, Ordering::SeqCst) & WOKEN != 0
    }

    /// `None` when all handles are gone.
    pub fn handle(&self) -> Option<Connection<T>> {
        self.own.upgrade().map(Connection)
    }

    /// Lets `work` say what is to be sent, and sends it as far as the socket takes it at once. `None` when the
    /// connection has ended, or is the parent process's. What `work` gives is dropped by the caller, without the lock.
    pub fn give<R>(&self, work: impl FnOnce(&mut T, &mut Vec<T::Heard>) -> R) -> Option<R> {
        if self.generation != process::generation() || self.ending.get().is_some() {
            return None;
        }
        let mut given = None;
        let mut state = self.state.lock();
        let present = state.as_mut()?;
        let woken = present.poll(self, |traffic, heard| {
            given = Some(work(traffic, heard));
            traffic.send(self, heard)
        });
        // Nothing is passed on here: the sender may hold what would be needed for that.
        let wakes = woken || present.over.is_some() || !present.heard.is_empty();
        drop(state);
        if wakes {
            self.task.wake_task();
        }
        given
    }

    /// Lets the traffic do something, and passes on what was heard. Says why the connection is over, if it is.
    fn turn(&self, work: impl FnOnce(&mut T, &mut Vec<T::Heard>) -> Result<(), String>) -> Option<String> {
        let mut heard = Vec::new();
        let (over, woken) = match self.state.lock().as_mut() {
            Some(state) => {
                let woken = state.poll(self, work);
                mem::swap(&mut heard, &mut state.heard);
                (state.over.clone(), woken)
            }
            None => (Some("it has ended".to_string()), false),
        };
        if woken {
            self.task.wake_task();
        }
        self.pass_on(heard);
        over
    }

    fn pass_on(&self, heard: Vec<T::Heard>) {
        for heard in heard {
            T::pass_on(heard, self);
        }
    }

    fn end(&self, why: &'static str) {
        // The first reason stays.
        let _ = self.ending.set(why);
        self.task.wake_task();
    }
}

impl<T: Traffic> Driven for Core<T> {
    fn source(&self) -> &dyn Source {
        &self.poller
    }

    fn take_in(&self) -> bool {
        let over = self.turn(|traffic, heard| traffic.take_in(self, heard)).is_some();
        if over {
            // It ends the connection.
            self.task.wake_task();
        }
        !over
    }

    fn awaited(&self) -> usize {
        self.state.lock().as_ref().map_or(1, |state| state.traffic.awaited(&self.common))
    }
}

impl<T: Traffic> Connection<T> {
    /// `poller` polls the socket of `traffic`. The task is to be run for as long as the connection lives.
    pub fn new(traffic: T, poller: SocketPoller, common: T::Common) -> (Connection<T>, Task<T>) {
        let task = Arc::<TaskWaker>::default();
        let handle = Arc::new_cyclic(|own| {
            Handle(Arc::new(Core {
                state: Mutex::new(Some(State { traffic, heard: Vec::new(), over: None })),
                waker: Waker::from(Arc::clone(&task)),
                task,
                ending: OnceLock::new(),
                generation: process::generation(),
                poller,
                own: Weak::clone(own),
                common,
            }))
        });
        let task = Task(Arc::clone(&handle.0));
        (Connection(handle), task)
    }

    /// What does not keep the connection alive.
    pub fn downgrade(&self) -> Weak<Core<T>> {
        Arc::downgrade(&self.0.0)
    }

    /// Ends the connection, also for others that have a handle of it. Does not wait.
    pub fn leave(&self, why: &'static str) {
        self.0.0.end(why);
    }
}

impl<T: Traffic> link::Connection for Connection<T> {
    type Request = T::Request;

    fn start(&self, request: T::Request) -> Result<(), T::Request> {
        let core = &self.0.0;
        let mut request = Some(request);
        core.give(|traffic, heard| request.take().map(|request| traffic.start(request, core, heard)));
        request.map_or(Ok(()), Err)
    }

    fn leave(&self) {
        Connection::leave(self, "another host of the URL is tried");
    }

    fn driven(&self) -> Option<Arc<dyn Driven>> {
        Some(Arc::clone(&self.0.0) as Arc<dyn Driven>)
    }
}

/// The task of a connection.
pub struct Task<T: Traffic>(Arc<Core<T>>);

impl<T: Traffic> Task<T> {
    /// Runs the connection to its end, and says why it ended, with the requests that were not sent: before those that
    /// were sent are answered.
    pub async fn run(self, ended_with: impl FnOnce(&str, VecDeque<T::Request>)) {
        let core = self.0;
        let why = poll_fn(|context| {
            *core.task.task.lock() = Some(context.waker().clone());
            let over = core.turn(|traffic, heard| {
                traffic.take_in(&core, heard)?;
                traffic.tend(&core, heard)
            });
            let over = over.or_else(|| core.ending.get().map(|why| why.to_string()));
            over.map_or(Poll::Pending, Poll::Ready)
        })
        .await;
        let ended = core.state.lock().take();
        let Some(State { mut traffic, heard, .. }) = ended else { return };
        ended_with(&why, traffic.close());
        // What came in since the last look: requests that were too late to be sent.
        core.pass_on(heard);
        traffic.end(&why, &core);
    }
}
