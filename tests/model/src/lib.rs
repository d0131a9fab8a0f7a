//! The protocol of the locks (rules R1 to R8, R17 and R18 of `docs/correctness.md`), explored by a model
//! checker: every order of messages, lost, late and doubled ones, of crashes, pauses and expiry.
//!
//! The *arrival* of a request and its *application* are two moments, and the server's clock is read at
//! the first: that is what a real server does to a request that it applies late (R3). Arriving changes
//! nothing but that reading, so it is chosen with the application, among all moments since the request
//! was sent. What is never applied, or never delivered, is lost; a client that does nothing for a while
//! was paused.
//!
//! Each mutant leaves out what the rules ask for. The checker must find what becomes of it: a check
//! that finds nothing wrong with a mutant would find nothing wrong with anything.

pub mod plain;
pub mod reentrant;

/// Moments of a clock that all share: that clocks differ is what the margin is for.
pub type Time = u8;
