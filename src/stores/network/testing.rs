//! Sockets for tests of connections.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::sys::mutex::Mutex;

/// A socket whose other end is the test.
#[derive(Clone, Default)]
pub struct Scripted(pub Arc<Mutex<Script>>);

#[derive(Default)]
pub struct Script {
    /// What it has to say.
    pub says: Vec<u8>,
    /// It has hung up.
    pub has_ended: bool,
    /// It takes nothing.
    pub is_full: bool,
    /// Writing to it fails.
    pub is_broken: bool,
    /// What it took.
    pub taken: Vec<u8>,
    writer: Option<Waker>,
}

impl Scripted {
    pub fn saying(says: &[u8]) -> Scripted {
        Scripted(Arc::new(Mutex::new(Script { says: says.to_vec(), ..Script::default() })))
    }

    /// It takes everything again.
    pub fn make_room(&self) {
        let writer = {
            let mut script = self.0.lock();
            script.is_full = false;
            script.writer.take()
        };
        writer.into_iter().for_each(Waker::wake);
    }
}

impl AsyncWrite for Scripted {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let mut script = self.0.lock();
        if script.is_broken {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        }
        if script.is_full {
            script.writer = Some(context.waker().clone());
            return Poll::Pending;
        }
        script.taken.extend_from_slice(bytes);
        Poll::Ready(Ok(bytes.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

impl AsyncRead for Scripted {
    fn poll_read(self: Pin<&mut Self>, _: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let mut script = self.0.lock();
        match script.says.len().min(into.remaining()) {
            0 if !script.has_ended => Poll::Pending,
            length => {
                into.put_slice(&script.says.drain(..length).collect::<Vec<u8>>());
                Poll::Ready(Ok(()))
            }
        }
    }
}
