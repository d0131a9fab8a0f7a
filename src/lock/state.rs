//! The state of one lock object, and its transitions (R5).

use std::borrow::Borrow;
use std::os::fd::RawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, MutexGuard, OnceLock};
use std::time::Duration;

use tokio::sync::Notify;

use super::cleanup::Cleanup;
use super::deadline::Deadline;
use super::queue::{Ticket, WaitQueue};
use super::schedule::{Scheduled, Slot};
use super::session::{OpenStore, Session};
use crate::clock::{self, Boottime};
use crate::error::{Error, ErrorKind};
use crate::key::Key;
use crate::options::{IfHeld, LockOptions};
use crate::protocol::{Granted, Proof, Release, Renewal, Step};
use crate::sys::descriptor;
use crate::sys::mutex::Mutex;
use crate::sys::process::{self, PerProcess};
use crate::token::{HoldId, ObjectId, OwnerToken, Token};

/// A lock object, as shared by its handle, the schedule and operations in progress.
pub struct LockCore {
    pub key: Key,
    pub session: Arc<Session>,
    /// The options for calls that do not set their own.
    defaults: LockOptions,
    /// Reentrant locks only.
    owner: Option<Owner>,
    process: PerProcess<ProcessState>,
}

/// The part of a lock object that belongs to one process.
struct ProcessState {
    state: Mutex<State>,
    /// Whether there is a hold. A forked child can read this without locking the mutex.
    occupied: AtomicBool,
    /// Made when threads first queue for this object.
    sharing: OnceLock<Box<ObjectQueue>>,
}

impl ProcessState {
    #[inline(always)]
    fn end_call(&self, state: &mut State, phase: Phase) {
        state.phase = phase;
        state.update_signal();
        self.occupied.store(state.hold.is_some() || matches!(phase, Phase::Lost(_)), Ordering::Release);
        if let Some(sharing) = self.sharing.get() {
            sharing.idle.notify_one();
        }
    }
}

/// Queueing of threads that share one lock object (`if_held = wait`).
#[derive(Default)]
pub struct ObjectQueue {
    pub queue: Arc<WaitQueue>,
    /// Notified when the object becomes idle.
    idle: Notify,
}

pub struct State {
    pub phase: Phase,
    pub hold: Option<Hold>,
    /// The handle was freed: a later grant is given back.
    freed: bool,
    /// Whether its last hold was abandoned.
    pub abandoned: bool,
    /// Readable while the hold is overdue or lost. Made on first use.
    signal: Option<Signal>,
    /// Reentrant locks only: the name of the object in records, and the number of its last write.
    pub object: Option<ObjectId>,
    pub write_seq: u64,
    /// The number of steps that were lost together with their hold, and not unlocked since. Unlocking one of them
    /// changes nothing in the store.
    lost_steps: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// No call is in progress. The lock is held if `hold` is set.
    Idle,
    Acquiring,
    Releasing,
    /// The store said that this hold is lost, and no call has reported it yet.
    Lost(Stay),
    /// The hold is the parent process's.
    Forked,
}

/// Identifies the hold that a request was for. A reentrant hold keeps its name while it has other users. An object that
/// has left it and entered again has a new stay, which begins with another of its writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stay {
    hold: HoldId,
    began: u64,
}

/// A hold: from its grant to its end.
pub struct Hold {
    pub id: HoldId,
    /// The number of the write that began it.
    pub began: u64,
    /// The token in the record. Plain holds only.
    pub token: Option<Token>,
    /// What proves the hold to the store.
    pub proof: Proof,
    pub expire: Duration,
    pub deadline: Deadline,
    /// The number of the write that the deadline belongs to.
    pub deadline_seq: u64,
    /// The number of the last write sent.
    pub write_seq: u64,
    pub auto_refresh: bool,
    /// When the hold is to be renewed next.
    pub renew_at: Boottime,
    pub fence: Option<u64>,
    /// Reentrant locks only: the terms of each step, innermost last.
    pub steps: Vec<StepTerms>,
    /// The hold's slot in the schedule.
    pub slot: Option<Slot>,
    /// Whether it was logged that the hold is overdue.
    pub overdue_logged: bool,
    /// Clean-ups for what unanswered requests may have left. They start when the hold has ended.
    pub cleanups: Vec<Cleanup>,
}

/// The options that a step into a reentrant hold was requested with.
#[derive(Clone, Copy)]
pub struct StepTerms {
    pub expire: Duration,
    pub auto_refresh: bool,
}

/// When auto-refresh renews a lease: after a third of it (R12).
#[inline]
pub fn renewal_at(sent: Boottime, expire: Duration) -> Boottime {
    Boottime::from_nanos(sent.as_nanos().saturating_add(clock::nanos(expire) / 3))
}

impl Hold {
    /// A hold with a lease of length `expire`, granted in reply to a request that was sent at `sent`.
    #[inline(always)]
    pub fn new(
        granted: &Granted,
        proof: Proof,
        expire: Duration,
        deadline: Deadline,
        sent: Boottime,
        auto_refresh: bool,
    ) -> Hold {
        Hold {
            id: granted.hold,
            began: granted.write_seq,
            token: granted.token,
            proof,
            expire,
            deadline,
            deadline_seq: granted.write_seq,
            write_seq: granted.write_seq,
            auto_refresh,
            renew_at: renewal_at(sent, expire),
            fence: granted.fence,
            steps: Vec::new(),
            slot: None,
            overdue_logged: false,
            cleanups: Vec::new(),
        }
    }

    pub fn stay(&self) -> Stay {
        Stay { hold: self.id, began: self.began }
    }

    /// Adds a step into a reentrant hold. The highest numbers are kept: replies to earlier renewals may still arrive.
    #[cold]
    fn merge_reentry(&mut self, step: Hold) {
        let (mut steps, mut cleanups) = (std::mem::take(&mut self.steps), std::mem::take(&mut self.cleanups));
        steps.extend(step.steps);
        cleanups.extend(step.cleanups);
        *self = Hold {
            began: self.began,
            renew_at: if self.deadline.is_before(&step.deadline) { step.renew_at } else { self.renew_at },
            deadline: self.deadline.clone().later_of(step.deadline),
            deadline_seq: self.deadline_seq.max(step.deadline_seq),
            write_seq: self.write_seq.max(step.write_seq),
            fence: self.fence.or(step.fence),
            steps,
            slot: self.slot,
            cleanups,
            ..step
        };
        self.recompute_terms();
    }

    /// Removes the innermost step, together with the terms that only it requested.
    fn pop_step(&mut self) -> Option<StepTerms> {
        let step = self.steps.pop();
        self.recompute_terms();
        step
    }

    /// Sets the longest lease that a step has requested, and auto-refresh if a step has requested it.
    fn recompute_terms(&mut self) {
        self.expire = self.steps.iter().map(|step| step.expire).max().unwrap_or(self.expire);
        self.auto_refresh = self.steps.iter().any(|step| step.auto_refresh);
    }

    /// Sets a new length of the lease, for all steps.
    pub fn set_expire(&mut self, expire: Duration) {
        self.expire = expire;
        self.steps.iter_mut().for_each(|step| step.expire = expire);
    }

    /// Turns auto-refresh on, until all present steps are unlocked.
    fn enable_auto_refresh(&mut self) {
        self.auto_refresh = true;
        self.steps.iter_mut().for_each(|step| step.auto_refresh = true);
    }
}

/// Why a call on a lock object did not begin.
pub enum Refused {
    /// Another call on the object is in progress, or it is held. A later attempt may succeed.
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

/// The state of a lock object, as its user sees it.
///
/// ```
/// use nblock::{Client, ClientOptions, Key, LockOptions, LockState, wait};
///
/// # fn main() -> Result<(), nblock::Error> {
/// let client = wait(Client::open(Some("memory:"), ClientOptions::default()))?;
/// let lock = client.lock(Key::new(b"jobs:report")?, LockOptions::default())?;
/// assert_eq!(lock.state(), LockState::Idle);
///
/// assert!(wait(lock.try_lock(LockOptions::default()))?);
/// // To be checked before each step of the work: only this state rules out another holder.
/// assert_eq!(lock.state(), LockState::Held);
///
/// wait(lock.unlock())?;
/// assert_eq!(lock.state(), LockState::Idle);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LockState {
    /// Not locked by this object.
    Idle,
    /// An acquire or an unlock is in progress.
    Pending,
    /// Held; certain until the deadline.
    Held,
    /// Held, but past its deadline: another program may take it over at any moment.
    Overdue,
    /// The store has reported that the hold is lost. The next unlock or refresh reports it.
    Lost,
    /// The hold belongs to the process that this one was forked from.
    Forked,
}

/// What an unlock releases.
pub struct ToRelease {
    /// `None`: a step of the owner token's present hold, for an object that has no step itself.
    pub release: Option<Release>,
    pub deadline: Deadline,
    /// Clean-ups for the requests that acquired the hold, if the hold ends with this.
    pub cleanups: Vec<Cleanup>,
}

impl LockCore {
    pub fn new(session: Arc<Session>, key: Key, owner: Option<Owner>, defaults: LockOptions) -> LockCore {
        let client = session.options();
        let defaults = defaults.or(LockOptions {
            expire: Some(client.expire),
            timeout: Some(client.timeout),
            auto_refresh: Some(false),
            if_held: Some(IfHeld::Error),
            fence: Some(false),
        });
        LockCore { key, session, defaults, owner, process: PerProcess::new() }
    }

    /// The owner token of a reentrant lock.
    pub fn owner_token(&self) -> Option<&OwnerToken> {
        self.owner.as_ref().map(Owner::token)
    }

    pub fn is_reentrant(&self) -> bool {
        self.owner.is_some()
    }

    #[inline]
    pub fn open_store(&self) -> Result<&Arc<OpenStore>, Error> {
        self.session.open_store()
    }

    #[inline(always)]
    fn process(&self) -> &ProcessState {
        self.process.get_or_init(|left| {
            let parents = left.is_some_and(|left| left.occupied.load(Ordering::Acquire));
            ProcessState {
                state: Mutex::new(State {
                    phase: if parents { Phase::Forked } else { Phase::Idle },
                    hold: None,
                    freed: false,
                    abandoned: false,
                    signal: None,
                    object: None,
                    write_seq: 0,
                    lost_steps: 0,
                }),
                occupied: AtomicBool::new(parents),
                sharing: OnceLock::new(),
            }
        })
    }

    #[inline(always)]
    pub fn state(&self) -> MutexGuard<'_, State> {
        self.process().state.lock()
    }

    pub fn object_queue(&self) -> &ObjectQueue {
        self.process().sharing.get_or_init(Box::default)
    }

    /// The options for a call: its own, then the lock's, then the client's.
    #[inline]
    pub fn effective(&self, call: LockOptions) -> LockOptions {
        call.or(self.defaults)
    }

    /// The time after which a request sent at `sent` has no effect.
    pub fn not_after(&self, sent: Boottime) -> Boottime {
        sent + self.session.options().op_timeout
    }

    /// The length of a lease by the options of a call.
    pub fn expire_of(&self, options: &LockOptions) -> Duration {
        options.expire.unwrap_or(self.session.options().expire)
    }

    /// The next renewal of the hold.
    pub fn renewal(&self, hold: &mut Hold) -> Renewal {
        hold.write_seq += 1;
        Renewal { proof: hold.proof.clone(), expire: hold.expire, write_seq: hold.write_seq }
    }

    // Transitions.

    /// From idle (for a reentrant lock, also from held) to acquiring.
    pub fn begin_acquire(self: &Arc<Self>) -> Result<Acquiring<&Arc<Self>>, Refused> {
        self.session.check_open()?;
        let mut state = self.state();
        self.enter_acquire(&mut state).ok_or_else(|| self.refuse_acquire(&mut state))
    }

    /// As `begin_acquire`, but does not check whether the client is open. `None`: `begin_acquire` fails, and says why.
    #[inline(always)]
    pub fn begin_acquire_if_free(self: &Arc<Self>) -> Option<Acquiring<&Arc<Self>>> {
        self.enter_acquire(&mut self.state())
    }

    #[inline(always)]
    fn enter_acquire(self: &Arc<Self>, state: &mut State) -> Option<Acquiring<&Arc<Self>>> {
        // A hold of the parent process does not belong to this process; an acquire ends that state.
        let free = matches!(state.phase, Phase::Idle | Phase::Forked)
            && !state.freed
            && (state.hold.is_none() || self.is_reentrant());
        if !free {
            return None;
        }
        state.phase = Phase::Acquiring;
        Some(Acquiring { core: self, done: false, generation: process::generation_of_call() })
    }

    /// Why an acquire cannot begin.
    #[cold]
    fn refuse_acquire(&self, state: &mut State) -> Refused {
        if state.freed {
            return Refused::Final(Error::new(
                ErrorKind::Cancelled,
                format!("lock instance {} was freed while the call waited", self.key.quoted()),
            ));
        }
        let why = match state.phase {
            Phase::Lost(_) if self.is_reentrant() => {
                // Entering again is a use of the hold: the first call after a loss reports it.
                self.end_call(state, Phase::Idle);
                return Refused::Final(lost(&self.key));
            }
            Phase::Lost(_) => "already locked: its hold was lost; call unlock or refresh, which reports the loss",
            Phase::Releasing => "is being unlocked",
            Phase::Acquiring | Phase::Idle | Phase::Forked => "already locked",
        };
        Refused::Busy(Error::invalid_op(format!("lock instance {} {why}", self.key.quoted())))
    }

    /// From held (for a reentrant lock, also from idle) to releasing. Returns what to release. Renewals end here.
    /// `open` is the store that was looked up before.
    pub fn begin_release(self: &Arc<Self>, open: &OpenStore) -> Result<ToRelease, Refused> {
        self.begin_release_of(&mut self.state(), open)
    }

    /// As `begin_release`, for a plain hold without clean-ups. `None`: use `begin_release`.
    #[inline(always)]
    pub fn begin_simple_release(&self, open: &OpenStore) -> Option<(Token, Deadline)> {
        if self.is_reentrant() {
            return None;
        }
        let mut state = self.state();
        let hold = state.hold.as_ref()?;
        let simple = state.phase == Phase::Idle && hold.cleanups.is_empty() && open.is_of_this_process();
        let token = hold.token.filter(|_| simple)?;
        let Hold { deadline, slot, proof, steps, cleanups, .. } = state.hold.take()?;
        // They own nothing here: skipping their drops saves time.
        std::mem::forget((proof, steps, cleanups));
        if let Some(slot) = slot {
            self.leave_schedule(slot);
        }
        state.update_signal();
        state.phase = Phase::Releasing;
        drop(state);
        Some((token, deadline))
    }

    /// As `begin_release`, if there is a hold and, with `only`, if it is that one.
    pub fn begin_release_if_held(
        self: &Arc<Self>,
        open: &OpenStore,
        only: Option<HoldId>,
    ) -> Result<Option<ToRelease>, Refused> {
        let mut state = self.state();
        match &state.hold {
            Some(hold) if only.is_none_or(|only| only == hold.id) => self.begin_release_of(&mut state, open).map(Some),
            _ => Ok(None),
        }
    }

    /// Takes a plain hold out of the lock, which is idle from then on: what to release. `None` if the lock has another
    /// hold, or none, or if a call on it is in progress.
    pub fn take_unreported(&self, id: HoldId, open: &OpenStore) -> Option<ToRelease> {
        let mut state = self.state();
        let is_it = state.phase == Phase::Idle && state.hold.as_ref().is_some_and(|hold| hold.id == id);
        if !is_it || self.is_reentrant() || self.check_same_process(open).is_err() {
            return None;
        }
        let released = self.take_plain_hold(&mut state).ok();
        self.end_call(&mut state, Phase::Idle);
        released
    }

    fn begin_release_of(&self, state: &mut State, open: &OpenStore) -> Result<ToRelease, Refused> {
        self.check_same_process(open)?;
        if state.phase != Phase::Idle {
            return Err(self.refuse_release(state));
        }
        let released = match &self.owner {
            None => self.take_plain_hold(state)?,
            Some(owner) => self.take_step(state, owner.token().clone())?,
        };
        state.phase = Phase::Releasing;
        Ok(released)
    }

    /// Why a release cannot begin in this phase.
    #[cold]
    fn refuse_release(&self, state: &mut State) -> Refused {
        match state.phase {
            Phase::Lost(_) => {
                self.end_call(state, Phase::Idle);
                state.lost_steps = state.lost_steps.saturating_sub(1);
                Refused::Final(lost(&self.key))
            }
            Phase::Forked => {
                self.end_call(state, Phase::Idle);
                Refused::Final(forked(&self.key))
            }
            Phase::Idle | Phase::Acquiring | Phase::Releasing => Refused::Busy(Error::invalid_op(format!(
                "lock instance {} not locked: another call on it is under way",
                self.key.quoted()
            ))),
        }
    }

    /// Fails in a child process, if a signal handler has forked since the store was looked up. To be called with the
    /// state locked after that: a release of the parent's hold must not be sent to a store that the child has opened.
    #[inline]
    pub fn check_same_process(&self, open: &OpenStore) -> Result<(), Error> {
        if open.is_of_this_process() { Ok(()) } else { Err(forked(&self.key)) }
    }

    fn take_plain_hold(&self, state: &mut State) -> Result<ToRelease, Error> {
        let hold = state.hold.as_ref().ok_or_else(|| not_locked(&self.key))?;
        let token = hold.token.ok_or_else(|| Error::new(ErrorKind::Internal, "a plain hold without a token"))?;
        let deadline = hold.deadline.clone();
        Ok(ToRelease { release: Some(Release::Plain { token }), deadline, cleanups: self.end_hold(state) })
    }

    fn take_step(&self, state: &mut State, owner: OwnerToken) -> Result<ToRelease, Error> {
        let Some(hold) = &mut state.hold else {
            if state.lost_steps > 0 {
                // What the owner token holds by now is another hold, or another object's.
                state.lost_steps -= 1;
                return Err(lost(&self.key));
            }
            // If closing the client released this object's hold, this would release another object's.
            self.session.check_open()?;
            return Ok(ToRelease { release: None, deadline: Deadline::PASSED, cleanups: Vec::new() });
        };
        hold.pop_step().ok_or_else(|| Error::new(ErrorKind::Internal, "a hold without a step in"))?;
        let (id, deadline, count) = (hold.id, hold.deadline.clone(), hold.steps.len() as u32);
        let cleanups = if count == 0 { self.end_hold(state) } else { Vec::new() };
        state.write_seq += 1;
        let object = state.object_id();
        let step = Step { owner, object, hold: id, count, write_seq: state.write_seq };
        Ok(ToRelease { release: Some(Release::Step(step)), deadline, cleanups })
    }

    /// Waits for this call's turn on the object and until `begin` can.
    pub async fn wait_turn<T>(
        self: &Arc<Self>,
        mut ticket: Ticket,
        begin: impl Fn(&Arc<Self>) -> Result<T, Refused>,
    ) -> Result<T, Error> {
        ticket.front().await;
        loop {
            // Registered before `begin` is tried: if the object becomes idle in between, it is noticed.
            let idle = self.object_queue().idle.notified();
            match begin(self) {
                Ok(begun) => return Ok(begun),
                Err(Refused::Final(error)) => return Err(error),
                Err(Refused::Busy(_)) => idle.await,
            }
        }
    }

    /// Notes that a call has ended.
    pub fn end_call(&self, state: &mut State, phase: Phase) {
        self.process().end_call(state, phase);
    }

    /// The state, to store a grant in. After it was looked up, it is checked whether the call belongs to the parent
    /// process: a signal handler may have forked before, and then the state that was looked up is the child's.
    #[inline(always)]
    pub fn state_for_grant<C: Borrow<Arc<Self>>>(
        &self,
        acquiring: &Acquiring<C>,
    ) -> Result<MutexGuard<'_, State>, NotTaken> {
        let state = self.state();
        if acquiring.is_the_parents() {
            return Err(NotTaken::Parents);
        }
        if state.freed || self.session.is_closed() { Err(NotTaken::Unwanted) } else { Ok(state) }
    }

    /// Notes that a grant has begun a hold, or added a step to it.
    #[inline(always)]
    fn begin_hold(self: &Arc<Self>, state: &mut State) {
        self.process().end_call(state, Phase::Idle);
        self.schedule(state);
    }

    /// Notes that a call has ended, with nothing left to report.
    pub fn become_idle(&self) {
        let process = self.process();
        process.end_call(&mut process.state.lock(), Phase::Idle);
    }

    /// Ends the hold, and removes it from the schedule. Returns its clean-ups.
    #[inline]
    fn end_hold(&self, state: &mut State) -> Vec<Cleanup> {
        let Some(hold) = &mut state.hold else { return Vec::new() };
        let (slot, cleanups) = (hold.slot.take(), std::mem::take(&mut hold.cleanups));
        state.hold = None;
        if let Some(slot) = slot {
            self.leave_schedule(slot);
        }
        state.update_signal();
        cleanups
    }

    #[cold]
    fn leave_schedule(&self, slot: Slot) {
        if let Ok(open) = self.open_store() {
            open.schedule.remove(slot);
        }
    }

    /// Ends a hold that the store has reported as lost. Returns its clean-ups.
    pub fn lose_hold(&self, state: &mut State) -> Option<Vec<Cleanup>> {
        state.lost_steps += state.hold.as_ref()?.steps.len();
        Some(self.end_hold(state))
    }

    /// From held to lost, by a reply to an automatic renewal.
    pub fn mark_lost(&self, stay: Stay) {
        let mut state = self.state();
        if state.phase != Phase::Idle || state.hold.as_ref().is_none_or(|hold| hold.stay() != stay) {
            // A call is in progress, and finds the loss itself, or the hold has ended.
            return;
        }
        let cleanups = self.lose_hold(&mut state);
        self.end_call(&mut state, Phase::Lost(stay));
        drop(state);
        tracing::warn!("the lock {} was lost", self.key.quoted());
        self.start_cleanups(cleanups.unwrap_or_default());
    }

    /// The handle was freed: abandons the hold; a later grant is given back.
    pub fn free(&self) {
        let Some(process) = self.process.current() else { return };
        process.state.lock().freed = true;
        self.abandon_hold("its lock");
        if let Some(sharing) = process.sharing.get() {
            // A thread that queues for this object fails now.
            sharing.idle.notify_one();
        }
    }

    /// Stops renewing a hold because `what` was freed: its lease runs out.
    pub fn abandon_hold(&self, what: &str) {
        let Some(process) = self.process.current() else { return };
        let mut state = process.state.lock();
        let Some(deadline) = state.hold.as_ref().map(|hold| hold.deadline.clone()) else { return };
        let cleanups = self.end_hold(&mut state);
        state.abandoned = true;
        process.occupied.store(false, Ordering::Release);
        drop(state);
        drop(cleanups);
        tracing::warn!(
            "{} was held when {what} was freed: it is no longer renewed, and its lease runs out in {:?}",
            self.key.quoted(),
            deadline.left()
        );
    }

    /// Starts the clean-ups of a hold that has ended.
    #[inline]
    pub fn start_cleanups(&self, cleanups: Vec<Cleanup>) {
        if !cleanups.is_empty() {
            self.start_all(cleanups);
        }
    }

    fn start_all(&self, cleanups: Vec<Cleanup>) {
        if let Ok(open) = self.open_store() {
            for cleanup in cleanups {
                cleanup.start(&self.session, open, &self.key);
            }
        }
    }

    // Scheduling.

    /// Schedules what is due next for the hold: a renewal, or the check whether it is overdue.
    #[inline(always)]
    pub fn schedule(self: &Arc<Self>, state: &mut State)
    where
        LockCore: Scheduled,
    {
        let Some(hold) = &state.hold else { return };
        if state.signal.is_some() || hold.auto_refresh || hold.slot.is_some() {
            self.set_slot(state);
        }
    }

    fn set_slot(self: &Arc<Self>, state: &mut State)
    where
        LockCore: Scheduled,
    {
        let watched = state.signal.is_some();
        let Some(hold) = &mut state.hold else { return };
        let Ok(open) = self.open_store() else { return };
        let overdue_at = (!hold.overdue_logged && (hold.auto_refresh || watched)).then(|| hold.deadline.moment());
        // A closed client renews nothing, but its auto-refreshed holds stay scheduled: closing finds them there and
        // releases them.
        let renew_at = hold.auto_refresh.then(|| match self.session.is_closed() {
            true => Boottime::NEVER,
            false => hold.renew_at,
        });
        let next = overdue_at.into_iter().chain(renew_at).min();
        hold.slot = open.schedule.set(hold.slot.take(), next, || Arc::clone(self) as Arc<dyn Scheduled>);
    }

    /// Turns auto-refresh on for the present hold.
    pub fn enable_auto_refresh(self: &Arc<Self>) {
        let mut state = self.state();
        // Without a hold, it has just ended, and there is nothing to renew.
        if let Some(hold) = &mut state.hold {
            hold.enable_auto_refresh();
        }
        self.schedule(&mut state);
    }

    /// A descriptor that is readable while the hold is overdue or lost.
    pub fn lost_fd(self: &Arc<Self>) -> Result<RawFd, Error> {
        let mut state = self.state();
        // A new one is also made if the program has closed the last one.
        if state.signal.as_ref().is_none_or(|signal| signal.descriptor.number().is_none()) {
            let mut signal = Signal::new()?;
            signal.set(state.alarming());
            state.signal = Some(signal);
        }
        let descriptor = state.signal.as_ref().and_then(|signal| signal.descriptor.number()).unwrap_or(-1);
        // From now on, a hold without auto-refresh is scheduled as well.
        self.open_store()?.schedule.start()?;
        self.schedule(&mut state);
        Ok(descriptor)
    }

    // Reading the state.

    pub fn with_hold<T>(&self, look: impl FnOnce(&Hold) -> Result<T, Error>) -> Result<T, Error> {
        let state = self.state();
        match (&state.hold, state.phase) {
            (Some(hold), _) => look(hold),
            (None, Phase::Lost(_)) => Err(lost(&self.key)),
            (None, Phase::Forked) => Err(forked(&self.key)),
            (None, _) => Err(not_locked(&self.key)),
        }
    }

    pub fn lock_state(&self) -> LockState {
        let state = self.state();
        match (state.phase, &state.hold) {
            (Phase::Lost(_), _) => LockState::Lost,
            (Phase::Forked, _) => LockState::Forked,
            (_, Some(hold)) if hold.deadline.has_passed() => LockState::Overdue,
            (_, Some(_)) => LockState::Held,
            (Phase::Acquiring | Phase::Releasing, None) => LockState::Pending,
            (Phase::Idle, None) => LockState::Idle,
        }
    }
}

impl State {
    /// The name of a reentrant lock object in records. It is made on first use.
    pub fn object_id(&mut self) -> ObjectId {
        *self.object.get_or_insert_with(ObjectId::random)
    }

    /// Whether the hold is overdue or lost.
    fn alarming(&self) -> bool {
        matches!(self.phase, Phase::Lost(_)) || self.hold.as_ref().is_some_and(|hold| hold.deadline.has_passed())
    }

    #[inline]
    pub fn update_signal(&mut self) {
        if self.signal.is_some() {
            self.set_signal();
        }
    }

    fn set_signal(&mut self) {
        let alarming = self.alarming();
        if let Some(signal) = &mut self.signal {
            signal.set(alarming);
        }
    }
}

/// Why a lock object does not take a grant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NotTaken {
    /// It was freed meanwhile, or its client was closed.
    Unwanted,
    /// This is a child process, because a signal handler has forked during the call.
    Parents,
}

/// An acquire in progress. When this is dropped, the lock is in its former state.
pub struct Acquiring<C: Borrow<Arc<LockCore>> = Arc<LockCore>> {
    core: C,
    done: bool,
    generation: u64,
}

impl<C: Borrow<Arc<LockCore>>> Acquiring<C> {
    #[inline]
    pub fn core(&self) -> &Arc<LockCore> {
        self.core.borrow()
    }

    /// The same acquire, with another kind of reference to its lock.
    pub fn with<D: Borrow<Arc<LockCore>>>(mut self, core: D) -> Acquiring<D> {
        let done = std::mem::replace(&mut self.done, true);
        Acquiring { core, done, generation: self.generation }
    }

    /// Whether this is a child process, because a signal handler has forked during the call: then the grant is the
    /// parent's.
    #[inline]
    fn is_the_parents(&self) -> bool {
        self.generation != process::generation()
    }

    /// From acquiring to held. Returns the hold if it is not taken; the acquire is still in progress then.
    pub fn granted(&mut self, hold: Hold) -> Option<(Hold, NotTaken)> {
        let core = self.core.borrow();
        let mut state = match core.state_for_grant(self) {
            Ok(state) => state,
            Err(why) => return Some((hold, why)),
        };
        match &mut state.hold {
            None => state.hold = Some(hold),
            Some(before) => before.merge_reentry(hold),
        }
        self.done = true;
        core.begin_hold(&mut state);
        None
    }

    /// As `granted`, for a plain hold. `state` is what `state_for_grant` returned.
    #[inline(always)]
    pub fn held(&mut self, core: &Arc<LockCore>, state: &mut State) {
        self.done = true;
        core.begin_hold(state);
    }
}

impl<C: Borrow<Arc<LockCore>>> Drop for Acquiring<C> {
    #[inline]
    fn drop(&mut self) {
        if !self.done {
            self.core().become_idle();
        }
    }
}

/// A descriptor that can be made readable.
struct Signal {
    descriptor: descriptor::Signal,
    raised: bool,
}

impl Signal {
    fn new() -> Result<Signal, Error> {
        Ok(Signal { descriptor: signal_descriptor()?, raised: false })
    }

    fn set(&mut self, raised: bool) {
        if self.raised != raised {
            self.raised = raised;
            self.descriptor.set(raised);
        }
    }
}

/// A new descriptor for the program, not readable.
pub fn signal_descriptor() -> Result<descriptor::Signal, Error> {
    descriptor::Signal::new()
        .map_err(|error| Error::new(ErrorKind::Resources, format!("no file descriptor could be created: {error}")))
}

/// The owner token of a reentrant lock (R17).
pub enum Owner {
    Given(OwnerToken),
    /// A different token in each process: a forked child must not enter its parent's holds.
    Random(PerProcess<OwnerToken>),
}

impl Owner {
    /// The given owner, or a random one.
    pub fn new(given: Option<&str>) -> Result<Owner, Error> {
        let must = |got: &str| {
            let most = OwnerToken::MAX_BYTES;
            Error::invalid_argument(format!("owner token must have 1 to {most} bytes of UTF-8 (got {got})"))
        };
        match given {
            None => Ok(Owner::Random(PerProcess::new())),
            Some("") => Err(must("an empty one")),
            Some(text) if text.len() > OwnerToken::MAX_BYTES => Err(must(&format!("{} bytes", text.len()))),
            Some(text) => Ok(Owner::Given(OwnerToken(text.into()))),
        }
    }

    fn token(&self) -> &OwnerToken {
        match self {
            Owner::Given(token) => token,
            Owner::Random(token) => token.get_or_init(|_| OwnerToken(HoldId::random().to_string().into())),
        }
    }
}

pub fn not_locked(key: &Key) -> Error {
    Error::invalid_op(format!("lock instance {} not locked", key.quoted()))
}

pub fn lost(key: &Key) -> Error {
    Error::new(ErrorKind::Lost, format!("lost lock on {}", key.quoted()))
}

pub fn forked(key: &Key) -> Error {
    Error::new(
        ErrorKind::Forked,
        format!("the lock on {} is held by the process that this one was forked from: unlock it there", key.quoted()),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::client::Client;
    use crate::options::ClientOptions;
    use crate::sys::runtime::wait;

    /// A signal handler may fork between a grant and the look-up of the state: the child must not have the hold that
    /// its parent was granted.
    #[test]
    fn a_fork_after_a_grant_leaves_the_hold_to_the_parent() {
        let client = wait(Client::open(Some("memory:"), ClientOptions::default())).unwrap();
        let lock = client.lock(Key::new(b"k").unwrap(), LockOptions::default()).unwrap();
        let core = &lock.0;
        let acquiring = core.begin_acquire().ok().unwrap();
        // SAFETY: the child makes a few calls and ends.
        let child = unsafe { libc::fork() };
        let taken = core.state_for_grant(&acquiring).map(drop);
        if child == 0 {
            // SAFETY: ends the child.
            unsafe { libc::_exit(if taken == Err(NotTaken::Parents) { 0 } else { 1 }) };
        }
        assert_eq!(taken, Ok(()));
        let mut status = 0;
        // SAFETY: writes one integer.
        assert_eq!(unsafe { libc::waitpid(child, &mut status, 0) }, child);
        assert_eq!(status, 0);
    }

    /// As the handler of a signal may do it, between two instructions of an unlock: the child has what its parent has
    /// taken by then, and must not take the hold away with it.
    #[test]
    fn a_fork_in_the_middle_of_an_unlock_leaves_the_hold_to_the_parent() {
        let client = wait(Client::open(Some("memory:"), ClientOptions::default())).unwrap();
        let lock = client.lock(Key::new(b"k").unwrap(), LockOptions::default()).unwrap();
        assert!(wait(lock.try_lock(LockOptions::default())).unwrap());
        let core = &lock.0;
        let open = Arc::clone(core.open_store().unwrap());
        let mut state = core.state();
        // SAFETY: the child makes a few calls and ends.
        let child = unsafe { libc::fork() };
        let begun = core.begin_release_of(&mut state, &open);
        if child == 0 {
            let told = matches!(begun, Err(Refused::Final(error)) if error.kind() == ErrorKind::Forked);
            // SAFETY: ends the child.
            unsafe { libc::_exit(if told && state.hold.is_some() { 0 } else { 1 }) };
        }
        assert!(begun.is_ok());
        let mut status = 0;
        // SAFETY: writes one integer.
        assert_eq!(unsafe { libc::waitpid(child, &mut status, 0) }, child);
        assert_eq!(status, 0);
    }
}
