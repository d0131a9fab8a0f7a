//! The embedded store where it can be hurt: its directory, its files, its mutex, its disk, its writers.

mod damage;
mod directory;
mod fences;
mod mutex;
mod openers;
mod read_only;
mod replaced;
mod space;

pub use damage::{damaged_metas, damaged_words};
pub use fences::fencer;
pub use mutex::{careless, storm, writer};
pub use openers::vandal;
pub use read_only::{capped, guest, read_only};
pub use replaced::moved;
pub use space::{filler, grower};

use std::sync::Arc;
use std::time::Duration;

use nblock::error::Error;
use nblock::key::Key;
use nblock::protocol::Proof;
use nblock::store::{Store, StoreError};

use crate::asks::{Acquired, Asks, Renewal, Renewed};
use crate::child::{say, wait_for_cue};
use crate::scene::{Asker, LONG, answer, fresh_key, open};

/// What a process does within a millisecond of its last look at the files, it may do without another.
const LOOK: Duration = Duration::from_millis(2);

/// A user that nobody is (Debian's nobody and nogroup).
const NOBODY: u32 = 65534;

fn grant(store: &Arc<dyn Store>, key: &Key) -> Asker {
    let mut asker = Asker::new();
    let acquired = answer(store.acquire(key, asker.attempt(LONG))).unwrap();
    assert!(matches!(acquired, Acquired::Granted { applied: true, .. }), "{acquired:?}");
    asker
}

fn renew(store: &Arc<dyn Store>, key: &Key, asker: &mut Asker) -> Result<Renewed, StoreError> {
    asker.n += 1;
    let renewal = Renewal { key: key.clone(), proof: Proof::Token(asker.token(1)), n: asker.n, expire: LONG };
    answer(store.refresh(vec![renewal]))?.remove(0)
}

fn refused(opened: Result<Arc<dyn Store>, Error>) -> Error {
    match opened {
        Ok(store) => panic!("it was opened: {}", store.location()),
        Err(error) => error,
    }
}

/// Makes an actor another user, unless that is 0.
fn become_user(user: u32, group: u32) {
    if user != 0 {
        // SAFETY: plain numbers; this process is the actor's own.
        let dropped = unsafe { [libc::setgroups(0, std::ptr::null()), libc::setgid(group), libc::setuid(user)] };
        assert_eq!(dropped, [0, 0, 0]);
    }
}

/// Opens the store as another user, and says how that went.
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
