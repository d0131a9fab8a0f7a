//! Proof: what `docs/protocol.md` promises, tried by every means at hand. One program, since each
//! test program is linked by itself.
//!
//! `cargo test --test proof` runs all of it; a part is chosen by name, as in `cargo test --test proof faults`.

mod allocations;
mod asks;
mod bytes;
mod checker;
mod child;
mod conformance;
mod contention;
mod crash;
mod descriptors;
mod embedded;
mod faults;
mod history;
mod oracle;
mod postgres;
mod postgres_oracle;
mod redis;
mod redis_interop;
mod reql;
mod resources;
mod round_trips;
mod support;
// Parts of it only: the tests of the store that tests/rethinkdb has use the rest.
#[allow(dead_code)]
#[path = "../rethinkdb/server.rs"]
mod scripted;
mod server_bytes;
// Parts of it only: tests of engines use the rest.
#[allow(dead_code)]
mod servers;
mod standstill;
mod stored_bytes;
mod url_bytes;
