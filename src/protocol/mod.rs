//! The lock protocol: what is granted, renewed, released, counted and cleaned up (rules R1 to R8 and R17).
//!
//! Everything in this module is a pure function of its arguments: no I/O, no clock, no randomness, no
//! store. It has two halves.
//!
//! - **What a store evaluates**: a [`Change`] is one [`Condition`] and one [`Write`]; [`apply`](fn@apply) is the
//!   reference meaning of a change. The memory and embedded stores call it under their mutex. A store with a server
//!   translates changes into the server's language, and the oracle test compares the translation with
//!   [`apply`](fn@apply). No store knows the rules.
//! - **What a client decides**: [`Acquisition`], [`Renewal`], [`Release`] and [`Orphan`] build changes and interpret
//!   the replies ([`Reply`]). The lock layer drives them; the model checker explores them.
//!
//! `docs/protocol.md` explains the rules.

mod acquire;
mod apply;
mod change;
mod orphan;
mod release;
mod renew;
mod state;
#[cfg(test)]
mod tests;

pub use acquire::{Acquisition, Asked, Granted, Verdict};
pub use apply::{Effect, apply, holds};
pub use change::{Change, Condition, Lease, NewRecord, PlainRenewal, Proof, Reply, Write};
pub use orphan::Orphan;
pub use release::{Judgement, Release, Step, step_out_of};
pub use renew::{Renewal, Renewed};
pub use state::{Entry, Holder, State, StoreTime};
