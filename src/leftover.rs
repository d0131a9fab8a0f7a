//! What attempts that were given up, or never answered, may have left in the store, and its removal (R7).

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use crate::backoff::Backoff;
use crate::client::OpenStore;
use crate::clock::Boottime;
use crate::lock::Shared;
use crate::process;
use crate::runtime::sleep_until;
use crate::store::{Action, Answer, Claim, JUST_AFTER, OwnerToken, Step, StoreError, StoreErrorKind};
use crate::token::{HoldId, ObjectId};

/// What attempts that were given up, or never answered, may have left in the store (R7).
pub(crate) struct Leftover {
    shared: Arc<Shared>,
    open: Arc<OpenStore>,
    what: What,
    answers: Vec<Late>,
    /// Whether a request may be applied although its connection is gone.
    doubtful: bool,
    /// The moment after which the last attempt takes nothing.
    not_after: Boottime,
    expire: Duration,
    generation: u64,
}

/// An answer that was not there in time.
type Late = Pin<Box<dyn Future<Output = Result<(), StoreError>> + Send>>;

pub(crate) enum What {
    /// All attempts of a plain hold.
    Hold(HoldId),
    /// One step into a reentrant hold.
    Step { owner: OwnerToken, object: ObjectId, number: u64 },
}

impl Leftover {
    /// What one attempt, sent at that time, may leave.
    pub fn new(shared: &Arc<Shared>, open: &Arc<OpenStore>, what: What, sent: Boottime, expire: Duration) -> Leftover {
        let (shared, open) = (Arc::clone(shared), Arc::clone(open));
        let not_after = sent + shared.client.options().op_timeout;
        Leftover {
            shared,
            open,
            what,
            answers: Vec::new(),
            doubtful: false,
            not_after,
            expire,
            generation: process::generation(),
        }
    }

    /// Another attempt was sent.
    pub fn sent(&mut self, at: Boottime) {
        self.not_after = self.not_after.max(at + self.shared.client.options().op_timeout);
    }

    /// A request of it may be applied although its connection is gone.
    pub fn doubt(&mut self) {
        self.doubtful = true;
    }

    /// An answer to wait for before anything is removed for good.
    pub fn await_answer<T: 'static>(&mut self, answer: impl Future<Output = Result<T, StoreError>> + Send + 'static) {
        self.answers.push(Box::pin(async { answer.await.map(|_| ()) }));
    }

    /// Whether it is of a reentrant step of this series.
    pub fn is_of(&self, series: ObjectId) -> bool {
        matches!(&self.what, What::Step { object, .. } if *object == series)
    }

    /// Whether something may still come of attempts.
    pub fn pending(&self) -> bool {
        self.doubtful || !self.answers.is_empty()
    }

    /// Removes what is there.
    pub fn remove(&self) -> Answer<()> {
        let key = &self.shared.key;
        match &self.what {
            What::Hold(hold) => self.open.store.release(key, Claim::AnyOf(*hold)).map(|_| ()),
            What::Step { owner, object, number } => {
                let action = Action::Undo { enter: *number };
                let undo = Step { owner: owner.clone(), object: *object, number: number + 1, action };
                self.open.store.step(key, undo).map(|_| ())
            }
        }
    }

    /// In the background: awaits every attempt's answer or the end of its connection, removes what is
    /// ours, and again after the last attempt can take anything. So an orphan lives one lease at most.
    pub fn clean_up(mut self) {
        if self.generation != process::generation() {
            // The parent process's, which cleans up itself, or holds it by now.
            return std::mem::forget(self);
        }
        let client = self.shared.client.clone();
        client.spawn(async move {
            for answer in std::mem::take(&mut self.answers) {
                if answer.await.is_err_and(|error| error.kind == StoreErrorKind::Unknown) {
                    self.doubtful = true;
                }
            }
            let settled_at = self.not_after + self.open.store.margin(self.expire);
            let lease_over = settled_at + self.expire;
            let mut backoff = Backoff::default();
            loop {
                let sent = Boottime::now();
                let pause = match self.remove().get().await {
                    Ok(()) if !self.doubtful || sent > settled_at => return,
                    Ok(()) => settled_at.since(sent) + JUST_AFTER,
                    Err(error) if error.may_pass() => backoff.failed(),
                    Err(error) => {
                        tracing::warn!("{} was not cleaned up: {error}", self.shared.key.quoted());
                        return;
                    }
                };
                if lease_over.has_passed() {
                    return;
                }
                sleep_until(Boottime::now() + pause).await;
            }
        });
    }
}
