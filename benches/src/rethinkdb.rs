//! Locks on a RethinkDB server, compared with the bare queries that they consist of, on the same server and in the same
//! run. Needs `NBLOCK_BENCH_RETHINKDB_URL`, without user, password or TLS.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use ring::{digest, hmac, pbkdf2};

use crate::{client, forever, give, hand_over, in_turns, lock, median, report, take};

const ROUNDS: usize = 300;

pub fn run() {
    let Some(url) = std::env::var("NBLOCK_BENCH_RETHINKDB_URL").ok().filter(|url| !url.is_empty()) else {
        println!("rethinkdb: not measured, NBLOCK_BENCH_RETHINKDB_URL names no server");
        return;
    };
    let authority = url.split("//").nth(1).and_then(|rest| rest.split('/').next()).expect("a host");
    let database = url.split('/').nth(3).and_then(|rest| rest.split('?').next()).expect("a database");
    let durability = if url.contains("durability=soft") { "soft" } else { "hard" };
    let asked = Asked { database, durability };
    cycles(&url, authority, &asked);
    handover(&url, authority, &asked);
}

/// The database of the bare queries, and their durability.
struct Asked<'a> {
    database: &'a str,
    durability: &'static str,
}

/// The row of a key, as a term. (The numbers of terms are from RethinkDB's ql2.proto.)
fn row(&Asked { database, .. }: &Asked, key: &str) -> String {
    format!(r#"[16,[[15,[[14,["{database}"]],"nobrainer_locks"]],"{key}"]]"#)
}

/// An INSERT without an existing row: the lower bound for an acquire.
fn write(&Asked { database, durability }: &Asked, key: &str) -> String {
    let fresh = format!(
        r#"{{"key_hash":"{key}","key":"bench","instance_token":"0123456789abcdef0123456789abcdef.1","expires_at":[24,[[103,[]],60]],"n":1}}"#
    );
    format!(
        r#"[1,[56,[[15,[[14,["{database}"]],"nobrainer_locks"]],{fresh}],{{"durability":"{durability}","return_changes":"always"}}],{{}}]"#
    )
}

fn delete(asked: &Asked, key: &str) -> String {
    format!(r#"[1,[54,[{}],{{"durability":"{}"}}],{{}}]"#, row(asked, key), asked.durability)
}

/// The queries that the library sends to acquire and release, with the same row and the same conditions.
fn same_terms(asked: &Asked, key: &str) -> [String; 2] {
    let Asked { database, durability } = *asked;
    let token = "0123456789abcdef0123456789abcdef.1";
    let fresh = format!(
        r#"{{"expires_at":[24,[[103,[]],60.0]],"instance_token":"{token}","key":"jobs:cycles","key_hash":"{key}","n":1,"owner":{{"acquired_at":[103,[]],"app":"nblock-benches","boot_id":"00000000-0000-0000-0000-000000000000","host":"host","pid":12345}}}}"#
    );
    let table = format!(r#"[15,[[14,["{database}"]],"nobrainer_locks"]]"#);
    let kept = r#"[12,[[24,["nblock keeps ",[172,[[10,[1]]]]]]]]"#;
    let conflict = format!("[69,[[2,[5,1,4]],{kept}]]");
    let insert = format!(r#"[56,[{table},{fresh}],{{"durability":"{durability}","conflict":{conflict}}}]"#);
    let now = "[102,[[103,[]]]]";
    let take = format!("[1,[2,[{now},[65,[[21,[{now},99999999999.9]],null,{insert}]]]]]");
    let field = |name: &str| format!(r#"[170,[[10,[1]],"{name}"]]"#);
    let is = |name: &str, kind: &str| format!(r#"[17,[[52,[{}]],"{kind}"]]"#, field(name));
    let record = format!("[67,[{},{}]]", is("expires_at", "PTYPE<TIME>"), is("key", "STRING"));
    let ours = format!(r#"[17,[{},"{token}"]]"#, field("instance_token"));
    let plain = format!(r#"[17,[[67,[[32,[[10,[1]],"lock_count"]],{}]],false]]"#, is("lock_count", "NUMBER"));
    let applies = format!("[92,[[67,[{record},[67,[{ours},{plain}]]]],false]]");
    let decide = format!("[69,[[2,[1]],[65,[{applies},null,{kept}]]]]");
    let options = format!(r#"{{"durability":"{durability}"}}"#);
    let give = format!(r#"[1,[2,[{now},[55,[{},{decide}],{options}]]]]"#, row(asked, key));
    [take, give]
}

/// The URL of a second store on the same server, with its own connection.
fn second(url: &str) -> String {
    format!("{url}{}skew=251", if url.contains('?') { '&' } else { '?' })
}

/// The server assigns connections to its threads in turn (RethinkDB src/client_protocol/server.cc: `handle_conn`), and
/// a row belongs to one of these threads. So each side has two connections, made one after the other.
fn two<T>(mut make: impl FnMut() -> T) -> [T; 2] {
    [make(), make()]
}

fn cycles(url: &str, authority: &str, asked: &Asked) {
    let options = forever();
    let locks = [url, &second(url)].map(|url| {
        let lock = lock(client(url), "jobs:cycles");
        take(lock, &options);
        give(lock);
        lock
    });
    let [mut bare, mut same] = two(|| two(|| Bare::connect(authority)));
    let (write, delete) = (write(asked, "bench"), delete(asked, "bench"));
    let [same_write, same_delete] = same_terms(asked, "same");
    let pair = |first: &str, second: &str, on: &mut [Bare; 2]| {
        let start = Instant::now();
        for on in on {
            on.ask(first);
            on.ask(second);
        }
        start.elapsed() / 2
    };
    let [ours, theirs, terms] = in_turns(
        ROUNDS,
        [
            &mut || {
                let start = Instant::now();
                for lock in locks {
                    take(lock, &options);
                    give(lock);
                }
                start.elapsed() / 2
            },
            &mut || pair(&write, &delete, &mut bare),
            &mut || pair(&same_write, &same_delete, &mut same),
        ],
    );
    report("rethinkdb: acquire+release", ours / 1e6, "the two bare writes", theirs / 1e6, "ms", "<= 1.05");
    report("rethinkdb: acquire+release", ours / 1e6, "the same terms, sent bare", terms / 1e6, "ms", "<= 1.05");
}

/// The time from one connection's release to another's grant.
fn handover(url: &str, authority: &str, asked: &Asked) {
    let mut locks = [url, &second(url)].map(|url| lock(client(url), "jobs:handover") as usize);
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    let mut ends = two(|| Bare::connect(authority));
    let (write, delete) = (write(asked, "handover"), delete(asked, "handover"));
    let changes = format!("[1,[152,[{}]],{{}}]", row(asked, "handover"));
    ends[0].ask(&delete);
    // During the pause, the waiter's change feed is opened. Both sides pause, because code is slower after a sleep.
    let pause = Duration::from_millis(30);
    for _ in 0..ROUNDS / 3 {
        ours.push(hand_over(locks, pause));
        locks.reverse();

        let [writer, feed] = &mut ends;
        feed.begin_feed(&changes);
        writer.ask(&write);
        feed.continue_feed();
        std::thread::sleep(pause);
        let released = Instant::now();
        writer.send(&delete);
        feed.continue_feed();
        writer.receive();
        writer.ask(&write);
        theirs.push(released.elapsed().as_nanos() as f64);
        feed.end_feed();
        writer.ask(&delete);
        ends.reverse();
    }
    let (ours, theirs) = (median(ours) / 1e6, median(theirs) / 1e6);
    report("rethinkdb: release to grant elsewhere", ours, "bare change feed and write", theirs, "ms", "<= 1.2");
}

/// A minimal connection.
struct Bare {
    stream: TcpStream,
    token: u64,
    feed: u64,
}

impl Bare {
    fn connect(authority: &str) -> Bare {
        let address = if authority.contains(':') { authority.to_string() } else { format!("{authority}:28015") };
        let stream = TcpStream::connect(address).expect("the server");
        stream.set_nodelay(true).expect("a socket");
        let mut bare = Bare { stream, token: 0, feed: 0 };
        bare.shake_hands();
        bare
    }

    /// The V1_0 handshake with SCRAM-SHA-256, as `admin` without a password.
    fn shake_hands(&mut self) {
        let first = "n=admin,r=benchbenchbench";
        self.stream.write_all(&0x34c2_bdc3u32.to_le_bytes()).expect("a connection");
        self.say(&format!(
            r#"{{"protocol_version":0,"authentication_method":"SCRAM-SHA-256","authentication":"n,,{first}"}}"#
        ));
        self.hear();
        let challenge = authentication(&self.hear());
        let part = |name: &str| {
            let found = challenge.split(',').find_map(|part| part.strip_prefix(name));
            found.expect("a whole challenge").to_string()
        };
        let salt = STANDARD.decode(part("s=")).expect("base64");
        let rounds = part("i=").parse().expect("a number");
        let mut salted = [0; digest::SHA256_OUTPUT_LEN];
        pbkdf2::derive(pbkdf2::PBKDF2_HMAC_SHA256, rounds, &salt, b"", &mut salted);
        let key = |bytes: &[u8]| hmac::Key::new(hmac::HMAC_SHA256, bytes);
        let client_key = hmac::sign(&key(&salted), b"Client Key");
        let stored = digest::digest(&digest::SHA256, client_key.as_ref());
        let last = format!("c=biws,r={}", part("r="));
        let signature = hmac::sign(&key(stored.as_ref()), format!("{first},{challenge},{last}").as_bytes());
        let proof: Vec<u8> = client_key.as_ref().iter().zip(signature.as_ref()).map(|(a, b)| a ^ b).collect();
        self.say(&format!(r#"{{"authentication":"{last},p={}"}}"#, STANDARD.encode(proof)));
        self.hear();
    }

    fn say(&mut self, message: &str) {
        self.stream.write_all(format!("{message}\0").as_bytes()).expect("a connection");
    }

    fn hear(&mut self) -> String {
        let mut message = Vec::new();
        let mut byte = [0];
        loop {
            self.stream.read_exact(&mut byte).expect("a connection");
            if byte[0] == 0 {
                let message = String::from_utf8(message).expect("text");
                assert!(message.contains("true"), "{message}");
                return message;
            }
            message.push(byte[0]);
        }
    }

    fn frame(&mut self, token: u64, query: &str) {
        let mut frame = token.to_le_bytes().to_vec();
        frame.extend_from_slice(&(query.len() as u32).to_le_bytes());
        frame.extend_from_slice(query.as_bytes());
        self.stream.write_all(&frame).expect("a connection");
    }

    fn send(&mut self, query: &str) {
        self.token += 1;
        self.frame(self.token, query);
    }

    fn receive(&mut self) {
        let mut header = [0; 12];
        self.stream.read_exact(&mut header).expect("an answer");
        let mut body = vec![0; u32::from_le_bytes(header[8..].try_into().expect("four bytes")) as usize];
        self.stream.read_exact(&mut body).expect("an answer");
        let body = String::from_utf8_lossy(&body);
        assert!(["1", "2", "3"].iter().any(|kind| body.starts_with(&format!(r#"{{"t":{kind},"#))), "{body}");
    }

    fn ask(&mut self, query: &str) {
        self.send(query);
        self.receive();
    }

    fn begin_feed(&mut self, query: &str) {
        self.ask(query);
        self.feed = self.token;
    }

    fn end_feed(&mut self) {
        self.frame(self.feed, "[3]");
        self.receive();
    }

    /// Requests the feed's next change, and waits for it.
    fn continue_feed(&mut self) {
        self.frame(self.feed, "[2]");
        self.receive();
    }
}

fn authentication(message: &str) -> String {
    let start = message.find(r#""authentication":""#).expect("a challenge") + r#""authentication":""#.len();
    message[start..].split('"').next().expect("a challenge").replace("\\/", "/")
}
