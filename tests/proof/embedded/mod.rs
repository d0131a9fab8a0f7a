//! The embedded store, when its directory, files, mutex, disk or processes fail.

mod boots;
mod damage;
mod directory;
mod fences;
mod mutex;
mod openers;
mod read_only;
mod replaced;
mod space;

pub use boots::other_boot;
pub use damage::damaged_words;
pub use fences::fencer;
pub use mutex::{careless, storm, writer};
pub use openers::vandal;
pub use read_only::{capped, guest, read_only};
pub use replaced::moved;
pub use space::{filler, grower};

use std::fs;
use std::mem::offset_of;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use nblock::error::Error;
use nblock::key::Key;
use nblock::protocol::Proof;
use nblock::store::{Store, StoreError};
use nblock::stores::embedded::fuzzing::checked::Sum;
use nblock::stores::embedded::fuzzing::layout::{self, Line, Top};

use crate::asks::{Acquired, Asks, Renewal, Renewed};
use crate::child::{say, wait_for_cue};
use crate::support::{Directory, LONG, RawClient, answer, fresh_key, open};

/// A process checks its files once per kernel tick, 1 to 10 ms: after this time, the next operation checks them.
const LOOK: Duration = Duration::from_millis(20);

/// Changes a word of a table's description, and corrects its checksum.
fn change_description(path: &Path, at: usize, change: impl FnOnce(u64) -> u64) {
    let file = fs::File::options().read(true).write(true).open(path).unwrap();
    let mut bytes = [0; size_of::<[u64; layout::DESCRIPTION]>()];
    file.read_exact_at(&mut bytes, 0).unwrap();
    let mut words = [0; layout::DESCRIPTION];
    words.iter_mut().zip(bytes.as_chunks::<8>().0).for_each(|(word, bytes)| *word = u64::from_ne_bytes(*bytes));
    words[at] = change(words[at]);
    let [words @ .., _] = words;
    let mut sum = Sum::new(layout::FORMAT);
    sum.add_all(&words);
    file.write_all_at(&words[at].to_ne_bytes(), at as u64 * 8).unwrap();
    file.write_all_at(&sum.finish().to_ne_bytes(), words.len() as u64 * 8).unwrap();
}

/// Makes a table look as if it was made before the machine was started.
fn started_before(path: &Path) {
    const STARTED_AT: usize = 5;
    change_description(path, STARTED_AT, |seconds| seconds - 1000);
}

/// Removes all reserved fences of a table in use, so that the next grant has to reserve some.
fn spend_fences(directory: &Directory) {
    let file = fs::File::options().write(true).open(directory.file("table-")).unwrap();
    let next = |shard: usize| {
        offset_of!(Top, shards) + shard * size_of::<Line<layout::Shard>>() + offset_of!(layout::Shard, next)
    };
    for at in (0..layout::SHARDS).map(next).chain([offset_of!(Top, central) + offset_of!(layout::Central, next)]) {
        file.write_all_at(&[0; 8], at as u64).unwrap();
    }
}

/// An unprivileged user and group (Debian's nobody and nogroup).
const NOBODY: u32 = 65534;

fn grant(store: &Arc<dyn Store>, key: &Key) -> RawClient {
    let mut client = RawClient::new();
    let acquired = answer(store.acquire(key, client.attempt(LONG))).unwrap();
    assert!(matches!(acquired, Acquired::Granted { applied: true, .. }), "{acquired:?}");
    client
}

fn renew(store: &Arc<dyn Store>, key: &Key, client: &mut RawClient) -> Result<Renewed, StoreError> {
    client.n += 1;
    let renewal = Renewal { key: key.clone(), proof: Proof::Token(client.token(1)), n: client.n, expire: LONG };
    answer(store.refresh(vec![renewal]))?.remove(0)
}

fn refused(opened: Result<Arc<dyn Store>, Error>) -> Error {
    match opened {
        Ok(store) => panic!("it was opened: {}", store.location()),
        Err(error) => error,
    }
}

/// Changes the user and group of an actor, unless the user is 0.
fn become_user(user: u32, group: u32) {
    if user != 0 {
        // SAFETY: plain numbers; the process has no other use than this actor.
        let dropped = unsafe { [libc::setgroups(0, std::ptr::null()), libc::setgid(group), libc::setuid(user)] };
        assert_eq!(dropped, [0, 0, 0]);
    }
}

/// Opens the store as another user, and reports the result.
pub fn opener(url: &str, user: &str, group: &str) {
    become_user(user.parse().unwrap(), group.parse().unwrap());
    match open(url) {
        Ok(store) => {
            grant(&store, &fresh_key());
            say("opened");
            wait_for_cue();
        }
        Err(error) => say(format_args!("{:?} {error}", error.kind())),
    }
}
