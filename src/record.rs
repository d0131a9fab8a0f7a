//! The stored row of one key, as inspection shows it.

use std::time::Duration;

use ring::digest::{Context, SHA256};

use crate::clock;
use crate::key::Key;
use crate::protocol::{Holder, State, StoreTime};

/// A record as it was read (R19).
///
/// ```
/// use nblock::{Broken, Client, ClientOptions, Key, LockOptions, wait};
///
/// # fn main() -> Result<(), nblock::Error> {
/// let client = wait(Client::open(Some("memory:"), ClientOptions::default()))?;
/// let lock = client.lock(Key::new(b"jobs:report")?, LockOptions::default())?;
/// assert!(wait(lock.try_lock(LockOptions::default()))?);
///
/// // Breaking is forcible, and happens only if the record is still as it was read.
/// let record = wait(client.find(lock.key()))?.expect("it is held");
/// assert!(!record.lease.expired());
/// assert_eq!(wait(client.break_seen(&record))?, Broken::Broken);
/// assert_eq!(wait(client.break_seen(&record))?, Broken::Changed);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct Record {
    /// If the record is damaged and its key cannot be read, a placeholder: see [`Key::is_placeholder`].
    pub key: Key,
    /// What is wrong with the record, if it is damaged. Then only the hash of its key is valid: the record is never
    /// granted, renewed or released, and its key stays locked until the record is broken in the state that was read.
    pub damaged: Option<String>,
    /// How long the lease still runs by the store's clock, or how long ago it ended.
    pub lease: Lease,
    /// Wall-clock time of the lease's end, in milliseconds since 1970: for people to read.
    pub expires_at_ms: u64,
    /// The owner. NoBrainer's records have none.
    pub owner: Option<Owner>,
    /// The fence of the grant, if it brought one.
    pub fence: Option<u64>,
    /// The state that decisions depend on, and that a conditional break compares. Its tokens are never shown (R19).
    pub state: State,
}

impl Record {
    /// A short text that identifies this exact state of the record. It changes with every renewal, with every step of a
    /// reentrant lock, and with the holder. It is a hash of all that a conditional break compares, and reveals none of
    /// it.
    pub fn version(&self) -> String {
        let mut state = Context::new(&SHA256);
        // Texts are preceded by their lengths, so that no two states give the same bytes.
        let text = |state: &mut Context, text: &str| {
            state.update(&(text.len() as u64).to_le_bytes());
            state.update(text.as_bytes());
        };
        state.update(&self.key.hash().0);
        state.update(&self.state.ends_at.0.to_le_bytes());
        match &self.state.holder {
            Holder::Plain { token, write_seq } => {
                text(&mut state, &token.to_string());
                state.update(&write_seq.to_le_bytes());
            }
            Holder::Reentrant { owner, hold, count, entries } => {
                text(&mut state, &owner.0);
                text(&mut state, &hold.map_or(String::new(), |hold| hold.to_string()));
                state.update(&count.to_le_bytes());
                for entry in entries {
                    state.update(&entry.object.0.to_le_bytes());
                    state.update(&entry.count.to_le_bytes());
                    state.update(&entry.write_seq.to_le_bytes());
                }
            }
            Holder::Foreign { token } => text(&mut state, token),
        }
        state.finish().as_ref()[..VERSION_BYTES].iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// The total count of a reentrant lock; `None` for a plain one.
    pub fn lock_count(&self) -> Option<u32> {
        match self.state.holder {
            Holder::Reentrant { count, .. } => Some(count),
            Holder::Plain { .. } | Holder::Foreign { .. } => None,
        }
    }

    /// Whether another program wrote it: another library's lock, or in Redis perhaps no lock at all. NoBrainer's
    /// reentrant locks look like ours.
    pub fn is_foreign(&self) -> bool {
        self.damaged.is_none() && matches!(self.state.holder, Holder::Foreign { .. })
    }

    /// Whether both records are of the same hold, which may have been renewed or entered again in between.
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

/// The part of the hash that is used: enough to distinguish the states of one key, and short enough to be copied by
/// hand.
const VERSION_BYTES: usize = 8;

/// How long a lease still runs, or how long ago it ended, by the store's clock.
///
/// ```
/// use nblock::Lease;
/// use std::time::Duration;
///
/// fn describe(lease: Lease) -> String {
///     match lease {
///         Lease::Runs(left) => format!("{left:?} left"),
///         Lease::RanOut(ago) => format!("ended {ago:?} ago: the lock can be taken over"),
///         Lease::Endless => "held until it is unlocked or broken".to_string(),
///     }
/// }
///
/// assert_eq!(describe(Lease::Runs(Duration::from_secs(7))), "7s left");
/// assert!(Lease::RanOut(Duration::from_secs(1)).expired());
/// assert_eq!(Lease::Endless.remaining(), Duration::MAX);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lease {
    /// It ends after this length of time.
    Runs(Duration),
    /// It ended this length of time ago.
    RanOut(Duration),
    /// Another library created it without an end.
    Endless,
}

impl Lease {
    /// Calculated from the end of the lease and the store's current time.
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

    /// Whether it is over.
    pub fn expired(self) -> bool {
        matches!(self, Lease::RanOut(_))
    }

    /// What is left of the lease: zero if it is over, [`Duration::MAX`] if it has no end.
    pub fn remaining(self) -> Duration {
        match self {
            Lease::Endless => Duration::MAX,
            Lease::Runs(left) => left,
            Lease::RanOut(_) => Duration::ZERO,
        }
    }
}

/// The wall-clock time, in milliseconds since 1970, of a past `moment` on this machine's clock.
pub fn wall_millis_at(moment: StoreTime, now: StoreTime) -> u64 {
    clock::wall_millis().saturating_sub(now.since(moment).as_millis() as u64)
}

/// The owner in a record, without the time of the grant.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Identity {
    /// The host's name.
    pub host: String,
    /// The process id on that host.
    pub pid: u32,
    /// The boot id of that host, which distinguishes boots, and hosts with the same name.
    pub boot_id: String,
    /// The application's name.
    pub app: String,
}

impl Identity {
    /// The owner of a hold that was granted at this time.
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

/// The owner of a lock. Host names are not unique, so the boot id is part of it.
///
/// ```
/// use nblock::{Client, ClientOptions, Key, LockOptions, wait};
///
/// # fn main() -> Result<(), nblock::Error> {
/// let options = ClientOptions { app: "billing".into(), ..Default::default() };
/// let client = wait(Client::open(Some("memory:"), options))?;
/// let lock = client.lock(Key::new(b"jobs:report")?, LockOptions::default())?;
/// assert!(wait(lock.try_lock(LockOptions::default()))?);
///
/// let record = wait(client.find(lock.key()))?.expect("it is held");
/// // A record of NoBrainer has no owner.
/// let owner = record.owner.expect("it is of this process");
/// println!("held by {}:{} ({})", owner.host, owner.pid, owner.app);
/// # assert_eq!((owner.pid, &*owner.app), (std::process::id(), "billing"));
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Owner {
    /// The host's name.
    pub host: String,
    /// The process id on that host.
    pub pid: u32,
    /// The boot id of that host, which distinguishes boots, and hosts with the same name.
    pub boot_id: String,
    /// The application's name.
    pub app: String,
    /// Wall-clock time of the grant, in milliseconds since 1970.
    pub acquired_at_ms: u64,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::{Entry, State};
    use crate::token::{HoldId, ObjectId, OwnerToken, Token};

    #[test]
    fn the_version_is_of_all_that_a_break_compares() {
        let hold = HoldId([1; 16]);
        let holder = |attempt, write_seq| Holder::Plain { token: Token { hold, attempt }, write_seq };
        let plain = Record {
            key: Key::new(b"k").unwrap(),
            damaged: None,
            lease: Lease::Runs(Duration::from_secs(1)),
            expires_at_ms: 1,
            owner: None,
            fence: Some(1),
            state: State { holder: holder(1, 1), ends_at: StoreTime(5) },
        };
        let with = |holder, ends_at| Record { state: State { holder, ends_at: StoreTime(ends_at) }, ..plain.clone() };
        let reentrant = |owner: &str, hold, count, write_seq| {
            let entries = vec![Entry { object: ObjectId(7), count, write_seq }];
            with(Holder::Reentrant { owner: OwnerToken(owner.into()), hold, count, entries }, 5)
        };
        let states = [
            plain.clone(),
            Record { key: Key::new(b"kt").unwrap(), ..plain.clone() },
            with(holder(2, 1), 5),
            with(holder(1, 1), 6),
            with(holder(1, 2), 5),
            with(Holder::Foreign { token: "token".into() }, 5),
            reentrant("token", None, 1, 1),
            reentrant("other", None, 1, 1),
            reentrant("token", None, 2, 1),
            reentrant("token", None, 1, 2),
            reentrant("token", Some(hold), 1, 1),
            reentrant("token", Some(HoldId([2; 16])), 1, 1),
        ];
        let mut versions: Vec<_> = states.iter().map(Record::version).collect();
        assert!(versions.iter().all(|version| version.len() == 16), "{versions:?}");
        // The time left is not part of the state.
        let later = Record { lease: Lease::RanOut(Duration::ZERO), expires_at_ms: 2, ..plain.clone() };
        assert_eq!(later.version(), plain.version());
        versions.sort_unstable();
        versions.dedup();
        assert_eq!(versions.len(), states.len());
    }
}
