//! Random names: of a hold, of an attempt within it, of a lock object.

use std::fmt;
use std::sync::Arc;

/// The name of one hold: 128 bits, random or partly counted. Aligned because it is copied with every grant.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
#[repr(align(8))]
pub struct HoldId(pub [u8; 16]);

/// The proof of a hold in a record: the hold, and which of its attempts was granted (R3).
///
/// A server may apply a late attempt after the hold has ended, which must not look like the hold. Therefore each
/// attempt has its own token, and the hold's token is the one that the reply names.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Token {
    pub hold: HoldId,
    pub attempt: u32,
}

/// 64 random bits that identify a reentrant lock object among those that share an owner token (R17).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct ObjectId(pub u64);

/// The text that the users of a reentrant lock share.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct OwnerToken(pub Arc<str>);

impl OwnerToken {
    /// The longest owner token, in bytes.
    pub const MAX_BYTES: usize = 255;
}

impl std::fmt::Debug for OwnerToken {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("OwnerToken(..)")
    }
}

impl HoldId {
    /// As text: 32 lower-case hexadecimal digits.
    pub fn digits(self) -> [u8; 32] {
        let digit = |half: u8| b"0123456789abcdef"[usize::from(half)];
        let mut digits = [0; 32];
        for (pair, byte) in digits.chunks_exact_mut(2).zip(self.0) {
            pair.copy_from_slice(&[digit(byte >> 4), digit(byte & 15)]);
        }
        digits
    }

    /// Reads what [`HoldId::digits`] writes.
    pub fn parse(text: &str) -> Option<HoldId> {
        if text.len() != 32 || !text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')) {
            return None;
        }
        Some(HoldId(u128::from_str_radix(text, 16).ok()?.to_be_bytes()))
    }
}

impl Token {
    /// Reads what `Display` writes: `<hold>.<attempt>`.
    pub fn parse(text: &str) -> Option<Token> {
        let (hold, attempt) = text.split_once('.')?;
        let number: u32 = attempt.parse().ok()?;
        let token = Token { hold: HoldId::parse(hold)?, attempt: number };
        (attempt == number.to_string()).then_some(token)
    }
}

impl fmt::Display for HoldId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(str::from_utf8(&self.digits()).map_err(|_| fmt::Error)?)
    }
}

impl fmt::Display for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.hold, self.attempt)
    }
}

/// Shows nothing: a token proves a hold, and must not get into a log.
impl fmt::Debug for HoldId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("HoldId(..)")
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Token(..{})", self.attempt)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_and_back() {
        let token = Token { hold: HoldId::random(), attempt: 7 };
        assert_eq!(Token::parse(&token.to_string()), Some(token));
        for wrong in [
            "",
            "x",
            "00.1",
            "0123456789abcdef0123456789abcdef",
            "0123456789abcdef0123456789abcdef.01",
            "0123456789ABCDEF0123456789abcdef.1",
            "0123456789abcdef0123456789abcdef.-1",
        ] {
            assert_eq!(Token::parse(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn tokens_are_never_shown() {
        let token = Token { hold: HoldId::random(), attempt: 1 };
        assert!(!format!("{token:?}").contains(&token.hold.to_string()));
    }
}
