//! Giving a hold back (R6, R7).

use std::pin::pin;
use std::sync::Arc;

use crate::backoff::Backoff;
use crate::client::{OpenStore, unanswered};
use crate::clock::Boottime;
use crate::error::{Error, ErrorKind};
use crate::leftover::Leftover;
use crate::lock::{Hold, Live, Phase, Refused, Shared, State, StepIn, forked, lost, not_locked};
use crate::runtime::{self, sleep_until, until};
use crate::store::{
    Action, Answer, Claim, JUST_AFTER, OwnerToken, Released, Step, Stepped, StoreError, StoreErrorKind,
};
use crate::token::{HoldId, ObjectId};

pub(crate) fn unlock(shared: &Arc<Shared>) -> Answer<(), Error> {
    match shared.client.check_open().map_err(Refused::Final).and_then(|()| begin(shared)) {
        Ok(releasing) => releasing.send(),
        // The steps of one reentrant object take turns.
        Err(Refused::Busy(_)) if shared.owner.is_some() => in_turn(shared),
        Err(refused) => Answer::Now(Err(refused.into())),
    }
}

/// Unlocks when the calls before it have ended. It goes on where the caller does not.
fn in_turn(shared: &Arc<Shared>) -> Answer<(), Error> {
    if let Err(error) = runtime::handle() {
        return Answer::Now(Err(error));
    }
    let (this, turn) = (Arc::clone(shared), shared.sharing().line.join());
    let limit = Boottime::now() + shared.client.options().op_timeout;
    Answer::later(shared.client.carry_on(async move {
        match until(limit, &mut pin!(this.turn(turn, begin))).await {
            Some(Ok(releasing)) => releasing.send().get().await,
            Some(Err(error)) => Err(error),
            None => Err(Error::invalid_op(format!("lock instance {} is in use", this.key.quoted()))),
        }
    }))
}

/// Takes the lock object for an unlock, and says what is to be given back.
fn begin(shared: &Arc<Shared>) -> Result<Releasing, Refused> {
    let live = shared.live();
    begin_with(shared, live, &mut live.state.lock())
}

/// As `begin`, but only if there is a hold, and, if one is named, that one.
fn begin_if_held(shared: &Arc<Shared>, only: Option<HoldId>) -> Result<Option<Releasing>, Refused> {
    let live = shared.live();
    let mut state = live.state.lock();
    match &state.hold {
        Some(hold) if only.is_none_or(|only| only == hold.id) => begin_with(shared, live, &mut state).map(Some),
        _ => Ok(None),
    }
}

fn begin_with(shared: &Arc<Shared>, live: &Live, state: &mut State) -> Result<Releasing, Refused> {
    let open = Arc::clone(shared.client.open_store()?);
    if !open.is_of(live.generation) {
        return Err(Refused::Final(forked(&shared.key)));
    }
    match state.phase {
        Phase::Resting => {}
        Phase::Lost(_) => {
            shared.rest(live, state, Phase::Resting);
            state.lost_steps = state.lost_steps.saturating_sub(1);
            return Err(Refused::Final(lost(&shared.key)));
        }
        Phase::Forked => {
            shared.rest(live, state, Phase::Resting);
            return Err(Refused::Final(forked(&shared.key)));
        }
        Phase::Acquiring | Phase::Releasing => {
            return Err(Refused::Busy(Error::invalid_op(format!(
                "lock instance {} not locked: another call on it is under way",
                shared.key.quoted()
            ))));
        }
    }
    // From here on nothing renews a hold that is given back whole.
    let what = match shared.owner_token() {
        None => What::Hold(shared.end_hold(state).ok_or_else(|| not_locked(&shared.key))?),
        Some(owner) => {
            state.last_step += 1;
            let (series, enter, held, leftovers) = match &mut state.hold {
                None if state.lost_steps > 0 => {
                    // What the owner token holds by now is another object's, or another hold.
                    state.lost_steps -= 1;
                    return Err(Refused::Final(lost(&shared.key)));
                }
                None => {
                    // Were it the close that gave this object's hold back, this would take another's.
                    shared.client.check_open()?;
                    (state.next_series(), None, None, Vec::new())
                }
                Some(hold) => {
                    let held = (hold.id, hold.deadline);
                    let StepIn { series, number, .. } =
                        hold.left().ok_or_else(|| Error::new(ErrorKind::Internal, "a hold without a step in"))?;
                    let mut leftovers: Vec<_> =
                        hold.leftovers.extract_if(.., |leftover| leftover.is_of(series)).collect();
                    if hold.steps.is_empty() {
                        leftovers.extend(shared.end_hold(state).into_iter().flat_map(|hold| hold.leftovers));
                    }
                    (series, Some(number), Some(held), leftovers)
                }
            };
            What::Step { owner: owner.clone(), series, enter, number: state.last_step, held, leftovers }
        }
    };
    state.phase = Phase::Releasing;
    Ok(Releasing { shared: Arc::clone(shared), open, what, unsettled: false, done: false })
}

enum What {
    Hold(Hold),
    Step {
        owner: OwnerToken,
        /// That of the step in, and its number.
        series: ObjectId,
        enter: Option<u64>,
        number: u64,
        /// This object's own hold. An object that never locked may unlock what its owner token holds.
        held: Option<(HoldId, Boottime)>,
        /// What may still come of the step in.
        leftovers: Vec<Leftover>,
    },
}

/// An unlock under way; dropped, the lock is idle and the release goes on in the background.
struct Releasing {
    shared: Arc<Shared>,
    open: Arc<OpenStore>,
    what: What,
    /// Whether something may still come of what asked for the hold.
    unsettled: bool,
    done: bool,
}

/// What the store said to a release, or would have.
#[derive(Clone, Copy)]
enum Verdict {
    Ours,
    Lost,
}

impl Releasing {
    fn send(mut self) -> Answer<(), Error> {
        let sent = Boottime::now();
        // What is left over is cleaned up once the release is answered, and not before: undoing a step while
        // its way out is under way would count twice.
        let (request, deadline, leftovers) = match &mut self.what {
            What::Hold(hold) => match hold.token {
                Some(token) => {
                    (Request::Plain(Claim::Token(token)), hold.deadline, std::mem::take(&mut hold.leftovers))
                }
                None => return Answer::Now(Err(Error::new(ErrorKind::Internal, "a plain hold without a token"))),
            },
            What::Step { owner, series, enter, number, held, leftovers } => {
                let request = Request::Leave {
                    owner: owner.clone(),
                    object: *series,
                    enter: *enter,
                    number: *number,
                    hold: held.map_or(LeaveFrom::WhateverThereIs, |(hold, _)| LeaveFrom::Hold(Some(hold))),
                    fresh: self.open.name_hold(),
                };
                (request, held.map_or(Boottime::ZERO, |(_, deadline)| deadline), std::mem::take(leftovers))
            }
        };
        self.unsettled = !leftovers.is_empty();
        let release = Release {
            shared: Arc::clone(&self.shared),
            open: Arc::clone(&self.open),
            request,
            sent,
            deadline,
            leftovers,
        };
        let first = match release.ask() {
            Some(Answer::Now(Ok(verdict))) => {
                let verdict = release.answered(verdict, false);
                return Answer::Now(self.finish(verdict));
            }
            first => first,
        };
        let mut released = self.shared.client.carry_on(release.until_answered(first));
        let op_timeout = self.shared.client.options().op_timeout;
        Answer::later(async move {
            match until(sent + op_timeout, &mut released).await {
                Some(Ok(verdict)) => self.finish(verdict),
                Some(Err(error)) => Err(error.into()),
                None => Err(unanswered(&*self.open.store, op_timeout)),
            }
        })
    }

    /// The store has answered.
    fn finish(mut self, verdict: Verdict) -> Result<(), Error> {
        self.done = true;
        let (shared, live) = (&self.shared, self.shared.live());
        let lost_whole = {
            let mut state = live.state.lock();
            let lost_whole = match (verdict, &self.what) {
                (Verdict::Lost, _) => shared.lose_hold(&mut state),
                (Verdict::Ours, What::Step { series, .. }) if !self.unsettled => {
                    state.settled(*series);
                    None
                }
                (Verdict::Ours, _) => None,
            };
            shared.rest(live, &mut state, Phase::Resting);
            lost_whole
        };
        clean_up_after(lost_whole);
        match verdict {
            Verdict::Ours => {
                if self.open.store.awaited_elsewhere(&shared.key) {
                    self.open.queue.defer(shared.key.hash());
                }
                Ok(())
            }
            Verdict::Lost => Err(lost(&shared.key)),
        }
    }
}

impl Drop for Releasing {
    fn drop(&mut self) {
        if self.done {
            return;
        }
        // A step that is still on its way keeps its series: what comes is another one.
        let live = self.shared.live();
        self.shared.rest(live, &mut live.state.lock(), Phase::Resting);
    }
}

/// A release that is sent until it is answered.
struct Release {
    shared: Arc<Shared>,
    open: Arc<OpenStore>,
    request: Request,
    /// When its first request left.
    sent: Boottime,
    deadline: Boottime,
    /// What may still come of the attempts that asked for the hold.
    leftovers: Vec<Leftover>,
}

enum Request {
    Plain(Claim),
    Leave { owner: OwnerToken, object: ObjectId, enter: Option<u64>, number: u64, hold: LeaveFrom, fresh: HoldId },
}

/// The hold that a reentrant step leaves.
#[derive(Clone, Copy)]
enum LeaveFrom {
    /// That of the record, which was not looked at yet.
    WhateverThereIs,
    /// `None`: one without a name.
    Hold(Option<HoldId>),
}

impl Release {
    /// Sends until there is an answer, or the lease is over.
    async fn until_answered(mut self, mut first: Option<Answer<Verdict>>) -> Result<Verdict, StoreError> {
        let mut backoff = Backoff::default();
        let mut doubtful = false;
        loop {
            let answer = match first.take().or_else(|| self.ask()) {
                Some(answer) => answer.get().await,
                None => match self.look().await {
                    Ok(true) => continue,
                    Ok(false) => Ok(Verdict::Lost),
                    Err(error) => Err(error),
                },
            };
            match answer {
                Ok(verdict) => return Ok(self.answered(verdict, doubtful)),
                // The parent process's, whose call goes on there.
                Err(error) if error.kind == StoreErrorKind::Forked => return Err(error),
                Err(error) if !error.may_pass() || self.is_in_vain() => {
                    tracing::warn!(
                        "{} was not released, its lease runs out instead: {error}",
                        self.shared.key.quoted()
                    );
                    self.clean_up();
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
    fn is_in_vain(&self) -> bool {
        let client = &self.shared.client;
        let options = client.options();
        let lease_over =
            self.deadline.max(self.sent + options.op_timeout) + self.open.store.margin(options.expire) + JUST_AFTER;
        lease_over.has_passed() && (matches!(self.request, Request::Plain(_)) || client.is_closed())
    }

    /// Sends the request; `None` when it is not known yet which hold it leaves.
    fn ask(&self) -> Option<Answer<Verdict>> {
        let key = &self.shared.key;
        Some(match &self.request {
            Request::Plain(claim) => self.open.store.release(key, *claim).map(|released| match released {
                Released::Released => Verdict::Ours,
                Released::NotOurs => Verdict::Lost,
            }),
            Request::Leave { hold: LeaveFrom::WhateverThereIs, .. } => return None,
            Request::Leave { owner, object, enter, number, hold: LeaveFrom::Hold(hold), fresh } => {
                let action = Action::Leave { hold: *hold, enter: *enter, fresh: *fresh };
                let step = Step { owner: owner.clone(), object: *object, number: *number, action };
                self.open.store.step(key, step).map(|stepped| match stepped {
                    Stepped::Left { .. } => Verdict::Ours,
                    _ => Verdict::Lost,
                })
            }
        })
    }

    /// Looks up the hold that the owner token has, for an object that never locked: its deadline is then
    /// ours. `false`: it has none.
    async fn look(&mut self) -> Result<bool, StoreError> {
        let Request::Leave { owner, hold, .. } = &mut self.request else { return Ok(true) };
        let looked_at = Boottime::now();
        let record = self.open.store.find(&self.shared.key).get().await?;
        let Some(record) = record.filter(|record| *record.seen.token == *owner.0) else { return Ok(false) };
        let Some(reentrant) = record.reentrant else { return Ok(false) };
        *hold = LeaveFrom::Hold(reentrant.hold);
        let margin = self.open.store.margin(self.shared.client.options().expire);
        self.deadline = looked_at + record.lease.remaining() - margin;
        Ok(true)
    }

    /// Judged by when the first request left (R7): before the deadline, the hold was ours to give back.
    ///
    /// A request whose answer was lost may have deleted the record, and one that was long on its way may
    /// have been overtaken by the lease's end. Inside the deadline neither can be: somebody broke it.
    fn answered(self, verdict: Verdict, doubtful: bool) -> Verdict {
        let verdict = match verdict {
            Verdict::Lost if self.sent < self.deadline && (doubtful || self.deadline.has_passed()) => Verdict::Ours,
            verdict => verdict,
        };
        self.clean_up();
        verdict
    }

    fn clean_up(self) {
        for leftover in self.leftovers {
            leftover.clean_up();
        }
    }
}

/// Removes what unanswered attempts of an ended hold may still bring about.
pub(crate) fn clean_up_after(hold: Option<Hold>) {
    for leftover in hold.into_iter().flat_map(|hold| hold.leftovers) {
        leftover.clean_up();
    }
}

/// Releases in the background a plain hold that nobody waits for: granted too late to be wanted.
pub(crate) fn give_back(shared: &Arc<Shared>, open: &Arc<OpenStore>, hold: Hold) {
    let Some(token) = hold.token else { return };
    let release = Release {
        shared: Arc::clone(shared),
        open: Arc::clone(open),
        request: Request::Plain(Claim::Token(token)),
        sent: Boottime::now(),
        deadline: hold.deadline,
        leftovers: hold.leftovers,
    };
    match release.ask() {
        Some(Answer::Now(Ok(_))) => release.clean_up(),
        answer => shared.client.spawn(async move {
            // Logged where it fails.
            let _ = release.until_answered(answer).await;
        }),
    }
}

/// Gives back all of a hold, client closed or not, without being waited for.
pub(crate) fn release_in_background(shared: &Arc<Shared>) {
    in_background(shared, None);
}

/// Unlocks once, without being waited for, if it still is this hold.
pub(crate) fn release_once_in_background(shared: &Arc<Shared>, id: HoldId) {
    in_background(shared, Some(id));
}

/// Gives back one step of the hold that is named, or all there is.
fn in_background(shared: &Arc<Shared>, one_step_of: Option<HoldId>) {
    // What is answered at once is done at once.
    let mut under_way = loop {
        match begin_if_held(shared, one_step_of) {
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
    let this = Arc::clone(shared);
    shared.client.spawn(async move {
        loop {
            if let Some(answer) = under_way.take() {
                // Where it fails, it was logged; where it has no answer yet, it goes on. So do the other steps.
                let _ = answer.await;
                if one_step_of.is_some() {
                    return;
                }
            }
            let turn = this.sharing().line.join();
            match this.turn(turn, |shared| begin_if_held(shared, one_step_of)).await {
                Ok(Some(releasing)) => under_way = Some(Box::pin(releasing.send().get())),
                Ok(None) | Err(_) => return,
            }
        }
    });
}
