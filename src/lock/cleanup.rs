//! Removes what unanswered requests may have left in the store (R7).

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
    /// Replies that did not arrive in time.
    answers: Vec<LateAnswer>,
    /// Whether a request may still be applied although its connection is closed.
    doubtful: bool,
    /// After this time, none of them has an effect.
    not_after: Option<Boottime>,
}

type LateAnswer = Pin<Box<dyn Future<Output = Result<(), StoreError>> + Send>>;

impl Unanswered {
    /// Notes a request that may still be applied, up to `not_after`, although its connection is closed.
    pub fn doubt(&mut self, not_after: Boottime) {
        self.doubtful = true;
        self.until(not_after);
    }

    /// Notes a request that was given up. The clean-up ends only after its reply.
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

/// An orphan (a record that no lock object uses), and the requests that may still create it.
pub struct Cleanup {
    orphan: Orphan,
    pub unanswered: Unanswered,
    expire: Duration,
    /// The process that sent the requests.
    generation: u64,
}

impl Cleanup {
    /// For what requests to this store have left, or may still leave.
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

    /// Runs in the background: waits for the reply to every request, or the end of its connection, removes the orphan,
    /// and removes it again when no request can have an effect any more. So an orphan exists for one lease at most. For
    /// a step into a reentrant hold there is no such limit, because other users of the hold depend on the count: the
    /// clean-up ends only when the step is removed or the client is closed.
    pub fn start(mut self, session: &Arc<Session>, open: &Arc<OpenStore>, key: &Key) {
        if self.generation != process::generation() {
            // It belongs to the parent process, which cleans up itself, or holds the lock by now.
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
