//! The identity of this process, across `fork`, without a system call per use.
//!
//! All state that the library changes (open stores, queues, the runtime, the state of a lock) belongs to one
//! *generation*: one process, from its start or fork to its end. A forked child is a new generation. It never touches
//! its parent's state, neither data nor a mutex that another thread of the parent had locked at the fork. It starts
//! with new state, and leaks what it cannot use.

use std::cell::Cell;
use std::ffi::CStr;
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicPtr, AtomicU64, Ordering};

use crate::error::{Error, ErrorKind};

/// The page that the kernel wipes in a forked child, raw `clone` included; `NO_PAGE` before there is one.
static PAGE: AtomicPtr<AtomicU64> = AtomicPtr::new((&raw const NO_PAGE).cast_mut());

/// Never written to, and always 0, so that readers need not check whether there is a page.
static NO_PAGE: AtomicU64 = AtomicU64::new(0);

/// The number of the next generation. A child inherits it, so its number differs from those of its ancestors.
static NEXT: AtomicU64 = AtomicU64::new(1);

/// The generation of this process. Never 0, and different in a forked child.
#[inline]
pub fn generation() -> u64 {
    // SAFETY: a page once published is never unmapped, and neither is what stands for none.
    match unsafe { &*PAGE.load(Ordering::Acquire) }.load(Ordering::Acquire) {
        0 => begin_generation(),
        number => number,
    }
}

thread_local! {
    /// The generation in which this thread's call of a C function began; 0 outside of one.
    static CALL: Cell<u64> = const { Cell::new(0) };
}

/// A call of a C function, until it is dropped.
pub struct Call {
    before: u64,
    began_in: u64,
    /// The cell of the thread that makes the call.
    current: *const Cell<u64>,
}

impl Call {
    #[inline]
    pub fn begin() -> Call {
        let began_in = generation();
        CALL.with(|current| Call { before: current.replace(began_in), began_in, current })
    }

    /// Whether this is a child process, because a signal handler has forked during the call: then the call is the
    /// parent's.
    #[inline]
    pub fn is_the_parents(&self) -> bool {
        self.began_in != generation()
    }
}

impl Drop for Call {
    fn drop(&mut self) {
        // SAFETY: a call ends on its thread, and the cell has no destructor.
        unsafe { (*self.current).set(self.before) };
    }
}

/// The generation in which the present call of this thread began.
#[inline]
pub fn generation_of_call() -> u64 {
    match CALL.get() {
        0 => generation(),
        began_in => began_in,
    }
}

/// The error number if there is no such page, or 0.
static REFUSED: AtomicI32 = AtomicI32::new(0);

/// Fails if the kernel provides no page that is wiped on fork: a parent and its child could use the same tokens, and
/// both be granted a lock, so no client is opened.
pub fn check() -> Result<(), Error> {
    generation();
    match REFUSED.load(Ordering::Relaxed) {
        0 => Ok(()),
        error => Err(Error::new(
            ErrorKind::Resources,
            format!(
                "nblock needs madvise(MADV_WIPEONFORK) to notice forks, and the system refuses it ({}): use Linux 4.14 or \
                 later, and allow the call in the sandbox",
                io::Error::from_raw_os_error(error)
            ),
        )),
    }
}

#[cold]
fn begin_generation() -> u64 {
    let no_page = (&raw const NO_PAGE).cast_mut();
    let mut page = PAGE.load(Ordering::Acquire);
    if page == no_page {
        let fresh = match wiped_page() {
            Ok(fresh) => fresh,
            Err(error) => {
                REFUSED.store(error, Ordering::Relaxed);
                // Any number will do, since no client can be opened.
                return u64::MAX;
            }
        };
        page = match PAGE.compare_exchange(no_page, fresh, Ordering::AcqRel, Ordering::Acquire) {
            Ok(_) => fresh,
            // Another thread was first. The page is small and this happens once: it stays mapped.
            Err(theirs) => theirs,
        };
        REFUSED.store(0, Ordering::Relaxed);
    }
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    // SAFETY: as above.
    match unsafe { &*page }.compare_exchange(0, number, Ordering::AcqRel, Ordering::Acquire) {
        Ok(_) => {
            begun(number);
            number
        }
        Err(theirs) => theirs,
    }
}

/// Called at the beginning of each new generation: a `fn(u64)`, or null.
static AT_BEGIN: AtomicPtr<()> = AtomicPtr::new(ptr::null_mut());

/// Registers a function that is called at the beginning of each later generation, with its number.
pub fn at_begin(function: fn(u64)) {
    AT_BEGIN.store(function as *mut (), Ordering::Release);
}

/// Registers a function that is called in every child that the C library forks from now on, once or twice. Each
/// function has its own `registered`.
///
/// This must not wait for another thread that registers the function: `pthread_atfork` waits for a fork in progress,
/// and in the child of that fork, such a thread would never finish.
pub fn at_fork(registered: &AtomicBool, function: extern "C" fn()) {
    // SAFETY: callers give a function that may be called in any child.
    if !registered.load(Ordering::Acquire) && unsafe { libc::pthread_atfork(None, None, Some(function)) } == 0 {
        registered.store(true, Ordering::Release);
    }
}

fn begun(number: u64) {
    let function = AT_BEGIN.load(Ordering::Acquire);
    if !function.is_null() {
        // SAFETY: only `at_begin` stores there.
        let function: fn(u64) = unsafe { std::mem::transmute(function) };
        function(number);
    }
}

/// The page, or the error number.
fn wiped_page() -> Result<*mut AtomicU64, i32> {
    let error = || io::Error::last_os_error().raw_os_error().unwrap_or(libc::EINVAL);
    // SAFETY: asks the kernel for one private anonymous page; nothing else refers to it.
    unsafe {
        let size = libc::sysconf(libc::_SC_PAGESIZE) as usize;
        let page = libc::mmap(
            ptr::null_mut(),
            size,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
            -1,
            0,
        );
        if page == libc::MAP_FAILED {
            return Err(error());
        }
        if libc::madvise(page, size, libc::MADV_WIPEONFORK) != 0 {
            let error = error();
            libc::munmap(page, size);
            return Err(error);
        }
        Ok(page.cast())
    }
}

/// The same file under a number above those of standard input, output and error: a program that has closed these would
/// otherwise read or write the file.
pub fn above_standard(descriptor: OwnedFd) -> io::Result<OwnedFd> {
    if descriptor.as_raw_fd() > libc::STDERR_FILENO {
        return Ok(descriptor);
    }
    // SAFETY: the descriptor is open; what is answered is nobody else's.
    match unsafe { libc::fcntl(descriptor.as_raw_fd(), libc::F_DUPFD_CLOEXEC, libc::STDERR_FILENO + 1) } {
        -1 => Err(io::Error::last_os_error()),
        // SAFETY: as above.
        higher => Ok(unsafe { OwnedFd::from_raw_fd(higher) }),
    }
}

/// Occupies the free ones among the numbers of standard input, output and error while it lives, so that files that are
/// opened meanwhile do not get them.
pub fn standard_taken() -> Vec<OwnedFd> {
    let mut taken = Vec::new();
    loop {
        // SAFETY: the path ends with a NUL; the descriptor that is answered is nobody else's.
        match unsafe { libc::open(c"/".as_ptr(), libc::O_PATH | libc::O_CLOEXEC) } {
            // SAFETY: as above.
            descriptor @ 0..=libc::STDERR_FILENO => taken.push(unsafe { OwnedFd::from_raw_fd(descriptor) }),
            -1 => return taken,
            higher => {
                // SAFETY: as above.
                drop(unsafe { OwnedFd::from_raw_fd(higher) });
                return taken;
            }
        }
    }
}

/// The name of this host.
pub fn host_name() -> String {
    // SAFETY: plain bytes, which the call fills in, with a NUL at the end of the name.
    unsafe {
        let mut names: libc::utsname = std::mem::zeroed();
        libc::uname(&mut names);
        CStr::from_ptr(names.nodename.as_ptr()).to_string_lossy().into_owned()
    }
}

/// The file with the id of this boot (random(4)).
pub const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// The id of this boot.
pub fn boot_id() -> io::Result<String> {
    let mut text = [0; 64];
    // The kernel returns all of it in one call.
    let length = File::open(BOOT_ID)?.read(&mut text)?;
    Ok(String::from_utf8_lossy(&text[..length]).trim().to_string())
}

/// The number of a namespace, from a link in `/proc` such as `/proc/self/ns/pid`, whose text is `pid:[4026531836]`
/// (namespaces(7)). The file behind the link has the same number as its inode, but `stat` takes twice as long.
pub fn namespace(link: &str) -> io::Result<u64> {
    let text = fs::read_link(link)?;
    let number = text.to_str().and_then(|text| text.split_once(":[")?.1.strip_suffix(']')?.parse().ok());
    number.ok_or_else(|| io::Error::other(format!("it reads {}", text.display())))
}

/// Whether the program runs with more rights than its caller (set-user-id, file capabilities): then the caller's
/// environment must be ignored (R25).
pub fn is_privileged() -> bool {
    // SAFETY: asks for a number.
    unsafe { libc::getauxval(libc::AT_SECURE) != 0 }
}

/// A value that belongs to one generation, made on first use in each.
///
/// Within a generation, it is made once and never replaced, so a reference to it lives as long as the cell. In a child,
/// the parent's value is leaked and not dropped, since it may have been in use.
pub struct PerProcess<T> {
    made: AtomicPtr<Made<T>>,
}

struct Made<T> {
    generation: u64,
    value: T,
}

impl<T> PerProcess<T> {
    pub const fn new() -> Self {
        PerProcess { made: AtomicPtr::new(ptr::null_mut()) }
    }

    /// The value of this generation, if it was made.
    #[inline(always)]
    pub fn current(&self) -> Option<&T> {
        let made = self.made.load(Ordering::Acquire);
        // SAFETY: a published value is freed only by `drop`, which has the cell to itself.
        let made = unsafe { made.as_ref() }?;
        (made.generation == generation()).then_some(&made.value)
    }

    /// The value of this generation. If there is none, it is made by `make`, which gets the value of an earlier
    /// generation, and may only read what is safe to read in any state.
    ///
    /// Two threads may both call `make`; one value is kept, the other dropped.
    #[inline(always)]
    pub fn get_or_try_init<E>(&self, make: impl FnOnce(Option<&T>) -> Result<T, E>) -> Result<&T, E> {
        match self.current() {
            Some(value) => Ok(value),
            None => self.init(make),
        }
    }

    #[inline(always)]
    pub fn get_or_init(&self, make: impl FnOnce(Option<&T>) -> T) -> &T {
        match self.get_or_try_init(|left| Ok::<T, std::convert::Infallible>(make(left))) {
            Ok(value) => value,
            Err(never) => match never {},
        }
    }

    #[cold]
    fn init<E>(&self, make: impl FnOnce(Option<&T>) -> Result<T, E>) -> Result<&T, E> {
        let generation = generation();
        let left = self.made.load(Ordering::Acquire);
        // SAFETY: as in `current`; a value of an earlier generation is leaked, never freed.
        let value = make(unsafe { left.as_ref() }.map(|left| &left.value))?;
        let fresh = Box::into_raw(Box::new(Made { generation, value }));
        match self.made.compare_exchange(left, fresh, Ordering::AcqRel, Ordering::Acquire) {
            // SAFETY: published, and freed only by `drop`.
            Ok(_) => Ok(unsafe { &(*fresh).value }),
            Err(theirs) => {
                // SAFETY: `fresh` was not published; `theirs` was, by a thread of this generation.
                drop(unsafe { Box::from_raw(fresh) });
                Ok(unsafe { &(*theirs).value })
            }
        }
    }
}

impl<T> Default for PerProcess<T> {
    fn default() -> Self {
        Self::new()
    }
}

impl<T> Drop for PerProcess<T> {
    fn drop(&mut self) {
        let made = *self.made.get_mut();
        // SAFETY: `&mut self`: nobody else has a reference. A parent's value is left alone.
        unsafe {
            if !made.is_null() && (*made).generation == generation() {
                drop(Box::from_raw(made));
            }
        }
    }
}

// SAFETY: the cell gives out `&T` to any thread and drops `T` on any thread.
unsafe impl<T: Send + Sync> Send for PerProcess<T> {}
// SAFETY: as above.
unsafe impl<T: Send + Sync> Sync for PerProcess<T> {}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    #[test]
    fn a_namespace_has_the_number_of_its_inode() {
        for link in ["/proc/self/ns/pid", "/proc/self/ns/mnt"] {
            assert_eq!(namespace(link).unwrap(), fs::metadata(link).unwrap().ino(), "{link}");
        }
        let error = namespace("/proc/self/exe").unwrap_err();
        assert!(error.to_string().starts_with("it reads /"), "{error}");
    }

    /// What a child that was just forked says with its exit status.
    fn in_child(work: impl FnOnce() -> bool) -> bool {
        // SAFETY: the child makes a few calls and ends.
        let child = unsafe { libc::fork() };
        if child == 0 {
            // SAFETY: ends the child, should it hang.
            unsafe { libc::alarm(30) };
            let well = work();
            // SAFETY: ends the child.
            unsafe { libc::_exit(if well { 0 } else { 1 }) };
        }
        let mut status = 0;
        // SAFETY: writes one integer.
        assert_eq!(unsafe { libc::waitpid(child, &mut status, 0) }, child);
        status == 0
    }

    /// A thread that registers a function waits for a fork under way: the child must not wait for that thread.
    #[test]
    fn a_child_registers_what_another_thread_was_registering() {
        extern "C" fn nothing() {}
        // Each time in a process of its own: what is registered stays, and glibc 2.36 reads a list that has become too
        // long for its first place without its lock.
        let once = || {
            let (registered, forks) = (AtomicBool::new(false), AtomicBool::new(false));
            std::thread::scope(|scope| {
                scope.spawn(|| {
                    while !forks.load(Ordering::Acquire) {
                        std::hint::spin_loop();
                    }
                    at_fork(&registered, nothing);
                });
                forks.store(true, Ordering::Release);
                in_child(|| {
                    at_fork(&registered, nothing);
                    true
                })
            })
        };
        for round in 0..1000 {
            assert!(in_child(once), "round {round}: the child hung, or died");
        }
    }

    /// An old kernel, or a sandbox: the program gets an error, and lives.
    #[test]
    fn without_a_wiped_page_there_is_an_error_in_words() {
        assert!(in_child(|| {
            refuse_madvise();
            // As if nothing had been asked for before.
            PAGE.store((&raw const NO_PAGE).cast_mut(), Ordering::Release);
            let refused = check().is_err_and(|error| {
                error.kind() == ErrorKind::Resources && error.message().contains("MADV_WIPEONFORK")
            });
            let client = crate::client::Client::open(Some("memory:"), crate::options::ClientOptions::default());
            let answered =
                matches!(client, crate::store::Answer::Now(Err(error)) if error.kind() == ErrorKind::Resources);
            refused && answered
        }));
    }

    /// From now on this process gets EPERM for `madvise`, and nothing else.
    fn refuse_madvise() {
        let step = |code: u32, jt, jf, k| libc::sock_filter { code: code as u16, jt, jf, k };
        let filter = [
            step(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, 0),
            step(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 0, 1, libc::SYS_madvise as u32),
            step(libc::BPF_RET | libc::BPF_K, 0, 0, libc::SECCOMP_RET_ERRNO | libc::EPERM as u32),
            step(libc::BPF_RET | libc::BPF_K, 0, 0, libc::SECCOMP_RET_ALLOW),
        ];
        let program = libc::sock_fprog { len: filter.len() as u16, filter: filter.as_ptr().cast_mut() };
        // SAFETY: the program outlives the call.
        unsafe {
            assert_eq!(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), 0);
            assert_eq!(libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &program), 0);
        }
    }
}
