//! Giving a hold back (R6, R7).

use std::pin::pin;
use std::sync::Arc;

use super::cleanup::Cleanup;
use super::session::{OfItsProcess, OpenStore};
use super::state::{Hold, LockCore, Phase, Refused, ToRelease, lost};
use crate::backoff::Backoff;
use crate::clock::Boottime;
use crate::error::Error;
use crate::protocol::{Judgement, Release, Reply, step_out_of};
use crate::store::{Answer, JUST_AFTER, StoreError, StoreErrorKind};
use crate::sys::runtime::{self, sleep_until, until};
use crate::token::HoldId;

pub fn unlock(core: &Arc<LockCore>) -> Answer<(), Error> {
    match core.session.check_open().map_err(Refused::Final).and_then(|()| begin(core)) {
        Ok(releasing) => releasing.send(),
        // The steps of one reentrant object take turns.
        Err(Refused::Busy(_)) if core.is_reentrant() => in_turn(core),
        Err(refused) => Answer::Now(Err(refused.into())),
    }
}

/// Unlocks when the calls before it have ended. It goes on when the caller drops it.
fn in_turn(core: &Arc<LockCore>) -> Answer<(), Error> {
    if let Err(error) = runtime::handle() {
        return Answer::Now(Err(error));
    }
    let (this, ticket) = (Arc::clone(core), core.object_queue().queue.join());
    let limit = Boottime::now() + core.session.options().op_timeout;
    Answer::later(core.session.detachable(async move {
        match until(limit, &mut pin!(this.wait_turn(ticket, begin))).await {
            Some(Ok(releasing)) => releasing.send().get().await,
            Some(Err(error)) => Err(error),
            None => Err(Error::invalid_op(format!("lock instance {} is in use", this.key.quoted()))),
        }
    }))
}

fn begin(core: &Arc<LockCore>) -> Result<Releasing, Refused> {
    let open = Arc::clone(core.open_store()?);
    let released = core.begin_release(&open)?;
    Ok(Releasing { core: Arc::clone(core), open, released: Some(released) })
}

fn begin_if_held(core: &Arc<LockCore>, only: Option<HoldId>) -> Result<Option<Releasing>, Refused> {
    let open = Arc::clone(core.open_store()?);
    let released = core.begin_release_if_held(&open, only)?;
    Ok(released.map(|released| Releasing { core: Arc::clone(core), open, released: Some(released) }))
}

/// An unlock under way; dropped, the lock is idle and the release goes on in the background.
struct Releasing {
    core: Arc<LockCore>,
    open: Arc<OpenStore>,
    /// `None` when it was sent.
    released: Option<ToRelease>,
}

impl Releasing {
    fn send(mut self) -> Answer<(), Error> {
        let sent = Boottime::now();
        // Clean-ups start once the release is answered, and not before.
        let Some(ToRelease { release, deadline, cleanups }) = self.released.take() else {
            return Answer::Now(Ok(()));
        };
        let request =
            Request { core: Arc::clone(&self.core), open: Arc::clone(&self.open), release, sent, deadline, cleanups };
        let first = match request.ask() {
            Some(Answer::Now(Ok(reply))) => {
                let judgement = request.judge(&reply, false);
                return Answer::Now(self.end(judgement));
            }
            first => first,
        };
        let mut released = self.core.session.detachable(request.until_answered(first));
        let op_timeout = self.core.session.options().op_timeout;
        Answer::later(OfItsProcess::new(Box::pin(async move {
            match until(sent + op_timeout, &mut released).await {
                Some(Ok(judgement)) => self.end(judgement),
                Some(Err(error)) => Err(error.into()),
                None => Err(self.open.unanswered(op_timeout)),
            }
        })))
    }

    /// The store has answered: releasing to idle (or held, of a reentrant lock).
    fn end(self, judgement: Judgement) -> Result<(), Error> {
        let core = &self.core;
        match judgement {
            Judgement::Released => {
                if self.open.store.awaited_elsewhere(&core.key) {
                    self.open.queue.defer(core.key.hash());
                }
                Ok(())
            }
            Judgement::Lost => {
                let cleanups = core.lose_hold(&mut core.state());
                core.start_cleanups(cleanups.unwrap_or_default());
                Err(lost(&core.key))
            }
        }
    }
}

impl Drop for Releasing {
    fn drop(&mut self) {
        self.core.end_call(&mut self.core.state(), Phase::Idle);
    }
}

/// A release that is sent until it is answered.
struct Request {
    core: Arc<LockCore>,
    open: Arc<OpenStore>,
    /// `None`: a step of whichever hold the owner token has, which was not looked up yet.
    release: Option<Release>,
    /// When its first request left.
    sent: Boottime,
    deadline: Boottime,
    cleanups: Vec<Cleanup>,
}

impl Request {
    /// Sends until there is an answer, or the lease is over.
    async fn until_answered(mut self, mut first: Option<Answer<Reply>>) -> Result<Judgement, StoreError> {
        let mut backoff = Backoff::default();
        let mut doubtful = false;
        loop {
            let answer = match first.take().or_else(|| self.ask()) {
                Some(answer) => answer.get().await,
                None => match self.look_up().await {
                    Ok(true) => continue,
                    Ok(false) => Ok(Reply::Found(None)),
                    Err(error) => Err(error),
                },
            };
            match answer {
                Ok(reply) => return Ok(self.judge(&reply, doubtful)),
                // The parent process's, whose call goes on there.
                Err(error) if error.kind == StoreErrorKind::Forked => {
                    std::mem::forget(self.cleanups);
                    return Err(error);
                }
                Err(error) if !error.may_pass() || self.is_pointless() => {
                    tracing::warn!("{} was not released, its lease runs out instead: {error}", self.core.key.quoted());
                    self.core.start_cleanups(self.cleanups);
                    return Err(error);
                }
                Err(error) => {
                    doubtful |= error.kind == StoreErrorKind::Unknown;
                    sleep_until(Boottime::now() + backoff.failed()).await;
                }
            }
        }
    }

    /// Whether the lease is over by now. That of a reentrant hold may go on for others who are in, who rely on
    /// the count: there only a client that closes gives up.
    fn is_pointless(&self) -> bool {
        let session = &self.core.session;
        let options = session.options();
        let lease_over =
            self.deadline.max(self.sent + options.op_timeout) + self.open.store.margin(options.expire) + JUST_AFTER;
        lease_over.has_passed() && (matches!(self.release, Some(Release::Plain { .. })) || session.is_closed())
    }

    /// Sends the request; `None` when it is not known yet which hold it leaves.
    fn ask(&self) -> Option<Answer<Reply>> {
        let release = self.release.as_ref()?;
        Some(self.open.store.change(&self.core.key, release.change()))
    }

    /// Looks up the hold that the owner token has, for an object that never locked: its deadline is then
    /// ours. `false`: it has none.
    async fn look_up(&mut self) -> Result<bool, StoreError> {
        let looked_at = Boottime::now();
        let record = self.open.store.find(&self.core.key).get().await?;
        let owner = self.core.owner_token();
        let found = record.as_ref().zip(owner).and_then(|(record, owner)| step_out_of(record, owner));
        let (Some(record), Some(release)) = (record, found) else { return Ok(false) };
        self.release = Some(release);
        let margin = self.open.store.margin(self.core.session.options().expire);
        self.deadline = looked_at + record.lease.remaining() - margin;
        Ok(true)
    }

    fn judge(self, reply: &Reply, doubtful: bool) -> Judgement {
        let judgement = match &self.release {
            Some(release) => release.judge(reply, self.sent, self.deadline, doubtful, Boottime::now()),
            None => Judgement::Lost,
        };
        self.core.start_cleanups(self.cleanups);
        judgement
    }
}

/// Releases in the background a plain hold that was granted too late to be wanted.
pub fn give_back(core: &Arc<LockCore>, open: &Arc<OpenStore>, hold: Hold) {
    let Some(token) = hold.token else { return };
    let request = Request {
        core: Arc::clone(core),
        open: Arc::clone(open),
        release: Some(Release::Plain { token }),
        sent: Boottime::now(),
        deadline: hold.deadline,
        cleanups: hold.cleanups,
    };
    match request.ask() {
        Some(Answer::Now(Ok(reply))) => {
            request.judge(&reply, false);
        }
        answer => core.session.spawn(async move {
            // Logged where it fails.
            let _ = request.until_answered(answer).await;
        }),
    }
}

/// Gives back all of a hold, client closed or not, in the background.
pub fn release_in_background(core: &Arc<LockCore>) {
    in_background(core, None);
}

/// Unlocks once, in the background, if it still is this hold.
pub fn release_once_in_background(core: &Arc<LockCore>, id: HoldId) {
    in_background(core, Some(id));
}

/// Gives back one step of the hold that is named, or all there is.
fn in_background(core: &Arc<LockCore>, one_step_of: Option<HoldId>) {
    // What is answered at once is done at once.
    let mut under_way = loop {
        match begin_if_held(core, one_step_of) {
            Ok(Some(releasing)) => match releasing.send() {
                Answer::Now(_) if one_step_of.is_none() => {}
                Answer::Now(_) => return,
                Answer::Later(answer) => break Some(answer),
            },
            Ok(None) | Err(Refused::Final(_)) => return,
            // Another call on it is under way, and ends.
            Err(Refused::Busy(_)) => break None,
        }
    };
    let this = Arc::clone(core);
    core.session.spawn(async move {
        loop {
            if let Some(answer) = under_way.take() {
                // Where it fails, it was logged; where it has no answer yet, it goes on. So do the other steps.
                let _ = answer.await;
                if one_step_of.is_some() {
                    return;
                }
            }
            let ticket = this.object_queue().queue.join();
            match this.wait_turn(ticket, |core| begin_if_held(core, one_step_of)).await {
                Ok(Some(releasing)) => under_way = Some(Box::pin(releasing.send().get())),
                Ok(None) | Err(_) => return,
            }
        }
    });
}
