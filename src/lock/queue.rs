//! Who is next, among the waiters of this process (R11).

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
    /// Ascending by id, since everybody joins at the end.
    waiting: VecDeque<(u64, Option<Waker>)>,
    /// How often the first one moved since it is that.
    moves: u64,
    /// The first one, and how often it had moved when it was last called upon to.
    called: Option<(u64, u64)>,
}

impl Waiters {
    fn first(&self) -> Option<u64> {
        self.waiting.front().map(|(id, _)| *id)
    }

    /// Somebody left the line: the new first one's waker, if there is one.
    fn moved_up(&mut self, before: Option<u64>) -> Option<Waker> {
        if self.first() == before {
            return None;
        }
        self.moves = 0;
        self.waiting.front_mut().and_then(|(_, waker)| waker.take())
    }
}

/// One's place in a line, kept until it is dropped.
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

    /// Passes by the first one, if it was called upon and did not move since; or calls upon it (R11). To be called now
    /// and then while there are several.
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

    /// The one with this number moves. If it is the first, it can be called upon.
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

    /// Waits until nobody is before. One that was passed by contends beside the others.
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
    /// Leaves the line, if that has not been done. What it answers is to be dropped where no mutex is held: wakers
    /// are the program's.
    fn leave(&self) -> Option<Left> {
        let mut standing = self.line.0.lock();
        let first = standing.first();
        let index = standing.waiting.binary_search_by_key(&self.id, |(id, _)| *id).ok()?;
        let own = standing.waiting.remove(index).and_then(|(_, waker)| waker);
        let next = standing.moved_up(first);
        Some(Left { _own: own, next })
    }
}

/// What is left of a place in a line; dropped, it tells the next one.
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

/// The lines of an open store, one for each key that is waited for.
#[derive(Default)]
pub struct Queue {
    lines: Mutex<HashMap<KeyHash, Arc<WaitQueue>>>,
    /// How many lines there are: with none, nobody has to look.
    count: AtomicUsize,
    deferrals: YieldWindows,
    /// Whether a task sees to the lines in which several stand.
    seen_to: AtomicBool,
}

/// A place in the line of a key.
pub struct KeyTicket {
    place: Ticket,
    queue: Arc<Queue>,
    hash: KeyHash,
}

impl Queue {
    /// Whether nobody in this process waits for the key.
    pub fn is_empty(&self, hash: KeyHash) -> bool {
        self.count.load(Ordering::Acquire) == 0 || !self.lines.lock().contains_key(&hash)
    }

    /// Whether somebody comes before a waiter that asks for the key now.
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

    /// A first one whose thread is stopped, or busy in the handler of a signal, is passed by within a second (R11).
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
                        // Under the map's lock: a waiter that joins a line after this starts another task.
                        queue.seen_to.store(false, Ordering::Release);
                        return;
                    }
                    lines
                };
                lines.iter().for_each(|line| line.see_to());
            }
        });
    }

    /// After an unlock while another process waits: this process lets it go first, for a moment.
    pub fn defer(&self, hash: KeyHash) {
        let slot = self.deferrals.slot(hash);
        let noted = slot.load(Ordering::Relaxed);
        if noted & NOT_BEFORE == 0 || Boottime::from_nanos(noted & !NOT_BEFORE).has_passed() {
            slot.store((Boottime::now() + DEFERRAL).as_nanos(), Ordering::Relaxed);
        }
    }

    /// Nobody came while this process let others go first: a process that was said to wait may have been
    /// killed. For a while there is no deferring.
    pub fn yield_was_wasted(&self, hash: KeyHash) {
        let not_before = (Boottime::now() + AFTER_A_WASTED_ONE).as_nanos() | NOT_BEFORE;
        self.deferrals.slot(hash).store(not_before, Ordering::Relaxed);
    }

    /// Until when this process lets others go first, if it does.
    pub fn deferred_until(&self, hash: KeyHash) -> Option<Boottime> {
        let noted = self.deferrals.slot(hash).load(Ordering::Relaxed);
        let until = Boottime::from_nanos(noted);
        (noted != 0 && noted & NOT_BEFORE == 0 && !until.has_passed()).then_some(until)
    }
}

impl KeyTicket {
    /// Whether nobody is before.
    pub fn is_front(&self) -> bool {
        self.place.is_front()
    }

    pub async fn front(&mut self) {
        self.place.front().await;
    }
}

impl KeyTicket {
    /// What tells the line that this waiter moves.
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
    /// Says that the waiter moves whenever `waiting` is polled.
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
        // Both under the map's lock: nobody can join a line that is about to be removed.
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

/// How often the first of a line is called upon to move: twice that is how long one that does not keeps the others.
const CALLED_EVERY: Duration = Duration::from_millis(450);

/// How long a process that has just unlocked lets another one go first (R11).
const DEFERRAL: Duration = Duration::from_millis(1);

/// How long it does not do so again after nobody came.
const AFTER_A_WASTED_ONE: Duration = Duration::from_millis(10);

/// Says that the moment is not the end of a deferral, but of a time without any.
const NOT_BEFORE: u64 = 1 << 63;

/// Moments by key hash, in nanoseconds of boot time. Two keys in one slot cost a waiter a millisecond, and nothing else.
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
