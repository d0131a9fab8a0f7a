//! What waiting costs: the CPU time of one thread, and a thousand waiters compared with one.

use std::os::fd::FromRawFd;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};
use std::{fs, io};

use crate::{client, forever, give, lock, report, take};

pub fn run(url: &str) {
    cpu(url);
    let one = throughput(url, 1);
    let thousand = throughput(url, 1_000);
    report("embedded: grants a second, 1,000 waiting", thousand, "1 waiting", one, "/s", ">= 0.8");
}

/// The CPU time of this process while one of its threads waits for a lock.
fn cpu(url: &str) {
    let (holder, waiter) = (lock(client(url), "jobs:cpu"), lock(client(url), "jobs:cpu") as usize);
    let options = forever();
    take(holder, &options);
    let thread = std::thread::spawn(move || {
        take(waiter as _, &forever());
        give(waiter as _);
    });
    // Measured after a while, because most waiting time is spent in long waits.
    std::thread::sleep(Duration::from_secs(15));
    let polling = bare_polling(MEASURED_SECS);
    let before = cpu_time();
    std::thread::sleep(Duration::from_secs(MEASURED_SECS));
    let a_minute = |used: Duration| used.as_secs_f64() * 1e3 * 60.0 / MEASURED_SECS as f64;
    let waiting = a_minute(cpu_time() - before);
    let polling = a_minute(polling());
    give(holder);
    thread.join().expect("the waiter");
    report("embedded: one thread waits, CPU a minute", waiting, "bare: one lstat a second", polling, "ms", "< 1 ms");
}

const MEASURED_SECS: u64 = 30;

/// The CPU time of a process that only calls `lstat` once a second, measured at the same time.
fn bare_polling(seconds: u64) -> impl FnOnce() -> Duration {
    let mut pipe = [0; 2];
    assert_eq!(unsafe { libc::pipe2(pipe.as_mut_ptr(), libc::O_CLOEXEC) }, 0, "{}", io::Error::last_os_error());
    let child = unsafe { libc::fork() };
    if child == 0 {
        // Only calls that are allowed in a child whose parent has other threads.
        unsafe {
            let before = cpu_time();
            for _ in 0..seconds {
                libc::nanosleep(&libc::timespec { tv_sec: 1, tv_nsec: 0 }, std::ptr::null_mut());
                let mut status = std::mem::zeroed();
                libc::lstat(c"/".as_ptr(), &mut status);
            }
            let used = (cpu_time() - before).as_nanos() as u64;
            libc::write(pipe[1], (&raw const used).cast(), size_of::<u64>());
            libc::_exit(0);
        }
    }
    assert!(child > 0, "{}", io::Error::last_os_error());
    unsafe { libc::close(pipe[1]) };
    move || {
        let mut used = [0; size_of::<u64>()];
        io::Read::read_exact(&mut unsafe { fs::File::from_raw_fd(pipe[0]) }, &mut used).expect("the child's figure");
        unsafe { libc::waitpid(child, std::ptr::null_mut(), 0) };
        Duration::from_nanos(u64::from_ne_bytes(used))
    }
}

fn cpu_time() -> Duration {
    let mut usage = unsafe { std::mem::zeroed::<libc::rusage>() };
    unsafe { libc::getrusage(libc::RUSAGE_SELF, &mut usage) };
    let time = |time: libc::timeval| Duration::new(time.tv_sec as u64, time.tv_usec as u32 * 1_000);
    time(usage.ru_utime) + time(usage.ru_stime)
}

/// Grants per second while this many threads wait for one lock. A holder releases it only when another thread is about
/// to wait, so that every grant is a hand-over.
fn throughput(url: &str, threads: usize) -> f64 {
    const GRANTS: usize = 20_000;
    let client = client(url) as usize;
    let left = AtomicUsize::new(GRANTS);
    let asking = AtomicUsize::new(0);
    let start = Instant::now();
    std::thread::scope(|scope| {
        for _ in 0..threads + 1 {
            let (left, asking) = (&left, &asking);
            let run = move || {
                let lock = lock(client as _, "jobs:throughput");
                let options = forever();
                loop {
                    asking.fetch_add(1, Ordering::SeqCst);
                    take(lock, &options);
                    asking.fetch_sub(1, Ordering::SeqCst);
                    let over =
                        left.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1)).is_err();
                    while !over && asking.load(Ordering::SeqCst) == 0 {
                        std::thread::yield_now();
                    }
                    give(lock);
                    if over {
                        return;
                    }
                }
            };
            std::thread::Builder::new().stack_size(64 << 10).spawn_scoped(scope, run).expect("a thread");
        }
    });
    GRANTS as f64 / start.elapsed().as_secs_f64()
}
