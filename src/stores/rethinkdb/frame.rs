//! The frames that queries and answers travel in: an eight-byte token, a four-byte length, JSON.
//!
//! RethinkDB src/client_protocol/json.cc: `parse_query`, `send_response`; both numbers are little
//! endian.

/// The largest answer that is taken. The server's batches are about 1 MiB
/// (RethinkDB src/rdb_protocol/batching.cc), and one row of ours is less than 2 MiB.
pub const MAX_BODY: usize = 64 << 20;

const HEADER: usize = 12;

/// Appends one frame.
pub fn write(out: &mut Vec<u8>, token: u64, body: &[u8]) {
    let length = u32::try_from(body.len()).expect("queries are far below 4 GiB");
    out.reserve(HEADER + body.len());
    out.extend_from_slice(&token.to_le_bytes());
    out.extend_from_slice(&length.to_le_bytes());
    out.extend_from_slice(body);
}

/// Puts frames together from bytes as they come.
///
/// A length is a claim: space is taken only for bytes that are there.
#[derive(Default)]
pub struct Decoder {
    bytes: Vec<u8>,
    /// How much of `bytes` was given out.
    start: usize,
}

#[derive(Debug, PartialEq, Eq)]
pub struct Frame {
    pub token: u64,
    pub body: Vec<u8>,
}

/// A frame claims to be longer than any answer is.
#[derive(Debug, PartialEq, Eq)]
pub struct TooLong(pub usize);

impl Decoder {
    pub fn push(&mut self, bytes: &[u8]) {
        if self.start == self.bytes.len() {
            self.bytes.clear();
            self.start = 0;
        }
        self.bytes.extend_from_slice(bytes);
    }

    /// The next frame that is complete.
    pub fn next_frame(&mut self) -> Result<Option<Frame>, TooLong> {
        let rest = &self.bytes[self.start..];
        let Some((header, rest)) = rest.split_first_chunk::<HEADER>() else { return Ok(None) };
        let (token, length) = header.split_first_chunk::<8>().expect("a header has 12 bytes");
        let length = u32::from_le_bytes(length.try_into().expect("a header has 12 bytes")) as usize;
        if length > MAX_BODY {
            return Err(TooLong(length));
        }
        if rest.len() < length {
            self.compact();
            return Ok(None);
        }
        let frame = Frame { token: u64::from_le_bytes(*token), body: rest[..length].to_vec() };
        self.start += HEADER + length;
        Ok(Some(frame))
    }

    /// Forgets what was given out, and does not keep the space of one large answer forever.
    fn compact(&mut self) {
        self.bytes.drain(..self.start);
        self.start = 0;
        if self.bytes.capacity() > 1 << 20 && self.bytes.len() < 1 << 16 {
            self.bytes.shrink_to(1 << 16);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stores::rethinkdb::testing::Random;

    #[test]
    fn any_split_gives_the_same_frames() {
        let mut random = Random::seeded();
        for _ in 0..300 {
            let frames: Vec<Frame> = (0..random.below(6))
                .map(|_| {
                    let length = if random.below(8) == 0 { random.below(70_000) } else { random.below(40) };
                    Frame { token: random.next(), body: (0..length).map(|_| random.next() as u8).collect() }
                })
                .collect();
            let mut wire = Vec::new();
            for frame in &frames {
                write(&mut wire, frame.token, &frame.body);
            }
            let mut decoder = Decoder::default();
            let mut decoded = Vec::new();
            let mut rest = &wire[..];
            while !rest.is_empty() {
                let size = if random.below(3) == 0 { 1 } else { 1 + random.below(rest.len()) };
                decoder.push(&rest[..size]);
                rest = &rest[size..];
                while let Some(frame) = decoder.next_frame().unwrap() {
                    decoded.push(frame);
                }
            }
            assert_eq!(decoded, frames);
            assert_eq!(decoder.next_frame(), Ok(None));
        }
    }

    #[test]
    fn a_length_is_not_believed() {
        let mut decoder = Decoder::default();
        let mut header = 5u64.to_le_bytes().to_vec();
        header.extend_from_slice(&u32::MAX.to_le_bytes());
        decoder.push(&header);
        assert_eq!(decoder.next_frame(), Err(TooLong(u32::MAX as usize)));

        let mut decoder = Decoder::default();
        let mut header = 5u64.to_le_bytes().to_vec();
        header.extend_from_slice(&(MAX_BODY as u32).to_le_bytes());
        decoder.push(&header);
        assert_eq!(decoder.next_frame(), Ok(None));
        assert!(decoder.bytes.capacity() < 1 << 12, "no space is taken for bytes that are not there");
    }

    #[test]
    fn random_bytes_never_panic() {
        let mut random = Random::seeded();
        for _ in 0..500 {
            let mut decoder = Decoder::default();
            for _ in 0..random.below(20) {
                let bytes: Vec<u8> = (0..random.below(64)).map(|_| random.next() as u8).collect();
                decoder.push(&bytes);
                while let Ok(Some(_)) = decoder.next_frame() {}
            }
        }
    }
}
