//! TLS, with a scripted server that has it. The certificates are made by certificates/make.sh.

use std::net::{SocketAddr, TcpListener};
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::sync::mpsc;

use nblock::client::Client;
use nblock::error::{Error, ErrorKind};
use nblock::sys::runtime::wait;
use serde_json::{Value, json};
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::rustls::server::WebPkiClientVerifier;
use tokio_rustls::rustls::version::{TLS12, TLS13};
use tokio_rustls::rustls::{RootCertStore, ServerConfig, SupportedProtocolVersion};

use crate::scripted::{lock, options, patient, serve};
use crate::server::{Asked, Connection, Handshake, Scripted, Secured, Server, now, time};

fn file(name: &str) -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/..")).join("tests/rethinkdb/certificates").join(name)
}

fn path(name: &str) -> String {
    file(name).display().to_string()
}

/// A server's side, with one of the certificates that `server.key` belongs to.
struct Side {
    certificate: &'static str,
    /// The authority of the clients that are let in; everybody is where there is none.
    clients_of: Option<&'static str>,
    version: &'static SupportedProtocolVersion,
    /// The most bytes of one record.
    record: Option<usize>,
}

impl Default for Side {
    fn default() -> Side {
        Side { certificate: "server.pem", clients_of: None, version: &TLS13, record: None }
    }
}

impl Side {
    fn config(&self) -> Arc<ServerConfig> {
        let provider = Arc::new(ring::default_provider());
        let config = ServerConfig::builder_with_provider(Arc::clone(&provider));
        let config = config.with_protocol_versions(&[self.version]).unwrap();
        let config = match self.clients_of {
            None => config.with_no_client_auth(),
            Some(authority) => {
                let mut roots = RootCertStore::empty();
                roots.add(CertificateDer::from_pem_file(file(authority)).unwrap()).unwrap();
                let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider);
                config.with_client_cert_verifier(verifier.build().unwrap())
            }
        };
        let chain = vec![CertificateDer::from_pem_file(file(self.certificate)).unwrap()];
        let key = PrivateKeyDer::from_pem_file(file("server.key")).unwrap();
        let mut config = config.with_single_cert(chain, key).unwrap();
        config.max_fragment_size = self.record;
        Arc::new(config)
    }

    fn secured(&self) -> Secured {
        Secured { configs: vec![self.config()], piece: usize::MAX }
    }

    /// A server that grants and releases.
    fn serving(&self) -> Server {
        Server::listen(ipv4(), Some(self.secured()), good)
    }
}

fn ipv4() -> SocketAddr {
    "127.0.0.1:0".parse().unwrap()
}

fn good(_: usize, mut connection: Connection) {
    let _ = connection.welcome().and_then(|()| serve(connection));
}

fn open(url: &str) -> Result<Client, Error> {
    wait(Client::open(Some(url), options(60_000)))
}

/// The error of a client that opens `url`, which must say all of `parts`, and where it was.
fn refused(server: &Server, url: &str, kind: ErrorKind, parts: &[&str]) {
    let error = open(url).err().expect("it must not be let in");
    assert_eq!(error.kind(), kind, "{error}");
    for part in parts {
        assert!(error.message().contains(part), "{part:?} is missing: {error}");
    }
    for raw in ["Context", "OtherError", "EndEntity", "AlertReceived", "docs.rs", "InvalidCertificate"] {
        assert!(!error.message().contains(raw), "that is no wording for people: {error}");
    }
    assert!(!error.message().contains("secret"), "{error}");
    assert!(server.connections() <= 1, "it was tried {} times: {error}", server.connections());
}

/// Handshake, a wait that a change feed ends, grant and release: in records and pieces of any size.
#[test]
fn a_whole_session() {
    let script = |_: usize, mut connection: Connection| {
        let _ = connection.welcome().and_then(|()| -> Scripted {
            let theirs = json!({
                "key_hash": "h", "key": "k", "instance_token": "somebody else's", "expires_at": time(now() + 60.0)
            });
            connection.feeds.extend([theirs.clone(), Value::Null]);
            loop {
                match connection.asked()? {
                    // Free when the feed has said so.
                    (token, Asked::Acquire(_)) if connection.feeds.is_empty() => {
                        connection.answer_done(token, "inserted")?
                    }
                    (token, Asked::Acquire(_)) => connection.answer_kept(token, &theirs)?,
                    (token, Asked::Release(_)) => connection.answer_done(token, "deleted")?,
                }
            }
        });
    };
    for (version, record, piece) in [
        (&TLS13, None, usize::MAX),
        (&TLS12, None, usize::MAX),
        (&TLS13, Some(40), 1),
        (&TLS12, Some(33), 7),
        (&TLS13, None, 5),
    ] {
        let side = Side { version, record, ..Side::default() };
        let server = Server::listen(ipv4(), Some(Secured { configs: vec![side.config()], piece }), script);
        let client = open(&server.url_as("localhost", &format!("?ca={}", path("authority.pem")))).unwrap();
        let lock = lock(&client);
        assert!(wait(lock.lock(patient())).unwrap());
        wait(lock.unlock()).unwrap();
        assert_eq!(server.connections(), 1);
    }
}

#[test]
fn an_address_of_ipv6() {
    // Where the machine has none, the address of IPv6 that stands for one of IPv4.
    let (listen, host) = match TcpListener::bind("[::1]:0") {
        Ok(_) => ("[::1]:0", "[::1]"),
        Err(_) => ("127.0.0.1:0", "[::ffff:127.0.0.1]"),
    };
    let server = Server::listen(listen.parse().unwrap(), Some(Side::default().secured()), good);
    let client = open(&server.url_as(host, &format!("?ca={}", path("authority.pem")))).unwrap();
    assert!(wait(lock(&client).try_lock(Default::default())).unwrap());
    let elsewhere = Side { certificate: "elsewhere.pem", ..Side::default() };
    let server = Server::listen(listen.parse().unwrap(), Some(elsewhere.secured()), good);
    let url = server.url_as(host, &format!("?ca={}", path("authority.pem")));
    refused(&server, &url, ErrorKind::Store, &[host, "db.example"]);
}

#[test]
fn a_certificate_for_another_host() {
    let server = Side { certificate: "elsewhere.pem", ..Side::default() }.serving();
    let url = server.url_as("localhost", &format!("?ca={}", path("authority.pem")));
    refused(&server, &url, ErrorKind::Store, &["localhost:", "is for db.example, not for localhost", "store URL"]);
}

#[test]
fn a_certificate_that_names_no_host() {
    let server = Side { certificate: "nameless.pem", ..Side::default() }.serving();
    let url = server.url_as("localhost", &format!("?ca={}", path("nameless.pem")));
    refused(&server, &url, ErrorKind::Store, &["localhost:", "has no host name", "subjectAltName"]);
}

#[test]
fn an_unknown_authority() {
    let server = Side::default().serving();
    let url = server.url_as("localhost", &format!("?ca={}", path("stranger.pem")));
    refused(&server, &url, ErrorKind::Store, &["localhost:", "not signed by a CA", "stranger.pem"]);
}

#[test]
fn a_certificate_that_ran_out() {
    let server = Side { certificate: "expired.pem", ..Side::default() }.serving();
    let url = server.url_as("localhost", &format!("?ca={}", path("authority.pem")));
    refused(&server, &url, ErrorKind::Store, &["localhost:", "expired", "days ago", "clock"]);
}

/// A server's own certificate in the `ca` file is enough, and only there.
#[test]
fn a_certificate_that_is_signed_by_itself() {
    let side = Side { certificate: "self-signed.pem", ..Side::default() };
    let server = side.serving();
    let client = open(&server.url_as("localhost", &format!("?ca={}", path("self-signed.pem")))).unwrap();
    assert!(wait(lock(&client).try_lock(Default::default())).unwrap());

    let server = side.serving();
    let url = server.url_as("localhost", &format!("?ca={}", path("stranger.pem")));
    refused(&server, &url, ErrorKind::Store, &["localhost:", "self-signed", "ca="]);
}

/// `tls=1` alone: the authorities are the system's, whichever these are.
#[test]
fn the_authorities_of_the_system() {
    let ping = |server: &Server, roots: &str| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_nblock"));
        command.args(["ping"]).env("NBLOCK_URL", server.url_as("localhost", "?tls=1"));
        command.env("SSL_CERT_FILE", file(roots)).env_remove("SSL_CERT_DIR");
        loop {
            let output = command.output().unwrap();
            let said = String::from_utf8(output.stderr).unwrap();
            // The command waits for 5 s, which a machine that is busy may need for something else.
            if !said.contains(" within ") {
                return (output.status.code(), said);
            }
        }
    };
    let server = Side::default().serving();
    assert_eq!(ping(&server, "authority.pem").0, Some(0));
    let (status, said) = ping(&server, "stranger.pem");
    assert!(status != Some(0) && said.contains("not signed by a CA that this system trusts"), "{said}");
    assert!(said.contains("localhost:") && said.contains("ca=/path.pem"), "{said}");

    let server = Side { certificate: "self-signed.pem", ..Side::default() }.serving();
    let (status, said) = ping(&server, "stranger.pem");
    assert!(status != Some(0) && said.contains("localhost:") && said.contains("self-signed"), "{said}");
    assert!(said.contains("ca=/path.pem") && !said.contains("EndEntity"), "{said}");
}

/// In TLS 1.3 the server's verdict comes when the client takes itself to be let in, in 1.2 before.
#[test]
fn certificates_of_clients() {
    for version in [&TLS12, &TLS13] {
        let side = Side { clients_of: Some("authority.pem"), version, ..Side::default() };
        let ca = format!("?ca={}", path("authority.pem"));
        let identity = |name: &str| format!("{ca}&cert={}&key={}", path(name), path("client.key"));

        let server = side.serving();
        let client = open(&server.url_as("localhost", &identity("client.pem"))).unwrap();
        assert!(wait(lock(&client).try_lock(Default::default())).unwrap());

        let server = side.serving();
        let wants = ["localhost:", "client certificate", "cert=/path.pem and key=/path.pem"];
        refused(&server, &server.url_as("localhost", &ca), ErrorKind::Denied, &wants);

        let server = side.serving();
        let url = server.url_as("localhost", &identity("strange-client.pem"));
        refused(&server, &url, ErrorKind::Denied, &["localhost:", "rejected the client certificate", "cert="]);
    }
}

/// A server that begins to want certificates is not asked again and again.
#[test]
fn a_certificate_that_is_wanted_later() {
    let later = Side { clients_of: Some("authority.pem"), ..Side::default() };
    let tls = Secured { configs: vec![Side::default().config(), later.config()], piece: usize::MAX };
    let server = Server::listen(ipv4(), Some(tls), |_, mut connection| {
        // Hangs up on the first acquire.
        let _ = connection.welcome().and_then(|()| connection.asked().map(drop));
    });
    let client = open(&server.url_as("localhost", &format!("?ca={}", path("authority.pem")))).unwrap();
    let error = wait(lock(&client).lock(patient())).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Denied, "{error}");
    assert!(error.message().contains("cert=/path.pem and key=/path.pem"), "{error}");
    // The one that was hung up on, and the one or two (the feed's) that were refused.
    assert!(server.connections() <= 3, "{}", server.connections());
}

/// With few rounds of hashing, where TLS has shown who the server is.
#[test]
fn few_rounds_of_hashing() {
    let server = Server::listen(ipv4(), Some(Side::default().secured()), |_, mut connection| {
        let handshake = Handshake { iterations: 1, ..Handshake::default() };
        let shaken = connection.shake_hands(&handshake).and_then(|()| connection.introduce());
        let _ = shaken.and_then(|()| serve(connection));
    });
    let client = open(&server.url_as("localhost", &format!("?ca={}", path("authority.pem")))).unwrap();
    assert!(wait(lock(&client).try_lock(Default::default())).unwrap());
}

/// A server may hang up without a word of TLS.
#[test]
fn a_server_that_hangs_up_after_the_handshake() {
    let server = Server::listen(ipv4(), Some(Side::default().secured()), |_, mut connection| {
        let _ = connection.greeting();
    });
    let url = server.url_as("localhost", &format!("?ca={}", path("authority.pem")));
    // It may be a proxy before a server that is being started: tried again, and reported in the end.
    let error = wait(Client::open(Some(&url), options(5000))).err().unwrap();
    assert_eq!(error.kind(), ErrorKind::Unreachable, "{error}");
    for part in ["localhost:", "closed the connection", "cert= and key="] {
        assert!(error.message().contains(part), "{part:?} is missing: {error}");
    }
    assert!(server.connections() > 1);
}

/// What is wrong with files is reported before a server is called.
#[test]
fn files_that_cannot_be_used() {
    let server = Side::default().serving();
    let (client, key) = (path("client.pem"), path("client.key"));
    let of_client = |cert: &str, key: &str| format!("?ca={}&cert={cert}&key={key}", path("authority.pem"));
    let missing = path("missing.pem");
    for (options, parts) in [
        (format!("?ca={missing}"), ["missing.pem", "No such file"]),
        (format!("?ca={key}"), ["client.key", "must contain a certificate"]),
        (of_client(&missing, &key), ["missing.pem", "No such file"]),
        (of_client(&key, &key), ["client.key", "must contain a certificate"]),
        (of_client(&client, &missing), ["missing.pem", "No such file"]),
        (of_client(&client, &client), ["client.pem", "must contain a private key"]),
        (of_client(&client, &path("server.key")), ["server.key", "does not belong to the certificate in"]),
    ] {
        refused(&server, &server.url_as("localhost", &options), ErrorKind::Store, &parts);
    }
    assert_eq!(server.connections(), 0);
}

/// Says what a RethinkDB server says to a client that does not speak its protocol.
#[test]
fn tls_to_a_port_without_it() {
    let server = Server::start(|_, mut connection| {
        let _ = connection.send(
            b"ERROR: Received an unsupported protocol version. This port is for RethinkDB queries. Does your client \
              driver version not match the server?\n\0",
        );
    });
    let url = server.url_as("localhost", "?ca=");
    let url = url + &path("authority.pem");
    refused(&server, &url, ErrorKind::Store, &["localhost:", "does not use TLS", "tls=1"]);
}

#[test]
fn a_port_with_tls_without_tls() {
    let server = Side::default().serving();
    refused(&server, &server.url_as("localhost", ""), ErrorKind::Store, &["localhost:", "TLS", "tls=1"]);
}

#[test]
fn a_server_that_says_nothing_of_tls() {
    let (hold, held) = mpsc::channel::<()>();
    let held = std::sync::Mutex::new(held);
    let server = Server::start(move |_, _connection| {
        let _ = held.lock().unwrap().recv();
    });
    let url = server.url_as("localhost", &format!("?ca={}", path("authority.pem")));
    let error = wait(Client::open(Some(&url), options(300))).err().unwrap();
    assert_eq!(error.kind(), ErrorKind::Unreachable, "{error}");
    assert!(error.message().contains("within 300ms"), "{error}");
    drop(hold);
}
