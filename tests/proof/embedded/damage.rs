//! Damaged files are set aside if no process uses them, and are an error otherwise. They never lead to a second grant
//! or a signal.

use std::fs;
use std::mem::offset_of;
use std::os::unix::fs::{FileExt, PermissionsExt, symlink};
use std::path::Path;

use nblock::key::Key;
use nblock::store::{Filter, StoreErrorKind};
use nblock::stores::embedded::fuzzing::layout::{self, Line, Top};

use super::{grant, refused, renew};
use crate::asks::{Acquired, Asks, Broken, Claim, Released, Renewed};
use crate::child::{Actor, say};
use crate::support::{Directory, LONG, RawClient, answer, fresh_key, key};

/// The size of the table's description, including its checksum.
const DESCRIPTION: u64 = size_of::<[u64; layout::DESCRIPTION]>() as u64;

#[test]
fn a_header_damaged_in_any_byte_has_the_file_set_aside() {
    let directory = Directory::quick();
    let key = key("lost");
    let mut fence = 0;
    for at in 0..DESCRIPTION {
        let mut holder = grant(&directory.store().unwrap(), &key);
        damage(&directory.file("table-"), at, 1 << (at % 8));
        let store = directory.store().unwrap_or_else(|error| panic!("byte {at}: {error}"));
        assert_eq!(directory.set_aside(), 1, "byte {at} of the header was not noticed");
        directory.forget_set_aside();
        assert_eq!(renew(&store, &key, &mut holder).unwrap(), Renewed::Lost, "byte {at}: the loss is reported");
        let next = answer(store.fence(&key)).unwrap();
        assert!(next > fence, "byte {at}: {next} after {fence}");
        fence = next;
    }
}

pub(super) fn damage(path: &Path, at: u64, flip: u8) {
    let file = fs::OpenOptions::new().read(true).write(true).open(path).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ flip], at).unwrap();
}

#[test]
fn damage_to_a_file_in_use_is_an_error_for_who_comes_and_harms_nobody_inside() {
    a_file_in_use_is_refused(30, "damaged");
}

/// As if an older or newer version had made the file.
#[test]
fn a_file_of_another_format_in_use_is_refused() {
    a_file_in_use_is_refused(8, &format!("made by another version of nblock (format {} ", layout::FORMAT ^ 1));
}

/// Changes a byte in the header of a file in use: new openers are refused, and holders keep working.
fn a_file_in_use_is_refused(at: u64, why: &str) {
    let directory = Directory::new();
    let store = directory.store().unwrap();
    let key = fresh_key();
    let mut holder = grant(&store, &key);
    damage(&directory.file("table-"), at, 1);
    let mut comer = Actor::start("opener", &[&directory.url(), "0", "0"]);
    let said = comer.says();
    assert!(said.starts_with("Store") && said.contains(why) && said.contains("end them"), "{said}");
    assert_eq!(renew(&store, &key, &mut holder).unwrap(), Renewed::Renewed { applied: true });
    assert_eq!(directory.set_aside(), 0);
    drop(store);
    // No process uses it now: it is set aside, and the store gets an empty one.
    let store = directory.store().unwrap();
    assert_eq!(directory.set_aside(), 1);
    assert_eq!(renew(&store, &key, &mut holder).unwrap(), Renewed::Lost, "the loss is reported");
    grant(&store, &key);
}

#[test]
fn a_file_cut_short_or_emptied_is_set_aside() {
    for length in [0, 1, 4096, 5000, layout::CHUNKS_AT - 1, layout::CHUNKS_AT, layout::CHUNKS_AT + 100] {
        let directory = Directory::quick();
        let key = fresh_key();
        let mut holder = grant(&directory.store().unwrap(), &key);
        fs::OpenOptions::new().write(true).open(directory.file("table-")).unwrap().set_len(length).unwrap();
        let store = directory.store().unwrap_or_else(|error| panic!("{length}: {error}"));
        assert_eq!(directory.set_aside(), 1, "{length} bytes");
        assert_eq!(renew(&store, &key, &mut holder).unwrap(), Renewed::Lost);
        grant(&store, &key);
    }
}

/// The bytes of a table that matter to a key, except the description: the part that all shards share, the key's shard,
/// its slot, and its record.
fn places_of(key: &Key, bytes: &[u8]) -> impl Iterator<Item = u64> + use<> {
    let (shard, slot) = layout::slot_of(&key.hash().0);
    let shard_at = offset_of!(Top, shards) + shard * size_of::<Line<layout::Shard>>();
    let slot_at = offset_of!(Top, slots) + (shard * layout::SLOTS + slot) * size_of::<layout::Slot>();
    let cell = cell_of(key, bytes);
    (DESCRIPTION as usize..offset_of!(Top, shards))
        .chain(shard_at..shard_at + size_of::<layout::Shard>())
        .chain(slot_at..slot_at + size_of::<layout::Slot>())
        .chain(cell..cell + size_of::<layout::Cell>())
        .map(|at| at as u64)
}

/// Where a key's body begins in the first cell of its record.
const BODY: usize = offset_of!(layout::Cell, words) + layout::HEAD_WORDS * 8;

/// Where the cell of a key's record begins.
fn cell_of(key: &Key, bytes: &[u8]) -> usize {
    let text = key.as_str().as_bytes();
    let mut cells = (layout::CHUNKS_AT as usize..bytes.len()).step_by(size_of::<layout::Cell>());
    cells.find(|cell| bytes[cell + BODY..].starts_with(text)).expect("it is in one cell")
}

/// Damages an unused table, in one byte after another of those that matter to a key (from number `from` up to `to`).
/// Then a request for the key finds it held, or fails because of the damage. It is granted only if the file was set
/// aside, and then the loss is reported.
pub fn damaged_words(from: &str, to: &str) {
    let (from, to): (usize, usize) = (from.parse().unwrap(), to.parse().unwrap());
    let key = key("the-damaged-record");
    let mut at = from;
    loop {
        let directory = Directory::quick();
        let mut holder = grant(&directory.store().unwrap(), &key);
        let path = directory.file("table-");
        let Some(place) = places_of(&key, &fs::read(&path).unwrap()).nth(at).filter(|_| at < to) else { break };
        for flip in [0xff, 1 << (at % 8)] {
            say(format_args!("byte {place} ^ {flip:#x}"));
            damage(&path, place, flip);
            let store = directory.store().unwrap();
            let lost = directory.set_aside() > 0;
            match answer(store.acquire(&key, RawClient::new().attempt(LONG))) {
                Ok(acquired) => assert_eq!(matches!(acquired, Acquired::Granted { .. }), lost, "{acquired:?}"),
                Err(error) => assert_eq!(error.kind, StoreErrorKind::Rejected, "{error}"),
            }
            match renew(&store, &key, &mut holder) {
                Ok(renewed) => assert_eq!(renewed == Renewed::Lost, lost, "{renewed:?}"),
                Err(error) => assert_eq!(error.kind, StoreErrorKind::Rejected, "{error}"),
            }
            let _ = answer(store.list_all(Filter::All));
            let _ = answer(store.acquire(&fresh_key(), RawClient::new().attempt(LONG)));
            drop(store);
            if lost {
                break;
            }
            damage(&path, place, flip);
        }
        at += 1;
    }
    say("whole");
}

#[test]
fn a_table_damaged_while_nobody_uses_it_grants_nothing_twice() {
    const PLACES: usize = 768;
    let mut actors = [0, PLACES / 2].map(|from| {
        let to = from + PLACES / 2;
        Actor::start("words", &[&from.to_string(), &to.to_string()])
    });
    for actor in &mut actors {
        let mut last = String::new();
        while last != "whole" {
            last = actor.line().unwrap_or_else(|| panic!("it died of {last}"));
        }
    }
}

/// A copy of a store that was made while it was in use may have a locked mutex.
#[test]
fn a_copied_directory_with_a_locked_mutex_can_be_opened() {
    let (directory, copy) = (Directory::quick(), Directory::quick());
    let store = directory.store().unwrap();
    let key = key("k");
    grant(&store, &key);
    drop(copy.store().unwrap());
    for file in directory.files() {
        fs::copy(&file, copy.path().join(file.file_name().unwrap())).unwrap();
    }
    let (shard, _) = layout::slot_of(&key.hash().0);
    let mutex = offset_of!(Top, shards) + shard * size_of::<Line<layout::Shard>>();
    damage(&copy.file("table-"), mutex as u64, 0xff);
    let opened = copy.store().unwrap();
    let acquired = answer(opened.acquire(&key, RawClient::new().attempt(LONG))).unwrap();
    assert!(matches!(acquired, Acquired::Held { .. }), "{acquired:?}");
    assert_eq!(answer(store.list_all(Filter::All)).unwrap().len(), 1);
}

/// For each byte of a record: if it is damaged, every request fails, and the lock is not granted.
#[test]
fn a_record_damaged_in_any_byte_is_an_error_and_never_a_grant() {
    let directory = Directory::quick();
    let store = directory.store().unwrap();
    let key = key("the-damaged-record");
    let holder = grant(&store, &key);
    let _other = grant(&store, &fresh_key());
    let path = directory.file("table-");
    let bytes = fs::read(&path).unwrap();
    let cell = cell_of(&key, &bytes);
    let text = BODY..BODY + key.as_str().len();
    // After the link to the next record of the slot: the kind, the description, the key, and the payload.
    let payload_at = BODY + key.as_str().len().next_multiple_of(8);
    let end = payload_at + 72 + "proof".len() + "here".len() + "now".len();
    let file = fs::OpenOptions::new().read(true).write(true).open(&path).unwrap();
    for at in offset_of!(layout::Cell, kind)..end {
        for flip in [0xff, 1u8 << (at % 8)] {
            let flipped = |flip: u8| file.write_all_at(&[bytes[cell + at] ^ flip], (cell + at) as u64).unwrap();
            flipped(flip);
            let acquired = answer(store.acquire(&key, RawClient::new().attempt(LONG)));
            let error = acquired.expect_err("a damaged record was no error");
            assert_eq!(error.kind, StoreErrorKind::Rejected, "byte {at}: {error}");
            assert!(error.message.contains(key.as_str()), "{error}");
            let found = answer(store.find(&key)).unwrap().expect("it is there");
            assert!(found.damaged.is_some() && found.key == key, "byte {at}: {found:?}");
            if flip != 0xff {
                // Listing is slow, because it reads all slots: only for one of the two changes.
                flipped(0);
                continue;
            }
            let listed = answer(store.list_all(Filter::All)).unwrap();
            let shown: Vec<_> = listed.iter().filter(|record| record.damaged.is_some()).collect();
            assert_eq!((listed.len(), shown.len()), (2, 1), "byte {at}: {listed:?}");
            // The description contains the key's hash. If it is damaged, nothing is known of the key; if only the key's
            // bytes are damaged, the hash is known.
            assert_eq!(shown[0].key.hash() == key.hash(), at >= BODY, "byte {at}: {listed:?}");
            assert_eq!(shown[0].key.is_placeholder(), at < text.end, "byte {at}: {listed:?}");
            assert_eq!(answer(store.list_all(Filter::Expired)).unwrap().len(), 0);
            let released = answer(store.release(&key, Claim::Token(holder.token(1))));
            assert_eq!(released.unwrap_err().kind, StoreErrorKind::Rejected);
            flipped(0);
        }
    }
    // Other keys were not affected, and the record is undamaged again.
    grant(&store, &fresh_key());
    assert_eq!(answer(store.release(&key, Claim::Token(holder.token(1)))).unwrap(), Released::Released);
}

/// Only the damaged record that was seen can be broken, and not the record before the damage or after a change.
#[test]
fn a_damaged_record_can_be_broken_as_it_was_seen() {
    let directory = Directory::quick();
    let store = directory.store().unwrap();
    let key = key("the-damaged-record");
    let holder = grant(&store, &key);
    let other = fresh_key();
    grant(&store, &other);
    let whole = answer(store.find(&key)).unwrap().unwrap();
    let path = directory.file("table-");
    let text = key.as_str().as_bytes();
    let place = cell_of(&key, &fs::read(&path).unwrap()) + BODY;
    let file = fs::OpenOptions::new().read(true).write(true).open(&path).unwrap();
    let put = |text: &[u8]| file.write_all_at(text, place as u64).unwrap();

    put(b"The-damaged-record");
    let seen = answer(store.list_all(Filter::All)).unwrap();
    let seen = seen.iter().find(|record| record.damaged.is_some()).unwrap();
    assert_eq!(seen.key.hash(), key.hash());
    assert_eq!(answer(store.break_seen(&whole)).unwrap(), Broken::Changed, "it was seen whole, and is not");
    put(b"the-Damaged-record");
    assert_eq!(answer(store.break_seen(seen)).unwrap(), Broken::Changed, "it is damaged otherwise than it was seen");
    put(text);
    assert_eq!(answer(store.break_seen(seen)).unwrap(), Broken::Changed, "it is whole");
    put(b"The-damaged-record");
    assert_eq!(answer(store.break_seen(seen)).unwrap(), Broken::Broken);
    assert!(answer(store.find(&key)).unwrap().is_none());
    assert_eq!(answer(store.break_seen(seen)).unwrap(), Broken::Changed, "it is gone");
    assert_eq!(answer(store.release(&key, Claim::Token(holder.token(1)))).unwrap(), Released::NotOurs);
    grant(&store, &key);
    assert!(answer(store.list_all(Filter::All)).unwrap().iter().all(|record| record.damaged.is_none()));
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
        // The table has reserved fences left, so that the file would not be read: remove it.
        let _ = fs::remove_file(directory.file("table-"));
        let error = refused(directory.store());
        assert!(error.message().contains("damaged") && error.message().contains("write"), "byte {at}: {error}");
    }
    // A symbolic link in its place is refused too.
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
