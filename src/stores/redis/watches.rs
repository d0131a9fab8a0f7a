//! What is watched on a server, by the name that the server has for it, and what it has notified of.

use std::collections::HashMap;
use std::sync::Arc;
use std::task::Waker;
use std::time::Duration;

use super::resp::Value;
use crate::clock::Boottime;
use crate::store::{StoreError, StoreErrorKind};
use crate::sys::mutex::Mutex;

/// All watches of a store, by the server's name of their keys.
#[derive(Default)]
pub struct Watches(pub Mutex<HashMap<Vec<u8>, Vec<Arc<Watched>>>>);

impl Watches {
    /// A key was changed.
    pub fn changed(&self, key: &[u8]) {
        let watched = self.0.lock().get(key).cloned();
        watched.into_iter().flatten().for_each(|watched| watched.change());
    }

    /// How many of them the server is to notify. More than two are no more than two.
    pub fn awaited(&self) -> usize {
        self.0.lock().values().flatten().filter(|watched| watched.0.lock().armed).take(2).count()
    }

    /// The server tracks nothing any more, and anything may have been changed.
    pub fn all_changed(&self) {
        let all: Vec<Arc<Watched>> = self.0.lock().values().flatten().cloned().collect();
        all.iter().for_each(|watched| watched.change());
    }
}

/// One watch, as the connection knows it.
#[derive(Default)]
pub struct Watched(pub Mutex<WatchState>);

#[derive(Default)]
pub struct WatchState {
    pub news: Option<News>,
    pub waiter: Option<Waker>,
    /// Whether the server was asked to track the key, and has not notified of a change yet.
    pub armed: bool,
}

pub enum News {
    Look,
    /// Somebody has it, until this moment of ours.
    Held {
        until: Boottime,
    },
}

impl Watched {
    pub fn change(&self) {
        self.tell(Some(News::Look), false);
    }

    pub fn tell(&self, news: Option<News>, armed: bool) {
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
    pub fn armed(&self, answer: Result<(Vec<Value>, Boottime), StoreError>) {
        match answer {
            Ok((replies, received)) => match replies.get(1) {
                // Without tracking there are no notifications; looking now and then is left.
                _ if matches!(replies.first(), Some(Value::Error(_))) => self.tell(None, true),
                Some(Value::Integer(-2)) => self.tell(Some(News::Look), true),
                Some(Value::Integer(-1)) => self.tell(Some(News::Held { until: Boottime::NEVER }), true),
                Some(Value::Integer(ttl)) => {
                    let left = Duration::from_millis(u64::try_from(*ttl).unwrap_or(0).saturating_add(1));
                    self.tell(Some(News::Held { until: received + left }), true);
                }
                _ => self.tell(Some(News::Look), false),
            },
            // Waiters try again after a pause, and arm the watch again.
            Err(error) if error.kind == StoreErrorKind::Unreachable => self.tell(None, false),
            Err(_) => self.tell(Some(News::Look), false),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Between a notification and the next look nothing is to come for a watch.
    #[test]
    fn watches_are_awaited_while_they_are_armed() {
        let watches = Watches::default();
        let of = |key: &[u8]| {
            let watched = Arc::new(Watched::default());
            watches.0.lock().entry(key.to_vec()).or_default().push(Arc::clone(&watched));
            watched
        };
        let first = of(b"a");
        assert_eq!(watches.awaited(), 0);
        first.0.lock().armed = true;
        assert_eq!(watches.awaited(), 1);
        for other in [of(b"a"), of(b"b")] {
            other.0.lock().armed = true;
            assert_eq!(watches.awaited(), 2, "two stand for all");
        }
        watches.changed(b"a");
        assert_eq!(watches.awaited(), 1);
        watches.all_changed();
        assert_eq!(watches.awaited(), 0);
    }
}
