//! Which directory the store lives in, and whether it may be trusted.
//!
//! Two programs exclude each other only if they use the same directory, so the choice depends on the
//! URL, `NBLOCK_DIR` and the user, and on nothing else (not on `XDG_RUNTIME_DIR` or `TMPDIR`, which
//! cron and a login shell see differently). Whoever else can write to the directory could grant
//! anything to anybody, so a directory that others can write to is refused.

use std::ffi::{CString, OsString};
use std::fs::Metadata;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::{fmt, ptr};

use super::directory::denied;
use crate::error::Error;
use crate::key::Excerpt;
use crate::store::StoreError;
use crate::url::Url;

/// The environment variable that names the directory where the URL does not.
pub const VARIABLE: &str = "NBLOCK_DIR";

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

/// Refuses what others than those meant could have written, or could write.
pub fn trust(path: &Path, found: &Metadata, access: &Access, what: &str) -> Result<(), StoreError> {
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
