//! A socket to a server, in the clear or by TLS as PostgreSQL begins it.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::clock::Boottime;
use crate::store::StoreError;
use crate::stores::network::address::Address;
use crate::stores::network::dial;
use crate::stores::network::stream::{self, Stream};
use crate::stores::network::tls::Connector;

pub async fn open(address: &Address, tls: Option<&Connector>, limit: Boottime) -> Result<Stream, StoreError> {
    let mut socket = dial::socket(address, limit).await?;
    match tls {
        None => Ok(socket),
        Some(tls) => {
            ask_for_tls(&mut socket).await?;
            dial::secure(socket, address, tls).await
        }
    }
}

/// PostgreSQL's request for TLS, and its answer (protocol documentation, "SSL Session Encryption").
async fn ask_for_tls(socket: &mut Stream) -> Result<(), StoreError> {
    stream::write(socket, &[0, 0, 0, 8, 0x04, 0xd2, 0x16, 0x2f]).await?;
    match stream::read(socket).await?.as_slice() {
        b"S" => Ok(()),
        b"N" => Err(StoreError::bad_config(
            "the server has no TLS: set it up there (ssl = on), or write sslmode=disable in the store URL",
        )),
        [] => Err(StoreError::unreachable("the server closed the connection when it was asked for TLS")),
        // What comes in the clear behind the answer would be taken for the server's.
        [b'S', ..] => Err(StoreError::bad_config("the server sent unexpected data when it was asked for TLS")),
        _ => Err(StoreError::bad_config("the server on this port is not a PostgreSQL server")),
    }
}

/// A socket that ignores being shut down. A pooler drops a request whose sender has hung up.
pub struct KeptOpen(pub Stream);

impl AsyncRead for KeptOpen {
    fn poll_read(mut self: Pin<&mut Self>, context: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_read(context, into)
    }
}

impl AsyncWrite for KeptOpen {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(context)
    }

    fn poll_shutdown(self: Pin<&mut Self>, _context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}
