//! Bytes to and from a server.

use std::future::poll_fn;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio_rustls::client::TlsStream;

use super::tls::{self, OptionNames};
use crate::store::StoreError;
use crate::sys::sockets::{Socket, SocketPoller};

/// A connection to a server.
pub enum Stream {
    Tcp(Socket),
    Unix(Socket),
    /// Its state is large beside a bare socket's.
    Tls(Box<TlsStream<Socket>>),
}

impl Stream {
    pub fn is_secured(&self) -> bool {
        matches!(self, Stream::Tls(_))
    }

    fn socket(&self) -> &Socket {
        match self {
            Stream::Tcp(socket) | Stream::Unix(socket) => socket,
            Stream::Tls(stream) => stream.get_ref().0,
        }
    }

    /// The addresses of our end and of the other, as far as it has them.
    pub fn ends(&self) -> Option<(SocketAddr, SocketAddr)> {
        self.socket().ends()
    }

    /// What polls its socket.
    pub fn poller(&self) -> SocketPoller {
        self.socket().poller()
    }
}

/// Calls the same method on whichever stream it is.
macro_rules! each {
    ($stream:expr, $method:ident ( $($argument:expr),* )) => {
        match $stream.get_mut() {
            Stream::Tcp(stream) | Stream::Unix(stream) => Pin::new(stream).$method($($argument),*),
            Stream::Tls(stream) => Pin::new(stream).$method($($argument),*),
        }
    };
}

impl AsyncRead for Stream {
    fn poll_read(self: Pin<&mut Self>, context: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        each!(self, poll_read(context, into))
    }
}

impl AsyncWrite for Stream {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        each!(self, poll_write(context, bytes))
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        each!(self, poll_flush(context))
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        each!(self, poll_shutdown(context))
    }
}

/// What a greeting needs of a connection: a [`Stream`], or what a test puts in its place.
pub trait Duplex: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Duplex for T {}

/// Writes all of `bytes`.
pub async fn write(stream: &mut dyn Duplex, mut bytes: &[u8]) -> Result<(), StoreError> {
    poll_fn(|context| {
        while !bytes.is_empty() {
            let written = ready!(Pin::new(&mut *stream).poll_write(context, bytes))?;
            if written == 0 {
                return Err(io::Error::from(io::ErrorKind::WriteZero)).into();
            }
            bytes = &bytes[written..];
        }
        Pin::new(&mut *stream).poll_flush(context)
    })
    .await
    .map_err(|error| broken(&error))
}

/// Reads what there is, 1 KiB at most, once there is something. Empty: the other end has closed the connection.
pub async fn read(stream: &mut dyn Duplex) -> Result<Vec<u8>, StoreError> {
    let mut space = [0; 1024];
    let mut buffer = ReadBuf::new(&mut space);
    match poll_fn(|context| Pin::new(&mut *stream).poll_read(context, &mut buffer)).await {
        Ok(()) => Ok(buffer.filled().to_vec()),
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(Vec::new()),
        Err(error) => Err(broken(&error)),
    }
}

/// The error of a connection that ended.
pub fn broken(error: &io::Error) -> StoreError {
    let refused = tls::refused(error, OptionNames::USUAL);
    refused.unwrap_or_else(|| StoreError::unreachable(format!("the connection broke: {}", why(error))))
}

/// Why a connection ended.
pub fn why(error: &io::Error) -> String {
    match error.kind() {
        // TLS has a word for goodbye, which few say.
        io::ErrorKind::UnexpectedEof => "the server closed the connection".to_string(),
        _ => error.to_string(),
    }
}
