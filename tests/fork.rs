//! What a fork means (R16), with real processes.

use std::io::{Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::ptr::null_mut;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU64, Ordering};
use std::time::Duration;

use nblock::client::Client;
use nblock::clock::Boottime;
use nblock::error::ErrorKind;
use nblock::ffi::*;
use nblock::key::Key;
use nblock::lock::{Lock, LockState};
use nblock::options::{ClientOptions, LockOptions, Timeout};
use nblock::stores::Choice;
use nblock::sys::runtime::wait;

/// A store of its own, removed at the end.
struct Directory(std::path::PathBuf);

impl Directory {
    fn new(name: &str) -> Directory {
        let path = std::env::temp_dir().join(format!("nblock-fork-{name}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&path);
        Directory(path)
    }

    fn url(&self) -> String {
        format!("embedded:{}", self.0.display())
    }

    fn client(&self) -> Client {
        wait(Client::open(Some(&self.url()), ClientOptions::default())).unwrap()
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn lock(client: &Client, key: &str) -> Lock {
    client.lock(Key::new(key.as_bytes()).unwrap(), LockOptions::default()).unwrap()
}

fn renewed() -> LockOptions {
    LockOptions { auto_refresh: Some(true), ..LockOptions::default() }
}

/// How a child is made: by the C library's fork, or by the bare system call.
#[derive(Clone, Copy)]
enum Kind {
    Fork,
    RawClone,
}

/// Runs `work` in a child; it says with `true` that all was well. A child that hangs is killed by its
/// alarm, and fails.
fn in_child(kind: Kind, work: impl FnOnce() -> bool) -> libc::pid_t {
    let child = unsafe {
        match kind {
            Kind::Fork => libc::fork(),
            Kind::RawClone => libc::syscall(libc::SYS_clone, libc::SIGCHLD, 0, 0, 0, 0) as libc::pid_t,
        }
    };
    assert!(child >= 0, "{}", std::io::Error::last_os_error());
    if child == 0 {
        unsafe { libc::alarm(30) };
        let well = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work)).unwrap_or(false);
        unsafe { libc::_exit(if well { 0 } else { 1 }) };
    }
    child
}

/// Runs a test in a process with one thread. A raw `clone` copies the locks that other threads hold in the
/// C library, its allocator's among them, and only `fork` sets those right: beside the threads of other
/// tests, the child could hang in anything.
fn alone(test: impl FnOnce()) {
    ended_well(in_child(Kind::Fork, || {
        test();
        true
    }));
}

fn ended_well(child: libc::pid_t) {
    let mut status = 0;
    assert_eq!(unsafe { libc::waitpid(child, &mut status, 0) }, child);
    assert_eq!(status, 0, "exit status 1: it found something wrong; signal 14: it hung");
}

fn pipe() -> (std::fs::File, std::fs::File) {
    let mut ends = [0; 2];
    assert_eq!(unsafe { libc::pipe2(ends.as_mut_ptr(), libc::O_CLOEXEC) }, 0);
    let [reader, writer] = ends.map(|end| unsafe { OwnedFd::from_raw_fd(end) });
    (reader.into(), writer.into())
}

fn idle_locks_work(kind: Kind, name: &str) {
    let directory = Directory::new(name);
    let client = directory.client();
    let (used, idle) = (lock(&client, "used"), lock(&client, "idle"));
    assert!(wait(used.try_lock(LockOptions::default())).unwrap());
    wait(used.unlock()).unwrap();
    let child = in_child(kind, || {
        [&used, &idle].into_iter().all(|lock| {
            wait(lock.try_lock(LockOptions::default())).unwrap()
                && lock.state() == LockState::Held
                && wait(lock.unlock()).is_ok()
                && wait(lock.lock(renewed())).unwrap()
                && wait(lock.unlock()).is_ok()
        })
    });
    ended_well(child);
    assert!(wait(used.try_lock(LockOptions::default())).unwrap());
    wait(used.unlock()).unwrap();
}

#[test]
fn idle_locks_work_in_a_child() {
    idle_locks_work(Kind::Fork, "idle");
}

#[test]
fn idle_locks_work_in_a_raw_clone() {
    alone(|| idle_locks_work(Kind::RawClone, "idle-raw"));
}

#[test]
fn what_the_parent_holds_stays_the_parents() {
    what_the_parent_holds(Kind::Fork, "held", renewed());
}

#[test]
fn what_the_parent_holds_stays_the_parents_beside_a_raw_clone() {
    // Not renewed: nothing has started the library's threads.
    alone(|| what_the_parent_holds(Kind::RawClone, "held-raw", LockOptions::default()));
}

fn what_the_parent_holds(kind: Kind, name: &str, options: LockOptions) {
    let directory = Directory::new(name);
    let client = directory.client();
    let held = lock(&client, "held");
    assert!(wait(held.lock(options)).unwrap());
    let seen = wait(client.find(held.key())).unwrap().unwrap();
    let child = in_child(kind, || {
        assert_eq!(held.state(), LockState::Forked);
        assert_eq!(wait(held.unlock()).unwrap_err().kind(), ErrorKind::Forked);
        assert_eq!(held.state(), LockState::Idle);
        assert_eq!(wait(held.unlock()).unwrap_err().kind(), ErrorKind::InvalidOp);
        // It is the parent's: this process has to wait like any other.
        assert!(!wait(held.try_lock(LockOptions::default())).unwrap());
        wait(client.close(Boottime::NEVER)).is_ok()
    });
    ended_well(child);
    assert_eq!(held.state(), LockState::Held);
    let now = wait(client.find(held.key())).unwrap().unwrap();
    assert_eq!(now.state.holder.token(), seen.state.holder.token(), "the parent's hold is what it was");
    wait(held.unlock()).unwrap();
}

#[test]
fn a_refresh_in_the_child_is_told_too_and_the_parent_unlocks() {
    let directory = Directory::new("refresh");
    let client = directory.client();
    let held = lock(&client, "held");
    assert!(wait(held.lock(renewed())).unwrap());
    ended_well(in_child(Kind::Fork, || {
        wait(held.refresh(None)).unwrap_err().kind() == ErrorKind::Forked
            && wait(held.refresh(None)).unwrap_err().kind() == ErrorKind::InvalidOp
    }));
    assert_eq!(held.state(), LockState::Held);
    wait(held.refresh(None)).unwrap();
    wait(held.unlock()).unwrap();
}

#[test]
fn the_parents_renewals_go_on() {
    let directory = Directory::new("renewals");
    let client = directory.client();
    let held = lock(&client, "held");
    // A third of this is when it is renewed; nothing here depends on when exactly.
    let options = LockOptions { expire: Some(Duration::from_secs(3)), ..renewed() };
    assert!(wait(held.lock(options)).unwrap());
    let before = wait(client.find(held.key())).unwrap().unwrap().state;
    ended_well(in_child(Kind::Fork, || wait(held.unlock()).unwrap_err().kind() == ErrorKind::Forked));
    let end = Boottime::now() + Duration::from_secs(60);
    loop {
        let now = wait(client.find(held.key())).unwrap().unwrap().state;
        assert_eq!(now.holder.token(), before.holder.token());
        if now.ends_at > before.ends_at {
            break;
        }
        assert!(!end.has_passed(), "it was not renewed after the fork");
        std::thread::yield_now();
    }
    wait(held.unlock()).unwrap();
}

#[test]
fn parent_and_child_draw_different_tokens() {
    let directory = Directory::new("tokens");
    let client = directory.client();
    let token = |key: &str| {
        let lock = lock(&client, key);
        assert!(wait(lock.try_lock(LockOptions::default())).unwrap());
        let token = lock.instance_token().unwrap();
        wait(lock.unlock()).unwrap();
        token
    };
    // Drawn before the fork: what is left of that block is in both processes.
    token("before");
    let (mut reader, mut writer) = pipe();
    let child = in_child(Kind::Fork, || {
        writer.write_all((0..8).map(|_| token("child")).collect::<String>().as_bytes()).is_ok()
    });
    drop(writer);
    let parents: Vec<String> = (0..8).map(|_| token("parent")).collect();
    let mut childs = String::new();
    reader.read_to_string(&mut childs).unwrap();
    ended_well(child);
    assert!(!childs.is_empty());
    for parents in parents {
        let (hold, _) = parents.split_once('.').unwrap();
        assert!(!childs.contains(hold), "a token was drawn twice");
    }
}

#[test]
fn a_child_is_not_hung_by_what_other_threads_of_the_parent_did() {
    let directory = Directory::new("busy");
    let client = directory.client();
    let stop = AtomicBool::new(false);
    let mine = lock(&client, "mine");
    std::thread::scope(|scope| {
        for thread in 0..4 {
            let (client, stop) = (&client, &stop);
            scope.spawn(move || {
                let lock = lock(client, if thread % 2 == 0 { "contended" } else { "own" });
                let options = LockOptions { timeout: Some(Timeout::Forever), ..renewed() };
                while !stop.load(Ordering::Relaxed) {
                    assert!(wait(lock.lock(options)).unwrap());
                    wait(lock.unlock()).unwrap();
                }
            });
        }
        for _ in 0..100 {
            ended_well(in_child(Kind::Fork, || {
                wait(mine.try_lock(LockOptions::default())).unwrap() && wait(mine.unlock()).is_ok()
            }));
        }
        stop.store(true, Ordering::Relaxed);
    });
}

#[test]
fn operations_of_the_parent_are_told_apart() {
    let directory = Directory::new("ops");
    let url = std::ffi::CString::new(directory.url()).unwrap();
    unsafe {
        let (mut client, mut held, mut waiting, mut op) = (null_mut(), null_mut(), null_mut(), null_mut());
        assert_eq!(nbl_client_new(url.as_ptr(), null_mut(), &mut client, null_mut()), NBL_OK);
        assert_eq!(nbl_lock_new(client, c"k".as_ptr(), NBL_CSTR, null_mut(), &mut held, null_mut()), NBL_OK);
        assert_eq!(nbl_lock_new(client, c"k".as_ptr(), NBL_CSTR, null_mut(), &mut waiting, null_mut()), NBL_OK);
        assert_eq!(nbl_lock(held, null_mut(), null_mut()), NBL_OK);
        let options = nbl_lock_options_t {
            struct_size: size_of::<nbl_lock_options_t>() as u32,
            timeout_ms: NBL_FOREVER,
            auto_refresh: 0,
            expire_ms: 0,
            if_held: 0,
            fence: 0,
        };
        assert_eq!(nbl_lock_start(waiting, &options, &mut op, null_mut()), NBL_OK);
        ended_well(in_child(Kind::Fork, || {
            let mut state = 0;
            nbl_op_finish(op, null_mut()) == NBL_ERR_FORKED
                && nbl_op_fd(op) == -1
                && nbl_op_cancel(op) == NBL_ERR_FORKED
                && nbl_op_free(op) == NBL_OK
                && nbl_lock_state(held, &mut state, null_mut()) == NBL_OK
                && state == NBL_STATE_FORKED
                && nbl_unlock(held, null_mut()) == NBL_ERR_FORKED
                && nbl_lock_free(held) == NBL_OK
                && nbl_client_free(client) == NBL_OK
        }));
        assert_eq!(nbl_op_finish(op, null_mut()), NBL_PENDING);
        assert_eq!(nbl_unlock(held, null_mut()), NBL_OK);
        assert_eq!(nbl_op_wait(op, NBL_FOREVER, null_mut()), NBL_OK);
        assert_eq!(nbl_unlock(waiting, null_mut()), NBL_OK);
        for status in [nbl_op_free(op), nbl_lock_free(held), nbl_lock_free(waiting), nbl_client_free(client)] {
            assert_eq!(status, NBL_OK);
        }
    }
}

/// A reentrant lock that was given no owner token is another owner in a child.
#[test]
fn a_random_owner_is_not_its_parent() {
    let directory = Directory::new("owner");
    let client = directory.client();
    let key = Key::new(b"reentrant").unwrap();
    let ours = client.reentrant_lock(key, None, LockOptions::default()).unwrap();
    let parents = ours.owner_token().unwrap().to_string();
    assert!(wait(ours.try_lock(LockOptions::default())).unwrap());
    ended_well(in_child(Kind::Fork, || {
        assert_eq!(wait(ours.unlock()).unwrap_err().kind(), ErrorKind::Forked);
        assert_ne!(ours.owner_token().unwrap(), parents);
        !wait(ours.try_lock(LockOptions::default())).unwrap()
    }));
    assert_eq!(ours.owner_token().unwrap(), parents);
    wait(ours.unlock()).unwrap();
}

/// A future that was begun before the fork is dropped on both sides.
#[test]
fn a_timer_of_the_parent_is_dropped_in_the_child() {
    use std::future::Future;
    nblock::sys::runtime::handle().unwrap();
    let mut sleep = Some(Box::pin(nblock::sys::runtime::sleep_until(Boottime::now() + Duration::from_secs(3600))));
    let mut context = std::task::Context::from_waker(std::task::Waker::noop());
    assert!(sleep.as_mut().unwrap().as_mut().poll(&mut context).is_pending());
    ended_well(in_child(Kind::Fork, || {
        sleep = None;
        true
    }));
}

/// The child drops a call of its parent's, while other threads of that one wait for the same key.
#[test]
fn a_call_of_the_parent_is_dropped_in_the_child() {
    let directory = Directory::new("calls");
    let client = directory.client();
    let (held, waiting) = (lock(&client, "k"), lock(&client, "k"));
    assert!(wait(held.try_lock(LockOptions::default())).unwrap());
    let patient = LockOptions { timeout: Some(Timeout::Forever), ..LockOptions::default() };
    let stop = AtomicBool::new(false);
    let mut children = Vec::new();
    std::thread::scope(|scope| {
        for _ in 0..3 {
            let other = lock(&client, "k");
            let stop = &stop;
            scope.spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    drop(other.lock(patient));
                }
            });
        }
        for _ in 0..40 {
            let mut call = Some(waiting.lock(patient));
            children.push(in_child(Kind::Fork, || {
                call = None;
                wait(waiting.try_lock(LockOptions::default())).is_ok_and(|granted| !granted)
            }));
            drop(call);
        }
        stop.store(true, Ordering::Relaxed);
    });
    children.into_iter().for_each(ended_well);
    wait(held.unlock()).unwrap();
    assert!(wait(waiting.try_lock(LockOptions::default())).unwrap());
}

/// A future of the library's that a program polls before anything has started the runtime.
#[test]
fn the_first_wait_of_a_process_starts_the_runtime() {
    alone(|| {
        use std::future::Future;
        let mut sleep = std::pin::pin!(nblock::sys::runtime::sleep_until(Boottime::now() + Duration::from_millis(1)));
        let woken = std::sync::Arc::new(Woken(std::thread::current()));
        let waker = std::task::Waker::from(woken);
        while sleep.as_mut().poll(&mut std::task::Context::from_waker(&waker)).is_pending() {
            std::thread::park();
        }
    });
}

struct Woken(std::thread::Thread);

impl std::task::Wake for Woken {
    fn wake(self: std::sync::Arc<Self>) {
        self.0.unpark();
    }
}

/// Logs to standard error while it forks: in a process of its own, since what is logged is a matter of the
/// whole process.
#[test]
fn a_child_logs_while_another_thread_of_its_parent_does() {
    alone(|| {
        let nowhere = std::fs::OpenOptions::new().write(true).open("/dev/null").unwrap();
        assert_eq!(unsafe { libc::dup2(nowhere.as_raw_fd(), libc::STDERR_FILENO) }, libc::STDERR_FILENO);
        nblock::log::set_sink(tracing::Level::INFO, nblock::log::to_standard_error);
        let stop = AtomicBool::new(false);
        let open = || drop(wait(Client::open(Some("memory:"), ClientOptions::default())).unwrap());
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    open();
                }
            });
            for _ in 0..500 {
                ended_well(in_child(Kind::Fork, || {
                    open();
                    true
                }));
            }
            stop.store(true, Ordering::Relaxed);
        });
    });
}

/// In a process of its own, which closes what all of its threads share.
#[test]
fn no_file_of_the_store_takes_the_place_of_standard_output() {
    let directory = Directory::new("standard");
    ended_well(in_child(Kind::Fork, || {
        (0..=libc::STDERR_FILENO).for_each(|standard| {
            unsafe { libc::close(standard) };
        });
        let client = directory.client();
        let lock = lock(&client, "k");
        let held = wait(lock.try_lock(LockOptions::default())).unwrap();
        let ours = |standard: i32| {
            let link = std::fs::read_link(format!("/proc/self/fd/{standard}")).unwrap_or_default();
            link.starts_with(directory.0.parent().unwrap())
        };
        held && lock.lost_fd().unwrap() > libc::STDERR_FILENO && !(0..=libc::STDERR_FILENO).any(ours)
    }));
}

// ---- a child that has become somebody else (R25) ----

/// A user that nobody is (Debian's nobody).
const NOBODY: u32 = 65534;

fn is_root() -> bool {
    // SAFETY: cannot fail and touches nothing.
    unsafe { libc::geteuid() == 0 }
}

fn become_nobody() {
    // SAFETY: plain numbers; the process is the test's own child.
    let dropped = unsafe { [libc::setgroups(0, std::ptr::null()), libc::setgid(NOBODY), libc::setuid(NOBODY)] };
    assert_eq!(dropped, [0, 0, 0]);
}

/// A master that starts as root and workers that give their rights up.
#[test]
fn a_child_that_becomes_another_user_is_told_and_never_granted_what_its_parent_holds() {
    if !is_root() {
        println!("\nSKIPPED fork-setuid: only root can become another user");
        return;
    }
    let directory = Directory::new("setuid");
    let client = directory.client();
    let held = lock(&client, "master");
    assert!(wait(held.try_lock(LockOptions::default())).unwrap());
    let child = in_child(Kind::Fork, || {
        become_nobody();
        let error = wait(lock(&client, "master").try_lock(LockOptions::default())).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Denied);
        assert!(error.message().contains("65534") && error.message().contains("?group="), "{error}");
        // With the rights to do it, it must not make files there that its parent could not trust.
        assert!(wait(client.find(&Key::new(b"master").unwrap())).is_err());
        true
    });
    ended_well(child);
    assert_eq!(held.state(), LockState::Held);
    wait(held.unlock()).unwrap();
}

#[test]
fn a_child_with_another_root_directory_is_told_and_gets_no_other_store() {
    if !is_root() {
        println!("\nSKIPPED fork-chroot: only root can change its root directory");
        return;
    }
    let directory = Directory::new("chroot");
    let root = Directory::new("chroot-root");
    let client = directory.client();
    let held = lock(&client, "master");
    assert!(wait(held.try_lock(LockOptions::default())).unwrap());
    let within = root.0.join(directory.0.strip_prefix("/").unwrap());
    for is_there in [false, true] {
        // With a directory of the same name, and all that a store needs: only its place is another.
        std::fs::create_dir_all(if is_there { &within } else { within.parent().unwrap() }).unwrap();
        std::fs::create_dir_all(root.0.join("proc")).unwrap();
        let child = in_child(Kind::Fork, || {
            let [path, proc] = [&root.0, &root.0.join("proc")].map(|path| c_path(path));
            // SAFETY: texts that end with NUL; the mount is in a namespace of the child's own, and ends with it.
            let done = unsafe {
                let none = std::ptr::null();
                let private = libc::MS_REC | libc::MS_PRIVATE;
                libc::unshare(libc::CLONE_NEWNS) == 0
                    && libc::mount(none, c"/".as_ptr(), none, private, none.cast()) == 0
                    && libc::mount(c"/proc".as_ptr(), proc.as_ptr(), none, libc::MS_BIND | libc::MS_REC, none.cast())
                        == 0
                    && libc::chroot(path.as_ptr()) == 0
                    && libc::chdir(c"/".as_ptr()) == 0
            };
            if !done {
                println!("\nSKIPPED fork-chroot: {}", std::io::Error::last_os_error());
                return true;
            }
            let error = wait(lock(&client, "master").try_lock(LockOptions::default())).unwrap_err();
            assert!(error.message().contains("root directory or mounts"), "{error}");
            true
        });
        ended_well(child);
        assert!(!is_there || std::fs::read_dir(&within).unwrap().next().is_none(), "nothing was made there");
    }
    wait(held.unlock()).unwrap();
}

fn c_path(path: &std::path::Path) -> std::ffi::CString {
    std::ffi::CString::new(path.as_os_str().as_encoded_bytes()).unwrap()
}

#[test]
fn a_changed_environment_leads_a_child_to_no_other_store() {
    alone(|| {
        let (directory, other) = (Directory::new("env"), Directory::new("env-other"));
        // SAFETY: this process has one thread.
        unsafe {
            for name in ["NBLOCK_URL", "RETHINKDB_URL", "RDB_URL", "RETHINKDB_DB", "RDB_DB"] {
                std::env::remove_var(name);
            }
            std::env::set_var("NBLOCK_DIR", &directory.0);
        }
        let client = wait(Client::open(None, ClientOptions::default())).unwrap();
        let held = lock(&client, "master");
        assert!(wait(held.try_lock(LockOptions::default())).unwrap());
        ended_well(in_child(Kind::Fork, || {
            // SAFETY: as above.
            unsafe { std::env::set_var("NBLOCK_DIR", &other.0) };
            assert!(!wait(lock(&client, "master").try_lock(LockOptions::default())).unwrap());
            !other.0.exists()
        }));
        ended_well(in_child(Kind::Fork, || {
            // SAFETY: as above.
            unsafe { std::env::set_var("NBLOCK_URL", "memory:") };
            !wait(lock(&client, "master").try_lock(LockOptions::default())).unwrap()
        }));
    });
}

/// Not only the clients that there were: one that is opened later would have another default directory.
#[test]
fn a_process_that_becomes_another_user_is_handed_no_other_default_store() {
    if !is_root() {
        println!("\nSKIPPED fork-setuid: only root can become another user");
        return;
    }
    alone(|| {
        // SAFETY: this process has one thread.
        unsafe {
            for name in ["NBLOCK_URL", "NBLOCK_DIR", "RETHINKDB_URL", "RDB_URL", "RETHINKDB_DB", "RDB_DB"] {
                std::env::remove_var(name);
            }
        }
        match Choice::make(None) {
            Ok(_) if std::path::Path::new("/etc/nblock.conf").exists() => {
                return println!("\nSKIPPED fork-default: /etc/nblock.conf chooses this machine's store");
            }
            Ok(_) => {}
            Err(error) => return println!("\nSKIPPED fork-default: {error}"),
        }
        ended_well(in_child(Kind::Fork, || {
            become_nobody();
            let error = Choice::make(None).map(drop).unwrap_err();
            assert!(error.message().contains("/var/tmp/nblock-0") && error.message().contains("65534"), "{error}");
            // What is named is what is meant.
            Choice::make(Some("embedded:/var/tmp/nblock-tests")).is_ok()
        }));
        assert!(Choice::make(None).is_ok());
    });
}

/// What the handler forked: -1 nothing yet, 0 this is the child.
static FORKED_IN_HANDLER: AtomicI32 = AtomicI32::new(0);

extern "C" fn fork_in_handler(_: i32) {
    let child = unsafe { libc::fork() };
    if child == 0 {
        unsafe { libc::alarm(30) };
    }
    FORKED_IN_HANDLER.store(child, Ordering::SeqCst);
}

/// The handler of a signal interrupts a call that waits, and forks: the call is the parent's, and the child's ends.
#[test]
fn a_child_that_is_forked_in_the_middle_of_a_call_is_told() {
    let directory = Directory::new("handler");
    let url = std::ffi::CString::new(directory.url()).unwrap();
    let client = directory.client();
    let held = lock(&client, "k");
    assert!(wait(held.try_lock(LockOptions::default())).unwrap());
    let (mut reader, writer) = pipe();
    let (thread, task) = (AtomicU64::new(0), AtomicI32::new(0));
    std::thread::scope(|scope| {
        let (thread, task) = (&thread, &task);
        let waiter = scope.spawn(move || unsafe {
            let (mut client, mut waiting) = (null_mut(), null_mut());
            assert_eq!(nbl_client_new(url.as_ptr(), null_mut(), &mut client, null_mut()), NBL_OK);
            assert_eq!(nbl_lock_new(client, c"k".as_ptr(), NBL_CSTR, null_mut(), &mut waiting, null_mut()), NBL_OK);
            let options = nbl_lock_options_t {
                struct_size: size_of::<nbl_lock_options_t>() as u32,
                timeout_ms: NBL_FOREVER,
                auto_refresh: 0,
                expire_ms: 0,
                if_held: 0,
                fence: 0,
            };
            thread.store(libc::pthread_self(), Ordering::SeqCst);
            task.store(libc::gettid(), Ordering::SeqCst);
            let status = nbl_lock(waiting, &options, null_mut());
            if FORKED_IN_HANDLER.load(Ordering::SeqCst) == 0 {
                // The child: whatever it does to the lock is no business of its parent's.
                let told = status == NBL_ERR_FORKED && nbl_try_lock(waiting, null_mut(), null_mut()) == NBL_UNAVAILABLE;
                let told = told && nbl_lock_free(waiting) == NBL_OK && nbl_client_free(client) == NBL_OK;
                let _ = (&writer).write_all(if told { b"heard" } else { b"not heard" });
                libc::_exit(0);
            }
            drop(writer);
            assert_eq!(status, NBL_OK);
            assert_eq!(nbl_unlock(waiting, null_mut()), NBL_OK);
            assert_eq!(nbl_lock_free(waiting), NBL_OK);
            assert_eq!(nbl_client_free(client), NBL_OK);
        });
        FORKED_IN_HANDLER.store(-1, Ordering::SeqCst);
        let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
        action.sa_sigaction = fork_in_handler as *const () as usize;
        action.sa_flags = libc::SA_RESTART;
        assert_eq!(unsafe { libc::sigaction(libc::SIGUSR1, &action, null_mut()) }, 0);
        // Asleep in the library, and not about to allocate: a fork there would hang in the C library.
        let asleep = || {
            let task = task.load(Ordering::SeqCst);
            task != 0 && sleeps_in_a_futex(task)
        };
        while !asleep() {
            std::thread::yield_now();
        }
        assert_eq!(unsafe { libc::pthread_kill(thread.load(Ordering::SeqCst), libc::SIGUSR1) }, 0);
        while FORKED_IN_HANDLER.load(Ordering::SeqCst) == -1 {
            std::thread::yield_now();
        }
        let child = FORKED_IN_HANDLER.load(Ordering::SeqCst);
        ended_well(child);
        wait(held.unlock()).unwrap();
        waiter.join().unwrap();
    });
    let mut said = String::new();
    reader.read_to_string(&mut said).unwrap();
    assert_eq!(said, "heard");
}

/// Whether a thread has slept on a futex for a while, which is how the library waits.
fn sleeps_in_a_futex(task: i32) -> bool {
    let path = format!("/proc/self/task/{task}/syscall");
    let calls = [libc::SYS_futex, libc::SYS_futex_waitv].map(|call| format!("{call} "));
    let futex = || std::fs::read_to_string(&path).is_ok_and(|said| calls.iter().any(|call| said.starts_with(call)));
    (0..20).all(|_| {
        std::thread::sleep(Duration::from_millis(5));
        futex()
    })
}

/// Between two instructions of a call that had not asked yet: the child goes on with it, asks in its own name, and keeps
/// nothing of what it is granted.
#[test]
fn a_grant_to_a_call_that_a_fork_has_cut_in_two_is_given_back() {
    let directory = Directory::new("cut");
    let client = directory.client();
    let key = || Key::new(b"k").unwrap();
    let plain = lock(&client, "k");
    let reentrant = client.reentrant_lock(key(), None, LockOptions::default()).unwrap();
    for asks in [&plain, &reentrant] {
        let call = nblock::sys::process::Call::begin();
        ended_well(in_child(Kind::Fork, || {
            let asked = wait(asks.try_lock(LockOptions::default()));
            let told = asked.is_err_and(|error| error.kind() == ErrorKind::Forked);
            // What is given back in the background is given back then.
            wait(client.close(Boottime::NEVER)).unwrap();
            told && asks.state() == LockState::Idle
        }));
        drop(call);
        assert!(wait(client.find(&key())).unwrap().is_none());
    }
}
