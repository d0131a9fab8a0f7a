//! The time from one process's release to another's grant, compared with flock.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use crate::{client, forever, give, lock, median, report, take};

/// The memory that the two processes share.
#[repr(C)]
struct Shared {
    started: AtomicU32,
    /// Set by the process that is about to wait: the round, counted from 1.
    waiting: AtomicU32,
    /// Set by the process that was granted the lock: the round, counted from 1.
    granted: AtomicU32,
    released_at: AtomicU64,
    results: [AtomicU64; ROUNDS],
}

const ROUNDS: usize = 4_000;

pub fn run(url: &str, directory: &Path) {
    let file = directory.join("flock");
    File::create(&file).expect("a file");
    let mut ours = Vec::new();
    let mut theirs = Vec::new();
    for _ in 0..3 {
        ours.extend(measure(|| {
            let lock = lock(client(url), "jobs:handover");
            let options = forever();
            (move || take(lock, &options), move || give(lock))
        }));
        theirs.extend(measure(|| {
            let file = File::open(&file).expect("the file");
            let descriptor = file.as_raw_fd();
            std::mem::forget(file);
            let flock = move |operation| assert_eq!(unsafe { libc::flock(descriptor, operation) }, 0);
            (move || flock(libc::LOCK_EX), move || flock(libc::LOCK_UN))
        }));
    }
    report("embedded: release to grant elsewhere", median(ours) / 1e3, "flock", median(theirs) / 1e3, "us", "<= 1.2");
}

/// Two processes hand a lock back and forth. Returns the times from release to grant, in nanoseconds.
fn measure<T: Fn(), G: Fn()>(open: impl Fn() -> (T, G)) -> Vec<f64> {
    let shared = unsafe {
        let memory = libc::mmap(
            std::ptr::null_mut(),
            size_of::<Shared>(),
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_SHARED | libc::MAP_ANONYMOUS,
            -1,
            0,
        );
        assert_ne!(memory, libc::MAP_FAILED);
        &*memory.cast::<Shared>()
    };
    let child = unsafe { libc::fork() };
    let me = usize::from(child == 0);
    let (take, give) = open();
    if me == 0 {
        take();
        shared.started.store(1, Ordering::Release);
    }
    spin_until(|| shared.started.load(Ordering::Acquire) == 1);
    for round in 0..ROUNDS {
        if round % 2 == me {
            // Give the other process, which is about to wait, time to fall asleep.
            spin_until(|| shared.waiting.load(Ordering::Acquire) == round as u32 + 1);
            let asleep = now() + 60_000;
            spin_until(|| now() > asleep);
            shared.released_at.store(now(), Ordering::Release);
            give();
            // Otherwise, this process could take the lock again before a waiter that is not asleep yet.
            spin_until(|| shared.granted.load(Ordering::Acquire) == round as u32 + 1);
        } else {
            shared.waiting.store(round as u32 + 1, Ordering::Release);
            take();
            shared.results[round].store(now() - shared.released_at.load(Ordering::Acquire), Ordering::Release);
            shared.granted.store(round as u32 + 1, Ordering::Release);
        }
    }
    if (ROUNDS - 1) % 2 != me {
        give();
    }
    if me == 1 {
        unsafe { libc::_exit(0) };
    }
    let mut status = 0;
    unsafe { libc::waitpid(child, &mut status, 0) };
    assert_eq!(status, 0, "the other process");
    shared.results.iter().map(|result| result.load(Ordering::Acquire) as f64).collect()
}

fn spin_until(condition: impl Fn() -> bool) {
    let end = now() + 30_000_000_000;
    while !condition() {
        assert!(now() < end, "the other process is gone");
        std::hint::spin_loop();
    }
}

fn now() -> u64 {
    nblock::clock::Boottime::now().as_nanos()
}
