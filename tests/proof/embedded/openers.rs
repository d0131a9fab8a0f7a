//! Processes that open one store at the same time, set it aside, create it, and are killed while they do.

use std::fs;
use std::path::Path;

use nblock::error::ErrorKind;
use nblock::store::Filter;

use super::damage::damage;
use super::grant;
use crate::asks::Asks;
use crate::child::{Actor, say};
use crate::support::{Directory, Random, answer, fresh_key, key, open};

/// If several processes find the damage at once, one of them sets the file aside, and all use the same new store.
#[test]
fn openers_of_a_damaged_store_agree() {
    const OPENERS: usize = 4;
    for _ in 0..10 {
        let directory = Directory::quick();
        grant(&directory.store().unwrap(), &fresh_key());
        damage(&directory.file("table-"), 20, 1);
        let url = directory.url();
        let mut actors: Vec<_> = (0..OPENERS).map(|_| Actor::start("opener", &[&url, "0", "0"])).collect();
        for actor in &mut actors {
            assert_eq!(actor.says(), "opened");
        }
        assert_eq!(directory.set_aside(), 1);
        assert_eq!(answer(directory.store().unwrap().list_all(Filter::All)).unwrap().len(), OPENERS);
    }
}

/// Opens a store, and removes or damages one of its files, again and again, until it is killed.
pub fn vandal(url: &str, seed: &str) {
    let mut random = Random::new(seed.parse().unwrap());
    let directory = Path::new(url.strip_prefix("embedded:").unwrap());
    loop {
        match open(url) {
            Ok(store) => {
                // The other process may have removed the files already.
                let _ = answer(store.fence(&fresh_key()));
            }
            // The other process has the damaged file open at this moment, or removes what was just created.
            Err(error) => {
                assert!(matches!(error.kind(), ErrorKind::Store | ErrorKind::Unreachable), "{error}");
            }
        }
        let files: Vec<_> = fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path()).collect();
        let victim = &files[random.below(files.len())];
        let name = victim.file_name().unwrap().to_string_lossy().into_owned();
        // Without `open.lock`, two processes could create files at once; and a damaged `fence` can only be repaired by
        // a person.
        if name != "open.lock" && name != "fence" {
            match random.below(3) {
                0 => drop(fs::remove_file(victim)),
                1 if !name.contains(".new-") => {
                    let file = fs::OpenOptions::new().write(true).open(victim);
                    let _ = file.and_then(|file| std::os::unix::fs::FileExt::write_all_at(&file, b"?", 16));
                }
                _ => {}
            }
        }
        say("again");
    }
}

#[test]
fn openers_killed_at_any_moment_leave_a_store() {
    const KILLS: u64 = 40;
    let directory = Directory::quick();
    let url = directory.url();
    let mut fence = answer(directory.store().unwrap().fence(&key("k"))).unwrap();
    let mut random = Random::new(5);
    let start = |seed: u64| Actor::start("vandal", &[&url, &seed.to_string()]);
    let mut vandals = [start(1), start(2)];
    for kill in 0..KILLS {
        let victim = random.below(vandals.len());
        for _ in 0..random.below(20) {
            assert_eq!(vandals[victim].says(), "again");
        }
        vandals[victim].kill();
        vandals[victim] = start(100 + kill);
    }
    drop(vandals);
    let store = directory.store().unwrap();
    grant(&store, &fresh_key());
    let last = fence;
    fence = answer(store.fence(&key("k"))).unwrap();
    assert!(fence > last, "{fence} after {last}");
    drop(store);
    // Half-made files are removed by the next process that creates a table.
    fs::remove_file(directory.file("table-")).unwrap();
    drop(directory.store().unwrap());
    assert!(directory.files().iter().all(|file| !file.to_string_lossy().contains(".new")));
}
