//! Bytes to and from a server, before the connection has a task of its own.

use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::task::ready;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::tls;
use crate::store::StoreError;

/// What carries a connection: a socket, or TLS over one.
pub trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

/// Writes all of `bytes`.
pub async fn write(stream: &mut dyn Stream, mut bytes: &[u8]) -> Result<(), StoreError> {
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

/// Reads what there is, 1 KiB at most, once there is something. Nothing: the other end has hung up.
pub async fn read(stream: &mut dyn Stream) -> Result<Vec<u8>, StoreError> {
    let mut space = [0; 1024];
    let mut buffer = ReadBuf::new(&mut space);
    match poll_fn(|context| Pin::new(&mut *stream).poll_read(context, &mut buffer)).await {
        Ok(()) => Ok(buffer.filled().to_vec()),
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(Vec::new()),
        Err(error) => Err(broken(&error)),
    }
}

/// A connection that ended.
pub fn broken(error: &io::Error) -> StoreError {
    tls::refused(error).unwrap_or_else(|| StoreError::unreachable(format!("the connection broke: {}", why(error))))
}

/// Why a connection ended.
pub fn why(error: &io::Error) -> String {
    match error.kind() {
        // TLS has a word for goodbye, which few say.
        io::ErrorKind::UnexpectedEof => "the server hung up".to_string(),
        _ => error.to_string(),
    }
}
