//! How a connection begins: RethinkDB's protocol V1_0.
//!
//! RethinkDB src/client_protocol/server.cc: `handle_conn`. Messages are JSON, each ended by a NUL.

use serde_json::{Value, json};

use super::scram;
use crate::key::Excerpt;
use crate::store::{StoreError, StoreErrorKind};
use crate::stores::network::secret::Secret;
use crate::stores::network::stream::{self, Duplex};

/// RethinkDB ql2.proto: VersionDummy.Version.V1_0.
const V1_0: u32 = 0x34c2_bdc3;

/// The longest message of a handshake. The server takes 2048 bytes (server.cc: `read_datum`).
pub const MAX_MESSAGE: usize = 8192;

/// Errors of the server's authentication have these codes
/// (RethinkDB src/clustering/administration/auth/authentication_error.hpp).
const AUTHENTICATION_ERRORS: std::ops::RangeInclusive<u64> = 10..=20;

/// Greets the server and proves who we are; answers the server's version. `secured`: over TLS.
pub async fn shake_hands(
    stream: &mut dyn Duplex,
    user: &str,
    password: &Secret,
    secured: bool,
) -> Result<String, StoreError> {
    let mut first = scram::First::new(user);
    if !secured && !password.0.is_empty() {
        first = first.with_least_iterations(scram::MIN_ITERATIONS);
    }
    let mut greeting = V1_0.to_le_bytes().to_vec();
    append(
        &mut greeting,
        &json!({
            "protocol_version": 0,
            "authentication_method": "SCRAM-SHA-256",
            "authentication": first.message(),
        }),
    );
    stream::write(stream, &greeting).await?;
    let mut incoming = Incoming { bytes: Vec::new(), secured, introduced: false };
    let hello = incoming.message(stream).await?;
    let version = hello.get("server_version").and_then(Value::as_str).ok_or_else(no_rethinkdb)?.to_string();
    incoming.introduced = true;
    // RethinkDB 2.x speaks protocol version 0 and no other.
    if hello.get("min_protocol_version").and_then(Value::as_f64) != Some(0.0) {
        return Err(StoreError::bad_config("the server does not support the protocol version that this library uses"));
    }
    let challenge = authentication(&incoming.message(stream).await?)?;

    let password = password.clone();
    let answered = tokio::task::spawn_blocking(move || first.answer(&challenge, &password)).await;
    let last = answered.map_err(|_| StoreError::unreachable("the library stopped"))?.map_err(violation)?;
    let mut answer = Vec::new();
    append(&mut answer, &json!({ "authentication": last.message }));
    stream::write(stream, &answer).await?;
    let proof = authentication(&incoming.message(stream).await?)?;
    last.verify(&proof).map_err(violation)?;
    if !incoming.bytes.is_empty() {
        return Err(no_rethinkdb());
    }
    Ok(version)
}

fn append(out: &mut Vec<u8>, message: &Value) {
    out.extend_from_slice(message.to_string().as_bytes());
    out.push(0);
}

fn authentication(message: &Value) -> Result<String, StoreError> {
    message.get("authentication").and_then(Value::as_str).map(str::to_string).ok_or_else(no_rethinkdb)
}

fn violation(violation: scram::Violation) -> StoreError {
    StoreError::new(StoreErrorKind::Denied, format!("the server failed authentication: {}", violation.0))
}

fn no_rethinkdb() -> StoreError {
    StoreError::bad_config(
        "the server on this port is not a RethinkDB server, or the port is not its driver port \
         (28015)",
    )
}

/// Messages as they come in.
struct Incoming {
    bytes: Vec<u8>,
    /// Whether it is over TLS.
    secured: bool,
    /// Whether it is a RethinkDB server, by its own word.
    introduced: bool,
}

const CUT: &str = "the connection ended during the handshake";

impl Incoming {
    async fn message(&mut self, stream: &mut dyn Duplex) -> Result<Value, StoreError> {
        loop {
            // First: what TLS says has a NUL in it too.
            if let Some(error) = self.looks_foreign() {
                return Err(error);
            }
            if let Some(end) = self.bytes.iter().position(|byte| *byte == 0) {
                let message: Vec<u8> = self.bytes.drain(..=end).collect();
                return parse(&message[..end]);
            }
            let read = stream::read(stream).await?;
            if read.is_empty() {
                return Err(match self.bytes.as_slice() {
                    // It has said who it is, or was about to: a cut, and no answer.
                    _ if self.introduced => StoreError::unreachable(CUT),
                    [b'{', ..] => StoreError::unreachable(CUT),
                    // A proxy does so, too, before a server that is being started.
                    [] => StoreError::unreachable(match self.secured {
                        true => {
                            "the server closed the connection during the handshake: it may require a client \
                             certificate (cert= and key=), or not be a RethinkDB server"
                        }
                        false => {
                            "the server closed the connection during the handshake: it may require TLS (tls=1), or not \
                             be a RethinkDB server"
                        }
                    }),
                    _ => StoreError::bad_config(
                        "the server closed the connection during the handshake: it is not a RethinkDB server",
                    ),
                });
            }
            self.bytes.extend_from_slice(&read);
        }
    }

    /// What the first bytes of something else show.
    fn looks_foreign(&self) -> Option<StoreError> {
        match self.bytes.as_slice() {
            // An alert, or a handshake, of TLS (RFC 8446, section 5.1).
            [0x15 | 0x16, 0x03, ..] => Some(StoreError::bad_config(
                "the server requires TLS on this port: add tls=1 (or ca=...) to the store \
                     URL",
            )),
            [b'{', ..] | [] if self.bytes.len() < MAX_MESSAGE => None,
            // A server that does not know V1_0 sends a text.
            [b'E', ..]
                if self.bytes.len() < MAX_MESSAGE && b"ERROR:".starts_with(&self.bytes[..self.bytes.len().min(6)]) =>
            {
                None
            }
            _ => Some(no_rethinkdb()),
        }
    }
}

fn parse(message: &[u8]) -> Result<Value, StoreError> {
    let text = String::from_utf8_lossy(message);
    if text.starts_with("ERROR:") {
        return Err(StoreError::bad_config(format!(
            "the server is too old, or is not RethinkDB: it says {:?}",
            Excerpt(text.trim())
        )));
    }
    let message: Value = serde_json::from_slice(message).map_err(|_| no_rethinkdb())?;
    match message.get("success").and_then(Value::as_bool) {
        Some(true) => Ok(message),
        Some(false) => {
            let said = message.get("error").and_then(Value::as_str).unwrap_or("an error without a message");
            let kind = match message.get("error_code").and_then(Value::as_u64) {
                Some(code) if AUTHENTICATION_ERRORS.contains(&code) => StoreErrorKind::Denied,
                _ => StoreErrorKind::BadConfig,
            };
            Err(StoreError::new(kind, format!("the server refused the connection: {:?}", Excerpt(said))))
        }
        None => Err(no_rethinkdb()),
    }
}
