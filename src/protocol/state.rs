//! The part of a record that decisions are made on.

use std::fmt;
use std::ops::Add;
use std::time::Duration;

use crate::clock::{self, Boottime};
use crate::token::{HoldId, ObjectId, OwnerToken, Token};

/// A moment on the store's clock: nanoseconds since whatever that clock counts from.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct StoreTime(pub u64);

impl StoreTime {
    /// After every other moment: the end of a lease that has none.
    pub const NEVER: StoreTime = StoreTime(u64::MAX);

    /// How long after `earlier` this is; zero when it is not after.
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

/// What conditions compare and writes change. The rest of a record (owner, fence, time of the grant) is for
/// people and resources, and no decision looks at it.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct State {
    pub holder: Holder,
    /// When the lease ends. It is over when this is *before* the store's now.
    pub ends_at: StoreTime,
}

/// Who holds a record, by what its fields say.
#[derive(Clone, PartialEq, Eq, Hash)]
pub enum Holder {
    /// One hold of ours: the attempt that was granted, and the number of the last write.
    Plain { token: Token, write_seq: u64 },
    /// The users of one owner token.
    Reentrant {
        owner: OwnerToken,
        /// The name of the hold; a hold that another library made has none until one of ours joins it.
        hold: Option<HoldId>,
        /// How often it is locked by all of its users. This number decides when the record goes; what it has
        /// beyond the entries is counted by another library.
        count: u32,
        entries: Vec<Entry>,
    },
    /// Somebody else's convention, or a newer version's: held until its lease is over. The text identifies
    /// the state, and means nothing else here.
    Foreign { token: Box<str> },
}

/// How often one lock object is in a reentrant hold.
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

    /// What an object's entry says.
    pub fn entry(&self, object: ObjectId) -> Option<Entry> {
        match self {
            Holder::Reentrant { entries, .. } => entries.iter().find(|entry| entry.object == object).copied(),
            Holder::Plain { .. } | Holder::Foreign { .. } => None,
        }
    }
}

/// A token proves a hold: it never gets into a log by accident.
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
