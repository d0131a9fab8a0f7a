//! The directory: which owner it may have, and which users may use it.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink};
use std::path::Path;

use nblock::error::ErrorKind;
use nblock::store::Filter;

use super::{NOBODY, grant, refused};
use crate::asks::Asks;
use crate::child::Actor;
use crate::support::{Directory, answer, eventually, fresh_key, is_root, open, skipped};

#[test]
fn makes_a_directory_for_its_user_alone() {
    let directory = Directory::new();
    let _store = directory.store().unwrap();
    assert_eq!(fs::metadata(directory.path()).unwrap().mode() & 0o7777, 0o700);
    for file in directory.files() {
        assert_eq!(fs::metadata(&file).unwrap().mode() & 0o7777, 0o600, "{}", file.display());
    }
}

#[test]
fn refuses_a_directory_that_others_can_write_to() {
    for mode in [0o777, 0o720, 0o702, 0o1777] {
        let directory = Directory::new();
        fs::create_dir(directory.path()).unwrap();
        fs::set_permissions(directory.path(), fs::Permissions::from_mode(mode)).unwrap();
        let error = refused(directory.store());
        assert_eq!(error.kind(), ErrorKind::Denied);
        assert!(error.message().contains(&format!("{mode:04o}")), "{error}");
        assert_eq!(directory.files(), [] as [&Path; 0], "nothing was made in it");
    }
}

#[test]
fn refuses_a_link_a_file_and_a_relative_path() {
    let (directory, name) = (Directory::new(), Directory::new());
    drop(directory.store().unwrap());
    symlink(directory.path(), name.path()).unwrap();
    for url in [name.url(), format!("{}/", name.url()), format!("{}/.", name.url()), format!("{}//", name.url())] {
        let error = refused(open(&url));
        assert_eq!(error.kind(), ErrorKind::Denied, "{url}: {error}");
        assert!(error.message().contains("symbolic link"), "{error}");
    }
    fs::remove_file(name.path()).unwrap();
    fs::write(name.path(), "").unwrap();
    let error = refused(name.store());
    assert!(error.message().contains("directory"), "{error}");
    fs::remove_file(name.path()).unwrap();

    assert_eq!(refused(open("embedded:relative/path")).kind(), ErrorKind::InvalidArgument);
    assert_eq!(refused(open("embedded:/")).kind(), ErrorKind::InvalidArgument);
    assert_eq!(refused(open(&format!("{}%00x", name.url()))).kind(), ErrorKind::InvalidArgument);
    assert_eq!(refused(open("embedded://host/x")).kind(), ErrorKind::InvalidArgument);
    assert_eq!(refused(open(&format!("{}?grupp=x", name.url()))).kind(), ErrorKind::InvalidArgument);
    assert_eq!(refused(open(&format!("{}?group=no-such-group-here", name.url()))).kind(), ErrorKind::InvalidArgument);
    let error = refused(open(&format!("{}/not/there", name.url())));
    assert!(error.message().contains("parent directory"), "{error}");
}

#[test]
fn refuses_what_stands_in_for_its_files() {
    for prefix in ["table-", "open.lock"] {
        let directory = Directory::new();
        drop(directory.store().unwrap());
        let file = directory.file(prefix);
        if prefix == "open.lock" {
            // It is only opened when a table has to be created.
            fs::remove_file(directory.file("table-")).unwrap();
        }
        let kept = directory.path().join("kept");

        fs::rename(&file, &kept).unwrap();
        symlink(&kept, &file).unwrap();
        refused(directory.store());
        fs::remove_file(&file).unwrap();

        fs::create_dir(&file).unwrap();
        refused(directory.store());
        fs::remove_dir(&file).unwrap();

        let name = std::ffi::CString::new(file.as_os_str().as_encoded_bytes()).unwrap();
        // SAFETY: the name ends with a NUL.
        assert_eq!(unsafe { libc::mkfifo(name.as_ptr(), 0o600) }, 0);
        refused(directory.store());
        fs::remove_file(&file).unwrap();

        fs::rename(&kept, &file).unwrap();
        fs::set_permissions(&file, fs::Permissions::from_mode(0o666)).unwrap();
        assert_eq!(refused(directory.store()).kind(), ErrorKind::Denied, "{prefix}");
        fs::set_permissions(&file, fs::Permissions::from_mode(0o600)).unwrap();
        drop(directory.store().unwrap_or_else(|error| panic!("{prefix}: {error}")));
    }
}

#[test]
fn refuses_a_directory_of_somebody_else() {
    if !is_root() {
        return skipped("embedded-owner", "only root can give a directory away");
    }
    let directory = Directory::new();
    drop(directory.store().unwrap());
    chown(directory.path(), Some(NOBODY), None).unwrap();
    let error = refused(directory.store());
    assert_eq!(error.kind(), ErrorKind::Denied);
    assert!(error.message().contains("65534"), "{error}");
    chown(directory.path(), Some(0), None).unwrap();
    chown(directory.file("table-"), Some(NOBODY), None).unwrap();
    assert_eq!(refused(directory.store()).kind(), ErrorKind::Denied);
}

#[test]
fn a_group_shares_a_directory_and_nobody_else_does() {
    if !is_root() {
        return skipped("embedded-group", "only root can be several users");
    }
    let directory = Directory::new();
    let url = format!("{}?group={NOBODY}", directory.url());
    // Members of the group can write to the memory that root has mapped, so root must allow that explicitly.
    let error = refused(open(&url));
    assert_eq!(error.kind(), ErrorKind::Denied);
    assert!(error.message().contains("root=1") && error.message().contains("sudo -u"), "{error}");
    assert!(!directory.path().exists());
    let _store = open(&format!("{url}&root=1")).unwrap();
    let found = fs::metadata(directory.path()).unwrap();
    assert_eq!((found.mode() & 0o7777, found.gid()), (0o2770, NOBODY));
    for file in directory.files() {
        let found = fs::metadata(&file).unwrap();
        assert_eq!((found.mode() & 0o7777, found.gid()), (0o660, NOBODY), "{}", file.display());
    }
    let mut member = Actor::start("opener", &[&url, "65533", "65534"]);
    assert_eq!(member.says(), "opened");
    let mut stranger = Actor::start("opener", &[&url, "65533", "65533"]);
    assert!(stranger.says().starts_with("Denied"));
    // Without the option, it is a directory of another user.
    let mut member = Actor::start("opener", &[&directory.url(), "65533", "65534"]);
    assert!(member.says().starts_with("Denied"));
    let private = Directory::new();
    let _store = private.store().unwrap();
    let mut stranger = Actor::start("opener", &[&private.url(), "65533", "65533"]);
    assert!(stranger.says().starts_with("Denied"));
}

#[test]
fn refuses_another_pid_namespace() {
    let directory = Directory::new();
    let store = directory.store().unwrap();
    grant(&store, &fresh_key());
    if !is_root() {
        return skipped("embedded-namespace", "only root can make a PID namespace");
    }
    let arguments = [&*directory.url(), "0", "0"];
    let mut other = Actor::start_within("unshare", &["--pid", "--fork", "--kill-child"], "opener", &arguments);
    let Some(said) = other.line() else { return skipped("embedded-namespace", "no PID namespace is available here") };
    assert!(said.starts_with("InvalidArgument") && said.contains("PID namespace"), "{said}");
    drop(store);

    // If no process is left that could own a mutex, the file is taken over, and its leases stay valid.
    let mut other = Actor::start_within("unshare", &["--pid", "--fork", "--kill-child"], "opener", &arguments);
    assert_eq!(other.says(), "opened");
    // Now it belongs to the other namespace.
    let error = refused(directory.store());
    assert!(error.message().contains("PID namespace"), "{error}");
    other.cue();
    other.ends();
    assert_eq!(answer(directory.store().unwrap().list_all(Filter::All)).unwrap().len(), 2);
}

/// How many descriptors of this process lead to a file.
fn opened(path: &Path) -> usize {
    let descriptors = fs::read_dir("/proc/self/fd").unwrap();
    descriptors
        .filter(|entry| entry.as_ref().is_ok_and(|entry| fs::read_link(entry.path()).is_ok_and(|to| to == path)))
        .count()
}

#[test]
fn who_is_kept_waiting_by_one_directory_keeps_nobody_waiting_for_another() {
    let stuck = Directory::new();
    drop(stuck.store().unwrap());
    fs::remove_file(stuck.file("table-")).unwrap();
    let path = stuck.file("open.lock");
    let opening = fs::File::open(&path).unwrap();
    opening.lock().unwrap();
    let url = stuck.url();
    let waiting = std::thread::spawn(move || open(&url).map(|store| answer(store.list_all(Filter::All))));
    eventually("it waits to open the directory", || opened(&path) == 2);
    let other = Directory::new();
    grant(&other.store().unwrap(), &fresh_key());
    assert!(!waiting.is_finished(), "the other directory was opened only after this one was given up");
    opening.unlock().unwrap();
    assert!(waiting.join().unwrap().unwrap().unwrap().is_empty());
}

/// Cleaners of temporary files lock a file for a moment, to see whether it is in use.
#[test]
fn a_file_that_somebody_has_locked_is_waited_for() {
    let directory = Directory::new();
    drop(directory.store().unwrap());
    let path = directory.file("table-");
    let locked = fs::File::open(&path).unwrap();
    locked.lock().unwrap();
    let url = directory.url();
    let waiting = std::thread::spawn(move || open(&url).map(drop));
    eventually("it has the file open, or has given up", || opened(&path) > 1 || waiting.is_finished());
    locked.unlock().unwrap();
    waiting.join().unwrap().unwrap();
}
