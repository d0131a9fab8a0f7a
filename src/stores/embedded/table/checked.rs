//! Numbers that say themselves whether they are whole: the value, and a remainder of it.
//!
//! The remainder is by a prime above 255, so every change of the value within one byte changes the
//! remainder; the widths are chosen so that this also holds for the byte that has parts of both (the tests
//! try every byte). Zero is not a whole number in this sense: a page that the file system has lost, and
//! filled with zeros, is damage and not an empty table.

/// Values of a `u32` are below this.
pub const LIMIT32: u32 = 1 << 23;
/// Values of a `u64` are below this.
pub const LIMIT64: u64 = 1 << 53;

const BITS32: u32 = 9;
const PRIME32: u32 = 509;
const BITS64: u32 = 11;
const PRIME64: u64 = 2039;
/// What is added before the remainder is taken, so that it is not 0 for 0.
const OFFSET: u32 = 257;

#[inline]
pub const fn seal32(value: u32) -> u32 {
    (value << BITS32) | ((value + OFFSET) % PRIME32)
}

/// The value, if the word is whole.
#[inline]
pub const fn open32(word: u32) -> Option<u32> {
    let value = word >> BITS32;
    if seal32(value) == word { Some(value) } else { None }
}

#[inline]
pub const fn seal64(value: u64) -> u64 {
    (value << BITS64) | ((value + OFFSET as u64) % PRIME64)
}

/// The value, if the word is whole.
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
/// Two lanes that take turns, so that the multiplications overlap.
#[derive(Clone, Copy)]
pub struct Sum {
    this: u64,
    other: u64,
}

/// Odd numbers of random bits.
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
        Sum { this: seed ^ LAST, other: seed.wrapping_add(FACTOR) }
    }

    #[inline]
    pub fn add(&mut self, word: u64) {
        let mixed = fold(self.this ^ word, FACTOR);
        self.this = self.other;
        // The value itself stays in play: what is folded to the same number differs here.
        self.other = mixed.rotate_left(23).wrapping_add(word);
    }

    #[inline]
    pub fn finish(self) -> u64 {
        fold(self.this ^ LAST, FACTOR) ^ fold(self.other.rotate_left(32) ^ FACTOR, LAST)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
