//! Many users of one reentrant record at once: none makes another's request be done again, so none waits for
//! longer than its own request takes (DESIGN: contention is a value).

use std::sync::Barrier;
use std::time::{Duration, Instant};

use nblock::client::Client;
use nblock::options::LockOptions;
use nblock::sys::runtime;

use crate::support::{Directory, client, fresh_key};

const USERS: usize = 100;
const ROUNDS: usize = 10;

/// Locks and unlocks in many threads at once: how many operations a second, and how long the longest took.
fn run(client: &Client, one_record: bool) -> (f64, Duration) {
    let shared = fresh_key();
    let barrier = Barrier::new(USERS + 1);
    let (elapsed, longest) = std::thread::scope(|scope| {
        let users: Vec<_> = (0..USERS)
            .map(|_| {
                scope.spawn(|| {
                    let key = if one_record { shared.clone() } else { fresh_key() };
                    let lock = client.reentrant_lock(key, Some("all"), LockOptions::default()).expect("a lock is made");
                    barrier.wait();
                    let mut longest = Duration::ZERO;
                    for _ in 0..ROUNDS {
                        let start = Instant::now();
                        let granted = runtime::wait(lock.try_lock(LockOptions::default())).expect("an answer");
                        assert!(granted, "the owner token has it, or nobody has");
                        longest = longest.max(start.elapsed());
                        let start = Instant::now();
                        runtime::wait(lock.unlock()).expect("it is ours");
                        longest = longest.max(start.elapsed());
                    }
                    longest
                })
            })
            .collect();
        // Before the users begin: this thread may be the last to go on.
        let start = Instant::now();
        barrier.wait();
        let longest = users.into_iter().map(|user| user.join().expect("a user")).max();
        (start.elapsed(), longest.unwrap_or_default())
    });
    let found = runtime::wait(client.find(&shared)).expect("find is answered");
    assert!(found.is_none(), "the last one out leaves nothing: {found:?}");
    ((USERS * ROUNDS * 2) as f64 / elapsed.as_secs_f64(), longest)
}

fn contend(what: &str, client: &Client) {
    let (alone, _) = run(client, false);
    let (together, longest) = run(client, true);
    println!(
        "{what}: {USERS} users of one record: {together:.0} operations a second, {:.2} of those on as many records; \
         the longest took {longest:?}",
        together / alone
    );
    assert!(longest < client.options().op_timeout, "an operation took {longest:?}");
}

#[test]
fn memory() {
    contend("memory", &client("memory:"));
}

#[test]
fn embedded() {
    contend("embedded", &Directory::quick().client());
}

#[test]
fn reql() {
    contend("reql", &client(&crate::reql::Server::start(1).url()));
}
