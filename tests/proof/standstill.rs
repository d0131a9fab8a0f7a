//! A thread that waits for an answer reads its connection for all who use it. One that stands still meanwhile, because
//! the handler of a signal runs in it or a debugger has stopped it, must not keep their answers from them (R11).

use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU64, Ordering};
use std::time::Duration;

use nblock::options::{LockOptions, Timeout};
use nblock::sys::runtime::wait;

use crate::asks::Shown;
use crate::support::{PATIENCE, client, eventually, fresh_key, lock};

static STANDS_STILL: AtomicBool = AtomicBool::new(false);
static GOES_ON: AtomicBool = AtomicBool::new(false);

extern "C" fn stand_still(_: i32) {
    STANDS_STILL.store(true, Ordering::SeqCst);
    while !GOES_ON.load(Ordering::SeqCst) {
        // SAFETY: sleeps, as a handler of signals may.
        unsafe { libc::poll(std::ptr::null_mut(), 0, 1) };
    }
}

/// Whether a thread sleeps in the library, where it waits for an answer or to be woken.
fn sleeps(task: i32) -> bool {
    let path = format!("/proc/self/task/{task}/syscall");
    let calls =
        [libc::SYS_poll, libc::SYS_ppoll, libc::SYS_futex, libc::SYS_futex_waitv].map(|call| format!("{call} "));
    (0..20).all(|_| {
        std::thread::sleep(Duration::from_millis(5));
        std::fs::read_to_string(&path).is_ok_and(|said| calls.iter().any(|call| said.starts_with(call)))
    })
}

/// The role. (The handler is the process's.)
pub fn standing_still(url: &str) {
    let client = client(url);
    let held = lock(&client, &fresh_key());
    assert!(wait(held.try_lock(LockOptions::default())).unwrap());
    let (thread, task) = (AtomicU64::new(0), AtomicI32::new(0));
    // SAFETY: the handler does what handlers may.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = stand_still as *const () as usize;
        action.sa_flags = libc::SA_RESTART;
        assert_eq!(libc::sigaction(libc::SIGUSR1, &action, std::ptr::null_mut()), 0);
    }
    std::thread::scope(|scope| {
        scope.spawn(|| {
            // SAFETY: both ask for a number.
            unsafe {
                thread.store(libc::pthread_self(), Ordering::SeqCst);
                task.store(libc::gettid(), Ordering::SeqCst);
            }
            let waiting = lock(&client, held.key());
            let within = LockOptions { timeout: Some(Timeout::After(PATIENCE)), ..LockOptions::default() };
            assert!(wait(waiting.lock(within)).unwrap());
            wait(waiting.unlock()).unwrap();
        });
        eventually("it waits", || task.load(Ordering::SeqCst) != 0 && sleeps(task.load(Ordering::SeqCst)));
        // SAFETY: the thread has not ended: it waits.
        assert_eq!(unsafe { libc::pthread_kill(thread.load(Ordering::SeqCst), libc::SIGUSR1) }, 0);
        eventually("it stands still", || STANDS_STILL.load(Ordering::SeqCst));
        let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            // Alone, and two at once, by a thread that waits and by tasks that none waits for.
            let other = lock(&client, &fresh_key());
            for _ in 0..3 {
                assert!(wait(other.try_lock(LockOptions::default())).unwrap());
                wait(other.unlock()).unwrap();
            }
            let renewed = LockOptions {
                expire: Some(Duration::from_secs(3)),
                auto_refresh: Some(true),
                ..LockOptions::default()
            };
            assert!(wait(other.try_lock(renewed)).unwrap());
            let before = wait(client.find(other.key())).unwrap().unwrap().seen().n;
            eventually("it is renewed", || {
                wait(client.find(other.key())).unwrap().is_some_and(|found| found.seen().n > before)
            });
            wait(other.unlock()).unwrap();
        }));
        GOES_ON.store(true, Ordering::SeqCst);
        wait(held.unlock()).unwrap();
        outcome.unwrap();
    });
    crate::child::say("well");
}

fn nobody_waits_for_it(url: &str) {
    let mut actor = crate::child::Actor::start("standing still", &[url]);
    assert_eq!(actor.says(), "well");
    actor.ends();
}

#[test]
fn redis_answers_beside_a_thread_that_stands_still() {
    nobody_waits_for_it(&crate::redis::server().url);
}

#[test]
fn postgres_answers_beside_a_thread_that_stands_still() {
    nobody_waits_for_it(&crate::postgres::shared().url);
}

#[test]
fn reql_answers_beside_a_thread_that_stands_still() {
    nobody_waits_for_it(&crate::reql::Server::start(1).url());
}
