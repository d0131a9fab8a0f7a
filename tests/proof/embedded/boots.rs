//! Files of other boots, files that only seem to be, and files that are not the store's.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use nblock::error::ErrorKind;
use nblock::store::Filter;

use super::{grant, refused, renew, started_before};
use crate::asks::{Acquired, Asks};
use crate::child::{Actor, say, wait_for_cue};
use crate::support::{Directory, LONG, RawClient, answer, fresh_key, is_root, key, open, skipped};

/// A boot id that no machine has.
const OTHER: &str = "01234567-89ab-4cde-8f01-23456789abcd";

#[test]
fn what_an_earlier_boot_left_is_removed() {
    let directory = Directory::quick();
    let store = directory.store().unwrap();
    grant(&store, &key("k"));
    let before = answer(store.fence(&key("k"))).unwrap();
    drop(store);
    let table = directory.file("table-");
    let half_made = [
        table.with_file_name(format!("table-{OTHER}.new-0123456789abcdef")),
        PathBuf::from(format!("{}.new-fedcba9876543210", table.display())),
    ];
    fs::write(&half_made[0], "").unwrap();
    fs::write(&half_made[1], [0; 4096]).unwrap();
    started_before(&table);
    let left = table.with_file_name(format!("table-{OTHER}"));
    fs::rename(table, &left).unwrap();
    let set_aside = directory.path().join(format!("table-{OTHER}.damaged-1700000000000"));
    fs::copy(&left, &set_aside).unwrap();
    fs::remove_file(directory.file("fence")).unwrap();

    let store = directory.store().unwrap();
    assert!(answer(store.list_all(Filter::All)).unwrap().is_empty());
    assert!(answer(store.fence(&key("k"))).unwrap() > before, "the ceiling was carried over from the table");
    let names: Vec<_> = directory.files().iter().map(|file| file.file_name().unwrap().to_owned()).collect();
    assert_eq!(names.len(), 4, "a table, fence, open.lock, and what was set aside: {names:?}");
    assert!(set_aside.exists(), "what was set aside is kept for people to look at");
}

/// Files of other programs. Some names begin like ours, and some are names that only we use.
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
        "table-of-contents.md".to_string(),
        "table-".to_string(),
        "fence.old".to_string(),
    ];
    let boot_id = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap();
    for kind in ["control-", "data-", "table-"] {
        for end in ["", ".new", ".new-0123456789abcdef", ".damaged-5", ".bak"] {
            theirs.push(format!("{kind}{OTHER}{end}"));
        }
        theirs.push(format!("{kind}{}.new-0123456789abcdef", boot_id.trim()));
    }
    let text = "another program's data, which nobody may lose\n".repeat(100);
    for name in &theirs {
        fs::write(directory.path().join(name), &text).unwrap();
    }
    for _ in 0..2 {
        // The process that creates the table looks at the other files.
        fs::remove_file(directory.path().join(format!("table-{}", boot_id.trim()))).unwrap();
        let store = directory.store().unwrap();
        grant(&store, &fresh_key());
    }
    for name in &theirs {
        let kept = fs::read_to_string(directory.path().join(name)).unwrap_or_else(|error| panic!("{name}: {error}"));
        assert_eq!(kept, text, "{name}");
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
        assert!(error.message().contains("name a separate directory for the locks"), "{error}");
        assert_eq!(fs::read_to_string(&path).unwrap(), TEXT);
    }
    for text in [TEXT.to_string(), TEXT.repeat(20_000)] {
        let directory = Directory::quick();
        drop(directory.store().unwrap());
        fs::write(directory.file("table-"), &text).unwrap();
        drop(directory.store().unwrap());
        assert_eq!(directory.set_aside(), 1);
        let aside = directory.files().into_iter().find(|file| file.to_string_lossy().contains(".damaged-"));
        assert_eq!(fs::read_to_string(aside.unwrap()).unwrap(), text);
    }
}

/// Mounts another boot id before its first use, and opens a store.
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

/// The actor that sees another boot id, and the result that it reports.
fn under_another_boot(directory: &Directory, boot_id_file: &Path) -> Result<(Actor, String), String> {
    if !is_root() {
        return Err("only root can make a mount namespace".to_string());
    }
    fs::write(boot_id_file, format!("{OTHER}\n")).unwrap();
    let arguments = [&*directory.url(), &*boot_id_file.to_string_lossy()];
    let mut actor = Actor::start_within("unshare", &["--mount"], "other boot", &arguments);
    let said = actor.line().ok_or("no mount namespace is available here")?;
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
    let inode = || fs::metadata(directory.file("table-")).unwrap().ino();
    let before = inode();

    let (_, said) = match under_another_boot(&directory, &boot_id_file) {
        Ok(said) => said,
        Err(reason) => return skipped("embedded-boot-id", &reason),
    };
    assert!(said.starts_with("InvalidArgument") && said.contains("boot id"), "in use: {said}");
    assert_eq!(renew(&store, &held, &mut holder).unwrap(), crate::asks::Renewed::Renewed { applied: true });
    drop(store);
    // No process has it open, but the leases have not expired.
    let (_, said) = under_another_boot(&directory, &boot_id_file).unwrap();
    assert!(said.starts_with("InvalidArgument") && said.contains("boot id"), "not in use: {said}");
    assert_eq!(inode(), before);
    let store = directory.store().unwrap();
    let acquired = answer(store.acquire(&held, RawClient::new().attempt(LONG))).unwrap();
    assert!(matches!(acquired, Acquired::Held { .. }), "{acquired:?}");

    // The reverse: a table of the other boot id, opened with the real one.
    let theirs = Directory::new();
    let (mut actor, said) = under_another_boot(&theirs, &boot_id_file).unwrap();
    assert_eq!(said, "opened");
    let error = refused(theirs.store());
    assert!(error.message().contains("boot id"), "{error}");
    assert!(theirs.file("table-").to_string_lossy().ends_with(OTHER), "nothing was made or removed");
    actor.cue();
    actor.ends();
    assert!(refused(theirs.store()).message().contains("boot id"));
}
