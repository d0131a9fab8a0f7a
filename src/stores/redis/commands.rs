//! Each change, and each look, as one command: a script of `lua/`, which the server applies atomically.

use std::fmt::Write;

use sha1::{Digest, Sha1};

use super::greeting::ServerInfo;
use super::resp;
use super::value::{
    self, fence_key, full_key, holder_head, identity_text, millis, object_text, owner_text, token_head,
};
use crate::clock::Boottime;
use crate::key::Key;
use crate::protocol::{Change, Condition, Holder, Lease, NewRecord, PlainRenewal, Proof, StoreTime, Write as Written};
use crate::store::StoreError;

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
        let length = 64 + keys.iter().map(|key| key.len() + 16).sum::<usize>() + 256;
        let arguments = Vec::with_capacity(length);
        let mut command = Command { script: Some(script), count: 0, arguments, limit: Limit::None };
        command.push(keys.len().to_string().as_bytes());
        keys.iter().for_each(|key| command.push(key.as_bytes()));
        command
    }

    fn push(&mut self, argument: &[u8]) {
        resp::argument(&mut self.arguments, argument);
        self.count += 1;
    }

    fn with(mut self, arguments: &[&str]) -> Command {
        arguments.iter().for_each(|argument| self.push(argument.as_bytes()));
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
                resp::argument(out, server.offset().deadline(moment).to_string().as_bytes());
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
            let arguments = [token_head(token), write_seq.to_string(), milliseconds(expire)];
            return Ok(Command::script(self.renew, &[&name]).with(&arguments.each_ref().map(String::as_str)));
        }
        match (&change.condition, &change.write) {
            (Condition::Absent, Written::Put(new)) => {
                let (head, lease, owner) = put(new)?;
                let counter = fence_key(&self.prefix, &name);
                let command = Command::script(self.acquire, &[&name, &counter]).with(&[&head, &lease, &owner]);
                Ok(command.until(change.not_after))
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
        command = command.with(&condition.each_ref().map(String::as_str));
        command = command.with(&write.each_ref().map(String::as_str));
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
fn milliseconds(length: std::time::Duration) -> String {
    length.as_nanos().div_ceil(1_000_000).to_string()
}

/// How the value of a new record begins, its lease, and its owner.
fn put(new: &NewRecord) -> Result<(String, String, String), StoreError> {
    let head =
        holder_head(&new.holder).ok_or_else(|| StoreError::rejected("another library's record is not ours to make"))?;
    Ok((head, milliseconds(new.expire), identity_text(&new.identity)))
}

fn name_or_none(hold: Option<crate::token::HoldId>) -> String {
    hold.map_or_else(|| "-".to_string(), |hold| hold.to_string())
}

fn none() -> String {
    "-".to_string()
}

/// The condition of a change on a record that is there, with its four arguments.
fn condition(condition: &Condition) -> [String; 5] {
    let words = |kind: &str, [a, b, c]: [String; 3]| [kind.to_string(), a, b, c, none()];
    match condition {
        Condition::Absent => unreachable!("a change to a record that is not there is another script"),
        Condition::Seen { state, over } => {
            let over = if *over { "over" } else { "-" }.to_string();
            let endless = state.ends_at == StoreTime::NEVER;
            match (&state.holder, holder_head(&state.holder)) {
                (_, Some(head)) if endless => words("seen", [head, "endless".to_string(), over]),
                (_, Some(head)) => words("seen", [format!("{head}{} ", millis(state.ends_at)), none(), over]),
                (Holder::Foreign { token }, None) => {
                    let end = if endless { "endless".to_string() } else { millis(state.ends_at).to_string() };
                    words("foreign", [token.to_string(), end, over])
                }
                (_, None) => unreachable!("only another library's holder has no text"),
            }
        }
        Condition::Mine(Proof::Token(token)) => words("token", [token.to_string(), none(), none()]),
        Condition::Mine(Proof::Hold(hold)) => words("hold", [hold.to_string(), none(), none()]),
        Condition::Mine(Proof::Owner { owner, hold }) => {
            words("owner", [owner_text(owner), name_or_none(*hold), none()])
        }
        Condition::Mine(Proof::Object { owner, hold, object }) => {
            words("object", [owner_text(owner), hold.to_string(), object_text(*object)])
        }
    }
}

/// A write to a record that is there, with its seven arguments.
fn write(write: &Written) -> Result<[String; 8], StoreError> {
    let lease = |lease: &Lease| match lease {
        Lease::FromNow(length) => ("from".to_string(), milliseconds(*length)),
        Lease::NotSooner(length) => ("later".to_string(), milliseconds(*length)),
        Lease::AsStored => ("stored".to_string(), "0".to_string()),
    };
    Ok(match write {
        Written::Put(new) => {
            let (head, length, owner) = put(new)?;
            ["put".to_string(), head, length, owner, none(), none(), none(), none()]
        }
        Written::Delete => ["delete".to_string(), none(), none(), none(), none(), none(), none(), none()],
        Written::Extend { lease: new, write_seq } => {
            let (kind, length) = lease(new);
            let write_seq = write_seq.map_or_else(none, |write_seq| write_seq.to_string());
            ["extend".to_string(), none(), none(), write_seq, none(), kind, length, none()]
        }
        Written::Entry { object, count, write_seq, may_add, lease: new, name } => {
            let (kind, length) = lease(new);
            [
                "entry".to_string(),
                object.map_or_else(none, object_text),
                count.to_string(),
                write_seq.to_string(),
                if *may_add { "add" } else { "-" }.to_string(),
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
