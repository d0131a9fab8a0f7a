//! A holder that is killed: the next one is granted when the lease runs out, and not before.

use std::time::Duration;

use nblock::clock::Boottime;
use nblock::options::{LockOptions, Timeout};
use nblock::sys::runtime::wait;

use crate::child::{Actor, say, wait_for_the_end};
use crate::support::{Directory, RETHINKDB, client, fresh_key, key, lock, skipped};

const EXPIRE: Duration = Duration::from_millis(1200);

/// Takes the lock, with renewals, says when it was last renewed, and is killed.
pub fn holder(url: &str, name: &str, expire: &str) {
    let client = client(url);
    let lock = lock(&client, &key(name));
    let expire = Duration::from_millis(expire.parse().expect("milliseconds"));
    let options = LockOptions { expire: Some(expire), auto_refresh: Some(true), ..LockOptions::default() };
    assert!(wait(lock.try_lock(options)).unwrap());
    let before = Boottime::now();
    wait(lock.refresh(None)).unwrap();
    // The lease ends no earlier than so long after this.
    say(before.as_nanos());
    wait_for_the_end();
}

/// Waits for the lock, and says when it was granted.
pub fn waiter(url: &str, name: &str) {
    let client = client(url);
    let lock = lock(&client, &key(name));
    say("waiting");
    assert!(wait(lock.lock(forever())).unwrap());
    say(Boottime::now().as_nanos());
    wait_for_the_end();
}

fn forever() -> LockOptions {
    LockOptions { timeout: Some(Timeout::Forever), ..LockOptions::default() }
}

fn moment(said: String) -> Boottime {
    Boottime::from_nanos(said.parse().expect("a moment"))
}

fn a_killed_holder(url: &str) {
    let name = fresh_key();
    let expire = EXPIRE.as_millis().to_string();
    let mut holder = Actor::start("holder", &[url, name.as_str(), &expire]);
    let renewed = moment(holder.says());
    let mut waiter = Actor::start("waiter", &[url, name.as_str()]);
    assert_eq!(waiter.says(), "waiting");
    let here = client(url);
    let ours = lock(&here, &name);
    assert!(!wait(ours.try_lock(LockOptions::default())).unwrap());
    // It may renew by itself between these two lines: the lease only ends later for it.
    holder.kill();
    let killed = Boottime::now();
    let granted = moment(waiter.says());
    // A store may keep milliseconds only.
    assert!(granted + Duration::from_millis(1) >= renewed + EXPIRE, "granted before the lease was over");
    // One lease, and then no longer than a waiter takes to notice on a loaded machine.
    assert!(granted < killed + EXPIRE + Duration::from_secs(20), "granted long after the lease was over");

    // A holder that does not run still holds: only its lease says when that is over.
    waiter.stop();
    assert!(!wait(ours.try_lock(LockOptions::default())).unwrap(), "it was given to two");
    let seen = wait(here.find(&name)).unwrap().unwrap();
    assert_eq!(seen.owner.map(|owner| owner.pid), Some(waiter.pid()));
}

#[test]
fn a_killed_holder_embedded() {
    let directory = Directory::new();
    a_killed_holder(&directory.url());
}

#[test]
fn a_killed_holder_rethinkdb() {
    match std::env::var(RETHINKDB).ok().filter(|url| !url.is_empty()) {
        Some(url) => a_killed_holder(&url),
        None => skipped("crash-rethinkdb", &format!("{RETHINKDB} is not set")),
    }
}

#[test]
fn a_killed_holder_redis() {
    a_killed_holder(&crate::redis::server().url);
}

#[test]
fn a_killed_holder_postgres() {
    a_killed_holder(&crate::postgres::shared().url);
}

/// A short lease of a holder that was killed is over even if nobody tells the waiters.
#[test]
fn leases_of_the_killed_run_out_one_by_one() {
    let directory = Directory::new();
    let url = directory.url();
    let name = fresh_key();
    for _ in 0..3 {
        let mut holder = Actor::start("holder", &[&url, name.as_str(), "100"]);
        let renewed = moment(holder.says());
        holder.kill();
        let client = client(&url);
        let lock = lock(&client, &name);
        assert!(wait(lock.lock(forever())).unwrap());
        assert!(Boottime::now() >= renewed + Duration::from_millis(100));
        wait(lock.unlock()).unwrap();
    }
}
