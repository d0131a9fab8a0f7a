//! What waiting costs: one thread's CPU time, and a thousand waiters against one.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

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
    // A wait that has gone on for a while: that is what most waits are made of.
    std::thread::sleep(Duration::from_secs(15));
    let (before, start) = (cpu_time(), Instant::now());
    std::thread::sleep(Duration::from_secs(30));
    let used = cpu_time() - before;
    let a_minute = used.as_secs_f64() * 1e3 * 60.0 / start.elapsed().as_secs_f64();
    give(holder);
    thread.join().expect("the waiter");
    println!("{:<44} {a_minute:>9.3} ms of CPU a minute  (aim < 1)", "embedded: one thread that waits");
}

fn cpu_time() -> Duration {
    let mut usage = unsafe { std::mem::zeroed::<libc::rusage>() };
    unsafe { libc::getrusage(libc::RUSAGE_SELF, &mut usage) };
    let time = |time: libc::timeval| Duration::new(time.tv_sec as u64, time.tv_usec as u32 * 1_000);
    time(usage.ru_utime) + time(usage.ru_stime)
}

/// Grants a second while so many threads wait for the one lock, again and again. Whoever has it gives it
/// back when somebody else is about to wait, so that every grant is a hand-over.
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
