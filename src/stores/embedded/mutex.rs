//! The C library's mutexes: robust (a dead owner's is handed on), shared by processes, and waited for
//! with a limit.

use std::cell::Cell;
use std::io;
use std::mem::MaybeUninit;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use super::directory::failed;
use crate::store::StoreError;
use crate::sys::process;
use crate::sys::runtime;

/// How many of a mutex's first words tell whether somebody has it and of what kind it is, in glibc and in
/// musl. Behind them are links, which mean nothing while nobody has it.
pub const WORDS: usize = 6;

/// Makes a mutex that processes share, and that is handed on when its owner dies.
pub fn make(mutex: *mut libc::pthread_mutex_t) -> Result<(), StoreError> {
    let mut attributes = MaybeUninit::uninit();
    // SAFETY: the caller has room for a mutex that nobody uses; attributes are initialised before they
    // are used.
    let made = unsafe {
        let made = [
            libc::pthread_mutexattr_init(attributes.as_mut_ptr()),
            libc::pthread_mutexattr_setpshared(attributes.as_mut_ptr(), libc::PTHREAD_PROCESS_SHARED),
            libc::pthread_mutexattr_setrobust(attributes.as_mut_ptr(), libc::PTHREAD_MUTEX_ROBUST),
            libc::pthread_mutex_init(mutex, attributes.as_ptr()),
        ];
        libc::pthread_mutexattr_destroy(attributes.as_mut_ptr());
        made
    };
    match made.into_iter().find(|&status| status != 0) {
        None => Ok(()),
        Some(status) => Err(failed("a robust mutex could not be made", &io::Error::from_raw_os_error(status))),
    }
}

/// Whether the C library knows this thread's true number, which it writes into robust mutexes.
///
/// It does not in a child made by `clone` behind its back: such a child would own mutexes in its
/// parent's name, and its death would not be noticed. Threads that the child starts are sound.
pub fn may_be_owned() -> bool {
    thread_local! {
        static KNOWN: Cell<(u64, bool)> = const { Cell::new((0, false)) };
    }
    let generation = process::generation();
    KNOWN.with(|known| match known.get() {
        (of, may) if of == generation => may,
        _ => {
            let may = owns_in_its_own_name();
            known.set((generation, may));
            may
        }
    })
}

/// Runs something that waits for a mutex: here, or where this thread may own none, on another.
pub fn where_they_may_be_owned<T: Send>(work: impl FnOnce() -> T + Send) -> T {
    if may_be_owned() {
        return work();
    }
    let done = runtime::with_signals_blocked(|| std::thread::scope(|scope| scope.spawn(work).join()));
    done.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

#[cold]
fn owns_in_its_own_name() -> bool {
    /// One of the first words is the futex word: the number of the owner's thread, under two flags
    /// (linux/futex.h: FUTEX_TID_MASK).
    const TID_MASK: u32 = 0x3fff_ffff;
    let mut mutex = MaybeUninit::<libc::pthread_mutex_t>::uninit();
    let mut attributes = MaybeUninit::uninit();
    // SAFETY: attributes and mutex are initialised, used by this thread alone, and destroyed.
    unsafe {
        libc::pthread_mutexattr_init(attributes.as_mut_ptr());
        libc::pthread_mutexattr_setrobust(attributes.as_mut_ptr(), libc::PTHREAD_MUTEX_ROBUST);
        libc::pthread_mutex_init(mutex.as_mut_ptr(), attributes.as_ptr());
        libc::pthread_mutexattr_destroy(attributes.as_mut_ptr());
        libc::pthread_mutex_lock(mutex.as_mut_ptr());
        let words: [u32; WORDS] = mutex.as_ptr().cast::<[u32; WORDS]>().read();
        libc::pthread_mutex_unlock(mutex.as_mut_ptr());
        libc::pthread_mutex_destroy(mutex.as_mut_ptr());
        let thread = libc::syscall(libc::SYS_gettid) as u32;
        words.iter().any(|word| word & TID_MASK == thread)
    }
}

/// Locks, or gives up: `ETIMEDOUT` when so long has passed, perhaps earlier when the clock was set.
pub fn timed_lock(mutex: *mut libc::pthread_mutex_t, left: Duration) -> i32 {
    type ClockLock = unsafe extern "C" fn(*mut libc::pthread_mutex_t, libc::clockid_t, *const libc::timespec) -> i32;
    /// How long a wait by the wall clock may be, which somebody may set back meanwhile.
    const SLICE: Duration = Duration::from_millis(100);
    // glibc has it since 2.30, and musl does not: it must not be needed for linking.
    static CLOCK_LOCK: AtomicUsize = AtomicUsize::new(0);
    let found = match CLOCK_LOCK.load(Ordering::Relaxed) {
        0 => {
            // SAFETY: a name that ends with NUL; the handle is predefined.
            let found = unsafe { libc::dlsym(libc::RTLD_DEFAULT, c"pthread_mutex_clocklock".as_ptr()) } as usize;
            let found = if found == 0 { usize::MAX } else { found };
            CLOCK_LOCK.store(found, Ordering::Relaxed);
            found
        }
        found => found,
    };
    if found == usize::MAX {
        let until = moment(libc::CLOCK_REALTIME, left.min(SLICE));
        // SAFETY: an initialised mutex, and a valid time.
        return unsafe { libc::pthread_mutex_timedlock(mutex, &until) };
    }
    let until = moment(libc::CLOCK_MONOTONIC, left);
    // SAFETY: the C library's function of that name has this type; mutex and time are valid.
    unsafe {
        let clock_lock: ClockLock = std::mem::transmute(found as *const ());
        clock_lock(mutex, libc::CLOCK_MONOTONIC, &until)
    }
}

/// The moment after so long on a clock.
pub fn moment(clock: libc::clockid_t, left: Duration) -> libc::timespec {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: writes one timespec.
    unsafe { libc::clock_gettime(clock, &mut time) };
    let nanos = time.tv_nsec as u64 + u64::from(left.subsec_nanos());
    time.tv_sec += left.as_secs() as i64 + (nanos / 1_000_000_000) as i64;
    time.tv_nsec = (nanos % 1_000_000_000) as i64;
    time
}
