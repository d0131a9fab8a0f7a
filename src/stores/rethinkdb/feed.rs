//! Watching a record: a change feed on its one row, on the store's connection (R10).
//!
//! Its first change is the present row: what happened before it began is in it. The thread that reads a change notifies
//! the waiter, and the waiter asks for the next one.

use std::future::Future;
use std::mem;
use std::pin::Pin;
use std::sync::{Arc, Weak};
use std::task::{Context, Poll, Waker, ready};
use std::time::Duration;

use serde_json::Value;
use tokio::sync::{AcquireError, OwnedSemaphorePermit};

use super::connection::{Answered, Body, Follow, Rest, Tell};
use super::queries::Queries;
use super::reply::{self, ServerAnswer};
use super::row::Row;
use super::servers::Link;
use crate::backoff::Backoff;
use crate::clock::Boottime;
use crate::key::Key;
use crate::store::{Notice, StoreError, Watch};
use crate::sys::mutex::Mutex;
use crate::sys::process;
use crate::sys::runtime::{Sleep, sleep_until};

/// The library's end of a feed.
pub struct FeedWatch {
    link: Weak<Link>,
    body: Body,
    feed: Arc<Feed>,
    room: Room,
    backoff: Backoff,
    /// While a feed that was lost is not begun again.
    pause: Option<Sleep>,
    /// The process that it was made in.
    generation: u64,
}

/// One of the feeds that there may be.
enum Room {
    Awaited(Pin<Box<dyn Future<Output = Result<OwnedSemaphorePermit, AcquireError>> + Send>>),
    Given {
        _permit: OwnedSemaphorePermit,
    },
    /// The store was closed.
    Closed,
}

/// A feed, as the connection knows it.
#[derive(Default)]
struct Feed(Mutex<FeedState>);

#[derive(Default)]
struct FeedState {
    /// What was received last and not yet reported. A later change says more than an earlier one.
    change: Option<Heard>,
    /// The waker of the task that waits for more.
    waiter: Option<Waker>,
    phase: Phase,
}

#[derive(Default)]
enum Phase {
    /// It has not begun.
    #[default]
    Unasked,
    Asked,
    /// The next change was asked for.
    Awaited(Rest),
    /// A change came. A waiter that is notified is mostly granted next, and then nobody needs more.
    Paused(Rest),
    Lost,
    /// The watch is gone.
    Ended,
}

enum Heard {
    Look,
    /// Somebody has it, until this moment of ours.
    Held {
        until: Boottime,
    },
}

impl FeedWatch {
    pub fn new(link: &Arc<Link>, queries: &Queries, key: &Key) -> FeedWatch {
        let body = queries.changes(key).start();
        let room = match Arc::clone(&link.engine.feeds).try_acquire_owned() {
            Ok(permit) => Room::Given { _permit: permit },
            Err(_) => Room::Awaited(Box::pin(Arc::clone(&link.engine.feeds).acquire_owned())),
        };
        let watch = FeedWatch {
            link: Arc::downgrade(link),
            body: Arc::new(move |_| body.clone()),
            feed: Arc::default(),
            room,
            backoff: Backoff::default(),
            pause: None,
            generation: process::generation(),
        };
        if let Room::Given { .. } = watch.room {
            watch.begin(link);
        }
        watch
    }

    /// Begins the feed once a pause is over and there is room for it.
    fn poll_begin(&mut self, link: &Link, context: &mut Context<'_>) -> Poll<()> {
        if let Some(pause) = &mut self.pause {
            ready!(Pin::new(pause).poll(context));
            self.pause = None;
        }
        if let Room::Awaited(room) = &mut self.room {
            self.room = match ready!(room.as_mut().poll(context)) {
                Ok(permit) => Room::Given { _permit: permit },
                Err(_) => Room::Closed,
            };
        }
        self.begin(link);
        Poll::Ready(())
    }

    fn begin(&self, link: &Link) {
        self.feed.0.lock().phase = Phase::Asked;
        link.send_query(Arc::clone(&self.body), self.follower());
    }

    fn follower(&self) -> Tell {
        Tell::Follower(Arc::clone(&self.feed) as Arc<dyn Follow>)
    }
}

impl Watch for FeedWatch {
    fn poll_change(&mut self, context: &mut Context<'_>) -> Poll<Notice> {
        let phase = {
            let mut state = self.feed.0.lock();
            match state.change.take() {
                Some(Heard::Look) => return Poll::Ready(Notice::Look),
                Some(Heard::Held { until }) => {
                    return Poll::Ready(Notice::Held { expires_in: until.since(Boottime::now()) });
                }
                None => {}
            }
            state.waiter = Some(context.waker().clone());
            match &state.phase {
                Phase::Paused(rest) => {
                    let rest = rest.clone();
                    mem::replace(&mut state.phase, Phase::Awaited(rest))
                }
                Phase::Lost => mem::take(&mut state.phase),
                Phase::Unasked => Phase::Unasked,
                Phase::Asked | Phase::Awaited(_) | Phase::Ended => Phase::Asked,
            }
        };
        let Some(link) = self.link.upgrade() else { return Poll::Pending };
        match phase {
            Phase::Paused(rest) => {
                self.backoff = Backoff::default();
                rest.resume(self.follower());
            }
            Phase::Lost => {
                self.pause = Some(sleep_until(Boottime::now() + self.backoff.failed()));
                ready!(self.poll_begin(&link, context));
            }
            Phase::Unasked => ready!(self.poll_begin(&link, context)),
            Phase::Asked | Phase::Awaited(_) | Phase::Ended => {}
        }
        link.drive();
        Poll::Pending
    }
}

impl Drop for FeedWatch {
    fn drop(&mut self) {
        // In a forked child it is the parent's, whose mutexes may have been held at the fork.
        if self.generation != process::generation() {
            return mem::forget(mem::replace(&mut self.room, Room::Closed));
        }
        let (phase, waiter) = {
            let mut state = self.feed.0.lock();
            (mem::replace(&mut state.phase, Phase::Ended), state.waiter.take())
        };
        drop(waiter);
        if let Phase::Awaited(rest) | Phase::Paused(rest) = phase {
            rest.stop();
        }
    }
}

impl Follow for Feed {
    fn told(&self, answer: Result<Answered, StoreError>) {
        let (change, phase) = match &answer {
            Ok(answered) => match reply::read(&answered.body) {
                Ok(ServerAnswer::Items { items, more: true }) => {
                    (items.last().map(|change| heard(change, answered)), Phase::Paused(answered.rest()))
                }
                Ok(_) | Err(_) => (Some(Heard::Look), Phase::Lost),
            },
            // Losing the feed is a change, and its next beginning is one again.
            Err(_) => (Some(Heard::Look), Phase::Lost),
        };
        let waiter = {
            let mut state = self.0.lock();
            if let Phase::Ended = state.phase {
                drop(state);
                // The server would keep it forever.
                if let Phase::Paused(rest) = phase {
                    rest.stop();
                }
                return;
            }
            state.phase = phase;
            if change.is_some() {
                state.change = change;
            }
            // Also without a change: then it asks for the next one.
            state.waiter.take()
        };
        if let Some(waiter) = waiter {
            waiter.wake();
        }
    }
}

/// What a change of the row means to a waiter.
fn heard(change: &Value, answered: &Answered) -> Heard {
    let Some(row) = change.get("new_val").filter(|row| !row.is_null()) else { return Heard::Look };
    // The next look reports what is not a lock record.
    let Ok(row) = Row::read(row) else { return Heard::Look };
    let now = answered.connection.offset().earliest(answered.received);
    match u64::try_from(i64::try_from(row.state.ends_at.0 / 1_000_000).unwrap_or(i64::MAX).saturating_sub(now)) {
        Ok(left) => Heard::Held { until: answered.received + Duration::from_millis(left.saturating_add(1)) },
        Err(_) => Heard::Look,
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::task::Wake;

    use super::super::connection::{Connection, ReqlProtocol};
    use super::super::frame;
    use super::*;
    use crate::stores::network::connection::Task;
    use crate::stores::network::pipeline::Pipeline;
    use crate::stores::network::testing::Scripted;
    use crate::stores::rethinkdb::testing::connection;

    const TOKEN: u64 = 7;
    const NO_CHANGE: &[u8] = br#"{"t":3,"r":[]}"#;
    const FREE: &[u8] = br#"{"t":3,"r":[{"new_val":null}]}"#;

    struct Scene {
        socket: Scripted,
        connection: Connection,
        _task: Task<Pipeline<ReqlProtocol>>,
        watch: FeedWatch,
    }

    fn scene() -> Scene {
        let socket = Scripted::default();
        let (connection, task) = connection(&socket);
        let watch = FeedWatch {
            link: Weak::new(),
            body: Arc::new(|_| Vec::new()),
            feed: Arc::new(Feed(Mutex::new(FeedState { phase: Phase::Asked, ..FeedState::default() }))),
            room: Room::Closed,
            backoff: Backoff::default(),
            pause: None,
            generation: process::generation(),
        };
        Scene { socket, connection, _task: task, watch }
    }

    impl Scene {
        fn part(&self, body: &[u8]) -> Result<Answered, StoreError> {
            let at = Boottime::now();
            let connection = self.connection.clone();
            Ok(Answered { body: body.to_vec(), sent: at, received: at, token: TOKEN, connection })
        }

        fn is_stopped(&self) -> bool {
            let mut stop = Vec::new();
            frame::write(&mut stop, TOKEN, b"[3]");
            let taken = &self.socket.0.lock().taken;
            assert!(taken.is_empty() || *taken == stop, "{taken:?}");
            !taken.is_empty()
        }
    }

    #[test]
    fn a_feed_ends_with_its_watch() {
        for body in [NO_CHANGE, FREE] {
            let mut scene = scene();
            scene.watch.feed.told(scene.part(body));
            assert!(!scene.is_stopped());
            scene.watch = self::scene().watch;
            assert!(scene.is_stopped());
        }
    }

    #[test]
    fn a_feed_that_begins_after_its_watch_has_gone_is_stopped() {
        for (body, stopped) in [(FREE, true), (br#"{"t":2,"r":[]}"#, false)] {
            let mut scene = scene();
            let feed = Arc::clone(&scene.watch.feed);
            scene.watch = self::scene().watch;
            assert!(!scene.is_stopped(), "nobody knows yet whether there will be one");
            feed.told(scene.part(body));
            assert_eq!(scene.is_stopped(), stopped);
        }
    }

    struct Woken(AtomicBool);

    impl Wake for Woken {
        fn wake(self: Arc<Self>) {
            self.0.store(true, Ordering::SeqCst);
        }
    }

    /// The waiter asks for the next part, also where one had no change.
    #[test]
    fn a_part_wakes_the_waiter() {
        for (body, look) in [(NO_CHANGE, false), (FREE, true), (b"nonsense", true)] {
            let mut scene = scene();
            let woken = Arc::new(Woken(AtomicBool::new(false)));
            let waker = Waker::from(Arc::clone(&woken));
            let mut context = Context::from_waker(&waker);
            assert!(scene.watch.poll_change(&mut context).is_pending());
            scene.watch.feed.told(scene.part(body));
            assert!(woken.0.load(Ordering::SeqCst));
            let notice = scene.watch.poll_change(&mut context);
            assert_eq!(notice, if look { Poll::Ready(Notice::Look) } else { Poll::Pending });
        }
    }
}
