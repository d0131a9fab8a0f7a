//! The names of the channels of keys.

use crate::key::KeyHash;

/// The channel of a key. A name of PostgreSQL has 63 bytes at most.
pub fn channel(hash: KeyHash) -> String {
    let digits: String = hash.0.iter().map(|byte| format!("{byte:02x}")).collect();
    format!("{PREFIX}{digits}")
}

const PREFIX: &str = "nblock_";

/// The key of a channel.
pub fn hash_of(channel: &str) -> Option<KeyHash> {
    let digits = channel.strip_prefix(PREFIX)?;
    if digits.len() != 40 || !digits.is_ascii() {
        return None;
    }
    let mut hash = [0; 20];
    for (index, byte) in hash.iter_mut().enumerate() {
        *byte = u8::from_str_radix(&digits[2 * index..2 * index + 2], 16).ok()?;
    }
    Some(KeyHash(hash))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn channels_name_their_keys() {
        let hash = KeyHash(std::array::from_fn(|index| index as u8 * 13));
        let name = channel(hash);
        assert!(name.len() <= 63);
        assert_eq!(hash_of(&name), Some(hash));
        for wrong in ["", "nblock_", "nblock_trial_0123", "other_0000000000000000000000000000000000000000"] {
            assert_eq!(hash_of(wrong), None, "{wrong}");
        }
    }
}
