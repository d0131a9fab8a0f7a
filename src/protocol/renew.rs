//! Renewing a hold (R8, R12).

use std::time::Duration;

use super::change::{Change, Condition, Lease, Proof, Reply, Write};

/// One renewal. It never acquires: it changes only a record that proves the hold.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Renewal {
    /// For a reentrant hold: the proof of the object.
    pub proof: Proof,
    pub expire: Duration,
    /// Above the number of every earlier write of the hold. Not used for a reentrant hold, which is renewed by several
    /// objects, and whose lease is never made shorter.
    pub write_seq: u64,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Renewed {
    /// The hold is ours. `applied`: whether the lease is now that of this renewal, or longer. If not, a later write was
    /// applied first, and the deadline does not change.
    Ours { applied: bool },
    /// The hold is not ours any more.
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

    /// What a reply means. This depends on what the record proves, and not on whether it was changed.
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
