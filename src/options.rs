//! Options of clients and locks, and their bounds.

use std::time::Duration;

use crate::clock::Boottime;
use crate::error::Error;

/// Default length of a lease, as in NoBrainer (`lock_options`).
pub const DEFAULT_EXPIRE: Duration = Duration::from_secs(60);
/// Default time to wait for a grant, as in NoBrainer (`lock_options`).
pub const DEFAULT_TIMEOUT: Timeout = Timeout::After(Duration::from_secs(10));
/// Default limit of one request to the store (R7).
pub const DEFAULT_OP_TIMEOUT: Duration = Duration::from_secs(5);
/// Default limit of opening a store.
pub const DEFAULT_CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// The shortest lease (R21).
pub const MIN_EXPIRE: Duration = Duration::from_millis(1);
/// The longest lease (R21).
pub const MAX_EXPIRE: Duration = Duration::from_secs(366 * 86_400);

/// How long to wait for a grant.
///
/// ```
/// use nblock::{Client, ClientOptions, Key, LockOptions, Timeout, wait};
/// use std::time::Duration;
///
/// # fn main() -> Result<(), nblock::Error> {
/// let client = wait(Client::open(Some("memory:"), ClientOptions::default()))?;
/// let lock = client.lock(Key::new(b"jobs:report")?, LockOptions::default())?;
/// let patient = LockOptions { timeout: Some(Timeout::After(Duration::from_secs(30))), ..Default::default() };
/// assert!(wait(lock.lock(patient))?);
///
/// // Another object for the same key gets no grant.
/// let other = client.lock(Key::new(b"jobs:report")?, LockOptions::default())?;
/// let at_once = LockOptions { timeout: Some(Timeout::NoWait), ..Default::default() };
/// assert!(!wait(other.lock(at_once))?);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Timeout {
    /// One try.
    NoWait,
    /// Up to this length of time.
    After(Duration),
    /// Until it is granted.
    Forever,
}

impl Timeout {
    /// The time at which waiting ends, counted from `start`.
    pub fn from(self, start: Boottime) -> Boottime {
        match self {
            Timeout::NoWait => start,
            Timeout::After(length) => start + length,
            Timeout::Forever => Boottime::NEVER,
        }
    }
}

/// What an acquire does if this lock object is not idle (R5).
///
/// ```
/// use nblock::{Client, ClientOptions, ErrorKind, IfHeld, Key, LockOptions, wait};
///
/// # fn main() -> Result<(), nblock::Error> {
/// let client = wait(Client::open(Some("memory:"), ClientOptions::default()))?;
/// let lock = client.lock(Key::new(b"jobs:report")?, LockOptions::default())?;
/// assert!(wait(lock.try_lock(LockOptions::default()))?);
///
/// let error = wait(lock.lock(LockOptions::default())).unwrap_err();
/// assert_eq!(error.kind(), ErrorKind::InvalidOp); // already locked
///
/// // For an object that threads share: the second call waits until the first one has unlocked.
/// let shared = client.lock(
///     Key::new(b"jobs:shared")?,
///     LockOptions { if_held: Some(IfHeld::Wait), ..Default::default() },
/// )?;
/// let work = || -> Result<(), nblock::Error> {
///     assert!(wait(shared.lock(LockOptions::default()))?);
///     wait(shared.unlock())
/// };
/// std::thread::scope(|scope| [scope.spawn(work), scope.spawn(work)].map(|thread| thread.join().unwrap().unwrap()));
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum IfHeld {
    /// Fail with "already locked".
    #[default]
    Error,
    /// Queue. For lock objects that are shared by threads.
    Wait,
}

/// Options of a lock, or of one call on it. What is `None` is taken from the lock, then from the client.
///
/// ```
/// use nblock::{LockOptions, Timeout};
/// use std::time::Duration;
///
/// let once_a_day = LockOptions {
///     expire: Some(Duration::from_secs(86_400)),
///     timeout: Some(Timeout::NoWait),
///     ..Default::default()
/// };
/// assert!(once_a_day.check().is_ok());
/// assert!(LockOptions { expire: Some(Duration::ZERO), ..once_a_day }.check().is_err());
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LockOptions {
    /// Length of the lease: [`MIN_EXPIRE`] to [`MAX_EXPIRE`].
    pub expire: Option<Duration>,
    /// How long to wait for a grant.
    pub timeout: Option<Timeout>,
    /// Whether the library renews the hold at a third of the lease, until the unlock (R12). Off by default.
    pub auto_refresh: Option<bool>,
    /// What an acquire does if this object is not idle.
    pub if_held: Option<IfHeld>,
    /// Ask for a fence with the grant. Stores whose grants always have one ignore this.
    pub fence: Option<bool>,
}

impl LockOptions {
    /// These options; `defaults` for those that are `None`.
    #[inline]
    pub fn or(self, defaults: LockOptions) -> LockOptions {
        LockOptions {
            expire: self.expire.or(defaults.expire),
            timeout: self.timeout.or(defaults.timeout),
            auto_refresh: self.auto_refresh.or(defaults.auto_refresh),
            if_held: self.if_held.or(defaults.if_held),
            fence: self.fence.or(defaults.fence),
        }
    }

    /// Checks the bounds. Every function that takes options does this itself.
    #[inline]
    pub fn check(&self) -> Result<(), Error> {
        match self.expire {
            Some(expire) if !(MIN_EXPIRE..=MAX_EXPIRE).contains(&expire) => Err(bad_expire(expire)),
            _ => Ok(()),
        }
    }
}

#[cold]
fn bad_expire(expire: Duration) -> Error {
    Error::invalid_argument(format!("expire must be 1 ms to 366 days (got {expire:?})"))
}

/// Options of a client.
///
/// ```
/// use nblock::{ClientOptions, Timeout};
/// use std::time::Duration;
///
/// let options = ClientOptions { op_timeout: Duration::from_secs(1), app: "billing".into(), ..Default::default() };
/// assert_eq!((options.expire, options.timeout), (Duration::from_secs(60), Timeout::After(Duration::from_secs(10))));
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClientOptions {
    /// Default length of a lease.
    pub expire: Duration,
    /// Default time to wait for a grant.
    pub timeout: Timeout,
    /// How long one request to the store may take: more than zero, at most 1 hour.
    pub op_timeout: Duration,
    /// How long opening the store may take: more than zero, at most 1 hour.
    pub connect_timeout: Duration,
    /// Shown in lists of locks; the program's name when empty.
    pub app: String,
}

impl Default for ClientOptions {
    fn default() -> ClientOptions {
        ClientOptions {
            expire: DEFAULT_EXPIRE,
            timeout: DEFAULT_TIMEOUT,
            op_timeout: DEFAULT_OP_TIMEOUT,
            connect_timeout: DEFAULT_CONNECT_TIMEOUT,
            app: String::new(),
        }
    }
}

impl ClientOptions {
    /// The longest app name, in bytes.
    pub const MAX_APP_BYTES: usize = 255;

    /// Checks the bounds. Opening a client does this itself.
    pub fn check(&self) -> Result<(), Error> {
        LockOptions { expire: Some(self.expire), ..LockOptions::default() }.check()?;
        for (name, value) in [("op_timeout", self.op_timeout), ("connect_timeout", self.connect_timeout)] {
            if value.is_zero() || value > Duration::from_secs(3600) {
                return Err(Error::invalid_argument(format!("{name} must be 1 ms to 1 hour (got {value:?})")));
            }
        }
        if self.app.len() > ClientOptions::MAX_APP_BYTES {
            return Err(Error::invalid_argument(format!(
                "app must have at most {} bytes (got {})",
                ClientOptions::MAX_APP_BYTES,
                self.app.len()
            )));
        }
        Ok(())
    }
}
