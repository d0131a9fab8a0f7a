//! Watching a record by the server's tracking of keys (R10).
//!
//! A server that tracks a connection's keys sends one message when a key is next changed, by anybody. It begins to
//! track a key when that is read behind `CLIENT CACHING YES`; the reading is a look, too. Both are sent when somebody
//! waits, on the store's connection, and so behind the attempt that failed: what came between is in the look.

use std::collections::HashMap;
use std::sync::{Arc, Weak};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use super::commands::Command;
use super::connection::{Answered, Request, Tell};
use super::resp::Value;
use super::servers::Link;
use crate::clock::Boottime;
use crate::store::{Notice, StoreError, StoreErrorKind, Watch};
use crate::sys::mutex::Mutex;

/// All watches of a store, by the server's name of their keys.
#[derive(Default)]
pub struct Watches(Mutex<HashMap<Vec<u8>, Vec<Arc<Watched>>>>);

impl Watches {
    /// A key was changed.
    pub fn changed(&self, key: &[u8]) {
        let watched = self.0.lock().get(key).cloned();
        watched.into_iter().flatten().for_each(|watched| watched.change());
    }

    /// The server tracks nothing any more, and anything may have been changed.
    pub fn all_changed(&self) {
        let all: Vec<Arc<Watched>> = self.0.lock().values().flatten().cloned().collect();
        all.iter().for_each(|watched| watched.change());
    }
}

/// One watch, as the connection knows it.
#[derive(Default)]
pub struct Watched(Mutex<WatchState>);

#[derive(Default)]
struct WatchState {
    news: Option<News>,
    waiter: Option<Waker>,
    /// Whether the server was asked to track the key, and has not told of a change yet.
    armed: bool,
}

enum News {
    Look,
    /// Somebody has it, until this moment of ours.
    Held {
        until: Boottime,
    },
}

impl Watched {
    fn change(&self) {
        self.tell(Some(News::Look), false);
    }

    fn tell(&self, news: Option<News>, armed: bool) {
        let waiter = {
            let mut state = self.0.lock();
            state.armed = armed;
            let Some(news) = news else { return };
            state.news = Some(news);
            state.waiter.take()
        };
        if let Some(waiter) = waiter {
            waiter.wake();
        }
    }

    /// The answer to what arms a watch: whether it did, and for how long the key is there.
    pub fn armed(&self, answer: Result<Answered, StoreError>) {
        match answer {
            Ok(Answered { replies, received, .. }) => match replies.get(1) {
                // Without tracking nothing is told; looking now and then is left.
                _ if matches!(replies.first(), Some(Value::Error(_))) => self.tell(None, true),
                Some(Value::Integer(-2)) => self.tell(Some(News::Look), true),
                Some(Value::Integer(-1)) => self.tell(Some(News::Held { until: Boottime::NEVER }), true),
                Some(Value::Integer(ttl)) => {
                    let left = Duration::from_millis(u64::try_from(*ttl).unwrap_or(0).saturating_add(1));
                    self.tell(Some(News::Held { until: received + left }), true);
                }
                _ => self.tell(Some(News::Look), false),
            },
            // Waiters try again after a pause, and arm the watch anew.
            Err(error) if error.kind == StoreErrorKind::Unreachable => self.tell(None, false),
            Err(_) => self.tell(Some(News::Look), false),
        }
    }
}

/// The library's end of a watch.
pub struct TrackedWatch {
    link: Weak<Link>,
    watches: Arc<Watches>,
    watched: Arc<Watched>,
    key: String,
}

impl TrackedWatch {
    /// `key`: as the server names it.
    pub fn new(link: &Arc<Link>, key: String) -> TrackedWatch {
        let watches = Arc::clone(&link.engine.watches);
        let watched = Arc::new(Watched::default());
        watches.0.lock().entry(key.clone().into_bytes()).or_default().push(Arc::clone(&watched));
        TrackedWatch { link: Arc::downgrade(link), watches, watched, key }
    }

    fn arm(&self) {
        let Some(link) = self.link.upgrade() else { return };
        let commands = Arc::new([
            Command::plain(&[b"CLIENT", b"CACHING", b"YES"]),
            Command::plain(&[b"PTTL", self.key.as_bytes()]),
        ]);
        let give_up_at = Boottime::now() + link.engine.config.op_timeout;
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
        Poll::Pending
    }
}

impl Drop for TrackedWatch {
    fn drop(&mut self) {
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
