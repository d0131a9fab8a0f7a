//! Files and directories that are removed, moved or replaced.

use std::ffi::CString;
use std::fs::{self, DirBuilder};
use std::future::poll_fn;
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;

use nblock::clock::Boottime;
use nblock::error::ErrorKind;
use nblock::store::Filter;
use nblock::sys::runtime::{self, wait};

use super::{LOOK, grant, renew, spend_fences};
use crate::asks::{Asks, Claim, Released, Renewed};
use crate::child::{Actor, say, wait_for_cue};
use crate::support::{
    Directory, LONG, PATIENCE, RawClient, answer, eventually, fresh_key, is_root, key, lock, open, skipped,
};

fn lost_when(take_away: impl Fn(&Directory)) {
    let directory = Directory::new();
    let store = directory.store().unwrap();
    let client = directory.client();
    let (key, other) = (fresh_key(), fresh_key());
    let mut holder = grant(&store, &key);
    let held = lock(&client, &other);
    assert!(wait(held.try_lock(Default::default())).unwrap());
    take_away(&directory);
    let mut comer = Actor::start("opener", &[&directory.url(), "0", "0"]);
    assert_eq!(comer.says(), "opened");
    eventually("the loss is noticed", || renew(&store, &key, &mut holder).unwrap() == Renewed::Lost);
    assert_eq!(wait(held.unlock()).unwrap_err().kind(), ErrorKind::Lost);
    // From here on, it uses the same files as other processes.
    let holder = grant(&store, &key);
    assert_eq!(answer(directory.store().unwrap().list_all(Filter::All)).unwrap().len(), 2);
    comer.cue();
    comer.ends();
    assert_eq!(answer(store.release(&key, Claim::Token(holder.token(1)))).unwrap(), Released::Released);
}

#[test]
fn a_file_that_is_removed_is_noticed() {
    lost_when(|directory| fs::remove_file(directory.file("table-")).unwrap());
}

#[test]
fn a_directory_that_is_removed_is_noticed() {
    lost_when(|directory| fs::remove_dir_all(directory.path()).unwrap());
}

#[test]
fn a_directory_that_is_replaced_is_noticed() {
    let aside = Directory::new();
    lost_when(|directory| fs::rename(directory.path(), aside.path()).unwrap());
}

// ---- processes for which the path leads elsewhere ----

fn c_text(path: &Path) -> CString {
    CString::new(path.as_os_str().as_encoded_bytes()).unwrap()
}

/// Opens a store. At the first cue, changes its root directory or mounts something over the path. At each further cue,
/// reports the result of acquiring a key.
pub fn moved(url: &str, how: &str, what: &str) {
    let store = open(url).unwrap();
    grant(&store, &key("before"));
    say("open");
    wait_for_cue();
    let what = c_text(Path::new(what));
    let path = c_text(Path::new(url.strip_prefix("embedded:").unwrap()));
    let none = std::ptr::null();
    // SAFETY: all texts end with NUL.
    let done = unsafe {
        match how {
            "root" => libc::chroot(what.as_ptr()),
            _ => libc::mount(what.as_ptr(), path.as_ptr(), none, libc::MS_BIND, none.cast()),
        }
    };
    if done != 0 {
        return say(format_args!("cannot: {}", std::io::Error::last_os_error()));
    }
    say("moved");
    loop {
        wait_for_cue();
        std::thread::sleep(LOOK);
        match answer(store.acquire(&fresh_key(), RawClient::new().attempt(LONG))) {
            Ok(granted) => say(format_args!("{granted:?}")),
            Err(error) => say(format_args!("{:?} {error}", error.kind)),
        }
    }
}

/// A directory to be used as a root directory, with other files at the path of a store's directory.
fn root_with(directory: &Directory) -> Directory {
    let root = Directory::new();
    let within = root.path().join(directory.path().strip_prefix("/").unwrap());
    DirBuilder::new().recursive(true).mode(0o700).create(&within).unwrap();
    for file in directory.files() {
        fs::write(within.join(file.file_name().unwrap()), "another").unwrap();
    }
    root
}

#[test]
fn a_process_with_another_root_directory_keeps_its_store() {
    if !is_root() {
        return skipped("embedded-chroot", "only root can change its root directory");
    }
    let directory = Directory::new();
    let store = directory.store().unwrap();
    let held = fresh_key();
    let mut holder = grant(&store, &held);
    let root = root_with(&directory);
    let mut actor = Actor::start("moved", &[&directory.url(), "root", &root.path().to_string_lossy()]);
    assert_eq!(actor.says(), "open");
    actor.cue();
    let said = actor.says();
    if said != "moved" {
        return skipped("embedded-chroot", &said);
    }
    actor.cue();
    let said = actor.says();
    assert!(said.starts_with("Granted"), "{said}");
    // The grant is in this store, which still has what the actor held before, and other holds are not affected.
    assert_eq!(answer(store.list_all(Filter::All)).unwrap().len(), 3);
    assert_eq!(renew(&store, &held, &mut holder).unwrap(), Renewed::Renewed { applied: true });
    assert_eq!(directory.set_aside(), 0);
}

#[test]
fn a_process_with_a_mount_over_its_directory_stops_alone() {
    let directory = Directory::new();
    let store = directory.store().unwrap();
    let held = fresh_key();
    let mut holder = grant(&store, &held);
    let other = Directory::new();
    drop(other.store().unwrap());
    let (url, over) = (directory.url(), other.path().to_string_lossy().into_owned());
    let mut actor = Actor::start_within("unshare", &["--mount"], "moved", &[&url, "mount", &over]);
    let Some(said) = actor.line() else {
        return skipped("embedded-mount", "no mount namespace is available here (root may)");
    };
    assert_eq!(said, "open");
    actor.cue();
    let said = actor.says();
    if said != "moved" {
        return skipped("embedded-mount", &said);
    }
    actor.cue();
    let said = actor.says();
    assert!(said.starts_with("Granted"), "{said}");
    assert_eq!(answer(other.store().unwrap().list_all(Filter::All)).unwrap().len(), 1, "it works on what it sees");
    assert_eq!(renew(&store, &held, &mut holder).unwrap(), Renewed::Renewed { applied: true });
    assert_eq!(answer(store.list_all(Filter::All)).unwrap().len(), 2);
}

/// After a change of its root directory, as daemons make it, a process cannot see the path at all. It keeps working,
/// and stops when other processes would use other files.
#[test]
fn a_process_that_sees_nothing_works_on_and_notices_a_replaced_directory() {
    if !is_root() {
        return skipped("embedded-chroot", "only root can change its root directory");
    }
    let (directory, root, aside) = (Directory::new(), Directory::new(), Directory::new());
    fs::create_dir(root.path()).unwrap();
    let mut actor = Actor::start("moved", &[&directory.url(), "root", &root.path().to_string_lossy()]);
    assert_eq!(actor.says(), "open");
    actor.cue();
    let said = actor.says();
    if said != "moved" {
        return skipped("embedded-chroot", &said);
    }
    actor.cue();
    let said = actor.says();
    assert!(said.starts_with("Granted"), "{said}");
    let seen = |count| assert_eq!(answer(directory.store().unwrap().list_all(Filter::All)).unwrap().len(), count);
    seen(2);
    // Fences have to be reserved, which uses files, but not the path.
    spend_fences(&directory);
    actor.cue();
    let said = actor.says();
    assert!(said.starts_with("Granted"), "{said}");
    seen(3);

    fs::rename(directory.path(), aside.path()).unwrap();
    seen(0);
    actor.cue();
    let said = actor.says();
    assert!(!said.starts_with("Granted"), "granted where nobody looks any more: {said}");
    assert!(said.starts_with("BadConfig") || said.starts_with("Unreachable"), "{said}");
    assert_eq!(answer(aside.store().unwrap().list_all(Filter::All)).unwrap().len(), 3);
}

/// A store that has followed its path to a new directory is not the store of the old directory.
#[test]
fn a_directory_under_its_new_name_is_another_store() {
    let (directory, aside) = (Directory::new(), Directory::new());
    let store = directory.store().unwrap();
    grant(&store, &key("a"));
    fs::rename(directory.path(), aside.path()).unwrap();
    let early = aside.store().unwrap();
    assert_eq!(answer(early.list_all(Filter::All)).unwrap().len(), 1);
    let mut comer = Actor::start("opener", &[&directory.url(), "0", "0"]);
    assert_eq!(comer.says(), "opened");
    eventually("it has moved on", || answer(store.find(&key("a"))).unwrap().is_none());
    let late = aside.store().unwrap();
    for left in [early, late] {
        assert!(answer(left.find(&key("a"))).unwrap().is_some(), "{} leads to {}", aside.url(), directory.url());
    }
    comer.cue();
    comer.ends();
}

/// No operation is running in this process: the process that replaces the files wakes its watches.
#[test]
fn watches_are_told_that_the_files_were_replaced() {
    let directory = Directory::new();
    let store = directory.store().unwrap();
    let mut watch = store.watch(&fresh_key());
    fs::remove_file(directory.file("table-")).unwrap();
    let mut comer = Actor::start("opener", &[&directory.url(), "0", "0"]);
    assert_eq!(comer.says(), "opened");
    let mut told = poll_fn(|context| watch.poll_change(context));
    let told = runtime::block_on(runtime::until(Boottime::now() + PATIENCE, &mut told)).unwrap();
    assert!(told.is_some(), "the waiter looks at files that are no longer a store");
    comer.cue();
    comer.ends();
}
