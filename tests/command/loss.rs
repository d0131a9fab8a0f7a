//! Losing the lock while the command runs.

use std::io::Write as _;
use std::time::Duration;

use nblock::key::Key;
use nblock::options::LockOptions;
use nblock::stores::embedded::fuzzing::layout;
use nblock::sys::runtime;

use super::{Running, Store, until};

#[test]
fn broken_by_force_the_command_is_killed() {
    let store = Store::new();
    let mut running = store.start(&["--expire", "3"], "trap '' TERM; sleep 1000 & echo in; wait; wait");
    running.out.expect("in");
    let broke = store.said(&["break", "k"]);
    assert!(broke.starts_with(&format!("broke \"k\", of {}", hostname_and(&running))), "{broke}");
    assert_eq!(running.status(), Some(76));
    assert_eq!(running.out.rest(), [""; 0], "with its children");
    running.err.expect("nblock: \"k\" was lost (it was broken, or its record was removed): killed the command");
}

fn hostname_and(running: &Running) -> String {
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap();
    format!("{}:{}", host.trim(), running.pid())
}

#[test]
fn with_the_stores_directory_the_lock_is_lost() {
    let store = Store::new();
    let mut running = store.start(&["--expire", "1"], "echo in; exec sleep 1000");
    running.out.expect("in");
    std::fs::remove_dir_all(&store.0).unwrap();
    assert_eq!(running.status(), Some(76));
    assert_eq!(running.out.rest(), [""; 0]);
}

#[test]
fn lost_and_only_warned_about() {
    let store = Store::new();
    let mut running = store.start(&["--expire", "3", "--on-lost", "warn"], "echo in; read x; exit 3");
    running.out.expect("in");
    store.said(&["break", "k"]);
    running
        .err
        .expect("nblock: \"k\" was lost (it was broken, or its record was removed): another process may hold it");
    assert_eq!(running.finish().code(), Some(3));
    assert_eq!(running.err.rest(), [""; 0], "said once");
}

#[test]
fn a_standard_error_that_nobody_reads_changes_nothing() {
    let store = Store::new();
    let (nobody, err) = std::io::pipe().unwrap();
    drop(nobody);
    let mut command = store.nblock(&["run", "--expire", "1", "k", "--", "sh", "-c", "echo in; exec sleep 1000"]);
    let mut process =
        command.env("NBLOCK_LOG", "debug").stdout(std::process::Stdio::piped()).stderr(err).spawn().unwrap();
    let out = super::Lines::of(process.stdout.take().unwrap());
    out.expect("in");
    store.said(&["break", "k"]);
    assert_eq!(process.wait().unwrap().code(), Some(76));
    assert_eq!(out.rest(), [""; 0]);
}

#[test]
fn lost_and_noticed_at_the_end_only() {
    let store = Store::new();
    for (options, status) in [(&[][..], 76), (&["--on-lost", "warn"], 0)] {
        // It is renewed after 20 s: nobody notices before the unlock.
        let mut running = store.start(options, "echo in; read x");
        running.out.expect("in");
        store.said(&["break", "k"]);
        running.process.stdin.as_mut().unwrap().write_all(b"\n").unwrap();
        assert_eq!(running.status(), Some(status));
        running.err.expect("nblock: \"k\" was lost while the command ran: another process may have held it");
    }
}

/// A key that the mutex of "k" guards too.
fn beside_k() -> Key {
    let shard = |key: &Key| layout::slot_of(&key.hash().0).0;
    let k = Key::new(b"k").unwrap();
    let mut keys = (0..).map(|n| Key::new(format!("writer {n}").as_bytes()).unwrap());
    keys.find(|key| shard(key) == shard(&k)).unwrap()
}

/// A process that was stopped in the middle of writing to the store, so that nobody else can use that part of it.
fn stopped_writer(store: &Store) -> Running {
    let mut command = store.command(std::env::current_exe().unwrap().to_str().unwrap());
    command.args(["--ignored", "--exact", "--nocapture", "loss::writes_without_end"]).env("NBLOCK_TEST_WRITER", "1");
    let writer = Running::start(command);
    writer.out.expect_part("writing");
    let client = store.client(Duration::from_millis(200));
    until(|| {
        writer.signal(libc::SIGSTOP);
        let stopped_in_it = runtime::wait(client.find(&beside_k())).is_err();
        if !stopped_in_it {
            writer.signal(libc::SIGCONT);
        }
        stopped_in_it.then_some(())
    });
    writer
}

#[test]
#[ignore = "a process that other tests here start"]
fn writes_without_end() {
    if std::env::var_os("NBLOCK_TEST_WRITER").is_none() {
        return;
    }
    let url = format!("embedded:{}", std::env::var("NBLOCK_DIR").unwrap());
    let client = runtime::wait(nblock::client::Client::open(Some(&url), Default::default())).unwrap();
    let lock = client.lock(beside_k(), LockOptions::default()).unwrap();
    println!("writing");
    loop {
        let _ = runtime::wait(lock.try_lock(LockOptions::default()));
        let _ = runtime::wait(lock.unlock());
    }
}

#[test]
fn a_store_that_does_not_answer_ends_the_command_in_time() {
    let store = Store::new();
    let mut running =
        store.start(&["--expire", "3"], "trap 'echo TERM' TERM; echo in; while :; do sleep 1000 & wait $!; done");
    running.out.expect("in");
    let writer = stopped_writer(&store);
    // Asked first; it does not obey.
    running.out.expect("TERM");
    running.err.expect_part("cannot be renewed");
    assert_eq!(running.out.rest(), [""; 0], "then killed, with its children");
    // Nobody could have had the lock by then, since nobody else has renewed it: the lease ran on.
    writer.signal(libc::SIGCONT);
    assert_eq!(running.status(), Some(76));
}

#[test]
fn a_renewal_calls_it_off() {
    let store = Store::new();
    let mut running = store.start(
        &["--expire", "24"],
        "trap 'echo TERM' TERM; trap 'kill -9 $!; exit 5' USR1; echo in; while :; do sleep 1000 & wait $!; done",
    );
    running.out.expect("in");
    let writer = stopped_writer(&store);
    running.err.expect_part("cannot be renewed");
    writer.signal(libc::SIGCONT);
    running.err.expect_part("was renewed after all");
    running.signal(libc::SIGUSR1);
    assert_eq!(running.status(), Some(5));
}

#[test]
fn overdue_and_only_warned_about() {
    let store = Store::new();
    let mut running = store.start(&["--expire", "3", "--on-lost", "warn"], "echo in; read x; exit 3");
    running.out.expect("in");
    let writer = stopped_writer(&store);
    running.err.expect("nblock: \"k\" is overdue: others may take it over");
    writer.signal(libc::SIGCONT);
    running.err.expect("nblock: \"k\" was renewed, and is held again");
    assert_eq!(running.finish().code(), Some(3));
}

#[test]
fn a_store_that_is_busy_is_69() {
    let store = Store::new();
    let _writer = stopped_writer(&store);
    let output = store.run(&["run", "--no-wait", "k", "--", "echo", "never"]);
    assert_eq!(output.status.code(), Some(69), "{output:?}");
    assert!(output.stdout.is_empty());
}
