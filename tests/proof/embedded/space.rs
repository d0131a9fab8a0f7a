//! Space: a full disk, a file that may not grow, and processes that extend a file at the same time.

use std::fs;

use nblock::error::ErrorKind;
use nblock::key::Key;
use nblock::store::Filter;

use super::{grant, refused, renew};
use crate::asks::{Acquired, Asks, Claim, Released, Renewed};
use crate::child::{Actor, say, wait_for_the_end};
use crate::support::{Directory, LONG, RawClient, answer, key, open, skipped};

/// Fills the store until it is full, reports the error, and checks what still works then.
pub fn filler(url: &str, limit: &str) {
    let limit: u64 = limit.parse().unwrap();
    let store = open(url).unwrap();
    if limit > 0 {
        let limit = libc::rlimit { rlim_cur: limit, rlim_max: limit };
        // SAFETY: reads one rlimit.
        assert_eq!(unsafe { libc::setrlimit(libc::RLIMIT_FSIZE, &limit) }, 0);
    }
    let mut held: Vec<(Key, RawClient)> = Vec::new();
    let error = loop {
        let key = key(&format!("{:0>1500}", held.len()));
        let mut client = RawClient::new();
        match answer(store.acquire(&key, client.attempt(LONG))) {
            Ok(Acquired::Granted { .. }) => held.push((key, client)),
            Ok(other) => panic!("{other:?}"),
            Err(error) => break error,
        }
    };
    say(format_args!("{:?} {error}", error.kind));
    assert!(held.len() > 100, "{}", held.len());
    // All grants are valid: they can be renewed, and no other client can acquire their keys.
    for (key, client) in &mut held {
        assert_eq!(renew(&store, key, client).unwrap(), Renewed::Renewed { applied: true });
        let acquired = answer(store.acquire(key, RawClient::new().attempt(LONG)));
        assert!(!matches!(acquired, Ok(Acquired::Granted { .. })));
    }
    assert_eq!(answer(store.list_all(Filter::All)).unwrap().len(), held.len());
    for (key, client) in &held[50..] {
        assert_eq!(answer(store.release(key, Claim::Token(client.token(1)))).unwrap(), Released::Released);
    }
    assert_eq!(answer(store.list_all(Filter::All)).unwrap().len(), 50);
    // The space of released locks can be used by others.
    for (key, _) in &held[50..] {
        grant(&store, key);
    }
    say("whole");
}

fn filled(mut actor: Actor) {
    let said = actor.says();
    assert!(said.starts_with("Resources") && said.contains("store full"), "{said}");
    assert_eq!(actor.says(), "whole");
    actor.ends();
}

#[test]
fn a_file_that_may_not_grow_is_an_error_and_no_signal() {
    let directory = Directory::new();
    filled(Actor::start("filler", &[&directory.url(), &(2 << 20).to_string()]));
}

/// A small file system in memory, unmounted on drop.
struct SmallDisk(Directory);

impl SmallDisk {
    fn mount(size: &str) -> Option<SmallDisk> {
        let directory = Directory::new();
        fs::create_dir(directory.path()).unwrap();
        let target = std::ffi::CString::new(directory.path().as_os_str().as_encoded_bytes()).unwrap();
        let options = std::ffi::CString::new(format!("size={size},mode=0700")).unwrap();
        // SAFETY: all texts end with NUL.
        let status =
            unsafe { libc::mount(c"none".as_ptr(), target.as_ptr(), c"tmpfs".as_ptr(), 0, options.as_ptr().cast()) };
        (status == 0).then_some(SmallDisk(directory))
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let target = std::ffi::CString::new(self.0.path().as_os_str().as_encoded_bytes()).unwrap();
        // SAFETY: the text ends with NUL.
        unsafe { libc::umount2(target.as_ptr(), libc::MNT_DETACH) };
    }
}

#[test]
fn a_full_disk_is_an_error_and_loses_nothing() {
    let Some(disk) = SmallDisk::mount("3m") else {
        return skipped("embedded-full-disk", "a small file system cannot be mounted here (root may)");
    };
    filled(Actor::start("filler", &[&format!("{}/store", disk.0.url()), "0"]));

    // A disk that is too small for an empty store.
    let disk = SmallDisk::mount("200k").unwrap();
    let error = refused(open(&format!("{}/store", disk.0.url())));
    assert_eq!(error.kind(), ErrorKind::Resources, "{error}");
    // No half-made table is left.
    let left: Vec<_> = fs::read_dir(disk.0.path().join("store")).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert!(left.iter().all(|name| !name.to_string_lossy().starts_with("table-")), "{left:?}");
}

/// Takes `count` locks, and holds them.
pub fn grower(url: &str, name: &str, count: &str) {
    let store = open(url).unwrap();
    for number in 0..count.parse().unwrap() {
        grant(&store, &key(&format!("{name}:{number:0>100}")));
    }
    say("grown");
    wait_for_the_end();
}

#[test]
fn processes_grow_the_file_together() {
    const COUNT: usize = 4000;
    let directory = Directory::new();
    let store = directory.store().unwrap();
    let first = fs::metadata(directory.file("table-")).unwrap().len();
    let mut growers: Vec<_> =
        ["a", "b"].map(|name| Actor::start("grower", &[&directory.url(), name, &COUNT.to_string()])).into();
    let mut mine = Vec::new();
    for number in 0..COUNT {
        let key = key(&format!("mine:{number:0>100}"));
        mine.push((key.clone(), grant(&store, &key)));
    }
    for grower in &mut growers {
        assert_eq!(grower.says(), "grown");
    }
    assert!(fs::metadata(directory.file("table-")).unwrap().len() > 2 * first, "it had to grow");
    assert_eq!(answer(store.list_all(Filter::All)).unwrap().len(), 3 * COUNT);
    for (key, holder) in &mut mine {
        assert_eq!(renew(&store, key, holder).unwrap(), Renewed::Renewed { applied: true });
    }
}
