//! Watching a record by the server's tracking of keys (R10).
//!
//! A server that tracks a connection's keys sends one message when a key is next changed, by anybody. It begins to
//! track a key when that is read behind `CLIENT CACHING YES`; the reading is a look, too. Both are sent when somebody
//! waits, on the store's connection, and so behind the attempt that failed: what came between is in the look.

use std::sync::{Arc, Weak};
use std::task::{Context, Poll};

use super::commands::Command;
use super::connection::{Request, Tell};
use super::servers::Link;
use super::watches::{News, Watched, Watches};
use crate::clock::Boottime;
use crate::store::{Notice, Watch};
use crate::stores::network::link::give_up_unsent_at;
use crate::sys::process;

/// The library's end of a watch.
pub struct TrackedWatch {
    link: Weak<Link>,
    watches: Arc<Watches>,
    watched: Arc<Watched>,
    key: String,
    /// The process that it was made in.
    generation: u64,
}

impl TrackedWatch {
    /// `key`: as the server names it.
    pub fn new(link: &Arc<Link>, key: String) -> TrackedWatch {
        let watches = Arc::clone(&link.engine.watches);
        let watched = Arc::new(Watched::default());
        watches.0.lock().entry(key.clone().into_bytes()).or_default().push(Arc::clone(&watched));
        TrackedWatch { link: Arc::downgrade(link), watches, watched, key, generation: process::generation() }
    }

    fn arm(&self) {
        let Some(link) = self.link.upgrade() else { return };
        let commands = Arc::new([
            Command::plain(&[b"CLIENT", b"CACHING", b"YES"]),
            Command::plain(&[b"PTTL", self.key.as_bytes()]),
        ]);
        let give_up_at = give_up_unsent_at(link.engine.config.op_timeout);
        let tell = Tell::Watched(Arc::clone(&self.watched));
        link.send(Request { commands, whole_scripts: false, give_up_at, tell });
    }
}

impl Watch for TrackedWatch {
    fn poll_change(&mut self, context: &mut Context<'_>) -> Poll<Notice> {
        let arm = {
            let mut state = self.watched.0.lock();
            match state.news.take() {
                Some(News::Look) => return Poll::Ready(Notice::Look),
                Some(News::Held { until }) => {
                    return Poll::Ready(Notice::Held { expires_in: until.since(Boottime::now()) });
                }
                None => {}
            }
            state.waiter = Some(context.waker().clone());
            !std::mem::replace(&mut state.armed, true)
        };
        if arm {
            self.arm();
        }
        if let Some(link) = self.link.upgrade() {
            link.drive();
        }
        Poll::Pending
    }
}

impl Drop for TrackedWatch {
    fn drop(&mut self) {
        // In a forked child it is the parent's, whose mutex may have been held at the fork.
        if self.generation != process::generation() {
            return;
        }
        let mut watches = self.watches.0.lock();
        if let Some(same) = watches.get_mut(self.key.as_bytes()) {
            same.retain(|watched| !Arc::ptr_eq(watched, &self.watched));
            if same.is_empty() {
                watches.remove(self.key.as_bytes());
            }
        }
    }
}

/// A watch where the server is not to tell of changes: looking now and then is left.
pub struct Silent;

impl Watch for Silent {
    fn poll_change(&mut self, _context: &mut Context<'_>) -> Poll<Notice> {
        Poll::Pending
    }
}
