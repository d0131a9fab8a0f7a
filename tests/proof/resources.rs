//! What many locks cost, and what happens when the system gives no more.

use std::os::fd::AsRawFd;
use std::time::Duration;

use nblock::lock::{Lock, LockState};
use nblock::options::{LockOptions, Timeout};
use nblock::store::Filter;
use nblock::sys::runtime::{self, wait};

use crate::asks::Shown;
use crate::child::{Actor, say};
use crate::support::{Directory, client, eventually, fresh_key, key, lock};

fn status(field: &str) -> u64 {
    let text = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = text.lines().find(|line| line.starts_with(field)).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

fn descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

/// Proportional set size, in KiB: the map of the data file included.
fn memory() -> u64 {
    rollup("Pss:")
}

/// Memory that is this process's alone, in KiB: not the code, of which it gets a larger share whenever another process
/// that runs it ends.
fn own_memory() -> u64 {
    rollup("Anonymous:")
}

fn rollup(field: &str) -> u64 {
    let text = std::fs::read_to_string("/proc/self/smaps_rollup").unwrap();
    let line = text.lines().find(|line| line.starts_with(field)).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

/// Holds very many locks at once, each renewed, and says what that took. In a process of its own: the
/// numbers are the process's.
pub fn many(url: &str, count: &str) {
    let count: usize = count.parse().unwrap();
    let client = client(url);
    // Whatever is made once is there before anything is measured.
    let first = lock(&client, &fresh_key());
    let expire = Duration::from_secs(30);
    let renewed = LockOptions { expire: Some(expire), auto_refresh: Some(true), ..LockOptions::default() };
    assert!(wait(first.try_lock(renewed)).unwrap());
    let before = (status("Threads:"), descriptors(), memory());
    let locks: Vec<Lock> = (0..count)
        .map(|number| {
            let lock = lock(&client, &key(&format!("many:{number:0>27}")));
            assert!(wait(lock.try_lock(renewed)).unwrap());
            lock
        })
        .collect();
    let after = (status("Threads:"), descriptors(), memory());
    // The blocking pool may have started; a thread or a descriptor per lock would be thousands.
    assert!(after.0 <= before.0 + 16, "{} threads for {count} locks", after.0.saturating_sub(before.0));
    assert!(after.1 <= before.1 + 16, "{} descriptors for {count} locks", after.1.saturating_sub(before.1));
    let bytes = (after.2.saturating_sub(before.2)) * 1024 / count as u64;
    // Every one of them is renewed: its number grows beyond the grant's.
    let newest = &locks[count - 1];
    for sample in locks.iter().step_by(count / 50).chain([newest]) {
        eventually("it is renewed", || {
            wait(client.find(sample.key())).unwrap().is_some_and(|found| found.seen().n > 1)
        });
    }
    let held = locks.iter().filter(|lock| lock.state() == LockState::Held).count();
    assert_eq!(held, count, "renewals did not keep up");
    for lock in &locks {
        wait(lock.unlock()).unwrap();
    }
    drop(first);
    say(format_args!("{count} held locks: {bytes} bytes each, {} threads more", after.0.saturating_sub(before.0)));
}

#[test]
fn many_held_locks() {
    let directory = Directory::quick();
    let mut actor = Actor::start("many", &[&directory.url(), "100000"]);
    let said = actor.says();
    println!("{said}");
    let bytes: u64 = said.split(' ').nth(3).unwrap().parse().unwrap();
    assert!(bytes <= 2048, "{said}");
    actor.ends();
}

/// Cycles of lock and unlock that may leave nothing behind: no memory, descriptor, thread, or room in the
/// data file.
pub fn cycles(url: &str, count: &str) {
    let client = client(url);
    let lock = lock(&client, &fresh_key());
    let cycle = |count: u64| {
        for _ in 0..count {
            assert!(wait(lock.try_lock(LockOptions::default())).unwrap());
            wait(lock.unlock()).unwrap();
        }
    };
    let data = || url.strip_prefix("embedded:").map_or(0, data_size);
    cycle(10_000);
    // Every four million grants, fences are reserved on a thread of the library: its threads are there before anything is
    // measured.
    let started = runtime::handle().unwrap().spawn_blocking(|| ());
    eventually("the threads have started", || started.is_finished());
    let before = (own_memory(), descriptors(), status("Threads:"), data());
    cycle(count.parse().unwrap());
    let after = (own_memory(), descriptors(), status("Threads:"), data());
    assert!(after.0 <= before.0 + 256, "{count} cycles made the process grow from {} to {} KiB", before.0, after.0);
    assert_eq!((after.1, after.3), (before.1, before.3), "descriptors, bytes of data");
    assert!(after.2 <= before.2, "{} threads became {}", before.2, after.2);
    assert!(wait(client.list(Filter::All)).unwrap().is_empty());
    say(format_args!("{count} cycles: {} KiB before, {} KiB after", before.0, after.0));
}

/// How long the table in a directory is.
fn data_size(directory: &str) -> u64 {
    let mut files = std::fs::read_dir(directory).unwrap().map(Result::unwrap);
    let data = files.find(|file| file.file_name().to_string_lossy().starts_with("table-")).unwrap();
    data.metadata().unwrap().len()
}

/// `make torture` asks for ten million.
#[test]
fn cycles_leave_nothing_behind() {
    let count = std::env::var("NBLOCK_TORTURE_CYCLES")
        .ok()
        .filter(|count| !count.is_empty())
        .unwrap_or_else(|| "300000".to_string());
    let directory = Directory::quick();
    for url in [&*directory.url(), "memory:"] {
        let mut actor = Actor::start("cycles", &[url, &count]);
        println!("{url}: {}", actor.says());
        actor.ends();
    }
}

/// Runs out of descriptors, and says what still works.
pub fn exhausted(url: &str, _: &str) {
    let client = client(url);
    let held = lock(&client, &fresh_key());
    assert!(wait(held.try_lock(LockOptions::default())).unwrap());
    let mut taken = Vec::new();
    let limit = libc::rlimit { rlim_cur: 256, rlim_max: 256 };
    // SAFETY: reads one rlimit.
    assert_eq!(unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &limit) }, 0);
    while let Ok(file) = std::fs::File::open("/dev/null") {
        taken.push(file);
    }
    assert!(taken.last().unwrap().as_raw_fd() > 200);
    // A lock needs none.
    let other = lock(&client, &fresh_key());
    assert!(wait(other.try_lock(LockOptions::default())).unwrap());
    wait(other.unlock()).unwrap();
    wait(held.refresh(None)).unwrap();
    // What needs one says so, and nothing is lost by it.
    let error = held.lost_fd().unwrap_err();
    assert_eq!(error.kind(), nblock::error::ErrorKind::Resources, "{error}");
    assert_eq!(held.state(), LockState::Held);
    let rival = lock(&client, held.key());
    let briefly = LockOptions { timeout: Some(Timeout::After(Duration::from_millis(20))), ..LockOptions::default() };
    match wait(rival.lock(briefly)) {
        Ok(granted) => assert!(!granted),
        Err(error) => assert_eq!(error.kind(), nblock::error::ErrorKind::Resources, "{error}"),
    }
    drop(taken);
    assert!(held.lost_fd().unwrap() >= 0);
    wait(held.unlock()).unwrap();
    assert!(wait(client.list(Filter::All)).unwrap().is_empty());
    say("whole");
}

#[test]
fn without_descriptors_nothing_is_lost() {
    let directory = Directory::quick();
    let mut actor = Actor::start("exhausted", &[&directory.url(), ""]);
    assert_eq!(actor.says(), "whole");
    actor.ends();
}

/// For how long the threads of a process were running.
fn run_time_of(pid: u32) -> Duration {
    let ran = |task: std::io::Result<std::fs::DirEntry>| -> Option<u64> {
        // A thread may end while it is looked at.
        let text = std::fs::read_to_string(task.ok()?.path().join("schedstat")).ok()?;
        text.split_whitespace().next()?.parse().ok()
    };
    Duration::from_nanos(std::fs::read_dir(format!("/proc/{pid}/task")).unwrap().filter_map(ran).sum())
}

/// How often threads of a process began to sleep.
fn sleeps_of(pid: u32) -> u64 {
    let sleeps = |task: std::io::Result<std::fs::DirEntry>| -> Option<u64> {
        // A thread may end while it is looked at.
        let text = std::fs::read_to_string(task.ok()?.path().join("status")).ok()?;
        let line = text.lines().find(|line| line.starts_with("voluntary_ctxt_switches"))?;
        line.split_whitespace().nth(1)?.parse().ok()
    };
    std::fs::read_dir(format!("/proc/{pid}/task")).unwrap().filter_map(sleeps).sum()
}

/// One thread of the process looks once a second. The one that waits, and the one of the timers, sleep on. What that costs
/// is printed.
#[test]
fn who_waits_is_hardly_ever_woken() {
    const SECONDS: u64 = 12;
    let directory = Directory::new();
    let client = client(&directory.url());
    let held = lock(&client, &key("awaited"));
    assert!(
        wait(held.try_lock(LockOptions { expire: Some(Duration::from_secs(600)), ..LockOptions::default() })).unwrap()
    );
    let mut waiter = Actor::start("waiter", &[&directory.url(), "awaited"]);
    assert_eq!(waiter.says(), "waiting");
    // The first looks come a second after another.
    std::thread::sleep(Duration::from_secs(4));
    let before = (sleeps_of(waiter.pid()), run_time_of(waiter.pid()));
    std::thread::sleep(Duration::from_secs(SECONDS));
    let woken = sleeps_of(waiter.pid()) - before.0;
    let ran = run_time_of(waiter.pid()) - before.1;
    println!(
        "one that waits was woken {woken} times within {SECONDS} s, and ran for {:?} a minute",
        ran * 60 / SECONDS as u32
    );
    assert!(woken < 2 * SECONDS, "woken {woken} times within {SECONDS} s");
    wait(held.unlock()).unwrap();
    waiter.says();
}
