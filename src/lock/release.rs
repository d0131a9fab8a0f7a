//! Releasing a hold (R6, R7).

use std::ops::Deref;
use std::pin::pin;
use std::sync::Arc;

use super::deadline::Deadline;
use super::session::{OfItsProcess, OpenStore};
use super::state::{Hold, LockCore, Refused, ToRelease, lost};
use crate::backoff::Backoff;
use crate::clock::Boottime;
use crate::error::Error;
use crate::protocol::{Judgement, Release, Reply, step_out_of};
use crate::store::{Answer, JUST_AFTER, StoreError, StoreErrorKind};
use crate::sys::runtime::{self, sleep_until, until};
use crate::token::{HoldId, Token};

#[inline(always)]
pub fn unlock(core: &Arc<LockCore>) -> Answer<(), Error> {
    if !core.session.is_closed()
        && let Ok(open) = core.open_store()
        && let Some((token, deadline)) = core.begin_simple_release(open)
    {
        return send_plain(core, open, token, deadline);
    }
    unlock_any(core)
}

/// The general case of `unlock`.
#[cold]
fn unlock_any(core: &Arc<LockCore>) -> Answer<(), Error> {
    let begun = core.session.check_open().and_then(|()| core.open_store()).map_err(Refused::Final);
    match begun.and_then(|open| Ok((open, core.begin_release(open)?))) {
        Ok((open, released)) => send(core, open, released),
        // The steps of one reentrant object take turns.
        Err(Refused::Busy(_)) if core.is_reentrant() => in_turn(core),
        Err(refused) => Answer::Now(Err(refused.into())),
    }
}

/// Unlocks when the calls before it have ended. It continues if the caller drops it.
fn in_turn(core: &Arc<LockCore>) -> Answer<(), Error> {
    if let Err(error) = runtime::handle() {
        return Answer::Now(Err(error));
    }
    let (this, ticket) = (Arc::clone(core), core.object_queue().queue.join());
    let limit = Boottime::now() + core.session.options().op_timeout;
    Answer::later(core.session.detachable(async move {
        match until(limit, &mut pin!(this.wait_turn(ticket, begin))).await {
            Some(Ok((open, released))) => send(&this, &open, released).get().await,
            Some(Err(error)) => Err(error),
            None => Err(Error::invalid_op(format!(
                "lock instance {} is in use: another call on it did not end in time",
                this.key.quoted()
            ))),
        }
    }))
}

/// Begins an unlock. Returns the store to send it to as well: a signal handler may fork before it is sent, and the
/// child must not send it to a store that it opens itself.
fn begin(core: &Arc<LockCore>) -> Result<(Arc<OpenStore>, ToRelease), Refused> {
    let open = core.open_store()?;
    Ok((Arc::clone(open), core.begin_release(open)?))
}

fn begin_if_held(core: &Arc<LockCore>, only: Option<HoldId>) -> Result<Option<(Arc<OpenStore>, ToRelease)>, Refused> {
    let open = core.open_store()?;
    Ok(core.begin_release_if_held(open, only)?.map(|released| (Arc::clone(open), released)))
}

/// An unlock in progress. When this is dropped, the lock is idle; a request that was sent continues in the background.
struct Releasing<C: Deref<Target = LockCore>>(C);

impl<C: Deref<Target = LockCore>> Drop for Releasing<C> {
    fn drop(&mut self) {
        self.0.become_idle();
    }
}

/// Releases a plain hold that needs no clean-up.
#[inline(always)]
fn send_plain(core: &Arc<LockCore>, open: &Arc<OpenStore>, token: Token, deadline: Deadline) -> Answer<(), Error> {
    let releasing = Releasing(&**core);
    let answer = open.store.change(&core.key, Release::change_of_plain(token));
    if let Answer::Now(Ok(Reply::Applied { .. })) = answer {
        // The reply owns nothing: skipping its drop saves time. The store has said that the hold was ours.
        std::mem::forget(answer);
        let_others_go_first(core, open);
        return Answer::Now(Ok(()));
    }
    let released = ToRelease { release: Some(Release::Plain { token }), deadline, cleanups: Vec::new() };
    sent(releasing, (core, open), released, Some(answer))
}

fn send(core: &Arc<LockCore>, open: &Arc<OpenStore>, released: ToRelease) -> Answer<(), Error> {
    let releasing = Releasing(&**core);
    // Clean-ups start only after the reply to the release.
    let first = released.ask(core, open);
    sent(releasing, (core, open), released, first)
}

/// Continues a release whose first request was sent, with its answer.
fn sent(
    releasing: Releasing<&LockCore>,
    (core, open): (&Arc<LockCore>, &Arc<OpenStore>),
    released: ToRelease,
    first: Option<Answer<Reply>>,
) -> Answer<(), Error> {
    if let Some(Answer::Now(Ok(reply))) = &first {
        let judgement = released.judge(core, reply, Boottime::now, false);
        return Answer::Now(end(core, open, judgement));
    }
    let sent = Boottime::now();
    std::mem::forget(releasing);
    let releasing = Releasing(Arc::clone(core));
    let request = Request { core: Arc::clone(core), open: Arc::clone(open), released, sent };
    let mut released = core.session.detachable(request.until_answered(first));
    let open = Arc::clone(open);
    Answer::later(OfItsProcess::new(Box::pin(async move {
        let core = &releasing.0;
        let op_timeout = core.session.options().op_timeout;
        match until(sent + op_timeout, &mut released).await {
            Some(Ok(judgement)) => end(core, &open, judgement),
            Some(Err(error)) => Err(error.into()),
            None => Err(open.unanswered(op_timeout)),
        }
    })))
}

/// The store has replied: from releasing to idle (for a reentrant lock with more steps, to held).
fn end(core: &Arc<LockCore>, open: &OpenStore, judgement: Judgement) -> Result<(), Error> {
    match judgement {
        Judgement::Released => {
            let_others_go_first(core, open);
            Ok(())
        }
        Judgement::Lost => Err(lose(core)),
    }
}

/// If another process may be waiting, the waiters of this one pause briefly (R11).
#[inline]
fn let_others_go_first(core: &LockCore, open: &OpenStore) {
    if open.store.awaited_elsewhere(&core.key) {
        open.queue.defer(core.key.hash());
    }
}

/// The release has found that the hold was lost.
#[cold]
fn lose(core: &LockCore) -> Error {
    let cleanups = core.lose_hold(&mut core.state());
    core.start_cleanups(cleanups.unwrap_or_default());
    lost(&core.key)
}

impl ToRelease {
    /// Sends the request. `None` if it is not known yet which hold to release.
    fn ask(&self, core: &LockCore, open: &OpenStore) -> Option<Answer<Reply>> {
        let release = self.release.as_ref()?;
        Some(open.store.change(&core.key, release.change()))
    }

    /// Decides what the reply to a request means, and starts the clean-ups. `sent` is when the first request was sent,
    /// or later.
    fn judge(self, core: &LockCore, reply: &Reply, sent: impl FnOnce() -> Boottime, doubtful: bool) -> Judgement {
        let judgement = match &self.release {
            Some(release) => release.judge(reply, sent, self.deadline.moment(), doubtful, Boottime::now),
            None => Judgement::Lost,
        };
        core.start_cleanups(self.cleanups);
        judgement
    }
}

/// A release that is sent again until the store replies.
struct Request {
    core: Arc<LockCore>,
    open: Arc<OpenStore>,
    released: ToRelease,
    /// When its first request was sent.
    sent: Boottime,
}

impl Request {
    /// Sends the request until the store replies, or until the lease is over.
    async fn until_answered(mut self, mut first: Option<Answer<Reply>>) -> Result<Judgement, StoreError> {
        let mut backoff = Backoff::default();
        let mut doubtful = false;
        loop {
            let answer = match first.take().or_else(|| self.released.ask(&self.core, &self.open)) {
                Some(answer) => answer.get().await,
                None => match self.look_up().await {
                    Ok(true) => continue,
                    Ok(false) => Ok(Reply::Found(None)),
                    Err(error) => Err(error),
                },
            };
            match answer {
                Ok(reply) => return Ok(self.released.judge(&self.core, &reply, || self.sent, doubtful)),
                // The hold is the parent process's, and the call continues there.
                Err(error) if error.kind == StoreErrorKind::Forked => {
                    std::mem::forget(self.released.cleanups);
                    return Err(error);
                }
                Err(error) if !error.may_pass() || self.is_pointless() => {
                    tracing::warn!("{} was not released, and its lease will run out: {error}", self.core.key.quoted());
                    self.core.start_cleanups(self.released.cleanups);
                    return Err(error);
                }
                Err(error) => {
                    doubtful |= error.kind == StoreErrorKind::Unknown;
                    sleep_until(Boottime::now() + backoff.failed()).await;
                }
            }
        }
    }

    /// Whether the lease is over, so that sending again is pointless. A reentrant hold may have other users, who renew
    /// it and depend on the count: for it, only closing the client ends the attempts.
    fn is_pointless(&self) -> bool {
        let session = &self.core.session;
        let options = session.options();
        let ToRelease { release, deadline, .. } = &self.released;
        let lease_over =
            deadline.moment().max(self.sent + options.op_timeout) + self.open.store.margin(options.expire) + JUST_AFTER;
        lease_over.has_passed() && (matches!(release, Some(Release::Plain { .. })) || session.is_closed())
    }

    /// Looks up the hold of the owner token, for an object that has not locked itself, and uses its deadline. `false`:
    /// there is none.
    async fn look_up(&mut self) -> Result<bool, StoreError> {
        let looked_at = Boottime::now();
        let record = self.open.store.find(&self.core.key).get().await?;
        let owner = self.core.owner_token();
        let found = record.as_ref().zip(owner).and_then(|(record, owner)| step_out_of(record, owner));
        let (Some(record), Some(release)) = (record, found) else { return Ok(false) };
        self.released.release = Some(release);
        let margin = self.open.store.margin(self.core.session.options().expire);
        self.released.deadline = Deadline::new(&*self.open.store, looked_at, record.lease.remaining(), margin);
        Ok(true)
    }
}

/// Releases, in the background, a plain hold that was granted too late.
pub fn give_back(core: &Arc<LockCore>, open: &Arc<OpenStore>, hold: Hold) {
    let Some(token) = hold.token else { return };
    let release = Some(Release::Plain { token });
    send_in_background(core, open, ToRelease { release, deadline: hold.deadline, cleanups: hold.cleanups });
}

/// Releases a hold that no lock object refers to any more.
fn send_in_background(core: &Arc<LockCore>, open: &Arc<OpenStore>, released: ToRelease) {
    let sent = Boottime::now();
    match released.ask(core, open) {
        Some(Answer::Now(Ok(reply))) => {
            released.judge(core, &reply, || sent, false);
        }
        answer => {
            let request = Request { core: Arc::clone(core), open: Arc::clone(open), released, sent };
            core.session.spawn(async move {
                // A failure was logged.
                let _ = request.until_answered(answer).await;
            });
        }
    }
}

/// Releases all steps of a hold in the background, also if the client is closed. `false`: there is no hold.
pub fn release_in_background(core: &Arc<LockCore>) -> bool {
    in_background(core, None)
}

/// Unlocks once, in the background, if the lock still has this hold, whose grant was not reported. A plain lock can be
/// locked again at once.
pub fn release_unreported(core: &Arc<LockCore>, id: HoldId) {
    let taken = core.open_store().ok().and_then(|open| Some((open, core.take_unreported(id, open)?)));
    match taken {
        Some((open, released)) => send_in_background(core, open, released),
        None => {
            in_background(core, Some(id));
        }
    }
}

/// Releases one step of the given hold, or all steps of whatever hold there is. `false`: there is none.
fn in_background(core: &Arc<LockCore>, one_step_of: Option<HoldId>) -> bool {
    let mut begun = false;
    // While replies are immediate, no task is needed.
    let mut under_way = loop {
        match begin_if_held(core, one_step_of) {
            Ok(Some((open, released))) => {
                begun = true;
                match send(core, &open, released) {
                    Answer::Now(_) if one_step_of.is_none() => {}
                    Answer::Now(_) => return true,
                    Answer::Later(answer) => break Some(answer),
                }
            }
            Ok(None) | Err(Refused::Final(_)) => return begun,
            // Another call on the lock is in progress, and will end.
            Err(Refused::Busy(_)) => break None,
        }
    };
    let this = Arc::clone(core);
    core.session.spawn(async move {
        loop {
            if let Some(answer) = under_way.take() {
                // A failure was logged, and a request without a reply continues by itself. The other steps are released
                // in any case.
                let _ = answer.await;
                if one_step_of.is_some() {
                    return;
                }
            }
            let ticket = this.object_queue().queue.join();
            match this.wait_turn(ticket, |core| begin_if_held(core, one_step_of)).await {
                Ok(Some((open, released))) => under_way = Some(Box::pin(send(&this, &open, released).get())),
                Ok(None) | Err(_) => return,
            }
        }
    });
    true
}
