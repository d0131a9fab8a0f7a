//! Two processes, compared with one.

use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::{client, forever, give, lock, report, take};

/// Through the C interface. It forks.
pub fn run(directory: &Path) {
    let url = format!("embedded:{}", directory.join("processes").display());
    measure("embedded, C", |key| {
        let lock = lock(client(&url), &format!("jobs:{key}"));
        let options = forever();
        move || {
            take(lock, &options);
            give(lock);
        }
    });
}

/// The CPU time of this process.
fn processor_time() -> Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: writes one timespec.
    unsafe { libc::clock_gettime(libc::CLOCK_PROCESS_CPUTIME_ID, &mut time) };
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

/// Compares the cycles of two processes, on two keys and on one, with those of one process. They are counted per second
/// of CPU time, so that other load on the machine does not matter. `open` is called in each process.
pub fn measure<C: FnMut()>(what: &str, open: impl Fn(u64) -> C) {
    const SPAN: Duration = Duration::from_millis(300);
    // SAFETY: a new mapping that children share, never removed; zeroed atomics are valid.
    let rates = unsafe {
        let (protection, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED | libc::MAP_ANONYMOUS);
        &*libc::mmap(std::ptr::null_mut(), 4096, protection, flags, -1, 0).cast::<[[AtomicU64; 8]; 2]>()
    };
    let cycles = |workers: usize, same: bool| {
        let children: Vec<_> = (0..workers)
            .map(|worker| {
                // SAFETY: this process has no other threads yet.
                match unsafe { libc::fork() } {
                    0 => {
                        let mut cycle = open(if same { 0 } else { worker as u64 });
                        let (begun, before) = (Instant::now(), processor_time());
                        let mut done = 0u64;
                        while begun.elapsed() < SPAN {
                            (0..100).for_each(|_| cycle());
                            done += 100;
                        }
                        let rate = done as f64 / (processor_time() - before).as_secs_f64();
                        rates[worker][0].store(rate as u64, Ordering::SeqCst);
                        // SAFETY: ends the child.
                        unsafe { libc::_exit(0) }
                    }
                    child => child,
                }
            })
            .collect();
        for child in children {
            // SAFETY: a child of this process.
            unsafe { libc::waitpid(child, std::ptr::null_mut(), 0) };
        }
        (0..workers).map(|worker| rates[worker][0].load(Ordering::SeqCst)).sum::<u64>() as f64 / 1e6
    };
    let mut rounds: Vec<[f64; 3]> = (0..7).map(|_| [cycles(1, false), cycles(2, false), cycles(2, true)]).collect();
    let [one, two, same] = std::array::from_fn(|at| {
        rounds.sort_by(|a, b| a[at].total_cmp(&b[at]));
        rounds[rounds.len() / 2][at]
    });
    report(&format!("{what}: two processes, two keys"), two, "one process", one, "M/s", ">= 1.7");
    report(&format!("{what}: two processes, one key"), same, "one process", one, "M/s", "-");
}
