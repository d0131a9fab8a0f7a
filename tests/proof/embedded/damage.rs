//! Damaged files: set aside when nobody uses them, an error otherwise, and never a grant or a signal.

use std::fs;
use std::os::unix::fs::{FileExt, PermissionsExt, symlink};
use std::path::Path;

use nblock::store::{Filter, StoreErrorKind};

use super::{grant, refused, renew};
use crate::asks::{Acquired, Asks, Claim, Released, Renewed};
use crate::child::{Actor, say};
use crate::scene::{Asker, Directory, LONG, answer, fresh_key, key};

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

pub(super) fn damage(path: &Path, at: u64, flip: u8) {
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
                let _ = answer(store.list_all(Filter::All));
                let _ = answer(store.acquire(&fresh_key(), Asker::new().attempt(LONG)));
            }
        }
    }
    say("whole");
}

/// The control file behind its header, damaged while nobody uses it: mutex, words, fences, the first bucket.
/// What was held is held, and the store works.
pub fn damaged_words(from: &str, to: &str) {
    let (from, to): (u64, u64) = (from.parse().unwrap(), to.parse().unwrap());
    for at in from..to {
        // 0x50 makes of the mutex's kind one at whose locking glibc's assertion fails (tpp.c).
        for flip in [0xff, 0x50, 1 << (at % 8)] {
            say(format_args!("byte {at} ^ {flip:#x}"));
            let directory = Directory::quick();
            let key = key("k");
            let mut holder = grant(&directory.store().unwrap(), &key);
            damage(&directory.file("control-"), at, flip);
            let store = directory.store().unwrap();
            assert_eq!(renew(&store, &key, &mut holder).unwrap(), Renewed::Renewed { applied: true });
            let other = grant(&store, &fresh_key());
            assert_eq!(answer(store.release(&key, Claim::Token(other.token(1)))).unwrap(), Released::NotOurs);
        }
    }
    say("whole");
}

#[test]
fn a_control_file_damaged_behind_its_header_is_mended() {
    const BUCKETS: u64 = 576;
    let mut actor = Actor::start("words", &[&HEADER.to_string(), &(BUCKETS + 64).to_string()]);
    let mut last = String::new();
    while last != "whole" {
        last = actor.line().unwrap_or_else(|| panic!("it died of {last}"));
    }
}

/// As it may be in a copy that was made of a store at work.
#[test]
fn a_copied_directory_with_a_locked_mutex_can_be_opened() {
    const MUTEX: u64 = 384;
    let (directory, copy) = (Directory::quick(), Directory::quick());
    let store = directory.store().unwrap();
    grant(&store, &key("k"));
    drop(copy.store().unwrap());
    for file in directory.files() {
        fs::copy(&file, copy.path().join(file.file_name().unwrap())).unwrap();
    }
    damage(&copy.file("control-"), MUTEX, 0xff);
    let opened = copy.store().unwrap();
    assert!(answer(opened.list_all(Filter::All)).unwrap().is_empty(), "the data is of another control file");
    assert_eq!(answer(store.list_all(Filter::All)).unwrap().len(), 1);
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
            assert_eq!(answer(store.list_all(Filter::All)).unwrap_err().kind, StoreErrorKind::Rejected);
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
