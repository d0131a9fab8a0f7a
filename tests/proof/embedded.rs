//! The embedded store where it can be hurt: its directory, its files, its mutex, its disk, its writers.

use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, chown, symlink};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nblock::error::{Error, ErrorKind};
use nblock::key::Key;
use nblock::runtime::wait;
use nblock::store::{Acquired, Claim, Filter, Proof, Released, Renewal, Renewed, Store, StoreErrorKind, StoreOptions};
use nblock::url::Url;

use crate::child::{Actor, say, wait_for_cue, wait_for_the_end};
use crate::scene::{
    Asker, Directory, LONG, PATIENCE, answer, eventually, fresh_key, is_root, key, lock, open, skipped,
};

/// A user that nobody is (Debian's nobody and nogroup).
const NOBODY: u32 = 65534;

fn grant(store: &Arc<dyn Store>, key: &Key) -> Asker {
    let mut asker = Asker::new();
    let acquired = answer(store.acquire(key, asker.attempt(LONG))).unwrap();
    assert!(matches!(acquired, Acquired::Granted { applied: true, .. }), "{acquired:?}");
    asker
}

fn renew(store: &Arc<dyn Store>, key: &Key, asker: &mut Asker) -> Result<Renewed, nblock::store::StoreError> {
    asker.n += 1;
    let renewal = Renewal { key: key.clone(), proof: Proof::Plain(asker.token(1)), n: asker.n, expire: LONG };
    answer(store.refresh(vec![renewal]))?.remove(0)
}

fn refused(opened: Result<Arc<dyn Store>, Error>) -> Error {
    match opened {
        Ok(store) => panic!("it was opened: {}", store.location()),
        Err(error) => error,
    }
}

// ---- the directory ----

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
    assert!(error.message().contains("above"), "{error}");
}

#[test]
fn refuses_what_stands_in_for_its_files() {
    for prefix in ["control-", "data-", "open.lock"] {
        let directory = Directory::new();
        drop(directory.store().unwrap());
        let file = directory.file(prefix);
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
    chown(directory.file("data-"), Some(NOBODY), None).unwrap();
    assert_eq!(refused(directory.store()).kind(), ErrorKind::Denied);
}

/// Opens the store as another user, and says how that went.
pub fn opener(url: &str, user: &str, group: &str) {
    let (user, group): (u32, u32) = (user.parse().unwrap(), group.parse().unwrap());
    if user != 0 {
        // SAFETY: plain numbers; this process is the actor's own.
        let dropped = unsafe { [libc::setgroups(0, std::ptr::null()), libc::setgid(group), libc::setuid(user)] };
        assert_eq!(dropped, [0, 0, 0]);
    }
    match open(url) {
        Ok(store) => {
            grant(&store, &fresh_key());
            say("opened");
            wait_for_cue();
        }
        Err(error) => say(format_args!("{:?} {error}", error.kind())),
    }
}

#[test]
fn a_group_shares_a_directory_and_nobody_else_does() {
    if !is_root() {
        return skipped("embedded-group", "only root can be several users");
    }
    let directory = Directory::new();
    let url = format!("{}?group={NOBODY}", directory.url());
    let _store = open(&url).unwrap();
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
    // Without the option it is somebody else's directory.
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
    let Some(said) = other.line() else { return skipped("embedded-namespace", "no PID namespace is to be had here") };
    assert!(said.starts_with("InvalidArgument") && said.contains("PID namespace"), "{said}");
    drop(store);

    // When nobody is left who could own the mutex, the leases are still good: the data is kept.
    let mut other = Actor::start_within("unshare", &["--pid", "--fork", "--kill-child"], "opener", &arguments);
    assert_eq!(other.says(), "opened");
    // And now it is theirs.
    let error = refused(directory.store());
    assert!(error.message().contains("PID namespace"), "{error}");
    other.cue();
    other.ends();
    assert_eq!(answer(directory.store().unwrap().list(Filter::All)).unwrap().len(), 2);
}

// ---- damage ----

/// Bytes of the control file's header (its fields, up to and with the checksum).
const HEADER: u64 = 8 + 4 + 4 + 64 + 256 + 8 + 8 + 8 + 8;

#[test]
fn a_control_file_damaged_in_any_byte_is_set_aside_and_the_holds_live() {
    let directory = Directory::quick();
    let key = key("survivor");
    let mut holder = grant(&directory.store().unwrap(), &key);
    for at in 0..HEADER {
        damage(&directory.file("control-"), at, 1 << (at % 8));
        let store = directory.store().unwrap_or_else(|error| panic!("byte {at}: {error}"));
        assert_eq!(directory.set_aside(), 1, "byte {at} of the header was not noticed");
        directory.forget_set_aside();
        assert_eq!(renew(&store, &key, &mut holder).unwrap(), Renewed::Renewed { applied: true }, "byte {at}");
        let acquired = answer(store.acquire(&key, Asker::new().attempt(LONG))).unwrap();
        assert!(matches!(acquired, Acquired::Held { .. }), "byte {at}: {acquired:?}");
    }
}

fn damage(path: &Path, at: u64, flip: u8) {
    let file = fs::OpenOptions::new().read(true).write(true).open(path).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ flip], at).unwrap();
}

#[test]
fn damage_to_files_in_use_is_an_error_for_who_comes_and_harms_nobody_inside() {
    let directory = Directory::new();
    let store = directory.store().unwrap();
    let key = fresh_key();
    let mut holder = grant(&store, &key);
    damage(&directory.file("control-"), 20, 1);
    let mut comer = Actor::start("opener", &[&directory.url(), "0", "0"]);
    let said = comer.says();
    assert!(said.starts_with("Store") && said.contains("damaged") && said.contains("end them"), "{said}");
    assert_eq!(renew(&store, &key, &mut holder).unwrap(), Renewed::Renewed { applied: true });
    damage(&directory.file("control-"), 20, 1);

    damage(&directory.file("data-"), 16, 1);
    damage(&directory.file("data-"), 4096 + 16, 1);
    let mut comer = Actor::start("opener", &[&directory.url(), "0", "0"]);
    let said = comer.says();
    assert!(said.starts_with("Store") && said.contains("damaged"), "{said}");
    assert_eq!(directory.set_aside(), 0);
    drop(store);
    // Nobody uses them now: they are set aside, and the store goes on with empty ones.
    let store = directory.store().unwrap();
    assert_eq!(directory.set_aside(), 1);
    assert_eq!(renew(&store, &key, &mut holder).unwrap(), Renewed::Lost, "the loss is told");
    grant(&store, &key);
}

#[test]
fn files_cut_short_or_emptied_are_set_aside() {
    for prefix in ["control-", "data-"] {
        for length in [0, 1, 4096, 5000] {
            let directory = Directory::quick();
            let key = fresh_key();
            let mut holder = grant(&directory.store().unwrap(), &key);
            fs::OpenOptions::new().write(true).open(directory.file(prefix)).unwrap().set_len(length).unwrap();
            let store = directory.store().unwrap_or_else(|error| panic!("{prefix} {length}: {error}"));
            assert_eq!(directory.set_aside(), 1, "{prefix} of {length} bytes");
            let expected = if prefix == "data-" { Renewed::Lost } else { Renewed::Renewed { applied: true } };
            assert_eq!(renew(&store, &key, &mut holder).unwrap(), expected);
        }
    }
}

/// Opens stores whose meta pages are damaged, byte by byte: an answer or an error, and never a signal.
pub fn damaged_metas(from: &str, to: &str) {
    let (from, to): (u64, u64) = (from.parse().unwrap(), to.parse().unwrap());
    for at in from..to {
        for flip in [0xff, 1 << (at % 8)] {
            say(format_args!("byte {at} ^ {flip:#x}"));
            let directory = Directory::quick();
            let key = key("k");
            grant(&directory.store().unwrap(), &key);
            damage(&directory.file("data-"), at, flip);
            if let Ok(store) = directory.store() {
                let _ = answer(store.acquire(&key, Asker::new().attempt(LONG)));
                let _ = answer(store.list(Filter::All));
                let _ = answer(store.acquire(&fresh_key(), Asker::new().attempt(LONG)));
            }
        }
    }
    say("whole");
}

#[test]
fn damaged_meta_pages_bring_no_signal() {
    const META: u64 = 16 + 24 + 2 * 48 + 16;
    let mut actors: Vec<_> = [0u64, 4096]
        .map(|page| Actor::start("metas", &[&page.to_string(), &(page + META).to_string()]))
        .into_iter()
        .collect();
    for actor in &mut actors {
        let mut last = String::new();
        loop {
            match actor.line() {
                Some(said) if said == "whole" => break,
                Some(said) => last = said,
                None => panic!("it died of {last}"),
            }
        }
    }
}

/// Each byte of a record: whoever meets it is told, and nobody is granted.
#[test]
fn a_record_damaged_in_any_byte_is_an_error_and_never_a_grant() {
    let directory = Directory::quick();
    let store = directory.store().unwrap();
    let key = key("the-damaged-record");
    let holder = grant(&store, &key);
    let path = directory.file("data-");
    let bytes = fs::read(&path).unwrap();
    let text = key.as_str().as_bytes();
    let places: Vec<usize> = (0..bytes.len() - text.len()).filter(|&at| bytes[at..].starts_with(text)).collect();
    assert!(!places.is_empty());
    // The fixed part, then the texts of `scene::identity`, then the key.
    let before = 72 + "proof".len() + "here".len() + "now".len();
    let file = fs::OpenOptions::new().read(true).write(true).open(&path).unwrap();
    for at in 0..before + text.len() {
        for flip in [0xff, 1u8 << (at % 8)] {
            let flipped = |flip: u8| {
                for place in &places {
                    let at = place - before + at;
                    file.write_all_at(&[bytes[at] ^ flip], at as u64).unwrap();
                }
            };
            flipped(flip);
            let acquired = answer(store.acquire(&key, Asker::new().attempt(LONG)));
            let error = acquired.expect_err("a damaged record was no error");
            assert_eq!(error.kind, StoreErrorKind::Rejected, "byte {at}: {error}");
            assert!(error.message.contains(key.as_str()), "{error}");
            assert_eq!(answer(store.find(&key)).unwrap_err().kind, StoreErrorKind::Rejected);
            assert_eq!(answer(store.list(Filter::All)).unwrap_err().kind, StoreErrorKind::Rejected);
            let released = answer(store.release(&key, Claim::Token(holder.token(1))));
            assert_eq!(released.unwrap_err().kind, StoreErrorKind::Rejected);
            flipped(0);
        }
    }
    // Other keys were never the worse for it, and the record is whole again.
    grant(&store, &fresh_key());
    assert_eq!(answer(store.release(&key, Claim::Token(holder.token(1)))).unwrap(), Released::Released);
}

#[test]
fn a_damaged_fence_file_is_an_error_with_the_way_out() {
    let directory = Directory::quick();
    drop(directory.store().unwrap());
    let path = directory.file("fence");
    let whole = fs::read(&path).unwrap();
    for at in 0..whole.len() {
        let mut damaged = whole.clone();
        damaged[at] ^= 1 << (at % 8);
        fs::write(&path, &damaged).unwrap();
        // With the control file as it is, the fences that were reserved still serve.
        let _ = fs::remove_file(directory.file("control-"));
        let error = refused(directory.store());
        assert!(error.message().contains("damaged") && error.message().contains("write"), "byte {at}: {error}");
    }
    // Nor may somebody else's file stand in for it.
    let kept = directory.path().join("kept");
    fs::write(&kept, &whole).unwrap();
    fs::remove_file(&path).unwrap();
    symlink(&kept, &path).unwrap();
    refused(directory.store());
    fs::remove_file(&path).unwrap();
    fs::write(&path, &whole).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
    directory.store().unwrap();
}

// ---- the files are taken away ----

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
    // From here on it works on what everybody works on.
    let holder = grant(&store, &key);
    assert_eq!(answer(directory.store().unwrap().list(Filter::All)).unwrap().len(), 2);
    comer.cue();
    comer.ends();
    assert_eq!(answer(store.release(&key, Claim::Token(holder.token(1)))).unwrap(), Released::Released);
}

#[test]
fn files_that_are_removed_are_noticed() {
    lost_when(|directory| {
        fs::remove_file(directory.file("control-")).unwrap();
        fs::remove_file(directory.file("data-")).unwrap();
    });
}

#[test]
fn a_control_file_that_is_removed_is_noticed() {
    lost_when(|directory| fs::remove_file(directory.file("control-")).unwrap());
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

// ---- the mutex ----

/// Writes without a pause: most of the time inside the mutex.
pub fn writer(url: &str) {
    let store = open(url).unwrap();
    let key = fresh_key();
    say("writing");
    loop {
        let holder = grant(&store, &key);
        answer(store.release(&key, Claim::Token(holder.token(1)))).unwrap();
    }
}

/// Stops the writer while it has the mutex: answers with what others are told then.
fn stop_inside(writer: &Actor, store: &Arc<dyn Store>) -> nblock::store::StoreError {
    let key = fresh_key();
    let start = Instant::now();
    loop {
        writer.stop();
        match answer(store.find(&key)) {
            Err(error) if error.message.contains("process") => return error,
            _ => assert!(start.elapsed() < PATIENCE, "it was never stopped inside"),
        }
        writer.signal(libc::SIGCONT);
        std::thread::yield_now();
    }
}

#[test]
fn a_stopped_writer_makes_others_answer_store_busy() {
    let directory = Directory::new();
    let options = StoreOptions { op_timeout: Duration::from_millis(100), connect_timeout: PATIENCE };
    let store = nblock::stores::open(&Url::parse(&directory.url()).unwrap(), &options).unwrap();
    // So short an op_timeout may pass on a loaded machine without anybody being stopped.
    let answered = |key: &Key| eventually("the store is free again", || answer(store.find(key)).is_ok());
    let mut writer = Actor::start("writer", &[&directory.url()]);
    writer.says();
    let error = stop_inside(&writer, &store);
    assert_eq!(error.kind, StoreErrorKind::Unreachable, "nothing was applied");
    assert!(error.message.contains("store busy") && error.message.contains(&writer.pid().to_string()), "{error}");

    // It goes on: so does everybody.
    writer.signal(libc::SIGCONT);
    let key = fresh_key();
    answered(&key);
    let mut holder = Asker::new();
    eventually("it is granted", || answer(store.acquire(&key, holder.attempt(LONG))).is_ok());
    // Stopped again, and killed there: what it had is handed on, and nothing is lost.
    stop_inside(&writer, &store);
    writer.kill();
    answered(&key);
    let claim = Claim::AnyOf(holder.hold);
    assert_eq!(answer(store.release(&key, claim)).unwrap(), Released::Released);
    answer(store.list(Filter::All)).unwrap();
}

/// Two copies of the library in one process, as a program gets that loads two bindings.
#[test]
fn a_second_copy_of_the_library_shares_the_store() {
    use std::ffi::{CString, c_char, c_void};
    type ClientNew = unsafe extern "C" fn(*const c_char, *const c_void, *mut *mut c_void, *mut c_void) -> i32;
    type LockNew =
        unsafe extern "C" fn(*mut c_void, *const c_char, usize, *const c_void, *mut *mut c_void, *mut c_void) -> i32;
    type LockIt = unsafe extern "C" fn(*mut c_void, *const c_void, *mut c_void) -> i32;
    type Unlock = unsafe extern "C" fn(*mut c_void, *mut c_void) -> i32;

    let directory = Directory::new();
    let client = directory.client();
    let ours = lock(&client, &key("shared"));
    let exe = std::env::current_exe().unwrap();
    let library = exe.with_file_name("libnblock.so");
    assert!(library.exists(), "{} is built beside the tests", library.display());
    let name = CString::new(library.as_os_str().as_encoded_bytes()).unwrap();
    let url = CString::new(directory.url()).unwrap();
    let counter = std::sync::atomic::AtomicU64::new(0);
    const ROUNDS: u64 = 500;
    let increment = || {
        // Read, and written back one higher: two at once would lose one.
        let value = counter.load(std::sync::atomic::Ordering::Relaxed);
        std::thread::yield_now();
        counter.store(value + 1, std::sync::atomic::Ordering::Relaxed);
    };
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let forever =
                nblock::options::LockOptions { timeout: Some(nblock::options::Timeout::Forever), ..Default::default() };
            for _ in 0..ROUNDS {
                assert!(wait(ours.lock(forever)).unwrap());
                increment();
                wait(ours.unlock()).unwrap();
            }
        });
        // SAFETY: the functions have the types that the header gives them; texts end with NUL.
        unsafe {
            let library = libc::dlopen(name.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL);
            assert!(!library.is_null());
            let find = |name: &std::ffi::CStr| {
                let found = libc::dlsym(library, name.as_ptr());
                assert!(!found.is_null(), "{name:?}");
                found
            };
            let client_new: ClientNew = std::mem::transmute(find(c"nbl_client_new"));
            let lock_new: LockNew = std::mem::transmute(find(c"nbl_lock_new"));
            let lock_it: LockIt = std::mem::transmute(find(c"nbl_lock"));
            let unlock: Unlock = std::mem::transmute(find(c"nbl_unlock"));
            let ours = nblock::ffi::nbl_client_new as *const ();
            assert_ne!(client_new as *const (), ours, "it is another copy");
            let (mut client, mut lock) = (std::ptr::null_mut(), std::ptr::null_mut());
            let null = std::ptr::null_mut();
            assert_eq!(client_new(url.as_ptr(), null, &mut client, null), 0);
            assert_eq!(lock_new(client, c"shared".as_ptr(), usize::MAX, null, &mut lock, null), 0);
            for _ in 0..ROUNDS {
                while lock_it(lock, null, null) != 0 {}
                increment();
                assert_eq!(unlock(lock, null), 0);
            }
        }
    });
    assert_eq!(counter.into_inner(), 2 * ROUNDS);
}

// ---- space ----

/// Fills the store until it is full, and says what still works then.
pub fn filler(url: &str, limit: &str) {
    let limit: u64 = limit.parse().unwrap();
    let store = open(url).unwrap();
    if limit > 0 {
        let limit = libc::rlimit { rlim_cur: limit, rlim_max: limit };
        // SAFETY: reads one rlimit.
        assert_eq!(unsafe { libc::setrlimit(libc::RLIMIT_FSIZE, &limit) }, 0);
    }
    let mut held: Vec<(Key, Asker)> = Vec::new();
    let error = loop {
        let key = key(&format!("{:0>1500}", held.len()));
        let mut asker = Asker::new();
        match answer(store.acquire(&key, asker.attempt(LONG))) {
            Ok(Acquired::Granted { .. }) => held.push((key, asker)),
            Ok(other) => panic!("{other:?}"),
            Err(error) => break error,
        }
    };
    say(format_args!("{:?} {error}", error.kind));
    assert!(held.len() > 100, "{}", held.len());
    // What was granted is held: it is there, is renewed, and is nobody else's.
    for (key, asker) in &mut held {
        assert_eq!(renew(&store, key, asker).unwrap(), Renewed::Renewed { applied: true });
        let acquired = answer(store.acquire(key, Asker::new().attempt(LONG)));
        assert!(!matches!(acquired, Ok(Acquired::Granted { .. })));
    }
    assert_eq!(answer(store.list(Filter::All)).unwrap().len(), held.len());
    for (key, asker) in &held[50..] {
        assert_eq!(answer(store.release(key, Claim::Token(asker.token(1)))).unwrap(), Released::Released);
    }
    assert_eq!(answer(store.list(Filter::All)).unwrap().len(), 50);
    // And what was given back is room for others.
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

/// A file system in memory, unmounted at the end.
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

    // A disk on which not even an empty store fits.
    let disk = SmallDisk::mount("200k").unwrap();
    let error = refused(open(&format!("{}/store", disk.0.url())));
    assert_eq!(error.kind(), ErrorKind::Resources, "{error}");
    // And no half a store stays.
    let left: Vec<_> = fs::read_dir(disk.0.path().join("store")).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert!(left.iter().all(|name| !name.to_string_lossy().starts_with("control-")), "{left:?}");
}

/// Takes so many locks, and keeps them.
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
    let first = fs::metadata(directory.file("data-")).unwrap().len();
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
    assert!(fs::metadata(directory.file("data-")).unwrap().len() > 2 * first, "it had to grow");
    assert_eq!(answer(store.list(Filter::All)).unwrap().len(), 3 * COUNT);
    for (key, holder) in &mut mine {
        assert_eq!(renew(&store, key, holder).unwrap(), Renewed::Renewed { applied: true });
    }
}

// ---- killed writers ----

/// Does everything that writes, without a pause, until it is killed.
pub fn storm(url: &str, seed: &str) {
    let store = open(url).unwrap();
    let mut random = crate::scene::Random::new(seed.parse().unwrap());
    let shared: Vec<Key> = (0..16).map(|number| key(&format!("storm:{number:0>200}"))).collect();
    say("storming");
    loop {
        let key = &shared[random.below(shared.len())];
        let mut asker = Asker::new();
        let expire = Duration::from_millis(1 + random.below(20) as u64);
        match answer(store.acquire(key, asker.attempt(expire))).unwrap() {
            Acquired::Granted { .. } if random.below(4) > 0 => {
                renew(&store, key, &mut asker).unwrap();
                answer(store.release(key, Claim::Token(asker.token(1)))).unwrap();
            }
            _ => {}
        }
        if random.below(64) == 0 {
            answer(store.list(Filter::All)).unwrap();
            answer(store.fence(key)).unwrap();
        }
    }
}

#[test]
fn killed_writers_leave_the_store_whole() {
    const KILLS: u64 = 60;
    let directory = Directory::new();
    let url = directory.url();
    let store = directory.store().unwrap();
    let kept = fresh_key();
    let mut holder = grant(&store, &kept);
    let start = |seed: u64| {
        let mut actor = Actor::start("storm", &[&url, &seed.to_string()]);
        assert_eq!(actor.says(), "storming");
        actor
    };
    let mut writers: Vec<_> = (0..3).map(start).collect();
    let mut random = crate::scene::Random::new(7);
    let mut fence = 0;
    for kill in 0..KILLS {
        for _ in 0..20 {
            assert_eq!(renew(&store, &kept, &mut holder).unwrap(), Renewed::Renewed { applied: true });
            let next = answer(store.fence(&kept)).unwrap();
            assert!(next > fence, "a fence came twice: {next} after {fence}");
            fence = next;
        }
        let victim = random.below(writers.len());
        writers[victim].kill();
        writers[victim] = start(100 + kill);
    }
    drop(writers);
    answer(store.list(Filter::All)).unwrap();
    assert_eq!(renew(&store, &kept, &mut holder).unwrap(), Renewed::Renewed { applied: true });
    drop(store);
    let store = directory.store().unwrap();
    assert_eq!(renew(&store, &kept, &mut holder).unwrap(), Renewed::Renewed { applied: true });
    assert!(answer(store.fence(&kept)).unwrap() > fence);
    assert_eq!(directory.set_aside(), 0);
}
