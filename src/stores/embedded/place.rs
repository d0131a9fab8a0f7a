//! The choice of the store's directory, and whether it can be trusted.
//!
//! Two programs exclude each other only if they use the same directory. So the choice depends only on the URL,
//! `NBLOCK_DIR`, the machine's configuration file and the user (not on `XDG_RUNTIME_DIR` or `TMPDIR`, which differ
//! between cron and a login shell). It is made once for each client (R25): a later change, in this process or in a
//! forked child, leads to the same directory or to an error, and never to another store. Any user who can write to the
//! directory could grant every lock, so a directory that other users can write to is refused.

use std::ffi::{CStr, CString};
use std::fs::{self, Metadata};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicPtr, AtomicU64, Ordering};
use std::{fmt, ptr};

use super::mounts;
use crate::error::{Error, ErrorKind};
use crate::key::Excerpt;
use crate::store::{StoreError, StoreErrorKind};
use crate::stores::settings::{self, MACHINE_FILE, Machine};
use crate::sys::process;
use crate::url::Url;

/// The environment variable that names the directory if the URL does not.
pub const VARIABLE: &str = "NBLOCK_DIR";

pub use crate::sys::descriptor::Identity;

/// The identity of a file.
pub fn identity(found: &Metadata) -> Identity {
    (found.dev(), found.ino())
}

pub fn denied(message: String) -> StoreError {
    StoreError::new(StoreErrorKind::Denied, message)
}

/// A directory, and how it was chosen. Clones share `known`.
#[derive(Clone, Debug)]
pub struct Place {
    pub path: PathBuf,
    pub why: Why,
    pub access: Access,
    /// The view in which the path was looked up when the place was chosen.
    view: View,
    known: Arc<Known>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Why {
    Url,
    Variable,
    Machine,
    Default,
}

/// Who may use the directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Access {
    Private { user: u32 },
    Group { id: u32, name: String },
}

/// What a path is looked up in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct View {
    root: Identity,
    /// The mount namespace; 0 if `/proc` does not tell.
    mounts: u64,
}

/// The directory that was last opened at the path; inode 0 if none was. The numbers are atomic, so that a forked child
/// can read them in any state.
#[derive(Debug, Default)]
struct Known {
    device: AtomicU64,
    inode: AtomicU64,
}

/// The default directory that this process, or its parent, has chosen first. Never freed.
static DEFAULT: AtomicPtr<Place> = AtomicPtr::new(ptr::null_mut());

impl View {
    fn now() -> View {
        View {
            root: fs::metadata("/").map_or((0, 0), |found| identity(&found)),
            mounts: process::namespace("/proc/self/ns/mnt").unwrap_or(0),
        }
    }
}

impl Place {
    /// The directory for a URL, for this user and in this environment.
    pub fn choose(url: &Url) -> Result<Place, Error> {
        url.only_options(&["group", "root"])?;
        if !url.hosts.is_empty() || url.user.is_some() || url.password.is_some() {
            return Err(Error::invalid_argument(
                "store URL must have no host, user or password after embedded: (write \
                 embedded: or embedded:/dir)",
            ));
        }
        let (path, why) = if !url.path.is_empty() {
            (url.path.clone(), Why::Url)
        } else if let Some(path) = settings::variable(VARIABLE)? {
            (path, Why::Variable)
        } else if let Some(path) = Machine::read()?.directory {
            (path, Why::Machine)
        } else {
            let user = effective_user();
            if url.option("group").is_some() {
                return Err(Error::invalid_argument(
                    "store URL has the option group but no directory, and the default directory is for one user only: \
                     write embedded:/dir?group=GROUP",
                ));
            }
            access(None, url.option("root"))?;
            return Place::default_of(user);
        };
        let path = check_path(&path, why)?;
        let access = access(url.option("group"), url.option("root"))?;
        Ok(Place::new(path, why, access))
    }

    fn new(path: PathBuf, why: Why, access: Access) -> Place {
        Place { path, why, access, view: View::now(), known: Arc::default() }
    }

    /// The user's default directory, which must be the same for all programs of the user.
    fn default_of(user: u32) -> Result<Place, Error> {
        let path = PathBuf::from(format!("/var/tmp/nblock-{user}"));
        // SAFETY: the pointer is null or leads to a `Place` that is never freed.
        if let Some(first) = unsafe { DEFAULT.load(Ordering::Acquire).as_ref() } {
            if first.path != path {
                return Err(Error::new(
                    ErrorKind::Denied,
                    format!(
                        "the default directory of this process was {}, and the process has changed to user {user} \
                         since then: name one directory for both users (embedded:/dir?group=GROUP, {VARIABLE}, or \
                         {MACHINE_FILE})",
                        first.path.display()
                    ),
                ));
            }
            // The clone shares `known`: see `recognize`.
            return Ok(first.clone());
        }
        if let Some(private) = mounts::why_private(&path) {
            return Err(Error::invalid_argument(format!(
                "the default directory {} is not the one that other programs use: {private}, as PrivateTmp= and \
                 DynamicUser= make it. Name a directory that all of them see: \"directory = /dir\" in {MACHINE_FILE}, \
                 or {VARIABLE}=/dir in each program's environment",
                path.display()
            )));
        }
        let place = Place::new(path, Why::Default, Access::Private { user });
        let kept = Box::into_raw(Box::new(place.clone()));
        if DEFAULT.compare_exchange(ptr::null_mut(), kept, Ordering::AcqRel, Ordering::Acquire).is_err() {
            // SAFETY: it was not published. Another thread was first, for the same user.
            drop(unsafe { Box::from_raw(kept) });
            return Place::default_of(user);
        }
        Ok(place)
    }

    /// Whether two places are the same: the same path, in the same view.
    pub fn is(&self, other: &Place) -> bool {
        self.path == other.path && self.view == other.view
    }

    /// Whether this process has changed its root directory or its mounts since the place was chosen.
    pub fn is_seen_otherwise(&self) -> bool {
        self.view != View::now()
    }

    /// Fails if the process has changed its user since the directory was chosen.
    pub fn check_user(&self) -> Result<(), StoreError> {
        let (Access::Private { user }, now) = (&self.access, effective_user()) else { return Ok(()) };
        if *user == now {
            return Ok(());
        }
        Err(denied(format!(
            "directory {} belongs to {}, who opened the client, and this process has changed to {} since then: open \
             the client after the change of user, or share a directory with a group (embedded:/dir?group=GROUP)",
            self.path.display(),
            user_shown(*user),
            user_shown(now)
        )))
    }

    /// The error for a directory that belongs to another user.
    pub fn is_anothers(&self, owner: u32, user: u32) -> StoreError {
        if self.why != Why::Default {
            return belongs_to_another(&self.path, owner, user, "directory");
        }
        // The directory was not chosen by anyone: another user has created it under the default name.
        denied(format!(
            "the default directory {} belongs to {}, not to {}, who is locked out by that: have root remove it and \
             create it at boot (tmpfiles.d), or name another directory (\"directory = /dir\" in {MACHINE_FILE}, or \
             {VARIABLE})",
            self.path.display(),
            user_shown(owner),
            user_shown(user)
        ))
    }

    /// Fails if the directory must not be created, because it was known before, and this process sees other files now.
    pub fn check_missing(&self) -> Result<(), StoreError> {
        if self.known().is_none() || !self.is_seen_otherwise() {
            return Ok(());
        }
        Err(StoreError::unreachable(format!(
            "directory {} no longer exists for this process, whose root directory or mounts have changed since the \
             client was opened: open the client after that change, with a directory that all processes see",
            self.path.display()
        )))
    }

    /// Fails if the directory is not the known one, unless other processes find it at the path as well.
    pub fn recognize(&self, found: Identity) -> Result<(), StoreError> {
        let known = self.known();
        if known == Some(found) {
            return Ok(());
        }
        if let Some(known) = known
            && self.is_seen_otherwise()
        {
            return Err(denied(format!(
                "directory {} is not the one that the client was opened with ({}; it was {}): the root directory or \
                 mounts of this process have changed since then, and its locks would not exclude other processes. \
                 Open the client after that change, with a directory that all processes see",
                self.path.display(),
                identity_shown(found),
                identity_shown(known)
            )));
        }
        self.known.inode.store(0, Ordering::Release);
        self.known.device.store(found.0, Ordering::Release);
        self.known.inode.store(found.1, Ordering::Release);
        Ok(())
    }

    fn known(&self) -> Option<Identity> {
        match self.known.inode.load(Ordering::Acquire) {
            0 => None,
            inode => Some((self.known.device.load(Ordering::Acquire), inode)),
        }
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let why = match self.why {
            Why::Url => "from the URL".to_string(),
            Why::Variable => format!("from {VARIABLE}"),
            Why::Machine => format!("from {MACHINE_FILE}"),
            Why::Default => format!("the default: neither URL nor {VARIABLE} nor {MACHINE_FILE} names one"),
        };
        write!(f, "{} ({why}", self.path.display())?;
        if let Some(known) = self.known() {
            write!(f, "; {}", identity_shown(known))?;
        }
        f.write_str(")")
    }
}

/// Device and inode, as `stat` and `mountinfo` show them.
pub fn identity_shown((device, inode): Identity) -> impl fmt::Display {
    format!("device {}:{}, inode {inode}", libc::major(device), libc::minor(device))
}

fn effective_user() -> u32 {
    // SAFETY: cannot fail and touches nothing.
    unsafe { libc::geteuid() }
}

/// Checks a path. An error says where the path was given.
fn check_path(path: &str, why: Why) -> Result<PathBuf, Error> {
    let named = match why {
        Why::Variable => VARIABLE,
        Why::Machine => MACHINE_FILE,
        Why::Url | Why::Default => "store URL",
    };
    if !path.starts_with('/') {
        // The variable may contain a URL by mistake, and the URL a password.
        let shown = match path.contains(':') && why != Why::Url {
            true => "got a URL, which belongs in NBLOCK_URL or url =".to_string(),
            false => format!("got {:?}", Excerpt(path)),
        };
        return Err(Error::invalid_argument(format!(
            "{named} must name a directory by its absolute path ({shown}): a relative path could mean a different \
             directory in each program"
        )));
    }
    if why != Why::Url && path.contains('?') {
        return Err(Error::invalid_argument(format!(
            "{named} must be a directory without options (got {:?}): options belong in a URL, \
             NBLOCK_URL='embedded:/dir?group=GROUP' or url = embedded:/dir?group=GROUP",
            Excerpt(path)
        )));
    }
    if path.contains('\0') {
        return Err(Error::invalid_argument(format!("{named} must not contain a NUL byte")));
    }
    if path.trim() != path || path.chars().any(char::is_control) {
        return Err(Error::invalid_argument(format!(
            "{named} must not begin or end with white space, or contain a line break (got {:?})",
            Excerpt(path)
        )));
    }
    let path = Path::new(path);
    if path.parent().is_none() {
        return Err(Error::invalid_argument(format!(
            "{named} must not be the root directory: name a separate directory for the locks, such as embedded:/dir"
        )));
    }
    // With a slash at the end, the kernel would follow a symbolic link, which must be refused.
    Ok(path.components().collect())
}

/// Who may use the directory.
fn access(group: Option<&str>, root: Option<&str>) -> Result<Access, Error> {
    let root = match root {
        None | Some("0") => false,
        Some("1") => true,
        Some(other) => {
            return Err(Error::invalid_argument(format!(
                "store URL has root={:?}: must be 1 (root may share the store with the group) or 0",
                Excerpt(other)
            )));
        }
    };
    let user = effective_user();
    let Some(group) = group else {
        return match root {
            true => Err(Error::invalid_argument("store URL has the option root without group: remove it")),
            false => Ok(Access::Private { user }),
        };
    };
    let id = group_id(group)?;
    if user == 0 && !root {
        return Err(Error::new(
            ErrorKind::Denied,
            format!(
                "store URL has group={:?}, and this process is root: each member of the group can write to the memory \
                 that all users of the store have mapped. Run it as a member (sudo -u USER), or accept that with \
                 root=1",
                Excerpt(group)
            ),
        ));
    }
    Ok(Access::Group { id, name: group.to_string() })
}

/// A user's number, and the name if it has one.
fn user_shown(user: u32) -> String {
    match user_name(user) {
        Some(name) => format!("user {user} ({name})"),
        None => format!("user {user}"),
    }
}

fn user_name(user: u32) -> Option<String> {
    let mut buffer = vec![0u8; 4096];
    // SAFETY: plain integers and pointers, for which zero is a value.
    let mut entry: libc::passwd = unsafe { std::mem::zeroed() };
    let mut found = ptr::null_mut();
    // SAFETY: the buffer has the given length, and all arguments outlive the call.
    let status = unsafe { libc::getpwuid_r(user, &mut entry, buffer.as_mut_ptr().cast(), buffer.len(), &mut found) };
    if status != 0 || found.is_null() {
        return None;
    }
    // SAFETY: the entry was found, so its name is a NUL-terminated string in the buffer.
    let name = unsafe { CStr::from_ptr(entry.pw_name) };
    Some(name.to_string_lossy().into_owned())
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
        // SAFETY: the name ends with a NUL, the buffer has the given length, and both outlive the call.
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

/// Fails if users other than those in `access` could have written to the file, or can.
pub fn trust(path: &Path, found: &Metadata, access: &Access, what: &str) -> Result<(), StoreError> {
    let mode = found.mode() & 0o7777;
    match access {
        Access::Private { user } if found.uid() != *user => Err(belongs_to_another(path, found.uid(), *user, what)),
        // For example /tmp, whose mode must not be changed.
        Access::Private { .. } if mode & 0o022 != 0 && mode & 0o1000 != 0 => Err(denied(format!(
            "{what} {} is shared by several users (mode {mode:04o}): name a directory of its own, such as {0}/nblock",
            path.display()
        ))),
        Access::Private { .. } if mode & 0o022 != 0 => Err(denied(format!(
            "{what} {} must be writable by its owner only (mode {mode:04o}): chmod go-w",
            path.display()
        ))),
        Access::Group { id, name } if found.gid() != *id => Err(denied(format!(
            "{what} {} must belong to group {name} ({id}) (belongs to group {}): chgrp {name}",
            path.display(),
            found.gid()
        ))),
        Access::Group { name, .. } if mode & 0o002 != 0 || mode & 0o060 != 0o060 => Err(denied(format!(
            "{what} {} must be readable and writable by group {name}, and not writable by others (mode {mode:04o})",
            path.display()
        ))),
        _ => Ok(()),
    }
}

/// The error for a private directory, or a file in it, that belongs to another user.
fn belongs_to_another(path: &Path, owner: u32, user: u32, what: &str) -> StoreError {
    let run_as = user_name(owner).unwrap_or_else(|| format!("'#{owner}'"));
    denied(format!(
        "{what} {} belongs to {}, not to {}: run the program as that user (sudo -u {run_as} ...), or share a directory \
         with a group (embedded:/dir?group=GROUP)",
        path.display(),
        user_shown(owner),
        user_shown(user)
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_that_could_be_meant_in_two_ways_is_refused() {
        for (path, part) in [
            ("dir", "absolute"),
            ("/dir?group=g", "NBLOCK_URL="),
            ("/dir\n", "line break"),
            ("/dir ", "white space"),
            (" /dir", "absolute"),
            ("/d\0", "NUL"),
            ("/", "root directory"),
            ("rethinkdb://u:hunter2@h/d", "NBLOCK_URL"),
            ("embedded:/dir", "NBLOCK_URL"),
        ] {
            let error = check_path(path, Why::Variable).unwrap_err();
            assert!(error.message().starts_with(VARIABLE) && error.message().contains(part), "{path:?}: {error}");
            assert!(!error.message().contains("hunter2"), "{error}");
        }
        assert_eq!(check_path("/dir/./x/", Why::Variable).unwrap(), Path::new("/dir/x"));
    }

    #[test]
    fn nobody_is_told_to_change_the_mode_of_tmp() {
        let found = fs::metadata("/tmp").unwrap();
        let error = trust(Path::new("/tmp"), &found, &Access::Private { user: found.uid() }, "directory").unwrap_err();
        assert!(error.message.ends_with("name a directory of its own, such as /tmp/nblock"), "{}", error.message);
    }

    #[test]
    fn who_shares_a_directory_is_said_outright() {
        assert!(access(None, Some("1")).unwrap_err().message().contains("without group"));
        assert!(access(Some("0"), Some("yes")).unwrap_err().message().contains("root=\"yes\""));
        assert!(matches!(access(None, None).unwrap(), Access::Private { .. }));
        assert!(matches!(access(Some("0"), Some("1")).unwrap(), Access::Group { id: 0, .. }));
    }
}
