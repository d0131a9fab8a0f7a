//! What must be so for any bytes that come from where a server should be: RethinkDB's, and Redis'.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use nblock::key::Key;
use nblock::protocol::{Holder, StoreTime};
use nblock::store::StoreErrorKind;
use nblock::stores::redis::fuzzing as redis;
use nblock::stores::rethinkdb::fuzzing::{
    self, Decoder, Failure, First, Frame, Row, Secret, ServerAnswer, TooLong, field,
};
use nblock::sys::runtime::{block_on, handle};
use serde_json::{Value, json};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// Frames: split in any way they are the same, and what was read is what stands there. The first byte says
/// where to split.
pub fn frames(bytes: &[u8]) {
    let Some((&seed, wire)) = bytes.split_first() else { return };
    let whole = decoded(wire, wire.len());
    assert_eq!(whole, decoded(wire, 1 + usize::from(seed)), "split, it is something else");
    let (frames, too_long) = whole;
    let mut again = Vec::new();
    for frame in &frames {
        fuzzing::write(&mut again, frame.token, &frame.body);
    }
    assert!(wire.starts_with(&again), "something else was read than is there");
    let claimed = wire[again.len()..].get(8..12).map(|length| u32::from_le_bytes(length.try_into().unwrap()) as usize);
    match (too_long, claimed) {
        (Some(TooLong(told)), Some(claimed)) => assert!(told == claimed && claimed > fuzzing::MAX_BODY),
        (Some(_), None) => panic!("too long without a length"),
        (None, Some(claimed)) => {
            assert!(
                claimed <= fuzzing::MAX_BODY && wire.len() < again.len() + 12 + claimed,
                "neither read nor refused"
            );
        }
        (None, None) => {}
    }
}

fn decoded(wire: &[u8], piece: usize) -> (Vec<Frame>, Option<TooLong>) {
    let mut decoder = Decoder::default();
    let mut frames = Vec::new();
    for piece in wire.chunks(piece.max(1)) {
        decoder.push(piece);
        loop {
            match decoder.next_frame() {
                Ok(Some(frame)) => frames.push(frame),
                Ok(None) => break,
                Err(too_long) => return (frames, Some(too_long)),
            }
        }
    }
    (frames, None)
}

/// Answers to queries: only an answer that says that nothing was applied is taken for one (R7).
pub fn response(bytes: &[u8]) {
    let read = fuzzing::read(bytes);
    assert_eq!(fuzzing::has_more(bytes), matches!(read, Ok(ServerAnswer::Items { more: true, .. })));
    let (kind, items) = match read {
        Ok(ServerAnswer::Atom(value)) => (1, vec![value]),
        Ok(ServerAnswer::Items { items, more }) => (if more { 3 } else { 2 }, items),
        Err(failure) => {
            assert!(!failure.message().is_empty());
            let sure = !matches!(&failure, Failure::Store(error) if error.kind != StoreErrorKind::Unreachable);
            if sure || failure.sees_no_primary() {
                let answer: Value = serde_json::from_slice(bytes).expect("only words of the server's make sure");
                assert_eq!((answer["t"].as_u64(), answer["e"].as_u64()), (Some(18), Some(4_100_000)));
            }
            return;
        }
    };
    // What was taken is taken again when it is written down. (Not compared number by number: serde_json's
    // quick way of reading floating ones may be off by the last bit.)
    let count = items.len();
    let again = json!({ "t": kind, "r": items }).to_string();
    match fuzzing::read(again.as_bytes()) {
        Ok(ServerAnswer::Atom(_)) => assert_eq!((kind, count), (1, 1)),
        Ok(ServerAnswer::Items { items, more }) => assert_eq!((items.len(), more), (count, kind == 3)),
        Err(failure) => panic!("{failure:?}"),
    }
}

/// Rows of the table of locks: read, or refused by name and without their token (R19).
pub fn record(bytes: &[u8]) {
    let Ok(value) = serde_json::from_slice::<Value>(bytes) else { return };
    let row = match Row::read(&value) {
        Ok(row) => row,
        Err(error) => {
            if let Some(token) = value[field::INSTANCE_TOKEN].as_str()
                && token.len() >= 16
                && ![field::KEY, field::KEY_HASH].iter().any(|name| value[*name].to_string().contains(token))
            {
                assert!(!error.message.contains(token), "{error}");
            }
            return assert_eq!(error.kind, StoreErrorKind::Rejected);
        }
    };
    match row.clone().record(1_700_000_000_000) {
        Ok(record) => {
            assert_eq!(record.key.as_str(), row.key);
            assert!(record.state == row.state);
            let token = token(&row);
            assert!(!format!("{record:?}").contains(&token) || token.len() < 16 || shows_elsewhere(&row));
        }
        Err(_) => assert!(Key::new(row.key.as_bytes()).is_err()),
    }
    // A server's floating numbers hold milliseconds up to here.
    let fits = |ms: u64| ms < 1 << 52;
    if row.state.ends_at != StoreTime::NEVER && row.owner.as_ref().is_none_or(|owner| fits(owner.acquired_at_ms)) {
        assert_eq!(Row::read(&written(&row)).as_ref(), Ok(&row));
    }
}

/// Whether what anybody may see has the token in it by itself.
fn shows_elsewhere(row: &Row) -> bool {
    format!("{:?} {:?}", row.key, row.owner).contains(&token(row))
}

/// The instance token of a row.
fn token(row: &Row) -> String {
    match &row.state.holder {
        Holder::Plain { token, .. } => token.to_string(),
        Holder::Reentrant { owner, .. } => owner.0.to_string(),
        Holder::Foreign { token } => token.to_string(),
    }
}

fn time(ms: u64) -> Value {
    json!({ "$reql_type$": "TIME", "epoch_time": ms as f64 / 1000.0, "timezone": "+00:00" })
}

/// The row as NoBrainer or we would have written it.
fn written(row: &Row) -> Value {
    let mut value = json!({
        field::KEY: row.key, field::INSTANCE_TOKEN: token(row), field::EXPIRES_AT: time(row.state.ends_at.0 / 1_000_000),
    });
    if let Some(owner) = &row.owner {
        value[field::OWNER] = json!({
            "host": owner.host, "pid": owner.pid, "boot_id": owner.boot_id, "app": owner.app,
            "acquired_at": time(owner.acquired_at_ms),
        });
    }
    match &row.state.holder {
        Holder::Plain { write_seq, .. } => value[field::N] = json!(write_seq),
        Holder::Foreign { .. } => {}
        Holder::Reentrant { hold, count, entries, .. } => {
            value[field::LOCK_COUNT] = json!(count);
            value[field::TYPE] = json!(fuzzing::REENTRANT_TYPE);
            value[field::ENTRIES] = fuzzing::entries_value(entries);
            if let Some(hold) = hold {
                value[field::HOLD] = json!(hold.to_string());
            }
        }
    }
    value
}

const NONCE: &str = "rOprNGfwEbeRWgbNEkqO";

/// Challenges of SCRAM: answered only when they go on with our nonce, and ask for no more work than is sane.
pub fn challenge(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    if asks_for_long_work(text) {
        return;
    }
    let Ok(last) = First::with_nonce("user", NONCE.into()).answer(text, &Secret("pencil".into())) else { return };
    let part = |name: &str| text.split(',').find_map(|part| part.strip_prefix(name));
    let nonce = part("r=").expect("an answered challenge has a nonce");
    assert!(nonce.starts_with(NONCE) && nonce.len() > NONCE.len());
    assert!(part("i=").is_some_and(|rounds| rounds.parse::<u32>().is_ok_and(|rounds| rounds > 0)));
    assert!(last.message.starts_with(&format!("c=biws,r={nonce},p=")));
    assert!(!last.message.contains("pencil"));
    // A peer does not prove that it knows the password by repeating an earlier proof.
    assert!(last.verify(text).is_err() && last.verify("v=").is_err());
}

/// So many rounds of hashing are allowed, and would take all the time that there is for other bytes.
fn asks_for_long_work(text: &str) -> bool {
    let rounds = text.split("i=").skip(1);
    let mut rounds = rounds.map(|rest| rest.chars().take_while(|char| char.is_ascii_digit() || *char == '+'));
    rounds.any(|digits| {
        let number = digits.filter(char::is_ascii_digit).collect::<String>().parse::<u64>();
        number.is_ok_and(|number| (100..=u64::from(fuzzing::MAX_ITERATIONS)).contains(&number))
    })
}

/// A whole handshake with somebody who does not know the password: never a success, never a panic, and no more
/// is read than the messages may be long. The first byte says in what pieces it comes, and whether it ends.
pub fn handshake(bytes: &[u8]) {
    const PASSWORD: &str = "a-password-of-ours";
    let Some((&seed, script)) = bytes.split_first() else { return };
    if asks_for_long_work(&String::from_utf8_lossy(script)) {
        return;
    }
    let mut server = Server {
        script: script.to_vec(),
        given: 0,
        piece: 1 + usize::from(seed >> 1),
        endless: seed & 1 == 1 && !script.is_empty(),
        heard: Vec::new(),
    };
    let shaking = async move {
        let result = fuzzing::shake_hands(&mut server, "admin", &Secret(PASSWORD.into()), seed & 2 == 2).await;
        (result, server)
    };
    let (result, server) = block_on(handle().unwrap().spawn(shaking)).unwrap().expect("no panic");
    let error = result.expect_err("nobody proved anything");
    assert!(!error.message.is_empty() && !error.message.contains(PASSWORD));
    assert!(!String::from_utf8_lossy(&server.heard).contains(PASSWORD), "the password was sent");
    // Three messages, and what one read brings.
    assert!(server.given <= 3 * fuzzing::MAX_MESSAGE + 1024, "{} bytes were read", server.given);
}

/// Says what its script says, with our nonce where `$NONCE` stands.
struct Server {
    script: Vec<u8>,
    given: usize,
    piece: usize,
    /// Goes on with the last byte forever, where others hang up.
    endless: bool,
    heard: Vec<u8>,
}

impl Server {
    fn put_in_the_nonce(&mut self) {
        const PLACE: &[u8] = b"$NONCE";
        let heard = String::from_utf8_lossy(&self.heard).into_owned();
        let Some(nonce) = heard.split_once(",r=").and_then(|(_, rest)| rest.split(['"', ',']).next()) else { return };
        if let Some(at) = self.script.windows(PLACE.len()).position(|window| window == PLACE) {
            self.script.splice(at..at + PLACE.len(), nonce.bytes());
        }
    }
}

impl AsyncRead for Server {
    fn poll_read(self: Pin<&mut Self>, _: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let server = self.get_mut();
        server.put_in_the_nonce();
        let rest = &server.script[server.given.min(server.script.len())..];
        let room = into.remaining().min(server.piece);
        let size = rest.len().min(room);
        into.put_slice(&rest[..size]);
        server.given += size;
        // Not quite forever: a client that reads on is to fail, and not to fill this machine's memory.
        if size == 0 && server.endless && server.given < 1 << 20 {
            let last = server.script[server.script.len() - 1];
            into.put_slice(&vec![last; room]);
            server.given += room;
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Server {
    fn poll_write(mut self: Pin<&mut Self>, _: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.heard.extend_from_slice(bytes);
        Poll::Ready(Ok(bytes.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

/// Replies of Redis: split in any way they are the same. The first byte says where to split.
pub fn replies(bytes: &[u8]) {
    let Some((&seed, wire)) = bytes.split_first() else { return };
    let whole = read_replies(wire, wire.len());
    assert_eq!(whole, read_replies(wire, 8 + usize::from(seed)), "split, it is something else");
}

fn read_replies(wire: &[u8], piece: usize) -> (Vec<redis::Value>, Option<redis::Malformed>) {
    let mut decoder = redis::Decoder::default();
    let mut values = Vec::new();
    for piece in wire.chunks(piece.max(1)) {
        decoder.push(piece);
        loop {
            match decoder.next_value() {
                Ok(Some(value)) => values.push(value),
                Ok(None) => break,
                Err(malformed) => return (values, Some(malformed)),
            }
        }
    }
    (values, None)
}
