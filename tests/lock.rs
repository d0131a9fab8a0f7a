//! What a lock means, over the stores that need no server.

use std::sync::Arc;
use std::thread;
use std::time::Duration;

use nblock::client::Client;
use nblock::clock::Boottime;
use nblock::error::{Error, ErrorKind};
use nblock::key::Key;
use nblock::lock::{Lock, LockState};
use nblock::options::{ClientOptions, IfHeld, LockOptions, Timeout};
use nblock::protocol::{Holder, State};
use nblock::store::{Answer, Filter};
use nblock::sys::runtime;

fn wait<T>(answer: Answer<T, Error>) -> Result<T, Error> {
    match answer {
        Answer::Now(result) => result,
        Answer::Later(answer) => runtime::block_on(answer)?,
    }
}

fn client() -> Client {
    wait(Client::open(Some("memory:"), ClientOptions::default())).unwrap()
}

fn lock(client: &Client, key: &str) -> Lock {
    client.lock(Key::new(key.as_bytes()).unwrap(), LockOptions::default()).unwrap()
}

fn within(milliseconds: u64) -> LockOptions {
    LockOptions { timeout: Some(Timeout::After(Duration::from_millis(milliseconds))), ..LockOptions::default() }
}

fn lasting(milliseconds: u64) -> LockOptions {
    LockOptions { expire: Some(Duration::from_millis(milliseconds)), ..LockOptions::default() }
}

fn eventually(so: impl Fn() -> bool) {
    let end = Boottime::now() + Duration::from_secs(60);
    while !so() {
        assert!(!end.has_passed(), "it did not become so");
        thread::yield_now();
    }
}

/// The number of the last write of a plain hold.
fn seq(state: &State) -> u64 {
    match state.holder {
        Holder::Plain { write_seq, .. } => write_seq,
        _ => panic!("not a plain hold"),
    }
}

#[test]
fn one_holder_at_a_time() {
    let client = client();
    let (a, b) = (lock(&client, "k"), lock(&client, "k"));
    assert!(wait(a.try_lock(LockOptions::default())).unwrap());
    assert!(!wait(b.try_lock(LockOptions::default())).unwrap());
    assert_eq!(a.state(), LockState::Held);
    assert_eq!(wait(a.try_lock(LockOptions::default())).unwrap_err().kind(), ErrorKind::InvalidOp);
    assert_eq!(wait(b.unlock()).unwrap_err().kind(), ErrorKind::InvalidOp);
    wait(a.unlock()).unwrap();
    assert_eq!(a.state(), LockState::Idle);
    assert!(wait(b.lock(within(0))).unwrap());
    wait(b.unlock()).unwrap();
    assert!(wait(client.list(Filter::All)).unwrap().is_empty());
}

#[test]
fn waits_for_release_and_for_expiry() {
    let client = client();
    let (a, b) = (lock(&client, "k"), lock(&client, "k"));
    assert!(wait(a.lock(lasting(60_000))).unwrap());
    let start = Boottime::now();
    assert!(!wait(b.lock(within(20))).unwrap());
    assert!(Boottime::now().since(start) >= Duration::from_millis(20));

    let waiter = thread::spawn(move || {
        assert!(wait(b.lock(within(60_000))).unwrap());
        b
    });
    wait(a.unlock()).unwrap();
    let b = waiter.join().unwrap();

    // b's lease runs out: a takes over, and b is notified.
    wait(b.refresh(Some(Duration::from_millis(30)))).unwrap();
    assert!(wait(a.lock(within(60_000))).unwrap());
    assert!(matches!(b.state(), LockState::Overdue));
    assert_eq!(wait(b.unlock()).unwrap_err().kind(), ErrorKind::Lost);
    assert_eq!(b.state(), LockState::Idle);
    wait(a.unlock()).unwrap();
}

#[test]
fn a_hold_is_renewed_and_a_loss_is_told() {
    let client = client();
    let a = lock(&client, "k");
    let renewed = LockOptions { auto_refresh: Some(true), ..lasting(3_000) };
    assert!(wait(a.lock(renewed)).unwrap());
    let find = || wait(client.find(a.key())).unwrap().unwrap();
    let granted = find().state;
    eventually(|| seq(&find().state) > seq(&granted));
    let record = find();
    assert_eq!(record.state.holder.token(), granted.holder.token());
    assert!(record.state.ends_at > granted.ends_at);
    assert!(!wait(lock(&client, "k").try_lock(LockOptions::default())).unwrap());
    assert_eq!(a.state(), LockState::Held);
    let fd = a.lost_fd().unwrap();
    let mut poll = libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
    assert_eq!(unsafe { libc::poll(&mut poll, 1, 0) }, 0);
    // Renewals change what was seen: it takes a few tries to break it between two of them.
    let mut seen = record;
    while wait(client.break_seen(&seen)).unwrap() != nblock::client::Broken::Broken {
        seen = wait(client.find(a.key())).unwrap().unwrap();
    }
    assert_eq!(unsafe { libc::poll(&mut poll, 1, 10_000) }, 1, "the descriptor tells");
    let state = a.state();
    assert!(matches!(state, LockState::Lost), "{state:?}");
    assert_eq!(wait(a.unlock()).unwrap_err().kind(), ErrorKind::Lost);
    assert_eq!(unsafe { libc::poll(&mut poll, 1, 0) }, 0);
}

#[test]
fn threads_share_one_lock_object() {
    let client = client();
    let shared = Arc::new(lock(&client, "k"));
    let options =
        LockOptions { if_held: Some(IfHeld::Wait), timeout: Some(Timeout::Forever), ..LockOptions::default() };
    let inside = Arc::new(std::sync::atomic::AtomicU32::new(0));
    let threads: Vec<_> = (0..8)
        .map(|_| {
            let (shared, inside) = (Arc::clone(&shared), Arc::clone(&inside));
            thread::spawn(move || {
                for _ in 0..200 {
                    assert!(wait(shared.lock(options)).unwrap());
                    assert_eq!(inside.fetch_add(1, std::sync::atomic::Ordering::SeqCst), 0);
                    inside.fetch_sub(1, std::sync::atomic::Ordering::SeqCst);
                    wait(shared.unlock()).unwrap();
                }
            })
        })
        .collect();
    for thread in threads {
        thread.join().unwrap();
    }
    assert!(wait(client.list(Filter::All)).unwrap().is_empty());
}

#[test]
fn reentrant() {
    let client = client();
    let key = Key::new(b"k").unwrap();
    let new = |owner| client.reentrant_lock(key.clone(), owner, LockOptions::default()).unwrap();
    let (a, b, c) = (new(Some("hello")), new(Some("hello")), new(None));
    assert!(wait(a.try_lock(LockOptions::default())).unwrap());
    assert!(wait(b.try_lock(LockOptions::default())).unwrap());
    assert!(!wait(c.try_lock(LockOptions::default())).unwrap());
    assert!(wait(a.try_lock(LockOptions::default())).unwrap());
    wait(a.unlock()).unwrap();
    wait(a.unlock()).unwrap();
    assert!(!wait(c.try_lock(LockOptions::default())).unwrap());
    // An object that never locked may unlock what its owner token holds.
    wait(new(Some("hello")).unlock()).unwrap();
    assert!(wait(c.try_lock(LockOptions::default())).unwrap());
    assert_eq!(wait(b.unlock()).unwrap_err().kind(), ErrorKind::Lost);
    wait(c.unlock()).unwrap();
    assert!(wait(client.list(Filter::All)).unwrap().is_empty());
}

/// What a step in asked for ends with its way out.
#[test]
fn a_nested_step_does_not_change_the_outer_one() {
    let client = client();
    let lock = client.reentrant_lock(Key::new(b"nested").unwrap(), None, LockOptions::default()).unwrap();
    let asked = |expire, auto_refresh| {
        let options = LockOptions { auto_refresh: Some(auto_refresh), ..lasting(expire) };
        assert!(wait(lock.try_lock(options)).unwrap());
    };
    // A short one inside a long one that is renewed: the next renewal asks for the long lease.
    asked(3_000, true);
    asked(30, false);
    wait(lock.unlock()).unwrap();
    wait(lock.refresh(None)).unwrap();
    assert!(lock.remaining().unwrap() > Duration::from_secs(1), "{:?}", lock.remaining());
    let seen = || wait(client.find(lock.key())).unwrap().unwrap().state;
    let first = seen();
    eventually(|| seen() != first);
    wait(lock.unlock()).unwrap();

    // One that is renewed inside a plain lease, which runs out.
    asked(300, false);
    asked(300, true);
    let first = seen();
    eventually(|| seen() != first);
    wait(lock.unlock()).unwrap();
    eventually(|| lock.state() == LockState::Overdue);
    wait(lock.unlock()).unwrap();
}

#[test]
fn closing_gives_back_what_is_renewed() {
    let name = "memory:closing_gives_back_what_is_renewed";
    let open = || wait(Client::open(Some(name), ClientOptions::default())).unwrap();
    let (client, other) = (open(), open());
    let (renewed, plain) = (lock(&client, "renewed"), lock(&client, "plain"));
    assert!(wait(renewed.lock(LockOptions { auto_refresh: Some(true), ..LockOptions::default() })).unwrap());
    assert!(wait(plain.lock(LockOptions::default())).unwrap());
    wait(client.close(Boottime::NEVER)).unwrap();
    let left = wait(other.list(Filter::All)).unwrap();
    assert_eq!(left.iter().map(|record| record.key.as_str()).collect::<Vec<_>>(), ["plain"]);
    assert_eq!(wait(plain.unlock()).unwrap_err().kind(), ErrorKind::InvalidOp);
    wait(client.close(Boottime::NEVER)).unwrap();
}

/// A caller that asked before there was a line, and stands in it when its grant is answered, must not be waited
/// for by those before it.
#[test]
fn a_grant_that_was_asked_for_before_the_line_was_joined_stalls_nobody() {
    let directory = std::env::temp_dir().join(format!("nblock-line-{}", std::process::id()));
    let url = format!("embedded:{}", directory.display());
    let client = wait(Client::open(Some(&url), ClientOptions::default())).unwrap();
    // A lease that is left behind lasts longer than anybody waits.
    let options = LockOptions { expire: Some(Duration::from_secs(600)), ..within(60_000) };
    thread::scope(|scope| {
        for _ in 0..100 {
            scope.spawn(|| {
                let lock = lock(&client, "k");
                for _ in 0..50 {
                    assert!(wait(lock.lock(options)).unwrap());
                    wait(lock.unlock()).unwrap();
                }
            });
        }
    });
    wait(client.close(Boottime::NEVER)).unwrap();
    std::fs::remove_dir_all(directory).unwrap();
}

#[test]
fn fences_grow_over_all_clients_of_a_named_memory() {
    let fence = || {
        let client = wait(Client::open(Some("memory:fences"), ClientOptions::default())).unwrap();
        let lock = lock(&client, "k");
        assert!(wait(lock.try_lock(LockOptions::default())).unwrap());
        wait(lock.fence()).unwrap()
    };
    let first = fence();
    assert!(fence() > first, "the last client was gone in between");
}
