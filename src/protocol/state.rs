//! The part of a record on which decisions are made.

use std::fmt;
use std::ops::Add;
use std::time::Duration;

use crate::clock::{self, Boottime};
use crate::token::{HoldId, ObjectId, OwnerToken, Token};

/// A time on the store's clock, in nanoseconds. Its zero depends on the store.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct StoreTime(pub u64);

impl StoreTime {
    /// Later than every other time: the end of a lease that does not end.
    pub const NEVER: StoreTime = StoreTime(u64::MAX);

    /// How long after `earlier` this is; zero if it is not later.
    pub fn since(self, earlier: StoreTime) -> Duration {
        Duration::from_nanos(self.0.saturating_sub(earlier.0))
    }
}

/// On stores whose clock is this machine's.
impl From<Boottime> for StoreTime {
    fn from(moment: Boottime) -> StoreTime {
        StoreTime(moment.as_nanos())
    }
}

impl Add<Duration> for StoreTime {
    type Output = StoreTime;

    fn add(self, length: Duration) -> StoreTime {
        StoreTime(self.0.saturating_add(clock::nanos(length)))
    }
}

/// What conditions compare and writes change. The rest of a record (owner, fence, time of the grant) is for people and
/// for protected resources; no decision depends on it.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct State {
    pub holder: Holder,
    /// When the lease ends. It is over if this is *before* the store's present time.
    pub ends_at: StoreTime,
}

/// The holder, as the record describes it.
#[derive(Clone, PartialEq, Eq, Hash)]
pub enum Holder {
    /// One plain hold of nblock: the token of the attempt that was granted, and the number of the last write.
    Plain { token: Token, write_seq: u64 },
    /// The users of one owner token.
    Reentrant {
        owner: OwnerToken,
        /// The name of the hold. A hold that was created by another library has none until an object of nblock joins
        /// it.
        hold: Option<HoldId>,
        /// How often it is locked, by all of its users. The record is deleted when this is 0. What it has beyond the
        /// entries was counted by other libraries.
        count: u32,
        entries: Vec<Entry>,
    },
    /// A format that this version does not know, of another library or a newer version: held until its lease is over.
    /// The text identifies the state, and is not interpreted.
    Foreign { token: Box<str> },
}

/// The steps of one lock object in a reentrant hold.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Entry {
    pub object: ObjectId,
    pub count: u32,
    /// The number of the object's write that set this count.
    pub write_seq: u64,
}

impl State {
    /// Whether the lease is over.
    pub fn is_over(&self, now: StoreTime) -> bool {
        self.ends_at < now
    }
}

impl Holder {
    /// The token of a plain hold.
    pub fn token(&self) -> Option<Token> {
        match self {
            Holder::Plain { token, .. } => Some(*token),
            Holder::Reentrant { .. } | Holder::Foreign { .. } => None,
        }
    }

    /// The entry of an object.
    pub fn entry(&self, object: ObjectId) -> Option<Entry> {
        match self {
            Holder::Reentrant { entries, .. } => entries.iter().find(|entry| entry.object == object).copied(),
            Holder::Plain { .. } | Holder::Foreign { .. } => None,
        }
    }
}

/// Without the tokens, which prove a hold and must not get into a log.
impl fmt::Debug for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Holder::Plain { write_seq, .. } => write!(f, "Plain {{ write_seq: {write_seq} }}"),
            Holder::Reentrant { count, entries, .. } => {
                write!(f, "Reentrant {{ count: {count}, entries: {} }}", entries.len())
            }
            Holder::Foreign { .. } => f.write_str("Foreign"),
        }
    }
}
