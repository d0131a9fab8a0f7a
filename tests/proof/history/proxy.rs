//! What stands between clients and a server, and cuts their connections: by seed, at once, in the middle of
//! a request, after it was forwarded and before its answer comes back, in the middle of the answer; or
//! stalls them, or closes one direction.

use std::fmt;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::support::Random;

/// RethinkDB's port for clients where a URL names none.
const DRIVER_PORT: u16 = 28015;

/// What happens to a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    Untouched,
    AtOnce,
    /// So many bytes of the client's get through, and no more.
    InRequest(usize),
    /// What the client sends gets through; after so many bytes no answer does, and some time later it is cut.
    Unanswered(usize, Duration),
    /// So many bytes of the server's get through, and no more.
    InAnswer(usize),
    /// After so many bytes of the client's, nothing moves for a while.
    Stalled(usize, Duration),
    /// After so many bytes of the client's, the client sees that the server sends nothing more.
    ServerSilent(usize),
    /// After so many bytes of the client's, the server sees that the client sends nothing more.
    ClientSilent(usize),
}

impl Fault {
    const NAMES: [&str; 8] = [
        "left alone",
        "cut at once",
        "cut in a request",
        "cut before the answer",
        "cut in an answer",
        "stalled",
        "closed by half to the client",
        "closed by half to the server",
    ];

    fn draw(random: &mut Random) -> Fault {
        // A greeting has about 700 bytes, and a lock and unlock thereafter 2,500.
        let bytes = match random.below(8) {
            0 => random.below(1_000),
            _ => random.below(120_000),
        };
        let while_ms = match random.below(20) {
            // Longer than clients wait for an answer by default.
            0 => 5_500,
            _ => 20 + random.below(800),
        };
        let length = Duration::from_millis(while_ms as u64);
        match random.below(12) {
            0 => Fault::Untouched,
            1 => Fault::AtOnce,
            2 | 3 => Fault::InRequest(bytes),
            4..=6 => Fault::Unanswered(bytes, length),
            7 | 8 => Fault::InAnswer(bytes),
            9 => Fault::Stalled(bytes, length),
            10 => Fault::ServerSilent(bytes),
            _ => Fault::ClientSilent(bytes),
        }
    }

    fn number(self) -> usize {
        match self {
            Fault::Untouched => 0,
            Fault::AtOnce => 1,
            Fault::InRequest(_) => 2,
            Fault::Unanswered(..) => 3,
            Fault::InAnswer(_) => 4,
            Fault::Stalled(..) => 5,
            Fault::ServerSilent(_) => 6,
            Fault::ClientSilent(_) => 7,
        }
    }
}

/// One host's. It lives as long as the program.
pub struct Proxy {
    /// How often each fault came to pass.
    faults: Arc<[AtomicU64; Fault::NAMES.len()]>,
    port: u16,
}

impl Proxy {
    /// The URL with a proxy in place of each host.
    pub fn before(url: &str, seed: u64) -> (String, Vec<Proxy>) {
        let start = url.find("//").expect("a URL with hosts") + 2;
        let end = url[start..].find('/').map_or(url.len(), |end| start + end);
        let start = url[..end].rfind('@').map_or(start, |at| at + 1);
        let proxies: Vec<Proxy> =
            (0..).zip(url[start..end].split(',')).map(|(n, host)| Proxy::start(host, seed + n)).collect();
        let hosts: Vec<String> = proxies.iter().map(|proxy| format!("127.0.0.1:{}", proxy.port)).collect();
        (format!("{}{}{}", &url[..start], hosts.join(","), &url[end..]), proxies)
    }

    fn start(host: &str, seed: u64) -> Proxy {
        let address = match host.rsplit_once(':') {
            Some((_, port)) if port.parse::<u16>().is_ok() => host.to_string(),
            _ => format!("{host}:{DRIVER_PORT}"),
        };
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let faults = Arc::new([const { AtomicU64::new(0) }; Fault::NAMES.len()]);
        let counts = Arc::clone(&faults);
        std::thread::spawn(move || {
            let mut random = Random::new(seed);
            for client in listener.incoming() {
                let fault = Fault::draw(&mut random);
                let client = client.unwrap();
                match TcpStream::connect(&address) {
                    Ok(server) if fault != Fault::AtOnce => {
                        Connection::carry(client, server, fault, random.below(2) == 0, &counts)
                    }
                    _ => count(&counts, Fault::AtOnce),
                }
            }
        });
        Proxy { faults, port }
    }

    /// How many connections did not end as those who had them wanted.
    pub fn cuts(&self) -> u64 {
        self.faults[1..].iter().map(|count| count.load(Ordering::Relaxed)).sum()
    }
}

impl fmt::Display for Proxy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let each: Vec<String> = Fault::NAMES
            .iter()
            .zip(self.faults.iter())
            .map(|(name, count)| format!("{name} {}", count.load(Ordering::Relaxed)))
            .collect();
        f.write_str(&each.join(", "))
    }
}

fn count(faults: &[AtomicU64; Fault::NAMES.len()], fault: Fault) {
    faults[fault.number()].fetch_add(1, Ordering::Relaxed);
}

struct Connection {
    client: TcpStream,
    server: TcpStream,
    fault: Fault,
    /// The end is a reset, and not a farewell.
    reset: bool,
    /// Its fault has come.
    met: AtomicBool,
    /// Held while nothing moves.
    stall: Mutex<()>,
    faults: Arc<[AtomicU64; Fault::NAMES.len()]>,
}

impl Connection {
    fn carry(
        client: TcpStream,
        server: TcpStream,
        fault: Fault,
        reset: bool,
        faults: &Arc<[AtomicU64; Fault::NAMES.len()]>,
    ) {
        for stream in [&client, &server] {
            let _ = stream.set_nodelay(true);
        }
        if fault == Fault::Untouched {
            count(faults, fault);
        }
        let faults = Arc::clone(faults);
        let connection = Arc::new(Connection {
            client,
            server,
            fault,
            reset,
            met: AtomicBool::new(false),
            stall: Mutex::new(()),
            faults,
        });
        let other = Arc::clone(&connection);
        std::thread::spawn(move || connection.requests());
        std::thread::spawn(move || other.answers());
    }

    fn meet(&self) {
        self.met.store(true, Ordering::SeqCst);
        count(&self.faults, self.fault);
    }

    /// Ends it for both. The descriptors are closed when both threads have seen it.
    fn cut(&self) {
        for stream in [&self.client, &self.server] {
            if self.reset {
                let linger = libc::linger { l_onoff: 1, l_linger: 0 };
                // SAFETY: reads one struct, whose size is given; the descriptor is open.
                unsafe {
                    let size = size_of_val(&linger) as libc::socklen_t;
                    libc::setsockopt(
                        stream.as_raw_fd(),
                        libc::SOL_SOCKET,
                        libc::SO_LINGER,
                        (&raw const linger).cast(),
                        size,
                    );
                }
                // Wakes the reader, and says nothing to the other side: closing does.
                let _ = stream.shutdown(Shutdown::Read);
            } else {
                let _ = stream.shutdown(Shutdown::Both);
            }
        }
    }

    fn requests(&self) {
        let mut buffer = [0; 16 * 1024];
        let mut passed = 0;
        loop {
            let read = match (&self.client).read(&mut buffer) {
                Ok(read) if read > 0 => read,
                _ => break,
            };
            let (before, met) = (passed, self.met.load(Ordering::SeqCst));
            passed += read;
            let mut part = &buffer[..read];
            match self.fault {
                Fault::InRequest(bytes) if passed > bytes => {
                    part = &buffer[..bytes - before];
                    let _ = (&self.server).write_all(part);
                    self.meet();
                    break;
                }
                Fault::Unanswered(bytes, length) if passed > bytes && !met => {
                    self.meet();
                    let _ = (&self.server).write_all(part);
                    std::thread::sleep(length);
                    break;
                }
                Fault::Stalled(bytes, length) if passed > bytes && !met => {
                    let _stall = self.stall.lock();
                    self.meet();
                    std::thread::sleep(length);
                }
                Fault::ServerSilent(bytes) if passed > bytes && !met => {
                    self.meet();
                    let _ = self.client.shutdown(Shutdown::Write);
                }
                Fault::ClientSilent(bytes) if passed > bytes && !met => {
                    self.meet();
                    let _ = (&self.server).write_all(part);
                    let _ = self.server.shutdown(Shutdown::Write);
                    // What the client goes on to say is for nobody.
                    while (&self.client).read(&mut buffer).is_ok_and(|read| read > 0) {}
                    break;
                }
                _ => {}
            }
            if (&self.server).write_all(part).is_err() {
                break;
            }
        }
        self.cut();
    }

    fn answers(&self) {
        let mut buffer = [0; 16 * 1024];
        let mut passed = 0;
        loop {
            let read = match (&self.server).read(&mut buffer) {
                Ok(read) if read > 0 => read,
                _ => break,
            };
            let before = passed;
            passed += read;
            let met = self.met.load(Ordering::SeqCst);
            match self.fault {
                Fault::InAnswer(bytes) if passed > bytes => {
                    let _ = (&self.client).write_all(&buffer[..bytes - before]);
                    self.meet();
                    break;
                }
                Fault::Stalled(..) => drop(self.stall.lock()),
                // For nobody: the requests' thread cuts.
                Fault::Unanswered(..) | Fault::ServerSilent(_) if met => continue,
                _ => {}
            }
            if (&self.client).write_all(&buffer[..read]).is_err() {
                break;
            }
        }
        self.cut();
    }
}
