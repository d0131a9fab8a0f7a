//! Sockets, and the thread that polls them.
//!
//! Tokio's own sockets are not used: tokio writes to an eventfd and reads from an epoll descriptor by number, and the
//! number may have become the program's (R26); tokio's threads end when these descriptors are closed. Here each use is
//! checked first. If the descriptors are gone, the sockets of that thread fail, and the next connection starts a new
//! thread.
//!
//! A thread that waits for a reply polls its socket itself (see [`SocketPoller`]), as a program with a blocking socket
//! does: no other thread has to be woken first.

use std::io::{self, Write};
use std::mem::MaybeUninit;
use std::net::{Shutdown, SocketAddr, TcpStream, ToSocketAddrs};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock, Weak};
use std::task::{Context, Poll, Waker, ready};
use std::thread;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::descriptor::{Own, Signal, pipe};
use super::mutex::Mutex;
use super::process::{self, PerProcess};
use super::runtime::{Source, handle, sleep_until, with_signals_blocked};
use crate::clock::Boottime;

/// The addresses of a host.
pub async fn resolve(host: &str, port: u16) -> io::Result<Vec<SocketAddr>> {
    let host = host.to_string();
    blocking(move || Ok((host.as_str(), port).to_socket_addrs()?.collect())).await
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> io::Result<T> + Send + 'static) -> io::Result<T> {
    let handle = handle().map_err(|error| io::Error::other(error.message().to_string()))?;
    handle.spawn_blocking(work).await.unwrap_or_else(|error| Err(io::Error::other(error)))
}

/// A connection. It may be used from any thread.
pub struct Socket {
    shared: Arc<Shared>,
    listener: Arc<Listener>,
}

struct Shared {
    stream: Own<Connected>,
    number: u64,
    reading: Mutex<Direction>,
    writing: Mutex<Direction>,
    /// The socket is closed, and nothing polls it any more.
    closed: AtomicBool,
    /// Which thread polls it.
    polling: Mutex<Polling>,
    /// Wakes a thread that polls the socket in a turn. Created for the first turn.
    wake_signal: OnceLock<Signal>,
}

/// Which thread polls a socket.
#[derive(Default)]
struct Polling {
    by: PolledBy,
    /// Whether a task waits to write.
    wants_to_write: bool,
    /// When the last turn ended.
    last_turn: Option<Boottime>,
    /// Whether there are waiters besides the thread whose turn it is.
    shared: bool,
    /// Whether a task checks that the socket is polled by a thread that is not stopped.
    watched: bool,
}

#[derive(Clone, Copy, Default, PartialEq, Eq)]
enum PolledBy {
    /// The library's thread.
    #[default]
    Listener,
    /// A thread that waits for a reply, in its turn.
    Waiter,
    /// The library's thread as well: the thread whose turn it is has not moved for a while.
    Both,
    /// No thread, for a moment: the next turn is expected to follow.
    Nobody,
}

impl Polling {
    /// The events that the library's thread listens for.
    fn events(&self) -> i32 {
        let reads = matches!(self.by, PolledBy::Listener | PolledBy::Both);
        let reading = if reads { libc::EPOLLIN | libc::EPOLLRDHUP } else { 0 };
        reading | if self.wants_to_write { libc::EPOLLOUT } else { 0 } | libc::EPOLLET
    }
}

/// The connected stream. Writing to either kind never raises SIGPIPE in the program.
enum Connected {
    Tcp(TcpStream),
    Unix(UnixStream),
}

impl Connected {
    /// Reads into uninitialised memory: initialising it takes longer than reading.
    fn read(&self, into: &mut [MaybeUninit<u8>]) -> io::Result<usize> {
        // SAFETY: an open socket; the call writes at most so many bytes to where there is room for them.
        match unsafe { libc::recv(self.as_raw_fd(), into.as_mut_ptr().cast(), into.len(), 0) } {
            -1 => Err(io::Error::last_os_error()),
            read => Ok(read as usize),
        }
    }

    fn write(&self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Connected::Tcp(stream) => (&*stream).write(bytes),
            Connected::Unix(stream) => (&*stream).write(bytes),
        }
    }

    fn end_writing(&self) -> io::Result<()> {
        match self {
            Connected::Tcp(stream) => stream.shutdown(Shutdown::Write),
            Connected::Unix(stream) => stream.shutdown(Shutdown::Write),
        }
    }
}

/// Connects a non-blocking socket. (With the standard library, `connect` could wait forever for a server that accepts
/// nothing.)
fn unix_socket(path: &Path) -> io::Result<OwnedFd> {
    let path = path.as_os_str().as_bytes();
    // SAFETY: plain integers, for which zero is a value.
    let mut address: libc::sockaddr_un = unsafe { std::mem::zeroed() };
    // A NUL must follow the path, and a NUL at its beginning would mean a name outside the file system.
    if path.is_empty() || path.contains(&0) || path.len() >= address.sun_path.len() {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!(
                "the path of a Unix socket must have 1 to {} bytes, none of them NUL (got {:?})",
                address.sun_path.len() - 1,
                String::from_utf8_lossy(path)
            ),
        ));
    }
    address.sun_family = libc::AF_UNIX as libc::sa_family_t;
    for (to, byte) in address.sun_path.iter_mut().zip(path) {
        *to = *byte as libc::c_char;
    }
    // SAFETY: makes a descriptor, which nobody else has; the address outlives the call, and its length is its own.
    unsafe {
        let number = libc::socket(libc::AF_UNIX, libc::SOCK_STREAM | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK, 0);
        if number < 0 {
            return Err(io::Error::last_os_error());
        }
        let socket = OwnedFd::from_raw_fd(number);
        match libc::connect(number, (&raw const address).cast(), size_of_val(&address) as libc::socklen_t) {
            0 => Ok(socket),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

impl AsRawFd for Connected {
    fn as_raw_fd(&self) -> RawFd {
        match self {
            Connected::Tcp(stream) => stream.as_raw_fd(),
            Connected::Unix(stream) => stream.as_raw_fd(),
        }
    }
}

/// Whether the socket is ready for reading or writing, and the waker of the task that waits for it.
struct Direction {
    /// Whether a try may succeed, according to the events so far.
    ready: bool,
    /// How many events have reported readiness.
    events: u64,
    /// The other end has hung up: the socket stays readable.
    ended: bool,
    waker: Option<Waker>,
}

impl Default for Direction {
    fn default() -> Direction {
        Direction { ready: true, events: 0, ended: false, waker: None }
    }
}

impl Direction {
    fn mark_ready(&mut self, ended: bool) {
        self.events += 1;
        self.ready = true;
        self.ended |= ended;
    }
}

impl Socket {
    /// Connects. Fails after `limit`.
    pub async fn connect(address: SocketAddr, limit: Duration) -> io::Result<Socket> {
        let stream = blocking(move || {
            let stream = TcpStream::connect_timeout(&address, limit.max(Duration::from_millis(1)))?;
            let stream = TcpStream::from(process::above_standard(stream.into())?);
            stream.set_nonblocking(true)?;
            // Requests are small, and their replies are awaited.
            stream.set_nodelay(true)?;
            Ok(stream)
        });
        Listener::current()?.listen_to(Connected::Tcp(stream.await?))
    }

    /// Connects to a socket in the file system. Fails at once if the server's backlog is full.
    pub fn connect_unix(path: &Path) -> io::Result<Socket> {
        let stream = process::above_standard(unix_socket(path)?)?;
        Listener::current()?.listen_to(Connected::Unix(stream.into()))
    }

    /// Tries while the socket may be ready. `drained`: whether the result shows that another try would block.
    fn poll<T>(
        &self,
        direction: &Mutex<Direction>,
        context: &Context<'_>,
        mut attempt: impl FnMut(&Connected) -> io::Result<T>,
        drained: impl Fn(&T) -> bool,
    ) -> Poll<io::Result<T>> {
        loop {
            let events = {
                let mut direction = direction.lock();
                if !direction.ready {
                    direction.waker = Some(context.waker().clone());
                    drop(direction);
                    if self.shared.closed.load(Ordering::SeqCst) {
                        return Poll::Ready(Err(gone()));
                    }
                    return Poll::Pending;
                }
                direction.events
            };
            let done = match attempt(self.shared.stream.get()?) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => None,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Poll::Ready(Err(error)),
                Ok(done) => Some(done),
            };
            if done.as_ref().is_none_or(&drained) {
                let mut direction = direction.lock();
                // If there was another event, there may be more by now.
                if direction.events == events && (done.is_none() || !direction.ended) {
                    direction.ready = false;
                }
            }
            match done {
                Some(done) => return Poll::Ready(Ok(done)),
                None if std::ptr::eq(direction, &self.shared.writing) => self.want_to_write()?,
                None => {}
            }
        }
    }

    /// The socket would block: makes the library's thread report when it is writable.
    fn want_to_write(&self) -> io::Result<()> {
        let mut polling = self.shared.polling.lock();
        polling.wants_to_write = true;
        self.listener.listen_for(&self.shared, &polling)
    }

    /// The addresses of both ends. `None` for a socket in the file system.
    pub fn ends(&self) -> Option<(SocketAddr, SocketAddr)> {
        match self.shared.stream.get().ok()? {
            Connected::Tcp(stream) => stream.local_addr().ok().zip(stream.peer_addr().ok()),
            Connected::Unix(_) => None,
        }
    }

    /// Lets a waiting thread poll this socket in place of the library's thread.
    pub fn poller(&self) -> SocketPoller {
        SocketPoller { shared: Arc::downgrade(&self.shared), listener: Arc::downgrade(&self.listener) }
    }
}

fn gone() -> io::Error {
    io::Error::other("the program closed file descriptors of nblock")
}

impl AsyncRead for Socket {
    fn poll_read(self: Pin<&mut Self>, context: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        // SAFETY: what is written to it is never taken for uninitialised.
        let room = unsafe { into.unfilled_mut() };
        let size = room.len();
        let drained = |read: &usize| *read > 0 && *read < size;
        let read = ready!(self.poll(&self.shared.reading, context, |stream| stream.read(room), drained))?;
        // SAFETY: so many bytes were read into it.
        unsafe { into.assume_init(read) };
        into.advance(read);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Socket {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let written = self.poll(&self.shared.writing, context, |stream| stream.write(bytes), |_| false);
        if written.is_ready() {
            self.shared.polling.lock().wants_to_write = false;
        }
        written
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(self.shared.stream.get().and_then(Connected::end_writing))
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        self.listener.sockets.lock().retain(|socket| socket.number != self.shared.number);
    }
}

/// Polls a socket for a thread that waits for a reply, in turns.
///
/// During a turn, the library's own thread receives no events for reading. Between two turns that follow each other at
/// once, no thread polls the socket: each change of that thread's events costs a system call.
///
/// The thread may be stopped in its turn, by a debugger or in a signal handler. If others wait and it has not moved for
/// a moment, the library's thread receives events as well.
#[derive(Default)]
pub struct SocketPoller {
    shared: Weak<Shared>,
    listener: Weak<Listener>,
}

/// If a turn follows the last one sooner than this, the library's thread does not poll in between.
const AT_ONCE: Duration = Duration::from_millis(1);
/// Half of the longest time for which no thread polls a socket, or only one that is stopped.
const UNHEARD: Duration = Duration::from_millis(5);

impl SocketPoller {
    fn both(&self) -> Option<(Arc<Shared>, Arc<Listener>)> {
        let (shared, listener) = (self.shared.upgrade()?, self.listener.upgrade()?);
        (listener.generation == process::generation() && !shared.closed.load(Ordering::SeqCst))
            .then_some((shared, listener))
    }

    /// Starts a task that checks whether a thread polls the socket.
    fn watch(&self, polling: &mut Polling) {
        if !polling.watched
            && let Ok(handle) = handle()
        {
            polling.watched = true;
            handle.spawn(watch_polling(self.shared.clone(), self.listener.clone()));
        }
    }

    /// Notes a waiter that does not have the present turn.
    fn share(&self, polling: &mut Polling) {
        polling.shared = true;
        if polling.by == PolledBy::Waiter {
            self.watch(polling);
        }
    }
}

impl Source for SocketPoller {
    fn begin(&self) -> bool {
        let Some((shared, listener)) = self.both() else { return false };
        if shared.wake_signal.get().is_none() {
            let Ok(wake_signal) = Signal::private() else { return false };
            let _ = shared.wake_signal.set(wake_signal);
        }
        let mut polling = shared.polling.lock();
        let before = polling.by;
        if matches!(before, PolledBy::Waiter | PolledBy::Both) {
            self.share(&mut polling);
            return false;
        }
        polling.by = PolledBy::Waiter;
        if before == PolledBy::Listener && listener.listen_for(&shared, &polling).is_err() {
            polling.by = PolledBy::Listener;
            return false;
        }
        true
    }

    fn wait(&self, limit: Boottime) -> bool {
        let Some((shared, _)) = self.both() else { return false };
        let Some(wake_signal) = shared.wake_signal.get() else { return false };
        let wanted = |fd, events| libc::pollfd { fd, events, revents: 0 };
        // If one of these numbers belongs to another file by now, nothing is read from it before that is noticed.
        let mut polled = [
            wanted(shared.stream.unchecked().as_raw_fd(), libc::POLLIN | libc::POLLRDHUP),
            wanted(wake_signal.unchecked_number(), libc::POLLIN),
        ];
        // Rounded up, so that the wait does not end just before the limit.
        let at_most = LOOK.min(limit.since(Boottime::now())).as_micros().div_ceil(1000);
        // SAFETY: an array of so many, which outlives the call.
        let count = unsafe { libc::poll(polled.as_mut_ptr(), 2, at_most as i32) };
        if self.both().is_none() {
            return false;
        }
        let [socket, signalled] = polled.map(|polled| polled.revents);
        // After a while without events, using the descriptors shows whether they are still ours.
        if count == 0 || socket != 0 {
            let ended = socket & (libc::POLLRDHUP | libc::POLLHUP | libc::POLLERR | libc::POLLNVAL) != 0;
            shared.reading.lock().mark_ready(ended);
        }
        (signalled == 0 && count != 0) || wake_signal.take_back()
    }

    fn end(&self, expects: bool) {
        let Some((shared, listener)) = self.both() else { return };
        let now = Boottime::now();
        let mut polling = shared.polling.lock();
        let at_once = polling.last_turn.replace(now).is_some_and(|last| now.since(last) < AT_ONCE);
        // A waiter that came after `expects` was computed has marked the turn as shared.
        if std::mem::take(&mut polling.shared) || expects || !at_once {
            return listener.poll_again(&shared, &mut polling, PolledBy::Listener);
        }
        polling.by = PolledBy::Nobody;
        self.watch(&mut polling);
    }

    fn listen(&self) {
        let Some((shared, listener)) = self.both() else { return };
        let mut polling = shared.polling.lock();
        match polling.by {
            PolledBy::Nobody => listener.poll_again(&shared, &mut polling, PolledBy::Listener),
            PolledBy::Waiter | PolledBy::Both => self.share(&mut polling),
            PolledBy::Listener => {}
        }
    }

    fn is_shared(&self) -> bool {
        self.both().is_none_or(|(shared, _)| shared.polling.lock().shared)
    }

    fn wake(&self) {
        if let Some((shared, _)) = self.both()
            && let Some(wake_signal) = shared.wake_signal.get()
        {
            wake_signal.set(true);
        }
    }
}

/// Makes the library's thread poll a socket again if no turn has followed the last one, or if others wait and the
/// thread whose turn it is has not moved.
async fn watch_polling(shared: Weak<Shared>, listener: Weak<Listener>) {
    let mut seen = None;
    loop {
        sleep_until(Boottime::now() + UNHEARD).await;
        let (Some(shared), Some(listener)) = (shared.upgrade(), listener.upgrade()) else { return };
        let mut polling = shared.polling.lock();
        let by = match polling.by {
            PolledBy::Nobody => Some(PolledBy::Listener),
            PolledBy::Waiter if polling.shared => Some(PolledBy::Both),
            PolledBy::Waiter | PolledBy::Both | PolledBy::Listener => None,
        };
        if let Some(by) = by {
            let moved = Some((polling.last_turn, shared.reading.lock().events));
            if seen != moved {
                seen = moved;
                continue;
            }
            listener.poll_again(&shared, &mut polling, by);
        }
        polling.watched = false;
        return;
    }
}

static LISTENER: PerProcess<Mutex<Option<Arc<Listener>>>> = PerProcess::new();

/// The thread that polls sockets, and its descriptors. There is one per process, until its descriptors are closed.
struct Listener {
    epoll: Own<OwnedFd>,
    /// Both ends of a pipe that is never written to. The reading end is registered with our epoll descriptor and no
    /// other, which distinguishes ours from an epoll descriptor of the program.
    sentinel: (Own<OwnedFd>, Own<OwnedFd>),
    sockets: Mutex<Vec<Arc<Shared>>>,
    generation: u64,
}

/// The longest sleep of the thread: it may notice this late that its descriptors are gone.
const LOOK: Duration = Duration::from_secs(1);
const LOOK_WHEN_IDLE: Duration = Duration::from_secs(60);

/// The epoll number of the sentinel. Those of sockets follow.
const SENTINEL: u64 = 0;

impl Listener {
    fn current() -> io::Result<Arc<Listener>> {
        let mut current = LISTENER.get_or_init(|_| Mutex::default()).lock();
        if let Some(listener) = current.as_ref().filter(|listener| listener.is_sound()) {
            return Ok(Arc::clone(listener));
        }
        let listener = Listener::start()?;
        if let Some(former) = current.replace(Arc::clone(&listener)) {
            former.give_up();
        }
        Ok(listener)
    }

    fn start() -> io::Result<Arc<Listener>> {
        // SAFETY: makes a descriptor, which nobody else has.
        let epoll = match unsafe { libc::epoll_create1(libc::EPOLL_CLOEXEC) } {
            -1 => return Err(io::Error::last_os_error()),
            // SAFETY: as above.
            descriptor => unsafe { OwnedFd::from_raw_fd(descriptor) },
        };
        let private = |descriptor| Own::private(process::above_standard(descriptor)?);
        let (reader, writer) = pipe()?;
        let listener = Arc::new(Listener {
            epoll: private(epoll)?,
            sentinel: (private(reader)?, private(writer)?),
            sockets: Mutex::default(),
            generation: process::generation(),
        });
        listener.register(libc::EPOLL_CTL_ADD, listener.sentinel.0.get()?, 0, SENTINEL)?;
        let weak = Arc::downgrade(&listener);
        with_signals_blocked(|| {
            thread::Builder::new().name("nblock-net".to_string()).stack_size(256 << 10).spawn(move || listen(&weak))
        })?;
        Ok(listener)
    }

    fn register(&self, what: i32, descriptor: &impl AsRawFd, events: i32, number: u64) -> io::Result<()> {
        let mut event = libc::epoll_event { events: events as u32, u64: number };
        let epoll = self.epoll.get()?.as_raw_fd();
        // SAFETY: one event, which outlives the call.
        match unsafe { libc::epoll_ctl(epoll, what, descriptor.as_raw_fd(), &mut event) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// Whether the descriptors are still the library's.
    fn is_sound(&self) -> bool {
        let sentinel = self.sentinel.0.get();
        self.generation == process::generation()
            && sentinel.is_ok_and(|sentinel| self.register(libc::EPOLL_CTL_MOD, sentinel, 0, SENTINEL).is_ok())
    }

    fn listen_to(self: Arc<Self>, stream: Connected) -> io::Result<Socket> {
        static NUMBERS: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(SENTINEL + 1);
        let shared = Arc::new(Shared {
            stream: Own::private(stream)?,
            number: NUMBERS.fetch_add(1, Ordering::Relaxed),
            reading: Mutex::default(),
            writing: Mutex::default(),
            closed: AtomicBool::new(false),
            polling: Mutex::default(),
            wake_signal: OnceLock::new(),
        });
        self.sockets.lock().push(Arc::clone(&shared));
        let socket = Socket { shared, listener: self };
        let events = Polling::default().events();
        socket.listener.register(libc::EPOLL_CTL_ADD, socket.shared.stream.get()?, events, socket.shared.number)?;
        Ok(socket)
    }

    /// Registers the socket's events again. If something has arrived already, there is an event at once.
    fn listen_for(&self, socket: &Shared, polling: &Polling) -> io::Result<()> {
        self.register(libc::EPOLL_CTL_MOD, socket.stream.get()?, polling.events(), socket.number)
    }

    /// Makes the library's thread poll a socket, alone or beside a turn.
    fn poll_again(&self, socket: &Shared, polling: &mut Polling, by: PolledBy) {
        polling.by = by;
        if self.listen_for(socket, polling).is_err() {
            // The descriptors are gone. The next read or write will find out.
            socket.mark_ready(true);
        }
    }

    /// Makes everything that waits on these sockets fail.
    fn give_up(&self) {
        for socket in self.sockets.lock().drain(..) {
            socket.closed.store(true, Ordering::SeqCst);
            socket.mark_ready(true);
            if let Some(wake_signal) = socket.wake_signal.get() {
                wake_signal.set(true);
            }
        }
    }
}

impl Shared {
    /// Whether an event is no longer meant for the library's thread, because a turn has begun since, in which another
    /// thread reads the socket. If that turn ends without reading, the events are registered again, and this one is
    /// repeated.
    fn is_read_by_others(&self, events: i32) -> bool {
        let to_be_read = libc::EPOLLIN | libc::EPOLLRDHUP;
        events & !to_be_read == 0 && matches!(self.polling.lock().by, PolledBy::Waiter | PolledBy::Nobody)
    }

    fn mark_ready(&self, ended: bool) {
        for direction in [&self.reading, &self.writing] {
            let waker = {
                let mut direction = direction.lock();
                direction.mark_ready(ended);
                direction.waker.take()
            };
            if let Some(waker) = waker {
                waker.wake();
            }
        }
    }
}

fn listen(listener: &Weak<Listener>) {
    let mut events = [libc::epoll_event { events: 0, u64: 0 }; 64];
    loop {
        let Some(alive) = listener.upgrade() else { return };
        if !alive.is_sound() {
            alive.give_up();
            return;
        }
        let Ok(epoll) = alive.epoll.get().map(AsRawFd::as_raw_fd) else { return alive.give_up() };
        // Without sockets, a late check makes nothing fail late. A socket that is added is polled at once.
        let look_in = if alive.sockets.lock().is_empty() { LOOK_WHEN_IDLE } else { LOOK };
        drop(alive);
        // SAFETY: room for so many events.
        let count =
            unsafe { libc::epoll_wait(epoll, events.as_mut_ptr(), events.len() as i32, look_in.as_millis() as i32) };
        let Some(alive) = listener.upgrade() else { return };
        for event in &events[..usize::try_from(count).unwrap_or(0)] {
            let libc::epoll_event { events, u64: number } = *event;
            let socket = alive.sockets.lock().iter().find(|socket| socket.number == number).cloned();
            if let Some(socket) = socket
                && !socket.is_read_by_others(events as i32)
            {
                let ended = libc::EPOLLRDHUP | libc::EPOLLHUP | libc::EPOLLERR;
                socket.mark_ready(events & ended as u32 != 0);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::future::{Future, poll_fn};
    use std::io::Read;
    use std::os::unix::net::UnixListener;

    use super::*;
    use crate::sys::runtime::{self, Driven, block_on, until};

    struct Place(std::path::PathBuf);

    impl Place {
        fn new(name: &str) -> Place {
            Place(std::env::temp_dir().join(format!("nblock-{name}-{}", std::process::id())))
        }
    }

    impl Drop for Place {
        fn drop(&mut self) {
            let _ = std::fs::remove_file(&self.0);
        }
    }

    /// Puts a file under the number of a socket, like a program that closes all its descriptors.
    #[test]
    fn a_file_of_the_programs_under_a_sockets_number_is_left_alone() {
        let place = Place::new("replaced-socket");
        let server = UnixListener::bind(&place.0).unwrap();
        let mut socket = Socket::connect_unix(&place.0).unwrap();
        let (mut accepted, _) = server.accept().unwrap();
        let number = socket.shared.stream.get().unwrap().as_raw_fd();
        let mut write =
            |bytes| block_on(std::future::poll_fn(|context| Pin::new(&mut socket).poll_write(context, bytes)));
        assert_eq!(write(b"before").unwrap().unwrap(), 6);
        // SAFETY: the name ends with a NUL; the descriptor is nobody else's.
        let theirs = unsafe { File::from_raw_fd(libc::memfd_create(c"theirs".as_ptr(), libc::MFD_CLOEXEC)) };
        // SAFETY: two open descriptors.
        assert_eq!(unsafe { libc::dup3(theirs.as_raw_fd(), number, libc::O_CLOEXEC) }, number);
        assert!(write(b"after").unwrap().is_err());
        drop(socket);
        assert_eq!(theirs.metadata().unwrap().len(), 0);
        // SAFETY: asks for the flags of a number, which is the test's to close.
        unsafe {
            assert!(libc::fcntl(number, libc::F_GETFD) >= 0, "the program's file was closed");
            libc::close(number);
        }
        let mut heard = Vec::new();
        accepted.read_to_end(&mut heard).unwrap();
        assert_eq!(heard, b"before");
    }

    /// A socket that is read by the thread that waits for the data.
    struct Reader {
        poller: SocketPoller,
        socket: Mutex<Socket>,
        /// The bytes that arrived, and the threads that read them.
        came: Mutex<Vec<(u8, thread::ThreadId)>>,
        waker: Mutex<Option<Waker>>,
        expects: bool,
    }

    impl Reader {
        fn of(socket: Socket, expects: bool) -> Arc<Reader> {
            let (came, waker) = (Mutex::default(), Mutex::default());
            Arc::new(Reader { poller: socket.poller(), socket: Mutex::new(socket), came, waker, expects })
        }

        /// The thread that read the next byte.
        fn next(self: &Arc<Reader>) -> Option<(u8, thread::ThreadId)> {
            let next = std::future::poll_fn(|context| {
                *self.waker.lock() = Some(context.waker().clone());
                runtime::drive(Arc::clone(self) as Arc<dyn Driven>);
                self.came.lock().pop().map_or(Poll::Pending, Poll::Ready)
            });
            block_on(runtime::until(Boottime::now() + Duration::from_secs(60), &mut Box::pin(next))).unwrap()
        }
    }

    impl Driven for Reader {
        fn source(&self) -> &dyn Source {
            &self.poller
        }

        fn take_in(&self) -> bool {
            let mut byte = [0];
            let mut buffer = ReadBuf::new(&mut byte);
            let read =
                Pin::new(&mut *self.socket.lock()).poll_read(&mut Context::from_waker(Waker::noop()), &mut buffer);
            if let (Poll::Ready(Ok(())), [byte]) = (read, buffer.filled()) {
                self.came.lock().push((*byte, thread::current().id()));
                self.waker.lock().take().into_iter().for_each(Waker::wake);
            }
            true
        }

        fn awaited(&self) -> usize {
            usize::from(self.expects)
        }
    }

    /// The waiting thread reads the byte itself, instead of being woken by another thread. A wake-up by another thread
    /// also ends its wait.
    #[test]
    fn a_waiting_thread_reads_its_socket_itself() {
        for expects in [true, false] {
            let place = Place::new(if expects { "read-by-waiter" } else { "read-by-waiters" });
            let server = UnixListener::bind(&place.0).unwrap();
            let reader = Reader::of(Socket::connect_unix(&place.0).unwrap(), expects);
            let (mut accepted, _) = server.accept().unwrap();
            let shared = reader.poller.shared.upgrade().unwrap();
            let polled_by = || shared.polling.lock().by;
            for number in 0..200 {
                thread::scope(|scope| {
                    scope.spawn(|| {
                        while polled_by() != PolledBy::Waiter {
                            thread::yield_now();
                        }
                        accepted.write_all(&[number]).unwrap();
                    });
                    assert_eq!(reader.next(), Some((number, thread::current().id())));
                });
            }
            // Woken by another thread, while no data arrives.
            thread::scope(|scope| {
                scope.spawn(|| {
                    while polled_by() != PolledBy::Waiter {
                        thread::yield_now();
                    }
                    reader.came.lock().push((200, thread::current().id()));
                    reader.waker.lock().take().unwrap().wake();
                });
                let (byte, by) = reader.next().unwrap();
                assert!(byte == 200 && by != thread::current().id());
            });
            // Between two turns in succession no thread may poll the socket, but not for long.
            while polled_by() != PolledBy::Listener {
                thread::yield_now();
            }
            accepted.write_all(&[201]).unwrap();
            let read = std::future::poll_fn(|context| {
                let mut byte = [0];
                let mut buffer = ReadBuf::new(&mut byte);
                Pin::new(&mut *reader.socket.lock()).poll_read(context, &mut buffer).map(|read| {
                    read.unwrap();
                    buffer.filled().to_vec()
                })
            });
            assert_eq!(block_on(read).unwrap(), [201]);
        }
    }

    fn connected(place: &Place) -> (Socket, UnixStream) {
        let server = UnixListener::bind(&place.0).unwrap();
        let socket = Socket::connect_unix(&place.0).unwrap();
        (socket, server.accept().unwrap().0)
    }

    /// Whether a byte is read that the other end writes while the socket is empty, which needs a thread that polls it.
    fn is_polled(socket: &mut Socket, server: &mut UnixStream) -> bool {
        let mut space = [0; 8];
        let mut into = ReadBuf::new(&mut space);
        let mut reading = poll_fn(|context| Pin::new(&mut *socket).poll_read(context, &mut into));
        assert!(Pin::new(&mut reading).poll(&mut Context::from_waker(Waker::noop())).is_pending());
        server.write_all(b"x").unwrap();
        let read = block_on(until(Boottime::now() + Duration::from_secs(60), &mut reading)).unwrap();
        read.is_some_and(|read| read.is_ok())
    }

    /// The thread whose turn it is runs a signal handler or was stopped. The library's thread then polls the socket for
    /// waiters that come later. (`listen` is called for those that came before, too.)
    #[test]
    fn a_thread_that_stands_still_in_its_turn_keeps_nothing_from_others() {
        let place = Place::new("stands-still");
        let (mut socket, mut server) = connected(&place);
        let poller = socket.poller();
        let comes: [fn(&SocketPoller); 2] = [|poller| assert!(!poller.begin()), |poller| poller.listen()];
        for (number, comes) in comes.iter().enumerate() {
            assert!(poller.begin());
            comes(&poller);
            for _ in 0..3 {
                assert!(is_polled(&mut socket, &mut server), "case {number}");
            }
            poller.end(false);
            assert!(is_polled(&mut socket, &mut server), "case {number}, when it has gone on");
        }
    }

    /// A thread keeps its turn while it polls its future, and may be stopped there as well.
    #[test]
    fn a_thread_that_stands_still_in_its_futures_code_keeps_nothing_from_others() {
        for in_a_task in [false, true] {
            let place = Place::new(if in_a_task { "still-and-task" } else { "still-and-thread" });
            let server = UnixListener::bind(&place.0).unwrap();
            let reader = Reader::of(Socket::connect_unix(&place.0).unwrap(), false);
            let (mut accepted, _) = server.accept().unwrap();
            let shared = reader.poller.shared.upgrade().unwrap();
            let polled_by = || shared.polling.lock().by;
            let (stands_still, go_on) = (AtomicBool::new(false), AtomicBool::new(false));
            thread::scope(|scope| {
                let thread = scope.spawn(|| {
                    block_on(poll_fn(|context| {
                        *reader.waker.lock() = Some(context.waker().clone());
                        runtime::drive(Arc::clone(&reader) as Arc<dyn Driven>);
                        if reader.came.lock().is_empty() {
                            return Poll::Pending;
                        }
                        assert!(polled_by() == PolledBy::Waiter, "its turn has ended");
                        stands_still.store(true, Ordering::SeqCst);
                        while !go_on.load(Ordering::SeqCst) {
                            thread::yield_now();
                        }
                        Poll::Ready(())
                    }))
                });
                while polled_by() != PolledBy::Waiter {
                    thread::yield_now();
                }
                accepted.write_all(b"1").unwrap();
                while !stands_still.load(Ordering::SeqCst) {
                    thread::yield_now();
                }
                let (other, begun) = (Arc::clone(&reader), Arc::new(AtomicBool::new(false)));
                let waits = Arc::clone(&begun);
                let mut read = Box::pin(poll_fn(move |context| {
                    let mut byte = [0];
                    let mut buffer = ReadBuf::new(&mut byte);
                    runtime::drive(Arc::clone(&other) as Arc<dyn Driven>);
                    let read = Pin::new(&mut *other.socket.lock()).poll_read(context, &mut buffer);
                    begun.store(true, Ordering::SeqCst);
                    read.map(|read| read.map(|()| buffer.filled().to_vec()).unwrap())
                }));
                let limit = Boottime::now() + Duration::from_secs(60);
                let read = scope.spawn(move || match in_a_task {
                    false => block_on(until(limit, &mut read)).unwrap(),
                    true => {
                        let task = handle().unwrap().spawn(async move { until(limit, &mut read).await });
                        block_on(task).unwrap().unwrap()
                    }
                });
                while !waits.load(Ordering::SeqCst) {
                    thread::yield_now();
                }
                accepted.write_all(b"2").unwrap();
                let read = read.join().unwrap();
                go_on.store(true, Ordering::SeqCst);
                thread.join().unwrap().unwrap();
                assert_eq!(read, Some(b"2".to_vec()), "in a task: {in_a_task}");
            });
        }
    }

    /// A waiter that comes while a turn ends does not have to wait for the next check of the task.
    #[test]
    fn a_turn_that_was_shared_is_followed_by_the_librarys_thread() {
        let place = Place::new("shared-turn");
        let (socket, _server) = connected(&place);
        let poller = socket.poller();
        // Nearly always, the second turn follows the first at once.
        for _ in 0..100 {
            assert!(poller.begin());
            poller.end(false);
            assert!(poller.begin());
            poller.listen();
            poller.end(false);
            assert!(socket.shared.polling.lock().by == PolledBy::Listener);
        }
    }

    /// The library's thread ignores the event, so that no thread is woken besides the one whose turn it is.
    #[test]
    fn what_comes_when_a_turn_has_begun_is_left_to_it() {
        let place = Place::new("late-event");
        let (socket, _server) = connected(&place);
        let poller = socket.poller();
        let is_left = |events| socket.shared.is_read_by_others(events);
        let to_read = libc::EPOLLIN | libc::EPOLLRDHUP;
        assert!(!is_left(to_read));
        assert!(poller.begin());
        assert!(is_left(to_read));
        for others in [libc::EPOLLOUT, libc::EPOLLERR, libc::EPOLLHUP] {
            assert!(!is_left(to_read | others), "a writer waits in no turn");
        }
        poller.end(true);
        assert!(!is_left(to_read));
    }

    /// The library's thread may have left the event to the turn.
    #[test]
    fn what_comes_when_a_turn_begins_and_is_not_read_in_it_is_read_after_it() {
        let place = Place::new("unread-turn");
        let (mut socket, mut server) = connected(&place);
        let poller = socket.poller();
        for number in 0..100 {
            let mut space = [0; 8];
            let mut into = ReadBuf::new(&mut space);
            let mut reading = poll_fn(|context| Pin::new(&mut socket).poll_read(context, &mut into));
            assert!(Pin::new(&mut reading).poll(&mut Context::from_waker(Waker::noop())).is_pending());
            server.write_all(b"x").unwrap();
            assert!(poller.begin());
            // After a turn that is not the first and that is not shared, no thread polls the socket for a moment.
            poller.end(number % 2 == 0);
            let read = block_on(until(Boottime::now() + Duration::from_secs(60), &mut reading)).unwrap();
            assert!(read.is_some_and(|read| read.is_ok()), "round {number}");
        }
    }

    /// If the program has closed the descriptors, a thread that polls a socket cannot be woken. Its wait must still end
    /// at its timeout (R26).
    #[test]
    fn a_wait_that_nobody_can_end_is_not_longer_than_its_timeout() {
        struct Waits(SocketPoller);

        impl Driven for Waits {
            fn source(&self) -> &dyn Source {
                &self.0
            }

            fn take_in(&self) -> bool {
                true
            }

            fn awaited(&self) -> usize {
                0
            }
        }

        let place = Place::new("closed-signal");
        let (socket, _server) = connected(&place);
        let waits = Arc::new(Waits(socket.poller()));
        assert!(waits.0.begin());
        waits.0.end(false);
        let number = socket.shared.wake_signal.get().unwrap().unchecked_number();
        let (theirs, _writer) = pipe().unwrap();
        let in_time = (0..5).any(|_| {
            // SAFETY: two open descriptors.
            assert_eq!(unsafe { libc::dup3(theirs.as_raw_fd(), number, libc::O_CLOEXEC) }, number);
            let start = Boottime::now();
            let mut waiting = poll_fn(|_| {
                runtime::drive(Arc::clone(&waits) as Arc<dyn Driven>);
                Poll::<()>::Pending
            });
            assert!(block_on(until(start + Duration::from_millis(20), &mut waiting)).unwrap().is_none());
            Boottime::now().since(start) < LOOK
        });
        drop((waits, socket));
        // SAFETY: the number is the test's.
        unsafe { libc::close(number) };
        assert!(in_time, "each time it waited until it looked whether the descriptors are there");
    }

    /// Connecting neither occupies a thread nor waits forever.
    #[test]
    fn a_server_that_accepts_nothing_is_an_error_at_once() {
        let place = Place::new("full-socket");
        let server = UnixListener::bind(&place.0).unwrap();
        // SAFETY: an open descriptor.
        assert_eq!(unsafe { libc::listen(server.as_raw_fd(), 0) }, 0);
        let connected: Vec<_> = std::iter::from_fn(|| Socket::connect_unix(&place.0).ok()).collect();
        assert!(!connected.is_empty());
        let full = Socket::connect_unix(&place.0).err().unwrap();
        assert_eq!(full.kind(), io::ErrorKind::WouldBlock, "{full}");
        let (_accepted, _) = server.accept().unwrap();
        assert!(Socket::connect_unix(&place.0).is_ok());
    }

    #[test]
    fn paths_that_are_none_are_refused_in_words() {
        for path in ["", "/a\0b", &"x".repeat(108)] {
            let error = Socket::connect_unix(Path::new(path)).err().unwrap();
            assert!(error.to_string().contains("1 to 107 bytes"), "{error}");
        }
    }
}
