//! This thread, as the kernel knows it: its number, and the mutex that it may die with.
//!
//! When a thread ends, the kernel reads its *robust list* (linux/futex.h, `struct robust_list_head`), which the C
//! library has registered for its own mutexes. One field of its head, `list_op_pending`, names a single futex that the
//! thread is about to take or release. Only that field is used here. The head is in private memory of the thread, so
//! another process cannot change it, and nothing depends on the layout of the C library's mutexes.

use std::cell::Cell;
use std::ffi::{c_long, c_void};
use std::marker::PhantomData;
use std::ptr;
use std::sync::atomic::{Ordering::SeqCst, compiler_fence};

use super::word::Word32;

/// `struct robust_list_head`.
#[repr(C)]
struct RobustList {
    first: *mut c_void,
    futex_offset: c_long,
    pending: *mut c_void,
}

struct Known {
    /// 0 before the rest is known.
    generation: Cell<u64>,
    number: Cell<u32>,
    list: Cell<*mut RobustList>,
    /// The generation in which this thread took the mutex that it holds; 0 if it holds none.
    inside: Cell<u64>,
}

thread_local! {
    static KNOWN: Known = const {
        Known {
            generation: Cell::new(0),
            number: Cell::new(0),
            list: Cell::new(ptr::null_mut()),
            inside: Cell::new(0),
        }
    };
}

/// The calling thread. Not to be sent to another.
#[derive(Clone, Copy)]
pub struct Thread {
    /// The thread's own data, which lives as long as the thread.
    known: *const Known,
}

/// While this lives, the kernel hands the mutex on if this thread dies. A thread has one at a time.
pub struct Pending<'a> {
    pub thread: Thread,
    before: *mut c_void,
    _word: PhantomData<&'a Word32>,
}

impl Thread {
    /// The calling thread, in this generation. `None` if the kernel has no robust list for the thread, and does not
    /// accept one.
    #[inline]
    pub fn current(generation: u64) -> Option<Thread> {
        KNOWN.with(|known| {
            if known.generation.get() != generation {
                look_up(known, generation);
            }
            (!known.list.get().is_null()).then_some(Thread { known })
        })
    }

    #[inline]
    fn known(&self) -> &Known {
        // SAFETY: of this thread, which is running, and without a destructor.
        unsafe { &*self.known }
    }

    /// The thread's number in this PID namespace, which the kernel expects in mutexes.
    #[inline]
    pub fn number(self) -> u32 {
        self.known().number.get()
    }

    /// Whether this thread holds one of our mutexes already: in a signal handler that interrupted an operation, it
    /// does.
    #[inline]
    pub fn is_inside(self) -> bool {
        self.known().inside.get() == self.known().generation.get()
    }

    /// Names the mutex that this thread is about to take. This comes before the word is changed, so that the thread
    /// never holds a mutex that the kernel does not know of.
    #[inline]
    pub fn about_to_take(self, word: &Word32) -> Pending<'_> {
        let known = self.known();
        known.inside.set(known.generation.get());
        let list = known.list.get();
        // SAFETY: the list's head belongs to this thread and lives as long as it does.
        let before = unsafe {
            let pending = &raw mut (*list).pending;
            let before = pending.read_volatile();
            // The kernel adds the offset to find the futex.
            pending.write_volatile(
                word.address().cast_mut().cast::<u8>().wrapping_offset(-(*list).futex_offset as isize).cast(),
            );
            before
        };
        compiler_fence(SeqCst);
        Pending { thread: self, before, _word: PhantomData }
    }
}

impl Drop for Pending<'_> {
    #[inline]
    fn drop(&mut self) {
        compiler_fence(SeqCst);
        let known = self.thread.known();
        // SAFETY: as above. The former value is restored: it belongs to the code that was interrupted if this is a
        // signal handler.
        unsafe { (&raw mut (*known.list.get()).pending).write_volatile(self.before) };
        known.inside.set(0);
    }
}

#[cold]
fn look_up(known: &Known, generation: u64) {
    // SAFETY: cannot fail and touches nothing.
    known.number.set(unsafe { libc::syscall(libc::SYS_gettid) } as u32);
    known.list.set(registered(known.list.get()));
    known.generation.set(generation);
}

/// The robust list of this thread. `former` is the one that this thread, or the thread that it is a copy of, had
/// before.
fn registered(former: *mut RobustList) -> *mut RobustList {
    let asked = || {
        let (mut list, mut size) = (ptr::null_mut::<RobustList>(), 0usize);
        // SAFETY: writes the two.
        let status = unsafe { libc::syscall(libc::SYS_get_robust_list, 0, &raw mut list, &raw mut size) };
        if status == 0 && size == size_of::<RobustList>() { list } else { ptr::null_mut() }
    };
    let found = asked();
    if !found.is_null() {
        return found;
    }
    // musl registers a list when the thread takes its first robust mutex.
    let _ = take_a_robust_mutex();
    let found = asked();
    if !found.is_null() {
        return found;
    }
    // In a child made by a raw clone(), the kernel has no list.
    let list = if former.is_null() {
        let list =
            Box::leak(Box::new(RobustList { first: ptr::null_mut(), futex_offset: 0, pending: ptr::null_mut() }));
        // An empty list leads to itself.
        list.first = (&raw mut *list).cast();
        &raw mut *list
    } else {
        former
    };
    // SAFETY: the head lives as long as the thread: it is the C library's own, or never freed.
    unsafe { libc::syscall(libc::SYS_set_robust_list, list, size_of::<RobustList>()) };
    asked()
}

fn take_a_robust_mutex() -> bool {
    let mut mutex = std::mem::MaybeUninit::<libc::pthread_mutex_t>::uninit();
    let mut attributes = std::mem::MaybeUninit::uninit();
    // SAFETY: attributes and mutex are initialised, used by this thread alone, and destroyed.
    unsafe {
        libc::pthread_mutexattr_init(attributes.as_mut_ptr());
        libc::pthread_mutexattr_setrobust(attributes.as_mut_ptr(), libc::PTHREAD_MUTEX_ROBUST);
        libc::pthread_mutexattr_setpshared(attributes.as_mut_ptr(), libc::PTHREAD_PROCESS_SHARED);
        libc::pthread_mutex_init(mutex.as_mut_ptr(), attributes.as_ptr());
        libc::pthread_mutexattr_destroy(attributes.as_mut_ptr());
        let locked = libc::pthread_mutex_lock(mutex.as_mut_ptr()) == 0;
        if locked {
            libc::pthread_mutex_unlock(mutex.as_mut_ptr());
        }
        libc::pthread_mutex_destroy(mutex.as_mut_ptr());
        locked
    }
}

/// Whether a thread with that number exists, and has not ended (a zombie).
pub fn is_alive(number: u32) -> bool {
    // SAFETY: signal 0 is sent to nobody.
    let status = unsafe { libc::kill(number as libc::pid_t, 0) };
    if status != 0 && std::io::Error::last_os_error().raw_os_error() == Some(libc::ESRCH) {
        return false;
    }
    // A process that was killed and not yet waited for has no thread that could release the mutex.
    let stat = std::fs::read_to_string(format!("/proc/{number}/stat")).unwrap_or_default();
    let state = stat.rsplit_once(") ").and_then(|(_, rest)| rest.chars().next());
    !matches!(state, Some('Z' | 'X'))
}

/// The process that a thread belongs to.
pub fn process_of(number: u32) -> Option<u32> {
    let status = std::fs::read_to_string(format!("/proc/{number}/status")).ok()?;
    status.lines().find_map(|line| line.strip_prefix("Tgid:"))?.trim().parse().ok()
}
