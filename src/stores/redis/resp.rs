//! The protocol of Redis as bytes: commands out, replies in (RESP2 and RESP3).

/// The most bytes that one reply may have. A server's own limit for a string is 512 MiB.
pub const MAX_REPLY: usize = 1 << 30;

/// How deep replies may be nested. Those to our commands have three levels.
const MAX_DEPTH: usize = 16;

/// A reply, or a message that the server pushes.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    Null,
    Integer(i64),
    /// A string of any kind, numbers that are no integers among them.
    Text(Vec<u8>),
    Error(String),
    /// An array or a set; a map as its keys and values in turn.
    Array(Vec<Value>),
    Push(Vec<Value>),
}

impl Value {
    pub fn as_text(&self) -> Option<&str> {
        match self {
            Value::Text(bytes) => std::str::from_utf8(bytes).ok(),
            _ => None,
        }
    }

    pub fn as_integer(&self) -> Option<i64> {
        match self {
            Value::Integer(number) => Some(*number),
            _ => None,
        }
    }

    /// The value of a key in a map.
    pub fn field(&self, name: &str) -> Option<&Value> {
        let Value::Array(items) = self else { return None };
        items.chunks_exact(2).find(|pair| pair[0].as_text() == Some(name)).map(|pair| &pair[1])
    }
}

/// The decimal digits of a number. Every request has many; the standard library's formatting takes ten times as long.
pub struct Digits {
    bytes: [u8; 20],
    begin: usize,
}

impl Digits {
    pub fn of(mut number: u64) -> Digits {
        let mut digits = Digits { bytes: [0; 20], begin: 20 };
        loop {
            digits.begin -= 1;
            digits.bytes[digits.begin] = b'0' + (number % 10) as u8;
            number /= 10;
            if number == 0 {
                return digits;
            }
        }
    }

    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes[self.begin..]
    }
}

/// Appends one argument of a command.
pub fn argument(out: &mut Vec<u8>, bytes: &[u8]) {
    count(out, b'$', bytes.len());
    out.extend_from_slice(bytes);
    out.extend_from_slice(b"\r\n");
}

/// Appends the head of a command with so many arguments, its name among them.
pub fn head(out: &mut Vec<u8>, arguments: usize) {
    count(out, b'*', arguments);
}

/// Appends a whole command.
pub fn command(out: &mut Vec<u8>, arguments: &[&[u8]]) {
    head(out, arguments.len());
    for bytes in arguments {
        argument(out, bytes);
    }
}

fn count(out: &mut Vec<u8>, kind: u8, number: usize) {
    out.push(kind);
    out.extend_from_slice(Digits::of(number as u64).as_bytes());
    out.extend_from_slice(b"\r\n");
}

/// Takes replies out of the bytes of a connection, however they are split.
#[derive(Default)]
pub struct Decoder {
    bytes: Vec<u8>,
    taken: usize,
    /// How many bytes there must be before another try makes sense.
    wanted: usize,
}

/// What answers does not speak the protocol.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Malformed(pub &'static str);

/// Why a reply was not read.
enum Stop {
    /// It needs so many bytes, counted from its beginning.
    Wants(usize),
    Malformed(&'static str),
}

impl Decoder {
    pub fn push(&mut self, bytes: &[u8]) {
        if self.taken > 0 && self.taken == self.bytes.len() {
            self.bytes.clear();
            self.bytes.shrink_to(1 << 20);
            self.taken = 0;
        } else if self.taken > 1 << 16 {
            self.bytes.drain(..self.taken);
            self.taken = 0;
        }
        self.bytes.extend_from_slice(bytes);
    }

    /// Whether every byte belonged to a reply that was read.
    pub fn is_empty(&self) -> bool {
        self.taken == self.bytes.len()
    }

    /// The next reply, or `None` until there are more bytes.
    pub fn next_value(&mut self) -> Result<Option<Value>, Malformed> {
        let bytes = &self.bytes[self.taken..];
        if bytes.is_empty() || bytes.len() < self.wanted {
            return Ok(None);
        }
        let mut reader = Reader { bytes, at: 0 };
        match reader.value(0) {
            Ok(value) => {
                self.taken += reader.at;
                self.wanted = 0;
                Ok(Some(value))
            }
            Err(Stop::Wants(wanted)) if wanted > MAX_REPLY => Err(Malformed("a reply is longer than 1 GiB")),
            Err(Stop::Wants(wanted)) => {
                self.wanted = wanted;
                Ok(None)
            }
            Err(Stop::Malformed(why)) => Err(Malformed(why)),
        }
    }
}

struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    fn value(&mut self, depth: usize) -> Result<Value, Stop> {
        if depth > MAX_DEPTH {
            return Err(Stop::Malformed("a reply is nested too deep"));
        }
        let line = self.line()?;
        let (kind, rest) = line.split_first().ok_or(Stop::Malformed("an empty line in place of a reply"))?;
        match kind {
            b'+' | b',' | b'(' => Ok(Value::Text(rest.to_vec())),
            b'-' => Ok(Value::Error(String::from_utf8_lossy(rest).into_owned())),
            b':' => Ok(Value::Integer(integer(rest)?)),
            b'_' => Ok(Value::Null),
            b'#' => Ok(Value::Integer(i64::from(rest == b"t"))),
            b'$' | b'=' | b'!' => match length(rest)? {
                None => Ok(Value::Null),
                Some(length) => {
                    let bytes = self.bulk(length)?;
                    Ok(match kind {
                        // `txt:` or `mkd:` before the text.
                        b'=' => Value::Text(bytes.get(4..).unwrap_or_default().to_vec()),
                        b'!' => Value::Error(String::from_utf8_lossy(bytes).into_owned()),
                        _ => Value::Text(bytes.to_vec()),
                    })
                }
            },
            b'*' | b'~' => match length(rest)? {
                None => Ok(Value::Null),
                Some(count) => self.items(count, depth).map(Value::Array),
            },
            b'%' => {
                let pairs = length(rest)?.ok_or(Stop::Malformed("a map without a length"))?;
                self.items(pairs.saturating_mul(2), depth).map(Value::Array)
            }
            b'>' => {
                let count = length(rest)?.ok_or(Stop::Malformed("a push without a length"))?;
                self.items(count, depth).map(Value::Push)
            }
            // Attributes stand before the value that they are about, and say nothing that we asked for.
            b'|' => {
                let pairs = length(rest)?.ok_or(Stop::Malformed("attributes without a length"))?;
                self.items(pairs.saturating_mul(2), depth)?;
                self.value(depth + 1)
            }
            _ => Err(Stop::Malformed("a reply of a kind that Redis does not have")),
        }
    }

    fn items(&mut self, count: usize, depth: usize) -> Result<Vec<Value>, Stop> {
        // Each has three bytes at least: a count is not believed beyond what can follow it.
        let mut items = Vec::with_capacity(count.min((self.bytes.len() - self.at) / 3));
        for _ in 0..count {
            items.push(self.value(depth + 1)?);
        }
        Ok(items)
    }

    fn line(&mut self) -> Result<&'a [u8], Stop> {
        let rest = &self.bytes[self.at..];
        match rest.iter().position(|byte| *byte == b'\n') {
            Some(end) if end > 0 && rest[end - 1] == b'\r' => {
                self.at += end + 1;
                Ok(&rest[..end - 1])
            }
            Some(_) => Err(Stop::Malformed("a line that does not end as Redis ends lines")),
            None => Err(Stop::Wants(self.bytes.len() + 1)),
        }
    }

    fn bulk(&mut self, length: usize) -> Result<&'a [u8], Stop> {
        let end = self.at.saturating_add(length);
        if self.bytes.len() < end.saturating_add(2) {
            return Err(Stop::Wants(end.saturating_add(2)));
        }
        let bytes = &self.bytes[self.at..end];
        if &self.bytes[end..end + 2] != b"\r\n" {
            return Err(Stop::Malformed("a string that is longer than it says"));
        }
        self.at = end + 2;
        Ok(bytes)
    }
}

fn integer(digits: &[u8]) -> Result<i64, Stop> {
    std::str::from_utf8(digits).ok().and_then(|digits| digits.parse().ok()).ok_or(Stop::Malformed("an invalid number"))
}

/// `None`: the null of RESP2.
fn length(digits: &[u8]) -> Result<Option<usize>, Stop> {
    match integer(digits)? {
        -1 => Ok(None),
        length => usize::try_from(length).map(Some).map_err(|_| Stop::Malformed("a length below zero")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(text: &str) -> Value {
        Value::Text(text.as_bytes().to_vec())
    }

    #[test]
    fn replies_of_all_kinds_however_they_are_split() {
        let bytes = b"+OK\r\n-ERR no\r\n:-5\r\n$3\r\na\r\n\r\n$-1\r\n_\r\n#t\r\n,1.5\r\n=5\r\ntxt:x\r\n*2\r\n:1\r\n*-1\r\n%1\r\n+k\r\n~1\r\n:2\r\n>2\r\n+invalidate\r\n*1\r\n$1\r\nk\r\n|1\r\n+a\r\n+b\r\n:7\r\n";
        let expected = vec![
            text("OK"),
            Value::Error("ERR no".into()),
            Value::Integer(-5),
            text("a\r\n"),
            Value::Null,
            Value::Null,
            Value::Integer(1),
            text("1.5"),
            text("x"),
            Value::Array(vec![Value::Integer(1), Value::Null]),
            Value::Array(vec![text("k"), Value::Array(vec![Value::Integer(2)])]),
            Value::Push(vec![text("invalidate"), Value::Array(vec![text("k")])]),
            Value::Integer(7),
        ];
        for size in [1, 2, 3, 7, bytes.len()] {
            let mut decoder = Decoder::default();
            let mut read = Vec::new();
            for part in bytes.chunks(size) {
                decoder.push(part);
                while let Some(value) = decoder.next_value().unwrap() {
                    read.push(value);
                }
            }
            assert_eq!(read, expected, "in parts of {size}");
        }
    }

    #[test]
    fn what_is_not_redis_is_refused() {
        for bytes in [
            &b"HTTP/1.1 400 Bad Request\r\n"[..],
            b"\r\n",
            b"+OK\n",
            b":x\r\n",
            b"$-2\r\n",
            b"$1\r\nabc\r\n",
            b"$9999999999999\r\n",
            b"%-1\r\n",
            "*1\r\n".repeat(20).as_bytes(),
        ] {
            let mut decoder = Decoder::default();
            decoder.push(bytes);
            assert!(decoder.next_value().is_err(), "{}", String::from_utf8_lossy(bytes));
        }
        // A count that nothing follows takes no memory.
        let mut decoder = Decoder::default();
        decoder.push(b"*99999999999\r\n");
        assert_eq!(decoder.next_value(), Ok(None));
    }

    #[test]
    fn commands() {
        let mut out = Vec::new();
        command(&mut out, &[b"GET", b"a\r\nb"]);
        assert_eq!(out, b"*2\r\n$3\r\nGET\r\n$4\r\na\r\nb\r\n");
    }
}
