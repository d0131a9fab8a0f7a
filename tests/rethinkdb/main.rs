//! The RethinkDB store against a scripted server, which does what a good one never does; and, where one is
//! named, against a real server.

mod opening;
mod real;
mod scripted;
mod server;
mod tls;
