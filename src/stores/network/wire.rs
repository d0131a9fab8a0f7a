//! The socket of a connection: what waits to be written to it, what is read from it, and whether the server still
//! answers. What the bytes mean is the engine's.

use std::mem::MaybeUninit;
use std::pin::Pin;
use std::task::{Context, Poll, Waker};
use std::time::Duration;
use std::{future::Future, io};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::stream::Duplex;
use crate::clock::Boottime;
use crate::sys::runtime::{Sleep, sleep_until};

/// How many bytes are read at once.
const READ_SIZE: usize = 16 << 10;
/// How many reads the task of a connection does before it lets others run.
pub const READS_IN_A_ROW: usize = 16;
/// While more than this waits to be written, requests wait.
const MAX_UNWRITTEN: usize = 1 << 20;

pub struct Wire {
    stream: Box<dyn Duplex>,
    /// What waits to be written, behind what has been.
    pub out: Vec<u8>,
    written: usize,
    unflushed: bool,
    heard_at: Boottime,
    /// When the server was asked for a sign of life that it has not given yet.
    asked_at: Option<Boottime>,
    /// How long a reply may take before a sign of life is asked for, and how long that may take.
    patience: Duration,
    alarm: Sleep,
}

pub enum Received {
    Bytes,
    /// No bytes yet; the task is woken when there are.
    Nothing,
    /// The server has closed the connection.
    End,
}

/// What a server that says nothing calls for.
pub enum Silence {
    /// Ask for a sign of life.
    Ask,
    /// It has given none in time.
    TooLong,
}

impl Wire {
    pub fn new(stream: Box<dyn Duplex>, patience: Duration) -> Wire {
        let now = Boottime::now();
        Wire {
            stream,
            out: Vec::new(),
            written: 0,
            unflushed: false,
            heard_at: now,
            asked_at: None,
            patience,
            alarm: sleep_until(now + patience),
        }
    }

    pub fn has_room(&self) -> bool {
        self.out.len() - self.written < MAX_UNWRITTEN
    }

    /// Writes what the socket takes now.
    pub fn write(&mut self, context: &mut Context<'_>) -> io::Result<()> {
        while self.written < self.out.len() {
            match Pin::new(&mut self.stream).poll_write(context, &self.out[self.written..])? {
                Poll::Ready(0) => return Err(io::ErrorKind::WriteZero.into()),
                Poll::Ready(written) => {
                    self.written += written;
                    self.unflushed = true;
                }
                Poll::Pending => break,
            }
        }
        if self.written == self.out.len() {
            self.out.clear();
            self.written = 0;
            self.out.shrink_to(MAX_UNWRITTEN);
        }
        if self.unflushed && Pin::new(&mut self.stream).poll_flush(context)?.is_ready() {
            self.unflushed = false;
        }
        Ok(())
    }

    /// Reads once, and gives `take` the bytes that there are, with the present time.
    pub fn read(
        &mut self,
        context: &mut Context<'_>,
        take: impl FnOnce(&[u8], Boottime) -> io::Result<()>,
    ) -> io::Result<Received> {
        let mut space = [MaybeUninit::uninit(); READ_SIZE];
        let mut buffer = ReadBuf::uninit(&mut space);
        match Pin::new(&mut self.stream).poll_read(context, &mut buffer)? {
            Poll::Pending => return Ok(Received::Nothing),
            Poll::Ready(()) if buffer.filled().is_empty() => return Ok(Received::End),
            Poll::Ready(()) => {}
        }
        self.heard_at = Boottime::now();
        self.asked_at = None;
        take(buffer.filled(), self.heard_at)?;
        Ok(Received::Bytes)
    }

    /// Ready when the server has said nothing for too long. `idle`: nobody waits for a reply. Asking now and then is
    /// then for routers, which forget silent connections.
    pub fn poll_silence(&mut self, context: &mut Context<'_>, idle: bool) -> Poll<Silence> {
        let allowed = if idle { self.patience * 8 } else { self.patience };
        while Pin::new(&mut self.alarm).poll(context).is_ready() {
            let now = Boottime::now();
            let due = match self.asked_at {
                Some(asked_at) if asked_at + self.patience <= now => return Poll::Ready(Silence::TooLong),
                Some(asked_at) => {
                    self.alarm = sleep_until(asked_at + self.patience);
                    continue;
                }
                None => self.heard_at + allowed <= now,
            };
            self.alarm = sleep_until(now + self.patience);
            if due {
                self.asked_at = Some(now);
                return Poll::Ready(Silence::Ask);
            }
        }
        Poll::Pending
    }

    /// Ends the socket, also where a forked child has inherited it.
    pub fn shut_down(&mut self) {
        let _ = Pin::new(&mut self.stream).poll_shutdown(&mut Context::from_waker(Waker::noop()));
    }
}
