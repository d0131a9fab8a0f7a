//! One program's object for one key, and the state of its hold (R5).

use std::os::fd::RawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use tokio::sync::Notify;

use crate::acquire;
use crate::client::Client;
use crate::clock::Boottime;
use crate::descriptor;
use crate::error::{Error, ErrorKind};
use crate::key::Key;
use crate::leftover::Leftover;
use crate::mutex::Mutex;
use crate::options::{IfHeld, LockOptions};
use crate::process::{self, PerProcess};
use crate::queue::{Line, Place};
use crate::store::{Answer, OwnerToken, Proof};
use crate::token::{HoldId, ObjectId, Token};
use crate::{refresh, release};

/// One program's object for one key. Dropping it while it is held abandons the hold (R15).
///
/// Safe to use from many threads. Answers come at once, or as a future that the caller drives;
/// dropping the future of an acquire cancels it (R14), that of an unlock or refresh does not.
pub struct Lock(Arc<Shared>);

/// What the handle, the keeper and operations under way have in common.
pub(crate) struct Shared {
    pub key: Key,
    pub client: Client,
    defaults: LockOptions,
    /// Present in a reentrant lock.
    pub owner: Option<Owner>,
    live: PerProcess<Live>,
}

/// What a lock has in one process.
pub(crate) struct Live {
    pub state: Mutex<State>,
    pub generation: u64,
    /// Whether there is a hold: what a forked child may read in any state.
    occupied: AtomicBool,
    /// Made when threads first queue for this very object.
    sharing: OnceLock<Box<Sharing>>,
}

/// Queueing of threads that share one lock object (`if_held = wait`).
#[derive(Default)]
pub(crate) struct Sharing {
    pub line: Arc<Line>,
    /// Told when the object becomes idle.
    pub idle: Notify,
}

pub(crate) struct State {
    pub phase: Phase,
    pub hold: Option<Hold>,
    /// The handle is gone: a grant that still comes is given back.
    pub freed: bool,
    /// Readable while the hold is overdue or lost, from when it was first asked for.
    signal: Option<Signal>,
    /// Of a reentrant lock: the number of its last step, and the series that may be used again.
    pub last_step: u64,
    settled_series: Vec<ObjectId>,
    /// How many steps in were lost with their hold, and not left since: their ways out leave nothing.
    pub lost_steps: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    /// Nothing is under way; held or not, as `hold` says.
    Resting,
    Acquiring,
    Releasing,
    /// The store said that this hold is lost, and nobody was told yet.
    Lost(HoldId),
    /// The hold is the parent process's.
    Forked,
}

/// The time from a grant to its end.
pub(crate) struct Hold {
    pub id: HoldId,
    /// What the record carries. A reentrant lock proves itself by owner token and hold.
    pub token: Option<Token>,
    pub expire: Duration,
    /// When this hold stops being ours, by our own clock.
    ///
    /// Counted from before the request left: a slow reply must shorten the lease, never stretch it.
    pub deadline: Boottime,
    /// The number of the write that the deadline comes from.
    pub deadline_n: u64,
    /// The number of the last write sent.
    pub n: u64,
    pub auto_refresh: bool,
    /// When the keeper renews it next.
    pub renew_at: Boottime,
    pub fence: Option<u64>,
    /// Of a reentrant lock: each step in, the last one last.
    pub steps: Vec<StepIn>,
    /// Where the keeper has it in its agenda.
    pub agenda: Option<(Boottime, u64)>,
    /// Whether it was told that the hold is overdue.
    pub overdue_told: bool,
    /// Attempts that were never answered, to be cleaned up when the hold ends.
    pub leftovers: Vec<Leftover>,
}

/// A step into a reentrant hold: its series and number, and what was asked for with it.
#[derive(Clone, Copy)]
pub(crate) struct StepIn {
    pub series: ObjectId,
    pub number: u64,
    pub expire: Duration,
    pub auto_refresh: bool,
}

impl Hold {
    /// One more step into a reentrant hold. Of its numbers the highest stay: answers to earlier renewals
    /// may still come.
    fn entered_again(self, step: Hold) -> Hold {
        let (mut steps, mut leftovers) = (self.steps, self.leftovers);
        steps.extend(step.steps);
        leftovers.extend(step.leftovers);
        let mut hold = Hold {
            deadline: self.deadline.max(step.deadline),
            deadline_n: self.deadline_n.max(step.deadline_n),
            n: self.n.max(step.n),
            renew_at: if self.deadline < step.deadline { step.renew_at } else { self.renew_at },
            fence: self.fence.or(step.fence),
            steps,
            agenda: self.agenda,
            leftovers,
            ..step
        };
        hold.as_its_steps_ask();
        hold
    }

    /// Leaves the last step in. What only that one asked for ends with it.
    pub fn left(&mut self) -> Option<StepIn> {
        let step = self.steps.pop();
        self.as_its_steps_ask();
        step
    }

    /// The longest lease that one of its steps asked for, renewed if one of them asked for that.
    fn as_its_steps_ask(&mut self) {
        self.expire = self.steps.iter().map(|step| step.expire).max().unwrap_or(self.expire);
        self.auto_refresh = self.steps.iter().any(|step| step.auto_refresh);
    }

    /// A new lease's length, for all that is in.
    pub fn ask_for(&mut self, expire: Duration) {
        self.expire = expire;
        self.steps.iter_mut().for_each(|step| step.expire = expire);
    }

    /// Renewed from now on, until all that is in was left.
    pub fn keep(&mut self) {
        self.auto_refresh = true;
        self.steps.iter_mut().for_each(|step| step.auto_refresh = true);
    }
}

/// Why a call on a lock object did not begin.
pub(crate) enum Refused {
    /// Another call on it is under way, or it is held: later it may be otherwise.
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

/// What a lock's state looks like from outside.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LockState {
    Idle,
    /// An acquire or an unlock is under way.
    Pending,
    Held,
    /// Held, but past its deadline: others may take it over at any moment.
    Overdue,
    Lost,
    /// Held by the process that this one was forked from.
    Forked,
}

impl Lock {
    pub(crate) fn new(client: Client, key: Key, owner: Option<Owner>, defaults: LockOptions) -> Lock {
        Lock(Arc::new(Shared { key, client, defaults, owner, live: PerProcess::new() }))
    }

    pub fn key(&self) -> &Key {
        &self.0.key
    }

    /// The text that users of a reentrant lock share; `None` for a plain lock.
    pub fn owner_token(&self) -> Option<&str> {
        self.0.owner_token().map(|owner| &*owner.0)
    }

    /// Tries once. `false`: somebody else holds it. Bounded by `op_timeout`.
    pub fn try_lock(&self, options: LockOptions) -> Answer<bool, Error> {
        granted(acquire::acquire(&self.0, options, acquire::Patience::OneTry))
    }

    /// Waits for a grant, `timeout` at most. `false`: not granted in time.
    pub fn lock(&self, options: LockOptions) -> Answer<bool, Error> {
        granted(self.ask(options))
    }

    /// As `lock`, and says which hold was granted.
    pub(crate) fn ask(&self, options: LockOptions) -> Answer<Option<HoldId>, Error> {
        acquire::acquire(&self.0, options, acquire::Patience::Timeout)
    }

    /// Gives the hold back. [`ErrorKind::Lost`] when it was not ours any more (R6, R7).
    pub fn unlock(&self) -> Answer<(), Error> {
        release::unlock(&self.0)
    }

    /// Sets a new expiry on the hold; with no `expire`, the last one again (R8).
    pub fn refresh(&self, expire: Option<Duration>) -> Answer<(), Error> {
        refresh::refresh(&self.0, expire)
    }

    pub fn state(&self) -> LockState {
        let state = self.0.live().state.lock();
        match (state.phase, &state.hold) {
            (Phase::Lost(_), _) => LockState::Lost,
            (Phase::Forked, _) => LockState::Forked,
            (_, Some(hold)) if hold.deadline.has_passed() => LockState::Overdue,
            (_, Some(_)) => LockState::Held,
            (Phase::Acquiring | Phase::Releasing, None) => LockState::Pending,
            (Phase::Resting, None) => LockState::Idle,
        }
    }

    /// How long the hold is certainly ours still; zero when it is overdue.
    pub fn remaining(&self) -> Result<Duration, Error> {
        self.0.with_hold(|hold| Ok(hold.deadline.since(Boottime::now())))
    }

    /// The instance token of the hold: what the record carries. For whoever holds it only.
    pub fn instance_token(&self) -> Result<String, Error> {
        self.0.with_hold(|hold| match (&hold.token, self.0.owner_token()) {
            (Some(token), _) => Ok(token.to_string()),
            (None, Some(owner)) => Ok(owner.0.to_string()),
            (None, None) => Err(Error::new(ErrorKind::Internal, "a plain hold without a token")),
        })
    }

    /// A descriptor that is readable while the hold is overdue or lost. It stays the library's, and
    /// is open as long as the lock lives in this process.
    pub fn lost_fd(&self) -> Result<RawFd, Error> {
        let live = self.0.live();
        let mut state = live.state.lock();
        // Anew also where the program has closed the former one.
        if state.signal.as_ref().is_none_or(|signal| signal.descriptor.number().is_none()) {
            let mut signal = Signal::new()?;
            signal.set(state.alarming());
            state.signal = Some(signal);
        }
        let descriptor = state.signal.as_ref().and_then(|signal| signal.descriptor.number()).unwrap_or(-1);
        // A plain lease that nobody renews is looked after as well, from now on.
        let keeper = &self.0.client.open_store()?.keeper;
        keeper.start()?;
        keeper.look_after(&self.0, &mut state);
        Ok(descriptor)
    }
}

impl Lock {
    /// Gives up this object without unlocking: what it holds is abandoned, and a grant that is still
    /// to come is given back (R15). Does not wait.
    pub fn abandon(&self) {
        if let Some(live) = self.0.live.current() {
            live.state.lock().freed = true;
            self.0.abandon("its lock");
            if let Some(sharing) = live.sharing.get() {
                // Whoever queues for this very object queues in vain.
                sharing.idle.notify_one();
            }
        }
    }

    /// To be called with a grant that nobody took note of: gives it back, in the background (R14), if
    /// it still is that hold.
    pub(crate) fn give_back_unseen(&self) -> impl FnOnce(HoldId) + Send + Sync + 'static {
        let shared = Arc::clone(&self.0);
        move |hold| release::release_once_in_background(&shared, hold)
    }

    /// Has the hold renewed by itself from now on (R12), as `auto_refresh` does from the grant on. Does
    /// not wait. Fails where there is no hold, when the client is closed, and when the system gives no
    /// threads.
    pub fn keep(&self) -> Result<(), Error> {
        self.0.client.check_open()?;
        let keeper = &self.0.client.open_store()?.keeper;
        keeper.start()?;
        self.0.with_hold(|_| Ok(()))?;
        let mut state = self.0.live().state.lock();
        // None: it ended just now, and nothing is to be renewed.
        if let Some(hold) = &mut state.hold {
            hold.keep();
        }
        keeper.look_after(&self.0, &mut state);
        drop(state);
        self.0.renewed_if_open()
    }

    /// The fence of the hold. One that the grant did not bring is asked for now, and the hold is
    /// proven by a refresh before it is handed out (R18). May wait, twice `op_timeout` at most.
    pub fn fence(&self) -> Answer<u64, Error> {
        refresh::fence(&self.0)
    }

    /// Wall-clock time of the lease's end as this process knows it, in milliseconds since 1970.
    pub fn expires_at_ms(&self) -> Result<u64, Error> {
        let open = self.0.client.open_store()?;
        self.0.with_hold(|hold| {
            let end = hold.deadline + open.store.margin(hold.expire);
            let now = Boottime::now();
            let wall = crate::clock::wall_millis();
            Ok(match end > now {
                true => wall.saturating_add(end.since(now).as_millis() as u64),
                false => wall.saturating_sub(now.since(end).as_millis() as u64),
            })
        })
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        self.abandon();
    }
}

impl Shared {
    /// What a reentrant lock presents.
    pub fn owner_token(&self) -> Option<&OwnerToken> {
        self.owner.as_ref().map(Owner::token)
    }

    pub fn live(&self) -> &Live {
        self.live.get_or_init(|left| {
            let parents = left.is_some_and(|left| left.occupied.load(Ordering::Acquire));
            Live {
                generation: process::generation(),
                state: Mutex::new(State {
                    phase: if parents { Phase::Forked } else { Phase::Resting },
                    hold: None,
                    freed: false,
                    signal: None,
                    last_step: 0,
                    settled_series: Vec::new(),
                    lost_steps: 0,
                }),
                occupied: AtomicBool::new(parents),
                sharing: OnceLock::new(),
            }
        })
    }

    /// Stops looking after a hold because `what` was freed: its lease runs out. What is being unlocked
    /// is no hold any more.
    pub fn abandon(&self, what: &str) {
        let Some(live) = self.live.current() else { return };
        let mut state = live.state.lock();
        if let Some(hold) = self.end_hold(&mut state) {
            live.occupied.store(false, Ordering::Release);
            drop(state);
            tracing::warn!(
                "{} was held when {what} was freed: it is not renewed any more, and its lease runs out in {:?}",
                self.key.quoted(),
                hold.deadline.since(Boottime::now())
            );
        }
    }

    /// The options of a call: the call's own, then the lock's, then the client's.
    pub fn effective(&self, call: LockOptions) -> Result<LockOptions, Error> {
        call.check()?;
        let client = self.client.options();
        Ok(call.or(self.defaults).or(LockOptions {
            expire: Some(client.expire),
            timeout: Some(client.timeout),
            auto_refresh: Some(false),
            if_held: Some(IfHeld::Error),
            fence: Some(false),
        }))
    }

    pub fn sharing(&self) -> &Sharing {
        self.live().sharing.get_or_init(Box::default)
    }

    /// What a renewal of the hold must show.
    pub fn proof(&self, hold: &Hold) -> Proof {
        match (&hold.token, self.owner_token()) {
            (Some(token), _) => Proof::Plain(*token),
            (None, Some(owner)) => Proof::Reentrant { owner: owner.clone(), hold: hold.id },
            (None, None) => unreachable!("a plain hold has a token"),
        }
    }

    /// Begins an acquire: nobody else's call on this object is under way, and, if it is a plain lock,
    /// it is not held.
    pub fn begin_acquire(self: &Arc<Self>) -> Result<Acquiring, Refused> {
        self.client.check_open()?;
        let mut state = self.live().state.lock();
        if state.freed {
            return Err(Refused::Final(Error::new(
                ErrorKind::Cancelled,
                format!("lock instance {} was freed while the call waited", self.key.quoted()),
            )));
        }
        let why = match state.phase {
            // The parent's hold is no hold of ours, and asking for one of our own is an answer to it.
            Phase::Resting | Phase::Forked if state.hold.is_none() || self.owner.is_some() => {
                state.phase = Phase::Acquiring;
                return Ok(Acquiring {
                    shared: Arc::clone(self),
                    done: false,
                    generation: process::generation_of_call(),
                });
            }
            Phase::Lost(_) if self.owner.is_some() => {
                // Entering again is a use of the hold: it is told now, since nobody else may come who is.
                self.rest(self.live(), &mut state, Phase::Resting);
                return Err(Refused::Final(lost(&self.key)));
            }
            Phase::Lost(_) => "already locked: its hold was lost, which unlock or refresh will tell",
            Phase::Releasing => "is being unlocked",
            Phase::Acquiring | Phase::Resting | Phase::Forked => "already locked",
        };
        Err(Refused::Busy(Error::invalid_op(format!("lock instance {} {why}", self.key.quoted()))))
    }

    /// Waits for this call's turn on the object and until `begin` can.
    pub async fn turn<T>(
        self: &Arc<Self>,
        mut turn: Place,
        begin: impl Fn(&Arc<Self>) -> Result<T, Refused>,
    ) -> Result<T, Error> {
        turn.front().await;
        loop {
            // Told before it is asked: an object that becomes idle in between is not missed.
            let idle = self.sharing().idle.notified();
            match begin(self) {
                Ok(begun) => return Ok(begun),
                Err(Refused::Final(error)) => return Err(error),
                Err(Refused::Busy(_)) => idle.await,
            }
        }
    }

    /// Takes the hold out, wherever it is noted.
    pub fn end_hold(&self, state: &mut State) -> Option<Hold> {
        let mut hold = state.hold.take();
        if let Some(at) = hold.as_mut().and_then(|hold| hold.agenda.take())
            && let Ok(open) = self.client.open_store()
        {
            open.keeper.forget(at);
        }
        state.update_signal();
        hold
    }

    /// As `end_hold`, by the store's word that it is lost.
    pub fn lose_hold(&self, state: &mut State) -> Option<Hold> {
        let hold = self.end_hold(state);
        state.lost_steps += hold.as_ref().map_or(0, |hold| hold.steps.len());
        hold
    }

    /// Has the keeper attend to the hold when something is due: a renewal, or telling that it is overdue.
    pub fn look_after(self: &Arc<Self>, state: &mut State) {
        let kept = state.signal.is_some() || state.hold.as_ref().is_some_and(|hold| hold.auto_refresh);
        if kept && let Ok(open) = self.client.open_store() {
            open.keeper.look_after(self, state);
        }
    }

    /// Nothing is under way any more.
    pub fn rest(&self, live: &Live, state: &mut State, phase: Phase) {
        state.phase = phase;
        state.update_signal();
        live.occupied.store(state.hold.is_some() || matches!(phase, Phase::Lost(_)), Ordering::Release);
        if let Some(sharing) = live.sharing.get() {
            sharing.idle.notify_one();
        }
    }

    /// The store's word, heard by the keeper: the hold is lost, and whoever relies on it is told.
    pub fn mark_lost(self: &Arc<Self>, id: HoldId) {
        let live = self.live();
        let mut state = live.state.lock();
        if state.phase != Phase::Resting || state.hold.as_ref().is_none_or(|hold| hold.id != id) {
            // An unlock is under way and hears it from the store itself, or the hold is gone.
            return;
        }
        let hold = self.lose_hold(&mut state);
        self.rest(live, &mut state, Phase::Lost(id));
        drop(state);
        tracing::warn!("the lock {} was lost", self.key.quoted());
        release::clean_up_after(hold);
    }

    /// To be called once a hold is noted for renewal: its client may have been closed just before, and
    /// have looked in vain for what it is to give back. Then it is given back here, and not renewed.
    pub fn renewed_if_open(self: &Arc<Self>) -> Result<(), Error> {
        self.client.check_open().inspect_err(|_| release::release_in_background(self))
    }

    /// Gives an auto-refreshed hold back because its client closes.
    pub fn give_back_at_close(self: &Arc<Self>) {
        release::release_in_background(self);
    }

    pub fn with_hold<T>(&self, look: impl FnOnce(&Hold) -> Result<T, Error>) -> Result<T, Error> {
        let state = self.live().state.lock();
        match (&state.hold, state.phase) {
            (Some(hold), _) => look(hold),
            (None, Phase::Lost(_)) => Err(lost(&self.key)),
            (None, Phase::Forked) => Err(forked(&self.key)),
            (None, _) => Err(not_locked(&self.key)),
        }
    }
}

impl State {
    /// A series of reentrant steps: a way in, and the way out of it, by one name in the record. So what is
    /// undone late is told from what was left.
    pub fn next_series(&mut self) -> ObjectId {
        self.settled_series.pop().unwrap_or_else(ObjectId::random)
    }

    /// Every step of a series was answered, and nothing more comes of it: the next one may go on with it, and
    /// the record has one name less to keep.
    pub fn settled(&mut self, series: ObjectId) {
        self.settled_series.push(series);
    }

    /// Whether the hold is overdue or lost.
    pub fn alarming(&self) -> bool {
        matches!(self.phase, Phase::Lost(_)) || self.hold.as_ref().is_some_and(|hold| hold.deadline.has_passed())
    }

    pub fn update_signal(&mut self) {
        let alarming = self.alarming();
        if let Some(signal) = &mut self.signal {
            signal.set(alarming);
        }
    }

    /// Whether somebody asked for the descriptor.
    pub fn signals(&self) -> bool {
        self.signal.is_some()
    }
}

/// An acquire under way; dropped, the lock is what it was before.
pub(crate) struct Acquiring {
    shared: Arc<Shared>,
    done: bool,
    generation: u64,
}

impl Acquiring {
    pub fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }

    /// Whether a signal's handler has forked meanwhile, and this is the child: the grant is the parent's.
    pub fn is_the_parents(&self) -> bool {
        self.generation != process::generation()
    }

    /// The grant is ours: the lock is held from here on. Answers the hold back if the lock was freed
    /// meanwhile, or its client closed; the acquire is still under way then.
    pub fn granted(&mut self, hold: Hold) -> Option<Hold> {
        let live = self.shared.live();
        let mut state = live.state.lock();
        if state.freed || self.shared.client.is_closed() {
            return Some(hold);
        }
        self.done = true;
        state.hold = Some(match state.hold.take() {
            None => hold,
            Some(before) => before.entered_again(hold),
        });
        self.shared.rest(live, &mut state, Phase::Resting);
        self.shared.look_after(&mut state);
        None
    }
}

impl Drop for Acquiring {
    fn drop(&mut self) {
        if !self.done {
            let live = self.shared.live();
            self.shared.rest(live, &mut live.state.lock(), Phase::Resting);
        }
    }
}

/// A descriptor that is readable or not, as it is set.
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

fn granted(answer: Answer<Option<HoldId>, Error>) -> Answer<bool, Error> {
    match answer {
        Answer::Now(hold) => Answer::Now(hold.map(|hold| hold.is_some())),
        Answer::Later(hold) => Answer::later(async move { Ok(hold.await?.is_some()) }),
    }
}

/// A new descriptor for the program, not readable.
pub(crate) fn signal_descriptor() -> Result<descriptor::Signal, Error> {
    descriptor::Signal::new()
        .map_err(|error| Error::new(ErrorKind::Resources, format!("no descriptor could be made: {error}")))
}

/// Who a reentrant lock is (R17).
pub(crate) enum Owner {
    Given(OwnerToken),
    /// Another one in each process: a forked child is not its parent, and must not enter what it holds.
    Random(PerProcess<OwnerToken>),
}

impl Owner {
    fn token(&self) -> &OwnerToken {
        match self {
            Owner::Given(token) => token,
            Owner::Random(token) => token.get_or_init(|_| OwnerToken(HoldId::drawn_now().to_string().into())),
        }
    }
}

/// The owner that was named, or a random one.
pub(crate) fn owner(given: Option<&str>) -> Result<Owner, Error> {
    match given {
        None => Ok(Owner::Random(PerProcess::new())),
        Some("") => Err(Error::invalid_argument("owner token is empty: it has 1 to 255 bytes of UTF-8")),
        Some(text) if text.len() > OwnerToken::MAX_BYTES => Err(Error::invalid_argument(format!(
            "owner token has {} bytes: it has 1 to {} bytes of UTF-8",
            text.len(),
            OwnerToken::MAX_BYTES
        ))),
        Some(text) => Ok(Owner::Given(OwnerToken(text.into()))),
    }
}

pub(crate) fn not_locked(key: &Key) -> Error {
    Error::invalid_op(format!("lock instance {} not locked", key.quoted()))
}

pub(crate) fn lost(key: &Key) -> Error {
    Error::new(ErrorKind::Lost, format!("lost lock on {}", key.quoted()))
}

pub(crate) fn forked(key: &Key) -> Error {
    Error::new(
        ErrorKind::Forked,
        format!("the lock on {} is held by the process that this one was forked from", key.quoted()),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::options::ClientOptions;
    use crate::runtime::wait;

    /// A record keeps a name for each series: as many as the deepest nesting, however often it was left.
    #[test]
    fn series_are_used_again() {
        let client = wait(Client::open(Some("memory:"), ClientOptions::default())).unwrap();
        let lock = client.reentrant_lock(Key::new(b"k").unwrap(), None, LockOptions::default()).unwrap();
        assert!(wait(lock.try_lock(LockOptions::default())).unwrap());
        for _ in 0..10 {
            assert!(wait(lock.try_lock(LockOptions::default())).unwrap());
            wait(lock.unlock()).unwrap();
        }
        wait(lock.unlock()).unwrap();
        assert_eq!(lock.0.live().state.lock().settled_series.len(), 2);
    }
}
