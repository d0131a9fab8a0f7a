//! One hold that is asked for: its attempts, their answers, and what proves a grant (R2 to R4).

use std::future::poll_fn;
use std::pin::pin;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use crate::client::{OpenStore, Running, unanswered};
use crate::clock::Boottime;
use crate::error::{Error, ErrorKind};
use crate::leftover::{Leftover, What};
use crate::lock::{Acquiring, Hold, Shared, StepIn, forked};
use crate::options::LockOptions;
use crate::release;
use crate::runtime::until;
use crate::store::{
    Acquired, Action, Answer, Attempt, Identity, OwnerToken, Renewal, Renewed, Step, Stepped, StoreError,
    StoreErrorKind,
};
use crate::token::{HoldId, ObjectId, Token};

/// One hold that is asked for.
pub(crate) struct Claimant {
    acquiring: Acquiring,
    shared: Arc<Shared>,
    pub open: Arc<OpenStore>,
    identity: Arc<Identity>,
    hold: HoldId,
    expire: Duration,
    auto_refresh: bool,
    fence: bool,
    attempts: u32,
    n: u64,
    /// In a reentrant lock: this step.
    step: Option<Entering>,
    /// A request that is not answered yet.
    pub flight: Option<Flight>,
    /// An answer that was not dealt with yet.
    pub settled: Option<Settled>,
    /// What may be in the store, or come to be.
    leftover: Option<Leftover>,
    /// The client's close waits for the end of this.
    _running: Running,
}

pub(crate) struct Flight {
    pub sent: Boottime,
    pub n: u64,
    pub answer: Answer<Tried>,
}

struct Entering {
    owner: OwnerToken,
    object: ObjectId,
    number: u64,
    /// The hold that this object has already.
    held: Option<HoldId>,
}

pub(crate) enum Tried {
    Granted { hold: HoldId, token: Option<Token>, applied: bool, fence: Option<u64> },
    Held { expires_in: Duration },
    TooLate,
}

pub(crate) enum Settled {
    Granted(Hold),
    Held(Duration),
    /// Nothing was taken, or it was given back: ask anew.
    Again,
    /// Ours, but its deadline is not known, or its fence is missing.
    Unproven(Hold),
    /// Ours, but past its deadline.
    Late(Hold),
    /// A reentrant hold of this object's was taken over.
    Lost,
    Failed(StoreError),
}

impl Claimant {
    pub fn new(acquiring: Acquiring, open: Arc<OpenStore>, options: &LockOptions) -> Result<Claimant, Error> {
        let shared = Arc::clone(acquiring.shared());
        let running = shared.client.begin()?;
        let step = shared.owner_token().cloned().map(|owner| {
            let mut state = shared.live().state.lock();
            let object = state.next_series();
            // Two numbers: the step's, and that of undoing it.
            state.last_step += 2;
            Entering { owner, object, number: state.last_step - 1, held: state.hold.as_ref().map(|hold| hold.id) }
        });
        Ok(Claimant {
            identity: Arc::clone(shared.client.identity()?),
            acquiring,
            hold: open.name_hold(),
            open,
            expire: options.expire.unwrap_or(shared.client.options().expire),
            auto_refresh: options.auto_refresh == Some(true),
            fence: options.fence == Some(true),
            attempts: 0,
            n: 0,
            step,
            flight: None,
            settled: None,
            leftover: None,
            _running: running,
            shared,
        })
    }

    pub fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }

    /// Sends one more attempt, with a token and a number of its own (R3). `sent` is a moment before that.
    pub fn send(&mut self, sent: Boottime) -> Flight {
        self.attempts += 1;
        self.n += 1;
        let n = self.n;
        let not_after = sent + self.shared.client.options().op_timeout;
        let key = &self.shared.key;
        let answer = match &self.step {
            None => {
                let token = Token { hold: self.hold, attempt: self.attempts };
                let identity = Arc::clone(&self.identity);
                let attempt = Attempt { token, n, expire: self.expire, not_after, identity };
                self.open.store.acquire(key, attempt).map(|acquired| match acquired {
                    Acquired::Granted { token, applied, fence } => {
                        Tried::Granted { hold: token.hold, token: Some(token), applied, fence }
                    }
                    Acquired::Held { expires_in } => Tried::Held { expires_in },
                    Acquired::TooLate => Tried::TooLate,
                })
            }
            Some(step) => {
                let action = Action::Enter {
                    hold: step.held,
                    fresh: self.hold,
                    expire: self.expire,
                    not_after,
                    identity: Arc::clone(&self.identity),
                };
                let step = Step { owner: step.owner.clone(), object: step.object, number: step.number, action };
                self.open.store.step(key, step).map(|stepped| match stepped {
                    Stepped::Entered { hold, applied, fence, .. } => {
                        Tried::Granted { hold, token: None, applied, fence }
                    }
                    Stepped::Held { expires_in } => Tried::Held { expires_in },
                    Stepped::TooLate | Stepped::Left { .. } | Stepped::NotOurs | Stepped::Undone => Tried::TooLate,
                })
            }
        };
        Flight { sent, n, answer }
    }

    fn steps_in(&self) -> Vec<StepIn> {
        let (expire, auto_refresh) = (self.expire, self.auto_refresh);
        let step = |step: &Entering| StepIn { series: step.object, number: step.number, expire, auto_refresh };
        self.step.iter().map(step).collect()
    }

    /// Judges the answer to an attempt.
    pub fn settle(&mut self, sent: Boottime, n: u64, result: Result<Tried, StoreError>) -> Settled {
        let held_before = self.step.as_ref().and_then(|step| step.held);
        match result {
            Ok(Tried::Granted { hold, token, applied, fence }) => {
                let deadline = sent + self.expire - self.open.store.margin(self.expire);
                let fenced = fence.is_some() || !self.fence;
                let hold = Hold {
                    id: hold,
                    token,
                    expire: self.expire,
                    deadline,
                    deadline_n: n,
                    n: self.n,
                    auto_refresh: self.auto_refresh,
                    renew_at: sent + self.expire / 3,
                    fence,
                    steps: self.steps_in(),
                    agenda: None,
                    overdue_told: false,
                    leftovers: Vec::new(),
                };
                match held_before {
                    Some(held) if held != hold.id => Settled::Lost,
                    _ if !applied => Settled::Unproven(hold),
                    _ if deadline.has_passed() => Settled::Late(hold),
                    _ if !fenced => Settled::Unproven(hold),
                    _ => Settled::Granted(hold),
                }
            }
            Ok(Tried::Held { .. }) if held_before.is_some() => Settled::Lost,
            Ok(Tried::Held { expires_in }) => Settled::Held(expires_in),
            Ok(Tried::TooLate) => Settled::Again,
            Err(error) => {
                if error.kind == StoreErrorKind::Unknown {
                    self.leftover(sent).doubt();
                }
                Settled::Failed(error)
            }
        }
    }

    /// One attempt, answered or given up at `limit`, and whatever it takes to be sure of a grant.
    pub async fn attempt(&mut self, limit: Boottime) -> Settled {
        let settled = match self.settled.take() {
            Some(settled) => settled,
            None => {
                let mut flight = match self.flight.take() {
                    Some(flight) => flight,
                    None => self.send(Boottime::now()),
                };
                let (sent, n) = (flight.sent, flight.n);
                let result = match flight.answer {
                    Answer::Now(result) => result,
                    answer => {
                        flight.answer = answer;
                        match self.answered(flight, limit).await {
                            Some(result) => result,
                            None => return Settled::Failed(self.not_answered(sent)),
                        }
                    }
                };
                self.settle(sent, n, result)
            }
        };
        match settled {
            Settled::Unproven(hold) => {
                let proven = self.prove(hold, limit).await;
                self.or_give_back(proven, limit).await
            }
            Settled::Late(hold) => self.or_give_back(Settled::Late(hold), limit).await,
            Settled::Lost => {
                // This object's former hold is gone; what this step entered is somebody else's count.
                let ended = self.shared.lose_hold(&mut self.shared.live().state.lock());
                if ended.is_none() {
                    // A refresh has told of it meanwhile: what is asked for now is a hold of its own.
                    self.step.iter_mut().for_each(|step| step.held = None);
                    return self.or_give_back(Settled::Again, limit).await;
                }
                release::clean_up_after(ended);
                self.leftover(Boottime::now());
                Settled::Lost
            }
            settled => settled,
        }
    }

    /// Waits for the answer of a flight. It stays with the claimant meanwhile: were this dropped, the
    /// clean-up would have it.
    async fn answered(&mut self, flight: Flight, limit: Boottime) -> Option<Result<Tried, StoreError>> {
        let sent = flight.sent;
        self.flight = Some(flight);
        let flight = &mut self.flight;
        let answer = poll_fn(|context| match flight {
            Some(Flight { answer: Answer::Later(answer), .. }) => answer.as_mut().poll(context),
            _ => Poll::Pending,
        });
        match until(limit, &mut pin!(answer)).await {
            Some(result) => {
                self.flight = None;
                Some(result)
            }
            None => {
                if let Some(Flight { answer: Answer::Later(answer), .. }) = self.flight.take() {
                    self.leftover(sent).await_answer(answer);
                }
                None
            }
        }
    }

    fn not_answered(&self, sent: Boottime) -> StoreError {
        let waited = Boottime::now().since(sent);
        StoreError::unknown(unanswered(&*self.open.store, waited).message())
    }

    /// Makes sure of a grant: gets its fence, and renews it, so that its deadline is known (R18).
    async fn prove(&mut self, mut hold: Hold, limit: Boottime) -> Settled {
        // From here on something of ours is in the store, whatever happens to this call.
        self.leftover(Boottime::now());
        if self.fence && hold.fence.is_none() {
            let sent = Boottime::now();
            match until(limit, &mut pin!(self.open.store.fence(&self.shared.key).get())).await {
                Some(Ok(fence)) => hold.fence = Some(fence),
                Some(Err(error)) => return Settled::Failed(error),
                None => return Settled::Failed(self.not_answered(sent)),
            }
        }
        while !limit.has_passed() {
            self.n += 1;
            let (sent, n) = (Boottime::now(), self.n);
            let renewal =
                Renewal { key: self.shared.key.clone(), proof: self.shared.proof(&hold), n, expire: self.expire };
            match until(limit, &mut pin!(self.open.store.refresh(vec![renewal]).get())).await {
                Some(Ok(renewed)) => match renewed.into_iter().next() {
                    Some(Ok(Renewed::Renewed { applied: true })) => {
                        (hold.n, hold.deadline_n) = (n, n);
                        hold.deadline = sent + self.expire - self.open.store.margin(self.expire);
                        hold.renew_at = sent + self.expire / 3;
                        return if hold.deadline.has_passed() { Settled::Late(hold) } else { Settled::Granted(hold) };
                    }
                    Some(Ok(Renewed::Renewed { applied: false })) => {}
                    Some(Ok(Renewed::Lost)) => return Settled::Again,
                    Some(Err(error)) => return Settled::Failed(error),
                    None => return Settled::Failed(StoreError::rejected("a refresh of one lock answered for none")),
                },
                Some(Err(error)) => return Settled::Failed(error),
                None => return Settled::Failed(self.not_answered(sent)),
            }
        }
        Settled::Late(hold)
    }

    /// A grant, or else nothing of it left in the store: a late grant is no grant (R4).
    async fn or_give_back(&mut self, settled: Settled, limit: Boottime) -> Settled {
        if let Settled::Granted(_) = settled {
            return settled;
        }
        let fresh = self.new_leftover(Boottime::now());
        // It stays with the claimant meanwhile: were this dropped, it would be cleaned up all the same.
        let removal = self.leftover.get_or_insert(fresh).remove();
        let removed = until(limit, &mut pin!(removal.get())).await;
        // Asked for again, it is another hold, or another step: this one is over.
        let left = |leftover: &mut Leftover| removed.is_none_or(|removed| removed.is_err()) || leftover.pending();
        if let Some(leftover) = self.leftover.take_if(left) {
            leftover.clean_up();
        }
        self.leftover = None;
        self.begin_anew();
        if let Settled::Late(_) = settled { Settled::Again } else { settled }
    }

    /// Attempts that may still be granted are cleaned up in the background; what comes is another hold.
    pub fn give_up_unanswered(&mut self) {
        if let Some(leftover) = self.leftover.take_if(|leftover| leftover.pending()) {
            leftover.clean_up();
            self.begin_anew();
        }
    }

    /// Goes on as another hold.
    fn begin_anew(&mut self) {
        self.hold = self.open.name_hold();
        (self.attempts, self.n) = (0, 0);
        if let Some(step) = &mut self.step {
            let mut state = self.shared.live().state.lock();
            state.last_step += 2;
            (step.object, step.number) = (state.next_series(), state.last_step - 1);
        }
    }

    /// The grant is the lock's.
    pub fn done(mut self, mut hold: Hold) -> Result<Option<HoldId>, Error> {
        if self.acquiring.is_the_parents() {
            // Asked for in the parent's store, it is the parent's, and goes on there.
            if !self.open.is_of_this_process() {
                std::mem::forget(self.leftover.take());
                return Err(forked(&self.shared.key));
            }
            // The call had not got that far: it is this process's, and nobody is told of it.
            match self.step {
                None => release::give_back(&self.shared, &self.open, hold),
                Some(_) => {
                    self.leftover(Boottime::now());
                }
            }
            return Err(forked(&self.shared.key));
        }
        let id = hold.id;
        // Attempts that were never answered are cleaned up when the hold has ended.
        hold.leftovers.extend(self.leftover.take().filter(|leftover| leftover.pending()));
        match self.acquiring.granted(hold) {
            None => {
                self.step = None;
                if !self.auto_refresh || self.shared.renewed_if_open().is_ok() {
                    return Ok(Some(id));
                }
            }
            Some(unwanted) if self.step.is_none() => release::give_back(&self.shared, &self.open, unwanted),
            Some(mut unwanted) => {
                // Dropped, the claimant undoes its own step, and no other.
                self.leftover = unwanted.leftovers.pop();
                self.leftover(Boottime::now());
            }
        }
        Err(Error::new(ErrorKind::Cancelled, "the lock was freed, or its client closed, while the call waited"))
    }

    fn leftover(&mut self, sent: Boottime) -> &mut Leftover {
        let fresh = self.new_leftover(sent);
        let leftover = self.leftover.get_or_insert(fresh);
        leftover.sent(sent);
        leftover
    }

    fn new_leftover(&self, sent: Boottime) -> Leftover {
        let what = match &self.step {
            None => What::Hold(self.hold),
            Some(Entering { owner, object, number, .. }) => {
                What::Step { owner: owner.clone(), object: *object, number: *number }
            }
        };
        Leftover::new(&self.shared, &self.open, what, sent, self.expire)
    }
}

impl Drop for Claimant {
    fn drop(&mut self) {
        // Before the lock rests: what is under way is given up, and nothing of it may stay.
        if let Some(Flight { answer: Answer::Later(answer), sent, .. }) = self.flight.take() {
            self.leftover(sent).await_answer(answer);
        }
        if let Some(Settled::Unproven(_) | Settled::Late(_)) = self.settled {
            self.leftover(Boottime::now());
        }
        match (self.leftover.take(), &self.step) {
            (Some(leftover), _) => leftover.clean_up(),
            (None, Some(step)) => self.shared.live().state.lock().settled(step.object),
            (None, None) => {}
        }
    }
}
