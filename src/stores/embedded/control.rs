//! The control file: a small mapping that all processes of the store share.
//!
//! It holds the one mutex in front of the data, the fences' base, and the words that waiters sleep on.
//! The mutex is robust (a holder that is killed hands it on) and timed (a holder that is stopped makes
//! the others answer "store busy", not hang).

use std::cell::UnsafeCell;
use std::fs::File;
use std::mem::{MaybeUninit, offset_of};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};
use std::{io, ptr, slice};

use super::directory::failed;
use super::mutex;
use super::row::Home;
use super::run::{self, Made};
use super::section::{self, Section};
use super::space::allocate;
use super::surroundings::Surroundings;
use super::wake::Bucket;
use crate::clock::Boottime;
use crate::store::StoreError;
use crate::sys::descriptor::Own;

const MAGIC: [u8; 8] = *b"nblock\0C";
/// Raised when anything here or in a row changes its meaning or place.
const FORMAT: u32 = 2;

/// Keys are spread over so many buckets; two keys of one bucket wake each other's waiters.
pub const BUCKETS: usize = 2048;

const HOST_MAX: usize = 223;

/// Mutexes are laid out as the C library of the machine's kind has them: these must be one.
const LIBRARY: &str = match (cfg!(target_env = "musl"), cfg!(target_arch = "x86_64"), cfg!(target_arch = "aarch64")) {
    (true, true, _) => "musl-x86_64",
    (true, _, true) => "musl-aarch64",
    (true, ..) => "musl",
    (false, true, _) => "gnu-x86_64",
    (false, _, true) => "gnu-aarch64",
    (false, ..) => "gnu",
};

/// A word that no single damaged byte makes of 0.
const RETIRED: u32 = u32::from_ne_bytes(*b"over");

/// What is written once, when the file is made.
#[repr(C)]
#[derive(Clone, Copy)]
struct Header {
    magic: [u8; 8],
    format: u32,
    size: u32,
    boot_id: [u8; 64],
    host: [u8; HOST_MAX + 1],
    library: [u8; 16],
    /// When the machine was started, in seconds since 1970, or 0: see [`run::start`]. And when the file was made, in
    /// nanoseconds since then.
    started_at: u64,
    made_at: u64,
    pid_namespace: u64,
    time_namespace: u64,
    /// The inode of the data file: the two are made for each other.
    data_inode: u64,
    /// Over all that stands before it.
    check: u64,
}

impl Header {
    fn sum(&self) -> u64 {
        // SAFETY: a header is plain integers without padding, and so many bytes are before `check`.
        let bytes = unsafe { slice::from_raw_parts((&raw const *self).cast::<u8>(), offset_of!(Header, check)) };
        u64::from(crc32fast::hash(bytes)) | 1 << 32
    }
}

#[repr(C)]
struct Page {
    header: Header,
    mutex: Aligned<UnsafeCell<libc::pthread_mutex_t>>,
    /// The process that has the mutex, and since when (nanoseconds of boot time): for messages.
    writer: AtomicU32,
    /// [`RETIRED`] for good when the pair of files is replaced by another: nothing may be granted here.
    retired: AtomicU32,
    since: AtomicU64,
    fence_base: Twice,
    fence_ceiling: Twice,
    /// Numbers those who open the file, so that a releaser can tell its own waiters from others.
    openers: AtomicU32,
    bell: Aligned<AtomicU32>,
    buckets: Aligned<[Bucket; BUCKETS]>,
}

/// On a cache line of its own.
#[repr(C, align(64))]
struct Aligned<T>(T);

/// A number and its complement, so that half a write is noticed.
#[repr(C)]
struct Twice {
    value: AtomicU64,
    complement: AtomicU64,
}

impl Twice {
    fn load(&self) -> Option<u64> {
        let value = self.value.load(Ordering::Relaxed);
        (self.complement.load(Ordering::Relaxed) == !value).then_some(value)
    }

    fn store(&self, value: u64) {
        self.value.store(value, Ordering::Relaxed);
        self.complement.store(!value, Ordering::Relaxed);
    }
}

/// Why a control file that is there cannot be used.
#[derive(Debug, PartialEq, Eq)]
pub enum Unfit {
    /// Not what this version of the library writes.
    Damaged(String),
    /// Made in another PID or time namespace.
    Elsewhere { pid_namespace: u64, time_namespace: u64 },
    /// Made by a program with another C library, whose mutexes are others.
    OtherLibrary { theirs: String, ours: &'static str },
}

/// The control file, mapped.
pub struct Control {
    page: NonNull<Page>,
    /// As it was when it was mapped and checked.
    header: Header,
    host: String,
    boot_id: String,
    /// Of this process: the number it has in its PID namespace.
    pid: u32,
    /// What messages call the file.
    name: String,
    /// Its mapping keeps the file locked as being in use, also when the program has closed this.
    _file: Own<File>,
}

// SAFETY: the page is shared by design: atomics, and a mutex made for processes. The rest is not changed.
unsafe impl Send for Control {}
// SAFETY: as above.
unsafe impl Sync for Control {}

impl Control {
    /// Writes a new control file into an empty one.
    pub fn create(file: &File, name: &str, surroundings: &Surroundings, data_inode: u64) -> Result<(), StoreError> {
        allocate(file, 0, size_of::<Page>() as u64)
            .map_err(|error| failed(format_args!("no space for {name}"), &error))?;
        let mut header = Header {
            magic: MAGIC,
            format: FORMAT,
            size: size_of::<Page>() as u32,
            boot_id: [0; 64],
            host: [0; HOST_MAX + 1],
            library: library(),
            started_at: run::start(),
            made_at: Boottime::now().as_nanos(),
            pid_namespace: surroundings.pid_namespace,
            time_namespace: surroundings.time_namespace,
            data_inode,
            check: 0,
        };
        put_text(&mut header.boot_id, &surroundings.boot_id);
        put_text(&mut header.host, &surroundings.host);
        header.check = header.sum();
        let page = map(file).map_err(|error| failed(format_args!("{name} could not be mapped"), &error))?;
        // SAFETY: the mapping is as large as a page, its blocks are there, and nobody else knows of it
        // yet.
        let made = unsafe {
            (&raw mut (*page.as_ptr()).header).write(header);
            mutex::make(page.as_ref().mutex.0.get())
        };
        unmap(page);
        made
    }

    /// Makes the mutex anew, if it is not as one that nobody has. To be called by who is alone with the
    /// file, so whoever left it so is gone: killed together with all others, or a damaged file. (Nobody
    /// has it mapped and seems not to: a mapping keeps the lock that says so, closed descriptors or not.)
    pub fn mend(&self) -> Result<(), StoreError> {
        let mut model = MaybeUninit::uninit();
        mutex::make(model.as_mut_ptr())?;
        // SAFETY: a mutex has more words than that, which may be read while others change them.
        let words = |of: *const libc::pthread_mutex_t| unsafe { of.cast::<[u32; mutex::WORDS]>().read_volatile() };
        let fresh = words(model.as_ptr());
        // SAFETY: an initialised mutex that nobody else knows of.
        unsafe {
            libc::pthread_mutex_lock(model.as_mut_ptr());
            libc::pthread_mutex_unlock(model.as_mut_ptr());
        }
        let used = words(model.as_ptr());
        if [fresh, used].contains(&words(self.mutex())) {
            return Ok(());
        }
        tracing::debug!("the mutex in {} was left locked, or was damaged: it is made anew", self.name);
        mutex::make(self.mutex())
    }

    /// Maps a control file, after looking whether it is one, and for here.
    pub fn open(file: File, name: &str, surroundings: &Surroundings) -> Result<Result<Control, Unfit>, StoreError> {
        let length =
            file.metadata().map_err(|error| failed(format_args!("{name} could not be looked at"), &error))?.len();
        if length != size_of::<Page>() as u64 {
            return Ok(Err(Unfit::Damaged(format!("{name} has {length} bytes, not {}", size_of::<Page>()))));
        }
        section::watch_forks().map_err(|error| failed("forks could not be watched", &error))?;
        let page = map(&file).map_err(|error| failed(format_args!("{name} could not be mapped"), &error))?;
        // SAFETY: the mapping is as large as a page; a header is valid whatever its bytes are, and so is a word.
        let (header, retired) = unsafe {
            let page = page.as_ptr();
            ((&raw const (*page).header).read_volatile(), (*page).retired.load(Ordering::Relaxed))
        };
        let (pid_namespace, time_namespace) = (header.pid_namespace, header.time_namespace);
        let unfit = if header.magic != MAGIC || header.check != header.sum() {
            Unfit::Damaged(format!("the header of {name} is damaged"))
        } else if header.format != FORMAT {
            Unfit::Damaged(format!("{name} has format {}, not {FORMAT}", header.format))
        } else if text(&header.boot_id) != surroundings.boot_id {
            Unfit::Damaged(format!("{name} was made for another boot of this machine, or on another machine"))
        } else if retired != 0 && retired != RETIRED {
            Unfit::Damaged(format!("{name} is damaged behind its header"))
        } else if header.library != library() {
            Unfit::OtherLibrary { theirs: text(&header.library).to_string(), ours: LIBRARY }
        } else if (pid_namespace, time_namespace) != (surroundings.pid_namespace, surroundings.time_namespace) {
            Unfit::Elsewhere { pid_namespace, time_namespace }
        } else {
            return Ok(Ok(Control {
                page,
                header,
                host: text(&header.host).to_string(),
                boot_id: text(&header.boot_id).to_string(),
                pid: std::process::id(),
                name: name.to_string(),
                _file: Own::private(file)
                    .map_err(|error| failed(format_args!("{name} could not be looked at"), &error))?,
            }));
        };
        unmap(page);
        Ok(Err(unfit))
    }

    /// Whether an open file is a control file, whole or damaged behind its first bytes.
    pub fn is_one(file: &File) -> bool {
        let mut magic = [0; MAGIC.len()];
        file.read_exact_at(&mut magic, 0).is_ok() && magic == MAGIC
    }

    /// When and where a control file was made, if its header is whole.
    pub fn made(file: &File) -> Option<Made> {
        let mut bytes = [0; size_of::<Header>()];
        file.read_exact_at(&mut bytes, 0).ok()?;
        // SAFETY: a header is plain integers: any bytes are one.
        let header = unsafe { bytes.as_ptr().cast::<Header>().read_unaligned() };
        (header.magic == MAGIC && header.check == header.sum()).then_some(Made {
            started_at: header.started_at,
            made_at: header.made_at,
            pid_namespace: header.pid_namespace,
        })
    }

    /// The inode of the data file that it was made for.
    pub fn data_inode(&self) -> u64 {
        self.header.data_inode
    }

    fn page(&self) -> &Page {
        // SAFETY: mapped as long as `self` lives, and nothing in it is changed but through cells.
        unsafe { self.page.as_ref() }
    }

    /// The host and the boot that the file was made on.
    pub fn home(&self) -> Home<'_> {
        Home { host: &self.host, boot_id: &self.boot_id }
    }

    /// Below this lies every fence that was given out here. 0 when there are none, or it is damaged.
    pub fn fence_ceiling(&self) -> u64 {
        self.page().fence_ceiling.load().filter(|&ceiling| ceiling <= super::fence::LIMIT).unwrap_or(0)
    }

    /// A number for this opener, never 0. After millions of opens one may come again.
    pub fn number_opener(&self) -> u32 {
        super::wake::opener(self.page().openers.fetch_add(1, Ordering::Relaxed))
    }

    pub fn bell(&self) -> &AtomicU32 {
        &self.page().bell.0
    }

    pub fn bucket(&self, index: usize) -> &Bucket {
        &self.page().buckets.0[index]
    }

    pub fn buckets(&self) -> &[Bucket] {
        &self.page().buckets.0
    }

    /// The mutex, if it can be had at once or nearly so. `None`: somebody else has it, or this thread
    /// must not own one (see [`mutex::may_be_owned`]).
    pub fn try_lock(&self) -> Result<Option<Guard<'_>>, StoreError> {
        /// About as long as a few transactions take: longer, and the owner is probably not running.
        const PAUSES: u32 = 64;
        const YIELDS: u32 = 3;
        if !mutex::may_be_owned() {
            return Ok(None);
        }
        for attempt in 0..PAUSES + YIELDS {
            let section = Section::enter();
            if (attempt == 0 || self.page().writer.load(Ordering::Relaxed) == 0)
                // SAFETY: an initialised mutex in a mapping that lives as long as the guard.
                && let Some(guard) = self.locked(unsafe { libc::pthread_mutex_trylock(self.mutex()) }, section)?
            {
                return Ok(Some(guard));
            }
            if attempt < PAUSES {
                std::hint::spin_loop();
            } else {
                std::thread::yield_now();
            }
        }
        Ok(None)
    }

    /// The mutex, waited for. Past the deadline: "store busy", with who has it.
    pub fn lock_until(&self, deadline: Instant) -> Result<Guard<'_>, StoreError> {
        let asked = Instant::now();
        if !mutex::may_be_owned() {
            return Err(StoreError::unreachable(
                "this thread was copied by a clone() that the C library knows nothing of, and cannot own a mutex",
            ));
        }
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let section = Section::enter();
            if let Some(guard) = self.locked(mutex::timed_lock(self.mutex(), left), section)? {
                return Ok(guard);
            }
            if Instant::now() >= deadline {
                return Err(self.busy(asked.elapsed()));
            }
        }
    }

    fn mutex(&self) -> *mut libc::pthread_mutex_t {
        self.page().mutex.0.get()
    }

    /// What a locking call's status means.
    fn locked(&self, status: i32, section: Section) -> Result<Option<Guard<'_>>, StoreError> {
        match status {
            0 => {}
            libc::EBUSY | libc::ETIMEDOUT | libc::EAGAIN => return Ok(None),
            libc::EOWNERDEAD => self.heal()?,
            libc::ENOTRECOVERABLE => return Err(self.damaged()),
            _ => {
                let error = io::Error::from_raw_os_error(status);
                return Err(failed(format_args!("the mutex in {} could not be locked", self.name), &error));
            }
        }
        self.page().writer.store(self.pid, Ordering::Relaxed);
        Ok(Some(Guard { control: self, _section: section }))
    }

    /// The mutex is ours, and its last owner died with it. The data is as its last commit left it
    /// (LMDB never overwrites what the last commit refers to), so it needs no repair.
    #[cold]
    fn heal(&self) -> Result<(), StoreError> {
        // SAFETY: as in `open`.
        let header = unsafe { (&raw const (*self.page.as_ptr()).header).read_volatile() };
        if header.check != self.header.check || header.check != header.sum() {
            // Unlocked without being made consistent, the mutex says ENOTRECOVERABLE to everybody.
            // SAFETY: this thread has it.
            unsafe { libc::pthread_mutex_unlock(self.mutex()) };
            return Err(self.damaged());
        }
        let dead = self.page().writer.load(Ordering::Relaxed);
        tracing::debug!(pid = dead, "a process died while it wrote to the embedded store; nothing was lost");
        // SAFETY: this thread has it, as its last status said.
        unsafe { libc::pthread_mutex_consistent(self.mutex()) };
        // What the dead one committed, it may not have told.
        super::wake::tell_everybody(self);
        Ok(())
    }

    fn damaged(&self) -> StoreError {
        StoreError::rejected(format!("{} was damaged while it was in use: end the programs that use it", self.name))
    }

    fn busy(&self, waited: Duration) -> StoreError {
        let waited = waited.as_secs_f64();
        match self.page().writer.load(Ordering::Relaxed) {
            0 => StoreError::unreachable(format!("store busy: no turn within {waited:.1} s")),
            pid => {
                let since = Boottime::from_nanos(self.page().since.load(Ordering::Relaxed));
                let writing = Boottime::now().since(since).as_secs_f64();
                StoreError::unreachable(format!(
                    "store busy: process {pid} has been writing for {writing:.1} s (is it stopped?); \
                     no turn within {waited:.1} s"
                ))
            }
        }
    }
}

impl Drop for Control {
    fn drop(&mut self) {
        unmap(self.page);
    }
}

/// Possession of the mutex, by this thread.
pub struct Guard<'a> {
    control: &'a Control,
    /// It ends after the mutex is given back. Like a robust mutex it is its thread's: the guard must not be sent to
    /// another.
    _section: Section,
}

impl Guard<'_> {
    /// Says since when it is held.
    pub fn held_since(&self, now: Boottime) {
        self.control.page().since.store(now.as_nanos(), Ordering::Relaxed);
    }

    pub fn is_retired(&self) -> bool {
        self.control.page().retired.load(Ordering::Relaxed) != 0
    }

    /// Tells all who use the file that nothing may be granted under it any more, those who wait included.
    pub fn retire(&self) {
        self.control.page().retired.store(RETIRED, Ordering::Relaxed);
        super::wake::tell_everybody(self.control);
    }

    /// Base and ceiling of the fences; `None` when there are none yet, or they are damaged.
    pub fn fences(&self) -> Option<(u64, u64)> {
        let page = self.control.page();
        let (base, ceiling) = (page.fence_base.load()?, page.fence_ceiling.load()?);
        (base < ceiling && ceiling <= super::fence::LIMIT).then_some((base, ceiling))
    }

    pub fn fence_ceiling(&self) -> u64 {
        self.control.fence_ceiling()
    }

    pub fn set_fences(&self, base: u64, ceiling: u64) {
        // In this order: a kill in between leaves a base that is above the old ceiling, or a number
        // that is noticed to be half written.
        self.control.page().fence_base.store(base);
        self.control.page().fence_ceiling.store(ceiling);
    }
}

impl Drop for Guard<'_> {
    fn drop(&mut self) {
        self.control.page().writer.store(0, Ordering::Relaxed);
        // SAFETY: this thread has locked it, and a guard stays on its thread.
        unsafe { libc::pthread_mutex_unlock(self.control.mutex()) };
    }
}

fn map(file: &File) -> io::Result<NonNull<Page>> {
    // SAFETY: a new mapping at an address of the kernel's choice.
    let page = unsafe {
        libc::mmap(
            ptr::null_mut(),
            size_of::<Page>(),
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_SHARED,
            file.as_raw_fd(),
            0,
        )
    };
    match NonNull::new(page.cast()) {
        Some(mapped) if page != libc::MAP_FAILED => Ok(mapped),
        _ => Err(io::Error::last_os_error()),
    }
}

fn unmap(page: NonNull<Page>) {
    // SAFETY: `map` made it, and its owner is going.
    unsafe { libc::munmap(page.as_ptr().cast(), size_of::<Page>()) };
}

fn library() -> [u8; 16] {
    let mut library = [0; 16];
    put_text(&mut library, LIBRARY);
    library
}

fn put_text(into: &mut [u8], text: &str) {
    // One byte stays 0.
    let length = text.len().min(into.len() - 1);
    into[..length].copy_from_slice(&text.as_bytes()[..length]);
}

fn text(bytes: &[u8]) -> &str {
    let length = bytes.iter().position(|&byte| byte == 0).unwrap_or(bytes.len());
    std::str::from_utf8(&bytes[..length]).unwrap_or_default()
}
