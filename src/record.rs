//! The stored row of one key, as inspection shows it.

use std::time::Duration;

use ring::digest::{Context, SHA256};

use crate::clock;
use crate::key::Key;

/// A record as it was found (R19).
#[derive(Clone, Debug)]
pub struct Record {
    /// Of a damaged record whose key cannot be read, a text that only stands for it: see [`Key::is_placeholder`].
    pub key: Key,
    /// What is wrong with the record, if it is damaged. Then nothing but its key's hash counts: it is never granted,
    /// renewed or released, and its key stays locked until somebody breaks it as it was seen.
    pub damaged: Option<String>,
    /// How long the lease still runs by the store's clock, or how long ago it ran out.
    pub lease: Lease,
    /// Wall-clock time of the lease's end, in milliseconds since 1970: for people to read.
    pub expires_at_ms: u64,
    /// Who holds it. NoBrainer's records don't say.
    pub owner: Option<Owner>,
    pub fence: Option<u64>,
    pub reentrant: Option<Reentrant>,
    /// What a conditional break compares.
    pub seen: Seen,
}

impl Record {
    /// A short text that identifies this very state of the record: it changes with every renewal,
    /// with every step of a reentrant lock, and with the holder. It is made of all that a conditional
    /// break compares, and shows none of it.
    pub fn version(&self) -> String {
        let mut state = Context::new(&SHA256);
        // With its length, so that no two states give the same bytes.
        state.update(&self.key.hash().0);
        state.update(&(self.seen.token.len() as u64).to_le_bytes());
        state.update(self.seen.token.as_bytes());
        state.update(&self.seen.expires_at.to_le_bytes());
        state.update(&self.seen.n.to_le_bytes());
        if let Some(reentrant) = &self.reentrant {
            state.update(&reentrant.count.to_le_bytes());
            if let Some(hold) = &reentrant.hold {
                state.update(&hold.0);
            }
        }
        state.finish().as_ref()[..VERSION_BYTES].iter().map(|byte| format!("{byte:02x}")).collect()
    }
}

/// Of the hash: enough to tell the states of one key apart, and short enough to be copied by hand.
const VERSION_BYTES: usize = 8;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lease {
    Runs(Duration),
    RanOut(Duration),
}

impl Lease {
    /// From the end of the lease and the store's now, both in nanoseconds of the store's clock.
    pub fn from_nanos(expires_at: u64, now: u64) -> Lease {
        // A lease is over when its end is *before* now (R2).
        match expires_at.checked_sub(now) {
            Some(left) => Lease::Runs(Duration::from_nanos(left)),
            None => Lease::RanOut(Duration::from_nanos(now - expires_at)),
        }
    }

    /// The wall-clock time of the lease's end, in milliseconds since 1970.
    pub fn wall_millis(self) -> u64 {
        let now = clock::wall_millis();
        match self {
            Lease::Runs(left) => now.saturating_add(left.as_millis() as u64),
            Lease::RanOut(ago) => now.saturating_sub(ago.as_millis() as u64),
        }
    }

    pub fn expired(self) -> bool {
        matches!(self, Lease::RanOut(_))
    }

    /// What is left of it, zero when it ran out.
    pub fn remaining(self) -> Duration {
        match self {
            Lease::Runs(left) => left,
            Lease::RanOut(_) => Duration::ZERO,
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

/// What the record of a reentrant lock says beside.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reentrant {
    pub count: u32,
    /// The hold that our steps gave it; `None` on one that NoBrainer made.
    pub hold: Option<crate::token::HoldId>,
}

/// What identifies this very state of the record, for a conditional break (R20).
#[derive(Clone, PartialEq, Eq)]
pub struct Seen {
    /// The instance token as stored. Never shown (R19).
    pub token: Box<str>,
    /// The lease's end in the store's own units.
    pub expires_at: u64,
    pub n: u64,
}

impl std::fmt::Debug for Seen {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Seen {{ expires_at: {}, n: {} }}", self.expires_at, self.n)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::token::HoldId;

    #[test]
    fn the_version_is_of_all_that_a_break_compares() {
        let plain = Record {
            key: Key::new(b"k").unwrap(),
            damaged: None,
            lease: Lease::Runs(Duration::from_secs(1)),
            expires_at_ms: 1,
            owner: None,
            fence: Some(1),
            reentrant: None,
            seen: Seen { token: "token".into(), expires_at: 5, n: 1 },
        };
        let seen = |token: &str, expires_at, n| Seen { token: token.into(), expires_at, n };
        let with = |count, hold| Record { reentrant: Some(Reentrant { count, hold }), ..plain.clone() };
        let states = [
            plain.clone(),
            Record { key: Key::new(b"kt").unwrap(), seen: seen("oken", 5, 1), ..plain.clone() },
            Record { seen: seen("another", 5, 1), ..plain.clone() },
            Record { seen: seen("token", 6, 1), ..plain.clone() },
            Record { seen: seen("token", 5, 2), ..plain.clone() },
            with(1, None),
            with(2, None),
            with(1, Some(HoldId([1; 16]))),
            with(1, Some(HoldId([2; 16]))),
        ];
        let mut versions: Vec<_> = states.iter().map(Record::version).collect();
        assert!(versions.iter().all(|version| version.len() == 16), "{versions:?}");
        // What is left of the lease is not part of the state.
        let later = Record { lease: Lease::RanOut(Duration::ZERO), expires_at_ms: 2, ..plain.clone() };
        assert_eq!(later.version(), plain.version());
        versions.sort_unstable();
        versions.dedup();
        assert_eq!(versions.len(), states.len());
    }
}
