//! What other boots left, what looks as if they had, and files that are not the store's.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use nblock::error::ErrorKind;
use nblock::store::Filter;

use super::{grant, refused, renew};
use crate::asks::{Acquired, Asks};
use crate::child::{Actor, say, wait_for_cue};
use crate::scene::{Asker, Directory, LONG, answer, fresh_key, is_root, key, open, skipped};

/// A boot id that is nobody's.
const OTHER: &str = "01234567-89ab-4cde-8f01-23456789abcd";

/// Where the control file's header has these, and its checksum: over all before it.
const LIBRARY: u64 = 304;
const STARTED_AT: u64 = 320;
const SUM: u64 = 360;

/// Changes a header, and makes its checksum right.
fn change_header(path: &Path, at: u64, bytes: &[u8]) {
    let file = File::options().read(true).write(true).open(path).unwrap();
    file.write_all_at(bytes, at).unwrap();
    let mut header = vec![0; SUM as usize];
    file.read_exact_at(&mut header, 0).unwrap();
    let sum = u64::from(crc32fast::hash(&header)) | 1 << 32;
    file.write_all_at(&sum.to_ne_bytes(), SUM).unwrap();
}

/// Gives the store's two files the names of another boot's.
fn rename_to_other_boot(directory: &Directory) -> [PathBuf; 2] {
    ["control-", "data-"].map(|prefix| {
        let other = directory.path().join(format!("{prefix}{OTHER}"));
        fs::rename(directory.file(prefix), &other).unwrap();
        other
    })
}

#[test]
fn what_an_earlier_boot_left_is_removed() {
    let directory = Directory::quick();
    let store = directory.store().unwrap();
    grant(&store, &key("k"));
    let before = answer(store.fence(&key("k"))).unwrap();
    drop(store);
    let left = rename_to_other_boot(&directory);
    // The machine was started another time.
    let file = File::open(&left[0]).unwrap();
    let mut started = [0; 8];
    file.read_exact_at(&mut started, STARTED_AT).unwrap();
    change_header(&left[0], STARTED_AT, &(u64::from_ne_bytes(started) - 1000).to_ne_bytes());
    let set_aside = directory.path().join(format!("data-{OTHER}.damaged-1700000000000"));
    fs::copy(&left[1], &set_aside).unwrap();
    fs::remove_file(directory.file("fence")).unwrap();
    for kind in ["control-", "data-"] {
        fs::write(directory.path().join(format!("{kind}{OTHER}.new")), "").unwrap();
        fs::write(directory.path().join(format!("{kind}0{}.new", &OTHER[1..])), [0; 4096]).unwrap();
    }

    let store = directory.store().unwrap();
    assert!(answer(store.list_all(Filter::All)).unwrap().is_empty());
    assert!(answer(store.fence(&key("k"))).unwrap() > before, "the ceiling was carried over from the data file");
    let names: Vec<_> = directory.files().iter().map(|file| file.file_name().unwrap().to_owned()).collect();
    assert_eq!(names.len(), 5, "two files, fence, open.lock, and what was set aside: {names:?}");
    assert!(set_aside.exists(), "what was set aside is kept for people to look at");
}

/// Files of other programs, among them some that begin as ours do, and some under names that only we use.
#[test]
fn files_of_other_programs_are_left_alone() {
    let directory = Directory::quick();
    drop(directory.store().unwrap());
    let mut theirs = vec![
        "data-2024.csv".to_string(),
        "control-plane.yaml".to_string(),
        "data-backup.tar.gz".to_string(),
        "data-".to_string(),
        "control-.new".to_string(),
        "fence.old".to_string(),
    ];
    for kind in ["control-", "data-"] {
        for end in ["", ".new", ".damaged-5", ".bak"] {
            theirs.push(format!("{kind}{OTHER}{end}"));
        }
    }
    for name in &theirs {
        fs::write(directory.path().join(name), "another program's data, which nobody may lose").unwrap();
    }
    for _ in 0..2 {
        let store = directory.store().unwrap();
        grant(&store, &fresh_key());
    }
    for name in &theirs {
        let kept = fs::read_to_string(directory.path().join(name)).unwrap_or_else(|error| panic!("{name}: {error}"));
        assert_eq!(kept, "another program's data, which nobody may lose", "{name}");
    }
}

#[test]
fn a_file_that_has_the_name_of_ours_is_refused_or_set_aside_and_never_lost() {
    const TEXT: &str = "another program's data, which nobody may lose";
    for name in ["fence", "fence.new"] {
        let directory = Directory::quick();
        fs::create_dir(directory.path()).unwrap();
        let path = directory.path().join(name);
        fs::write(&path, TEXT).unwrap();
        let error = refused(directory.store());
        assert_eq!(error.kind(), ErrorKind::Store, "{error}");
        assert!(error.message().contains("name a directory for the locks alone"), "{error}");
        assert_eq!(fs::read_to_string(&path).unwrap(), TEXT);
    }
    for prefix in ["control-", "data-"] {
        let directory = Directory::quick();
        drop(directory.store().unwrap());
        let (path, other) = match prefix {
            "control-" => (directory.file("control-"), directory.file("data-")),
            _ => (directory.file("data-"), directory.file("control-")),
        };
        for with_the_other in [true, false] {
            fs::write(&path, TEXT).unwrap();
            if !with_the_other {
                fs::remove_file(&other).unwrap();
            }
            drop(directory.store().unwrap_or_else(|error| panic!("{prefix}: {error}")));
            assert_eq!(directory.set_aside(), 1, "{prefix}, with the other file: {with_the_other}");
            let aside = directory.files().into_iter().find(|file| file.to_string_lossy().contains(".damaged-"));
            assert_eq!(fs::read_to_string(aside.unwrap()).unwrap(), TEXT);
            directory.forget_set_aside();
        }
    }
}

/// Sees another boot id from its beginning, and opens a store.
pub fn other_boot(url: &str, boot_id_file: &str) {
    let [from, to] =
        [boot_id_file, "/proc/sys/kernel/random/boot_id"].map(|path| std::ffi::CString::new(path).unwrap());
    let none = std::ptr::null();
    // SAFETY: both texts end with NUL.
    if unsafe { libc::mount(from.as_ptr(), to.as_ptr(), none, libc::MS_BIND, none.cast()) } != 0 {
        return say(format_args!("cannot: {}", std::io::Error::last_os_error()));
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

/// What a process says that sees another boot id.
fn under_another_boot(directory: &Directory, boot_id_file: &Path) -> Result<(Actor, String), String> {
    if !is_root() {
        return Err("only root can make a mount namespace".to_string());
    }
    fs::write(boot_id_file, format!("{OTHER}\n")).unwrap();
    let arguments = [&*directory.url(), &*boot_id_file.to_string_lossy()];
    let mut actor = Actor::start_within("unshare", &["--mount"], "other boot", &arguments);
    let said = actor.line().ok_or("no mount namespace is to be had here")?;
    match said.strip_prefix("cannot: ") {
        Some(reason) => Err(reason.to_string()),
        None => Ok((actor, said)),
    }
}

#[test]
fn another_boot_id_of_the_running_machine_is_refused() {
    let (directory, elsewhere) = (Directory::new(), Directory::new());
    fs::create_dir(elsewhere.path()).unwrap();
    let boot_id_file = elsewhere.path().join("boot_id");
    let store = directory.store().unwrap();
    let held = key("once-a-day");
    let mut holder = grant(&store, &held);
    let inode = |prefix| fs::metadata(directory.file(prefix)).unwrap().ino();
    let before = [inode("control-"), inode("data-")];

    let (_, said) = match under_another_boot(&directory, &boot_id_file) {
        Ok(said) => said,
        Err(reason) => return skipped("embedded-boot-id", &reason),
    };
    assert!(said.starts_with("InvalidArgument") && said.contains("boot id"), "in use: {said}");
    assert_eq!(renew(&store, &held, &mut holder).unwrap(), crate::asks::Renewed::Renewed { applied: true });
    drop(store);
    // Nobody has it open, and the leases still run.
    let (_, said) = under_another_boot(&directory, &boot_id_file).unwrap();
    assert!(said.starts_with("InvalidArgument") && said.contains("boot id"), "not in use: {said}");
    assert_eq!([inode("control-"), inode("data-")], before);
    let store = directory.store().unwrap();
    let acquired = answer(store.acquire(&held, Asker::new().attempt(LONG))).unwrap();
    assert!(matches!(acquired, Acquired::Held { .. }), "{acquired:?}");

    // The other way round.
    let theirs = Directory::new();
    let (mut actor, said) = under_another_boot(&theirs, &boot_id_file).unwrap();
    assert_eq!(said, "opened");
    let error = refused(theirs.store());
    assert!(error.message().contains("boot id"), "{error}");
    assert!(theirs.file("data-").to_string_lossy().ends_with(OTHER), "nothing was made or removed");
    actor.cue();
    actor.ends();
    assert!(refused(theirs.store()).message().contains("boot id"));
}

#[test]
fn another_c_library_is_refused_while_the_store_is_in_use() {
    let directory = Directory::quick();
    let store = directory.store().unwrap();
    let held = key("k");
    let mut holder = grant(&store, &held);
    change_header(&directory.file("control-"), LIBRARY, b"musl-s390x\0\0\0\0\0\0");
    let mut comer = Actor::start("opener", &[&directory.url(), "0", "0"]);
    let said = comer.says();
    assert!(said.starts_with("InvalidArgument") && said.contains("C library (musl-s390x"), "{said}");
    drop(store);
    // Nobody is left who has the mutex: it is made anew, and the leases are good.
    let store = directory.store().unwrap();
    assert_eq!(renew(&store, &held, &mut holder).unwrap(), crate::asks::Renewed::Renewed { applied: true });
    assert_eq!(directory.set_aside(), 0);
}
