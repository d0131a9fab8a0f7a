//! What a program may do to the library's descriptors: close them all, and give their numbers to files of its own (R26).

use std::fs::File;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::time::Duration;

use nblock::client::Client;
use nblock::clock::Boottime;
use nblock::error::ErrorKind;
use nblock::key::Key;
use nblock::lock::LockState;
use nblock::options::{ClientOptions, LockOptions, Timeout};
use nblock::store::Filter;
use nblock::sys::runtime::wait;

use crate::asks::Shown;
use crate::child::{Actor, say, wait_for_cue};
use crate::reql;
use crate::support::{Directory, client, eventually, fresh_key, is_root, key, lock, skipped};

const DATA: &[u8] = b"my data\n";

/// Closes every descriptor above standard error, as daemons do, and opens so many files, which get the numbers.
fn replace_all(folder: &Path, count: usize) -> Vec<File> {
    // SAFETY: the library is to stand it, and nothing of this program needs them.
    assert_eq!(unsafe { libc::close_range(3, libc::c_uint::MAX, 0) }, 0);
    (0..count)
        .map(|number| {
            let path = folder.join(format!("important-{number}"));
            let mut file = File::options().read(true).write(true).create(true).truncate(true).open(path).unwrap();
            file.write_all(DATA).unwrap();
            file
        })
        .collect()
}

/// Whether the program's files are what they were, and still open.
fn untouched(files: &[File], folder: &Path) {
    for (number, file) in files.iter().enumerate() {
        // SAFETY: asks for the flags of a number.
        assert!(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GETFD) } >= 0, "file {number} was closed");
        let found = std::fs::read(folder.join(format!("important-{number}"))).unwrap();
        assert_eq!(found, DATA, "file {number}");
    }
}

/// A program that becomes a daemon while it uses the library.
pub fn daemon(url: &str, folder: &str) {
    let folder = Path::new(folder);
    // What is sent when the connection breaks is cleaned up for that time, and the close at the end waits for it.
    let options = ClientOptions { op_timeout: Duration::from_secs(10), ..ClientOptions::default() };
    let client = wait(Client::open(Some(url), options)).unwrap();
    let briefly =
        |millis| LockOptions { timeout: Some(Timeout::After(Duration::from_millis(millis))), ..LockOptions::default() };
    let renewed =
        LockOptions { expire: Some(Duration::from_secs(3)), auto_refresh: Some(true), ..LockOptions::default() };
    let kept = lock(&client, &fresh_key());
    assert!(wait(kept.lock(renewed)).unwrap());
    assert!(kept.lost_fd().unwrap() > 2);
    let held = lock(&client, &fresh_key());
    assert!(wait(held.try_lock(LockOptions::default())).unwrap());
    let before = wait(client.find(kept.key())).unwrap().unwrap().seen();

    let files = replace_all(folder, 40);

    // What the system tells of a connection that is gone is no answer; the next one comes.
    let start = Boottime::now();
    let again = lock(&client, held.key());
    match wait(again.lock(briefly(300))) {
        Ok(granted) => assert!(!granted, "it is held"),
        Err(error) => assert!(matches!(error.kind(), ErrorKind::Unreachable | ErrorKind::Indeterminate), "{error}"),
    }
    // On a machine however loaded: the wait did not go on forever.
    assert!(Boottime::now().since(start) < Duration::from_secs(60));
    // The store grows, several times.
    for number in 0..3_000 {
        let taken = lock(&client, &key(&format!("user-{number}:{}", "x".repeat(200))));
        match wait(taken.try_lock(LockOptions { expire: Some(Duration::from_secs(3600)), ..LockOptions::default() })) {
            Ok(granted) => assert!(granted),
            Err(error) => assert!(matches!(error.kind(), ErrorKind::Unreachable | ErrorKind::Indeterminate), "{error}"),
        }
    }
    untouched(&files, folder);
    eventually("it is renewed", || {
        wait(client.find(kept.key())).is_ok_and(|found| found.is_some_and(|found| found.seen().n > before.n + 1))
    });
    assert_eq!(kept.state(), LockState::Held);
    assert!(kept.lost_fd().unwrap() > 2, "another one, since the former was closed");
    // A wait is ended by another process.
    say("waiting");
    let free = lock(&client, &key("handed over"));
    wait(free.lock(LockOptions { timeout: Some(Timeout::Forever), ..LockOptions::default() })).unwrap();
    wait(free.unlock()).unwrap();
    wait(kept.unlock()).unwrap();
    wait(held.unlock()).unwrap();
    assert!(!wait(client.list(Filter::All)).unwrap().is_empty());
    wait(client.close(Boottime::NEVER)).unwrap();
    drop((kept, held, again, free, client));
    untouched(&files, folder);
    say("whole");
}

fn becomes_a_daemon(url: &str) {
    let files = Directory::new();
    std::fs::create_dir(files.path()).unwrap();
    let client = client(url);
    let handed_over = lock(&client, &key("handed over"));
    let long = LockOptions { expire: Some(Duration::from_secs(3600)), ..LockOptions::default() };
    assert!(wait(handed_over.try_lock(long)).unwrap());
    let mut daemon = Actor::start("daemon", &[url, &files.path().to_string_lossy()]);
    assert_eq!(daemon.says(), "waiting");
    wait(handed_over.unlock()).unwrap();
    assert_eq!(daemon.says(), "whole");
    daemon.ends();
}

#[test]
fn a_daemon_keeps_its_files_and_its_locks() {
    let directory = Directory::quick();
    becomes_a_daemon(&directory.url());
}

#[test]
fn a_daemon_keeps_its_files_and_its_locks_on_a_network() {
    becomes_a_daemon(&reql::Server::start(26).url());
}

/// A daemon that closes its descriptors and leaves for an empty root directory, where nothing can be opened again.
pub fn stranded(url: &str, root: &str) {
    let options = ClientOptions { op_timeout: Duration::from_secs(2), ..ClientOptions::default() };
    let client = wait(Client::open(Some(url), options)).unwrap();
    let renewed =
        LockOptions { expire: Some(Duration::from_secs(1)), auto_refresh: Some(true), ..LockOptions::default() };
    let kept = lock(&client, &fresh_key());
    assert!(wait(kept.lock(renewed)).unwrap());
    let other = lock(&client, &fresh_key());
    // SAFETY: the library is to stand it.
    assert_eq!(unsafe { libc::close_range(3, libc::c_uint::MAX, 0) }, 0);
    std::os::unix::fs::chroot(root).unwrap();
    std::env::set_current_dir("/").unwrap();
    let lost = kept.lost_fd().unwrap();
    // It cannot be renewed any more, and that is notified.
    let mut polled = libc::pollfd { fd: lost, events: libc::POLLIN, revents: 0 };
    // SAFETY: one pollfd.
    assert_eq!(unsafe { libc::poll(&mut polled, 1, 60_000) }, 1, "nobody was notified");
    assert_eq!(kept.state(), LockState::Overdue);
    let error = wait(other.try_lock(LockOptions::default())).unwrap_err();
    assert!(error.message().contains("closed"), "{error}");
    // An unlock is tried again for as long as a call may take.
    assert_eq!(wait(kept.unlock()).unwrap_err().kind(), ErrorKind::Indeterminate);
    say("lost");
}

#[test]
fn a_hold_that_can_not_be_renewed_any_more_is_overdue() {
    if !is_root() {
        return skipped("descriptors-chroot", "this is not root");
    }
    let (directory, root) = (Directory::quick(), Directory::new());
    std::fs::create_dir(root.path()).unwrap();
    let mut stranded = Actor::start("stranded", &[&directory.url(), &root.path().to_string_lossy()]);
    assert_eq!(stranded.says(), "lost");
    stranded.ends();
}

/// What a process that has closed its descriptors shares with others stays as it is: the store goes on for all.
pub fn closer(url: &str, folder: &str) {
    let client = client(url);
    let taken = lock(&client, &key("of the closer"));
    assert!(wait(taken.try_lock(LockOptions::default())).unwrap());
    let mut files = replace_all(Path::new(folder), 40);
    for (number, file) in files.iter_mut().enumerate() {
        // Nobody may take a file of the program's without a name for the store's own, and end everybody's holds.
        std::fs::remove_file(Path::new(folder).join(format!("important-{number}"))).unwrap();
        file.flush().unwrap();
    }
    say("closed");
    wait_for_cue();
    wait(taken.unlock()).unwrap();
    say("unlocked");
}

#[test]
fn what_others_hold_outlives_a_closing() {
    let (directory, files) = (Directory::quick(), Directory::new());
    std::fs::create_dir(files.path()).unwrap();
    let client = directory.client();
    let held = lock(&client, &fresh_key());
    assert!(wait(held.try_lock(LockOptions::default())).unwrap());
    let mut closer = Actor::start("closer", &[&directory.url(), &files.path().to_string_lossy()]);
    assert_eq!(closer.says(), "closed");
    assert!(!wait(lock(&client, &key("of the closer")).try_lock(LockOptions::default())).unwrap());
    closer.cue();
    assert_eq!(closer.says(), "unlocked");
    closer.ends();
    wait(held.refresh(None)).unwrap();
    wait(held.unlock()).unwrap();
}

/// A chain of processes, each forked from the one before, which all use the store.
pub fn generations(url: &str, count: &str) {
    let client = client(url);
    let used = lock(&client, &Key::new(b"generations").unwrap());
    let renewed = LockOptions { auto_refresh: Some(true), ..LockOptions::default() };
    let rival = lock(&client, used.key());
    let briefly = LockOptions { timeout: Some(Timeout::After(Duration::from_millis(50))), ..LockOptions::default() };
    let mut open = Vec::new();
    for _ in 0..count.parse().unwrap() {
        assert!(wait(used.lock(renewed)).unwrap());
        // What a thread needs that waits is made when it first does, and a quick answer may need no waiting. A slow one
        // may not be there in time.
        match wait(rival.lock(briefly)) {
            Ok(granted) => assert!(!granted),
            Err(error) => assert_eq!(error.kind(), ErrorKind::Indeterminate, "{error}"),
        }
        wait(used.unlock()).unwrap();
        open.push(std::fs::read_dir("/proc/self/fd").unwrap().count());
        // SAFETY: the child goes on with this, and its parent waits for it.
        let child = unsafe { libc::fork() };
        assert!(child >= 0);
        if child > 0 {
            let mut status = 0;
            // SAFETY: writes one integer.
            unsafe { libc::waitpid(child, &mut status, 0) };
            assert!(status == 0, "a child ended with {status:#x}");
            // SAFETY: ends this process, whose test goes on in the one that began the chain.
            unsafe { libc::_exit(0) };
        }
    }
    say(format_args!("{open:?}"));
    // SAFETY: as above.
    unsafe { libc::_exit(0) };
}

#[test]
fn a_chain_of_forks_keeps_no_descriptors() {
    let server = reql::Server::start(27);
    let directory = Directory::quick();
    for url in [directory.url(), server.url()] {
        let mut first = Actor::start("generations", &[&url, "8"]);
        let said = first.says();
        first.ends();
        let open: Vec<usize> =
            said.trim_matches(['[', ']']).split(", ").map(|number| number.parse().unwrap()).collect();
        // Each child opens what its parent had: no more.
        assert!(open.iter().all(|count| *count <= open[1]), "{url}: {said}");
    }
}
