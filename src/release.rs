//! Giving a hold back (R6, R7).

use std::sync::Arc;

use tokio::sync::oneshot;

use crate::acquire::{Backoff, JUST_AFTER};
use crate::client::{OpenStore, unanswered};
use crate::clock::Boottime;
use crate::error::{Error, ErrorKind};
use crate::lock::{Hold, Phase, Shared, forked, lost, not_locked};
use crate::runtime::{self, sleep_until, until};
use crate::store::{Action, Answer, Claim, OwnerToken, Released, Step, Stepped, StoreError, StoreErrorKind};
use crate::token::{HoldId, ObjectId};

pub(crate) fn unlock(shared: &Arc<Shared>) -> Answer<(), Error> {
    let begun = shared.client.check_open().map_err(Refused::Final).and_then(|()| begin(shared));
    match begun {
        Ok(releasing) => releasing.send(),
        // The steps of one reentrant object take turns.
        Err(Refused::Busy(_)) if shared.owner.is_some() => match runtime::handle() {
            Ok(_) => {
                let (shared, turn) = (Arc::clone(shared), shared.sharing().line.join());
                Answer::later(async move {
                    let limit = Boottime::now() + shared.client.options().op_timeout;
                    let begin = |shared: &Arc<Shared>| begin(shared).map_err(Error::from);
                    match shared.turn(turn, limit, begin).await? {
                        Some(releasing) => releasing.send().get().await,
                        None => Err(Error::invalid_op(format!("lock instance {} is in use", shared.key.quoted()))),
                    }
                })
            }
            Err(error) => Answer::Now(Err(error)),
        },
        Err(refused) => Answer::Now(Err(refused.into())),
    }
}

/// Why an unlock did not begin.
enum Refused {
    Busy(Error),
    Final(Error),
}

impl From<Refused> for Error {
    fn from(refused: Refused) -> Error {
        match refused {
            Refused::Busy(error) | Refused::Final(error) => error,
        }
    }
}

impl From<Error> for Refused {
    fn from(error: Error) -> Refused {
        Refused::Final(error)
    }
}

/// Takes the lock object for an unlock, and says what is to be given back.
fn begin(shared: &Arc<Shared>) -> Result<Releasing, Refused> {
    let open = Arc::clone(shared.client.open_store()?);
    let live = shared.live();
    let mut state = live.state.lock();
    match state.phase {
        Phase::Resting => {}
        Phase::Lost => {
            shared.rest(live, &mut state, Phase::Resting);
            return Err(Refused::Final(lost(&shared.key)));
        }
        Phase::Forked => {
            shared.rest(live, &mut state, Phase::Resting);
            return Err(Refused::Final(forked(&shared.key)));
        }
        Phase::Acquiring | Phase::Releasing => {
            return Err(Refused::Busy(Error::invalid_op(format!(
                "lock instance {} not locked: another call on it is under way",
                shared.key.quoted()
            ))));
        }
    }
    let what = match shared.owner_token() {
        None => {
            // From here on nothing renews it.
            let hold = shared.end_hold(&mut state).ok_or_else(|| not_locked(&shared.key))?;
            What::Hold(hold)
        }
        Some(owner) => {
            state.last_step += 1;
            let (object, number) = (state.object, state.last_step);
            let held = state.hold.as_ref().map(|hold| (hold.id, hold.deadline));
            What::Step { owner: owner.clone(), object, number, held }
        }
    };
    state.phase = Phase::Releasing;
    Ok(Releasing { shared: Arc::clone(shared), open, what, done: false })
}

enum What {
    Hold(Hold),
    Step {
        owner: OwnerToken,
        object: ObjectId,
        number: u64,
        /// This object's own hold. An object that never locked may unlock what its owner token holds.
        held: Option<(HoldId, Boottime)>,
    },
}

/// An unlock under way; dropped, the lock is idle and the release goes on in the background.
struct Releasing {
    shared: Arc<Shared>,
    open: Arc<OpenStore>,
    what: What,
    done: bool,
}

/// What the store said to a release, or would have.
#[derive(Clone, Copy)]
enum Verdict {
    Ours,
    Lost,
}

impl Releasing {
    fn send(self) -> Answer<(), Error> {
        let sent = Boottime::now();
        let (claim, deadline) = match &self.what {
            What::Hold(hold) => match hold.token {
                Some(token) => (Request::Plain(Claim::Token(token)), hold.deadline),
                None => return Answer::Now(Err(Error::new(ErrorKind::Internal, "a plain hold without a token"))),
            },
            What::Step { owner, object, number, held } => {
                let fresh = HoldId::random();
                let hold = held.map(|(hold, _)| hold);
                let request = Request::Leave {
                    owner: owner.clone(),
                    object: *object,
                    number: *number,
                    hold,
                    fresh,
                    looked: held.is_some(),
                };
                (request, held.map_or(Boottime::ZERO, |(_, deadline)| deadline))
            }
        };
        let request =
            Release { shared: Arc::clone(&self.shared), open: Arc::clone(&self.open), request: claim, sent, deadline };
        let first = match &request.request {
            Request::Plain(claim) => match self.open.store.release(&self.shared.key, *claim) {
                Answer::Now(Ok(released)) => {
                    let verdict = request.judged(verdict(released), false);
                    return Answer::Now(self.finish(verdict));
                }
                answer => Some(answer),
            },
            Request::Leave { .. } => None,
        };
        let (tell, told) = oneshot::channel();
        self.open.spawn(async move {
            // Nobody listens where the caller has gone on.
            let _ = tell.send(request.until_answered(first).await);
        });
        let op_timeout = self.shared.client.options().op_timeout;
        Answer::later(async move {
            let mut told = told;
            match until(sent + op_timeout, &mut told).await {
                Some(Ok(Ok(verdict))) => self.finish(verdict),
                Some(Ok(Err(error))) => Err(error.into()),
                Some(Err(_)) | None => Err(unanswered(&*self.open.store, op_timeout)),
            }
        })
    }

    /// The store has answered.
    fn finish(mut self, verdict: Verdict) -> Result<(), Error> {
        self.done = true;
        let (shared, live) = (&self.shared, self.shared.live());
        let leftover = {
            let mut state = live.state.lock();
            let leftover = match &mut self.what {
                What::Hold(hold) => hold.leftover.take(),
                What::Step { .. } => leave(shared, &mut state, verdict),
            };
            shared.rest(live, &mut state, Phase::Resting);
            leftover
        };
        if let Some(leftover) = leftover {
            leftover.clean_up();
        }
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

/// One step out of a reentrant hold; what is left over of the hold if that was the last.
fn leave(
    shared: &Arc<Shared>,
    state: &mut crate::lock::State,
    verdict: Verdict,
) -> Option<Box<crate::acquire::Leftover>> {
    match (&mut state.hold, verdict) {
        (Some(hold), Verdict::Ours) if hold.depth > 1 => {
            hold.depth -= 1;
            None
        }
        _ => shared.end_hold(state).and_then(|hold| hold.leftover),
    }
}

impl Drop for Releasing {
    fn drop(&mut self) {
        if self.done {
            return;
        }
        let live = self.shared.live();
        let mut state = live.state.lock();
        let leftover = match &mut self.what {
            What::Hold(hold) => hold.leftover.take(),
            What::Step { .. } => {
                // The step is still on its way: what comes after it is another series.
                state.object = ObjectId::random();
                leave(&self.shared, &mut state, Verdict::Ours)
            }
        };
        self.shared.rest(live, &mut state, Phase::Resting);
        drop(state);
        if let Some(leftover) = leftover {
            leftover.clean_up();
        }
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
}

enum Request {
    Plain(Claim),
    Leave {
        owner: OwnerToken,
        object: ObjectId,
        number: u64,
        hold: Option<HoldId>,
        fresh: HoldId,
        /// Whether `hold` is known; otherwise the record says.
        looked: bool,
    },
}

impl Release {
    /// Sends until there is an answer, or the lease is over.
    async fn until_answered(mut self, mut first: Option<Answer<Released>>) -> Result<Verdict, StoreError> {
        let mut backoff = Backoff::default();
        let mut doubtful = false;
        let lease_over = self.deadline.max(self.sent + self.shared.client.options().op_timeout)
            + self.open.store.margin(self.shared.client.options().expire)
            + JUST_AFTER;
        loop {
            let answer = match first.take() {
                Some(answer) => answer.get().await.map(verdict),
                None => self.ask().await,
            };
            match answer {
                Ok(verdict) => return Ok(self.judged(verdict, doubtful)),
                Err(error) if !error.may_pass() || lease_over.has_passed() => {
                    tracing::warn!(
                        "{} was not released, its lease runs out instead: {error}",
                        self.shared.key.quoted()
                    );
                    return Err(error);
                }
                Err(error) => {
                    doubtful |= error.kind == StoreErrorKind::Unknown;
                    sleep_until(Boottime::now() + backoff.next()).await;
                }
            }
        }
    }

    /// Judged by when the first request left (R7): before the deadline, the hold was ours to give back.
    ///
    /// A request whose answer was lost may have deleted the record, and one that was long on its way may
    /// have been overtaken by the lease's end. Inside the deadline neither can be: somebody broke it.
    fn judged(&self, verdict: Verdict, doubtful: bool) -> Verdict {
        match verdict {
            Verdict::Lost if self.sent < self.deadline && (doubtful || self.deadline.has_passed()) => Verdict::Ours,
            verdict => verdict,
        }
    }

    async fn ask(&mut self) -> Result<Verdict, StoreError> {
        let key = &self.shared.key;
        match &mut self.request {
            Request::Plain(claim) => self.open.store.release(key, *claim).get().await.map(verdict),
            Request::Leave { owner, object, number, hold, fresh, looked } => {
                if !*looked {
                    // An object that never locked: the hold is the one that its owner token has.
                    let Some(record) = self.open.store.find(key).get().await? else { return Ok(Verdict::Lost) };
                    let Some(reentrant) = record.reentrant.filter(|_| *record.seen.token == *owner.0) else {
                        return Ok(Verdict::Lost);
                    };
                    (*hold, *looked) = (reentrant.hold, true);
                }
                let action = Action::Leave { hold: *hold, fresh: *fresh };
                let step = Step { owner: owner.clone(), object: *object, number: *number, action };
                match self.open.store.step(key, step).get().await? {
                    Stepped::Left { .. } => Ok(Verdict::Ours),
                    _ => Ok(Verdict::Lost),
                }
            }
        }
    }
}

fn verdict(released: Released) -> Verdict {
    match released {
        Released::Released => Verdict::Ours,
        Released::NotOurs => Verdict::Lost,
    }
}

/// Releases in the background a hold that nobody waits for: granted too late to be wanted.
pub(crate) fn give_back(shared: &Arc<Shared>, open: &Arc<OpenStore>, hold: Hold) {
    let leftover = hold.leftover;
    match hold.token {
        Some(token) => {
            let release = Release {
                shared: Arc::clone(shared),
                open: Arc::clone(open),
                request: Request::Plain(Claim::Token(token)),
                sent: Boottime::now(),
                deadline: hold.deadline,
            };
            match open.store.release(&shared.key, Claim::Token(token)) {
                Answer::Now(Ok(_)) => {}
                answer => open.spawn(async move {
                    // Logged where it fails.
                    let _ = release.until_answered(Some(answer)).await;
                }),
            }
        }
        None => drop(unlock_once(shared)),
    }
    if let Some(leftover) = leftover {
        leftover.clean_up();
    }
}

/// Gives back all of a hold, client closed or not, without being waited for.
pub(crate) fn release_in_background(shared: &Arc<Shared>) {
    let open = match shared.client.open_store() {
        Ok(open) => Arc::clone(open),
        Err(_) => return,
    };
    loop {
        match unlock_once(shared) {
            Some(Answer::Now(Ok(()))) => {}
            Some(Answer::Now(Err(_))) | None => return,
            Some(Answer::Later(answer)) => {
                let shared = Arc::clone(shared);
                open.spawn(async move {
                    let mut answer = Some(answer);
                    while let Some(step) = answer.take() {
                        if step.await.is_err() {
                            return;
                        }
                        answer = unlock_once(&shared).map(|next| Box::pin(next.get()) as _);
                    }
                });
                return;
            }
        }
    }
}

/// Unlocks once, without being waited for, if it still is this hold.
pub(crate) fn release_once_in_background(shared: &Arc<Shared>, id: HoldId) {
    if shared.live().state.lock().hold.as_ref().is_none_or(|hold| hold.id != id) {
        return;
    }
    if let Some(Answer::Later(answer)) = unlock_once(shared)
        && let Ok(open) = shared.client.open_store()
    {
        open.spawn(async move {
            // Logged where it fails.
            let _ = answer.await;
        });
    }
}

/// One unlock, if there is a hold.
fn unlock_once(shared: &Arc<Shared>) -> Option<Answer<(), Error>> {
    shared.live().state.lock().hold.as_ref()?;
    Some(begin(shared).ok()?.send())
}
