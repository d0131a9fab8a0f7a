//! The first two questions on a new connection: who the server is, and what time it has.

use serde_json::Value;

use super::frame::{self, Decoder};
use super::reply::{self, ServerAnswer};
use super::term;
use super::wire::{self, Stream};
use crate::clock::Boottime;
use crate::store::StoreError;

/// The first token that a connection may use after this.
pub const FIRST_TOKEN: u64 = 3;

/// RethinkDB ql2.proto: Query.QueryType.SERVER_INFO.
const SERVER_INFO: &[u8] = b"[5]";

/// What a server says of itself.
pub struct Introduced {
    /// Which one it is: names are people's, and two servers may have the same.
    pub id: Option<String>,
    pub name: Option<String>,
    /// Its time, and the moments before and after it was read.
    pub seconds: f64,
    pub sent: Boottime,
    pub received: Boottime,
}

/// Uses the tokens below [`FIRST_TOKEN`].
pub async fn look(stream: &mut dyn Stream) -> Result<Introduced, StoreError> {
    let mut out = Vec::new();
    frame::write(&mut out, 1, SERVER_INFO);
    let info = exchange(stream, &out, 1).await?;
    let text = |name: &str| info.get(name).and_then(Value::as_str).map(str::to_string);
    out.clear();
    frame::write(&mut out, 2, &term::now().epoch_time().start());
    let sent = Boottime::now();
    let now = exchange(stream, &out, 2).await?;
    let received = Boottime::now();
    let seconds = now.as_f64().ok_or_else(nonsense)?;
    Ok(Introduced { id: text("id"), name: text("name"), seconds, sent, received })
}

async fn exchange(stream: &mut dyn Stream, out: &[u8], token: u64) -> Result<Value, StoreError> {
    wire::write(stream, out).await?;
    let mut decoder = Decoder::default();
    let frame = loop {
        if let Some(frame) = decoder.next_frame().map_err(|_| nonsense())? {
            break frame;
        }
        let read = wire::read(stream).await?;
        if read.is_empty() {
            return Err(StoreError::unreachable("the server hung up"));
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
    StoreError::bad_config("the server's first answer makes no sense")
}
