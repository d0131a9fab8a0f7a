//! Who a server is, and what time it has: the first two questions on a new connection.

use serde_json::Value;

use super::frame::{self, Decoder};
use super::reply::{self, ServerAnswer};
use super::row::seconds_to_ms;
use super::term;
use crate::clock::Boottime;
use crate::store::StoreError;
use crate::stores::network::skew::{Clocks, Offset};
use crate::stores::network::stream::{self, Duplex};
use crate::sys::mutex::Mutex;

/// The first token that a connection may use after this.
pub const FIRST_TOKEN: u64 = 3;

/// RethinkDB ql2.proto: Query.QueryType.SERVER_INFO.
const SERVER_INFO: &[u8] = b"[5]";

/// What a server says of itself.
pub struct Introduction {
    /// Which one it is: names are people's, and two servers may have the same.
    pub id: Option<String>,
    pub name: Option<String>,
    /// Its time, in milliseconds since 1970, and the moments before and after it was read.
    pub now_ms: u64,
    pub sent: Boottime,
    pub received: Boottime,
}

/// What is known of the server at the other end of a connection.
pub struct ServerInfo {
    /// As in the URL.
    pub host: String,
    pub version: String,
    /// Which server of its cluster it is, and how people call it; its host where it says neither.
    pub id: String,
    pub name: String,
    /// The connection's number.
    pub connection: u64,
    offset: Mutex<Offset>,
}

impl ServerInfo {
    pub fn new(
        host: String,
        version: String,
        introduction: Introduction,
        clocks: &Clocks,
        connection: u64,
    ) -> ServerInfo {
        let Introduction { id, name, now_ms, sent, received } = introduction;
        let name = name.or_else(|| id.clone()).unwrap_or_else(|| host.clone());
        let id = id.unwrap_or_else(|| name.clone());
        let offset = Mutex::new(clocks.observe(&id, &name, sent, received, now_ms));
        ServerInfo { host, version, id, name, connection, offset }
    }

    pub fn offset(&self) -> Offset {
        *self.offset.lock()
    }

    /// Notes a time that this server answered with.
    pub fn observe(&self, clocks: &Clocks, sent: Boottime, received: Boottime, now_ms: u64) {
        *self.offset.lock() = clocks.observe(&self.id, &self.name, sent, received, now_ms);
    }
}

/// Uses the tokens below [`FIRST_TOKEN`].
pub async fn ask(stream: &mut dyn Duplex) -> Result<Introduction, StoreError> {
    let mut out = Vec::new();
    frame::write(&mut out, 1, SERVER_INFO);
    let info = exchange(stream, &out, 1).await?;
    let text = |name: &str| info.get(name).and_then(Value::as_str).map(str::to_string);
    out.clear();
    frame::write(&mut out, 2, &term::now().epoch_time().start());
    let sent = Boottime::now();
    let now = exchange(stream, &out, 2).await?;
    let received = Boottime::now();
    let now_ms = seconds_to_ms(now.as_f64().ok_or_else(nonsense)?);
    Ok(Introduction { id: text("id"), name: text("name"), now_ms, sent, received })
}

async fn exchange(stream: &mut dyn Duplex, out: &[u8], token: u64) -> Result<Value, StoreError> {
    stream::write(stream, out).await?;
    let mut decoder = Decoder::default();
    let frame = loop {
        if let Some(frame) = decoder.next_frame().map_err(|_| nonsense())? {
            break frame;
        }
        let read = stream::read(stream).await?;
        if read.is_empty() {
            return Err(StoreError::unreachable("the server closed the connection"));
        }
        decoder.push(&read);
    };
    match reply::read(&frame.body) {
        Ok(ServerAnswer::Atom(value)) if frame.token == token => Ok(value),
        Err(failure) => Err(StoreError::unreachable(failure.message())),
        Ok(_) => Err(nonsense()),
    }
}

fn nonsense() -> StoreError {
    StoreError::bad_config("the server sent an unexpected first reply")
}
