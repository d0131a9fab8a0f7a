//! Waiting for the store's answer, and for signals, on the one thread of `nblock run`.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::task::{Context, Poll, Wake, Waker};

use nblock::error::{Error, ErrorKind};
use nblock::store::Answer;
use nblock::sys::runtime;

use super::signals::{Arrived, Signals, stop_with_group};

/// A signal that asks us to end came first.
pub struct Interrupted(pub libc::c_int);

/// The answer, or the signal that came before it; then the operation is cancelled. A stop (^Z) is
/// obeyed.
pub fn answer<T>(signals: &Signals, answer: Answer<T, Error>) -> Result<Result<T, Error>, Interrupted> {
    let mut future = match answer {
        Answer::Now(result) => return Ok(result),
        Answer::Later(future) => future,
    };
    // Its threads and timers are what wakes us.
    if let Err(error) = runtime::handle() {
        return Ok(Err(error));
    }
    let wake_pipe = match WakePipe::new() {
        Ok(wake_pipe) => Arc::new(wake_pipe),
        Err(error) => {
            return Ok(Err(Error::new(ErrorKind::Resources, format!("no file descriptor could be created: {error}"))));
        }
    };
    let waker = Waker::from(Arc::clone(&wake_pipe));
    let mut context = Context::from_waker(&waker);
    loop {
        if let Poll::Ready(result) = future.as_mut().poll(&mut context) {
            return Ok(result);
        }
        wait_readable(&[signals.descriptor(), wake_pipe.0.as_raw_fd()]);
        wake_pipe.clear();
        while let Some(signal) = signals.next() {
            match signal {
                Arrived::End(signal) | Arrived::User(signal) => return Err(Interrupted(signal)),
                Arrived::Stop => drop(stop_with_group()),
                Arrived::Child => signals.reap_orphans(),
                Arrived::Continue | Arrived::Resized => {}
            }
        }
    }
}

/// Waits until one of the descriptors is readable. Negative ones are not waited for.
pub fn wait_readable(descriptors: &[RawFd]) {
    let mut polled: Vec<_> =
        descriptors.iter().map(|&fd| libc::pollfd { fd, events: libc::POLLIN, revents: 0 }).collect();
    // SAFETY: so many pollfds.
    while unsafe { libc::poll(polled.as_mut_ptr(), polled.len() as libc::nfds_t, -1) } < 0
        && io::Error::last_os_error().kind() == io::ErrorKind::Interrupted
    {}
}

/// Wakes the thread that polls its descriptor.
struct WakePipe(OwnedFd);

impl WakePipe {
    fn new() -> io::Result<WakePipe> {
        // SAFETY: makes a descriptor, which nobody else has.
        match unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) } {
            -1 => Err(io::Error::last_os_error()),
            // SAFETY: as above.
            descriptor => Ok(WakePipe(unsafe { OwnedFd::from_raw_fd(descriptor) })),
        }
    }

    fn clear(&self) {
        let mut count = 0u64;
        // SAFETY: reads eight bytes into as many.
        unsafe { libc::read(self.0.as_raw_fd(), (&raw mut count).cast(), 8) };
    }
}

impl Wake for WakePipe {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        let one = 1u64;
        // SAFETY: writes the eight bytes of `one`.
        unsafe { libc::write(self.0.as_raw_fd(), (&raw const one).cast(), 8) };
    }
}
