//! The value of a record: one string at the lock's own key, where other libraries have their token.
//!
//! `nb1 TOKEN N END FENCE OWNER` is a plain hold, `nb1 r OWNERTOKEN HOLD COUNT ENTRIES END FENCE OWNER` a reentrant
//! one. END is milliseconds of the server's clock since 1970, OWNERTOKEN hexadecimal, ENTRIES `object:count:n` with
//! commas between, OWNER JSON; what is missing is `-`. Everything up to END is what decisions are made on.

use std::fmt::Write;

use serde_json::Value as Json;
use sha1::{Digest, Sha1};

use super::resp::Digits;
use crate::clock;
use crate::key::Key;
use crate::protocol::{Entry, Holder, State, StoreTime};
use crate::record::{Identity, Lease, Owner, Record};
use crate::store::StoreError;
use crate::token::{HoldId, ObjectId, OwnerToken, Token};

/// How every value of ours begins. Those of a later version may be of other shapes, or begin otherwise.
const OURS: &str = "nb1 ";

/// A moment of the servers' clock.
pub fn moment(ms: i64) -> StoreTime {
    StoreTime(u64::try_from(ms).unwrap_or(0).saturating_mul(1_000_000))
}

pub fn millis(moment: StoreTime) -> u64 {
    moment.0 / 1_000_000
}

/// How the value of a plain hold begins.
pub fn token_head(token: Token) -> Vec<u8> {
    let mut head = Vec::with_capacity(96);
    head.extend_from_slice(OURS.as_bytes());
    head.extend_from_slice(&token.hold.digits());
    head.push(b'.');
    head.extend_from_slice(Digits::of(token.attempt.into()).as_bytes());
    head.push(b' ');
    head
}

/// How the value of a holder begins, up to the lease's end. `None`: it is not ours to write.
pub fn holder_head(holder: &Holder) -> Option<Vec<u8>> {
    match holder {
        Holder::Plain { token, write_seq } => {
            let mut head = token_head(*token);
            head.extend_from_slice(Digits::of(*write_seq).as_bytes());
            head.push(b' ');
            Some(head)
        }
        Holder::Reentrant { owner, hold, count, entries } => {
            let hold = hold.map_or_else(|| "-".to_string(), |hold| hold.to_string());
            let entries = entries_text(entries);
            Some(format!("{OURS}r {} {hold} {count} {entries} ", owner_text(owner)).into_bytes())
        }
        Holder::Foreign { .. } => None,
    }
}

pub fn owner_text(owner: &OwnerToken) -> String {
    owner.0.bytes().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

pub fn object_text(object: ObjectId) -> String {
    format!("{:016x}", object.0)
}

fn entries_text(entries: &[Entry]) -> String {
    if entries.is_empty() {
        return "-".to_string();
    }
    let each = entries.iter().map(|entry| format!("{}:{}:{}", object_text(entry.object), entry.count, entry.write_seq));
    each.collect::<Vec<_>>().join(",")
}

/// The owner of a hold that is granted now.
pub fn identity_text(identity: &Identity) -> Vec<u8> {
    let Identity { app, boot_id, host, pid } = identity;
    let mut text = Vec::with_capacity(256);
    text.extend_from_slice(br#"{"acquired_at_ms":"#);
    text.extend_from_slice(Digits::of(clock::wall_millis()).as_bytes());
    for (name, value) in [(r#","app":"#, app), (r#","boot_id":"#, boot_id), (r#","host":"#, host)] {
        text.extend_from_slice(name.as_bytes());
        quote(&mut text, value);
    }
    text.extend_from_slice(br#","pid":"#);
    text.extend_from_slice(Digits::of((*pid).into()).as_bytes());
    text.push(b'}');
    text
}

/// Appends a text as JSON has it. Most need no escapes.
fn quote(out: &mut Vec<u8>, text: &str) {
    if text.bytes().any(|byte| byte < b' ' || byte == b'"' || byte == b'\\') {
        return out.extend_from_slice(Json::from(text).to_string().as_bytes());
    }
    out.push(b'"');
    out.extend_from_slice(text.as_bytes());
    out.push(b'"');
}

/// What a value says.
struct Parsed {
    holder: Holder,
    ends_at: StoreTime,
    fence: u64,
    owner: Option<Owner>,
}

/// `None`: another library's, or of a version that is not known here.
fn parse(value: &[u8]) -> Option<Parsed> {
    let rest = std::str::from_utf8(value).ok()?.strip_prefix(OURS)?;
    let (holder, rest) = match rest.strip_prefix("r ") {
        Some(rest) => {
            let mut parts = rest.splitn(5, ' ');
            let (owner, hold, count, entries) = (parts.next()?, parts.next()?, parts.next()?, parts.next()?);
            let hold = if hold == "-" { None } else { Some(HoldId::parse(hold)?) };
            let entries = if entries == "-" { Vec::new() } else { parse_entries(entries)? };
            let holder = Holder::Reentrant { owner: parse_owner(owner)?, hold, count: number(count)?, entries };
            (holder, parts.next()?)
        }
        None => {
            let mut parts = rest.splitn(3, ' ');
            let holder = Holder::Plain { token: Token::parse(parts.next()?)?, write_seq: number(parts.next()?)? };
            (holder, parts.next()?)
        }
    };
    let mut parts = rest.splitn(3, ' ');
    let (ends_at, fence) = (number::<i64>(parts.next()?)?, number(parts.next()?)?);
    let owner = serde_json::from_str(parts.next()?).ok().and_then(|owner: Json| parse_identity(&owner));
    Some(Parsed { holder, ends_at: moment(ends_at), fence, owner })
}

fn number<T: std::str::FromStr>(digits: &str) -> Option<T> {
    digits.bytes().all(|byte| byte.is_ascii_digit()).then(|| digits.parse().ok()).flatten()
}

fn parse_owner(hex: &str) -> Option<OwnerToken> {
    if !hex.is_ascii() || !hex.len().is_multiple_of(2) {
        return None;
    }
    let bytes: Option<Vec<u8>> =
        (0..hex.len()).step_by(2).map(|at| u8::from_str_radix(&hex[at..at + 2], 16).ok()).collect();
    Some(OwnerToken(String::from_utf8(bytes?).ok()?.into()))
}

fn parse_entries(text: &str) -> Option<Vec<Entry>> {
    text.split(',')
        .map(|entry| {
            let mut parts = entry.split(':');
            let (object, count, write_seq) = (parts.next()?, parts.next()?, parts.next()?);
            let object = (object.len() == 16).then(|| u64::from_str_radix(object, 16).ok()).flatten()?;
            Some(Entry { object: ObjectId(object), count: number(count)?, write_seq: number(write_seq)? })
        })
        .collect()
}

fn parse_identity(owner: &Json) -> Option<Owner> {
    let text = |name: &str| owner[name].as_str().map(str::to_string);
    Some(Owner {
        host: text("host")?,
        pid: u32::try_from(owner["pid"].as_u64()?).ok()?,
        boot_id: text("boot_id")?,
        app: text("app")?,
        acquired_at_ms: owner["acquired_at_ms"].as_u64()?,
    })
}

/// What the scripts find at a key.
pub enum Found<'a> {
    /// A value that begins as ours do.
    Value(&'a [u8]),
    /// What identifies a value that does not, and is not read: it may be anything, and large.
    Digest(&'a str),
}

/// The digest of a value that is not ours, as the scripts make it.
fn digest(value: &[u8]) -> String {
    let mut text = String::new();
    for byte in Sha1::digest(&value[..value.len().min(4096)]) {
        let _ = write!(text, "{byte:02x}");
    }
    let _ = write!(text, ".{}", value.len());
    text
}

/// The record of a key: what was found, with its time to live and the server's now, both in milliseconds.
pub fn record(key: &Key, found: Found<'_>, ttl_ms: i64, now_ms: i64) -> Record {
    let by_ttl = moment(now_ms.saturating_add(ttl_ms.max(0)));
    let foreign = |token: String| Parsed {
        holder: Holder::Foreign { token: token.into() },
        ends_at: by_ttl,
        fence: 0,
        owner: None,
    };
    let (parsed, fence) = match found {
        Found::Value(value) => match parse(value) {
            Some(parsed) => {
                let fence = Some(parsed.fence);
                (parsed, fence)
            }
            None => (foreign(digest(value)), None),
        },
        Found::Digest(text) => (foreign(text.to_string()), None),
    };
    // Redis says of a key that has no end: -1. Then it is held forever, whatever the value says.
    let ends_at = if ttl_ms == -1 { StoreTime::NEVER } else { parsed.ends_at };
    let lease = Lease::at(ends_at, moment(now_ms));
    Record {
        damaged: None,
        key: key.clone(),
        lease,
        expires_at_ms: lease.wall_millis(),
        owner: parsed.owner,
        fence,
        state: State { holder: parsed.holder, ends_at },
    }
}

/// The key that counts the fences of a lock's key: in a hash slot with it wherever that can be had.
pub fn fence_key(prefix: &str, full_key: &str) -> String {
    let tagged = full_key.split_once('{').is_some_and(|(_, rest)| rest.find('}').is_some_and(|end| end > 0));
    let parts = match tagged {
        true => [prefix, FENCES, full_key, "", ""],
        false => [prefix, FENCES, "{", full_key, "}"],
    };
    parts.concat()
}

/// What the keys of counters contain, behind the prefix of their store. Another store's prefix may be longer or
/// shorter: no key that contains it is a lock's.
pub const FENCES: &str = "nblock:fence:";

/// The name of a lock at the server: an error where it is a counter's.
pub fn full_key(prefix: &str, key: &Key) -> Result<String, StoreError> {
    let full = [prefix, key.as_str()].concat();
    if full.contains(FENCES) {
        return Err(StoreError::rejected(format!(
            "the key {} cannot be locked: keys that contain {FENCES}, with the prefix, are the store's own",
            key.quoted()
        )));
    }
    Ok(full)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(value: &str) -> Record {
        record(&Key::new(b"k").unwrap(), Found::Value(value.as_bytes()), 500, 1_000)
    }

    fn identity() -> Identity {
        Identity { host: "a b".into(), pid: 7, boot_id: "boot".into(), app: "é \"x\"".into() }
    }

    #[test]
    fn what_is_written_is_read() {
        let token = Token { hold: HoldId::random(), attempt: 3 };
        let entries = vec![
            Entry { object: ObjectId(1), count: 2, write_seq: 9 },
            Entry { object: ObjectId(u64::MAX), count: 1, write_seq: 1 << 53 },
        ];
        let reentrant = |hold, entries| Holder::Reentrant { owner: OwnerToken("ü o".into()), hold, count: 3, entries };
        for holder in [
            Holder::Plain { token, write_seq: 12 },
            reentrant(Some(HoldId::random()), entries),
            reentrant(None, Vec::new()),
        ] {
            let text = |bytes| String::from_utf8(bytes).unwrap();
            let value = [&text(holder_head(&holder).unwrap()), "1500 77 ", &text(identity_text(&identity()))].concat();
            let record = read(&value);
            assert_eq!(record.state, State { holder, ends_at: moment(1_500) });
            assert_eq!(record.fence, Some(77));
            let owner = record.owner.unwrap();
            assert_eq!((owner.host.as_str(), owner.pid, owner.app.as_str()), ("a b", 7, "é \"x\""));
        }
    }

    #[test]
    fn what_is_not_ours_is_somebody_elses() {
        let token = Token { hold: HoldId::random(), attempt: 3 };
        for value in [
            "",
            "b0b1",
            "nb1 ",
            "nb2 x",
            "nb1 s 1 2 3",
            &format!("nb1 {token} x 5 5 {{}}"),
            &format!("nb1 {token} 1 5"),
            "nb1 r zz - 1 - 5 5 {}",
        ] {
            let record = read(value);
            assert!(matches!(&record.state.holder, Holder::Foreign { token } if **token == digest(value.as_bytes())));
            assert!(matches!(record.lease, Lease::Runs(left) if left.as_millis() == 500), "{value}");
            assert!(value.is_empty() || !format!("{record:?}").contains(value), "a value is shown");
        }
        let endless = record(&Key::new(b"k").unwrap(), Found::Value(b"x"), -1, 1_000);
        assert_eq!(endless.lease, Lease::Endless);
    }

    #[test]
    fn counters_have_the_hash_tag_of_their_lock() {
        assert_eq!(fence_key("p:", "p:jobs"), "p:nblock:fence:{p:jobs}");
        assert_eq!(fence_key("", "a{b}c"), "nblock:fence:a{b}c");
        assert_eq!(fence_key("", "a{}c"), "nblock:fence:{a{}c}");
        assert!(full_key("", &Key::new(b"nblock:fence:{x}").unwrap()).is_err());
    }
}
