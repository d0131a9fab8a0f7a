//! Directories, files and file systems that may not be written to: a clear error, and nothing is lost.

use std::fs;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::Path;

use nblock::store::{Store, StoreError};

use super::{NOBODY, become_user, grant, refused, renew, spend_fences};
use crate::asks::{Asks, Renewed};
use crate::child::{Actor, say, wait_for_cue};
use crate::support::{Directory, LONG, RawClient, answer, fresh_key, is_root, key, open, skipped};

/// The user of the actors. Permissions do not restrict root, so root's actors become another user.
fn user() -> u32 {
    if is_root() { NOBODY } else { 0 }
}

fn permit(path: &Path, mode: u32) {
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
}

fn acquire(store: &std::sync::Arc<dyn Store>) -> Result<(), StoreError> {
    answer(store.acquire(&fresh_key(), RawClient::new().attempt(LONG))).map(|_| ())
}

/// Holds a key of a store. At every cue, renews it, acquires another one, and reports the result.
pub fn guest(url: &str, user: &str) {
    become_user(user.parse().unwrap(), NOBODY);
    let store = match open(url) {
        Ok(store) => store,
        Err(error) => return say(format_args!("{:?} {error}", error.kind())),
    };
    let key = fresh_key();
    let mut holder = grant(&store, &key);
    say("opened");
    loop {
        wait_for_cue();
        assert_eq!(renew(&store, &key, &mut holder).unwrap(), Renewed::Renewed { applied: true });
        match acquire(&store) {
            Ok(()) => say("granted"),
            Err(error) => say(format_args!("{:?} {error}", error.kind)),
        }
    }
}

#[test]
fn a_directory_that_may_not_be_written_to_is_an_error() {
    let directory = Directory::new();
    fs::create_dir(directory.path()).unwrap();
    permit(directory.path(), 0o500);
    if is_root() {
        chown(directory.path(), Some(NOBODY), Some(NOBODY)).unwrap();
    }
    let (url, user) = (directory.url(), user().to_string());
    let asked = |says: &str| {
        let mut guest = Actor::start("guest", &[&url, &user]);
        let said = guest.says();
        assert!(said.starts_with(says), "{said}");
        (guest, said)
    };
    let (_, said) = asked("Denied");
    assert!(said.contains("open.lock") && said.contains("must be able to write to the directory"), "{said}");
    assert!(directory.files().is_empty());

    permit(directory.path(), 0o700);
    let (mut early, _) = asked("opened");
    permit(directory.path(), 0o500);
    // No file has to be created: a process that may write to the existing files can use them.
    let (mut late, _) = asked("opened");
    let mut both = |says: &str| {
        for guest in [&mut early, &mut late] {
            guest.cue();
            let said = guest.says();
            assert!(said.starts_with(says), "{said}");
        }
    };
    both("granted");
    // Until fences have to be reserved. Even then, the guests can renew what they hold.
    spend_fences(&directory);
    both("Denied");
    permit(directory.path(), 0o700);
    both("granted");

    for name in ["table-", "open.lock", "fence"] {
        permit(&directory.file(name), 0o400);
        // The ceiling is written to a new file, so that `fence` is only read; and an existing table is opened without
        // `open.lock`.
        if name == "table-" {
            let (_, said) = asked("Denied");
            assert!(said.contains(name), "{said}");
        }
        both("granted");
        permit(&directory.file(name), 0o600);
    }
    asked("opened");
    assert_eq!(directory.set_aside(), 0);
}

/// Opens a store in a file system that it has made read-only for itself, and reports the result.
pub fn read_only(url: &str) {
    let path = std::ffi::CString::new(url.strip_prefix("embedded:").unwrap()).unwrap();
    let none = std::ptr::null();
    // SAFETY: the path ends with NUL; the other pointers may be null with these flags.
    let mounted = unsafe {
        let remount = libc::MS_REMOUNT | libc::MS_BIND | libc::MS_RDONLY;
        libc::mount(path.as_ptr(), path.as_ptr(), none, libc::MS_BIND, none.cast()) == 0
            && libc::mount(none, path.as_ptr(), none, remount, none.cast()) == 0
    };
    if !mounted {
        return say(format_args!("cannot: {}", std::io::Error::last_os_error()));
    }
    match open(url) {
        Ok(store) => say(format_args!("opened {}", store.location())),
        Err(error) => say(format_args!("{:?} {error}", error.kind())),
    }
}

#[test]
fn a_read_only_file_system_is_an_error() {
    let directory = Directory::new();
    let store = directory.store().unwrap();
    let key = key("held");
    let mut holder = grant(&store, &key);
    let mut actor = Actor::start_within("unshare", &["--mount"], "read only", &[&directory.url()]);
    let said = actor.line().unwrap_or_else(|| "cannot: no mount namespace is available here (root may)".to_string());
    if let Some(reason) = said.strip_prefix("cannot: ") {
        return skipped("embedded-read-only-mount", reason);
    }
    assert!(said.starts_with("Denied") && said.contains("Read-only file system"), "{said}");
    assert_eq!(renew(&store, &key, &mut holder).unwrap(), Renewed::Renewed { applied: true });
    acquire(&store).unwrap();
}

/// Sets its file size limit to 0, and reports the results of acquiring and opening when they have to write a file.
pub fn capped(url: &str, _: &str) {
    let limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: reads one rlimit.
    assert_eq!(unsafe { libc::setrlimit(libc::RLIMIT_FSIZE, &limit) }, 0);
    let store = open(url).unwrap();
    let key = fresh_key();
    let mut holder = grant(&store, &key);
    // The limit does not apply to pipes, so this arrives.
    say("opened");
    wait_for_cue();
    let error = acquire(&store).unwrap_err();
    assert_eq!(renew(&store, &key, &mut holder).unwrap(), Renewed::Renewed { applied: true });
    say(format_args!("{:?} {error}", error.kind));
    drop(store);
    // On this thread, which does not block signals (SIGXFSZ).
    let error = refused(open(url));
    say(format_args!("{:?} {error}", error.kind()));
}

#[test]
fn a_process_that_may_write_no_file_gets_an_error_and_no_signal() {
    let directory = Directory::new();
    let _store = directory.store().unwrap();
    let mut actor = Actor::start("capped", &[&directory.url(), ""]);
    assert_eq!(actor.says(), "opened");
    spend_fences(&directory);
    actor.cue();
    for what in ["acquire", "open"] {
        let said = actor.says();
        assert!(said.starts_with("Resources") && said.contains("fence"), "{what}: {said}");
    }
}
