//! The first words with a server: who it is, who we are, what it can, and its clock.

use std::fmt;

use super::failure;
use super::resp::{self, Decoder, Value};
use super::url::{Config, Sentinel};
use crate::clock::Boottime;
use crate::store::{StoreError, StoreErrorKind};
use crate::stores::network::address::Address;
use crate::stores::network::skew::{Clocks, Offset};
use crate::stores::network::stream::{self, Duplex};
use crate::sys::mutex::Mutex;

/// A server that has let us in.
pub struct Introduction {
    pub software: String,
    pub version: String,
    /// Whether it tells of changes.
    pub tells: bool,
    /// Its time, and when it was asked for that and had answered.
    pub now_ms: u64,
    pub sent: Boottime,
    pub received: Boottime,
}

/// The server of a connection.
pub struct ServerInfo {
    pub address: String,
    pub software: String,
    pub version: String,
    offset: Mutex<Offset>,
}

impl ServerInfo {
    pub fn new(address: &Address, introduction: Introduction, clocks: &Clocks) -> ServerInfo {
        let Introduction { software, version, now_ms, sent, received, .. } = introduction;
        let address = address.to_string();
        let offset = Mutex::new(clocks.observe(&address, &address, sent, received, now_ms));
        ServerInfo { address, software, version, offset }
    }

    /// What is known of its clock.
    pub fn offset(&self) -> Offset {
        *self.offset.lock()
    }

    /// Notes a time that it answered with, in milliseconds since 1970.
    pub fn observe(&self, clocks: &Clocks, sent: Boottime, received: Boottime, now_ms: u64) {
        let offset = clocks.observe(&self.address, &self.address, sent, received, now_ms);
        *self.offset.lock() = offset;
    }
}

impl fmt::Display for ServerInfo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} at {}", self.software, self.version, self.address)
    }
}

/// Says who we are, and hears who answers. A server that can grant nothing is refused with a reason.
pub async fn greet(stream: &mut dyn Duplex, config: &Config) -> Result<Introduction, StoreError> {
    let mut hello: Vec<&[u8]> = vec![b"HELLO", b"3"];
    if config.user.is_some() || config.password.is_some() {
        let user = config.user.as_deref().unwrap_or("default");
        let password = config.password.as_ref().map_or("", |password| password.0.as_str());
        hello.extend([&b"AUTH"[..], user.as_bytes(), password.as_bytes()]);
    }
    let hello = ask(stream, &[&hello]).await?.remove(0);
    if let Value::Error(said) = &hello {
        let said = failure::without_arguments(said);
        return Err(match said.contains("unknown command") || said.starts_with("NOPROTO") {
            true => StoreError::bad_config(format!(
                "the server does not speak RESP3: Redis 6.0 or later, or Valkey, is needed ({said})"
            )),
            false => failure::error(said, "HELLO", config),
        });
    }
    let text = |name: &str| hello.field(name).and_then(Value::as_text).map(str::to_string);
    match text("mode").as_deref() {
        Some("cluster") => {
            return Err(StoreError::bad_config(
                "the server is part of a Redis Cluster, which is not supported: name a server that stands alone, or has \
                 sentinels",
            ));
        }
        Some("sentinel") => {
            return Err(StoreError::bad_config("the server is a sentinel: write redis+sentinel://host/NAME"));
        }
        _ => {}
    }
    if text("role").is_some_and(|role| role != "master") {
        return Err(StoreError::unreachable("the server is a replica, which takes no locks: name its primary"));
    }
    let database = config.database.to_string();
    let select: &[&[u8]] = &[b"SELECT", database.as_bytes()];
    let tracking: &[&[u8]] = &[b"CLIENT", b"TRACKING", b"ON", b"OPTIN"];
    // It holds for the command behind it.
    let caching: &[&[u8]] = &[b"CLIENT", b"CACHING", b"YES"];
    let sent = Boottime::now();
    let mut wanted: Vec<&[&[u8]]> = vec![&[b"TIME"]];
    if config.database > 0 {
        wanted.push(select);
    }
    if config.notify {
        wanted.extend([tracking, caching, &[b"PING"]]);
    }
    let mut replies = ask(stream, &wanted).await?.into_iter();
    let received = Boottime::now();
    let now_ms = match replies.next() {
        Some(Value::Error(said)) => return Err(failure::error(&said, "TIME", config)),
        Some(time) => milliseconds(&time).ok_or_else(StoreError::unexpected_reply)?,
        None => return Err(StoreError::unexpected_reply()),
    };
    if config.database > 0
        && let Some(Value::Error(said)) = replies.next()
    {
        return Err(match said.contains("NOPERM") {
            true => failure::error(&said, "SELECT", config),
            false => StoreError::bad_config(format!("database {database} could not be selected: {said}")),
        });
    }
    let refused = replies.find_map(|reply| match reply {
        Value::Error(said) => Some(said),
        _ => None,
    });
    if let Some(said) = &refused {
        tracing::warn!(
            "the server does not notify of changes ({}): waiters poll, at most every {:?}",
            failure::without_arguments(said),
            config.poll
        );
    }
    Ok(Introduction {
        software: match text("server").as_deref() {
            Some("valkey") => "Valkey".to_string(),
            Some("redis") | None => "Redis".to_string(),
            Some(other) => other.to_string(),
        },
        version: text("version").unwrap_or_default(),
        tells: config.notify && refused.is_none(),
        now_ms,
        sent,
        received,
    })
}

/// The milliseconds of what TIME answers: seconds and microseconds.
pub fn milliseconds(time: &Value) -> Option<u64> {
    let Value::Array(parts) = time else { return None };
    let number = |index: usize| parts.get(index)?.as_text()?.parse::<u64>().ok();
    number(0)?.checked_mul(1000)?.checked_add(number(1)? / 1000)
}

/// Asks a sentinel where the primary is.
pub async fn find_primary(
    stream: &mut dyn Duplex,
    sentinel: &Sentinel,
    config: &Config,
) -> Result<Address, StoreError> {
    let Sentinel { name, user, password } = sentinel;
    if let Some(password) = password {
        let mut auth: Vec<&[u8]> = vec![b"AUTH"];
        auth.extend(user.as_deref().map(str::as_bytes));
        auth.push(password.0.as_bytes());
        if let Value::Error(said) = ask(stream, &[&auth]).await?.remove(0) {
            let said = failure::without_arguments(&said);
            return Err(StoreError::new(StoreErrorKind::Denied, format!("the sentinel denied access: {said}")));
        }
    }
    let question: &[&[u8]] = &[b"SENTINEL", b"GET-MASTER-ADDR-BY-NAME", name.as_bytes()];
    match ask(stream, &[question]).await?.remove(0) {
        Value::Null => Err(StoreError::bad_config(format!("the sentinel knows no primary named {name:?}"))),
        Value::Error(said) if said.contains("unknown command") => {
            Err(StoreError::bad_config("the server is not a sentinel: write redis://host"))
        }
        Value::Error(said) => Err(failure::error(&said, "the sentinel", config)),
        Value::Array(parts) => {
            let text = |index: usize| parts.get(index).and_then(Value::as_text);
            let port = text(1).and_then(|port| port.parse().ok());
            match (text(0), port) {
                (Some(host), Some(port)) => Ok(Address::Tcp { host: host.to_string(), port }),
                _ => Err(StoreError::unexpected_reply()),
            }
        }
        _ => Err(StoreError::unexpected_reply()),
    }
}

/// Sends commands, and reads as many replies.
async fn ask(stream: &mut dyn Duplex, commands: &[&[&[u8]]]) -> Result<Vec<Value>, StoreError> {
    let mut out = Vec::new();
    commands.iter().for_each(|command| resp::command(&mut out, command));
    stream::write(stream, &out).await?;
    let mut decoder = Decoder::default();
    let mut replies = Vec::with_capacity(commands.len());
    while replies.len() < commands.len() {
        match decoder.next_value() {
            Ok(Some(Value::Push(_))) => {}
            Ok(Some(value)) => replies.push(value),
            Ok(None) => {
                let bytes = stream::read(stream).await?;
                if bytes.is_empty() {
                    return Err(StoreError::unreachable("the server closed the connection"));
                }
                decoder.push(&bytes);
            }
            Err(resp::Malformed(why)) => {
                return Err(StoreError::bad_config(format!(
                    "the server on this port does not speak the Redis protocol: \
                     {why}"
                )));
            }
        }
    }
    if !decoder.is_empty() {
        return Err(StoreError::unreachable("the server sent more replies than there were requests"));
    }
    Ok(replies)
}
