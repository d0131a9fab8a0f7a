//! Fences grow, no matter which of the files are left (R18).

use std::fs;
use std::path::Path;

use nblock::clock;

use super::{LOOK, started_before};
use crate::child::{Actor, say, wait_for_cue};
use crate::support::{Directory, answer, key, open};

/// Far above the wall clock's milliseconds, as if there had been more than a thousand grants every second.
fn far() -> u64 {
    clock::wall_millis() + (1 << 40)
}

fn write_ceiling(path: &Path, ceiling: u64) {
    let said = format!("nblock fence ceiling {ceiling}");
    fs::write(path, format!("{said} {:08x}\n", crc32fast::hash(said.as_bytes()))).unwrap();
}

fn fence(url: &str) -> u64 {
    answer(open(url).unwrap().fence(&key("k"))).unwrap()
}

/// Makes the fences of a store far higher than the clock. Returns the last one that was given out.
fn outrun(directory: &Directory) -> u64 {
    drop(directory.store().unwrap());
    let far = far();
    write_ceiling(&directory.file("fence"), far);
    fs::remove_file(directory.file("table-")).unwrap();
    let last = fence(&directory.url());
    assert!(last >= far);
    last
}

const FILES: [&str; 3] = ["fence", "open.lock", "table-"];

/// Every choice of files to be deleted that leaves at least one.
fn choices() -> impl Iterator<Item = Vec<&'static str>> {
    (1..7u32).map(|chosen| (0..3).filter(|at| chosen & 1 << at != 0).map(|at| FILES[at]).collect())
}

fn delete(directory: &Directory, names: &[&str]) {
    for name in names {
        fs::remove_file(directory.file(name)).unwrap();
    }
}

#[test]
fn fences_outlive_any_two_of_the_files() {
    for gone in choices() {
        let directory = Directory::quick();
        let last = outrun(&directory);
        delete(&directory, &gone);
        let next = fence(&directory.url());
        assert!(next > last, "{next} after {last}, without {gone:?}");
    }
}

/// Gives out a fence at every cue.
pub fn fencer(url: &str, _: &str) {
    loop {
        say(fence(url));
        wait_for_cue();
    }
}

#[test]
fn fences_outlive_files_that_are_deleted_in_use() {
    for gone in choices() {
        let directory = Directory::quick();
        outrun(&directory);
        let store = directory.store().unwrap();
        let mut last = answer(store.fence(&key("k"))).unwrap();
        delete(&directory, &gone);
        let mut comer = Actor::start("fencer", &[&directory.url(), ""]);
        let mut grows = |next: u64| {
            assert!(next > last, "{next} after {last}, without {gone:?}");
            last = next;
        };
        grows(comer.says().parse().unwrap());
        std::thread::sleep(LOOK);
        grows(answer(store.fence(&key("k"))).unwrap());
        comer.cue();
        grows(comer.says().parse().unwrap());
    }
}

/// A process that had the files open remembers the ceiling, and the new files continue above it.
#[test]
fn fences_outlive_all_files_in_who_had_them_open() {
    let directory = Directory::quick();
    outrun(&directory);
    let store = directory.store().unwrap();
    let last = answer(store.fence(&key("k"))).unwrap();
    delete(&directory, &FILES);
    std::thread::sleep(LOOK);
    let next = answer(store.fence(&key("k"))).unwrap();
    assert!(next > last, "{next} after {last}");
    let mut comer = Actor::start("fencer", &[&directory.url(), ""]);
    assert!(comer.says().parse::<u64>().unwrap() > next);
}

#[test]
fn fences_outlive_a_reboot_without_the_fence_file() {
    let directory = Directory::quick();
    let last = outrun(&directory);
    // The name of the table contains the boot id: renamed, it is the table of another boot.
    let table = directory.file("table-");
    started_before(&table);
    fs::rename(&table, table.with_file_name("table-00000000-0000-4000-8000-000000000000")).unwrap();
    delete(&directory, &["fence", "open.lock"]);
    let next = fence(&directory.url());
    assert!(next > last, "{next} after {last}");
}

#[test]
fn an_old_copy_of_the_fence_file_lowers_nothing() {
    for gone in [None, Some("open.lock"), Some("table-")] {
        let directory = Directory::quick();
        let last = outrun(&directory);
        // As if it had been restored from a backup.
        write_ceiling(&directory.file("fence"), 1 << 30);
        delete(&directory, gone.as_slice());
        let next = fence(&directory.url());
        assert!(next > last, "{next} after {last}, without {gone:?}");
    }
}
