//! Getting a connection: names to addresses, sockets, TLS, handshake, and which host to try next.

use std::future::{Future, poll_fn};
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::pki_types::ServerName;

use super::handshake;
use super::tls;
use super::url::{Address, Config, Secret};
use super::wire::Stream;
use crate::clock::Boottime;
use crate::runtime::until;
use crate::sockets::{self, Socket};
use crate::store::{StoreError, StoreErrorKind};

/// How long one host has before the next is tried beside it.
const HEAD_START: Duration = Duration::from_millis(300);

/// A server that took us in.
pub struct Connected {
    pub stream: Box<dyn Stream>,
    /// Which host of the URL it is.
    pub host: usize,
    pub version: String,
    /// Until when it must have answered its first query.
    pub limit: Boottime,
}

/// A host on the way to a connection.
type Dialling = Pin<Box<dyn Future<Output = Result<Connected, StoreError>> + Send>>;

/// Reaches one of the hosts, `first` before the others. Which one answers first wins.
///
/// Ends within the connect deadline of the last host. If none can be reached, the error is the one
/// that says most: a refusal rather than silence.
pub async fn dial(config: &Arc<Config>, first: usize) -> Result<Connected, StoreError> {
    let connector = match &config.tls {
        Some(tls) => Some(tls::connector(tls)?),
        None => None,
    };
    let count = config.hosts.len();
    let mut waiting = (0..count).map(|offset| (first + offset) % count);
    let mut trying: Vec<Dialling> = Vec::new();
    let mut errors: Vec<StoreError> = Vec::new();
    let mut next_at = Boottime::now();
    loop {
        if trying.is_empty() || next_at.has_passed() {
            match waiting.next() {
                Some(host) => {
                    trying.push(Box::pin(one_host(Arc::clone(config), host, connector.clone())));
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
            Some(Ok(connected)) => return Ok(connected),
            Some(Err(error)) => {
                errors.push(error);
                next_at = Boottime::now();
            }
            None => {}
        }
    }
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

async fn one_host(config: Arc<Config>, host: usize, tls: Option<TlsConnector>) -> Result<Connected, StoreError> {
    let address = &config.hosts[host];
    let limit = Boottime::now() + config.connect_timeout;
    let mut attempt = Box::pin(connect(&config, address, tls.as_ref(), limit));
    let result = match until(limit, &mut attempt).await {
        Some(result) => result,
        None => Err(StoreError::unreachable(format!("no answer within {:?}", config.connect_timeout))),
    };
    match result {
        Ok((stream, version)) => Ok(Connected { stream, host, version, limit }),
        Err(error) => Err(StoreError::new(error.kind, format!("{address}: {}", error.message))),
    }
}

async fn connect(
    config: &Config,
    address: &Address,
    tls: Option<&TlsConnector>,
    limit: Boottime,
) -> Result<(Box<dyn Stream>, String), StoreError> {
    let socket = socket(address, limit).await?;
    let mut stream: Box<dyn Stream> = match tls.zip(config.tls.as_ref()) {
        None => Box::new(socket),
        Some((connector, tls)) => {
            let name = ServerName::try_from(address.name.clone())
                .map_err(|_| StoreError::bad_config("TLS needs a host name or an address"))?;
            let secured = connector.connect(name, socket).await;
            Box::new(secured.map_err(|error| tls::explain(&error, tls, &address.name))?)
        }
    };
    let shaken = handshake::shake_hands(&mut *stream, &config.user, &config.password, tls.is_some()).await;
    let version = shaken.map_err(|error| match error.kind {
        StoreErrorKind::Denied if error.message.contains("refused the connection") => {
            StoreError::new(error.kind, denied(&config.user, &config.password, &error.message))
        }
        _ => error,
    })?;
    Ok((stream, version))
}

fn denied(user: &str, password: &Secret, said: &str) -> String {
    let with = if password.0.is_empty() { "without a password" } else { "with the password given" };
    format!("user {user:?} was not let in {with}: {said}")
}

/// A socket to the first address of the host that takes it; each has its share of the time.
async fn socket(address: &Address, limit: Boottime) -> Result<Socket, StoreError> {
    let found: Vec<SocketAddr> = sockets::resolve(&address.name, address.port)
        .await
        .map_err(|error| StoreError::unreachable(format!("the host name was not resolved: {error}")))?;
    let mut last = io::Error::new(io::ErrorKind::NotFound, "the host name has no address");
    for (index, one) in found.iter().enumerate() {
        let left = limit.since(Boottime::now());
        let share = left / u32::try_from(found.len() - index).unwrap_or(u32::MAX);
        let mut attempt = Box::pin(Socket::connect(*one, share));
        match until(Boottime::now() + share, &mut attempt).await {
            Some(Ok(socket)) => return Ok(socket),
            Some(Err(error)) => last = error,
            None => last = io::ErrorKind::TimedOut.into(),
        }
    }
    Err(match last.raw_os_error() {
        Some(libc::EMFILE | libc::ENFILE | libc::ENOMEM | libc::ENOBUFS) => {
            StoreError::resources(format!("no socket could be made: {last}"))
        }
        _ => StoreError::unreachable(format!("{last}")),
    })
}
