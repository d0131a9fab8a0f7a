//! The lock, on any store: acquiring, waiting, renewing, releasing, cleaning up.
//!
//! `crate::protocol` decides what to request and what a reply means; this module sends requests, waits, and keeps the
//! state. Its files depend on each other in one direction: `queue`, `schedule`, `session`, `cleanup` ← `state` ←
//! `release` ← `renew` ← `acquire` ← `wait` ← this one.

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

/// A lock object for one key. Dropping it while it is held abandons the hold: its lease runs out (R15).
///
/// It may be used from many threads. A result is returned at once, or as a future. Dropping the future of an acquire
/// cancels the acquire (R14); an unlock or refresh continues.
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

    /// The owner token, which all users of a reentrant hold share. `None` for a plain lock.
    pub fn owner_token(&self) -> Option<&str> {
        self.0.owner_token().map(|owner| &*owner.0)
    }

    /// Tries once. `false`: the lock has another holder. Waits for the store's reply, at most `op_timeout`.
    #[inline(always)]
    pub fn try_lock(&self, options: LockOptions) -> Answer<bool, Error> {
        granted(wait::acquire(&self.0, options, WaitMode::OneTry))
    }

    /// Waits for a grant, at most `timeout`. `false`: not granted in time.
    pub fn lock(&self, options: LockOptions) -> Answer<bool, Error> {
        granted(self.ask(options))
    }

    /// As `lock`; returns which hold was granted.
    pub(crate) fn ask(&self, options: LockOptions) -> Answer<Option<HoldId>, Error> {
        wait::acquire(&self.0, options, WaitMode::Timeout)
    }

    /// Releases the hold. [`ErrorKind::Lost`] if it was lost before (R6, R7).
    #[inline(always)]
    pub fn unlock(&self) -> Answer<(), Error> {
        release::unlock(&self.0)
    }

    /// Renews the lease of the hold, with a new length or, without `expire`, with the last one (R8).
    pub fn refresh(&self, expire: Option<Duration>) -> Answer<(), Error> {
        renew::refresh(&self.0, expire)
    }

    /// The state of this object, as far as this process knows it. Sends nothing to the store, and does not wait.
    pub fn state(&self) -> LockState {
        self.0.lock_state()
    }

    /// How much longer the hold is certainly ours; zero if it is overdue.
    pub fn remaining(&self) -> Result<Duration, Error> {
        self.0.with_hold(|hold| Ok(hold.deadline.left()))
    }

    /// The instance token of the hold, which is also in the record. It proves the hold: keep it secret.
    pub fn instance_token(&self) -> Result<String, Error> {
        self.0.with_hold(|hold| match (&hold.token, self.0.owner_token()) {
            (Some(token), _) => Ok(token.to_string()),
            (None, Some(owner)) => Ok(owner.0.to_string()),
            (None, None) => Err(Error::new(ErrorKind::Internal, "a plain hold without a token")),
        })
    }

    /// A descriptor that is readable while the hold is overdue or lost. It belongs to the library, and stays open until
    /// the lock object is dropped in this process.
    pub fn lost_fd(&self) -> Result<RawFd, Error> {
        self.0.lost_fd()
    }

    /// Gives up this object without unlocking: its hold is abandoned, and a later grant to it is released (R15). Does
    /// not wait.
    pub fn abandon(&self) {
        self.0.free();
    }

    /// Returns what to call with a grant that was not reported to the caller: it releases that hold in the background
    /// (R14), unless the lock has another hold by then.
    pub(crate) fn give_back_unseen(&self) -> impl FnOnce(HoldId) + Send + Sync + 'static {
        let core = Arc::clone(&self.0);
        move |hold| release::release_unreported(&core, hold)
    }

    /// Turns auto-refresh on for the present hold (R12). Does not wait. Fails if there is no hold, if the client is
    /// closed, or if no thread can be started.
    pub fn enable_auto_refresh(&self) -> Result<(), Error> {
        self.0.session.check_open()?;
        self.0.open_store()?.schedule.start()?;
        self.0.with_hold(|_| Ok(()))?;
        self.0.enable_auto_refresh();
        renew::check_still_open(&self.0)
    }

    /// The fence of the hold. If the grant did not come with one, it is requested now, and the hold is proven by a
    /// refresh before the fence is returned (R18). May wait, at most twice `op_timeout`.
    pub fn fence(&self) -> Answer<u64, Error> {
        renew::fence(&self.0)
    }

    /// When the lease ends, as far as this process knows, in milliseconds since 1970.
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
