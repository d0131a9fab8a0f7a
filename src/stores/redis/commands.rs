//! Each change, and each look, as one command: a script of `lua/`, which the server applies atomically.

use std::fmt::Write;
use std::time::Duration;

use sha1::{Digest, Sha1};

use super::greeting::ServerInfo;
use super::resp::{self, Digits};
use super::value::{
    self, fence_key, full_key, holder_head, identity_text, millis, object_text, owner_text, token_head,
};
use crate::clock::Boottime;
use crate::key::Key;
use crate::protocol::{Change, Condition, Holder, Lease, NewRecord, PlainRenewal, Proof, StoreTime, Write as Written};
use crate::store::StoreError;
use crate::token::Token;

/// One command, ready but for what depends on the server that gets it.
#[derive(Clone)]
pub struct Command {
    script: Option<Script>,
    /// How many arguments stand in `arguments`.
    count: usize,
    arguments: Vec<u8>,
    /// Of a script that is applied before a moment only, which is its last argument in the server's milliseconds.
    limit: Limit,
}

#[derive(Clone, Copy)]
enum Limit {
    /// The script has no such argument.
    None,
    Never,
    Before(Boottime),
}

/// A script, and what a server knows it by.
#[derive(Clone, Copy)]
struct Script {
    text: &'static str,
    sha1: [u8; 40],
}

impl Script {
    fn new(text: &'static str) -> Script {
        let mut hex = String::with_capacity(40);
        for byte in Sha1::digest(text) {
            let _ = write!(hex, "{byte:02x}");
        }
        Script { text, sha1: hex.into_bytes().try_into().expect("SHA-1 has 40 digits") }
    }
}

impl Command {
    /// A command without a script.
    pub fn plain(arguments: &[&[u8]]) -> Command {
        let mut command = Command { script: None, count: 0, arguments: Vec::new(), limit: Limit::None };
        arguments.iter().for_each(|argument| command.push(argument));
        command
    }

    fn script(script: Script, keys: &[&str]) -> Command {
        let arguments = Vec::with_capacity(512 + keys.iter().map(|key| key.len() + 16).sum::<usize>());
        let mut command = Command { script: Some(script), count: 0, arguments, limit: Limit::None };
        command.push(Digits::of(keys.len() as u64).as_bytes());
        keys.iter().for_each(|key| command.push(key.as_bytes()));
        command
    }

    fn push(&mut self, argument: &[u8]) {
        resp::argument(&mut self.arguments, argument);
        self.count += 1;
    }

    fn with(mut self, arguments: &[&[u8]]) -> Command {
        arguments.iter().for_each(|argument| self.push(argument));
        self
    }

    fn until(mut self, limit: Option<Boottime>) -> Command {
        self.limit = limit.map_or(Limit::Never, Limit::Before);
        self
    }

    /// The hash of its script, if it is one.
    pub fn script_hash(&self) -> Option<[u8; 40]> {
        self.script.map(|script| script.sha1)
    }

    /// Appends it as it is sent. `whole`: with the text of its script.
    pub fn write(&self, out: &mut Vec<u8>, whole: bool, server: &ServerInfo) {
        let limited = !matches!(self.limit, Limit::None);
        resp::head(out, self.count + usize::from(limited) + if self.script.is_some() { 2 } else { 0 });
        match &self.script {
            None => {}
            Some(script) if whole => {
                resp::argument(out, b"EVAL");
                resp::argument(out, script.text.as_bytes());
            }
            Some(script) => {
                resp::argument(out, b"EVALSHA");
                resp::argument(out, &script.sha1);
            }
        }
        out.extend_from_slice(&self.arguments);
        match self.limit {
            Limit::None => {}
            Limit::Never => resp::argument(out, b"-"),
            Limit::Before(moment) => {
                // The past is too late in any case.
                let deadline = server.offset().deadline(moment).max(0) as u64;
                resp::argument(out, Digits::of(deadline).as_bytes());
            }
        }
    }
}

/// Writes commands for one store.
pub struct Commands {
    prefix: String,
    acquire: Script,
    release: Script,
    renew: Script,
    change: Script,
    look: Script,
    fence: Script,
}

impl Commands {
    pub fn new(prefix: &str) -> Commands {
        Commands {
            prefix: prefix.to_string(),
            acquire: Script::new(include_str!("lua/acquire.lua")),
            release: Script::new(include_str!("lua/release.lua")),
            renew: Script::new(include_str!("lua/renew.lua")),
            change: Script::new(include_str!("lua/change.lua")),
            look: Script::new(include_str!("lua/look.lua")),
            fence: Script::new(include_str!("lua/fence.lua")),
        }
    }

    pub fn full_key(&self, key: &Key) -> Result<String, StoreError> {
        full_key(&self.prefix, key)
    }

    /// A change, as [`crate::protocol::apply`] says. What is asked for most has a script of its own.
    pub fn change(&self, key: &Key, change: &Change) -> Result<Command, StoreError> {
        let name = self.full_key(key)?;
        if let Some(PlainRenewal { token, write_seq, expire }) = change.as_plain_renewal() {
            let (head, write_seq, lease) = (token_head(token), Digits::of(write_seq), milliseconds(expire));
            let arguments = [&head[..], write_seq.as_bytes(), lease.as_bytes()];
            return Ok(Command::script(self.renew, &[&name]).with(&arguments));
        }
        match (&change.condition, &change.write) {
            (Condition::Absent, Written::Put(new)) => {
                let (head, lease, owner) = put(new)?;
                let counter = fence_key(&self.prefix, &name);
                let arguments = [&head[..], lease.as_bytes(), &owner];
                Ok(Command::script(self.acquire, &[&name, &counter]).with(&arguments).until(change.not_after))
            }
            (Condition::Absent, _) => Err(StoreError::rejected("only a new record has no record before it")),
            (Condition::Mine(Proof::Token(token)), Written::Delete) if change.not_after.is_none() => {
                Ok(Command::script(self.release, &[&name]).with(&[&token_head(*token)]))
            }
            _ => self.any_change(&name, change),
        }
    }

    fn any_change(&self, name: &str, change: &Change) -> Result<Command, StoreError> {
        let counter = fence_key(&self.prefix, name);
        let condition = condition(&change.condition);
        let write = write(&change.write)?;
        let mut command = Command::script(self.change, &[name, &counter]);
        command = command.with(&condition.each_ref().map(Vec::as_slice));
        command = command.with(&write.each_ref().map(Vec::as_slice));
        Ok(command.until(change.not_after))
    }

    /// What is at each of the keys, which are the server's.
    pub fn look(&self, keys: &[&str]) -> Command {
        Command::script(self.look, keys)
    }

    pub fn fence(&self, key: &Key) -> Result<Command, StoreError> {
        Ok(Command::script(self.fence, &[&fence_key(&self.prefix, &self.full_key(key)?)]))
    }

    /// Part of all keys that hold strings.
    pub fn scan(&self, cursor: &[u8]) -> Command {
        let pattern = format!("{}*", glob(&self.prefix));
        Command::plain(&[b"SCAN", cursor, b"MATCH", pattern.as_bytes(), b"COUNT", b"1000", b"TYPE", b"string"])
    }

    /// The key of a lock, if this is the name of one at the server.
    pub fn key_of(&self, name: &str) -> Option<Key> {
        let key = name.strip_prefix(&self.prefix)?;
        if name.contains(value::FENCES) { None } else { Key::new(key.as_bytes()).ok() }
    }
}

/// A text as a pattern that matches itself alone.
fn glob(text: &str) -> String {
    text.chars().fold(String::new(), |mut pattern, c| {
        if matches!(c, '*' | '?' | '[' | ']' | '\\' | '^') {
            pattern.push('\\');
        }
        pattern.push(c);
        pattern
    })
}

/// In whole milliseconds, never fewer than the caller asked for.
fn milliseconds(length: Duration) -> Digits {
    let begun = u64::from(length.subsec_nanos().div_ceil(1_000_000));
    Digits::of(length.as_secs().saturating_mul(1000).saturating_add(begun))
}

/// How the value of a new record begins, its lease, and its owner.
fn put(new: &NewRecord) -> Result<(Vec<u8>, Digits, Vec<u8>), StoreError> {
    let head =
        holder_head(&new.holder).ok_or_else(|| StoreError::rejected("another library's record is not ours to make"))?;
    Ok((head, milliseconds(new.expire), identity_text(&new.identity)))
}

fn name_or_none(hold: Option<crate::token::HoldId>) -> Vec<u8> {
    hold.map_or_else(none, |hold| hold.digits().to_vec())
}

fn none() -> Vec<u8> {
    b"-".to_vec()
}

/// The condition of a change on a record that is there, with its four arguments.
fn condition(condition: &Condition) -> [Vec<u8>; 5] {
    let words = |kind: &str, [a, b, c]: [Vec<u8>; 3]| [kind.into(), a, b, c, none()];
    let text = |token: &Token| token.to_string().into_bytes();
    match condition {
        Condition::Absent => unreachable!("a change to a record that is not there is another script"),
        Condition::Seen { state, over } => {
            let over = if *over { "over" } else { "-" }.into();
            let endless = state.ends_at == StoreTime::NEVER;
            let end = Digits::of(millis(state.ends_at));
            match (&state.holder, holder_head(&state.holder)) {
                (_, Some(head)) if endless => words("seen", [head, "endless".into(), over]),
                (_, Some(head)) => words("seen", [[&head, end.as_bytes(), b" "].concat(), none(), over]),
                (Holder::Foreign { token }, None) => {
                    let end = if endless { b"endless" } else { end.as_bytes() };
                    words("foreign", [token.to_string().into(), end.into(), over])
                }
                (_, None) => unreachable!("only another library's holder has no text"),
            }
        }
        Condition::Mine(Proof::Token(token)) => words("token", [text(token), none(), none()]),
        Condition::Mine(Proof::Hold(hold)) => words("hold", [hold.digits().into(), none(), none()]),
        Condition::Mine(Proof::Owner { owner, hold }) => {
            words("owner", [owner_text(owner).into(), name_or_none(*hold), none()])
        }
        Condition::Mine(Proof::Object { owner, hold, object }) => {
            words("object", [owner_text(owner).into(), hold.digits().into(), object_text(*object).into()])
        }
    }
}

/// A write to a record that is there, with its seven arguments.
fn write(write: &Written) -> Result<[Vec<u8>; 8], StoreError> {
    let number = |number: u64| Digits::of(number).as_bytes().to_vec();
    let lease = |lease: &Lease| match lease {
        Lease::FromNow(length) => ("from".into(), milliseconds(*length).as_bytes().to_vec()),
        Lease::NotSooner(length) => ("later".into(), milliseconds(*length).as_bytes().to_vec()),
        Lease::AsStored => ("stored".into(), "0".into()),
    };
    Ok(match write {
        Written::Put(new) => {
            let (head, length, owner) = put(new)?;
            ["put".into(), head, length.as_bytes().to_vec(), owner, none(), none(), none(), none()]
        }
        Written::Delete => ["delete".into(), none(), none(), none(), none(), none(), none(), none()],
        Written::Extend { lease: new, write_seq } => {
            let (kind, length) = lease(new);
            ["extend".into(), none(), none(), write_seq.map_or_else(none, number), none(), kind, length, none()]
        }
        Written::Entry { object, count, write_seq, may_add, lease: new, name } => {
            let (kind, length) = lease(new);
            [
                "entry".into(),
                object.map_or_else(none, |object| object_text(object).into()),
                number(u64::from(*count)),
                number(*write_seq),
                if *may_add { "add" } else { "-" }.into(),
                kind,
                length,
                name_or_none(*name),
            ]
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prefixes_match_themselves_alone() {
        assert_eq!(glob("a*[b]?\\é"), "a\\*\\[b\\]\\?\\\\é");
    }
}
