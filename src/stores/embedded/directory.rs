//! The open directory of the store, and the files in it.

use std::ffi::{CStr, CString};
use std::fs::{self, DirBuilder, File, Metadata, OpenOptions, Permissions, TryLockError};
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt, fchown};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use std::{fmt, io};

use super::place::{Access, Place, trust};
use crate::store::{StoreError, StoreErrorKind};
use crate::sys::descriptor::Own;
use crate::sys::process;

/// Where an open descriptor has a path, so that exactly the directory that was checked is listed.
const DESCRIPTORS: &str = "/proc/self/fd";

/// The interval between attempts at something that has no timed wait.
const RETRY: Duration = Duration::from_millis(1);

/// The boot id in the name of a file of one boot, and what follows it. `None` if the name has no boot id there: then it
/// is not a file of nblock.
pub fn boot_in<'a>(name: &'a str, prefix: &str) -> Option<(&'a str, &'a str)> {
    const GROUPS: [usize; 5] = [8, 4, 4, 4, 12];
    let rest = name.strip_prefix(prefix)?;
    let (boot_id, after) = rest.split_at_checked(GROUPS.iter().sum::<usize>() + GROUPS.len() - 1)?;
    let is_hex = |group: &str| group.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
    let groups = boot_id.split('-').map(|group| if is_hex(group) { group.len() } else { 0 });
    groups.eq(GROUPS).then_some((boot_id, after))
}

pub use super::place::{Identity, denied, identity};

/// An open directory that has passed the checks of owner and mode. While it is open, cleaners of temporary files leave
/// it alone.
///
/// Operations act on this directory, even if its path leads to another one by now.
pub struct Directory {
    pub place: Place,
    /// Holds the shared lock that systemd-tmpfiles respects ("Automatic cleanup", tmpfiles.d(5)).
    file: Own<File>,
    pub identity: Identity,
    /// The parent directory, and the name of this one in it.
    above: Option<(Own<File>, CString)>,
    generation: u64,
}

impl Directory {
    /// Opens the directory. Creates it if it does not exist.
    pub fn open(place: &Place) -> Result<Directory, StoreError> {
        // A process that creates a directory for a group sets its group and mode by two further calls: retry until
        // then.
        let patience = Instant::now() + Duration::from_millis(200);
        loop {
            match Directory::open_once(place) {
                Err(_) if matches!(place.access, Access::Group { .. }) && Instant::now() < patience => {
                    std::thread::sleep(RETRY);
                }
                result => return result,
            }
        }
    }

    fn open_once(place: &Place) -> Result<Directory, StoreError> {
        let path = &place.path;
        place.check_user()?;
        let mut options = OpenOptions::new();
        options.read(true).custom_flags(libc::O_DIRECTORY | libc::O_NOFOLLOW);
        let file = match options.open(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                place.check_missing()?;
                make_directory(place)?;
                options.open(path)
            }
            opened => opened,
        };
        let file = file.and_then(above_standard).map_err(|error| match error.raw_os_error() {
            Some(libc::ENOTDIR | libc::ELOOP) if fs::symlink_metadata(path).is_ok_and(|found| found.is_symlink()) => {
                denied(format!("directory {} is a symbolic link: name the directory itself", path.display()))
            }
            Some(libc::EACCES) => match (&place.access, fs::symlink_metadata(path)) {
                (Access::Private { user }, Ok(found)) if found.uid() != *user => place.is_anothers(found.uid(), *user),
                _ => failed(format_args!("directory {} could not be opened", path.display()), &error),
            },
            _ => failed(format_args!("directory {} could not be opened", path.display()), &error),
        })?;
        let found = file
            .metadata()
            .map_err(|error| failed(format_args!("directory {} could not be examined", path.display()), &error))?;
        match place.access {
            Access::Private { user } if found.uid() != user => return Err(place.is_anothers(found.uid(), user)),
            _ => trust(path, &found, &place.access, "directory")?,
        }
        place.recognize(identity(&found))?;
        // Without the lock, a cleaner of temporary files may remove the files. That is noticed later, so it is no
        // reason to fail.
        let _ = file.try_lock_shared();
        Ok(Directory {
            place: place.clone(),
            file: Own::private(file)
                .map_err(|error| failed(format_args!("directory {} could not be examined", path.display()), &error))?,
            identity: identity(&found),
            above: above(path).map_err(|error| {
                failed(format_args!("the directory above {} could not be opened", path.display()), &error)
            })?,
            generation: process::generation(),
        })
    }

    fn open_at(&self, name: &str, flags: libc::c_int) -> io::Result<File> {
        let name = c_text(name)?;
        loop {
            let here = self.file.get()?.as_raw_fd();
            // SAFETY: the name ends with a NUL; nothing else owns the descriptor that is returned.
            match unsafe { libc::openat(here, name.as_ptr(), flags | libc::O_CLOEXEC, 0o600) } {
                -1 => match io::Error::last_os_error() {
                    error if error.kind() == io::ErrorKind::Interrupted => {}
                    error => return Err(error),
                },
                // SAFETY: as above.
                descriptor => return above_standard(unsafe { File::from_raw_fd(descriptor) }),
            }
        }
    }

    /// The path of a file in this directory, for messages.
    pub fn shown(&self, name: &str) -> PathBuf {
        self.place.path.join(name)
    }

    /// Opens an existing file, and checks its owner and mode.
    pub fn open_file(&self, name: &str) -> Result<Option<File>, StoreError> {
        // O_NONBLOCK: if the name is a pipe, opening it must not wait.
        let file = match self.open_at(name, libc::O_RDWR | libc::O_NOFOLLOW | libc::O_NONBLOCK) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => {
                return Err(failed(format_args!("{} could not be opened", self.shown(name).display()), &error));
            }
        };
        let found = self.look(name, &file)?;
        if !found.is_file() {
            return Err(denied(format!("{} is not a file", self.shown(name).display())));
        }
        trust(&self.shown(name), &found, &self.place.access, "file")?;
        Ok(Some(file))
    }

    /// Creates a file. Fails if it exists.
    pub fn create_file(&self, name: &str) -> Result<File, StoreError> {
        let create = || -> io::Result<File> {
            let file = self.open_at(name, libc::O_RDWR | libc::O_CREAT | libc::O_EXCL | libc::O_NOFOLLOW)?;
            // Independently of the umask and the directory's group.
            match self.place.access {
                Access::Private { .. } => file.set_permissions(Permissions::from_mode(0o600))?,
                Access::Group { id, .. } => {
                    fchown(&file, None, Some(id))?;
                    file.set_permissions(Permissions::from_mode(0o660))?;
                }
            }
            Ok(file)
        };
        create().map_err(|error| {
            match failed(format_args!("{} could not be created", self.shown(name).display()), &error) {
                StoreError { kind: StoreErrorKind::Denied, message } => {
                    denied(format!("{message}: every user of the store must be able to write to the directory"))
                }
                other => other,
            }
        })
    }

    /// The metadata of an open file of this directory.
    pub fn look(&self, name: &str, file: &File) -> Result<Metadata, StoreError> {
        file.metadata()
            .map_err(|error| failed(format_args!("{} could not be examined", self.shown(name).display()), &error))
    }

    pub fn rename(&self, from: &str, to: &str) -> Result<(), StoreError> {
        let rename = || {
            let (here, from, to) = (self.file.get()?.as_raw_fd(), c_text(from)?, c_text(to)?);
            // SAFETY: both names end with a NUL.
            succeeded(unsafe { libc::renameat(here, from.as_ptr(), here, to.as_ptr()) })
        };
        rename().map_err(|error| failed(format_args!("{} could not be renamed", self.shown(from).display()), &error))
    }

    /// Gives a file another name, in addition, unless that name exists.
    pub fn link(&self, name: &str, other: &str) -> Result<(), StoreError> {
        let link = || {
            let (here, name, other) = (self.file.get()?.as_raw_fd(), c_text(name)?, c_text(other)?);
            // SAFETY: both names end with a NUL.
            succeeded(unsafe { libc::linkat(here, name.as_ptr(), here, other.as_ptr(), 0) })
        };
        match link() {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(failed(
                format_args!("{} could not be linked to its final name", self.shown(name).display()),
                &error,
            )),
            _ => Ok(()),
        }
    }

    /// Removes a file, if it exists.
    pub fn remove(&self, name: &str) -> Result<(), StoreError> {
        let remove = || {
            let name = c_text(name)?;
            // SAFETY: the name ends with a NUL.
            succeeded(unsafe { libc::unlinkat(self.file.get()?.as_raw_fd(), name.as_ptr(), 0) })
        };
        match remove() {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(failed(format_args!("{} could not be removed", self.shown(name).display()), &error))
            }
            _ => Ok(()),
        }
    }

    pub fn names(&self) -> Result<Vec<String>, StoreError> {
        let read = || {
            let path = format!("{DESCRIPTORS}/{}", self.file.get()?.as_raw_fd());
            fs::read_dir(path)?.map(|entry| Ok(entry?.file_name())).collect::<io::Result<Vec<_>>>()
        };
        let names = read().map_err(|error| {
            failed(format_args!("directory {} could not be read", self.place.path.display()), &error)
        })?;
        // The names of nblock's files are all UTF-8.
        Ok(names.into_iter().filter_map(|name| name.into_string().ok()).collect())
    }

    /// Syncs the names of the files, so that they survive a crash of the machine.
    pub fn sync(&self) -> Result<(), StoreError> {
        self.file.get().and_then(|file| file.sync_all()).map_err(|error| {
            failed(format_args!("directory {} could not be synced", self.place.path.display()), &error)
        })
    }

    /// Locks `open.lock`: only one process at a time creates files here and raises the fence ceiling.
    pub fn lock_opening(&self, deadline: Instant) -> Result<Opening, StoreError> {
        const NAME: &str = "open.lock";
        loop {
            let file = match self.open_file(NAME)? {
                Some(file) => file,
                // Another process may create it first.
                None => match self.create_file(NAME) {
                    Ok(file) => file,
                    Err(error) => self.open_file(NAME)?.ok_or(error)?,
                },
            };
            match until(deadline, || file.try_lock()) {
                // The file may have been removed meanwhile: then other processes lock a new one.
                Ok(()) if self.is_still(NAME, &file) => return Ok(Opening { file }),
                Ok(()) => {}
                Err(TryLockError::WouldBlock) => {
                    return Err(StoreError::unreachable(format!(
                        "store busy: another process has been opening {} for too long (it holds the lock on {NAME}): \
                         continue or end that process",
                        self.place.path.display()
                    )));
                }
                Err(TryLockError::Error(error)) => {
                    return Err(failed(format_args!("{} could not be locked", self.shown(NAME).display()), &error));
                }
            }
        }
    }

    fn is_still(&self, name: &str, file: &File) -> bool {
        file.metadata().is_ok_and(|open| self.entry(name).is_ok_and(|named| named == identity(&open)))
    }

    /// Whether the name of an open file still leads to it. `has_a_name` returns whether the file has any name left.
    pub fn path_status(&self, name: &str, file_identity: Identity, has_a_name: impl FnOnce() -> bool) -> PathStatus {
        let found = fs::symlink_metadata(self.shown(name)).map(|found| identity(&found));
        match found {
            Ok(found) if found == file_identity => PathStatus::Current,
            _ if !has_a_name() => PathStatus::Unlinked,
            // This process sees the path as others do.
            Ok(_) if !self.place.is_seen_otherwise() => PathStatus::Replaced,
            // This process has changed its root directory or its mounts, or given up its rights: what it finds at the
            // path is not what other processes find.
            _ if self.is_displaced(name, file_identity) => PathStatus::Replaced,
            _ => PathStatus::Current,
        }
    }

    /// Whether another file has taken the place of a file of this directory, or another directory the place of this
    /// one. This needs no path, so it works if no path leads here any more.
    fn is_displaced(&self, name: &str, file: Identity) -> bool {
        let other = |found: io::Result<Identity>, expected| found.is_ok_and(|found| found != expected);
        other(self.entry(name), file)
            || self.above.as_ref().is_some_and(|(above, name)| {
                other(above.get().and_then(|above| entry_named(above, name)), self.identity)
            })
    }

    /// The identity of the file with this name.
    fn entry(&self, name: &str) -> io::Result<Identity> {
        entry_named(self.file.get()?, &c_text(name)?)
    }

    /// Whether the file with this identity has this name.
    pub fn has(&self, name: &str, file: Identity) -> Result<bool, StoreError> {
        match self.entry(name) {
            Ok(found) => Ok(found == file),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(failed(format_args!("{} could not be examined", self.shown(name).display()), &error)),
        }
    }

    /// Whether the descriptors are still ours: the program may have closed them.
    pub fn is_open(&self) -> bool {
        self.file.is_ours() && self.above.as_ref().is_none_or(|(above, _)| above.is_ours())
    }
}

/// What a process would find that opens the store now.
pub enum PathStatus {
    /// The file that is open here.
    Current,
    /// Another file.
    Replaced,
    /// The file has no name left, for any process.
    Unlinked,
}

impl Drop for Directory {
    fn drop(&mut self) {
        // The lock must be released although a forked child may have the descriptor too; and a child must not release
        // its parent's lock.
        if self.generation == process::generation()
            && let Ok(file) = self.file.get()
        {
            let _ = file.unlock();
        }
    }
}

/// The parent directory, and the last part of the path. `None` if that is not a name (`..`).
fn above(path: &Path) -> io::Result<Option<(Own<File>, CString)>> {
    let (Some(above), Some(name)) = (path.parent(), path.file_name()) else { return Ok(None) };
    // O_PATH: finding a name in it does not need the permission to list it.
    let above = OpenOptions::new().read(true).custom_flags(libc::O_PATH | libc::O_DIRECTORY).open(above)?;
    let above = Own::private(above_standard(above)?)?;
    Ok(Some((above, CString::new(name.as_bytes())?)))
}

/// The identity of the file with this name in a directory.
fn entry_named(directory: &File, name: &CStr) -> io::Result<Identity> {
    let mut found = MaybeUninit::<libc::stat>::uninit();
    // SAFETY: the name ends with a NUL; the call fills in the buffer or fails.
    unsafe {
        let flags = libc::AT_SYMLINK_NOFOLLOW;
        succeeded(libc::fstatat(directory.as_raw_fd(), name.as_ptr(), found.as_mut_ptr(), flags))?;
        let found = found.assume_init();
        Ok((found.st_dev, found.st_ino))
    }
}

fn c_text(name: &str) -> io::Result<CString> {
    Ok(CString::new(name)?)
}

fn succeeded(status: libc::c_int) -> io::Result<()> {
    if status == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Tries to lock a file until it succeeds or the deadline has passed: `flock` has no timed wait.
pub fn until(deadline: Instant, lock: impl Fn() -> Result<(), TryLockError>) -> Result<(), TryLockError> {
    loop {
        match lock() {
            Err(TryLockError::WouldBlock) if Instant::now() < deadline => std::thread::sleep(RETRY),
            other => return other,
        }
    }
}

/// See [`Directory::lock_opening`].
pub struct Opening {
    /// The locked file.
    pub file: File,
}

impl Drop for Opening {
    fn drop(&mut self) {
        // As in `Directory`: if it were only closed, it would stay locked while a forked child has the descriptor.
        let _ = self.file.unlock();
    }
}

fn make_directory(place: &Place) -> Result<(), StoreError> {
    let make = || -> io::Result<()> {
        match DirBuilder::new().mode(0o700).create(&place.path) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => return Ok(()),
            made => made?,
        }
        let directory =
            OpenOptions::new().read(true).custom_flags(libc::O_DIRECTORY | libc::O_NOFOLLOW).open(&place.path)?;
        match place.access {
            Access::Private { .. } => directory.set_permissions(Permissions::from_mode(0o700)),
            Access::Group { id, .. } => {
                fchown(&directory, None, Some(id))?;
                directory.set_permissions(Permissions::from_mode(0o2770))
            }
        }
    };
    make().map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => StoreError::bad_config(format!(
            "directory {} could not be created: its parent directory does not exist",
            place.path.display()
        )),
        _ => failed(format_args!("directory {} could not be created", place.path.display()), &error),
    })
}

fn above_standard(file: File) -> io::Result<File> {
    process::above_standard(file.into()).map(File::from)
}

/// An error of a system call, as an error of the store.
pub fn failed(what: impl fmt::Display, error: &io::Error) -> StoreError {
    let kind = match error.raw_os_error() {
        Some(libc::EACCES | libc::EPERM | libc::EROFS) => StoreErrorKind::Denied,
        Some(libc::ENOSPC | libc::EDQUOT | libc::EFBIG | libc::EMFILE | libc::ENFILE | libc::ENOMEM) => {
            StoreErrorKind::Resources
        }
        Some(libc::ENAMETOOLONG | libc::ELOOP | libc::EINVAL) => StoreErrorKind::BadConfig,
        _ => StoreErrorKind::Unreachable,
    };
    StoreError::new(kind, format!("{what}: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_ours_to_the_last_letter() {
        const BOOT: &str = "0a1b2c3d-4e5f-6071-8293-a4b5c6d7e8f9";
        assert_eq!(boot_in(&format!("data-{BOOT}"), "data-"), Some((BOOT, "")));
        assert_eq!(boot_in(&format!("data-{BOOT}.new"), "data-"), Some((BOOT, ".new")));
        for name in
            ["data-2024.csv", "data-backup.tar.gz", "control-plane.yaml", "data-", "data", "data-äöüäöüäöüäöüäöüäöü"]
        {
            assert_eq!(boot_in(name, "data-"), None, "{name}");
        }
        assert_eq!(boot_in(&format!("data-{}", BOOT.to_uppercase()), "data-"), None);
        assert_eq!(boot_in(&format!("data-{}", BOOT.replace('-', "0")), "data-"), None);
        assert_eq!(boot_in(&format!("data-0{}", BOOT.replacen('-', "", 1)), "data-"), None);
    }
}
