//! The library's descriptors, which the program may close at any moment (R26).
//!
//! A program that becomes a daemon closes all its descriptors, including ours, and the next files that it opens get
//! their numbers. So each use of a descriptor here first compares device and inode; one that is not ours any more is
//! neither read, written nor closed.
//!
//! The descriptors whose numbers only the library knows are listed, so that a forked child can close the inherited
//! ones; it opens its own.

use std::mem::ManuallyDrop;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicI32, AtomicU64, Ordering};
use std::{io, mem};

use super::entries::Entries;
use super::process;

/// Device and inode, which identify a file independently of its name.
pub type Identity = (u64, u64);

/// The number of an open descriptor, and the identity of its file.
pub struct Known {
    number: RawFd,
    identity: Identity,
    generation: u64,
    listed: Option<&'static Slot>,
}

impl Known {
    /// Notes the identity of an open descriptor's file. `private`: only the library knows its number, and a forked
    /// child closes it.
    pub fn note(number: RawFd, private: bool) -> io::Result<Known> {
        let identity = identity_of(number)?;
        let generation = process::generation();
        let listed = private.then(|| list(number, identity, generation));
        Ok(Known { number, identity, generation, listed })
    }

    pub fn identity(&self) -> Identity {
        self.identity
    }

    /// Whether the number still refers to the file.
    pub fn is_ours(&self) -> bool {
        self.status().is_some()
    }

    /// The status of the file; `None` if the number refers to another file, or to none.
    fn status(&self) -> Option<libc::stat> {
        // In a forked child, the listed descriptors are closed, and the number may be that of a new one of ours.
        let may_be_ours = self.listed.is_none() || self.generation == process::generation();
        may_be_ours.then(|| status_of(self.number).ok())?.filter(|found| identity_in(found) == self.identity)
    }

    pub fn check(&self) -> io::Result<()> {
        if self.is_ours() { Ok(()) } else { Err(closed()) }
    }
}

impl Drop for Known {
    fn drop(&mut self) {
        if let Some(slot) = self.listed
            && self.generation == process::generation()
        {
            slot.number.store(FREE, Ordering::Release);
        }
    }
}

/// An object with a descriptor. Dropping it closes the descriptor if it is still ours.
pub struct Own<T: AsRawFd> {
    inner: ManuallyDrop<T>,
    known: ManuallyDrop<Known>,
}

impl<T: AsRawFd> Own<T> {
    /// For a descriptor whose number only the library knows.
    pub fn private(inner: T) -> io::Result<Own<T>> {
        let known = ManuallyDrop::new(Known::note(inner.as_raw_fd(), true)?);
        Ok(Own { inner: ManuallyDrop::new(inner), known })
    }

    /// For a descriptor whose number the program is given.
    pub fn handed_out(inner: T) -> io::Result<Own<T>> {
        let known = ManuallyDrop::new(Known::note(inner.as_raw_fd(), false)?);
        Ok(Own { inner: ManuallyDrop::new(inner), known })
    }

    /// The object, to be used at once. An error if the program has closed its descriptor.
    pub fn get(&self) -> io::Result<&T> {
        self.known.check()?;
        Ok(&self.inner)
    }

    /// The object, without a check: only for uses that do no harm if the number refers to another file.
    pub fn unchecked(&self) -> &T {
        &self.inner
    }

    pub fn is_ours(&self) -> bool {
        self.known.is_ours()
    }

    pub fn identity(&self) -> Identity {
        self.known.identity
    }

    /// How many names the file has; `None` if the program has closed the descriptor.
    pub fn names(&self) -> Option<u64> {
        self.known.status().map(|found| found.st_nlink)
    }
}

impl<T: AsRawFd> Drop for Own<T> {
    fn drop(&mut self) {
        let ours = self.is_ours();
        // SAFETY: each is dropped once, here, and not used after that. First what is listed: a number that is closed
        // may be another's at once.
        unsafe {
            ManuallyDrop::drop(&mut self.known);
            if ours {
                ManuallyDrop::drop(&mut self.inner);
            }
        }
    }
}

/// The error for a closed descriptor.
fn closed() -> io::Error {
    io::Error::other("the program closed a file descriptor of nblock")
}

fn identity_of(number: RawFd) -> io::Result<Identity> {
    status_of(number).map(|found| identity_in(&found))
}

fn identity_in(found: &libc::stat) -> Identity {
    (found.st_dev, found.st_ino)
}

fn status_of(number: RawFd) -> io::Result<libc::stat> {
    let mut found = mem::MaybeUninit::<libc::stat>::uninit();
    // SAFETY: the call fills in what it is given, or fails.
    unsafe {
        match libc::fstat(number, found.as_mut_ptr()) {
            0 => Ok(found.assume_init()),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

/// A descriptor that the program can poll: it is readable while it is raised.
///
/// It is a pipe with both ends open under one number. Unlike an eventfd, a pipe has an inode of its own, which
/// distinguishes it from a file that the program opens under the same number.
pub struct Signal(Own<OwnedFd>);

impl Signal {
    pub fn new() -> io::Result<Signal> {
        Ok(Signal(Own::handed_out(Signal::descriptor()?)?))
    }

    /// One whose number the program does not get.
    pub fn private() -> io::Result<Signal> {
        Ok(Signal(Own::private(Signal::descriptor()?)?))
    }

    fn descriptor() -> io::Result<OwnedFd> {
        let descriptor = match both_ends() {
            Ok(pipe) => pipe,
            Err(error) if matches!(error.raw_os_error(), Some(libc::EMFILE | libc::ENFILE | libc::ENOMEM)) => {
                return Err(error);
            }
            // Without /proc, both ends of a pipe cannot have one number.
            Err(_) => event_descriptor()?,
        };
        process::above_standard(descriptor)
    }

    /// Its number, only for waiting: it may refer to another file by now.
    pub fn unchecked_number(&self) -> RawFd {
        self.0.unchecked().as_raw_fd()
    }

    /// Makes it unreadable. `false`: the program has closed it.
    pub fn take_back(&self) -> bool {
        self.set(false);
        self.0.is_ours()
    }

    /// Its number; `None` if the program has closed it.
    pub fn number(&self) -> Option<RawFd> {
        self.0.get().ok().map(AsRawFd::as_raw_fd)
    }

    /// Makes it readable or unreadable.
    pub fn set(&self, raised: bool) {
        let Ok(descriptor) = self.0.get() else { return };
        let mut bytes = 1u64.to_ne_bytes();
        // SAFETY: writes or reads at most the eight bytes of a local. (An eventfd takes no fewer.)
        unsafe {
            if raised {
                libc::write(descriptor.as_raw_fd(), bytes.as_ptr().cast(), bytes.len());
            } else {
                libc::read(descriptor.as_raw_fd(), bytes.as_mut_ptr().cast(), bytes.len());
            }
        }
    }
}

fn both_ends() -> io::Result<OwnedFd> {
    let (reader, _writer) = pipe()?;
    let path = format!("/proc/self/fd/{}\0", reader.as_raw_fd());
    // SAFETY: the path ends with a NUL; a descriptor that is answered is nobody else's.
    match unsafe { libc::open(path.as_ptr().cast(), libc::O_RDWR | libc::O_CLOEXEC | libc::O_NONBLOCK) } {
        -1 => Err(io::Error::last_os_error()),
        // SAFETY: as above.
        descriptor => Ok(unsafe { OwnedFd::from_raw_fd(descriptor) }),
    }
}

/// The reading and the writing end of a pipe, both non-blocking.
pub fn pipe() -> io::Result<(OwnedFd, OwnedFd)> {
    let mut ends = [-1; 2];
    // SAFETY: fills in two descriptors, which are nobody else's.
    unsafe {
        if libc::pipe2(ends.as_mut_ptr(), libc::O_CLOEXEC | libc::O_NONBLOCK) != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok((OwnedFd::from_raw_fd(ends[0]), OwnedFd::from_raw_fd(ends[1])))
    }
}

fn event_descriptor() -> io::Result<OwnedFd> {
    // SAFETY: makes a descriptor, which nobody else has.
    match unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) } {
        -1 => Err(io::Error::last_os_error()),
        // SAFETY: as above.
        descriptor => Ok(unsafe { OwnedFd::from_raw_fd(descriptor) }),
    }
}

/// An entry of the list of private descriptors.
struct Slot {
    /// The descriptor's number, [`FREE`], or [`TAKEN`] while the rest is written.
    number: AtomicI32,
    generation: AtomicU64,
    device: AtomicU64,
    inode: AtomicU64,
}

const FREE: i32 = -1;
const TAKEN: i32 = -2;

static LISTED: Entries<Slot> = Entries::new();

fn list(number: RawFd, (device, inode): Identity, generation: u64) -> &'static Slot {
    process::at_begin(close_inherited);
    let free = |slot: &&Slot| slot.number.compare_exchange(FREE, TAKEN, Ordering::AcqRel, Ordering::Relaxed).is_ok();
    let slot = LISTED.iter().find(free).unwrap_or_else(|| {
        LISTED.add(Slot {
            number: AtomicI32::new(TAKEN),
            generation: AtomicU64::new(0),
            device: AtomicU64::new(0),
            inode: AtomicU64::new(0),
        })
    });
    slot.generation.store(generation, Ordering::Relaxed);
    slot.device.store(device, Ordering::Relaxed);
    slot.inode.store(inode, Ordering::Relaxed);
    slot.number.store(number, Ordering::Release);
    slot
}

/// Whether a private descriptor refers to a file with this inode. May be called in a signal handler.
pub fn lists_inode(inode: u64) -> bool {
    LISTED.iter().any(|slot| slot.number.load(Ordering::Acquire) >= 0 && slot.inode.load(Ordering::Relaxed) == inode)
}

/// In a forked child: closes the private descriptors of the parent's library. Async-signal-safe.
fn close_inherited(generation: u64) {
    for slot in LISTED.iter() {
        let number = slot.number.load(Ordering::Acquire);
        if number < 0 || slot.generation.load(Ordering::Relaxed) >= generation {
            continue;
        }
        let known = (slot.device.load(Ordering::Relaxed), slot.inode.load(Ordering::Relaxed));
        if identity_of(number).is_ok_and(|found| found == known) {
            // SAFETY: the descriptor is the library's, and those who knew it are of another process.
            unsafe { libc::close(number) };
        }
        slot.number.store(FREE, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::{Seek, Write};

    use super::*;

    fn temporary() -> File {
        // SAFETY: the name ends with a NUL; the descriptor is nobody else's.
        unsafe { File::from_raw_fd(libc::memfd_create(c"test".as_ptr(), libc::MFD_CLOEXEC)) }
    }

    /// Puts another file under the number of one of ours, as a program does that closes all it has.
    fn replace(number: RawFd, by: &File) {
        // SAFETY: two open descriptors.
        assert_eq!(unsafe { libc::dup3(by.as_raw_fd(), number, libc::O_CLOEXEC) }, number);
    }

    #[test]
    fn what_is_not_ours_any_more_is_neither_used_nor_closed() {
        let ours = Own::private(temporary()).unwrap();
        let number = ours.get().unwrap().as_raw_fd();
        assert!(lists_inode(ours.identity().1));
        let theirs = temporary();
        replace(number, &theirs);
        assert!(ours.get().is_err());
        drop(ours);
        // SAFETY: asks for the flags of a number.
        assert!(unsafe { libc::fcntl(number, libc::F_GETFD) } >= 0, "the program's file was closed");
        // SAFETY: the descriptor is the test's.
        unsafe { libc::close(number) };
    }

    #[test]
    fn a_signal_is_raised_and_lowered_and_never_in_a_file_of_the_programs() {
        let signal = Signal::new().unwrap();
        let number = signal.number().unwrap();
        let readable = || {
            let mut polled = libc::pollfd { fd: number, events: libc::POLLIN, revents: 0 };
            // SAFETY: one pollfd.
            unsafe { libc::poll(&mut polled, 1, 0) == 1 }
        };
        assert!(!readable());
        signal.set(true);
        assert!(readable());
        signal.set(false);
        assert!(!readable());
        let mut theirs = temporary();
        theirs.write_all(b"data").unwrap();
        replace(number, &theirs);
        signal.set(true);
        assert_eq!(theirs.stream_position().unwrap(), 4);
        assert_eq!(theirs.metadata().unwrap().len(), 4);
        drop(signal);
        // SAFETY: the descriptor is the test's.
        unsafe { libc::close(number) };
    }
}
