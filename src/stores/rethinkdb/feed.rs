//! Watching a record: a change feed on its one row, on the store's connection (R10).

use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::sync::{Arc, Weak};
use std::task::{Context, Poll, Waker};

use serde_json::Value;
use tokio::sync::oneshot;

use super::connection::Answered;
use super::queries::Queries;
use super::reply::{self, ServerAnswer};
use super::row::Row;
use super::servers::Link;
use crate::backoff::Backoff;
use crate::clock::Boottime;
use crate::key::Key;
use crate::store::{Notice, Watch};
use crate::sys::mutex::Mutex;
use crate::sys::runtime::{self, sleep_until};

/// The library's end of a feed.
pub struct FeedWatch {
    news: Arc<Mutex<News>>,
    /// Dropped with the watch, which ends the feed.
    _alive: oneshot::Sender<()>,
}

/// What was received last and not yet reported. A later change says more than an earlier one.
#[derive(Default)]
struct News {
    change: Option<Heard>,
    /// The waker of the task that waits for more.
    waiter: Option<Waker>,
    /// The feed's task, which waits for somebody to wait.
    feed: Option<Waker>,
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
        let news = Arc::new(Mutex::new(News::default()));
        let (alive, ended) = oneshot::channel();
        let body = queries.changes(key).start();
        let feed = Feed { link: Arc::downgrade(link), body: body.into(), news: Arc::clone(&news) };
        // Without the runtime there is nothing to hear; the safety check is left.
        if let Ok(handle) = runtime::handle() {
            handle.spawn(feed.run(ended));
        }
        FeedWatch { news, _alive: alive }
    }
}

impl Watch for FeedWatch {
    fn poll_change(&mut self, context: &mut Context<'_>) -> Poll<Notice> {
        let mut news = self.news.lock();
        match news.change.take() {
            Some(Heard::Look) => Poll::Ready(Notice::Look),
            Some(Heard::Held { until }) => Poll::Ready(Notice::Held { expires_in: until.since(Boottime::now()) }),
            None => {
                news.waiter = Some(context.waker().clone());
                let feed = news.feed.take();
                drop(news);
                if let Some(feed) = feed {
                    feed.wake();
                }
                Poll::Pending
            }
        }
    }
}

struct Feed {
    link: Weak<Link>,
    body: Arc<[u8]>,
    news: Arc<Mutex<News>>,
}

impl Feed {
    async fn run(self, mut ended: oneshot::Receiver<()>) {
        let Some(room) = self.link.upgrade().map(|link| Arc::clone(&link.engine.feeds)) else { return };
        let room = first_of(Box::pin(room.acquire_owned()), &mut ended).await;
        let Some(Ok(_room)) = room else { return };
        let mut backoff = Backoff::default();
        loop {
            let body = Arc::clone(&self.body);
            // The first change is the present row: what happened before the feed began is in it.
            let asked = match self.link.upgrade() {
                Some(link) => link.ask(Arc::new(move |_| body.to_vec())),
                None => return,
            };
            let mut next = first_of(asked, &mut ended).await;
            loop {
                let answered = match next {
                    None => return,
                    Some(Err(_)) => break,
                    Some(Ok(answered)) => answered,
                };
                if !self.tell_all(&answered) {
                    break;
                }
                backoff = Backoff::default();
                // A waiter that was notified of a change is mostly granted next, and then nobody needs more.
                if first_of(Box::pin(self.awaited()), &mut ended).await.is_none() {
                    answered.connection.stop(answered.token);
                    return;
                }
                next = first_of(answered.connection.resume(answered.token), &mut ended).await;
                if next.is_none() {
                    answered.connection.stop(answered.token);
                    return;
                }
            }
            // Losing the feed is a change, and its next beginning is one again.
            self.tell(Heard::Look);
            let pause = sleep_until(Boottime::now() + backoff.failed());
            if first_of(pause, &mut ended).await.is_none() {
                return;
            }
        }
    }

    /// Tells what came. `false`: nothing more will.
    fn tell_all(&self, answered: &Answered) -> bool {
        match reply::read(&answered.body) {
            Ok(ServerAnswer::Items { items, more }) => {
                if let Some(change) = items.last() {
                    self.tell(heard(change, answered));
                }
                more
            }
            Ok(ServerAnswer::Atom(_)) | Err(_) => false,
        }
    }

    /// Until somebody waits for a change.
    async fn awaited(&self) {
        poll_fn(|context| {
            let mut news = self.news.lock();
            if news.waiter.is_some() {
                return Poll::Ready(());
            }
            news.feed = Some(context.waker().clone());
            Poll::Pending
        })
        .await
    }

    fn tell(&self, heard: Heard) {
        let waker = {
            let mut news = self.news.lock();
            news.change = Some(heard);
            news.waiter.take()
        };
        if let Some(waker) = waker {
            waker.wake();
        }
    }
}

/// What a change of the row means to a waiter.
fn heard(change: &Value, answered: &Answered) -> Heard {
    let Some(row) = change.get("new_val").filter(|row| !row.is_null()) else { return Heard::Look };
    // The next look reports what is not a lock record.
    let Ok(row) = Row::read(row) else { return Heard::Look };
    let now = answered.connection.info.offset().earliest(answered.received);
    match u64::try_from(i64::try_from(row.state.ends_at.0 / 1_000_000).unwrap_or(i64::MAX).saturating_sub(now)) {
        Ok(left) => Heard::Held { until: answered.received + std::time::Duration::from_millis(left.saturating_add(1)) },
        Err(_) => Heard::Look,
    }
}

/// What `future` gives, or `None` when the watch is gone.
async fn first_of<F: Future + Unpin>(mut future: F, ended: &mut oneshot::Receiver<()>) -> Option<F::Output> {
    poll_fn(|context| {
        if Pin::new(&mut *ended).poll(context).is_ready() {
            return Poll::Ready(None);
        }
        Pin::new(&mut future).poll(context).map(Some)
    })
    .await
}
