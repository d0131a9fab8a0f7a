//! A buffer for the bytes of one record, outside the table.

use super::layout::{HEAD_WORDS, WORDS};

/// The number of bytes of a record that fit in its first cell. Most records are no larger: for them, nothing is
/// allocated.
const FEW: usize = (WORDS - HEAD_WORDS) * 8;

pub struct Buffer {
    few: [u8; FEW],
    many: Vec<u8>,
    length: usize,
}

impl Buffer {
    #[inline]
    pub const fn new() -> Buffer {
        Buffer { few: [0; FEW], many: Vec::new(), length: 0 }
    }

    /// A slice of this length, to be written. Its contents are unspecified.
    #[inline]
    pub fn room(&mut self, length: usize) -> &mut [u8] {
        self.length = length;
        if length > FEW {
            self.many.resize(length, 0);
            return &mut self.many;
        }
        &mut self.few[..length]
    }

    /// The bytes that were written last.
    #[inline]
    pub fn bytes(&self) -> &[u8] {
        if self.length > FEW { &self.many } else { &self.few[..self.length] }
    }
}

impl Default for Buffer {
    fn default() -> Buffer {
        Buffer::new()
    }
}
