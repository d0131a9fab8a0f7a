//! The file behind the mapping, and its descriptor, which the program may close (R26).

use std::fs::{File, TryLockError};
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::super::directory::{Directory, failed};
use super::fault::Fault;
use super::layout::{CHUNK_BYTES, CHUNKS_AT};
use super::mapping::Mapping;
use crate::store::StoreError;
use crate::sys::descriptor::{Identity, Own};
use crate::sys::mutex::Mutex;
use crate::sys::{process, space};

pub struct Backing {
    directory: Arc<Directory>,
    name: String,
    identity: Identity,
    /// The `flock` that marks the file as in use is kept by the mapping as well, so it stays if the program closes the
    /// descriptor.
    file: Mutex<Own<File>>,
    generation: u64,
}

impl Backing {
    pub fn new(directory: Arc<Directory>, name: String, file: File) -> io::Result<Backing> {
        let file = Own::private(file)?;
        let identity = file.identity();
        Ok(Backing { directory, name, identity, file: Mutex::new(file), generation: process::generation() })
    }

    pub fn identity(&self) -> Identity {
        self.identity
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    /// The path of the file, for messages.
    pub fn shown(&self) -> String {
        self.directory.shown(&self.name).display().to_string()
    }

    /// Runs `work` with a descriptor of this file, which is opened again if the program has closed it.
    fn with<T>(&self, work: impl FnOnce(&File) -> io::Result<T>, what: &str) -> Result<T, Fault> {
        let mut kept = self.file.lock();
        let described = |error| failed(format_args!("{} could not be {what}", self.shown()), &error);
        if !kept.is_ours() {
            let anew = self.directory.open_file(&self.name)?.map(Own::private).transpose().map_err(described)?;
            *kept = anew.filter(|file| file.identity() == self.identity).ok_or_else(|| {
                StoreError::unreachable(format!(
                    "the program closed the file descriptor of {}, and the file cannot be opened again, because it was \
                     renamed or removed",
                    self.shown()
                ))
            })?;
        }
        // It was checked just now.
        work(kept.unchecked()).map_err(|error| described(error).into())
    }

    /// Marks the file as in use. Returns whether no other process uses it: then it is locked exclusively, and others
    /// have to wait.
    pub fn lock(&self, deadline: Instant) -> Result<bool, StoreError> {
        let alone = self.file.lock().get().is_ok_and(|file| file.try_lock().is_ok());
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

    /// Lets other processes use the file too, after it was locked exclusively.
    pub fn share(&self, deadline: Instant) -> Result<(), StoreError> {
        let kept = self.file.lock();
        match kept.get() {
            Ok(file) => share(file, &self.shown(), deadline),
            Err(_) => Ok(()),
        }
    }

    /// Whether a process that opens the name now opens this file.
    pub fn is_at_its_name(&self) -> Result<bool, StoreError> {
        self.directory.has(&self.name, self.identity)
    }

    /// Whether the descriptor is still ours: the program may have closed it.
    pub fn is_open(&self) -> bool {
        self.file.lock().is_ours()
    }

    /// Whether the file has a name left. `true` if this is not known.
    pub fn has_a_name(&self) -> bool {
        self.file.lock().names() != Some(0)
    }

    /// Whether the file is long enough for this many chunks.
    pub fn has(&self, chunks: u32) -> Result<bool, Fault> {
        let length = self.with(|file| Ok(file.metadata()?.len()), "examined")?;
        Ok(length >= CHUNKS_AT + u64::from(chunks) * CHUNK_BYTES)
    }

    /// Maps this many chunks, which the file must have.
    pub fn map(&self, mapping: &Mapping, chunks: u32) -> Result<(), Fault> {
        self.with(|file| mapping.now_has(chunks, file), "mapped")
    }

    /// Extends the file and allocates its blocks, so that writing to a mapping of it cannot fail.
    pub fn allocate(&self, from: u64, to: u64) -> Result<(), Fault> {
        self.with(|file| space::allocate(file, from, to), "enlarged: store full")
    }
}

/// Takes the shared lock that every user of the file has. `flock` has no timed wait.
fn share(file: &File, shown: &str, deadline: Instant) -> Result<(), StoreError> {
    const RETRY: Duration = Duration::from_millis(1);
    loop {
        match file.try_lock_shared() {
            Ok(()) => return Ok(()),
            // The first user of the file locks it while it checks it, and a cleaner of temporary files may lock it to
            // see whether it is in use.
            Err(TryLockError::WouldBlock) if Instant::now() < deadline => std::thread::sleep(RETRY),
            Err(TryLockError::WouldBlock) => {
                return Err(StoreError::unreachable(format!("store busy: another process has locked {shown}")));
            }
            Err(TryLockError::Error(error)) => return Err(failed(format_args!("{shown} could not be locked"), &error)),
        }
    }
}

impl Drop for Backing {
    fn drop(&mut self) {
        // The lock must be released although a forked child may have the descriptor too; and a child must not release
        // its parent's lock.
        if self.generation == process::generation()
            && let Ok(file) = self.file.get_mut().get()
        {
            let _ = file.unlock();
        }
    }
}
