//! Reaching a server: names to addresses, sockets, TLS, and which host is tried next.

use std::future::{Future, poll_fn};
use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::pin::Pin;
use std::task::Poll;
use std::time::Duration;

use super::address::Address;
use super::stream::Stream;
use super::tls::Connector;
use crate::clock::Boottime;
use crate::store::{StoreError, StoreErrorKind};
use crate::sys::runtime::until;
use crate::sys::sockets::{self, Socket};

/// How long one host has before the next is tried beside it.
const HEAD_START: Duration = Duration::from_millis(300);

/// A server that was reached.
pub struct Reached<T> {
    /// Its result.
    pub value: T,
    /// Which host of the URL it is.
    pub host: usize,
    /// The end of the time that it had for connecting.
    pub limit: Boottime,
}

/// One host on the way to a connection.
pub type Reaching<'a, T> = Pin<Box<dyn Future<Output = Result<T, StoreError>> + Send + 'a>>;

/// Reaches one of the hosts by `reach`, the one numbered `first` before the others. Which one answers first wins.
///
/// `reach` also gets the end of the time that the host has for it, `connect_timeout` from its start; it is dropped
/// then. If no host can be reached, the error is the one that says most: a refusal rather than silence. Each
/// host's message begins with its address.
pub async fn first_of<'a, T>(
    hosts: &'a [Address],
    first: usize,
    connect_timeout: Duration,
    reach: impl Fn(&'a Address, Boottime) -> Reaching<'a, T>,
) -> Result<Reached<T>, StoreError> {
    let mut waiting = (0..hosts.len()).map(|offset| (first + offset) % hosts.len());
    let mut trying = Vec::new();
    let mut errors: Vec<StoreError> = Vec::new();
    let mut next_at = Boottime::now();
    loop {
        if trying.is_empty() || next_at.has_passed() {
            match waiting.next() {
                Some(host) => {
                    let limit = Boottime::now() + connect_timeout;
                    let reaching = reach(&hosts[host], limit);
                    trying.push(Box::pin(one_host(&hosts[host], host, limit, connect_timeout, reaching)));
                    next_at = Boottime::now() + HEAD_START;
                }
                None if trying.is_empty() => return Err(what_says_most(errors)),
                None => next_at = Boottime::NEVER,
            }
        }
        let mut step = poll_fn(|context| {
            for index in 0..trying.len() {
                if let Poll::Ready(result) = trying[index].as_mut().poll(context) {
                    drop(trying.swap_remove(index));
                    return Poll::Ready(result);
                }
            }
            Poll::Pending
        });
        match until(next_at, &mut step).await {
            Some(Ok(reached)) => return Ok(reached),
            Some(Err(error)) => {
                errors.push(error);
                next_at = Boottime::now();
            }
            None => {}
        }
    }
}

async fn one_host<T>(
    address: &Address,
    host: usize,
    limit: Boottime,
    connect_timeout: Duration,
    mut reaching: Reaching<'_, T>,
) -> Result<Reached<T>, StoreError> {
    match until(limit, &mut reaching).await.unwrap_or_else(|| Err(no_answer(connect_timeout))) {
        Ok(value) => Ok(Reached { value, host, limit }),
        Err(error) => Err(StoreError::new(error.kind, format!("{address}: {}", error.message))),
    }
}

/// The error of a server that said nothing in its time.
pub fn no_answer(connect_timeout: Duration) -> StoreError {
    StoreError::unreachable(format!("no answer within {connect_timeout:?}"))
}

/// Of the errors of all hosts: for good only if every one is.
fn what_says_most(errors: Vec<StoreError>) -> StoreError {
    let passing = |error: &&StoreError| error.kind == StoreErrorKind::Unreachable;
    let kind = match errors.iter().find(passing) {
        Some(_) => StoreErrorKind::Unreachable,
        None => errors
            .iter()
            .find(|error| error.kind == StoreErrorKind::Denied)
            .or(errors.first())
            .map_or(StoreErrorKind::Unreachable, |error| error.kind),
    };
    let messages: Vec<&str> = errors.iter().map(|error| &*error.message).collect();
    StoreError::new(kind, messages.join("; "))
}

/// A connection to one host, with TLS where `tls` is given.
pub async fn connect(address: &Address, tls: Option<&Connector>, limit: Boottime) -> Result<Stream, StoreError> {
    let socket = socket(address, limit).await?;
    match tls {
        None => Ok(socket),
        Some(tls) => secure(socket, address, tls).await,
    }
}

/// Sets TLS up on a bare connection.
pub async fn secure(socket: Stream, address: &Address, tls: &Connector) -> Result<Stream, StoreError> {
    match (socket, address) {
        (Stream::Tcp(socket), Address::Tcp { host, .. }) => Ok(Stream::Tls(Box::new(tls.secure(socket, host).await?))),
        _ => Err(StoreError::bad_config(
            "a Unix socket cannot be used with TLS: remove the TLS options from the store \
             URL, or name a host",
        )),
    }
}

/// A bare connection to one host: to the first of its addresses that takes it, each having its share of the time
/// until `limit`.
pub async fn socket(address: &Address, limit: Boottime) -> Result<Stream, StoreError> {
    match address {
        Address::Tcp { host, port } => tcp(host, *port, limit).await,
        Address::Unix(path) => unix(path),
    }
}

async fn tcp(host: &str, port: u16, limit: Boottime) -> Result<Stream, StoreError> {
    let found: Vec<SocketAddr> = sockets::resolve(host, port)
        .await
        .map_err(|error| StoreError::unreachable(format!("the host name could not be resolved: {error}")))?;
    let mut last = io::Error::new(io::ErrorKind::NotFound, "the host name has no address");
    for (index, one) in found.iter().enumerate() {
        let left = limit.since(Boottime::now());
        let share = left / u32::try_from(found.len() - index).unwrap_or(u32::MAX);
        let mut attempt = Box::pin(Socket::connect(*one, share));
        match until(Boottime::now() + share, &mut attempt).await {
            Some(Ok(socket)) => return Ok(Stream::Tcp(socket)),
            Some(Err(error)) => last = error,
            None => last = io::ErrorKind::TimedOut.into(),
        }
    }
    Err(no_socket(&last))
}

fn unix(path: &Path) -> Result<Stream, StoreError> {
    Socket::connect_unix(path).map(Stream::Unix).map_err(|error| match error.kind() {
        // Not trouble of the server's, and asking again would not help.
        io::ErrorKind::PermissionDenied => StoreError::new(StoreErrorKind::Denied, error.to_string()),
        io::ErrorKind::InvalidInput => StoreError::bad_config(error.to_string()),
        _ => no_socket(&error),
    })
}

fn no_socket(error: &io::Error) -> StoreError {
    match error.raw_os_error() {
        Some(libc::EMFILE | libc::ENFILE | libc::ENOMEM | libc::ENOBUFS) => {
            StoreError::resources(format!("no socket could be created: {error}"))
        }
        _ => StoreError::unreachable(error.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::super::stream;
    use super::*;
    use crate::sys::runtime::{block_on, handle};

    fn hosts(count: u16) -> Vec<Address> {
        (1..=count).map(|port| Address::Tcp { host: "h".into(), port }).collect()
    }

    fn port(address: &Address) -> u16 {
        let Address::Tcp { port, .. } = address else { panic!("{address}") };
        *port
    }

    /// Reaches hosts as `reach` says, which answers by port; `None`: never.
    fn reach(
        count: u16,
        first: usize,
        timeout: Duration,
        reach: impl Fn(u16) -> Option<Result<u16, StoreError>>,
    ) -> Result<(u16, usize), StoreError> {
        let hosts = hosts(count);
        let reaching = Box::pin(first_of(&hosts, first, timeout, |address, _| {
            let answer = reach(port(address));
            Box::pin(async move {
                match answer {
                    Some(answer) => answer,
                    None => std::future::pending().await,
                }
            })
        }));
        block_on(reaching).unwrap().map(|reached| (reached.value, reached.host))
    }

    const LONG: Duration = Duration::from_secs(600);

    #[test]
    fn a_host_that_is_silent_or_refuses_keeps_nobody_from_the_next() {
        assert_eq!(reach(3, 1, LONG, |port| Some(Ok(port))), Ok((2, 1)));
        assert_eq!(reach(3, 2, LONG, |port| (port == 2).then_some(Ok(port))), Ok((2, 1)));
        let refusing = |port| Some(if port == 1 { Ok(port) } else { Err(StoreError::unreachable("no")) });
        assert_eq!(reach(3, 1, LONG, refusing), Ok((1, 0)));
    }

    #[test]
    fn the_error_of_all_hosts_is_for_good_only_if_each_is() {
        let denied = || StoreError::new(StoreErrorKind::Denied, "wrong password");
        let error = reach(2, 0, LONG, |_| Some(Err(denied()))).unwrap_err();
        assert_eq!((error.kind, &*error.message), (StoreErrorKind::Denied, "h:1: wrong password; h:2: wrong password"));
        let mixed = |port| (port == 1).then(|| Err(denied()));
        let error = reach(2, 0, Duration::from_millis(1), mixed).unwrap_err();
        assert_eq!(error.kind, StoreErrorKind::Unreachable);
        assert!(error.message.contains("h:2: no answer within 1ms"), "{error}");
    }

    #[test]
    fn unix_sockets() {
        let unique = Boottime::now().as_nanos();
        let path = std::env::temp_dir().join(format!("nblock-socket-{}-{unique}", std::process::id()));
        let address = Address::Unix(path.clone());
        let limit = Boottime::now() + LONG;
        let connecting = |address: Address| {
            let connecting = async move { connect(&address, None, limit).await };
            block_on(handle().unwrap().spawn(connecting)).unwrap().unwrap()
        };
        let error = connecting(address.clone()).err().unwrap();
        assert_eq!(error.kind, StoreErrorKind::Unreachable, "{error}");

        let listener = UnixListener::bind(&path).unwrap();
        let mut stream = connecting(address).unwrap();
        let (mut server, _) = listener.accept().unwrap();
        std::fs::remove_file(&path).unwrap();
        std::io::Write::write_all(&mut server, b"hello").unwrap();
        let greeted = block_on(handle().unwrap().spawn(async move {
            stream::write(&mut stream, b"hi").await?;
            stream::read(&mut stream).await
        }));
        assert_eq!(greeted.unwrap().unwrap().unwrap(), b"hello");
        let mut heard = Vec::new();
        std::io::Read::read_to_end(&mut server, &mut heard).unwrap();
        assert_eq!(heard, b"hi");
    }
}
