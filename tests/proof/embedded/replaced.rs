//! Files and directories that are taken away, or stand elsewhere than they did.

use std::fs;

use nblock::error::ErrorKind;
use nblock::runtime::wait;
use nblock::store::{Claim, Filter, Released, Renewed};

use super::{grant, renew};
use crate::child::Actor;
use crate::scene::{Directory, answer, eventually, fresh_key, lock};

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
