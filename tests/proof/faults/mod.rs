//! What a network and a server can do to requests, done to every path of the lock, over any store.

mod early_clock;
mod endings;
pub mod network;
mod overlaps;
mod paths;
mod reentrant_storm;
mod storm;
