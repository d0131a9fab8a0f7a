//! TLS by rustls: system roots, a file of authorities, or a client's own certificate.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tokio_rustls::rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use tokio_rustls::rustls::client::{WebPkiServerVerifier, verify_server_name};
use tokio_rustls::rustls::crypto::{CryptoProvider, ring, verify_tls12_signature, verify_tls13_signature};
use tokio_rustls::rustls::pki_types::pem::{self, PemObject};
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use tokio_rustls::rustls::server::ParsedCertificate;
use tokio_rustls::rustls::{
    AlertDescription, CertificateError, ClientConfig, DigitallySignedStruct, Error as TlsError, RootCertStore,
    SignatureScheme,
};

use crate::store::{StoreError, StoreErrorKind};
use crate::stores::settings;
use crate::sys::sockets::Socket;

/// What a store URL says of TLS.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tls {
    /// A file with the authorities that are trusted; `None` means the system's roots.
    pub ca: Option<PathBuf>,
    /// The files of the client's own certificate and its key.
    pub identity: Option<(PathBuf, PathBuf)>,
    /// How the engine's URL calls these options.
    pub names: OptionNames,
    pub check: Check,
}

/// What is asked of a server's certificate. Less than a name is for engines whose users know such modes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Check {
    /// A trusted authority has signed it, for the host that the URL names.
    Name,
    /// A trusted authority has signed it, for whatever host.
    Authority,
    /// Nothing: what is sent cannot be read by others, but anybody may be at the other end.
    Nothing,
}

/// The names of options, as messages show them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OptionNames {
    /// What asks for TLS.
    pub tls: &'static str,
    pub ca: &'static str,
    pub cert: &'static str,
    pub key: &'static str,
}

impl OptionNames {
    pub const USUAL: OptionNames = OptionNames { tls: "tls=1", ca: "ca=", cert: "cert=", key: "key=" };
}

/// What makes a plain connection a secured one. Cheap to clone.
#[derive(Clone)]
pub struct Connector {
    inner: TlsConnector,
    tls: Tls,
}

impl Connector {
    /// Reads the certificates. Does not touch the network.
    pub fn new(tls: &Tls) -> Result<Connector, StoreError> {
        Ok(Connector { inner: connector(tls)?, tls: tls.clone() })
    }

    /// Sets TLS up on a connection to `host`, which the server's certificate must name.
    pub async fn secure(&self, socket: Socket, host: &str) -> Result<TlsStream<Socket>, StoreError> {
        let name = ServerName::try_from(host.to_string())
            .map_err(|_| StoreError::bad_config("TLS needs a host name or an address"))?;
        self.inner.connect(name, socket).await.map_err(|error| explain(&error, &self.tls, host))
    }
}

fn connector(tls: &Tls) -> Result<TlsConnector, StoreError> {
    let OptionNames { ca, .. } = tls.names;
    let provider = Arc::new(ring::default_provider());
    let mut roots = RootCertStore::empty();
    let mut pinned = Vec::new();
    match &tls.ca {
        None if tls.check == Check::Nothing => {}
        Some(path) => {
            for certificate in certificates(path)? {
                roots.add(certificate.clone()).map_err(|error| unusable(path, &error.to_string()))?;
                pinned.push(certificate);
            }
        }
        None => {
            // The caller of a program with more rights must not say which authorities that trusts.
            if let Some(name) = settings::ignored(&["SSL_CERT_FILE", "SSL_CERT_DIR"]).first() {
                return Err(StoreError::bad_config(format!(
                    "{name} is set, and this program runs with more rights than its caller: unset it, or name a file \
                     with ca=/path.pem"
                )));
            }
            let found = rustls_native_certs::load_native_certs();
            roots.add_parsable_certificates(found.certs);
            if roots.is_empty() {
                return Err(StoreError::bad_config(format!(
                    "this system has no CA certificates: name a file with {ca}/path.pem"
                )));
            }
        }
    }
    let inner = match tls.check {
        Check::Nothing => None,
        Check::Name | Check::Authority => Some(
            WebPkiServerVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&provider))
                .build()
                .map_err(|error| StoreError::bad_config(format!("could not load the CA certificates: {error}")))?,
        ),
    };
    let names = tls.check == Check::Name;
    let verifier = Arc::new(Verifier { inner, names, pinned, provider: Arc::clone(&provider) });
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| StoreError::bad_config(error.to_string()))?
        .dangerous()
        .with_custom_certificate_verifier(verifier);
    let config = match &tls.identity {
        None => config.with_no_client_auth(),
        Some((certificate, key)) => {
            let chain = certificates(certificate)?;
            let secret = PrivateKeyDer::from_pem_file(key).map_err(|error| match error {
                pem::Error::NoItemsFound => unusable(key, "it must contain a private key (PEM, not encrypted)"),
                other => unusable(key, &other.to_string()),
            })?;
            config.with_client_auth_cert(chain, secret).map_err(|error| match error {
                TlsError::InconsistentKeys(_) => {
                    unusable(key, &format!("its key does not belong to the certificate in {}", certificate.display()))
                }
                other => unusable(key, &other.to_string()),
            })?
        }
    };
    Ok(TlsConnector::from(Arc::new(config)))
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, StoreError> {
    let read = CertificateDer::pem_file_iter(path).and_then(|found| found.collect::<Result<Vec<_>, _>>());
    let certificates = read.map_err(|error| unusable(path, &error.to_string()))?;
    match certificates.is_empty() {
        true => Err(unusable(path, "it must contain a certificate (PEM)")),
        false => Ok(certificates),
    }
}

fn unusable(path: &Path, why: &str) -> StoreError {
    StoreError::bad_config(format!("the file {} cannot be used for TLS: {why}", path.display()))
}

/// What went wrong while TLS was set up with `host`, in words that say what to change.
fn explain(error: &io::Error, tls: &Tls, host: &str) -> StoreError {
    let OptionNames { tls: on, ca, cert, key } = tls.names;
    let Some(failure) = failure(error) else {
        // A server without TLS takes our greeting for a query of an unknown version, and may hang up.
        return match error.kind() {
            // A proxy does so, too, before a server that is being started.
            io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset => StoreError::unreachable(format!(
                "the server closed the connection during the TLS handshake: it may require a client certificate \
                 ({cert} and {key}), or not use TLS on this port"
            )),
            _ => StoreError::unreachable(format!("the connection broke during TLS: {error}")),
        };
    };
    let why = match failure {
        TlsError::AlertReceived(alert) => return refusal(*alert, tls.names),
        TlsError::InvalidMessage(_) => format!(
            "the server does not use TLS on this port: remove {on} and {ca} from the store URL, or name its TLS port"
        ),
        TlsError::InvalidCertificate(why) => wrong_certificate(why, tls, host),
        other => format!("TLS failed: {other}"),
    };
    StoreError::bad_config(why)
}

/// What the other end said of us in an alert, if that is what ended the connection.
///
/// In TLS 1.3 a server's verdict on our certificate comes after we take ourselves to be let in.
pub fn refused(error: &io::Error, names: OptionNames) -> Option<StoreError> {
    match failure(error) {
        Some(TlsError::AlertReceived(alert)) => Some(refusal(*alert, names)),
        _ => None,
    }
}

fn failure(error: &io::Error) -> Option<&TlsError> {
    error.get_ref().and_then(|inner| inner.downcast_ref())
}

/// Asking again would not help, where it is about certificates.
fn refusal(alert: AlertDescription, OptionNames { cert, key, .. }: OptionNames) -> StoreError {
    use AlertDescription as Alert;
    match alert {
        // The second is how TLS 1.2 says it, among other things.
        Alert::CertificateRequired | Alert::HandshakeFailure => StoreError::new(
            StoreErrorKind::Denied,
            format!(
                "the server aborted the TLS handshake ({alert:?}): it seems to require a client certificate: name one \
                 with {cert}/path.pem and {key}/path.pem"
            ),
        ),
        Alert::BadCertificate
        | Alert::UnsupportedCertificate
        | Alert::CertificateRevoked
        | Alert::CertificateExpired
        | Alert::CertificateUnknown
        | Alert::UnknownCA
        | Alert::AccessDenied
        | Alert::DecryptError => StoreError::new(
            StoreErrorKind::Denied,
            format!(
                "the server rejected the client certificate named with {cert} ({alert:?}): it must be valid, and \
                 signed by a CA that the server trusts"
            ),
        ),
        other => StoreError::bad_config(format!("the server aborted the TLS handshake: {other:?}")),
    }
}

fn wrong_certificate(why: &CertificateError, tls: &Tls, host: &str) -> String {
    let option = tls.names.ca;
    let days = |from: UnixTime, to: UnixTime| to.as_secs().saturating_sub(from.as_secs()) / (24 * 60 * 60);
    match why {
        CertificateError::NotValidForNameContext { presented, .. } if presented.is_empty() => {
            format!("the server's certificate has no host name: create one with {host} as subjectAltName")
        }
        CertificateError::NotValidForNameContext { presented, .. } => format!(
            "the server's certificate is for {}, not for {host}: name the host in the store URL as the certificate does",
            presented.iter().map(|name| bare(name)).collect::<Vec<_>>().join(", "),
        ),
        CertificateError::UnknownIssuer => match &tls.ca {
            Some(path) => {
                let path = path.display();
                format!(
                    "the server's certificate is not signed by a CA in {path}, the file named with {option}: add \
                     its CA to the file, or name another file"
                )
            }
            None => format!(
                "the server's certificate is not signed by a CA that this system trusts: name its CA with \
                 {option}/path.pem"
            ),
        },
        CertificateError::ExpiredContext { time, not_after } => format!(
            "the server's certificate expired {} days ago: renew it, or correct this machine's clock",
            days(*not_after, *time)
        ),
        CertificateError::NotValidYetContext { time, not_before } => format!(
            "the server's certificate becomes valid in {} days: correct this machine's clock",
            days(*time, *not_before) + 1
        ),
        CertificateError::Other(other) if other.to_string() == AUTHORITY_AS_SERVER => format!(
            "the server's certificate is self-signed, or is a CA's own certificate: to trust it, name this certificate \
             with {option}/path.pem"
        ),
        other => format!("the server's certificate cannot be used: {other}"),
    }
}

/// How webpki, beneath rustls, says that a certificate is an authority's.
const AUTHORITY_AS_SERVER: &str = "CaUsedAsEndEntity";

/// A name as it stands in a certificate, without what rustls writes around it: `DnsName("a.example")`.
fn bare(name: &str) -> &str {
    let inner = name.split_once('(').and_then(|(_, rest)| rest.strip_suffix(')')).unwrap_or(name);
    inner.trim_matches('"')
}

/// The usual checks; and a server whose very certificate is in the `ca` file is trusted as well.
///
/// RethinkDB's manual has people sign a server's certificate with itself, and such a certificate is an
/// authority's, which the usual checks refuse as a server's own. Of one that is trusted by itself, only the name
/// is looked at: as with any authority that is named, its dates are not.
#[derive(Debug)]
struct Verifier {
    /// `None`: every certificate will do.
    inner: Option<Arc<WebPkiServerVerifier>>,
    /// Whether the certificate must be for the host.
    names: bool,
    pinned: Vec<CertificateDer<'static>>,
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        certificate: &CertificateDer<'_>,
        chain: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        stapled: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, TlsError> {
        let Some(inner) = &self.inner else { return Ok(ServerCertVerified::assertion()) };
        match inner.verify_server_cert(certificate, chain, name, stapled, now) {
            // Names are looked at when all else is right.
            Err(TlsError::InvalidCertificate(
                CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. },
            )) if !self.names => Ok(ServerCertVerified::assertion()),
            Err(TlsError::InvalidCertificate(CertificateError::Other(_) | CertificateError::UnknownIssuer))
                if self.pinned.iter().any(|pinned| pinned == certificate) =>
            {
                if self.names {
                    verify_server_name(&ParsedCertificate::try_from(certificate)?, name)?;
                }
                Ok(ServerCertVerified::assertion())
            }
            verdict => verdict,
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, TlsError> {
        verify_tls12_signature(message, certificate, signature, &self.provider.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, TlsError> {
        verify_tls13_signature(message, certificate, signature, &self.provider.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}
