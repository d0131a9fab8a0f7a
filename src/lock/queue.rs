//! The order of the waiters of this process (R11).

use std::collections::{HashMap, VecDeque};
use std::future::{Future, poll_fn};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::task::{Poll, Waker};
use std::time::Duration;

use crate::clock::Boottime;
use crate::key::KeyHash;
use crate::sys::mutex::Mutex;
use crate::sys::runtime::{self, sleep_until};

/// A first-in first-out queue. When a member leaves it, for any reason, the next one moves up.
#[derive(Default)]
pub struct WaitQueue(Mutex<Waiters>);

#[derive(Default)]
struct Waiters {
    last_id: u64,
    /// Ascending by id, since members join at the end.
    waiting: VecDeque<(u64, Option<Waker>)>,
    /// How often the first member was active since it became the first.
    moves: u64,
    /// The first member, and how often it had been active when it was last asked to be.
    called: Option<(u64, u64)>,
}

impl Waiters {
    fn first(&self) -> Option<u64> {
        self.waiting.front().map(|(id, _)| *id)
    }

    /// A member left the queue: the waker of the new first member, if the first member has changed.
    fn moved_up(&mut self, before: Option<u64>) -> Option<Waker> {
        if self.first() == before {
            return None;
        }
        self.moves = 0;
        self.waiting.front_mut().and_then(|(_, waker)| waker.take())
    }
}

/// A place in a queue, which is given up when this is dropped.
pub struct Ticket {
    line: Arc<WaitQueue>,
    id: u64,
}

impl WaitQueue {
    pub fn join(self: &Arc<Self>) -> Ticket {
        let mut standing = self.0.lock();
        standing.last_id += 1;
        let id = standing.last_id;
        standing.waiting.push_back((id, None));
        Ticket { line: Arc::clone(self), id }
    }

    pub fn is_empty(&self) -> bool {
        self.0.lock().waiting.is_empty()
    }

    /// Passes over the first member if it was asked to be active and was not; otherwise asks it (R11). To be called at
    /// intervals while the queue has several members.
    fn see_to(&self) {
        let woken = {
            let mut standing = self.0.lock();
            let Some(first) = standing.first().filter(|_| standing.waiting.len() > 1) else { return };
            if standing.called == Some((first, standing.moves)) {
                standing.waiting.pop_front();
                standing.moved_up(Some(first))
            } else {
                standing.called = Some((first, standing.moves));
                standing.waiting.front_mut().and_then(|(_, waker)| waker.take())
            }
        };
        if let Some(waker) = woken {
            waker.wake();
        }
    }

    /// Notes that the member with this number is active, and how to wake it if it is the first.
    fn moves(&self, id: u64, waker: &Waker) {
        let mut standing = self.0.lock();
        if standing.first() == Some(id) {
            standing.moves += 1;
            standing.waiting[0].1 = Some(waker.clone());
        }
    }
}

impl Ticket {
    pub fn is_front(&self) -> bool {
        self.line.0.lock().waiting.front().is_some_and(|(id, _)| *id == self.id)
    }

    /// Waits until this is the first member. A member that was passed over does not wait any more, and competes with
    /// the others.
    pub async fn front(&mut self) {
        poll_fn(|context| {
            let mut standing = self.line.0.lock();
            match standing.waiting.binary_search_by_key(&self.id, |(id, _)| *id) {
                Ok(0) | Err(_) => Poll::Ready(()),
                Ok(index) => {
                    standing.waiting[index].1 = Some(context.waker().clone());
                    Poll::Pending
                }
            }
        })
        .await;
    }
}

impl Ticket {
    /// Leaves the queue, if that has not been done. Drop the result while no mutex is held: it calls wakers, which may
    /// be the program's code.
    fn leave(&self) -> Option<Left> {
        let mut standing = self.line.0.lock();
        let first = standing.first();
        let index = standing.waiting.binary_search_by_key(&self.id, |(id, _)| *id).ok()?;
        let own = standing.waiting.remove(index).and_then(|(_, waker)| waker);
        let next = standing.moved_up(first);
        Some(Left { _own: own, next })
    }
}

/// What remains of a place in a queue. On drop, it wakes the next member.
struct Left {
    _own: Option<Waker>,
    next: Option<Waker>,
}

impl Drop for Left {
    fn drop(&mut self) {
        if let Some(waker) = self.next.take() {
            waker.wake();
        }
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        drop(self.leave());
    }
}

/// The queues of an open store, one for each key that has waiters.
#[derive(Default)]
pub struct Queue {
    lines: Mutex<HashMap<KeyHash, Arc<WaitQueue>>>,
    /// The number of queues: if there are none, the map need not be searched.
    count: AtomicUsize,
    deferrals: YieldWindows,
    /// Whether a task watches the queues that have several members.
    seen_to: AtomicBool,
}

/// A place in the queue of a key.
pub struct KeyTicket {
    place: Ticket,
    queue: Arc<Queue>,
    hash: KeyHash,
}

impl Queue {
    /// Whether this process has no waiter for the key.
    pub fn is_empty(&self, hash: KeyHash) -> bool {
        self.count.load(Ordering::Acquire) == 0 || !self.lines.lock().contains_key(&hash)
    }

    /// Whether a waiter that requests the key now would have other waiters before it.
    pub fn anybody_is_before(&self, hash: KeyHash) -> bool {
        !self.is_empty(hash) || self.deferred_until(hash).is_some()
    }

    pub fn join(self: &Arc<Self>, hash: KeyHash) -> KeyTicket {
        let mut lines = self.lines.lock();
        let line = lines.entry(hash).or_default();
        let behind_others = !line.is_empty();
        let place = line.join();
        self.count.store(lines.len(), Ordering::Release);
        drop(lines);
        if behind_others && !self.seen_to.swap(true, Ordering::AcqRel) {
            self.see_to_lines();
        }
        KeyTicket { place, queue: Arc::clone(self), hash }
    }

    /// Starts the task that passes over a first member whose thread is stopped, or busy in a signal handler. This takes
    /// less than a second (R11).
    fn see_to_lines(self: &Arc<Self>) {
        let queue = Arc::downgrade(self);
        let Ok(handle) = runtime::handle() else {
            self.seen_to.store(false, Ordering::Release);
            return;
        };
        handle.spawn(async move {
            loop {
                sleep_until(Boottime::now() + CALLED_EVERY).await;
                let Some(queue) = queue.upgrade() else { return };
                let lines: Vec<Arc<WaitQueue>> = {
                    let lines = queue.lines.lock();
                    let several = |line: &&Arc<WaitQueue>| line.0.lock().waiting.len() > 1;
                    let lines: Vec<_> = lines.values().filter(several).cloned().collect();
                    if lines.is_empty() {
                        // With the map locked: a waiter that joins a queue after this starts another task.
                        queue.seen_to.store(false, Ordering::Release);
                        return;
                    }
                    lines
                };
                lines.iter().for_each(|line| line.see_to());
            }
        });
    }

    /// After an unlock while another process waits: the waiters of this process pause briefly, to let it go first.
    pub fn defer(&self, hash: KeyHash) {
        let slot = self.deferrals.slot(hash);
        let noted = slot.load(Ordering::Relaxed);
        if noted & NOT_BEFORE == 0 || Boottime::from_nanos(noted & !NOT_BEFORE).has_passed() {
            slot.store((Boottime::now() + DEFERRAL).as_nanos(), Ordering::Relaxed);
        }
    }

    /// No other process took the lock during the pause: the process that seemed to wait may have been killed. There is
    /// no pause for a while.
    pub fn yield_was_wasted(&self, hash: KeyHash) {
        let not_before = (Boottime::now() + AFTER_A_WASTED_ONE).as_nanos() | NOT_BEFORE;
        self.deferrals.slot(hash).store(not_before, Ordering::Relaxed);
    }

    /// The end of the pause, if there is one now.
    pub fn deferred_until(&self, hash: KeyHash) -> Option<Boottime> {
        let noted = self.deferrals.slot(hash).load(Ordering::Relaxed);
        let until = Boottime::from_nanos(noted);
        (noted != 0 && noted & NOT_BEFORE == 0 && !until.has_passed()).then_some(until)
    }
}

impl KeyTicket {
    /// Whether this is the first member.
    pub fn is_front(&self) -> bool {
        self.place.is_front()
    }

    pub async fn front(&mut self) {
        self.place.front().await;
    }
}

impl KeyTicket {
    /// A value that tells the queue when this waiter is active.
    pub fn motion(&self) -> Motion {
        Motion { line: Arc::clone(&self.place.line), id: self.place.id }
    }
}

/// See [`KeyTicket::motion`].
pub struct Motion {
    line: Arc<WaitQueue>,
    id: u64,
}

impl Motion {
    /// Runs `waiting`; each poll of it counts as activity of the waiter.
    pub async fn while_waiting<F: Future>(self, waiting: F) -> F::Output {
        let mut waiting = std::pin::pin!(waiting);
        poll_fn(|context| {
            self.line.moves(self.id, context.waker());
            waiting.as_mut().poll(context)
        })
        .await
    }
}

impl Drop for KeyTicket {
    fn drop(&mut self) {
        // Both with the map locked: no waiter can join a queue that is about to be removed.
        let mut lines = self.queue.lines.lock();
        let left = self.place.leave();
        if lines.get(&self.hash).is_some_and(|line| line.is_empty()) {
            lines.remove(&self.hash);
            self.queue.count.store(lines.len(), Ordering::Release);
        }
        drop(lines);
        drop(left);
    }
}

/// How often the first member of a queue is asked to be active. One that is not delays the others for twice this time.
const CALLED_EVERY: Duration = Duration::from_millis(450);

/// How long a process that has just unlocked pauses to let another process go first (R11).
const DEFERRAL: Duration = Duration::from_millis(1);

/// How long there is no further pause after a pause in which no other process took the lock.
const AFTER_A_WASTED_ONE: Duration = Duration::from_millis(10);

/// Marks a time as the end of a period without pauses, instead of the end of a pause.
const NOT_BEFORE: u64 = 1 << 63;

/// Times by key hash, in nanoseconds of boot time. If two keys share a slot, a waiter may wait a millisecond longer.
struct YieldWindows([AtomicU64; 256]);

impl Default for YieldWindows {
    fn default() -> Self {
        YieldWindows([const { AtomicU64::new(0) }; 256])
    }
}

impl YieldWindows {
    fn slot(&self, hash: KeyHash) -> &AtomicU64 {
        &self.0[(hash.bits() % self.0.len() as u64) as usize]
    }
}

#[cfg(test)]
mod tests {
    use std::pin::pin;
    use std::task::{Context, Wake};

    use super::*;

    #[derive(Default)]
    struct Flag(AtomicBool);

    impl Wake for Flag {
        fn wake(self: Arc<Self>) {
            self.0.store(true, Ordering::SeqCst);
        }
    }

    fn at_front(place: &mut KeyTicket, flag: &Arc<Flag>) -> bool {
        let waker = Waker::from(Arc::clone(flag));
        pin!(place.front()).poll(&mut Context::from_waker(&waker)).is_ready()
    }

    #[test]
    fn first_in_first_out_and_a_dead_waiter_stalls_nobody() {
        let queue = Arc::new(Queue::default());
        let hash = KeyHash([7; 20]);
        assert!(queue.is_empty(hash));
        let (mut first, mut second, mut third) = (queue.join(hash), queue.join(hash), queue.join(hash));
        let flag = Arc::new(Flag::default());
        assert!(at_front(&mut first, &flag));
        assert!(!at_front(&mut second, &flag));
        assert!(!at_front(&mut third, &flag));
        drop(second);
        drop(first);
        assert!(flag.0.load(Ordering::SeqCst), "the next one was woken");
        assert!(at_front(&mut third, &flag));
        assert!(!queue.is_empty(hash));
        drop(third);
        assert!(queue.is_empty(hash));
    }

    /// One whose thread is stopped, or busy in the handler of a signal.
    #[test]
    fn a_first_one_that_does_not_move_is_passed_by() {
        let queue = Arc::new(Queue::default());
        let hash = KeyHash([7; 20]);
        let (mut first, mut second) = (queue.join(hash), queue.join(hash));
        let (stalls, waits) = (Arc::new(Flag::default()), Arc::new(Flag::default()));
        let line = Arc::clone(&first.place.line);
        let waiting = first.motion().while_waiting(std::future::pending::<()>());
        let mut waiting = pin!(waiting);
        let waker = Waker::from(Arc::clone(&stalls));
        let mut polled = || assert!(waiting.as_mut().poll(&mut Context::from_waker(&waker)).is_pending());
        assert!(at_front(&mut first, &stalls));
        assert!(!at_front(&mut second, &waits));
        // As long as it moves when it is called upon, nobody passes it by.
        for _ in 0..3 {
            polled();
            stalls.0.store(false, Ordering::SeqCst);
            line.see_to();
            assert!(stalls.0.load(Ordering::SeqCst), "it was called upon");
            assert!(!at_front(&mut second, &waits));
        }
        line.see_to();
        assert!(waits.0.load(Ordering::SeqCst), "the next one was woken");
        assert!(at_front(&mut second, &waits));
        // Back again, it contends beside the others.
        assert!(at_front(&mut first, &stalls));
        drop(first);
        assert!(at_front(&mut second, &waits));
        drop(second);
        assert!(queue.is_empty(hash));
    }

    /// The queue does it by itself.
    #[test]
    fn nobody_stands_behind_one_that_never_moves() {
        let queue = Arc::new(Queue::default());
        let hash = KeyHash([7; 20]);
        let _first = queue.join(hash);
        let mut second = queue.join(hash);
        runtime::block_on(second.front()).unwrap();
    }

    /// As a task does that is woken when its executor is gone: it is dropped there and then.
    struct Leaves(Mutex<Option<KeyTicket>>);

    impl Wake for Leaves {
        fn wake(self: Arc<Self>) {
            let place = self.0.lock().take();
            drop(place);
        }
    }

    #[test]
    fn who_is_woken_may_leave_at_once() {
        let queue = Arc::new(Queue::default());
        let hash = KeyHash([7; 20]);
        let (first, mut second) = (queue.join(hash), queue.join(hash));
        let leaves = Arc::new(Leaves(Mutex::new(None)));
        let waker = Waker::from(Arc::clone(&leaves));
        assert!(pin!(second.front()).poll(&mut Context::from_waker(&waker)).is_pending());
        *leaves.0.lock() = Some(second);
        let (tell, told) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            drop(first);
            tell.send(()).unwrap();
        });
        told.recv_timeout(Duration::from_secs(60)).expect("it does not hang");
        assert!(queue.is_empty(hash));
    }
}
