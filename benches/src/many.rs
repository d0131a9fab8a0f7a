//! A hundred thousand locks held at once, all of them renewed.

use std::time::{Duration, Instant};

use nblock::ffi::*;

use crate::{client, forever, lock, take};

pub fn run(url: &str) {
    const LOCKS: usize = 100_000;
    let client = client(url);
    let options = nbl_lock_options_t { auto_refresh: NBL_ON, expire_ms: 6_000, ..forever() };
    take(lock(client, "jobs:first"), &options);
    let before = proportional_set_size();
    let start = Instant::now();
    let locks: Vec<_> = (0..LOCKS).map(|index| lock(client, &format!("jobs:{index:027}"))).collect();
    for &lock in &locks {
        take(lock, &options);
    }
    let took = start.elapsed();
    let grown = proportional_set_size() - before;
    println!(
        "{:<44} {:>9.0} bytes a lock  (aim <= 1024); taken in {took:.2?}",
        "embedded: 100,000 held and renewed",
        grown as f64 / LOCKS as f64
    );
    let mut overdue = 0;
    let mut least = u64::MAX;
    let end = Instant::now() + Duration::from_secs(12);
    while Instant::now() < end {
        for &lock in &locks {
            let mut left = 0;
            match unsafe { nbl_lock_remaining_ms(lock, &mut left, std::ptr::null_mut()) } {
                NBL_OK if left > 0 => least = least.min(left),
                _ => overdue += 1,
            }
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    println!(
        "{:<44} {least:>9} ms were left at the least, of leases of 6,000; {overdue} seen overdue or lost  (aim 0)",
        "embedded: renewing them, for 12 s"
    );
    let start = Instant::now();
    for &lock in &locks {
        unsafe {
            assert_eq!(nbl_unlock(lock, std::ptr::null_mut()), NBL_OK);
            nbl_lock_free(lock);
        }
    }
    println!("{:<44} {:>9.2} us each", "embedded: releasing them", start.elapsed().as_secs_f64() * 1e6 / LOCKS as f64);
}

/// The proportional set size of this process, including its mappings, in bytes.
fn proportional_set_size() -> u64 {
    let rollup = std::fs::read_to_string("/proc/self/smaps_rollup").expect("the kernel tells");
    let line = rollup.lines().find(|line| line.starts_with("Pss:")).expect("a line of Pss");
    line.split_whitespace().nth(1).and_then(|kilobytes| kilobytes.parse::<u64>().ok()).expect("a number") * 1024
}
