//! A record in its cells: how it is described, copied out and checked.
//!
//! The first cell describes it. That description has a checksum of its own, which every walk along a chain
//! verifies: otherwise a damaged hash would make a record invisible, and its key would be granted twice.
//! The body (the key, then the payload, each padded to whole words) is verified when it is read.

use super::buffer::Buffer;
use super::checked::{Link, Sum};
use super::layout::{Cell, HEAD_WORDS, MAX_KEY, MAX_PAYLOAD, WORDS, kind};

/// A private copy of what a record's first cell says, found whole.
#[derive(Clone, Copy, Debug)]
pub struct Head {
    /// Sealed link to the second cell.
    pub more: u32,
    pub key_len: usize,
    pub payload_len: usize,
    /// Over the body.
    pub sum: u64,
    pub hash: [u8; 20],
}

/// A key and what it is found by.
#[derive(Clone, Copy)]
pub struct KeyRef<'k> {
    pub bytes: &'k [u8],
    pub hash: [u8; 20],
}

const fn words_for(bytes: usize) -> usize {
    bytes.div_ceil(8)
}

pub fn body_words(key_len: usize, payload_len: usize) -> usize {
    words_for(key_len) + words_for(payload_len)
}

impl Head {
    /// What the cell of this number says, if it is the first of a record and whole.
    #[inline]
    pub fn read(cell: &Cell, number: u32) -> Option<Head> {
        if cell.kind.load() != kind::RECORD {
            return None;
        }
        let words: [u64; HEAD_WORDS] = std::array::from_fn(|at| cell.words[at].load());
        let head = Head {
            more: words[0] as u32,
            key_len: (words[0] >> 32) as usize,
            payload_len: words[1] as u32 as usize,
            sum: words[2],
            hash: joined(words[3], words[4], (words[1] >> 32) as u32),
        };
        let whole = words[HEAD_WORDS - 1] == check(&words, number);
        (whole && head.key_len <= MAX_KEY && head.payload_len <= MAX_PAYLOAD).then_some(head)
    }

    #[inline]
    pub fn write(&self, cell: &Cell, number: u32) {
        let (hash, tail) = self.hash.as_chunks::<8>();
        let tail = u32::from_le_bytes(*tail.first_chunk().expect("a hash has 20 bytes"));
        let mut words = [
            u64::from(self.more) | (self.key_len as u64) << 32,
            self.payload_len as u64 | u64::from(tail) << 32,
            self.sum,
            u64::from_le_bytes(hash[0]),
            u64::from_le_bytes(hash[1]),
            0,
        ];
        words[HEAD_WORDS - 1] = check(&words, number);
        for (word, value) in cell.words.iter().zip(words) {
            word.fill(value);
        }
        cell.kind.store(kind::RECORD);
    }

    pub fn body_words(&self) -> usize {
        body_words(self.key_len, self.payload_len)
    }

    /// Where the payload is in a copy of the body.
    pub fn payload(&self) -> std::ops::Range<usize> {
        let from = words_for(self.key_len) * 8;
        from..from + self.payload_len
    }
}

#[inline]
fn joined(first: u64, second: u64, third: u32) -> [u8; 20] {
    let mut hash = [0; 20];
    hash[..8].copy_from_slice(&first.to_le_bytes());
    hash[8..16].copy_from_slice(&second.to_le_bytes());
    hash[16..].copy_from_slice(&third.to_le_bytes());
    hash
}

/// The number is part of it: a cell that is read in another's place is damage.
#[inline]
fn check(words: &[u64; HEAD_WORDS], number: u32) -> u64 {
    let mut sum = Sum::new(u64::from(number));
    words[..HEAD_WORDS - 1].iter().for_each(|&word| sum.add(word));
    sum.finish()
}

/// Copies a body out. `cell` answers the further cells; `None`, like any other damage, ends it.
#[inline]
pub fn copy<'a>(first: &'a Cell, head: &Head, into: &mut Buffer, cell: impl Fn(u32) -> Option<&'a Cell>) -> Option<()> {
    let (mut rest, _) = into.room(head.body_words() * 8).as_chunks_mut::<8>();
    let mut sum = Sum::new(0);
    let (mut here, mut from, mut link) = (first, HEAD_WORDS, head.more);
    loop {
        let (now, later) = rest.split_at_mut(rest.len().min(WORDS - from));
        for (word, place) in here.words[from..].iter().zip(now) {
            let word = word.load();
            sum.add(word);
            *place = word.to_ne_bytes();
        }
        rest = later;
        if rest.is_empty() {
            break;
        }
        here = cell(Link::open(link)?.0).filter(|cell| cell.kind.load() == kind::FURTHER)?;
        (from, link) = (0, here.next.load());
    }
    (link == Link::NONE.seal() && sum.finish() == head.sum).then_some(())
}

/// Fewer than eight bytes, and zeros behind them.
#[inline]
fn padded(bytes: &[u8]) -> [u8; 8] {
    let word = match (bytes.first_chunk(), bytes.last_chunk()) {
        // The two have bytes in common.
        (Some(first), Some(last)) => {
            let last = u64::from(u32::from_le_bytes(*last));
            u64::from(u32::from_le_bytes(*first)) | last << (8 * (bytes.len() - size_of::<u32>()))
        }
        _ => bytes.iter().rev().fold(0, |word, &byte| word << 8 | u64::from(byte)),
    };
    word.to_le_bytes()
}

/// Puts a body into cells, one after the other. `further` answers the next cell and its sealed link.
pub struct Writer<'a, F> {
    cell: &'a Cell,
    at: usize,
    sum: Sum,
    /// Sealed link from the first cell.
    more: u32,
    in_first: bool,
    further: F,
}

impl<'a, E, F: FnMut() -> Result<(&'a Cell, u32), E>> Writer<'a, F> {
    pub fn new(first: &'a Cell, further: F) -> Self {
        Writer { cell: first, at: HEAD_WORDS, sum: Sum::new(0), more: Link::NONE.seal(), in_first: true, further }
    }

    #[inline]
    pub fn put(&mut self, bytes: &[u8]) -> Result<(), E> {
        let (words, rest) = bytes.as_chunks::<8>();
        self.put_words(words)?;
        if rest.is_empty() { Ok(()) } else { self.put_words(&[padded(rest)]) }
    }

    #[inline]
    fn put_words(&mut self, mut words: &[[u8; 8]]) -> Result<(), E> {
        while !words.is_empty() {
            if self.at == WORDS {
                self.go_on()?;
            }
            let (now, later) = words.split_at(words.len().min(WORDS - self.at));
            // In a register, other than behind `self`.
            let mut sum = self.sum;
            for (place, word) in self.cell.words[self.at..].iter().zip(now) {
                let word = u64::from_ne_bytes(*word);
                place.fill(word);
                sum.add(word);
            }
            self.sum = sum;
            self.at += now.len();
            words = later;
        }
        Ok(())
    }

    /// Continues in a further cell.
    #[cold]
    fn go_on(&mut self) -> Result<(), E> {
        let (cell, link) = (self.further)()?;
        if self.in_first {
            self.more = link;
        } else {
            self.cell.next.store(link);
        }
        cell.kind.store(kind::FURTHER);
        (self.cell, self.at, self.in_first) = (cell, 0, false);
        Ok(())
    }

    /// Ends the chain of cells; answers the sealed link to the second, and the checksum.
    pub fn finish(self) -> (u32, u64) {
        if !self.in_first {
            self.cell.next.store(Link::NONE.seal());
        }
        (self.more, self.sum.finish())
    }
}
