//! A record in its cells: its description, copying it out, and checking it.
//!
//! The first cell describes it. That description has a checksum of its own, which every walk along a chain
//! verifies: otherwise a damaged hash would make a record invisible, and its key would be granted twice.
//! The body (the key, then the payload, each padded to whole words) is verified when it is read.

use super::buffer::Buffer;
use super::checked::{self, Link, Sum};
use super::layout::{self, Cell, HEAD_WORDS, MAX_KEY, MAX_PAYLOAD, WORDS, kind};
use super::word::Word64;

/// A private copy of the description in a record's first cell, whose checksum is right.
#[derive(Clone, Copy, Debug)]
pub struct Head {
    pub body: Body,
    pub hash: [u8; 20],
}

/// The description of a record's body, in its first cell.
#[derive(Clone, Copy, Debug)]
pub struct Body {
    /// The sealed link to the second cell.
    pub more: u32,
    pub key_len: usize,
    pub payload_len: usize,
    pub sum: u64,
}

/// A key and its hash.
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
    /// The description in a cell, if it is the first of a record, and the checksum is right.
    #[inline]
    pub fn read(cell: &Cell, number: u32) -> Option<Head> {
        if cell.kind.load() != kind::RECORD {
            return None;
        }
        let words: [u64; HEAD_WORDS] = std::array::from_fn(|at| cell.words[at].load());
        let body = Body {
            more: words[0] as u32,
            key_len: (words[0] >> 32) as usize,
            payload_len: words[1] as u32 as usize,
            sum: words[2],
        };
        let hash = joined(words[3], words[4], (words[1] >> 32) as u32);
        let whole = words[HEAD_WORDS - 1] == check(&words, number);
        (whole && body.key_len <= MAX_KEY && body.payload_len <= MAX_PAYLOAD).then_some(Head { body, hash })
    }

    #[inline]
    pub fn write(&self, cell: &Cell, number: u32) {
        let (body, (first, second, tail)) = (&self.body, split(&self.hash));
        let mut words = [
            u64::from(body.more) | (body.key_len as u64) << 32,
            body.payload_len as u64 | u64::from(tail) << 32,
            body.sum,
            first,
            second,
            0,
        ];
        words[HEAD_WORDS - 1] = check(&words, number);
        for (word, value) in cell.words.iter().zip(words) {
            word.fill(value);
        }
        cell.kind.store(kind::RECORD);
    }

    #[inline]
    pub fn is_of(&self, key: &KeyRef<'_>) -> bool {
        // As numbers, so that they are compared in registers.
        split(&self.hash) == split(&key.hash)
    }
}

impl Body {
    #[inline]
    pub fn words(&self) -> usize {
        body_words(self.key_len, self.payload_len)
    }

    #[inline]
    pub fn cells(&self) -> u32 {
        layout::cells_for(self.words())
    }

    /// The place of the payload in a copy of the body.
    #[inline]
    pub fn payload(&self) -> std::ops::Range<usize> {
        let from = words_for(self.key_len) * 8;
        from..from + self.payload_len
    }
}

/// A hash as numbers.
#[inline]
fn split(hash: &[u8; 20]) -> (u64, u64, u32) {
    let (words, tail) = hash.as_chunks::<8>();
    let tail = tail.first_chunk().expect("a hash has 20 bytes");
    (u64::from_le_bytes(words[0]), u64::from_le_bytes(words[1]), u32::from_le_bytes(*tail))
}

#[inline]
fn joined(first: u64, second: u64, third: u32) -> [u8; 20] {
    let mut hash = [0; 20];
    hash[..8].copy_from_slice(&first.to_le_bytes());
    hash[8..16].copy_from_slice(&second.to_le_bytes());
    hash[16..].copy_from_slice(&third.to_le_bytes());
    hash
}

/// The checksum of a description. It includes the number of the cell, so that a cell in another's place is damage.
#[inline]
fn check(words: &[u64; HEAD_WORDS], number: u32) -> u64 {
    let mut sum = Sum::new(u64::from(number));
    sum.add_all(&words[..HEAD_WORDS - 1]);
    sum.finish()
}

/// The checksum of a body: of the key, then of the payload.
#[inline]
fn sum(key: &[u8], payload: &[u8]) -> u64 {
    let mut sum = Sum::new(0);
    sum.add_bytes(key);
    sum.add_bytes(payload);
    sum.finish()
}

/// Copies a body out. `cell` returns the further cells; `None` counts as damage.
#[inline(always)]
pub fn copy<'a>(first: &'a Cell, body: &Body, into: &mut Buffer, cell: impl Fn(u32) -> Option<&'a Cell>) -> Option<()> {
    let copy = into.room(body.words() * 8);
    let (places, _) = copy.as_chunks_mut::<8>();
    let key_words = words_for(body.key_len);
    let found = match first.words[HEAD_WORDS..].split_at_checked(places.len()) {
        Some((words, _)) => {
            let ((key, payload), (key_places, payload_places)) =
                (words.split_at(key_words), places.split_at_mut(key_words));
            let mut sum = Sum::new(0);
            get(key, key_places, &mut sum);
            get(payload, payload_places, &mut sum);
            if body.more != Link::NONE.seal() {
                return None;
            }
            sum.finish()
        }
        None => {
            copy_along(first, body.more, places, cell)?;
            let (key, payload) = copy.split_at(key_words * 8);
            sum(key, payload)
        }
    };
    (found == body.sum).then_some(())
}

/// Copies words, and adds them to a sum.
#[inline]
fn get(words: &[Word64], places: &mut [[u8; 8]], sum: &mut Sum) {
    let (pairs, last) = places.as_chunks_mut::<2>();
    let (words, rest) = words.split_at(2 * pairs.len());
    for ([first, second], pair) in words.as_chunks().0.iter().zip(pairs) {
        let (first, second) = (first.load(), second.load());
        *pair = [first.to_ne_bytes(), second.to_ne_bytes()];
        sum.add(first, second);
    }
    if let ([word], [place]) = (rest, last) {
        let word = word.load();
        *place = word.to_ne_bytes();
        sum.add(word, 0);
    }
}

/// As [`copy`], out of several cells.
#[cold]
fn copy_along<'a>(
    first: &'a Cell,
    more: u32,
    places: &mut [[u8; 8]],
    cell: impl Fn(u32) -> Option<&'a Cell>,
) -> Option<()> {
    let (mut here, mut from, mut link, mut rest) = (first, HEAD_WORDS, more, places);
    loop {
        let (now, later) = rest.split_at_mut(rest.len().min(WORDS - from));
        for (word, place) in here.words[from..].iter().zip(now) {
            *place = word.load().to_ne_bytes();
        }
        rest = later;
        if rest.is_empty() {
            break;
        }
        here = cell(Link::open(link)?.0).filter(|cell| cell.kind.load() == kind::FURTHER)?;
        (from, link) = (0, here.next.load());
    }
    (link == Link::NONE.seal()).then_some(())
}

/// Writes a body into cells, one after the other. `further` returns the next cell and its sealed link. Returns the
/// sealed link to the second cell, and the checksum.
#[inline(always)]
pub fn write<'a, E>(
    first: &'a Cell,
    key: &[u8],
    payload: &[u8],
    further: impl FnMut() -> Result<(&'a Cell, u32), E>,
) -> Result<(u32, u64), E> {
    let (key_words, words) = (words_for(key.len()), body_words(key.len(), payload.len()));
    match first.words[HEAD_WORDS..].split_at_checked(words) {
        Some((places, _)) => {
            let (key_places, payload_places) = places.split_at(key_words);
            let mut sum = Sum::new(0);
            put(key_places, key, &mut sum);
            put(payload_places, payload, &mut sum);
            Ok((Link::NONE.seal(), sum.finish()))
        }
        None => Ok((write_along(first, key, payload, further)?, sum(key, payload))),
    }
}

/// Writes bytes into words, and adds them to a sum, as [`Sum::add_bytes`] does.
#[inline]
fn put(places: &[Word64], bytes: &[u8], sum: &mut Sum) {
    let fill = |place: &Word64, bytes: &[u8]| {
        let word = bytes.first_chunk().map_or_else(|| checked::padded(bytes), |word| u64::from_ne_bytes(*word));
        place.fill(word);
        word
    };
    let (pairs, rest) = bytes.as_chunks::<16>();
    let (places, last) = places.split_at(2 * pairs.len());
    for ([first, second], pair) in places.as_chunks().0.iter().zip(pairs) {
        sum.add(fill(first, &pair[..8]), fill(second, &pair[8..]));
    }
    match last {
        [] => {}
        [place] => sum.add(fill(place, rest), 0),
        [first, second, ..] => sum.add(fill(first, rest), fill(second, &rest[8..])),
    }
}

/// As [`write()`], into several cells.
#[cold]
fn write_along<'a, E>(
    first: &'a Cell,
    key: &[u8],
    payload: &[u8],
    further: impl FnMut() -> Result<(&'a Cell, u32), E>,
) -> Result<u32, E> {
    let mut writer = Writer { cell: first, at: HEAD_WORDS, more: Link::NONE.seal(), in_first: true, further };
    for part in [key, payload] {
        let (words, rest) = part.as_chunks::<8>();
        writer.put(words)?;
        if !rest.is_empty() {
            writer.put(&[checked::padded(rest).to_ne_bytes()])?;
        }
    }
    if !writer.in_first {
        writer.cell.next.store(Link::NONE.seal());
    }
    Ok(writer.more)
}

struct Writer<'a, F> {
    cell: &'a Cell,
    at: usize,
    /// The sealed link in the first cell.
    more: u32,
    in_first: bool,
    further: F,
}

impl<'a, E, F: FnMut() -> Result<(&'a Cell, u32), E>> Writer<'a, F> {
    fn put(&mut self, mut words: &[[u8; 8]]) -> Result<(), E> {
        while !words.is_empty() {
            if self.at == WORDS {
                self.go_on()?;
            }
            let (now, later) = words.split_at(words.len().min(WORDS - self.at));
            for (place, word) in self.cell.words[self.at..].iter().zip(now) {
                place.fill(u64::from_ne_bytes(*word));
            }
            self.at += now.len();
            words = later;
        }
        Ok(())
    }

    /// Continues in a further cell.
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
}
