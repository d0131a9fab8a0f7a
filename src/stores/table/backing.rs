//! The file behind the mapping, and the descriptor it was opened by, which the program may close (R26).

use std::fs::{File, Metadata, TryLockError};
use std::io;
use std::os::fd::{AsRawFd, IntoRawFd};
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::Directory;
use super::fault::Fault;
use super::layout::{CHUNK_BYTES, CHUNKS_AT};
use super::mapping::Mapping;
use crate::store::{StoreError, StoreErrorKind};
use crate::sys::mutex::Mutex;
use crate::sys::process;

/// Device and inode: which file it is, whatever it is called.
pub type FileId = (u64, u64);

pub fn file_id(found: &Metadata) -> FileId {
    (found.dev(), found.ino())
}

pub struct Backing {
    directory: Arc<dyn Directory>,
    name: String,
    id: FileId,
    /// `None` only while it is dropped. The lock that says that the file is in use belongs to the mapping as well,
    /// and so stays when the descriptor is closed.
    file: Mutex<Option<File>>,
    generation: u64,
}

impl Backing {
    pub fn new(directory: Arc<dyn Directory>, name: String, file: File) -> io::Result<Backing> {
        let id = file_id(&file.metadata()?);
        Ok(Backing { directory, name, id, file: Mutex::new(Some(file)), generation: process::generation() })
    }

    pub fn id(&self) -> FileId {
        self.id
    }

    /// What messages call the file.
    pub fn shown(&self) -> String {
        self.directory.shown(&self.name)
    }

    /// Does something with a descriptor that is of this very file.
    fn with<T>(&self, work: impl FnOnce(&File) -> io::Result<T>, what: &str) -> Result<T, Fault> {
        let mut kept = self.file.lock();
        if !kept.as_ref().is_some_and(|file| self.is_ours(file)) {
            let anew = self.directory.open(&self.name)?.filter(|file| self.is_ours(file)).ok_or_else(|| {
                StoreError::unreachable(format!(
                    "the descriptor of {} was closed by the program, and the file cannot be opened anew: it has \
                     another name by now, or none",
                    self.shown()
                ))
            })?;
            if let Some(foreign) = kept.replace(anew) {
                // Its number may be another file's by now.
                let _ = foreign.into_raw_fd();
            }
        }
        let file = kept.as_ref().ok_or(Fault::Gone)?;
        work(file).map_err(|error| failed(&format!("{} could not be {what}", self.shown()), &error).into())
    }

    /// Says that the file is in use. Answers whether nobody else has said so: then, others have to wait.
    pub fn lock(&self, deadline: Instant) -> Result<bool, StoreError> {
        let alone = self.file.lock().as_ref().is_some_and(|file| file.try_lock().is_ok());
        if !alone {
            self.share(deadline)?;
        }
        Ok(alone)
    }

    /// Maps the top, if the file is long enough to have one.
    pub fn map_top(&self) -> Result<Option<Mapping>, StoreError> {
        let map = |file: &File| (file.metadata()?.len() >= CHUNKS_AT).then(|| Mapping::new(file)).transpose();
        self.with(map, "mapped").map_err(Fault::into_error)
    }

    /// Lets others use the file too: it was locked for this process alone.
    pub fn share(&self, deadline: Instant) -> Result<(), StoreError> {
        match &*self.file.lock() {
            Some(file) => share(file, &self.shown(), deadline),
            None => Ok(()),
        }
    }

    /// Whether who opens the name now opens this file.
    pub fn is_at_its_name(&self) -> Result<bool, StoreError> {
        Ok(self.directory.open(&self.name)?.is_some_and(|file| self.is_ours(&file)))
    }

    fn is_ours(&self, file: &File) -> bool {
        file.metadata().is_ok_and(|found| file_id(&found) == self.id)
    }

    /// Maps so many chunks, if the file has them.
    pub fn map(&self, mapping: &Mapping, chunks: u32) -> Result<(), Fault> {
        self.with(
            |file| {
                let has = file.metadata()?.len().saturating_sub(CHUNKS_AT) / CHUNK_BYTES;
                if u64::from(chunks) > has {
                    return Err(io::Error::other(format!("it is shorter than it says: {has} chunks, not {chunks}")));
                }
                mapping.now_has(chunks, file)
            },
            "mapped",
        )
    }

    /// Makes the file so long and its blocks be there, so that writing to a mapping of it cannot fail.
    pub fn allocate(&self, from: u64, to: u64) -> Result<(), Fault> {
        self.with(|file| allocate(file, from, to), "made larger")
    }
}

/// Takes the lock that every user of a file has. There is no timed wait for it.
fn share(file: &File, shown: &str, deadline: Instant) -> Result<(), StoreError> {
    const RETRY: Duration = Duration::from_millis(1);
    loop {
        match file.try_lock_shared() {
            Ok(()) => return Ok(()),
            // Its first user has it while it looks at it, and so may a tmp cleaner, to see whether it is in use.
            Err(TryLockError::WouldBlock) if Instant::now() < deadline => std::thread::sleep(RETRY),
            Err(TryLockError::WouldBlock) => {
                return Err(StoreError::unreachable(format!("store busy: another process has locked {shown}")));
            }
            Err(TryLockError::Error(error)) => return Err(failed(&format!("{shown} could not be locked"), &error)),
        }
    }
}

pub fn allocate(file: &File, from: u64, to: u64) -> io::Result<()> {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: writes one rlimit.
    unsafe { libc::getrlimit(libc::RLIMIT_FSIZE, &mut limit) };
    if to > limit.rlim_cur {
        // The kernel would send a SIGXFSZ, which ends the program.
        return Err(io::Error::from_raw_os_error(libc::EFBIG));
    }
    loop {
        // SAFETY: a call on an open descriptor, without pointers.
        match unsafe { libc::posix_fallocate(file.as_raw_fd(), from as i64, (to - from) as i64) } {
            0 => return Ok(()),
            libc::EINTR => {}
            status => return Err(io::Error::from_raw_os_error(status)),
        }
    }
}

impl Drop for Backing {
    fn drop(&mut self) {
        let Some(file) = self.file.get_mut().take() else { return };
        if !self.is_ours(&file) {
            let _ = file.into_raw_fd();
        } else if self.generation == process::generation() {
            // Closing alone would leave it locked while a forked child has the descriptor.
            let _ = file.unlock();
        }
    }
}

/// What the system said when it was asked for something.
pub fn failed(what: &str, error: &io::Error) -> StoreError {
    let kind = match error.raw_os_error() {
        Some(libc::EACCES | libc::EPERM | libc::EROFS) => StoreErrorKind::Denied,
        Some(libc::ENOSPC | libc::EDQUOT | libc::EFBIG | libc::EMFILE | libc::ENFILE | libc::ENOMEM) => {
            StoreErrorKind::Resources
        }
        None => StoreErrorKind::Rejected,
        _ => StoreErrorKind::Unreachable,
    };
    StoreError::new(kind, format!("{what}: {error}"))
}
