//! The timer of an open store: it renews holds, and notices when one is overdue (R12, R13). There is one task for all
//! holds, and one request for many renewals.

use std::collections::BTreeMap;
use std::future::{Future as _, poll_fn};
use std::pin::pin;
use std::sync::Arc;
use std::task::Poll;

use tokio::sync::Notify;
use tokio::sync::futures::Notified;

use crate::clock::Boottime;
use crate::error::Error;
use crate::key::Key;
use crate::protocol::{Change, Reply};
use crate::store::{Answer, Store, StoreError};
use crate::sys::mutex::Mutex;
use crate::sys::runtime::{self, until};

/// A lock whose hold is scheduled.
pub trait Scheduled: Send + Sync {
    /// Does what is due at `slot`, unless the hold is scheduled for another time by now, and schedules what is due
    /// next. Returns the renewal to send, if one is due.
    fn process_due(self: Arc<Self>, slot: Slot) -> Option<DueRenewal>;

    /// The store's clock was found to be ahead of ours.
    fn clock_stepped(self: Arc<Self>);

    /// Whether the lock belongs to the client with this number.
    fn is_of(&self, client: u64) -> bool;

    fn is_renewed(&self) -> bool;

    fn release_at_close(self: Arc<Self>);

    fn abandon_with_client(&self);
}

/// A time, and a number that distinguishes entries with the same time.
pub type Slot = (Boottime, u64);

/// A scheduled lock.
type Entry = (Slot, Arc<dyn Scheduled>);

/// A renewal to be sent.
pub struct DueRenewal {
    pub key: Key,
    pub change: Change,
    pub dispatch: Box<dyn FnOnce(Result<Reply, StoreError>) + Send>,
}

pub struct Schedule {
    store: Arc<dyn Store>,
    slots: Mutex<Slots>,
    changed: Notify,
}

#[derive(Default)]
struct Slots {
    entries: BTreeMap<Slot, Arc<dyn Scheduled>>,
    last_id: u64,
    started: bool,
    stopped: bool,
    /// Until when the task sleeps, unless it is woken.
    asleep_until: Option<Boottime>,
}

#[derive(PartialEq, Eq)]
enum Woken {
    Changed,
    ClockStepped,
}

/// The largest number of holds that one request renews.
const BATCH: usize = 256;

impl Schedule {
    pub fn new(store: Arc<dyn Store>) -> Schedule {
        Schedule { store, slots: Mutex::default(), changed: Notify::new() }
    }

    /// Starts the task if it is not running. Fails if no thread can be started.
    pub fn start(self: &Arc<Self>) -> Result<(), Error> {
        if self.slots.lock().started {
            return Ok(());
        }
        let handle = runtime::handle()?;
        let mut slots = self.slots.lock();
        if !slots.started {
            slots.started = true;
            handle.spawn(Arc::clone(self).run());
        }
        Ok(())
    }

    pub fn stop(&self) {
        self.slots.lock().stopped = true;
        self.changed.notify_one();
    }

    /// Schedules a lock for a time, in place of its previous slot. Returns the new slot.
    pub fn set(
        &self,
        former: Option<Slot>,
        at: Option<Boottime>,
        lock: impl FnOnce() -> Arc<dyn Scheduled>,
    ) -> Option<Slot> {
        let mut slots = self.slots.lock();
        let removed = former.and_then(|former| slots.entries.remove(&former));
        let slot = at.map(|at| {
            slots.last_id += 1;
            let slot = (at, slots.last_id);
            slots.entries.insert(slot, lock());
            if slots.asleep_until.is_some_and(|until| at < until) {
                slots.asleep_until = None;
                self.changed.notify_one();
            }
            slot
        });
        drop(slots);
        // Dropped without the mutex: this may be the last reference to the lock object.
        drop(removed);
        slot
    }

    pub fn remove(&self, slot: Slot) {
        let removed = self.slots.lock().entries.remove(&slot);
        drop(removed);
    }

    /// The locks of a client that have auto-refreshed holds.
    pub fn renewed_for(&self, client: u64) -> Vec<Arc<dyn Scheduled>> {
        let mut locks: Vec<_> = self.slots.lock().entries.values().filter(|lock| lock.is_of(client)).cloned().collect();
        locks.retain(|lock| lock.is_renewed());
        locks
    }

    async fn run(self: Arc<Self>) {
        loop {
            let changed = self.changed.notified();
            let (due, next) = self.due();
            if due.is_empty() {
                let Some(next) = next else { return };
                if until(next, &mut pin!(self.woken(changed))).await == Some(Woken::ClockStepped) {
                    // Without the mutex, because each of them is scheduled again.
                    let all: Vec<_> = self.slots.lock().entries.values().cloned().collect();
                    all.into_iter().for_each(Scheduled::clock_stepped);
                }
                continue;
            }
            self.process(due);
            tokio::task::yield_now().await;
        }
    }

    /// Waits until an entry with an earlier time is scheduled, or the clock has changed.
    async fn woken(&self, changed: Notified<'_>) -> Woken {
        let stepped = async {
            match self.store.clock_steps() {
                Some(steps) => steps.noted().await,
                None => std::future::pending().await,
            }
        };
        let (mut changed, mut stepped) = (pin!(changed), pin!(stepped));
        poll_fn(|context| match stepped.as_mut().poll(context) {
            Poll::Ready(()) => Poll::Ready(Woken::ClockStepped),
            Poll::Pending => changed.as_mut().poll(context).map(|()| Woken::Changed),
        })
        .await
    }

    /// The entries that are due, or the time of the next one; `None` if the store is not used any more. An entry stays
    /// until it is processed, so that a client that is closed meanwhile finds it.
    fn due(&self) -> (Vec<Entry>, Option<Boottime>) {
        let mut slots = self.slots.lock();
        if slots.stopped {
            return (Vec::new(), None);
        }
        let due: Vec<_> = slots
            .entries
            .range(..=(Boottime::now(), u64::MAX))
            .take(BATCH)
            .map(|(slot, lock)| (*slot, Arc::clone(lock)))
            .collect();
        let next = slots.entries.first_key_value().map_or(Boottime::NEVER, |((at, _), _)| *at);
        slots.asleep_until = due.is_empty().then_some(next);
        (due, Some(next))
    }

    fn process(&self, due: Vec<Entry>) {
        let (mut changes, mut dispatches) = (Vec::new(), Vec::new());
        for (slot, lock) in due {
            if let Some(renewal) = lock.process_due(slot) {
                changes.push((renewal.key, renewal.change));
                dispatches.push(renewal.dispatch);
            }
        }
        if changes.is_empty() {
            return;
        }
        let dispatch = move |answer: Result<Vec<Result<Reply, StoreError>>, StoreError>| match answer {
            Ok(replies) => dispatches.into_iter().zip(replies).for_each(|(dispatch, reply)| dispatch(reply)),
            Err(error) => dispatches.into_iter().for_each(|dispatch| dispatch(Err(error.clone()))),
        };
        match self.store.change_many(changes) {
            Answer::Now(answer) => dispatch(answer),
            Answer::Later(answer) => {
                // Each request has a task: one that hangs does not delay the others.
                tokio::spawn(async move { dispatch(answer.await) });
            }
        }
    }
}
