//! `make bench`: what a lock costs. Each figure is printed with the one it is compared with, and both are measured in
//! turns in the same run. The ratios matter; nothing here fails because something is slow.

mod handover;
mod many;
mod postgres;
mod processes;
mod redis;
mod rethinkdb;
mod table;
mod uncontended;
mod waiting;

use std::ffi::CString;
use std::ptr;
use std::time::{Duration, Instant};

use nblock::ffi::*;

fn main() {
    let chosen: Vec<String> = std::env::args().skip(1).collect();
    let wanted = |name: &str| chosen.is_empty() || chosen.iter().any(|chosen| chosen == name);
    let directory = std::env::temp_dir().join(format!("nblock-bench-{}", std::process::id()));
    std::fs::create_dir(&directory).expect("a directory for the store");
    let url = std::env::var("NBLOCK_BENCH_URL")
        .ok()
        .filter(|url| !url.is_empty())
        .unwrap_or(format!("embedded:{}/store", directory.display()));
    if wanted("handover") {
        // First, because it forks, which a process with threads should not do.
        handover::run(&url, &directory);
    }
    if wanted("processes") {
        processes::run(&directory);
    }
    if wanted("table") {
        // It forks too.
        table::run(&directory);
    }
    if wanted("uncontended") {
        uncontended::run(&url, &directory);
    }
    if wanted("waiting") {
        waiting::run(&url);
    }
    if wanted("many") {
        many::run(&url);
    }
    if wanted("postgres") {
        postgres::run();
    }
    if wanted("rethinkdb") {
        rethinkdb::run();
    }
    if wanted("redis") {
        redis::run(&directory);
    }
    let _ = std::fs::remove_dir_all(&directory);
}

/// Prints one line: what was measured, ours, theirs, the ratio, and the target.
fn report(what: &str, ours: f64, theirs_name: &str, theirs: f64, unit: &str, aim: &str) {
    println!(
        "{what:<44} {ours:>9.2} {unit:<3} {theirs_name:<26} {theirs:>9.2} {unit:<3} ratio {:>6.2}  (aim {aim})",
        ours / theirs
    );
}

/// The median time of one call of each side, in nanoseconds. In each round, the sides take turns.
fn in_turns<const N: usize>(rounds: usize, mut sides: [&mut dyn FnMut() -> Duration; N]) -> [f64; N] {
    let mut times = [const { Vec::new() }; N];
    for _ in 0..rounds {
        for (side, times) in sides.iter_mut().zip(&mut times) {
            times.push(side().as_nanos() as f64);
        }
    }
    times.map(median)
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// The nanoseconds from the release of the first lock to the grant of the second, for which a thread has waited for
/// `pause`. Both have the same key, but each its own store.
fn hand_over(locks: [usize; 2], pause: Duration) -> f64 {
    take(locks[0] as _, &forever());
    let (asked, waits) = std::sync::mpsc::channel();
    let waiter = std::thread::spawn(move || {
        asked.send(()).expect("the other thread waits");
        take(locks[1] as _, &forever());
        let granted = Instant::now();
        give(locks[1] as _);
        granted
    });
    waits.recv().expect("the thread runs");
    std::thread::sleep(pause);
    let released = Instant::now();
    give(locks[0] as _);
    (waiter.join().expect("the waiter") - released).as_nanos() as f64
}

/// The mean time of `count` calls.
fn each(count: u32, mut call: impl FnMut()) -> Duration {
    let start = Instant::now();
    for _ in 0..count {
        call();
    }
    start.elapsed() / count
}

fn client(url: &str) -> *mut nbl_client_t {
    let url = CString::new(url).expect("a URL has no NUL");
    let mut client = ptr::null_mut();
    let mut error = error();
    let status = unsafe { nbl_client_new(url.as_ptr(), ptr::null(), &mut client, &mut error) };
    assert_eq!(status, NBL_OK, "{}", message(&error));
    client
}

fn lock(client: *mut nbl_client_t, key: &str) -> *mut nbl_lock_t {
    let mut lock = ptr::null_mut();
    let status =
        unsafe { nbl_lock_new(client, key.as_ptr().cast(), key.len(), ptr::null(), &mut lock, ptr::null_mut()) };
    assert_eq!(status, NBL_OK);
    lock
}

fn forever() -> nbl_lock_options_t {
    nbl_lock_options_t {
        struct_size: size_of::<nbl_lock_options_t>() as u32,
        auto_refresh: 0,
        expire_ms: 0,
        timeout_ms: NBL_FOREVER,
        if_held: 0,
        fence: 0,
    }
}

fn take(lock: *mut nbl_lock_t, options: &nbl_lock_options_t) {
    let mut error = error();
    let status = unsafe { nbl_lock(lock, options, &mut error) };
    assert_eq!(status, NBL_OK, "{}", message(&error));
}

fn give(lock: *mut nbl_lock_t) {
    let mut error = error();
    let status = unsafe { nbl_unlock(lock, &mut error) };
    assert_eq!(status, NBL_OK, "{}", message(&error));
}

fn error() -> nbl_error_t {
    nbl_error_t { struct_size: size_of::<nbl_error_t>() as u32, status: 0, message: [0; NBL_ERROR_MESSAGE_SIZE] }
}

fn message(error: &nbl_error_t) -> String {
    unsafe { std::ffi::CStr::from_ptr(error.message.as_ptr()) }.to_string_lossy().into_owned()
}
