//! Renewing holds, by `refresh` (R8) and by auto-refresh (R12). Detecting that one is overdue (R13).

use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use super::deadline::Deadline;
use super::release;
use super::schedule::{DueRenewal, Scheduled, Slot};
use super::state::{LockCore, Phase, Stay, forked, lost, not_locked, renewal_at};
use crate::clock::Boottime;
use crate::error::Error;
use crate::options::LockOptions;
use crate::protocol::{Change, Renewal, Renewed, Reply};
use crate::store::{Answer, StoreError};
use crate::sys::runtime::until;

/// A renewal that was sent.
struct Sent {
    core: Arc<LockCore>,
    stay: Stay,
    renewal: Renewal,
    at: Boottime,
}

/// Renews the lease of the hold, with its last length if none is given.
pub fn refresh(core: &Arc<LockCore>, expire: Option<Duration>) -> Answer<(), Error> {
    let (sent, change) = match prepare(core, expire) {
        Ok(prepared) => prepared,
        Err(error) => return Answer::Now(Err(error)),
    };
    let open = match core.open_store() {
        Ok(open) => open,
        Err(error) => return Answer::Now(Err(error)),
    };
    match open.store.change(&core.key, change) {
        Answer::Now(answer) => Answer::Now(sent.report(answer)),
        Answer::Later(answer) => {
            let (at, op_timeout) = (sent.at, core.session.options().op_timeout);
            // It continues if the caller drops it: a renewal that is applied late still counts.
            let mut renewal = core.session.detachable(async move { sent.report(answer.await) });
            let open = Arc::clone(open);
            Answer::later(async move {
                let renewed = until(at + op_timeout, &mut renewal).await;
                renewed.unwrap_or_else(|| Err(open.unanswered(op_timeout)))
            })
        }
    }
}

/// The fence of the hold, which is requested now if the grant came without one (R18).
pub fn fence(core: &Arc<LockCore>) -> Answer<u64, Error> {
    let known = core.session.check_open().and_then(|()| core.with_hold(|hold| Ok((hold.stay(), hold.fence))));
    let stay = match known {
        Ok((_, Some(fence))) => return Answer::Now(Ok(fence)),
        Ok((stay, None)) => stay,
        Err(error) => return Answer::Now(Err(error)),
    };
    let core = Arc::clone(core);
    Answer::later(async move {
        let open = Arc::clone(core.open_store()?);
        let op_timeout = core.session.options().op_timeout;
        let limit = Boottime::now() + op_timeout;
        let fence = match until(limit, &mut pin!(open.store.fence(&core.key).get())).await {
            Some(fence) => fence?,
            None => return Err(open.unanswered(op_timeout)),
        };
        // The fence is valid only if the hold still existed after it was drawn.
        refresh(&core, None).get().await?;
        let mut state = core.state();
        match state.hold.as_mut().filter(|hold| hold.stay() == stay) {
            Some(hold) => Ok(*hold.fence.get_or_insert(fence)),
            None => Err(not_locked(&core.key)),
        }
    })
}

fn prepare(core: &Arc<LockCore>, expire: Option<Duration>) -> Result<(Sent, Change), Error> {
    LockOptions { expire, ..LockOptions::default() }.check()?;
    core.session.check_open()?;
    let open = core.open_store()?;
    let mut state = core.state();
    core.check_same_process(open)?;
    match state.phase {
        Phase::Lost(_) => {
            core.end_call(&mut state, Phase::Idle);
            return Err(lost(&core.key));
        }
        Phase::Forked => {
            core.end_call(&mut state, Phase::Idle);
            return Err(forked(&core.key));
        }
        Phase::Idle | Phase::Acquiring | Phase::Releasing => {}
    }
    let hold = state.hold.as_mut().ok_or_else(|| not_locked(&core.key))?;
    let shorter = expire.is_some_and(|expire| expire < hold.expire);
    hold.set_expire(expire.unwrap_or(hold.expire));
    let renewal = core.renewal(hold);
    let at = Boottime::now();
    let deadline = Deadline::of_lease(&*open.store, at, hold.expire);
    if (shorter || deadline.is_before(&hold.deadline)) && !core.is_reentrant() {
        // It may be applied although no reply arrives: from here on, only the shorter lease is certain, and replies to
        // earlier, longer renewals do not count.
        if deadline.is_before(&hold.deadline) {
            hold.deadline = deadline;
        }
        hold.deadline_seq = hold.write_seq;
    }
    // The next renewal must be sent in time for the shorter lease too.
    hold.renew_at = hold.renew_at.min(renewal_at(at, hold.expire));
    let change = renewal.change();
    let sent = Sent { core: Arc::clone(core), stay: hold.stay(), renewal, at };
    state.update_signal();
    core.schedule(&mut state);
    Ok((sent, change))
}

impl Sent {
    /// The result of an explicit refresh.
    fn report(&self, answer: Result<Reply, StoreError>) -> Result<(), Error> {
        match self.renewal.read(&answer?) {
            Renewed::Ours { applied } => match self.renewed(applied) {
                true => Ok(()),
                false => Err(self.unlocked_meanwhile()),
            },
            Renewed::Lost => match self.lost() {
                true => Err(lost(&self.core.key)),
                // The record is gone because another thread of this process has unlocked it.
                false => Err(self.unlocked_meanwhile()),
            },
        }
    }

    fn unlocked_meanwhile(&self) -> Error {
        Error::invalid_op(format!("lock instance {} was unlocked while it was refreshed", self.core.key.quoted()))
    }

    /// The store has said that the hold is lost, and the caller reports it. `false`: the hold had ended in another way.
    fn lost(&self) -> bool {
        let core = &self.core;
        let mut state = core.state();
        let cleanups = match (&state.hold, state.phase) {
            (Some(hold), _) if hold.stay() == self.stay => core.lose_hold(&mut state),
            // An automatic renewal has noted it first.
            (None, Phase::Lost(stay)) if stay == self.stay => None,
            _ => return false,
        };
        if matches!(state.phase, Phase::Idle | Phase::Lost(_)) {
            core.end_call(&mut state, Phase::Idle);
        }
        drop(state);
        core.start_cleanups(cleanups.unwrap_or_default());
        true
    }

    /// The store has renewed the hold. `false`: the hold has ended meanwhile.
    fn renewed(&self, applied: bool) -> bool {
        let core = &self.core;
        let Ok(open) = core.open_store() else { return false };
        let mut state = core.state();
        let Some(hold) = state.hold.as_mut().filter(|hold| hold.stay() == self.stay) else { return false };
        let Renewal { expire, write_seq, .. } = self.renewal;
        if applied && write_seq >= hold.deadline_seq {
            let deadline = Deadline::of_lease(&*open.store, self.at, expire);
            hold.deadline = match core.is_reentrant() {
                true => hold.deadline.clone().later_of(deadline),
                false => deadline,
            };
            hold.deadline_seq = write_seq;
            hold.overdue_logged = false;
            hold.renew_at = renewal_at(self.at, expire);
        }
        state.update_signal();
        core.schedule(&mut state);
        true
    }

    /// Processes the reply to an automatic renewal.
    fn dispatch(&self, answer: Result<Reply, StoreError>) {
        match answer.map(|reply| self.renewal.read(&reply)) {
            Ok(Renewed::Ours { applied }) => {
                self.renewed(applied);
            }
            Ok(Renewed::Lost) => self.core.mark_lost(self.stay),
            // A missing reply is neither success nor failure: the renewal is sent again until the store replies.
            Err(error) => tracing::debug!("{} was not renewed yet: {error}", self.core.key.quoted()),
        }
    }
}

impl Scheduled for LockCore {
    fn process_due(self: Arc<Self>, slot: Slot) -> Option<DueRenewal> {
        let mut state = self.state();
        let hold = state.hold.as_mut().filter(|hold| hold.slot == Some(slot))?;
        let now = Boottime::now();
        let deadline = hold.deadline.moment();
        if deadline <= now && !hold.overdue_logged {
            hold.overdue_logged = true;
            tracing::warn!("{} is overdue: others may take it over", self.key.quoted());
        }
        let due = (hold.auto_refresh && hold.renew_at <= now && !self.session.is_closed()).then(|| {
            let renewal = self.renewal(hold);
            hold.renew_at = now + retry_in(hold.expire, deadline.since(now));
            let (key, change) = (self.key.clone(), renewal.change());
            let sent = Sent { core: Arc::clone(&self), stay: hold.stay(), renewal, at: now };
            DueRenewal { key, change, dispatch: Box::new(move |answer| sent.dispatch(answer)) }
        });
        state.update_signal();
        self.schedule(&mut state);
        due
    }

    /// The deadline may have moved to an earlier time: an overdue hold must be noticed in time, and an auto-refreshed
    /// one is renewed now.
    fn clock_stepped(self: Arc<Self>) {
        let mut state = self.state();
        let Some(hold) = &mut state.hold else { return };
        hold.renew_at = hold.renew_at.min(Boottime::now());
        state.update_signal();
        self.schedule(&mut state);
    }

    fn is_of(&self, client: u64) -> bool {
        self.session.id() == client
    }

    fn is_renewed(&self) -> bool {
        self.state().hold.as_ref().is_some_and(|hold| hold.auto_refresh)
    }

    fn release_at_close(self: Arc<Self>) {
        release::release_in_background(&self);
    }

    fn abandon_with_client(&self) {
        self.abandon_hold("its client");
    }
}

/// To be called after a hold is scheduled for renewal. If its client was closed just before, the close may have missed
/// it: then it is released here, and not renewed.
pub fn check_still_open(core: &Arc<LockCore>) -> Result<(), Error> {
    core.session.check_open().inspect_err(|_| {
        release::release_in_background(core);
    })
}

/// After what time a renewal without a reply is sent again: in time for what is `left` of the present lease, which may
/// be shorter than the requested one.
fn retry_in(expire: Duration, left: Duration) -> Duration {
    const LEAST: Duration = Duration::from_millis(1);
    let pace = (expire / 10).clamp(LEAST, Duration::from_secs(1));
    if left.is_zero() { pace } else { pace.min(left / 2).max(LEAST) }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Where a longer lease was asked for, and no answer came, the shorter one still runs out.
    #[test]
    fn an_unanswered_renewal_is_sent_again_while_there_is_time() {
        let (minute, moment) = (Duration::from_secs(60), Duration::from_millis(200));
        assert_eq!(retry_in(minute, minute), Duration::from_secs(1));
        assert_eq!(retry_in(minute, moment), moment / 2);
        assert_eq!(retry_in(minute, Duration::from_micros(10)), Duration::from_millis(1));
        assert_eq!(retry_in(minute, Duration::ZERO), Duration::from_secs(1), "overdue: no sooner than ever");
        assert_eq!(retry_in(moment, minute), moment / 10);
    }
}
