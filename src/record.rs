//! The stored row of one key, as inspection shows it.

use std::time::Duration;

use crate::clock;
use crate::key::Key;
use crate::protocol::{Holder, State, StoreTime};

/// A record as it was found (R19).
#[derive(Clone, Debug)]
pub struct Record {
    pub key: Key,
    /// How long the lease still runs by the store's clock, or how long ago it ran out.
    pub lease: Lease,
    /// Wall-clock time of the lease's end, in milliseconds since 1970: for people to read.
    pub expires_at_ms: u64,
    /// Who holds it. NoBrainer's records don't say.
    pub owner: Option<Owner>,
    pub fence: Option<u64>,
    /// What decisions are made on, and what a conditional break compares. Its tokens are never shown (R19).
    pub state: State,
}

impl Record {
    /// How often a reentrant lock is locked; `None` for a plain one.
    pub fn lock_count(&self) -> Option<u32> {
        match self.state.holder {
            Holder::Reentrant { count, .. } => Some(count),
            Holder::Plain { .. } | Holder::Foreign { .. } => None,
        }
    }

    /// Whether both are of one hold, renewed or entered again between the two or not.
    pub fn is_same_hold(&self, other: &Record) -> bool {
        match (&self.state.holder, &other.state.holder) {
            (Holder::Plain { token, .. }, Holder::Plain { token: others, .. }) => token == others,
            (Holder::Reentrant { owner, hold, .. }, Holder::Reentrant { owner: others, hold: others_hold, .. }) => {
                owner == others && hold == others_hold
            }
            (Holder::Foreign { token }, Holder::Foreign { token: others }) => token == others,
            _ => false,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lease {
    Runs(Duration),
    RanOut(Duration),
    /// Another library made it without an end.
    Endless,
}

impl Lease {
    /// From the end of the lease and the store's now.
    pub fn at(ends_at: StoreTime, now: StoreTime) -> Lease {
        // A lease is over when its end is *before* now (R2).
        match ends_at.0.checked_sub(now.0) {
            _ if ends_at == StoreTime::NEVER => Lease::Endless,
            Some(left) => Lease::Runs(Duration::from_nanos(left)),
            None => Lease::RanOut(Duration::from_nanos(now.0 - ends_at.0)),
        }
    }

    /// The wall-clock time of the lease's end, in milliseconds since 1970.
    pub fn wall_millis(self) -> u64 {
        let now = clock::wall_millis();
        match self {
            Lease::Runs(left) => now.saturating_add(left.as_millis() as u64),
            Lease::RanOut(ago) => now.saturating_sub(ago.as_millis() as u64),
            Lease::Endless => u64::MAX,
        }
    }

    pub fn expired(self) -> bool {
        matches!(self, Lease::RanOut(_))
    }

    /// What is left of it: zero when it ran out, [`Duration::MAX`] when it has no end.
    pub fn remaining(self) -> Duration {
        match self {
            Lease::Endless => Duration::MAX,
            Lease::Runs(left) => left,
            Lease::RanOut(_) => Duration::ZERO,
        }
    }
}

/// Who asks: what a record says of its owner, but for the moment of the grant.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Identity {
    pub host: String,
    pub pid: u32,
    pub boot_id: String,
    pub app: String,
}

impl Identity {
    /// The owner of a hold that was granted then.
    pub fn owner_since(&self, acquired_at_ms: u64) -> Owner {
        Owner {
            host: self.host.clone(),
            pid: self.pid,
            boot_id: self.boot_id.clone(),
            app: self.app.clone(),
            acquired_at_ms,
        }
    }
}

/// Who holds a lock. A host name is not unique, so the boot id stands beside it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Owner {
    pub host: String,
    pub pid: u32,
    pub boot_id: String,
    pub app: String,
    /// Wall-clock time of the grant, in milliseconds since 1970.
    pub acquired_at_ms: u64,
}
