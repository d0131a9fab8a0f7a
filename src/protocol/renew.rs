//! Renewing a hold (R8, R12).

use std::time::Duration;

use super::change::{Change, Condition, Lease, Proof, Reply, Write};

/// One renewal. It never acquires: it changes only a record that proves the hold.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Renewal {
    /// Of a reentrant hold: the object's own.
    pub proof: Proof,
    pub expire: Duration,
    /// Above that of every earlier write of the hold. A reentrant hold is renewed by several objects, and its
    /// lease never made shorter: it has none.
    pub write_seq: u64,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Renewed {
    /// Ours. `applied`: whether the lease is now this renewal's own, or longer. Otherwise a later write was
    /// there first, and no deadline moves.
    Ours { applied: bool },
    /// Not ours any more.
    Lost,
}

impl Renewal {
    pub fn change(&self) -> Change {
        let extend = match self.proof {
            Proof::Owner { .. } | Proof::Object { .. } => {
                Write::Extend { lease: Lease::NotSooner(self.expire), write_seq: None }
            }
            Proof::Token(_) | Proof::Hold(_) => {
                Write::Extend { lease: Lease::FromNow(self.expire), write_seq: Some(self.write_seq) }
            }
        };
        Change::new(Condition::Mine(self.proof.clone()), extend)
    }

    /// What a reply means. The verdict is what the record proves, never whether something was changed.
    pub fn read(&self, reply: &Reply) -> Renewed {
        match reply {
            Reply::Applied { .. } => Renewed::Ours { applied: true },
            Reply::Found(Some(record)) if record.state.holder.is_proven_by(&self.proof) => {
                Renewed::Ours { applied: false }
            }
            Reply::Found(_) | Reply::TooLate => Renewed::Lost,
        }
    }
}
