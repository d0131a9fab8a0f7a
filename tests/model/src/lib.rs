//! The protocol of the locks (`nblock::protocol`), explored by a model checker: every order of messages, lost,
//! late and doubled ones, of crashes, pauses, expiry, and of stores that go back.
//!
//! The library's own functions are explored: what a client asks and what it makes of an answer, and what the
//! store does. The *arrival* of a request and its *application* are two moments, and the server's clock is read
//! at the first: that is what a real server does to a request that it applies late (R3). Arriving changes nothing
//! but that reading, so it is chosen with the application, among all moments since the request was sent. What is
//! never applied, or never delivered, is lost; a client that does nothing for a while was paused.
//!
//! Each mutant leaves out what the rules ask for. The checker must find the result: a check that finds
//! nothing wrong with a mutant would find nothing wrong with anything.

pub mod interned;
pub mod mutant;
pub mod protocol;

#[cfg(test)]
mod exploring;
#[cfg(test)]
mod plain;
#[cfg(test)]
mod reentrant;
#[cfg(test)]
mod restored;

/// Moments of a clock that all share: that clocks differ is what the margin is for.
pub type Time = u8;
