//! What the tests of this room share.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::connection::{Connection, Driver};
use super::server_info::{Introduction, ServerInfo};
use crate::clock::Boottime;
use crate::stores::network::skew::Clocks;
use crate::stores::network::stream::Duplex;
use crate::sys::mutex::Mutex;
use crate::sys::sockets::SocketPoller;

/// A small generator of numbers (xorshift64*) whose seed is printed, so that a failure can be run
/// again with `NBLOCK_TEST_SEED`.
pub struct Random(u64);

impl Random {
    pub fn seeded() -> Random {
        let seed = std::env::var("NBLOCK_TEST_SEED")
            .ok()
            .and_then(|seed| seed.parse().ok())
            .unwrap_or_else(|| u64::from_le_bytes(crate::sys::random::random()));
        println!("NBLOCK_TEST_SEED={seed}");
        Random(seed | 1)
    }

    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D)
    }

    /// A number below `bound`; 0 where it is 0.
    pub fn below(&mut self, bound: usize) -> usize {
        (self.next() >> 16) as usize % bound.max(1)
    }
}

/// A socket that takes everything, and says nothing.
#[derive(Clone, Default)]
pub struct Written(pub Arc<Mutex<Vec<u8>>>);

impl AsyncWrite for Written {
    fn poll_write(self: Pin<&mut Self>, _: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.0.lock().extend_from_slice(bytes);
        Poll::Ready(Ok(bytes.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

impl AsyncRead for Written {
    fn poll_read(self: Pin<&mut Self>, _: &mut Context<'_>, _: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Poll::Pending
    }
}

pub fn connection(written: &Written) -> (Connection, Driver) {
    connection_over(Box::new(written.clone()))
}

pub fn connection_over(stream: Box<dyn Duplex>) -> (Connection, Driver) {
    let at = Boottime::now();
    let introduction = Introduction { id: None, name: None, now_ms: 1000, sent: at, received: at };
    let info = ServerInfo::new("h".into(), "2".into(), introduction, &Clocks::new("", Duration::ZERO), 1);
    Connection::new(stream, SocketPoller::default(), Arc::new(info), Duration::from_secs(60))
}
