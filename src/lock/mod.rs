//! The lock itself, over any store: waiting, renewing, releasing, cleaning up.
//!
//! What is asked of the store, and what its answers mean, is decided in `crate::protocol`; this module sends,
//! waits and keeps the state. Its files depend on each other in one direction:
//! `queue`, `schedule`, `session`, `cleanup` ← `state` ← `release` ← `renew` ← `acquire` ← `wait` ← this one.

mod acquire;
mod cleanup;
mod deadline;
mod queue;
mod release;
mod renew;
mod schedule;
pub(crate) mod session;
mod state;
mod wait;

use std::os::fd::RawFd;
use std::sync::Arc;
use std::time::Duration;

use self::session::Session;
use self::state::LockCore;
use self::wait::WaitMode;
use crate::clock::Boottime;
use crate::error::{Error, ErrorKind};
use crate::key::Key;
use crate::options::LockOptions;
use crate::store::Answer;
use crate::token::HoldId;

pub use self::state::LockState;
pub(crate) use self::state::{Owner, signal_descriptor};

/// One program's object for one key. Dropping it while it is held abandons the hold (R15).
///
/// Safe to use from many threads. Answers come at once, or as a future that the caller drives;
/// dropping the future of an acquire cancels it (R14), that of an unlock or refresh does not.
///
/// ```
/// use nblock::{Client, ClientOptions, ErrorKind, Key, LockOptions, LockState, wait};
/// use std::time::Duration;
///
/// # fn main() -> Result<(), nblock::Error> {
/// let client = wait(Client::open(Some("memory:"), ClientOptions::default()))?;
/// let lock = client.lock(Key::new(b"jobs:report")?, LockOptions::default())?;
///
/// // A plain lease of 5 s, made longer by hand.
/// assert!(wait(lock.try_lock(LockOptions { expire: Some(Duration::from_secs(5)), ..Default::default() }))?);
/// wait(lock.refresh(Some(Duration::from_secs(30))))?;
/// assert_eq!(lock.state(), LockState::Held);
/// println!("fence {}, {:?} left", wait(lock.fence())?, lock.remaining()?);
///
/// // Another object is another holder, until this one unlocks.
/// let other = client.lock(lock.key().clone(), LockOptions::default())?;
/// assert!(!wait(other.try_lock(LockOptions::default()))?);
/// wait(lock.unlock())?;
/// assert_eq!(wait(lock.unlock()).unwrap_err().kind(), ErrorKind::InvalidOp);
///
/// // A reentrant lock may be locked again by everything that has its owner token.
/// let outer = client.reentrant_lock(lock.key().clone(), Some("request 42"), LockOptions::default())?;
/// let inner = client.reentrant_lock(lock.key().clone(), Some("request 42"), LockOptions::default())?;
/// assert!(wait(outer.lock(LockOptions::default()))? && wait(inner.lock(LockOptions::default()))?);
/// wait(inner.unlock())?;
/// wait(outer.unlock())
/// # }
/// ```
pub struct Lock(Arc<LockCore>);

impl Lock {
    pub(crate) fn new(session: Arc<Session>, key: Key, owner: Option<Owner>, defaults: LockOptions) -> Lock {
        Lock(Arc::new(LockCore::new(session, key, owner, defaults)))
    }

    /// The key that this object locks.
    pub fn key(&self) -> &Key {
        &self.0.key
    }

    /// The text that users of a reentrant lock share; `None` for a plain lock.
    pub fn owner_token(&self) -> Option<&str> {
        self.0.owner_token().map(|owner| &*owner.0)
    }

    /// Tries once. `false`: somebody else holds it. Bounded by `op_timeout`.
    #[inline(always)]
    pub fn try_lock(&self, options: LockOptions) -> Answer<bool, Error> {
        granted(wait::acquire(&self.0, options, WaitMode::OneTry))
    }

    /// Waits for a grant, `timeout` at most. `false`: not granted in time.
    pub fn lock(&self, options: LockOptions) -> Answer<bool, Error> {
        granted(self.ask(options))
    }

    /// As `lock`, and says which hold was granted.
    pub(crate) fn ask(&self, options: LockOptions) -> Answer<Option<HoldId>, Error> {
        wait::acquire(&self.0, options, WaitMode::Timeout)
    }

    /// Gives the hold back. [`ErrorKind::Lost`] when it was not ours any more (R6, R7).
    #[inline(always)]
    pub fn unlock(&self) -> Answer<(), Error> {
        release::unlock(&self.0)
    }

    /// Sets a new expiry on the hold; with no `expire`, the last one again (R8).
    pub fn refresh(&self, expire: Option<Duration>) -> Answer<(), Error> {
        renew::refresh(&self.0, expire)
    }

    /// The state of this object, as far as this process knows it. Does not ask the store, and does not wait.
    pub fn state(&self) -> LockState {
        self.0.lock_state()
    }

    /// How long the hold is certainly ours still; zero when it is overdue.
    pub fn remaining(&self) -> Result<Duration, Error> {
        self.0.with_hold(|hold| Ok(hold.deadline.left()))
    }

    /// The instance token of the hold: what the record carries. It proves the hold: keep it secret.
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
        self.0.lost_fd()
    }

    /// Gives up this object without unlocking: what it holds is abandoned, and a grant that is still
    /// to come is given back (R15). Does not wait.
    pub fn abandon(&self) {
        self.0.free();
    }

    /// To be called with a grant that no caller took note of: gives it back, in the background (R14), if
    /// it still is that hold.
    pub(crate) fn give_back_unseen(&self) -> impl FnOnce(HoldId) + Send + Sync + 'static {
        let core = Arc::clone(&self.0);
        move |hold| release::release_unreported(&core, hold)
    }

    /// Has the hold renewed by itself from now on (R12), as `auto_refresh` does from the grant on. Does
    /// not wait. Fails where there is no hold, when the client is closed, and when the system gives no
    /// threads.
    pub fn enable_auto_refresh(&self) -> Result<(), Error> {
        self.0.session.check_open()?;
        self.0.open_store()?.schedule.start()?;
        self.0.with_hold(|_| Ok(()))?;
        self.0.enable_auto_refresh();
        renew::check_still_open(&self.0)
    }

    /// The fence of the hold. One that the grant did not bring is asked for now, and the hold is
    /// proven by a refresh before it is handed out (R18). May wait, twice `op_timeout` at most.
    pub fn fence(&self) -> Answer<u64, Error> {
        renew::fence(&self.0)
    }

    /// Wall-clock time of the lease's end as this process knows it, in milliseconds since 1970.
    pub fn expires_at_ms(&self) -> Result<u64, Error> {
        let open = self.0.open_store()?;
        self.0.with_hold(|hold| {
            let end = hold.deadline.moment() + open.store.margin(hold.expire);
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

fn granted(answer: Answer<Option<HoldId>, Error>) -> Answer<bool, Error> {
    match answer {
        Answer::Now(hold) => Answer::Now(hold.map(|hold| hold.is_some())),
        Answer::Later(hold) => Answer::later(async move { Ok(hold.await?.is_some()) }),
    }
}
