//! Proof: what `docs/correctness.md` promises, tried by every means at hand. One program, since each
//! test program is linked by itself.
//!
//! `cargo test --test proof` runs all of it; a part is chosen by name, as in `cargo test --test proof faults`.

#[path = "proof/allocations.rs"]
mod allocations;
#[path = "proof/asks.rs"]
mod asks;
#[path = "proof/bytes.rs"]
mod bytes;
#[path = "proof/checker.rs"]
mod checker;
#[path = "proof/child.rs"]
mod child;
#[path = "proof/conformance.rs"]
mod conformance;
#[path = "proof/crash.rs"]
mod crash;
#[path = "proof/embedded/mod.rs"]
mod embedded;
#[path = "proof/faults/mod.rs"]
mod faults;
#[path = "proof/history/mod.rs"]
mod history;
#[path = "proof/oracle.rs"]
mod oracle;
#[path = "proof/postgres.rs"]
mod postgres;
#[path = "proof/reql/mod.rs"]
mod reql;
#[path = "proof/resources.rs"]
mod resources;
#[path = "proof/scene.rs"]
mod scene;
// Parts of it only: the tests of the store that tests/rethinkdb.rs has use the rest.
#[allow(dead_code)]
#[path = "rethinkdb/server.rs"]
mod scripted;
#[path = "proof/server_bytes.rs"]
mod server_bytes;
// Parts of it only: tests of engines use the rest.
#[allow(dead_code)]
mod servers;
#[path = "proof/stored_bytes.rs"]
mod stored_bytes;
#[path = "proof/url_bytes.rs"]
mod url_bytes;
