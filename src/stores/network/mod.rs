//! What every store with servers needs, whatever protocol they speak.
//!
//! - `address`, `options`, `secret`: what a store URL says of servers and accounts.
//! - `stream`, `tls`, `dial`: bytes to and from one of several hosts.
//! - `wire`: what waits to be written, what is read, and whether the server still answers.
//! - `connection`: who moves what goes over a connection: the threads that wait for answers, or a task.
//! - `pipeline`: requests and answers on a `wire`, for engines whose protocol is written here.
//! - `link`: the present connection, the next one when it ends, and the requests that wait meanwhile. Pauses
//!   between attempts to connect are `crate::backoff`'s, which the lock layer uses too.
//! - `open_stores`: one store for one configuration, however often it is opened.
//! - `contention`: whether others come for a lock, where a server does not say (R11).
//! - `skew`: the servers' clocks, and the margin that follows from them (R4).
//!
//! # Adding an engine
//!
//! An engine implements [`link::Engine`] (how a server is reached and greeted, how a connection is run),
//! [`link::Request`] (what waits while there is no connection) and [`pipeline::Protocol`] (how requests are written and
//! answers taken apart); or [`connection::Traffic`], where another library reads and writes.
//! Reaching a server is mostly one call: [`dial::first_of`] with a closure that calls [`dial::connect`] and then
//! speaks the engine's greeting. Protocols that begin in the clear and switch to TLS call [`dial::socket`], say
//! what they have to, and hand the stream to [`dial::secure`].

pub mod address;
pub mod connection;
pub mod contention;
pub mod dial;
pub mod link;
pub mod open_stores;
pub mod options;
pub mod pipeline;
pub mod secret;
pub mod skew;
pub mod stream;
#[cfg(test)]
pub mod testing;
pub mod tls;
pub mod wire;
