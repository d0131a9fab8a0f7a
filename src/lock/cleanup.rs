//! Removing what requests that were given up, or never answered, may have left in the store (R7).

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use super::session::{OpenStore, Session};
use crate::backoff::Backoff;
use crate::clock::Boottime;
use crate::key::Key;
use crate::protocol::Orphan;
use crate::store::{JUST_AFTER, StoreError, StoreErrorKind};
use crate::sys::process;
use crate::sys::runtime::sleep_until;

/// Requests whose outcome is not known.
#[derive(Default)]
pub struct Unanswered {
    /// Answers that were not there in time.
    answers: Vec<LateAnswer>,
    /// Whether a request may be applied although its connection is gone.
    doubtful: bool,
    /// The moment after which the last of them takes nothing.
    not_after: Option<Boottime>,
}

type LateAnswer = Pin<Box<dyn Future<Output = Result<(), StoreError>> + Send>>;

impl Unanswered {
    /// A request that takes nothing after `not_after` may be applied although its connection is gone.
    pub fn doubt(&mut self, not_after: Boottime) {
        self.doubtful = true;
        self.until(not_after);
    }

    /// A request was given up; its answer is awaited before anything is removed for good.
    pub fn await_answer<T: 'static>(
        &mut self,
        not_after: Boottime,
        answer: impl Future<Output = Result<T, StoreError>> + Send + 'static,
    ) {
        self.answers.push(Box::pin(async { answer.await.map(|_| ()) }));
        self.until(not_after);
    }

    fn until(&mut self, not_after: Boottime) {
        self.not_after = self.not_after.max(Some(not_after));
    }

    pub fn is_empty(&self) -> bool {
        !self.doubtful && self.answers.is_empty()
    }
}

/// An orphan, and the requests that may still bring it about.
pub struct Cleanup {
    orphan: Orphan,
    pub unanswered: Unanswered,
    expire: Duration,
    /// Of the process that sent the requests.
    generation: u64,
}

impl Cleanup {
    /// What requests to this store have left, or may leave.
    pub fn new(open: &OpenStore, orphan: Orphan, unanswered: Unanswered, expire: Duration) -> Cleanup {
        Cleanup { orphan, unanswered, expire, generation: open.generation }
    }

    /// Removes what is there now.
    pub async fn remove(open: &OpenStore, key: &Key, orphan: &Orphan) -> Result<(), StoreError> {
        for removal in orphan.removals() {
            open.store.change(key, removal).get().await?;
        }
        Ok(())
    }

    /// In the background: awaits every request's answer or the end of its connection, removes what is ours,
    /// and again after the last request can take anything. So an orphan lives one lease at most. A step into a
    /// reentrant hold lives for as long as others are in, who rely on the count: there only a client that closes
    /// gives up.
    pub fn start(mut self, session: &Arc<Session>, open: &Arc<OpenStore>, key: &Key) {
        if self.generation != process::generation() {
            // The parent process's, which cleans up itself, or holds it by now.
            return std::mem::forget(self);
        }
        let (open, key, of) = (Arc::clone(open), key.clone(), Arc::clone(session));
        session.spawn(async move {
            for answer in std::mem::take(&mut self.unanswered.answers) {
                if answer.await.is_err_and(|error| error.kind == StoreErrorKind::Unknown) {
                    self.unanswered.doubtful = true;
                }
            }
            let not_after = self.unanswered.not_after.unwrap_or(Boottime::ZERO);
            let settled_at = not_after + open.store.margin(self.expire);
            let lease_over = settled_at.max(Boottime::now()) + self.expire;
            let mut backoff = Backoff::default();
            loop {
                let sent = Boottime::now();
                let pause = match Cleanup::remove(&open, &key, &self.orphan).await {
                    Ok(()) if !self.unanswered.doubtful || sent > settled_at => return,
                    Ok(()) => settled_at.since(sent) + JUST_AFTER,
                    Err(error) if error.may_pass() => backoff.failed(),
                    Err(error) => {
                        tracing::warn!("{} was not cleaned up: {error}", key.quoted());
                        return;
                    }
                };
                if lease_over.has_passed() && (matches!(self.orphan, Orphan::Plain { .. }) || of.is_closed()) {
                    return;
                }
                sleep_until(Boottime::now() + pause).await;
            }
        });
    }
}
