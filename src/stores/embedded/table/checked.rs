//! Numbers with check bits: the value, and a remainder of it.
//!
//! The divisor is a prime above 255, so every change of the value within one byte changes the remainder; the widths are
//! chosen so that this also holds for the byte that has parts of both (the tests try every byte). Zero is not a valid
//! word: a page that the file system has lost, and filled with zeros, is damage and not an empty table.

/// Values of a `u32` are below this.
pub const LIMIT32: u32 = 1 << 23;
/// Values of a `u64` are below this.
pub const LIMIT64: u64 = 1 << 53;

const BITS32: u32 = 9;
const PRIME32: u32 = 509;
const BITS64: u32 = 11;
const PRIME64: u64 = 2039;
/// Added before the remainder is computed, so that the remainder of 0 is not 0.
const OFFSET: u32 = 257;

#[inline]
pub const fn seal32(value: u32) -> u32 {
    (value << BITS32) | ((value + OFFSET) % PRIME32)
}

/// The value, if the check bits are right.
#[inline]
pub const fn open32(word: u32) -> Option<u32> {
    let value = word >> BITS32;
    if seal32(value) == word { Some(value) } else { None }
}

#[inline]
pub const fn seal64(value: u64) -> u64 {
    (value << BITS64) | ((value + OFFSET as u64) % PRIME64)
}

/// The value, if the check bits are right.
#[inline]
pub const fn open64(word: u64) -> Option<u64> {
    let value = word >> BITS64;
    if seal64(value) == word { Some(value) } else { None }
}

/// A link to a cell: its number, or [`Link::NONE`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Link(pub u32);

impl Link {
    pub const NONE: Link = Link(LIMIT32 - 1);

    #[inline]
    pub const fn seal(self) -> u32 {
        seal32(self.0)
    }

    /// Whether the check bits of a link are right. `NONE` is the most frequent link.
    #[inline]
    pub const fn is_whole(word: u32) -> bool {
        word == Link::NONE.seal() || Link::open(word).is_some()
    }

    #[inline]
    pub const fn open(word: u32) -> Option<Link> {
        match open32(word) {
            Some(number) => Some(Link(number)),
            None => None,
        }
    }
}

/// A checksum over words, for damage (not for adversaries, who could change it along with them).
///
/// One multiplication adds two words. (If one factor is 0, the other word does not count: this takes one particular
/// value out of 2^64.)
#[derive(Clone, Copy)]
pub struct Sum(u64);

/// Constants with random bits.
const FACTOR: u64 = 0x9e37_79b9_7f4a_7c15;
const LAST: u64 = 0xd6e8_feb8_6659_fd93;

#[inline]
fn fold(value: u64, factor: u64) -> u64 {
    let product = u128::from(value) * u128::from(factor);
    product as u64 ^ (product >> 64) as u64
}

impl Sum {
    #[inline]
    pub fn new(seed: u64) -> Sum {
        Sum(seed ^ LAST)
    }

    #[inline]
    pub fn add(&mut self, first: u64, second: u64) {
        self.0 = fold(self.0 ^ first, second ^ FACTOR);
    }

    /// Adds words in pairs. A single last word is paired with 0.
    #[inline]
    pub fn add_all(&mut self, words: &[u64]) {
        let (pairs, rest) = words.as_chunks::<2>();
        pairs.iter().for_each(|&[first, second]| self.add(first, second));
        rest.iter().for_each(|&last| self.add(last, 0));
    }

    /// Adds bytes as words. The last word is filled up with zeros.
    #[inline]
    pub fn add_bytes(&mut self, bytes: &[u8]) {
        let (pairs, rest) = bytes.as_chunks::<16>();
        for pair in pairs {
            let ([first, second], _) = pair.as_chunks::<8>() else { unreachable!("sixteen bytes") };
            self.add(u64::from_ne_bytes(*first), u64::from_ne_bytes(*second));
        }
        match rest.split_first_chunk() {
            Some((first, rest)) => self.add(u64::from_ne_bytes(*first), padded(rest)),
            None if rest.is_empty() => {}
            None => self.add(padded(rest), 0),
        }
    }

    #[inline]
    pub fn finish(self) -> u64 {
        self.0
    }
}

/// A word of fewer than eight bytes, filled up with zeros.
#[inline]
pub fn padded(bytes: &[u8]) -> u64 {
    let word = match (bytes.first_chunk(), bytes.last_chunk()) {
        // The two reads overlap.
        (Some(first), Some(last)) => {
            let last = u64::from(u32::from_le_bytes(*last));
            u64::from(u32::from_le_bytes(*first)) | last << (8 * (bytes.len() - size_of::<u32>()))
        }
        _ => bytes.iter().rev().fold(0, |word, &byte| word << 8 | u64::from(byte)),
    };
    word.to_le()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bit_that_changes_is_found_in_every_sum() {
        let sum = |words: &[u64]| {
            let mut sum = Sum::new(7);
            sum.add_all(words);
            sum.finish()
        };
        for length in 1..12 {
            for begin in [0, 1, u64::MAX, FACTOR, LAST] {
                let mut words: Vec<u64> = (0..length).map(|n| fold(n + 1, LAST)).collect();
                words[0] = begin;
                let whole = sum(&words);
                for at in 0..words.len() {
                    for bit in 0..64 {
                        words[at] ^= 1 << bit;
                        assert_ne!(sum(&words), whole, "bit {bit} of word {at} of {length}");
                        words[at] ^= 1 << bit;
                    }
                    let mut others = words.clone();
                    others.swap(0, at);
                    assert_eq!(sum(&others) == whole, others == words, "words 0 and {at} of {length} change places");
                }
            }
        }
    }

    #[test]
    fn bytes_are_added_as_the_words_that_they_fill() {
        let bytes: Vec<u8> = (1..=64).collect();
        for length in 0..=bytes.len() {
            let mut words = bytes[..length].to_vec();
            words.resize(length.next_multiple_of(8), 0);
            let words: Vec<u64> = words.as_chunks().0.iter().map(|word| u64::from_ne_bytes(*word)).collect();
            let (mut by_bytes, mut by_words) = (Sum::new(7), Sum::new(7));
            by_bytes.add_bytes(&bytes[..length]);
            by_words.add_all(&words);
            assert_eq!(by_bytes.finish(), by_words.finish(), "{length} bytes");
        }
    }

    fn samples() -> impl Iterator<Item = u64> {
        (0..2000).chain((0..20_000u64).map(|n| fold(n + 1, LAST)))
    }

    #[test]
    fn zero_is_no_number() {
        assert_eq!((open32(0), open64(0)), (None, None));
    }

    #[test]
    fn a_byte_that_changes_is_found_in_every_number() {
        for value in samples() {
            let (narrow, wide) = ((value as u32) % LIMIT32, value % LIMIT64);
            assert_eq!((open32(seal32(narrow)), open64(seal64(wide))), (Some(narrow), Some(wide)));
            for change in 1..=255u64 {
                for byte in 0..4 {
                    assert_eq!(open32(seal32(narrow) ^ (change as u32) << (8 * byte)), None);
                }
                for byte in 0..8 {
                    assert_eq!(open64(seal64(wide) ^ change << (8 * byte)), None);
                }
            }
        }
    }
}
