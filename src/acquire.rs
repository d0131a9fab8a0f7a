//! Asking for a grant, waiting for it, and cleaning up after what was given up.

use std::future::{Future, poll_fn};
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use crate::client::{Client, OpenStore, unanswered};
use crate::clock::Boottime;
use crate::error::{Error, ErrorKind};
use crate::lock::{Acquiring, Hold, Refused, Shared, lost};
use crate::options::{IfHeld, LockOptions, Timeout};
use crate::queue::{KeyPlace, Place};
use crate::release;
use crate::runtime::{self, sleep_until, until};
use crate::store::{
    Acquired, Action, Answer, Attempt, Change, Claim, Identity, OwnerToken, Renewal, Renewed, Step, Stepped,
    StoreError, StoreErrorKind,
};
use crate::token::{HoldId, ObjectId, Token};

#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Patience {
    OneTry,
    Timeout,
}

/// Asks for a grant: the hold that was granted, or `None`.
pub(crate) fn acquire(shared: &Arc<Shared>, options: LockOptions, patience: Patience) -> Answer<Option<HoldId>, Error> {
    match begin(shared, options, patience) {
        Ok(answer) => answer,
        Err(error) => Answer::Now(Err(error)),
    }
}

fn begin(shared: &Arc<Shared>, call: LockOptions, patience: Patience) -> Result<Answer<Option<HoldId>, Error>, Error> {
    let options = shared.effective(call)?;
    let start = Boottime::now();
    let timeout = match patience {
        Patience::OneTry => Timeout::NoWait,
        Patience::Timeout => options.timeout.unwrap_or(Timeout::NoWait),
    };
    let wanted = Wanted { options, waits: timeout != Timeout::NoWait, start, timeout_at: timeout.from(start) };

    // The calls on one reentrant object take turns; those on a shared plain one do when asked to.
    let takes_turns = shared.owner.is_some() || options.if_held == Some(IfHeld::Wait);
    if !takes_turns || shared.sharing().line.is_empty() {
        match shared.begin_acquire() {
            Ok(acquiring) => return contend(acquiring, wanted),
            Err(Refused::Busy(_)) if takes_turns => {}
            Err(refused) => return Err(refused.into()),
        }
    }
    shared.client.check_open()?;
    if !wanted.waits && shared.owner.is_none() {
        return Ok(Answer::Now(Ok(None)));
    }
    runtime::handle()?;
    let turn = shared.sharing().line.join();
    Ok(Answer::later(in_turn(Arc::clone(shared), turn, wanted)))
}

/// What a caller asked for.
#[derive(Clone, Copy)]
struct Wanted {
    options: LockOptions,
    waits: bool,
    start: Boottime,
    timeout_at: Boottime,
}

/// Waits until this call may use the lock object, then asks for the lock.
async fn in_turn(shared: Arc<Shared>, turn: Place, wanted: Wanted) -> Result<Option<HoldId>, Error> {
    let limit = match wanted.waits {
        true => wanted.timeout_at,
        false => wanted.start + shared.client.options().op_timeout,
    };
    match bounded(&shared.client, limit, shared.turn(turn, Shared::begin_acquire)).await {
        Ended::Done(acquiring) => contend(acquiring?, wanted)?.get().await,
        Ended::TimeUp => Ok(None),
        Ended::Closed => Err(closed()),
    }
}

fn closed() -> Error {
    Error::new(ErrorKind::Cancelled, "the client was closed while the call waited")
}

/// Asks the store; at once where it answers at once.
fn contend(acquiring: Acquiring, wanted: Wanted) -> Result<Answer<Option<HoldId>, Error>, Error> {
    let open = Arc::clone(acquiring.shared().client.open_store()?);
    let queued = acquiring.shared().owner.is_none() && wanted.waits;
    let hash = acquiring.shared().key.hash();
    if wanted.options.auto_refresh == Some(true) {
        // A hold that nobody can renew is not what was asked for.
        open.keeper.start()?;
    }
    let mut claimant = Claimant::new(acquiring, Arc::clone(&open), &wanted.options)?;
    let mut place = None;
    if queued && (!open.queue.is_empty(hash) || open.queue.deferred_until(hash).is_some()) {
        place = Some(open.queue.join(hash));
    } else {
        let flight = claimant.send();
        match flight.answer {
            Answer::Now(result) => match claimant.settle(flight.sent, flight.n, result) {
                Settled::Granted(hold) => return Ok(Answer::Now(claimant.done(hold))),
                Settled::Held(_) if !wanted.waits => return Ok(Answer::Now(Ok(None))),
                Settled::Failed(error) if !error.may_pass() => return Ok(Answer::Now(Err(error.into()))),
                settled => claimant.settled = Some(settled),
            },
            answer => claimant.flight = Some(Flight { answer, ..flight }),
        }
        if queued {
            place = Some(open.queue.join(hash));
        }
    }
    runtime::handle()?;
    Ok(match wanted.waits {
        true => Answer::later(wait_for_grant(claimant, place, wanted.timeout_at)),
        false => Answer::later(one_try(claimant, wanted.start)),
    })
}

/// A single try, bounded by `op_timeout`: sent again only when an answer was lost.
async fn one_try(mut claimant: Claimant, start: Boottime) -> Result<Option<HoldId>, Error> {
    let limit = start + claimant.shared().client.options().op_timeout;
    loop {
        match claimant.attempt(limit).await {
            Settled::Granted(hold) => return claimant.done(hold),
            Settled::Held(_) => return Ok(None),
            Settled::Lost => return Err(lost(&claimant.shared.key)),
            Settled::Failed(error) if error.kind != StoreErrorKind::Unknown || limit.has_passed() => {
                return Err(error.into());
            }
            _ if limit.has_passed() => {
                return Err(unanswered(&*claimant.open.store, limit.since(start)));
            }
            _ => {}
        }
    }
}

/// How long the last request of a waiter may take beyond its timeout, where the store answers.
const LAST_TRY: Duration = Duration::from_millis(50);

/// Beyond the moment that a lease's end was announced for. A lease is over when its end is *before*
/// the store's now, and no clock is read twice at the same moment.
pub(crate) const JUST_AFTER: Duration = Duration::from_micros(100);

/// Waits for a grant (R9, R10, R11).
async fn wait_for_grant(
    mut claimant: Claimant,
    place: Option<KeyPlace>,
    timeout_at: Boottime,
) -> Result<Option<HoldId>, Error> {
    let shared = Arc::clone(claimant.shared());
    let open = Arc::clone(&claimant.open);
    let op_timeout = shared.client.options().op_timeout;
    let began = Boottime::now();

    if claimant.flight.is_some() || claimant.settled.is_some() {
        // What was asked before joining the line is answered first: if it was granted, whoever stands
        // before us waits for us.
        let limit = (began + op_timeout).min(timeout_at.max(began + LAST_TRY));
        match claimant.attempt(limit).await {
            Settled::Granted(hold) => return claimant.done(hold),
            Settled::Failed(error) if !error.may_pass() => return Err(error.into()),
            Settled::Lost => return Err(lost(&shared.key)),
            _ => {}
        }
    }
    let mut place = place;
    if let Some(place) = &mut place {
        if !place.is_front() {
            // Nor may anything of it be granted while we stand in line: nobody would know.
            claimant.give_up_unanswered();
        }
        match bounded(&shared.client, timeout_at, place.front()).await {
            Ended::Done(()) => {}
            Ended::TimeUp => return Ok(None),
            Ended::Closed => return Err(closed()),
        }
    }
    // Watching begins before the look at the record that the wait relies on: no change is missed.
    let mut watch = open.store.watch(&shared.key);
    let mut deferred = false;
    if place.is_some()
        && let Some(deferred_until) = open.queue.deferred_until(shared.key.hash())
    {
        let change = poll_fn(|context| watch.poll_change(context));
        deferred = matches!(bounded(&shared.client, deferred_until.min(timeout_at), change).await, Ended::TimeUp);
    }

    let mut backoff = Backoff::default();
    let mut trouble: Option<Error> = None;
    loop {
        let now = Boottime::now();
        let limit = (now + op_timeout).min(timeout_at.max(now + LAST_TRY));
        let look_in = match claimant.attempt(limit).await {
            Settled::Granted(hold) => {
                if deferred {
                    open.queue.deferred_in_vain(shared.key.hash());
                }
                return claimant.done(hold);
            }
            Settled::Held(expires_in) => {
                deferred = false;
                trouble = None;
                backoff = Backoff::default();
                expires_in + JUST_AFTER
            }
            Settled::Again => Duration::ZERO,
            Settled::Failed(error) if error.may_pass() => {
                trouble = Some(error.into());
                backoff.next()
            }
            Settled::Failed(error) => return Err(error.into()),
            Settled::Lost => return Err(lost(&shared.key)),
            Settled::Unproven(_) | Settled::Late(_) => unreachable!("an attempt resolves these"),
        };
        let safety_check = open.store.safety_check(Boottime::now().since(began));
        let mut look_at = Boottime::now() + look_in.min(safety_check);
        loop {
            let change = poll_fn(|context| watch.poll_change(context));
            match bounded(&shared.client, look_at.min(timeout_at), change).await {
                Ended::Done(Change::Look) => break,
                // Somebody else was quicker: no use trying before that lease ends.
                Ended::Done(Change::Held { expires_in }) => {
                    look_at = Boottime::now() + (expires_in + JUST_AFTER).min(safety_check);
                }
                Ended::TimeUp if timeout_at.has_passed() => return trouble.map_or(Ok(None), Err),
                Ended::TimeUp => break,
                Ended::Closed => return Err(closed()),
            }
        }
    }
}

/// Growing pauses between requests that failed.
#[derive(Default)]
pub(crate) struct Backoff(u32);

impl Backoff {
    pub fn next(&mut self) -> Duration {
        let pause = Duration::from_millis(20 << self.0.min(6)).min(Duration::from_secs(1));
        self.0 += 1;
        pause
    }
}

enum Ended<T> {
    Done(T),
    TimeUp,
    Closed,
}

/// Waits for `future` until `limit`, or until the client is closed.
async fn bounded<F: Future>(client: &Client, limit: Boottime, future: F) -> Ended<F::Output> {
    let mut future = pin!(future);
    let mut closing = pin!(client.closing());
    let mut time = sleep_until(limit);
    poll_fn(|context| {
        if let Poll::Ready(output) = future.as_mut().poll(context) {
            return Poll::Ready(Ended::Done(output));
        }
        if closing.as_mut().poll(context).is_ready() {
            return Poll::Ready(Ended::Closed);
        }
        Pin::new(&mut time).poll(context).map(|()| Ended::TimeUp)
    })
    .await
}

/// One hold that is asked for.
struct Claimant {
    acquiring: Acquiring,
    shared: Arc<Shared>,
    open: Arc<OpenStore>,
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
    flight: Option<Flight>,
    /// An answer that was not dealt with yet.
    settled: Option<Settled>,
    /// What may be in the store, or come to be.
    leftover: Option<Leftover>,
}

struct Flight {
    sent: Boottime,
    n: u64,
    answer: Answer<Tried>,
}

#[derive(Clone)]
struct Entering {
    owner: OwnerToken,
    object: ObjectId,
    number: u64,
    /// The hold that this object has already.
    held: Option<HoldId>,
}

enum Tried {
    Granted { hold: HoldId, token: Option<Token>, applied: bool, fence: Option<u64> },
    Held { expires_in: Duration },
    TooLate,
}

enum Settled {
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

impl StoreError {
    /// Whether asking again may help.
    pub(crate) fn may_pass(&self) -> bool {
        matches!(self.kind, StoreErrorKind::Unreachable | StoreErrorKind::Unknown)
    }
}

impl Claimant {
    fn new(acquiring: Acquiring, open: Arc<OpenStore>, options: &LockOptions) -> Result<Claimant, Error> {
        let shared = Arc::clone(acquiring.shared());
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
            open,
            hold: HoldId::random(),
            expire: options.expire.unwrap_or(shared.client.options().expire),
            auto_refresh: options.auto_refresh == Some(true),
            fence: options.fence == Some(true),
            attempts: 0,
            n: 0,
            step,
            flight: None,
            settled: None,
            leftover: None,
            shared,
        })
    }

    fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }

    /// Sends one more attempt, with a token and a number of its own (R3).
    fn send(&mut self) -> Flight {
        self.attempts += 1;
        self.n += 1;
        let (sent, n) = (Boottime::now(), self.n);
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

    /// Judges the answer to an attempt.
    fn settle(&mut self, sent: Boottime, n: u64, result: Result<Tried, StoreError>) -> Settled {
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
                    series: self.step.iter().map(|step| step.object).collect(),
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
                    self.leftover(sent).doubtful = true;
                }
                Settled::Failed(error)
            }
        }
    }

    /// One attempt, answered or given up at `limit`, and whatever it takes to be sure of a grant.
    async fn attempt(&mut self, limit: Boottime) -> Settled {
        let settled = match self.settled.take() {
            Some(settled) => settled,
            None => {
                let mut flight = match self.flight.take() {
                    Some(flight) => flight,
                    None => self.send(),
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
                    self.leftover(sent).answers.push(answer);
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
    fn give_up_unanswered(&mut self) {
        if let Some(leftover) = self.leftover.take_if(|leftover| leftover.pending()) {
            leftover.clean_up();
            self.begin_anew();
        }
    }

    /// Goes on as another hold.
    fn begin_anew(&mut self) {
        self.hold = HoldId::random();
        (self.attempts, self.n) = (0, 0);
        if let Some(step) = &mut self.step {
            let mut state = self.shared.live().state.lock();
            state.last_step += 2;
            (step.object, step.number) = (state.next_series(), state.last_step - 1);
        }
    }

    /// The grant is the lock's.
    fn done(mut self, mut hold: Hold) -> Result<Option<HoldId>, Error> {
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
        leftover.not_after = leftover.not_after.max(sent + self.shared.client.options().op_timeout);
        leftover
    }

    fn new_leftover(&self, sent: Boottime) -> Leftover {
        Leftover {
            shared: Arc::clone(&self.shared),
            open: Arc::clone(&self.open),
            what: match &self.step {
                None => What::Hold(self.hold),
                Some(step) => What::Step(step.clone()),
            },
            answers: Vec::new(),
            doubtful: false,
            not_after: sent + self.shared.client.options().op_timeout,
            expire: self.expire,
        }
    }
}

impl Drop for Claimant {
    fn drop(&mut self) {
        // Before the lock rests: what is under way is given up, and nothing of it may stay.
        if let Some(Flight { answer: Answer::Later(answer), sent, .. }) = self.flight.take() {
            self.leftover(sent).answers.push(answer);
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
}

/// An answer that was not there in time.
type Late = Pin<Box<dyn Future<Output = Result<Tried, StoreError>> + Send>>;

enum What {
    Hold(HoldId),
    Step(Entering),
}

impl Leftover {
    /// Whether it is of a reentrant step of this series.
    pub fn is_of(&self, series: ObjectId) -> bool {
        matches!(&self.what, What::Step(step) if step.object == series)
    }

    /// Whether something may still come of attempts.
    fn pending(&self) -> bool {
        self.doubtful || !self.answers.is_empty()
    }

    /// Removes what is there.
    fn remove(&self) -> Answer<()> {
        let key = &self.shared.key;
        match &self.what {
            What::Hold(hold) => self.open.store.release(key, Claim::AnyOf(*hold)).map(|_| ()),
            What::Step(step) => {
                let undo = Step {
                    owner: step.owner.clone(),
                    object: step.object,
                    number: step.number + 1,
                    action: Action::Undo { enter: step.number },
                };
                self.open.store.step(key, undo).map(|_| ())
            }
        }
    }

    /// In the background: awaits every attempt's answer or the end of its connection, removes what is
    /// ours, and again after the last attempt can take anything. So an orphan lives one lease at most.
    pub fn clean_up(mut self) {
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
                    Err(error) if error.may_pass() => backoff.next(),
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
