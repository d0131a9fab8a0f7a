//! Waking waiters: a channel for each key that is waited for, on the store's connection (R10).
//!
//! A pooler that gives each transaction another server takes a LISTEN, and then passes on what arrives by chance: while
//! that server happens to be at work for this client, or none. So it is tried with a second connection that listens and
//! sends nothing, once for each connection of the store; where nothing arrives there, waiters look at intervals.

use std::collections::HashMap;
use std::future::poll_fn;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Weak};
use std::task::{Context, Poll, Waker, ready};
use std::time::Duration;

use tokio::sync::oneshot;
use tokio_postgres::AsyncMessage;

use super::channel::{channel, hash_of};
use super::connection::{self, Answered, ServerInfo};
use super::servers::{Entered, Link};
use super::sqlstate::Failure;
use super::statements::{Statement, Value};
use crate::backoff::Backoff;
use crate::clock::Boottime;
use crate::key::KeyHash;
use crate::store::{Notice, StoreError, Watch};
use crate::sys::mutex::Mutex;
use crate::sys::process;
use crate::sys::runtime::{self, sleep_until, until};
use crate::token::HoldId;

/// How long a notification may take to come through. It comes at once, and before the answer to the next
/// statement, unless it does not come at all.
const THROUGH: Duration = Duration::from_secs(1);

/// How long nobody listens where nothing arrives: what was listened to stays with the pooler's connections, which
/// others use.
const DEAF: Duration = Duration::from_secs(60);

/// Who listens to what.
pub struct Listening {
    own: Weak<Listening>,
    channels: Mutex<HashMap<KeyHash, Channel>>,
    /// Whether the present connection receives notifications.
    hears: AtomicBool,
    /// Until when nobody listens, since nothing arrives.
    deaf_until: Mutex<Boottime>,
    warned: AtomicBool,
}

struct Channel {
    watches: Vec<Arc<News>>,
    /// Dropped with the channel, which ends its task.
    _alive: oneshot::Sender<()>,
    _listened: Listened,
}

/// Counts a channel as listened to, until it is dropped.
struct Listened(Arc<AtomicUsize>);

impl Listened {
    fn begin(count: &Arc<AtomicUsize>) -> Listened {
        count.fetch_add(1, Ordering::SeqCst);
        Listened(Arc::clone(count))
    }
}

impl Drop for Listened {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

/// Whether something happened that was not reported yet, and the waker of its waiter.
#[derive(Default)]
struct News(Mutex<(bool, Option<Waker>)>);

impl News {
    fn tell(&self) {
        let waker = {
            let (happened, waker) = &mut *self.0.lock();
            *happened = true;
            waker.take()
        };
        if let Some(waker) = waker {
            waker.wake();
        }
    }
}

fn listen(channel: &str) -> Statement {
    Statement { sql: format!("LISTEN \"{channel}\""), values: Vec::new(), recurs: false }
}

fn unlisten(channel: &str) -> Statement {
    Statement { sql: format!("UNLISTEN \"{channel}\""), values: Vec::new(), recurs: false }
}

impl Listening {
    pub fn new(link: &Link) -> Arc<Listening> {
        let listening = Arc::new_cyclic(|own| Listening {
            own: own.clone(),
            channels: Mutex::default(),
            hears: AtomicBool::new(false),
            deaf_until: Mutex::new(Boottime::ZERO),
            warned: AtomicBool::new(false),
        });
        let told = Arc::downgrade(&listening);
        let _ = link.engine.notified.set(Arc::new(move |channel| {
            if let Some(listening) = told.upgrade() {
                listening.notified(channel);
            }
        }));
        listening
    }

    /// Whether waiters are notified of changes.
    pub fn hears(&self) -> bool {
        self.hears.load(Ordering::Relaxed)
    }

    /// Watches a key from now on. The LISTEN is on its way when this returns.
    pub fn watch(&self, link: &Arc<Link>, hash: KeyHash) -> Box<dyn Watch> {
        if !self.deaf_until.lock().has_passed() {
            return Box::new(Deaf);
        }
        let news = Arc::new(News::default());
        let mut channels = self.channels.lock();
        let listened = &link.engine.listened;
        let channel = channels.entry(hash).or_insert_with(|| {
            let (alive, ended) = oneshot::channel();
            // Sent with the channels locked: behind the UNLISTEN of one that was here before.
            let asked = link.ask(listen(&channel(hash)));
            if let (Some(own), Ok(handle)) = (self.own.upgrade(), runtime::handle()) {
                handle.spawn(keep_listening(Arc::downgrade(&own), Arc::downgrade(link), hash, asked, ended));
            }
            Channel { watches: Vec::new(), _alive: alive, _listened: Listened::begin(listened) }
        });
        channel.watches.push(Arc::clone(&news));
        drop(channels);
        let (listening, link) = (self.own.clone(), Arc::downgrade(link));
        Box::new(KeyWatch { listening, link, hash, news, generation: process::generation() })
    }

    /// A notification came in.
    fn notified(&self, channel: &str) {
        if let Some(hash) = hash_of(channel) {
            self.tell(hash);
        }
    }

    fn tell(&self, hash: KeyHash) {
        let watches: Vec<Arc<News>> = match self.channels.lock().get(&hash) {
            Some(channel) => channel.watches.clone(),
            None => return,
        };
        for news in watches {
            news.tell();
        }
    }

    /// Whether the connection receives notifications; tried with a second connection. Where it could not be
    /// tried, it is with the next channel.
    pub async fn hears_others(&self, link: &Arc<Link>, info: &Arc<ServerInfo>) -> Option<bool> {
        let tried = info.hears.get_or_try_init(|| self.try_hearing(link, info)).await.ok().copied();
        self.hears.store(tried == Some(true), Ordering::Relaxed);
        if tried == Some(false) {
            *self.deaf_until.lock() = Boottime::now() + DEAF;
        }
        tried
    }

    async fn try_hearing(&self, link: &Arc<Link>, info: &Arc<ServerInfo>) -> Result<bool, ()> {
        match trial(link, info).await {
            Ok(hears) => {
                if !hears && !self.warned.swap(true, Ordering::Relaxed) {
                    tracing::warn!("{}", pooled(&info.host));
                }
                Ok(hears)
            }
            Err(error) => {
                tracing::debug!("could not check whether notifications arrive from {}: {error}", info.host);
                Err(())
            }
        }
    }
}

/// Whether a second connection hears the store's.
async fn trial(link: &Arc<Link>, info: &Arc<ServerInfo>) -> Result<bool, StoreError> {
    let broke = || StoreError::unreachable("the second connection could not listen");
    let servers = &link.engine;
    let limit = Boottime::now() + servers.config.connect_timeout;
    let mut entering = Box::pin(servers.enter(&servers.config.hosts[info.index], limit));
    let entered = until(limit, &mut entering).await;
    let Entered { client, mut driver, .. } = entered.unwrap_or_else(|| Err(StoreError::unreachable("no answer")))?;
    let channel = format!("nblock_trial_{}", HoldId::random());
    let (listen, unlisten) = (listen(&channel).sql, unlisten(&channel).sql);
    let mut listening = Box::pin(connection::drive(&mut driver, client.batch_execute(&listen)));
    if !matches!(until(limit, &mut listening).await, Some(Ok(Ok(())))) {
        return Err(broke());
    }
    drop(listening);
    let values = vec![Value::Text(Some(channel.clone()))];
    let notify = Statement { sql: "SELECT pg_notify($1, '')".to_string(), values, recurs: false };
    link.ask(notify).await.map_err(Failure::into_error)?;
    let mut arrives = poll_fn(|context| {
        loop {
            match ready!(driver.poll_message(context)) {
                Some(Ok(AsyncMessage::Notification(notification))) if notification.channel() == channel => {
                    return Poll::Ready(true);
                }
                Some(Ok(_)) => {}
                Some(Err(_)) | None => return Poll::Ready(false),
            }
        }
    });
    match until(Boottime::now() + THROUGH, &mut arrives).await {
        Some(true) => Ok(true),
        Some(false) => Err(broke()),
        None => {
            // It is the pooler's connections that listen.
            let mut forgetting = Box::pin(connection::drive(&mut driver, client.batch_execute(&unlisten)));
            let _ = until(limit, &mut forgetting).await;
            Ok(false)
        }
    }
}

/// What a pooler in transaction mode does to waiting.
pub fn pooled(host: &str) -> String {
    format!(
        "{host} is a pooler in transaction mode (PgBouncer: pool_mode): it does not deliver notifications, and waiters \
         poll. Name the server itself, or a pool in session mode; notify=off accepts polling"
    )
}

/// Ensures that a channel is listened to as long as somebody watches it.
async fn keep_listening(
    listening: Weak<Listening>,
    link: Weak<Link>,
    hash: KeyHash,
    asked: impl Future<Output = Result<Answered, Failure>> + Send,
    mut ended: oneshot::Receiver<()>,
) {
    let channel = channel(hash);
    let mut backoff = Backoff::default();
    let mut asked: std::pin::Pin<Box<dyn Future<Output = Result<Answered, Failure>> + Send + '_>> = Box::pin(asked);
    loop {
        let answered = first_of(asked, &mut ended).await;
        let (Some(strong), Some(strong_link)) = (listening.upgrade(), link.upgrade()) else { return };
        let mut connection = None;
        match answered {
            None => return strong.stop_listening(&strong_link, hash, &channel),
            Some(Ok(answered)) => {
                backoff = Backoff::default();
                let (own, way, info) = (Arc::clone(&strong), Arc::clone(&strong_link), Arc::clone(&answered.info));
                // It runs to its end: dropped halfway, it would leave its channel, and the next wait would try again.
                let trying = tokio::spawn(async move { own.hears_others(&way, &info).await });
                if first_of(trying, &mut ended).await.is_none() {
                    return strong.stop_listening(&strong_link, hash, &channel);
                }
                connection = Some(answered.info);
            }
            Some(Err(failure)) => {
                tracing::debug!("could not listen for {channel}: {}", failure.into_error());
                strong.hears.store(false, Ordering::Relaxed);
            }
        }
        // What happened before it was listened to is seen by one more look.
        strong.tell(hash);
        drop((strong, strong_link));
        if let Some(info) = connection {
            let lost = first_of(Box::pin(info.ended()), &mut ended).await;
            let (Some(strong), Some(strong_link)) = (listening.upgrade(), link.upgrade()) else { return };
            if lost.is_none() {
                return strong.stop_listening(&strong_link, hash, &channel);
            }
            strong.hears.store(false, Ordering::Relaxed);
            strong.tell(hash);
        }
        let pause = sleep_until(Boottime::now() + backoff.failed());
        if first_of(Box::pin(pause), &mut ended).await.is_none() {
            return;
        }
        let Some(strong_link) = link.upgrade() else { return };
        asked = Box::pin(strong_link.ask(listen(&channel)));
    }
}

impl Listening {
    /// The last watch of a channel has gone. One that came meanwhile has sent its LISTEN, and keeps it.
    fn stop_listening(&self, link: &Arc<Link>, hash: KeyHash, channel: &str) {
        let channels = self.channels.lock();
        if !channels.contains_key(&hash) {
            drop(link.ask(unlisten(channel)));
        }
    }
}

/// What `future` gives, or `None` when the channel is gone.
async fn first_of<F: Future + Unpin>(mut future: F, ended: &mut oneshot::Receiver<()>) -> Option<F::Output> {
    poll_fn(|context| {
        if std::pin::Pin::new(&mut *ended).poll(context).is_ready() {
            return Poll::Ready(None);
        }
        std::pin::Pin::new(&mut future).poll(context).map(Some)
    })
    .await
}

/// A watch that is never notified: its waiter looks at intervals.
pub struct Deaf;

impl Watch for Deaf {
    fn poll_change(&mut self, _context: &mut Context<'_>) -> Poll<Notice> {
        Poll::Pending
    }
}

struct KeyWatch {
    listening: Weak<Listening>,
    link: Weak<Link>,
    hash: KeyHash,
    news: Arc<News>,
    /// The process that it was made in.
    generation: u64,
}

impl Watch for KeyWatch {
    fn poll_change(&mut self, context: &mut Context<'_>) -> Poll<Notice> {
        {
            let (happened, waker) = &mut *self.news.0.lock();
            if std::mem::take(happened) {
                return Poll::Ready(Notice::Look);
            }
            *waker = Some(context.waker().clone());
        }
        if let Some(link) = self.link.upgrade() {
            link.drive();
        }
        Poll::Pending
    }
}

impl Drop for KeyWatch {
    fn drop(&mut self) {
        // In a forked child it is the parent's, whose mutex may have been held at the fork.
        if self.generation != process::generation() {
            return;
        }
        let Some(listening) = self.listening.upgrade() else { return };
        let mut channels = listening.channels.lock();
        if let Some(channel) = channels.get_mut(&self.hash) {
            channel.watches.retain(|news| !Arc::ptr_eq(news, &self.news));
            if channel.watches.is_empty() {
                channels.remove(&self.hash);
            }
        }
    }
}
