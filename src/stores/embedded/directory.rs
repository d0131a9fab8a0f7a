//! Which directory the store lives in, whether it may be trusted, and the files in it.
//!
//! Two programs exclude each other only if they use the same directory, so the choice depends on the
//! URL, `NBLOCK_DIR` and the user, and on nothing else (not on `XDG_RUNTIME_DIR` or `TMPDIR`, which
//! cron and a login shell see differently). Whoever else can write to the directory could grant
//! anything to anybody, so a directory that others can write to is refused.

use std::ffi::{CString, OsString};
use std::fs::{self, DirBuilder, File, Metadata, OpenOptions, Permissions, TryLockError};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt, fchown};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use std::{fmt, io, ptr};

use crate::error::Error;
use crate::key::Excerpt;
use crate::store::{StoreError, StoreErrorKind};
use crate::url::Url;

/// The environment variable that names the directory where the URL does not.
pub const VARIABLE: &str = "NBLOCK_DIR";

/// How often something that has no timed wait is tried again.
const RETRY: Duration = Duration::from_millis(1);

/// A directory, and why it is this one.
#[derive(Clone, Debug)]
pub struct Place {
    pub path: PathBuf,
    pub why: Why,
    pub access: Access,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Why {
    Url,
    Variable,
    Default,
}

/// Who may use the directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Access {
    Private { user: u32 },
    Group { id: u32, name: String },
}

impl Place {
    pub fn choose(url: &Url) -> Result<Place, Error> {
        url.only_options(&["group"])?;
        if !url.hosts.is_empty() || url.user.is_some() || url.password.is_some() {
            return Err(Error::invalid_argument("store URL embedded: has no hosts: write embedded: or embedded:/dir"));
        }
        Place::from(&url.path, url.option("group"), std::env::var_os(VARIABLE))
    }

    fn from(path: &str, group: Option<&str>, variable: Option<OsString>) -> Result<Place, Error> {
        // SAFETY: cannot fail and touches nothing.
        let user = unsafe { libc::geteuid() };
        let (path, why) = match variable.filter(|variable| !variable.is_empty()) {
            _ if !path.is_empty() => (PathBuf::from(path), Why::Url),
            Some(variable) => (PathBuf::from(variable), Why::Variable),
            None => (PathBuf::from(format!("/var/tmp/nblock-{user}")), Why::Default),
        };
        let named = || match why {
            Why::Variable => VARIABLE,
            _ => "store URL",
        };
        if !path.is_absolute() {
            return Err(Error::invalid_argument(format!(
                "{} names the directory {:?}: it must be absolute, or two programs could mean two directories",
                named(),
                Excerpt(&path.to_string_lossy())
            )));
        }
        if path.as_os_str().as_encoded_bytes().contains(&0) {
            return Err(Error::invalid_argument(format!("{} names a directory with a NUL byte in it", named())));
        }
        if path.parent().is_none() {
            return Err(Error::invalid_argument(format!(
                "{} names the root directory: name one for the locks alone, embedded:/dir",
                named()
            )));
        }
        // A slash at the end would make the kernel follow a link that must be refused.
        let path = path.components().collect();
        let access = match group {
            None => Access::Private { user },
            Some(_) if why == Why::Default => {
                return Err(Error::invalid_argument(
                    "store URL has the option group and names no directory: the default directory is one user's own, \
                     write embedded:/dir?group=...",
                ));
            }
            Some(group) => Access::Group { id: group_id(group)?, name: group.to_string() },
        };
        Ok(Place { path, why, access })
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let why = match self.why {
            Why::Url => "from the URL",
            Why::Variable => "from NBLOCK_DIR",
            Why::Default => "the default: neither URL nor NBLOCK_DIR names one",
        };
        write!(f, "{} ({why})", self.path.display())
    }
}

/// A group by number or by name.
fn group_id(group: &str) -> Result<u32, Error> {
    if let Ok(id) = group.parse() {
        return Ok(id);
    }
    let unknown = || Error::invalid_argument(format!("store URL has group={:?}: no such group", Excerpt(group)));
    let name = CString::new(group).map_err(|_| unknown())?;
    let mut buffer = vec![0u8; 4096];
    loop {
        // SAFETY: plain integers and pointers, for which zero is a value.
        let mut entry: libc::group = unsafe { std::mem::zeroed() };
        let mut found = ptr::null_mut();
        // SAFETY: the name ends with a NUL, the buffer is as long as is said, and both outlive the call.
        let status = unsafe {
            libc::getgrnam_r(name.as_ptr(), &mut entry, buffer.as_mut_ptr().cast(), buffer.len(), &mut found)
        };
        match status {
            libc::ERANGE if buffer.len() < 1 << 24 => buffer.resize(buffer.len() * 2, 0),
            0 if !found.is_null() => return Ok(entry.gr_gid),
            _ => return Err(unknown()),
        }
    }
}

/// An open directory that was found to be trustworthy. Kept from tmp cleaners while it lives.
pub struct Directory {
    pub place: Place,
    /// Holds the shared lock that systemd-tmpfiles respects ("Automatic cleanup", tmpfiles.d(5)).
    file: File,
    /// Device and inode.
    pub identity: (u64, u64),
}

impl Directory {
    /// Opens the directory, and makes it if it is not there.
    pub fn open(place: &Place) -> Result<Directory, StoreError> {
        // Whoever makes a group's directory needs two more calls to give it to the group.
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
        let mut options = OpenOptions::new();
        options.read(true).custom_flags(libc::O_DIRECTORY | libc::O_NOFOLLOW);
        let file = match options.open(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                make_directory(place)?;
                options.open(path)
            }
            opened => opened,
        };
        let file = file.map_err(|error| match error.raw_os_error() {
            Some(libc::ENOTDIR | libc::ELOOP) if fs::symlink_metadata(path).is_ok_and(|found| found.is_symlink()) => {
                denied(format!("directory {} is a symbolic link: name the directory itself", path.display()))
            }
            _ => failed(format_args!("directory {} could not be opened", path.display()), &error),
        })?;
        let found = file
            .metadata()
            .map_err(|error| failed(format_args!("directory {} could not be looked at", path.display()), &error))?;
        trust(path, &found, &place.access, "directory")?;
        // Without the lock a tmp cleaner may take the files away, which is noticed; no reason to fail.
        let _ = file.try_lock_shared();
        Ok(Directory { place: place.clone(), file, identity: (found.dev(), found.ino()) })
    }

    /// A name in this very directory, wherever its path leads by now.
    fn at(&self, name: &str) -> PathBuf {
        PathBuf::from(format!("/proc/self/fd/{}/{name}", self.file.as_raw_fd()))
    }

    /// The name as people know it.
    pub fn shown(&self, name: &str) -> PathBuf {
        self.place.path.join(name)
    }

    /// Opens a file that is there, and belongs to whom it must.
    pub fn open_file(&self, name: &str) -> Result<Option<File>, StoreError> {
        let opened = OpenOptions::new()
            .read(true)
            .write(true)
            // O_NONBLOCK: should somebody have put a pipe there, opening it must not wait.
            .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
            .open(self.at(name));
        let file = match opened {
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

    /// Makes a file that is not there.
    pub fn create_file(&self, name: &str) -> Result<File, StoreError> {
        let create = || -> io::Result<File> {
            let file = OpenOptions::new()
                .read(true)
                .write(true)
                .create_new(true)
                .mode(0o600)
                .custom_flags(libc::O_NOFOLLOW)
                .open(self.at(name))?;
            // Whatever the umask and the directory's own group say.
            match self.place.access {
                Access::Private { .. } => file.set_permissions(Permissions::from_mode(0o600))?,
                Access::Group { id, .. } => {
                    fchown(&file, None, Some(id))?;
                    file.set_permissions(Permissions::from_mode(0o660))?;
                }
            }
            Ok(file)
        };
        create().map_err(|error| failed(format_args!("{} could not be made", self.shown(name).display()), &error))
    }

    /// What is known of an open file of this directory.
    pub fn look(&self, name: &str, file: &File) -> Result<Metadata, StoreError> {
        file.metadata()
            .map_err(|error| failed(format_args!("{} could not be looked at", self.shown(name).display()), &error))
    }

    pub fn rename(&self, from: &str, to: &str) -> Result<(), StoreError> {
        fs::rename(self.at(from), self.at(to))
            .map_err(|error| failed(format_args!("{} could not be renamed", self.shown(from).display()), &error))
    }

    /// Removes a file, if it is there.
    pub fn remove(&self, name: &str) -> Result<(), StoreError> {
        match fs::remove_file(self.at(name)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(failed(format_args!("{} could not be removed", self.shown(name).display()), &error))
            }
            _ => Ok(()),
        }
    }

    pub fn names(&self) -> Result<Vec<String>, StoreError> {
        let read = || fs::read_dir(self.at("."))?.map(|entry| Ok(entry?.file_name())).collect::<io::Result<Vec<_>>>();
        let names = read().map_err(|error| {
            failed(format_args!("directory {} could not be read", self.place.path.display()), &error)
        })?;
        // Ours are all UTF-8.
        Ok(names.into_iter().filter_map(|name| name.into_string().ok()).collect())
    }

    /// Makes the names themselves outlive a crash of the machine.
    pub fn sync(&self) -> Result<(), StoreError> {
        self.file.sync_all().map_err(|error| {
            failed(format_args!("directory {} could not be synced", self.place.path.display()), &error)
        })
    }

    /// The right to open, make and set aside files here: one process at a time.
    pub fn lock_opening(&self, deadline: Instant) -> Result<Opening, StoreError> {
        const NAME: &str = "open.lock";
        loop {
            let file = match self.open_file(NAME)? {
                Some(file) => file,
                // Somebody else may be first.
                None => match self.create_file(NAME) {
                    Ok(file) => file,
                    Err(error) => self.open_file(NAME)?.ok_or(error)?,
                },
            };
            let locked = loop {
                match file.try_lock() {
                    Err(TryLockError::WouldBlock) if Instant::now() < deadline => std::thread::sleep(RETRY),
                    other => break other,
                }
            };
            match locked {
                // Somebody may have removed the name meanwhile: then others lock another file.
                Ok(()) if self.is_still(NAME, &file) => return Ok(Opening { file }),
                Ok(()) => {}
                Err(TryLockError::WouldBlock) => {
                    return Err(StoreError::unreachable(format!(
                        "store busy: another process has been opening {} for too long (it holds {NAME})",
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
        match (fs::symlink_metadata(self.at(name)), file.metadata()) {
            (Ok(named), Ok(open)) => (named.dev(), named.ino()) == (open.dev(), open.ino()),
            _ => false,
        }
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        // A forked child that has the descriptor too must not keep the lock.
        let _ = self.file.unlock();
    }
}

/// See [`Directory::lock_opening`].
pub struct Opening {
    file: File,
}

impl Drop for Opening {
    fn drop(&mut self) {
        // As in `Directory`: closing alone would leave it locked while a forked child lives.
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
            "directory {} could not be made: the directory above it is not there",
            place.path.display()
        )),
        _ => failed(format_args!("directory {} could not be made", place.path.display()), &error),
    })
}

/// Refuses what others than those meant could have written, or could write.
fn trust(path: &Path, found: &Metadata, access: &Access, what: &str) -> Result<(), StoreError> {
    let mode = found.mode() & 0o7777;
    match access {
        Access::Private { user } if found.uid() != *user => Err(denied(format!(
            "{what} {} belongs to user {}, not to user {user}: a store belongs to who uses it, or to a group (?group=)",
            path.display(),
            found.uid()
        ))),
        Access::Private { .. } if mode & 0o022 != 0 => Err(denied(format!(
            "{what} {} has mode {mode:04o}: others than its owner must not be able to write to it (chmod go-w)",
            path.display()
        ))),
        Access::Group { id, name } if found.gid() != *id => Err(denied(format!(
            "{what} {} belongs to group {}, not to group {name} ({id})",
            path.display(),
            found.gid()
        ))),
        Access::Group { name, .. } if mode & 0o002 != 0 || mode & 0o060 != 0o060 => Err(denied(format!(
            "{what} {} has mode {mode:04o}: group {name} must be able to read and write it, and nobody else to write",
            path.display()
        ))),
        _ => Ok(()),
    }
}

fn denied(message: String) -> StoreError {
    StoreError::new(StoreErrorKind::Denied, message)
}

/// What the system said when it was asked for something.
pub fn failed(what: impl fmt::Display, error: &io::Error) -> StoreError {
    let kind = match error.raw_os_error() {
        Some(libc::EACCES | libc::EPERM | libc::EROFS) => StoreErrorKind::Denied,
        Some(libc::ENOSPC | libc::EDQUOT | libc::EFBIG | libc::EMFILE | libc::ENFILE | libc::ENOMEM) => {
            StoreErrorKind::Resources
        }
        _ => StoreErrorKind::Unreachable,
    };
    StoreError::new(kind, format!("{what}: {error}"))
}
