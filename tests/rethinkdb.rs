//! The RethinkDB store against a scripted server, which does what a good one never does; and, where one is
//! named, against a real server.

#[path = "rethinkdb/opening.rs"]
mod opening;
#[path = "rethinkdb/real.rs"]
mod real;
#[path = "rethinkdb/scripted.rs"]
mod scripted;
#[path = "rethinkdb/server.rs"]
mod server;
#[path = "rethinkdb/tls.rs"]
mod tls;
