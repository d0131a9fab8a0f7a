//! The name that is locked.

use std::fmt;
use std::sync::Arc;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use sha1::{Digest, Sha1};

use crate::error::Error;

/// The name that is locked: 1 byte to 1 MiB of UTF-8 (R21).
///
/// ```
/// use nblock::{ErrorKind, Key};
///
/// # fn main() -> Result<(), nblock::Error> {
/// let key = Key::new("jobs:übersicht".as_bytes())?;
/// assert_eq!(key.as_str(), "jobs:übersicht");
/// println!("{} is locked", key.quoted()); // shortened if it is long
///
/// let error = Key::new(b"").unwrap_err();
/// assert_eq!(error.kind(), ErrorKind::InvalidArgument);
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct Key(Arc<Inner>);

struct Inner {
    hash: KeyHash,
    text: Box<str>,
    /// Whether only the key's hash is known: `text` is then a placeholder.
    placeholder: bool,
}

/// SHA-1 of a key's bytes, by which stores find its record. NoBrainer uses the same hash.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct KeyHash(pub [u8; 20]);

impl Key {
    /// The longest key, in bytes (R21).
    pub const MAX_BYTES: usize = 1 << 20;

    /// A key from its bytes: 1 byte to 1 MiB of UTF-8. Anything else is an error of the kind
    /// [`ErrorKind::InvalidArgument`](crate::error::ErrorKind::InvalidArgument).
    pub fn new(bytes: &[u8]) -> Result<Key, Error> {
        if bytes.is_empty() {
            return Err(Error::invalid_argument("key must have 1 byte to 1 MiB of UTF-8 (got an empty one)"));
        }
        if bytes.len() > Key::MAX_BYTES {
            return Err(Error::invalid_argument(format!(
                "key must have 1 byte to 1 MiB (1048576 bytes) of UTF-8 (got {} bytes)",
                bytes.len()
            )));
        }
        let text = std::str::from_utf8(bytes).map_err(|error| {
            Error::invalid_argument(format!(
                "key must be UTF-8 (got {:?}, with an invalid byte at offset {})",
                Excerpt(&String::from_utf8_lossy(bytes)),
                error.valid_up_to()
            ))
        })?;
        Ok(Key(Arc::new(Inner { hash: KeyHash(Sha1::digest(bytes).into()), text: text.into(), placeholder: false })))
    }

    /// A key of which only the hash is known, such as that of a damaged record. Its text is for people.
    pub(crate) fn of_hash(hash: KeyHash) -> Key {
        let text = format!("(key with the hash {})", hash.base64()).into();
        Key(Arc::new(Inner { hash, text, placeholder: true }))
    }

    /// Whether only the key's hash is known, and its text is a placeholder.
    pub fn is_placeholder(&self) -> bool {
        self.0.placeholder
    }

    /// The text of the key.
    pub fn as_str(&self) -> &str {
        &self.0.text
    }

    /// The SHA-1 of the key, by which stores find its record.
    pub fn hash(&self) -> KeyHash {
        self.0.hash
    }

    /// The key for messages: quoted, and shortened if it is long.
    pub fn quoted(&self) -> impl fmt::Display + '_ {
        struct Quoted<'a>(&'a str);
        impl fmt::Display for Quoted<'_> {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:?}", Excerpt(self.0))
            }
        }
        Quoted(self.as_str())
    }
}

impl KeyHash {
    /// Standard base64 with padding, as NoBrainer stores it (`Digest::SHA1.base64digest`).
    pub fn base64(&self) -> String {
        STANDARD.encode(self.0)
    }

    /// Eight bytes of the hash, for picking a bucket.
    pub fn bits(&self) -> u64 {
        u64::from_le_bytes(self.0[..8].try_into().expect("a hash has 20 bytes"))
    }
}

impl PartialEq for Key {
    fn eq(&self, other: &Key) -> bool {
        self.0.text == other.0.text && self.0.hash == other.0.hash
    }
}

impl Eq for Key {}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Key({:?})", Excerpt(self.as_str()))
    }
}

impl fmt::Debug for KeyHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "KeyHash({})", self.base64())
    }
}

/// Shows the beginning of a text that may be long, for messages.
pub struct Excerpt<'a>(pub &'a str);

impl fmt::Debug for Excerpt<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const SHOWN: usize = 80;
        match self.0.char_indices().nth(SHOWN) {
            None => write!(f, "{:?}", self.0),
            Some((end, _)) => write!(f, "{:?}...", &self.0[..end]),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hashes_as_nobrainer_does() {
        // ruby -rdigest -e 'puts Digest::SHA1.base64digest("some_key")'
        let key = Key::new(b"some_key").unwrap();
        assert_eq!(key.hash().base64(), "U97wd6QmS9MYPU6yGx9W+IPhtXI=");
    }

    #[test]
    fn bounds() {
        assert!(Key::new(b"").unwrap_err().message().contains("empty"));
        assert!(Key::new(&vec![b'a'; Key::MAX_BYTES]).is_ok());
        assert!(Key::new(&vec![b'a'; Key::MAX_BYTES + 1]).unwrap_err().message().contains("1048577"));
        assert!(Key::new(b"a\xffb").unwrap_err().message().contains("offset 1"));
        assert_eq!(Key::new(b"a\0b").unwrap().as_str(), "a\0b");
    }
}
